"""Reports as a table of pandas, and in netCDF, CSV or JSON files, from which they come back to the last bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.files import NETCDF, atomic
from torchalign.cube.labels import Array, with_plain_dates
from torchalign.cube.solution import build_report, check_report, name_statuses, report_labels, summarize
from torchalign.types import Status

REPORT_SUFFIXES = (".csv", ".json", *NETCDF)
PAGES = (".html", ".htm")
PICTURED = (*PAGES, ".geojson")  # which are not read back
_MATRICES = {"warp": 3, "covariance": 2}  # of each frame, with its number of columns
_GRID_COLUMNS = ("grid_height", "grid_width", *(f"grid_transform_{letter}" for letter in "abcdef"))
_CRS_COLUMN, _LABEL_COLUMN = "grid_crs", "label_dtype"
_CURE = "give a file that save_report wrote"


def check_suffix(path: Path, others: Sequence[str] = (), name: str = "path") -> None:
    """A name whose ending says which format, and what writes it; ``others`` are those that the caller knows, too."""
    suffix = path.suffix.lower()
    if suffix not in (*REPORT_SUFFIXES, *others):
        expected = f"a name ending in {', '.join((*REPORT_SUFFIXES, *others))}"
        raise ValueError(message(name, expected, path.name, "rename it"))
    if suffix in NETCDF:
        require("a report in netCDF", "io", "h5netcdf", "h5py")
    elif suffix in PAGES:
        require("a page", "plot", "matplotlib", "PIL", "jinja2")
    elif suffix == ".geojson":
        require("a GeoJSON", "io", "rasterio")


def write_report(report: xr.Dataset, path: Path) -> None:
    """A report in memory, whole or not at all."""
    suffix = path.suffix.lower()
    with atomic(path) as partial:
        if suffix == ".csv":
            write_csv(report, partial)
        elif suffix == ".json":
            partial.write_text(_to_json(report), encoding="utf-8")
        else:
            with_plain_dates(report, report["status"].dims[0]).to_netcdf(partial, engine="h5netcdf")


def read_report(path: Path) -> xr.Dataset:
    """What :func:`write_report` wrote, in memory."""
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

    Of a field of local shifts it has the length alone.

    Args:
        report: of :func:`torchalign.align`, or read by :func:`torchalign.load_report`; a lazy one is computed.

    Raises:
        TypeError: no Dataset.
        ValueError: a Dataset that is no report.

    Example:
        >>> from torchalign.datasets import demo_stack
        >>> cube = demo_stack(frames=4, size=(128, 128)).cube  # the last is overcast
        >>> table = to_table(ta.align(cube, "first")[1])
        >>> table.status.tolist(), table.index.name
        (['OK', 'OK', 'OK', 'NOT_CONVERGED'], 'time')
    """
    check_report(report)
    known = report.compute()
    time = known["status"].dims[0]
    columns: dict[str, Any] = {"status": name_statuses(known)["status_name"].values}
    for name, array in known.drop_vars(("status", "status_name"), errors="ignore").items():
        if array.dims == (time,):
            columns[str(name)] = array.values
    for name, array in known.items():
        if array.ndim == 3 and name in _MATRICES:  # a field is no table
            values = array.transpose(time, ...).values
            for row, column in np.ndindex(*values.shape[1:]):
                columns[f"{name}_{row}{column}"] = values[:, row, column]
    return pd.DataFrame(columns, index=pd.Index(report_labels(known), name=time))


# --- netCDF and CSV ---


def _read_netcdf(path: Path) -> xr.Dataset:
    # dates that nanoseconds do not reach
    decoder: Any = xr.coders.CFDatetimeCoder(time_unit="us") if hasattr(xr, "coders") else True
    with xr.open_dataset(path, engine="h5netcdf", decode_times=decoder) as file:
        return name_statuses(file.load())  # whose text is no wider than what it holds


def write_csv(report: xr.Dataset, target: Path | TextIO) -> None:
    """A table that is read back to the last bit, into a file."""
    table = to_table(report)
    for name in table.columns.drop("status"):  # as short as is read back to the last bit of its own dtype
        table[name] = [str(value) for value in table[name].to_numpy()]
    grid = [*report.attrs.get("grid_size", ()), *report.attrs.get("grid_transform", ())]
    for number, (name, value) in enumerate(zip(_GRID_COLUMNS, grid, strict=False)):
        table[name] = str(int(value)) if number < 2 else repr(float(value))
    if report.attrs.get("grid_crs"):
        table[_CRS_COLUMN] = str(report.attrs["grid_crs"])
    labels, kind = _plain_labels(report)
    if kind is not None:
        table[_LABEL_COLUMN] = kind
    table.index = pd.Index([str(label) for label in labels], name=report["status"].dims[0], dtype=object)
    table.to_csv(target, encoding="utf-8")


def _read_csv(path: Path) -> xr.Dataset:
    table = pd.read_csv(path, dtype=str, na_filter=False)
    time, *names = (str(name) for name in table.columns)
    if not {"status", "warp_00"} <= {*names}:
        raise ValueError("a table has status and warp_00 … for every frame")
    matrices = {kind: [name for name in names if re.fullmatch(rf"{kind}_\d\d", name)] for kind in _MATRICES}
    cells = [name for entries in matrices.values() for name in entries]
    others = {"status", "stage", *cells, *_GRID_COLUMNS, _CRS_COLUMN, _LABEL_COLUMN}
    fields: dict[str, Any] = {name: _floats(table[name]) for name in names if name not in others}
    for matrix, entries in matrices.items():
        if entries:
            values = _floats(table[entries].to_numpy().ravel())
            columns = _MATRICES[matrix]
            fields[matrix] = values.reshape(len(table), len(entries) // columns, columns)
    # all were of one dtype; one that holds nothing but NaN does not tell which
    dtype = np.result_type(*fields.values())
    fields = {name: values.astype(dtype) for name, values in fields.items()}
    fields["status"] = _status_codes(table["status"])
    if "stage" in names:
        fields["stage"] = table["stage"].to_numpy().astype(np.int8)
    attrs: dict[str, Any] = {}
    first: Mapping[str, str] = table.iloc[0].to_dict() if len(table) else {}  # without a row there is no grid
    grid = [first[name] for name in _GRID_COLUMNS if name in first]
    if grid:
        attrs["grid_size"] = [int(value) for value in grid[:2]]
    if len(grid) == len(_GRID_COLUMNS):
        attrs["grid_transform"] = [float(value) for value in grid[2:]]
    if first.get(_CRS_COLUMN):
        attrs["grid_crs"] = first[_CRS_COLUMN]
    kind = first.get(_LABEL_COLUMN)
    read = {"M": str, "U": str, "f": float}.get("" if kind is None else np.dtype(kind).kind, int)
    return _relabel(fields, time, [read(label) for label in table[time]] if kind else [], kind, attrs)


def _floats(texts: Sequence[str]) -> Array:
    """Numbers in the shortest dtype that writes them like this."""
    values = np.array(texts, np.float64)
    short = values.astype(np.float32)
    return short if all(str(value) == text for value, text in zip(short, texts, strict=True)) else values


def _status_codes(names: Sequence[str]) -> Array:
    return np.array([Status[name] for name in names], np.int8)


# --- JSON ---


def _to_json(report: xr.Dataset) -> str:
    time, (labels, kind) = report["status"].dims[0], _plain_labels(report)
    fields = [
        {
            time: label,
            **{
                str(name): _json_values(array.values[number])
                for name, array in report.drop_vars("status_name", errors="ignore").items()
            },
            "status": Status(int(report["status"].values[number])).name,
        }
        for number, label in enumerate(labels)
    ]
    attrs = {str(key): np.asarray(value).tolist() for key, value in report.attrs.items()}
    dtype = str(report["warp"].dtype)
    document = {"time": time, "labels": kind, "dtype": dtype, "attrs": attrs, "frames": fields}
    return json.dumps(document, indent=1, allow_nan=False, default=str)


def _json_values(values: Any) -> Any:
    """Numbers, as short as is read back to the last bit; as text those that JSON does not know, "inf", "nan"."""
    if np.ndim(values):
        return [_json_values(value) for value in values]
    return float(str(values)) if np.isfinite(values) else str(values)


def _read_json(path: Path) -> xr.Dataset:
    document = json.loads(path.read_text(encoding="utf-8"))
    time, rows, dtype = document["time"], document["frames"], np.dtype(document["dtype"])
    names = [name for name in rows[0] if name not in (time, "status")] if rows else ["warp"]
    fields: dict[str, Any] = {name: np.array([row[name] for row in rows], dtype) for name in names}
    if not rows:
        fields["warp"] = fields["warp"].reshape(0, 2, 3)
    fields["status"] = _status_codes([row["status"] for row in rows])
    return _relabel(fields, time, [row[time] for row in rows], document["labels"], document["attrs"])


# --- labels ---


def _plain_labels(report: xr.Dataset) -> tuple[list[Any], str | None]:
    """Numbers and text, and the dtype that makes the labels of them; the frames' numbers where there are none."""
    time = report["status"].dims[0]
    if time not in report.coords:
        return list(range(report.sizes[time])), None
    labels = report_labels(report)
    if labels.dtype.kind == "M":
        return np.datetime_as_string(labels).tolist(), str(labels.dtype)
    if labels.dtype.kind in "bm":
        return labels.astype(np.int64).tolist(), str(labels.dtype)
    is_number = labels.dtype.kind in "iuf"
    return labels.tolist() if is_number else list(map(str, labels)), str(labels.dtype) if is_number else "str"


def _relabel(
    fields: dict[str, Any], time: Hashable, labels: list[Any], kind: str | None, attrs: Mapping[str, Any]
) -> xr.Dataset:
    if "stage" in fields:
        fields["stage"] = fields["stage"].astype(np.int8)
    report = build_report(fields, None, attrs, time)
    report.attrs |= dict(attrs) | summarize(report).attrs()
    return report if kind is None else report.assign_coords({time: np.array(labels, kind)})
