"""A folder of GeoTIFFs, or of whatever GDAL opens, as a cube; nothing changed on the way; with rasterio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from torchalign._check import message
from torchalign.cube.finding import Source, find_sources, read_times, short_names
from torchalign.cube.georeference import Georeference, is_same_grid
from torchalign.cube.gridding import Reading, find_grid, plan_reading
from torchalign.cube.headers import CLOSE, Header, drop_strangers, read_headers
from torchalign.cube.labels import CUBE, MASK, USABLE, Array, find_bands
from torchalign.cube.variables import is_class_name

OnError = Literal["raise", "skip"]
# coordinates: the names of the files, their tags, of the bands colours, and what went through GDAL's warper
FILE, TAGS, COLOURS, RESAMPLED = "file", "tags", "colours", "resampled"
_CHUNK_BYTES = 2**26  # of chunks="auto"
# the coordinate where bands differ, the attribute where they do not, and what changes nothing
SCALING: tuple[tuple[str, str, Any], ...] = (
    ("scales", "scale_factor", 1.0),
    ("offsets", "add_offset", 0.0),
    ("units", "units", ""),
)
_PLAIN = {"gray", "undefined"}  # interpretations of bands that say nothing


@dataclass(frozen=True)
class StackOptions:
    """Of :func:`torchalign.open_stack`."""

    pattern: str
    bands: Any
    time: Callable[[Any], Any] | None
    chunks: Any
    errors: OnError
    keep_empty: bool
    recursive: bool
    grid: Any
    resampling: str
    on_demand: bool = False  # pixels stay in the files, and whoever takes some of them reads these


class _File(NamedTuple):
    path: Source
    header: Header
    time: np.datetime64


def read_stack(source: Any, options: StackOptions) -> Any:
    """See :func:`torchalign.open_stack`."""
    mapping = options.bands if isinstance(options.bands, Mapping) else None
    found = find_sources(source, options.pattern, mapping, options.recursive)
    skipped: dict[Source, str] = {}
    layers: dict[str | None, list[_File]] = {}
    for name, paths in found.bands.items():
        headers = read_headers(paths, skipped)
        times = read_times(list(headers), options.time, found.times, source, skipped)
        drop_strangers(headers, skipped, grids=options.grid is None)
        taken = [_File(path, headers[path], times[path]) for path in headers if path not in skipped]
        layers[name] = _one_a_date(taken, skipped)
    layers = _with_common_dates(layers, skipped)
    _complain(skipped, options, found.total)
    if not next(iter(layers.values())):
        raise _nothing_left(skipped, found.total)
    grid = _common_grid(layers, options.grid)
    cubes = {
        name: _read_layer(name, files, grid, options, skipped, found.total) for name, files in layers.items()
    }
    result: Any = cubes[None] if None in cubes else _as_dataset(cubes)  # type: ignore[arg-type]  # names, all of them
    if skipped:
        listed = sorted(skipped.items(), key=lambda item: str(item[0]))
        result.attrs["skipped_files"] = [f"{path.name}: {reason}" for path, reason in listed]
    return result


def _nothing_left(skipped: Mapping[Source, str], total: int) -> ValueError:
    got = f"none of {total} ({_first_reasons(skipped)})"
    return ValueError(message("source", "at least one usable file", got, "see errors="))


def _first_reasons(skipped: Mapping[Source, str]) -> str:
    return "; ".join(f"{path.name}: {reason}" for path, reason in list(skipped.items())[:3])


def _one_a_date(files: Sequence[_File], skipped: dict[Source, str]) -> list[_File]:
    """Sorted by time, the first in the alphabet of each."""
    first: dict[np.datetime64, _File] = {}
    for file in sorted(files, key=lambda file: str(file.path)):
        if file.time in first:
            skipped[file.path] = f"it is of the same time as {first[file.time].path.name}, {file.time}"
        else:
            first[file.time] = file
    return [first[time] for time in sorted(first)]


def _with_common_dates(
    layers: Mapping[str | None, Sequence[_File]], skipped: dict[Source, str]
) -> dict[str | None, list[_File]]:
    """Of every band the files of the dates that all bands have."""
    dates = {name: {file.time for file in files} for name, files in layers.items()}
    common = set.intersection(*dates.values())
    for file in (file for files in layers.values() for file in files if file.time not in common):
        lacking = next(name for name, own in dates.items() if file.time not in own)
        skipped[file.path] = f"band {lacking} has no file of its time, {file.time}"
    return {name: [file for file in files if file.time in common] for name, files in layers.items()}


def _complain(skipped: Mapping[Source, str], options: StackOptions, total: int) -> None:
    if options.errors == "skip" or not skipped:
        return
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    got = f"{len(skipped)} of {total} that are not: {_first_reasons(skipped)}{more}"
    cure = 'pass errors="skip" to leave them out, pattern= or a list to choose others, or time= to tell dates'
    places = ("transform", "size", "CRS", "ground control")
    if any(reason.startswith(places) for reason in skipped.values()):
        cure = f'pass grid="first", "union" or "intersection" to bring them onto one grid; {cure}'
    raise ValueError(message("source", "files of one grid, each of its own date", got, cure))


def _common_grid(layers: Mapping[str | None, Sequence[_File]], wanted: Any) -> Georeference:
    if wanted is not None:
        return find_grid(wanted, {file.path: file.header for files in layers.values() for file in files})
    grids = {name: files[0].header.grid for name, files in layers.items()}
    first = next(iter(grids))
    for name, grid in grids.items():
        if not is_same_grid(grids[first], grid, CLOSE):
            got = f"{_grid_in_words(grids[first])} for {first}, {_grid_in_words(grid)} for {name}"
            cure = 'pass grid="first", "union" or "intersection" to bring them onto one grid'
            raise ValueError(message("bands", "bands of one grid", got, cure))
    return grids[first]


def _grid_in_words(grid: Georeference) -> str:
    return f"{grid.size[0]} × {grid.size[1]} pixels of {abs(grid.transform[0]):g}"


# --- pixels ---


def _read_layer(
    name: str | None,
    files: Sequence[_File],
    grid: Georeference,
    options: StackOptions,
    skipped: dict[Source, str],
    total: int,
) -> xr.DataArray:
    first = files[0].header
    count = len(first.numbers)
    whole = name is not None or options.bands is None
    chosen = list(range(count)) if whole else find_bands(options.bands, first.descriptions, count, first=1)
    numbers = [first.numbers[position] for position in chosen]
    dtype = np.result_type(*(np.dtype(first.dtypes[position]) for position in chosen))
    kernel = options.resampling
    if (name and is_class_name(name)) or any('"table"' in first.colours[one] for one in chosen):
        kernel = "nearest"  # codes, not numbers
    readings = [
        Reading(path, tuple(numbers), header, grid, (0, 0), kernel, dtype.name)
        if options.grid is None
        else plan_reading(path, header, numbers, grid, kernel, dtype)
        for path, header, _ in files
    ]
    masked = any(one.leaves_gaps or one.header.alpha or one.header.has_mask for one in readings)
    values: Any = indexing.LazilyIndexedArray(_Files(readings))
    usable: Any = indexing.LazilyIndexedArray(_Files(readings, masks=True)) if masked else None
    if options.chunks is not None:
        chunks = _frames_of_chunks(options.chunks, values)
        values = xr.Variable(CUBE, values).chunk(chunks).data
        usable = xr.Variable(MASK, usable).chunk(time=chunks["time"]).data if masked else None
    elif not options.on_demand:
        values, usable = _read_all(readings, options.keep_empty, masked, skipped)
        _complain(skipped, options, total)
        kept = [number for number, file in enumerate(files) if file.path not in skipped]
        if not kept:
            raise _nothing_left(skipped, total)
        if len(kept) < len(files):
            values, usable = values[kept], None if usable is None else usable[kept]
            readings, files = [readings[number] for number in kept], [files[number] for number in kept]
    cube = _label(values, readings, [file.time for file in files], chosen)
    if usable is not None:
        kind = "alpha" if first.alpha else "mask"
        attrs = {"kind": kind, "long_name": "0 where a pixel is not usable"}
        cube = cube.assign_coords({USABLE: (MASK, usable, attrs)})
    return cube


class _Files(BackendArray):
    """Pixels of files, (T, C, H, W), or what of them is usable, (T, H, W); those that are taken are read, by rows."""

    def __init__(self, readings: Sequence[Reading], *, masks: bool = False) -> None:
        one = readings[0]
        bands = () if masks else (len(one.numbers),)
        self.readings, self.masks = readings, masks
        self.shape = (len(readings), *bands, *one.grid.size)
        self.dtype = np.dtype(_mask_dtype(one) if masks else one.dtype)

    def __getitem__(self, key: Any) -> Array:
        support = indexing.IndexingSupport.BASIC  # numbers and slices; xarray makes the others of these
        found: Array = indexing.explicit_indexing_adapter(key, self.shape, support, self._read)
        return found

    def _read(self, key: tuple[Any, ...]) -> Array:
        """Of a key of numbers and slices."""
        frames, *bands, rows, columns = key
        chosen, lines = np.arange(self.shape[0])[frames], np.arange(self.shape[-2])[rows]
        first, last = (int(lines.min()), int(lines.max()) + 1) if lines.size else (0, 0)
        values = np.empty((chosen.size, *self.shape[1:-2], last - first, self.shape[-1]), self.dtype)
        for place, number in zip(values, np.ravel(chosen), strict=True):
            one, span = self.readings[number], slice(first, last)
            if first < last:
                place[:] = one.usable(span) if self.masks else one.pixels(span)
        within = lines - first if np.ndim(lines) == 0 else slice(None, None, getattr(rows, "step", None))
        where = (0 if np.ndim(chosen) == 0 else slice(None), *bands, within, columns)
        return values[where]


def _read_all(
    readings: Sequence[Reading], keep_empty: bool, masked: bool, skipped: dict[Source, str]
) -> tuple[Array, Array | None]:
    """(T, C, H, W) and (T, H, W); the frames that are of no use are added to skipped."""
    one = readings[0]
    values = np.empty((len(readings), len(one.numbers), *one.grid.size), one.dtype)
    usable = np.zeros((len(readings), *one.grid.size), _mask_dtype(one)) if masked else None
    for number, reading in enumerate(readings):
        frame, nodata = values[number], reading.header.nodata
        try:
            frame[:] = reading.pixels()
            if usable is not None:
                usable[number] = reading.usable()
        except OSError as error:  # a download that broke off: its head is whole
            skipped[reading.path] = f"it cannot be read ({error.__cause__ or error})"
            continue
        nothing = 0 if nodata is None else nodata
        empty = (np.isnan(frame) if np.isnan(nothing) else frame == nothing).all()
        if not keep_empty and (empty or (usable is not None and not usable[number].any())):
            skipped[reading.path] = "it is empty"
    return values, usable


def _mask_dtype(reading: Reading) -> str:
    return reading.dtype if reading.header.alpha else "uint8"


def _frames_of_chunks(chunks: Any, array: Any) -> dict[Any, Any]:
    """Dask's sizes of chunks, frame by frame where nothing is said of time."""
    if isinstance(chunks, Mapping):
        return {"time": 1} | {CUBE[key] if isinstance(key, int) else key: own for key, own in chunks.items()}
    if isinstance(chunks, str) and chunks == "auto":
        return {"time": max(1, _CHUNK_BYTES // max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize))}
    if not isinstance(chunks, (int, np.integer)) or isinstance(chunks, bool) or chunks < 1:
        expected = 'a positive number of frames, a mapping, "auto" or None'
        raise ValueError(message("chunks", expected, repr(chunks), "give a number of frames"))
    return {"time": int(chunks)}


# --- labels ---


def _label(
    values: Any, readings: Sequence[Reading], times: Sequence[np.datetime64], chosen: Sequence[int]
) -> xr.DataArray:
    first, grid = readings[0].header, readings[0].grid

    def of_bands(entries: Sequence[Any]) -> list[Any]:
        return [entries[position] for position in chosen]

    names = of_bands(first.descriptions)
    unique = all(names) and len(set(names)) == len(names)
    coords: dict[str, Any] = {
        "time": np.array(times, "datetime64[ns]"),
        "band": [str(name) for name in names] if unique else of_bands(first.numbers),
        FILE: ("time", np.array(short_names([one.path for one in readings]), dtype=np.str_)),
    }
    if any(one.header.tags for one in readings):
        coords[TAGS] = ("time", np.array([one.header.tags for one in readings], dtype=np.str_))
    if any(one.offset is None for one in readings):
        coords[RESAMPLED] = ("time", np.array([one.offset is None for one in readings]))
    coords |= _place_labels(grid, first.gcps if all(one.is_whole for one in readings) else "")
    attrs: dict[str, Any] = {}
    if first.nodata is not None:
        with np.errstate(all="ignore"):
            own = np.array(first.nodata).astype(values.dtype)[()]
        attrs["_FillValue"] = own if own == first.nodata or values.dtype.kind == "f" else first.nodata
    if any(names):
        attrs["long_name"] = tuple(name or "" for name in names)
        if not unique:
            coords["description"] = ("band", [name or "" for name in names])
    colours = of_bands(first.colours)
    if any(not any(f'"{word}"' in colour for word in _PLAIN) for colour in colours):
        coords[COLOURS] = ("band", colours)
    for plural, single, neutral in SCALING:
        numbers = of_bands(getattr(first, plural))
        if len(set(numbers)) > 1:
            coords[plural] = ("band", numbers)  # they go where their bands go
        elif numbers[0] != neutral:
            attrs[single] = numbers[0]
    cube = xr.DataArray(values, coords, CUBE, attrs=attrs)
    cube.name = None  # a lazy one is else called after its graph
    if "spatial_ref" in coords:
        cube.encoding["grid_mapping"] = "spatial_ref"
    if first.overviews:
        cube.encoding["overviews"] = list(first.overviews)
    return cube


def _place_labels(grid: Georeference, gcps: str) -> dict[str, Any]:
    """The coordinates y, x and spatial_ref; none where nothing tells of a place."""
    a, b, c, d, e, f = grid.transform
    height, width = grid.size
    coords: dict[str, Any] = {}
    if not (grid.is_placed or gcps):
        return coords
    if not b and not d and not gcps:
        coords["y"] = ("y", f + e * (np.arange(height) + 0.5), {"axis": "Y", "long_name": "pixel centres"})
        coords["x"] = ("x", c + a * (np.arange(width) + 0.5), {"axis": "X", "long_name": "pixel centres"})
    mapping: dict[str, Any] = {"gcps": gcps} if gcps else {"GeoTransform": grid.to_gdal()}
    if grid.crs:
        mapping |= {"crs_wkt": grid.crs, "spatial_ref": grid.crs} | _cf_attributes(grid.crs)
    coords["spatial_ref"] = ((), 0, mapping)
    return coords


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


def _as_dataset(cubes: Mapping[str, xr.DataArray]) -> xr.Dataset:
    """One variable a band, each with its own nodata and scale; usable is what is usable in all of them."""
    # an empty file of one band takes its date from all
    alike = xr.align(*cubes.values(), join="inner", copy=False, exclude=("band", "y", "x"))
    variables: dict[str, xr.DataArray] = {}
    coords: dict[str, Any] = {}
    for name, whole in zip(cubes, alike, strict=True):
        # labels of other bands would be joined with these, and pixels filled with NaN
        single = whole.sizes["band"] == 1
        cube = whole.isel(band=0, drop=True) if single else whole.rename(band=f"band_{name}")
        for key, both in ((USABLE, np.minimum), (RESAMPLED, np.logical_or)):
            if key in cube.coords:
                own = cube.coords[key].variable
                coords[key] = own.copy(data=both(coords[key].data, own.data)) if key in coords else own
        coords |= {f"{key}_{name}": cube.coords[key].variable for key in (FILE, TAGS) if key in cube.coords}
        variables[name] = cube.drop_vars((TAGS, FILE, USABLE, RESAMPLED), errors="ignore")
        if single and COLOURS in whole.coords:
            variables[name].attrs[COLOURS] = str(whole.coords[COLOURS].values[0])
    return xr.Dataset(variables).assign_coords(coords)
