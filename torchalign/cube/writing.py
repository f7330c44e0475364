"""A cube as a folder of GeoTIFFs, one a frame, nothing changed on the way; with rasterio."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from torchalign._check import message
from torchalign.cube.chunks import chunk_sizes, is_lazy, parts_along_time, rows_after, share
from torchalign.cube.files import atomic, check_free
from torchalign.cube.georeference import find_georeference, frame_transforms
from torchalign.cube.gridding import control_points
from torchalign.cube.headers import quiet
from torchalign.cube.labels import CUBE, MASK, USABLE, Array, Cube, as_numbers, frame_names, load, own_codes
from torchalign.cube.pixels import find_nodata
from torchalign.cube.rasters import COLOURS, FILE, SCALING, TAGS
from torchalign.cube.stores import finish_writing

_ENDINGS = (".tif", ".tiff")

Compression = Literal["deflate", "lzw", "zstd", "none"]


class WriteOptions(NamedTuple):
    """Of :func:`torchalign.write_stack`."""

    template: str | None
    driver: str
    compression: Compression
    overwrite: bool
    tiled: bool = False  # in blocks of 512, written as they come
    suffix: str = ""  # of names made of dates and numbers


def write_rasters(
    cube: Cube, folder: Path, options: WriteOptions, report: xr.Dataset | None, compute: bool
) -> Any:
    """See :func:`torchalign.write_stack`."""
    files, usable = plan_files(cube, folder, options), own_codes(cube)
    if not is_lazy(cube.array):
        for number, file in enumerate(files):
            one = slice(number, number + 1)
            codes = None if usable is None else load(usable, MASK, time=one)
            _write_files(load(cube.variable, CUBE, time=one), codes, (file,), 0, 1)
        return finish_writing([file.path for file in files], report, compute)
    from dask.delayed import delayed

    chunks = chunk_sizes(cube, None)
    everything = share(files)  # in one task: dask would keep many small ones, and pixels, waiting
    write, edges = delayed(_write_files, pure=False), itertools.pairwise(np.cumsum((0, *chunks)))
    pixels, seen = parts_along_time(cube.variable, CUBE, chunks), parts_along_time(usable, MASK, chunks)
    jobs = [
        write(part, mask, everything, int(first), int(last))
        for part, mask, (first, last) in zip(pixels, seen, edges, strict=True)
    ]
    rows = None if report is None else rows_after(report, jobs, chunks)
    return finish_writing(delayed(_all_paths, pure=False)(jobs), rows, compute)


def write_variables(
    dataset: xr.Dataset, folder: Path, options: WriteOptions, report: xr.Dataset | None, compute: bool
) -> Any:
    """Of a Dataset a file for each variable and date; those that are no frames are named in a warning."""
    frames = frame_names(dataset, "write it with torchalign.io.write_cube", kinds="iufb")
    others = [str(name) for name in dataset.data_vars if name not in frames]
    if others:
        told = "not written as GeoTIFF, being no frames of numbers; torchalign.io.write_cube keeps them"
        warnings.warn(f"{', '.join(others)}: {told}", UserWarning, stacklevel=3)
    written = []
    for name in frames:
        array = as_numbers(dataset[name])
        for own in (FILE, TAGS):
            if f"{own}_{name}" in array.coords:
                array = array.assign_coords({own: array.coords[f"{own}_{name}"].variable})
        own_options = options._replace(suffix=f"_{name}")
        cube = Cube.of(array, None, f"cube[{name!r}]")
        written.append(write_rasters(cube, folder, own_options, None, False))
    if any(is_lazy(dataset[name]) for name in frames):
        from dask.delayed import delayed

        return finish_writing(delayed(_all_paths, pure=False)(written), report, compute)
    return finish_writing(_all_paths(written), report, compute)


def _all_paths(parts: Sequence[Sequence[Path]]) -> list[Path]:
    return [path for part in parts for path in part]


class FilePlan(NamedTuple):
    """What is written of a frame, beside its pixels."""

    path: Path
    profile: dict[str, Any]  # of rasterio
    bands: dict[str, list[Any]]  # what each band is called, how it is scaled and coloured
    transform: tuple[float, ...] | None
    tags: str
    gcps: str
    mask: str  # "alpha", "mask" or ""
    overviews: tuple[int, ...]


def plan_files(cube: Cube, folder: Path, options: WriteOptions) -> tuple[FilePlan, ...]:
    """What is written of every frame, beside its pixels; the folder is made."""
    paths = [folder / name for name in _file_names(cube, options.template, options.suffix)]
    for path in paths:
        check_free(path, options.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    profile, bands = _raster_profile(cube, options.driver, options.compression), _band_tags(cube)
    if options.tiled and min(cube.size) >= 512:
        profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "BIGTIFF": "IF_SAFER"}
    transforms, tags = frame_transforms(cube), cube.array.coords.get(TAGS)
    texts = [""] * len(paths) if tags is None or tags.dims != (cube.dims["time"],) else map(str, tags.values)
    mapping = cube.array.coords.get("spatial_ref")
    gcps = "" if mapping is None else str(mapping.attrs.get("gcps", ""))
    if mapping is not None and gcps:
        profile["crs"] = mapping.attrs.get("crs_wkt")
        transforms = [None] * len(paths)
    mask = ""
    if own_codes(cube) is not None:
        mask = str(cube.array.coords[USABLE].attrs.get("kind", "mask"))
        profile["count"] += mask == "alpha"
    levels = () if options.driver == "COG" else tuple(cube.array.encoding.get("overviews", ()))
    return tuple(
        FilePlan(path, profile, bands, own, text, gcps, mask, levels)
        for path, own, text in zip(paths, transforms, texts, strict=True)
    )


def _file_names(cube: Cube, template: str | None, suffix: str) -> list[str]:
    time, count = cube.dims["time"], cube.sizes["time"]
    stems: list[str] = [""] * count
    if FILE in cube.array.coords and cube.array[FILE].dims == (time,):
        stems = [str(name) for name in cube.array[FILE].values]
    own = cube.coordinate("time", local=True)
    labels = [None] * count if own is None else list(own.values)
    dates = [_as_datetime(label) for label in labels]
    if template is not None:
        names = []
        for number, (stem, date, label) in enumerate(zip(stems, dates, labels, strict=True)):
            fields = {"number": number, "name": cube.array.name or "cube"}
            fields |= {"time": label if date is None else date} | ({"file": Path(stem).stem} if stem else {})
            try:
                names.append(template.format(**fields))
            except (KeyError, IndexError, ValueError, TypeError) as error:
                cure = f"use {{time:%Y%m%d}}, {{number}}, {{name}}{', {file}' if stem else ''}"
                got = f"{template!r} ({error!r})"
                raise ValueError(message("template", "a name with fields", got, cure)) from error
    elif all(stems):
        names = [
            stem if stem.lower().endswith(_ENDINGS) else Path(stem).with_suffix(".tif").name for stem in stems
        ]
    elif None not in dates:
        days = Counter(date.strftime("%Y%m%d") for date in dates)  # by the time of day where they repeat
        form = {day: "%Y%m%d" if count == 1 else "%Y%m%dT%H%M%S" for day, count in days.items()}
        names = [f"{date:{form[date.strftime('%Y%m%d')]}}{suffix}" for date in dates]
    else:
        names = [f"{number:04d}{suffix}" for number in range(count)]
    names = [name if name.lower().endswith(_ENDINGS) else f"{name}.tif" for name in names]
    twice = [name for name, often in Counter(names).items() if often > 1]
    if twice or any(os.sep in name for name in names):
        got = f"{twice[0]} more than once" if twice else f"{names[0]}, a path"
        cure = 'give a template with {number} or the time of day, "{time:%Y%m%dT%H%M%S}.tif"'
        raise ValueError(message("template", "a file name for each frame", got, cure))
    return names


def _as_datetime(label: Any) -> Any:
    """A date of Python, or of cftime; ``None`` of another label."""
    if isinstance(label, np.datetime64) and not np.isnat(label):
        return label.astype("datetime64[us]").astype(datetime.datetime)
    return label if hasattr(label, "timetuple") else None


def _raster_profile(cube: Cube, driver: str, compression: Compression) -> dict[str, Any]:
    """What rasterio is told of every file, beside the transform and the bands."""
    from rasterio.dtypes import check_dtype

    array, grid, nodata = cube.array, find_georeference(cube), find_nodata(cube.array)
    declared = array.attrs.get("_FillValue", array.encoding.get("_FillValue"))
    if nodata:
        declared = nodata[0]
        if array.dtype.kind != "f" and (int(float(declared)) != int(declared) or abs(int(declared)) > 10**15):
            # rasterio hands it on as a float's text, which GDAL reads as another number
            expected, got = "an integer up to 10**15 in a GeoTIFF", f"{declared}, which no file will declare"
            cure = "declare another, or keep it with torchalign.io.write_cube"
            warnings.warn(message("nodata", expected, got, cure), UserWarning, stacklevel=5)
            declared = None
    elif declared is not None and array.dtype.kind == "f":
        declared = np.nan  # what is encoded is of the integers that another file packs these floats into
    if not check_dtype(array.dtype.newbyteorder("=").name):
        cure = 'convert it with .astype("float32")'
        raise TypeError(message("cube", "a dtype that GeoTIFF has", array.dtype, cure))
    if driver == "COG" and declared is not None and array.dtype.itemsize == 8 and array.dtype.kind != "f":
        driver = "GTiff"  # in a COG GDAL loses the nodata of 64-bit integers
    height, width = cube.size
    profile: dict[str, Any] = {
        "driver": driver,
        "dtype": array.dtype.newbyteorder("=").name,
        "count": cube.sizes["band"],
        "height": height,
        "width": width,
        "crs": (grid.crs if grid is not None else "") or None,
        "nodata": None if declared is None else float(declared),
        "compress": compression,  # "none" must be said, too: a COG is else LZW
    }
    is_float = array.dtype.kind == "f"
    if driver == "COG":
        if compression != "none":
            profile["predictor"] = "FLOATING_POINT" if is_float else "STANDARD"
        # its default is cubic, which makes classes that there are not, and blends nodata
        return profile | {"overview_resampling": "nearest"}
    return profile if compression == "none" else profile | {"predictor": 3 if is_float else 2}


def _band_tags(cube: Cube) -> dict[str, list[Any]]:
    scaling = {names[0]: _per_band(cube, *names) for names in SCALING}
    count, band = cube.sizes["band"], cube.dims.get("band")
    own = cube.array.coords.get(COLOURS)
    colours = [str(cube.array.attrs.get(COLOURS, ""))] * count
    if own is not None and own.dims in ((band,), ()):
        colours = [str(text) for text in np.broadcast_to(own.values, count)]
    return {"descriptions": _descriptions(cube), "colours": colours, **scaling}


def _descriptions(cube: Cube) -> list[str | None]:
    """Names of the bands: as the file had them, else their labels, if these are text."""
    count, labels = cube.sizes["band"], cube.coordinate("band")
    if labels is not None:
        if labels.dtype.kind in "UO":
            return [str(label) for label in labels.values]
        own = cube.array.coords.get("description")
        if own is not None and own.dims == labels.dims:
            return [str(name) or None for name in own.values]
    names = cube.array.attrs.get("long_name")
    if isinstance(names, (tuple, list)) and len(names) == count:
        return [str(name) or None for name in names]
    return [None] * count


def _per_band(cube: Cube, plural: str, single: str, neutral: Any) -> list[Any]:
    array, count, kind = cube.array, cube.sizes["band"], type(neutral)
    if plural in array.coords:
        return [kind(value) for value in np.broadcast_to(array[plural].values, count)]
    if not isinstance(array.attrs.get(plural, ""), str):  # as rioxarray has them
        values = [kind(value) for value in np.ravel(array.attrs[plural])]
        if len(values) != count:
            cure = f"select them as the bands were: cube.attrs[{plural!r}]"
            raise ValueError(message("cube", f"{plural} of {count} bands", values, cure))
        return values
    return [kind(array.attrs.get(single, neutral))] * count


def _write_files(
    frames: Array, seen: Array | None, files: Sequence[FilePlan], first: int, last: int
) -> list[Path]:
    """Frames (t, C, H, W) of one chunk, and their masks (t, H, W), into those of the files that are theirs."""
    for number, file in enumerate(files[first:last]):
        with open_writer(file) as write:
            write(frames[number], None if seen is None else seen[number], None)
    return [file.path for file in files[first:last]]


Writer = Callable[[Array, "Array | None", "slice | None"], None]


@contextmanager
def open_writer(plan: FilePlan) -> Iterator[Writer]:
    """One file that is whole or not there at all.

    It is written by a function of pixels (C, h, W), their mask (h, W), and which rows these are; ``None``: all.
    """
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.transform import Affine
    from rasterio.windows import Window

    where = {} if plan.transform is None else {"transform": Affine(*plan.transform)}
    with (
        atomic(plan.path) as partial,
        quiet(),
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(partial, "w", **plan.profile, **where) as file,
    ):

        def write(values: Array, seen: Array | None, rows: slice | None) -> None:
            count, width = len(values), values.shape[-1]
            window = None if rows is None else Window.from_slices((rows.start, rows.stop), (0, width))
            pixels = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
            file.write(pixels, list(range(1, count + 1)), window=window)
            if plan.mask == "alpha" and seen is not None:
                file.write(seen.astype(pixels.dtype), count + 1, window=window)
            elif seen is not None:
                file.write_mask(np.where(seen != 0, np.uint8(255), np.uint8(0)), window=window)

        _describe(file, plan)
        yield write
        if plan.overviews:
            file.build_overviews(list(plan.overviews), Resampling.nearest)


def _describe(file: Any, plan: FilePlan) -> None:
    """Names, colours, scales, tags and control points of a file that is being written."""
    from rasterio.enums import ColorInterp

    alpha = plan.mask == "alpha"
    told = [json.loads(text) if text else {} for text in plan.bands["colours"]]
    kinds = [ColorInterp[one["interpretation"]] if one else file.colorinterp[i] for i, one in enumerate(told)]
    if any(told) or alpha:
        file.colorinterp = [*kinds, *([ColorInterp.alpha] * alpha)]
    for number, (one, name) in enumerate(zip(told, plan.bands["descriptions"], strict=True), 1):
        if "table" in one:
            file.write_colormap(number, {int(key): tuple(colour) for key, colour in one["table"].items()})
        if name:
            file.set_band_description(number, name)
    for plural, _, neutral in SCALING:
        if set(plan.bands[plural]) != {neutral}:
            setattr(file, plural, [*plan.bands[plural], *([neutral] * alpha)])
    for band, tags in json.loads(plan.tags or "{}").items():
        if band == "RPC":
            file.update_tags(ns="RPC", **tags)
        elif not band or int(band) <= len(told):
            file.update_tags(**({"bidx": int(band)} if band else {}), **tags)
    if plan.gcps:
        file.gcps = (control_points(plan.gcps), file.crs)
