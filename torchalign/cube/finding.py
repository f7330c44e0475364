"""Which files make a stack, and of what date each is: folders, globs, URLs, lists, manifests; dates in names."""

from __future__ import annotations

import csv
import datetime
import fnmatch
import glob
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchalign._check import message
from torchalign.cube.labels import as_list

_DATE = r"(?P<year>(?:19|20)\d\d){0}(?P<month>0[1-9]|1[0-2]){0}(?P<day>0[1-9]|[12]\d|3[01])"
_CLOCK = r"(?:[T ](?P<hour>[01]\d|2[0-3]){0}(?P<minute>[0-5]\d)(?:{0}(?P<second>[0-5]\d))?)?"
_YEARDAY = r"(?P<year>(?:19|20)\d\d)(?P<yearday>[0-3]\d\d)"
_YEAR_LAST = r"(?<!\d){}([-._/]){}\2(?P<year>(?:19|20)\d\d)(?!\d)"
_MONTH, _LATE_DAY = r"(?P<month>0[1-9]|1[0-2])", r"(?P<day>1[3-9]|2\d|3[01])"
# in this order; the first date in the name is that of acquisition in the products of Sentinel and Landsat
_TIMES = [
    # 20200131_183012_1032_3B: Planet's
    re.compile(
        rf"(?<!\d){_DATE.format('')}_(?P<hour>[01]\d|2[0-3])(?P<minute>[0-5]\d)(?P<second>[0-5]\d)_(?=[0-9a-f]{{2,4}}_)"
    ),
    # 20170105T013443, 20170105013443, 20170105, and no part of a longer number; so are the names of Sentinel's and
    # Landsat's collections
    re.compile(rf"(?<!\d){_DATE.format('')}{_CLOCK.format('').replace('[T ]', '[T ]?')}(?!\d)"),
    # 2017-01-05T01:34:43, 2017_01_05
    re.compile(rf"(?<!\d){_DATE.format('-')}{_CLOCK.format('[-:]?')}(?!\d)"),
    re.compile(rf"(?<!\d){_DATE.format('_')}(?!\d)"),
    re.compile(rf"(?<!\d){_DATE.format('[.]')}(?!\d)"),
    # LC80010022013164LGN00: year and day of the year; HLS.L30.T10SEG.2020131T184512; MODIS' A2020001
    re.compile(rf"L[A-Z]\d\d{{6}}{_YEARDAY}[A-Z]"),
    re.compile(rf"\.{_YEARDAY}{_CLOCK.format('')}(?!\d)"),
    re.compile(rf"(?<![0-9A-Za-z])[Aa]?{_YEARDAY}(?!\d)"),
    # 31-12-2020, where the day can be no month
    re.compile(_YEAR_LAST.format(_LATE_DAY, _MONTH)),
    re.compile(_YEAR_LAST.format(_MONTH, _LATE_DAY)),
    re.compile(_YEAR_LAST.format(r"(?P<day>0[1-9]|1[0-2])", r"(?P<month>(?P=day))")),
]
_EITHER = re.compile(r"(?<!\d)(\d\d)[-._](\d\d)[-._]((?:19|20)\d\d)(?!\d)")  # 05-04-2020
# what nanoseconds since 1970 reach
_EARLIEST, _LATEST = np.datetime64("1678", "s"), np.datetime64("2262", "s")


class Remote(str):
    """What GDAL opens and is no file here: a URL, or a name that begins with /vsi."""

    @property
    def name(self) -> str:
        """The last part."""
        return self.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


Source = Path | Remote
# URLs (of which a path keeps one slash), names that begin with /vsi, and datasets inside a file: NETCDF:"a.nc":red
_REMOTE = re.compile(r"/vsi|[a-zA-Z][\w+.-]+:/|[A-Z][A-Z0-9_]{2,}:")


def is_remote(text: str) -> bool:
    """Whether GDAL opens it, and it is no path of this machine."""
    return _REMOTE.match(text) is not None


class FoundFiles(NamedTuple):
    """Files, by what band they are of (``None``: all of them), and what a manifest says of their dates."""

    bands: dict[str | None, list[Source]]
    times: dict[Source, Any]
    total: int


def find_sources(source: Any, pattern: str, bands: Mapping[str, str] | None, recursive: bool) -> FoundFiles:
    """The files of a folder, a glob, a URL, a manifest, or a list of these, as :func:`torchalign.open_stack` has it.

    With ``bands``, name → pattern, those of each band.
    """
    if isinstance(source, (str, os.PathLike)) and str(source).lower().endswith(".csv"):
        return _read_manifest(Path(source).expanduser())
    if bands is None:
        files = _list(source, pattern, recursive)
        return FoundFiles({None: files}, {}, len(files))
    everything = _list(source, "*", recursive)
    found: dict[str | None, list[Source]] = {}
    for name, own in bands.items():
        found[name] = [path for path in everything if _fits(path, own, source)]
        if not found[name]:
            got = f"none among {len(everything)} files"
            raise FileNotFoundError(message(f"bands[{name!r}]", f"files like {own}", got, "mend the pattern"))
    return FoundFiles(found, {}, sum(map(len, found.values())))


def _list(source: Any, pattern: str, recursive: bool) -> list[Source]:
    if not isinstance(source, (str, os.PathLike)):
        given = as_list(source)
        if not all(isinstance(one, (str, os.PathLike)) for one in given):
            cure = "give a path, a glob, a URL or a list of them"
            raise TypeError(message("source", "a folder or files", type(source).__name__, cure))
        if not given:
            got, cure = "an empty list", "check the paths"
            raise FileNotFoundError(message("source", "a folder or files", got, cure))
        return sorted((path for one in given for path in _list(one, pattern, recursive)), key=str)
    text = os.fspath(source)
    if is_remote(text):
        return [Remote(text)]
    folder = Path(text).expanduser()
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        matches = [Path(name) for name in sorted(glob.glob(str(folder), recursive=True))]
        files: list[Source] = [path for path in matches if path.is_file() and not path.name.startswith(".")]
        for path in matches:
            files += _list(path, pattern, recursive) if path.is_dir() else []
        if not files:
            got = f"{folder}, {'like which there is nothing' if glob.has_magic(text) else 'not there'}"
            raise FileNotFoundError(message("source", "a folder or files", got, "check the path"))
        return _without_notes(files)
    inside = folder.rglob("*") if recursive else folder.iterdir()
    shown = [
        path
        for path in inside
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    fitting: list[Source] = [path for path in sorted(shown) if _fits(path, pattern, folder)]
    paths = _without_notes(fitting)
    if not paths:
        deeper = not recursive and any(_fits(path, pattern, folder) for path in folder.glob("*/**/*"))
        got = f"none among the {len(shown)} files of {folder}"
        cure = "pass recursive=True, for its subfolders have some" if deeper else "give pattern="
        raise FileNotFoundError(message("source", f"files like {pattern}", got, cure))
    return paths


def _fits(path: Source, pattern: str, root: Any) -> bool:
    """By its name; by its path below the folder where the pattern has a slash."""
    name = path.name
    if "/" in pattern:
        below = isinstance(path, Path) and _is_folder(root)
        name = Path(os.path.relpath(path, root)).as_posix() if below else str(path)
    return fnmatch.fnmatch(name.lower(), pattern.lower())


def _is_folder(root: Any) -> bool:
    return isinstance(root, (str, os.PathLike)) and Path(root).expanduser().is_dir()


def _without_notes(paths: Sequence[Source]) -> list[Source]:
    """GDAL's notes are called after their file: a.tif.aux.xml, a.tif.ovr, a.tif.msk beside a.tif."""
    names = {str(path) for path in paths}

    def is_note(path: Source) -> bool:
        parts = path.name.split(".")
        folder = str(path)[: len(str(path)) - len(path.name)]
        return any(folder + ".".join(parts[:last]) in names for last in range(1, len(parts)))

    return [path for path in paths if not is_note(path)]


def _read_manifest(path: Path) -> FoundFiles:
    """A table with the column path, and maybe time and band."""
    if not path.is_file():
        raise FileNotFoundError(message("source", "a manifest", f"{path}, not there", "check the path"))
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [{str(key).strip().lower(): (value or "").strip() for key, value in row.items() if key is not None}
                for row in csv.DictReader(file)]  # fmt: skip
    if not rows or not all(row.get("path") for row in rows):
        got = f"{path.name} with the columns {sorted(rows[0]) if rows else 'of no row'}"
        cure = "write one line a file"
        raise ValueError(message("source", "a table path, time, band, with a path in every line", got, cure))
    bands: dict[str | None, list[Source]] = {}
    times: dict[Source, Any] = {}
    named = any(row.get("band") for row in rows)
    for number, row in enumerate(rows, 2):
        if named and not row.get("band"):
            got = f"none in line {number}"
            raise ValueError(message("source", "a band in every line, or in none", got, "fill it in"))
        remote = is_remote(row["path"])
        [one] = _list(row["path"] if remote else path.parent / Path(row["path"]).expanduser(), "*", False)[:1]
        bands.setdefault(row.get("band") or None, []).append(one)
        if row.get("time"):
            times[one] = row["time"]
    return FoundFiles(bands, times, len(rows))


# --- dates ---


def parse_time(name: str) -> np.datetime64 | None:
    """The first date in a file's name: acquisition in all products of Sentinel and Landsat, and in what
    fastcubo and satalign call their files.

    Known are ``20170105``, ``20170105T013443``, ``2017-01-05``, ``2017-01-05T01:34:43``, ``2017_01_05``,
    ``2017.01.05``, ``20170105_013443`` (Planet), ``31-12-2017`` and ``12-31-2017`` where one of the two can be no
    month, and year and day of the year in the names of Landsat (``LC80010022013164LGN00``), HLS
    (``2020131T184512``) and MODIS (``A2020001``).

    Returns:
        ``None`` if there is none.

    Example:
        >>> parse_time("20160608T064632_20160608T070007_T39PVM.tif")
        np.datetime64('2016-06-08T06:46:32.000000000')
        >>> parse_time("LC08_L1TP_123032_20200131_20200205_02_T1_B4.TIF")
        np.datetime64('2020-01-31T00:00:00.000000000')
        >>> parse_time("MOD09GA.A2020060.h18v04.tif"), parse_time("scene_05-04-2020.tif")
        (np.datetime64('2020-02-29T00:00:00.000000000'), None)
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


def read_times(
    paths: Sequence[Source],
    time: Callable[[Any], Any] | None,
    known: Mapping[Source, Any],
    root: Any,
    skipped: dict[Source, str],
) -> dict[Source, np.datetime64]:
    """Of every file its date: of the manifest, of ``time``, of its name, or of the folders that it is in.

    Those without one are added to ``skipped``.
    """
    order = _day_month_order([path.name for path in paths]) if time is None else None
    times = {}
    for path in paths:
        if path in known:
            found = known[path]
        elif time is not None:
            found = time(path)
        else:
            found = _date_of(path, root, order)
        label = None if found is None else _to_datetime64(found, path)
        if label is None or np.isnat(label):
            doubtful = time is None and path not in known and _EITHER.search(path.name)
            why = "there is no date in its name"
            skipped[path] = "its date may be day first or month first; pass time=" if doubtful else why
        else:
            times[path] = label
    return times


def _date_of(path: Source, root: Any, order: str | None) -> np.datetime64 | None:
    if (found := parse_time(path.name)) is not None:
        return found
    if order is not None and (either := _EITHER.search(path.name)):
        first, second, year = either.groups()
        day, month = (first, second) if order == "day" else (second, first)
        return parse_time(f"{year}-{month}-{day}")
    folders: Sequence[str] = str(path).split("/")[:-1]
    if isinstance(path, Path) and _is_folder(root):
        folders = Path(os.path.relpath(path.parent, Path(root).expanduser())).parts
    elif isinstance(path, Path):
        folders = path.parent.parts[-3:]
    return next((date for part in reversed(folders) if (date := parse_time(part)) is not None), None)


def _day_month_order(names: Collection[str]) -> str | None:
    """Whether a series writes the day or the month first; ``None`` where nothing tells."""
    pairs = [(int(found[1]), int(found[2])) for found in map(_EITHER.search, names) if found]
    if not pairs:
        return None
    first, second = (max(column) for column in zip(*pairs, strict=True))
    if first > 12 and second > 12:
        return None
    return "day" if first > 12 else "month" if second > 12 else None


def _to_datetime64(value: Any, path: Source) -> Any:
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


def short_names(paths: Sequence[Source]) -> list[str]:
    """The files' names; with their folders where files of several folders are called alike."""
    names = [path.name for path in paths]
    depth = 2
    while len({*names}) < len(names) and depth < 8:
        names = ["_".join(str(path).replace("\\", "/").split("/")[-depth:]) for path in paths]
        depth += 1
    return names
