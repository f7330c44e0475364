r"""Masked, band-limited, sub-pixel phase correlation of whole stacks.

The chain, each link a function that works alone:

1. :func:`band_limit`: beyond about a quarter of the sampling rate a real sensor's spectrum is mostly folded
   (aliased), and folded frequencies pull every estimate towards whole pixels. The frames are resampled, in the
   spectral domain, onto the coarser grid that holds just the band that is kept: nothing that counts is lost,
   and all that follows costs a quarter.
2. :func:`local_contrast`: high-passed and divided by its local standard deviation, so that bright clouds,
   shadows and gains weigh no more than fields and roads.
3. :func:`cross_power`, :func:`coarse_peak`: the weighted cross-power spectrum and the peak of its inverse.
4. :func:`agreement`: where do the two frames, brought together, show the same ground? Both are weighted by it,
   in the same place of the ground, and correlated again.
5. :func:`refine_peak`: Newton's ascent on the trigonometric polynomial that the correlation is: no grid, no
   interpolation, differentiable by the implicit function theorem.

Convention:
    shift (x, y) in pixels moves the content of the moving frame onto the reference,
    ``reference(p) = moving(p - shift)``; it is the translation of the warp moving → reference.
    With :math:`M, R` the spectra, :math:`M^* R\,` has the phase :math:`-2\pi f \cdot shift`.

References:
    Knapp & Carter 1976, doi:10.1109/TASSP.1976.1162830 (the generalised cross-correlation and its weightings);
    Kuglin & Hines 1975 (phase correlation); Guizar-Sicairos et al. 2008, doi:10.1364/OL.33.000156 (upsampled
    DFT); Stone et al. 2001, doi:10.1109/36.957286 (aliasing and sub-pixel phase correlation); Moisan 2011,
    doi:10.1007/s10851-010-0227-1 (the periodic component of an image).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Contrast",
    "PhaseShift",
    "Texture",
    "Weighting",
    "agreement",
    "band_limit",
    "coarse_peak",
    "cross_power",
    "extract_texture",
    "local_contrast",
    "phase_correlation",
    "refine_peak",
    "working_size",
]

Weighting = Literal["ramp", "sqrt", "phase", "none"]
Contrast = Literal["local", "none"]

# Share of the kept band, from its outer edge, over which the low-pass rolls off: a sharp edge would ring.
_ROLL_OFF = 0.2
# A peak must stand out of its correlation surface by this many standard deviations to be one. Maxima of
# unrelated scenes stay below 4.6 (a Gumbel law); see benchmarks/README.md.
_MIN_SIGNIFICANCE = 5.0
# A peak beyond the limit must exceed the one within by this factor to be believed.
_OUTSIDE_MARGIN = 1.2
_NEWTON_STEPS = 3
# The last Newton step of an estimate that has converged is shorter than this, in pixels (float32 stalls at 1e-5).
_NEWTON_TOLERANCE = 1e-2
# Share of usable pixels around a sample (in 15 × 15 samples) at which its weight is 0, and from which it is 1.
# A soft weight as wide as a hole leaves no pattern of its own to be correlated.
_COVERAGE = (0.3, 0.9)
# Errors on simulated frames of all kinds exceed what the sandwich predicts by this factor (benchmarks/accuracy.py).
_SIGMA_CALIBRATION = 1.07
# A hole is filled from neighbours of at least this (triangular) weight in all; further in it fades to the mean.
_LEAST_WEIGHT = 0.05
# The window falls off over at least this many pixels on each side, where the frame allows it.
_LEAST_RAMP = 8
# Frames with less than this share of usable pixels are not worth a guess.
_MIN_USABLE = 1 / 64


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


class Texture(NamedTuple):
    """What of an image is correlated, see :func:`extract_texture`.

    Attributes:
        field: (..., h, w), band-limited and locally normalised.
        weights: (..., h, w) in [0, 1], small where little is usable; ``None`` if all is.
        flat: (...,) bool, nothing to see: no texture, or too few usable pixels.
    """

    field: Tensor
    weights: Tensor | None
    flat: Tensor


def phase_correlation(
    moving: Tensor,
    reference: Tensor | Texture,
    moving_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    max_translation: float = 5.0,
    max_frequency: float = 0.25,
    contrast: Contrast = "local",
    weighting: Weighting = "ramp",
    taper: float = 0.15,
    robust: bool = True,
    upsample_factor: int | None = None,
    start: Tensor | None = None,
) -> PhaseShift:
    """The translation that brings every moving frame onto the reference. See the module's docstring.

    Args:
        moving: (..., H, W), float32 or float64, finite.
        reference: (..., H, W), broadcastable; or its :func:`extract_texture` with the same options, to compute
            it once for many calls.
        moving_mask: bool, broadcastable to ``moving``, True = usable; ``None`` if all of it is.
        reference_mask: the same for ``reference``.
        max_translation: limit of the length of the shift, in pixels.
        max_frequency: the band that is kept, in cycles per pixel; 0.5 is everything.
        contrast: ``"local"`` for :func:`local_contrast`, ``"none"`` for the mean removed.
        weighting: of the cross-power spectrum, see :func:`cross_power`.
        taper: share of each axis over which the window falls off (Tukey), in [0, 1]; unless it is 0, at least 8
            pixels on each side, or a quarter of a small frame.
        robust: weight by :func:`agreement` and correlate a second time.
        upsample_factor: ``None`` for Newton; n for the best of a grid of 1/n pixel (not differentiable).
        start: (..., 2), a shift to refine, where it correlates better than the coarse peak does.

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
    height, width = moving.shape[-2:]
    size = working_size((height, width), max_frequency)
    grid = _Grid.of((height, width), size, max_frequency, moving)

    field, weights, moving_flat = _texture(moving, moving_mask, grid, contrast)
    if not isinstance(reference, Texture):
        reference = _texture(reference, reference_mask, grid, contrast)
    reference_field, reference_weights, reference_flat = reference
    flat = moving_flat | reference_flat

    def correlate(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The moving frame's spectrum under its window, and the cross-power: (..., h, w//2+1)."""
        spectrum = torch.fft.rfft2(field * own)
        reference_spectrum = torch.fft.rfft2(reference_field * other)
        return spectrum, cross_power(spectrum, reference_spectrum, grid.radius, max_frequency, weighting)

    window = grid.window(taper)
    spectrum, power = correlate(window, window)
    surface = torch.fft.irfft2(power, s=size)
    peak = coarse_peak(surface, (height, width), max_translation)
    if start is not None:
        peak = _higher_of(peak, start, power, grid)
    shift, outside = peak.shift, peak.outside

    inliers = None
    effective = window.square()
    if robust:
        inliers = agreement(grid.move(spectrum, shift), reference_field * window)
        # holes too must lie on the same ground in both, or their pattern is what is correlated
        if reference_weights is not None:
            inliers = inliers * reference_weights
        if weights is not None:
            inliers = inliers * grid.move(torch.fft.rfft2(weights), shift).clamp(0, 1)
        # each frame gets the window, and the weights, of the ground that both see
        tapered = grid.window(taper, -shift) * grid.move(torch.fft.rfft2(inliers), -shift)
        reference_tapered = grid.window(taper, shift) * inliers
        _, power = correlate(tapered, reference_tapered)
        effective = reference_tapered.square()

    if upsample_factor is None:
        refined, step, curved = refine_peak(power, grid.frequencies, shift)
    else:
        refined = _upsampled_peak(power, grid.frequencies, shift, upsample_factor)
        step, curved = torch.zeros_like(shift), torch.ones_like(outside)
    sigma = _sigma(power, grid.frequencies, refined, effective)
    near = (refined - shift).norm(dim=-1) <= 2 * max(height / size[0], width / size[1])
    converged = curved & near & (step.norm(dim=-1) < _NEWTON_TOLERANCE) & torch.isfinite(sigma)
    converged = converged & (peak.significance >= _MIN_SIGNIFICANCE)
    return PhaseShift(refined, sigma, peak.significance, flat, outside, converged, inliers)


def extract_texture(
    image: Tensor, mask: Tensor | None = None, *, max_frequency: float = 0.25, contrast: Contrast = "local"
) -> Texture:
    """The first two links of the chain: fill holes, limit the band, normalise the contrast.

    Args:
        image: (..., H, W), finite.
        mask: bool, broadcastable, True = usable.
        max_frequency: in cycles per pixel.
        contrast: ``"local"`` or ``"none"``.

    Returns:
        :class:`Texture` on the grid of :func:`working_size`.
    """
    height, width = image.shape[-2:]
    size = working_size((height, width), max_frequency)
    return _texture(image, mask, _Grid.of((height, width), size, max_frequency, image), contrast)


def working_size(size: tuple[int, int], max_frequency: float) -> tuple[int, int]:
    """The coarsest grid (h, w), in multiples of 8, that holds the band; never finer than the frame's.

    >>> working_size((256, 101), 0.25), working_size((256, 101), 0.5)
    ((128, 56), (256, 101))
    """
    height, width = (min(length, 8 * math.ceil(2 * max_frequency * length / 8)) for length in size)
    return height, width


def band_limit(image: Tensor, size: tuple[int, int], max_frequency: float = 0.25) -> Tensor:
    """Keep the frequencies below ``max_frequency`` and resample to ``size``, in the spectral domain.

    Sample (i, j) of the result lies at pixel (i·H/h, j·W/w) of the image: the origins coincide. The mean is
    removed, and so is the smooth image that accounts for the jumps between opposite borders, which the Fourier
    series would take for edges (Moisan 2011).

    Args:
        image: (..., H, W).
        size: (h, w), at most (H, W), see :func:`working_size`.
        max_frequency: in cycles per pixel of the image; the outer fifth of the band rolls off as a cosine.

    Returns:
        (..., h, w).
    """
    height, width = image.shape[-2:]
    centred = image - image.mean((-2, -1), keepdim=True)
    return _band_limit(centred, _Grid.of((height, width), size, max_frequency, image))


def local_contrast(image: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""High-passed and normalised by the local standard deviation.

    .. math:: \frac{x - g * x}{\sqrt{g * (x - g * x)^2 + c}}

    with g a triangle of 7 × 7 samples and c the frame's median of the local variance, which keeps noise on flat
    ground from being blown up. Invariant to gain and offset.

    Args:
        image: (..., H, W).
        weights: in [0, 1], broadcastable; the median is taken where they exceed one half, and the result is
            multiplied by them.

    Returns:
        (..., H, W), about [−3, 3].
    """
    detail = image - _triangle(image, 2)
    variance = _triangle(detail.square(), 2)
    # a sixteenth of the samples tells the median as well, and sorting is what costs
    sampled = variance[..., ::4, ::4]
    if weights is not None:
        sampled = sampled.masked_fill(weights[..., ::4, ::4] < 0.5, torch.nan)
    typical = sampled.flatten(-2).nanmedian(-1).values.nan_to_num(0.0)[..., None, None]
    total = variance + typical
    flat = total <= torch.finfo(image.dtype).tiny ** 0.5  # below it the derivative of the root overflows
    contrast = torch.where(flat, 0.0, detail * torch.rsqrt(torch.where(flat, 1.0, total)))
    return contrast if weights is None else contrast * weights


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
    # |z| has no derivative at 0: a floor, relative to nothing smaller than the dtype can tell, stands in
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
    reach = max_translation + 0.5 * math.hypot(step_x, step_y)
    near_y = _lags(rows, reach / step_y, surface)
    near_x = _lags(columns, reach / step_x, surface)
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
    dy = torch.tensor([0, 0, 0, -1, 1], device=surface.device)
    dx = torch.tensor([0, -1, 1, 0, 0], device=surface.device)
    at = (row[..., None] + dy) % rows * columns + (column[..., None] + dx) % columns
    centre, left, right, above, below = flat.gather(-1, at).unbind(-1)
    delta_x, delta_y = _parabola(left, centre, right), _parabola(above, centre, below)
    shift = torch.stack([step_x * (column + delta_x), step_y * (row + delta_y)], dim=-1)
    return _Peak(shift, significance, outside, inside, spread)


def _higher_of(peak: _Peak, start: Tensor, power: Tensor, grid: _Grid) -> _Peak:
    """A given shift instead of the coarse peak, where the correlation is higher there."""
    samples = grid.size[0] * grid.size[1]
    height = _derivatives(power.detach(), grid.frequencies, start.detach())[..., 0, 0] / samples
    better = height >= peak.height
    significance = height.clamp(min=0) / (peak.spread + torch.finfo(height.dtype).tiny)
    return _Peak(
        torch.where(better[..., None], start, peak.shift),
        torch.where(better, significance, peak.significance),
        peak.outside & ~better,
        torch.where(better, height, peak.height),
        peak.spread,
    )


def _lags(samples: int, reach: float, like: Tensor) -> Tensor:
    """The whole lags within ``reach`` samples that a surface of ``samples`` can tell apart."""
    lowest, highest = max(-math.floor(reach), -(samples // 2)), min(math.floor(reach), (samples - 1) // 2)
    return torch.arange(lowest, highest + 1, device=like.device)


def agreement(moving: Tensor, reference: Tensor) -> Tensor:
    r"""Weights in [0, 1]: how much two frames, brought together, show the same ground.

    The squared local correlation coefficient, squared again, over a triangle of 15 × 15 samples,

    .. math:: \left( \frac{(g * ab)_+^2}{(g * a^2)\,(g * b^2)} \right)^2

    near 1 on common ground, near 0 under a cloud, on a changed field, and where one of them is empty.

    Args:
        moving: (..., H, W), over the reference.
        reference: (..., H, W), broadcastable.

    Returns:
        (..., H, W).
    """
    common = _triangle(moving * reference, 3).clamp(min=0)
    energy = _triangle(moving.square(), 3) * _triangle(reference.square(), 3)
    tiny = torch.finfo(moving.dtype).eps ** 2  # the fields are of order 1
    return _triangle((common.square() / (energy + tiny)).square(), 1).clamp(max=1)


def refine_peak(
    power: Tensor, frequencies: tuple[Tensor, Tensor], start: Tensor, *, steps: int = _NEWTON_STEPS
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
        steps: number of steps, at most half a pixel per axis each.

    Returns:
        shift (..., 2); the last step (..., 2); and whether the Hessian is negative definite there (...,).
    """
    shift = start.detach()
    fixed = power.detach()
    for _ in range(steps):
        step, _ = _newton_step(fixed, frequencies, shift)
        shift = shift + step
    last, curved = _newton_step(power, frequencies, shift)
    shift = shift + last
    # identical frames are at exactly 0: what rounding leaves there is taken off, and its gradient kept
    none = shift.detach().abs() < 64 * torch.finfo(shift.dtype).eps
    return torch.where(none, shift - shift.detach(), shift), last.detach(), curved


def _newton_step(power: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor) -> tuple[Tensor, Tensor]:
    derivatives = _derivatives(power, frequencies, shift)  # (..., 3, 3): [order in y, order in x]
    gx, gy = derivatives[..., 0, 1], derivatives[..., 1, 0]
    hxx, hyy, hxy = derivatives[..., 0, 2], derivatives[..., 2, 0], derivatives[..., 1, 1]
    determinant = hxx * hyy - hxy.square()
    curved = (hxx < 0) & (determinant > torch.finfo(hxx.dtype).eps * hxx * hyy)
    safe = torch.where(curved, determinant, 1.0)
    step = torch.stack([hxy * gy - hyy * gx, hxy * gx - hxx * gy], dim=-1) / safe[..., None]
    return torch.where(curved[..., None], step, 0.0).clamp(-0.5, 0.5), curved


def _derivatives(power: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor) -> Tensor:
    """(..., 3, 3): the correlation's derivatives of order 0, 1, 2 in y (rows) and x (columns) at ``shift``."""
    waves_y = _wave(frequencies[0], shift[..., 1])[..., None, :] * _orders(frequencies[0])  # (..., 3, H)
    waves_x = _wave(frequencies[1], shift[..., 0])[..., None, :] * _orders(frequencies[1])  # (..., 3, W//2+1)
    # (10-bit mantissas, as in TF32, would move the peak by less than 1e-4 px)
    return torch.matmul(torch.matmul(waves_y, power), (waves_x * _multiplicity(frequencies[1])).mT).real


def _multiplicity(frequency: Tensor) -> Tensor:
    """(W//2+1,): how often a column stands in the whole spectrum, whose other half is the conjugate."""
    return 1 + (frequency > 0).to(frequency.dtype)


def _orders(frequency: Tensor) -> Tensor:
    """(3, N): what the derivatives of order 0, 1, 2 of e^{iωt} multiply it by: 1, iω, −ω²."""
    omega = 2 * math.pi * frequency
    zero = torch.zeros_like(omega)
    return torch.complex(
        torch.stack([torch.ones_like(omega), zero, -omega.square()]), torch.stack([zero, omega, zero])
    )


def _turn(spectrum: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor) -> Tensor:
    """The spectrum times e^{iω·t}: its content moved by −t."""
    wave_y, wave_x = (_wave(frequency, shift[..., 1 - axis]) for axis, frequency in enumerate(frequencies))
    return spectrum * wave_y[..., :, None] * wave_x[..., None, :]


def _wave(frequency: Tensor, shift: Tensor) -> Tensor:
    """(..., N): e^{iωt}, ω = 2πf in radians per pixel."""
    angle = shift[..., None] * (2 * math.pi * frequency)
    return torch.complex(angle.cos(), angle.sin())


def _upsampled_peak(power: Tensor, frequencies: tuple[Tensor, Tensor], start: Tensor, factor: int) -> Tensor:
    """The best point of a grid of 1/factor pixel, 1.5 pixels around the start (Guizar-Sicairos et al. 2008)."""
    half = math.ceil(0.75 * factor)
    centre = (start.detach() * factor).round()
    offsets = torch.arange(-half, half + 1, device=start.device, dtype=start.dtype)
    candidates = (centre[..., None] + offsets) / factor  # (..., 2, n), x then y
    waves_y = _wave(frequencies[0], candidates[..., 1, :])  # (..., n, H)
    waves_x = _wave(frequencies[1], candidates[..., 0, :]) * _multiplicity(frequencies[1])
    values = torch.matmul(torch.matmul(waves_y, power.detach()), waves_x.mT).real  # (..., n, n)
    best = values.flatten(-2).argmax(-1)
    count = offsets.shape[0]
    return (
        torch.stack([centre[..., 0] + offsets[best % count], centre[..., 1] + offsets[best // count]], -1)
        / factor
    )


def _sigma(power: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor, effective: Tensor) -> Tensor:
    r"""Predicted 1-σ error per axis: the sandwich :math:`H^{-1} G H^{-1}`, G the scatter of the gradient.

    At the optimum every frequency pulls by :math:`-\omega\, \mathrm{Im}\,P e^{i\omega t}`; the pulls sum to zero,
    and the sum of their squares is the variance of that sum, times the number of bins that the window's
    spectrum correlates, :math:`N \sum u^2 / (\sum u)^2` for a window whose square is u.
    """
    power = power.detach()
    shift = shift.detach()
    derivatives = _derivatives(power, frequencies, shift)
    hxx, hyy, hxy = derivatives[..., 0, 2], derivatives[..., 2, 0], derivatives[..., 1, 1]
    omega_y, omega_x = (2 * math.pi * frequency for frequency in frequencies)
    pull = _turn(power, frequencies, shift).imag  # (..., H, W//2+1)
    # a bin and its conjugate pull alike: together (2·pull)², hence 4 where two are counted
    square = pull.square() * _multiplicity(frequencies[1]).square()
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


class _Grid(NamedTuple):
    """The working grid of h × w samples over a frame of H × W pixels; all in pixels of the frame."""

    frame: tuple[int, int]
    size: tuple[int, int]
    max_frequency: float
    frequencies: tuple[Tensor, Tensor]  # (h,), (w//2+1,), cycles per pixel
    radius: Tensor  # (h, w//2+1), |f|

    @classmethod
    def of(cls, frame: tuple[int, int], size: tuple[int, int], max_frequency: float, like: Tensor) -> _Grid:
        kind = {"device": like.device, "dtype": like.dtype}
        # bin k is k cycles per frame, on either grid
        y = torch.fft.fftfreq(size[0], frame[0] / size[0], **kind)
        x = torch.fft.rfftfreq(size[1], frame[1] / size[1], **kind)
        return cls(frame, size, max_frequency, (y, x), torch.hypot(x, y[:, None]))

    def roll_off(self) -> Tensor:
        """(h, w//2+1): 1 in the band, falling to 0 at its edge as a cosine."""
        edge = (self.max_frequency - self.radius) / (_ROLL_OFF * self.max_frequency)
        return 0.5 - 0.5 * torch.cos(math.pi * edge.clamp(0, 1))

    def window(self, taper: float, shift: Tensor | None = None) -> Tensor:
        """(..., h, w): a Tukey window; given a shift, the ground that a frame so shifted has in common with it."""
        profiles = []
        for axis, (length, samples) in enumerate(zip(self.frame, self.size, strict=True)):
            position = torch.arange(samples, device=self.radius.device, dtype=self.radius.dtype) * (
                length / samples
            )
            profile = _tukey(position, length, taper)
            if shift is not None:
                moved = _tukey(position - shift[..., 1 - axis, None], length, taper)
                profile = torch.minimum(profile, moved)
            profiles.append(profile)
        return profiles[0][..., :, None] * profiles[1][..., None, :]

    def move(self, spectrum: Tensor, shift: Tensor) -> Tensor:
        """(..., h, w): the field of a spectrum with its content moved by ``shift`` (..., 2)."""
        return torch.fft.irfft2(_turn(spectrum, self.frequencies, -shift), s=self.size)


def _texture(image: Tensor, mask: Tensor | None, grid: _Grid, contrast: Contrast) -> Texture:
    """See :func:`extract_texture`."""
    height, width = grid.frame
    if mask is None:
        mean = image.mean((-2, -1), keepdim=True)
        centred = image - mean
        empty = torch.zeros_like(mean[..., 0, 0], dtype=torch.bool)
        weights = None
    else:
        share = mask.to(image.dtype).mean((-2, -1), keepdim=True)
        mean = torch.where(mask, image, 0.0).mean((-2, -1), keepdim=True) / share.clamp(
            min=1 / (height * width)
        )
        centred = _fill_holes(torch.where(mask, image - mean, 0.0), mask)
        empty = share[..., 0, 0] < _MIN_USABLE
        weights = _weights(mask, grid)
    limited = _band_limit(centred, grid)
    scale = torch.linalg.vector_norm(limited.detach(), dim=(-2, -1)) / math.sqrt(
        limited.shape[-2] * limited.shape[-1]
    )
    # a frame whose deviation is the rounding error of its mean is flat
    noise = 32 * torch.finfo(image.dtype).eps * mean[..., 0, 0].abs()
    flat = (scale <= noise) | empty | ~torch.isfinite(scale)
    # units of any size: squares of what follows neither vanish nor overflow
    normal = limited / torch.where(flat, 1.0, scale)[..., None, None]
    if contrast == "local":
        return Texture(local_contrast(normal, weights), weights, flat)
    return Texture(normal if weights is None else normal * weights, weights, flat)


def _fill_holes(centred: Tensor, mask: Tensor) -> Tensor:
    """Unusable pixels take the mean of their usable neighbours (7 × 7, triangular), or else that of the frame.

    Narrow holes all but vanish; wide ones keep a soft edge instead of a step, which would ring.
    """
    weight = _triangle(mask.to(centred.dtype), 2)
    local = _triangle(centred, 2) / weight.clamp(min=_LEAST_WEIGHT)
    return torch.where(mask, centred, local)


def _weights(mask: Tensor, grid: _Grid) -> Tensor:
    """(..., h, w) in [0, 1]: how much of what lies around a sample is usable."""
    height, width = grid.size
    shape = mask.shape[:-2]
    share = mask.expand(*shape, *grid.frame).reshape(-1, 1, *grid.frame).to(grid.radius.dtype)
    coverage = F.interpolate(share, size=(height, width), mode="area").reshape(*shape, height, width)
    lowest, highest = _COVERAGE
    return ((_triangle(coverage, 3) - lowest) / (highest - lowest)).clamp(0, 1)


def _band_limit(image: Tensor, grid: _Grid) -> Tensor:
    """See :func:`band_limit`."""
    height, width = grid.frame
    rows, columns = grid.size
    # columns beyond the band are dropped before they are transformed
    spectrum = _keep_rows(torch.fft.fft(torch.fft.rfft(image)[..., : columns // 2 + 1], dim=-2), rows)
    # Moisan's periodic component: what jumps between opposite borders has the Laplacian of a smooth image
    jump_y = torch.fft.rfft(image[..., -1, :] - image[..., 0, :])[..., None, : columns // 2 + 1]
    jump_x = _keep_rows(torch.fft.fft(image[..., :, -1] - image[..., :, 0]).unsqueeze(-1), rows)
    angle_y, angle_x = 2 * math.pi * grid.frequencies[0][:, None], 2 * math.pi * grid.frequencies[1]
    laplacian = 2 * angle_y.cos() + 2 * angle_x.cos() - 4
    laplacian = torch.where(laplacian == 0, 1.0, laplacian)  # at frequency 0, where the jumps vanish
    turn_y, turn_x = (
        torch.complex(1 - angle.cos(), -angle.sin()) / laplacian for angle in (angle_y, angle_x)
    )
    periodic = spectrum - jump_y * turn_y - jump_x * turn_x
    gain = rows * columns / (height * width)
    return torch.fft.irfft2(periodic * (grid.roll_off() * gain), s=(rows, columns))


def _keep_rows(spectrum: Tensor, rows: int) -> Tensor:
    """The rows (dim −2) of the lowest frequencies of either sign, in the order of a transform of that length."""
    height = spectrum.shape[-2]
    if rows == height:
        return spectrum
    return torch.cat([spectrum[..., : rows - rows // 2, :], spectrum[..., height - rows // 2 :, :]], dim=-2)


def _tukey(position: Tensor, length: int, taper: float) -> Tensor:
    """The Tukey window of ``length`` pixels at (fractional) pixel positions: 0 beyond the frame's outer edge."""
    if taper <= 0:
        return ((position > -0.5) & (position < length - 0.5)).to(position.dtype)
    ramp = max(0.5 * taper * length, min(_LEAST_RAMP, 0.25 * length))  # pixels
    from_edge = torch.minimum(position + 0.5, length - 0.5 - position)
    return 0.5 - 0.5 * torch.cos(math.pi * (from_edge / ramp).clamp(0, 1))


def _triangle(image: Tensor, order: int) -> Tensor:
    """Mean with triangular weights over 2·2ⁿ − 1 samples a side: two boxes of 2ⁿ by repeated doubling.

    A chain of 2n additions an axis: much faster than a convolution or a pooling on the CPU.
    """
    length = 2**order
    flat = image.reshape(-1, 1, *image.shape[-2:])
    result = F.pad(flat, (length - 1,) * 4, mode="replicate")
    for dim in (-1, -2):
        for _ in range(2):
            for power in range(order):
                count = result.shape[dim] - 2**power
                result = result.narrow(dim, 0, count) + result.narrow(dim, 2**power, count)
    return (result * (1 / length**4)).reshape(image.shape)


def _parabola(before: Tensor, centre: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three equidistant samples, the middle one highest, has its vertex."""
    curvature = before - 2 * centre + after
    safe = torch.where(curvature < 0, curvature, -1.0)
    return torch.where(curvature < 0, 0.5 * (before - after) / safe, 0.0).clamp(-0.5, 0.5)
