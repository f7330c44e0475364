"""What frames are compared with: pixels that were given, one of the frames, or an image made of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from torchalign._check import message
from torchalign._host import give_back_memory
from torchalign.cube import labels
from torchalign.cube.chunks import is_lazy
from torchalign.cube.labels import CUBE, MASK, Array, Cube
from torchalign.cube.pixels import Pixels, find_nodata
from torchalign.cube.regrid import onto_grid
from torchalign.functional.affine import (
    center_displacement,
    change_origin,
    compose_warps,
    invert_warp,
    transform_points,
)
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.shift_field import move_origin
from torchalign.functional.warp import resample
from torchalign.types import ShiftField

# What `reference=` knows by name, beside the labels of frames.
ReferenceName = Literal["median", "mean", "first", "clearest", "iterative", "previous", "groupwise"]

_READ_BYTES = 2**28  # of raw pixels of a lazy cube held at once, all its frames of a block of rows
_LOAD_BYTES = 2**25  # of these, read at once: dask holds what it reads twice
_REFERENCE_BYTES = 2**26  # of computed pixels held at once for a temporal median or mean
_DECODE_BYTES = 2**23  # of these, decoded and aligned at once
_SORT_BYTES = 2**22  # of these, sorted at once
_MOST_ROUNDS = 8  # of "iterative"; two or three are the rule
_ENOUGH = 0.5  # of the frames aligned with their median, or "iterative" tries to start from the clearest
_FEWEST = 3  # frames that make a median, if there are so many
# Share of the frames; if less are placed by their pairs, a median is taken of all, as they are.
_FEWEST_PLACED = 0.25
STILL = 0.005  # pixels; frames that move by less stay as they are, and "iterative" stops


class Found(NamedTuple):
    """What of an estimate a reference is built from."""

    warp: Tensor  # (T, 2, 3) or (T, 3, 3)
    valid: Tensor  # (T,) bool
    field: ShiftField | None = None  # of local shifts on top of the warps


Estimator = Callable[["ReferenceSource"], Found]


class Pairs(Protocol):
    """What pairs of frames tell, which no reference has a part in."""

    @property
    def found(self) -> Found:
        """Where they place the frames."""

    def prefers(self, first: Found, second: Found) -> bool:
        """Whether the second of two solutions fits them clearly better."""


@dataclass(frozen=True)
class ReferenceSource:
    """Pixels of a reference, as they were given, and what it is called in the report."""

    name: str
    variable: xr.Variable  # over some of time, band, y and x; always y and x
    pixels: Pixels

    @property
    def is_empty(self) -> bool:
        """Whether no pixel is usable; no where that is not known yet, or where each frame has one of its own."""
        if is_lazy(self.variable) or "time" in self.variable.dims:
            return False
        values = self.variable.to_numpy()
        return not (np.isfinite(values) & ~np.isin(values, self.pixels.nodata)).any()


@dataclass(frozen=True)
class FrameReader:
    """The frames as a reference is made of them: NaN wherever a pixel is not to be used."""

    cube: Cube
    pixels: Pixels
    usable: xr.Variable | None  # bool over some of time, y and x
    device: torch.device
    others: tuple[xr.Variable, ...] = ()  # further masks, of files that are read on demand: 0 = not usable

    @property
    def frames(self) -> int:
        """T."""
        return self.cube.sizes["time"]

    def frame(self, number: int) -> Tensor:
        """(C, H, W); all NaN where there is no such frame."""
        values = self.read(slice(number, number + 1))
        return values[0] if len(values) else values.new_full(values.shape[1:], torch.nan)

    def read(self, frames: slice | Array, rows: slice = slice(None)) -> Tensor:
        """(t, C, h, W)."""
        return self.decode(self.load(frames, rows), self.seen(frames, rows))

    def load(self, frames: slice | Array, rows: slice) -> Array:
        """(t, C, h, W), as they are."""
        return labels.load(self.cube.variable, CUBE, time=frames, y=rows)

    def seen(self, frames: slice | Array, rows: slice) -> Array | None:
        """(t or 1, h or 1, W or 1) bool: what is usable; ``None`` where all is."""
        masks = [mask for mask in (self.usable, *self.others) if mask is not None]
        parts = [labels.load(mask, MASK, time=frames, y=rows) != 0 for mask in masks]
        return np.logical_and.reduce(np.broadcast_arrays(*parts)) if parts else None

    def hold(self, rows: slice) -> FrameReader:
        """Of these rows alone, which are in memory from here on."""
        held = xr.DataArray(_hold_rows(self.cube.variable, rows))
        cube = Cube(held, {str(role): role for role in held.dims})
        usable = None if self.usable is None else _hold_rows(self.usable, rows)
        return replace(
            self, cube=cube, usable=usable, others=tuple(_hold_rows(mask, rows) for mask in self.others)
        )

    def centre(self, side: int) -> FrameReader:
        """Of the middle of the frames alone, so many pixels a side at most."""
        starts = {role: max(0, (self.cube.sizes[role] - side) // 2) for role in ("y", "x")}
        window = {role: slice(start, start + side) for role, start in starts.items()}

        def within(mask: xr.Variable) -> xr.Variable:
            return mask.isel({role: window[role] for role in window if mask.sizes.get(role, 1) > 1})

        array = self.cube.array.isel({self.cube.dims[role]: part for role, part in window.items()})
        usable = None if self.usable is None else within(self.usable)
        others = tuple(within(mask) for mask in self.others)
        return replace(self, cube=Cube(array, self.cube.dims), usable=usable, others=others)

    def decode(self, raw: Array, seen: Array | None) -> Tensor:
        """(…, t, C, h, w) from pixels of that shape, and what of them is usable, (…, t or 1, h or 1, w or 1)."""
        values = self.pixels.decode(raw, self.device)
        values.nan_to_num_(torch.nan, torch.nan, torch.nan)  # infinities are not usable either
        if seen is not None:
            values.masked_fill_(~torch.from_numpy(np.array(seen)).to(self.device).unsqueeze(-3), torch.nan)
        return values

    def source(self, name: str, values: Tensor) -> ReferenceSource:
        """A reference of computed pixels, (C, H, W)."""
        host = values.cpu().numpy()
        return ReferenceSource(name, xr.Variable(CUBE[1:], host), Pixels(host.dtype, self.pixels.compute, ()))


def find_reference(reference: Any, reader: FrameReader, estimate: Estimator, pairs: Pairs) -> ReferenceSource:
    """What ``reference`` of :func:`torchalign.align` stands for; ``estimate`` is for ``"iterative"``."""
    if isinstance(reference, (xr.DataArray, np.ndarray)) and reference.ndim == 0:
        reference = getattr(reference, "values", reference)[()]  # a label, `cube.time[3]`
    # dates of cftime, and periods, are those of no common class
    is_label = isinstance(reference, (str, np.generic, int, float)) or hasattr(reference, "strftime")
    if is_label and not isinstance(reference, bool):
        return _make_reference(reference, reader, estimate, pairs)
    return given_pixels(reference, reader.cube, reader.pixels)


def given_pixels(reference: Any, cube: Cube, pixels: Pixels) -> ReferenceSource:
    """A DataArray, an array or a tensor as the reference of a cube; without nodata of its own it has the cube's."""
    labelled = labels.label_axes(reference, "reference", cube, CUBE)
    if labelled.dtype.kind not in "iuf":
        cure = "convert it with .astype"
        raise TypeError(message("reference", "an integer or floating dtype", labelled.dtype, cure))
    labelled, done = onto_grid(labelled, cube)
    variable = labels.match(labelled, "reference", cube, CUBE)
    own = Pixels(labelled.dtype, pixels.compute, find_nodata(labelled) or pixels.nodata)
    name = type(reference).__name__
    return ReferenceSource(f"{name}, {done}" if done else name, variable, own)


def _make_reference(word: Any, reader: FrameReader, estimate: Estimator, pairs: Pairs) -> ReferenceSource:
    name, cube = str(word), reader.cube
    if name in ("median", "mean"):
        return _over_placed(name, reader, pairs)
    if name == "iterative":
        if not reader.frames:
            return reader.source(name, over_time("median", reader))
        return _iterated_median(reader, estimate, pairs)
    number, dates = 0, cube.coordinate("time", local=True)
    if name == "clearest":
        number = _clearest(reader, _over_placed("median", reader, pairs))
    elif name != "first":
        words = get_args(ReferenceName)
        number = labels.find_frame(
            cube.array, cube.dims["time"], word, "reference", words=words, positions=False
        )
    if name != "first" and dates is not None and reader.frames:
        label = labels.label_text(dates.values[number])
        name = f"clearest ({label})" if name == "clearest" else label
    return reader.source(name, reader.frame(number))


# --- over time ---


def _over_placed(word: str, reader: FrameReader, pairs: Pairs) -> ReferenceSource:
    """The median or mean of the frames that their pairs place, each there; of all, as they are, where these are few.

    A frame is part of the median. Where clouds cover half of the frames the median shows pixels of single ones, which
    fit their own frame where it lies: as it came, or, if it was placed before, where it belongs. Pixels that no placed
    frame shows are those of the others, as they are.
    """
    if reader.frames < 2 or 0 in reader.cube.size:
        return reader.source(word, over_time(word, reader))
    found, frames = pairs.found, reader.frames
    placed = int(found.valid.sum())
    if placed < max(min(_FEWEST, frames), _FEWEST_PLACED * frames):
        return reader.source(
            f"{word} (of all frames as they are: pairs place {placed})", over_time(word, reader)
        )
    values = over_time(word, reader, found)
    if placed < frames and bool(values.isnan().any()):
        values = torch.where(values.isnan(), over_time(word, reader), values)
    return reader.source(f"{word} (of {placed} of {frames} frames, placed by their pairs)", values)


def over_time(word: str, reader: FrameReader, found: Found | None = None) -> Tensor:
    """(C, H, W), "median" or "mean" of the usable pixels, by blocks of rows; NaN where there are none.

    With ``found``, of the frames that are valid, aligned.
    """
    frames, bands, height, width = (reader.cube.sizes[role] for role in CUBE)
    compute = reader.pixels.compute
    result = torch.full((bands, height, width), torch.nan, dtype=compute, device=reader.device)
    samples = frames * bands * width  # of one row
    # a lazy cube is read anew for every block of rows: few and large ones, which are then worked on in parts
    read = max(1, _READ_BYTES // max(1, samples * reader.cube.array.dtype.itemsize))
    work = max(1, _REFERENCE_BYTES // max(1, samples * compute.itemsize))
    chosen = np.arange(frames) if found is None else np.flatnonzero(found.valid.cpu().numpy())
    margins = Margins(found, (height, width))
    for first in range(0, height if samples else 0, read):
        last = min(first + read, height)
        held = margins.source(first, last)
        block = reader.hold(held)
        for top in range(first, last, work):
            bottom = min(top + work, last)
            values = result.new_empty(len(chosen), bands, bottom - top, width)
            rows = margins.source(top, bottom)
            within = slice(rows.start - held.start, rows.stop - held.start)
            _fill(values, partial(block.read, rows=within), chosen, rows, top, found)
            result[:, top:bottom] = reduce_over_time(word, values).to(result.dtype)
        del block, values
        give_back_memory()  # before as much is read again
    return result


def _fill(
    values: Tensor,
    read: Callable[[Array], Tensor],
    chosen: Array,
    rows: slice,
    top: int,
    found: Found | None,
) -> None:
    """Put the rows from ``top`` on of the chosen frames into values, (T, C, h, W), a few frames at a time.

    They are made of ``rows`` of the frames, which ``read`` gives.
    """
    row_bytes = values.shape[1] * values.shape[3] * values.itemsize
    step = max(1, _DECODE_BYTES // max(1, row_bytes * (rows.stop - rows.start)))
    for first in range(0, len(chosen), step):
        frames = chosen[first : first + step]
        part = read(frames)
        if found is not None:
            origin = (0.0, float(rows.start))
            warp = change_origin(found.warp[frames].to(part), origin)
            # not bilinear: a median of blurred frames is blurred; NaN where a frame does not reach
            field = found.field
            if field is not None:
                field = move_origin(ShiftField(*(one[frames].to(part) for one in field)), origin)
            part = resample(part, warp, interpolation="bicubic", fill_value=torch.nan, field=field).values
            part = part[:, :, top - rows.start :][:, :, : values.shape[2]]
        values[first : first + step] = part


def _hold_rows(source: xr.Variable, rows: slice) -> xr.Variable:
    """Rows in memory; those of a lazy source part by part along time, into memory that is there already."""
    part = source.isel(y=rows) if "y" in source.dims else source
    if not is_lazy(part) or "time" not in part.dims:
        return part.compute()
    part = part.transpose("time", ...)
    values = np.empty(part.shape, part.dtype)
    step = max(1, _LOAD_BYTES * len(values) // max(1, values.nbytes))
    for first in range(0, len(values), step):
        values[first : first + step] = part[first : first + step].to_numpy()
    return xr.Variable(part.dims, values)


def reduce_over_time(word: str, values: Tensor) -> Tensor:
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


class Margins:
    """Which rows of the frames show up in rows of the aligned frames; the same where nothing is aligned."""

    def __init__(self, found: Found | None, size: tuple[int, int]) -> None:
        self.height, self.width = size
        self.back: Tensor | None = None  # reference → moving
        self.beyond = 0  # rows that local shifts reach further
        if found is not None:
            if found.field is not None and len(found.field.coefficients):
                self.beyond = math.ceil(float(found.field.coefficients.abs().amax()))
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
        first = min(max(0, int(rows.min().floor()) - 3 - self.beyond), top)
        return slice(first, max(min(self.height, int(rows.max().ceil()) + 4 + self.beyond), bottom))


# --- "iterative" ---


def _iterated_median(reader: FrameReader, estimate: Estimator, pairs: Pairs) -> ReferenceSource:
    """Estimate against the median of what was aligned before, until the frames stop moving; the last median.

    Where shading moves with the sun, medians of aligned frames wander off: the first median is kept, unless the last one
    fits pairs of frames clearly better.
    """
    plain = _over_placed("median", reader, pairs)
    first = found = estimate(plain)
    median = torch.empty(0)
    # displaced or clouded so much that their median shows nothing
    if int(found.valid.sum()) < _ENOUGH * reader.frames:
        clearest = reader.source("clearest", reader.frame(_clearest(reader, plain)))
        found = max((found, estimate(clearest)), key=lambda one: int(one.valid.sum()))
    rounds, previous = 0, found
    while rounds < _MOST_ROUNDS:
        rounds, found = rounds + 1, _anchor(found)
        if int(found.valid.sum()) < min(_FEWEST, reader.frames):  # too few: all frames as they are
            return reader.source("median (of all frames as they are)", over_time("median", reader))
        if rounds > 1 and _is_still(found, previous, reader.cube.size):
            break
        previous, median = found, over_time("median", reader, found)
        found = estimate(reader.source("median", median))
    sound = int(first.valid.sum()) >= _ENOUGH * reader.frames
    if sound and not pairs.prefers(first, found):
        return replace(plain, name=f"{plain.name}; iterative did not fit their pairs better")
    return reader.source(f"iterative (median of the aligned stack, {rounds} rounds)", median)


def _is_still(found: Found, previous: Found, size: tuple[int, int]) -> bool:
    if not bool((found.valid == previous.valid).all()):
        return False
    steps = [center_displacement(one.warp[one.valid].double(), size) for one in (found, previous)]
    return bool((steps[0] - steps[1]).square().mean().sqrt() <= STILL)


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
    rows = found.valid[:, None, None]
    anchored = torch.where(rows, anchored, warp).to(found.warp.dtype)
    if found.field is None:
        return found._replace(warp=anchored)
    coefficients = found.field.coefficients
    common = coefficients[found.valid].median(0).values
    field = found.field._replace(
        coefficients=torch.where(rows[..., None], coefficients - common, coefficients)
    )
    return Found(
        anchored, found.valid, move_origin(field, center_displacement(middle, (1, 1)).to(coefficients))
    )


# --- one of the frames ---


def _clearest(reader: FrameReader, source: ReferenceSource) -> int:
    """The frame with most ground: the share of its usable pixels times its correlation with the median.

    Clouds that no mask tells of, other seasons and displaced frames correlate less.
    """
    median = torch.as_tensor(source.variable.values, device=reader.device).nanmean(0)  # (H, W)
    best, clearest = -1.0, 0
    for number in range(reader.frames):
        frame = reader.frame(number).nanmean(0)
        ground = (frame.isfinite() & median.isfinite())[None]
        correlation = normalized_cross_correlation(
            frame.nan_to_num(0.0)[None], median.nan_to_num(0.0)[None], ground
        )
        clearness = float(ground.double().mean()) * float(correlation.clamp(min=0))
        if clearness > best:
            best, clearest = clearness, number
    return clearest
