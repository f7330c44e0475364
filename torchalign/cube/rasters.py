"""A folder of GeoTIFFs as a cube, and a cube as a folder of GeoTIFFs, nothing changed on the way; with rasterio."""

from __future__ import annotations

import datetime
import fnmatch
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from torchalign._check import message
from torchalign.cube.chunks import chunk_sizes, is_lazy, parts_along_time, share
from torchalign.cube.files import atomic, check_free
from torchalign.cube.georeference import Georeference, crs_name, find_georeference, frame_transforms
from torchalign.cube.labels import CUBE, Array, Cube, find_bands, load
from torchalign.cube.pixels import find_nodata
from torchalign.cube.stores import finish_writing

__all__ = ["Compression", "OnError", "parse_time", "read_stack", "write_rasters"]

OnError = Literal["raise", "skip"]
Compression = Literal["deflate", "lzw", "zstd", "none"]
_FILE = "file"  # the coordinate that keeps the names
_CHUNK_BYTES = 2**26  # of chunks="auto"
# the coordinate where bands differ, the attribute where they do not, and what changes nothing
_SCALING = (("scales", "scale_factor", 1.0), ("offsets", "add_offset", 0.0))
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

    grid: Georeference
    dtypes: tuple[str, ...]
    nodata: float | None
    descriptions: tuple[str | None, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]

    @property
    def kind(self) -> dict[str, Any]:
        """What all files of a stack must have in common."""
        nodata = "nan" if self.nodata is not None and np.isnan(self.nodata) else self.nodata
        grid = {"transform": self.grid.transform, "size": self.grid.size, "CRS": self.grid.crs}
        own = {"dtypes": self.dtypes, "nodata": nodata, "band names": self.descriptions}
        return grid | own | {"scales": self.scales, "offsets": self.offsets}


class _Bands(NamedTuple):
    """What is read of every file: some bands, of one dtype."""

    numbers: list[int]  # GDAL's, from 1
    raster: _Raster

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return len(self.numbers), *self.raster.grid.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """That holds all of them."""
        return np.result_type(*(np.dtype(name) for name in self.of(self.raster.dtypes)))

    def of(self, values: Sequence[Any]) -> list[Any]:
        """What belongs to these bands."""
        return [values[number - 1] for number in self.numbers]


def read_stack(
    source: Any,
    pattern: str,
    bands: Any,
    time: Callable[[Path], Any] | None,
    chunks: Any,
    errors: OnError,
    keep_empty: bool,
) -> xr.DataArray:
    """See :func:`torchalign.open_stack`."""
    paths = _find_files(source, pattern)
    skipped: dict[Path, str] = {}
    rasters = _read_headers(paths, skipped)
    times = _read_times(list(rasters), time, skipped)
    _drop_strangers(rasters, skipped)
    _drop_duplicates([path for path in rasters if path not in skipped], times, skipped)
    _complain(skipped, errors, len(paths))
    chosen = sorted((path for path in rasters if path not in skipped), key=lambda path: (times[path], path))
    if chosen:
        first = rasters[chosen[0]]
        count = len(first.dtypes)
        numbers = (
            list(range(count)) if bands is None else find_bands(bands, first.descriptions, count, first=1)
        )
        wanted = _Bands([number + 1 for number in numbers], first)
        if chunks is not None:
            values = _read_lazily(chosen, wanted, chunks)
        else:
            values = _read_all(chosen, wanted, keep_empty, skipped)
            _complain(skipped, errors, len(paths))
            kept = [number for number, path in enumerate(chosen) if path not in skipped]
            if len(kept) < len(chosen):
                values, chosen = values[kept], [chosen[number] for number in kept]
    if not chosen:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in list(skipped.items())[:3])
        got = f"none of {len(paths)} ({reasons})"
        raise ValueError(message("source", "at least one usable file", got, "see errors="))
    cube = _label(values, chosen, [times[path] for path in chosen], wanted)
    if skipped:
        cube.attrs["skipped_files"] = [f"{path.name}: {reason}" for path, reason in sorted(skipped.items())]
    return cube


# --- files and their dates ---


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
                grid = Georeference((a, b, c, d, e, f), (file.height, file.width), crs)
                bands = (file.dtypes, file.descriptions, file.scales, file.offsets)
                dtypes, names, scales, offsets = map(tuple, bands)
                rasters[path] = _Raster(grid, dtypes, file.nodata, names, scales, offsets)
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
    kinds = {path: raster.kind for path, raster in rasters.items() if path not in skipped}
    often = Counter(tuple(kind.values()) for kind in kinds.values())
    if len(often) < 2:
        return
    usual = often.most_common(1)[0][0]
    for path, kind in kinds.items():
        differing = [
            (name, own, most) for (name, own), most in zip(kind.items(), usual, strict=True) if own != most
        ]
        if differing:
            name, own, most = differing[0]
            if name == "CRS" and crs_name(own) != crs_name(most):  # else only their WKT tells them apart
                own, most = crs_name(own) or "none", crs_name(most) or "none"
            skipped[path] = f"{name} {own} where most have {most}"


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
    got = f"{len(skipped)} of {total} that are not: {listed}{more}"
    cure = 'pass errors="skip" to leave them out, pattern= or a list to choose others, or time= to tell dates'
    raise ValueError(message("source", "files of one grid, each of its own date", got, cure))


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


def _read_all(paths: Sequence[Path], bands: _Bands, keep_empty: bool, skipped: dict[Path, str]) -> Array:
    """(T, C, H, W); the frames that are of no use are added to skipped."""
    values = np.empty((len(paths), *bands.shape), bands.dtype)
    nothing = 0 if bands.raster.nodata is None else bands.raster.nodata
    for frame, path in zip(values, paths, strict=True):
        try:
            frame[:] = _read_pixels(path, bands.numbers)
        except OSError as error:  # a download that broke off: its head is whole
            skipped[path] = f"it cannot be read ({error.__cause__ or error})"
            continue
        if not keep_empty and (np.isnan(frame) if np.isnan(nothing) else frame == nothing).all():
            skipped[path] = "it is empty"
    return values


def _read_lazily(paths: Sequence[Path], bands: _Bands, chunks: Any) -> Any:
    import dask.array
    from dask.delayed import delayed

    da: Any = dask.array  # which has no types
    size = chunks if isinstance(chunks, (int, np.integer)) and not isinstance(chunks, bool) else None
    known = chunks == "auto" or isinstance(chunks, Mapping) or (size is not None and size > 0)
    if not known:
        expected = 'a positive number of frames, a mapping, "auto" or None'
        raise ValueError(message("chunks", expected, repr(chunks), "give a number of frames"))
    if chunks == "auto":
        size = max(1, _CHUNK_BYTES // max(1, int(np.prod(bands.shape)) * bands.dtype.itemsize))
    if isinstance(chunks, Mapping) and isinstance(chunks.get("time"), int) and chunks["time"] > 0:
        size = chunks["time"]
    read, step = delayed(_read_some, pure=True), size or 1
    groups = [list(paths[start : start + step]) for start in range(0, len(paths), step)]
    blocks = [
        da.from_delayed(read(group, bands.numbers), (len(group), *bands.shape), dtype=bands.dtype)
        for group in groups
    ]
    whole = da.concatenate(blocks)
    if isinstance(chunks, Mapping):
        axes = {role: axis for axis, role in enumerate(CUBE)}
        return whole.rechunk({axes.get(key, key): value for key, value in chunks.items()})
    return whole


def _read_some(paths: Sequence[Path], numbers: Sequence[int]) -> Array:
    return np.stack([_read_pixels(path, numbers) for path in paths])


def _label(values: Any, paths: Sequence[Path], times: Sequence[np.datetime64], bands: _Bands) -> xr.DataArray:
    raster, grid = bands.raster, bands.raster.grid
    a, b, c, d, e, f = grid.transform
    height, width = grid.size
    names = bands.of(raster.descriptions)
    unique = all(names) and len(set(names)) == len(names)
    coords: dict[str, Any] = {
        "time": np.array(times, "datetime64[ns]"),
        "band": [str(name) for name in names] if unique else bands.numbers,
        _FILE: ("time", np.array([path.name for path in paths], dtype=np.str_)),
    }
    georeferenced = bool(grid.crs) or grid.transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if georeferenced and not b and not d:
        coords["y"] = ("y", f + e * (np.arange(height) + 0.5), {"axis": "Y", "long_name": "pixel centres"})
        coords["x"] = ("x", c + a * (np.arange(width) + 0.5), {"axis": "X", "long_name": "pixel centres"})
    if georeferenced:
        mapping = {"GeoTransform": grid.to_gdal()}
        if grid.crs:
            mapping |= {"crs_wkt": grid.crs, "spatial_ref": grid.crs} | _cf_attributes(grid.crs)
        coords["spatial_ref"] = ((), 0, mapping)
    attrs: dict[str, Any] = {}
    if raster.nodata is not None:
        with np.errstate(all="ignore"):
            own = np.array(raster.nodata).astype(values.dtype)[()]
        attrs["_FillValue"] = own if own == raster.nodata or values.dtype.kind == "f" else raster.nodata
    if any(names):
        attrs["long_name"] = tuple(name or "" for name in names)
        if not unique:
            coords["description"] = ("band", [name or "" for name in names])
    for plural, single, neutral in _SCALING:
        numbers = bands.of(getattr(raster, plural))
        if len(set(numbers)) > 1:
            coords[plural] = ("band", numbers)  # they go where their bands go
        elif numbers[0] != neutral:
            attrs[single] = numbers[0]
    cube = xr.DataArray(values, coords, CUBE, attrs=attrs)
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
    except (CRSError, KeyError):  # no WKT that PROJ knows, or a method that CF has not
        return {}


# --- writing ---


def write_rasters(
    cube: Cube,
    folder: Path,
    template: str | None,
    driver: str,
    compression: Compression,
    overwrite: bool,
    report: xr.Dataset | None,
    compute: bool,
) -> Any:
    """See :func:`torchalign.write_stack`."""
    paths = [folder / name for name in _file_names(cube, template)]
    for path in paths:
        check_free(path, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    profile, transforms = _profile(cube, driver, compression), frame_transforms(cube)
    bands = {"descriptions": _descriptions(cube)} | {names[0]: _per_band(cube, *names) for names in _SCALING}
    files = tuple(_File(path, profile, bands, own) for path, own in zip(paths, transforms, strict=True))
    if not is_lazy(cube.array):
        for number in range(len(files)):
            _write_files(
                load(cube.variable, CUBE, time=slice(number, number + 1)), files[number : number + 1], 0, 1
            )
        return paths if report is None else (paths, report.compute())
    from dask.delayed import delayed

    chunks = chunk_sizes(cube, None)
    everything = share(files)  # in one task: dask would keep many small ones, and pixels, waiting
    write, edges = delayed(_write_files, pure=False), itertools.pairwise(np.cumsum((0, *chunks)))
    jobs = [
        write(pixels, everything, int(first), int(last))
        for pixels, (first, last) in zip(parts_along_time(cube.variable, CUBE, chunks), edges, strict=True)
    ]
    done = delayed(_all_paths, pure=False)(jobs)
    return finish_writing(done, jobs, chunks, report, compute)


def _all_paths(parts: Sequence[Sequence[Path]]) -> list[Path]:
    return [path for part in parts for path in part]


class _File(NamedTuple):
    path: Path
    profile: dict[str, Any]  # of rasterio
    bands: dict[str, list[Any]]  # what each band is called and how it is scaled
    transform: tuple[float, ...] | None


def _file_names(cube: Cube, template: str | None) -> list[str]:
    time, count = cube.dims["time"], cube.sizes["time"]
    stems: list[str] = [""] * count
    if _FILE in cube.array.coords and cube.array[_FILE].dims == (time,):
        stems = [str(name) for name in cube.array[_FILE].values]
    own = cube.coordinate("time")
    labels = [None] * count if own is None else list(own.values)
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


def _profile(cube: Cube, driver: str, compression: Compression) -> dict[str, Any]:
    """What rasterio is told of every file, beside the transform and the bands."""
    array, grid, nodata = cube.array, find_georeference(cube), find_nodata(cube.array)
    declared = array.attrs.get("_FillValue", array.encoding.get("_FillValue"))
    if nodata:
        declared = nodata[0]
    elif declared is not None and array.dtype.kind == "f":
        declared = np.nan  # what is encoded is of the integers that another file packs these floats into
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


def _per_band(cube: Cube, plural: str, single: str, neutral: float) -> list[float]:
    array, count = cube.array, cube.sizes["band"]
    if plural in array.coords:
        return [float(value) for value in np.broadcast_to(array[plural].values, count)]
    if plural in array.attrs:  # as rioxarray has them
        values = [float(value) for value in np.ravel(array.attrs[plural])]
        if len(values) != count:
            cure = f"select them as the bands were: cube.attrs[{plural!r}]"
            raise ValueError(message("cube", f"{plural} of {count} bands", values, cure))
        return values
    return [float(array.attrs.get(single, neutral))] * count


def _write_files(frames: Array, files: Sequence[_File], first: int, last: int) -> list[Path]:
    """Frames (t, C, H, W) of one chunk into those of the files that are theirs."""
    import rasterio
    from rasterio.transform import Affine

    for values, (path, profile, bands, transform) in zip(frames, files[first:last], strict=True):
        where = {} if transform is None else {"transform": Affine(*transform)}
        with atomic(path) as partial, _quiet(), rasterio.open(partial, "w", **profile, **where) as file:
            file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
            for number, name in enumerate(bands["descriptions"], 1):
                if name:
                    file.set_band_description(number, name)
            if set(bands["scales"]) != {1.0} or set(bands["offsets"]) != {0.0}:
                file.scales, file.offsets = bands["scales"], bands["offsets"]
    return [file.path for file in files[first:last]]
