r"""Errors of a translation as covariances, 2 × 2 in px²: a stripe fixes the shift across it, not along it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchalign._host import keeps_tables, kernels_for
from torchalign.functional.fourier import by_columns, irfft2, shift_phase
from torchalign.functional.smoothing import block_sums
from torchalign.functional.working_grid import WorkingGrid

__all__ = [
    "CALIBRATION",
    "LEAST_HEIGHT",
    "PeakQuality",
    "assess_peak",
    "beyond_chance",
    "block_pulls",
    "isotropic",
    "largest_direction",
    "largest_sigma",
    "overlap_curvature",
    "parts_of",
    "shared_slope",
    "trace",
    "weights_error",
    "with_finite_slope",
]

# Errors on simulated frames of all kinds exceed what the sandwich predicts by this factor (benchmarks/accuracy.py).
_SIGMA_CALIBRATION = 1.07
# So is one whose σ is larger than this, in pixels, and so many times that of the other.
_STRETCHED, _UNSURE = 4.2, 0.04
# What the weights share of the curvature leaves of an error, in pixels.
_WEIGHTS_ERROR = 0.4
# Factors of the variance of a peak, and of the square of its correction.
CALIBRATION = _SIGMA_CALIBRATION**2, _WEIGHTS_ERROR**2
# What blocks, so many along the shorter axis, disagree by counts where it is so many times what chance explains, in
# standard deviations; and as the displacements of neighbouring blocks are alike, it counts so many times.
_PARTS, _BEYOND_CHANCE, _MISFIT = 4, 2.0, 2.0
# A direction whose curvature is less than so many standard deviations of chance, a maximum less high than so many,
# and a direction along which less than this share of the curvature is the ground's, are ambiguous.
_LEAST_CURVATURE, LEAST_HEIGHT, _LEAST_FIXED = 3.0, 3.0, 0.82


def largest_sigma(covariance: Tensor) -> Tensor:
    r"""The root of the larger eigenvalue of symmetric (..., 2, 2) matrices, in closed form: the larger half axis.

    .. math:: \lambda = \tfrac{1}{2} (a + b) + \sqrt{\tfrac{1}{4} (a - b)^2 + c^2}

    >>> largest_sigma(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor(2.)
    """
    a, b, c = covariance[..., 0, 0], covariance[..., 1, 1], covariance[..., 0, 1]
    apart = (0.5 * (a - b)).nan_to_num(0.0)  # of two infinities
    return (0.5 * (a + b) + torch.hypot(apart, c)).clamp(min=0).sqrt()


def isotropic(sigma: Tensor) -> Tensor:
    """(..., 2, 2): the covariance of errors of standard deviation ``sigma`` (...) in every direction."""
    variance = sigma.square()
    return torch.diag_embed(torch.stack((variance, variance), dim=-1))


def largest_direction(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y), the direction of the larger axis of symmetric (..., 2, 2) matrices."""
    difference = (covariance[..., 0, 0] - covariance[..., 1, 1]).nan_to_num(0.0)
    angle = 0.5 * torch.atan2(2 * covariance[..., 0, 1].nan_to_num(0.0), difference)
    return angle.cos(), angle.sin()


def shared_slope(
    residual: Tensor, reference: Tensor, weights: Tensor, direction: tuple[Tensor, Tensor]
) -> Tensor:
    r"""The share of the reference's slope along a direction that is ground, not noise.

    .. math:: 1 - \frac{\sum w\, (\partial_d (m - r))^2}{2 \sum w\, (\partial_d r)^2}

    Two frames of one ground differ by the noise of both. Along a direction that the ground does not show, their
    slopes are noise: the share is 0. Where they have only ρ in common, in all directions, it is (1 + ρ²) / 2.

    Args:
        residual: (..., h, w), of the two frames, brought together and to one contrast.
        reference: (..., h, w).
        weights: (..., h, w).
        direction: (x, y) of a unit vector, (...,) each.

    Returns:
        (...,), at most 1; 1 where the reference has no slope.
    """
    weights, (x, y) = weights[..., 1:-1, 1:-1], direction
    by_x, by_y = _slopes_of(reference)
    squares = _weighted_sums(weights, by_x.square(), by_y.square(), by_x * by_y)
    whole = x * x * squares[..., 0] + y * y * squares[..., 1] + 2 * x * y * squares[..., 2]
    by_x, by_y = _slopes_of(residual)
    along = torch.addcmul(x[..., None, None] * by_x, y[..., None, None], by_y)
    left = (weights * along.square()).sum((-2, -1))
    return 1 - left / torch.where(whole > 0, 2 * whole, torch.inf)


def _slopes_of(field: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of the neighbours of inner samples, along x and along y: (..., h − 2, w − 2)."""
    by_x = field[..., 1:-1, 2:] - field[..., 1:-1, :-2]
    return by_x, field[..., 2:, 1:-1] - field[..., :-2, 1:-1]


def _weighted_sums(weights: Tensor, *fields: Tensor) -> Tensor:
    """(..., T, K), of (..., T, h, w) and K times (..., 1 or T, h, w)."""
    rows, weights = torch.stack([field.flatten(-2) for field in fields], dim=-2), weights.flatten(-2)
    if weights.ndim > 1 and rows.ndim > 2 and rows.shape[-3] == 1:
        return torch.matmul(weights, rows.squeeze(-3).mT)
    return torch.matmul(weights.unsqueeze(-2), rows.mT).squeeze(-2)


def weights_error(reference: Tensor, weights: Tensor, grid: WorkingGrid) -> Tensor:
    """(...,): the error that the weights cause in small and smooth frames, in px; see :func:`assess_peak`.

    Their share of the curvature, both summed over the two axes, times 0.4 px.

    Args:
        reference: (..., h, w), of mean nearly 0.
        weights: (..., h, w), of each of the two frames.
        grid: of both.
    """
    square, (y, x) = weights.square(), grid.spacings()
    by_x, by_y = _slopes_of(reference)
    # of twice the sampling
    slopes = 0.25 * (by_x.square() / (x * x) + by_y.square() / (y * y))
    slope = _weighted_sums(square[..., 1:-1, 1:-1], slopes)[..., 0]
    own = _weighted_sums(square, reference.square())[..., 0]
    xx, yy, _ = overlap_curvature(weights, grid)
    share = (xx + yy) * own / torch.where(slope > 0, slope, torch.inf)
    return _WEIGHTS_ERROR * share.clamp(max=1)


def parts_of(field: Tensor) -> Tensor:
    """Sums of (..., h, w) over blocks of 2ⁿ samples a side, 4 or more along the shorter axis."""
    times = 0
    # compared, not computed: a size may be a symbol
    while min(field.shape[-2:]) >= _PARTS * 2 ** (times + 1):
        times += 1
    return block_sums(field, times)


def block_pulls(moving: Tensor, reference: Tensor, shift: Tensor, grid: WorkingGrid) -> Tensor:
    r"""By how much blocks of a frame pull a correlation weighted by the frequency off its peak, along x and y.

    .. math:: s_b = \sum_{p \in b} \tfrac{1}{2} (a - b) \nabla (a + b)

    with a and b the frame, moved, and the reference, each weighted by the root of the frequency. Summed over all
    blocks it is the correlation's gradient there, 0; where the two are alike it is 0 in every block.

    Args:
        moving: (..., h, w//2+1), an ``rfft2`` on the grid.
        reference: the same, broadcastable.
        shift: (..., 2), of the peak, in pixels.
        grid: of both.

    Returns:
        (..., 2, n), in units of the sum over all frequencies.
    """
    root, slopes = _rooted_slopes(grid.frame, grid.size, grid.max_frequency, like=grid.radius)
    kernels = kernels_for(moving, reference, shift)
    if kernels is not None:
        spectra = kernels.pulls(
            moving, reference, grid.frequencies, -shift, root, grid.size[0] * grid.size[1]
        )
        fields = torch.split(irfft2(spectra, grid.size), [1, 2], -3)
        return parts_of(fields[0] * fields[1]).flatten(-2)
    own = shift_phase(moving, grid.frequencies, -shift)
    apart, both = irfft2((own - reference).mul_(root), grid.size), own + reference
    # one axis after the other, which the cache of a CPU holds
    pulls = [parts_of(irfft2(both * slope, grid.size).mul_(apart)) for slope in slopes]
    return torch.stack(pulls, -3).flatten(-2)


@keeps_tables
def _rooted_slopes(
    frame: tuple[int, int], size: tuple[int, int], max_frequency: float, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(h, w//2+1), the root of the frequency; (2, h, w//2+1), times iω along x and y and half the number of samples."""
    grid = WorkingGrid.of(frame, size, max_frequency, like)
    root = grid.radius.sqrt() * (grid.radius < max_frequency)
    y, x = (math.pi * size[0] * size[1] * frequency for frequency in grid.frequencies)
    none = torch.zeros_like(root)
    slopes = torch.stack((torch.complex(none, root * x), torch.complex(none, root * y[:, None])))
    return root, by_columns(slopes)


def with_finite_slope(divisor: Tensor) -> Tensor:
    """A divisor that hands no gradient back where it is so small that 1 / divisor² is no number."""
    small = divisor.abs() < torch.finfo(divisor.dtype).tiny ** 0.4
    return torch.where(small, divisor.detach(), divisor)


def trace(matrix: Tensor) -> Tensor:
    """(...,) of (..., 2, 2)."""
    return matrix[..., 0, 0] + matrix[..., 1, 1]


def beyond_chance(scatter: Tensor, covariance: Tensor, *, times: float = _MISFIT) -> Tensor:
    """The part of a scatter (..., 2, 2) that a covariance, at so many σ, does not explain; 0 where it may."""
    chance, found = trace(covariance), trace(scatter).clamp(min=torch.finfo(scatter.dtype).tiny)
    share = (times**2 - (times * _BEYOND_CHANCE) ** 2 * (chance / found)).clamp(min=0)
    return share[..., None, None] * scatter


class PeakQuality(NamedTuple):
    """How well a maximum of a correlation is known, see :func:`assess_peak`; one row a frame.

    Attributes:
        covariance: (..., 2, 2), of the errors of the shift, px².
        height: (...,), the correlation in standard deviations of what unrelated phases would give.
        curvature: (...,), its curvature along the larger axis of the covariance, likewise.
        fixed: (...,), share of the curvature along that axis that is not that of the weights.
        inverse: (..., 2, 2), of the Hessian of the ground's correlation; 0 where it has none.
    """

    covariance: Tensor
    height: Tensor
    curvature: Tensor
    fixed: Tensor
    inverse: Tensor

    @property
    def ambiguous(self) -> Tensor:
        """(...,) bool: a direction has a curvature of chance, or of the weights, or is much less sure."""
        larger = largest_sigma(self.covariance)
        smaller = (trace(self.covariance) - larger.square()).nan_to_num(0.0).clamp(min=0).sqrt()
        stretched = (larger > _STRETCHED * smaller) & (larger > _UNSURE) & larger.isfinite()
        weak = (self.curvature < _LEAST_CURVATURE) | (self.height < LEAST_HEIGHT)
        return weak | (self.fixed < _LEAST_FIXED) | stretched

    def with_misfit(self, pulls: Tensor, share: Tensor | None = None) -> tuple[PeakQuality, Tensor]:
        r"""Add the disagreement of parts of the frame beyond chance: a motion that the model lacks.

        Were the pulls (..., 2, n) of n blocks independent, their scatter would give the same covariance,
        :math:`H^{-1} \sum_b s_b s_b^T H^{-1}`. What it gives beyond chance counts besides. Where only a share of the
        frame shows the same ground, as it moved alike, the rest is off by more: its variance is divided by that.

        Returns:
            The quality, and (...,), by how much it raises the trace of the covariance, px².
        """
        moved = torch.matmul(self.inverse, pulls)
        misfit = beyond_chance(torch.matmul(moved, moved.mT), self.covariance)
        if share is not None:
            misfit = misfit / share[..., None, None]
        return self._replace(covariance=self.covariance + misfit), trace(misfit)

    def widened(self, error: Tensor) -> PeakQuality:
        """Add an error (..., 2) of unknown sign."""
        return self._replace(covariance=self.covariance + error[..., :, None] * error[..., None, :])


def overlap_curvature(weights: Tensor, grid: WorkingGrid) -> tuple[Tensor, Tensor, Tensor]:
    r"""Of the correlation of weights (..., h, w) with themselves, in px⁻².

    .. math:: \sum \nabla w \nabla w^T / \sum w^2

    Returns:
        xx, yy and xy, (...,) each.
    """
    by_x, by_y = _slopes_of(weights)
    # norms leave nothing behind
    squares = [torch.linalg.vector_norm(part, dim=(-2, -1)).square() for part in (by_x, by_y, by_x + by_y)]
    total = 4 * (torch.linalg.vector_norm(weights, dim=(-2, -1)).square() + torch.finfo(weights.dtype).tiny)
    (y, x), both = grid.spacings(), 0.5 * (squares[2] - squares[0] - squares[1])
    return squares[0] / (x * x * total), squares[1] / (y * y * total), both / (x * y * total)


def assess_peak(
    turned: Tensor, grid: WorkingGrid, overlap: tuple[Tensor, Tensor, Tensor], bins: Tensor
) -> tuple[PeakQuality, Tensor]:
    r"""The sandwich :math:`H^{-1} G H^{-1}` of a maximum, G the scatter of the gradient; and whether it is one.

    At the optimum every frequency pulls by :math:`-\omega\, \mathrm{Im}\,P e^{i\omega t}`; the pulls sum to zero,
    and the sum of their squares is the variance of that sum, times the number of bins that the window's spectrum
    correlates. H is the curvature of the ground's correlation: that of the weights, C K, is taken off. Where the
    ground shows one direction only, it is all there is along the other, and its peak is where the weights fit.

    Were the phases of P unrelated, the correlation would have the variance :math:`\tfrac{1}{2} \sum |P|^2`, and its
    curvature along d :math:`\tfrac{1}{2} \sum |P|^2 (\omega \cdot d)^4`.

    Args:
        turned: (..., H, W//2+1), the cross-power at the optimum, :math:`P e^{i\omega t}`.
        grid: of the frames.
        overlap: K, see :func:`overlap_curvature`.
        bins: (...,), how many bins the window correlates.

    Returns:
        :class:`PeakQuality`; and (..., 2, 2), what to add to the way from where the weights were brought together,
        which alone carries a gradient, by ``turned`` and ``overlap``.
    """
    table = _moment_tables(grid.frame, grid.size, like=grid.radius)
    parts = torch.view_as_real(turned.resolve_conj().mT)  # (..., W//2+1, H, 2)
    sums = (_spectral_moments(parts, table.along_x, table.along_y) * table.signs).sum(-2).flatten(-2)
    scatter = _spectral_moments(parts.detach().square(), table.twice_along_x, table.twice_along_y)

    value = sums[..., 0, None, None]
    whole = -sums.index_select(-1, table.curvatures).reshape(*sums.shape[:-1], 2, 2)
    weights = value * _symmetric(*overlap)
    ground = whole - weights
    inverse, regular = _inverted(ground)
    # by which the weights shorten the way from where they fit
    correction = _times(inverse, weights)
    curvatures, inverse, share = torch.stack((ground, whole)).detach(), inverse.detach(), correction.detach()
    spread = scatter[..., 1, :].flatten(-2).index_select(-1, table.squares).reshape(whole.shape)
    covariance = _times(_times(inverse, spread * (CALIBRATION[0] * bins)[..., None, None]), inverse)
    # what the weights do to higher orders, in small and smooth frames
    covariance = covariance + CALIBRATION[1] * _times(share, share.mT)
    covariance = 0.5 * (covariance + covariance.mT)  # symmetric to the last bit
    covariance = torch.where(regular[..., None, None], covariance, table.unknown)

    tiny = torch.finfo(bins.dtype).tiny
    powers = (
        scatter.sum(-2).flatten(-2).index_select(-1, table.fourths)
    )  # of ω_x⁴, ω_x³ω_y, …, ω_y⁴, and of 1
    powers = powers * (0.5 * bins)[..., None] + tiny
    height = value.detach()[..., 0, 0] * torch.rsqrt(powers[..., 5])
    # along the larger axis
    axis = torch.stack(largest_direction(covariance), -1)
    square = axis[..., None] * axis[..., None, :]
    bend, entire = (curvatures * square).sum((-2, -1)).unbind()
    first, second = square.flatten(-2).index_select(-1, table.pairs).chunk(2, -1)
    fourth = (first * second * table.binomial * powers[..., :5]).sum(-1)
    curvature = bend * torch.rsqrt(fourth + tiny)
    fixed = torch.where(entire > 0, bend / torch.where(entire > 0, entire, 1.0), 0.0)
    return PeakQuality(covariance, height, curvature, fixed, inverse), correction


def _spectral_moments(parts: Tensor, along_x: Tensor, along_y: Tensor) -> Tensor:
    """(..., n, 2, n): sums of the parts (..., W//2+1, H, 2) of a spectrum, by order in x, part, and order in y."""
    rows = torch.matmul(along_x, parts.flatten(-2))
    return torch.matmul(rows.reshape(*rows.shape[:-1], *parts.shape[-2:]).mT, along_y)


class _MomentTables(NamedTuple):
    along_x: Tensor  # (3, w//2+1), powers of ω, as often as a column stands in the whole spectrum
    along_y: Tensor  # (h, 3)
    twice_along_x: (
        Tensor  # (5, w//2+1), the square of how often: a bin and its conjugate pull alike, twice as far
    )
    twice_along_y: Tensor  # (h, 5)
    signs: Tensor  # (3, 2, 3), of real and imaginary part in Re (iω_x)^j (iω_y)^k P
    curvatures: Tensor  # xx, xy, xy, yy among orders of (3, 3)
    squares: Tensor  # and ω_x², ω_x ω_y, ω_x ω_y, ω_y² among those of (5, 5)
    fourths: Tensor
    pairs: Tensor  # of xx, xy, xy, yy, whose products are x⁴, x³y, …, y⁴
    binomial: Tensor  # (5,)
    unknown: Tensor  # (2, 2)


@keeps_tables
def _moment_tables(frame: tuple[int, int], size: tuple[int, int], *, like: Tensor) -> _MomentTables:
    omega_y, omega_x = (2 * math.pi * part for part in WorkingGrid.of(frame, size, 0.5, like).frequencies)
    orders, often = torch.arange(5, device=like.device), 1 + (omega_x > 0).to(like.dtype)
    along_x, along_y = omega_x ** orders[:, None], omega_y[:, None] ** orders
    order = orders[:3, None] + orders[:3]
    sign = 1 - order // 2 % 2 * 2
    signs = torch.stack((sign * (1 - order % 2), -sign * (order % 2)), 1).to(like.dtype)
    matrix = order[:2, :2].flatten()  # of xx, xy, xy, yy the order in y
    pairs = torch.cat(((orders - 2).clamp(min=0), orders.clamp(max=2)))
    factorials = torch.lgamma(1 + orders.to(like.dtype))
    return _MomentTables(
        along_x[:3] * often,
        along_y[:, :3],
        along_x * often.square(),
        along_y,
        signs,
        6 - 2 * matrix,
        10 - 4 * matrix,
        20 - 4 * torch.arange(6, device=like.device),
        pairs + pairs // 2,
        torch.exp(factorials[4] - factorials - factorials.flip(0)).round(),
        torch.diag_embed(torch.full_like(omega_x[:1].expand(2), torch.inf)),
    )


def _symmetric(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """(..., 2, 2)."""
    return torch.stack((xx, xy, xy, yy), -1).reshape(*xx.shape, 2, 2)


def _inverted(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2, 2), of symmetric matrices, 0 where one has no positive determinant; and where it has."""
    (xx, xy), (_, yy) = (row.unbind(-1) for row in matrix.unbind(-2))
    determinant = xx * yy - xy.square()
    regular = (determinant > 0)[..., None, None]
    divisor = with_finite_slope(torch.where(regular, determinant[..., None, None], 1.0))
    inverse = torch.where(regular, _symmetric(yy, xx, -xy) / divisor, 0.0)
    return inverse, regular[..., 0, 0]


def _times(one: Tensor, other: Tensor) -> Tensor:
    """Of (..., 2, 2) matrices, to full precision."""
    return (one.unsqueeze(-1) * other.unsqueeze(-3)).sum(-2)
