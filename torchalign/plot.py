"""Pictures of an alignment: shifts with their errors, the stack before and after, and both in motion.

Every function takes what :func:`torchalign.align` returns and gives back a ``matplotlib.figure.Figure`` that
belongs to nobody: no window, no global state, any thread, any backend. In a notebook it shows itself as the
last line of a cell; elsewhere ``figure.savefig("name.png")`` writes it. With ``ax`` it draws into axes of
yours (several where it has several pictures) and returns their figure. :func:`summary`, a page, and
:func:`animate`, a file, take none.

What does not fit raises, before anything is drawn: ``TypeError`` where a report is no Dataset, or a cube no
DataArray or Dataset; ``ValueError`` where a report lacks a field, or ``true_shift`` is of another shape than (T, 2).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr

from torchalign._check import check_number, check_option, check_whole, message
from torchalign.cube.displacements import known_field
from torchalign.cube.labels import Array, find_dims, find_frame, time_labels
from torchalign.cube.solution import report_labels
from torchalign.functional.shift_field import field_at
from torchalign.pictures import animation, columns, frames, style
from torchalign.pictures.frames import Comparison, Label, Statistic, Zoom
from torchalign.types import ShiftField, Status, each_field

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from torchalign.lgm import MatchedPoints

__all__ = [
    "Along",
    "Statistic",
    "Zoom",
    "animate",
    "before_after",
    "closure",
    "local_shifts",
    "matches",
    "network",
    "pair_residuals",
    "score_gain",
    "shift_error",
    "shift_scatter",
    "shifts_over_time",
    "summary",
    "sun_shift",
    "temporal_profile",
]


def __dir__() -> list[str]:
    return sorted(__all__)


Along = Literal["time", "y", "x"]

_STRIP = 16  # thumbnails in a row of the summary
_ARCS_UP_TO = 548  # days: within 18 months, day of year over date is nearly one line
# frames up to the split, or all, and those after it
_GROUPS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "color": style.BLUE, "ecolor": style.SKY},
    {"marker": "s", "color": style.VERMILLION, "ecolor": "#F2B48C"},
)

# --- shifts ---


def shift_scatter(
    report: xr.Dataset,
    *,
    split: Label | None = None,
    true_shift: Any = None,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Where every frame was moved to: shift y against shift x, with 1-σ ellipses, magnified where they are small.

    Frames that were flagged lie where they came, at (0, 0); if the truth is known, at the truth.

    Args:
        report: from :func:`torchalign.align`.
        split: a date, or an entry of another time coordinate: frames up to it (a day: up to its end) and
            after it get two colours, and each group a cross at its median. A change of the sensor, of its
            processing baseline or of its reference image shows as two clusters.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown; drawn as open circles.
        ax: to draw into; default: a new figure.

    Raises:
        ValueError: ``split`` cannot be compared with the time coordinate.

    Example:
        >>> zeros = xr.Variable("time", np.zeros(3))
        >>> fields = dict.fromkeys(["shift_x", "shift_y", "score", "score_before", "sigma", "status"], zeros)
        >>> figure = shift_scatter(xr.Dataset(fields), true_shift=np.zeros((3, 2)))
        >>> figure.axes[0].get_xlabel()
        'shift x, right (pixels)'
    """
    rows = columns.read_columns(report, true_shift)
    groups = _groups(rows, split)
    figure, ax = style.one_axes(ax, (5.4, 5.2))
    truth, placed = rows.truth, rows.shift
    if truth is not None:
        placed = np.where(rows.ok[:, None] | np.isnan(truth), placed, truth)
    reach = 1.12 * max(float(np.abs(placed).max(initial=0.0)), 0.1)
    times = style.magnification(rows.covariance[rows.ok], reach)
    sigma = "σ" if times == 1 else f"{times} σ"
    ax.axhline(0, color=style.GREY, linewidth=0.6, zorder=0)
    ax.axvline(0, color=style.GREY, linewidth=0.6, zorder=0)
    if truth is not None:
        style.draw_truth(ax, truth[:, 0], truth[:, 1], label="truth")
    for (words, members), group in zip(groups if rows.ok.any() else (), _GROUPS, strict=False):
        drawn = rows.ok & members
        label = f"{words} ({drawn.sum()}), with {sigma}"
        if split is not None and drawn.any():
            x, y = np.median(placed[drawn], axis=0)
            label = f"{words} ({drawn.sum()}), median {x:+.2f}, {y:+.2f}"
            cross: dict[str, Any] = {"marker": "+", "markersize": 18, "markeredgewidth": 2.5}
            ax.plot(x, y, **cross, linestyle="none", color=group["color"], zorder=5)
        style.draw_points(ax, placed[drawn].T, label, size=rows.size, **group)
        style.draw_ellipses(ax, placed[drawn], times**2 * rows.covariance[drawn], group["ecolor"], rows.size)
    for code, chosen in rows.flagged:
        ax.scatter(*placed[chosen].T, zorder=4, **style.marker_style(code, chosen, 60, rows.size))
    ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")  # y down, as in the image
    ax.set(xlabel="shift x, right (pixels)", ylabel="shift y, down (pixels)", title="Shift of each frame")
    style.finish_axes(ax)
    return figure


def shift_error(report: xr.Dataset, true_shift: Any, *, ax: Axes | None = None) -> Figure | SubFigure:
    """What is left between found and true shift, in pixels, with the 1-σ ellipses that were predicted.

    Flagged frames were not moved and have no error; they are counted in the legend, as are frames without a truth.

    Args:
        report: from :func:`torchalign.align`.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown: those frames are left out.
        ax: to draw into; default: a new figure.
    """
    rows = columns.read_columns(report, true_shift)
    if rows.truth is None:
        raise ValueError(message("true_shift", "an array (T, 2)", None, "use shift_scatter without a truth"))
    figure, ax = style.one_axes(ax, (5.4, 5.2))
    error = rows.shift - rows.truth
    known = rows.ok & np.isfinite(error).all(1)
    radius = np.hypot(*error[known].T)
    reach = max(0.01, 1.15 * float((np.abs(error[known]) + rows.sigma[known]).max(initial=0.0)))
    style.draw_rings(ax, reach)
    style.draw_points(ax, error[known].T, f"found − true, with σ ({known.sum()})", size=rows.size)
    style.draw_ellipses(ax, error[known], rows.covariance[known], style.SKY, rows.size)
    rest = rows.ok & ~known
    if rest.any():
        words = {"label": f"{style.NO_TRUTH} ({rest.sum()})", "color": style.GREY}
        ax.scatter([], [], **style.marker_style(Status.OK, rest, 26) | words)
    for code, chosen in rows.flagged:
        ax.scatter([], [], **style.marker_style(code, chosen, 50))
    ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")
    median = f": median {np.median(radius):.4f} px" if len(radius) else ""
    ax.set(xlabel="error x (pixels)", ylabel="error y (pixels)", title=f"Error{median}")
    style.finish_axes(ax)
    return figure


def shifts_over_time(
    report: xr.Dataset, *, true_shift: Any = None, ax: Axes | None = None
) -> Figure | SubFigure:
    """Shift x and y of every frame along time, with 1-σ bars; flagged frames as their status' marker.

    Args:
        report: from :func:`torchalign.align`.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown; drawn as open circles.
        ax: to draw into; default: a new figure.
    """
    rows = columns.read_columns(report, true_shift)
    figure, ax = style.one_axes(ax, (9.0, 3.6))
    time, ok, size = rows.time, rows.ok, rows.size
    ax.axhline(0, color=style.GREY, linewidth=0.6, zorder=0)
    looks = (("x, right", style.BLUE, "o"), ("y, down", style.ORANGE, "s"))
    for axis, (name, colour, marker) in enumerate(looks):
        if rows.truth is not None:
            label = "truth" if axis == 0 else ""
            style.draw_truth(ax, time, rows.truth[:, axis], marker=marker, label=label)
        drawn: dict[str, Any] = {
            "marker": marker,
            "color": colour,
            "ecolor": colour,
            "elinewidth": 1.5 * size,
        }
        points, bars = (time[ok], rows.shift[ok, axis]), rows.sigma[ok, axis]
        style.draw_points(ax, points, f"{name} ± σ", size=size, yerr=bars, **drawn)
    for code, chosen in rows.flagged:
        line: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "lw": 0.8, "alpha": 0.6 * size**2}
        ax.vlines(time[chosen], 0, 1, style.STATUS_COLOUR[code], "dotted", **line)
        ax.scatter(time[chosen], np.zeros(chosen.sum()), **style.marker_style(code, chosen, 50, size))
    style.time_axis(ax, rows)
    ax.set(ylabel="shift (pixels)", title="Shifts over time")
    ax.margins(y=0.12)
    style.finish_axes(ax, columns=4)
    return figure


def local_shifts(
    report: xr.Dataset, frame: Label | None = None, *, ax: Sequence[Axes] | Array | None = None
) -> Figure | SubFigure:
    """The field of local shifts of one frame: arrows coloured by σ, its length, and its profiles.

    Arrows show where the ground at a node was moved on top of the warp, magnified. The profiles are the mean over
    each row and over each column: jitter of a platform shows in one of them alone.

    Args:
        report: of :func:`torchalign.align` with :class:`torchalign.Local`.
        frame: its label, or else its position; default: the one with the largest local shifts.
        ax: four axes to draw into; default: a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: the report is no Dataset.
        ValueError: it has no field; an unknown frame; another number of axes.
    """
    report = columns.check_pictured(report)
    field = known_field(report)
    time = report["status"].dims[0]
    labels = time_labels(report["status"], time)
    strongest = int(np.argmax(report["local_shift_p95"].values))
    number = strongest if frame is None else find_frame(report["status"], time, frame)
    figure, axes = style.several_axes(ax, (10.0, 8.6), 2)
    one = each_field(field, lambda part: part[number : number + 1])
    _draw_local_shifts(axes, one, tuple(report.attrs.get("grid_size", (0, 0))))
    if ax is None:
        figure.suptitle(f"Local shifts, {labels[number]}", fontsize=13, color=style.INK)
    return figure


def _draw_local_shifts(axes: Array, field: ShiftField, size: tuple[int, int]) -> None:
    """Arrows, length, and the profiles by row and by column, of one frame."""
    (left, top), (step_x, step_y) = field.origin[0].tolist(), field.spacing[0].tolist()
    n, m = field.coefficients.shape[-2:]
    height, width = (
        length or int(step * (count - 3))
        for length, step, count in zip(size, (step_y, step_x), (n, m), strict=True)
    )
    arrows, lengths, by_row, by_column = axes.ravel()
    nodes_x, nodes_y = left + step_x * np.arange(1, m - 1), top + step_y * np.arange(1, n - 1)
    nodes_x, nodes_y = nodes_x[nodes_x < width], nodes_y[nodes_y < height]
    dx, dy = (-part[0].numpy() for part in field_at(field, torch.tensor(nodes_x), torch.tensor(nodes_y)))
    sigma = field.sigma[0, 1 : 1 + len(nodes_y), 1 : 1 + len(nodes_x)].numpy()
    drawn_as: dict[str, Any] = {"angles": "xy", "pivot": "mid", "cmap": "cividis_r", "width": 0.004}
    if not np.isfinite(sigma).any():  # no arrow is drawn, whose mean length would be the scale
        drawn_as["scale"] = 1.0
    drawn = arrows.quiver(nodes_x, nodes_y, dx, dy, sigma, **drawn_as)
    arrows.figure.colorbar(drawn, ax=arrows, label="σ (pixels)", shrink=0.8)
    arrows.quiverkey(drawn, 0.85, 1.04, 1.0, "1 px", labelpos="E")
    arrows.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    arrows.set_title("Moved by, on top of the warp", loc="left")
    step = max(1, max(height, width) // 256)
    x, y = torch.arange(0.0, width, step).double(), torch.arange(0.0, height, step).double()
    dx, dy = (-part[0].numpy() for part in field_at(field, x, y))
    picture = lengths.imshow(np.hypot(dx, dy), extent=(-0.5, width - 0.5, height - 0.5, -0.5), cmap="magma")
    lengths.figure.colorbar(picture, ax=lengths, label="pixels", shrink=0.8)
    lengths.set(title="Length")
    for ax, along, axis, word in ((by_row, y, 1, "row"), (by_column, x, 0, "column")):
        for part, name, colour in ((dx, "x, right", style.BLUE), (dy, "y, down", style.ORANGE)):
            ax.plot(along.numpy(), part.mean(axis), color=colour, label=name)
        ax.axhline(0, color=style.GREY, linewidth=0.6, zorder=0)
        ax.set(title=f"Mean over each {word}", xlabel=f"{word} (pixels)", ylabel="shift (pixels)")
        style.finish_axes(ax)


def score_gain(report: xr.Dataset, *, ax: Axes | None = None) -> Figure | SubFigure:
    """Correlation of each frame with the reference, before → after, worst frame at the bottom.

    Args:
        report: from :func:`torchalign.align`.
        ax: to draw into; default: a new figure.
    """
    rows = columns.read_columns(report)
    figure, ax = style.one_axes(ax, (5.4, 5.2))
    after, before, size = rows.report["score"].values, rows.report["score_before"].values, rows.size
    rank = np.argsort(np.argsort(np.fmax(after, before), kind="stable"))
    for code, chosen in columns.by_status(rows.status):
        colour = style.STATUS_COLOUR[code]
        open_marker: dict[str, Any] = {"facecolors": "white", "edgecolors": colour, "linewidths": size}
        ax.hlines(rank[chosen], before[chosen], after[chosen], colour, linewidth=1.2 * size, alpha=0.6)
        ax.scatter(before[chosen], rank[chosen], s=22 * size**2, zorder=3, **open_marker)
        ax.scatter(after[chosen], rank[chosen], zorder=4, **style.marker_style(code, chosen, 26, size))
    ax.set(xlabel="correlation, before (open) → after (filled)")
    ax.set(ylabel="frames, ordered by score", yticks=[], title="Score of each frame")
    style.finish_axes(ax)
    return figure


# --- pictures ---


def before_after(
    cube: xr.DataArray | xr.Dataset,
    aligned: xr.DataArray | xr.Dataset,
    *,
    bands: Sequence[Hashable] | None = None,
    statistic: Statistic = "median",
    frame: Label | None = None,
    report: xr.Dataset | None = None,
    stretch: tuple[float, float] = (1.0, 99.0),
    zoom: Zoom | None = None,
    ax: Sequence[Axes] | Array | None = None,
) -> Figure | SubFigure:
    """The temporal median or mean of the cube, or one frame, before and after, whole and magnified.

    A stack that is registered has a sharp median; one that is not, a blurred one. The gain is written in the
    title: the mean length of the gradient after, over that before, and with a report the mean correlation of
    the frames with the reference. Resampling takes its share of the gradient: bilinear about 10 % where
    every frame moves by a fraction of a pixel, bicubic almost nothing.

    Args:
        cube: what was aligned: time, y, x and maybe band, named as :func:`torchalign.align` finds them. Or a
            Dataset, of which the variables are the bands, but for classes.
        aligned: what came back.
        bands: three bands for red, green and blue (or one, for grey): labels, or else positions. Default: the
            bands called B04, B03, B02 or red, green, blue; else positions (3, 2, 1), or the first.
        statistic: over time, of the pixels with data.
        frame: one frame in the statistic's place: its label, or else its position.
        report: to leave flagged frames out of both pictures, so that the same frames are compared.
        stretch: percentiles of the picture after, band by band, that become black and white in both.
        zoom: (row, column, side) in pixels of the part to magnify; default: the most textured one.
        ax: two axes to draw into, before and after, or four, with the magnified below; default: a new
            figure of four.

    Raises:
        TypeError: a cube is no DataArray or Dataset.
        ValueError: the cubes differ in shape; unknown dims, bands, frame or statistic; stretch or zoom out of
            range; another number of axes.

    Example:
        >>> values = np.random.default_rng(0).random((3, 3, 20, 20))
        >>> cube = xr.DataArray(values, dims=("time", "band", "y", "x"))
        >>> figure = before_after(cube, cube, statistic="mean")
        >>> len(figure.axes)
        4
    """
    cube, aligned = map(frames.as_drawn, (cube, aligned))
    pair = frames.compare(cube, aligned, bands, statistic, frame, report, stretch, zoom)
    figure, axes = style.several_axes(ax, (9.6, 9.9), 2, fewer=True)
    _draw_comparison(axes, pair)
    if ax is None:
        figure.suptitle(pair.words, fontsize=13, color=style.INK)
    return figure


def temporal_profile(
    cube: xr.DataArray | xr.Dataset,
    aligned: xr.DataArray | xr.Dataset,
    *,
    row: int | None = None,
    column: int | None = None,
    bands: Sequence[Hashable] | None = None,
    report: xr.Dataset | None = None,
    equalize: bool = True,
    stretch: tuple[float, float] = (1.0, 99.0),
    ax: Sequence[Axes] | Array | None = None,
) -> Figure | SubFigure:
    """One row and one column of the cube along time, before and after: edges that wiggled run straight.

    A row gives the x–t slice, time down; a column the y–t slice, time to the right; every frame is a stripe
    of one width, whatever the days between. Only that row and column of the cubes are loaded, except to
    choose one. The title has the mean correlation of the stripes with their median.

    Args:
        cube: what was aligned.
        aligned: what came back.
        row: of the x–t slice, from 0; negative: from the bottom.
        column: of the y–t slice, from 0; negative: from the right. Default where neither is given: both,
            those with most edges.
        bands: as in :func:`before_after`.
        report: to leave flagged frames out.
        equalize: bring every stripe to the brightness and contrast of the median stripe, so that neither
            season nor light hides the edges.
        stretch: percentiles of the median stripe after that become black and white; what is brighter,
            clouds, is compressed.
        ax: two axes to draw into, before and after, for a row or a column, or four for both: the row's first;
            default: a new figure.

    Raises:
        TypeError: a cube is no DataArray or Dataset; the row or column is no whole number.
        ValueError: the cubes differ in shape; no frames; row or column outside; else as in :func:`before_after`.

    Example:
        >>> values = np.random.default_rng(0).random((5, 20, 30))
        >>> cube = xr.DataArray(values, dims=("time", "y", "x"))
        >>> before, after = temporal_profile(cube, cube, row=7).axes
        >>> before.images[0].get_array().shape  # 5 dates, 30 columns, colours
        (5, 30, 3)
    """
    cube, aligned = map(frames.as_drawn, (cube, aligned))
    count, height, width = frames.check_same(cube, aligned, may_be_empty=False)
    kept = columns.kept_frames(columns.status_of(report, count))
    cubes = [(each, name, find_dims(each, name)) for each, name in ((cube, "cube"), (aligned, "aligned"))]
    if row is None and column is None:
        values = frames.load_frames(aligned, "aligned", bands).values[kept]
        row, column = _busiest(frames.reduce_time(values, "median"))
    slices = [
        (role, check_whole(name, index, minimum=-size, maximum=size - 1) % size)
        for role, name, index, size in (("y", "row", row, height), ("x", "column", column, width))
        if index is not None
    ]
    figure, axes = style.several_axes(ax, (10.4, 4.8 * len(slices)), len(slices))
    for pair, (role, number) in zip(axes, slices, strict=True):
        parts = [
            frames.load_frames(each.isel({dims[role]: [number], dims["time"]: kept}), name, bands)
            for each, name, dims in cubes
        ]
        _draw_profile(pair, parts, role, number, stretch, equalize)
    return figure


def summary(
    cube: xr.DataArray | xr.Dataset,
    aligned: xr.DataArray | xr.Dataset,
    report: xr.Dataset,
    *,
    true_shift: Any = None,
    bands: Sequence[Hashable] | None = None,
    statistic: Statistic = "median",
    stretch: tuple[float, float] = (1.0, 99.0),
    zoom: Zoom | None = None,
    title: str | None = None,
) -> Figure:
    """All on one page: before and after, the shifts, their errors or scores, and every frame with its status.

    Args:
        cube: what was aligned.
        aligned: what came back.
        report: what came with it.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown; errors take the place of the scores.
        bands: as in :func:`before_after`.
        statistic: as in :func:`before_after`.
        stretch: as in :func:`before_after`.
        zoom: as in :func:`before_after`.
        title: default: how many frames were aligned.
    """
    cube, aligned = map(frames.as_drawn, (cube, aligned))
    rows = columns.read_columns(report, true_shift)
    count, done = rows.ok.size, int(rows.ok.sum())
    strips = 1.6 * max(1, -(-min(count, 2 * _STRIP) // _STRIP))  # their height
    figure = style.new_figure(18.0, 9.9 + strips)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(9.0, 0.3 + strips))[:, 0]
    axes = top.subplot_mosaic("ABST;abtt", width_ratios=(1.12, 1.12, 1.0, 1.0))
    pictures = np.array([[axes["A"], axes["B"]], [axes["a"], axes["b"]]])
    pair = frames.compare(cube, aligned, bands, statistic, None, report, stretch, zoom)
    _draw_comparison(pictures, pair)
    axes["A"].set_title(f"Before: {pair.words}".replace(" (", "\n(", 1), fontsize=11, color=style.INK)
    shift_scatter(report, true_shift=true_shift, ax=axes["S"])
    if true_shift is None:
        score_gain(report, ax=axes["T"])
    else:
        shift_error(report, true_shift, ax=axes["T"])
    shifts_over_time(report, true_shift=true_shift, ax=axes["t"])
    _draw_frames(bottom, cube, rows, bands, stretch)
    if title is None:
        title = f"torchalign: {done} of {count} frames aligned, {count - done} flagged"
    figure.suptitle(title, fontsize=17, color=style.INK, fontweight="bold")
    return figure


def animate(
    cube: xr.DataArray | xr.Dataset,
    aligned: xr.DataArray | xr.Dataset,
    path: str | os.PathLike[str],
    *,
    along: Along = "time",
    report: xr.Dataset | None = None,
    bands: Sequence[Hashable] | None = None,
    stretch: tuple[float, float] = (1.0, 99.0),
    zoom: Zoom | None = None,
    frames_per_second: float = 3.0,
    loop: int = 0,
    panel: int = 400,
) -> Path:
    """Write a GIF, or an MP4 where ffmpeg is installed: the cube before, in motion beside the cube after.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        cube: what was aligned.
        aligned: what came back.
        path: NAME.gif or NAME.mp4; an existing file is replaced, a missing folder is made.
        along: ``"time"``, frame by frame; ``"y"``, the x–t slices of :func:`temporal_profile` from the top row
            to the bottom; ``"x"``, the y–t slices from left to right.
        report: to frame flagged frames in the colour of their status and to write it; slices leave them out.
        bands: as in :func:`before_after`.
        stretch: percentiles of the temporal median after, band by band, that become black and white; what is
            brighter, clouds, is compressed.
        zoom: (row, column, side) in pixels of the part to show; default: the whole frame.
        frames_per_second: of the animation.
        loop: how many times a GIF runs; 0: for ever.
        panel: width of each half in the file's pixels; frames are magnified by a whole number to come near it.

    Returns:
        The path.

    Raises:
        TypeError: a cube is no DataArray or Dataset.
        ValueError: as in :func:`before_after`; no frames; another suffix.
        ImportError: an MP4 without ffmpeg.
    """
    path = Path(path)
    animation.check_animation(path)
    check_option("along", along, Along)
    check_number("frames_per_second", frames_per_second, minimum=0.0, maximum=50.0, inclusive=False)
    check_number("loop", loop, minimum=0, maximum=65535)
    check_number("panel", panel, minimum=16, maximum=4096)
    cube, aligned = map(frames.as_drawn, (cube, aligned))
    count, *_ = frames.check_same(cube, aligned, may_be_empty=False)
    status = columns.status_of(report, count)
    before, after = frames.load_frames(cube, "cube", bands), frames.load_frames(aligned, "aligned", bands)
    pixels = [each.values for each in (before, after)]
    if zoom is not None:
        pixels = [frames.crop(values, frames.check_zoom(zoom, values.shape[1:3])) for values in pixels]
    good = columns.kept_frames(status)
    low, high = frames.median_limits(after.values[good], stretch)
    labels = before.labels
    if along != "time":
        axis, word = (1, "row") if along == "y" else (2, "column")
        slices = [_equalize(np.moveaxis(values[good], axis, 0)) for values in pixels]  # (N, T, W or H, 3)
        pixels = slices if along == "y" else [values.swapaxes(1, 2) for values in slices]  # time to the right
        start = 0 if zoom is None else zoom[axis - 1]
        labels = [f"{word} {start + number}" for number in range(len(pixels[0]))]
        status = np.zeros(len(labels), np.int64)
    size = _panel_size(pixels[0].shape[1:3], panel, along)
    pictures = [
        animation.compose(
            [frames.to_rgb(values[number], low, high, clouds=True) for values in pixels],
            size,
            labels[number],
            code,
        )
        for number, code in enumerate(status)
    ]
    animation.write(pictures, path, frames_per_second, int(loop))
    return path


def _draw_comparison(axes: Array, pair: Comparison) -> None:
    """Into axes (1 or 2, 2): whole above, magnified below."""
    from matplotlib.patches import Rectangle

    row, column, side = pair.zoom
    titles = ("Before", ": ".join(filter(None, ("After", ", ".join(pair.gains)))))
    for number, (rgb, name) in enumerate(zip(pair.pictures, titles, strict=True)):
        whole = axes[0, number]
        whole.imshow(rgb, interpolation="nearest")
        whole.set_title(name, fontsize=11, color=style.INK)
        whole.set(xticks=[], yticks=[])
        if len(axes) == 1:
            continue
        part = axes[1, number]
        square = ((column - 0.5, row - 0.5), side, side)
        whole.add_patch(Rectangle(*square, fill=False, edgecolor=style.ORANGE, linewidth=2.0))
        part.imshow(frames.crop(rgb, pair.zoom), interpolation="nearest")
        part.set(xticks=[], yticks=[])
        for spine in part.spines.values():
            spine.set(edgecolor=style.ORANGE, linewidth=2.0)
    if len(axes) == 2:
        axes[1, 0].set_xlabel(f"{side} × {side} pixels, magnified", fontsize=9)


def _draw_profile(
    axes: Array,
    parts: Sequence[frames.FrameImages],
    role: str,
    number: int,
    stretch: tuple[float, float],
    equalize: bool,
) -> None:
    """Into two axes: the stripes of one row (role "y") or column ("x") along time, before and after."""
    # (T, 1, W, 3) or (T, H, 1, 3) → (T, N, 3)
    stripes = [part.values[:, 0] if role == "y" else part.values[:, :, 0] for part in parts]
    low, high = frames.median_limits(stripes[1][:, None], stretch)
    title = f"x–t slice of row {number}" if role == "y" else f"y–t slice of column {number}"
    for ax, values, name in zip(axes, stripes, ("before", "after"), strict=True):
        rgb = frames.to_rgb(_equalize(values) if equalize else values, low, high, clouds=True)
        rgb = rgb if role == "y" else rgb.swapaxes(0, 1)  # time down; or time to the right, y down
        ax.imshow(rgb, interpolation="nearest", aspect="auto")
        agreement = _agreement(values)
        words = "" if agreement is None else f", correlation with the median {agreement:.3f}"
        ax.set_title(f"{title}, {name}{words}", fontsize=10, color=style.INK)
        labels = parts[0].labels
        ticks = np.unique(np.linspace(0, max(len(labels) - 1, 0), min(len(labels), 7)).round())
        named = [labels[int(tick)] for tick in ticks]
        if role == "y":
            ax.set(xlabel="x (pixels)", yticks=ticks, yticklabels=named)
        else:
            ax.set(ylabel="y (pixels)", xticks=ticks, xticklabels=named)
            ax.tick_params("x", rotation=20)
        ax.tick_params(labelsize=8)


def _busiest(picture: Array) -> tuple[int, int]:
    """(H, W, 3) → the row with most edges along x, the column with most along y."""
    grey = np.nan_to_num(picture.mean(-1))
    # the root: many edges before one strong edge
    by_row, by_column = (np.sqrt(np.abs(np.diff(grey, axis=axis))).sum(axis) for axis in (1, 0))
    return int(by_row.argmax()), int(by_column.argmax())


def _equalize(stripes: Array) -> Array:
    """Stripes (..., T, N, 3), each with the mean and spread, over N, of the median stripe."""
    blank = ~np.isfinite(stripes).any(-2, keepdims=True)
    filled = np.where(blank, 0.0, stripes)  # else NumPy warns of empty slices
    mean, spread = np.nanmean(filled, -2, keepdims=True), np.nanstd(filled, -2, keepdims=True)
    middle, width = (np.median(each, axis=-3, keepdims=True) for each in (mean, spread))
    flat = spread <= 1e-6 * np.abs(mean)
    return (stripes - mean) * np.where(flat, 1.0, width / np.where(flat, 1.0, spread)) + middle


def _agreement(stripes: Array) -> float | None:
    """Mean correlation of each stripe (T, N, 3) with the median stripe; None where there is no contrast."""
    grey = stripes.mean(-1).astype(np.float64)
    seen = np.isfinite(grey).all(0)
    if len(grey) < 3 or seen.sum() < 8:
        return None
    centred = grey[:, seen] - grey[:, seen].mean(1, keepdims=True)
    median = np.median(grey[:, seen], 0)
    median -= median.mean()
    length = np.linalg.norm(centred, axis=1) * np.linalg.norm(median)
    flat = length <= 1e-12 * max(1.0, float(np.abs(grey[:, seen]).max()) ** 2)
    return None if flat.all() else float((centred @ median)[~flat].dot(1 / length[~flat]) / (~flat).sum())


def _panel_size(shape: tuple[int, ...], panel: int, along: Along) -> tuple[int, int]:
    """(height, width) of a panel in the file; the time axis of a slice is stretched to look at, not to scale."""
    height, width = shape
    across = max(1, round(panel / width))
    down = across if along == "time" else max(1, round({"y": 0.75, "x": 1.0}[along] * panel / height))
    return height * down, width * across


def _groups(rows: columns.Columns, split: Any) -> list[tuple[str, Array]]:
    """Frames up to ``split`` and after it, as words and masks; without one all frames, in one group."""
    if split is None:
        return [("OK", np.ones(rows.ok.size, bool))]
    times = report_labels(rows.report, local=True)
    try:
        if times.dtype.kind == "M":
            moment: Any = np.datetime64(split)
            after = times.astype(moment.dtype) > moment  # at its resolution: a day is up to its end
        else:
            after = times > times.dtype.type(split)
    except (TypeError, ValueError) as error:
        dim = rows.report["status"].dims[0]
        expected = f"an entry to compare with {dim!r}, as {times[0] if len(times) else 'a date'}"
        raise ValueError(message("split", expected, repr(split), "write a date as 2022-01-25")) from error
    return [(f"to {split}", ~after), (f"after {split}", after)]


def _draw_frames(
    figure: SubFigure,
    cube: xr.DataArray,
    rows: columns.Columns,
    bands: Sequence[Hashable] | None,
    stretch: tuple[float, float],
) -> None:
    """Thumbnails of frames from first to last, each in the colour of its status."""
    images, status, sigma = frames.load_frames(cube, "cube", bands), rows.status, rows.report["sigma"].values
    shown = min(len(status), 2 * _STRIP)
    across = min(max(shown, 1), _STRIP)
    grid = figure.subplots(max(1, -(-shown // across)), across, squeeze=False)
    low, high = frames.median_limits(images.values[columns.kept_frames(status)], stretch)
    chosen = np.linspace(0, len(status) - 1, shown).round().astype(int)
    for place, ax in enumerate(grid.ravel()):
        ax.set(xticks=[], yticks=[])
        if place >= shown:
            ax.set_axis_off()
            continue
        number = chosen[place]
        code = Status(status[number])
        ax.imshow(frames.to_rgb(images.values[number], low, high, clouds=True))
        for spine in ax.spines.values():
            spine.set(edgecolor=style.STATUS_COLOUR[code], linewidth=1.2 if code == Status.OK else 4.0)
        ax.set_title(images.labels[number][:10], fontsize=8, color=style.INK, pad=3)
        words = f"{sigma[number]:.3f} px" if code == Status.OK else code.name
        look = {"color": style.STATUS_TEXT_COLOUR[code], "fontweight": "bold"}
        look = {"color": style.INK} if code == Status.OK else look
        ax.set_xlabel(words, fontsize=8, labelpad=3, **look)
    which = f"{shown} of {len(status)} frames as they" if shown < len(status) else "Every frame as it"
    figure.suptitle(f"{which} came, with its σ or the reason why it was left", fontsize=11)


# --- a series without a reference ---


def network(report: xr.Dataset, *, ax: Axes | None = None) -> Figure | SubFigure:
    """The pairs that hold a series together: a line for each, the more weight the darker.

    Frames lie at their date and day of year, which shows the pairs across years. Of a series within 18 months, or
    without dates, all these lines would be one: there each pair is an arc, as high as its frames are apart.

    Args:
        report: from ``ta.align(cube, "groupwise")``.
        ax: to draw into; default: a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: the report is no Dataset.
        ValueError: it is of another reference.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.dates import date2num

    rows = columns.read_columns(report, series=True)
    figure, ax = style.one_axes(ax, (9.0, 4.0))
    along = np.asarray(date2num(rows.time) if rows.is_date else rows.time, float)  # type: ignore[no-untyped-call]
    days, ok = columns.day_of_year(rows.report), rows.ok
    moving, reference, weight, _ = columns.pairs_of(rows.report)
    first, second = along[moving, None], along[reference, None]
    if days is None or along.max(initial=-np.inf) - along.min(initial=np.inf) <= _ARCS_UP_TO:
        way = np.linspace(0, np.pi, 33)
        x, y = (first + second - (second - first) * np.cos(way)) / 2, np.abs(second - first) * np.sin(way)
        height, ylabel = np.zeros_like(along), "frames apart" if days is None else "days apart"
    else:
        x, y = (np.stack([values[moving], values[reference]], -1) for values in (along, days))
        height, ylabel = days, "day of year"
    colours = np.zeros((len(weight), 4))
    colours[:, 3] = 0.08 + 0.5 * np.clip(weight, 0, 1)
    ax.add_collection(LineCollection(list(np.stack([x, y], -1)), colors=colours, linewidths=0.7, zorder=1))
    ax.scatter(along[ok], height[ok], s=24, color=style.BLUE, zorder=3, label=f"connected ({ok.sum()})")
    if (~ok).any():
        label = f"not ({(~ok).sum()})"
        ax.scatter(along[~ok], height[~ok], s=30, marker="x", color=style.VERMILLION, label=label)
    style.time_axis(ax, rows)
    ax.set(ylabel=ylabel, title="The pairs that hold the series together")
    style.finish_axes(ax)
    return figure


def pair_residuals(report: xr.Dataset, *, ax: Axes | None = None) -> Figure | SubFigure:
    """What pairs of frames say less what the positions say: a matrix of frames by day of year.

    Dark squares agree; a bright row is a frame that its pairs disagree about, a bright block two seasons that
    do. White pairs were not compared, or count nothing. Arguments, result and errors are those of :func:`network`.
    """
    report = columns.read_columns(report, series=True).report
    figure, ax = style.one_axes(ax, (6.0, 5.2))
    days, count = columns.day_of_year(report), report["status"].size
    order = np.arange(count) if days is None else np.argsort(days, kind="stable")
    place = np.argsort(order)
    moving, reference, _, residual = columns.pairs_of(report)
    matrix = np.full((count, count), np.nan)
    matrix[place[moving], place[reference]] = matrix[place[reference], place[moving]] = residual
    top = float(np.nanquantile(residual, 0.95)) if len(residual) else 1.0
    drawn = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=max(top, 1e-3), interpolation="nearest")
    figure.colorbar(drawn, ax=ax, shrink=0.8)
    if days is not None and count:
        ticks = np.unique(np.linspace(0, count - 1, min(count, 7)).round().astype(int))
        names = [str(days[order[tick]]) for tick in ticks]
        ax.set(xticks=ticks, xticklabels=names, yticks=ticks, yticklabels=names)
    words = "frame" if days is None else "day of year"
    ax.set(xlabel=words, ylabel=words, title="What pairs say less what the positions say (pixels)")
    ax.title.set(fontsize=11, color=style.INK)
    return figure


def sun_shift(report: xr.Dataset, *, ax: Axes | None = None) -> Figure | SubFigure:
    """Shift along the shadow against the cotangent of the sun's elevation, and the season term through it.

    Arguments, result and errors are those of :func:`network`.

    Raises:
        ValueError: the report does not know where the sun stood, either.
    """
    rows = columns.read_columns(report, series=True)
    if not columns.sun_known(report):
        cure = "align a cube with dates and a CRS, or pass sun="
        raise ValueError(message("report", "one that knows where the sun stood", "no sun_elevation", cure))
    figure, ax = style.one_axes(ax, (5.6, 4.4))
    elevation, azimuth = (np.deg2rad(report[f"sun_{name}"].values) for name in ("elevation", "azimuth"))
    ok = rows.ok & np.isfinite(elevation) & (elevation > 0)
    along = np.stack([-np.sin(azimuth), np.cos(azimuth)], -1)
    length = 1 / np.tan(elevation)
    season = np.stack([report["season_shift_x"].values, report["season_shift_y"].values], -1)
    corrected = report.attrs.get("season") == "correct"
    measured = ((rows.shift + season if corrected else rows.shift) * along).sum(-1)
    drawn: dict[str, Any] = {"label": "frames ± σ", "yerr": report["sigma"].values[ok]}
    style.draw_points(ax, (length[ok], measured[ok]), color=style.BLUE, ecolor=style.BLUE, **drawn)
    order = np.flatnonzero(ok)[np.argsort(length[ok])]
    if len(order) and (season != 0).any():
        fit = (season * along).sum(-1)
        fit = fit + np.median((measured - fit)[ok])
        ax.plot(length[order], fit[order], color=style.ORANGE, label="season term")
    words = "cot(elevation of the sun)"
    ax.set(xlabel=words, ylabel="shift along the shadow (pixels)", title="What follows the sun")
    style.finish_axes(ax)
    return figure


def closure(report: xr.Dataset, *, ax: Axes | None = None) -> Figure | SubFigure:
    """How well each frame's pairs agree, along time. No accuracy: an error that all its pairs share closes.

    Arguments, result and errors are those of :func:`network`.
    """
    rows = columns.read_columns(report, series=True)
    figure, ax = style.one_axes(ax, (9.0, 3.0))
    time, values = rows.time[rows.ok], rows.report["closure"].values[rows.ok]
    ax.vlines(time, 0, values, color=style.GREY, linewidth=0.8)
    ax.scatter(time, values, s=18, color=style.BLUE, zorder=3)
    title = "How well each frame's pairs agree: no accuracy, what all share closes"
    ax.set(ylabel="closure (pixels)", title=title)
    ax.set_ylim(bottom=0)
    style.time_axis(ax, rows)
    style.finish_axes(ax)
    return figure


# --- local features ---


def matches(
    frame: Any,
    reference: Any,
    found: MatchedPoints,
    *,
    index: int | None = None,
    lines: int = 100,
    stretch: tuple[float, float] = (1.0, 99.0),
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """A frame beside its reference, and a line for each match: those that agree with its motion, and the others.

    Args:
        frame: (H, W), or (C, H, W) of which the mean is drawn: array or tensor.
        reference: the same, of the same size.
        found: what :meth:`torchalign.LGM.matches` returned.
        index: which of its frames; default: it holds one only, without or with a frame axis of 1.
        lines: how many of either kind are drawn at most, evenly from all.
        stretch: percentiles that become black and white, each picture for itself.
        ax: to draw into; default: a new figure.

    Raises:
        ValueError: the shapes do not fit, or there are many frames and no index.

    Example:
        >>> points = torch.tensor([[4.0, 4.0], [9.0, 12.0]])
        >>> both = torch.ones(2, dtype=torch.bool)
        >>> found = ta.lgm.MatchedPoints(points, points + 1, both, torch.tensor([1.0, 0.0]))
        >>> figure = matches(torch.rand(20, 20), torch.rand(20, 20), found)
        >>> figure.axes[0].get_title()
        '1 of 2 matches agree'
    """
    pictures: list[Array] = []
    for name, image in (("frame", frame), ("reference", reference)):
        values = np.asarray(image, dtype=np.float64)
        values = values.mean(0) if values.ndim == 3 else values
        if values.ndim != 2 or (pictures and values.shape != pictures[0].shape):
            expected, cure = "(H, W) or (C, H, W), both of one size", "give one image of each"
            raise ValueError(message(name, expected, values.shape, cure))
        low, high = np.nanpercentile(values, stretch)
        pictures.append(np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1))
    fields = [np.asarray(field) for field in found]
    if fields[3].ndim > 1:
        if index is None and fields[3].shape[0] != 1:
            cure = f"{fields[3].shape[0]} are there"
            raise ValueError(message("index", "the number of a frame", index, cure))
        fields = [field[index or 0] for field in fields]
    if fields[3].ndim != 1:
        cure = "give found of one series"
        raise ValueError(message("found", "one frame's K points", fields[3].shape, cure))
    points, targets, matched, weight = fields
    figure, ax = style.one_axes(ax, (10.0, 5.2))
    width, gap = pictures[0].shape[1], max(2, pictures[0].shape[1] // 40)
    between = np.ones((pictures[0].shape[0], gap))
    ax.imshow(np.nan_to_num(np.hstack([pictures[0], between, pictures[1]])), cmap="gray", vmin=0, vmax=1)
    agree = matched & (weight > 0)
    kinds = (("others", matched & ~agree, style.VERMILLION, 0.35), ("agree", agree, style.SKY, 0.8))
    for label, chosen, colour, alpha in kinds:
        rows = np.flatnonzero(chosen)
        rows = rows[np.linspace(0, len(rows) - 1, min(lines, len(rows))).round().astype(int)]
        start, end = points[rows], targets[rows] + (width + gap, 0)
        if len(rows):
            ax.plot(*np.stack([start, end], 1).T, color=colour, alpha=alpha, lw=0.7)
            x, y = np.concatenate([start, end]).T
            ax.scatter(x, y, s=5, color=colour, label=label, zorder=3)
    ax.set(title=f"{agree.sum()} of {matched.sum()} matches agree", xticks=[], yticks=[])
    ax.set(xlabel="frame, and the reference")
    style.finish_axes(ax)
    ax.grid(False)
    return figure
