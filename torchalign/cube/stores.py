"""A cube as a Zarr store or a netCDF file that is never seen half-written; what is in them is xarray's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.chunks import chunk_sizes, compute_together, is_lazy, rows_after, share
from torchalign.cube.files import atomic, check_free, discard, put_in_place, temporary_sibling
from torchalign.cube.labels import Array, Cube, as_numbers, frame_names, with_plain_dates
from torchalign.cube.solution import summarize

# of encodings: what every format knows; what goes from netCDF to netCDF
_STORABLE = {
    *("dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"),
    *("units", "calendar", "grid_mapping", "coordinates"),
}
_PIXEL_CODE = {"dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"}
_COMPRESSION = {"zlib", "complevel", "shuffle", "compression", "compression_opts"}


def write_store(
    cube: xr.DataArray | xr.Dataset,
    path: Path,
    attrs: Mapping[str, Any],
    overwrite: bool,
    report: xr.Dataset | None,
    compute: bool,
) -> Any:
    """See :func:`torchalign.io.write_cube`."""
    suffix = path.suffix.lower()
    if suffix not in (".zarr", ".nc", ".nc4"):
        raise ValueError(message("path", "a name ending in .zarr or .nc", path.name, "rename it"))
    if isinstance(cube, xr.Dataset):
        given = cube
    else:
        Cube.of(as_numbers(cube), None, "cube")  # or it raises
        given = cube.to_dataset(name=str(cube.name or "cube"))
    # a single variable may have dims of any names
    own = list(given.data_vars)
    frames = own if len(own) == 1 else frame_names(given, "write it with xarray's own to_netcdf or to_zarr")
    check_free(path, overwrite)
    require(f"a {suffix} file", "io", "zarr" if suffix == ".zarr" else "h5netcdf")
    lazy = [name for name in frames if is_lazy(given[name])]
    others = [name for name, array in given.variables.items() if name not in lazy and is_lazy(array)]
    given = given.assign({name: given[name].compute() for name in others})  # small: masks and the like
    for dim in given.dims:
        given = with_plain_dates(given, dim)
    if lazy and isinstance(cube, xr.Dataset):  # one task a chunk writes all of them
        given = given.unify_chunks()
    plain = given.assign({name: _without_codes(array) for name, array in given.data_vars.items()})
    dataset = _storable(plain.assign_attrs(attrs), suffix)
    if not lazy:
        with atomic(path) as partial:
            _store(dataset, partial, suffix)
        return finish_writing(path, report, compute)
    from dask.delayed import delayed

    seen = Cube.of(as_numbers(given[lazy[0]]))
    chunks, time = chunk_sizes(seen, None), seen.dims["time"]
    partial = temporary_sibling(path)
    try:
        _store(dataset, partial, suffix)  # all but the pixels
        empty: list[tuple[str, xr.Variable]] = []
        for name in lazy:
            variable = dataset[name].variable
            nothing = np.empty([0 if d == time else n for d, n in variable.sizes.items()], variable.dtype)
            empty.append((str(name), variable.isel({time: slice(0)}).copy(data=nothing)))
        known, write = share(tuple(empty)), delayed(_write_pixels, pure=False)
        jobs: list[Any] = []
        for first, last in itertools.pairwise(np.cumsum((0, *chunks))):
            pixels = []  # (arguments, not a dict of them, which would be a task that holds them)
            for name in lazy:
                part = dataset[name].variable.isel({time: slice(int(first), int(last))}).data.rechunk(-1)
                pixels.append(part.to_delayed(optimize_graph=False).ravel()[0])
            # a netCDF file is written by one after the other
            before = jobs[-1] if jobs and suffix != ".zarr" else None
            jobs.append(write(partial, known, time, int(first), before, *pixels))
        done = delayed(_publish, pure=False)(jobs, partial, path)
        return finish_writing(done, None if report is None else rows_after(report, jobs, chunks), compute)
    except BaseException:
        discard(partial, path)
        raise


def _without_codes(array: xr.DataArray) -> xr.DataArray:
    """Bool, which xarray stores and reads as such, unless nodata of what it was made from came along."""
    if array.dtype != np.bool_:
        return array
    array = array.copy(deep=False)
    array.attrs = {key: value for key, value in array.attrs.items() if key not in _PIXEL_CODE}
    array.encoding = {key: value for key, value in array.encoding.items() if key not in _PIXEL_CODE}
    return array


def finish_writing(done: Any, report: xr.Dataset | None, compute: bool) -> Any:
    """What a writer returns: what it wrote, of a lazy cube computed here or left to dask, with the report or alone."""
    if not hasattr(done, "dask"):
        return done if report is None else (done, report.compute())
    if not compute:
        return done if report is None else (done, report)
    if report is None:
        return done.compute()
    written, known = compute_together((done, report))
    return written, known.assign_attrs(summarize(known).attrs())


def _storable(dataset: xr.Dataset, suffix: str) -> xr.Dataset:
    """Without attributes and encodings that only another format has; chunks are the cube's own."""
    keep = _STORABLE if suffix == ".zarr" else _STORABLE | _COMPRESSION
    cleaned = dataset.copy(deep=False)
    cleaned.attrs = _storable_attributes(dataset.attrs, suffix)
    for variable in cleaned.variables.values():
        text = variable.dtype.kind not in "biufcmM"  # each format has one way to store it
        encoding = {key: value for key, value in variable.encoding.items() if key in keep and not text}
        variable.attrs = _storable_attributes(variable.attrs, suffix)
        # a fill value is declared once: by the encoding, where xarray writes it
        declared = variable.attrs.pop("_FillValue", None)
        variable.encoding = encoding if declared is None else {"_FillValue": declared} | encoding
    return cleaned


def _storable_attributes(attributes: Mapping[Any, Any], suffix: str) -> dict[Any, Any]:
    """Of JSON, netCDF has numbers, text and lists of them; the rest is written as its text."""

    def storable(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "iufU":
            return value
        text = json.dumps(value, default=str)
        items = value if isinstance(value, (list, tuple)) and len(value) else [value]
        if suffix == ".zarr":
            return json.loads(text)
        one_kind = {type(item) for item in items} in ({int}, {float}, {str})
        return value if one_kind else text

    return {key: storable(value) for key, value in attributes.items()}


def _store(dataset: xr.Dataset, path: Path, suffix: str) -> None:
    """Everything, but for what is lazy."""
    if suffix == ".zarr":
        import zarr

        # version 2 is what every reader knows, and the only one with settled rules for strings
        options: dict[str, Any] = {"consolidated": True, "compute": False}
        options |= {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}
        dataset.to_zarr(path, **options)
    else:
        dataset.to_netcdf(path, engine="h5netcdf", compute=False)


def _write_pixels(
    path: Path,
    empty: tuple[tuple[str, xr.Variable], ...],
    time: Hashable,
    first: int,
    before: Any,
    *pixels: Array,
) -> None:
    """Frames of one chunk into a store that has all but pixels, encoded as the store says."""
    if path.suffix.lower() == ".zarr":
        part = xr.Dataset({name: (like.dims, own) for (name, like), own in zip(empty, pixels, strict=True)})
        part.to_zarr(path, region={str(time): slice(first, first + part.sizes[time])}, consolidated=True)
        return
    import h5netcdf

    with h5netcdf.File(path, "a") as file:
        for (name, like), values in zip(empty, pixels, strict=True):
            plain = xr.Variable(like.dims, values, like.attrs, like.encoding)
            variable = xr.conventions.encode_cf_variable(plain)
            last = first + variable.sizes[time]
            where = tuple(slice(first, last) if dim == time else slice(None) for dim in like.dims)
            file[name][where] = variable.to_numpy()


def _publish(jobs: Sequence[Any], written: Path, path: Path) -> Path:
    put_in_place(written, path)
    discard(written, path)
    return path
