"""Fourier transforms of stacks of images, and what moves them.

Convention:
    Frequencies f are in cycles per pixel, angular ones ω = 2πf in radians per pixel; a real image's spectrum is
    the half (..., H, W//2+1) that :func:`torch.fft.rfft2` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchalign._host import keeps_tables, kernels_for, launches_kernels

__all__ = ["by_columns", "fft", "irfft2", "rfft", "rfft2", "shift_phase", "unit_circle", "waves"]


def fft(signal: Tensor, dim: int = -1) -> Tensor:
    """:func:`torch.fft.fft`, of empty batches too."""
    return _or_empty(lambda values: torch.fft.fft(values, dim=dim), signal)


def rfft(signal: Tensor) -> Tensor:
    """:func:`torch.fft.rfft` of the last dimension, of empty batches too."""
    return _or_empty(torch.fft.rfft, signal)


def rfft2(image: Tensor) -> Tensor:
    """:func:`torch.fft.rfft2`: (..., H, W) → (..., H, W//2+1), of empty batches too.

    On the CPU the columns of the result lie one after the other, as the inverse transform reads them.
    """
    if launches_kernels(image):
        return _or_empty(torch.fft.rfft2, image)
    return _or_empty(lambda values: torch.fft.fft(torch.fft.rfft(values), dim=-2), image)


def irfft2(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`torch.fft.irfft2`: (..., H, W//2+1) → (..., H, W), of empty batches too.

    Columns that are missing from the right of the spectrum are 0, and not transformed first.
    """
    if spectrum.shape[-1] < size[1] // 2 + 1:
        return _or_empty(lambda values: torch.fft.irfft(torch.fft.ifft(values, dim=-2), n=size[1]), spectrum)
    return _or_empty(lambda values: torch.fft.irfft2(values, s=size), spectrum)


def by_columns(table: Tensor) -> Tensor:
    """The same, its columns one after the other, as spectra of the CPU lie."""
    return table if launches_kernels(table) else table.mT.contiguous().mT


def shift_phase(spectrum: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor) -> Tensor:
    """The spectrum times e^{iω·t}: its content moved by −t.

    Args:
        spectrum: (..., H, W//2+1), an ``rfft2``.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        shift: (..., 2), t = (x, y) in pixels.

    Returns:
        (..., H, W//2+1).
    """
    kernels = kernels_for(spectrum, shift)
    if kernels is not None:
        return kernels.turn(spectrum, frequencies, shift)
    wave_y, wave_x = waves(frequencies, shift)
    return spectrum * wave_y[..., :, None] * wave_x[..., None, :]


def waves(frequencies: tuple[Tensor, Tensor], shift: Tensor) -> tuple[Tensor, Tensor]:
    """(..., H) and (..., W//2+1): e^{iω·t} along y and x; arguments as in :func:`shift_phase`."""
    y, x = frequencies
    turn = 2 * math.pi * shift
    angle = torch.cat((turn[..., 1:] * y, turn[..., :1] * x), -1)
    both, rows = unit_circle(angle), y.shape[-1]
    return both[..., :rows], both[..., rows:]


def unit_circle(angle: Tensor) -> Tensor:
    """e^{iφ}, in one operation."""
    return torch.polar(_one(like=angle).expand_as(angle), angle)


@keeps_tables
def _one(*, like: Tensor) -> Tensor:
    return torch.ones((), device=like.device, dtype=like.dtype)


def _or_empty(transform: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Transform one blank frame and drop it if the batch is empty, which some builds of MKL refuse."""
    if values.numel() > 0:
        return transform(values)
    blank = transform(values.new_zeros([max(1, length) for length in values.shape]))
    return blank.new_empty((*values.shape[:-2], *blank.shape[-2:]))
