"""The API pages of the site name every public function and class."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import torchalign

PAGES = Path(__file__).parents[1] / "docs" / "api"
PUBLIC = ("", ".io", ".plot", ".html", ".report", ".datasets", ".training", ".types")


def documented() -> set[str]:
    text = "".join(page.read_text() for page in PAGES.glob("*.md"))
    return set(re.findall(r"auto(?:function|class|exception|module):: ([\w.]+)", text))


@pytest.mark.parametrize("end", PUBLIC)
def test_every_public_name_has_its_place(end):
    name = f"torchalign{end}"
    module = importlib.import_module(name)
    missing = []
    for member in module.__all__:
        thing = getattr(module, member)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        home = thing.__module__
        if not {f"{name}.{member}", f"torchalign.{member}", f"{home}.{member}", home} & documented():
            missing.append(member)
    assert missing == []


def test_every_module_of_functions_has_its_place():
    folder = Path(torchalign.__file__).parent / "functional"
    modules = {f"torchalign.functional.{path.stem}" for path in folder.glob("[!_]*.py")}
    assert modules - documented() == set()
