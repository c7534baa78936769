"""The site: `make docs` builds it from the Markdown files, the examples and the docstrings.

The source folder is the root of the repository, so that a relative link leads to the same place on
the site and on a code host. The build needs no network.
"""

import contextlib
import importlib.metadata
import inspect
import io
import json
import os
import pathlib
import re

from docutils import nodes
from docutils.parsers.rst import Directive
from myst_parser.parsers.sphinx_ import MystParser
from sphinx import addnodes

import zerojax
from zerojax import cli

os.environ["COLUMNS"] = "100"  # the width of the help texts
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}
FENCE = "~~~~~~"  # no example contains it

project = "zerojax"
copyright = "the authors of zerojax"
version = release = importlib.metadata.version("zerojax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
source_suffix = {".md": "markdown", ".ipynb": "notebook", **dict.fromkeys(LANGUAGES, "code")}
include_patterns = ["*.md", "docs/**.md", "benchmarks/*.md", "examples/**", "notebooks/*.ipynb"]
exclude_patterns = [".*", "**/.*", "**/__pycache__", "docs/_build", "tests", "zerojax"]
myst_heading_anchors = 4
# types of other packages, because there is no network, and internal types in annotations
INTERNAL = ["checkpoint.manifest.Manifest", "hlo.program.Program", "hlo.schedule.Run",
            "plan.reading.Reading", "policy.Policy", "train.state.Model"]
nitpick_ignore = [("py:class", f"zerojax.{name}") for name in INTERNAL]
nitpick_ignore_regex = [("py:.*", r"(?!zerojax\b).*")]

html_theme = "furo"
html_title = "zerojax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # index.html, which leads to docs/index.html
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
default_role = "zerojax"  # the single backticks of docstrings
maximum_signature_line_length = 88
napoleon_attr_annotations = False  # the signature of a class shows them
napoleon_numpy_docstring = False
napoleon_use_param = False  # several parameters may share a description
python_use_unqualified_type_names = True


class CodeParser(MystParser):
    """Makes a page of a file with code."""

    supported = ("code",)

    def parse(self, inputstring, document):
        path = pathlib.Path(document["source"])
        language = LANGUAGES[path.suffix]
        super().parse(f"# {path.name}\n\n{fenced(language, inputstring)}", document)


class NotebookParser(MystParser):
    """Makes a page of a notebook with its outputs."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        name = pathlib.Path(document["source"]).name
        parts = [part for cell in json.loads(inputstring)["cells"] for part in shown(cell)]
        super().parse("\n\n".join([*parts, f"[Download {name}](path:{name})"]), document)


def fenced(language, text):
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"


def shown(cell):
    """Yields the source and the outputs of a notebook's cell as Markdown."""
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else fenced("python", source)
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        text = "".join(output.get("text") or data.get("text/plain", ""))
        if "image/png" in data:
            yield f"![](data:image/png;base64,{data['image/png'].strip()})"
        elif text.strip():
            yield fenced("text", re.sub(r"\x1b\[[\d;]*m", "", text))


def public_names():
    """Returns full names by the names that docstrings use, such as `zj.Loss` and `Zero.init`."""
    names = {}
    for name in zerojax.__all__:
        names[name] = f"zerojax.{name}"
        members = inspect.getmembers(getattr(zerojax, name), inspect.isfunction)
        names |= {f"{name}.{m}": f"zerojax.{name}.{m}" for m, _ in members if m[0] != "_"}
    return names


def reference(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Marks code in a docstring, with a link if it is a public name."""
    literal = nodes.literal(rawtext, text)
    known = NAMES.get(text.removeprefix("zj.").removeprefix("zerojax."))
    if known is None:
        return [literal], []
    docname = inliner.document.settings.env.docname
    return [addnodes.pending_xref(rawtext, literal, refdomain="py", reftype="obj", reftarget=known,
                                  refdoc=docname, refexplicit=True)], []


NAMES = public_names()


class CommandHelp(Directive):
    """Shows the help text of the `zerojax` command, or of one of its subcommands."""

    optional_arguments = 1

    def run(self):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([*self.arguments, "--help"])
        text = shown.getvalue()
        return [nodes.literal_block(text, text, language="text")]


def with_recipes(app, docname, source):
    """Makes the recipes subpages of their index, in its order."""
    if docname == "docs/recipes/index":
        pages = re.findall(r"\((\w+)\.md\)", source[0])
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *pages, "```", ""])


def without_links_to_folders(app, doctree):
    """Leaves only the text of links to folders and of links out of the site, to tests."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        _, path = app.env.relfn2path(link["reftarget"])
        if link["reftype"] == "myst" and pathlib.Path(path).is_dir():
            link.replace_self(link.children)


def plain_defaults(app, what, name, obj, options, signature, returns):
    """Writes the defaults of dataclasses as code."""
    if signature:
        signature = re.sub(r"Precision\(params=.*?, keep=\(\)\)", "Precision()", signature)
        return signature.replace("<factory>", "{}"), returns


def prepare(app, what, name, obj, options, lines):
    """Turns a docstring into what napoleon and reStructuredText require, before napoleon."""
    text = indented_code("\n".join(lines))
    text = re.sub(r"(`[\w.]+`)(?=\w)", r"\1\\ ", text)  # the "s" in `ShapeDtypeStruct`s
    lines[:] = separate(text).split("\n")


def indented_code(text):
    """Marks indented paragraphs as code."""
    return re.sub(r"^(\S.*\n)\n(?=    )", r"\1\n::\n\n", text, flags=re.MULTILINE)


def separate(text):
    """Repeats a description that several attributes share, because each has an entry of its own."""
    shared = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)", re.MULTILINE)
    head, mark, rest = text.partition("Attributes:\n")
    rest = shared.sub(lambda m: "\n".join(m[1] + name + m[3] for name in m[2].split(", ")), rest)
    return head + mark + rest


def setup(app):
    app.add_source_parser(CodeParser)
    app.add_source_parser(NotebookParser)
    app.add_role("zerojax", reference)
    app.add_directive("zerojax-help", CommandHelp)
    app.connect("source-read", with_recipes)
    app.connect("doctree-read", without_links_to_folders)
    app.connect("autodoc-process-docstring", prepare, priority=400)  # napoleon has 500
    app.connect("autodoc-process-signature", plain_defaults)
