"""From a folder of GeoTIFFs to a cube and back, nothing changed on the way; and cubes written whole or not at all.

Needs the extra ``io`` (rasterio through rioxarray). Zarr and netCDF are xarray's own:
``xarray.open_zarr``, ``xarray.open_dataset``; :func:`write_cube` adds that a half-written store is never seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr
from torch import nn

from torchalign._check import check_bool, check_kind, check_option, check_path, message, require
from torchalign.cube.displacements import (
    tie_points,
    write_displacements,
    write_ground_control,
    write_tie_points,
)
from torchalign.cube.finding import parse_time
from torchalign.cube.gridding import GridWord, Resampling
from torchalign.cube.labels import Cube, as_numbers
from torchalign.cube.rasters import OnError, StackOptions, read_stack
from torchalign.cube.run import find_aligner, find_device, place_module, progress_bar
from torchalign.cube.solution import check_report
from torchalign.cube.stores import write_store
from torchalign.cube.tiles import LargeReference, align_large, count_steps, large_reader
from torchalign.cube.writing import Compression, WriteOptions, write_rasters, write_variables

__all__ = [
    "Compression",
    "OnError",
    "align_scenes",
    "open_stack",
    "parse_time",
    "tie_points",
    "write_cube",
    "write_displacements",
    "write_ground_control",
    "write_stack",
    "write_tie_points",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def open_stack(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    pattern: str = "*.tif*",
    bands: Sequence[str | int] | str | int | Mapping[str, str] | None = None,
    time: Callable[[Any], Any] | None = None,
    chunks: int | Mapping[Any, Any] | Literal["auto"] | None = None,
    errors: OnError = "raise",
    keep_empty: bool = False,
    recursive: bool = False,
    grid: GridWord | str | os.PathLike[str] | xr.DataArray | xr.Dataset | None = None,
    resampling: Resampling = "bilinear",
) -> Any:
    """Read a folder of GeoTIFFs, one a date, as a cube (time, band, y, x); or one a band and date, as a Dataset.

    Pixels are not touched: dtype, nodata (``attrs["_FillValue"]``), ``scale_factor`` and ``add_offset``
    (coordinates ``scales`` and ``offsets`` along ``band`` where bands differ) are what the files say. The CRS and
    the exact transform are in the coordinate ``spatial_ref``, as rioxarray has them; y and x are pixel centres; the
    names of the files are the coordinate ``file``, so that :func:`write_stack` writes them under the same names.
    What GDAL keeps beside a file (``.aux.xml``, ``.ovr``) is no date.

    An alpha band, or a mask inside or beside a file, is no imagery: it becomes the coordinate ``usable``
    (time, y, x), 0 where a pixel is not usable, which :func:`torchalign.align` takes for a mask and
    :func:`write_stack` writes back. So do the parts of a grid that a file without a nodata value does not
    reach. Tags, colour tables and whether there are overviews are kept for :func:`write_stack`, too. Files
    that have nothing but ground control points keep them where all have the same; else they need ``grid=``.

    Args:
        source: a folder, a file, a glob, a URL or ``/vsi…`` name that GDAL opens, or a list of these. Or a
            manifest, a ``.csv`` with the column ``path`` (from the folder that the manifest is in), and maybe
            ``time`` and ``band``.
        pattern: of the names in a folder, as a shell has it; with a slash, of the path below the folder.
        bands: names (the files' band descriptions) or GDAL's numbers, from 1; default: all. Or a mapping of a
            name to a pattern, for products with a file a band and date: ``{"red": "*_B4.TIF", "qa":
            "*_QA_PIXEL.TIF"}`` gives a Dataset with these variables, each with its own dtype, nodata and scale.
        time: a function of a path that gives its date (a datetime, or what else numpy takes for one; or text with
            a date that :func:`parse_time` knows). Default: :func:`parse_time` of the name, else of the folders that
            the file is in. A series that writes the day or the month first is understood where one date tells.
        chunks: ``None`` reads everything into memory. Else the cube is lazy: frames in a chunk, or dask's mapping;
            ``"auto"`` is one chunk a file, or as many small files as make 64 MiB.
        errors: what becomes of files that cannot be read, have no date, are empty (nothing but nodata, or zeros
            without a nodata value), are of another grid, dtype, nodata or bands than most, or of a date that a file
            before them in the alphabet has. ``"raise"``; or ``"skip"``: they are left out, and
            ``attrs["skipped_files"]`` lists them with the reason. (Whether files are empty is not checked in
            a lazy stack.)
        keep_empty: take empty files as they are: in a folder of cloud masks they are the dates without clouds.
        recursive: search the subfolders, too.
        grid: brings files of other extents, origins, pixel sizes or CRS onto one grid: that of the
            ``"first"`` date, its pixels over the ``"union"`` or the ``"intersection"`` of all extents, or
            that of a file or a DataArray. Files on these pixels to a hundredth of one are not resampled, only
            cut or padded. The others go through GDAL's warper (rasterio's WarpedVRT), which is one resampling
            more: the coordinate ``resampled`` along time, of the cube and of a report, names them. ``None``:
            files of one grid only.
        resampling: of the warper: ``"nearest"``, ``"bilinear"``, ``"cubic"`` or ``"average"``; classes by the
            name of their band, and files with a colour table, are taken by ``"nearest"``.

    Returns:
        The cube, sorted by time. With band descriptions as labels, else 1, 2, …. With a mapping as ``bands``, or
        bands in a manifest, a Dataset.

    Raises:
        FileNotFoundError: no folder or file of that name, or none in the folder that fits the pattern.
        TypeError: a source or a grid of another kind.
        ValueError: files as described under ``errors``; unknown bands; no grid that suits all.
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
    options = StackOptions(pattern, bands, time, chunks, errors, keep_empty, recursive, grid, resampling)
    _check_reading(options)
    return read_stack(source, options)


def _check_reading(options: StackOptions) -> None:
    require("GeoTIFF", "io", "rasterio")
    check_option("errors", options.errors, OnError)
    check_option("resampling", options.resampling, Resampling)
    check_bool("recursive", options.recursive)
    check_bool("keep_empty", options.keep_empty)
    check_kind("pattern", options.pattern, str, "text", 'write it as "*.tif"', optional=False)
    check_kind("time", options.time, Callable, "a function of a path", "for example lambda path: path.stem")
    if isinstance(options.bands, Mapping) and not options.bands:
        cure = "name some, or pass None"
        raise ValueError(message("bands", "a name and its pattern at least", "none", cure))


def _check_writing(options: WriteOptions, report: Any) -> None:
    require("GeoTIFF", "io", "rasterio")
    check_option("compression", options.compression, Compression)
    check_option("driver", options.driver, Literal["GTiff", "COG"])
    check_kind("template", options.template, str, "a name with fields", 'write it as "{time:%Y%m%d}.tif"')
    check_bool("overwrite", options.overwrite)
    if report is not None:
        check_report(report)


def write_stack(
    cube: xr.DataArray | xr.Dataset,
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
    file a transform of its own. A lazy cube is computed and written chunk by chunk. Of files that a cube was read
    from, the alpha band or mask (the coordinate ``usable``), tags, colour tables and ground control points are
    written back, and with ``driver="GTiff"`` overviews where there were some; statistics are not.

    Args:
        cube: time, y, x and maybe band, of numbers or bool (written as uint8). Of a Dataset, a file for each
            variable and date.
        folder: made if it is not there.
        template: names of the files, with ``{time:%Y%m%d}``, ``{number}`` from 0, ``{name}`` of the cube, and
            ``{file}``, the name it was read from, without its ending; for example ``"{file}_aligned.tif"``.
            Default: the names in the coordinate ``file``, else ``{time:%Y%m%d}.tif``, with the time of day where
            days repeat; without dates ``{number:04d}.tif``.
        driver: ``"COG"``, a GeoTIFF in tiles with overviews, or plain ``"GTiff"``; so are 64-bit integers with nodata,
            which GDAL loses in a COG; beyond 10**15 in every GeoTIFF, with a warning.
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
    options = WriteOptions(template, driver, compression, overwrite)
    _check_writing(options, report)
    where = check_path("folder", folder)
    if isinstance(cube, xr.Dataset):
        return write_variables(cube, where, options, report, compute)
    return write_rasters(Cube.of(as_numbers(cube), None, "cube"), where, options, report, compute)


def align_scenes(  # noqa: D417  # options of open_stack and write_stack stand in one line each
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    reference: Any = "first",
    aligner: nn.Module | str = "auto",
    *,
    mask: xr.DataArray | None = None,
    reference_mask: xr.DataArray | None = None,
    pattern: str = "*.tif*",
    bands: Sequence[str | int] | str | int | None = None,
    time: Callable[[Any], Any] | None = None,
    errors: OnError = "raise",
    recursive: bool = False,
    grid: GridWord | str | os.PathLike[str] | xr.DataArray | xr.Dataset | None = None,
    resampling: Resampling = "bilinear",
    template: str | None = None,
    compression: Compression = "deflate",
    overwrite: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> tuple[list[Path], xr.Dataset]:
    """Align scenes larger than memory, from file to file.

    The warp of each frame is estimated from up to 5 × 5 tiles of 512 × 512 pixels of full resolution, whose
    estimates are combined by a robust mean (a robust fit for affine motions), each weighted by its own
    ``covariance``; tiles that are not ``OK`` do not count. A frame is ``AMBIGUOUS`` where fewer than half of its
    tiles agree to half a pixel, unless local shifts are kept, which explain that. Nodata, alpha bands and masks of
    the files are masks, as everywhere. Each frame is then read, resampled and written by blocks of rows: what is
    needed of memory is set by the width of a frame, not by its height or the number of frames. Two Sentinel-2 tiles,
    10980² of four bands, need 2.0 GiB.

    Args:
        source: as in :func:`open_stack`.
        folder: for the aligned files, tiled GeoTIFFs of the same names; made if it is not there.
        reference: ``"first"``, the label of one frame, ``"median"`` or ``"mean"`` of the frames as they are, made tile
            by tile, or a DataArray.
        aligner: a module, or a name, as in :func:`torchalign.align`; motions up to affine, and
            local shifts on top, tile by tile on one lattice. The score of a frame with a field is
            the mean of the tiles' scores under it, and the field is kept by that.
        mask: bool, True = usable, as in :func:`torchalign.align`; of dask chunks it is read as it is needed:
            ``open_stack(clouds, chunks=1).isel(band=0) == 0``.
        reference_mask: the same for the reference.
        pattern, time, recursive, grid, resampling: as in :func:`open_stack`.
        bands: names or numbers, as in :func:`open_stack`.
        errors: as in :func:`open_stack`; whether files are empty is not checked.
        template, compression, overwrite: as in :func:`write_stack`.
        device, progress: as in :func:`torchalign.align`.

    Returns:
        The paths and the report, without residuals.

    Raises:
        TypeError, ValueError, FileNotFoundError: as in :func:`open_stack`; another reference; a homography.
        FileExistsError: a file is there.
        ImportError: rasterio is not installed.

    Example:
        >>> import tempfile
        >>> from torchalign.datasets import demo_stack
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = write_stack(demo_stack(frames=4, size=(64, 64)).cube, folder + "/in")
        ...     written, report = align_scenes(folder + "/in", folder + "/out")
        >>> [path.name for path in written] == [path.name for path in paths], report.sizes["time"]
        (True, 4)
    """
    options = StackOptions(pattern, bands, time, None, errors, True, recursive, grid, resampling, True)
    write = WriteOptions(template, "GTiff", compression, overwrite, tiled=True)
    _check_reading(options)
    _check_writing(write, None)
    target = check_path("folder", folder)
    if isinstance(options.bands, Mapping):
        cure = "align them as a Dataset of dask chunks: open_stack(…, bands=…, chunks=1)"
        raise TypeError(message("bands", "names or numbers of the bands in a file", "a mapping", cure))
    module = find_aligner(aligner)
    where = find_device(device, module)
    array = read_stack(source, options)
    if isinstance(array, xr.Dataset):
        cure = "leave the column out"
        raise ValueError(message("source", "a manifest without bands", "one with bands", cure))
    stack = large_reader(array, mask, where)
    onto = LargeReference.of(reference, reference_mask, stack)
    steps = count_steps(stack, module, onto)
    with progress_bar(progress, steps, "align", "block") as advance:
        return align_large(stack, place_module(module, where), onto, target, write, advance)


def write_cube(
    cube: xr.DataArray | xr.Dataset,
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
        cube: time, y, x and maybe band, of numbers or bool; or a Dataset of such variables and others.
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
    check_kind("attrs", attrs, Mapping, "a mapping", "give a dict")
    check_bool("overwrite", overwrite)
    if report is not None:
        check_report(report)
    return write_store(cube, check_path("path", path), attrs or {}, overwrite, report, compute)
