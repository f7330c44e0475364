"""What frames are compared with: pixels that were given, one of the frames, or an image made of all of them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from torchalign._check import message
from torchalign._chunks import is_lazy
from torchalign._host import give_back_memory
from torchalign._labelled import (
    CUBE,
    MASK,
    Array,
    Cube,
    Pixels,
    describe,
    find_nodata,
    label_axes,
    load,
    match,
)
from torchalign.functional.affine import (
    center_displacement,
    change_origin,
    compose_warps,
    invert_warp,
    transform_points,
)
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.warp import resample

__all__ = ["ReferenceName", "ReferenceSource", "decode_reference", "find_reference", "label_text"]

# What `reference=` knows by name, beside the labels of frames.
ReferenceName = Literal["median", "mean", "first", "clearest", "iterative"]

_READ_BYTES = 2**28  # of raw pixels of a lazy cube held at once, all its frames of a block of rows
_LOAD_BYTES = 2**25  # of these, read at once: dask holds what it reads twice
_REFERENCE_BYTES = 2**26  # of computed pixels held at once for a temporal median or mean
_DECODE_BYTES = 2**23  # of these, decoded and aligned at once
_SORT_BYTES = 2**22  # of these, sorted at once
_MOST_ROUNDS = 8  # of "iterative"; two or three are the rule
_ENOUGH = 0.5  # of the frames aligned with their median, or "iterative" tries to start from the clearest
_FEWEST = 3  # frames that make a median
_STILL = 0.005  # pixels; "iterative" stops when the frames move by less, in the root mean square


class Found(NamedTuple):
    """What of an estimate a reference is built from."""

    warp: Tensor  # (T, 2, 3) or (T, 3, 3)
    valid: Tensor  # (T,) bool


Estimator = Callable[["ReferenceSource"], Found]


@dataclass(frozen=True)
class ReferenceSource:
    """Pixels of a reference, as they were given, and what it is called in the report."""

    name: str
    variable: xr.Variable  # over some of time, band, y and x; always y and x
    pixels: Pixels

    @property
    def roles(self) -> tuple[str, ...]:
        """The axes of what an aligner is given."""
        return CUBE if "time" in self.variable.dims else CUBE[1:]


def decode_reference(pixels: Pixels, raw: Array, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(C, H, W), or (t, C, H, W) with one per frame, from an array with these axes; ``shape`` is (C, H, W)."""
    values = pixels.decode(raw, device)
    return values.expand(*values.shape[:-3], *shape)


def find_reference(
    reference: Any,
    cube: Cube,
    pixels: Pixels,
    usable: xr.Variable | None,
    device: torch.device,
    estimate: Estimator,
) -> ReferenceSource:
    """What the argument ``reference`` of :func:`torchalign.align` stands for.

    Args:
        reference: a word, a label of time, or pixels.
        cube: the frames.
        pixels: how they are decoded.
        usable: bool over some of time, y and x.
        device: where to compute.
        estimate: estimates all frames against a reference, for ``"iterative"``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no frame of that label, or several; pixels that do not fit.
    """
    if isinstance(reference, (xr.DataArray, np.ndarray)) and reference.ndim == 0:
        reference = getattr(reference, "values", reference)[()]  # a label, `cube.time[3]`
    is_label = isinstance(reference, (str, np.generic, datetime.date, int, float))
    if is_label and not isinstance(reference, bool):
        return _make_reference(reference, cube, pixels, usable, device, estimate)
    labelled = label_axes(reference, "reference", cube, CUBE)
    if labelled.dtype.kind not in "iuf":
        cure = "convert it with .astype"
        raise TypeError(message("reference", "an integer or floating dtype", labelled.dtype, cure))
    variable = match(labelled, "reference", cube, CUBE)
    given = Pixels(labelled.dtype, pixels.compute, find_nodata(labelled) or pixels.nodata)
    return ReferenceSource(type(reference).__name__, variable, given)


def _make_reference(
    word: Any,
    cube: Cube,
    pixels: Pixels,
    usable: xr.Variable | None,
    device: torch.device,
    estimate: Estimator,
) -> ReferenceSource:
    def source(name: str, values: Tensor) -> ReferenceSource:
        host = values.cpu().numpy()
        return ReferenceSource(name, xr.Variable(CUBE[1:], host), Pixels(host.dtype, pixels.compute, ()))

    name = str(word)
    if name in ("median", "mean"):
        return source(name, over_time(name, cube, pixels, usable, device))
    if name == "iterative":
        if not cube.sizes["time"]:
            return source(name, over_time("median", cube, pixels, usable, device))
        values, rounds = _settle(cube, pixels, usable, device, estimate, source)
        return source(f"iterative (median of the aligned stack, {rounds} rounds)", values)
    number = 0
    if name == "clearest":
        number = _clearest(cube, pixels, usable, device)
    elif name != "first":
        number = _frame_number(word, cube)
    if name not in get_args(ReferenceName):
        name = label_text(cube.array[cube.dims["time"]].values[number])
    elif name == "clearest" and cube.dims["time"] in cube.array.coords and cube.sizes["time"]:
        name = f"clearest ({label_text(cube.array[cube.dims['time']].values[number])})"
    frame = visible(cube, pixels, usable, device, time=slice(number, number + 1))
    shape = tuple(cube.sizes[role] for role in CUBE[1:])
    return source(name, frame[0] if len(frame) else frame.new_full(shape, torch.nan))


def visible(
    cube: Cube, pixels: Pixels, usable: xr.Variable | None, device: torch.device, **parts: slice
) -> Tensor:
    """(t, C, h, w), NaN wherever a pixel is not to be used."""
    raw = load(cube.variable, CUBE, **parts)
    seen = None if usable is None else load(usable, MASK, **parts)
    return _mark(raw, seen, pixels, device)


def _mark(raw: Array, seen: Array | None, pixels: Pixels, device: torch.device) -> Tensor:
    values = pixels.decode(raw, device)
    values.nan_to_num_(torch.nan, torch.nan, torch.nan)  # infinities are not usable either
    if seen is not None:
        values.masked_fill_(~torch.from_numpy(np.array(seen)).to(device)[:, None], torch.nan)
    return values


# --- over time ---


def over_time(
    word: str,
    cube: Cube,
    pixels: Pixels,
    usable: xr.Variable | None,
    device: torch.device,
    found: Found | None = None,
) -> Tensor:
    """(C, H, W), "median" or "mean" of the usable pixels, by blocks of rows; NaN where there are none.

    Args:
        word: ``"median"`` or ``"mean"``.
        cube: the frames.
        pixels: how they are decoded.
        usable: bool over some of time, y and x.
        device: where to compute.
        found: warps to align the frames with; only valid ones are taken. ``None``: all frames, as they are.
    """
    frames, bands, height, width = (cube.sizes[role] for role in CUBE)
    result = torch.full((bands, height, width), torch.nan, dtype=pixels.compute, device=device)
    samples = frames * bands * width  # of one row
    # a lazy cube is read anew for every block of rows: few and large ones, which are then worked on in parts
    read = max(1, _READ_BYTES // max(1, samples * cube.array.dtype.itemsize))
    work = max(1, _REFERENCE_BYTES // max(1, samples * pixels.compute.itemsize))
    chosen = np.arange(frames) if found is None else np.flatnonzero(found.valid.cpu().numpy())
    margins = _Margins(found, (height, width))
    for first in range(0, height if samples else 0, read):
        last = min(first + read, height)
        block = _Block.load(cube, pixels, usable, margins.source(first, last), device)
        for top in range(first, last, work):
            bottom = min(top + work, last)
            values = result.new_empty(len(chosen), bands, bottom - top, width)
            _fill(values, block, chosen, top, margins, found)
            result[:, top:bottom] = _reduce(word, values).to(result.dtype)
        del block, values
        give_back_memory()  # before as much is read again
    return result


@dataclass(frozen=True)
class _Block:
    """Rows of all frames, as they were read."""

    raw: Array  # (T, C, h, W)
    seen: Array | None  # (T or 1, h or 1, W or 1)
    top: int  # the number of its first row
    pixels: Pixels
    device: torch.device

    @classmethod
    def load(
        cls, cube: Cube, pixels: Pixels, usable: xr.Variable | None, rows: slice, device: torch.device
    ) -> _Block:
        raw = _load_rows(cube.variable, CUBE, rows)
        seen = None if usable is None else _load_rows(usable, MASK, rows)
        return cls(raw, seen, rows.start, pixels, device)

    def decode(self, frames: Array, rows: slice) -> Tensor:
        """(len(frames), C, h, W), NaN wherever a pixel is not to be used."""
        within = slice(rows.start - self.top, rows.stop - self.top)
        seen = self.seen
        if seen is not None:
            seen = seen if len(seen) == 1 else seen[frames]
            seen = seen if seen.shape[1] == 1 else seen[:, within]
        return _mark(self.raw[frames, :, within], seen, self.pixels, self.device)


def _fill(
    values: Tensor, block: _Block, chosen: Array, top: int, margins: _Margins, found: Found | None
) -> None:
    """Put the rows from ``top`` on of the chosen frames into values, (T, C, h, W), a few frames at a time."""
    rows = margins.source(top, top + values.shape[2])
    row_bytes = values.shape[1] * values.shape[3] * values.itemsize
    step = max(1, _DECODE_BYTES // max(1, row_bytes * (rows.stop - rows.start)))
    for first in range(0, len(chosen), step):
        frames = chosen[first : first + step]
        part = block.decode(frames, rows)
        if found is not None:
            warp = change_origin(found.warp[frames].to(part), (0.0, float(rows.start)))
            # not bilinear: a median of blurred frames is blurred; NaN where a frame does not reach
            part = resample(part, warp, interpolation="bicubic", fill_value=torch.nan).values
            part = part[:, :, top - rows.start :][:, :, : values.shape[2]]
        values[first : first + step] = part


def _load_rows(source: xr.Variable, roles: Sequence[str], rows: slice) -> Array:
    """``load(source, roles, y=rows)``; a lazy one part by part along time, into memory that is there already."""
    if not is_lazy(source) or "time" not in source.dims:
        return load(source, roles, y=rows)
    part = source.isel(y=rows) if "y" in source.dims else source
    shape = tuple(part.sizes.get(role, 1) for role in roles)
    values = np.empty(shape, source.dtype)
    step = max(1, _LOAD_BYTES * shape[0] // max(1, values.nbytes))
    for first in range(0, shape[0], step):
        frames = slice(first, first + step)
        values[frames] = load(part, roles, time=frames)
    return values


def _reduce(word: str, values: Tensor) -> Tensor:
    """(T, C, h, W) → (C, h, W); on the CPU, some pixels at a time."""
    pixels = values.flatten(1)
    step = _SORT_BYTES // max(1, len(values) * values.itemsize)
    parts = [pixels] if values.is_cuda else pixels.split(max(1, step), 1)  # type: ignore[no-untyped-call]  # torch has no types for it
    if word == "mean":
        reduced = [part.nanmean(0, dtype=torch.float64) for part in parts]
    else:
        reduced = [_median_of_series(part.T) for part in parts]
    return torch.cat(reduced).view(values.shape[1:])


def _median_of_series(values: Tensor) -> Tensor:
    """(N, T) → (N,); of an even number of values the mean of the two in the middle."""
    series = values.contiguous().nan_to_num(torch.inf)
    if series.is_cuda:
        series = series.sort(1).values
    else:
        series.numpy().sort(axis=1)  # in place, and ten times as fast as torch's
    count = torch.searchsorted(series, series.new_full((len(series), 1), torch.inf))  # of what is no NaN
    below, above = series.gather(1, (count - 1).clamp(min=0) // 2), series.gather(1, count // 2)
    return ((below + above) / 2).masked_fill(count == 0, torch.nan).squeeze(1)


class _Margins:
    """Which rows of the frames show up in rows of the aligned frames; the same where nothing is aligned."""

    def __init__(self, found: Found | None, size: tuple[int, int]) -> None:
        self.height, self.width = size
        self.back: Tensor | None = None  # reference → moving
        if found is not None:
            back = invert_warp(found.warp[found.valid].double().cpu())
            self.back = back[back.isfinite().flatten(-2).all(-1)]

    def source(self, top: int, bottom: int) -> slice:
        """Rows of the frames, with what the kernel reaches over; some row at least."""
        if self.back is None:
            return slice(top, bottom)
        right, low = float(self.width - 1), float(bottom - 1)
        corners = torch.tensor([(0.0, top), (right, top), (0.0, low), (right, low)], dtype=torch.float64)
        rows = transform_points(self.back, corners)[..., 1]
        rows = torch.cat((rows.flatten(), corners[:, 1])).nan_to_num(0.0, float(self.height), 0.0)
        first = min(max(0, int(rows.min().floor()) - 3), top)
        return slice(first, max(min(self.height, int(rows.max().ceil()) + 4), bottom))


# --- "iterative" ---


def _settle(
    cube: Cube,
    pixels: Pixels,
    usable: xr.Variable | None,
    device: torch.device,
    estimate: Estimator,
    source: Callable[[str, Tensor], ReferenceSource],
) -> tuple[Tensor, int]:
    """Estimate against the median of what was aligned before, until the frames stop moving; the last median."""
    size, frames = (cube.sizes["y"], cube.sizes["x"]), cube.sizes["time"]
    median = over_time("median", cube, pixels, usable, device)
    found = estimate(source("median", median))
    # displaced or clouded so much that their median shows nothing
    if int(found.valid.sum()) < _ENOUGH * frames:
        number = _clearest(cube, pixels, usable, device)
        frame = visible(cube, pixels, usable, device, time=slice(number, number + 1))[0]
        found = max((found, estimate(source("clearest", frame))), key=lambda one: int(one.valid.sum()))
    rounds, previous = 0, found
    while rounds < _MOST_ROUNDS:
        rounds, found = rounds + 1, _anchor(found)
        if int(found.valid.sum()) < min(_FEWEST, frames):  # too few for a median: all frames as they are
            return over_time("median", cube, pixels, usable, device), rounds
        if rounds > 1 and _is_still(found, previous, size):
            break
        previous, median = found, over_time("median", cube, pixels, usable, device, found)
        found = estimate(source("median", median))
    return median, rounds


def _is_still(found: Found, previous: Found, size: tuple[int, int]) -> bool:
    if not bool((found.valid == previous.valid).all()):
        return False
    steps = [center_displacement(one.warp[one.valid].double(), size) for one in (found, previous)]
    return bool((steps[0] - steps[1]).square().mean().sqrt() <= _STILL)


def _anchor(found: Found) -> Found:
    """Relative to the median of the valid frames' motions, which is what "not displaced" is to mean.

    A reference made from the aligned frames could otherwise wander off with all of them, round by round.
    """
    if not bool(found.valid.any()):
        return found
    warp = found.warp.double()
    if warp.shape[-2] == 3:
        warp = warp / warp[..., 2:, 2:]
    ordered = warp[found.valid].sort(0).values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    anchored = compose_warps(warp, invert_warp(middle).expand_as(warp))
    # what was not aligned stays as it came
    return found._replace(warp=torch.where(found.valid[:, None, None], anchored, warp).to(found.warp.dtype))


# --- one of the frames ---


def _clearest(cube: Cube, pixels: Pixels, usable: xr.Variable | None, device: torch.device) -> int:
    """The frame with most ground: the share of its usable pixels times its correlation with the median.

    Clouds that no mask tells of, other seasons and displaced frames correlate less.
    """
    median = over_time("median", cube, pixels, usable, device).nanmean(0)  # (H, W)
    best, clearest = -1.0, 0
    for number in range(cube.sizes["time"]):
        frame = visible(cube, pixels, usable, device, time=slice(number, number + 1))[0].nanmean(0)
        ground = (frame.isfinite() & median.isfinite())[None]
        correlation = normalized_cross_correlation(
            frame.nan_to_num(0.0)[None], median.nan_to_num(0.0)[None], ground
        )
        worth = float(ground.double().mean()) * float(correlation.clamp(min=0))
        if worth > best:
            best, clearest = worth, number
    return clearest


def _frame_number(label: Any, cube: Cube) -> int:
    """The one frame of that label; a date is that of all frames of the day, and nothing is near enough."""
    dim = cube.dims["time"]
    if isinstance(label, np.datetime64) or type(label) is datetime.date:
        label = str(label)  # its unit is its resolution
    matches: list[int] = []
    if dim in cube.array.coords:
        numbers = xr.DataArray(np.arange(cube.sizes["time"]), {dim: cube.array[dim]}, [dim])
        with suppress(KeyError, TypeError, ValueError):
            matches = numbers.sel({dim: label}).values.ravel().tolist()
    if len(matches) != 1:
        words = ", ".join(map(repr, get_args(ReferenceName)))
        expected = f"{words} or the label of exactly one frame"
        got = f"{label!r}, that of {len(matches)} among {describe(cube.array, dim)}"
        cure = f"write the label of {dim!r} in full, or pass a frame, datacube.isel({dim}=0)"
        raise ValueError(message("reference", expected, got, cure))
    return matches[0]


def label_text(label: Hashable | np.generic) -> str:
    """A time coordinate's entry as text; a date in ISO 8601, as short as it can be."""
    return str(np.datetime_as_string(label, unit="auto") if isinstance(label, np.datetime64) else label)
