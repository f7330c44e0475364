r"""Keypoints of whole stacks in fixed shapes: the K highest local maxima of score maps, to a fraction of a pixel.

The chain, each link a function that works alone:

1. :func:`stretch_contrast`: every frame's 1st and 99th percentile become 0 and 1, whatever its units.
2. :func:`strict_maxima`, :func:`erode`: where a keypoint may be: a maximum of its neighbourhood, away from the
   border and from what is not usable.
3. :func:`highest`: the K highest of them, always K rows; what is missing is marked invalid.
4. :func:`quadratic_offset`: their place between the pixels. Keypoints on whole pixels would lock every estimate of
   a shift to the grid (0.36 px off, measured).

No shape depends on the data, so nothing here waits for a GPU, and the chain compiles into one graph.

Convention:
    points (x, y) in pixels, integers at pixel centres; maps (B, H, W); masks bool, True = usable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["erode", "highest", "pixel_of", "quadratic_offset", "stretch_contrast", "strict_maxima"]

# Percentiles are taken over about this many pixels a side: more would not move them.
_SAMPLED_SIDE = 128
# A frame whose percentiles lie closer than this many roundings of their size is flat.
_FLAT = 64
# Frames with less than this share of usable pixels are empty.
_MIN_USABLE = 1 / 64


def stretch_contrast(image: Tensor, usable: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale every frame between its 1st and 99th percentile to [0, 1], over its usable pixels; the rest is clamped.

    Unusable pixels get the frame's middle (its median), which has the least contrast with what is around them.

    Args:
        image: (B, H, W), float32 or float64, of any range; NaN and ±inf count as unusable.
        usable: (B, H, W) bool, or ``None``.

    Returns:
        ``(stretched, usable, empty)``: (B, H, W) in [0, 1], never NaN; (B, H, W) bool; (B,) bool, frames that are
        flat or have hardly a usable pixel, and are 0 all over.

    Example:
        >>> frame = torch.arange(101.0).mul(80).reshape(1, 1, 101)
        >>> stretched, _, empty = stretch_contrast(frame)
        >>> [round(v, 3) for v in stretched[0, 0, [0, 1, 50, 99, 100]].tolist()], empty.item()
        ([0.0, 0.0, 0.5, 1.0, 1.0], False)
    """
    finite = image.isfinite()
    usable = finite if usable is None else usable & finite
    image = torch.where(usable, image, 0.0)
    height, width = image.shape[-2:]
    steps = (max(1, height // _SAMPLED_SIDE), max(1, width // _SAMPLED_SIDE))
    some = usable[:, :: steps[0], :: steps[1]].flatten(1)
    values = image[:, :: steps[0], :: steps[1]].flatten(1)
    values = values.masked_fill(~some, torch.inf).sort(-1).values
    last = (some.sum(-1, keepdim=True) - 1).clamp(min=0)

    def percentile(share: float) -> Tensor:
        return values.gather(-1, (last * share).round().long())

    bottom, middle, top = percentile(0.01), percentile(0.5), percentile(0.99)
    span = top - bottom
    # not isfinite: without a usable pixel the percentiles are inf
    rounding = torch.finfo(image.dtype).eps * torch.maximum(top.abs(), bottom.abs())
    empty = ~(span > _FLAT * rounding) | ~span.isfinite()
    empty = empty | (usable.flatten(1).to(image).mean(-1, keepdim=True) < _MIN_USABLE)
    scale = torch.where(empty, 1.0, span).unsqueeze(-1)
    base, middle = (torch.where(empty, 0.0, value).unsqueeze(-1) for value in (bottom, middle))
    stretched = ((torch.where(usable, image, middle) - base) / scale).clamp(0, 1)
    return stretched.masked_fill(empty.unsqueeze(-1), 0.0), usable, empty.squeeze(-1)


def strict_maxima(scores: Tensor, radius: int) -> Tensor:
    """(..., H, W) bool: where a score exceeds every other within ``radius`` pixels in x and y; plateaus have none.

    Beyond the border there is nothing.

    Example:
        >>> strict_maxima(torch.tensor([[0.0, 2.0, 1.0, 3.0, 3.0]]), 1).int()
        tensor([[0, 1, 0, 0, 0]], dtype=torch.int32)
    """
    if radius == 0:
        return scores > -torch.inf
    height, width = scores.shape[-2:]
    padded = F.pad(scores, (radius,) * 4, value=-torch.inf)
    # the other rows of the own column, then all rows of the other columns
    lines = running_largest(padded, radius, -2)
    beside = torch.maximum(lines.narrow(-2, 0, height), lines.narrow(-2, radius + 1, height))
    column = torch.maximum(beside, padded.narrow(-2, radius, height))
    others = running_largest(column, radius, -1)
    others = torch.maximum(others.narrow(-1, 0, width), others.narrow(-1, radius + 1, width))
    return scores > torch.maximum(others, beside.narrow(-1, radius, width))


def running_largest(maps: Tensor, length: int, dim: int) -> Tensor:
    """The largest of ``length`` neighbours from each on, by doubling: 1 + log₂ of it many maxima."""
    samples, reached = maps.shape[dim] - length + 1, 1
    while 2 * reached <= length:
        count = maps.shape[dim] - reached
        maps = torch.maximum(maps.narrow(dim, 0, count), maps.narrow(dim, reached, count))
        reached *= 2
    if reached == length:
        return maps
    return torch.maximum(maps.narrow(dim, 0, samples), maps.narrow(dim, length - reached, samples))


def erode(usable: Tensor, radius: int) -> Tensor:
    """(..., H, W) bool: usable, and so is all within ``radius`` pixels in x and y. The border does not count.

    Example:
        >>> erode(torch.tensor([[True, True, True, False]]), 1)
        tensor([[ True,  True, False, False]])
    """
    bad = F.pad((~usable).to(torch.uint8), (radius,) * 4)
    for dim in (-2, -1):
        bad = running_largest(bad, 2 * radius + 1, dim)
    return bad == 0


def dilate(area: Tensor, radius: int) -> Tensor:
    """(..., H, W) bool: within ``radius`` pixels in x and y of the area.

    Example:
        >>> dilate(torch.tensor([[True, False, False, False]]), 1)
        tensor([[ True,  True, False, False]])
    """
    return ~erode(~area, radius)


def highest(scores: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of scores (B, N) in every row where allowed, (B, N) bool, in descending order.

    Returns:
        ``(value, index)``, both (B, count): -inf and an index of no meaning (0 … N - 1) where there are fewer.

    Example:
        >>> value, index = highest(torch.tensor([[1.0, 9.0, 5.0]]), torch.tensor([[True, False, True]]), 3)
        >>> value.tolist(), index[0, :2].tolist()
        ([[5.0, 1.0, -inf]], [2, 0])
    """
    found = min(count, scores.shape[-1])
    value, index = scores.masked_fill(~allowed, -torch.inf).topk(found, -1)
    missing = (0, count - found)
    return F.pad(value, missing, value=-torch.inf), F.pad(index, missing)


def pixel_of(index: Tensor, width: int) -> Tensor:
    """(..., 2) int64, (x, y), of places in a flattened map of that width."""
    return torch.stack((index % width, index.div(width, rounding_mode="floor")), -1)


def quadratic_offset(scores: Tensor, index: Tensor) -> Tensor:
    r"""How far from its pixel a maximum lies: that of the quadratic through its 3 × 3 neighbourhood.

    .. math:: \delta = -H^{-1} g

    with gradient g and Hessian H by central differences. Where they describe no maximum: per axis, without the
    mixed term; at most half a pixel: (B, K, 2), (x, y) in [-½, ½], of places (B, K) in flattened maps.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
        >>> bump = -((x - 2.3) ** 2) - 2 * (y - 1.9) ** 2 + 0.5 * (x - 2.3) * (y - 1.9)
        >>> quadratic_offset(bump[None], torch.tensor([[12]])).round(decimals=3)
        tensor([[[ 0.3000, -0.1000]]])
    """
    height, width = scores.shape[-2:]
    x, y = pixel_of(index, width).unbind(-1)
    x, y = x.clamp(1, max(width - 2, 1)), y.clamp(1, max(height - 2, 1))
    centre = y * width + x
    flat = scores.flatten(1)

    def at(dx: int, dy: int) -> Tensor:
        return flat.gather(-1, (centre + dy * width + dx).clamp(0, flat.shape[-1] - 1))

    middle = at(0, 0)
    gx, gy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    xx, yy = at(1, 0) + at(-1, 0) - 2 * middle, at(0, 1) + at(0, -1) - 2 * middle
    xy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4
    # a saddle along the diagonal is noise, not a peak
    peaked = xx * yy - xy * xy > 0.1 * xx * yy
    xy = torch.where(peaked, xy, 0.0)
    determinant = xx * yy - xy * xy
    safe = torch.where(determinant > 0, determinant, 1.0)
    offset = torch.stack((xy * gy - yy * gx, xy * gx - xx * gy), -1) / safe.unsqueeze(-1)
    found = (determinant > 0) & offset.isfinite().all(-1)
    return torch.where(found.unsqueeze(-1), offset, 0.0).clamp(-0.5, 0.5)
