"""The house stays light: few lines, short functions, one home for a name, no questions to the host in the maths."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest

import torchalign
from torchalign.aligner import Aligner, SharedOptions

ROOT = Path(torchalign.__file__).parent

# Lines of the whole package, and of a function's body (without its docstring) in functional/ and anywhere.
# (Wanted are 17,500 before the capabilities of the second edition: a ratchet.)
LINES, BODY_OF_MATHS, BODY = 32_100, 60, 100
# Parameters of a function that is not public: options are handed down in one piece.
PARAMETERS = 9
# Names of functions and classes that more than one module defines at its top level.
REPEATED = 5
# Where tensors lie, whether they may be read, whether sizes are symbols: `_host` alone asks.
QUESTIONS = re.compile(r"\b(is_cuda|is_symbol|is_compiling|is_on_host)\b|\.device\.type\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache  # by the worker that runs these tests, not by each that collects them
def trees():
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))
    }


def functions(tree):
    """Every function of a module, at whatever depth, with its qualified name."""
    todo = [(node, "") for node in tree.body]
    while todo:
        node, outer = todo.pop()
        name = f"{outer}.{node.name}" if hasattr(node, "name") else outer
        if isinstance(node, Function):
            yield name.lstrip("."), node
        # (expressions hold no statements)
        todo += [(child, name) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]


def body_length(node):
    """Lines from the first statement after the docstring to the last."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def count_parameters(node):
    own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in own)


def test_lines_of_the_package():
    assert sum(len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")) <= LINES


def test_functions_are_short():
    long = {}
    for path, tree in trees().items():
        limit = BODY_OF_MATHS if path.startswith("functional/") else BODY
        for name, node in functions(tree):
            if body_length(node) > limit:
                long[f"{path}: {name}"] = body_length(node)
    assert long == {}


def test_internal_functions_take_few_parameters():
    many = {}
    for path, tree in trees().items():
        if path.startswith(
            "kernels/"
        ):  # what is launched takes nothing but tensors and numbers, in one flat list
            continue
        for name, node in functions(tree):
            internal = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
            if internal and count_parameters(node) > PARAMETERS:
                many[f"{path}: {name}"] = count_parameters(node)
    assert many == {}


def test_one_thing_has_one_name():
    homes = defaultdict(set)
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, (Function, ast.ClassDef)) and not node.name.startswith("__"):
                homes[node.name].add(path)
    repeated = {name: sorted(paths) for name, paths in homes.items() if len(paths) > 1}
    assert len(repeated) <= REPEATED, repeated


def test_the_maths_does_not_ask_where_it_runs():
    asked = []
    for path in sorted((ROOT / "functional").glob("*.py")):
        asked += [
            f"{path.name}: {line.strip()}" for line in path.read_text().splitlines() if QUESTIONS.search(line)
        ]
    assert asked == []


@pytest.mark.parametrize("kind", [torchalign.PCC, torchalign.ECC, torchalign.LGM])
def test_shared_options_are_declared_once_and_shown_by_every_method(kind):
    shared = {
        name: option
        for name, option in inspect.signature(Aligner.__init__).parameters.items()
        if name != "self"
    }
    # what a type checker knows of **shared is what the base class takes
    known = {name: getattr(annotation, "__forward_arg__", annotation) for name, annotation in
             SharedOptions.__annotations__.items()}  # fmt: skip
    assert known == {name: option.annotation for name, option in shared.items()}
    signature = inspect.signature(kind)
    assert list(signature.parameters)[-len(shared) :] == list(shared)
    for name, option in shared.items():
        assert signature.parameters[name] == option
        assert f"{name}: " in kind.__doc__
        assert getattr(kind(), name) == option.default
    assert not any(option.kind is option.VAR_KEYWORD for option in signature.parameters.values())
    assert "shared" not in inspect.signature(kind.__init__).parameters
    with pytest.raises(TypeError, match="no_such_option"):
        kind(no_such_option=1)
