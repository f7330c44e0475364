"""From a folder of GeoTIFFs to a cube and back, nothing changed on the way; and cubes written whole or not at all.

Needs the extra ``io`` (rasterio through rioxarray). Zarr and netCDF are xarray's own:
``xarray.open_zarr``, ``xarray.open_dataset``; :func:`write_cube` adds that a half-written store is never seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from torchalign._check import check_option, require
from torchalign.cube.displacements import tie_points, write_displacements, write_tie_points
from torchalign.cube.labels import Cube
from torchalign.cube.rasters import Compression, OnError, parse_time, read_stack, write_rasters
from torchalign.cube.stores import write_store

__all__ = [
    "Compression",
    "OnError",
    "open_stack",
    "parse_time",
    "tie_points",
    "write_cube",
    "write_displacements",
    "write_stack",
    "write_tie_points",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def open_stack(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    pattern: str = "*.tif*",
    bands: Sequence[str | int] | str | int | None = None,
    time: Callable[[Path], Any] | None = None,
    chunks: int | Mapping[Any, Any] | Literal["auto"] | None = None,
    errors: OnError = "raise",
    keep_empty: bool = False,
) -> xr.DataArray:
    """Read a folder of GeoTIFFs, one a date, as a cube (time, band, y, x).

    Pixels are not touched: dtype, nodata (``attrs["_FillValue"]``), ``scale_factor`` and ``add_offset``
    (coordinates ``scales`` and ``offsets`` along ``band`` where bands differ) are what the files say. The CRS and
    the exact transform are in the coordinate ``spatial_ref``, as rioxarray has them; y and x are pixel centres; the
    names of the files are the coordinate ``file``, so that :func:`write_stack` writes them under the same names.
    What GDAL keeps beside a file (``.aux.xml``, ``.ovr``) is no date. Files of one grid only: not those that
    ``apply(…, mode="shift-coords")`` gave a georeference each.

    Args:
        source: a folder, which is searched without its subfolders, or the files.
        pattern: of the names in a folder, as a shell has it.
        bands: names (the files' band descriptions) or GDAL's numbers, from 1; default: all.
        time: a function of a path that gives its date (a datetime, or what else numpy takes for one; or text with
            a date that :func:`parse_time` knows). Default: :func:`parse_time` of the name.
        chunks: ``None`` reads everything into memory. Else the cube is lazy: frames in a chunk, or dask's mapping;
            ``"auto"`` is one chunk a file, or as many small files as make 64 MiB.
        errors: what becomes of files that cannot be read, have no date, are empty (nothing but nodata, or zeros
            without a nodata value), are of another grid, dtype, nodata or bands than most, or of a date that a file
            before them in the alphabet has. ``"raise"``; or ``"skip"``: they are left out, and
            ``attrs["skipped_files"]`` lists them with the reason. (Whether files are empty is not checked in
            a lazy stack.)
        keep_empty: take empty files as they are: in a folder of cloud masks they are the dates without clouds.

    Returns:
        The cube, sorted by time. With band descriptions as labels, else 1, 2, ….

    Raises:
        FileNotFoundError: no folder or file of that name, or none in the folder that fits the pattern.
        ValueError: files as described under ``errors``; unknown bands.
        ImportError: rasterio is not installed.

    Example:
        >>> import tempfile
        >>> from torchalign.datasets import demo_stack
        >>> cube = demo_stack(frames=4, size=(64, 64)).cube
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [path.name for path in write_stack(cube, folder)]
        ...     same = open_stack(folder)
        >>> names[0], same.dims, bool((same.values == cube.values).sum() == cube.notnull().sum())
        ('20240105.tif', ('time', 'band', 'y', 'x'), True)
    """
    require("GeoTIFF", "io", "rasterio")
    check_option("errors", errors, OnError)
    return read_stack(source, pattern, bands, time, chunks, errors, keep_empty)


def write_stack(
    cube: xr.DataArray,
    folder: str | os.PathLike[str],
    *,
    template: str | None = None,
    driver: Literal["GTiff", "COG"] = "COG",
    compression: Compression = "deflate",
    overwrite: bool = False,
    report: xr.Dataset | None = None,
    compute: bool = True,
) -> Any:
    """Write a cube as GeoTIFFs, one a frame, each whole or not at all.

    Pixels, dtype, nodata, band names, scale and offset, CRS and transform are written as they are, bit for bit.
    A coordinate ``geotransform`` along time (of :func:`torchalign.apply` with ``mode="shift-coords"``) gives each
    file a transform of its own. A lazy cube is computed and written chunk by chunk. Colour tables and other tags
    of the files that a cube was read from are not written.

    Args:
        cube: time, y, x and maybe band, of numbers or bool (written as uint8).
        folder: made if it is not there.
        template: names of the files, with ``{time:%Y%m%d}``, ``{number}`` from 0, ``{name}`` of the cube, and
            ``{file}``, the name it was read from, without its ending; for example ``"{file}_aligned.tif"``.
            Default: the names in the coordinate ``file``, else ``{time:%Y%m%d}.tif``, with the time of day where
            days repeat; without dates ``{number:04d}.tif``.
        driver: ``"COG"``, a GeoTIFF in tiles with overviews, or plain ``"GTiff"``.
        compression: lossless, all of them.
        overwrite: replace files that are there.
        report: of the same :func:`torchalign.align`, to be computed in the same pass.
        compute: False leaves a lazy cube and its report to ``dask.compute``.

    Returns:
        The paths in the order of time. With ``report``, these and the report in memory. With ``compute=False``, a
        ``Delayed`` of the paths, and a report that waits for the pixels, chunk by chunk.

    Raises:
        TypeError, ValueError: no cube; names that are not unique; a dtype that GeoTIFF has not.
        FileExistsError: a file is there.
        ImportError: rasterio is not installed.
    """
    require("GeoTIFF", "io", "rasterio")
    check_option("compression", compression, Compression)
    check_option("driver", driver, Literal["GTiff", "COG"])
    if isinstance(cube, xr.DataArray) and cube.dtype == np.bool_:
        cube = cube.astype(np.uint8)
    return write_rasters(
        Cube.of(cube), Path(folder), template, driver, compression, overwrite, report, compute
    )


def write_cube(
    cube: xr.DataArray,
    path: str | os.PathLike[str],
    *,
    attrs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    report: xr.Dataset | None = None,
    compute: bool = True,
) -> Any:
    """Write a cube with xarray to a Zarr store or a netCDF file that is never seen half-written.

    It is written beside ``path`` under another name (``.NAME.….partial``), and put into its place when it is
    complete; a run that is killed leaves only the other name. A lazy cube goes through chunk by chunk.

    Args:
        cube: time, y, x and maybe band, of numbers or bool.
        path: ending in ``.zarr`` or ``.nc``.
        attrs: of the file as a whole, beside those of the cube.
        overwrite: replace what is there.
        report: of the same :func:`torchalign.align`, to be computed in the same pass.
        compute: False leaves a lazy cube and its report to ``dask.compute``.

    Returns:
        The path. With ``report``, that and the report in memory. With ``compute=False``, a ``Delayed`` of the path,
        and a report that waits for the pixels, chunk by chunk.

    Raises:
        TypeError, ValueError: no cube; another ending; chunks that differ in length, for Zarr.
        FileExistsError: the path is there.
    """
    return write_store(cube, Path(path), attrs or {}, overwrite, report, compute)
