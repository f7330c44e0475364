"""The step that maximises the enhanced correlation coefficient of a linearised reference, and moments of its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchalign._host import keeps_tables
from torchalign.functional.affine import are_finite, unit_matrix
from torchalign.functional.levels import Level, inner

__all__ = [
    "LONGEST_STEP",
    "Increment",
    "Moments",
    "System",
    "scatter_of_blocks",
    "shorten",
    "weighted_moments",
    "weighted_system",
]

# One step moves no point of the frame further than this many samples of its level.
LONGEST_STEP = 2.0
# Relative to its trace: what keeps a Hessian with a blind direction from having an inverse without bounds.
_RIDGE = 1e-6
# A direction is blind whose curvature is less than this many ridges, inverted.
_BLIND = 1e-2


class System(NamedTuple):
    """The part of the normal equations of one set of weights that does not depend on the moving frame."""

    weights: Tensor  # (..., T, n)
    mean: Tensor  # (..., T, 2 + P), weighted, of the regressors
    inverse: Tensor  # (..., T, P, P), of the Hessian
    solved: Tensor  # (..., T, P), H⁻¹ Gᵀ r̄
    rest: Tensor  # (..., T), ‖r̄‖² − r̄ᵀ P_G r̄: what of the reference its derivatives do not explain
    sound: Tensor  # (..., T) bool, the Hessian has an inverse


def weighted_system(weights: Tensor, level: Level) -> System:
    """The normal equations of these weights."""
    parameters = level.corners.shape[-1]
    gram = inner(weights, level.products)[..., _triangle(2 + parameters, like=weights)]
    mean = gram[..., 0, :] / gram[..., 0, :1].clamp(min=torch.finfo(weights.dtype).tiny)
    centred = torch.addcmul(gram[..., 1:, 1:], gram[..., 1:, :1], mean[..., None, 1:], value=-1)
    against, hessian = centred[..., 0, :], centred[..., 1:, 1:]  # of (..., T, 1 + P, 1 + P)
    ridge = _RIDGE * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = ridge.clamp(min=torch.finfo(ridge.dtype).tiny)
    eye = unit_matrix(parameters, like=weights)
    inverse = torch.linalg.inv_ex(torch.addcmul(hessian, ridge[..., None, None], eye)).inverse
    # in a direction in which nothing changes the ridge is all there is
    spread = inverse.diagonal(dim1=-2, dim2=-1) * ridge[..., None]
    sound = are_finite(inverse) & ((spread > 0) & (spread < _BLIND)).all(-1)
    inverse = inverse.masked_fill(~sound[..., None, None], 0.0)
    solved = (inverse * against[..., None, 1:]).sum(-1)
    rest = against[..., 0] - (against[..., 1:] * solved).sum(-1)
    return System(weights, mean, inverse, solved, rest, sound)


class Increment(NamedTuple):
    r"""The step that maximises the coefficient of the linearised reference.

    .. math:: \Delta = H^{-1} G^T (\lambda \bar m - \bar r), \qquad
              \lambda = \frac{\|\bar r\|^2 - \bar r^T P_G \bar r}{\bar m^T \bar r - \bar m^T P_G \bar r}

    with :math:`P_G` the projection on the derivatives (Evangelidis & Psarakis 2008, theorem 1). Where the
    denominator is not positive, the two are far from each other, and λ = 1 makes it a least-squares step.
    """

    step: Tensor  # (..., T, P), Δ
    gain: Tensor  # (..., T), λ
    along: Tensor  # (..., T), its denominator, infinity where it is not positive
    direction: Tensor  # (..., T, P), H⁻¹ Gᵀ m̄

    @classmethod
    def of(cls, values: Tensor, level: Level, system: System) -> Increment:
        """Of frames (..., T, n)."""
        moments = inner(system.weights * values, level.regressors)
        moments = torch.addcmul(moments, moments[..., :1], system.mean, value=-1)  # less the means
        along = moments[..., 1] - (moments[..., 2:] * system.solved).sum(-1)
        good = (along > 0) & (system.rest > 0)
        along = torch.where(good, along, torch.inf)
        gain = torch.where(good, system.rest / along, 1.0)
        direction = (system.inverse * moments[..., None, 2:]).sum(-1)
        return cls(gain[..., None] * direction - system.solved, gain, along, direction)


def shorten(increment: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """No step is longer than a few samples of its level; and how far it moves the farthest corner, in pixels."""
    moved = (increment.detach()[..., None, :] * level.corners).sum(-1)  # (..., T, 8)
    reach = torch.hypot(moved[..., :4], moved[..., 4:]).amax(-1)
    longest = LONGEST_STEP * level.grid.spacing()
    shorter = longest / reach.clamp(min=longest)
    return increment * shorter[..., None], reach * shorter


class Moments(NamedTuple):
    """Weighted moments of two textures, which are of order 1 and of mean nearly 0, so that sums do not cancel."""

    mean: Tensor
    other_mean: Tensor
    variance: Tensor  # 1 where it vanishes, and so the correlation is 0
    covariance: Tensor
    correlation: Tensor


def weighted_moments(values: Tensor, level: Level, weights: Tensor) -> Moments:
    """Of (..., T, n) and the reference's texture; (..., T)."""
    two = level.regressors[..., :2, :]  # 1 and the texture
    total, other = inner(weights, two).unbind(-1)
    count = total.clamp(min=torch.finfo(weights.dtype).tiny)
    weighted = weights * values
    own, product = inner(weighted, two).unbind(-1)
    mean, other_mean = own / count, other / count
    variance = torch.linalg.vecdot(weighted, values) / count - mean.square()
    other_square = inner(weights, level.squares.unsqueeze(-2)).squeeze(-1)
    other_variance = other_square / count - other_mean.square()
    covariance = product / count - mean * other_mean
    flat = (variance <= 1e-6) | (other_variance <= 1e-6)
    variance, other_variance = variance.masked_fill(flat, 1.0), other_variance.masked_fill(flat, 1.0)
    covariance = covariance.masked_fill(flat, 0.0)
    return Moments(
        mean, other_mean, variance, covariance, covariance * torch.rsqrt(variance * other_variance)
    )


def scatter_of_blocks(sums: Tensor, system: System) -> Tensor:
    """(..., T, 2, 2): of what blocks, whose pulls are (..., T, 2 + P, h, w), do to the two translations."""
    lever = system.inverse[..., :2, :]
    mean = system.mean[..., 2:, None]
    moved = torch.matmul(lever, sums[..., 2:, :, :].flatten(-2) - mean * sums[..., :1, :, :].flatten(-2))
    blocks = moved.shape[-1]
    freedom = blocks / max(1, blocks - sums.shape[-3])
    return freedom * torch.matmul(moved, moved.mT)


@keeps_tables
def _triangle(parameters: int, *, like: Tensor) -> Tensor:
    """(P, P): where in the packed upper triangle of a symmetric matrix its entries are."""
    index = torch.arange(parameters, device=like.device)
    low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
    return low * parameters - low * (low - 1) // 2 + high - low
