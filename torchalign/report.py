"""The report of an alignment: one row a frame. Made, summed up, written to netCDF, CSV or JSON, and read back."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from torchalign._check import message
from torchalign._files import atomic, check_free
from torchalign._grid import Grid, find_grid, metres_per_pixel
from torchalign._labelled import Array, Cube
from torchalign.functional.affine import center_displacement
from torchalign.types import Estimate, Status

__all__ = ["Summary", "build_report", "load_report", "measure", "report_grid", "save_report", "summarize"]

_NETCDF = (".nc", ".nc4", ".netcdf", ".h5")
_SUFFIXES = (*_NETCDF, ".csv", ".json")
# name: (unit, what it is); in this order in every report
_FIELDS = {
    "warp": ("pixel", "matrix from moving to reference points (x, y)"),
    "shift_x": ("pixel", "displacement of the frame's centre, to the right"),
    "shift_y": ("pixel", "displacement of the frame's centre, downwards"),
    "score": ("1", "correlation with the reference after alignment"),
    "score_before": ("1", "correlation with the reference before alignment"),
    "sigma": ("pixel", "predicted standard error of the translation"),
    "status": ("1", "OK: aligned; else the frame was left as it came, and why"),
    "residual_x": ("pixel", "displacement left after alignment, measured again, to the right"),
    "residual_y": ("pixel", "displacement left after alignment, measured again, downwards"),
    "shift_x_metres": ("m", "displacement of the frame's centre, towards greater x"),
    "shift_y_metres": ("m", "displacement of the frame's centre, towards greater y"),
    "residual_x_metres": ("m", "displacement left after alignment, towards greater x"),
    "residual_y_metres": ("m", "displacement left after alignment, towards greater y"),
}
_GRID_COLUMNS = ("grid_height", "grid_width", *(f"grid_transform_{letter}" for letter in "abcdef"))
_CRS_COLUMN = "grid_crs"
_DATE_UNITS = {3: "ms", 6: "us", 9: "ns"}  # by the digits of a second's fraction


class Summary(NamedTuple):
    """A report in a few numbers, over the frames that were aligned; NaN for what was not measured.

    ``print`` it, or take a field.

    Attributes:
        frames: T.
        counts: of every status that occurs, by its name.
        shift_median: of the length of the displacement of the frames' centres, in pixels.
        shift_p95: its 95th percentile.
        shift_median_metres: the same in metres, NaN where the grid has no unit of length.
        shift_p95_metres: the same.
        residual_median: of the length of what is left after alignment, in pixels.
        ce90: circular error, 90 %: nine in ten frames have no more left than this, in pixels.
        ce90_metres: the same in metres.
    """

    frames: int
    counts: dict[str, int]
    shift_median: float
    shift_p95: float
    shift_median_metres: float
    shift_p95_metres: float
    residual_median: float
    ce90: float
    ce90_metres: float

    def __str__(self) -> str:
        """Lines for people."""
        others = ", ".join(f"{name} {count}" for name, count in self.counts.items() if name != "OK")
        lines = [
            f"{self.counts.get('OK', 0)} of {self.frames} frames aligned" + (f" ({others})" if others else "")
        ]
        for label, first, pixels, metres in (
            ("shift", "median", self.shift_median, self.shift_median_metres),
            ("", "p95", self.shift_p95, self.shift_p95_metres),
            ("residual", "median", self.residual_median, np.nan),
            ("", "CE90", self.ce90, self.ce90_metres),
        ):
            if np.isfinite(pixels):
                in_metres = f" = {metres:.3g} m" if np.isfinite(metres) else ""
                lines.append(f"{label:<9}{first:<7}{pixels:.3f} px{in_metres}")
        return "\n".join(lines)

    def attrs(self) -> dict[str, Any]:
        """As attributes of a report; what was not measured is left out."""
        numbers = {
            name: float(value)
            for name, value in zip(self._fields[2:], self[2:], strict=True)
            if np.isfinite(value)
        }
        return {
            "frames": self.frames,
            "frames_aligned": self.counts.get("OK", 0),
            "status_counts": ", ".join(f"{name}: {count}" for name, count in self.counts.items()),
            **numbers,
        }


def summarize(report: xr.Dataset) -> Summary:
    """What a report says, in a few numbers; a lazy report is computed.

    Args:
        report: of :func:`torchalign.align`, or read by :func:`load_report`.

    Raises:
        TypeError: no Dataset.
        ValueError: a Dataset without ``status`` and ``warp``.

    Example:
        >>> one, none = torch.ones(1), torch.zeros(1).long()
        >>> estimate = ta.Estimate(torch.eye(2, 3)[None], one, one, one, torch.eye(2)[None], none, none)
        >>> print(summarize(as_report(estimate)))
        1 of 1 frames aligned
        shift    median 0.000 px
                 p95    0.000 px
    """
    _check_report(report)
    needed = [name for name in report.data_vars if str(name) in _FIELDS and name != "warp"]
    known = report[needed].compute()
    status = known["status"].values
    counts = {code.name: int((status == code).sum()) for code in Status}
    aligned = status == Status.OK

    def length(x: str, y: str) -> Array:
        if x not in known or y not in known:
            return np.empty(0)
        values: Array = np.hypot(known[x].values[aligned], known[y].values[aligned])
        return values[np.isfinite(values)]

    def percentile(values: Array, rank: float) -> float:
        return float(np.percentile(values, rank)) if len(values) else float("nan")

    shift, metres = length("shift_x", "shift_y"), length("shift_x_metres", "shift_y_metres")
    residual, residual_metres = (
        length("residual_x", "residual_y"),
        length("residual_x_metres", "residual_y_metres"),
    )
    return Summary(
        len(status),
        {name: count for name, count in counts.items() if count},
        percentile(shift, 50),
        percentile(shift, 95),
        percentile(metres, 50),
        percentile(metres, 95),
        percentile(residual, 50),
        percentile(residual, 90),
        percentile(residual_metres, 90),
    )


# --- made ---


def measure(
    estimate: Estimate, residual: Tensor | None, size: tuple[int, int], metres: Mapping[str, float]
) -> dict[str, Array]:
    """The fields of a report that come with a batch of frames, on the host.

    Args:
        estimate: of (T,) frames.
        residual: (T, 2), (x, y) in pixels.
        size: (H, W) of the frames.
        metres: in a pixel along ``"x"`` and ``"y"``, signed; without those that are not known.
    """
    shift = center_displacement(estimate.warp, size)  # (T, 2), (x, y)
    fields = {"warp": estimate.warp, "shift_x": shift[:, 0], "shift_y": shift[:, 1], "score": estimate.score}
    fields |= {"score_before": estimate.score_before, "sigma": estimate.sigma, "status": estimate.status}
    if residual is not None:
        fields |= {"residual_x": residual[:, 0], "residual_y": residual[:, 1]}
    for name in [name for name in fields if name.startswith(("shift", "residual")) and name[-1] in metres]:
        fields[f"{name}_metres"] = fields[name] * metres[name[-1]]
    found = {name: np.asarray(tensor.detach().cpu().numpy()) for name, tensor in fields.items()}
    return found | {"status": found["status"].astype(np.int8)}


def build_report(
    fields: Mapping[str, Any], cube: Cube | None, attrs: Mapping[str, Any], time: Hashable = "time"
) -> xr.Dataset:
    """Label what was measured.

    Args:
        fields: name → (T,) or (T, 2 or 3, 3), of :func:`measure`; numpy or dask.
        cube: for the coordinates along time, the grid and the metres; ``None`` if there is none.
        attrs: of the report: the aligner, the reference.
        time: the time dim, where there is no cube.
    """
    if cube is not None:
        time = cube.dims["time"]
    variables = {name: _variable(name, fields[name], time) for name in _FIELDS if name in fields}
    report = xr.Dataset(variables, _time_coords(cube, variables, time), _general_attrs() | dict(attrs))
    grid = None if cube is None else find_grid(cube)
    if grid is not None:
        report.attrs["grid_transform"] = list(grid.transform)
        if grid.crs:
            report.attrs["grid_crs"] = grid.crs
    if cube is not None:
        report.attrs["grid_size"] = [cube.sizes["y"], cube.sizes["x"]]
    if all(isinstance(variable._data, np.ndarray) for variable in variables.values()):
        report.attrs |= summarize(report).attrs()
    return report


def as_report(estimate: Estimate, like: xr.DataArray | None = None) -> xr.Dataset:
    """A report of a plain :class:`~torchalign.Estimate` of tensors.

    Args:
        estimate: of one series, (T, …).
        like: the cube it was made on, for dates, grid and metres.

    Raises:
        ValueError: a batch of series; another number of frames than the cube's.
    """
    if estimate.warp.ndim != 3:
        cure = "take one series, estimate.map(lambda rows: rows[i])"
        raise ValueError(message("estimate", "fields (T, …)", tuple(estimate.warp.shape), cure))
    cube = None if like is None else Cube.of(like, dict.fromkeys(("time", "band", "y", "x")))
    if cube is not None and cube.sizes["time"] != len(estimate.warp):
        got = f"{len(estimate.warp)} frames for a cube of {cube.sizes['time']}"
        raise ValueError(message("estimate", "one warp for each frame", got, "give the cube it was made on"))
    size = (1, 1) if cube is None else (cube.sizes["y"], cube.sizes["x"])
    fields = measure(estimate, None, size, {} if cube is None else metres_per_pixel(cube))
    return build_report(fields, cube, {"aligner": "unknown", "reference": "unknown"})


def _variable(name: str, values: Any, time: Hashable) -> xr.Variable:
    units, long_name = _FIELDS[name]
    attrs: dict[str, Any] = {"units": units, "long_name": long_name}
    if name == "status":
        attrs |= {
            "flag_values": np.array(list(Status), np.int8),
            "flag_meanings": " ".join(code.name for code in Status),
        }
    return xr.Variable((time, "row", "col")[: values.ndim], values, attrs)


def _time_coords(cube: Cube | None, fields: Mapping[str, Any], time: Hashable) -> Any:
    if cube is None:
        return {}
    along = cube.array[time]
    taken = {"row", "col", *fields} - {time}  # names that the report itself uses
    others = [name for name, coord in along.coords.items() if coord.dims != (time,) or name in taken]
    return along.drop_vars(others).compute().coords


def _general_attrs() -> dict[str, Any]:
    try:
        version = metadata.version("torchalign")
    except metadata.PackageNotFoundError:  # run from a checkout
        version = "unknown"
    return {
        "Conventions": "CF-1.11",
        "title": "How each frame was aligned, and how far to trust it",
        "torchalign_version": version,
    }


def report_grid(report: xr.Dataset) -> Grid | None:
    """The grid whose pixels the warps of a report are in; ``None`` where the cube had none."""
    size = report.attrs.get("grid_size")
    transform = report.attrs.get("grid_transform")
    if size is None or transform is None:
        return None
    a, b, c, d, e, f = (float(value) for value in transform)
    return Grid((a, b, c, d, e, f), (int(size[0]), int(size[1])), str(report.attrs.get("grid_crs", "")))


def _check_report(report: object) -> None:
    if not isinstance(report, xr.Dataset):
        cure = "pass what torchalign.align returns second, or what load_report reads"
        raise TypeError(message("report", "an xarray.Dataset", type(report).__name__, cure))
    if "warp" not in report or "status" not in report:
        cure = "pass what torchalign.align returns second, or what load_report reads"
        raise ValueError(message("report", "the variables warp and status", sorted(map(str, report)), cure))


# --- written and read ---


def save_report(
    report: xr.Dataset | Estimate,
    path: str | Path,
    *,
    like: xr.DataArray | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a report, whole or not at all; a lazy one is computed.

    ``.nc`` keeps everything. ``.json`` keeps everything but coordinates along time beside the labels. ``.csv`` is
    a table for spreadsheets, one row a frame: its label, the status in words, the numbers, the warp row by row and
    the grid that its pixels are of; of the attributes it has the grid alone. All three give
    :func:`torchalign.apply` the same warps, to the last bit.

    Args:
        report: of :func:`torchalign.align`, or a plain :class:`~torchalign.Estimate` of one series.
        path: ending in ``.nc``, ``.json`` or ``.csv``.
        like: the cube that a plain estimate was made on, for dates, grid and metres.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        TypeError: neither a report nor an estimate.
        ValueError: another suffix; a Dataset that is no report.
        FileExistsError: the file is there.
        ImportError: netCDF without h5netcdf.
    """
    path = Path(path)
    _check_suffix(path)
    given = as_report(report, like) if isinstance(report, Estimate) else report
    _check_report(given)
    check_free(path, overwrite)
    made = given.compute()
    made = made.assign_attrs(summarize(made).attrs())
    with atomic(path) as partial:
        if path.suffix.lower() == ".csv":
            _to_csv(made, partial)
        elif path.suffix.lower() == ".json":
            _to_json(made, partial)
        else:
            made.to_netcdf(partial, engine="h5netcdf")
    return path


def load_report(path: str | Path) -> xr.Dataset:
    """Read what :func:`save_report` wrote, into memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, or no report.
        ImportError: netCDF without h5netcdf.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(message("path", "a report", f"{path}, which is not there", "check the path"))
    if path.suffix.lower() == ".csv":
        report = _from_csv(path)
    elif path.suffix.lower() == ".json":
        report = _from_json(path)
    else:
        try:
            with xr.open_dataset(path, engine="h5netcdf") as file:
                report = file.load()
        except (OSError, ValueError) as error:  # an ImportError says itself what is missing
            reason = f"{path} ({str(error).strip().splitlines()[0]})" if str(error).strip() else path
            cure = "give a file that save_report wrote"
            raise ValueError(message("path", "a report in netCDF", reason, cure)) from error
    _check_report(report)
    return report


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(message("path", f"a name ending in {', '.join(_SUFFIXES)}", path.name, "rename it"))


def _rows(report: xr.Dataset) -> tuple[str, Array | None, list[str]]:
    """The name of the time dim, its labels if it has any, and the names of the numbers."""
    time = report["status"].dims[0]
    labels = report[time].values if time in report.coords else None
    numbers = [str(name) for name in report.data_vars if name not in ("warp", "status")]
    return str(time), labels, numbers


def _plain(label: Any) -> Any:
    """As JSON has it; with the dtype beside it, it is read back as it was."""
    if isinstance(label, np.datetime64):
        return str(np.datetime_as_string(label))
    if isinstance(label, np.timedelta64):
        return int(label.astype(np.int64))
    return label.item() if isinstance(label, (np.bool_, np.number)) else str(label)


def _text(label: Any) -> str:
    """As a table has it; a date always with a fraction of the second, which tells it from text."""
    if isinstance(label, np.datetime64) and np.datetime_data(label)[0] not in _DATE_UNITS.values():
        label = label.astype("datetime64[ms]")
    return str(label)


def _number(value: np.generic) -> str:
    """As short as is read back to the last bit of its own dtype."""
    return str(value)


def _to_csv(report: xr.Dataset, path: Path) -> None:
    time, labels, numbers = _rows(report)
    rows, columns = report["warp"].shape[1:]
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    size = report.attrs.get("grid_size", ())
    grid = [str(int(value)) for value in size]
    grid += [repr(float(value)) for value in report.attrs.get("grid_transform", ())]
    grid_header = list(_GRID_COLUMNS[: len(grid)])
    if report.attrs.get("grid_crs"):
        grid.append(str(report.attrs["grid_crs"]))
        grid_header.append(_CRS_COLUMN)
    header = [time, "status", *numbers, *(f"warp_{row}{column}" for row, column in cells)]
    texts = map(str, range(report["status"].size)) if labels is None else map(_text, labels)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, *grid_header])
        for number, label in enumerate(texts):
            values = [report[name].values[number] for name in numbers]
            values += [report["warp"].values[number, row, column] for row, column in cells]
            status = Status(int(report["status"].values[number])).name
            writer.writerow([label, status, *map(_number, values), *grid])


def _from_csv(path: Path) -> xr.Dataset:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or ())
    if "status" not in names or "warp_00" not in names:
        cure = "give a file that save_report wrote"
        raise ValueError(message("path", "a table with status and warp_00 … for every frame", path, cure))
    try:
        return _from_rows(rows, names)
    except (ValueError, KeyError, TypeError) as error:
        cure = "give a file that save_report wrote"
        raise ValueError(message("path", "a report in CSV", f"{path} ({error})", cure)) from error


def _from_rows(rows: list[dict[str, str]], names: list[str]) -> xr.Dataset:
    time = names[0]
    cells = [name for name in names if re.fullmatch(r"warp_\d\d", name)]
    others = {"status", *cells, *_GRID_COLUMNS, _CRS_COLUMN}
    numbers = [name for name in names[1:] if name not in others]
    fields: dict[str, Any] = {name: _floats([row[name] for row in rows]) for name in numbers}
    warp = _floats([row[name] for row in rows for name in cells])
    fields["warp"] = warp.reshape(len(rows), len(cells) // 3, 3)
    fields["status"] = np.array([Status[row["status"]] for row in rows], np.int8)
    attrs: dict[str, Any] = {}
    first = rows[0] if rows else {}  # without a row there is no grid
    grid = [first[name] for name in _GRID_COLUMNS if name in first]
    if grid:
        attrs["grid_size"] = [int(value) for value in grid[:2]]
    if len(grid) == len(_GRID_COLUMNS):
        attrs["grid_transform"] = [float(value) for value in grid[2:]]
    if first.get(_CRS_COLUMN):
        attrs["grid_crs"] = first[_CRS_COLUMN]
    return _relabel(fields, time, _parse_labels([row[time] for row in rows]), attrs)


def _floats(texts: Sequence[str]) -> Array:
    """Numbers in the shortest dtype that writes them like this."""
    values = np.array(texts, np.float64)
    short = values.astype(np.float32)
    return short if all(_number(value) == text for value, text in zip(short, texts, strict=True)) else values


def _to_json(report: xr.Dataset, path: Path) -> None:
    time, labels, numbers = _rows(report)
    plain = range(report["status"].size) if labels is None else map(_plain, labels)
    fields = [
        {
            time: label,
            "status": Status(int(report["status"].values[number])).name,
            **{name: _number(report[name].values[number]) for name in numbers},
            "warp": [[_number(value) for value in row] for row in report["warp"].values[number]],
        }
        for number, label in enumerate(plain)
    ]
    for row in fields:  # numbers as numbers, but for those that JSON does not know: "inf", "nan"
        row |= {name: _json_number(row[name]) for name in numbers}
        row["warp"] = [[_json_number(value) for value in line] for line in row["warp"]]
    attrs = {str(key): np.asarray(value).tolist() for key, value in report.attrs.items()}
    dtype = str(report["warp"].dtype)
    kind = None if labels is None else str(labels.dtype) if labels.dtype.kind in "biufmM" else "str"
    document = {"time": time, "labels": kind, "dtype": dtype, "attrs": attrs, "frames": fields}
    path.write_text(json.dumps(document, indent=1, allow_nan=False, default=str), encoding="utf-8")


def _json_number(text: str) -> float | str:
    return float(text) if np.isfinite(float(text)) else text


def _from_json(path: Path) -> xr.Dataset:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        time, rows, dtype = document["time"], document["frames"], np.dtype(document["dtype"])
        names = [name for name in rows[0] if name not in (time, "status")] if rows else ["warp"]
        fields: dict[str, Any] = {name: np.array([row[name] for row in rows], dtype) for name in names}
        if not rows:
            fields["warp"] = fields["warp"].reshape(0, 2, 3)
        fields["status"] = np.array([Status[row["status"]] for row in rows], np.int8)
        labels = _json_labels([row[time] for row in rows], document)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        cure = "give a file that save_report wrote"
        raise ValueError(message("path", "a report in JSON", f"{path} ({error})", cure)) from error
    return _relabel(fields, time, labels, document["attrs"])


def _json_labels(labels: list[Any], document: Mapping[str, Any]) -> Array | None:
    if "labels" not in document:  # written before dtypes were
        return _parse_labels(labels)
    kind = document["labels"]
    return None if kind is None else np.array(labels, kind)


def _relabel(fields: dict[str, Any], time: str, labels: Array | None, attrs: Mapping[str, Any]) -> xr.Dataset:
    report = build_report(fields, None, attrs, time)
    report.attrs |= dict(attrs) | summarize(report).attrs()
    return report if labels is None else report.assign_coords({time: labels})


def _parse_labels(labels: list[Any]) -> Array | None:
    """Dates and whole numbers that are written like this, or text; ``None`` if they are but the frames' numbers."""
    if list(map(str, labels)) == list(map(str, range(len(labels)))):
        return None
    if not all(isinstance(label, str) for label in labels):
        return np.array(labels)
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
