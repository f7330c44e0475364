r"""The maximum of a correlation surface: its highest sample, and Newton's ascent on the polynomial that it is.

The correlation of two fields is a trigonometric polynomial in a continuous shift. It is climbed on its Taylor series:
no grid, no interpolation, differentiable by the implicit function theorem. Shifts (x, y) are in pixels.

References:
    Guizar-Sicairos et al. 2008, doi:10.1364/OL.33.000156 (upsampled DFT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchalign._host import keeps_tables, kernels_for
from torchalign.functional.fourier import waves
from torchalign.functional.masked_correlation import OUTSIDE_MARGIN
from torchalign.functional.sizes import lags_within, square_root
from torchalign.functional.working_grid import WorkingGrid

__all__ = [
    "MIN_SIGNIFICANCE",
    "TERMS",
    "CoarsePeak",
    "ascended",
    "coarse_peak",
    "derivatives_at",
    "higher_of",
    "multiplicity",
    "newton_rows",
    "newton_step",
    "orders_of",
    "refine_peak",
    "settled",
    "upsampled_peak",
    "wave_orders",
]

# A peak must stand out of its correlation surface by this many standard deviations to be one. Maxima of
# unrelated scenes stay below 4.6 (a Gumbel law); see benchmarks/README.md.
MIN_SIGNIFICANCE = 5.0
# Terms of the series along each axis that they climb.
TERMS = 10


class CoarsePeak(NamedTuple):
    """The highest sample of a surface, and how far it stands out."""

    shift: Tensor  # (..., 2), pixels
    significance: Tensor
    outside: Tensor
    height: Tensor  # of the highest sample within the limit
    spread: Tensor  # standard deviation of the surface


def coarse_peak(surface: Tensor, size: tuple[int, int], max_translation: float) -> CoarsePeak:
    """The highest sample of a correlation surface within the limit, and a parabola through its neighbours.

    The surface is periodic; its samples stand for shifts in ± half of the frame, so nothing wraps unseen: a
    higher peak beyond the limit is reported as ``outside``.

    Args:
        surface: (..., h, w), over shifts of the frame of ``size``.
        size: (H, W) of the frame; one sample is H/h by W/w pixels.
        max_translation: in pixels.

    Returns:
        shift (..., 2) in pixels, significance (...,) in standard deviations, outside (...,) bool.
    """
    rows, columns = surface.shape[-2:]
    step_y, step_x = size[0] / rows, size[1] / columns
    # a shift between two samples may have its highest sample half a diagonal beyond the limit
    square = step_x * step_x + step_y * step_y
    reach = max_translation + 0.5 * square_root(square)
    kernels = kernels_for(surface)
    if kernels is not None:
        found = kernels.peak(surface, (step_y, step_x), reach, OUTSIDE_MARGIN, MIN_SIGNIFICANCE)
        if found is not None:
            return CoarsePeak(*found)
    lags, around, excluded = _lags_near((rows, columns), (step_y, step_x), reach, like=surface)
    flat = surface.flatten(-2)
    values = flat.detach()
    inside, index = (values.index_select(-1, around[:, 2]) + excluded).max(-1)
    power = torch.linalg.vector_norm(values, dim=-1).square() / values.shape[-1]
    spread = (power - values.mean(-1).square()).clamp(min=0).sqrt()
    significance = inside.clamp(min=0) / (spread + torch.finfo(surface.dtype).tiny)
    highest = values.amax(-1)
    outside = (highest > OUTSIDE_MARGIN * inside.clamp(min=0)) & (highest >= MIN_SIGNIFICANCE * spread)
    neighbours = flat.gather(-1, around[index])
    before, centre, after = neighbours[..., :2], neighbours[..., 2:3], neighbours[..., 3:]
    delta_x, delta_y = _parabola(before, centre, after).unbind(-1)
    column, row = lags[index].unbind(-1)
    shift = torch.stack([step_x * (column + delta_x), step_y * (row + delta_y)], dim=-1)
    return CoarsePeak(shift, significance, outside, inside, spread)


@keeps_tables
def _lags_near(
    size: tuple[int, int], steps: tuple[float, float], reach: float, *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The lags (n, 2) within a reach; where they and their neighbours lie in a surface, flattened (n, 5); −inf beyond.

    Neighbours in the order left, above, itself, right, below.
    """
    rows, columns = size
    y, x = (lags_within(samples, reach / step, like) for samples, step in zip(size, steps, strict=True))
    excluded = torch.where(torch.hypot(x * steps[1], y[:, None] * steps[0]) <= reach, 0.0, -torch.inf)
    lags = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    place = torch.arange(5, device=like.device)  # made there: a list would be copied from the host
    dx = (place == 3).to(torch.int64) - (place == 0).to(torch.int64)
    dy = (place == 4).to(torch.int64) - (place == 1).to(torch.int64)
    around = (lags[:, 1:] + dy) % rows * columns + (lags[:, :1] + dx) % columns
    return lags, around, excluded.flatten().to(like.dtype)


def higher_of(
    peak: CoarsePeak, start: Tensor, power: Tensor, grid: WorkingGrid, orders: tuple[Tensor, Tensor]
) -> CoarsePeak:
    """A given shift instead of the coarse peak, where the correlation is higher there."""
    samples = grid.size[0] * grid.size[1]
    value = derivatives_at(power.detach(), grid.frequencies, start.detach(), orders)
    height = value[..., 0, 0] / samples
    better = height >= peak.height
    significance = height.clamp(min=0) / (peak.spread + torch.finfo(height.dtype).tiny)
    return CoarsePeak(
        torch.where(better[..., None], start, peak.shift),
        torch.where(better, significance, peak.significance),
        peak.outside & ~better,
        torch.where(better, height, peak.height),
        peak.spread,
    )


def _parabola(before: Tensor, centre: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three equidistant samples, the middle one highest, has its vertex."""
    curvature = torch.sub(before + after, centre, alpha=2)
    flat = curvature >= 0
    return (
        (0.5 * (before - after) / curvature.masked_fill(flat, -1.0)).masked_fill(flat, 0.0).clamp(-0.5, 0.5)
    )


def refine_peak(
    power: Tensor,
    frequencies: tuple[Tensor, Tensor],
    start: Tensor,
    orders: tuple[Tensor, Tensor] | None = None,
    *,
    steps: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Newton's ascent on the correlation as a function of a continuous shift.

    .. math:: C(t) = \sum_f \mathrm{Re}\, P(f)\, e^{2\pi i f \cdot t}

    The steps are made on the polynomial of Taylor's series about the start, whose terms two matrix products give for
    all of them, and carry no gradient. One last step, of the whole sum at the optimum, does,
    :math:`t = t^* - H^{-1} \nabla C`, whose derivative is that of the implicit
    function theorem, at the cost of one step of memory.

    Args:
        power: (..., H, W//2+1), half of a Hermitian cross-power spectrum.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        start: (..., 2), (x, y) in pixels, within the peak's basin.
        orders: ten :func:`wave_orders` of the frequencies, if they are at hand.
        steps: number of steps, one or more, at most half a pixel per axis each.

    Returns:
        shift (..., 2); the last step (..., 2); and whether the Hessian is negative definite there (...,).
    """
    kernels = kernels_for(power, start)
    if kernels is not None:
        climbed = kernels.climb(power, frequencies, start, steps + 1, False)
        if climbed is not None:
            return climbed
    orders = wave_orders(frequencies, TERMS) if orders is None else orders
    shift = ascended(power, frequencies, start, orders, steps, _plain_step)
    last, curved = _plain_step(derivatives_at(power, frequencies, shift, orders, 3))
    return settled(shift + last), last.detach(), curved


def ascended(
    power: Tensor,
    frequencies: tuple[Tensor, Tensor],
    start: Tensor,
    orders: tuple[Tensor, Tensor],
    steps: int,
    newton_step: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    r"""(..., 2): some of Newton's steps from a start, on the polynomial of Taylor's series there. No gradient.

    .. math:: C(t_0 + d) = \sum_{j, k} \frac{d_y^j d_x^k}{j!\, k!}\, \partial_y^j \partial_x^k C(t_0)

    Up to the tenth order each the spectrum is summed once for all of the steps. What is left out is 1e-6 of the
    highest frequency that a grid holds half a sample from the start; the step that follows them is of the whole.
    """
    start = start.detach()
    exponents, factors = _monomials(like=start)
    series = derivatives_at(power.detach(), frequencies, start, orders)
    way, _ = newton_step(series[..., :3, :3])
    for _ in range(steps - 1):
        by_x, by_y = (way[..., None, None] ** exponents * factors).unbind(-3)
        way = way + newton_step(torch.matmul(torch.matmul(by_y, series), by_x.mT))[0]
    return start + way


@keeps_tables
def _monomials(*, like: Tensor) -> tuple[Tensor, Tensor]:
    """(3, n) each: the derivatives of order 0, 1, 2 of d^j / j! are these factors times d to these exponents."""
    order = torch.arange(TERMS, device=like.device, dtype=like.dtype)
    exponents = order - order[:3, None]
    factors = torch.where(exponents >= 0, torch.exp(-torch.lgamma(exponents.clamp(min=0) + 1)), 0.0)
    return exponents.clamp(min=0), factors


def _plain_step(derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step on a sum itself, by its derivatives (..., 3, 3)."""
    return newton_step(newton_rows(derivatives), 0.5)


def newton_step(rows: Tensor, longest: float) -> tuple[Tensor, Tensor]:
    """The step (..., 2) to a maximum by the rows (∇C, H), (..., 2, 3), along x and y; and whether it is one.

    H · step = −∇C by Cramer's rule, whose determinants are the cross product of the two rows.
    """
    first, second = rows.unbind(-2)
    cross = torch.linalg.cross(first, second)
    hxx, hyy, determinant = first[..., 1], second[..., 2], cross[..., 0]
    # negative definite
    left = torch.addcmul(determinant, hxx, hyy, value=-torch.finfo(hxx.dtype).eps)
    curved = torch.minimum(-hxx, left) > 0
    flat = ~curved[..., None]
    step = cross[..., 1:] / determinant[..., None].masked_fill(flat, 1.0)
    return step.masked_fill(flat, 0.0).clamp(-longest, longest), curved


def newton_rows(derivatives: Tensor) -> Tensor:
    """(..., 2, 3): the slope along x, and how it changes along x and y; and the same of the slope along y."""
    flat = derivatives.flatten(-2)
    return flat.index_select(-1, _row_places(like=flat)).reshape(*flat.shape[:-1], 2, 3)


@keeps_tables
def _row_places(*, like: Tensor) -> Tensor:
    """Of orders in y and x, one after the other: 01, 02, 11; 10, 11, 20."""
    row = torch.arange(3, device=like.device)
    return torch.cat((1 + row + row // 2, 3 + row + row // 2))


def derivatives_at(
    power: Tensor,
    frequencies: tuple[Tensor, Tensor],
    shift: Tensor,
    orders: tuple[Tensor, Tensor],
    count: int | None = None,
) -> Tensor:
    """The correlation's derivatives at a shift.

    Args:
        power: (..., H, W//2+1), half of a Hermitian cross-power spectrum.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        shift: (..., 2), (x, y) in pixels.
        orders: :func:`wave_orders` of the frequencies.
        count: how many of them; ``None`` for all.

    Returns:
        (..., count, count), of order 0, 1, 2, … in y (rows) and in x (columns).
    """
    waves_y, waves_x = waves(frequencies, shift)
    # (10-bit mantissas, as in TF32, would move the peak by less than 1e-4 px)
    along_y = torch.matmul(waves_y[..., None, :] * orders[0][:count], power)
    return torch.matmul(along_y, (waves_x[..., None, :] * orders[1][:count]).mT).real


def multiplicity(frequency: Tensor) -> Tensor:
    """(W//2+1,): how often a column stands in the whole spectrum, whose other half is the conjugate."""
    return 1 + (frequency > 0).to(frequency.dtype)


def wave_orders(frequencies: tuple[Tensor, Tensor], count: int = 3) -> tuple[Tensor, Tensor]:
    """What the derivatives of order 0, 1, 2, … of e^{iωt} multiply it by, (iω)^n: (count, H) and (count, W//2+1).

    Those along x count each column as often as it stands in the whole spectrum.
    """
    order = torch.arange(count, device=frequencies[0].device)[:, None]
    odd, sign = order % 2, 1 - order // 2 % 2 * 2
    along_y, along_x = (
        torch.complex(power * ((1 - odd) * sign), power * (odd * sign))
        for power in ((2 * math.pi * frequency) ** order for frequency in frequencies)
    )
    return along_y, along_x * multiplicity(frequencies[1])


@keeps_tables
def orders_of(
    frame: tuple[int, int], size: tuple[int, int], count: int = 3, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`wave_orders` of a working grid."""
    return wave_orders(WorkingGrid.of(frame, size, 0.5, like).frequencies, count)


def upsampled_peak(power: Tensor, frequencies: tuple[Tensor, Tensor], start: Tensor, factor: int) -> Tensor:
    """The best point of a grid of 1/factor pixel, 1.5 pixels around the start (Guizar-Sicairos et al. 2008)."""
    half = math.ceil(0.75 * factor)
    centre = (start.detach() * factor).round()
    offsets = torch.arange(-half, half + 1, device=start.device, dtype=start.dtype)
    candidates = (centre[..., None, :] + offsets[:, None]) / factor  # (..., n, 2)
    waves_y, waves_x = waves(frequencies, candidates)  # (..., n, H) and (..., n, W//2+1)
    along_x = (waves_x * multiplicity(frequencies[1])).mT
    values = torch.matmul(torch.matmul(waves_y, power.detach()), along_x).real  # (..., n, n)
    best = values.flatten(-2).argmax(-1)
    count = offsets.shape[0]
    return (
        torch.stack([centre[..., 0] + offsets[best % count], centre[..., 1] + offsets[best // count]], -1)
        / factor
    )


def settled(shift: Tensor) -> Tensor:
    """Set shifts within rounding of 0 to 0, so that identical frames give exactly 0; gradients are kept."""
    fixed = shift.detach()
    none = fixed.abs() < 64 * torch.finfo(shift.dtype).eps
    return torch.where(none, shift - fixed, shift)
