"""The site: `python -m sphinx -W -n docs site`, offline."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "torchalign"
author = "The torchalign developers"
copyright = author
release = version = metadata.version("torchalign")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torchalign"
html_static_path: list[str] = []

# notebooks are pages with the outputs they were committed with; `notebooks/run.py` executes them in CI
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and units, which types do not
autosummary_generate = False
napoleon_google_docstring = True
napoleon_use_rtype = False

# a formula in a page without the network: MathJax is not fetched while building, only while reading
nitpicky = True
nitpick_ignore_regex = [("py:.*", r".*")]  # references to other projects' objects are not resolved offline


def _copy_sources() -> None:
    """Pages that live elsewhere in the repository appear on the site under one name each."""
    pages = HERE / "_generated"
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "notebooks").mkdir(parents=True)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, pages / "notebooks" / notebook.name)
    shutil.copy(ROOT / "CHANGELOG.md", pages / "changelog.md")
    shutil.copy(ROOT / "benchmarks" / "README.md", pages / "benchmarks.md")


_copy_sources()
