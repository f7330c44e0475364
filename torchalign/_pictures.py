"""What a picture of an alignment is made of: a cube's frames as colours, a report's columns as numbers.

Private: :mod:`torchalign.plot` and :mod:`torchalign.html` draw with it. Colours are those of Okabe and Ito,
told apart with any colour vision; a status differs in its marker too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from torchalign._check import message
from torchalign.cube.labels import find_bands, find_dims, find_frame, time_labels
from torchalign.cube.pixels import find_nodata
from torchalign.types import Status

Statistic = Literal["median", "mean"]
Zoom = tuple[int, int, int]  # row and column of the top left pixel, and the side, of a square
Label = Hashable  # of a frame, a position or an entry of the time coordinate
Array = NDArray[Any]

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY, INK = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C", "#222222"

STATUS_COLOUR = {
    Status.OK: BLUE,
    Status.TOO_FAR: ORANGE,
    Status.NOT_CONVERGED: PURPLE,
    Status.NO_TEXTURE: GREY,
    Status.TOO_FEW_MATCHES: YELLOW,
    Status.NOT_BETTER: VERMILLION,
    Status.LOW_SCORE: SKY,
}
STATUS_MARKER = {
    Status.OK: "o",
    Status.TOO_FAR: "^",
    Status.NOT_CONVERGED: "X",
    Status.NO_TEXTURE: "s",
    Status.TOO_FEW_MATCHES: "P",
    Status.NOT_BETTER: "D",
    Status.LOW_SCORE: "v",
}
# the same hues as text on white, with a contrast of 4.5 : 1 at least
_TEXT_COLOUR = {
    Status.OK: BLUE,
    Status.TOO_FAR: "#8A5F00",
    Status.NOT_CONVERGED: "#A3487A",
    Status.NO_TEXTURE: "#666666",
    Status.TOO_FEW_MATCHES: "#6F6600",
    Status.NOT_BETTER: "#AE4A00",
    Status.LOW_SCORE: "#1F6F9F",
}
_RGB_NAMES = (("B04", "B03", "B02"), ("B4", "B3", "B2"), ("red", "green", "blue"), ("R", "G", "B"))
_RGB_BANDS = (3, 2, 1)  # Sentinel-2 with all its bands, as everywhere in the library
NODATA_GREY = 0.15
_ROWS_BYTES = 2**23  # of frames that are reduced over time at once
_KNEE = 0.7  # of the display range; above it clouds are compressed instead of cut
_SHADE = 0.15  # of the display range; so much below black, shadows of clouds still differ


class Frames(NamedTuple):
    """A cube's display bands, (T, H, W, 3) float32, NaN for nodata, and the labels of its frames."""

    values: Array
    labels: list[str]
    bands: str


class Pair(NamedTuple):
    """Pictures before and after, (H, W, 3) in 0 … 1; the part to magnify; what is gained and seen, in words."""

    pictures: list[Array]
    zoom: Zoom
    gains: list[str]
    words: str


def dark(code: Status) -> str:
    """The status' colour as text: most of the bright ones are unreadable on white."""
    return _TEXT_COLOUR[code]


# --- the cube as pictures ---


def load_frames(cube: xr.DataArray, name: str, bands: Sequence[Hashable] | None) -> Frames:
    """The display bands, in memory; three of them, or one three times."""
    dims = find_dims(cube, name)
    chosen, words = cube, "one band"
    if "band" in dims:
        numbers = display_bands(cube, dims["band"], bands)
        chosen = cube.isel({dims["band"]: numbers})
        labelled = dims["band"] in cube.coords
        words = ("bands " if len(numbers) > 1 else "band ") + ", ".join(
            map(str, chosen[dims["band"]].values if labelled else numbers)
        )
    order = [dims[role] for role in ("time", "y", "x", "band") if role in dims]
    raw = chosen.transpose(*order).to_numpy()
    values = raw.astype(np.float32)
    values[np.isin(raw, find_nodata(cube)) | ~np.isfinite(values)] = np.nan
    values = values if "band" in dims else values[..., None]
    if values.shape[-1] == 1:
        values = values.repeat(3, -1)
    return Frames(values, time_labels(cube, dims["time"]), words)


def display_bands(cube: xr.DataArray, dim: Hashable, bands: Sequence[Hashable] | None) -> list[int]:
    """Positions of the bands to display: those asked for, or red, green and blue."""
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
    chosen = find_bands(bands, labels, count)
    if len(chosen) not in (1, 3):
        cure = "name the bands for red, green and blue"
        raise ValueError(message("bands", "one or three bands", repr(bands), cure))
    return chosen


def over_time(values: Array, statistic: Statistic) -> Array:
    """(T, H, W, 3) → (H, W, 3), NaN where there never was data."""
    reduce = np.nanmedian if statistic == "median" else np.nanmean
    picture = np.full(values.shape[1:], np.nan, values.dtype)
    step = max(1, _ROWS_BYTES // max(1, values[:, :1].nbytes))
    for first in range(0, len(picture), step):  # each of them makes several copies of what it is given
        rows = values[:, first : first + step]
        seen = np.isfinite(rows).any(0)
        filled = np.where(seen, rows, np.zeros((), rows.dtype))  # else NumPy warns of empty slices
        picture[first : first + step] = np.where(seen, reduce(filled, 0), np.nan)
    return picture


def limits(values: Array, stretch: tuple[float, float]) -> tuple[Array, Array]:
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


def to_rgb(values: Array, low: Array, high: Array, *, clouds: bool = False) -> Array:
    """Reflectance to 0 … 1, no data dark grey; with clouds, the bright is compressed instead of cut."""
    if clouds:
        low = low - _SHADE * (high - low)
    linear = (values - low) / (high - low)
    excess = np.maximum(linear - _KNEE, 0)
    rgb = np.minimum(linear, _KNEE) + (1 - _KNEE) * excess / (excess + 1) if clouds else linear
    return np.where(np.isfinite(values), np.clip(rgb, 0, 1), NODATA_GREY).astype(np.float32)


def gradient_length(picture: Array) -> Array:
    """(H, W, 3) → (H, W), NaN beside missing pixels."""
    grey = np.asarray(picture.mean(-1), np.float64)
    if min(grey.shape) < 2:
        return np.zeros_like(grey)
    return np.hypot(*np.gradient(grey))


def sharpness(picture: Array) -> float:
    """Mean length of the gradient."""
    length = gradient_length(picture)
    return float(np.nanmean(length)) if np.isfinite(length).any() else 0.0


def find_zoom(picture: Array) -> Zoom:
    """The most textured square of about a quarter of the frame's shorter side."""
    height, width = picture.shape[:2]
    side = max(1, min(height, width, max(16, min(height, width) // 4)))
    energy = np.nan_to_num(gradient_length(picture)) ** 0.5  # the root: many edges before one strong edge
    total = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    return int(row), int(column), side


def check_zoom(zoom: Zoom, size: tuple[int, ...]) -> Zoom:
    """The square as ints, inside a frame of size (H, W)."""
    if len(zoom) == 3:
        row, column, side = zoom
        if side >= 1 and 0 <= row <= size[0] - side and 0 <= column <= size[1] - side:
            return int(row), int(column), int(side)
    cure = "keep the square inside the frame"
    raise ValueError(message("zoom", f"(row, column, side) within {size[0]} × {size[1]} pixels", zoom, cure))


def crop(values: Array, zoom: Zoom) -> Array:
    """The square of (..., H, W, 3)."""
    row, column, side = zoom
    return values[..., row : row + side, column : column + side, :]


def compare(
    cube: xr.DataArray,
    aligned: xr.DataArray,
    bands: Sequence[Hashable] | None,
    statistic: Statistic,
    frame: Label | None,
    report: xr.Dataset | None,
    stretch: tuple[float, float],
    zoom: Zoom | None,
) -> Pair:
    """The cube before and after, over time or of one frame, in the same colours; flagged frames left out."""
    before, after = load_frames(cube, "cube", bands), load_frames(aligned, "aligned", bands)
    check_same(before, after)
    status = status_of(report, len(before.values))
    kept = status == Status.OK
    if frame is not None:
        kept = np.arange(len(status)) == find_frame(cube, find_dims(cube)["time"], frame)
    if not kept.any():  # better all than none
        kept[:] = True
    pictures = [over_time(frames.values[kept], statistic) for frames in (before, after)]
    low, high = limits(pictures[1], stretch)
    zoom = find_zoom(pictures[1]) if zoom is None else check_zoom(zoom, pictures[1].shape[:2])
    edges = [sharpness(picture) for picture in pictures]
    gains = [f"gradients × {edges[1] / edges[0]:.2f}"] if edges[0] > 0 else []
    if report is not None:
        scores = (float(report[field].values[kept].mean()) for field in ("score_before", "score"))
        gains.insert(0, "correlation {:.2f} → {:.2f}".format(*scores))
    words = f"{statistic} over time of {int(kept.sum())} frames ({before.bands})"
    if frame is not None:
        shown = int(kept.argmax())
        flag = "" if status[shown] == Status.OK else f", not moved: {Status(status[shown]).name}"
        words = f"{before.labels[shown]} ({before.bands}{flag})"
    return Pair([to_rgb(picture, low, high) for picture in pictures], zoom, gains, words)


# --- the report as numbers ---


def check_report(report: object) -> xr.Dataset:
    """A Dataset with the fields that pictures use."""
    if not isinstance(report, xr.Dataset):
        cure = "give the second thing that ta.align returns"
        raise TypeError(message("report", "an xarray.Dataset", type(report).__name__, cure))
    fields = ("shift_x", "shift_y", "score", "score_before", "sigma", "status")
    missing = [name for name in fields if name not in report]
    if missing:
        cure = "give the report of ta.align with all its fields"
        raise ValueError(message("report", f"the fields {', '.join(fields)}", f"none of {missing}", cure))
    return report


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


def check_same(before: Frames, after: Frames) -> None:
    """Both of one number of frames, rows and columns."""
    if before.values.shape != after.values.shape:
        expected = f"the cube's frames, rows and columns {before.values.shape[:3]}"
        raise ValueError(
            message("aligned", expected, after.values.shape[:3], "give the pair of one ta.align")
        )


def status_of(report: xr.Dataset | None, count: int) -> Array:
    """(T,) int64 of the report; all OK without one."""
    if report is None:
        return np.zeros(count, np.int64)
    status = check_report(report)["status"].values.astype(np.int64)
    if len(status) != count:
        raise ValueError(
            message("report", f"{count} frames as the cube", len(status), "give the report of this cube")
        )
    return np.asarray(status)


def shift_of(report: xr.Dataset) -> Array:
    """(T, 2), x and y in pixels."""
    return np.stack([report["shift_x"].values, report["shift_y"].values], -1).astype(np.float64)


def sigma_of(report: xr.Dataset) -> Array:
    """(T,), 0 where nothing can be said: no bar is drawn then."""
    sigma = report["sigma"].values
    return np.where(np.isfinite(sigma), sigma, 0.0)


def time_of(report: xr.Dataset) -> tuple[Array, bool]:
    """Positions along a time axis, and whether they are dates."""
    dim = report["status"].dims[0]
    values = report[dim].values if dim in report.coords else np.arange(report["status"].size)
    if values.dtype.kind == "M":
        return values.astype("datetime64[ms]").astype(object), True
    return (values if values.dtype.kind in "iuf" else np.arange(len(values))), False


def by_status(status: Array) -> list[tuple[Status, Array]]:
    """Each status that occurs, OK first, with its frames as a mask."""
    return [(code, status == code) for code in Status if (status == code).any()]


def status_label(code: Status, chosen: Array) -> str:
    """A status and how many frames have it."""
    return f"{code.name} ({int(chosen.sum())})"
