"""Pictures of a series without a reference: its pairs, its network, and what the sun adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from torchalign._check import message
from torchalign.pictures.columns import Array, check_pictured, time_of
from torchalign.pictures.style import BLUE, GREY, INK, ORANGE, VERMILLION
from torchalign.types import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def _pairs(report: xr.Dataset) -> tuple[Array, Array, Array, Array]:
    names = ("pair_moving", "pair_reference", "pair_weight", "pair_residual")
    moving, reference, weight, residual = (np.atleast_1d(report.attrs[name]) for name in names)
    return moving.astype(int), reference.astype(int), weight, residual


def _day_of_year(report: xr.Dataset) -> Array | None:
    """(T,), or ``None`` where there are no dates."""
    dim = report["status"].dims[0]
    if dim not in report.coords or report[dim].dtype.kind != "M":
        return None
    dates = report[dim].values.astype("datetime64[D]")
    days: Array = (dates - dates.astype("datetime64[Y]").astype("datetime64[D]")).astype(int) + 1
    return days


def draw_pair_residuals(report: xr.Dataset, ax: Axes) -> Any:
    """The matrix, frames sorted by day of year; what was drawn, for its colour bar."""
    days, count = _day_of_year(report), report["status"].size
    order = np.arange(count) if days is None else np.argsort(days, kind="stable")
    place = np.empty(count, int)
    place[order] = np.arange(count)
    moving, reference, _, residual = _pairs(report)
    matrix = np.full((count, count), np.nan)
    matrix[place[moving], place[reference]] = matrix[place[reference], place[moving]] = residual
    top = float(np.nanquantile(residual, 0.95)) if len(residual) else 1.0
    drawn = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=max(top, 1e-3), interpolation="nearest")
    if days is not None and count:
        ticks = np.unique(np.linspace(0, count - 1, min(count, 7)).round().astype(int))
        ax.set_xticks(ticks, [str(days[order[tick]]) for tick in ticks])
        ax.set_yticks(ticks, [str(days[order[tick]]) for tick in ticks])
    words = "frame" if days is None else "day of year"
    ax.set(xlabel=words, ylabel=words, title="What pairs say less what the positions say (pixels)")
    ax.title.set(fontsize=11, color=INK)
    return drawn


def draw_network(report: xr.Dataset, ax: Axes) -> None:
    """Frames at their date and day of year, and the pairs between them."""
    from matplotlib.collections import LineCollection
    from matplotlib.dates import date2num

    time, is_date = time_of(report)
    along = np.asarray(date2num(time) if is_date else time, float)  # type: ignore[no-untyped-call]
    days = _day_of_year(report)
    height = report["support"].values if days is None else days
    moving, reference, weight, _ = _pairs(report)
    ends = np.stack([np.stack([along[end], height[end]], -1) for end in (moving, reference)], 1)
    colours = np.zeros((len(weight), 4))
    colours[:, 3] = 0.08 + 0.5 * np.clip(weight, 0, 1)
    ax.add_collection(LineCollection(list(ends), colors=colours, linewidths=0.7, zorder=1))
    ok = report["status"].values == Status.OK
    ax.scatter(along[ok], height[ok], s=24, color=BLUE, zorder=3, label=f"connected ({ok.sum()})")
    if (~ok).any():
        ax.scatter(along[~ok], height[~ok], s=30, marker="x", color=VERMILLION, label=f"not ({(~ok).sum()})")
    if is_date:
        ax.xaxis_date()
    ylabel = "support" if days is None else "day of year"
    ax.set(xlabel="" if is_date else "frame", ylabel=ylabel, title="The pairs that hold the series together")


def draw_sun_shift(report: xr.Dataset, ax: Axes) -> None:
    """Shift along the shadow against cot(elevation), and what the season term makes of it."""
    elevation, azimuth = (np.deg2rad(report[f"sun_{name}"].values) for name in ("elevation", "azimuth"))
    ok = (report["status"].values == Status.OK) & np.isfinite(elevation) & (elevation > 0)
    along = np.stack([-np.sin(azimuth), np.cos(azimuth)], -1)
    length = 1 / np.tan(elevation)
    shift = np.stack([report["shift_x"].values, report["shift_y"].values], -1)
    season = np.stack([report["season_shift_x"].values, report["season_shift_y"].values], -1)
    corrected = report.attrs.get("season") == "correct"
    measured = ((shift + season if corrected else shift) * along).sum(-1)
    sigma = report["sigma"].values
    ax.errorbar(
        length[ok], measured[ok], sigma[ok], fmt="o", color=BLUE, ms=4, elinewidth=0.8, label="frames ± σ"
    )
    order = np.flatnonzero(ok)[np.argsort(length[ok])]
    if len(order) and (season != 0).any():
        fit = (season * along).sum(-1)
        fit = fit + np.median((measured - fit)[ok])
        ax.plot(length[order], fit[order], color=ORANGE, label="season term")
    words = "cot(elevation of the sun)"
    ax.set(xlabel=words, ylabel="shift along the shadow (pixels)", title="What follows the sun")


def draw_closure(report: xr.Dataset, ax: Axes) -> None:
    """Closure of every frame along time."""
    time, is_date = time_of(report)
    ok = report["status"].values == Status.OK
    ax.vlines(np.asarray(time)[ok], 0, report["closure"].values[ok], color=GREY, linewidth=0.8)
    ax.scatter(np.asarray(time)[ok], report["closure"].values[ok], s=18, color=BLUE, zorder=3)
    ax.set(
        xlabel="" if is_date else "frame",
        ylabel="closure (pixels)",
        title="How well each frame's pairs agree: no accuracy, what all share closes",
    )
    ax.set_ylim(bottom=0)
