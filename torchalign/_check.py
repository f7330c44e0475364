"""Argument checks and their wording: what was expected, what came, and the cure. Host only, no maths.

Public functions and Modules call them, once a call. What is called from there takes its arguments as they are.
All raise TypeError for another kind of thing or another dtype, ValueError for a value, a shape or a device.
"""

from __future__ import annotations

import inspect
import numbers
import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args, overload

import torch
from torch import Tensor, nn

Option = TypeVar("Option")
Number = TypeVar("Number", bound=float | None)
Owner = TypeVar("Owner", bound=nn.Module)
Given = ParamSpec("Given")
Returned = TypeVar("Returned")

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def message(name: str, expected: str, got: object, cure: str) -> str:
    """The one wording of every complaint.

    >>> message("max_translation", "a number > 0", -1, "give pixels")
    'max_translation: expected a number > 0, got -1; give pixels'
    """
    return f"{name}: expected {expected}, got {got}; {cure}"


def require(what: str, extra: str, *packages: str) -> None:
    """The packages that ``what`` needs must be installed; ``extra`` brings them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        cure = f'pip install "torchalign[{extra}]"'
        expected = f"the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise ImportError(message(what, expected, "no such package", cure))


def check_floating(name: str, tensor: object, shape: str = "", cure: str = "") -> None:
    """``tensor`` must be a tensor of a floating dtype; ``shape`` says in words what is expected of its shape."""
    if not isinstance(tensor, Tensor):
        cure = cure or "wrap it with torch.as_tensor, or use ta.align for xarray"
        raise TypeError(message(name, f"a torch.Tensor {shape}".rstrip(), type(tensor).__name__, cure))
    if tensor.dtype not in _FLOATING:
        expected = f"a floating dtype {shape}" if cure else "a floating dtype"
        cure = cure or "convert it with .float(), or use ta.align, which restores the dtype"
        raise TypeError(message(name, expected, tensor.dtype, cure))


def check_option(name: str, value: Option, choices: Any) -> Option:
    """``value`` must be one of a ``Literal``'s arguments; returned as given."""
    allowed = get_args(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(message(name, f"one of {allowed}", repr(value), "choose one of these"))
    return value


def check_kind(
    name: str, value: object, kind: Any, expected: str, cure: str, *, optional: bool = True
) -> None:
    """``value`` must be an instance of ``kind``, ``expected`` in words (or ``None`` where ``optional``)."""
    if not isinstance(value, kind) and not (value is None and optional):
        got = f"{value!r:.60} ({type(value).__name__})"
        raise TypeError(message(name, f"{expected}{', or None' * optional}", got, cure))


def check_path(name: str, path: object) -> Path:
    """``path`` must be one, or text."""
    kinds = (str, os.PathLike)
    check_kind(name, path, kinds, "a path, as text or a pathlib.Path", "give one", optional=False)
    return Path(path)  # type: ignore[arg-type]  # as was checked


def check_fill(name: str, value: Any) -> None:
    """``value`` must be a real number, NaN among them, or ``None``."""
    if not (isinstance(value, numbers.Real) and value != value):
        check_number(name, value, optional=True)


def check_bool(name: str, value: object) -> None:
    """``value`` must be ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(message(name, "True or False", repr(value), "give a bool"))


def check_number(
    name: str,
    value: Number,
    *,
    minimum: float = float("-inf"),
    maximum: float = float("inf"),
    inclusive: bool = True,
    optional: bool = False,
) -> Number:
    """``value`` must be a real number within bounds (or ``None`` where ``optional``); returned as a float."""
    if value is None and optional:
        return value
    bounds = f"a number {'≥' if inclusive else '>'} {minimum:g} and ≤ {maximum:g}{' or None' * optional}"
    given: object = value
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(message(name, bounds, f"{given!r} ({type(given).__name__})", "give a plain number"))
    number = float(given)
    above = number >= minimum if inclusive else number > minimum
    if not (above and number <= maximum):
        raise ValueError(message(name, bounds, value, "give a number within these bounds"))
    return number  # type: ignore[return-value]  # a float, of which Number is one


def check_whole(name: str, value: object, *, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
    """``value`` must be a whole number within bounds; returned as an int."""
    expected = f"a whole number from {minimum} to {maximum}"
    if isinstance(value, bool):
        raise TypeError(message(name, expected, f"{value!r} (bool)", "give an int"))
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # that it can be told is being tried
    except TypeError:  # arrays have the method, too
        got = f"{value!r} ({type(value).__name__})"
        raise TypeError(message(name, expected, got, "give an int")) from None
    if not minimum <= number <= maximum:
        raise ValueError(message(name, expected, number, "give a number within these bounds"))
    return number


def check_cube(cube: Tensor) -> None:
    """A floating cube (..., T, C, H, W)."""
    check_floating("cube", cube)
    if cube.ndim < 4:
        cure = "add what is missing: cube[None] of one (C, H, W), cube[:, None] of one band (T, H, W)"
        raise ValueError(message("cube", "shape (..., T, C, H, W)", tuple(cube.shape), cure))
    if min(cube.shape[-3:]) < 1:
        cure = "drop the empty dimension's source"
        raise ValueError(message("cube", "at least one band and one pixel", tuple(cube.shape), cure))


def check_reference(reference: Tensor, cube: Tensor) -> Tensor:
    """A reference (..., C, H, W), or one per frame (..., T, C, H, W), that fits ``cube``.

    Returns:
        (..., 1 or T, C, H, W), with as many dimensions as ``cube``.
    """
    check_floating("reference", reference)
    if reference.dtype != cube.dtype:
        cure = "convert it: reference.to(cube.dtype)"
        raise TypeError(message("reference", f"the cube's dtype {cube.dtype}", reference.dtype, cure))
    check_device("reference", reference, cube)
    one = (*cube.shape[:-4], *cube.shape[-3:])
    shape = tuple(reference.shape)
    if len(shape) == cube.ndim and shape == tuple(cube.shape):  # ndim first, or export pins T where T == C
        return reference
    if shape == one:
        return reference.unsqueeze(-4)
    if shape == tuple(cube.shape[-3:]):  # one reference for every series of a batch
        return reference.reshape(*(1,) * (cube.ndim - 3), *shape)
    expected = f"shape {one}, or {tuple(cube.shape)} for one per frame"
    cure = "same bands, same grid as the cube"
    if shape == (*one[:-3], 1, *one[-3:]):
        cure = f"pass the frame, reference[{':, ' * (len(one) - 3)}0]"
    raise ValueError(message("reference", expected, shape, cure))


def check_mask(name: str, mask: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """A bool mask that broadcasts to ``shape``; returned as given."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        cure = "a cloud mask with 1 = cloud becomes `clouds == 0`"
        raise TypeError(message(name, "a bool tensor, True = usable", kind, cure))
    check_device(name, mask, like)
    fits = mask.ndim <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        expected = f"a shape that broadcasts to {tuple(shape)}"
        cure = "one value per frame and pixel, no band axis"
        raise ValueError(message(name, expected, tuple(mask.shape), cure))
    return mask


def check_warp(name: str, warp: Tensor, batch: Sequence[int], like: Tensor) -> None:
    """A warp (..., T, 2, 3) or (..., T, 3, 3) for frames of batch shape ``batch``."""
    check_floating(name, warp)
    check_device(name, warp, like)
    if tuple(warp.shape) not in ((*batch, 2, 3), (*batch, 3, 3)):
        expected = f"shape {(*batch, 2, 3)} or {(*batch, 3, 3)}"
        cure = "one matrix per frame, moving → reference"
        raise ValueError(message(name, expected, tuple(warp.shape), cure))


def check_crop(crop_center: Any) -> tuple[int, int] | None:
    """``None``, an int, or (h, w), each ≥ 1; returned as (h, w)."""
    if crop_center is None:
        return None
    values = tuple(crop_center) if isinstance(crop_center, Iterable) else (crop_center, crop_center)
    if len(values) != 2:
        expected, cure = "an int ≥ 1, or two (h, w)", "give whole pixels"
        raise ValueError(message("crop_center", expected, repr(crop_center), cure))
    return check_whole("crop_center", values[0]), check_whole("crop_center", values[1])


def check_bands(rgb_bands: object) -> tuple[int, int, int]:
    """Three band indices, returned as ints."""
    expected, cure = "three band indices (R, G, B)", "give three integers, e.g. (3, 2, 1)"
    complaint = message("rgb_bands", expected, repr(rgb_bands), cure)
    if isinstance(rgb_bands, str) or not isinstance(rgb_bands, Iterable):
        raise TypeError(complaint)
    try:
        bands = tuple(operator.index(band) for band in rgb_bands)
    except TypeError:
        raise TypeError(complaint) from None
    if len(bands) != 3:
        raise ValueError(complaint)
    return bands[0], bands[1], bands[2]


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """``tensor`` must be on the device of the cube ``like``."""
    if tensor.device != like.device:
        cure = f"move it: {name}.to(cube.device)"
        raise ValueError(message(name, f"the cube's device {like.device}", tensor.device, cure))


# --- arguments that several public functions share: written once, shown by each ---


def _said_of_arguments(documented: Any) -> dict[str, str]:
    """What a docstring says of each argument, as it is indented there."""
    text = inspect.cleandoc(documented.__doc__ or "")
    section = re.search(r"(?<=^Args:\n).*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    said = re.split(r"\n(?=    \S)", section.group()) if section else []
    return {line.partition(":")[0].strip(): line for line in said}


@overload
def like(
    shown: Callable[Concatenate[Owner, Given], Any],
) -> Callable[[Callable[..., Returned]], Callable[Concatenate[Any, Given], Returned]]: ...
@overload
def like(shown: Callable[Given, Any]) -> Callable[[Callable[..., Returned]], Callable[Given, Returned]]: ...
def like(shown: Any) -> Any:
    """A function (or method) that takes what another takes: type checkers know it, ``help`` shows and explains it."""

    def show(function: Any) -> Any:
        returned = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(shown).replace(return_annotation=returned)
        text = inspect.cleandoc(function.__doc__ or "")
        head, gap, rest = re.split(r"(\n\n(?=Returns:|Raises:|Example:)|\Z)", text, maxsplit=1)
        function.__doc__ = "\n".join((f"{head}\n\nArgs:", *_said_of_arguments(shown).values())) + gap + rest
        return function

    return show


def show_shared(kind: type, source: type, names: Container[str]) -> None:
    """Have ``kind`` show the options of ``source`` that its constructor takes as ``**shared``, as if written there."""
    constructor: Any = vars(kind)["__init__"]
    signature = inspect.signature(constructor)
    own = [parameter for name, parameter in signature.parameters.items() if name != "shared"]
    if len(own) == len(signature.parameters):
        return
    options = inspect.signature(source).parameters
    shown = {name: options[name] for name in options if name in names and name not in signature.parameters}
    constructor.__signature__ = signature.replace(parameters=[*own, *shown.values()])
    said = _said_of_arguments(source)
    text = "\n".join(said[name] for name in shown if name in said)
    if kind.__doc__ and text:
        lines = inspect.cleandoc(kind.__doc__).splitlines()
        kind.__doc__ = "\n".join(text if "**shared:" in line else line for line in lines)
