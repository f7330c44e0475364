r"""Masked, band-limited, sub-pixel phase correlation of whole stacks.

The chain, each link a function that works alone:

1. :func:`~torchalign.functional.texture.extract_texture`: the band limit and the local contrast.
2. :func:`cross_power`, :func:`~torchalign.functional.peak.coarse_peak`: the weighted cross-power spectrum and the peak
   of its inverse.
3. :func:`~torchalign.functional.common_ground.agreement`: where do the two frames, brought together, show the same
   ground? Both are weighted by it, in the same place of the ground, and correlated again.
4. :func:`~torchalign.functional.stripes.without_stripes`: what is of the detector is left out.
5. :func:`~torchalign.functional.peak.refine_peak`: Newton's ascent; where frames have holes, on the correlation divided
   by their overlap.

Convention:
    shift (x, y) in pixels moves the content of the moving frame onto the reference,
    ``reference(p) = moving(p - shift)``; it is the translation of the warp moving → reference.
    With :math:`M, R` the spectra, :math:`M^* R\,` has the phase :math:`-2\pi f \cdot shift`.

References:
    Knapp & Carter 1976, doi:10.1109/TASSP.1976.1162830 (the generalised cross-correlation and its weightings);
    Kuglin & Hines 1975 (phase correlation); Stone et al. 2001, doi:10.1109/36.957286 (aliasing and sub-pixel phase
    correlation).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._check import message
from torchalign._host import kernels_for
from torchalign.functional.common_ground import BLOCK, agreement_of_blocks
from torchalign.functional.fourier import irfft2, rfft2, shift_phase
from torchalign.functional.peak import (
    MIN_SIGNIFICANCE,
    TERMS,
    CoarsePeak,
    ascended,
    coarse_peak,
    derivatives_at,
    higher_of,
    newton_rows,
    newton_step,
    orders_of,
    refine_peak,
    settled,
    upsampled_peak,
)
from torchalign.functional.smoothing import between_blocks, block_means, enlarge
from torchalign.functional.stripes import lines_of, without_stripes
from torchalign.functional.texture import Contrast, Texture, extract_pyramid, extract_texture
from torchalign.functional.uncertainty import (
    CALIBRATION,
    LEAST_HEIGHT,
    PeakQuality,
    assess_peak,
    block_pulls,
    largest_sigma,
    overlap_curvature,
    with_finite_slope,
)
from torchalign.functional.working_grid import Window, WorkingGrid, working_size

__all__ = ["PhaseShift", "Weighting", "cross_power", "phase_correlation"]

Weighting = Literal["ramp", "sqrt", "phase", "none"]

# Or the maximum of the second correlation must rise so many above what chance may reach: of unrelated scenes it stays
# more than half a deviation below. It tells ground under clouds better, as it is that of ground in common.
_SURE = 2.5
_NEWTON_STEPS = 2
# The last Newton step of an estimate that has converged is shorter than this, in pixels (float32 stalls at 1e-5).
_NEWTON_TOLERANCE = 1e-2
# Holes that pull so far, in pixels, may pull on.
_FAR_PULLED = 0.5
# Holes are divided by where they, and what is next to them, are at least this share of a frame; and where what lies
# off them is at least that share of what is mostly usable.
_LEAST_HOLES, _LEAST_COVER = 0.06, 0.6
# Across sensors, where each shows edges of its own, errors exceed the prediction by that (benchmarks/sensors.py).
_STRUCTURE_CALIBRATION = 3.2
# Less ground in common than this share of a frame counts as that.
_LEAST_SHARE = 0.05
# What is taken off for the weights' own correlation is of the second order: no more than this, on no longer a way
# than that, in pixels.
_LARGEST_CORRECTION, _LONGEST_WAY = 0.5, 4.0
# Ground in common, which is told at the same place, pulls there besides: the error left is so many times that.
_LEFT_PULLS = 2.0


class PhaseShift(NamedTuple):
    """What :func:`phase_correlation` finds, one row a frame.

    Attributes:
        shift: (..., 2), (x, y) in pixels.
        sigma: (...,), predicted 1-σ error in pixels, along the larger axis of ``covariance``.
        covariance: (..., 2, 2), predicted, of the errors, px².
        misfit: (...,), what of its trace comes from parts of the frame that disagree: a motion that a shift lacks.
        significance: (...,), height of the coarse peak in standard deviations of the correlation surface.
        flat: (...,) bool, no texture or too few usable pixels in frame or reference.
        outside: (...,) bool, a clearly higher peak lies beyond ``max_translation``.
        converged: (...,) bool, the peak is significant, or the second one rises 2.5 deviations above what chance may
            reach, and Newton's ascent arrived near it.
        ambiguous: (...,) bool, along some direction nothing but the weights, or chance, fixes the maximum, or it is
            lower than chance may reach: 3 deviations within 5 pixels, and more where more places are sought.
        inliers: (..., h, w), weights in [0, 1] on the grid of the reference (coarser than the frames by the
            band limit): where both show the same ground. ``None`` if not asked for (``robust=False``).
    """

    shift: Tensor
    sigma: Tensor
    covariance: Tensor
    misfit: Tensor
    significance: Tensor
    flat: Tensor
    outside: Tensor
    converged: Tensor
    ambiguous: Tensor
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
    fixed_at: Tensor | None = None,
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
        fixed_at: (..., 2), the shift at which a pattern of the detector lies on itself, if frames were moved before;
            ``None``: no shift.

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
    texture, grid = _textured(moving, moving_mask, size, max_frequency, contrast)
    (height, width), samples = grid.frame, grid.size
    vector = texture.is_vector
    weighting = weighting or ("none" if vector else "ramp")
    robust = not vector if robust is None else robust
    if not isinstance(reference, Texture):
        reference = extract_texture(
            reference, reference_mask, max_frequency=max_frequency, contrast=contrast, cover=True
        )
    pair = _Pair(texture, reference, grid, Window.of(grid, taper), weighting)
    window = pair.tapering.whole
    spectrum, still, power = pair.correlate(window, window)
    peak = _find_peak(power, grid, max_translation, start)
    shift, outside = peak.shift, peak.outside

    inliers, effective, holes = None, window, None
    if robust:
        same = agreement_of_blocks(grid.move(spectrum, shift), reference.field * window, vector=vector)
        own_window, other_window = pair.tapering.common(torch.stack((-shift, shift))).unbind()
        windows = own_window, other_window
        back = pair.moved_back(shift)
        inliers, own, effective = pair.weights_at(shift, same, windows, back)
        spectrum, still, power = pair.correlate(own, effective)
        if not vector and upsample_factor is None:
            holes = pair.holes()
    if not vector:
        power, still = without_stripes(power, still, grid, shift, fixed_at)
    together = shift if robust else torch.zeros_like(shift)
    left = _LEFT_PULLS if robust else 1.0
    found = _refine_plain(power, effective, shift, together, grid, upsample_factor, left)
    significant, ambiguous = _told_from_chance(peak, found.quality, max_translation, vector=vector)
    misfit = torch.zeros_like(found.quality.height)
    if not vector and weighting == "ramp":
        pulls = block_pulls(spectrum.detach(), still.detach(), found.peak, grid)
        share = pair.share_of(same) if robust else None
        quality, misfit = found.quality.with_misfit(pulls, share)
        found = found._replace(quality=quality)
    if holes is not None:
        divided, step, curved = _refine_divided(pair, found.shift.detach(), same, windows, back)
        found = found._replace(
            shift=torch.where(holes[..., None], divided, found.shift),
            step=torch.where(holes, step, found.step),
            curved=torch.where(holes, curved, found.curved),
            quality=found.quality.widened(_doubt(divided - found.shift, holes)),
        )
    covariance = found.quality.covariance
    if vector:
        covariance = _STRUCTURE_CALIBRATION**2 * covariance
    sigma = largest_sigma(covariance)
    climbed = (found.shift - shift).norm(dim=-1)
    # (not against the larger of the two: under torch.export these are symbols, which cannot be compared)
    near = (climbed <= 2 * height / samples[0]) | (climbed <= 2 * width / samples[1])
    converged = found.curved & near & (found.step < _NEWTON_TOLERANCE) & torch.isfinite(sigma) & significant
    flat = texture.flat | reference.flat
    told = peak.significance, flat, outside, converged, ambiguous, inliers
    return PhaseShift(found.shift, sigma, covariance, misfit, *told)


def _told_from_chance(
    peak: CoarsePeak, quality: PeakQuality, max_translation: float, *, vector: bool
) -> tuple[Tensor, Tensor]:
    """(...,) bool each: whether chance has no such maximum, and whether it may have, or a direction is not fixed."""
    significant = peak.significance >= MIN_SIGNIFICANCE
    if vector:  # its power is in a few low frequencies: the surface's peak separates ground from chance
        return significant, quality._replace(height=torch.full_like(quality.height, torch.inf)).ambiguous
    # among more places chance rises higher: as rarely as to the least height within 5 pixels
    least = math.sqrt(LEAST_HEIGHT**2 + 4 * math.log(max(max_translation / 5, 1.0)))
    return significant | (quality.height >= least + _SURE), quality.ambiguous | (quality.height < least)


def _find_peak(power: Tensor, grid: WorkingGrid, max_translation: float, start: Tensor | None) -> CoarsePeak:
    """The coarse peak, or the start where the correlation is higher there."""
    # without the two lines on which a detector's stripes lie, which fit at no shift
    *_, off_lines = lines_of(grid.frame, grid.size, like=grid.radius)
    ground = power * off_lines
    peak = coarse_peak(irfft2(ground, grid.size), grid.frame, max_translation)
    if start is None:
        return peak
    return higher_of(peak, start, ground, grid, orders_of(grid.frame, grid.size, like=grid.radius))


def _textured(
    moving: Tensor | Texture,
    mask: Tensor | None,
    size: tuple[int, int] | None,
    max_frequency: float,
    contrast: Contrast,
) -> tuple[Texture, WorkingGrid]:
    """The texture of moving frames, and its grid."""
    if isinstance(moving, Texture):
        if size is None:
            raise ValueError(message("size", "(H, W) with a moving texture", size, "give the frame's size"))
        samples = moving.field.shape[-2], moving.field.shape[-1]
        return moving, WorkingGrid.of(size, samples, max_frequency, moving.field)
    size = moving.shape[-2], moving.shape[-1]
    grid = WorkingGrid.of(size, working_size(size, max_frequency), max_frequency, moving)
    (texture,) = extract_pyramid(moving, mask, grids=(grid,), contrast=contrast, cover=True)
    return texture, grid


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
    if weighting in ("ramp", "none"):
        weight = radius * band if weighting == "ramp" else band.to(radius)
        kernels = kernels_for(moving, reference)
        if kernels is not None:
            return kernels.cross(moving, reference, weight)
        return moving.conj() * (reference * weight)  # the reference may be one for all frames
    power = moving.conj() * reference
    # |z| has no derivative at 0: a floor, relative to nothing smaller than the dtype resolves, stands in
    squared = power.real.square() + power.imag.square()
    floor = torch.finfo(squared.dtype).eps ** 2 * squared.amax((-2, -1), keepdim=True).detach()
    magnitude = (squared + floor + torch.finfo(squared.dtype).tiny).sqrt()
    return power * (band / (magnitude if weighting == "phase" else magnitude.sqrt()))


class _Pair(NamedTuple):
    """Frames and their reference, as they are correlated."""

    moving: Texture
    reference: Texture
    grid: WorkingGrid
    tapering: Window
    weighting: Weighting

    def correlate(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The spectra of both under weights (..., h, w), and the cross-power: (..., h, w//2+1)."""
        spectrum = rfft2(self.moving.field * own)
        reference = rfft2(self.reference.field * other)
        power = cross_power(spectrum, reference, self.grid.radius, self.grid.max_frequency, self.weighting)
        return spectrum, reference, power.sum(0) if self.moving.is_vector else power

    def moved_back(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """What brings blocks of the reference over the frame, see :func:`between_blocks`."""
        return between_blocks(shift, BLOCK, self.grid.size, self.grid.spacings())

    def weights_at(
        self, shift: Tensor, same: Tensor, windows: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where both show the same ground, over the reference; and the weights of the two that lie on it.

        Args:
            shift: (..., 2), at which ``same`` was told.
            same: (..., n, m), of blocks of the reference.
            windows: (..., h, w) each, of the ground in common, over the frame and over the reference.
            back: see :meth:`moved_back`.
        """
        # holes too must lie on the same ground in both, else their pattern is correlated
        if self.reference.weights is not None:
            same = same * block_means(self.reference.weights, BLOCK)
        if self.moving.weights is not None:
            y, x = (-BLOCK * spacing for spacing in self.grid.spacings())
            over = between_blocks(shift, 1, (same.shape[-2], same.shape[-1]), (y, x))
            same = same * _sampled_blocks(block_means(self.moving.weights, BLOCK), over)
        inliers = enlarge(same, BLOCK, self.grid.size)
        # each frame gets the window, and the weights, of the ground that both see
        return inliers, windows[0] * _sampled_blocks(same, back), windows[1] * inliers

    def share_of(self, same: Tensor) -> Tensor:
        """(...,) in (0, 1]: how much of what both could show they show alike, of blocks (..., n, m)."""
        share = same.detach().mean((-2, -1))
        weights = [one.weights for one in (self.moving, self.reference) if one.weights is not None]
        if weights:
            # they are smooth: every fourth sample tells
            usable = [one[..., ::4, ::4].mean((-2, -1)) for one in weights]
            whole = usable[0] if len(usable) == 1 else usable[0] * usable[1]
            share = share / whole.clamp(min=_LEAST_SHARE)
        return share.clamp(_LEAST_SHARE, 1)

    def holes(self) -> Tensor | None:
        """(...,) bool: the pairs of which one has a hole, and around them enough is left; ``None``: none can have.

        Pixels missing here and there are filled well enough; of what is further from any there may be nothing.
        """
        found: Tensor | None = None
        enough: Tensor | None = None
        for texture in (self.moving, self.reference):
            if texture.cover is None or texture.weights is None:
                continue
            share = texture.cover.mean((-2, -1))
            some, left = share < 1 - _LEAST_HOLES, share >= _LEAST_COVER * texture.weights.mean((-2, -1))
            found = some if found is None else found | some
            enough = left if enough is None else enough & left
        return None if found is None or enough is None else found & enough


def _sampled_blocks(blocks: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """(..., h, w): samples of blocks, see :func:`between_blocks`."""
    return torch.matmul(torch.matmul(matrices[0], blocks), matrices[1].mT)


class _Refined(NamedTuple):
    shift: Tensor  # (..., 2)
    step: Tensor  # (...,), length of the last of Newton's steps
    curved: Tensor  # (...,) bool
    quality: PeakQuality
    peak: Tensor  # (..., 2), of the correlation itself


def _refine_plain(
    power: Tensor,
    weights: Tensor,
    start: Tensor,
    together: Tensor,
    grid: WorkingGrid,
    upsample_factor: int | None,
    left: float,
) -> _Refined:
    """The peak near ``start`` of the correlation of frames whose weights (..., h, w) match at ``together``.

    The correlation is that of the ground times that of the weights, which has its peak there and pulls there. To
    the second order in the way from there, its curvature is taken off, ``left`` times which is error.
    """
    if upsample_factor is None:
        orders = orders_of(grid.frame, grid.size, TERMS, like=grid.radius)
        shift, step, curved = refine_peak(power, grid.frequencies, start, orders, steps=_NEWTON_STEPS)
    else:
        shift = upsampled_peak(power, grid.frequencies, start, upsample_factor)
        step, curved = torch.zeros_like(shift), torch.ones_like(shift[..., 0], dtype=torch.bool)
    step = step.norm(dim=-1)
    kernels = kernels_for(power, shift, together, weights) if upsample_factor is None else None
    if kernels is not None:
        limits = (*CALIBRATION, left, _LONGEST_WAY, _LARGEST_CORRECTION)
        known = kernels.assess(power, grid.frequencies, shift, together, weights, grid.spacings(), limits)
        if known is not None:
            return _Refined(known[0], step, curved, PeakQuality(*known[1:]), shift.detach())
    found = shift
    bins = _correlated_bins(weights.detach().square())
    turned = shift_phase(power, grid.frequencies, found)
    quality, correction = assess_peak(turned, grid, overlap_curvature(weights, grid), bins)
    if upsample_factor is None:
        away = (found - together).clamp(-_LONGEST_WAY, _LONGEST_WAY)
        extra = (correction * away[..., None, :]).sum(-1)
        bounded = extra.detach().abs().amax(-1, keepdim=True) <= _LARGEST_CORRECTION
        shift = settled(found + torch.where(bounded, extra, 0.0))
        quality = quality.widened(left * extra.detach().clamp(-1, 1))
    return _Refined(shift, step, curved, quality, found.detach())


def _refine_divided(
    pair: _Pair, start: Tensor, same: Tensor, windows: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The peak of the correlation divided by the overlap of the weights: even regular holes do not bias it.

    .. math:: S(t) = \frac{\sum w_m(p - t)\, w_r(p)\, f(p - t)\, g(p)}
                          {\sqrt{\sum w_m f^2 (p - t)\, w_r(p) \cdot \sum w_m(p - t)\, w_r g^2 (p)}}

    Each of the sums is a trigonometric polynomial, so that the logarithm of S has derivatives in closed form, and
    Newton's method climbs it (Padfield 2012, doi:10.1109/TIP.2011.2181402, at whole pixels).

    Args:
        pair: what is correlated.
        start: (..., 2), near the peak.
        same: (..., n, m), weights of blocks of the reference.
        windows: (..., h, w) each, of the ground in common, over the frame and over the reference.
        back: see :meth:`_Pair.moved_back`, of the shift at which ``same`` was told.

    Returns:
        The shift (..., 2); the length of the last step; and whether the curvature there is that of a maximum.
    """
    grid = pair.grid
    spectra = rfft2(_divided_fields(pair, same, windows, back))  # (2, 3, ..., h, w//2+1)
    kernels = kernels_for(spectra, start)
    if kernels is not None:
        climbed = kernels.climb(spectra, grid.frequencies, start, _NEWTON_STEPS + 1, True)
        if climbed is not None:
            return climbed[0], climbed[1].norm(dim=-1), climbed[2]
    powers, orders = spectra[0].conj() * spectra[1], orders_of(grid.frame, grid.size, TERMS, like=grid.radius)
    shift = ascended(powers, grid.frequencies, start, orders, _NEWTON_STEPS, _divided_step)
    step, curved = _divided_step(derivatives_at(powers, grid.frequencies, shift, orders, 3))
    return settled(shift + step), step.detach().norm(dim=-1), curved


def _divided_fields(
    pair: _Pair, same: Tensor, windows: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]
) -> Tensor:
    """(2, 3, ..., h, w): of the moving frame and of the reference what each of the three sums correlates."""
    root = same.clamp(min=torch.finfo(same.dtype).tiny).sqrt()
    inliers, moved = enlarge(root, BLOCK, pair.grid.size), _sampled_blocks(root, back)
    covers = pair.moving.cover, pair.reference.cover
    first, second = (
        texture.field if texture.detail is None else texture.detail
        for texture in (pair.moving, pair.reference)
    )
    kernels = kernels_for(moved, *windows, *covers, first, second)
    if kernels is not None:
        return kernels.overlaps(windows, moved, inliers, *covers, first, second)
    own, other = windows[0] * moved, windows[1] * inliers
    if covers[0] is not None:
        own = own * covers[0]
    if covers[1] is not None:
        other = other * covers[1]
    weighted, other_weighted = own * first, other * second
    fields = weighted, weighted * first, own, other_weighted, other, other_weighted * second
    return torch.stack(torch.broadcast_tensors(*fields)).unflatten(0, (2, 3))  # type: ignore[no-untyped-call]


def _divided_step(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step (..., 2) on log S, by the derivatives (3, ..., 3, 3) of its sums; and whether to a maximum."""
    value = sums[..., 0, 0]
    positive = value > 0
    rows = newton_rows(sums) / with_finite_slope(torch.where(positive, value, 1.0))[..., None, None]
    # of a logarithm the curvatures lose the product of the slopes
    slopes = rows[..., 0]
    rows = torch.addcmul(rows, slopes[..., None], F.pad(slopes, (1, 0))[..., None, :], value=-1)
    step, curved = newton_step(torch.sub(rows[0], rows[1] + rows[2], alpha=0.5), 0.3)
    curved = curved & positive.all(0)
    return torch.where(curved[..., None], step, 0.0), curved


def _doubt(way: Tensor, holes: Tensor) -> Tensor:
    """(..., 2): the error left by holes that biased a shift by ``way`` (..., 2): all of it where that was far."""
    way = way.detach()
    share = (way.norm(dim=-1) / _FAR_PULLED).clamp(max=1)
    return way * torch.where(holes, share, 0.0)[..., None]


def _correlated_bins(effective: Tensor) -> Tensor:
    """(...,): a window whose square is u correlates N Σu² / (Σu)² bins of its spectrum of N."""
    area = effective.sum((-2, -1))
    samples = effective.shape[-2] * effective.shape[-1]
    return samples * effective.square().sum((-2, -1)) / (area.square() + torch.finfo(area.dtype).tiny)
