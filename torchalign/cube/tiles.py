"""Scenes larger than memory in space: estimated from tiles of full resolution, resampled and written row by row.

A translation of the ground moves every tile alike, so the tiles' own estimates are combined by a robust mean,
weighted by their predicted covariances (Huber's weights, iterated; Huber 1964, doi:10.1214/aoms/1177703732). A tile
of clouds or of water says so by its status and does not count; one that is wrong and does not say so is weighted
down. Of affine motions the corners of the tiles are fitted in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from torchalign._check import message
from torchalign._host import give_back_memory
from torchalign.aligner import Aligner
from torchalign.cascade import Cascade
from torchalign.cube.georeference import metres_per_pixel
from torchalign.cube.labels import MASK, Array, Cube, find_frame, find_mask, label_text, load, own_codes
from torchalign.cube.pixels import Pixels
from torchalign.cube.reference import (
    Found,
    FrameReader,
    Margins,
    ReferenceName,
    given_pixels,
    reduce_over_time,
)
from torchalign.cube.run import WarpFrames, estimate_only, resampling_of
from torchalign.cube.solution import build_report, report_fields
from torchalign.cube.writing import WriteOptions, Writer, open_writer, plan_files
from torchalign.functional.affine import (
    center_displacement,
    change_origin,
    identity_warp,
    transform_points,
)
from torchalign.functional.local import Mosaic
from torchalign.functional.quality import WORSE, choose_rows, kept_field
from torchalign.functional.shift_field import move_origin
from torchalign.functional.uncertainty import isotropic, largest_sigma
from torchalign.groupwise import Groupwise
from torchalign.local import Local
from torchalign.pcc import PCC
from torchalign.types import Estimate, ShiftField, Status, combine

_TILE = 512  # pixels along each side
_ACROSS = 5  # tiles, at most, along each side
_FLOOR = 0.01  # pixels; to what tiles are trusted to agree
_HUBER = 1.5  # scales, from where on a tile is weighted down
_OUTLIER = 0.5  # pixels from the others, from where on a tile does not agree
_AGREE = 0.5  # of the tiles, which must
_ROUNDS = 20
_ROW_BYTES = 2**26  # of computed pixels of a block of rows
_SERIES_BYTES = 2**27  # of those of all frames, of which a median or a mean is made


def large_reader(array: xr.DataArray, mask: Any, device: torch.device) -> FrameReader:
    """Of a stack whose pixels stay in the files; ``mask`` as :func:`torchalign.align` takes it."""
    cube = Cube.of(array)
    usable, codes = find_mask(mask, "mask", cube), own_codes(cube)
    others = () if codes is None else (codes,)
    return FrameReader(cube, Pixels.of(cube, look=False), usable, device, others)


def _read_tiles(reader: FrameReader, frame: int | None, rows: slice, columns: Sequence[slice]) -> Tensor:
    """(n, C, h, w) floats of one frame, or (n, T, C, h, w) of several; NaN wherever a pixel is not to be used."""
    frames = slice(None) if frame is None else slice(frame, frame + 1)
    raw, seen = reader.load(frames, rows), reader.seen(frames, rows)
    seen = None if seen is None else np.broadcast_to(seen, (len(seen), *raw.shape[-2:]))
    parts = [None if one is None else np.stack([one[..., part] for part in columns]) for one in (raw, seen)]
    values = reader.decode(*parts)  # type: ignore[arg-type]  # raw is no None
    return values[:, 0] if values.shape[1] == 1 else values


@dataclass(frozen=True)
class LargeReference:
    """What the frames are brought onto, tile by tile."""

    name: str
    reader: FrameReader  # of the stack, or of pixels that were given; with the reference's own mask
    masked: bool
    frame: int | None = None  # one of the stack's own
    word: str = ""  # what is made of all of them

    def is_of(self, frame: int) -> bool:
        """Whether it is that frame itself, the same pixels of it."""
        return frame == self.frame and not self.masked

    @classmethod
    def of(cls, reference: Any, mask: Any, stack: FrameReader) -> LargeReference:
        """A word, the label of a frame, or pixels on the stack's grid."""
        cube, known = stack.cube, find_mask(mask, "reference_mask", stack.cube)
        own, masked = () if known is None else (known,), known is not None
        reader = replace(stack, others=(*stack.others, *own))
        if isinstance(reference, str) and reference in ("median", "mean"):
            return cls(reference, reader, masked, word=reference)
        if isinstance(reference, str) and reference in get_args(ReferenceName) and reference != "first":
            expected = "'first', 'median', 'mean', the label of one frame, or pixels"
            cure = "name a frame, or make the reference's pixels first: the scenes are larger than memory"
            raise ValueError(message("reference", expected, repr(reference), cure))
        if isinstance(reference, (xr.DataArray, np.ndarray)) and reference.ndim > 1:
            source = given_pixels(reference, cube, stack.pixels)
            picture: Any = source.variable  # (xarray has no types for set_dims)
            variable = picture.set_dims({"band": cube.sizes["band"]} | picture.sizes)
            pixels = Cube(xr.DataArray(variable), {str(dim): dim for dim in variable.dims})
            return cls(source.name, FrameReader(pixels, source.pixels, None, stack.device, own), masked)
        if isinstance(reference, xr.DataArray) and not reference.ndim:  # a label, `cube.time[3]`
            reference = reference.values[()]
        frame, words = 0, ("first", "median", "mean")
        if not isinstance(reference, str) or reference != "first":
            frame = find_frame(cube.array, cube.dims["time"], reference, "reference", words=words)
        time = cube.coordinate("time", local=True)
        return cls(str(frame) if time is None else label_text(time.values[frame]), reader, masked, frame)

    def tiles(self, rows: slice, columns: Sequence[slice]) -> Tensor:
        """(n, C, h, w), or of a reference for each frame (n, T, C, h, w); NaN where nothing is to be used."""
        if not self.word:
            return _read_tiles(self.reader, self.frame, rows, columns)
        # of all frames, as many rows at a time as memory is meant to hold: each row is read once
        count, bands, made = self.reader.frames, self.reader.cube.sizes["band"], []
        row = count * bands * sum(part.stop - part.start for part in columns)
        step = max(1, _SERIES_BYTES // (row * self.reader.pixels.compute.itemsize))
        for first in range(rows.start, rows.stop, step):
            some = slice(first, min(first + step, rows.stop))
            series = [_read_tiles(self.reader, frame, some, columns) for frame in range(count)]
            made.append(reduce_over_time(self.word, torch.stack(series)).to(series[0].dtype))
        return torch.cat(made, 2)


def align_large(
    stack: FrameReader,
    module: nn.Module,
    reference: LargeReference,
    folder: Path,
    options: WriteOptions,
    advance: Callable[[int], object],
) -> tuple[list[Path], xr.Dataset]:
    """See :func:`torchalign.io.align_scenes`."""
    whole, local = _split(module)
    motion = str(getattr(whole, "motion", "translation"))
    if isinstance(module, Groupwise):
        cure = "pass the aligner inside it, or align a cube of dask chunks"
        raise ValueError(message("aligner", "one that compares a frame with a reference", "Groupwise", cure))
    if motion == "homography":
        cure = "estimate an affine motion, or align a cube in memory"
        raise ValueError(message("aligner", "a motion up to affine", motion, cure))
    files = plan_files(stack.cube, folder, options)
    start = None if local is None else _unlimited(whole)
    found, begun = _estimate_frames(stack, whole, reference, motion, advance, start)
    if local is not None:
        shifted, better = _add_shifts(stack, local, reference, begun, advance)
        last = torch.full_like(shifted.stage, max(0, len(getattr(module, "stages", ())) - 1))
        # a start that was not trusted alone has to gain by its field
        better &= found.valid | (shifted.score >= shifted.score_before)
        found = choose_rows(better, shifted._replace(stage=last), found)
    fields = report_fields(found, None, stack.cube.size, metres_per_pixel(stack.cube))
    attrs = {
        "aligner": repr(module),
        "reference": reference.name,
        "tiles": sum(len(columns) for _, columns in _grid(stack.cube.size)),
    }
    report = build_report(fields, stack.cube, attrs)
    operation = WarpFrames(stack.pixels, stack.device, None, **resampling_of(module))
    for frame, file in enumerate(files):
        own = found.map(partial(torch.narrow, dim=0, start=frame, length=1))
        with open_writer(file) as write:
            _write_frame(stack, frame, own, operation, write, advance)
    return [file.path for file in files], report


def count_steps(stack: FrameReader, module: nn.Module, reference: LargeReference) -> int:
    """How often :func:`align_large` tells that it goes on."""
    size, frames = stack.cube.size, stack.frames
    rows, blocks = len(_grid(size)), len(_row_blocks(size, stack.cube.sizes["band"]))
    steps, local = frames * (rows + blocks), _split(module)[1]
    if local is not None:
        of_field = len(list(_rows_of_windows(Mosaic(size, local.spacing))))
        steps += len(_to_shift(frames, reference)) * (of_field + rows)
    return steps


def _grid(size: tuple[int, int]) -> list[tuple[slice, list[slice]]]:
    """Rows of tiles, and the columns in each; the whole of a small frame."""

    def along(length: int) -> list[slice]:
        side = min(length, _TILE)
        count = max(1, min(_ACROSS, length // _TILE))
        inside = np.linspace(0, length - side, count + 2)[1:-1] if count < length / side else [0]
        return [slice(start, start + side) for start in map(round, inside)]

    columns = along(size[1])
    return [(rows, columns) for rows in along(size[0])]


def _estimate_frames(
    stack: FrameReader,
    module: nn.Module,
    reference: LargeReference,
    motion: str,
    advance: Callable[[int], object],
    start: nn.Module | None,
) -> tuple[Estimate, Estimate]:
    """(T,) rows; and those where local shifts start, of which ``start`` finds what the module does not trust."""
    found: list[list[Estimate]] = [[] for _ in range(stack.frames)]
    begun: list[list[Estimate]] = [[] for _ in range(stack.frames)]
    origins: list[tuple[int, int]] = []
    with torch.no_grad():
        for rows, columns in _grid(stack.cube.size):
            still = reference.tiles(rows, columns)
            origins += [(part.start, rows.start) for part in columns]
            for frame in range(stack.frames):
                moving = still if reference.is_of(frame) else _read_tiles(stack, frame, rows, columns)
                known = estimate_only(module, moving, still)
                found[frame].append(known)
                if start is not None and not bool(known.valid.all()):
                    known = estimate_only(start, moving, still)
                begun[frame].append(known)
                advance(1)
        size = (rows.stop - rows.start, columns[0].stop - columns[0].start)
        limit = float(getattr(module, "max_translation", np.inf))
        whole = stack.cube.size
        of_frames = partial(
            _combine_tiles, origins=origins, size=size, whole=whole, motion=motion, limit=limit
        )
        told, loose = (
            combine(torch.cat, [of_frames(combine(torch.cat, parts).map(torch.Tensor.cpu), share=share)
                                for parts in tiles])
            for tiles, share in ((found, _AGREE), (begun, 0.0))
        )  # fmt: skip
    return told, choose_rows(told.valid, told, loose)


def _combine_tiles(
    tiles: Estimate,
    origins: Sequence[tuple[int, int]],
    size: tuple[int, int],
    whole: tuple[int, int],
    motion: str,
    limit: float,
    share: float,
) -> Estimate:
    """One row, of n tiles, of which at least a ``share`` must agree."""
    status = _why_not(tiles)
    warp, used = identity_warp(dtype=torch.float64)[None], tiles.valid
    covariance = isotropic(torch.tensor(torch.inf, dtype=torch.float64))
    if status == Status.OK:
        chosen = torch.nonzero(tiles.valid)[:, 0]
        own = torch.cat([
            change_origin(tiles.warp[i : i + 1].double(), (-float(origins[i][0]), -float(origins[i][1])))
            for i in chosen.tolist()
        ])  # fmt: skip
        if len(origins) == 1:
            fitted, apart, found = own[0], torch.zeros(1, dtype=torch.float64), tiles.covariance[0].double()
        else:
            corner = torch.tensor([origins[i] for i in chosen.tolist()], dtype=torch.float64)
            points = corner[:, None] + _box(*size)
            there, known = transform_points(own, points), tiles.covariance[chosen].double()
            shifts_only, middle = motion == "translation", _box(*whole).mean(0)
            fitted, apart, found = _motion_of_tiles(points, there, known, shifts_only, middle)
        agree = apart <= max(_OUTLIER, 3 * float(apart.median()))
        if float((apart <= _OUTLIER).double().mean()) < share:
            status = Status.AMBIGUOUS
        elif float(center_displacement(fitted, whole).norm()) > limit:
            status = Status.TOO_FAR
        else:
            warp, covariance, used = fitted[None], found, torch.zeros_like(tiles.valid)
            used[chosen[agree]] = True
    score, before = (values[used].mean()[None] if bool(used.any()) else values[:1] for values in tiles[1:3])
    codes = torch.tensor([int(status)])
    stage = tiles.stage.max()[None] if status == Status.OK else torch.tensor([-1])
    kind = tiles.warp.dtype
    covariance = covariance.to(kind)[None]
    return Estimate(warp.to(kind), score, before, largest_sigma(covariance), covariance, codes, stage)


def _why_not(tiles: Estimate) -> Status:
    """OK where enough tiles are; else what most of those with texture say."""
    seen = tiles.status[tiles.status != Status.NO_TEXTURE]
    if not len(seen):
        return Status.NO_TEXTURE
    if int(tiles.valid.sum()) >= max(1, 0.2 * len(seen)):
        return Status.OK
    return Status(int(seen[seen != 0].mode().values))


def _box(height: int, width: int) -> Tensor:
    """(4, 2), the points (x, y) at the corners of a frame."""
    right, low = width - 1, height - 1
    return torch.tensor([(0, 0), (right, 0), (0, low), (right, low)], dtype=torch.float64)


def _motion_of_tiles(
    points: Tensor, there: Tensor, own: Tensor, translation: bool, middle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The motion (2, 3) of all tiles, how far each is from it in pixels, and the covariance at ``middle``.

    Of n tiles the corners, (n, 4, 2), where each puts its own, and the covariance of its translation, (n, 2, 2).

    Generalised least squares over the corners, each with a quarter of its tile's weight :math:`W`:
    :math:`\hat\theta = N^{-1} \sum X^\top W y`, :math:`N = \sum X^\top W X`, with the displacements y and the rows
    X of ones (a translation) or of ones and places (an affine motion). Its covariance is :math:`N^{-1}`, times
    what the tiles disagree beyond their own covariances.
    """
    scale = float((points - middle).abs().max())
    design = torch.ones_like(points[..., :1])
    if not translation:
        design = torch.cat([design, (points - middle) / scale], -1)  # (n, 4, k)
    target = there - points
    prior = torch.linalg.inv(own + _FLOOR**2 * torch.eye(2, dtype=torch.float64))
    weight, terms = prior, design.shape[-1]
    for _ in range(_ROUNDS):
        normal = torch.einsum("npi,npj,nab->iajb", design, design, weight / 4).reshape(2 * terms, 2 * terms)
        right = torch.einsum("npi,nab,npb->ia", design, weight / 4, target).reshape(2 * terms)
        solved = torch.linalg.solve(normal, right).reshape(terms, 2)
        left = target - design @ solved
        apart = left.square().sum(-1).mean(1).sqrt()
        robust = max(float(apart.median()) * 1.4826, _FLOOR)
        weight = prior * (_HUBER * robust / apart.clamp(min=1e-12)).clamp(max=1.0)[:, None, None]
    freedom = max(1, 2 * (len(design) - terms))
    excess = torch.einsum("na,nab,nb->", left.mean(1), weight, left.mean(1)) / freedom
    covariance = torch.linalg.inv(normal)[:2, :2] * excess.clamp(min=1.0)
    linear = torch.eye(2, dtype=torch.float64)
    if not translation:
        linear = linear + solved[1:].T / scale
    shift = solved[0] + middle - linear @ middle
    return torch.cat([linear, shift[:, None]], 1), apart, covariance


# --- rows ---


def _row_blocks(size: tuple[int, int], bands: int) -> list[slice]:
    height, width = size
    step = max(16, _ROW_BYTES // max(1, 4 * width * bands))
    return [slice(first, min(first + step, height)) for first in range(0, height, step)]


def _split(module: nn.Module) -> tuple[nn.Module, Local | None]:
    """What finds one warp of the whole frame, and what adds local shifts to it."""
    stages = module._stages() if isinstance(module, Cascade) else [module]
    last = stages[-1]
    if not isinstance(last, Local):
        return module, None
    if last.crop_center is not None:
        expected = "None for scenes larger than memory"
        raise ValueError(message("crop_center", expected, last.crop_center, "leave it out"))
    before: list[Any] = list(stages[:-1])
    return Cascade(*before) if before else last.global_method(), last


def _unlimited(module: nn.Module) -> nn.Module:
    """The same, to which it does not matter whether parts disagree, for local shifts explain that (in PCC's σ)."""
    if isinstance(module, Cascade):
        return Cascade(*(cast("Aligner", _unlimited(stage)) for stage in module._stages()))
    if isinstance(module, PCC):
        module = copy.copy(module)
        module.max_sigma = torch.inf
    return module


def _to_shift(frames: int, reference: LargeReference) -> list[int]:
    """The frames that may have local shifts: all but the reference itself, unless there is no other."""
    return [frame for frame in range(frames) if not reference.is_of(frame)] or [0]


def _rows_of_windows(mosaic: Mosaic) -> Iterator[tuple[slice, list[int], list[slice]]]:
    """The rows of its tiles; and the numbers and the columns of the tiles in each."""
    for rows, group in groupby(enumerate(mosaic.windows()), key=lambda one: one[1][0]):
        numbers, windows = zip(*group, strict=True)
        yield rows, list(numbers), [columns for _, columns in windows]


def _add_shifts(
    stack: FrameReader,
    local: Local,
    reference: LargeReference,
    begun: Estimate,
    advance: Callable[[int], object],
) -> tuple[Estimate, Tensor]:
    """With the field of every frame, tile by tile on one lattice; and (T,) whether it is to be kept.

    It is where its own σ and length allow it, and the score of the tiles is no lower for it.
    """
    mosaics = {frame: Mosaic(stack.cube.size, local.spacing) for frame in _to_shift(stack.frames, reference)}
    kept = torch.zeros_like(begun.valid)
    with torch.no_grad():
        for rows, numbers, columns in _rows_of_windows(next(iter(mosaics.values()))):
            still = reference.tiles(rows, columns)
            for frame, mosaic in mosaics.items():
                moving, warp = _read_tiles(stack, frame, rows, columns), begun.warp[frame : frame + 1]
                for i, index in enumerate(numbers):
                    local.add_tile(mosaic, index, moving[i : i + 1], _own(still[i : i + 1], frame), warp)
                advance(1)
        shifts = [mosaic.conclude() for mosaic in mosaics.values()]
        fields, allowed = zip(*map(local.field_of, shifts), strict=True)
        scores: list[list[Tensor]] = [[] for _ in fields]
        for rows, columns in _grid(stack.cube.size):
            still = reference.tiles(rows, columns)
            for frame, field, told in zip(mosaics, fields, scores, strict=True):
                moving = _read_tiles(stack, frame, rows, columns)
                for i, part in enumerate(columns):
                    corner = (float(part.start), float(rows.start))
                    warp = change_origin(begun.warp[frame : frame + 1], corner).to(moving)
                    there = ShiftField(*(values.to(moving) for values in move_origin(field, corner)))
                    told.append(local.compare(moving[i : i + 1], _own(still[i : i + 1], frame), warp, there))
                advance(1)
    mean = torch.stack([torch.cat(parts).nanmean(0) for parts in scores]).to(begun.score)  # (frames, 2)
    searched = list(mosaics)
    kept[searched] = torch.cat(allowed).cpu() & ~(mean[:, 1] < mean[:, 0] - WORSE)
    kept &= begun.valid
    # (the reference's own row is not looked at)
    row = [searched.index(frame) if frame in mosaics else 0 for frame in range(len(kept))]
    covariance = torch.cat([shift.covariance for shift in shifts]).to(begun.covariance)[row]
    field = ShiftField(*(torch.cat(parts).to(begun.warp)[row] for parts in zip(*fields, strict=True)))
    shifted = begun._replace(score=mean[row, 1], covariance=covariance, sigma=largest_sigma(covariance))
    return shifted._replace(field=kept_field(field, kept)), kept


def _own(still: Tensor, frame: int) -> Tensor:
    """Of a reference for each frame (n, T, C, h, w) that frame's, (n, C, h, w)."""
    return still[:, frame] if still.ndim == 5 else still


def _write_frame(
    stack: FrameReader,
    frame: int,
    found: Estimate,
    operation: WarpFrames,
    write: Writer,
    advance: Callable[[int], object],
) -> None:
    one, warp, field = slice(frame, frame + 1), found.warp, found.field
    margins = Margins(Found(warp, torch.ones(1, dtype=torch.bool), field), stack.cube.size)
    nearest = replace(operation, pixels=replace(stack.pixels, nodata=()), interpolation="nearest",
                      padding_mode="zeros", fill_value=0.0)  # fmt: skip
    for rows in _row_blocks(stack.cube.size, stack.cube.sizes["band"]):
        source = margins.source(rows.start, rows.stop)
        start = (0.0, float(source.start))
        moves = change_origin(warp, start)
        lattice: list[Tensor] = []
        if field is not None:
            there = move_origin(field, start)
            lattice = [there.coefficients, torch.cat((there.origin, there.spacing), -1)]
        cut = slice(rows.start - source.start, rows.stop - source.start)
        raw, seen = stack.load(one, source), replace(stack, others=()).seen(one, source)
        codes = None
        if stack.others:  # read once, and moved with the pixels
            codes = load(stack.others[0], MASK, time=one, y=source)
            seen = codes != 0 if seen is None else seen & (codes != 0)
        usable = None if seen is None else torch.from_numpy(np.array(seen)).to(stack.device)
        with torch.no_grad():
            values, _ = operation.run(raw, stack.device, moves, usable, *lattice)
            moved: Array | None = None
            if codes is not None:
                own = replace(nearest, pixels=replace(nearest.pixels, dtype=codes.dtype))
                moved = own.run(codes[:, None], stack.device, moves, None, *lattice)[0][0, 0, cut]
        write(values[0][:, cut], moved, rows)
        del raw, values
        give_back_memory()
        advance(1)
