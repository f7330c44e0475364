"""The working grid: the samples, coarser than the pixels, that hold the band of an image which is registered.

Convention:
    On every grid the first sample lies on the first pixel, and sample (i, j) of h × w at pixel (i·H/h, j·W/w):
    there is no half pixel to be kept in mind between them. Frequencies are in cycles per pixel of the frame.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchalign._host import keeps_tables, kernels_for
from torchalign.functional.fourier import irfft2, shift_phase
from torchalign.functional.low_pass import bin_frequencies
from torchalign.functional.sizes import working_length

__all__ = ["Window", "WorkingGrid", "ramp_length", "tukey", "working_size"]

# The window falls off over at least this many pixels on each side, where the frame allows it.
_LEAST_RAMP = 8


class WorkingGrid(NamedTuple):
    """The working grid of h × w samples over a frame of H × W pixels; all in pixels of the frame."""

    frame: tuple[int, int]
    size: tuple[int, int]
    max_frequency: float
    frequencies: tuple[Tensor, Tensor]  # (h,), (w//2+1,), cycles per pixel
    radius: Tensor  # (h, w//2+1), |f|

    @classmethod
    def of(
        cls, frame: tuple[int, int], size: tuple[int, int], max_frequency: float, like: Tensor
    ) -> WorkingGrid:
        """The grid of ``size`` over frames of ``frame``; tensors on the device and in the dtype of ``like``."""
        y, x, radius = _frequency_tables(frame, size, like=like)
        return cls(frame, size, max_frequency, (y, x), radius)

    def spacing(self) -> float:
        """Pixels from one sample to the next, along the axis where they are further apart."""
        return torch.sym_max(*self.spacings())  # type: ignore[return-value, unused-ignore]

    def spacings(self) -> tuple[float, float]:
        """Pixels from one sample to the next, along y and x."""
        return self.frame[0] / self.size[0], self.frame[1] / self.size[1]

    def move(self, spectrum: Tensor, shift: Tensor) -> Tensor:
        """(..., h, w): the field of a spectrum with its content moved by ``shift`` (..., 2)."""
        back = _backwards(self.frame, self.size, like=self.radius)
        return irfft2(shift_phase(spectrum, back, shift), self.size)


class Window(NamedTuple):
    """The Tukey window over a :class:`WorkingGrid`, as one profile an axis."""

    frame: tuple[int, int]
    size: tuple[int, int]
    taper: float
    positions: tuple[Tensor, Tensor]  # (h,), (w,), of the samples, in pixels
    profiles: tuple[Tensor, Tensor]  # (h,), (w,)
    whole: Tensor  # (h, w)

    @classmethod
    def of(cls, grid: WorkingGrid, taper: float) -> Window:
        """The window of a grid, see :func:`tukey`."""
        y, x, *profiles, whole = _window(grid.frame, grid.size, taper, like=grid.radius)
        return cls(grid.frame, grid.size, taper, (y, x), (profiles[0], profiles[1]), whole)

    def common(self, shift: Tensor) -> Tensor:
        """(..., h, w): of the ground that a frame shifted by ``shift`` (..., 2) has in common with it."""
        whole = not any(isinstance(length, float) for length in self.frame)  # a part of a frame need not be
        kernels = kernels_for(shift) if whole and self.taper > 0 else None
        if kernels is not None:
            ramps = tuple(ramp_length(length, self.taper) for length in self.frame)
            return kernels.common_window(shift, self.size, self.frame, ramps)
        y, x = (
            torch.minimum(profile, tukey(position - shift[..., 1 - axis, None], length, self.taper))
            for axis, (profile, position, length) in enumerate(
                zip(self.profiles, self.positions, self.frame, strict=True)
            )
        )
        return y[..., :, None] * x[..., None, :]


@keeps_tables
def _frequency_tables(
    frame: tuple[int, int], size: tuple[int, int], *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(h,) and (w//2+1,), in cycles per pixel, and their radius."""
    y, x = bin_frequencies(frame, size, like)
    return y[:, 0], x, torch.hypot(x, y)


@keeps_tables
def _backwards(frame: tuple[int, int], size: tuple[int, int], *, like: Tensor) -> tuple[Tensor, Tensor]:
    """The frequencies along y and x with their sign turned: a shift then moves a field by itself."""
    y, x, _ = _frequency_tables(frame, size, like=like)
    return -y, -x


@keeps_tables
def _window(
    frame: tuple[int, int], size: tuple[int, int], taper: float, *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions along y and x, the profile along each, and the window."""
    y, x = (
        torch.arange(samples, device=like.device, dtype=like.dtype) * length / samples
        for length, samples in zip(frame, size, strict=True)
    )
    along_y, along_x = tukey(y, frame[0], taper), tukey(x, frame[1], taper)
    return y, x, along_y, along_x, along_y[:, None] * along_x


def working_size(size: tuple[int, int], max_frequency: float) -> tuple[int, int]:
    """The coarsest grid (h, w), in multiples of 8, that holds the band; never finer than the frame's.

    >>> working_size((256, 101), 0.25), working_size((256, 101), 0.5)
    ((128, 56), (256, 101))
    """
    height, width = (working_length(length, max_frequency) for length in size)
    return height, width


def tukey(position: Tensor, length: int, taper: float) -> Tensor:
    """The Tukey window of ``length`` pixels at (fractional) pixel positions: 0 beyond the frame's outer edge.

    It falls off over a share ``taper`` of the axis; unless that is 0, over at least 8 pixels on each side, or a quarter
    of a small frame.
    """
    if taper <= 0:
        return ((position > -0.5) & (position < length - 0.5)).to(position.dtype)
    ramp = ramp_length(length, taper)
    from_middle = (position - 0.5 * (length - 1)).abs()
    # sin² from 0 at the outer edge to 1
    return ((0.5 * length - from_middle) * (0.5 * math.pi / ramp)).clamp(0, 0.5 * math.pi).sin().square()


def ramp_length(length: int, taper: float) -> float:
    """Over how many pixels the window of a frame's axis falls off, see :func:`tukey`; 0 if it does not."""
    return max(0.5 * taper * length, min(_LEAST_RAMP, 0.25 * length)) if taper > 0 else 0.0
