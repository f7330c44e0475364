r"""What of an image is no ground: fills that nobody declared, hot pixels; and whether it was enlarged.

* :func:`undeclared_fill`: one value over a whole area, with an edge as sharp as a cut.
* :func:`hot_pixels`: single pixels far off all of their neighbours.
* :func:`enlargement`: the factor by which an image was enlarged, told by a sharpness that repeats with it.

Convention:
    Images are (..., H, W) and finite; ``usable`` is bool and broadcastable to them, ``None`` if all is.

References:
    Gallagher 2005, doi:10.1109/CRV.2005.33 (interpolation leaves a periodic variance of second differences).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import all_true, keeps_tables, kernels_for
from torchalign.functional.keypoints import dilate, erode, running_largest
from torchalign.functional.sizes import stride_for

__all__ = [
    "LARGEST_FACTOR",
    "LEAST_ENLARGED",
    "enlargement",
    "exclude_defects",
    "hot_pixels",
    "remove_defects",
    "suspects",
    "suspicious",
    "undeclared_fill",
]

# Enlargements up to this factor are looked for.
LARGEST_FACTOR = 8
# A repeating sharpness stands out of that of the other columns by so many standard deviations.
_LEAST_REPEAT = 5.5
# Of the rows every so many-th, and fewer where so many remain, tell how sharp the columns are.
_THINNED, _LEAST_LINES = 4, 32
# Smaller images, in pixels a side, are not looked at, and not for an enlargement.
_LEAST_SIDE, LEAST_ENLARGED = 24, 32
# An area is constant over squares of so many pixels a side, and fills at least this share of the frame.
_SQUARE, _LEAST_FILL = 5, 0.01
# And leaves at least this share of ground, most of which is of no single value.
_LEAST_GROUND = 0.02
# At a cut the first pixel is as far off the fill as the third; at a shore, or where a sensor saturates, it is not.
_SHARPNESS = 0.8
# A hot pixel is so many times as far off its neighbours along its row and its column as neighbours are on the mean.
_HOT = 10.0


def undeclared_fill(image: Tensor, usable: Tensor | None = None) -> Tensor:
    """Areas of one value, exactly, that end at a cut: what lies outside an area of interest.

    The value is the lowest or the highest that fills a square of 5 × 5 pixels, whatever it is. Water in 8 bits and
    saturated snow are constant too, but their shores are mixed pixels, or fade: they are ground.

    Returns:
        bool, (..., H, W), True where it is filled.

    Example:
        >>> image = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
        >>> image[:, 25:] = 7.0
        >>> undeclared_fill(image).sum(0).tolist() == 25 * [0] + 15 * [40]
        True
    """
    image = image.detach()
    known = None if usable is None else usable.expand(image.shape)
    constant = _constant_squares(image)
    if known is not None:
        constant = constant & erode(known, _SQUARE // 2)
    if all_true(~constant):
        return constant
    least = torch.where(constant, image, torch.inf).amin((-2, -1))
    most = torch.where(constant, image, -torch.inf).amax((-2, -1))
    value = torch.stack((least, most), -1)[..., None, None]  # (..., 2, 1, 1)
    image, alike = image.unsqueeze(-3), image.unsqueeze(-3) == value
    constant = constant.unsqueeze(-3)
    # squares to their pixels, and on to those of the same value beside them, which no square reaches
    area = alike & dilate(constant & alike, 2 * (_SQUARE // 2))
    if known is not None:
        known = known.unsqueeze(-3)
        area = area & known
    one = dilate(area, 1)
    two = dilate(one, 1)
    distance = (image - value).abs()

    def away(ring: Tensor) -> Tensor:
        ring = ring if known is None else ring & known
        return torch.where(ring, distance, 0.0).sum((-2, -1)) / ring.sum((-2, -1)).clamp(min=1)

    first, third = away(one & ~area), away(dilate(two, 1) & ~two)
    share = area.to(image.dtype).mean((-2, -1))
    filled = (first > _SHARPNESS * third) & (first > 0) & (share >= _LEAST_FILL)
    # wherever else the value stands it is the fill too: in a corner that no square fits into
    found = (alike & filled[..., None, None]).any(-3)
    # of labels, or black and white, all is of such values: that is what the image shows
    others = (constant & ~alike.any(-3, keepdim=True)).to(image.dtype).mean((-3, -2, -1))
    ground = (~found).to(image.dtype).mean((-2, -1))
    drawn = (ground < _LEAST_GROUND) | (others > 0.5 * ground)
    found = found & ~drawn[..., None, None]
    return found if known is None else found & known.squeeze(-3)


def _constant_squares(image: Tensor) -> Tensor:
    """(..., H, W) bool: the middle of a square of 5 × 5 pixels that are equal, to the last bit."""
    changes_x = (image[..., 1:] != image[..., :-1]).to(torch.uint8)
    changes_y = (image[..., 1:, :] != image[..., :-1, :]).to(torch.uint8)
    within_rows = running_largest(running_largest(changes_x, _SQUARE - 1, -1), _SQUARE, -2)
    down = running_largest(changes_y[..., : 1 - _SQUARE], _SQUARE - 1, -2)
    return F.pad((within_rows | down) == 0, (_SQUARE // 2,) * 4)


def hot_pixels(image: Tensor, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Single pixels far off the median of three along their row and along their column.

    Returns:
        bool, (..., H, W); and how far every pixel is off the nearer of its two medians.

    Example:
        >>> image = torch.rand(30, 30, generator=torch.Generator().manual_seed(0))
        >>> image[7, 9] = 30.0
        >>> hot_pixels(image)[0].nonzero().tolist()
        [[7, 9]]
    """
    across, down = (_off_median(image, dim) for dim in (-1, -2))
    off = torch.where(across.abs() < down.abs(), across, down)
    # in units of how much neighbours differ on the mean
    step = (image[..., 1:] - image[..., :-1]).detach().abs()
    if usable is None:
        return off.detach().abs() > _HOT * step.mean((-2, -1), keepdim=True), off
    pairs = usable[..., 1:] & usable[..., :-1]
    typical = _mean_where(pairs, step)[..., None, None]
    # what lies beside a masked pixel has no median
    across = F.pad(pairs[..., 1:] & pairs[..., :-1], (1, 1))
    above = usable[..., 1:, :] & usable[..., :-1, :]
    down = F.pad(above[..., 1:, :] & above[..., :-1, :], (0, 0, 1, 1))
    return (off.detach().abs() > _HOT * typical) & across & down, off


def _mean_where(known: Tensor, values: Tensor) -> Tensor:
    """(...,), of (..., H, W), over what is known; 0 where nothing is."""
    return torch.where(known, values, 0.0).sum((-2, -1)) / known.sum((-2, -1)).clamp(min=1)


def _off_median(image: Tensor, dim: int) -> Tensor:
    """How far a pixel is off the median of itself and its two neighbours; 0 at the border."""
    length = image.shape[dim]
    before, own, after = (image.narrow(dim, start, length - 2) for start in (0, 1, 2))
    low, high = torch.minimum(before, after), torch.maximum(before, after)
    off = own - torch.minimum(torch.maximum(own, low), high)
    return F.pad(off, (1, 1) if dim == -1 else (0, 0, 1, 1))


def enlargement(image: Tensor, usable: Tensor | None = None) -> Tensor:
    r"""The factor by which an image was enlarged, along both axes: 1 if it was not.

    Between the true samples an enlarged image is smoother than at them: the mean second difference of its columns
    (or first) repeats with the factor, whatever the kernel,

    .. math:: z_k = \sqrt{2 / n}\, \Big| \sum_j u_j e^{-2 \pi i j / k} \Big|, \qquad
              u = \text{standardised} \log \overline{|\partial_x^2 I|}

    Returns:
        (...,) int64, 1 to 8; 1 of images of fewer than 32 pixels a side.

    Example:
        >>> image = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
        >>> enlargement(image), enlargement(image.repeat_interleave(3, 0).repeat_interleave(3, 1))
        (tensor(1), tensor(3))
    """
    image = image.detach()
    if usable is not None:
        usable = usable.expand(image.shape)
    size = (image.shape[-2], image.shape[-1])
    if min(size) < LEAST_ENLARGED:
        return torch.ones_like(image[..., 0, 0], dtype=torch.int64)
    # some of the rows tell the columns as well
    strides = [max(_THINNED, stride_for((length, length), _LEAST_LINES)) for length in size]
    kernels = kernels_for(image, usable)
    if kernels is not None:
        return kernels.repeated(image, usable, strides, _LEAST_REPEAT)
    least: Tensor | None = None  # (..., K)
    for dim, stride in zip((-2, -1), strides, strict=True):
        lines, known = (
            None if part is None else _every(part, dim, stride).transpose(dim, -2) for part in (image, usable)
        )
        assert lines is not None
        repeats = _repeats(_profiles(lines, known))
        least = repeats if least is None else torch.minimum(least, repeats)
        if all_true(least <= _LEAST_REPEAT):  # the other axis changes nothing
            break
    assert least is not None
    factors = torch.arange(2, LARGEST_FACTOR + 1, device=image.device)
    return torch.where(least > _LEAST_REPEAT, factors, 1).amax(-1)


def _every(image: Tensor, dim: int, stride: int) -> Tensor:
    """Every ``stride``-th row (dim −2) or column (−1) of (..., H, W)."""
    return (image[..., ::stride, :] if dim == -2 else image[..., ::stride]).contiguous()


def _profiles(lines: Tensor, known: Tensor | None) -> Tensor:
    """(..., 2, n): mean first differences and second ones: twice as large, pairs of columns are bent alike."""
    step = lines[..., 1:] - lines[..., :-1]
    both = torch.stack((step[..., 1:], step[..., 1:] - step[..., :-1]), dim=-3).abs_()
    if known is None:
        return both.mean(-2)
    known = known[..., 1:-1] & known[..., :-2] & known[..., 2:]
    return (both * known.unsqueeze(-3)).sum(-2) / known.sum(-2, keepdim=True).clamp(min=1)


def _repeats(profiles: Tensor) -> Tensor:
    """(..., K): z of every factor from 2 on, of mean differences (..., 2, n)."""
    # the floor is what rounding leaves of a straight line
    floored = torch.add(profiles, profiles.mean(-1, keepdim=True), alpha=1e-3)
    level = floored.clamp(min=torch.finfo(profiles.dtype).tiny).log()
    # less what changes slowly
    level = level[..., 1:-1] - torch.lerp(level[..., :-2], level[..., 2:], 0.5)
    level = level - level.mean(-1, keepdim=True)
    spread = torch.linalg.vector_norm(level, dim=-1, keepdim=True)
    real, imaginary = torch.matmul(level, _turns(level.shape[-1], like=level)).chunk(2, -1)
    return (torch.hypot(real, imaginary) / spread.masked_fill(spread == 0, torch.inf)).amax(-2)


@keeps_tables
def _turns(count: int, *, like: Tensor) -> Tensor:
    """(n, 2 K): cosine and sine of 2π j / k, times √2."""
    position = torch.arange(count, device=like.device, dtype=like.dtype)
    factors = torch.arange(2, LARGEST_FACTOR + 1, device=like.device, dtype=like.dtype)
    angle = 2 * math.pi * position[:, None] / factors
    return 2**0.5 * torch.cat((angle.cos(), angle.sin()), -1)


def suspicious(image: Tensor, usable: Tensor | None = None) -> Tensor:
    """(...,) bool: whether some of the rows have a pixel off its neighbours on both axes, or five alike.

    A look at images of which most have neither fill nor hot pixels, for a tenth of the cost of the others. Of small
    images, which a single pixel can mislead, all rows are looked at, of large ones up to every eighth: a hot pixel
    or a strip between them is not seen.
    """
    stride = min(2 * _THINNED, stride_for((image.shape[-2],) * 2, 2 * _LEAST_LINES))

    def thirds(plane: Tensor) -> list[Tensor]:
        return [plane[..., start : start - 2 or None : stride, :] for start in (0, 1, 2)]

    above, lines, below = thirds(image.detach())
    step = lines[..., 1:] - lines[..., :-1]
    length = step.abs()
    masks = None if usable is None else thirds(usable.expand(image.shape))
    if masks is None:
        typical = length.mean((-2, -1))
    else:
        known = masks[1][..., 1:] & masks[1][..., :-1]
        typical = _mean_where(known, length)
        step, length = torch.where(known, step, 0.0), torch.where(known, length, torch.inf)
    # of most images no step is 0, and no pixel is off its neighbours along the rows
    alike = length.amin((-2, -1)) == 0
    if not all_true(~alike):  # four steps of nothing in a row
        longer = torch.maximum(length[..., 1:], length[..., :-1])
        alike = torch.maximum(longer[..., 2:], longer[..., :-2]).amin((-2, -1)) == 0
    off = _twice_off(step[..., :-1], step[..., 1:])
    hot = off.amax((-2, -1)) > 2 * _HOT * typical
    if not all_true(~hot):
        up, down = lines - above, below - lines
        if masks is not None:
            over, within, under = masks
            up, down = torch.where(over & within, up, 0.0), torch.where(within & under, down, 0.0)
        off = torch.minimum(off, _twice_off(up, down)[..., 1:-1])
        hot = off.amax((-2, -1)) > 2 * _HOT * typical
    return alike | hot


def _twice_off(before: Tensor, after: Tensor) -> Tensor:
    """Twice how far up and down again, or down and up, two steps go; not above 0 where they go on."""
    return (before - after).abs_().sub_((before + after).abs_())


def exclude_defects(image: Tensor, usable: Tensor | None = None) -> Tensor | None:
    """What is usable, (..., H, W), but for fills and hot pixels; as it was given where that is known to be all."""
    suspect = suspects(image, usable)
    if suspect is None:
        return usable
    filled = undeclared_fill(image, usable) & suspect
    seen = _besides(filled, usable)
    return seen & ~(hot_pixels(image, seen)[0] & suspect)


def _besides(filled: Tensor, usable: Tensor | None) -> Tensor:
    """What is usable and no fill: ground between two pixels of a fill is no hot pixel."""
    return ~filled if usable is None else usable & ~filled


def remove_defects(image: Tensor, usable: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The image with the median of the neighbours for hot pixels, and what of it is usable: all but fills.

    A gap of one pixel costs more to correlate around than it costs to fill. Only suspicious images are treated, so
    the host must be able to read them.

    Returns:
        Both as they were given where nothing is to be removed; the image is 0 where it is filled.
    """
    suspect = suspects(image, usable)
    if suspect is None:
        return image, usable
    rows = suspect.flatten().nonzero().squeeze(-1)
    images = image.flatten(0, -3) if image.ndim > 2 else image.unsqueeze(0)
    part = images[rows]
    known = None if usable is None else usable.expand(image.shape).reshape(images.shape)[rows]
    filled = undeclared_fill(part, known)
    unfilled = all_true(~filled)
    hot, off = hot_pixels(part, known if unfilled else _besides(filled, known))
    mended = torch.where(filled, 0.0, torch.where(hot, part - off, part))
    image = images.index_copy(0, rows, mended).reshape(image.shape)
    if unfilled:
        return image, usable
    good = torch.ones_like(images, dtype=torch.bool).index_copy(0, rows, ~filled).reshape(image.shape)
    return image, good if usable is None else usable & good


def suspects(image: Tensor, usable: Tensor | None) -> Tensor | None:
    """(..., 1, 1) bool: images to look at more closely; ``None`` if there are none."""
    if 0 in image.shape or min(image.shape[-2:]) < _LEAST_SIDE:
        return None
    suspect = suspicious(image, usable)
    return None if all_true(~suspect) else suspect[..., None, None]
