"""From a folder of GeoTIFFs to a cube and back, nothing changed on the way; and cubes written whole or not at all.

Needs the extra ``io`` (rasterio through rioxarray). Zarr and netCDF are xarray's own:
``xarray.open_zarr``, ``xarray.open_dataset``; :func:`write_cube` adds that a half-written store is never seen.
"""

from __future__ import annotations

import datetime
import fnmatch
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from torchalign._check import check_option, message
from torchalign._chunks import (
    chunk_sizes,
    compute_together,
    is_lazy,
    parts_along_time,
    rows_after,
    share,
)
from torchalign._files import atomic, check_free, discard, put_in_place, workshop_beside
from torchalign._grid import Grid, find_grid
from torchalign._labelled import CUBE, Array, Cube, find_nodata
from torchalign.report import summarize

__all__ = ["Compression", "OnError", "open_stack", "parse_time", "write_cube", "write_stack"]

OnError = Literal["raise", "skip"]
Compression = Literal["deflate", "lzw", "zstd", "none"]
_FILE = "file"  # the coordinate that keeps the names
# of encodings: what every format knows; what goes from netCDF to netCDF
_STORABLE = {
    *("dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"),
    *("units", "calendar", "grid_mapping", "coordinates"),
}
_PIXEL_CODE = {"dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"}
_COMPRESSION = {"zlib", "complevel", "shuffle", "compression", "compression_opts"}
_DATE = r"(?P<year>(?:19|20)\d\d){0}(?P<month>0[1-9]|1[0-2]){0}(?P<day>0[1-9]|[12]\d|3[01])"
_CLOCK = r"(?:[T ](?P<hour>[01]\d|2[0-3]){0}(?P<minute>[0-5]\d)(?:{0}(?P<second>[0-5]\d))?)?"
# in this order; the first date in the name is that of acquisition in the products of Sentinel and Landsat
_TIMES = [
    # 20170105T013443, 20170105013443, 20170105, and no part of a longer number; so are the names of Sentinel's and
    # Landsat's collections
    re.compile(rf"(?<!\d){_DATE.format('')}{_CLOCK.format('').replace('[T ]', '[T ]?')}(?!\d)"),
    # 2017-01-05T01:34:43, 2017_01_05
    re.compile(rf"(?<!\d){_DATE.format('-')}{_CLOCK.format('[-:]?')}(?!\d)"),
    re.compile(rf"(?<!\d){_DATE.format('_')}(?!\d)"),
    # LC80010022013164LGN00: year and day of the year; HLS.L30.T10SEG.2020131T184512
    re.compile(r"L[A-Z]\d\d{6}(?P<year>(?:19|20)\d\d)(?P<yearday>[0-3]\d\d)[A-Z]"),
    re.compile(rf"\.(?P<year>(?:19|20)\d\d)(?P<yearday>[0-3]\d\d){_CLOCK.format('')}(?!\d)"),
]

# what nanoseconds since 1970 reach
_EARLIEST, _LATEST = np.datetime64("1678", "s"), np.datetime64("2262", "s")


class _Raster(NamedTuple):
    """What a file says of itself, without its pixels."""

    path: Path
    grid: Grid
    bands: int
    dtypes: tuple[str, ...]
    nodata: float | None
    descriptions: tuple[str | None, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all files of a stack must have in common."""
        nodata = "nan" if self.nodata is not None and np.isnan(self.nodata) else self.nodata
        return (*self.grid, self.dtypes, nodata, self.descriptions, self.scales, self.offsets)


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
            ``attrs["skipped_files"]`` lists them with the reason. (Of a lazy stack, whether files are empty is not
            looked at.)
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
    _require_rasterio()
    check_option("errors", errors, OnError)
    paths = _find_files(source, pattern)
    skipped: dict[Path, str] = {}
    rasters = _read_headers(paths, skipped)
    times = _read_times(list(rasters), time, skipped)
    _drop_strangers(rasters, skipped)
    _drop_duplicates([path for path in rasters if path not in skipped], times, skipped)
    _complain(skipped, errors, len(paths))
    chosen = sorted((path for path in rasters if path not in skipped), key=lambda path: (times[path], path))
    if not chosen:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in list(skipped.items())[:3])
        raise ValueError(
            message("source", "at least one usable file", f"none of {len(paths)} ({reasons})", "see errors=")
        )
    first = rasters[chosen[0]]
    numbers = _find_bands(bands, first)
    if chunks is None:
        values, bad = _read_all(chosen, numbers, first, keep_empty)
        if bad:
            skipped |= {chosen[number]: reason for number, reason in bad.items()}
            _complain(skipped, errors, len(paths))
            kept = [number for number in range(len(chosen)) if number not in bad]
            if not kept:
                got = f"{len(bad)} of which {next(iter(bad.values()))}"
                raise ValueError(message("source", "files with pixels", got, "check the download"))
            values, chosen = values[kept], [chosen[number] for number in kept]
    else:
        values = _read_lazily(chosen, numbers, first, chunks)
    cube = _label(values, [rasters[path] for path in chosen], [times[path] for path in chosen], numbers)
    if skipped:
        cube.attrs["skipped_files"] = [f"{path.name}: {reason}" for path, reason in sorted(skipped.items())]
    return cube


def parse_time(name: str) -> np.datetime64 | None:
    """The first date in a file's name: acquisition in all products of Sentinel and Landsat, and in what
    fastcubo and satalign call their files.

    Known are ``20170105``, ``20170105T013443``, ``2017-01-05``, ``2017-01-05T01:34:43``, ``2017_01_05``, and year
    and day of the year in the scene names of Landsat (``LC80010022013164LGN00``) and HLS (``2020131T184512``).

    Returns:
        ``None`` if there is none.

    Example:
        >>> parse_time("20160608T064632_20160608T070007_T39PVM.tif")
        np.datetime64('2016-06-08T06:46:32.000000000')
        >>> parse_time("LC08_L1TP_123032_20200131_20200205_02_T1_B4.TIF")
        np.datetime64('2020-01-31T00:00:00.000000000')
    """
    for pattern in _TIMES:
        for found in pattern.finditer(name):
            parts = {key: int(value) for key, value in found.groupdict().items() if value is not None}
            try:
                date = datetime.datetime(parts["year"], parts.get("month", 1), parts.get("day", 1))
                if "yearday" in parts:
                    date += datetime.timedelta(days=parts["yearday"] - 1)
                    if not parts["yearday"] or date.year != parts["year"]:
                        continue
            except ValueError:  # the 31st of June
                continue
            clock = {f"{key}s": parts[key] for key in ("hour", "minute", "second") if key in parts}
            return np.datetime64(date + datetime.timedelta(**clock), "ns")
    return None


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
    _require_rasterio()
    check_option("compression", compression, Compression)
    check_option("driver", driver, Literal["GTiff", "COG"])
    if isinstance(cube, xr.DataArray) and cube.dtype == np.bool_:
        cube = cube.astype(np.uint8)
    seen = Cube.of(cube, dict.fromkeys(("time", "band", "y", "x")))
    paths = [Path(folder) / name for name in _file_names(seen, template)]
    for path in paths:
        check_free(path, overwrite)
    Path(folder).mkdir(parents=True, exist_ok=True)
    profiles = _profiles(seen, driver, compression)
    if not is_lazy(cube):
        for path, profile, part in zip(paths, profiles, _frame_parts(seen), strict=True):
            _write_raster(part.to_numpy(), [path], [profile])
        return paths if report is None else (paths, report.compute())
    from dask.delayed import delayed

    chunks = chunk_sizes(seen, None)
    everything = share((paths, profiles))  # in one task: dask would keep many small ones, and pixels, waiting
    write, edges = delayed(_write_part, pure=False), itertools.pairwise(np.cumsum((0, *chunks)))
    jobs = [
        write(pixels, everything, int(first), int(last))
        for pixels, (first, last) in zip(parts_along_time(seen.variable, CUBE, chunks), edges, strict=True)
    ]
    return _complete(delayed(_all_paths, pure=False)(jobs), jobs, chunks, report, compute)


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
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".zarr", ".nc", ".nc4"):
        raise ValueError(message("path", "a name ending in .zarr or .nc", path.name, "rename it"))
    is_bool = isinstance(cube, xr.DataArray) and cube.dtype == np.bool_
    seen = Cube.of(cube.astype(np.uint8) if is_bool else cube, dict.fromkeys(CUBE))
    check_free(path, overwrite)
    if is_bool:  # which xarray stores and reads as such, unless nodata of what it was made from came along
        cube = cube.copy(deep=False)
        cube.attrs = {key: value for key, value in cube.attrs.items() if key not in _PIXEL_CODE}
        cube.encoding = {key: value for key, value in cube.encoding.items() if key not in _PIXEL_CODE}
    name = str(cube.name or "cube")
    dataset = _storable(cube.to_dataset(name=name), suffix).assign_attrs(attrs or {})
    if not is_lazy(cube):
        with atomic(path) as partial:
            _store(dataset, partial, suffix)
        return path if report is None else (path, report.compute())
    from dask.delayed import delayed

    chunks, time = chunk_sizes(seen, None), seen.dims["time"]
    workshop = workshop_beside(path)
    partial = workshop / path.name
    try:
        _store(dataset, partial, suffix)  # all but the pixels
        frame = share(
            dataset[name]
            .isel({time: slice(0)})
            .variable.copy(data=np.empty(_without(cube, time), cube.dtype))
        )
        write = delayed(_write_zarr if suffix == ".zarr" else _write_netcdf, pure=False)
        jobs: list[Any] = []
        edges = itertools.pairwise(np.cumsum((0, *chunks)))
        roles = tuple(str(dim) for dim in cube.dims)
        own = xr.Variable(roles, cube.data)
        for first, last in edges:
            part = own.isel({str(time): slice(int(first), int(last))}).data.rechunk(-1)
            pixels = part.to_delayed(optimize_graph=False).ravel()[0]
            # a netCDF file is written by one after the other
            before = jobs[-1] if jobs and suffix != ".zarr" else None
            jobs.append(write(pixels, partial, name, frame, time, int(first), before))
        done = delayed(_finish, pure=False)(jobs, workshop, path)
        return _complete(done, jobs, chunks, report, compute)
    except BaseException:
        discard(workshop, path)
        raise


def _complete(
    done: Any, jobs: Sequence[Any], chunks: tuple[int, ...], report: xr.Dataset | None, compute: bool
) -> Any:
    if report is None:
        return done.compute() if compute else done
    both = (done, rows_after(report, jobs, chunks))
    if not compute:
        return both
    written, known = compute_together(both)
    return written, known.assign_attrs(summarize(known).attrs())


# --- files and their names ---


def _require_rasterio() -> None:
    try:
        import rasterio  # noqa: F401
    except ImportError:
        cure = 'pip install "torchalign[io]"'
        raise ImportError(message("GeoTIFF", "the package rasterio", "no such package", cure)) from None


@contextmanager
def _quiet() -> Any:
    """A file without a georeference is a file like any other."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _find_files(source: Any, pattern: str) -> list[Path]:
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        if folder.is_file():
            return [folder]
        if not folder.is_dir():
            raise FileNotFoundError(
                message("source", "a folder or files", f"{folder}, not there", "check the path")
            )
        inside = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        paths = [path for path in inside if fnmatch.fnmatch(path.name.lower(), pattern.lower())]
        names = {path.name for path in inside}
        paths = [path for path in paths if not _is_note(path.name, names)]
        if not paths:
            got = f"none among the {len(inside)} files of {folder}"
            raise FileNotFoundError(message("source", f"files like {pattern}", got, "give pattern="))
        return paths
    paths = [Path(path) for path in source]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        got = f"{', '.join(missing[:3])}, not there" if missing else "an empty list"
        raise FileNotFoundError(message("source", "a folder or files", got, "check the paths"))
    return sorted(paths)


def _is_note(name: str, names: Collection[str]) -> bool:
    """GDAL's notes are called after their file: a.tif.aux.xml, a.tif.ovr, a.tif.msk beside a.tif."""
    parts = name.split(".")
    return any(".".join(parts[:last]) in names for last in range(1, len(parts)))


def _read_headers(paths: Sequence[Path], skipped: dict[Path, str]) -> dict[Path, _Raster]:
    import rasterio

    rasters = {}
    for path in paths:
        try:
            with _quiet(), rasterio.open(path) as file:
                crs = file.crs.to_wkt() if file.crs else ""
                a, b, c, d, e, f = (float(value) for value in tuple(file.transform)[:6])
                rasters[path] = _Raster(
                    path,
                    Grid((a, b, c, d, e, f), (file.height, file.width), crs),
                    file.count,
                    tuple(file.dtypes),
                    file.nodata,
                    tuple(file.descriptions),
                    tuple(file.scales),
                    tuple(file.offsets),
                )
        except rasterio.errors.RasterioError as error:
            skipped[path] = f"it cannot be read ({str(error).splitlines()[0]})"
    return rasters


def _read_times(
    paths: Sequence[Path], time: Callable[[Path], Any] | None, skipped: dict[Path, str]
) -> dict[Path, np.datetime64]:
    times = {}
    for path in paths:
        found = parse_time(path.name) if time is None else time(path)
        label = None if found is None else _to_datetime64(found, path)
        if label is None or np.isnat(label):
            skipped[path] = "there is no date in its name"
        else:
            times[path] = label
    return times


def _to_datetime64(value: Any, path: Path) -> Any:
    """Dates of pandas and cftime, text, what numpy takes; but no numbers, which it takes for nanoseconds."""
    if isinstance(value, str) and (parsed := parse_time(value)) is not None:
        return parsed
    try:
        if isinstance(value, (int, float, np.number)):
            raise TypeError("a number")
        label = np.array(value, "datetime64[s]")[()]
        if not np.isnat(label) and not _EARLIEST <= label < _LATEST:  # numpy reads 20200101 as a year
            raise ValueError(f"the year {label.astype('datetime64[Y]')}")
    except (TypeError, ValueError) as error:
        cure = "return a datetime, numpy.datetime64 or ISO text"
        raise ValueError(message(f"time({path.name!r})", "a date", f"{value!r} ({error})", cure)) from error
    return np.array(value, "datetime64[ns]")[()]


def _drop_strangers(rasters: Mapping[Path, _Raster], skipped: dict[Path, str]) -> None:
    """Files unlike most of the others."""
    kinds = Counter(raster.kind for path, raster in rasters.items() if path not in skipped)
    if len(kinds) < 2:
        return
    usual = kinds.most_common(1)[0][0]
    names = ("transform", "size", "CRS", "dtypes", "nodata", "band names", "scales", "offsets")
    for path, raster in rasters.items():
        if path not in skipped and raster.kind != usual:
            pairs = zip(names, raster.kind, usual, strict=True)
            name, own, most = next(pair for pair in pairs if pair[1] != pair[2])
            if name == "CRS" and _crs_name(own) != _crs_name(most):  # else only their WKT tells them apart
                own, most = _crs_name(own), _crs_name(most)
            skipped[path] = f"{name} {own} where most have {most}"


def _crs_name(wkt: str) -> str:
    return wkt.partition('"')[2].partition('"')[0] or "none"


def _drop_duplicates(
    paths: Sequence[Path], times: Mapping[Path, np.datetime64], skipped: dict[Path, str]
) -> None:
    first: dict[np.datetime64, Path] = {}
    for path in paths:
        if times[path] in first:
            skipped[path] = f"it is of the same time as {first[times[path]].name}, {times[path]}"
        else:
            first[times[path]] = path


def _complain(skipped: Mapping[Path, str], errors: OnError, total: int) -> None:
    if errors == "skip" or not skipped:
        return
    listed = "; ".join(f"{path.name}: {reason}" for path, reason in list(skipped.items())[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    cure = 'pass errors="skip" to leave them out, pattern= or a list to choose others, or time= to tell dates'
    raise ValueError(
        message(
            "source",
            "files of one grid, each of its own date",
            f"{len(skipped)} of {total} that are not: {listed}{more}",
            cure,
        )
    )


def _find_bands(bands: Any, raster: _Raster) -> list[int]:
    """GDAL's numbers."""
    everything = list(range(1, raster.bands + 1))
    if bands is None:
        return everything
    wanted = [bands] if isinstance(bands, (str, int, np.integer)) else list(bands)
    numbers = []
    for band in wanted:
        if isinstance(band, str) and band in raster.descriptions:
            numbers.append(raster.descriptions.index(band) + 1)
        elif isinstance(band, (int, np.integer)) and not isinstance(band, bool) and int(band) in everything:
            numbers.append(int(band))
        else:
            named = [name for name in raster.descriptions if name]
            expected = (
                f"some of {named} or of the numbers 1 … {raster.bands}"
                if named
                else f"numbers 1 … {raster.bands}"
            )
            raise ValueError(message("bands", expected, repr(band), "choose among these"))
    return numbers


# --- pixels ---


def _read_pixels(path: Path, numbers: Sequence[int]) -> Array:
    import rasterio

    try:
        with _quiet(), rasterio.open(path) as file:
            values: Array = file.read(list(numbers))
            return values
    except rasterio.errors.RasterioError as error:
        reason = str(error).splitlines()[0]
        cure = 'fetch it again, or leave it out (errors="skip" without chunks does)'
        raise OSError(message(str(path), "pixels that can be read", reason, cure)) from error


def _dtype_of(raster: _Raster, numbers: Sequence[int]) -> np.dtype[Any]:
    return np.result_type(*(np.dtype(raster.dtypes[number - 1]) for number in numbers))


def _read_all(
    paths: Sequence[Path], numbers: Sequence[int], raster: _Raster, keep_empty: bool
) -> tuple[Array, dict[int, str]]:
    """(T, C, H, W), and which frames are of no use, with the reason."""
    values = np.empty((len(paths), len(numbers), *raster.grid.size), _dtype_of(raster, numbers))
    nothing = 0 if raster.nodata is None else raster.nodata
    bad = {}
    for number, path in enumerate(paths):
        try:
            values[number] = _read_pixels(path, numbers)
        except OSError as error:  # a download that broke off: its head is whole
            bad[number] = f"it cannot be read ({error.__cause__ or error})"
            continue
        frame = values[number]
        if not keep_empty and (np.isnan(frame) if np.isnan(nothing) else frame == nothing).all():
            bad[number] = "it is empty"
    return values, bad


def _read_lazily(paths: Sequence[Path], numbers: Sequence[int], raster: _Raster, chunks: Any) -> Any:
    import dask.array
    from dask.delayed import delayed

    da: Any = dask.array  # which has no types

    dtype = _dtype_of(raster, numbers)
    shape = (len(numbers), *raster.grid.size)
    read = delayed(_read_some, pure=True)
    size = chunks if isinstance(chunks, (int, np.integer)) else None
    known = chunks == "auto" or isinstance(chunks, Mapping) or (size is not None and size > 0)
    if not known or isinstance(chunks, bool):
        expected = 'a positive number of frames, a mapping, "auto" or None'
        raise ValueError(message("chunks", expected, repr(chunks), "give a number of frames"))
    if chunks == "auto":
        size = max(1, 2**26 // max(1, int(np.prod(shape)) * dtype.itemsize))
    if isinstance(chunks, Mapping) and isinstance(chunks.get("time"), int) and chunks["time"] > 0:
        size = chunks["time"]
    groups = [list(paths[start : start + (size or 1)]) for start in range(0, len(paths), size or 1)]
    blocks = [
        da.from_delayed(read(group, list(numbers)), (len(group), *shape), dtype=dtype) for group in groups
    ]
    whole = da.concatenate(blocks)
    if isinstance(chunks, Mapping):
        axes = {"time": 0, "band": 1, "y": 2, "x": 3}
        return whole.rechunk({axes.get(key, key): value for key, value in chunks.items()})
    return whole


def _read_some(paths: Sequence[Path], numbers: Sequence[int]) -> Array:
    return np.stack([_read_pixels(path, numbers) for path in paths])


def _label(
    values: Any, rasters: Sequence[_Raster], times: Sequence[np.datetime64], numbers: Sequence[int]
) -> xr.DataArray:
    first = rasters[0]
    a, b, c, d, e, f = first.grid.transform
    height, width = first.grid.size
    names = [first.descriptions[number - 1] for number in numbers]
    unique = all(names) and len(set(names)) == len(names)
    coords: dict[str, Any] = {
        "time": np.array(times, "datetime64[ns]"),
        "band": [str(name) for name in names] if unique else list(numbers),
        _FILE: ("time", np.array([raster.path.name for raster in rasters], dtype=np.str_)),
    }
    georeferenced = bool(first.grid.crs) or first.grid.transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if georeferenced and not b and not d:
        coords["y"] = ("y", f + e * (np.arange(height) + 0.5), {"axis": "Y", "long_name": "pixel centres"})
        coords["x"] = ("x", c + a * (np.arange(width) + 0.5), {"axis": "X", "long_name": "pixel centres"})
    mapping = {"GeoTransform": first.grid.to_gdal()} if georeferenced else {}
    if first.grid.crs:
        mapping |= {"crs_wkt": first.grid.crs, "spatial_ref": first.grid.crs}
        mapping |= _cf_attributes(first.grid.crs)
    if georeferenced:
        coords["spatial_ref"] = ((), 0, mapping)
    attrs: dict[str, Any] = {}
    if first.nodata is not None:
        dtype = np.dtype(values.dtype)
        attrs["_FillValue"] = dtype.type(first.nodata) if _fits(first.nodata, dtype) else first.nodata
    if any(names):
        attrs["long_name"] = tuple(name or "" for name in names)
        if not unique:
            coords["description"] = ("band", [name or "" for name in names])
    for plural, single, neutral in (("scales", "scale_factor", 1.0), ("offsets", "add_offset", 0.0)):
        own = [getattr(first, plural)[number - 1] for number in numbers]
        if len(set(own)) == 1 and own[0] != neutral:
            attrs[single] = own[0]
        elif len(set(own)) > 1:
            coords[plural] = ("band", own)  # they go where their bands go
    cube = xr.DataArray(values, coords, ("time", "band", "y", "x"), attrs=attrs)
    cube.name = None  # a lazy one is else called after its graph
    if georeferenced:
        cube.encoding["grid_mapping"] = "spatial_ref"
    return cube


def _cf_attributes(wkt: str) -> dict[str, Any]:
    """What CF calls the parts of a CRS; the WKT alone where pyproj does not know it."""
    try:
        from pyproj import CRS
        from pyproj.exceptions import CRSError
    except ImportError:
        return {}
    try:
        return {key: value for key, value in CRS.from_wkt(wkt).to_cf().items() if key != "crs_wkt"}
    except (
        CRSError,
        KeyError,
    ):  # no WKT that PROJ knows, or a method that CF has not; nothing is lost without
        return {}


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":
        return True
    limits = np.iinfo(dtype)
    return bool(np.isfinite(value)) and limits.min <= value <= limits.max and value == int(value)


# --- writing ---


def _file_names(cube: Cube, template: str | None) -> list[str]:
    time, count = cube.dims["time"], cube.sizes["time"]
    stems: list[str] = [""] * count
    if _FILE in cube.array.coords and cube.array[_FILE].dims == (time,):
        stems = [str(name) for name in cube.array[_FILE].values]
    labels = list(cube.array[time].values) if time in cube.array.coords else [None] * count
    dates = [_as_datetime(label) for label in labels]
    if template is None:
        if all(stems):
            names = [str(Path(stem).with_suffix(".tif").name) for stem in stems]
        elif all(dates):
            days = [f"{date:%Y%m%d}" for date in dates]
            names = [
                f"{date:%Y%m%d}.tif" if days.count(day) == 1 else f"{date:%Y%m%dT%H%M%S}.tif"
                for date, day in zip(dates, days, strict=True)
            ]
        else:
            names = [f"{number:04d}.tif" for number in range(count)]
    else:
        names = []
        for number, (stem, date, label) in enumerate(zip(stems, dates, labels, strict=True)):
            fields = {
                "number": number,
                "name": cube.array.name or "cube",
                "time": label if date is None else date,
            }
            fields |= {"file": Path(stem).stem} if stem else {}
            try:
                names.append(template.format(**fields))
            except (KeyError, IndexError, ValueError, TypeError) as error:
                cure = f"use {{time:%Y%m%d}}, {{number}}, {{name}}{', {file}' if stem else ''}"
                raise ValueError(
                    message("template", "a name with fields", f"{template!r} ({error!r})", cure)
                ) from error
        names = [name if name.lower().endswith((".tif", ".tiff")) else f"{name}.tif" for name in names]
    twice = [name for name, often in Counter(names).items() if often > 1]
    if twice or any(os.sep in name for name in names):
        got = f"{twice[0]} more than once" if twice else f"{names[0]}, a path"
        cure = 'give a template with {number} or the time of day, "{time:%Y%m%dT%H%M%S}.tif"'
        raise ValueError(message("template", "a file name for each frame", got, cure))
    return names


def _as_datetime(label: Any) -> datetime.datetime | None:
    if isinstance(label, np.datetime64) and not np.isnat(label):
        return label.astype("datetime64[us]").astype(datetime.datetime)
    return label if isinstance(label, datetime.datetime) else None


def _stack_variable(cube: Cube) -> xr.Variable:
    """(T, C, H, W), not loaded."""
    variable = cube.variable
    if "band" not in cube.dims:
        variable = xr.Variable(("band", *variable.dims), variable.data[None])
    return variable.transpose("time", "band", "y", "x")


def _frame_parts(cube: Cube) -> list[xr.Variable]:
    whole = _stack_variable(cube)
    return [whole[number : number + 1] for number in range(cube.sizes["time"])]


def _profiles(cube: Cube, driver: str, compression: Compression) -> list[dict[str, Any]]:
    """What rasterio is told of every frame's file, beside the pixels."""
    array = cube.array
    grid = find_grid(cube)
    own = array.coords.get("geotransform")
    size = (cube.sizes["y"], cube.sizes["x"])
    transforms: list[tuple[float, ...] | None]
    if own is not None and own.dims == (cube.dims["time"],):
        shifted = [Grid.from_gdal(str(text), size) for text in own.values]
        transforms = [_carried(one, own.attrs, grid, cube).transform for one in shifted]
    else:
        transforms = [None if grid is None else grid.transform] * cube.sizes["time"]
    nodata = find_nodata(array)
    declared = array.attrs.get("_FillValue", array.encoding.get("_FillValue"))
    if nodata:
        declared = nodata[0]
    elif declared is not None and array.dtype.kind == "f":
        declared = np.nan  # what is encoded is of the integers that another file packs these floats into
    bands = cube.sizes["band"]
    profile: dict[str, Any] = {
        "driver": driver,
        "dtype": array.dtype.newbyteorder("=").name,
        "count": bands,
        "height": size[0],
        "width": size[1],
        "crs": (grid.crs if grid is not None else "") or None,
        "nodata": None if declared is None else float(declared),
        "descriptions": _descriptions(cube),
        "scales": _per_band(array, "scales", "scale_factor", 1.0, bands),
        "offsets": _per_band(array, "offsets", "add_offset", 0.0, bands),
    }
    profile["compress"] = compression  # "none" must be said, too: a COG is else LZW
    if driver == "COG":  # its default is cubic, which makes classes that there are not, and blends nodata
        profile["overview_resampling"] = "nearest"
    if compression != "none":
        predictor = 3 if array.dtype.kind == "f" else 2
        profile |= {
            "predictor": ("FLOATING_POINT" if predictor == 3 else "STANDARD")
            if driver == "COG"
            else predictor
        }
    return [{**profile, "transform": transform} for transform in transforms]


def _carried(shifted: Grid, of: Mapping[Any, Any], grid: Grid | None, cube: Cube) -> Grid:
    """A frame's own georeference, of the grid that the cube has by now: cropped, or of larger pixels."""
    if grid is None or "grid" not in of:
        return shifted
    before = Grid.from_gdal(str(of["grid"]), (int(of["height"]), int(of["width"])))
    if all(cube.dims[role] in cube.array.coords for role in ("y", "x")):
        if before.transform == grid.transform:
            return shifted
        old, new, own = (one.matrix for one in (before, grid, shifted))
        a, b, c, d, e, f = (float(value) for value in (own @ np.linalg.inv(old) @ new)[:2].ravel())
        return shifted._replace(transform=(a, b, c, d, e, f))
    if before.size != grid.size:
        got = f"{grid.size}, without y and x coordinates that tell where"
        cure = 'crop before apply(…, mode="shift-coords")'
        raise ValueError(message("cube", f"the size of its georeferences, {before.size}", got, cure))
    return shifted


def _descriptions(cube: Cube) -> list[str | None]:
    """Names of the bands: as the file had them, else their labels, if these are text."""
    count = cube.sizes["band"]
    band = cube.dims.get("band")
    if band is not None and band in cube.array.coords:
        labels = cube.array[band].values
        if labels.dtype.kind in "UO":
            return [str(label) for label in labels]
        if "description" in cube.array.coords and cube.array["description"].dims == (band,):
            return [str(name) or None for name in cube.array["description"].values]
    names = cube.array.attrs.get("long_name")
    if isinstance(names, (tuple, list)) and len(names) == count:
        return [str(name) or None for name in names]
    return [None] * count


def _per_band(array: xr.DataArray, plural: str, single: str, neutral: float, count: int) -> list[float]:
    if plural in array.coords:
        return [float(value) for value in np.broadcast_to(array[plural].values, count)]
    if plural in array.attrs:  # as rioxarray has them
        values = [float(value) for value in np.ravel(array.attrs[plural])]
        if len(values) != count:
            cure = f"select them as the bands were: cube.attrs[{plural!r}]"
            raise ValueError(message("cube", f"{plural} of {count} bands", values, cure))
        return values
    return [float(array.attrs.get(single, neutral))] * count


def _write_raster(frames: Array, paths: Sequence[Path], profiles: Sequence[dict[str, Any]]) -> list[Path]:
    """Frames (t, C, H, W) of one chunk."""
    import rasterio
    from rasterio.transform import Affine

    for values, path, given in zip(frames, paths, profiles, strict=True):
        profile = dict(given)
        named = {key: profile.pop(key) for key in ("descriptions", "scales", "offsets")}
        transform = profile.pop("transform")
        if transform is not None:
            profile["transform"] = Affine(*transform)
        with atomic(path) as partial, _quiet():
            partial.parent.mkdir(exist_ok=True)
            with rasterio.open(partial, "w", **profile) as file:
                file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
                for number, name in enumerate(named["descriptions"], 1):
                    if name:
                        file.set_band_description(number, name)
                if set(named["scales"]) != {1.0} or set(named["offsets"]) != {0.0}:
                    file.scales, file.offsets = named["scales"], named["offsets"]
    return list(paths)


def _write_part(
    frames: Array, everything: tuple[list[Path], list[dict[str, Any]]], first: int, last: int
) -> list[Path]:
    paths, profiles = everything
    return _write_raster(frames, paths[first:last], profiles[first:last])


def _all_paths(parts: Sequence[Sequence[Path]]) -> list[Path]:
    return [path for part in parts for path in part]


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


def _without(cube: xr.DataArray, time: Hashable) -> tuple[int, ...]:
    return tuple(0 if dim == time else length for dim, length in cube.sizes.items())


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


def _finish(jobs: Sequence[Any], workshop: Path, path: Path) -> Path:
    put_in_place(workshop / path.name, path)
    discard(workshop, path)
    return path
