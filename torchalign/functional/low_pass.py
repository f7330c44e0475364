"""The band limit: what lies below a frequency, resampled onto the coarser grid that just holds it.

By Fourier transforms, of the image less the smooth one that accounts for the jumps between opposite borders, which
the Fourier series would take for edges. (Two matrix products, a DCT-II low pass, do the same: with a response of
each axis for itself they pass the corners of the band, which costs 25 % of the accuracy on clear frames; with a
radial one they are as accurate, and on the CPU slower.)

References:
    Moisan 2011, doi:10.1007/s10851-010-0227-1 (the periodic component of an image).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchalign._host import keeps_tables, launches_kernels
from torchalign.functional.fourier import by_columns, fft, irfft2, rfft

__all__ = ["band_response", "bin_frequencies", "low_pass"]

# Share of the kept band, from its outer edge, over which the low-pass rolls off: a sharp edge would ring.
_ROLL_OFF = 0.2


def low_pass(
    image: Tensor, bands: Sequence[tuple[tuple[int, int], float]], *, blur: float = 0.0
) -> list[Tensor]:
    """Keep the frequencies below a limit, at the samples of a coarser grid, for one or several bands.

    Sample (i, j) of the result lies at pixel (i·H/h, j·W/w) of the image: the origins coincide. Opposite borders of
    the result meet without a jump.

    Args:
        image: (..., H, W), of mean 0 or nearly.
        bands: sizes (h, w), at most (H, W), each with its limit in cycles per pixel of the image, the widest band
            first; the outer fifth of a band rolls off as a cosine. See
            :func:`~torchalign.functional.working_grid.working_size`.
        blur: σ in pixels of a Gaussian that is applied with it.

    Returns:
        (..., h, w), one a band.

    Example:
        >>> frame = torch.arange(1600.0).reshape(40, 40)
        >>> [field.shape for field in low_pass(frame - frame.mean(), [((20, 20), 0.25), ((10, 10), 0.125)])]
        [torch.Size([20, 20]), torch.Size([10, 10])]
    """
    spectrum = _periodic_spectrum(image, bands[0][0])
    return [_limit(spectrum, (image.shape[-2], image.shape[-1]), *band, blur) for band in bands]


def band_response(frequency: Tensor, max_frequency: float, blur: float = 0.0) -> Tensor:
    """The response at frequencies in cycles per pixel: 1 in the band, falling to 0 at its edge as a cosine."""
    edge = ((max_frequency - frequency) / (_ROLL_OFF * max_frequency)).clamp(0, 1)
    response = 0.5 - 0.5 * torch.cos(math.pi * edge)
    return response * torch.exp(-2 * (math.pi * blur * frequency).square()) if blur else response


def _periodic_spectrum(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w//2+1): the spectrum of Moisan's periodic component, cut to the frequencies of a grid."""
    rows, columns = size
    step_y, step_x = _jump_spectra((image.shape[-2], image.shape[-1]), size, like=image)
    # columns beyond the band are dropped before they are transformed
    spectrum = _keep_rows(fft(rfft(image)[..., : columns // 2 + 1], dim=-2), rows)
    # what jumps between opposite borders has the Laplacian of a smooth image
    jump_y = rfft(image[..., -1, :] - image[..., 0, :])[..., None, : columns // 2 + 1]
    jump_x = _keep_rows(fft(image[..., :, -1] - image[..., :, 0]).unsqueeze(-1), rows)
    if launches_kernels(image):
        return spectrum.addcmul_(jump_y, step_y, value=-1).addcmul_(jump_x, step_x, value=-1)
    return spectrum - (jump_y * step_y + jump_x * step_x)  # of complex numbers faster than in one on the CPU


def _limit(
    spectrum: Tensor, frame: tuple[int, int], size: tuple[int, int], max_frequency: float, blur: float
) -> Tensor:
    """(..., h, w): the field of those frequencies of a spectrum that a grid holds, rolled off and blurred."""
    rows, columns = size
    kept = _keep_rows(spectrum, rows)[..., : columns // 2 + 1]
    return irfft2(kept * _radial_response(frame, size, max_frequency, blur, like=spectrum.real), size)


def bin_frequencies(frame: tuple[int, int], size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """(h, 1) and (w//2+1,): bin k is k cycles a frame, on either grid; in cycles per pixel."""
    # (not torch.fft.fftfreq, which knows no symbolic spacing)
    rows, columns = size
    y = (torch.arange(rows, device=like.device) + rows // 2) % rows - rows // 2
    x = torch.arange(columns // 2 + 1, device=like.device, dtype=like.dtype)
    return y.to(like.dtype)[:, None] / frame[0], x / frame[1]


@keeps_tables
def _radial_response(
    frame: tuple[int, int], size: tuple[int, int], max_frequency: float, blur: float, *, like: Tensor
) -> Tensor:
    """(h, w//2+1), for a spectrum of the frame and a transform back of the grid's size."""
    y, x = bin_frequencies(frame, size, like)
    gain = size[0] * size[1] / (frame[0] * frame[1])
    return by_columns(band_response(torch.hypot(x, y), max_frequency, blur) * gain)


@keeps_tables
def _jump_spectra(frame: tuple[int, int], size: tuple[int, int], *, like: Tensor) -> tuple[Tensor, Tensor]:
    """(h, w//2+1) twice: the factors that turn the jumps along y and x into the spectrum of the smooth image."""
    y, x = (2 * math.pi * frequency for frequency in bin_frequencies(frame, size, like))
    laplacian = 2 * y.cos() + 2 * x.cos() - 4
    laplacian = torch.where(laplacian == 0, 1.0, laplacian)  # at frequency 0, where the jumps vanish
    step_y, step_x = (torch.complex(1 - angle.cos(), -angle.sin()) / laplacian for angle in (y, x))
    return by_columns(step_y), by_columns(step_x)


def _keep_rows(spectrum: Tensor, rows: int) -> Tensor:
    """The rows (dim −2) of the lowest frequencies of either sign, in the order of a transform of that length."""
    height = spectrum.shape[-2]
    if rows == height:
        return spectrum
    # by columns: so they lie after a transform along them, and for the one back
    columns = spectrum.mT
    return torch.cat([columns[..., : rows - rows // 2], columns[..., height - rows // 2 :]], dim=-1).mT
