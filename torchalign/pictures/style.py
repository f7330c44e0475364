"""How pictures look: colours, figures, axes and markers.

Colours are those of Okabe and Ito, told apart with any colour vision; a status differs in its marker too.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchalign._check import message, require
from torchalign.pictures.columns import Array, Columns
from torchalign.types import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY, INK = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C", "#222222"

# of each status: colour, marker, and the same hue as text on white, with a contrast of 4.5 : 1 at least
_STATUS_STYLES = {
    "OK": (BLUE, "o", BLUE),
    "TOO_FAR": (ORANGE, "^", "#8A5F00"),
    "NOT_CONVERGED": (PURPLE, "X", "#A3487A"),
    "NO_TEXTURE": (GREY, "s", "#666666"),
    "TOO_FEW_MATCHES": (YELLOW, "P", "#6F6600"),
    "NOT_BETTER": (VERMILLION, "D", "#AE4A00"),
    "LOW_SCORE": (SKY, "v", "#1F6F9F"),
    "AMBIGUOUS": (GREEN, "*", "#00694D"),
    "NOT_CONNECTED": (INK, "h", INK),
}
STATUS_COLOUR, STATUS_MARKER, STATUS_TEXT_COLOUR = (
    {code: _STATUS_STYLES[code.name][part] for code in Status} for part in range(3)
)
NO_TRUTH = "OK, no truth to compare with"  # beside the statuses in a legend


@functools.cache
def _figure_class() -> type[Figure]:
    require("a figure", "plot", "matplotlib")
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """Shows itself in a notebook; a plain Figure does so only once pyplot was imported there."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure


def new_figure(width: float, height: float) -> Figure:
    """Sizes in inches."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def one_axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure | SubFigure, Axes]:
    """New axes, or those given, with their figure."""
    if ax is None:
        figure = new_figure(*size)
        return figure, figure.subplots()
    return ax.figure, ax


def several_axes(
    ax: Sequence[Axes] | Array | None, size: tuple[float, float], rows: int, *, fewer: bool = False
) -> tuple[Figure | SubFigure, Array]:
    """New axes (rows, 2), or those given; ``fewer``: or the first row of them alone."""
    if ax is None:
        figure = new_figure(*size)
        return figure, figure.subplots(rows, 2, squeeze=False)
    axes = np.array(ax, dtype=object).ravel()
    if len(axes) != 2 * rows and not (fewer and len(axes) == 2):
        expected, cure = (
            f"{'2 or ' * fewer}{2 * rows} axes",
            f"give them side by side, as figure.subplots({rows}, 2)",
        )
        raise ValueError(message("ax", expected, len(axes), cure))
    return axes[0].figure, axes.reshape(-1, 2)


def marker_style(code: Status, chosen: Array, area: float, size: float = 1.0) -> dict[str, Any]:
    """Of a status and the frames that have it, as ``Axes.scatter`` takes it, with how many they are."""
    outline: dict[str, Any] = {"edgecolors": INK, "linewidths": 0.5 * size**2, "s": area * size**2}
    label = f"{code.name} ({int(chosen.sum())})"
    return {"marker": STATUS_MARKER[code], "color": STATUS_COLOUR[code], "label": label, **outline}


def draw_points(ax: Axes, points: Any, label: str, *, size: float = 1.0, **drawn: Any) -> None:
    """(x, y), each (n,), maybe with bars of 1 σ, ``yerr``."""
    kept: dict[str, Any] = {"marker": "o", "color": BLUE, "ecolor": SKY, "elinewidth": size}
    ax.errorbar(*points, label=label, linestyle="none", markersize=4.5 * size, zorder=3, **(kept | drawn))


def magnification(covariances: Array, reach: float) -> int:
    """1, 10 or 100: ellipses that many times as large are seen on axes of that reach."""
    median = float(np.median(np.sqrt(np.trace(covariances, axis1=1, axis2=2)))) if len(covariances) else 0.0
    return next((times for times in (1, 10) if median * times >= 0.02 * reach), 100) if median > 0 else 1


def draw_ellipses(ax: Axes, centres: Array, covariances: Array, color: str, size: float = 1.0) -> None:
    """Of 1 σ, of covariances (n, 2, 2) around points (n, 2), both (x, y)."""
    from matplotlib.collections import EllipseCollection

    if not len(centres):
        return
    values, axes = np.linalg.eigh(covariances)
    width, height = 2 * np.sqrt(np.clip(values[:, ::-1], 0, None)).T  # along the larger axis, and across
    angles = np.rad2deg(np.arctan2(axes[:, 1, 1], axes[:, 0, 1]))
    drawn: dict[str, Any] = {"offsets": centres, "offset_transform": ax.transData, "units": "xy", "zorder": 2}
    outline: dict[str, Any] = {"facecolors": "none", "edgecolors": color, "linewidths": 1.2 * size}
    ax.add_collection(EllipseCollection(width, height, angles, **drawn, **outline))


def draw_truth(ax: Axes, x: Array, y: Array, *, marker: str = "o", label: str = "") -> None:
    """The truth: open, so that what was found is seen inside."""
    style: dict[str, Any] = {"facecolors": "none", "edgecolors": INK, "linewidths": 0.8, "s": 100}
    ax.scatter(x, y, marker=marker, label=label or None, zorder=2, **style)


def draw_rings(ax: Axes, reach: float) -> None:
    """Circles of equal error, labelled, at round numbers."""
    from matplotlib.patches import Circle
    from matplotlib.ticker import MaxNLocator

    step = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0.0, reach)[1]
    ring: dict[str, Any] = {
        "fill": False,
        "edgecolor": GREY,
        "linewidth": 0.6,
        "linestyle": "--",
        "zorder": 1,
    }
    words: dict[str, Any] = {"color": "#666666", "fontsize": 7, "ha": "center", "va": "bottom"}
    for radius in np.arange(1, int(reach / step * 1.42) + 1) * step:
        ax.add_patch(Circle((0, 0), radius, **ring))
        if radius < reach:
            ax.annotate(f"{radius:.3g} px", (0, -radius), **words)
    ax.plot(0, 0, marker="+", color=INK, markersize=9, zorder=2)


def time_axis(ax: Axes, rows: Columns) -> None:
    """Few and short dates along x, or the numbers of frames."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    if not rows.is_date:
        ax.set_xlabel("frame")
    if not (rows.is_date and rows.time.size):
        return
    locator = AutoDateLocator(maxticks=9)  # type: ignore[no-untyped-call]
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def finish_axes(ax: Axes, *, columns: int = 2) -> None:
    """Grid, title and legend, the same for all charts."""
    ax.title.set(fontsize=11, color=INK)
    ax.grid(True, color="#E6E6E6", linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # matplotlib lists error bars last; what was left belongs there
        left = {NO_TRUTH, *Status.__members__} - {"OK"}
        order = sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0].split(" (")[0] in left)
        labels, handles = [label for label, _ in order], [handle for _, handle in order]
        # below the axis: inside, it would hide frames; the pad, in letters, is for ticks and label
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 5.0}
        ax.legend(handles, labels, fontsize=8, ncols=columns, frameon=False, **below)
