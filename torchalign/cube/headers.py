"""What a raster file says of itself, without its pixels; with rasterio."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from torchalign.cube.finding import Source, find_sources, read_times
from torchalign.cube.georeference import Georeference, crs_name, gdal_errors, is_same_grid

CLOSE = 0.01  # pixels; grids that agree to this are one
_ALPHA_ROWS, _ALPHA_SHARE = 16, 0.9  # of these rows the share that is wholly clear or wholly not
_STALE = "STATISTICS_"  # what no longer holds of resampled pixels


class Header(NamedTuple):
    """A file's grid and bands; an alpha band is a mask, and none of them."""

    grid: Georeference
    numbers: tuple[int, ...]  # of the bands, GDAL's, from 1
    dtypes: tuple[str, ...]
    nodata: float | None
    descriptions: tuple[str | None, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    units: tuple[str, ...] = ()
    alpha: int = 0  # the number of the alpha band
    has_mask: bool = False  # of its own, inside or beside the file
    gcps: str = ""  # GeoJSON, where control points are all that it has
    tags: str = ""  # JSON: of the file "", and of its bands by number
    colours: tuple[str, ...] = ()  # of every band JSON: its interpretation and its table
    overviews: tuple[int, ...] = ()

    @property
    def kind(self) -> dict[str, Any]:
        """What all files of a stack must have in common, beside the grid."""
        nodata = "nan" if self.nodata is not None and np.isnan(self.nodata) else self.nodata
        own: dict[str, Any] = {"dtypes": self.dtypes, "nodata": nodata, "band names": self.descriptions}
        own |= {"scales": self.scales, "offsets": self.offsets}
        return own | {"alpha band": self.alpha, "mask": self.has_mask}


@contextmanager
def quiet() -> Iterator[None]:
    """A file without a georeference is a file like any other."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def read_headers(paths: Sequence[Source], skipped: dict[Source, str]) -> dict[Source, Header]:
    """Of all files that can be opened; the others are added to ``skipped``."""
    import rasterio

    headers = {}
    for path in paths:
        try:
            with quiet(), rasterio.open(path) as file:
                if file.count:
                    headers[path] = _read_header(file)
                else:
                    inside = f"{len(file.subdatasets)} datasets inside; name one of these"
                    skipped[path] = f"it has no bands of its own, but {inside}"
        except gdal_errors() as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            skipped[path] = f"it cannot be read ({reason[0]})"
    return headers


def _read_header(file: Any) -> Header:
    from rasterio.enums import ColorInterp, MaskFlags

    grid = Georeference.of_raster(file)
    interpretations = list(file.colorinterp)
    alpha = 0
    if file.count > 1 and interpretations[-1] == ColorInterp.alpha and _is_transparency(file):
        alpha = file.count
    numbers = [number for number in range(1, file.count + 1) if number != alpha]
    flags = file.mask_flag_enums[numbers[0] - 1]
    gcps = ""
    if not file.crs and file.gcps[0]:
        points, of = file.gcps
        grid = grid._replace(crs=of.to_wkt() if of else "")
        gcps = json.dumps([[point.row, point.col, point.x, point.y, point.z] for point in points])
    tags = {"": _lasting(file.tags()), **{str(number): _lasting(file.tags(number)) for number in numbers}}
    if rpcs := file.tags(ns="RPC"):
        tags["RPC"] = dict(rpcs)
    tags = {key: value for key, value in tags.items() if value}

    def of_bands(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[number - 1] for number in numbers)

    return Header(
        grid,
        tuple(numbers),
        of_bands(file.dtypes),
        file.nodata,
        of_bands(file.descriptions),
        of_bands(file.scales),
        of_bands(file.offsets),
        of_bands([unit or "" for unit in file.units]),
        alpha,
        MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
        gcps,
        json.dumps(tags) if tags else "",
        tuple(_colours(file, number, interpretations[number - 1].name) for number in numbers),
        tuple(file.overviews(numbers[0])),
    )


def _is_transparency(file: Any) -> bool:
    """Whether an alpha band holds what its name says: GDAL calls any fourth band of 8 bits alpha."""
    from rasterio.windows import Window

    rows = sorted({int(row) for row in np.linspace(0, file.height - 1, _ALPHA_ROWS)})
    values = np.stack([file.read(file.count, window=Window(0, row, file.width, 1)) for row in rows])
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    return bool(((values == 0) | (values == top)).mean() >= _ALPHA_SHARE)


def _lasting(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that stay true of resampled pixels."""
    return {key: value for key, value in tags.items() if not key.startswith(_STALE)}


def _colours(file: Any, number: int, interpretation: str) -> str:
    told: dict[str, Any] = {"interpretation": interpretation}
    if interpretation == "palette":
        told["table"] = {str(value): list(colour) for value, colour in file.colormap(number).items()}
    return json.dumps(told)


def drop_strangers(headers: Mapping[Source, Header], skipped: dict[Source, str], *, grids: bool) -> None:
    """Add to ``skipped`` the files unlike most of the others; ``grids``: in where they lie, too."""
    known = {path: header for path, header in headers.items() if path not in skipped}
    places: list[Header] = []  # one of every grid
    kinds: dict[Source, dict[str, Any]] = {}
    for path, header in known.items():
        kinds[path] = header.kind
        if grids:
            same = (
                one
                for one in places
                if is_same_grid(one.grid, header.grid, CLOSE) and one.gcps == header.gcps
            )
            place = next(same, header)
            places += [header] if place is header else []
            grid = place.grid
            where = {"transform": grid.transform, "size": grid.size, "CRS": grid.crs}
            kinds[path] = where | {"ground control points": place.gcps} | kinds[path]
    counts = Counter(tuple(kind.values()) for kind in kinds.values())
    if len(counts) < 2:
        return
    [(usual, _)] = counts.most_common(1)
    for path, kind in kinds.items():
        pairs = zip(kind, kind.values(), usual, strict=True)
        name, own, most = next((one for one in pairs if one[1] != one[2]), ("", "", ""))
        if name:
            if name == "CRS" and crs_name(own) != crs_name(most):  # else only their WKT tells them apart
                own, most = crs_name(own) or "none", crs_name(most) or "none"
            if name == "ground control points":
                own, most = "of its own", "others or none"
            skipped[path] = f"{name} {own} where most have {most}"


def describe_files(source: Any, pattern: str, recursive: bool) -> list[str]:
    """A table of the files of a folder, whatever they are: one line for each kind of grid, bands and nodata.

    With how many files there are of it, their dates, and one of their names.
    """
    found = find_sources(source, pattern, None, recursive)
    paths = [path for group in found.bands.values() for path in group]
    skipped: dict[Source, str] = {}
    headers = read_headers(paths, skipped)
    undated: dict[Source, str] = {}
    times = read_times(list(headers), None, found.times, source, undated)
    groups: dict[tuple[str, ...], list[Source]] = {}
    for path, header in headers.items():
        groups.setdefault(_in_words(header), []).append(path)
    rows = []
    for words, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        days = sorted(str(times[path])[:10] for path in members if path in times)
        span = f"{days[0]} … {days[-1]}" if days else "none in the names"
        rows.append((len(members), span, *words, members[0].name))
    columns = ["files", "dates", "size", "pixel", "CRS", "bands", "dtype", "nodata", "as"]
    table = pd.DataFrame(rows, columns=columns).to_string(index=False) if rows else ""
    return table.splitlines() + [f"{path.name}: {reason}" for path, reason in skipped.items()]


def _in_words(header: Header) -> tuple[str, ...]:
    height, width = header.grid.size
    step = f"{abs(header.grid.transform[0]):g}" if header.grid.is_placed and not header.gcps else "-"
    place = "control points" if header.gcps else crs_name(header.grid.crs) or "none"
    nodata = "none" if header.nodata is None else f"{header.nodata:g}"
    extra = " + alpha" if header.alpha else " + mask" if header.has_mask else ""
    dtypes = "/".join(dict.fromkeys(header.dtypes))
    return f"{height} × {width}", step, place, str(len(header.numbers)), dtypes, f"{nodata}{extra}"
