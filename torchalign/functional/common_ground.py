"""Which ground two registered frames both show, and values for pixels that show none.

* :func:`agreement`: roughly where the two show the same ground.
* :func:`shared_ground`: which of their pixels do.
* :func:`fill_holes`, :func:`fill_small_holes`: values for unusable pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import kernels_for
from torchalign.functional.smoothing import block_sums, enlarge, halve, nanmedian, triangle_mean

__all__ = [
    "BLOCK",
    "LEAST_WEIGHT",
    "agreement",
    "agreement_of_blocks",
    "fill_holes",
    "fill_small_holes",
    "shared_ground",
]

# Samples of a block a side, of which it is asked whether it shows the same ground.
BLOCK = 4
# A hole is filled from neighbours of at least this (triangular) weight in all; further in it fades to the mean.
LEAST_WEIGHT = 0.05
# A hole so much of whose surroundings is usable is as good as none, once it is filled.
_FILLED = 0.7
# Shared ground: rounds of regression, residuals that still belong to it, in their standard deviations, and by how
# much, in pixels, the frames may not lie on each other yet.
_ROUNDS, _LARGEST_RESIDUAL, _MISALIGNED = 5, 4.0, 0.5
# Where hardly anything agrees, the line is that of the frame: it counts as much as this share of agreeing ground.
# And where the reference is flat, the slope is: that share of the frame's variance.
_PRIOR, _FLAT_PRIOR = 0.3, 0.05


def agreement(moving: Tensor, reference: Tensor, *, fine: bool = False, vector: bool = False) -> Tensor:
    r"""Weights in [0, 1]: how much two frames, brought together, show the same ground.

    The squared local correlation coefficient, squared again, over about 15 × 15 samples: blocks of 4 × 4, with
    triangular weights over 3 × 3 of them, interpolated between,

    .. math:: \left( \frac{(g * ab)_+^2}{(g * a^2)\,(g * b^2)} \right)^2

    near 1 on common ground, near 0 under a cloud, on a changed field, and where one of them is empty.

    Args:
        moving: (..., H, W), over the reference.
        reference: (..., H, W), broadcastable.
        fine: around every sample, over 7 × 7 of them: sharper, noisier, and more work.
        vector: the fields are vectors, (2, ..., H, W): products are inner products.

    Returns:
        (..., H, W).
    """
    size = (moving.shape[-2], moving.shape[-1])
    share = agreement_of_blocks(moving, reference, length=1 if fine else BLOCK, vector=vector)
    return share if fine else enlarge(share, BLOCK, size)


def agreement_of_blocks(
    moving: Tensor, reference: Tensor, *, length: int = BLOCK, vector: bool = False
) -> Tensor:
    """:func:`agreement` at the middles of its blocks, (..., ⌈H / 4⌉, ⌈W / 4⌉): between them it is linear."""
    kernels = None if vector else kernels_for(moving, reference)
    if kernels is not None:
        return kernels.alike(moving, reference, length)
    # pooled before they are stacked: it is small then, and the reference may be one for all frames
    products = (moving * reference, moving.square(), reference.square())
    if vector:
        products = products[0].sum(0), products[1].sum(0), products[2].sum(0)
    sums = products if length == 1 else [block_sums(product, 2) for product in products]
    stacked = torch.stack(torch.broadcast_tensors(*sums))  # type: ignore[no-untyped-call]
    common, own, other = triangle_mean(stacked, 2 if length == 1 else 1).unbind()
    tiny = torch.finfo(moving.dtype).eps ** 2  # the fields are of order 1
    share = common.clamp(min=0).square() / (own * other + tiny)
    return share.square().clamp(max=1)


def shared_ground(moving: Tensor, reference: Tensor, weights: Tensor, usable: Tensor | None = None) -> Tensor:
    r"""Which pixels of two frames, brought together to half a pixel, show the same ground.

    To a local change of contrast and brightness, the moving frame is the reference there:

    .. math:: |m - (\alpha r + \beta)| \le 4 \hat\sigma + \tfrac{1}{2} |\alpha| \, |\nabla r|

    with :math:`\alpha, \beta` the weighted regression over about 25 × 25 pixels, tied to that of the whole frame
    where little agrees, and :math:`\hat\sigma` from the median residual of the better half. Residuals that are too
    large are left out of the next of five rounds. The gradient forgives half a pixel of misalignment: without it
    pixels would be chosen that fit the place where the frames happen to lie, and a shift estimated from them would
    stay there.

    Sharper than :func:`agreement`, which it starts from. What differs in brightness only slowly (haze) stays; what
    is as bright as the ground below it is not found.

    Args:
        moving: (..., H, W), over the reference.
        reference: (..., H, W), broadcastable.
        weights: (..., h, w) in [0, 1], how sure it is beforehand, see :func:`agreement`; on any grid.
        usable: bool, (..., H, W), True = both are usable.

    Returns:
        bool, (..., H, W), in blocks of 2 × 2 pixels. No gradient.

    Example:
        >>> reference = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
        >>> moving = 1.2 * reference + 0.1
        >>> moving[:20, :20] = 2  # a cloud
        >>> ground = shared_ground(moving, reference, torch.full((32, 32), 0.5))
        >>> ground[:20, :20].any().item(), ground[20:].all().item()
        (False, True)
    """
    height, width = moving.shape[-2:]
    lead = torch.broadcast_shapes(moving.shape[:-2], reference.shape[:-2])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if usable is not None:
            moving, reference = (torch.where(usable, image, 0.0) for image in (moving, reference))
        own, other = (halve(image.expand(*lead, height, width)) for image in (moving, reference))
        prior = F.interpolate(
            weights.expand(*lead, *weights.shape[-2:]).reshape(-1, 1, *weights.shape[-2:]),
            size=own.shape[-2:],
            mode="bilinear",
            align_corners=False,
        ).reshape(own.shape)
        if usable is not None:
            prior = prior * (halve(usable.expand(*lead, height, width).to(own.dtype)) == 1)
        own = own - own.mean((-2, -1), keepdim=True)
        other = other - other.mean((-2, -1), keepdim=True)
        # samples lie 2 pixels apart, and their neighbours 4
        slope_y = F.pad(other[..., 2:, :] - other[..., :-2, :], (0, 0, 1, 1)).square()
        slope_x = F.pad(other[..., 2:] - other[..., :-2], (1, 1)).square()
        forgiven = (slope_y + slope_x).sqrt() * (_MISALIGNED / 4)
        ground = _regressed(own, other, prior, forgiven)
        ground = ground.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return ground[..., :height, :width]


def _regressed(own: Tensor, other: Tensor, prior: Tensor, forgiven: Tensor) -> Tensor:
    """(..., h, w) bool: where the frame lies on its local regression on the other, but for what is forgiven."""
    size, tiny = (own.shape[-2], own.shape[-1]), torch.finfo(own.dtype).tiny
    moments = torch.stack((torch.ones_like(own), own, other, own * other, other.square()))
    chosen, ground = prior, torch.ones_like(own, dtype=torch.bool)
    for _ in range(_ROUNDS):
        blocks = block_sums(chosen * moments, 2)
        whole = blocks.mean((-2, -1), keepdim=True)
        _, _, covariance, variance = _moments_of(whole)
        floor = _FLAT_PRIOR * variance + tiny
        slope = covariance / (variance + tiny)
        own_mean, other_mean, covariance, variance = _moments_of(triangle_mean(blocks, 1) + _PRIOR * whole)
        alpha = (covariance + floor * slope) / (variance + floor)
        alpha, beta = enlarge(torch.stack((alpha, own_mean - alpha * other_mean)), 4, size).unbind()
        residual = (own - torch.addcmul(beta, alpha, other)).abs()
        # a quarter of the samples has the same median
        some, weight = (field[..., ::2, ::2].flatten(-2) for field in (residual, chosen))
        better = weight >= weight.mean(-1, keepdim=True)
        scale = 1.4826 * nanmedian(some.masked_fill(~better, torch.nan))[..., None, None]
        ground = residual <= _LARGEST_RESIDUAL * scale + forgiven * alpha.abs()
        chosen = prior * ground
    return ground


def _moments_of(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of the frame and of the reference, their covariance, the variance of the reference."""
    count, own_sum, other_sum, product, square = sums.unbind()
    count = count + torch.finfo(sums.dtype).tiny
    own_mean, other_mean = own_sum / count, other_sum / count
    variance = (square / count - other_mean.square()).clamp(min=0)
    return own_mean, other_mean, product / count - own_mean * other_mean, variance


def fill_holes(centred: Tensor, mask: Tensor) -> Tensor:
    """Unusable pixels take the mean of their usable neighbours (7 × 7, triangular), or else that of the frame.

    Narrow holes all but vanish; wide ones keep a soft edge instead of a step, which would ring.
    """
    weight = triangle_mean(mask.to(centred.dtype), 2)
    local = triangle_mean(centred, 2) / weight.clamp(min=LEAST_WEIGHT)
    return torch.where(mask, centred, local)


def fill_small_holes(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Single pixels and narrow gaps take the mean of their usable neighbours, and count as usable from then on.

    Those where 70 % of a triangle of 7 × 7 pixels around is usable. Image and mask are (..., H, W), finite and bool.
    """
    count = mask.to(image.dtype).sum((-2, -1), keepdim=True).clamp(min=1)
    mean = torch.where(mask, image, 0.0).sum((-2, -1), keepdim=True) / count
    filled = mean + fill_holes(torch.where(mask, image - mean, 0.0), mask)
    share = triangle_mean(mask.to(image.dtype), 2)
    return torch.where(mask, image, filled), mask | (share > _FILLED)
