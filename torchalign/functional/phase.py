r"""Masked, band-limited, sub-pixel phase correlation of whole stacks.

The chain, each link a function that works alone:

1. :func:`~torchalign.functional.texture.extract_texture`: the band limit and the local contrast.
2. :func:`cross_power`, :func:`coarse_peak`: the weighted cross-power spectrum and the peak of its inverse.
3. :func:`~torchalign.functional.common_ground.agreement`: where do the two frames, brought together, show the same
   ground? Both are weighted by it, in the same place of the ground, and correlated again.
4. :func:`refine_peak`: Newton's ascent on the trigonometric polynomial that the correlation is: no grid, no
   interpolation, differentiable by the implicit function theorem.

Convention:
    shift (x, y) in pixels moves the content of the moving frame onto the reference,
    ``reference(p) = moving(p - shift)``; it is the translation of the warp moving → reference.
    With :math:`M, R` the spectra, :math:`M^* R\,` has the phase :math:`-2\pi f \cdot shift`.

References:
    Knapp & Carter 1976, doi:10.1109/TASSP.1976.1162830 (the generalised cross-correlation and its weightings);
    Kuglin & Hines 1975 (phase correlation); Guizar-Sicairos et al. 2008, doi:10.1364/OL.33.000156 (upsampled
    DFT); Stone et al. 2001, doi:10.1109/36.957286 (aliasing and sub-pixel phase correlation).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchalign._check import message
from torchalign._host import kernels_for
from torchalign.functional.common_ground import agreement
from torchalign.functional.fourier import irfft2, rfft2, shift_phase, wave
from torchalign.functional.sizes import lags_within, square_root
from torchalign.functional.texture import Contrast, Texture, extract_pyramid, extract_texture
from torchalign.functional.working_grid import Window, WorkingGrid, working_size

__all__ = [
    "PhaseShift",
    "Weighting",
    "coarse_peak",
    "cross_power",
    "derivatives_at",
    "multiplicity",
    "phase_correlation",
    "refine_peak",
    "wave_orders",
]

Weighting = Literal["ramp", "sqrt", "phase", "none"]

# A peak must stand out of its correlation surface by this many standard deviations to be one. Maxima of
# unrelated scenes stay below 4.6 (a Gumbel law); see benchmarks/README.md.
_MIN_SIGNIFICANCE = 5.0
# A peak beyond the limit must exceed the one within by this factor to be believed.
_OUTSIDE_MARGIN = 1.2
_NEWTON_STEPS = 3
# The last Newton step of an estimate that has converged is shorter than this, in pixels (float32 stalls at 1e-5).
_NEWTON_TOLERANCE = 1e-2
# Errors on simulated frames of all kinds exceed what the sandwich predicts by this factor (benchmarks/accuracy.py).
_SIGMA_CALIBRATION = 1.07
# And across sensors, where each shows edges of its own, by this one more (benchmarks/sensors.py).
_STRUCTURE_CALIBRATION = 3.2


class PhaseShift(NamedTuple):
    """What :func:`phase_correlation` finds, one row a frame.

    Attributes:
        shift: (..., 2), (x, y) in pixels.
        sigma: (...,), predicted 1-σ error per axis, in pixels.
        significance: (...,), height of the coarse peak in standard deviations of the correlation surface.
        flat: (...,) bool, no texture or too few usable pixels in frame or reference.
        outside: (...,) bool, a clearly higher peak lies beyond ``max_translation``.
        converged: (...,) bool, the peak is significant and Newton's ascent arrived near it.
        inliers: (..., h, w), weights in [0, 1] on the grid of the reference (coarser than the frames by the
            band limit): where both show the same ground. ``None`` if not asked for (``robust=False``).
    """

    shift: Tensor
    sigma: Tensor
    significance: Tensor
    flat: Tensor
    outside: Tensor
    converged: Tensor
    inliers: Tensor | None


def phase_correlation(
    moving: Tensor | Texture,
    reference: Tensor | Texture,
    moving_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    max_translation: float = 5.0,
    max_frequency: float = 0.25,
    contrast: Contrast = "local",
    weighting: Weighting | None = None,
    taper: float = 0.15,
    robust: bool | None = None,
    upsample_factor: int | None = None,
    start: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> PhaseShift:
    """The translation that brings every moving frame onto the reference. See the module's docstring.

    Args:
        moving: (..., H, W), float32 or float64, finite; or its :func:`extract_texture` with the same options, and
            ``size``.
        reference: (..., H, W), broadcastable; or its :func:`extract_texture` with the same options, to compute
            it once for many calls.
        moving_mask: bool, broadcastable to ``moving``, True = usable; ``None`` if all of it is.
        reference_mask: the same for ``reference``.
        max_translation: limit of the length of the shift, in pixels.
        max_frequency: the band that is kept, in cycles per pixel; 0.5 is everything.
        contrast: see :func:`extract_texture`.
        weighting: of the cross-power spectrum, see :func:`cross_power`. ``None`` is ``"none"`` for the contrast
            ``"structure"``, whose fields have no 1/f spectrum, and else ``"ramp"``.
        taper: share of each axis over which the window falls off (Tukey), in [0, 1]; unless it is 0, at least 8
            pixels on each side, or a quarter of a small frame.
        robust: weight by :func:`agreement` and correlate a second time. ``None`` is no for ``"structure"``, whose
            weights across sensors cost more than they gain, and else yes.
        upsample_factor: ``None`` for Newton; n for the best of a grid of 1/n pixel (not differentiable).
        start: (..., 2), a shift to refine, where it correlates better than the coarse peak does.
        size: (H, W) in pixels of what a moving texture shows, which it does not tell itself.

    Returns:
        :class:`PhaseShift`. Never NaN, whatever the data.

    Example:
        >>> grid = torch.arange(96.0)
        >>> def scene(x, y):
        ...     waves = torch.tensor([[0.5, 0.4], [0.31, -0.77], [-0.9, 0.1], [0.2, 0.9], [0.7, 0.6]])
        ...     return sum(torch.sin(a * x + b * y + 7 * a) for a, b in waves)
        >>> reference = scene(grid, grid[:, None])
        >>> moving = scene(grid + 1.3, grid[:, None] - 0.6)
        >>> phase_correlation(moving, reference).shift.round(decimals=2)
        tensor([ 1.3000, -0.6000])
    """
    if isinstance(moving, Texture):
        if size is None:
            raise ValueError(message("size", "(H, W) with a moving texture", size, "give the frame's size"))
        texture, samples = moving, (moving.field.shape[-2], moving.field.shape[-1])
        (height, width), grid = size, WorkingGrid.of(size, samples, max_frequency, moving.field)
    else:
        height, width = moving.shape[-2:]
        samples = working_size((height, width), max_frequency)
        grid = WorkingGrid.of((height, width), samples, max_frequency, moving)
        (texture,) = extract_pyramid(moving, moving_mask, grids=(grid,), contrast=contrast)
    field, weights, moving_flat = texture
    vector = texture.is_vector
    weighting = weighting or ("none" if vector else "ramp")
    robust = not vector if robust is None else robust
    if not isinstance(reference, Texture):
        reference = extract_texture(reference, reference_mask, max_frequency=max_frequency, contrast=contrast)
    reference_field, reference_weights, reference_flat = reference
    flat = moving_flat | reference_flat

    def correlate(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The moving frame's spectrum under its window, and the cross-power: (..., h, w//2+1)."""
        spectrum = rfft2(field * own)
        reference_spectrum = rfft2(reference_field * other)
        power = cross_power(spectrum, reference_spectrum, grid.radius, max_frequency, weighting)
        return spectrum, power.sum(0) if vector else power

    orders = wave_orders(grid.frequencies)
    tapering = Window.of(grid, taper)
    window = tapering.whole
    spectrum, power = correlate(window, window)
    surface = irfft2(power, samples)
    peak = coarse_peak(surface, (height, width), max_translation)
    if start is not None:
        peak = _higher_of(peak, start, power, grid, orders)
    shift, outside = peak.shift, peak.outside

    inliers = None
    effective = window.square()
    if robust:
        inliers = agreement(grid.move(spectrum, shift), reference_field * window, vector=vector)
        # holes too must lie on the same ground in both, or their pattern is what is correlated
        if reference_weights is not None:
            inliers = inliers * reference_weights
        if weights is not None:
            inliers = inliers * grid.move(rfft2(weights), shift).clamp(0, 1)
        # each frame gets the window, and the weights, of the ground that both show
        tapered = tapering.common(-shift) * grid.move(rfft2(inliers), -shift)
        reference_tapered = tapering.common(shift) * inliers
        _, power = correlate(tapered, reference_tapered)
        effective = reference_tapered.square()

    if upsample_factor is None:
        refined, step, curved = refine_peak(power, grid.frequencies, shift, orders)
    else:
        refined = _upsampled_peak(power, grid.frequencies, shift, upsample_factor)
        step, curved = torch.zeros_like(shift), torch.ones_like(outside)
    sigma = _sigma(power, grid.frequencies, refined, effective, orders)
    if vector:
        sigma = _STRUCTURE_CALIBRATION * sigma
    climbed = (refined - shift).norm(dim=-1)
    # (not against the larger of the two: under torch.export these are symbols, which cannot be compared)
    near = (climbed <= 2 * height / samples[0]) | (climbed <= 2 * width / samples[1])
    converged = curved & near & (step.norm(dim=-1) < _NEWTON_TOLERANCE) & torch.isfinite(sigma)
    converged = converged & (peak.significance >= _MIN_SIGNIFICANCE)
    return PhaseShift(refined, sigma, peak.significance, flat, outside, converged, inliers)


def cross_power(
    moving: Tensor,
    reference: Tensor,
    radius: Tensor,
    max_frequency: float = 0.5,
    weighting: Weighting = "ramp",
) -> Tensor:
    r"""The weighted cross-power spectrum :math:`\psi(f)\, M^*(f) R(f)`, 0 from ``max_frequency`` on.

    * ``"ramp"``: :math:`\psi = |f|`, which evens out the 1/f spectrum of natural scenes without dividing;
    * ``"sqrt"``: :math:`\psi = |M^* R|^{-1/2}`;
    * ``"phase"``: :math:`\psi = |M^* R|^{-1}`, Kuglin & Hines' phase correlation;
    * ``"none"``: :math:`\psi = 1`, plain cross-correlation.

    Args:
        moving: (..., H, W//2+1), an ``rfft2``.
        reference: the same, broadcastable.
        radius: (H, W//2+1), :math:`|f|` in cycles per pixel.
        max_frequency: in cycles per pixel.
        weighting: see above.

    Returns:
        (..., H, W//2+1), complex.
    """
    band = radius < max_frequency
    power = moving.conj() * reference
    if weighting == "ramp":
        return power * (radius * band)
    if weighting == "none":
        return power * band
    # |z| has no derivative at 0: a floor, relative to nothing smaller than the dtype resolves, stands in
    squared = power.real.square() + power.imag.square()
    floor = torch.finfo(squared.dtype).eps ** 2 * squared.amax((-2, -1), keepdim=True).detach()
    magnitude = (squared + floor + torch.finfo(squared.dtype).tiny).sqrt()
    return power * (band / (magnitude if weighting == "phase" else magnitude.sqrt()))


class _Peak(NamedTuple):
    shift: Tensor  # (..., 2), pixels
    significance: Tensor
    outside: Tensor
    height: Tensor  # of the highest sample within the limit
    spread: Tensor  # standard deviation of the surface


def coarse_peak(surface: Tensor, size: tuple[int, int], max_translation: float) -> _Peak:
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
        found = kernels.peak(surface, (step_y, step_x), reach, _OUTSIDE_MARGIN, _MIN_SIGNIFICANCE)
        if found is not None:
            return _Peak(*found)
    near_y = lags_within(rows, reach / step_y, surface)
    near_x = lags_within(columns, reach / step_x, surface)
    values = surface.detach()
    near = values.index_select(-2, near_y % rows).index_select(-1, near_x % columns)
    within = torch.hypot(near_x * step_x, near_y[:, None] * step_y) <= reach
    inside, index = near.masked_fill(~within, -torch.inf).flatten(-2).max(-1)
    samples = rows * columns
    power = torch.linalg.vector_norm(values, dim=(-2, -1)).square() / samples
    spread = (power - values.mean((-2, -1)).square()).clamp(min=0).sqrt()
    significance = inside.clamp(min=0) / (spread + torch.finfo(surface.dtype).tiny)
    highest = values.amax((-2, -1))
    outside = (highest > _OUTSIDE_MARGIN * inside.clamp(min=0)) & (highest >= _MIN_SIGNIFICANCE * spread)

    row, column = near_y[index // near_x.shape[0]], near_x[index % near_x.shape[0]]
    flat = surface.flatten(-2)
    # the highest sample, its neighbours left and right, above and below: one gather
    place = torch.arange(5, device=surface.device)  # made there: a list would be copied from the host
    dx = (place == 2).to(torch.int64) - (place == 1).to(torch.int64)
    dy = (place == 4).to(torch.int64) - (place == 3).to(torch.int64)
    at = (row[..., None] + dy) % rows * columns + (column[..., None] + dx) % columns
    centre, left, right, above, below = flat.gather(-1, at).unbind(-1)
    delta_x, delta_y = _parabola(left, centre, right), _parabola(above, centre, below)
    shift = torch.stack([step_x * (column + delta_x), step_y * (row + delta_y)], dim=-1)
    return _Peak(shift, significance, outside, inside, spread)


def _higher_of(
    peak: _Peak, start: Tensor, power: Tensor, grid: WorkingGrid, orders: tuple[Tensor, Tensor]
) -> _Peak:
    """A given shift instead of the coarse peak, where the correlation is higher there."""
    samples = grid.size[0] * grid.size[1]
    value = derivatives_at(power.detach(), grid.frequencies, start.detach(), orders)
    height = value[..., 0, 0] / samples
    better = height >= peak.height
    significance = height.clamp(min=0) / (peak.spread + torch.finfo(height.dtype).tiny)
    return _Peak(
        torch.where(better[..., None], start, peak.shift),
        torch.where(better, significance, peak.significance),
        peak.outside & ~better,
        torch.where(better, height, peak.height),
        peak.spread,
    )


def refine_peak(
    power: Tensor,
    frequencies: tuple[Tensor, Tensor],
    start: Tensor,
    orders: tuple[Tensor, Tensor] | None = None,
    *,
    steps: int = _NEWTON_STEPS,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Newton's ascent on the correlation as a function of a continuous shift.

    .. math:: C(t) = \sum_f \mathrm{Re}\, P(f)\, e^{2\pi i f \cdot t}

    Value, gradient and Hessian come from two small matrix products a step. The steps carry no gradient; one
    last step from the optimum does, :math:`t = t^* - H^{-1} \nabla C`, whose derivative is that of the implicit
    function theorem, at the cost of one step of memory.

    Args:
        power: (..., H, W//2+1), half of a Hermitian cross-power spectrum.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        start: (..., 2), (x, y) in pixels, within the peak's basin.
        orders: :func:`wave_orders` of the frequencies, if they are at hand.
        steps: number of steps, at most half a pixel per axis each.

    Returns:
        shift (..., 2); the last step (..., 2); and whether the Hessian is negative definite there (...,).
    """
    kernels = kernels_for(power, start)
    if kernels is not None:
        climbed = kernels.climb(power, frequencies, start, steps + 1)
        if climbed is not None:
            shift, last, derivatives = climbed
            return shift, last, _is_peak(derivatives[..., 3], derivatives[..., 4], derivatives[..., 5])
    shift = start.detach()
    fixed = power.detach()
    orders = wave_orders(frequencies) if orders is None else orders
    for _ in range(steps):
        step, _ = _newton_step(fixed, frequencies, shift, orders)
        shift = shift + step
    last, curved = _newton_step(power, frequencies, shift, orders)
    shift = shift + last
    # identical frames are at exactly 0: what rounding leaves there is taken off, and its gradient kept
    none = shift.detach().abs() < 64 * torch.finfo(shift.dtype).eps
    return torch.where(none, shift - shift.detach(), shift), last.detach(), curved


def _newton_step(
    power: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor, orders: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    derivatives = derivatives_at(power, frequencies, shift, orders)  # (..., 3, 3): [order in y, order in x]
    gx, gy = derivatives[..., 0, 1], derivatives[..., 1, 0]
    hxx, hyy, hxy = derivatives[..., 0, 2], derivatives[..., 2, 0], derivatives[..., 1, 1]
    curved = _is_peak(hxx, hyy, hxy)
    safe = torch.where(curved, hxx * hyy - hxy.square(), 1.0)
    step = torch.stack([hxy * gy - hyy * gx, hxy * gx - hxx * gy], dim=-1) / safe[..., None]
    return torch.where(curved[..., None], step, 0.0).clamp(-0.5, 0.5), curved


def _is_peak(hxx: Tensor, hyy: Tensor, hxy: Tensor) -> Tensor:
    """Whether a Hessian is negative definite."""
    product = hxx * hyy
    return (hxx < 0) & (product - hxy.square() > torch.finfo(hxx.dtype).eps * product)


def derivatives_at(
    power: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor, orders: tuple[Tensor, Tensor]
) -> Tensor:
    """The correlation's derivatives at a shift.

    Args:
        power: (..., H, W//2+1), half of a Hermitian cross-power spectrum.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        shift: (..., 2), (x, y) in pixels.
        orders: :func:`wave_orders` of the frequencies.

    Returns:
        (..., 3, 3), of order 0, 1, 2 in y (rows) and in x (columns).
    """
    waves_y = wave(frequencies[0], shift[..., 1])[..., None, :] * orders[0]  # (..., 3, H)
    waves_x = wave(frequencies[1], shift[..., 0])[..., None, :] * orders[1]  # (..., 3, W//2+1)
    # (10-bit mantissas, as in TF32, would move the peak by less than 1e-4 px)
    return torch.matmul(torch.matmul(waves_y, power), waves_x.mT).real


def multiplicity(frequency: Tensor) -> Tensor:
    """(W//2+1,): how often a column stands in the whole spectrum, whose other half is the conjugate."""
    return 1 + (frequency > 0).to(frequency.dtype)


def wave_orders(frequencies: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the derivatives of order 0, 1, 2 of e^{iωt} multiply it by, 1, iω, −ω²: (3, H) and (3, W//2+1).

    Those along x count each column as often as it stands in the whole spectrum.
    """
    y, x = (2 * math.pi * frequency for frequency in frequencies)
    along_y, along_x = (
        torch.complex(
            torch.stack([torch.ones_like(omega), torch.zeros_like(omega), -omega.square()]),
            torch.stack([torch.zeros_like(omega), omega, torch.zeros_like(omega)]),
        )
        for omega in (y, x)
    )
    return along_y, along_x * multiplicity(frequencies[1])


def _upsampled_peak(power: Tensor, frequencies: tuple[Tensor, Tensor], start: Tensor, factor: int) -> Tensor:
    """The best point of a grid of 1/factor pixel, 1.5 pixels around the start (Guizar-Sicairos et al. 2008)."""
    half = math.ceil(0.75 * factor)
    centre = (start.detach() * factor).round()
    offsets = torch.arange(-half, half + 1, device=start.device, dtype=start.dtype)
    candidates = (centre[..., None] + offsets) / factor  # (..., 2, n), x then y
    waves_y = wave(frequencies[0], candidates[..., 1, :])  # (..., n, H)
    waves_x = wave(frequencies[1], candidates[..., 0, :]) * multiplicity(frequencies[1])
    values = torch.matmul(torch.matmul(waves_y, power.detach()), waves_x.mT).real  # (..., n, n)
    best = values.flatten(-2).argmax(-1)
    count = offsets.shape[0]
    return (
        torch.stack([centre[..., 0] + offsets[best % count], centre[..., 1] + offsets[best // count]], -1)
        / factor
    )


def _sigma(
    power: Tensor,
    frequencies: tuple[Tensor, Tensor],
    shift: Tensor,
    effective: Tensor,
    orders: tuple[Tensor, Tensor],
) -> Tensor:
    r"""Predicted 1-σ error per axis: the sandwich :math:`H^{-1} G H^{-1}`, G the scatter of the gradient.

    At the optimum every frequency pulls by :math:`-\omega\, \mathrm{Im}\,P e^{i\omega t}`; the pulls sum to zero,
    and the sum of their squares is the variance of that sum, times the number of bins that the window's
    spectrum correlates, :math:`N \sum u^2 / (\sum u)^2` for a window whose square is u.
    """
    power = power.detach()
    shift = shift.detach()
    derivatives = derivatives_at(power, frequencies, shift, orders)
    hxx, hyy, hxy = derivatives[..., 0, 2], derivatives[..., 2, 0], derivatives[..., 1, 1]
    omega_y, omega_x = (2 * math.pi * frequency for frequency in frequencies)
    pull = shift_phase(power, frequencies, shift).imag  # (..., H, W//2+1)
    # a bin and its conjugate pull alike: together (2·pull)², hence 4 where two are counted
    square = pull.square() * multiplicity(frequencies[1]).square()
    by_row, by_column = square.sum(-1), square.sum(-2)
    gxx, gyy = (by_column * omega_x.square()).sum(-1), (by_row * omega_y.square()).sum(-1)
    gxy = (torch.matmul(square, omega_x) * omega_y).sum(-1)
    determinant = hxx * hyy - hxy.square()
    safe = torch.where(determinant > 0, determinant, 1.0)
    variance_x = (hyy.square() * gxx - 2 * hyy * hxy * gxy + hxy.square() * gyy) / safe.square()
    variance_y = (hxx.square() * gyy - 2 * hxx * hxy * gxy + hxy.square() * gxx) / safe.square()
    effective = effective.detach()
    area = effective.sum((-2, -1))
    samples = effective.shape[-2] * effective.shape[-1]
    correlated = samples * effective.square().sum((-2, -1)) / (area.square() + torch.finfo(area.dtype).tiny)
    sigma = _SIGMA_CALIBRATION * (0.5 * (variance_x + variance_y) * correlated).clamp(min=0).sqrt()
    return torch.where(determinant > 0, sigma, torch.inf)


def _parabola(before: Tensor, centre: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three equidistant samples, the middle one highest, has its vertex."""
    curvature = before - 2 * centre + after
    safe = torch.where(curvature < 0, curvature, -1.0)
    return torch.where(curvature < 0, 0.5 * (before - after) / safe, 0.0).clamp(-0.5, 0.5)
