r"""What of an image is registered: band-limited, locally normalised, on the coarsest grid that holds the band.

The links, each a function that works alone, which every method shares:

* :func:`band_limit`: beyond about a quarter of the sampling rate a real sensor's spectrum is mostly folded
  (aliased), and folded frequencies pull every estimate towards whole pixels. The frames are resampled, in the
  spectral domain, onto the coarser grid that holds just the band that is kept: nothing that counts is lost,
  and all that follows costs a quarter.
* :func:`local_contrast`: high-passed and divided by its local standard deviation, so that bright clouds,
  shadows and gains weigh no more than fields and roads.
* :func:`agreement`: about where do two frames, brought together, show the same ground?
* :func:`shared_ground`: which of their pixels do?

:func:`extract_texture` is the chain of the first two, :func:`extract_pyramid` the same for several bands.

References:
    Moisan 2011, doi:10.1007/s10851-010-0227-1 (the periodic component of an image).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import is_symbol
from torchalign.functional.fourier import fft, irfft2, rfft, turn_spectrum

__all__ = [
    "Contrast",
    "Grid",
    "Texture",
    "Window",
    "agreement",
    "band_limit",
    "extract_pyramid",
    "extract_texture",
    "fill_small_holes",
    "local_contrast",
    "nanmedian",
    "pool",
    "shared_ground",
    "tukey",
    "working_size",
]

Contrast = Literal["local", "none"]

# Share of the kept band, from its outer edge, over which the low-pass rolls off: a sharp edge would ring.
_ROLL_OFF = 0.2
# Share of usable pixels around a sample (in 15 × 15 samples) at which its weight is 0, and from which it is 1.
# A soft weight as wide as a hole leaves no pattern of its own to be correlated.
_COVERAGE = (0.3, 0.9)
# A hole is filled from neighbours of at least this (triangular) weight in all; further in it fades to the mean.
_LEAST_WEIGHT = 0.05
# A hole so much of whose surroundings is usable is as good as none, once it is filled.
_FILLED = 0.7
# The window falls off over at least this many pixels on each side, where the frame allows it.
_LEAST_RAMP = 8
# Frames with less than this share of usable pixels are not worth a guess.
_MIN_USABLE = 1 / 64
# Shared ground: rounds of regression, residuals that still belong to it, in their standard deviations, and by how
# much, in pixels, the frames may not lie on each other yet.
_ROUNDS, _LARGEST_RESIDUAL, _MISALIGNED = 5, 4.0, 0.5
# Where hardly anything agrees, the line is that of the frame: it counts as much as this share of agreeing ground.
# And where the reference is flat, the slope is: that share of the frame's variance.
_PRIOR, _FLAT_PRIOR = 0.3, 0.05


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


class Grid(NamedTuple):
    """The working grid of h × w samples over a frame of H × W pixels; all in pixels of the frame."""

    frame: tuple[int, int]
    size: tuple[int, int]
    max_frequency: float
    frequencies: tuple[Tensor, Tensor]  # (h,), (w//2+1,), cycles per pixel
    radius: Tensor  # (h, w//2+1), |f|
    roll_off: Tensor  # (h, w//2+1): 1 in the band, falling to 0 at its edge as a cosine

    @classmethod
    def of(cls, frame: tuple[int, int], size: tuple[int, int], max_frequency: float, like: Tensor) -> Grid:
        """The grid of ``size`` over frames of ``frame``; tensors on the device and in the dtype of ``like``."""
        # bin k is k cycles per frame, on either grid
        rows, columns = size
        # (not torch.fft.fftfreq, which knows no symbolic spacing)
        y = (torch.arange(rows, device=like.device) + rows // 2) % rows - rows // 2
        x = torch.arange(columns // 2 + 1, device=like.device, dtype=like.dtype) / frame[1]
        y = y.to(like.dtype) / frame[0]
        radius = torch.hypot(x, y[:, None])
        edge = (max_frequency - radius) / (_ROLL_OFF * max_frequency)
        roll_off = 0.5 - 0.5 * torch.cos(math.pi * edge.clamp(0, 1))
        return cls(frame, size, max_frequency, (y, x), radius, roll_off)

    def spacing(self) -> float:
        """Pixels from one sample to the next, along the axis where they are further apart."""
        y, x = self.frame[0] / self.size[0], self.frame[1] / self.size[1]
        return torch.sym_max(y, x) if is_symbol(y, x) else max(y, x)  # type: ignore[return-value, unused-ignore]

    def move(self, spectrum: Tensor, shift: Tensor) -> Tensor:
        """(..., h, w): the field of a spectrum with its content moved by ``shift`` (..., 2)."""
        return irfft2(turn_spectrum(spectrum, self.frequencies, -shift), self.size)


class Window(NamedTuple):
    """The Tukey window over a :class:`Grid`, as one profile an axis."""

    frame: tuple[int, int]
    taper: float
    positions: tuple[Tensor, Tensor]  # (h,), (w,), of the samples, in pixels
    profiles: tuple[Tensor, Tensor]  # (h,), (w,)

    @classmethod
    def of(cls, grid: Grid, taper: float) -> Window:
        """The window of a grid, see :func:`tukey`."""
        y, x = (
            torch.arange(samples, device=grid.radius.device, dtype=grid.radius.dtype) * length / samples
            for length, samples in zip(grid.frame, grid.size, strict=True)
        )
        profiles = tukey(y, grid.frame[0], taper), tukey(x, grid.frame[1], taper)
        return cls(grid.frame, taper, (y, x), profiles)

    def whole(self) -> Tensor:
        """(h, w)."""
        return self.profiles[0][:, None] * self.profiles[1]

    def common(self, shift: Tensor) -> Tensor:
        """(..., h, w): of the ground that a frame shifted by ``shift`` (..., 2) has in common with it."""
        y, x = (
            torch.minimum(profile, tukey(position - shift[..., 1 - axis, None], length, self.taper))
            for axis, (profile, position, length) in enumerate(
                zip(self.profiles, self.positions, self.frame, strict=True)
            )
        )
        return y[..., :, None] * x[..., None, :]


def extract_texture(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    max_frequency: float = 0.25,
    contrast: Contrast = "local",
    blur: float = 0.0,
) -> Texture:
    """Fill holes, limit the band, normalise the contrast.

    Args:
        image: (..., H, W), finite.
        mask: bool, broadcastable, True = usable.
        max_frequency: in cycles per pixel.
        contrast: ``"local"`` or ``"none"``.
        blur: σ of a Gaussian in pixels, applied with the band limit, in the spectral domain.

    Returns:
        :class:`Texture` on the grid of :func:`working_size`.
    """
    frame = (image.shape[-2], image.shape[-1])
    grid = Grid.of(frame, working_size(frame, max_frequency), max_frequency, image)
    return extract_pyramid(image, mask, grids=(grid,), contrast=contrast, blur=blur)[0]


def extract_pyramid(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    grids: Sequence[Grid],
    contrast: Contrast = "local",
    blur: float = 0.0,
) -> list[Texture]:
    """:func:`extract_texture` for several bands, from one transform of the image.

    The first sample of every level lies on the first pixel, whatever the level's sampling: there is no half pixel
    to be kept in mind between them.

    Args:
        image: (..., H, W), finite.
        mask: bool, broadcastable, True = usable.
        grids: what each level is sampled on, over frames of this size; the first one has the widest band.
        contrast: ``"local"`` or ``"none"``.
        blur: σ of a Gaussian in pixels.

    Returns:
        One :class:`Texture` a grid.
    """
    mean, centred, empty = _centre(image, mask)
    spectrum = _periodic_spectrum(centred, grids[0])
    # a frame whose deviation is the rounding error of its mean is flat
    noise = 32 * torch.finfo(image.dtype).eps * mean[..., 0, 0].abs()
    textures = []
    for grid in grids:
        limited = _limit(spectrum, grid, blur)
        weights = None if mask is None else _weights(mask, grid)
        textures.append(_normalize(limited, weights, noise, empty, contrast))
    return textures


def working_size(size: tuple[int, int], max_frequency: float) -> tuple[int, int]:
    """The coarsest grid (h, w), in multiples of 8, that holds the band; never finer than the frame's.

    >>> working_size((256, 101), 0.25), working_size((256, 101), 0.5)
    ((128, 56), (256, 101))
    """
    height, width = (_samples(length, max_frequency) for length in size)
    return height, width


def _samples(length: int, max_frequency: float) -> int:
    if not is_symbol(length):
        return min(length, 8 * math.ceil(2 * max_frequency * length / 8))
    # under torch.export a size is a symbol: whole, positive numbers only, as few of them as can be
    parts = 2**16
    share = math.ceil(max_frequency / 4 * parts)
    common = math.gcd(share, parts)
    share, parts = share // common, parts // common
    coarse = 8 * ((length * share + parts - 1) // parts)
    if max_frequency > 0.25:
        return torch.sym_min(length, coarse)  # type: ignore[return-value, unused-ignore]
    torch._check(length >= 8)  # then it is no finer, which a symbol does not tell by itself
    return coarse


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
    grid = Grid.of((height, width), size, max_frequency, image)
    return _limit(_periodic_spectrum(centred, grid), grid, 0.0)


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
    typical = nanmedian(sampled.flatten(-2)).nan_to_num(0.0)[..., None, None]
    total = variance + typical
    flat = total <= torch.finfo(image.dtype).tiny ** 0.5  # below it the derivative of the root overflows
    contrast = torch.where(flat, 0.0, detail * torch.rsqrt(torch.where(flat, 1.0, total)))
    return contrast if weights is None else contrast * weights


def nanmedian(values: Tensor, dim: int = -1) -> Tensor:
    """The (lower) median of what is not NaN, along one dimension; NaN where nothing is.

    :func:`torch.nanmedian`, but for ``torch.use_deterministic_algorithms(True)``, under which torch refuses medians
    on CUDA, because of their indices: then the same values are found by sorting.

    Args:
        values: any shape.
        dim: along which.

    Returns:
        ``values`` without that dimension.

    >>> nanmedian(torch.tensor([[4.0, torch.nan, 1.0, 3.0, 2.0], [torch.nan] * 5]))
    tensor([2., nan])
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.nanmedian(dim).values
    ordered = values.sort(dim).values  # NaN last
    count = (~ordered.isnan()).sum(dim, keepdim=True)
    return ordered.gather(dim, (count - 1).clamp(min=0) // 2).squeeze(dim)


def agreement(moving: Tensor, reference: Tensor, *, fine: bool = False) -> Tensor:
    r"""Weights in [0, 1]: how much two frames, brought together, show the same ground.

    The squared local correlation coefficient, squared again, over about 15 × 15 samples: blocks of 4 × 4, with
    triangular weights over 3 × 3 of them, interpolated between,

    .. math:: \left( \frac{(g * ab)_+^2}{(g * a^2)\,(g * b^2)} \right)^2

    near 1 on common ground, near 0 under a cloud, on a changed field, and where one of them is empty.

    Args:
        moving: (..., H, W), over the reference.
        reference: (..., H, W), broadcastable.
        fine: around every sample, over 7 × 7 of them: sharper, noisier, and more work.

    Returns:
        (..., H, W).
    """
    size = (moving.shape[-2], moving.shape[-1])
    # pooled before they are stacked: it is small then, and the reference may be one for all frames
    products = (moving * reference, moving.square(), reference.square())
    pools = products if fine else [pool(product, 2) for product in products]
    stacked = torch.stack(torch.broadcast_tensors(*pools))  # type: ignore[no-untyped-call]
    common, own, other = _triangle(stacked, 2 if fine else 1).unbind()
    tiny = torch.finfo(moving.dtype).eps ** 2  # the fields are of order 1
    share = common.clamp(min=0).square() / (own * other + tiny)
    if fine:
        return share.square().clamp(max=1)
    smooth = F.interpolate(
        share.square().reshape(-1, 1, *share.shape[-2:]),
        scale_factor=4.0,
        mode="bilinear",
        align_corners=False,
    )
    return smooth.reshape(*share.shape[:-2], *smooth.shape[-2:])[..., : size[0], : size[1]].clamp(max=1)


def shared_ground(moving: Tensor, reference: Tensor, weights: Tensor, usable: Tensor | None = None) -> Tensor:
    r"""Which pixels of two frames, brought together to half a pixel, show the same ground.

    To a local change of contrast and brightness, the moving frame is the reference there:

    .. math:: |m - (\alpha r + \beta)| \le 4 \hat\sigma + \tfrac{1}{2} |\alpha| \, |\nabla r|

    with :math:`\alpha, \beta` the weighted regression over about 25 × 25 pixels, tied to that of the whole frame
    where little agrees, and :math:`\hat\sigma` from the median residual of the better half. Residuals that are too
    large are left out of the next of five rounds. The gradient forgives half a pixel of misalignment: without it
    pixels would be chosen that fit the place where the frames happen to lie, and a shift estimated from them would
    stay there.

    Sharper than :func:`agreement`, which it starts from. What differs in brightness only slowly (haze) stays; what
    is as bright as the ground below it cannot be told.

    Args:
        moving: (..., H, W), over the reference.
        reference: (..., H, W), broadcastable.
        weights: (..., h, w) in [0, 1], how sure it is beforehand, see :func:`agreement`; on any grid.
        usable: bool, (..., H, W), True = both are usable.

    Returns:
        bool, (..., H, W), in blocks of 2 × 2 pixels. No gradient.

    Example:
        >>> reference = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
        >>> moving = 1.2 * reference + 0.1
        >>> moving[:20, :20] = 2  # a cloud
        >>> ground = shared_ground(moving, reference, torch.full((32, 32), 0.5))
        >>> ground[:20, :20].any().item(), ground[20:].all().item()
        (False, True)
    """
    height, width = moving.shape[-2:]
    lead = torch.broadcast_shapes(moving.shape[:-2], reference.shape[:-2])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if usable is not None:
            moving, reference = (torch.where(usable, image, 0.0) for image in (moving, reference))
        own, other = (_halve(image.expand(*lead, height, width)) for image in (moving, reference))
        size = (own.shape[-2], own.shape[-1])
        prior = F.interpolate(
            weights.expand(*lead, *weights.shape[-2:]).reshape(-1, 1, *weights.shape[-2:]),
            size=size,
            mode="bilinear",
            align_corners=False,
        ).reshape(own.shape)
        if usable is not None:
            prior = prior * (_halve(usable.expand(*lead, height, width).to(own.dtype)) == 1)
        own = own - own.mean((-2, -1), keepdim=True)
        other = other - other.mean((-2, -1), keepdim=True)
        # samples lie 2 pixels apart, and their neighbours 4
        slope_y = F.pad(other[..., 2:, :] - other[..., :-2, :], (0, 0, 1, 1)).square()
        slope_x = F.pad(other[..., 2:] - other[..., :-2], (1, 1)).square()
        forgiven = (slope_y + slope_x).sqrt() * (_MISALIGNED / 4)
        tiny = torch.finfo(own.dtype).tiny

        def line(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Means of the frame and of the reference, their covariance, the variance of the reference."""
            count, own_sum, other_sum, product, square = sums.unbind()
            count = count + tiny
            own_mean, other_mean = own_sum / count, other_sum / count
            variance = (square / count - other_mean.square()).clamp(min=0)
            return own_mean, other_mean, product / count - own_mean * other_mean, variance

        moments = torch.stack((torch.ones_like(own), own, other, own * other, other.square()))
        chosen, ground = prior, torch.ones_like(own, dtype=torch.bool)
        for _ in range(_ROUNDS):
            blocks = pool(chosen * moments, 2)
            whole = blocks.mean((-2, -1), keepdim=True)
            _, _, covariance, variance = line(whole)
            floor = _FLAT_PRIOR * variance + tiny
            slope = covariance / (variance + tiny)
            own_mean, other_mean, covariance, variance = line(_triangle(blocks, 1) + _PRIOR * whole)
            alpha = (covariance + floor * slope) / (variance + floor)
            both = torch.stack((alpha, own_mean - alpha * other_mean))
            alpha, beta = (
                F.interpolate(
                    both.reshape(-1, 1, *both.shape[-2:]),
                    scale_factor=4.0,
                    mode="bilinear",
                    align_corners=False,
                )[..., : size[0], : size[1]]
                .reshape(2, *own.shape)
                .unbind()
            )
            residual = (own - torch.addcmul(beta, alpha, other)).abs()
            # a quarter of the samples tells the median as well
            some, weight = (field[..., ::2, ::2].flatten(-2) for field in (residual, chosen))
            better = weight >= weight.mean(-1, keepdim=True)
            scale = 1.4826 * nanmedian(some.masked_fill(~better, torch.nan))[..., None, None]
            ground = residual <= _LARGEST_RESIDUAL * scale + forgiven * alpha.abs()
            chosen = prior * ground
        ground = ground.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return ground[..., :height, :width]


def fill_small_holes(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Single pixels and narrow gaps take the mean of their usable neighbours, and count as usable from then on.

    Args:
        image: (..., H, W), finite.
        mask: bool, (..., H, W), True = usable.

    Returns:
        The image, and the mask: True besides where 70 % of a triangle of 7 × 7 pixels around is usable.
    """
    count = mask.to(image.dtype).sum((-2, -1), keepdim=True).clamp(min=1)
    mean = torch.where(mask, image, 0.0).sum((-2, -1), keepdim=True) / count
    filled = mean + _fill_holes(torch.where(mask, image - mean, 0.0), mask)
    share = _triangle(mask.to(image.dtype), 2)
    return torch.where(mask, image, filled), mask | (share > _FILLED)


def _centre(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of what is usable (..., 1, 1), the image less it with its holes filled, and whether it is empty."""
    if mask is None:
        mean = image.mean((-2, -1), keepdim=True)
        return mean, image - mean, torch.zeros_like(mean[..., 0, 0], dtype=torch.bool)
    share = mask.to(image.dtype).mean((-2, -1), keepdim=True)
    one_pixel = 1 / (image.shape[-2] * image.shape[-1])
    mean = torch.where(mask, image, 0.0).mean((-2, -1), keepdim=True) / share.clamp(min=one_pixel)
    centred = _fill_holes(torch.where(mask, image - mean, 0.0), mask)
    return mean, centred, share[..., 0, 0] < _MIN_USABLE


def _normalize(
    limited: Tensor, weights: Tensor | None, noise: Tensor, empty: Tensor, contrast: Contrast
) -> Texture:
    """Units of any size become 1; then the local contrast."""
    samples = limited.shape[-2] * limited.shape[-1]
    root = torch.sym_sqrt(samples) if is_symbol(samples) else math.sqrt(samples)  # type: ignore[attr-defined, unused-ignore]
    scale = torch.linalg.vector_norm(limited.detach(), dim=(-2, -1)) / root
    flat = (scale <= noise) | empty | ~torch.isfinite(scale)
    # squares of what follows neither vanish nor overflow
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


def _weights(mask: Tensor, grid: Grid) -> Tensor:
    """(..., h, w) in [0, 1]: how much of what lies around a sample is usable."""
    height, width = grid.size
    shape = mask.shape[:-2]
    share = mask.expand(*shape, *grid.frame).reshape(-1, 1, *grid.frame).to(grid.radius.dtype)
    coverage = F.interpolate(share, size=(height, width), mode="area").reshape(*shape, height, width)
    lowest, highest = _COVERAGE
    return ((_triangle(coverage, 3) - lowest) / (highest - lowest)).clamp(0, 1)


def _periodic_spectrum(image: Tensor, grid: Grid) -> Tensor:
    """(..., h, w//2+1): the spectrum of Moisan's periodic component, cut to the grid's frequencies."""
    rows, columns = grid.size
    # columns beyond the band are dropped before they are transformed
    spectrum = _keep_rows(fft(rfft(image)[..., : columns // 2 + 1], dim=-2), rows)
    # what jumps between opposite borders has the Laplacian of a smooth image
    jump_y = rfft(image[..., -1, :] - image[..., 0, :])[..., None, : columns // 2 + 1]
    jump_x = _keep_rows(fft(image[..., :, -1] - image[..., :, 0]).unsqueeze(-1), rows)
    angle_y, angle_x = 2 * math.pi * grid.frequencies[0][:, None], 2 * math.pi * grid.frequencies[1]
    laplacian = 2 * angle_y.cos() + 2 * angle_x.cos() - 4
    laplacian = torch.where(laplacian == 0, 1.0, laplacian)  # at frequency 0, where the jumps vanish
    turn_y, turn_x = (
        torch.complex(1 - angle.cos(), -angle.sin()) / laplacian for angle in (angle_y, angle_x)
    )
    return spectrum - jump_y * turn_y - jump_x * turn_x


def _limit(spectrum: Tensor, grid: Grid, blur: float) -> Tensor:
    """(..., h, w): the field of those frequencies of a spectrum that the grid holds, rolled off and blurred."""
    rows, columns = grid.size
    response = grid.roll_off * (rows * columns / (grid.frame[0] * grid.frame[1]))
    if blur:
        response = response * torch.exp(-2 * (math.pi * blur * grid.radius).square())
    kept = _keep_rows(spectrum, rows)[..., : columns // 2 + 1]
    return irfft2(kept * response, (rows, columns))


def _keep_rows(spectrum: Tensor, rows: int) -> Tensor:
    """The rows (dim −2) of the lowest frequencies of either sign, in the order of a transform of that length."""
    height = spectrum.shape[-2]
    if rows == height:
        return spectrum
    return torch.cat([spectrum[..., : rows - rows // 2, :], spectrum[..., height - rows // 2 :, :]], dim=-2)


def tukey(position: Tensor, length: int, taper: float) -> Tensor:
    """The Tukey window of ``length`` pixels at (fractional) pixel positions: 0 beyond the frame's outer edge.

    Args:
        position: any shape, in pixels.
        length: of the frame along this axis.
        taper: share of the axis over which the window falls off; unless it is 0, at least 8 pixels on each side,
            or a quarter of a small frame.

    Returns:
        In [0, 1], in the shape of ``position``.
    """
    if taper <= 0:
        return ((position > -0.5) & (position < length - 0.5)).to(position.dtype)
    ramp = max(0.5 * taper * length, min(_LEAST_RAMP, 0.25 * length))  # pixels
    from_middle = (position - 0.5 * (length - 1)).abs()
    # half a turn over the ramp: sin² from 0 at the outer edge to 1
    return ((0.5 * length - from_middle) * (0.5 * math.pi / ramp)).clamp(0, 0.5 * math.pi).sin().square()


def _triangle(image: Tensor, order: int) -> Tensor:
    """Mean with triangular weights over 2·2ⁿ − 1 samples a side: two boxes of 2ⁿ by repeated doubling.

    A chain of 2n additions an axis: much faster than a convolution or a pooling on the CPU. On a GPU two poolings
    are: three kernels instead of 4n + 2.
    """
    length = 2**order
    flat = image.reshape(-1, 1, *image.shape[-2:])
    result = F.pad(flat, (length - 1,) * 4, mode="replicate")
    if _pools(image):
        return F.avg_pool2d(F.avg_pool2d(result, length, 1), length, 1).reshape(image.shape)
    for dim in (-1, -2):
        for _ in range(2):
            for power in range(order):
                count = result.shape[dim] - 2**power
                result = result.narrow(dim, 0, count) + result.narrow(dim, 2**power, count)
    return (result * (1 / length**4)).reshape(image.shape)


def _pools(image: Tensor) -> bool:
    """Whether torch's poolings are faster than chains of additions."""
    return image.device.type != "cpu"


def _halve(image: Tensor) -> Tensor:
    """Means of 2 × 2 pixels; the last row or column counts twice where there is no other."""
    height, width = image.shape[-2:]
    if height % 2:
        image = torch.cat((image, image[..., -1:, :]), -2)
    if width % 2:
        image = torch.cat((image, image[..., -1:]), -1)
    image = image[..., ::2, :] + image[..., 1::2, :]
    return 0.25 * (image[..., ::2] + image[..., 1::2])


def pool(image: Tensor, times: int) -> Tensor:
    """Sums over blocks of 2ⁿ × 2ⁿ; what is missing of the last ones is 0.

    Args:
        image: (..., H, W).
        times: n.

    Returns:
        (..., ⌈H / 2ⁿ⌉, ⌈W / 2ⁿ⌉).
    """
    block = 2**times
    missing = [(length + block - 1) // block * block - length for length in image.shape[-2:]]
    if any(missing):
        image = F.pad(image, (0, missing[1], 0, missing[0]))
    if _pools(image) and times > 0:
        flat = image.reshape(-1, 1, *image.shape[-2:])
        sums = F.avg_pool2d(flat, block, divisor_override=1)
        return sums.reshape(*image.shape[:-2], *sums.shape[-2:])
    # halving by slices: much faster than a pooling on the CPU
    for _ in range(times):
        image = image[..., ::2, :] + image[..., 1::2, :]
        image = image[..., ::2] + image[..., 1::2]
    return image
