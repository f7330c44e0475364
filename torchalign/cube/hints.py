"""What looks wrong beforehand: a fill that nobody declared, a mask the wrong way round, a reference without pixels.

A few thousand pixels of every frame are looked at; a cube of dask's chunks is not, for it would be computed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr

from torchalign.cube.chunks import is_lazy
from torchalign.cube.labels import CUBE, MASK, Array, Cube, load
from torchalign.cube.pixels import Pixels
from torchalign.cube.reference import ReferenceSource

_SAMPLES = 96  # along y and along x
_FRAMES = 24  # that are looked at
_SHARE = 0.01  # of the pixels that a fill covers, at least
_APART = 0.5  # of the range of the others (1 to 99 %): so far below them is a fill
_SENTINELS = (32767, 65535, 2**31 - 1)  # above the others a fill is one of these; saturated clouds are others
_FEWEST, _LEVELS = 50, 10  # pixels, and values of them, that tell anything
_NOISIER = 3.0  # so many times what is masked out do pixels under an inverted mask vary


def give_hints(
    cube: Cube, pixels: Pixels, usable: xr.Variable | None, reference: ReferenceSource | None = None
) -> list[str]:
    """Sentences, one for each thing that looks wrong, each also as a ``UserWarning``."""
    found = _find_hints(cube, pixels, usable, reference)
    for hint in found:
        warnings.warn(hint, UserWarning, stacklevel=4)
    return found


def _find_hints(
    cube: Cube, pixels: Pixels, usable: xr.Variable | None, reference: ReferenceSource | None
) -> list[str]:
    if min(cube.sizes.values()) < 1:
        return []
    known = None if usable is None or is_lazy(usable) else usable
    if known is not None and not bool(known.any()):
        return [
            "mask: no pixel is usable (all False), so no frame can be aligned; True = usable, a cloud mask "
            "with 1 = cloud becomes `clouds == 0`"
        ]
    hints = []
    if reference is not None and reference.is_empty:
        hints += [
            f"reference: {reference.name} has no usable pixel (all is nodata, NaN or masked), so no frame can be "
            'aligned; use another date, or "clearest"'
        ]
    if is_lazy(cube.array):
        return hints
    seen = None if known is None else _sample_pixels(known, MASK, cube)
    values = _sample_pixels(cube.variable, CUBE, cube)[:, 0]
    seen = None if seen is None else np.broadcast_to(seen, values.shape)
    valid = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    for value in pixels.nodata:
        valid &= values != value
    inverted = [] if seen is None else _looks_inverted(values, valid, seen)
    valid = valid if seen is None else valid & seen
    # where no frame has any there is no other to name
    return (hints if valid.any() else []) + inverted + _undeclared_fill(values, valid)


def _sample_pixels(variable: xr.Variable, roles: tuple[str, ...], cube: Cube) -> Array:
    """Some pixels of some frames, of the first band."""
    parts = {"band": slice(0, 1)} if "band" in roles else {}
    for role, limit in (("time", _FRAMES), ("y", _SAMPLES), ("x", _SAMPLES)):
        parts[role] = slice(None, None, max(1, cube.sizes[role] // limit))
    return load(variable, roles, **parts)


def _undeclared_fill(values: Array, valid: Array) -> list[str]:
    """One value at an end of the range over a part of a frame: far from all others, or in the same place always."""
    found: dict[Any, int] = {}
    for frame, known in zip(values, valid, strict=True):
        inside = frame[known]
        if len(inside) < _FEWEST:
            continue
        for end in (inside.min(), inside.max()):
            others = inside[inside != end].astype(np.float64)
            if len(inside) - len(others) < _SHARE * frame.size or len(others) < _FEWEST:
                continue
            low, high = np.percentile(others, (1, 99))
            if len(np.unique(others)) < _LEVELS:  # a classification, or a picture in black and white
                continue
            gap = others.min() - float(end) if end < others[0] else float(end) - others.max()
            far = gap > _APART * (high - low) and (end < others[0] or end in _SENTINELS or end > 1e30)
            if far or _stays(values, valid, end):
                found[end] = found.get(end, 0) + 1
    return [
        f"datacube: the value {value} covers a part of {frames} of {len(values)} frames looked at and is not "
        f"declared as nodata; if it is a fill, declare it: datacube.attrs['_FillValue'] = {value}"
        for value, frames in found.items()
    ]


def _stays(values: Array, valid: Array, value: Any) -> bool:
    """Whether a value covers the same pixels in every frame: the outline of clouds and water moves."""
    covered = (values == value) & valid
    always = covered.all(0).sum()
    return len(values) > 1 and always >= _SHARE * covered[0].size and covered.any(0).sum() <= 1.02 * always


def _looks_inverted(values: Array, valid: Array, seen: Array) -> list[str]:
    """Clouds vary from frame to frame, ground hardly does."""
    if len(values) < 3 or seen.mean() > 0.6:
        return []
    series = np.where(valid, values, np.nan).astype(np.float64)
    known = valid.any(0)
    middle = np.nanmedian(np.where(known, series, 0.0), 0)
    apart = np.abs(series - middle)
    inside, outside = apart[valid & seen], apart[valid & ~seen]
    if min(len(inside), len(outside)) < _FEWEST:
        return []
    if np.median(inside) <= _NOISIER * np.median(outside):
        return []
    return [
        f"mask: what it calls usable ({seen.mean():.0%}) varies from frame to frame more than what it leaves "
        "out, as clouds do; if 1 = cloud, pass `mask == 0`"
    ]
