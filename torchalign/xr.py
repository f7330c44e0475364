"""Labelled cubes: :func:`align` takes an ``xarray.DataArray`` and gives back its like and a report per frame.

:func:`apply` takes such a report, to other bands, other pixel sizes, masks and classes. Nothing is estimated here.
Frames stream through the device in batches, or wait in dask's chunks until somebody computes them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from torchalign._check import check_option, message
from torchalign._chunks import (
    chunk_sizes,
    compute_together,
    is_lazy,
    map_chunks,
    parts_along_time,
    undisturbed,
)
from torchalign._grid import Grid, find_grid, metres_per_pixel, regrid_warp
from torchalign._host import give_back_memory
from torchalign._labelled import (
    CUBE,
    MASK,
    Array,
    Cube,
    Pixels,
    describe,
    find_mask,
    keep_nodata,
    load,
    mask_tensor,
)
from torchalign._reference import Found, ReferenceSource, decode_reference, find_reference, label_text
from torchalign.aligner import Aligner
from torchalign.cascade import Cascade
from torchalign.ecc import ECC
from torchalign.functional.affine import change_origin, from_homogeneous, identity_warp, to_homogeneous
from torchalign.functional.phase import phase_correlation
from torchalign.functional.warp import Interpolation, PaddingMode, Resampled, resample
from torchalign.lgm import LGM
from torchalign.pcc import PCC
from torchalign.report import build_report, load_report, measure, report_grid
from torchalign.types import Estimate

__all__ = ["ApplyMode", "align", "apply"]

# What `aligner=` knows by name.
_ALIGNERS: dict[str, Callable[[], nn.Module]] = {
    "auto": lambda: Cascade(PCC(), ECC()),
    "pcc": PCC,
    "ecc": ECC,
    "lgm": LGM,
}

ApplyMode = Literal["resample", "shift-coords"]

_CPU_BATCH_BYTES, _CUDA_BATCH_BYTES = 2**26, 2**30
_TASK_BATCH_BYTES = 2**24  # of each of dask's tasks on the CPU, several of which run side by side
_WARP = ("time", "row", "col")
_TRANSFORM = "geotransform"  # the coordinate of "shift-coords"


def align(
    datacube: xr.DataArray,
    reference: xr.DataArray | Array | Tensor | Hashable = "median",
    aligner: nn.Module | str = "auto",
    *,
    mask: xr.DataArray | Array | Tensor | None = None,
    reference_mask: xr.DataArray | Array | Tensor | None = None,
    init: xr.Dataset | Estimate | Array | Tensor | str | Path | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    time_dim: Hashable | None = None,
    band_dim: Hashable | None = None,
    y_dim: Hashable | None = None,
    x_dim: Hashable | None = None,
) -> tuple[xr.DataArray, xr.Dataset]:
    """Bring every frame of a cube onto one reference, and report per frame how far it can be trusted.

    Dimensions are found by name, in any order: time (or t, date), band (bands, channel, wavelength,
    variable; may be missing), y (lat, latitude, northing, row), x (lon, longitude, easting, col).

    A cube in memory, or in a file, goes through the device batch by batch; the result is in memory, as large as
    the cube, and what is needed beside it is set by ``batch_size``, not by T. A cube of dask chunks stays lazy:
    each chunk along time is one task, which gives the same bits on a cluster as on one machine. Write a cube
    larger than memory, and get its report, in one pass with ``report=`` of :func:`torchalign.write_stack` or
    :func:`torchalign.io.write_cube`: they need the memory of a few chunks. (``dask.compute(aligned, report)``
    runs each task once, too; beside a writer of another kind, dask holds all pixels until the report is done.)
    Only a reference that is made from the cube's own frames is computed at once, in blocks of rows.

    Batches of another size give the same result to rounding, since sums are taken in another order: about 1e-7
    of a float32, and now and then a step of 1 in an integer.

    Integers are computed in float32 (float64 where values exceed 2²⁴, and for all 32- and 64-bit integers of a
    lazy cube, which nobody has looked at) and come back rounded and clamped; floats that ``encoding`` packs into
    integers come back clamped to what these hold.
    Nodata (``_FillValue``, ``missing_value``, ``nodata`` in attrs or encoding, ``rio.nodata``) and NaN are
    not used and stay what they are; a valid pixel that would round to nodata takes the value beside it. (A
    float band with both NaN and nodata gets the latter for both.) An aligner's ``fill_value`` is for what
    comes from outside the frame or was masked. Frames of a ``status`` other than ``OK`` come back bit for
    bit.

    Args:
        datacube: time, y, x and maybe band; integer or floating.
        reference: what the frames are brought onto.

            * ``"median"`` or ``"mean"`` over time of the usable pixels, of the frames as they are.
            * ``"iterative"``: the median of the *aligned* frames. They are aligned with the median, the median is
              taken anew, and so on until they stop moving (0.005 px). It is sharp where ``"median"`` is blurred by
              the frames' displacements. It is anchored where the median frame lies, so it cannot wander off.
              Costs two to four estimates more, and as many medians.
            * ``"first"``, or the label of exactly one frame (``"2020-05-01"``, a ``datetime64``).
            * ``"clearest"``: the frame whose share of usable pixels, times its correlation with the median, is
              the largest.
            * pixels: a DataArray on the cube's grid (with time, one per frame; bands are matched by label;
              without band, one picture for every band), for example a frame of another cube, or an array
              (C, H, W) or (T, C, H, W). In pixels without a declared nodata value the cube's applies.
        aligner: a module, for example ``torchalign.PCC(channel="mean")``; it is neither changed nor moved.
            Or a name, for default options: ``"auto"``, ``"pcc"``, ``"ecc"`` or ``"lgm"``. ``"auto"`` stands for the
            best general choice of the installed release; in this one it is ``Cascade(PCC(), ECC())``.
        mask: bool, **True = usable**: a DataArray with some of time, y and x, on the cube's coordinates, or
            an array broadcastable to (T, H, W). Acts in the estimate, the warp and the reference taken over
            time.
        reference_mask: the same for the reference.
        init: an earlier solution to start from: a report (of other bands or another pixel size, too), the path of
            one, an ``Estimate``, or warps (T, 2, 3) or (T, 3, 3). Frames are matched by their labels.
        verify: measure what is left after alignment, once more and for every aligner in the same way: by phase
            correlation of the aligned frame with the reference. ``PCC`` takes half as long again; slower aligners
            hardly notice. It tells of a warp that went wrong and of what the aligner left behind; it does not
            tell of an error that the reference itself has.
        device: where to compute. Default: where the aligner's parameters are if that is not the CPU, else
            CUDA if there is any, else the CPU; for a lazy cube, of the machine that computes the chunk.
        batch_size: frames on the device at a time. Default: what fits 64 MiB on the CPU, and 1 GiB (or 1/16
            of the free memory) on CUDA. A lazy cube gets chunks of this size; by default it keeps its own.
        progress: show a bar: yes, no, or (default) if tqdm is installed and it takes more than two seconds.
            For lazy cubes dask has bars of its own.
        time_dim: the name of the time dim, where it is none of the above.
        band_dim: the same for band.
        y_dim: the same for y.
        x_dim: the same for x.

    Returns:
        The aligned cube, with the same dims, coords, attrs, name, dtype and encoding. And the report along
        time, with the coords that the cube has along it: ``warp`` (T, 2, 3) or (T, 3, 3), moving → reference
        in pixels; ``shift_x`` and ``shift_y``, the displacement of the frame's centre in pixels, right and
        down; ``shift_x_metres`` and ``shift_y_metres``, the same along the map's axes (north is positive)
        where the grid is regular and has a unit of length; ``score``, ``score_before``, ``sigma`` (pixels),
        ``status``, a :class:`~torchalign.Status`, and of ``verify`` ``residual_x`` and ``residual_y``, like the
        shifts (NaN for frames that were not aligned, or where nothing could be measured). Its attributes hold the
        grid and, unless it is lazy, the numbers of :func:`torchalign.summarize`.

    Raises:
        TypeError: the cube is no DataArray of numbers, a mask is not bool, an argument is of another kind.
        ValueError: unknown, missing or ambiguous dims; coordinates other than the cube's; a label of no
            frame or of several; an unknown aligner, device or batch size; a fill value that the dtype
            cannot hold.
        ImportError: ``progress=True`` without tqdm.

    Example:
        A scene cut at two offsets, 2 pixels apart in x and 1 in y:

        >>> scene = np.random.default_rng(0).random((68, 68)).astype("float32")
        >>> scene = sum(np.roll(scene, (i, j), (0, 1)) for i in range(4) for j in range(4))
        >>> frames = np.stack([scene[:64, :64], scene[1:65, 2:66]])
        >>> cube = xr.DataArray(frames, dims=("time", "y", "x"), coords={"time": [2019, 2020]})
        >>> aligned, report = align(cube, reference=2019, aligner="pcc")
        >>> shift = report[["shift_x", "shift_y"]].sel(time=2020).round(1)
        >>> float(shift.shift_x), float(shift.shift_y), aligned.dims
        (2.0, 1.0, ('time', 'y', 'x'))

    """
    cube = Cube.of(datacube, {"time": time_dim, "band": band_dim, "y": y_dim, "x": x_dim})
    if not isinstance(verify, bool):
        raise TypeError(message("verify", "True or False", repr(verify), "give a bool"))
    where = _find_device(device, aligner)
    module = _make_aligner(aligner)
    pixels = Pixels.of(cube, getattr(module, "fill_value", None), "aligner.fill_value")
    if not is_lazy(datacube):  # else each chunk chooses for itself, on the machine that computes it
        device, module = where, _find_aligner(module, where)
    job = _Job(
        _Recipe(
            module,
            pixels,
            device,
            _check_batch(batch_size),
            verify,
            _count_rows(module),
            metres_per_pixel(cube),
        ),
        cube,
        find_mask(mask, "mask", cube),
        find_mask(reference_mask, "reference_mask", cube),
        _find_warps(init, "init", cube, None),
    )

    def estimate(source: ReferenceSource) -> Found:
        _, fields = job.run(source, resampled=False)
        warp, status = (np.array(fields[name]) for name in ("warp", "status"))
        return Found(torch.from_numpy(warp), torch.from_numpy(status) == 0)

    with torch.no_grad(), _progress_bar(False if job.lazy else progress, cube, "align") as advance:
        source = find_reference(reference, cube, pixels, job.usable, where, estimate)
        values, fields = job.run(source, advance=advance)
    attrs = {"aligner": repr(module), "reference": source.name}
    # (a georeference of its own, as "shift-coords" makes, is no longer that of the resampled pixels)
    aligned = datacube.copy(data=values).drop_vars(_TRANSFORM, errors="ignore")
    return aligned, build_report(fields, cube, attrs)


def apply(
    datacube: xr.DataArray,
    estimate: xr.Dataset | Estimate | Array | Tensor | str | Path,
    *,
    mode: ApplyMode = "resample",
    interpolation: Interpolation = "bilinear",
    padding_mode: PaddingMode = "border",
    fill_value: float | None = None,
    mask: xr.DataArray | Array | Tensor | None = None,
    grid: xr.DataArray | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    time_dim: Hashable | None = None,
    band_dim: Hashable | None = None,
    y_dim: Hashable | None = None,
    x_dim: Hashable | None = None,
) -> xr.DataArray:
    """Apply one solution to another cube: other bands, another pixel size or extent, a mask, a classification.

    The warps of a report are in pixels of the cube they were estimated on, whose grid the report keeps; they are
    converted to the pixels of this cube by the two grids (pixel size, origin, direction of the axes). Frames are
    matched by their labels along time; without labels, by number. Frames that were not aligned come back bit for
    bit. Pixels, nodata, dtype, dask and everything about the cube are as in :func:`align`.

    Args:
        datacube: time, y, x and maybe band; integer, floating or bool (``interpolation="nearest"`` only).
        estimate: a report, or the path of one (:func:`torchalign.save_report`); a plain ``Estimate`` of one series,
            or warps (T, 2, 3) or (T, 3, 3), which are in pixels of ``grid``.
        mode: ``"resample"``, or ``"shift-coords"``: the pixels are not touched. Each frame is given the
            georeference that puts it in its place, as GDAL's six numbers in the coordinate ``geotransform`` along
            time, from where :func:`torchalign.write_stack` puts them into the files.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``; ``"nearest"`` copies
            pixels, whatever they mean.
        padding_mode: what comes from outside the frame: ``"border"``, ``"zeros"`` or ``"reflection"``.
        fill_value: or this value.
        mask: as in :func:`align`: True = usable, acts in the warp.
        grid: the cube that a plain estimate was made on. Default: this one.
        device: as in :func:`align`.
        batch_size: as in :func:`align`.
        progress: as in :func:`align`.
        time_dim: as in :func:`align`.
        band_dim: as in :func:`align`.
        y_dim: as in :func:`align`.
        x_dim: as in :func:`align`.

    Returns:
        Like ``datacube``, aligned.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a frame that the report has not; grids of which one is unknown, that differ in CRS or that are
            turned against each other; a bool cube that is to be interpolated; ``"shift-coords"`` without a grid, or
            with a homography, which no georeference can express; an unknown option.

    Example:
        One solution, found at 10 m, for a band of 20 m:

        >>> from torchalign.datasets import demo_stack
        >>> cube = demo_stack(frames=4, size=(96, 96)).cube
        >>> aligned, report = align(cube, "first", verify=False)
        >>> coarse = cube.sel(band=["B08"]).coarsen(y=2, x=2).mean()
        >>> apply(coarse, report).sizes["x"]
        48
    """
    check_option("mode", mode, ApplyMode)
    check_option("interpolation", interpolation, Interpolation)
    check_option("padding_mode", padding_mode, PaddingMode)
    dims = {"time": time_dim, "band": band_dim, "y": y_dim, "x": x_dim}
    is_bool = isinstance(datacube, xr.DataArray) and datacube.dtype == np.bool_
    if is_bool and mode == "resample" and interpolation != "nearest":
        got = f"bool with interpolation={interpolation!r}"
        raise ValueError(message("datacube", "numbers to interpolate", got, 'pass interpolation="nearest"'))
    cube = Cube.of(datacube.astype(np.uint8) if is_bool else datacube, dims)
    warps = _find_warps(estimate, "estimate", cube, grid)
    if warps is None:
        cure = "pass a report, its path, an Estimate or warps"
        raise TypeError(message("estimate", "a report", "None", cure))
    if mode == "shift-coords":
        return datacube.assign_coords({_TRANSFORM: _frame_transforms(warps, cube)})
    pixels = Pixels.of(cube, fill_value, "fill_value")
    recipe = _Resampling(pixels, device, _check_batch(batch_size), interpolation, padding_mode, fill_value)
    usable = find_mask(mask, "mask", cube)
    with torch.no_grad():
        if is_lazy(cube.array):
            chunks = chunk_sizes(cube, recipe.batch_size)
            parts = [parts_along_time(usable, _mask_roles(usable), chunks), warps.parts(chunks)]
            values = map_chunks(_apply_chunk, (recipe, warps.regridding), cube, chunks, parts, {})[0]
        else:
            values = np.empty(cube.array.shape, cube.array.dtype)
            where, loaded = _find_device(device, None), warps.load()
            with _progress_bar(progress, cube, "apply") as advance:
                for batch in _batches(
                    cube.sizes["time"], _frames_at_a_time(recipe.batch_size, cube.sizes, pixels, where)
                ):
                    raw = load(cube.variable, CUBE, time=batch)
                    seen = mask_tensor(usable, where, time=batch)
                    cube.view(values)[batch] = recipe.run(raw, seen, warps.regridding, loaded[batch], where)
                    advance(len(raw))
    moved = datacube.copy(data=values.astype(np.bool_) if is_bool else values)
    return moved.drop_vars(_TRANSFORM, errors="ignore")


# --- what is done to frames ---


@dataclass(frozen=True)
class _Recipe:
    """How frames are aligned; it travels to dask's workers."""

    aligner: nn.Module
    pixels: Pixels
    device: torch.device | str | None
    batch_size: int | None
    verify: bool
    rows: int  # of the warps
    metres: dict[str, float]  # of a pixel

    def fields(self, *, resampled: bool) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """What there is of every frame: the shape and the dtype of one."""
        axes = [f"shift_{axis}" for axis in "xy"]
        axes += [f"residual_{axis}" for axis in "xy"] if self.verify and resampled else []
        names = [*axes, *(f"{name}_metres" for name in axes if name[-1] in self.metres)]
        number = self.pixels.compute_dtype
        fields: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {"warp": ((self.rows, 3), number)}
        fields |= dict.fromkeys((*names, "score", "score_before", "sigma"), ((), number))
        return fields | {"status": ((), np.dtype(np.int8))}

    def run(
        self,
        module: nn.Module,
        raw: Array,
        reference: Tensor,
        usable: Tensor | None,
        reference_usable: Tensor | None,
        init: Tensor | None,
        *,
        resampled: bool,
    ) -> tuple[Array, dict[str, Array]]:
        """Pixels like raw, (t, C, H, W), and the fields of the report; on the device of the reference."""
        frames = self.pixels.decode(raw, reference.device)
        masks = {"mask": usable, "reference_mask": reference_usable}
        options = masks if init is None else masks | {"init": init.to(frames)}
        size = (raw.shape[-2], raw.shape[-1])
        if not resampled:
            only = getattr(module, "estimate", None)
            found = only(frames, reference, **options) if only else module(frames, reference, **options)[1]
            return raw, measure(found, None, size, self.metres)
        aligned, found = module(frames, reference, **options)
        if getattr(module, "fill_value", None) is not None:
            aligned = keep_nodata(aligned, frames, found.warp)
        residual = None
        if self.verify:
            residual = _residual(module, aligned, usable, found, reference, reference_usable)
        del frames  # what is large is given back before more of it is made
        encoded = self.pixels.encode(aligned, raw)
        left = ~found.valid.cpu().numpy()
        encoded[left] = raw[left]
        return encoded, measure(found, residual, size, self.metres)


@dataclass(frozen=True)
class _Job:
    """A cube and what goes with it, to be aligned with one reference or another."""

    recipe: _Recipe
    cube: Cube
    usable: xr.Variable | None
    reference_usable: xr.Variable | None
    init: _Warps | None

    @property
    def lazy(self) -> bool:
        return is_lazy(self.cube.array)

    def run(
        self,
        source: ReferenceSource,
        *,
        resampled: bool = True,
        advance: Callable[[int], object] = lambda frames: None,
    ) -> tuple[Any, dict[str, Any]]:
        """Pixels in the order of the cube's own dims, and the fields of the report; dask arrays if it is lazy."""
        if self.lazy:
            return self._run_lazily(source, resampled)
        recipe, cube = self.recipe, self.cube
        where = _find_device(recipe.device, recipe.aligner)
        shape = tuple(cube.sizes[role] for role in CUBE[1:])
        out = np.empty(cube.array.shape, cube.array.dtype) if resampled else None
        init = None if self.init is None else self.init.load()

        def decode(**part: slice) -> Tensor:
            return decode_reference(source.pixels, load(source.variable, source.roles, **part), shape, where)

        fixed = None if "time" in source.roles else decode()
        made: list[dict[str, Array]] = []
        step = _frames_at_a_time(recipe.batch_size, cube.sizes, recipe.pixels, where)
        for batch in _batches(cube.sizes["time"], step):
            raw = load(cube.variable, CUBE, time=batch)
            values, fields = recipe.run(
                recipe.aligner,
                raw,
                decode(time=batch) if fixed is None else fixed,
                mask_tensor(self.usable, where, time=batch),
                mask_tensor(self.reference_usable, where, time=batch),
                None if init is None or self.init is None else self.init.regridding(init[batch]),
                resampled=resampled,
            )
            made.append(fields)
            if out is not None:
                cube.view(out)[batch] = values
            advance(len(raw))
        give_back_memory()
        return out, {name: np.concatenate([fields[name] for fields in made]) for name in made[0]}

    def _run_lazily(self, source: ReferenceSource, resampled: bool) -> tuple[Any, dict[str, Any]]:
        recipe, cube = self.recipe, self.cube
        chunks = chunk_sizes(cube, recipe.batch_size)
        regridding = None if self.init is None else self.init.regridding
        shape = tuple(cube.sizes[role] for role in CUBE[1:])
        values, fields = map_chunks(
            _align_chunk,
            (recipe, source.pixels, shape, regridding, resampled),
            cube,
            chunks,
            [
                parts_along_time(source.variable, source.roles, chunks),
                parts_along_time(self.usable, _mask_roles(self.usable), chunks),
                parts_along_time(self.reference_usable, _mask_roles(self.reference_usable), chunks),
                [None] * len(chunks) if self.init is None else self.init.parts(chunks),
            ],
            recipe.fields(resampled=resampled),
        )
        if resampled:
            return values, fields
        return None, compute_together(fields)  # wanted now, and without the pixels


def _align_chunk(
    shared: tuple[_Recipe, Pixels, tuple[int, ...], _Regridding | None, bool],
    raw: Array,
    reference: Array,
    usable: Array | None,
    reference_usable: Array | None,
    init: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """A task: the pixels of a chunk, (t, C, H, W), and its rows of the report."""
    recipe, reference_pixels, shape, regridding, resampled = shared
    where = _find_device(recipe.device, recipe.aligner)
    with undisturbed(where), torch.no_grad():
        module = _find_aligner(recipe.aligner, where)
        one = decode_reference(reference_pixels, reference, shape, where) if reference.ndim == 3 else None
        sizes = dict(zip(CUBE, raw.shape, strict=True))
        pixels, rows = np.empty_like(raw) if resampled else raw, []
        step = _frames_at_a_time(recipe.batch_size, sizes, recipe.pixels, where, _TASK_BATCH_BYTES)
        for batch in _batches(len(raw), step):
            own = decode_reference(reference_pixels, reference[batch], shape, where) if one is None else one
            values, fields = recipe.run(
                module,
                raw[batch],
                own,
                _part(usable, batch, where),
                _part(reference_usable, batch, where),
                None if init is None or regridding is None else regridding(init[batch]),
                resampled=resampled,
            )
            if resampled:
                pixels[batch] = values
            rows.append(fields | {"warp": _with_rows(fields["warp"], recipe.rows)})
    return pixels, {name: np.concatenate([fields[name] for fields in rows]) for name in rows[0]}


def _with_rows(warp: Array, rows: int) -> Array:
    """Warps of the shape that was promised when nothing had been computed."""
    if warp.shape[1] < rows:
        return to_homogeneous(torch.from_numpy(warp)).numpy()
    if warp.shape[1] > rows:
        if not (warp[:, 2] == (0, 0, 1)).all():
            cure = 'give its class an attribute motion = "homography", so that it is known beforehand'
            raise ValueError(message("aligner", "warps (T, 2, 3)", f"homographies {warp.shape}", cure))
        return warp[:, :2]
    return warp


def _part(values: Array | None, batch: slice, device: torch.device) -> Tensor | None:
    """Of a mask (t, H, W), or (H, W) for all frames."""
    if values is None:
        return None
    return torch.from_numpy(np.array(values[batch] if values.ndim == 3 else values)).to(device)


def _residual(
    module: nn.Module,
    aligned: Tensor,
    usable: Tensor | None,
    found: Estimate,
    reference: Tensor,
    reference_usable: Tensor | None,
) -> Tensor:
    """(t, 2), how far aligned frames still are from the reference; NaN where that cannot be measured."""
    if not len(aligned):
        return aligned.new_empty(0, 2)
    inside = aligned.new_ones(len(aligned), 1, *aligned.shape[-2:])
    if usable is not None:
        inside = inside * usable.reshape(-1, 1, *usable.shape[-2:])
    # the mask moved with its frame, and borders are repeated beyond it
    seen = resample(inside, found.warp, interpolation="nearest", padding_mode="zeros").values.squeeze(1) > 0
    if reference_usable is not None:
        reference_usable = reference_usable.expand(
            -1 if reference_usable.ndim == 3 else 1, *reference.shape[-2:]
        )
    # the channel and the crop are those of the estimate; a module of another kind is taken to see the mean
    eyes = module if isinstance(module, Aligner) else PCC()
    moving, moving_usable = eyes._extract_channel(aligned, seen)
    frames = reference if reference.ndim == 4 else reference[None]
    still, still_usable = eyes._extract_channel(frames, reference_usable)
    left = phase_correlation(moving, still, moving_usable, still_usable)
    measured = found.valid & left.converged & ~left.flat & ~left.outside
    return left.shift.masked_fill(~measured[:, None], torch.nan)


# --- a solution and other cubes ---


@dataclass(frozen=True)
class _Regridding:
    """Warps of one grid in pixels of another; of the same one where not both are known."""

    source: Grid | None
    target: Grid | None

    def __call__(self, warps: Array) -> Tensor:
        tensor = torch.from_numpy(np.array(warps))
        if self.source is None or self.target is None:
            return tensor
        return regrid_warp(tensor, self.source, self.target)


@dataclass(frozen=True)
class _Warps:
    """The warps of an earlier solution, in the order of a cube's frames."""

    variable: xr.Variable  # (time, row, col)
    regridding: _Regridding

    def load(self) -> Array:
        """(T, 2 or 3, 3) in memory."""
        return np.asarray(self.variable.to_numpy())

    def parts(self, chunks: tuple[int, ...]) -> list[Any]:
        """See :func:`parts_along_time`."""
        return parts_along_time(self.variable, _WARP, chunks)


def _find_warps(given: Any, name: str, cube: Cube, grid: xr.DataArray | None) -> _Warps | None:
    if given is None:
        return None
    own, frames = find_grid(cube), cube.sizes["time"]
    size = (cube.sizes["y"], cube.sizes["x"])
    if isinstance(given, (str, Path)):
        given = load_report(given)
    if isinstance(given, xr.Dataset):
        if grid is not None:
            cure = "leave grid= out: a report knows its grid"
            raise ValueError(message("grid", "None with a report", type(grid).__name__, cure))
        variable = _match_frames(given, name, cube)
        source = report_grid(given)
        source_size = tuple(int(length) for length in given.attrs.get("grid_size", size))
    else:
        values = given.warp if isinstance(given, Estimate) else given
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if values.dtype.kind != "f" or values.ndim != 3 or values.shape[1:] not in ((2, 3), (3, 3)):
            got = f"{values.dtype} {values.shape}"
            cure = "pass a report, its path, an Estimate of one series, or its warps"
            raise TypeError(message(name, "floating warps (T, 2, 3) or (T, 3, 3)", got, cure))
        if len(values) != frames:
            got = f"{len(values)} warps for {frames} frames"
            raise ValueError(
                message(name, "one warp for each frame", got, "select the frames they belong to")
            )
        variable = xr.Variable(_WARP, values)
        other = cube if grid is None else Cube.of(grid, dict.fromkeys(CUBE))
        source = own if grid is None else find_grid(other)
        source_size = (other.sizes["y"], other.sizes["x"])
    if source is None or own is None:
        if source_size != size:
            got = f"{source_size} pixels and the cube's {size}, one of them without a grid"
            cure = "give both coordinates along y and x, with .assign_coords or .rio.write_transform"
            raise ValueError(message(name, "grids that are known", got, cure))
        source = None
    return _Warps(variable, _Regridding(source, own))


def _match_frames(report: xr.Dataset, name: str, cube: Cube) -> xr.Variable:
    """The warps of the cube's frames, by label where both have labels."""
    if "warp" not in report or "status" not in report:
        cure = "pass what torchalign.align returns second, or what load_report reads"
        raise ValueError(message(name, "a report with warp and status", sorted(map(str, report)), cure))
    there, here = report["status"].dims[0], cube.dims["time"]
    warp = report["warp"].transpose(there, ...)
    frames = cube.sizes["time"]
    if there in report.coords and here in cube.array.coords:
        labels = [label_text(label) for label in report[there].values]
        wanted = [label_text(label) for label in cube.array[here].values]
        if labels != wanted:
            missing = [label for label in wanted if label not in set(labels)]
            if missing or len(set(labels)) < len(labels):
                got = f"none of {', '.join(missing[:3])}" if missing else "labels that occur twice"
                expected = f"every frame of the cube among {describe(report['status'], there)}"
                raise ValueError(message(name, expected, got, "select frames with .sel, or drop the labels"))
            number = {label: position for position, label in enumerate(labels)}
            warp = warp.isel({there: [number[label] for label in wanted]})
    elif report.sizes[there] != frames:
        got = f"{report.sizes[there]} for {frames} frames"
        raise ValueError(message(name, "one warp for each frame", got, "give both labels along time"))
    return xr.Variable(_WARP, warp.variable._data if is_lazy(warp) else warp.to_numpy())


@dataclass(frozen=True)
class _Resampling:
    """How frames are resampled with warps that are known; it travels to dask's workers."""

    pixels: Pixels
    device: torch.device | str | None
    batch_size: int | None
    interpolation: Interpolation
    padding_mode: PaddingMode
    fill_value: float | None

    def run(
        self, raw: Array, usable: Tensor | None, regridding: _Regridding, warps: Array, device: torch.device
    ) -> Array:
        """Like raw, (t, C, H, W)."""
        warp = regridding(warps)
        identity = identity_warp(homography=warp.shape[-2] == 3, dtype=warp.dtype)
        moved = (warp != identity).flatten(1).any(1)
        kept = moved.numpy()[:, None, None, None]
        # read while they are on the host: of shifts a GPU needs a line of indices, not an image
        shifts = warp.shape[-2] == 2 and bool((warp[..., :2] == identity[..., :2]).all())
        warp = warp.to(device, self.pixels.compute)
        move = partial(resample, warp=warp[..., 2] if shifts else warp)
        options: dict[str, Any] = {"padding_mode": self.padding_mode, "mask": usable}
        if self.interpolation == "nearest":
            fill = self.fill_value
            if fill is not None and np.isnan(fill) and self.pixels.dtype.kind != "f":
                fill = self.pixels.nodata[0]  # checked: there is one
            return np.where(kept, self._copy(raw, move, device, fill, options), raw)
        frames = self.pixels.decode(raw, device)
        options |= {"interpolation": self.interpolation, "fill_value": self.fill_value}
        aligned = move(frames, **options).values
        if self.fill_value is not None:
            aligned = keep_nodata(aligned, frames, warp)
        return np.where(kept, self.pixels.encode(aligned, raw), raw)

    def _copy(
        self,
        raw: Array,
        move: Callable[..., Resampled],
        device: torch.device,
        fill: float | None,
        options: dict[str, Any],
    ) -> Array:
        """Pixels copied as they are: torch has few operations for unsigned integers, but bits are bits."""
        native = np.array(raw, dtype=self.pixels.native, order="C")
        kind = np.dtype(f"i{native.itemsize}") if native.dtype.kind == "u" else native.dtype
        if fill is not None:
            fill = np.array(fill).astype(native.dtype).view(kind)[()].item()
        bits = torch.from_numpy(native.view(kind)).to(device)
        copied = move(bits, interpolation="nearest", fill_value=fill, **options).values
        return copied.cpu().numpy().view(native.dtype).astype(raw.dtype)


def _apply_chunk(
    shared: tuple[_Resampling, _Regridding], raw: Array, usable: Array | None, warps: Array
) -> tuple[Array, dict[str, Array]]:
    """A task: the pixels of a chunk, (t, C, H, W), and nothing else."""
    recipe, regridding = shared
    where, sizes = _find_device(recipe.device, None), dict(zip(CUBE, raw.shape, strict=True))
    out = np.empty_like(raw)
    with undisturbed(where), torch.no_grad():
        for batch in _batches(
            len(raw), _frames_at_a_time(recipe.batch_size, sizes, recipe.pixels, where, _TASK_BATCH_BYTES)
        ):
            out[batch] = recipe.run(raw[batch], _part(usable, batch, where), regridding, warps[batch], where)
    return out, {}


def _frame_transforms(warps: _Warps, cube: Cube) -> xr.Variable:
    """Of every frame, the six numbers of GDAL that put its pixels where the warp would have.

    With the grid that they correct in the attributes, so that they can be carried over to a part of it.
    """
    grid = find_grid(cube)
    if grid is None:
        got = f"{cube.array.dims} without a regular grid"
        cure = "give it coordinates along y and x, or pass mode='resample'"
        raise ValueError(message("datacube", "a georeference to correct", got, cure))
    warp = warps.regridding(warps.load()).double()
    if warp.shape[-2] == 3:
        if not bool((warp[:, 2, :2] == 0).all()):
            cure = "pass mode='resample', or estimate another motion"
            raise ValueError(
                message("estimate", "warps that a georeference can express", "homographies", cure)
            )
        warp = from_homogeneous(warp)
    cornered = change_origin(warp, (-0.5, -0.5)).numpy()  # a georeference counts from the outer corner
    texts = []
    for matrix in cornered:
        if np.array_equal(matrix, np.eye(2, 3)):
            texts.append(grid.to_gdal())
            continue
        (a, b), (d, e) = grid.linear @ matrix[:, :2]
        c, f = grid.linear @ matrix[:, 2] + grid.corner
        texts.append(grid._replace(transform=(a, b, c, d, e, f)).to_gdal())
    of = {"grid": grid.to_gdal(), "height": grid.size[0], "width": grid.size[1]}
    return xr.Variable((cube.dims["time"],), np.array(texts, dtype=np.str_), of)


# --- the other arguments ---


def _batches(frames: int, step: int) -> list[slice]:
    """An empty cube is one empty batch."""
    return [slice(start, start + step) for start in range(0, max(frames, 1), step)]


def _mask_roles(usable: xr.Variable | None) -> tuple[str, ...]:
    return MASK if usable is not None and "time" in usable.dims else MASK[1:]


def _count_rows(module: nn.Module) -> int:
    """Rows of the warps that a module makes; of a lazy cube they must be known beforehand."""
    motions = {str(getattr(part, "motion", "")) for part in module.modules()}
    return 3 if "homography" in motions else 2


def _find_device(device: torch.device | str | None, aligner: object) -> torch.device:
    if device is None:
        state = [*aligner.parameters(), *aligner.buffers()] if isinstance(aligner, nn.Module) else []
        moved = [tensor.device for tensor in state if tensor.device.type != "cpu"]
        device = moved[0] if moved else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        cure = 'use device="cpu", or None to choose'
        raise ValueError(message("device", "a torch device of this machine", repr(device), cure)) from error


def _make_aligner(aligner: object) -> nn.Module:
    if isinstance(aligner, str):
        if aligner not in _ALIGNERS:
            expected = f"a module, or in this release one of {', '.join(map(repr, _ALIGNERS))}"
            raise ValueError(message("aligner", expected, repr(aligner), "choose one of these"))
        aligner = _ALIGNERS[aligner]()
    if not isinstance(aligner, nn.Module):
        cure = "make an instance, for example torchalign.PCC()"
        raise TypeError(message("aligner", "a torch.nn.Module or a name", repr(aligner), cure))
    return aligner


def _find_aligner(aligner: object, device: torch.device) -> nn.Module:
    module = _make_aligner(aligner)
    there = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    return module if there else copy.deepcopy(module).to(device)


def _check_batch(size: int | None) -> int | None:
    if size is None:
        return None
    complaint = message("batch_size", "a positive int or None", repr(size), "give a number of frames")
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(complaint)
    if operator.index(size) < 1:
        raise ValueError(complaint)
    return operator.index(size)


def _frames_at_a_time(
    size: int | None,
    sizes: Mapping[str, int],
    pixels: Pixels,
    device: torch.device,
    budget: int | None = None,
) -> int:
    """``size``, or what fits the budget: in bytes, of the CPU."""
    if size is not None:
        return size
    frame_bytes = pixels.compute.itemsize * sizes["band"] * sizes["y"] * sizes["x"]
    budget = _CPU_BATCH_BYTES if budget is None else budget
    if device.type == "cuda":
        budget = min(_CUDA_BATCH_BYTES, torch.cuda.mem_get_info(device)[0] // 16)
    return max(1, budget // max(1, frame_bytes))


@contextmanager
def _progress_bar(progress: bool | None, cube: Cube, word: str) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of frames done."""
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ImportError(message("progress", "tqdm", "no such package", "pip install tqdm")) from None
        progress = False
    if progress is False:
        yield lambda frames: None
        return
    # delay: seconds until it shows; disable=None: only on a terminal or in a notebook
    options: dict[str, Any] = {} if progress else {"delay": 2.0, "disable": None}
    with tqdm(total=cube.sizes["time"], desc=word, unit="frame", **options) as bar:
        yield bar.update
