"""Tables fit the width that there is."""

import re

import pytest

from zerojax import tables
from zerojax.tables import Sheet

PATHS = ("params/blocks/attention/key/kernel", "params/head/kernel", "step")
SHEET = Sheet("a title", ("leaf", "shape", "bytes/device", "empty"),
              tuple((path, "(2048, 16, 128)", f"{10**n:,}", "") for n, path in enumerate(PATHS, 6)),
              ("too small", "", "too small"))


def printed(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    return str(SHEET)


@pytest.mark.parametrize("width", [50, 80, 160])
def test_a_table_fits_its_terminal(monkeypatch, width):
    lines = printed(monkeypatch, width).splitlines()
    assert max(map(len, lines)) <= width


def test_cells_wrap_between_words_only(monkeypatch):
    narrow, wide = printed(monkeypatch, 50), printed(monkeypatch, 160)
    assert PATHS[0] in wide and PATHS[0] not in narrow
    assert {"blocks", "attention", "kernel"} <= set(re.findall("[a-z]+", narrow))


def test_numbers_are_aligned_on_the_right(monkeypatch):
    ends = {line.index(number) + len(number) for line in printed(monkeypatch, 160).splitlines()
            for number in re.findall(r"\d+,\d{3},\d{3}", line)}
    assert len(ends) == 1


def test_equal_notes_are_one_footnote(monkeypatch):
    text = printed(monkeypatch, 160)
    assert text.count("too small") == 1 and text.splitlines()[-1] == "1: too small"
    marked = [line.split()[0] for line in text.splitlines() if re.search(r"\d  +1$", line)]
    assert marked == [PATHS[0], PATHS[2]]


def test_a_column_without_text_is_left_out(monkeypatch):
    assert "empty" not in printed(monkeypatch, 160)


@pytest.mark.parametrize("cell", ["params/[lora]/w", "[/x]", ":smile:", "参数/核"])
def test_cells_are_no_markup(monkeypatch, cell):
    monkeypatch.setenv("COLUMNS", "80")
    assert str(Sheet(cell, ("a", cell), ((cell, "x"),))).count(cell) == 3


def test_text_with_digits_is_no_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = str(Sheet("", ("", ""), (("versions", "jax 0.12.0, " * 9), ("metrics", "0.25"))))
    assert max(map(len, text.splitlines())) <= 60
    assert re.search(r"metrics +0\.25$", text, re.MULTILINE)


def test_a_word_wider_than_a_line_is_divided(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = str(Sheet("", ("", ""), (("data", "x" * 200),)))
    assert max(map(len, text.splitlines())) <= 60 and text.count("x") == 200
    monkeypatch.setattr(tables, "WORD", 7)
    assert str(Sheet("", ("", ""), (("data", "核" * 200),))).count("核") == 200


def test_a_dumb_terminal_and_a_pipe_show_all(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any file for a terminal
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = Sheet("", ("", ""), (("a" * 70, "b" * 70),))
    monkeypatch.setattr(tables, "WORD", 100)
    assert "a" * 70 in str(wide) and "b" * 70 in str(wide) and "…" not in str(wide)


def test_a_notebook_scrolls_in_place_of_wrapping(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    html = SHEET._repr_html_()
    assert "white-space: pre;" in html and "overflow-x: auto" in html
    assert PATHS[0] in html


def test_a_notebook_wraps_prose():
    prose = tables.html("1 < 2: " + "word " * 60)
    assert "white-space: pre-wrap" in prose and "1 &lt; 2: word" in prose and "\n" not in prose


def test_prose_wraps_at_the_width_of_the_terminal(monkeypatch):
    prose = "word " * 60
    for columns, most in (("60", 60), ("300", tables.PROSE)):
        monkeypatch.setenv("COLUMNS", columns)
        longest = max(map(len, tables.text(prose).splitlines()))
        assert most - 5 <= longest <= most
