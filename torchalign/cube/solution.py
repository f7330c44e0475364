"""The report of an alignment, one row a frame: how it is made, summed up, and found again for a cube."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from torchalign import __version__
from torchalign._check import message
from torchalign.cube import georeference
from torchalign.cube.chunks import Companion, is_lazy
from torchalign.cube.georeference import Georeference
from torchalign.cube.labels import Array, Cube, label_text, labels_in_words, plain_labels
from torchalign.functional.affine import center_displacement
from torchalign.functional.shift_field import field_lengths
from torchalign.types import Estimate, ShiftField, Status

# name: (unit, what it is); in this order in every report
_FIELDS = {
    "warp": ("pixel", "matrix from moving to reference points (x, y)"),
    "shift_x": ("pixel", "displacement of the frame's centre, to the right"),
    "shift_y": ("pixel", "displacement of the frame's centre, downwards"),
    "score": ("1", "correlation with the reference after alignment"),
    "score_before": ("1", "correlation with the reference before alignment"),
    "sigma": ("pixel", "predicted standard error of the translation, along the axis that is known worst"),
    "covariance": ("pixel2", "predicted covariance of the translation (x, y)"),
    "local_shift_median": ("pixel", "median length of the local shifts on top of the warp, over the frame"),
    "local_shift_p95": ("pixel", "95th percentile of their length"),
    "status": ("1", "OK: aligned; else the frame was left as it came, and why"),
    "stage": ("1", "which stage of a cascade the warp is of; -1 where none was accepted"),
    "closure": ("pixel", "how well the frame's pairs agree, root mean square per axis; no accuracy"),
    "support": ("1", "summed weight of the frame's pairs"),
    "sigma_season": ("pixel", "part of sigma that comes from the sun's place and from parts that disagree"),
    "season_shift_x": ("pixel", "shift that the sun's place explains, to the right"),
    "season_shift_y": ("pixel", "shift that the sun's place explains, downwards"),
    "sun_elevation": ("degree", "of the sun, above the horizon"),
    "sun_azimuth": ("degree", "of the sun, clockwise from the image's up"),
    "residual_x": ("pixel", "displacement left after alignment, measured again, to the right"),
    "residual_y": ("pixel", "displacement left after alignment, measured again, downwards"),
    "misfit": (
        "pixel",
        "how far parts of the frame disagree with its warp, beyond their own standard errors",
    ),
    "shift_x_metres": ("m", "displacement of the frame's centre, towards greater x"),
    "shift_y_metres": ("m", "displacement of the frame's centre, towards greater y"),
    "residual_x_metres": ("m", "displacement left after alignment, towards greater x"),
    "residual_y_metres": ("m", "displacement left after alignment, towards greater y"),
    "field": (
        "pixel",
        "local shifts (x, y), coefficients of cubic B-splines, from reference to moving points",
    ),
    "field_sigma": ("pixel", "predicted standard error of the local shifts, per axis"),
    "field_lattice": ("pixel", "x and y of the field's first node, and its spacing along x and y"),
}
# the dims of what is no (T,) or (T, row, col)
_FIELD_DIMS: dict[str, tuple[str, ...]] = {
    "covariance": ("axis", "other_axis"),
    "field": ("component", "node_y", "node_x"),
    "field_sigma": ("node_y", "node_x"),
    "field_lattice": ("lattice",),
}
_ATTRS = {
    "Conventions": "CF-1.11",
    "title": "How each frame was aligned, and how far to trust it",
    "torchalign_version": __version__,
}


# A frame is distorted if its parts disagree by more than this, in pixels, and than so many of its σ, which has a share
# in it.
_DISTORTED, _DISTORTED_SIGMAS = 0.1, 2.0


class Remaining(NamedTuple):
    """What is measured again after alignment; NaN where that could not be done."""

    shift: Tensor  # (T, 2), (x, y), how far frames still are from the reference, in pixels
    misfit: Tensor  # (T,), see :func:`~torchalign.functional.misfit.misfit`


class ReportSummary(NamedTuple):
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
        distorted: share of the frames that were measured, ambiguous ones too, whose parts disagree with their warp.
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
    distorted: float = float("nan")

    def __str__(self) -> str:
        """Lines for people."""
        others = ", ".join(f"{name} {count}" for name, count in self.counts.items() if name != "OK")
        lines = [f"{self.counts.get('OK', 0)} of {self.frames} frames aligned{others and f' ({others})'}"]
        for label, first, pixels, metres in (
            ("shift", "median", self.shift_median, self.shift_median_metres),
            ("", "p95", self.shift_p95, self.shift_p95_metres),
            ("residual", "median", self.residual_median, np.nan),
            ("", "CE90", self.ce90, self.ce90_metres),
        ):
            if np.isfinite(pixels):
                in_metres = f" = {metres:.3g} m" if np.isfinite(metres) else ""
                lines.append(f"{label:<9}{first:<7}{pixels:.3f} px{in_metres}")
        if self.distorted > 0.5:
            lines.append('the frames are distorted: try ECC(motion="affine") or Local')
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


def summarize(report: xr.Dataset) -> ReportSummary:
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
    check_report(report)
    needed = [name for name in report.data_vars if str(name) in _FIELDS and name != "warp"]
    known = report[needed].compute()
    status = known["status"].values
    counts = {code.name: int((status == code).sum()) for code in Status}
    aligned = status == Status.OK

    def percentile(name: str, rank: float, unit: str = "") -> float:
        """Of the length of a displacement of the aligned frames."""
        x, y = (f"{name}_{axis}{unit}" for axis in "xy")
        if x not in known or y not in known:
            return float("nan")
        values = np.hypot(known[x].values[aligned], known[y].values[aligned])
        values = values[np.isfinite(values)]
        return float(np.percentile(values, rank)) if len(values) else float("nan")

    distorted = float("nan")
    if "misfit" in known:
        misfit, sigma = known["misfit"].values, known["sigma"].values
        seen = np.isfinite(misfit)  # of ambiguous frames too, whose σ is not known
        if seen.any():
            bound = np.maximum(_DISTORTED, _DISTORTED_SIGMAS * np.where(aligned, sigma, 0.0)[seen])
            distorted = float((misfit[seen] > bound).mean())
    return ReportSummary(
        len(status),
        {name: count for name, count in counts.items() if count},
        percentile("shift", 50),
        percentile("shift", 95),
        percentile("shift", 50, "_metres"),
        percentile("shift", 95, "_metres"),
        percentile("residual", 50),
        percentile("residual", 90),
        percentile("residual", 90, "_metres"),
        distorted,
    )


# --- made ---


def report_fields(
    estimate: Estimate, left: Remaining | None, size: tuple[int, int], metres: Mapping[str, float]
) -> dict[str, Array]:
    """The fields of a report that come with a batch of frames, on the host; ``metres`` of a pixel in x and y, signed."""
    shift = center_displacement(estimate.warp, size)  # (T, 2), (x, y)
    fields = {"warp": estimate.warp, "shift_x": shift[:, 0], "shift_y": shift[:, 1], "score": estimate.score}
    fields |= {"score_before": estimate.score_before, "sigma": estimate.sigma, "status": estimate.status}
    fields |= {"covariance": estimate.covariance, "stage": estimate.stage}
    if left is not None:
        fields |= {"residual_x": left.shift[:, 0], "residual_y": left.shift[:, 1], "misfit": left.misfit}
    if estimate.field is not None and estimate.field.coefficients.shape[-1]:
        fields |= _local_fields(estimate.field, size)
    for name in [name for name in fields if name.startswith(("shift", "residual")) and name[-1] in metres]:
        fields[f"{name}_metres"] = fields[name] * metres[name[-1]]
    found = {name: np.asarray(tensor.detach().cpu().numpy()) for name, tensor in fields.items()}
    return found | {name: found[name].astype(np.int8) for name in ("status", "stage")}


def _local_fields(field: ShiftField, size: tuple[int, int]) -> dict[str, Tensor]:
    """What a report tells of local shifts."""
    coefficients, sigma, origin, spacing = field
    told = {"field": coefficients, "field_sigma": sigma, "field_lattice": torch.cat((origin, spacing), -1)}
    lengths = field_lengths(field, size)
    ranks = {"local_shift_median": 0.5, "local_shift_p95": 0.95}
    if not len(lengths):
        return told | dict.fromkeys(ranks, lengths[:, 0])
    return told | {name: lengths.quantile(rank, dim=-1) for name, rank in ranks.items()}


def promised_fields(
    dtype: torch.dtype,
    rows: int,
    *,
    residual: bool,
    metres: Mapping[str, float],
    nodes: tuple[int, int] | None = None,
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """What :func:`report_fields` will give: the shape and the dtype of one frame's."""
    numbers = torch.empty(0, dtype=dtype)
    warp, covariance, codes = numbers.reshape(0, rows, 3), numbers.reshape(0, 2, 2), numbers.long()
    field = None
    if nodes is not None:
        shapes = ((0, 2, *nodes), (0, *nodes), (0, 2), (0, 2))
        field = ShiftField(*(torch.empty(shape, dtype=dtype) for shape in shapes))
    empty = Estimate(warp, numbers, numbers, numbers, covariance, codes, codes, field)
    left = Remaining(numbers.reshape(0, 2), numbers) if residual else None
    fields = report_fields(empty, left, (1, 1), metres)
    return {name: (values.shape[1:], values.dtype) for name, values in fields.items()}


def build_report(
    fields: Mapping[str, Any], cube: Cube | None, attrs: Mapping[str, Any], time: Hashable = "time"
) -> xr.Dataset:
    """Label :func:`report_fields`, of numpy or dask; a cube has coordinates along time, and the grid."""
    time = time if cube is None else cube.dims["time"]
    variables = {name: _variable(name, fields[name], time) for name in _FIELDS if name in fields}
    report = name_statuses(xr.Dataset(variables, _time_coords(cube, variables, time), _ATTRS | dict(attrs)))
    if cube is not None:
        grid = georeference.find_georeference(cube)
        if grid is not None:
            report.attrs["grid_transform"] = list(grid.transform)
            report.attrs |= {"grid_crs": grid.crs} if grid.crs else {}
        report.attrs["grid_size"] = list(cube.size)
    if not any(is_lazy(variable) for variable in variables.values()):
        report.attrs |= summarize(report).attrs()
    return report


def name_statuses(report: xr.Dataset) -> xr.Dataset:
    """With ``status_name``, the status in words."""
    names = np.array([code.name for code in Status])
    codes = report["status"].astype(np.int8).data
    # dask's asks for a function
    words = codes.map_blocks(names.take, dtype=names.dtype) if is_lazy(report["status"]) else names[codes]
    return report.assign(status_name=(report["status"].dims, words, {"long_name": "the status in words"}))


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
    cube = None if like is None else Cube.of(like)
    if cube is not None and cube.sizes["time"] != len(estimate.warp):
        got = f"{len(estimate.warp)} frames for a cube of {cube.sizes['time']}"
        raise ValueError(message("estimate", "one warp for each frame", got, "give the cube it was made on"))
    size, metres = ((1, 1), {}) if cube is None else (cube.size, georeference.metres_per_pixel(cube))
    fields = report_fields(estimate, None, size, metres)
    return build_report(fields, cube, {"aligner": "unknown", "reference": "unknown"})


def _variable(name: str, values: Any, time: Hashable) -> xr.Variable:
    units, long_name = _FIELDS[name]
    attrs: dict[str, Any] = {"units": units, "long_name": long_name}
    if name == "status":
        attrs |= {
            "flag_values": np.array(list(Status), np.int8),
            "flag_meanings": " ".join(code.name for code in Status),
        }
    dims = _FIELD_DIMS.get(name, ("row", "col")[: values.ndim - 1])
    return xr.Variable((time, *dims), values, attrs)


def _time_coords(cube: Cube | None, fields: Mapping[str, Any], time: Hashable) -> Any:
    if cube is None:
        return {}
    along = cube.array[time]
    # names that the report itself uses, and what is of files
    taken = {"row", "col", "tags", "status_name", *fields} - {time}
    others = [name for name, coord in along.coords.items() if coord.dims != (time,) or name in taken]
    return along.drop_vars(others).compute().coords


def report_georeference(report: xr.Dataset) -> Georeference | None:
    """The grid whose pixels the warps of a report are in; ``None`` where the cube had none."""
    size, transform = report.attrs.get("grid_size"), report.attrs.get("grid_transform")
    if size is None or transform is None:
        return None
    crs = str(report.attrs.get("grid_crs", ""))
    return Georeference(tuple(map(float, transform)), (int(size[0]), int(size[1])), crs)


def report_labels(report: xr.Dataset, *, local: bool = False) -> Array:
    """Of the frames, dates as :func:`~torchalign.cube.labels.with_plain_dates` has them; else their numbers."""
    time = report["status"].dims[0]
    labels: Array = plain_labels(report["status"], time, local=local).values
    return labels


def check_report(
    report: object, name: str = "report", fields: Sequence[str] = ("warp", "status")
) -> xr.Dataset:
    """A Dataset with these fields."""
    cure = "pass what torchalign.align returns second, or what load_report reads"
    if not isinstance(report, xr.Dataset):
        raise TypeError(message(name, "an xarray.Dataset", type(report).__name__, cure))
    if not {*fields} <= {*report}:
        expected = f"the variables {', '.join(fields)}"
        raise ValueError(message(name, expected, sorted(map(str, report)), cure))
    return report


# --- for a cube ---


def find_warps(given: Any, name: str, cube: Cube, grid: xr.DataArray | None = None) -> Companion | None:
    """The warps of an earlier solution, of the cube's frames and in its pixels; ``name`` to the user.

    Plain warps were made on the cube ``grid``; a report knows its own.
    """
    if given is None:
        return None
    if isinstance(given, xr.Dataset):
        if grid is not None:
            cure = "leave grid= out: a report knows its grid"
            raise ValueError(message("grid", "None with a report", type(grid).__name__, cure))
        variable = _match_frames(given, name, cube)
    else:
        variable = _plain_warps(given, name, cube)
    decode = partial(_decode_warps, *_grids(given, name, cube, grid))
    return Companion(variable, ("time", "row", "col"), decode)


def _grids(
    given: Any, name: str, cube: Cube, grid: xr.DataArray | None
) -> tuple[Georeference | None, Georeference | None]:
    """The grid that a solution is in the pixels of, and the cube's; of one that is not known, they are the same."""
    other, own = cube if grid is None else Cube.of(grid), georeference.find_georeference(cube)
    source, size = georeference.find_georeference(other), other.size
    if isinstance(given, xr.Dataset):
        height, width = given.attrs.get("grid_size", cube.size)
        source, size = report_georeference(given), (int(height), int(width))
    if source is not None and own is not None:
        return source, own
    if size != cube.size:
        got = f"{size} pixels and the cube's {cube.size}, one of them without a grid"
        cure = "give both coordinates along y and x, with .assign_coords or .rio.write_transform"
        raise ValueError(message(name, "grids that are known", got, cure))
    return own, own


def find_field(
    given: Any, name: str, cube: Cube, grid: xr.DataArray | None = None
) -> tuple[Companion | None, Companion | None]:
    """Coefficients and lattice of an earlier solution's field, in pixels of the cube; see :func:`find_warps`.

    Raises:
        ValueError: a table of a report whose frames had local shifts, which it does not hold.
    """
    if isinstance(given, Estimate) and given.field is not None and given.field.coefficients.shape[-1]:
        coefficients, _, origin, spacing = (part.detach().cpu() for part in given.field)
        told = {"field": coefficients.numpy(), "field_lattice": torch.cat((origin, spacing), -1).numpy()}
        variables = [xr.Variable(("time", *_FIELD_DIMS[part]), values) for part, values in told.items()]
    elif isinstance(given, xr.Dataset) and "field" in given:
        variables = [_match_frames(given, name, cube, part) for part in ("field", "field_lattice")]
    else:
        if isinstance(given, xr.Dataset) and "local_shift_p95" in given and given["local_shift_p95"].any():
            cure = "save the report as .nc or .json: a .csv does not hold fields"
            raise ValueError(message(name, "the field of frames with local shifts", "none", cure))
        return None, None
    grids = _grids(given, name, cube, grid)
    decoders = (partial(_decode_field, part, *grids) for part in ("field", "field_lattice"))
    first, second = (
        Companion(variable, ("time", *map(str, variable.dims[1:])), decode)
        for variable, decode in zip(variables, decoders, strict=True)
    )
    return first, second


def unpack_field(coefficients: Tensor, lattice: Tensor) -> ShiftField:
    """The field of coefficients (T, 2, n, m) and a lattice (T, 4), of which no error is known."""
    return ShiftField(coefficients, torch.zeros_like(coefficients[:, 0]), lattice[:, :2], lattice[:, 2:])


def _decode_field(
    part: str,
    source: Georeference | None,
    target: Georeference | None,
    values: Array,
    device: torch.device,
) -> Tensor:
    """Of a field in pixels of one grid the coefficients, or first node and spacing, in those of another."""
    tensor, is_lattice = torch.from_numpy(np.array(values)), part == "field_lattice"
    if source is None or target is None:
        return tensor
    coefficients = tensor.new_zeros(len(tensor), 2, 4, 4) if is_lattice else tensor
    lattice = tensor if is_lattice else tensor.new_ones(len(tensor), 4)
    field = georeference.regrid_field(unpack_field(coefficients, lattice), source, target)
    return torch.cat((field.origin, field.spacing), -1) if is_lattice else field.coefficients


def _decode_warps(
    source: Georeference | None, target: Georeference | None, warps: Array, device: torch.device
) -> Tensor:
    """Warps of one grid in pixels of another; on the host, where a user of them reads what they are."""
    tensor = torch.from_numpy(np.array(warps))
    return tensor if source is None or target is None else georeference.regrid_warp(tensor, source, target)


def _plain_warps(given: Any, name: str, cube: Cube) -> xr.Variable:
    values = given.warp if isinstance(given, Estimate) else given
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.dtype.kind != "f" or values.ndim != 3 or values.shape[1:] not in ((2, 3), (3, 3)):
        got = f"{values.dtype} {values.shape}"
        cure = "pass a report, its path, an Estimate of one series, or its warps"
        raise TypeError(message(name, "floating warps (T, 2, 3) or (T, 3, 3)", got, cure))
    if len(values) != cube.sizes["time"]:
        got = f"{len(values)} warps for {cube.sizes['time']} frames"
        raise ValueError(message(name, "one warp for each frame", got, "select the frames they belong to"))
    return xr.Variable(("time", "row", "col"), values)


def _match_frames(report: xr.Dataset, name: str, cube: Cube, told: str = "warp") -> xr.Variable:
    """What is told of the cube's frames, by label where both have labels."""
    check_report(report, name)
    there, here = report["status"].dims[0], cube.coordinate("time")
    warp, frames = report[told].transpose(there, ...), cube.sizes["time"]
    if there in report.coords and here is not None:
        labels = [label_text(label) for label in report_labels(report)]
        wanted = [label_text(label) for label in here.values]
        if labels != wanted:
            missing = [label for label in wanted if label not in set(labels)]
            if missing or len(set(labels)) < len(labels):
                got = f"none of {', '.join(missing[:3])}" if missing else "labels that occur twice"
                expected = f"every frame of the cube among {labels_in_words(report['status'], there)}"
                raise ValueError(message(name, expected, got, "select frames with .sel, or drop the labels"))
            number = {label: position for position, label in enumerate(labels)}
            warp = warp.isel({there: [number[label] for label in wanted]})
    elif report.sizes[there] != frames:
        got = f"{report.sizes[there]} for {frames} frames"
        raise ValueError(message(name, "one warp for each frame", got, "give both labels along time"))
    # an eager cube would compute a lazy report anew for every batch
    keep = is_lazy(warp) and is_lazy(cube.array)
    return xr.Variable(("time", *warp.dims[1:]), warp.variable._data if keep else warp.to_numpy())
