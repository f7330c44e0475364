r"""The structure of an image: where its edges run, whatever their brightness.

Sensors of different physics (optical and radar, visible and infrared, a photograph and a map) show the same
edges at different, even reversed contrast. :func:`orientation_field` keeps the direction of the edges and drops
the sign and most of the size of their contrast. Two such fields are correlated as vectors.

References:
    Granlund 1978, doi:10.1016/0146-664X(78)90047-6 (orientation as a vector of the doubled angle);
    Fitch, Kadyrov, Christmas & Kittler 2002, doi:10.5244/C.16.11 (orientation correlation).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign.functional.common_ground import fill_holes
from torchalign.functional.keypoints import erode
from torchalign.functional.smoothing import block_sums, enlarge, nanmedian, triangle_mean

__all__ = ["orientation_field", "turn_orientations"]

# The gradient at a pixel sees the 5 × 5 pixels around it: so far a mask reaches.
_SUPPORT = 2
# Strengths beyond this share of their surroundings' are clipped, softly: the edge of a cloud then weighs no more
# than the edge of a field.
_CLIP = 0.25
# Squares of what is divided by; so much shorter vectors, in units of the clip's, are shortened to nothing.
_LEAST = 1e-12


def orientation_field(image: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The orientation of the gradient as a vector of the doubled angle, of clipped strength.

    .. math:: f = \frac{b}{\sqrt{1 + b^2 / c^2}}\,(\cos 2\theta, \sin 2\theta), \qquad
              b = \frac{|g|}{G_{10} * |g| + m}

    with :math:`g = |g| (\cos\theta, \sin\theta)` the gradient of the image smoothed by 0.7 pixels, :math:`G_{10}`
    a local mean over about 10 pixels, m its median over the frame, and c = 1/4. An edge of reversed contrast has
    its gradient turned by half a circle, which twice the angle does not tell. Invariant to gain, offset and sign.

    The field has twice the bandwidth of the gradient, so it is made at full sampling and band-limited afterwards.

    Args:
        image: (..., H, W), finite.
        mask: bool, (..., H, W), True = usable. The field is 0 within two pixels of what is not.

    Returns:
        (2, ..., H, W), the parts first, so that weights (..., H, W) broadcast; of length at most 1/4; 0 where the
        image is flat.

    Example:
        >>> ramp = torch.arange(5.0).expand(5, 5)
        >>> orientation_field(ramp)[:, 2, 2] + 0.0, orientation_field(-ramp.mT)[:, 2, 2] + 0.0  # zeros of no sign
        (tensor([0.2376, 0.0000]), tensor([-0.2376,  0.0000]))
    """
    if mask is not None:
        image = fill_holes(torch.where(mask, image, 0.0), mask)
    gx, gy = _gradient(image)
    if mask is not None:
        inside = erode(mask, _SUPPORT)
        gx, gy = torch.where(inside, gx, 0.0), torch.where(inside, gy, 0.0)
    # (no derivative of a root at 0)
    strength = (torch.addcmul(gx.square(), gy, gy) + torch.finfo(gx.dtype).tiny ** 0.5).sqrt()
    unit = 1 / (_CLIP * _local_mean(strength))
    x, y = gx * unit, gy * unit
    xx, yy = x.square(), y.square()
    square = xx + yy
    # b / √(1 + b²/c²) of a vector b, of which the square is at hand: one root for both
    length = _CLIP * torch.rsqrt(torch.addcmul(square + _LEAST, square, square))
    return torch.stack(((xx - yy) * length, 2 * x * y * length))


def turn_orientations(field: Tensor, warp: Tensor) -> Tensor:
    r"""Orientations that were moved by a warp, turned as it turns: by twice its angle φ.

    .. math:: \varphi = \operatorname{atan2}(a_{21} - a_{12},\, a_{11} + a_{22})

    The field is (2, ..., T, ...); of a warp (..., T, 2 or 3, 3) the linear part counts, held fixed in derivatives.

    Example:
        >>> quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> turn_orientations(torch.tensor([0.2, 0.1]), quarter)
        tensor([-0.2000, -0.1000])
    """
    warp = warp.detach()
    cosine, sine = warp[..., 0, 0] + warp[..., 1, 1], warp[..., 1, 0] - warp[..., 0, 1]
    square = cosine.square() + sine.square()
    turned = square > 0  # a reflection turns nothing
    square = torch.where(turned, square, 1.0)
    double = torch.where(turned, (cosine.square() - sine.square()) / square, 1.0), 2 * cosine * sine / square
    shape = cosine.shape + (1,) * (field.ndim - 1 - cosine.ndim)
    cosine, sine = double[0].reshape(shape), double[1].reshape(shape)
    first, second = field.unbind(0)
    return torch.stack((cosine * first - sine * second, sine * first + cosine * second))


def _gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    """32 (gx, gy) of the image smoothed by the binomial (1, 2, 1)/4, a Gaussian of σ 0.71 px; borders repeat."""
    flat = image.reshape(-1, 1, *image.shape[-2:])
    padded = F.pad(flat, (2, 2, 2, 2), mode="replicate").reshape(
        *image.shape[:-2], *(n + 4 for n in image.shape[-2:])
    )
    smooth = torch.add(padded[..., :-2, :] + padded[..., 2:, :], padded[..., 1:-1, :], alpha=2)
    smooth = torch.add(smooth[..., :-2] + smooth[..., 2:], smooth[..., 1:-1], alpha=2)
    return (smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2], smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1])


def _local_mean(strength: Tensor) -> Tensor:
    """The mean over some 10 pixels (1 σ) around, plus the median over the frame of that; more than 0.

    Blocks of 4 × 4, two triangles of 7 × 7 blocks over them, interpolated between.
    """
    height, width = strength.shape[-2:]
    share = block_sums(strength.new_ones(height, width), 2)
    blocks = triangle_mean(triangle_mean(block_sums(strength, 2) / share, 2), 2)
    typical = nanmedian(blocks.flatten(-2))[..., None, None]
    return enlarge(blocks + typical, 2**2, (height, width))
