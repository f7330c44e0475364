"""A report's columns as numbers, checked where they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from torchalign._check import message
from torchalign.cube.solution import check_report, report_labels
from torchalign.types import Status

Array = NDArray[Any]


def check_pictured(report: object) -> xr.Dataset:
    """A report with the fields that pictures use."""
    return check_report(report, fields=("shift_x", "shift_y", "score", "score_before", "sigma", "status"))


def check_truth(true_shift: Any, report: xr.Dataset) -> Array | None:
    """(T, 2), or None."""
    if true_shift is None:
        return None
    truth = np.asarray(true_shift, dtype=np.float64)
    expected = (report["status"].size, 2)
    if truth.shape != expected:
        cure = "one row (x, y) a frame, in pixels"
        raise ValueError(message("true_shift", f"shape {expected}", truth.shape, cure))
    return truth


def status_of(report: xr.Dataset | None, count: int) -> Array:
    """(T,) int64 of the report; all OK without one."""
    if report is None:
        return np.zeros(count, np.int64)
    status = check_pictured(report)["status"].values.astype(np.int64)
    if len(status) != count:
        raise ValueError(
            message("report", f"{count} frames as the cube", len(status), "give the report of this cube")
        )
    return np.asarray(status)


def kept_frames(status: Array) -> Array:
    """(T,) bool, the frames that were aligned; all where none was, for a picture of nothing says nothing."""
    good = np.asarray(status == Status.OK)
    return good if good.any() else np.ones(len(good), bool)


def shift_of(report: xr.Dataset) -> Array:
    """(T, 2), x and y in pixels."""
    return np.stack([report["shift_x"].values, report["shift_y"].values], -1).astype(np.float64)


def covariance_of(report: xr.Dataset) -> Array:
    """(T, 2, 2), px², of (x, y): σ² in both directions where a report has no more; 0 where nothing can be said."""
    if "covariance" in report:
        time = report["status"].dims[0]
        covariance = report["covariance"].transpose(time, "axis", "other_axis").values.astype(np.float64)
    else:
        variance = report["sigma"].values.astype(np.float64) ** 2
        covariance = (
            np.stack([np.diag([value, value]) for value in variance])
            if len(variance)
            else np.empty((0, 2, 2))
        )
    known = np.isfinite(covariance).all((1, 2))
    return np.where(known[:, None, None], covariance, 0.0)


def time_of(report: xr.Dataset) -> tuple[Array, bool]:
    """Positions along a time axis, and whether they are dates."""
    values = report_labels(report, local=True)
    if values.dtype.kind == "M":
        return values.astype("datetime64[ms]").astype(object), True
    return (values if values.dtype.kind in "iuf" else np.arange(len(values))), False


def by_status(status: Array) -> list[tuple[Status, Array]]:
    """Each status that occurs, OK first, with its frames as a mask."""
    return [(code, status == code) for code in Status if (status == code).any()]


# --- of a series without a reference ---


def check_series(report: object) -> xr.Dataset:
    """A report of ``reference="groupwise"``, with its pairs.

    Raises:
        TypeError: no Dataset.
        ValueError: a report of another kind.
    """
    checked = check_pictured(report)
    if not is_series(checked):
        cure = 'give the report of ta.align(cube, "groupwise")'
        raise ValueError(message("report", "one with closure and pairs", sorted(map(str, checked)), cure))
    return checked


def is_series(report: xr.Dataset) -> bool:
    """Whether a report is one of ``reference="groupwise"``, with its pairs."""
    return "closure" in report and "pair_moving" in report.attrs


def sun_known(report: xr.Dataset) -> bool:
    """Whether the report says where the sun stood."""
    return "sun_elevation" in report and bool(np.isfinite(report["sun_elevation"].values).any())


def pairs_of(report: xr.Dataset) -> tuple[Array, Array, Array, Array]:
    """The frames of each pair, moving and reference, its weight and its residual."""
    names = ("pair_moving", "pair_reference", "pair_weight", "pair_residual")
    moving, reference, weight, residual = (np.atleast_1d(report.attrs[name]) for name in names)
    return moving.astype(int), reference.astype(int), weight, residual


def day_of_year(report: xr.Dataset) -> Array | None:
    """(T,), or ``None`` where there are no dates."""
    labels = xr.DataArray(report_labels(report))
    return np.asarray(labels.dt.dayofyear) if labels.dtype.kind == "M" else None
