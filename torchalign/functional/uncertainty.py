r"""Errors of a translation as covariances, 2 × 2 in px²: what is known across a stripe and not along it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["isotropic", "largest_sigma"]


def largest_sigma(covariance: Tensor) -> Tensor:
    r"""The root of the larger eigenvalue of symmetric (..., 2, 2) matrices, in closed form: the larger half axis.

    .. math:: \lambda = \tfrac{1}{2} (a + b) + \sqrt{\tfrac{1}{4} (a - b)^2 + c^2}

    >>> largest_sigma(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor(2.)
    """
    a, b, c = covariance[..., 0, 0], covariance[..., 1, 1], covariance[..., 0, 1]
    return (0.5 * (a + b) + torch.hypot(0.5 * (a - b), c)).clamp(min=0).sqrt()


def isotropic(sigma: Tensor) -> Tensor:
    """(..., 2, 2): the covariance of errors of standard deviation ``sigma`` (...) in every direction."""
    variance = sigma.square()
    return torch.diag_embed(torch.stack((variance, variance), dim=-1))
