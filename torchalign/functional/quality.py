"""How well two images agree, and the gate that keeps an alignment from making a frame worse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign.functional.affine import center_displacement, identity_warp
from torchalign.functional.warp import resample
from torchalign.types import Estimate, Status

__all__ = ["gate", "normalized_cross_correlation"]

# A frame whose score does not gain by a move this small (in σ, in pixels) was in place; a larger move without a
# gain is a mistake. Below a twentieth of a pixel what the interpolation smooths outweighs what the move gains.
_IN_PLACE_SIGMAS = 3.0
_IN_PLACE_PIXELS = 0.05
# Inlier weights above this count as common ground.
_COMMON = 0.01


def normalized_cross_correlation(first: Tensor, second: Tensor, usable: Tensor | None = None) -> Tensor:
    r"""Zero-normalised cross-correlation over the usable pixels.

    .. math:: \frac{\sum (a - \bar a)(b - \bar b)}{\sqrt{\sum (a - \bar a)^2 \sum (b - \bar b)^2}}

    Args:
        first: (..., H, W).
        second: (..., H, W), broadcastable.
        usable: bool, broadcastable; what is not usable may be anything, NaN too.

    Returns:
        (...,), in [−1, 1]; 0 where an image is flat or nothing is usable.

    Example:
        >>> ramp = torch.arange(4.0).reshape(2, 2)
        >>> normalized_cross_correlation(ramp, 5 - 2 * ramp)
        tensor(-1.)
    """
    axes = (-2, -1)
    # the mean of all pixels first: sums of squares of raw reflectances would cancel
    if usable is None:
        first = first - first.mean(axes, keepdim=True)
        second = second - second.mean(axes, keepdim=True)
    else:
        weight = usable.to(first.dtype)
        count = weight.sum(axes, keepdim=True).clamp(min=1)
        first, second = torch.where(usable, first, 0.0), torch.where(usable, second, 0.0)
        first = (first - first.sum(axes, keepdim=True) / count) * weight
        second = (second - second.sum(axes, keepdim=True) / count) * weight
    product = (first * second).sum(axes)
    # two roots, not the root of a product: squares of raw digital numbers overflow together
    first_norm, second_norm = first.square().sum(axes), second.square().sum(axes)
    flat = (first_norm <= 0) | (second_norm <= 0)
    norm = torch.where(flat, 1.0, first_norm).sqrt() * torch.where(flat, 1.0, second_norm).sqrt()
    return torch.where(flat, 0.0, product / norm).clamp(-1, 1)


def gate(
    warp: Tensor,
    sigma: Tensor,
    status: Tensor,
    moving: Tensor,
    reference: Tensor,
    *,
    moving_usable: Tensor | None = None,
    reference_usable: Tensor | None = None,
    inliers: Tensor | None = None,
    max_translation: float = 5.0,
    min_score: float | None = None,
) -> Estimate:
    """Score every frame before and after, and send back to the identity what is not better for it.

    In this order, a frame keeps the first verdict: the method's own ``status``; ``TOO_FAR`` if its centre moves
    by more than ``max_translation``; ``NOT_BETTER`` if its score does not gain, unless the move is within 3 σ
    or 0.05 px of none: such a frame was in place, stays as it is, and is ``OK``; ``LOW_SCORE`` below
    ``min_score``. Every accepted frame therefore has ``score >= score_before``.

    Args:
        warp: (..., T, 2, 3) or (..., T, 3, 3), in the coordinates of ``moving``.
        sigma: (..., T), in pixels.
        status: (..., T) int64.
        moving: (..., T, H, W), the channel seen.
        reference: (..., 1 or T, H, W).
        moving_usable: bool, broadcastable to ``moving``; ``None`` if all is.
        reference_usable: bool, broadcastable to ``moving``.
        inliers: (..., T, h, w), weights over the reference's frame on any grid: what the method found to be
            no common ground (clouds, changed fields) is left out of both scores.
        max_translation: in pixels.
        min_score: or ``None``.

    Returns:
        :class:`~torchalign.types.Estimate`.
    """
    height, width = moving.shape[-2:]
    identity = identity_warp(homography=warp.shape[-2] == 3, device=warp.device, dtype=warp.dtype).expand(warp.shape)
    displacement = center_displacement(warp, (height, width)).norm(dim=-1)
    finite = warp.isfinite().flatten(-2).all(-1) & sigma.isfinite()
    status = torch.where((status == 0) & ~finite, int(Status.NOT_CONVERGED), status)
    status = torch.where((status == 0) & ~(displacement <= max_translation), int(Status.TOO_FAR), status)
    warp = torch.where((status == 0)[..., None, None], warp, identity)

    common = reference_usable
    if inliers is not None:
        ground = _resize(inliers, (height, width)) > _COMMON
        common = ground if common is None else common & ground
    aligned, overlap = resample(moving.unsqueeze(-3), warp, mask=moving_usable)
    score = normalized_cross_correlation(aligned.squeeze(-3), reference, _both(overlap, common))
    score_before = normalized_cross_correlation(moving, reference, _both(moving_usable, common))

    gained = score >= score_before
    in_place = ~gained & (displacement <= (_IN_PLACE_SIGMAS * sigma).clamp(min=_IN_PLACE_PIXELS))
    status = torch.where((status == 0) & ~gained & ~in_place, int(Status.NOT_BETTER), status)
    moved = (status == 0) & ~in_place
    warp = torch.where(moved[..., None, None], warp, identity)
    score = torch.where(moved, score, score_before)
    if min_score is not None:
        status = torch.where((status == 0) & (score < min_score), int(Status.LOW_SCORE), status)
        warp = torch.where((status == 0)[..., None, None], warp, identity)
        score = torch.where(status == 0, score, score_before)
    sigma = torch.where(status == 0, sigma, torch.inf)
    return Estimate(warp, score, score_before, sigma, status)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _resize(weights: Tensor, size: tuple[int, int]) -> Tensor:
    flat = weights.detach().reshape(-1, 1, *weights.shape[-2:])
    return F.interpolate(flat, size=size, mode="nearest").reshape(*weights.shape[:-2], *size)
