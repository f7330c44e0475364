"""A cube as a Zarr store or a netCDF file that is never seen half-written; what is in them is xarray's."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.chunks import chunk_sizes, compute_together, is_lazy, rows_after, share
from torchalign.cube.files import atomic, check_free, discard, put_in_place, temporary_sibling
from torchalign.cube.labels import Array, Cube
from torchalign.cube.solution import summarize

__all__ = ["finish_writing", "write_store"]

# of encodings: what every format knows; what goes from netCDF to netCDF
_STORABLE = {
    *("dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"),
    *("units", "calendar", "grid_mapping", "coordinates"),
}
_PIXEL_CODE = {"dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"}
_COMPRESSION = {"zlib", "complevel", "shuffle", "compression", "compression_opts"}


def write_store(
    cube: xr.DataArray,
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
    is_bool = isinstance(cube, xr.DataArray) and cube.dtype == np.bool_
    seen = Cube.of(cube.astype(np.uint8) if is_bool else cube)
    check_free(path, overwrite)
    require(f"a {suffix} file", "io", "zarr" if suffix == ".zarr" else "h5netcdf")
    if is_bool:  # which xarray stores and reads as such, unless nodata of what it was made from came along
        cube = cube.copy(deep=False)
        cube.attrs = {key: value for key, value in cube.attrs.items() if key not in _PIXEL_CODE}
        cube.encoding = {key: value for key, value in cube.encoding.items() if key not in _PIXEL_CODE}
    name = str(cube.name or "cube")
    dataset = _storable(cube.to_dataset(name=name), suffix).assign_attrs(attrs)
    if not is_lazy(cube):
        with atomic(path) as partial:
            _store(dataset, partial, suffix)
        return path if report is None else (path, report.compute())
    from dask.delayed import delayed

    chunks, time = chunk_sizes(seen, None), seen.dims["time"]
    partial = temporary_sibling(path)
    try:
        _store(dataset, partial, suffix)  # all but the pixels
        variable = dataset[name].variable
        nothing = np.empty([0 if dim == time else length for dim, length in cube.sizes.items()], cube.dtype)
        empty = share(variable.isel({time: slice(0)}).copy(data=nothing))
        write = delayed(_write_zarr if suffix == ".zarr" else _write_netcdf, pure=False)
        jobs: list[Any] = []
        for first, last in itertools.pairwise(np.cumsum((0, *chunks))):
            part = variable.isel({time: slice(int(first), int(last))}).data.rechunk(-1)
            pixels = part.to_delayed(optimize_graph=False).ravel()[0]
            # a netCDF file is written by one after the other
            before = jobs[-1] if jobs and suffix != ".zarr" else None
            jobs.append(write(pixels, partial, name, empty, time, int(first), before))
        done = delayed(_publish, pure=False)(jobs, partial, path)
        return finish_writing(done, jobs, chunks, report, compute)
    except BaseException:
        discard(partial, path)
        raise


def finish_writing(
    done: Any, jobs: Sequence[Any], chunks: tuple[int, ...], report: xr.Dataset | None, compute: bool
) -> Any:
    """What a writer of a lazy cube returns: computed here, together with the report, or left to dask.

    Args:
        done: the last task.
        jobs: the tasks that write a chunk each.
        chunks: of time.
        report: of the same frames.
        compute: here, and now.
    """
    if report is None:
        return done.compute() if compute else done
    both = (done, rows_after(report, jobs, chunks))
    if not compute:
        return both
    written, known = compute_together(both)
    return written, known.assign_attrs(summarize(known).attrs())


def _storable(dataset: xr.Dataset, suffix: str) -> xr.Dataset:
    """Without the encodings of another format, which xarray would stumble over; chunks are the cube's own."""
    keep = _STORABLE if suffix == ".zarr" else _STORABLE | _COMPRESSION
    cleaned = dataset.copy(deep=False)
    for name in cleaned.variables:
        variable = cleaned.variables[name]
        text = variable.dtype.kind not in "biufcmM"  # each format has one way to store it
        variable.encoding = {
            key: value for key, value in variable.encoding.items() if key in keep and not text
        }
    return cleaned


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


def _write_zarr(
    pixels: Array, path: Path, name: str, empty: xr.Variable, time: Hashable, first: int, before: Any
) -> None:
    """Frames of one chunk into a store that has all but pixels; xarray encodes them as the store says."""
    part = xr.Dataset({name: (empty.dims, pixels)})
    part.to_zarr(path, region={str(time): slice(first, first + part.sizes[time])}, consolidated=True)


def _write_netcdf(
    pixels: Array, path: Path, name: str, empty: xr.Variable, time: Hashable, first: int, before: Any
) -> None:
    """The same for a netCDF file."""
    import h5netcdf

    variable = xr.conventions.encode_cf_variable(xr.Variable(empty.dims, pixels, empty.attrs, empty.encoding))
    last = first + variable.sizes[time]
    where = tuple(slice(first, last) if dim == time else slice(None) for dim in empty.dims)
    with h5netcdf.File(path, "a") as file:
        file[name][where] = variable.to_numpy()


def _publish(jobs: Sequence[Any], written: Path, path: Path) -> Path:
    put_in_place(written, path)
    discard(written, path)
    return path
