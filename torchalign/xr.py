"""Labelled cubes: :func:`align` takes an ``xarray.DataArray`` and gives back its like and a report per frame.

:func:`apply` takes such a report, to other bands, other pixel sizes, masks and classes. Nothing is estimated here.
Frames stream through the device in batches, or wait in dask's chunks until somebody computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from torchalign._check import check_bool, check_fill, check_option, check_whole, message
from torchalign.aligner import Aligner
from torchalign.cube import labels, series
from torchalign.cube import run as loop
from torchalign.cube.chunks import compute_together, is_lazy
from torchalign.cube.georeference import FRAME_TRANSFORM, georeference_frames, metres_per_pixel
from torchalign.cube.hints import give_hints
from torchalign.cube.labels import CUBE, MASK, USABLE, Array, Cube, Labelled
from torchalign.cube.pixels import Pixels
from torchalign.cube.reference import Found, FrameReader, ReferenceSource, find_reference
from torchalign.cube.solution import (
    build_report,
    check_report,
    find_field,
    find_warps,
    name_statuses,
    report_fields,
    report_labels,
    summarize,
    unpack_field,
)
from torchalign.cube.tables import read_report
from torchalign.cube.variables import (
    Variables,
    is_class,
    stack_archive,
    stack_reference,
    stack_variables,
    take_apart,
)
from torchalign.functional.warp import Interpolation, PaddingMode
from torchalign.groupwise import Groupwise
from torchalign.local import Local
from torchalign.pcc import PCC
from torchalign.types import Estimate

__all__ = ["ApplyMode", "align", "apply", "extend"]


def __dir__() -> list[str]:
    return sorted(__all__)


ApplyMode = Literal["resample", "shift-coords"]


def align(
    datacube: Labelled,
    reference: xr.DataArray | xr.Dataset | Array | Tensor | Hashable = "median",
    aligner: nn.Module | str = "auto",
    *,
    bands: Sequence[Hashable] | Hashable | None = None,
    classes: Sequence[Hashable] | Hashable | None = None,
    mask: xr.DataArray | Array | Tensor | None = None,
    reference_mask: xr.DataArray | Array | Tensor | None = None,
    init: xr.Dataset | Estimate | Array | Tensor | str | Path | None = None,
    sun: xr.DataArray | Array | Tensor | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    graph: bool = True,
    progress: bool | None = None,
    time_dim: Hashable | None = None,
    band_dim: Hashable | None = None,
    y_dim: Hashable | None = None,
    x_dim: Hashable | None = None,
) -> tuple[Labelled, xr.Dataset]:
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
    lazy cube, which are not read beforehand) and come back rounded and clamped; floats that ``encoding`` packs into
    integers come back clamped to what these hold.
    Nodata (``_FillValue``, ``missing_value``, ``nodata`` in attrs or encoding, ``rio.nodata``) and NaN are
    not used and stay what they are; a valid pixel that would round to nodata takes the value beside it. (A
    float band with both NaN and nodata gets the latter for both.) An aligner's ``fill_value`` is for what
    comes from outside the frame or was masked. Frames of a ``status`` other than ``OK`` come back bit for
    bit.

    Args:
        datacube: time, y, x and maybe band; integer or floating. Or a Dataset of such variables, as
            ``odc.stac.load`` returns: one estimate of all bands (or of ``bands``) moves every variable, each
            with its own nodata, dtype and attributes. Variables without time, y or x stay as they are.
        reference: what the frames are brought onto.

            * ``"median"`` or ``"mean"`` over time of the usable pixels, each frame where its pairs with others place
              it, as ``"groupwise"`` does: as it comes, a cloudy or displaced frame would fit its own pixels in the
              median. Frames that cannot be placed are left out; where those are three quarters, the frames are taken
              as they are, as ``cube.median("time")`` takes them.
            * ``"iterative"``: the frames are aligned with that median, by the aligner, the median of the *aligned* frames
              is taken, and so on until they stop moving (0.005 px). It is anchored where the median frame lies. Unless
              the frames' pairs fit it clearly better than the first median, that one is taken. Costs three to five
              estimates more, and as many medians.
            * ``"first"``, or the label of exactly one frame (``"2020-05-01"``, a ``datetime64``).
            * ``"clearest"``: the frame whose share of usable pixels, times its correlation with the median, is
              the largest.
            * ``"groupwise"``: none. All frames are placed by their pairs with others, see
              :class:`torchalign.Groupwise`; the median of all positions is at 0. ``aligner`` is what compares two
              frames (``"auto"`` is ``PCC()``), or a ``Groupwise`` with options. The report has ``closure``,
              ``support``, ``sigma_season`` and ``season_shift_x/y`` instead of a residual.
            * ``"previous"``: each frame onto the last one before it that was accepted. Errors add up along the
              chain; it is for series whose ends have nothing in common.
            * pixels: a DataArray on the cube's grid (with time, one per frame; bands are matched by label;
              without band, one picture for every band), for example a frame of another cube, a Dataset with the
              variables of a Dataset, or an array
              (C, H, W) or (T, C, H, W). In pixels without a declared nodata value the cube's applies.
        aligner: a module, for example ``torchalign.PCC(channel="mean")``; it is neither changed nor moved.
            Or a name, for default options: ``"auto"``, ``"cross"``, ``"pcc"``, ``"ecc"``, ``"local"`` or ``"lgm"``.
            ``"local"`` is ``Cascade(PCC(), Local())``. ``"cross"``
            is for frames and a reference of different sensors, ``PCC(contrast="structure")``. ``"auto"`` stands for
            the best general choice of the installed release; in this one it is ``Cascade(PCC(), ECC())``.
        bands: the variables of a Dataset (or the bands of a DataArray) that the estimate sees; default: all but
            classes. All of them are aligned. An aligner's band numbers (``channel``, ``rgb_bands``) count these.
        classes: variables (or bands) that nothing may blend; they are copied from the nearest pixel and the
            estimate does not see them. So are, without being named, bool variables, those with ``flag_values`` or
            ``flag_masks``, and those called like a classification (SCL, QA…, CLM, Fmask, UDM, …_class).
        mask: bool, **True = usable**: a DataArray with some of time, y and x, on the cube's coordinates (dates as
            :func:`apply` matches them), or an array broadcastable to (T, H, W). Acts in the estimate, the warp and the
            reference taken over time. Files with an alpha band or a mask of their own bring the coordinate ``usable``,
            which acts beside it.
        reference_mask: the same for the reference.
        init: an earlier solution to start from: a report (of other bands or another pixel size, too), the path of
            one, an ``Estimate``, or warps (T, 2, 3) or (T, 3, 3). Frames are matched by their labels.
        sun: for ``"groupwise"``: (T, 2), elevation of the sun and azimuth clockwise from north, in degrees.
            Default: from the dates (UTC; without a time of day, half past ten local solar time) and the middle of
            the cube, where it has both dates and a CRS.
        verify: measure what is left after alignment, once more and for every aligner in the same way: by phase
            correlation of the aligned frame with the reference. ``PCC`` takes two to three times as long; slower aligners
            hardly notice. It tells of a warp that went wrong and of what the aligner left behind; it does not
            tell of an error that the reference itself has.
        device: where to compute. Default: where the aligner's parameters are if that is not the CPU, else
            CUDA if there is any, else the CPU; for a lazy cube, of the machine that computes the chunk.
        batch_size: frames on the device at a time. Default: what fits 64 MiB on the CPU, and 1 GiB (or 1/16
            of the free memory) on CUDA. A lazy cube gets chunks of this size; by default it keeps its own.
        graph: on CUDA, record what is done to three and more whole batches as a CUDA graph and play it back: one
            launch a batch. An aligner that cannot be recorded runs as it is called, after a warning; modules that are
            no :class:`torchalign.Aligner`, those with a function as ``channel``, and ``"groupwise"`` and ``"previous"``
            always do. It holds one more batch and its result, and what a call needs, until all frames are done.
        progress: show a bar: yes, no, or (default) if tqdm is installed and it takes more than two seconds.
            For lazy cubes dask has bars of its own.
        time_dim: the name of the time dim, where it is none of the above.
        band_dim: the same for band.
        y_dim: the same for y.
        x_dim: the same for x.

    Returns:
        The aligned cube or Dataset, with the same dims, coords, attrs, name, dtype and encoding. And the
        report along time, with the coords that the cube has along it: ``warp`` (T, 2, 3) or (T, 3, 3), moving
        → reference in pixels; ``shift_x`` and ``shift_y``, the displacement of the frame's centre in pixels,
        right and down; ``shift_x_metres`` and ``shift_y_metres``, the same along the map's axes (north is positive)
        where the grid is regular and has a unit of length; ``score``, ``score_before``, ``sigma`` (pixels),
        ``covariance`` (T, 2, 2), ``stage``,
        ``status``, a :class:`~torchalign.Status`, and its ``status_name``;
        of an aligner with :class:`~torchalign.Local` the ``field``, its
        ``field_sigma`` and ``field_lattice``, and its length over the frame, ``local_shift_median`` and
        ``local_shift_p95``, in pixels; and of ``verify`` ``residual_x`` and ``residual_y``, like the
        shifts, and ``misfit``, how far parts of the frame disagree (NaN where nothing could be measured). Its
        attributes hold the grid and, unless it is lazy, the numbers of :func:`torchalign.summarize`.

    Raises:
        TypeError: the cube is no DataArray or Dataset of numbers, a mask is not bool, an argument is of
        another kind. ValueError: unknown, missing or ambiguous dims; coordinates other than the cube's; a
            label of no frame or of several; an unknown aligner, device or batch size; a fill value that the dtype
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
    dims = {"time": time_dim, "band": band_dim, "y": y_dim, "x": x_dim}
    check_bool("verify", verify)
    check_bool("graph", graph)
    running, module = _running(device, batch_size, progress, mask), loop.find_aligner(aligner)
    running |= {"verify": verify, "graph": graph}
    options = _Request(module, aligner == "auto", reference_mask, sun, init, **running)
    variables, join = take_apart(datacube, bands, classes, dims)
    if variables is None:
        return _align_cube(Cube.of(datacube, dims), reference, options)  # type: ignore[return-value]  # as it came
    moved, report = _align_variables(variables, reference, options)
    return join(moved), report


@dataclass(frozen=True, kw_only=True)
class _Running:
    device: torch.device | str | None
    batch_size: int | None
    progress: bool | None
    mask: Any


def _running(device: Any, batch_size: Any, progress: Any, mask: Any) -> dict[str, Any]:
    size = None if batch_size is None else check_whole("batch_size", batch_size)
    return {"device": device, "batch_size": size, "progress": progress, "mask": mask}


@dataclass(frozen=True)
class _Request(_Running):
    """Of :func:`align` and :func:`extend`."""

    module: nn.Module
    is_auto: bool  # the module is the default
    other_mask: Any  # of the reference, or of the archive
    sun: Any
    init: Any = None
    verify: bool = False
    graph: bool = False


def _align_cube(cube: Cube, reference: Any, options: _Request) -> tuple[xr.DataArray, xr.Dataset]:
    """Of one DataArray, whose bands are of one kind."""
    module, sun, lazy = options.module, options.sun, is_lazy(cube.array)
    word = reference if isinstance(reference, str) else None
    if word in ("groupwise", "previous"):
        _check_series(word, options.other_mask, options.init, sun)
        chosen = _series_module(module, options.is_auto) if word == "groupwise" else module
        return _align_series(cube, word, replace(options, module=chosen))
    if isinstance(module, Groupwise) or sun is not None:
        name, got = ("aligner", "Groupwise") if isinstance(module, Groupwise) else ("sun", "a value")
        cure = 'pass reference="groupwise"'
        raise ValueError(message(name, "what a reference needs", f"{got} with a reference", cure))
    there, _, reader = _prepare(cube, options)
    # each chunk of a lazy cube chooses for itself, on the machine that computes it
    device, module = (options.device, module) if lazy else (reader.device, there)
    nodes = module.field_nodes(cube.size) if isinstance(module, Aligner) else None
    operation = loop.AlignFrames(
        reader.pixels,
        device,
        options.batch_size,
        module,
        options.verify,
        metres_per_pixel(cube),
        nodes=nodes,
        graph=options.graph,
    )
    others = (
        loop.mask_companion(reader.usable),
        loop.mask_companion(labels.find_mask(options.other_mask, "reference_mask", cube)),
        find_warps(_read_solution(options.init), "init", cube),
    )

    def estimate(source: ReferenceSource) -> Found:
        only = replace(operation, makes_pixels=False)
        _, fields = loop.run(only, cube, (loop.reference_companion(source, cube), *others))
        known = compute_together(fields) if lazy else fields  # now, and without the pixels
        told = {name: torch.from_numpy(np.array(values)) for name, values in known.items()}
        field = unpack_field(told["field"], told["field_lattice"]) if "field" in told else None
        return Found(told["warp"], told["status"] == 0, field)

    with torch.no_grad(), loop.progress_bar(options.progress, cube, "align") as advance:
        source = find_reference(reference, reader, estimate, series.PairPositions(reader, there))
        hints = give_hints(cube, reader.pixels, reader.usable, source)
        values, fields = loop.run(operation, cube, (loop.reference_companion(source, cube), *others), advance)
    attrs = {"aligner": repr(module), "reference": source.name}
    attrs |= {"notes": " ".join(hints)} if hints else {}
    report = build_report(fields, cube, attrs)
    return _labelled(values, cube, report, device), report


def _align_variables(
    variables: Variables, reference: Any, options: _Request
) -> tuple[xr.Dataset, xr.Dataset]:
    """Of a Dataset: one estimate of the bands that it may see, and its warps for all variables of frames."""
    stacked, slices = stack_variables(variables)
    if isinstance(reference, xr.Dataset):
        reference = stack_reference(reference, variables)
    aligned, report = _align_cube(Cube.of(stacked), reference, options)
    seen, classes = ", ".join(map(str, variables.seen)), ", ".join(map(str, variables.classes))
    report.attrs |= {"bands": seen} | ({"classes": classes} if classes else {})
    moved = _move_variables(variables, (aligned, slices), report, options)
    return moved, report


def _move_variables(
    variables: Variables,
    stacked: tuple[xr.DataArray, Mapping[Hashable, slice]],
    report: xr.Dataset,
    options: _Request,
) -> xr.Dataset:
    """All variables of frames: those that were stacked for the estimate are aligned already."""
    aligned, slices = stacked
    resampling = loop.resampling_of(_comparing(options.module))
    moved = {}
    for name in (*variables.seen, *variables.moved, *variables.classes):
        array = variables.dataset[name]
        if name in slices:
            own = variables.cube(name)
            part = aligned.variable[:, slices[name] if "band" in own.dims else slices[name].start]
            roles = [role for role in CUBE if role in own.dims]
            values = xr.Variable([own.dims[role] for role in roles], part.data).transpose(*array.dims)
            moved[name] = array.copy(data=values.data)
            continue
        is_class = name in variables.classes
        how: dict[str, Any] = {"device": options.device, "batch_size": options.batch_size}
        how |= {"interpolation": "nearest"} if is_class else resampling | {"mask": options.mask}
        how |= {f"{role}_dim": dim for role, dim in variables.given(name).items()}
        moved[name] = apply(array, report, progress=False, **how)
    return _put_together(variables.dataset, moved)


def _put_together(dataset: xr.Dataset, moved: Mapping[Hashable, xr.DataArray]) -> xr.Dataset:
    """The variables, in the order and with the attributes that they had."""
    result = dataset.drop_vars(FRAME_TRANSFORM, errors="ignore")
    for name, array in moved.items():
        result[name] = array.variable
        for own in (FRAME_TRANSFORM, USABLE):
            if own in array.coords:
                result = result.assign_coords({own: array.coords[own].variable})
    return result


def _labelled(
    values: Any, cube: Cube, solution: Any, device: torch.device | str | None, grid: Any = None
) -> xr.DataArray:
    """The cube with other pixels.

    What a file's alpha band or mask said goes with them; nothing from outside the frame is usable. A georeference of
    its own, as "shift-coords" makes, is no longer that of resampled pixels.
    """
    aligned = cube.array.copy(data=values).drop_vars(FRAME_TRANSFORM, errors="ignore")
    codes = labels.own_codes(cube)
    if codes is None:
        return aligned
    own = cube.array.coords[USABLE]
    array = xr.DataArray(codes.astype(np.uint8) if codes.dtype == np.bool_ else codes)
    if is_lazy(cube.array):
        array = array.chunk(time=cube.array.chunksizes[cube.dims["time"]])
    seen = Cube(array, {role: role for role in MASK})
    nearest = loop.WarpFrames(Pixels.of(seen), device, None, "nearest", "zeros", 0.0)
    moving = find_warps(solution, "report", cube, grid), None, *find_field(solution, "report", cube, grid)
    moved, _ = loop.run(nearest, seen, moving)
    dims = [cube.dims[str(role)] for role in array.dims]
    coordinate = xr.Variable(dims, moved.astype(codes.dtype), own.attrs, own.encoding)
    return aligned.assign_coords({USABLE: coordinate})


def _check_series(word: str, reference_mask: object, init: object, sun: object) -> None:
    for name, value in (("reference_mask", reference_mask), ("init", init), ("sun", sun)):
        if value is not None and (name != "sun" or word == "previous"):
            got = f"{type(value).__name__} with reference={word!r}"
            raise ValueError(message(name, "None", got, "leave it out: there is nothing for it to act on"))


def _series_module(module: nn.Module, is_auto: bool) -> Groupwise:
    """The pairs of a series are compared by PCC, unless another aligner is named."""
    if isinstance(module, Groupwise):
        return module
    if is_auto:
        return Groupwise(PCC())
    return Groupwise(module)  # type: ignore[arg-type]  # it complains of what is no aligner


def _comparing(module: Any) -> Any:
    """What compares two frames."""
    return module.aligner if isinstance(module, Groupwise) else module


def _prepare(cube: Cube, options: _Request) -> tuple[Any, Any, FrameReader]:
    """The module where it computes, what of it compares two frames, and what reads the frames there."""
    where = loop.find_device(options.device, options.module)
    module = loop.place_module(options.module, where)
    aligner = _comparing(module)
    pixels = Pixels.of(cube, getattr(aligner, "fill_value", None), "aligner.fill_value")
    return module, aligner, FrameReader(cube, pixels, labels.find_usable(options.mask, "mask", cube), where)


def _align_series(cube: Cube, word: str, options: _Request) -> tuple[xr.DataArray, xr.Dataset]:
    """Frames are read twice: to be placed, now; and to be resampled, when they are wanted."""
    if any(isinstance(part, Local) for part in options.module.modules()):
        cure = "leave Local out, or name a reference"
        raise ValueError(message("aligner", f"no local shifts with reference={word!r}", "Local", cure))
    module, aligner, reader = _prepare(cube, options)
    hints, metres = give_hints(cube, reader.pixels, reader.usable), metres_per_pixel(cube)
    attrs: dict[str, Any] = {"aligner": repr(module)} | ({"notes": " ".join(hints)} if hints else {})
    with torch.no_grad(), loop.progress_bar(options.progress, cube, "align") as advance:
        if isinstance(module, Groupwise):
            angles = series.find_sun(options.sun, cube) if module.season != "none" else None
            sun = series.sun_tensor(angles, reader.device)
            solution = module.place(series.see_frames(module, reader), sun)
            estimate, fields = solution.estimate, series.series_fields(solution, cube.size, metres, angles)
            attrs["reference"] = "groupwise (the median of all positions is 0)"
            attrs |= {"season": module.season, **series.pair_attrs(solution)}
        else:
            estimate = series.chain_frames(module, reader)
            fields = report_fields(estimate, None, cube.size, metres)
            attrs["reference"] = "previous (each frame on the last one that was accepted)"
        values = _move_frames(reader, aligner, estimate, options, advance)
    report = build_report(fields, cube, attrs)
    return _labelled(values, cube, report, options.device), report


def _move_frames(
    reader: FrameReader,
    aligner: Any,
    estimate: Estimate,
    running: _Running,
    advance: Callable[[int], object],
) -> Any:
    """Pixels in the order of the cube's own dims, resampled as the aligner would."""
    cube = reader.cube
    device = running.device if is_lazy(cube.array) else reader.device
    operation = loop.WarpFrames(reader.pixels, device, running.batch_size, **loop.resampling_of(aligner))
    warps = find_warps(estimate, "estimate", cube)
    return loop.run(operation, cube, (warps, loop.mask_companion(reader.usable)), advance)[0]


def extend(  # noqa: D417  # options that are those of align stand in one line
    datacube: Labelled,
    report: xr.Dataset | str | Path,
    *,
    archive: Labelled,
    aligner: nn.Module | str = "auto",
    bands: Sequence[Hashable] | Hashable | None = None,
    classes: Sequence[Hashable] | Hashable | None = None,
    mask: xr.DataArray | Array | Tensor | None = None,
    archive_mask: xr.DataArray | Array | Tensor | None = None,
    sun: xr.DataArray | Array | Tensor | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    time_dim: Hashable | None = None,
    band_dim: Hashable | None = None,
    y_dim: Hashable | None = None,
    x_dim: Hashable | None = None,
) -> tuple[Labelled, xr.Dataset]:
    """Align new frames with an archive that was aligned before, and that stays as it is.

    Each new frame is compared with the twelve frames of the archive that look most like it, and placed among them;
    the old frames, and where they lie in common, do not move. The archive's pixels are those before alignment.

    Args:
        datacube: the new frames, on the archive's grid; time, y, x and maybe band. Or a Dataset, as in :func:`align`.
        report: of the archive, from :func:`align` with shifts only; or its path.
        archive: the frames of that report, as they came; a Dataset for a Dataset, with the bands that are compared.
        aligner: as it was for the archive with ``"groupwise"``: what compares two frames, or a ``Groupwise``.
        bands: what of both is compared, as in :func:`align`.
        classes: of the new frames, as in :func:`align`.
        mask: of the new frames, as in :func:`align`.
        archive_mask: of the archive's frames.
        sun: of the new frames, as in :func:`align`. Needed, or computed from dates and place, where the sun's part
            was taken off the archive.
        device, batch_size, progress, time_dim, band_dim, y_dim, x_dim: as in :func:`align`.

    Returns:
        The new frames, aligned; and the report of all frames, the old ones' rows first and as they were.

    Raises:
        TypeError: an argument of another kind.
        ValueError: frames of another size than the archive's; dates that the report has already; a report of other
            frames, or of more than shifts; an unknown sun that is needed.

    Example:
        >>> from torchalign.datasets import demo_stack
        >>> cube = demo_stack(frames=8, size=(96, 96)).cube
        >>> old, new = cube.isel(time=slice(0, 7)), cube.isel(time=slice(7, 8))
        >>> _, report = align(old, "groupwise")
        >>> aligned, longer = extend(new, report, archive=old)
        >>> longer.sizes["time"], bool((longer.warp[:7] == report.warp).all())
        (8, True)
    """
    dims = {"time": time_dim, "band": band_dim, "y": y_dim, "x": x_dim}
    report = check_report(_read_solution(report))
    if type(archive) is not type(datacube):
        expected, got = f"a {type(datacube).__name__}, as the new frames are", type(archive).__name__
        raise TypeError(message("archive", expected, got, "pass the cube that the report was made on"))
    module = _series_module(loop.find_aligner(aligner), aligner == "auto")
    running = _running(device, batch_size, progress, mask)
    options = _Request(module, False, archive_mask, sun, **running)
    variables, join = take_apart(datacube, bands, classes, dims)
    if variables is None:
        cube, old = Cube.of(datacube, dims), Cube.of(archive, dims, "archive")
        aligned, rows = _extend_cube(cube, old, report, options)
        return aligned, _longer_report(report, rows)  # type: ignore[return-value]  # as it came
    stacked, slices = stack_variables(variables)
    old = Cube.of(stack_archive(archive, variables, dims), None, "archive")
    aligned, rows = _extend_cube(Cube.of(stacked), old, report, options)
    moved = _move_variables(variables, (aligned, slices), rows, options)
    return join(moved), _longer_report(report, rows)


def _extend_cube(
    cube: Cube, old: Cube, report: xr.Dataset, options: _Request
) -> tuple[xr.DataArray, xr.Dataset]:
    """The new frames, and their rows of the report."""
    if cube.size != old.size:
        cure = "bring them onto the archive's grid first"
        expected = f"frames of {old.size} pixels, as the archive's"
        raise ValueError(message("datacube", expected, cube.size, cure))
    if report["status"].size != old.sizes["time"]:
        got = f"{old.sizes['time']} for a report of {report['status'].size}"
        raise ValueError(message("archive", "the frames of the report", got, "pass the cube it was made on"))
    if report["warp"].shape[1] != 2 or not bool((report["warp"][..., :2] == np.eye(2)).all()):
        cure = "align the archive with a motion that is a translation"
        raise ValueError(message("report", "shifts only", "warps that do more", cure))
    time, own = report["status"].dims[0], cube.coordinate("time")
    if (own is None) != (time not in report.coords):
        expected, got = ("dates", "none") if own is None else ("no dates", "some")
        cure = "give both a coordinate along time, or neither"
        raise ValueError(message("datacube", f"{expected}, as the report has", got, cure))
    if own is not None:
        found = labels.match_labels(own.values, report_labels(report))
        again = [position for position, row in enumerate(found) if row is not None]
        if again:
            dim, some = cube.dims["time"], ", ".join(map(labels.label_text, own.values[again[:3]]))
            cure = f"leave them out, datacube.drop_isel({dim}={again})"
            raise ValueError(message("datacube", "dates that the report has not", some, cure))
    module, aligner, reader = _prepare(cube, options)
    old_usable = labels.find_usable(options.other_mask, "archive_mask", old)
    readers = reader, FrameReader(old, Pixels.of(old), old_usable, reader.device)
    with torch.no_grad(), loop.progress_bar(options.progress, cube, "extend") as advance:
        there = series.sun_tensor(series.find_sun(None, old), reader.device)
        angles = series.find_sun(options.sun, cube)
        here = series.sun_tensor(angles, reader.device)
        positions = series.ArchivePositions.of(report, there, reader.device)
        new_frames, old_frames = (series.see_frames(module, each) for each in readers)
        solution = module.extend(new_frames, old_frames, positions.shift, positions.sigma, positions.accepted)
        solution = series.without_season(solution, positions.season_shift(here, cube.sizes["time"]))
        fields = series.series_fields(solution, cube.size, metres_per_pixel(cube), angles)
        values = _move_frames(reader, aligner, solution.estimate, options, advance)
    rows = build_report(fields, cube, {})
    return _labelled(values, cube, rows, options.device), rows


def _longer_report(report: xr.Dataset, rows: xr.Dataset) -> xr.Dataset:
    """The old rows as they were, and the new ones; what only one of them has is left out, but for the old's."""
    time = report["status"].dims[0]
    rows = rows.rename({rows["status"].dims[0]: time})
    both = [name for name in report.data_vars if name in rows]
    parts = [report[both], rows[both].astype({name: report[name].dtype for name in both})]
    if len({str(part.indexes[time].dtype) for part in parts if time in part.indexes}) > 1:
        # a report that was stored has dates in UTC, whatever the cube has
        parts = [labels.with_plain_dates(part, time) for part in parts]
    longer = xr.concat(
        parts,
        dim=time,
        join="override",
        combine_attrs="override",
        coords="minimal",
        compat="override",
        data_vars="minimal",
    )
    longer.attrs |= summarize(longer).attrs()
    return name_statuses(longer)


def apply(  # noqa: D417  # options that are those of align stand in one line
    datacube: Labelled,
    estimate: xr.Dataset | Estimate | Array | Tensor | str | Path,
    *,
    mode: ApplyMode = "resample",
    interpolation: Interpolation | None = None,
    classes: Sequence[Hashable] | Hashable | None = None,
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
) -> Labelled:
    """Apply one solution to another cube: other bands, another pixel size or extent, a mask, a classification.

    The warps of a report are in pixels of the cube they were estimated on, whose grid the report keeps; they are
    converted to the pixels of this cube by the two grids (pixel size, origin, direction of the axes). Frames are
    matched by their labels along time, dates that are not there by the second or the day where both sides have one such
    date; without labels, by number. Frames that were not aligned come back bit for
    bit. Pixels, nodata, dtype, dask and everything about the cube are as in :func:`align`.

    Args:
        datacube: time, y, x and maybe band; integer, floating or bool. Or a Dataset of such variables, as in
            :func:`align`.
        estimate: a report, or the path of one (:func:`torchalign.save_report`); a plain ``Estimate`` of one series,
            or warps (T, 2, 3) or (T, 3, 3), which are in pixels of ``grid``.
        mode: ``"resample"``, or ``"shift-coords"``: the pixels are not touched. Each frame is given the
            georeference that puts it in its place, as GDAL's six numbers in the coordinate ``geotransform`` along
            time, from where :func:`torchalign.write_stack` puts them into the files.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``; ``"nearest"`` copies
            pixels, whatever they mean. Default: ``"nearest"`` for bool and classes, else ``"bilinear"``.
        classes: as in :func:`align`.
        padding_mode: what comes from outside the frame: ``"border"``, ``"zeros"`` or ``"reflection"``.
        fill_value: or this value.
        mask: as in :func:`align`: True = usable, acts in the warp.
        grid: the cube that a plain estimate was made on. Default: this one.
        device, batch_size, progress, time_dim, band_dim, y_dim, x_dim: as in :func:`align`.

    Returns:
        Like ``datacube``, aligned.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a frame that the report has not; grids of which one is unknown, that differ in CRS or that are
            rotated against each other; a bool cube that is to be interpolated; ``"shift-coords"`` without a grid,
            or with a homography, which no georeference can express; an unknown option.

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
    if interpolation is not None:
        check_option("interpolation", interpolation, Interpolation)
    check_option("padding_mode", padding_mode, PaddingMode)
    check_fill("fill_value", fill_value)
    dims: dict[str, Hashable | None] = {"time": time_dim, "band": band_dim, "y": y_dim, "x": x_dim}
    running = _running(device, batch_size, progress, mask)
    how = _Application(mode, interpolation, padding_mode, fill_value, grid, **running)
    copied = mode != "resample" or interpolation == "nearest"
    if isinstance(datacube, xr.DataArray) and copied:
        return _apply_to_cube(datacube, estimate, how, dims)
    variables, join = take_apart(datacube, None, classes, dims)
    if variables is None:
        return _apply_to_cube(datacube, estimate, how, dims)  # type: ignore[arg-type, return-value]  # a DataArray
    return join(_apply_to_variables(variables, _read_solution(estimate), how))


@dataclass(frozen=True)
class _Application(_Running):
    """Of :func:`apply`."""

    mode: ApplyMode
    interpolation: Interpolation | None
    padding_mode: PaddingMode
    fill_value: float | None
    grid: xr.DataArray | None


def _apply_to_variables(variables: Variables, estimate: Any, how: _Application) -> xr.Dataset:
    nearest, moved = replace(how, interpolation="nearest", mask=None, fill_value=None), {}
    for name in (*variables.seen, *variables.moved, *variables.classes):
        own = nearest if name in variables.classes else how
        moved[name] = _apply_to_cube(variables.dataset[name], estimate, own, variables.given(name))
    return _put_together(variables.dataset, moved)


def _apply_to_cube(
    datacube: xr.DataArray, estimate: Any, how: _Application, dims: Mapping[str, Any]
) -> xr.DataArray:
    interpolation = how.interpolation or ("nearest" if is_class(datacube) else "bilinear")
    is_bool = datacube.dtype == np.bool_
    if is_bool and how.mode == "resample" and interpolation != "nearest":
        got = f"bool with interpolation={interpolation!r}"
        raise ValueError(message("datacube", "numbers to interpolate", got, 'pass interpolation="nearest"'))
    codes = datacube
    if is_bool or datacube.dtype.kind in "mM":  # dates of pixels are copied like classes
        codes = datacube.copy(data=datacube.data.astype(np.uint8 if is_bool else np.int64))
    cube = Cube.of(codes, dims)
    estimate = _read_solution(estimate)
    warps = find_warps(estimate, "estimate", cube, how.grid)
    if warps is None:
        cure = "pass a report, its path, an Estimate or warps"
        raise TypeError(message("estimate", "a report", "None", cure))
    fields = find_field(estimate, "estimate", cube, how.grid)
    if how.mode == "shift-coords":
        if fields[0] is not None and bool((fields[0].variable != 0).any()):
            cure = 'use mode="resample", or torchalign.io.write_ground_control'
            raise ValueError(message("mode", '"resample" for local shifts', repr(how.mode), cure))
        warp = warps.read(torch.device("cpu"), slice(None))
        return datacube.assign_coords({FRAME_TRANSFORM: georeference_frames(cube, warp)})
    pixels = Pixels.of(cube, how.fill_value, "fill_value")
    resampling = (interpolation, how.padding_mode, how.fill_value)
    operation = loop.WarpFrames(pixels, how.device, how.batch_size, *resampling)
    usable = (labels.find_mask if interpolation == "nearest" else labels.find_usable)(how.mask, "mask", cube)
    with torch.no_grad(), loop.progress_bar(how.progress, cube, "apply") as advance:
        values, _ = loop.run(operation, cube, (warps, loop.mask_companion(usable), *fields), advance)
    moved = _labelled(values, cube, estimate, how.device, how.grid)
    return moved if codes is datacube else moved.copy(data=moved.data.astype(datacube.dtype))


def _read_solution(given: Any) -> Any:
    return read_report(Path(given)) if isinstance(given, (str, Path)) else given
