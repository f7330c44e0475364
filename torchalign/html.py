"""A report as one HTML file: numbers, pictures, and a table of every frame to sort and to filter.

The file is complete in itself: pictures and script are inside, nothing is fetched, and a content security policy
forbids it to try. It is read on a phone as on a desk, by keyboard and by screen reader, and printed.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Hashable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from torchalign import plot
from torchalign._check import message
from torchalign.cube.files import atomic, check_free
from torchalign.cube.labels import find_dims, time_labels
from torchalign.cube.solution import summarize
from torchalign.cube.tables import write_csv
from torchalign.pictures import frames
from torchalign.pictures.columns import (
    Array,
    Columns,
    by_status,
    check_pictured,
    is_series,
    kept_frames,
    read_columns,
    status_of,
    sun_known,
)
from torchalign.pictures.frames import Label
from torchalign.pictures.style import STATUS_COLOUR, STATUS_TEXT_COLOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

__all__ = ["save_html", "to_html"]


def __dir__() -> list[str]:
    return sorted(__all__)


_MEANING = {
    "OK": "aligned",
    "TOO_FAR": "the shift that was found is larger than allowed",
    "NOT_CONVERGED": "no stable, distinct optimum was found",
    "NO_TEXTURE": "flat, empty or wholly masked",
    "TOO_FEW_MATCHES": "not enough agreeing matches",
    "NOT_BETTER": "would not correlate better than as it came",
    "LOW_SCORE": "correlates too little with the reference",
    "AMBIGUOUS": "more than one place fits",
    "NOT_CONNECTED": "no consistent chain of pairs ties it to the other frames",
}
_WINDOW = 512  # pixels: pictures are of at most so many rows and columns, in the frame's middle
_PICTURED = 6_000_000  # pixels of all frames in the median and the profiles; of 512 × 512, that is 22 frames
_FEWEST, _MOST = 8, 96  # of these frames
_THUMBNAILS, _THUMBNAIL = 400, 96  # frames at most that get one, and its longer side in pixels
_TOO_MANY = f"No pictures of single frames: there are more than {_THUMBNAILS}."
_RESIDUALS = "What each pair says less what the positions say: how well pairs agree, no accuracy."
_SUN = "Shift along the shadow against the sun's height: what follows it is no displacement of the frame."
_MAGNIFIED = 400  # pixels: smaller pictures are drawn with square pixels
_DOTS = 130  # an inch, of the charts


class _Picture(NamedTuple):
    source: str  # a data URI
    alt: str
    caption: str = ""
    wide: bool = False
    lazy: bool = False


class _Tile(NamedTuple):
    """A number on top of the page."""

    name: str
    value: str
    unit: str = ""
    detail: str = ""


class _Parts(NamedTuple):
    """What the pictures show: of the cubes, in memory, and of the report; in words where that is not all."""

    before: xr.DataArray
    after: xr.DataArray
    bands: list[Any] | None  # what they hold, by label
    report: xr.Dataset
    words: str


class _Column(NamedTuple):
    """Of the table: a heading, what it means, and a number a frame (NaN: none) with its format."""

    heading: str
    meaning: str
    values: Array
    form: str


def save_html(
    report: xr.Dataset,
    path: str | Path,
    cube: xr.DataArray | None = None,
    aligned: xr.DataArray | None = None,
    *,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write :func:`to_html`, whole or not at all.

    Args:
        report: from :func:`torchalign.align`, or :func:`torchalign.load_report`.
        path: ending in .html or .htm.
        cube: what was aligned, for the pictures.
        aligned: what came back.
        overwrite: replace a file that is there.
        options: of :func:`to_html`.

    Returns:
        The path.

    Raises:
        TypeError: as :func:`to_html`.
        ValueError: another suffix; as :func:`to_html`.
        FileExistsError: the file is there.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(message("path", "a name ending in .html or .htm", path.name, "rename it"))
    check_free(path, overwrite)
    page = to_html(report, cube, aligned, **options)
    with atomic(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def to_html(
    report: xr.Dataset,
    cube: xr.DataArray | None = None,
    aligned: xr.DataArray | None = None,
    *,
    title: str | None = None,
    bands: Sequence[Hashable] | None = None,
    split: Label | None = None,
    stretch: tuple[float, float] = (1.0, 99.0),
) -> str:
    """The page as text; numbers alone, or with a cube also how it looks before and after.

    A large cube is looked at in part: pictures are of at most 512 × 512 pixels in the frame's middle and of 8 to
    96 of the aligned frames, one loaded after the other. What is shown is said beside it.

    Args:
        report: from :func:`torchalign.align`, or :func:`torchalign.load_report`.
        cube: what was aligned; may be lazy.
        aligned: what came back; may be lazy, but is then computed in part for every picture: write it first.
        title: of the page; default: how many frames were aligned.
        bands: as in :func:`torchalign.plot.before_after`.
        split: as in :func:`torchalign.plot.shift_scatter`.
        stretch: as in :func:`torchalign.plot.before_after`.

    Returns:
        HTML.

    Raises:
        TypeError: the report is no Dataset, a cube no DataArray.
        ValueError: the report lacks a field; it is another cube's; ``aligned`` without ``cube``, or of another
            shape.

    Example:
        >>> zeros = xr.Variable("time", np.zeros(3))
        >>> fields = ["shift_x", "shift_y", "score", "score_before", "sigma", "status"]
        >>> warp = xr.Variable(("time", "row", "col"), np.eye(2, 3)[None].repeat(3, 0))
        >>> page = to_html(xr.Dataset({**dict.fromkeys(fields, zeros), "warp": warp}))
        >>> "3 of 3 frames aligned" in page, "://" in page
        (True, False)
    """
    found = read_columns(check_pictured(report).compute())
    report, codes, done = found.report, found.status, int(found.ok.sum())
    if cube is None and aligned is not None:
        raise ValueError(message("cube", "what was aligned, beside what came back", None, "give both"))
    if cube is not None:
        count, *_ = frames.check_same(cube, cube if aligned is None else aligned)
        status_of(report, count)
    import jinja2  # comes with torch

    statuses = {
        code: {"name": code.name, "colour": STATUS_COLOUR[code], "dark": STATUS_TEXT_COLOUR[code],
               "meaning": _MEANING[code.name], "frames": int(chosen.sum())}
        for code, chosen in by_status(codes)
    }  # fmt: skip
    columns, labels = _columns(found), time_labels(report["status"], report["status"].dims[0])
    folder = resources.files("torchalign").joinpath("assets")
    template, style, script = (
        folder.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    parts = None
    if cube is not None and aligned is not None and codes.size:
        parts = _load_parts(report, cube, aligned, bands)
    pictured = cube is not None and codes.size <= _THUMBNAILS
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    return page.render(
        title=f"{done} of {codes.size} frames aligned" if title is None else title,
        version=report.attrs.get("torchalign_version", ""),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        origin=_origin(report, labels),
        tiles=_tiles(found),
        statuses=list(statuses.values()),
        comparison=None if parts is None else _comparison(parts, stretch),
        charts=_charts(found, split, parts, stretch),
        time=report["status"].dims[0],
        columns=columns,
        rows=[
            {"label": label, "status": statuses[code], "cells": cells}
            for label, code, *cells in zip(labels, codes, *map(_cells, columns), strict=True)
        ],
        thumbnails=_thumbnails(report, cube, bands, stretch) if cube is not None and pictured else [],
        flagged=codes.size - done,
        pictured=pictured,
        note=_TOO_MANY if cube is not None and not pictured else "",
        csv=_csv(report),
        attributes={
            name: ", ".join(map(str, np.ravel(value))) if isinstance(value, np.ndarray) else value
            for name, value in report.attrs.items()
        },
    )


# --- the numbers on top ---


def _origin(report: xr.Dataset, labels: list[str]) -> str:
    words = [f"{labels[0]} to {labels[-1]}"] if labels else []
    # of the aligner its name; its options are at the end of the page
    words += [
        f"{name} {str(report.attrs[name]).partition('(')[0]}"
        for name in ("reference", "aligner")
        if name in report.attrs
    ]
    return " · ".join(words)


def _tiles(found: Columns) -> list[_Tile]:
    summary = summarize(found.report)

    def median(name: str) -> float:
        values = found.report[name].values[found.ok]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else np.nan

    def length(name: str, pixels: float, metres: float = np.nan, detail: str = "") -> _Tile:
        if not np.isfinite(pixels):
            return _Tile(name, "–")
        return _Tile(name, f"{pixels:.3f}", "px", f"{metres:.3g} m" if np.isfinite(metres) else detail)

    count, of = int(found.ok.sum()), found.ok.size
    tiles = [
        _Tile("frames aligned", str(count), f"of {of}", f"{count / max(of, 1):.0%}"),
        length("median shift", summary.shift_median, summary.shift_median_metres),
        length("95 % of the shifts are below", summary.shift_p95, summary.shift_p95_metres),
        length("median σ, the predicted error", median("sigma"), detail="per axis"),
    ]
    before, after = median("score_before"), median("score")
    if np.isfinite([before, after]).all():
        words = "median correlation with the reference"
        tiles.append(_Tile(words, f"{before:.3f} → {after:.3f}", detail="before → after"))
    if np.isfinite(summary.residual_median):
        tiles.append(length("median residual, measured again", summary.residual_median))
        tiles.append(length("CE90: 90 % of the residuals are below", summary.ce90, summary.ce90_metres))
    return tiles


# --- pictures ---


def _comparison(parts: _Parts, stretch: tuple[float, float]) -> dict[str, Any]:
    """Two pictures of the median, which the script lays on one another."""
    pair = frames.compare(parts.before, parts.after, parts.bands, "median", None, parts.report, stretch, None)
    gains = f" {', '.join(pair.gains).capitalize()}." if pair.gains else ""
    return {
        "words": f"The {pair.words}{parts.words}.{gains}",
        "small": max(pair.pictures[0].shape[:2]) <= _MAGNIFIED,
        "pictures": [
            _Picture(_jpeg(picture), f"The {pair.words}, {name} alignment", name.capitalize())
            for picture, name in zip(pair.pictures, ("before", "after"), strict=True)
        ],
    }


def _charts(
    found: Columns, split: Label | None, parts: _Parts | None, stretch: tuple[float, float]
) -> list[_Picture]:
    report, shift = found.report, found.shift[found.ok]
    count, reach, worst = f"{len(shift)} aligned frames", "", ""
    if len(shift):
        (left, up), (right, down) = shift.min(0), shift.max(0)
        reach = f": x from {left:+.2f} to {right:+.2f}, y from {up:+.2f} to {down:+.2f} pixels"
        reach = reach.replace("-", "−")
        worst = f"; the lowest of an aligned frame is {report['score'].values[found.ok].min():.2f} after"
    charts = [
        _chart(plot.shift_scatter(report, split=split), f"Shifts of {count}{reach}."),
        _chart(plot.score_gain(report), f"Correlation with the reference, before and after{worst}."),
        _chart(plot.shifts_over_time(report), f"Shift x and y of {count} along time, with σ{reach}.", True),
    ]
    if "local_shift_p95" in report and "field" in report and report["local_shift_p95"].any():
        most = f"up to {report['local_shift_p95'].values.max():.2f} pixels (95 % of a frame)"
        caption = f"Local shifts on top of the warp, {most}; the frame where they are largest."
        charts.append(_chart(plot.local_shifts(report), caption, True))
    charts += _series_charts(report)
    if parts is not None and len(shift):
        options: dict[str, Any] = {"report": parts.report, "bands": parts.bands, "stretch": stretch}
        figure = plot.temporal_profile(parts.before, parts.after, **options)
        caption = (
            f"One row and one column along time{parts.words}: edges that wiggle before run straight after."
        )
        charts.append(_chart(figure, caption, True))
    return charts


def _series_charts(report: xr.Dataset) -> list[_Picture]:
    """Of a series without a reference; none of another."""
    if not is_series(report):
        return []
    count = np.size(report.attrs["pair_moving"])
    charts = [
        _chart(plot.network(report), f"{count} pairs of frames, from which all positions follow.", True),
        _chart(plot.pair_residuals(report), _RESIDUALS),
    ]
    if sun_known(report):
        charts.append(_chart(plot.sun_shift(report), _SUN))
    return charts


def _load_parts(
    report: xr.Dataset, cube: xr.DataArray, aligned: xr.DataArray, bands: Sequence[Hashable] | None
) -> _Parts:
    sizes = [cube.sizes[find_dims(cube, "cube")[role]] for role in ("y", "x")]
    height, width = (min(size, _WINDOW) for size in sizes)
    chosen = _chosen_frames(report, min(max(_PICTURED // max(height * width, 1), _FEWEST), _MOST))
    words = f", the {height} × {width} pixels in the middle of {sizes[0]} × {sizes[1]}"
    before, after = (_middle_of(each, chosen, (height, width), bands) for each in (cube, aligned))
    few = report.isel({report["status"].dims[0]: chosen})
    dim = find_dims(before).get("band")
    shown = None if dim is None else before[dim].values.tolist()
    return _Parts(before, after, shown, few, "" if [height, width] == sizes else words)


def _middle_of(
    cube: xr.DataArray, numbers: list[int], size: tuple[int, int], bands: Sequence[Hashable] | None
) -> xr.DataArray:
    """Of the frames the (height, width) in the middle and the bands to display, loaded frame by frame."""
    dims = find_dims(cube, "cube")
    starts = [(cube.sizes[dims[role]] - length) // 2 for role, length in zip(("y", "x"), size, strict=True)]
    rows, columns = (slice(start, start + length) for start, length in zip(starts, size, strict=True))
    part = cube.isel({dims["y"]: rows, dims["x"]: columns})
    if "band" in dims:
        shown = frames.display_bands(cube, dims["band"], bands)
        part = part.isel({dims["band"]: shown})
        if dims["band"] not in part.coords:  # they keep their numbers
            part = part.assign_coords({dims["band"]: shown})
    return xr.concat([part.isel({dims["time"]: [n]}).load() for n in numbers], dims["time"])


def _chosen_frames(report: xr.Dataset, most: int = _MOST) -> list[int]:
    """Positions, evenly spread, of aligned frames; of all where none is."""
    numbers = np.flatnonzero(kept_frames(report["status"].values))
    spread = np.linspace(0, len(numbers) - 1, min(len(numbers), most)).round().astype(int)
    return [int(number) for number in numbers[spread]]


def _thumbnails(
    report: xr.Dataset, cube: xr.DataArray, bands: Sequence[Hashable] | None, stretch: tuple[float, float]
) -> list[_Picture]:
    """A small picture of every frame as it came, in the colours of the median of the aligned ones."""
    dims = find_dims(cube, "cube")
    step = max(1, -(-max(cube.sizes[dims["y"]], cube.sizes[dims["x"]]) // _THUMBNAIL))
    small = cube.isel({dims["y"]: slice(step // 2, None, step), dims["x"]: slice(step // 2, None, step)})
    count = cube.sizes[dims["time"]]
    shown = [
        frames.load_frames(small.isel({dims["time"]: [n]}), "cube", bands).values[0] for n in range(count)
    ]
    if not shown:
        return []
    low, high = frames.median_limits(np.stack([shown[n] for n in _chosen_frames(report)]), stretch)
    sources = [_jpeg(frames.to_rgb(frame, low, high, clouds=True), quality=75) for frame in shown]
    return [_Picture(source, f"Frame {number}", lazy=True) for number, source in enumerate(sources)]


def _chart(figure: Figure | SubFigure, caption: str, wide: bool = False) -> _Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS)  # type: ignore[union-attr]
    return _Picture(_data(buffer.getvalue(), "image/png"), caption, caption, wide)


def _jpeg(picture: Array, quality: int = 92) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return _data(buffer.getvalue(), "image/jpeg")


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- one row a frame ---


def _columns(found: Columns) -> list[_Column]:
    report, length = found.report, np.where(found.ok, np.hypot(*found.shift.T), np.nan)

    def of(name: str, *, flagged: bool = False) -> Array:
        values = report[name].values.astype(np.float64)
        return np.where(np.isfinite(values) & (found.ok | flagged), values, np.nan)

    columns = [
        _Column("shift x", "pixels, to the right", of("shift_x"), "+.3f"),
        _Column("shift y", "pixels, downwards", of("shift_y"), "+.3f"),
        _Column("length", "of the shift, in pixels", length, ".3f"),
        _Column("σ", "predicted error per axis, in pixels", of("sigma"), ".3f"),
        _Column("score before", "correlation with the reference", of("score_before", flagged=True), ".3f"),
        _Column("score after", "correlation with the reference", of("score", flagged=True), ".3f"),
    ]
    if "shift_x_metres" in report and "shift_y_metres" in report:
        columns[2:2] = [
            _Column("x metres", "shift towards greater x of the map", of("shift_x_metres"), "+.2f"),
            _Column("y metres", "shift towards greater y of the map", of("shift_y_metres"), "+.2f"),
        ]
    if "residual_x" in report and "residual_y" in report:
        left = np.hypot(of("residual_x"), of("residual_y"))
        columns.append(_Column("residual", "length of what is left, measured again, in pixels", left, ".3f"))
    return columns


def _cells(column: _Column) -> list[tuple[str, str]]:
    """Of every frame a number to sort by, and as it is read."""

    def cell(value: float) -> tuple[str, str]:
        if not np.isfinite(value):
            return "", "–"
        text = f"{value:{column.form}}"
        text = text if float(text) else text.lstrip("+-")  # zero has no sign
        return f"{value:.7g}", text.replace("-", "−")

    return [cell(value) for value in column.values]


def _csv(report: xr.Dataset) -> str:
    """What :func:`torchalign.load_report` reads."""
    with io.StringIO() as text:
        write_csv(report, text)
        return _data(text.getvalue().encode(), "text/csv")
