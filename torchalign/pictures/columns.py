"""A report's columns as numbers, checked where they come in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from torchalign._check import message
from torchalign.cube.solution import check_report, report_labels
from torchalign.types import Status

Array = NDArray[Any]


class Columns(NamedTuple):
    """Of each frame, T in all, what charts draw; lengths in pixels, (x, y)."""

    report: xr.Dataset
    status: Array  # (T,)
    ok: Array  # (T,) bool, it was aligned
    shift: Array  # (T, 2)
    covariance: (
        Array  # (T, 2, 2): σ² in both directions where a report has no more; 0 where nothing can be said
    )
    truth: Array | None  # (T, 2)
    time: Array  # (T,), positions along an axis
    is_date: bool  # which are dates

    @property
    def sigma(self) -> Array:
        """(T, 2), along x and y."""
        return np.sqrt(self.covariance.diagonal(axis1=1, axis2=2))

    @property
    def size(self) -> float:
        """Of markers and lines: smaller where there are many frames, so that they do not hide each other."""
        return float(np.clip(np.sqrt(150 / max(self.status.size, 1)), 0.45, 1.0))

    @property
    def flagged(self) -> list[tuple[Status, Array]]:
        """The frames (T,) bool of each status but OK that occurs."""
        return [(code, chosen) for code, chosen in by_status(self.status) if code != Status.OK]


def read_columns(report: object, true_shift: Any = None, *, series: bool = False) -> Columns:
    """The columns of a report; of a ``series``, one of ``reference="groupwise"`` with its pairs.

    Raises:
        TypeError: no Dataset.
        ValueError: a report of another kind, or ``true_shift`` of another shape.
    """
    report = check_pictured(report)
    if series and not is_series(report):
        cure = 'give the report of ta.align(cube, "groupwise")'
        raise ValueError(message("report", "one with closure and pairs", sorted(map(str, report)), cure))
    status = report["status"].values
    truth = None if true_shift is None else np.asarray(true_shift, dtype=np.float64)
    if truth is not None and truth.shape != (status.size, 2):
        expected, cure = f"shape {(status.size, 2)}", "one row (x, y) a frame, in pixels"
        raise ValueError(message("true_shift", expected, truth.shape, cure))
    shift = np.stack([report["shift_x"].values, report["shift_y"].values], -1).astype(np.float64)
    if "covariance" in report:
        axes = (report["status"].dims[0], "axis", "other_axis")
        covariance = report["covariance"].transpose(*axes).values.astype(np.float64)
    else:
        variance = report["sigma"].values.astype(np.float64)[:, None, None] ** 2
        covariance = np.where(np.eye(2, dtype=bool), variance, 0.0)
    known = np.isfinite(covariance).all((1, 2), keepdims=True)
    labels = report_labels(report, local=True)
    is_date = labels.dtype.kind == "M"
    if is_date:
        labels = labels.astype("datetime64[ms]").astype(object)
    elif labels.dtype.kind not in "iuf":
        labels = np.arange(len(labels))
    return Columns(
        report, status, status == Status.OK, shift, np.where(known, covariance, 0.0), truth, labels, is_date
    )


def check_pictured(report: object) -> xr.Dataset:
    """A report with the fields that pictures use."""
    return check_report(report, fields=("shift_x", "shift_y", "score", "score_before", "sigma", "status"))


def status_of(report: xr.Dataset | None, count: int) -> Array:
    """(T,) int64 of the report; all OK without one."""
    if report is None:
        return np.zeros(count, np.int64)
    status = check_pictured(report)["status"].values.astype(np.int64)
    if len(status) != count:
        cure = "give the report of this cube"
        raise ValueError(message("report", f"{count} frames as the cube", len(status), cure))
    return np.asarray(status)


def kept_frames(status: Array) -> Array:
    """(T,) bool, the frames that were aligned; all where none was, for a picture of nothing says nothing."""
    good = np.asarray(status == Status.OK)
    return good if good.any() else np.ones(len(good), bool)


def by_status(status: Array) -> list[tuple[Status, Array]]:
    """Each status that occurs, OK first, with its frames as a mask."""
    return [(code, status == code) for code in Status if (status == code).any()]


# --- of a series without a reference ---


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
