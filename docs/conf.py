"""The site: `python -m sphinx -W --keep-going -n docs site`, offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "torchalign"
author = "The torchalign developers"
copyright = author
release = version = metadata.version("torchalign")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torchalign"
html_static_path: list[str] = ["static"]
html_css_files = ["site.css"]

# notebooks are pages with the outputs they were committed with; `notebooks/run.py` executes them in CI
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and units, which types do not
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Yields", "returns_style")]

# Objects of torchalign must resolve, but for private ones and names of types; those of other projects cannot.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!torchalign\.).*"),
    (r"py:data", r".*"),
    (r"py:.*", r"torchalign\.(.*\.)?_\w+"),
]


def copy_sources() -> None:
    """Pages that live elsewhere in the repository appear on the site under one name each."""
    pages = HERE / "_generated"
    (pages / "notebooks").mkdir(parents=True, exist_ok=True)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, pages / "notebooks" / notebook.name)
    (pages / "changelog.md").write_text((ROOT / "CHANGELOG.md").read_text())
    benchmarks = (ROOT / "benchmarks/README.md").read_text()
    # scripts are no pages
    (pages / "benchmarks.md").write_text(re.sub(r"\[([\w.]+\.py)\]\(\1\)", r"`\1`", benchmarks))
    (pages / "cli.md").write_text(command_line())


def command_line() -> str:
    """The help of every command, as the program prints it."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": path, "NO_COLOR": "1"}
    commands = ("", "demo", "info", "align", "apply", "weights")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "torchalign", *filter(None, [command]), "--help"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for command in commands
    ]
    parts = ['# Command line\n\n`pip install ".[cli,io]"` brings the command `torchalign`.\n']
    for command, process in zip(commands, running, strict=True):
        text, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"torchalign {command} --help failed")
        parts.append(f"## `torchalign{' ' * bool(command)}{command}`\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def visit_math(self: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw by themselves: a page of this site fetches nothing."""
    display = "block" if node.tagname == "math_block" else "inline"
    mathml = convert(node.astext(), display=display)
    self.body.append(f'<div class="formula">{mathml}</div>' if display == "block" else mathml)
    raise _skip()


def _skip() -> Exception:
    from docutils.nodes import SkipNode

    return SkipNode()


def setup(app: Any) -> None:
    """Formulas by :func:`visit_math`."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))


html_math_renderer = "mathml"
copy_sources()
