"""Pictures of an alignment: shifts with their errors, the stack before and after, and both in motion.

Every function takes what :func:`torchalign.align` returns and gives back a ``matplotlib.figure.Figure`` that
belongs to nobody: no window, no global state, any thread, any backend. In a notebook it shows itself as the
last line of a cell; elsewhere ``figure.savefig("name.png")`` writes it.

Colours are those of Okabe and Ito, told apart with any colour vision; a status differs in its marker too.
"""

from __future__ import annotations

import functools
import io
import os
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from torchalign._check import check_number, check_option, message
from torchalign._labelled import find_dims as _find_dims
from torchalign._labelled import find_nodata as _find_nodata  # the one place that knows the names of dims
from torchalign.types import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from PIL import Image

    from torchalign.lgm import MatchedPoints

__all__ = [
    "Statistic",
    "Zoom",
    "animate",
    "before_after",
    "matches",
    "score_gain",
    "shift_error",
    "shift_scatter",
    "shifts_over_time",
    "summary",
]

Statistic = Literal["median", "mean"]
Zoom = tuple[int, int, int]  # row and column of the top left pixel, and the side, of a square
Array = NDArray[Any]

_BLUE, _ORANGE, _GREEN, _VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _YELLOW, _GREY, _INK = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C", "#222222"

_STATUS_COLOUR = {
    Status.OK: _BLUE,
    Status.TOO_FAR: _ORANGE,
    Status.NOT_CONVERGED: _PURPLE,
    Status.NO_TEXTURE: _GREY,
    Status.TOO_FEW_MATCHES: _YELLOW,
    Status.NOT_BETTER: _VERMILLION,
    Status.LOW_SCORE: _SKY,
}
_STATUS_MARKER = {
    Status.OK: "o",
    Status.TOO_FAR: "^",
    Status.NOT_CONVERGED: "X",
    Status.NO_TEXTURE: "s",
    Status.TOO_FEW_MATCHES: "P",
    Status.NOT_BETTER: "D",
    Status.LOW_SCORE: "v",
}
_RGB_NAMES = (("B04", "B03", "B02"), ("B4", "B3", "B2"), ("red", "green", "blue"), ("R", "G", "B"))
_RGB_BANDS = (3, 2, 1)  # Sentinel-2 with all its bands, as everywhere in the library
_NODATA_GREY = 0.15
_KNEE = 0.7  # of the display range; above it clouds are compressed instead of cut
_SHADE = 0.15  # of the display range; so much below black, shadows of clouds still differ


class _Frames(NamedTuple):
    """A cube's display bands, (T, H, W, 3) float32, NaN for nodata, and the labels of its frames."""

    values: Array
    labels: list[str]
    bands: str


# --- shifts ---


def shift_scatter(
    report: xr.Dataset, *, true_shift: Any = None, ax: Axes | None = None
) -> Figure | SubFigure:
    """Where every frame was moved to: shift y against shift x, with 1-σ bars.

    Frames that were flagged lie where they came, at (0, 0); if the truth is known, at the truth.

    Args:
        report: from :func:`torchalign.align`.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown; drawn as open circles.
        ax: to draw into; default: a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: the report is no Dataset.
        ValueError: it lacks a field, or ``true_shift`` has another shape.

    Example:
        >>> zeros = xr.Variable("time", np.zeros(3))
        >>> fields = dict.fromkeys(["shift_x", "shift_y", "score", "score_before", "sigma", "status"], zeros)
        >>> figure = shift_scatter(xr.Dataset(fields), true_shift=np.zeros((3, 2)))
        >>> figure.axes[0].get_xlabel()
        'shift x, right (pixels)'

    """
    report = _check_report(report)
    truth = _check_truth(true_shift, report)
    figure, ax = _axes(ax, (5.4, 5.2))
    shift, sigma = _shift(report), _sigma(report)
    status = report["status"].values
    moved = (status == Status.OK)[:, None]
    placed = shift if truth is None else np.where(moved | np.isnan(truth), shift, truth)
    ax.axhline(0, color=_GREY, linewidth=0.6, zorder=0)
    ax.axvline(0, color=_GREY, linewidth=0.6, zorder=0)
    if truth is not None:
        _circles(ax, truth[:, 0], truth[:, 1], label="truth")
    for code, chosen in _by_status(status):
        label = _status_label(code, chosen)
        if code == Status.OK:
            _points(ax, placed[chosen], sigma[chosen], f"{label}, with σ")
        else:
            ax.scatter(placed[chosen, 0], placed[chosen, 1], s=60, label=label, zorder=4, **_marker(code))
    reach = 1.12 * max(float(np.abs(placed).max(initial=0.0)), 0.1)
    ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")  # y down, as in the image
    ax.set(xlabel="shift x, right (pixels)", ylabel="shift y, down (pixels)", title="Shift of each frame")
    _finish(ax)
    return figure


def shift_error(report: xr.Dataset, true_shift: Any, *, ax: Axes | None = None) -> Figure | SubFigure:
    """What is left between found and true shift, in pixels, with the 1-σ bars that were predicted.

    Flagged frames were not moved and have no error; they are counted in the legend.

    Args:
        report: from :func:`torchalign.align`.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown: those frames are left out.
        ax: to draw into; default: a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: the report is no Dataset.
        ValueError: it lacks a field, or ``true_shift`` has another shape.

    """
    report = _check_report(report)
    truth = _check_truth(true_shift, report)
    if truth is None:
        raise ValueError(message("true_shift", "an array (T, 2)", None, "use shift_scatter without a truth"))
    figure, ax = _axes(ax, (5.4, 5.2))
    sigma, status = _sigma(report), report["status"].values
    error = _shift(report) - truth
    accepted = (status == Status.OK) & np.isfinite(error).all(1)
    radius = np.hypot(*error[accepted].T)
    reach = max(0.01, 1.15 * float((np.abs(error[accepted]) + sigma[accepted, None]).max(initial=0.0)))
    _rings(ax, reach)
    _points(ax, error[accepted], sigma[accepted], f"found − true ± σ ({accepted.sum()})")
    for code, chosen in _by_status(status):
        if code != Status.OK:
            ax.scatter([], [], **_marker(code), s=50, label=_status_label(code, chosen))
    ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")
    median = f": median {np.median(radius):.4f} px" if len(radius) else ""
    ax.set(xlabel="error x (pixels)", ylabel="error y (pixels)", title=f"Error{median}")
    _finish(ax)
    return figure


def shifts_over_time(
    report: xr.Dataset, *, true_shift: Any = None, ax: Axes | None = None
) -> Figure | SubFigure:
    """Shift x and y of every frame along time, with 1-σ bars; flagged frames as their status' marker.

    Args:
        report: from :func:`torchalign.align`.
        true_shift: (T, 2), x and y in pixels, NaN where it is unknown; drawn as open circles.
        ax: to draw into; default: a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: the report is no Dataset.
        ValueError: it lacks a field, or ``true_shift`` has another shape.

    """
    report = _check_report(report)
    truth = _check_truth(true_shift, report)
    figure, ax = _axes(ax, (9.0, 3.6))
    time, is_date = _time(report)
    shift, sigma, status = _shift(report), _sigma(report), report["status"].values
    accepted = status == Status.OK
    ax.axhline(0, color=_GREY, linewidth=0.6, zorder=0)
    for axis, (name, colour, marker) in enumerate((("x, right", _BLUE, "o"), ("y, down", _ORANGE, "s"))):
        if truth is not None:
            _circles(ax, time, truth[:, axis], marker=marker, label="truth" if axis == 0 else "")
        ax.errorbar(
            time[accepted],
            shift[accepted, axis],
            yerr=sigma[accepted],
            linestyle="none",
            marker=marker,
            markersize=4.5,
            color=colour,
            label=f"{name} ± σ",
            zorder=3,
        )
    for code, chosen in _by_status(status):
        if code != Status.OK:
            along = ax.get_xaxis_transform()
            ax.vlines(time[chosen], 0, 1, _STATUS_COLOUR[code], "dotted", transform=along, lw=0.8, alpha=0.6)
            ax.scatter(
                time[chosen], np.zeros(chosen.sum()), **_marker(code), s=50, label=_status_label(code, chosen)
            )
    if is_date and len(time):
        _date_axis(ax)
    ax.set(xlabel="" if is_date else "frame", ylabel="shift (pixels)", title="Shifts over time")
    ax.margins(y=0.12)
    _finish(ax, columns=4)
    return figure


def score_gain(report: xr.Dataset, *, ax: Axes | None = None) -> Figure | SubFigure:
    """Correlation of each frame with the reference, before → after, worst frame at the bottom.

    Args:
        report: from :func:`torchalign.align`.
        ax: to draw into; default: a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: the report is no Dataset.
        ValueError: it lacks a field.

    """
    report = _check_report(report)
    figure, ax = _axes(ax, (5.4, 5.2))
    after, before = report["score"].values, report["score_before"].values
    status = report["status"].values
    order = np.argsort(np.fmax(after, before), kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order))
    for code, chosen in _by_status(status):
        colour = _STATUS_COLOUR[code]
        ax.hlines(rank[chosen], before[chosen], after[chosen], colour, linewidth=1.2, alpha=0.6)
        ax.scatter(before[chosen], rank[chosen], facecolors="white", edgecolors=colour, s=22, zorder=3)
        ax.scatter(
            after[chosen], rank[chosen], **_marker(code), s=26, label=_status_label(code, chosen), zorder=4
        )
    ax.set(xlabel="correlation, before (open) → after (filled)")
    ax.set(ylabel="frames, ordered by score", yticks=[], title="Score of each frame")
    _finish(ax)
    return figure


# --- pictures ---


def before_after(
    cube: xr.DataArray,
    aligned: xr.DataArray,
    *,
    bands: Sequence[Hashable] | None = None,
    statistic: Statistic = "median",
    report: xr.Dataset | None = None,
    stretch: tuple[float, float] = (1.0, 99.0),
    zoom: Zoom | None = None,
) -> Figure:
    """The temporal median or mean of the cube, before and after, whole and magnified.

    A stack that is registered has a sharp median; one that is not, a blurred one. The gain is written in the
    title: the mean length of the gradient after, over that before, and with a report the mean correlation of
    the frames with the reference. Resampling takes its share of the gradient: bilinear about 10 % where
    every frame moves by a fraction of a pixel, bicubic almost nothing.

    Args:
        cube: what was aligned: time, y, x and maybe band, named as :func:`torchalign.align` finds them.
        aligned: what came back.
        bands: three bands for red, green and blue (or one, for grey): positions, or labels. Default: the
            bands called B04, B03, B02 or red, green, blue; else positions (3, 2, 1), or the first.
        statistic: over time, of the pixels with data.
        report: to leave flagged frames out of both pictures, so that the same frames are compared.
        stretch: percentiles of the picture after, band by band, that become black and white in both.
        zoom: (row, column, side) in pixels of the part to magnify; default: the most textured one.

    Returns:
        The figure, of four axes.

    Raises:
        TypeError: a cube is no DataArray.
        ValueError: the cubes differ in shape; unknown dims, bands or statistic; stretch or zoom out of range.

    Example:
        >>> values = np.random.default_rng(0).random((3, 3, 20, 20))
        >>> cube = xr.DataArray(values, dims=("time", "band", "y", "x"))
        >>> figure = before_after(cube, cube, statistic="mean")
        >>> len(figure.axes)
        4

    """
    figure = _new_figure(9.6, 9.9)
    axes = figure.subplots(2, 2)
    drawn = _draw_before_after(axes, cube, aligned, bands, statistic, report, stretch, zoom)
    figure.suptitle(f"{statistic.capitalize()} over time ({drawn})", fontsize=13, color=_INK)
    return figure


def summary(
    cube: xr.DataArray,
    aligned: xr.DataArray,
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

    Returns:
        The figure.

    Raises:
        TypeError: as in :func:`before_after` and :func:`shift_scatter`.
        ValueError: the same.

    """
    report = _check_report(report)
    truth = _check_truth(true_shift, report)
    count = report["status"].size
    rows = max(1, -(-min(count, 2 * _STRIP) // _STRIP))
    figure = _new_figure(18.0, 9.9 + 1.6 * rows)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(9.0, 0.3 + 1.6 * rows))[:, 0]
    axes = top.subplot_mosaic("ABST;abtt", width_ratios=(1.12, 1.12, 1.0, 1.0))
    pictures = np.array([[axes["A"], axes["B"]], [axes["a"], axes["b"]]])
    drawn = _draw_before_after(pictures, cube, aligned, bands, statistic, report, stretch, zoom)
    axes["A"].set_title(f"{statistic.capitalize()} before ({drawn})", fontsize=11, color=_INK)
    shift_scatter(report, true_shift=truth, ax=axes["S"])
    if truth is None:
        score_gain(report, ax=axes["T"])
    else:
        shift_error(report, truth, ax=axes["T"])
    shifts_over_time(report, true_shift=truth, ax=axes["t"])
    _draw_frames(bottom, cube, report, bands, stretch)
    done = int((report["status"].values == Status.OK).sum())
    title = (
        f"torchalign: {done} of {count} frames aligned, {count - done} flagged" if title is None else title
    )
    figure.suptitle(title, fontsize=17, color=_INK, fontweight="bold")
    return figure


def animate(
    cube: xr.DataArray,
    aligned: xr.DataArray,
    path: str | os.PathLike[str],
    *,
    report: xr.Dataset | None = None,
    bands: Sequence[Hashable] | None = None,
    stretch: tuple[float, float] = (1.0, 99.0),
    zoom: Zoom | None = None,
    frames_per_second: float = 3.0,
    panel: int = 400,
) -> Path:
    """Write a GIF: every frame before, beside the same frame after.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        cube: what was aligned.
        aligned: what came back.
        path: of the GIF; an existing file is replaced, a missing folder is made.
        report: to frame flagged frames in the colour of their status and to write it.
        bands: as in :func:`before_after`.
        stretch: percentiles of the temporal median after, band by band, that become black and white; what is
            brighter, clouds, is compressed.
        zoom: (row, column, side) in pixels of the part to show; default: the whole frame.
        frames_per_second: of the animation.
        panel: width of each half in the GIF's pixels; frames are magnified by a whole number to come near it.

    Returns:
        The path.

    Raises:
        TypeError: a cube is no DataArray.
        ValueError: as in :func:`before_after`; no frames; another suffix than .gif.

    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(message("path", "a name ending in .gif", path.name, "rename it"))
    check_number("frames_per_second", frames_per_second, minimum=0.0, maximum=50.0, inclusive=False)
    check_number("panel", panel, minimum=16, maximum=4096)
    before, after = _frames(cube, "cube", bands), _frames(aligned, "aligned", bands)
    _check_same(before, after)
    if not len(before.values):
        raise ValueError(message("cube", "at least one frame", "none", "nothing to animate"))
    status = _status_of(report, len(before.values))
    pixels = [frames.values for frames in (before, after)]
    if zoom is not None:
        pixels = [_crop(values, _check_zoom(zoom, values.shape[1:3])) for values in pixels]
    good = after.values[status == Status.OK]
    low, high = _limits(_over_time(good if len(good) else after.values, "median"), stretch)
    scale = max(1, round(panel / pixels[0].shape[2]))
    pictures = [
        _gif_frame(
            [_to_rgb(values[number], low, high, clouds=True) for values in pixels],
            scale,
            before.labels[number],
            code,
        )
        for number, code in enumerate(status)
    ]
    _write_gif(pictures, path, round(1000 / frames_per_second))
    return path


_STRIP = 16  # thumbnails in a row of the summary


def _draw_before_after(
    axes: Array,
    cube: xr.DataArray,
    aligned: xr.DataArray,
    bands: Sequence[Hashable] | None,
    statistic: Statistic,
    report: xr.Dataset | None,
    stretch: tuple[float, float],
    zoom: Zoom | None,
) -> str:
    """Into axes (2, 2): whole above, magnified below; returns what was shown, in words."""
    check_option("statistic", statistic, Statistic)
    before, after = _frames(cube, "cube", bands), _frames(aligned, "aligned", bands)
    _check_same(before, after)
    kept = _status_of(report, len(before.values)) == Status.OK
    if not kept.any():  # better all than none
        kept[:] = True
    pictures = [_over_time(frames.values[kept], statistic) for frames in (before, after)]
    low, high = _limits(pictures[1], stretch)
    height, width = pictures[1].shape[:2]
    zoom = _find_zoom(pictures[1]) if zoom is None else _check_zoom(zoom, (height, width))
    sharpness = [_sharpness(picture) for picture in pictures]
    gains = [f"gradients × {sharpness[1] / sharpness[0]:.2f}"] if sharpness[0] > 0 else []
    if report is not None:
        scores = (float(report[field].values[kept].mean()) for field in ("score_before", "score"))
        gains.insert(0, "correlation {:.2f} → {:.2f}".format(*scores))
    row, column, side = zoom
    titles = ("Before", ": ".join(filter(None, ("After", ", ".join(gains)))))
    for number, (picture, name) in enumerate(zip(pictures, titles, strict=True)):
        rgb = _to_rgb(picture, low, high)
        whole, part = axes[0, number], axes[1, number]
        whole.imshow(rgb, interpolation="nearest")
        part.imshow(_crop(rgb, zoom), interpolation="nearest")
        whole.add_patch(_square(column - 0.5, row - 0.5, side))
        whole.set_title(name, fontsize=11, color=_INK)
        for ax in (whole, part):
            ax.set(xticks=[], yticks=[])
        for spine in part.spines.values():
            spine.set(edgecolor=_ORANGE, linewidth=2.0)
    axes[1, 0].set_xlabel(f"{side} × {side} pixels, magnified", fontsize=9)
    return f"{int(kept.sum())} frames, {before.bands}"


def _draw_frames(
    figure: SubFigure,
    cube: xr.DataArray,
    report: xr.Dataset,
    bands: Sequence[Hashable] | None,
    stretch: tuple[float, float],
) -> None:
    """Thumbnails of frames from first to last, each in the colour of its status."""
    frames = _frames(cube, "cube", bands)
    status = _status_of(report, len(frames.values))
    shown = min(len(status), 2 * _STRIP)
    columns = min(max(shown, 1), _STRIP)
    grid = figure.subplots(max(1, -(-shown // columns)), columns, squeeze=False)
    good = frames.values[status == Status.OK]
    low, high = _limits(_over_time(good if len(good) else frames.values, "median"), stretch)
    chosen = np.linspace(0, len(status) - 1, shown).round().astype(int)
    for place, ax in enumerate(grid.ravel()):
        ax.set(xticks=[], yticks=[])
        if place >= shown:
            ax.set_axis_off()
            continue
        number = chosen[place]
        code = Status(status[number])
        ax.imshow(_to_rgb(frames.values[number], low, high, clouds=True))
        for spine in ax.spines.values():
            spine.set(edgecolor=_STATUS_COLOUR[code], linewidth=1.2 if code == Status.OK else 4.0)
        ax.set_title(frames.labels[number][:10], fontsize=8, color=_INK, pad=3)
        words = f"{report['sigma'].values[number]:.3f} px" if code == Status.OK else code.name
        colour, weight = (_INK, "normal") if code == Status.OK else (_dark(code), "bold")
        ax.set_xlabel(words, fontsize=8, color=colour, fontweight=weight, labelpad=3)
    which = f"{shown} of {len(status)} frames as they" if shown < len(status) else "Every frame as it"
    figure.suptitle(f"{which} came, with its σ or the reason why it was left", fontsize=11)


def _gif_frame(panels: list[Array], scale: int, label: str, code: int) -> Image.Image:
    """Two panels (h, w, 3) in 0 … 1 beside each other, under a line of text."""
    from PIL import Image, ImageDraw, ImageFont

    gap, head, edge = 6, 26, 3
    height, width = (scale * length for length in panels[0].shape[:2])
    picture = Image.new("RGB", (2 * width + gap, height + head), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for number, (panel, name) in enumerate(zip(panels, ("before", "after"), strict=True)):
        left = number * (width + gap)
        image = Image.fromarray((panel * 255).round().astype(np.uint8))
        picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, head))
        draw.text((left + 4, 4), f"{name}  {label}" if number == 0 else name, fill=_INK, font=font)
    if code != Status.OK:
        status = Status(code)
        left = width + gap
        draw.text((left + 60, 4), f"not moved: {status.name}", fill=_dark(status), font=font)
        draw.rectangle(
            (left, head, left + width - 1, head + height - 1), outline=_STATUS_COLOUR[status], width=edge
        )
    return picture


def _write_gif(pictures: list[Image.Image], path: Path, milliseconds: int) -> None:
    from PIL import Image

    # one palette for all, so that colours do not flicker: from a montage of some of the frames
    chosen = pictures[:: max(1, len(pictures) // 8)]
    montage = Image.new("RGB", (chosen[0].width, chosen[0].height * len(chosen)))
    for number, picture in enumerate(chosen):
        montage.paste(picture, (0, number * picture.height))
    palette = montage.quantize(255, method=Image.Quantize.MEDIANCUT)
    colours = (palette.getpalette() or [])[: 3 * 255]
    palette.putpalette([*colours, *[255] * (3 * 256 - len(colours))])  # the last colour is white
    coded = []
    for picture in pictures:
        numbers = np.array(picture.quantize(palette=palette, dither=Image.Dither.NONE))
        numbers[(np.asarray(picture) == 255).all(-1)] = 255  # Pillow's nearest is a little off: grey paper
        image = Image.fromarray(numbers)
        image.putpalette(palette.getpalette() or [])
        coded.append(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"duration": milliseconds, "loop": 0, "optimize": False}
    # a folder of its own, and not a temporary file, which only its owner could read
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as workshop:
        written = Path(workshop) / path.name
        with written.open("wb") as file:
            coded[0].save(file, format="GIF", save_all=True, append_images=coded[1:], **options)
        os.replace(written, path)


# --- the cube as pictures ---


def _frames(cube: object, name: str, bands: Sequence[Hashable] | None) -> _Frames:
    """The display bands, in memory; three of them, or one three times."""
    if not isinstance(cube, xr.DataArray):
        cure = "give what ta.align took and returned"
        raise TypeError(message(name, "an xarray.DataArray", type(cube).__name__, cure))
    dims = _find_dims(cube.dims, dict.fromkeys(("time", "band", "y", "x")))
    chosen, words = cube, "one band"
    if "band" in dims:
        numbers = _find_bands(cube, dims["band"], bands)
        chosen = cube.isel({dims["band"]: numbers})
        labelled = dims["band"] in cube.coords
        words = "bands " + ", ".join(map(str, chosen[dims["band"]].values if labelled else numbers))
    order = [dims[role] for role in ("time", "y", "x", "band") if role in dims]
    raw = chosen.transpose(*order).to_numpy()
    values = raw.astype(np.float32)
    values[np.isin(raw, _find_nodata(cube)) | ~np.isfinite(values)] = np.nan
    values = values if "band" in dims else values[..., None]
    if values.shape[-1] == 1:
        values = values.repeat(3, -1)
    return _Frames(values, _time_labels(cube, dims["time"]), words)


def _find_bands(cube: xr.DataArray, dim: Hashable, bands: Sequence[Hashable] | None) -> list[int]:
    """Positions of the bands to display."""
    labels = cube[dim].values.tolist() if dim in cube.coords else []
    count = cube.sizes[dim]
    if bands is None:
        lower = [str(label).lower() for label in labels]
        for names in _RGB_NAMES:
            if all(name.lower() in lower for name in names):
                return [lower.index(name.lower()) for name in names]
        if count > max(_RGB_BANDS):
            return list(_RGB_BANDS)
        return [0, 1, 2] if count == 3 else [0]
    chosen = []
    for band in bands:
        if band in labels:
            chosen.append(labels.index(band))
        elif isinstance(band, (int, np.integer)) and 0 <= band < count:
            chosen.append(int(band))
        else:
            expected = f"positions below {count}" + (f" or labels of {labels}" if labels else "")
            raise ValueError(message("bands", expected, repr(band), "name one or three bands that exist"))
    if len(chosen) not in (1, 3):
        cure = "name the bands for red, green and blue"
        raise ValueError(message("bands", "one or three bands", repr(bands), cure))
    return chosen


def _time_labels(cube: xr.DataArray, dim: Hashable) -> list[str]:
    if dim not in cube.coords:
        return [str(number) for number in range(cube.sizes[dim])]
    values = cube[dim].values
    if values.dtype.kind == "M":
        days = np.datetime_as_string(values, unit="D").tolist()
        # two frames of one day are told apart by the hour
        return days if len(set(days)) == len(days) else np.datetime_as_string(values, unit="m").tolist()
    return [str(value) for value in values.tolist()]


def _over_time(values: Array, statistic: Statistic) -> Array:
    """(T, H, W, 3) → (H, W, 3), NaN where there never was data."""
    seen = np.isfinite(values)
    filled = np.where(seen.any(0), values, 0.0)  # else NumPy warns of empty slices
    picture = np.nanmedian(filled, 0) if statistic == "median" else np.nanmean(filled, 0)
    return np.where(seen.any(0), picture, np.nan)


def _limits(values: Array, stretch: tuple[float, float]) -> tuple[Array, Array]:
    """Black and white of each of the three bands."""
    if len(stretch) != 2 or not 0 <= stretch[0] < stretch[1] <= 100:
        cure = "give two percentiles, the smaller first"
        raise ValueError(message("stretch", "(low, high) in 0 … 100", stretch, cure))
    pixels = values.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // 1_000_000)]  # a percentile needs no more
    pixels = pixels[np.isfinite(pixels).all(1)]
    if not len(pixels):
        return np.zeros(3, np.float32), np.ones(3, np.float32)
    low, high = np.percentile(pixels, stretch, axis=0).astype(np.float32)
    return low, np.where(high > low, high, low + 1)


def _to_rgb(values: Array, low: Array, high: Array, *, clouds: bool = False) -> Array:
    """Reflectance to 0 … 1, no data dark grey; with clouds, the bright is compressed instead of cut."""
    if clouds:
        low = low - _SHADE * (high - low)
    linear = (values - low) / (high - low)
    excess = np.maximum(linear - _KNEE, 0)
    rgb = np.minimum(linear, _KNEE) + (1 - _KNEE) * excess / (excess + 1) if clouds else linear
    return np.where(np.isfinite(values), np.clip(rgb, 0, 1), _NODATA_GREY).astype(np.float32)


def _gradient_length(picture: Array) -> Array:
    """(H, W, 3) → (H, W), NaN beside missing pixels."""
    grey = np.asarray(picture.mean(-1), np.float64)
    if min(grey.shape) < 2:
        return np.zeros_like(grey)
    return np.hypot(*np.gradient(grey))


def _sharpness(picture: Array) -> float:
    length = _gradient_length(picture)
    return float(np.nanmean(length)) if np.isfinite(length).any() else 0.0


def _find_zoom(picture: Array) -> Zoom:
    """The most textured square of about a quarter of the frame's shorter side."""
    height, width = picture.shape[:2]
    side = max(1, min(height, width, max(16, min(height, width) // 4)))
    energy = np.nan_to_num(_gradient_length(picture)) ** 0.5  # the root: many edges before one strong edge
    total = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    return int(row), int(column), side


def _check_zoom(zoom: Zoom, size: tuple[int, ...]) -> Zoom:
    if len(zoom) == 3:
        row, column, side = zoom
        if side >= 1 and 0 <= row <= size[0] - side and 0 <= column <= size[1] - side:
            return int(row), int(column), int(side)
    cure = "keep the square inside the frame"
    raise ValueError(message("zoom", f"(row, column, side) within {size[0]} × {size[1]} pixels", zoom, cure))


def _crop(values: Array, zoom: Zoom) -> Array:
    row, column, side = zoom
    return values[..., row : row + side, column : column + side, :]


# --- the report as numbers ---


def _check_report(report: object) -> xr.Dataset:
    if not isinstance(report, xr.Dataset):
        cure = "give the second thing that ta.align returns"
        raise TypeError(message("report", "an xarray.Dataset", type(report).__name__, cure))
    fields = ("shift_x", "shift_y", "score", "score_before", "sigma", "status")
    missing = [name for name in fields if name not in report]
    if missing:
        cure = "give the report of ta.align with all its fields"
        raise ValueError(message("report", f"the fields {', '.join(fields)}", f"none of {missing}", cure))
    return report


def _check_truth(true_shift: Any, report: xr.Dataset) -> Array | None:
    if true_shift is None:
        return None
    truth = np.asarray(true_shift, dtype=np.float64)
    expected = (report["status"].size, 2)
    if truth.shape != expected:
        cure = "one row (x, y) a frame, in pixels"
        raise ValueError(message("true_shift", f"shape {expected}", truth.shape, cure))
    return truth


def _check_same(before: _Frames, after: _Frames) -> None:
    if before.values.shape != after.values.shape:
        expected = f"the cube's frames, rows and columns {before.values.shape[:3]}"
        raise ValueError(
            message("aligned", expected, after.values.shape[:3], "give the pair of one ta.align")
        )


def _status_of(report: xr.Dataset | None, count: int) -> Array:
    if report is None:
        return np.zeros(count, np.int64)
    status = _check_report(report)["status"].values.astype(np.int64)
    if len(status) != count:
        raise ValueError(
            message("report", f"{count} frames as the cube", len(status), "give the report of this cube")
        )
    return np.asarray(status)


def _shift(report: xr.Dataset) -> Array:
    """(T, 2), x and y in pixels."""
    return np.stack([report["shift_x"].values, report["shift_y"].values], -1).astype(np.float64)


def _sigma(report: xr.Dataset) -> Array:
    """(T,), 0 where nothing can be said: no bar is drawn then."""
    sigma = report["sigma"].values
    return np.where(np.isfinite(sigma), sigma, 0.0)


def _time(report: xr.Dataset) -> tuple[Array, bool]:
    """Positions along a time axis, and whether they are dates."""
    dim = report["status"].dims[0]
    values = report[dim].values if dim in report.coords else np.arange(report["status"].size)
    if values.dtype.kind == "M":
        return values.astype("datetime64[ms]").astype(object), True
    return (values if values.dtype.kind in "iuf" else np.arange(len(values))), False


def _by_status(status: Array) -> list[tuple[Status, Array]]:
    """Each status that occurs, OK first, with its frames as a mask."""
    return [(code, status == code) for code in Status if (status == code).any()]


def _status_label(code: Status, chosen: Array) -> str:
    return f"{code.name} ({int(chosen.sum())})"


# --- style ---


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """Shows itself in a notebook; a plain Figure does so only once pyplot was imported there."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure


def _new_figure(width: float, height: float) -> Figure:
    """Sizes in inches."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure | SubFigure, Axes]:
    if ax is None:
        figure = _new_figure(*size)
        return figure, figure.subplots()
    return ax.figure, ax


def _marker(code: Status) -> dict[str, Any]:
    return {
        "marker": _STATUS_MARKER[code],
        "color": _STATUS_COLOUR[code],
        "edgecolors": _INK,
        "linewidths": 0.5,
    }


def _dark(code: Status) -> str:
    """The status' colour as text: the yellow is unreadable on white."""
    return "#8A7F00" if code == Status.TOO_FEW_MATCHES else _STATUS_COLOUR[code]


def _points(ax: Axes, points: Array, sigma: Array, label: str) -> None:
    """(n, 2) with bars of 1 σ in both axes."""
    ax.errorbar(
        points[:, 0],
        points[:, 1],
        xerr=sigma,
        yerr=sigma,
        linestyle="none",
        marker="o",
        markersize=4.5,
        elinewidth=1.0,
        color=_BLUE,
        ecolor=_SKY,
        label=label,
        zorder=3,
    )


def _circles(ax: Axes, x: Array, y: Array, *, marker: str = "o", label: str = "") -> None:
    """The truth: open, so that what was found is seen inside."""
    look: dict[str, Any] = {"facecolors": "none", "edgecolors": _INK, "linewidths": 0.8, "s": 100}
    ax.scatter(x, y, marker=marker, label=label or None, zorder=2, **look)


def _rings(ax: Axes, reach: float) -> None:
    """Circles of equal error, labelled, at round numbers."""
    from matplotlib.patches import Circle

    power = 10.0 ** np.floor(np.log10(reach))
    step = next(step for step in (power / 5, power / 2, power, 2 * power, 5 * power) if reach / step < 4)
    for number in range(1, int(reach / step * 1.42) + 1):
        radius = number * step
        ax.add_patch(
            Circle((0, 0), radius, fill=False, edgecolor=_GREY, linewidth=0.6, linestyle="--", zorder=1)
        )
        if radius < reach:
            ax.annotate(
                f"{radius:.3g} px", (0, -radius), color="#666666", fontsize=7, ha="center", va="bottom"
            )
    ax.plot(0, 0, marker="+", color=_INK, markersize=9, zorder=2)


def _square(left: float, top: float, side: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), side, side, fill=False, edgecolor=_ORANGE, linewidth=2.0)


def _date_axis(ax: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=9)  # type: ignore[no-untyped-call]
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def _finish(ax: Axes, *, columns: int = 1) -> None:
    ax.title.set(fontsize=11, color=_INK)
    ax.grid(True, color="#E6E6E6", linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # matplotlib lists error bars last; the flagged belong there
        flagged = [label.split(" (")[0] in set(Status.__members__) - {"OK"} for label in labels]
        order = sorted(range(len(labels)), key=flagged.__getitem__)
        handles, labels = [handles[number] for number in order], [labels[number] for number in order]
        ax.legend(handles, labels, fontsize=8, ncols=columns, framealpha=0.9, borderaxespad=0.3)


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

    Returns:
        The figure.

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
            raise ValueError(
                message(name, "(H, W) or (C, H, W), both of one size", values.shape, "give one image of each")
            )
        low, high = np.nanpercentile(values, stretch)
        pictures.append(np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1))
    fields = [np.asarray(field) for field in found]
    if fields[3].ndim > 1:
        if index is None and fields[3].shape[0] != 1:
            raise ValueError(
                message("index", "the number of a frame", index, f"{fields[3].shape[0]} are there")
            )
        fields = [field[index or 0] for field in fields]
    if fields[3].ndim != 1:
        raise ValueError(
            message("found", "one frame's K points", fields[3].shape, "give found of one series")
        )
    points, targets, matched, weight = fields
    figure, ax = _axes(ax, (10.0, 5.2))
    width, gap = pictures[0].shape[1], max(2, pictures[0].shape[1] // 40)
    between = np.ones((pictures[0].shape[0], gap))
    ax.imshow(np.nan_to_num(np.hstack([pictures[0], between, pictures[1]])), cmap="gray", vmin=0, vmax=1)
    agree = matched & (weight > 0)
    kinds = (("others", matched & ~agree, _VERMILLION, 0.35), ("agree", agree, _SKY, 0.8))
    for label, chosen, colour, alpha in kinds:
        rows = np.flatnonzero(chosen)
        rows = rows[np.linspace(0, len(rows) - 1, min(lines, len(rows))).round().astype(int)]
        start, end = points[rows], targets[rows] + (width + gap, 0)
        if len(rows):
            ax.plot(
                np.stack([start[:, 0], end[:, 0]]),
                np.stack([start[:, 1], end[:, 1]]),
                color=colour,
                alpha=alpha,
                lw=0.7,
            )
            x, y = np.concatenate([start, end]).T
            ax.scatter(x, y, s=5, color=colour, label=label, zorder=3)
    ax.set(title=f"{agree.sum()} of {matched.sum()} matches agree", xticks=[], yticks=[])
    ax.set(xlabel="frame, and the reference")
    _finish(ax)
    ax.grid(False)
    return figure
