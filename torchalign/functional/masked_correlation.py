r"""Weighted fields correlated at all translations at once: where to begin when what is sought is far.

.. math:: S(t) = \frac{\sum u(p - t)\, v(p)\, f(p - t) \cdot g(p)}
                      {\sqrt{\sum u |f|^2 (p - t)\, v(p) \cdot \sum u(p - t)\, v |g|^2 (p)}}

of fields f, g of mean nearly 0 and weights u, v: each sum a product of spectra, padded so that nothing wraps (Padfield
2012, doi:10.1109/TIP.2011.2181402).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign.functional.fourier import irfft2, rfft2

__all__ = ["OUTSIDE_MARGIN", "best_shift"]

# Two frames must have this share of the largest overlap in common.
_LEAST_OVERLAP = 0.2
# A peak beyond the limit must exceed the one within by this factor to be believed.
OUTSIDE_MARGIN = 1.2
# Of the product of their powers at least this share of the largest is divided by.
_LEAST_POWER = 1e-6


def best_shift(
    moving: Tensor,
    moving_weights: Tensor,
    reference: Tensor,
    reference_weights: Tensor,
    *,
    spacings: tuple[float, float],
    reach: float,
) -> tuple[Tensor, Tensor]:
    """The shift, of whole samples, at which two fields correlate best, and how well.

    Correlations over less ground are larger by chance: they are compared times the root of their overlap.

    Args:
        moving: (K, ..., T, h, w), the K parts of fields of mean nearly 0; 1 of scalars, 2 of vectors.
        moving_weights: (..., T, h, w) in [0, 1].
        reference: (K, ..., 1 or T, h, w).
        reference_weights: (..., 1 or T, h, w).
        spacings: along y and x, from one sample to the next, in pixels.
        reach: the longest shift that is expected, in pixels: a longer one must fit better by a fifth.

    Returns:
        (..., T, 2), the shift (x, y) moving → reference in pixels; and (..., T), the correlation times the root of
        the overlap, as a share of the largest. No gradient.

    Example:
        >>> scene = torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) - 0.5
        >>> alike = torch.ones(32, 32)
        >>> best_shift(
        ...     scene[None, :32, 9:41], alike, scene[None, 12:44, 2:34], alike, spacings=(2.0, 2.0), reach=40
        ... )[0]
        tensor([ 14., -24.])
    """
    with torch.no_grad():
        own = _products_of(moving, moving_weights)
        other = _products_of(reference, reference_weights)
        (rows, columns), pad = moving.shape[-2:], (0, moving.shape[-1], 0, moving.shape[-2])
        own, other = rfft2(F.pad(own, pad)).conj(), rfft2(F.pad(other, pad))
        # each of the powers with the other's weights
        products = torch.cat((own, own[-1:])) * torch.cat((other[:-2], other[-1:], other[-2:]))
        sums = torch.cat((products[:-3].sum(0, keepdim=True), products[-3:]))
        common, first, second, overlap = irfft2(sums, (2 * rows, 2 * columns)).unbind()
        both = first * second
        least = (_LEAST_POWER * both.amax((-2, -1), keepdim=True)).clamp(min=torch.finfo(both.dtype).tiny)
        share = overlap / overlap.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)
        height = common * torch.rsqrt(torch.maximum(both, least)) * share.clamp(min=0).sqrt()
        y, x = (
            torch.fft.fftfreq(2 * samples, 0.5 / (samples * spacing), device=both.device, dtype=both.dtype)
            for samples, spacing in zip((rows, columns), spacings, strict=True)
        )
        height = torch.where(torch.hypot(y[:, None], x) <= reach, height, height / OUTSIDE_MARGIN)
        height, place = height.masked_fill(share < _LEAST_OVERLAP, -1.0).flatten(-2).max(-1)
        return torch.stack((x[place % (2 * columns)], y[place // (2 * columns)]), -1), height


def _products_of(fields: Tensor, weights: Tensor) -> Tensor:
    """(K + 2, ..., h, w): the weighted fields, their weighted power, the weights."""
    return torch.stack((*(weights * fields), weights * fields.square().sum(0), weights))
