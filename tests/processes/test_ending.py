"""The end of a process, in programs of its own."""

import subprocess
import sys

import pytest


def ended(program, *arguments):
    """Returns a program that has ended."""
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True,
                          text=True, timeout=60)


SOON = """
import sys, threading, time
from zerojax.processes import ending

def waits_for_ever():
    time.sleep(100)

threading.Thread(target=waits_for_ever, daemon=True).start()
sys.stderr = None
ending.soon("the reason", sys.argv[1] == "stacks", 0.5)
time.sleep(50)
"""


@pytest.mark.parametrize("stacks", ["stacks", "none"])
def test_the_reason_and_the_stacks_are_printed(stacks):
    """To standard error itself: a program may have replaced sys.stderr."""
    done = ended(SOON, stacks)
    assert done.returncode == 1 and done.stderr.startswith("zerojax: the reason\n")
    assert ("in waits_for_ever" in done.stderr) == (stacks == "stacks")


BLOCKED = """
import sys, threading, time
from zerojax.processes import ending

threading.Thread(target=print, args=("x" * 10**7,), daemon=True).start()
time.sleep(0.5)
sys.stderr.write("blocked")
sys.stderr.flush()
if sys.argv[1] == "soon":
    ending.soon("the reason", False, 0.1)
    time.sleep(50)
ending.on_errors(lambda _: None, print)
sys.exit(3)
"""


@pytest.mark.parametrize("how, status", [("soon", 1), ("sys.exit", 3)])
def test_a_process_ends_although_nobody_reads_its_output(how, status, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # Python waits for a lock of its buffer
    with subprocess.Popen([sys.executable, "-c", BLOCKED, how], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stderr.read(7) == b"blocked"
        assert process.wait(20) == status


ENDS = """
import code, os, sys, threading  # the console shows errors like a notebook
from zerojax.processes import ending

class Odd(Exception):
    def __str__(self):
        raise ValueError("no text")

def shown(error):
    code.InteractiveConsole(dict(error=error)).push("raise error")

def caught():
    try:
        sys.exit(4)
    except SystemExit:
        pass

def kept():
    try:
        sys.exit(4)
    except SystemExit as error:
        sys.kept = error

def a_thread_exits():
    thread = threading.Thread(target=sys.exit, args=[4])
    thread.start(), thread.join()

def main():
    BODY

def say(line):
    os.write(1, f"{line}\\n".encode())  # several threads do

ending.on_errors(lambda text: say(f"reported: {text}"), lambda: say("left"))
main()
"""


@pytest.mark.parametrize("body, status, line", [
    ("raise Odd()", 1, "reported: Odd: <exception str() failed>"),
    ("raise ValueError('a\\nb')", 1, "reported: ValueError: a b"),
    ("raise KeyboardInterrupt", 1, "reported: KeyboardInterrupt"),
    ("sys.excepthook = lambda *_: None; raise ValueError('a')", 1, "reported: ValueError: a"),
    ("sys.exit(3)", 3, "reported: SystemExit: 3"),
    ("sys.exit(-1)", 255, "reported: SystemExit: -1"),
    ("sys.exit('no data')", 1, "reported: SystemExit: no data"),
    ("sys.exit()", 0, "left"), ("sys.exit(0)", 0, "left"), ("sys.exit(75)", 75, "left"),
    ("caught()", 0, "left"), ("caught(); sys.exit(0)", 0, "left"),
    ("shown(ValueError())", 0, "left"), ("shown(ValueError()); sys.exit()", 0, "left"),
    ("shown(ValueError()); sys.exit(5)", 5, "reported: SystemExit: 5"),
    ("sys.exit(2**40 + 3)", 3, "reported: SystemExit: 1099511627779"),
    ("sys.exit(256)", 0, "left"), ("caught(); raise SystemExit(0)", 0, "left"),
    ("kept(); raise SystemExit", 0, "left"),
    ("a_thread_exits()", 0, "left"), ("a_thread_exits(); raise SystemExit", 0, "left"),
    ("pass", 0, "left")])
def test_the_end_of_a_program_is_reported(body, status, line):
    """An error or status that a program has handled does not count."""
    done = ended(ENDS.replace("BODY", body))
    assert done.returncode == status and set(done.stdout.splitlines()) - {""} == {line}


THREAD = """
import os, sys, threading, time
from zerojax.processes import ending

def works():
    time.sleep(1)
    print("the thread ends", flush=True)

ending.on_errors(lambda _: os.write(1, b"failed\\n"), lambda: os.write(1, b"left\\n"))
threading.Thread(target=works).start()
if len(sys.argv) > 1:
    sys.exit("an error")
"""


@pytest.mark.parametrize("arguments, lines", [([], ["the thread ends", "left"]),
                                              (["error"], ["failed", "the thread ends"])])
def test_threads_may_go_on_after_the_end_but_not_after_an_error(arguments, lines):
    """A program may train in another thread. Python calls the functions of `atexit` after it."""
    done = ended(THREAD, *arguments)
    found = list(dict.fromkeys(done.stdout.split("\n")))
    assert found[:2] == lines and done.returncode == len(arguments)


UNREAD = """
import os, sys, threading
from zerojax.processes import ending

ending.on_errors(lambda text: os.write(1, f"reported: {text}\\n".encode()), print)
if "shown" in sys.argv:
    try:
        [][0]
    except IndexError:
        sys.excepthook(*sys.exc_info())
else:
    raise ValueError("x" * 10**6)
"""


def test_an_error_is_reported_although_nobody_reads_its_traceback():
    with subprocess.Popen([sys.executable, "-c", UNREAD], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout.read(30) == b"reported: ValueError: xxxxxxxx"
        process.kill()


def test_an_error_that_is_only_shown_ends_nothing():
    done = ended(UNREAD, "shown")
    assert (done.returncode, done.stdout) == (0, "\n") and "IndexError" in done.stderr
