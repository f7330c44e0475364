"""A cube's frames as pictures: bands chosen, stretched to colours, reduced over time, compared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import xarray as xr

from torchalign._check import check_option, message
from torchalign.cube.labels import find_bands, find_dims, find_frame, time_labels
from torchalign.cube.pixels import find_nodata
from torchalign.pictures.columns import Array, kept_frames, status_of
from torchalign.types import Status

Statistic = Literal["median", "mean"]
Zoom = tuple[int, int, int]  # row and column of the top left pixel, and the side, of a square
Label = Hashable  # of a frame, a position or an entry of the time coordinate

_RGB_NAMES = (("B04", "B03", "B02"), ("B4", "B3", "B2"), ("red", "green", "blue"), ("R", "G", "B"))
_RGB_BANDS = (3, 2, 1)  # Sentinel-2 with all its bands, as everywhere in the library
NODATA_GREY = 0.15
_ROWS_BYTES = 2**23  # of frames that are reduced over time at once
_KNEE = 0.7  # of the display range; above it clouds are compressed instead of cut
_SHADE = 0.15  # of the display range; so much below black, shadows of clouds still differ


class FrameImages(NamedTuple):
    """A cube's display bands, (T, H, W, 3) float32, NaN for nodata, and the labels of its frames."""

    values: Array
    labels: list[str]
    bands: str


class Comparison(NamedTuple):
    """Pictures before and after, (H, W, 3) in 0 … 1; the part to magnify; what is gained and seen, in words."""

    pictures: list[Array]
    zoom: Zoom
    gains: list[str]
    words: str


def check_same(
    cube: xr.DataArray, aligned: xr.DataArray, *, may_be_empty: bool = True
) -> tuple[int, int, int]:
    """(T, H, W) of both."""
    shapes = []
    for array, name in ((cube, "cube"), (aligned, "aligned")):
        dims = find_dims(array, name)
        shapes.append((array.sizes[dims["time"]], array.sizes[dims["y"]], array.sizes[dims["x"]]))
    if shapes[0] != shapes[1]:
        expected = f"the cube's frames, rows and columns {shapes[0]}"
        raise ValueError(message("aligned", expected, shapes[1], "give the pair of one ta.align"))
    if not (shapes[0][0] or may_be_empty):
        raise ValueError(message("cube", "at least one frame", "none", "give a cube with frames"))
    return shapes[0]


def load_frames(cube: xr.DataArray, name: str, bands: Sequence[Hashable] | None) -> FrameImages:
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
    values = np.broadcast_to(values if "band" in dims else values[..., None], (*values.shape[:3], 3))
    return FrameImages(values, time_labels(cube, dims["time"]), words)


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


def reduce_time(values: Array, statistic: Statistic) -> Array:
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


def median_limits(values: Array, stretch: tuple[float, float]) -> tuple[Array, Array]:
    """Black and white of the median of frames (T, H, W, 3)."""
    return limits(reduce_time(values, "median"), stretch)


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
) -> Comparison:
    """The cube before and after, over time or of one frame, in the same colours; flagged frames left out."""
    check_option("statistic", statistic, Statistic)
    count, *_ = check_same(cube, aligned)
    before, after = load_frames(cube, "cube", bands), load_frames(aligned, "aligned", bands)
    status = status_of(report, count)
    kept = kept_frames(status)
    if frame is not None:
        kept = np.arange(count) == find_frame(cube, find_dims(cube)["time"], frame)
    pictures = [reduce_time(frames.values[kept], statistic) for frames in (before, after)]
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
    return Comparison([to_rgb(picture, low, high) for picture in pictures], zoom, gains, words)
