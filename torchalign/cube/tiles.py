"""Scenes larger than memory in space: estimated from tiles of full resolution, resampled and written row by row.

A translation of the ground moves every tile alike, so the tiles' own estimates are combined by a robust mean,
weighted by their predicted errors (Huber's weights, iterated; Huber 1964, doi:10.1214/aoms/1177703732). A tile of
clouds or of water says so by its status and does not count; one that is wrong and does not say so is weighted down.
Of affine motions the corners of the tiles are fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from torchalign._check import message
from torchalign._host import give_back_memory
from torchalign.cube.georeference import metres_per_pixel
from torchalign.cube.gridding import Reading
from torchalign.cube.labels import Array, Cube, find_frame, label_text
from torchalign.cube.pixels import Pixels
from torchalign.cube.run import WarpFrames
from torchalign.cube.solution import build_report, report_fields
from torchalign.cube.writing import FileWriter, WriteOptions, plan_files
from torchalign.functional.affine import (
    center_displacement,
    change_origin,
    identity_warp,
    invert_warp,
    transform_points,
)
from torchalign.local import Local
from torchalign.types import Estimate, Status, combine

__all__ = ["LargeStack", "align_large", "count_steps"]

_TILE = 512  # pixels along each side
_ACROSS = 5  # tiles, at most, along each side
_FLOOR = 0.01  # pixels; to what tiles are trusted to agree
_HUBER = 1.5  # scales, from where on a tile is weighted down
_OUTLIER = 0.5  # pixels from the others, from where on a tile does not agree
_ROUNDS = 20
_ROW_BYTES = 2**26  # of computed pixels of a block of rows
_MARGIN = 4  # rows that a kernel reaches over


class LargeStack(NamedTuple):
    """A stack whose pixels stay in the files."""

    cube: Cube  # with all labels, and no pixels
    readings: Sequence[Reading]
    masked: bool
    pixels: Pixels
    device: torch.device

    @classmethod
    def of(
        cls, array: xr.DataArray, readings: Sequence[Reading], masked: bool, device: torch.device
    ) -> LargeStack:
        """Of what :func:`~torchalign.cube.rasters.plan_stack` found."""
        cube = Cube.of(array)
        pixels = Pixels.of(cube)
        if pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 2:  # nobody has looked how large they are
            pixels = replace(pixels, compute=torch.float64)
        return cls(cube, readings, masked, pixels, device)

    def tiles(self, frame: int, rows: slice, columns: Sequence[slice]) -> Tensor:
        """(n, C, h, w) floats, NaN wherever a pixel is not to be used."""
        reading = self.readings[frame]
        raw = reading.pixels(rows)
        values = self.pixels.decode(np.stack([raw[:, :, part] for part in columns]), self.device)
        if self.masked:
            usable = reading.usable(rows) != 0
            seen = np.stack([usable[None, :, part] for part in columns])
            values.masked_fill_(~torch.from_numpy(seen).to(self.device), torch.nan)
        return values


def align_large(
    stack: LargeStack,
    module: nn.Module,
    reference: Any,
    folder: Path,
    options: WriteOptions,
    advance: Callable[[int], object],
) -> tuple[list[Path], xr.Dataset]:
    """See :func:`torchalign.io.align_scenes`."""
    number = _reference_number(stack.cube, reference)
    motion = str(getattr(module, "motion", "translation"))
    if any(isinstance(part, Local) for part in module.modules()):
        cure = "leave Local out, or align a cube in memory"
        raise ValueError(message("aligner", "a motion without local shifts", "Local", cure))
    if motion == "homography":
        cure = "estimate an affine motion, or align a cube in memory"
        raise ValueError(message("aligner", "a motion up to affine", motion, cure))
    files = plan_files(stack.cube, folder, options)
    found = _estimate_frames(stack, module, number, motion, advance)
    time = stack.cube.coordinate("time")
    name = str(number) if time is None else label_text(time.values[number])
    fields = report_fields(found, None, stack.cube.size, metres_per_pixel(stack.cube))
    attrs = {
        "aligner": repr(module),
        "reference": name,
        "tiles": sum(len(columns) for _, columns in _grid(stack.cube.size)),
    }
    report = build_report(fields, stack.cube, attrs)
    how: dict[str, Any] = {name: getattr(module, name, default) for name, default in
           (("interpolation", "bilinear"), ("padding_mode", "border"), ("fill_value", None))}  # fmt: skip
    operation = WarpFrames(stack.pixels, stack.device, None, **how)
    for frame, file in enumerate(files):
        with FileWriter(file) as writer:
            _write_frame(stack, frame, found.warp[frame : frame + 1], operation, writer, advance)
    return [file.path for file in files], report


def _reference_number(cube: Cube, reference: Any) -> int:
    if isinstance(reference, str) and reference == "first":
        return 0
    if isinstance(reference, str) and reference in ("median", "mean", "iterative", "clearest", "groupwise"):
        cure = "name a frame, or make the reference's pixels first and align a cube of dask chunks"
        expected = "'first', or the label of one frame, of scenes larger than memory"
        raise ValueError(message("reference", expected, repr(reference), cure))
    return find_frame(cube.array, cube.dims["time"], reference, "reference", words=("first",))


def count_steps(size: tuple[int, int], frames: int, bands: int) -> int:
    """How often :func:`align_large` tells that it goes on."""
    blocks = len(_row_blocks(size, bands))
    return frames * (len(_grid(size)) + blocks)


def _grid(size: tuple[int, int]) -> list[tuple[slice, list[slice]]]:
    """Rows of tiles, and the columns in each; the whole of a small frame."""

    def along(length: int) -> list[slice]:
        side = min(length, _TILE)
        count = max(1, min(_ACROSS, length // _TILE))
        starts = (
            [round(start) for start in np.linspace(0, length - side, count + 2)[1:-1]]
            if count < length / side
            else [0]
        )
        return [slice(start, start + side) for start in (starts or [0])]

    columns = along(size[1])
    return [(rows, columns) for rows in along(size[0])]


def _estimate_frames(
    stack: LargeStack, module: nn.Module, number: int, motion: str, advance: Callable[[int], object]
) -> Estimate:
    """(T,) rows."""
    found: list[list[Estimate]] = [[] for _ in stack.readings]
    origins: list[tuple[int, int]] = []
    with torch.no_grad():
        for rows, columns in _grid(stack.cube.size):
            still = stack.tiles(number, rows, columns)
            origins += [(part.start, rows.start) for part in columns]
            for frame in range(len(stack.readings)):
                moving = still if frame == number else stack.tiles(frame, rows, columns)
                only = getattr(module, "estimate", None)
                estimate = only(moving, still) if only else module(moving, still)[1]
                found[frame].append(estimate.map(lambda tensor: tensor.cpu()))
                advance(1)
        size = (rows.stop - rows.start, columns[0].stop - columns[0].start)
        limit = float(getattr(module, "max_translation", np.inf))
        combined = [
            _combine_tiles(combine(torch.cat, parts), origins, size, stack.cube.size, motion, limit)
            for parts in found
        ]
    return combine(torch.cat, combined)


def _combine_tiles(
    tiles: Estimate,
    origins: Sequence[tuple[int, int]],
    size: tuple[int, int],
    whole: tuple[int, int],
    motion: str,
    limit: float,
) -> Estimate:
    """One row, of n tiles."""
    status = _why_not(tiles)
    warp = identity_warp(dtype=torch.float64)[None]
    sigma, used = float("inf"), tiles.valid
    if status == Status.OK:
        chosen = torch.nonzero(tiles.valid)[:, 0]
        own = torch.cat([
            change_origin(tiles.warp[i : i + 1].double(), (-float(origins[i][0]), -float(origins[i][1])))
            for i in chosen.tolist()
        ])  # fmt: skip
        if len(origins) == 1:
            fitted, apart, sigma = own[0], torch.zeros(1, dtype=torch.float64), float(tiles.sigma[0])
        else:
            corner = torch.tensor([origins[i] for i in chosen.tolist()], dtype=torch.float64)
            fitted, apart, sigma = _fit_tiles(own, corner, size, tiles.sigma[chosen].double(), motion)
        agree = apart <= max(_OUTLIER, 3 * float(apart.median()))
        if float((apart <= _OUTLIER).double().mean()) < 0.5:
            status = Status.AMBIGUOUS
        elif float(center_displacement(fitted, whole).norm()) > limit:
            status = Status.TOO_FAR
        else:
            warp, used = fitted[None], torch.zeros_like(tiles.valid)
            used[chosen[agree]] = True
    score, before = (values[used].mean()[None] if bool(used.any()) else values[:1] for values in tiles[1:3])
    numbers = torch.tensor([sigma if status == Status.OK else float("inf")], dtype=torch.float64)
    covariance = torch.diag_embed(numbers.square().expand(2))[None]
    codes = torch.tensor([int(status)])
    stage = tiles.stage.max()[None] if status == Status.OK else torch.tensor([-1])
    kind = tiles.warp.dtype
    return Estimate(warp.to(kind), score, before, numbers.to(kind), covariance.to(kind), codes, stage)


def _why_not(tiles: Estimate) -> Status:
    """OK where enough tiles are; else what most of those with texture say."""
    seen = tiles.status[tiles.status != Status.NO_TEXTURE]
    if not len(seen):
        return Status.NO_TEXTURE
    if int(tiles.valid.sum()) >= max(1, 0.2 * len(seen)):
        return Status.OK
    return Status(int(seen[seen != 0].mode().values))


def _fit_tiles(
    warps: Tensor, corners: Tensor, size: tuple[int, int], sigma: Tensor, motion: str
) -> tuple[Tensor, Tensor, float]:
    """The motion (2, 3) of all tiles, how far each is from it in pixels, and the error of the whole.

    Args:
        warps: (n, 2, 3), each in the pixels of the whole frame.
        corners: (n, 2), (x, y) of the tiles' first pixels.
        size: (H, W) of a tile.
        sigma: (n,), predicted errors in pixels.
        motion: of the aligner.
    """
    height, width = size
    box = torch.tensor(
        [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)], dtype=torch.float64
    )
    points = corners[:, None] + box  # (n, 4, 2)
    there = transform_points(warps, points)
    prior = 1 / (sigma.square() + _FLOOR**2)
    weight, apart = prior, torch.zeros_like(prior)
    fitted = warps[0]
    translation = motion == "translation"
    for _ in range(_ROUNDS):
        if translation:
            step = ((there - points).mean(1) * weight[:, None]).sum(0) / weight.sum()
            fitted = torch.cat([torch.eye(2, dtype=torch.float64), step[:, None]], 1)
        else:
            middle = points.mean((0, 1))
            flat = torch.cat([points - middle, torch.ones_like(points[..., :1])], -1).flatten(0, 1)
            root = weight.sqrt().repeat_interleave(4)[:, None]
            solved = torch.linalg.lstsq(flat * root, (there - middle).flatten(0, 1) * root).solution.T
            linear = solved[:, :2]
            fitted = torch.cat([linear, (solved[:, 2] + middle - linear @ middle)[:, None]], 1)
        apart = (transform_points(fitted[None], points) - there).square().sum(-1).mean(1).sqrt()
        scale = max(float(apart.median()) * 1.4826, _FLOOR)
        weight = prior * (_HUBER * scale / apart.clamp(min=1e-12)).clamp(max=1.0)
    spread = float(((weight * apart.square()).sum() / weight.sum()).sqrt()) / max(1, len(apart) - 1) ** 0.5
    return fitted, apart, max(float(weight.sum()) ** -0.5, spread)


# --- rows ---


def _row_blocks(size: tuple[int, int], bands: int) -> list[slice]:
    height, width = size
    step = max(16, _ROW_BYTES // max(1, 4 * width * bands))
    return [slice(first, min(first + step, height)) for first in range(0, height, step)]


def _write_frame(
    stack: LargeStack,
    frame: int,
    warp: Tensor,
    operation: WarpFrames,
    writer: FileWriter,
    advance: Callable[[int], object],
) -> None:
    reading, (height, width) = stack.readings[frame], stack.cube.size
    back = invert_warp(warp.double())
    nearest = replace(operation, pixels=replace(stack.pixels, nodata=()), interpolation="nearest",
                      padding_mode="zeros", fill_value=0.0)  # fmt: skip
    for rows in _row_blocks(stack.cube.size, stack.cube.sizes["band"]):
        source = _source_rows(back, rows, height, width)
        local = change_origin(warp, (0.0, float(source.start)))
        cut = slice(rows.start - source.start, rows.stop - source.start)
        raw = reading.pixels(source)
        codes = reading.usable(source) if stack.masked else None
        usable = None if codes is None else torch.from_numpy(codes != 0)[None].to(stack.device)
        with torch.no_grad():
            values, _ = operation.run(raw[None], stack.device, local, usable)
            moved: Array | None = None
            if codes is not None:
                own = replace(nearest, pixels=replace(nearest.pixels, dtype=codes.dtype))
                moved = own.run(codes[None, None], stack.device, local, None)[0][0, 0, cut]
        writer.write(values[0][:, cut], moved, rows)
        del raw, values
        give_back_memory()
        advance(1)


def _source_rows(back: Tensor, rows: slice, height: int, width: int) -> slice:
    """Rows of the frame that show up in rows of the aligned one, with what a kernel reaches over."""
    low, right = float(rows.stop - 1), float(width - 1)
    corners = torch.tensor(
        [(0.0, rows.start), (right, rows.start), (0.0, low), (right, low)], dtype=torch.float64
    )
    there = transform_points(back, corners)[..., 1].flatten()
    first = min(int(there.min().floor()), rows.start) - _MARGIN
    last = max(int(there.max().ceil()) + 1, rows.stop) + _MARGIN
    return slice(max(0, first), min(height, last))
