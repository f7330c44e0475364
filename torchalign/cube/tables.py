"""Reports as a table of pandas, and in netCDF, CSV or JSON files, from which they come back to the last bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.files import atomic
from torchalign.cube.labels import Array
from torchalign.cube.solution import build_report, check_report, summarize
from torchalign.types import Status

__all__ = ["check_suffix", "read_report", "to_table", "write_report"]

_NETCDF = (".nc", ".nc4", ".netcdf", ".h5")
_SUFFIXES = (*_NETCDF, ".csv", ".json")
_GRID_COLUMNS = ("grid_height", "grid_width", *(f"grid_transform_{letter}" for letter in "abcdef"))
_CRS_COLUMN = "grid_crs"
_DATE_UNITS = {3: "ms", 6: "us", 9: "ns"}  # by the digits of a second's fraction
_CURE = "give a file that save_report wrote"


def check_suffix(path: Path) -> None:
    """A name whose ending says which format.

    Raises:
        ValueError: another one.
        ImportError: what reads and writes netCDF is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(message("path", f"a name ending in {', '.join(_SUFFIXES)}", path.name, "rename it"))
    if suffix in _NETCDF:
        require("a report in netCDF", "io", "h5netcdf")


def write_report(report: xr.Dataset, path: Path) -> None:
    """A report in memory, whole or not at all."""
    suffix = path.suffix.lower()
    with atomic(path) as partial:
        if suffix == ".csv":
            _write_csv(report, partial)
        elif suffix == ".json":
            partial.write_text(_to_json(report), encoding="utf-8")
        else:
            report.to_netcdf(partial, engine="h5netcdf")


def read_report(path: Path) -> xr.Dataset:
    """What :func:`write_report` wrote, in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, or no report.
        ImportError: netCDF without h5netcdf.
    """
    check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(message("path", "a report", f"{path}, which is not there", "check the path"))
    readers: dict[str, tuple[str, Callable[[Path], xr.Dataset]]]
    readers = {".csv": ("CSV", _read_csv), ".json": ("JSON", _read_json)}
    kind, read = readers.get(path.suffix.lower(), ("netCDF", _read_netcdf))
    try:
        report = read(path)
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        reason = f"{path} ({str(error).strip().splitlines()[0]})" if str(error).strip() else path
        raise ValueError(message("path", f"a report in {kind}", reason, _CURE)) from error
    check_report(report)
    return report


def to_table(report: xr.Dataset) -> pd.DataFrame:
    """One row a frame, by its label: the status in words, the numbers, the warp row by row (``warp_00`` …).

    Args:
        report: of :func:`torchalign.align`, or read by :func:`torchalign.load_report`; a lazy one is computed.

    Raises:
        TypeError: no Dataset.
        ValueError: a Dataset that is no report.

    Example:
        >>> from torchalign.datasets import demo_stack
        >>> cube = demo_stack(frames=4, size=(64, 64)).cube
        >>> table = to_table(ta.align(cube, "first")[1])
        >>> table.status.tolist(), table.index.name
        (['OK', 'OK', 'OK', 'OK'], 'time')
    """
    check_report(report)
    known = report.compute()
    time = known["status"].dims[0]
    columns: dict[str, Any] = {"status": [Status(int(code)).name for code in known["status"].values]}
    for name, array in known.drop_vars("status").items():
        if array.dims == (time,):
            columns[str(name)] = array.values
    for name, array in known.items():
        if array.dims != (time,):  # the entries of a matrix
            values = array.transpose(time, ...).values
            for row, column in np.ndindex(*values.shape[1:]):
                columns[f"{name}_{row}{column}"] = values[:, row, column]
    labels = known[time].values if time in known.coords else np.arange(known.sizes[time])
    return pd.DataFrame(columns, index=pd.Index(labels, name=time))


# --- netCDF and CSV ---


def _read_netcdf(path: Path) -> xr.Dataset:
    with xr.open_dataset(path, engine="h5netcdf") as file:
        return file.load()


def _write_csv(report: xr.Dataset, path: Path) -> None:
    table = to_table(report)
    for name in table.columns.drop("status"):  # as short as is read back to the last bit of its own dtype
        table[name] = [str(value) for value in table[name].to_numpy()]
    grid = [*report.attrs.get("grid_size", ()), *report.attrs.get("grid_transform", ())]
    for number, (name, value) in enumerate(zip(_GRID_COLUMNS, grid, strict=False)):
        table[name] = str(int(value)) if number < 2 else repr(float(value))
    if report.attrs.get("grid_crs"):
        table[_CRS_COLUMN] = str(report.attrs["grid_crs"])
    time = report["status"].dims[0]
    labels = report[time].values if time in report.coords else range(len(table))
    table.index = pd.Index([_csv_label(label) for label in labels], name=time, dtype=object)
    table.to_csv(path, encoding="utf-8")


def _csv_label(label: Any) -> str:
    """A date always with a fraction of the second, which tells it from text."""
    if isinstance(label, np.datetime64) and np.datetime_data(label)[0] not in _DATE_UNITS.values():
        label = label.astype("datetime64[ms]")
    return str(label)


def _read_csv(path: Path) -> xr.Dataset:
    table = pd.read_csv(path, dtype=str, na_filter=False)
    time, *names = (str(name) for name in table.columns)
    if not {"status", "warp_00"} <= {*names}:
        raise ValueError("a table has status and warp_00 … for every frame")
    cells = [name for name in names if re.fullmatch(r"warp_\d\d", name)]
    others = {"status", *cells, *_GRID_COLUMNS, _CRS_COLUMN}
    fields: dict[str, Any] = {name: _floats(table[name]) for name in names if name not in others}
    warp = _floats(table[cells].to_numpy().ravel())
    fields["warp"] = warp.reshape(len(table), len(cells) // 3, 3)
    fields["status"] = _status_codes(table["status"])
    attrs: dict[str, Any] = {}
    first: Mapping[str, str] = table.iloc[0].to_dict() if len(table) else {}  # without a row there is no grid
    grid = [first[name] for name in _GRID_COLUMNS if name in first]
    if grid:
        attrs["grid_size"] = [int(value) for value in grid[:2]]
    if len(grid) == len(_GRID_COLUMNS):
        attrs["grid_transform"] = [float(value) for value in grid[2:]]
    if first.get(_CRS_COLUMN):
        attrs["grid_crs"] = first[_CRS_COLUMN]
    return _relabel(fields, time, _parse_labels(table[time].tolist()), attrs)


def _floats(texts: Sequence[str]) -> Array:
    """Numbers in the shortest dtype that writes them like this."""
    values = np.array(texts, np.float64)
    short = values.astype(np.float32)
    return short if all(str(value) == text for value, text in zip(short, texts, strict=True)) else values


def _status_codes(names: Sequence[str]) -> Array:
    return np.array([Status[name] for name in names], np.int8)


# --- JSON ---


def _to_json(report: xr.Dataset) -> str:
    time = report["status"].dims[0]
    labels = report[time].values if time in report.coords else None
    plain = range(report["status"].size) if labels is None else map(_json_label, labels)
    fields = [
        {
            time: label,
            **{str(name): _json_values(array.values[number]) for name, array in report.items()},
            "status": Status(int(report["status"].values[number])).name,
        }
        for number, label in enumerate(plain)
    ]
    attrs = {str(key): np.asarray(value).tolist() for key, value in report.attrs.items()}
    kind = None if labels is None else str(labels.dtype) if labels.dtype.kind in "biufmM" else "str"
    dtype = str(report["warp"].dtype)
    document = {"time": time, "labels": kind, "dtype": dtype, "attrs": attrs, "frames": fields}
    return json.dumps(document, indent=1, allow_nan=False, default=str)


def _json_values(values: Any) -> Any:
    """Numbers, as short as is read back to the last bit; as text those that JSON does not know, "inf", "nan"."""
    if np.ndim(values):
        return [_json_values(value) for value in values]
    return float(str(values)) if np.isfinite(values) else str(values)


def _json_label(label: Any) -> Any:
    """With the dtype beside it, it is read back as it was."""
    if isinstance(label, np.datetime64):
        return str(np.datetime_as_string(label))
    if isinstance(label, np.timedelta64):
        return int(label.astype(np.int64))
    return label.item() if isinstance(label, (np.bool_, np.number)) else str(label)


def _read_json(path: Path) -> xr.Dataset:
    document = json.loads(path.read_text(encoding="utf-8"))
    time, rows, dtype = document["time"], document["frames"], np.dtype(document["dtype"])
    names = [name for name in rows[0] if name not in (time, "status")] if rows else ["warp"]
    fields: dict[str, Any] = {name: np.array([row[name] for row in rows], dtype) for name in names}
    if not rows:
        fields["warp"] = fields["warp"].reshape(0, 2, 3)
    fields["status"] = _status_codes([row["status"] for row in rows])
    labels = [row[time] for row in rows]
    kind = document["labels"]
    return _relabel(fields, time, None if kind is None else np.array(labels, kind), document["attrs"])


def _relabel(
    fields: dict[str, Any], time: Hashable, labels: Array | None, attrs: Mapping[str, Any]
) -> xr.Dataset:
    report = build_report(fields, None, attrs, time)
    report.attrs |= dict(attrs) | summarize(report).attrs()
    return report if labels is None else report.assign_coords({time: labels})


def _parse_labels(labels: list[str]) -> Array | None:
    """Dates and whole numbers that are written like this, or text; ``None`` if they are but the frames' numbers."""
    if labels == list(map(str, range(len(labels)))):
        return None
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels):
        numbers = np.array(labels, np.int64)
        return numbers if list(map(str, numbers)) == labels else np.array(labels)
    date = re.compile(r"-?\d{4,}-\d\d-\d\dT\d\d:\d\d:\d\d\.(\d{3}|\d{6}|\d{9})")
    found = [date.fullmatch(label) for label in labels]
    if found[0] and all(found):
        try:
            dates = np.array(labels, f"datetime64[{_DATE_UNITS[len(found[0][1])]}]")
        except (ValueError, TypeError):  # the 31st of June
            return np.array(labels)
        if list(map(str, dates)) == labels:
            return dates
    return np.array(labels)
