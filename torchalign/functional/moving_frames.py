"""Moving frames under a warp, over the samples of a reference's level.

A frame that is only shifted is shifted in the spectral domain, which needs no kernel. Under other warps it is a
cubic B-spline through twice as many samples as the band needs: on a grid that just holds the band, a spline
displaces by 0.05 px, a bilinear or Keys' kernel by 0.13 px; on this one a spline by less than 0.003 px.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import keeps_tables, kernels_for
from torchalign.functional import sampling
from torchalign.functional.affine import composed, invert_warp, unit_corner, unit_matrix
from torchalign.functional.fourier import irfft2, rfft2, shift_phase
from torchalign.functional.levels import Level, band_response, derivatives_of, for_parts, joined, unflatten
from torchalign.functional.motion import half_length, warp_of
from torchalign.functional.normal_equations import LONGEST_STEP, System
from torchalign.functional.structure import turn_orientations
from torchalign.functional.texture import Texture
from torchalign.functional.working_grid import Window, WorkingGrid, ramp_length, tukey

__all__ = ["Climb", "Frames", "ShiftedFrames", "WarpedFrames", "WarpedSamples", "shift_of", "shifted_by"]

# Samples of the spline for each sample of the level: at the band's edge four a period.
_OVERSAMPLING = 2
# A point farther out than this, in samples, is nowhere.
_NOWHERE = 1e7


class WarpedSamples(NamedTuple):
    """The moving frames' samples under a warp, over the reference."""

    warp: Tensor  # (..., T, 3, 3)
    values: Tensor  # (..., T, n)
    common: Tensor  # (..., T, n) in [0, 1], the ground that both have


class Climb(NamedTuple):
    """Steps on one level, from where and how far."""

    start: Tensor  # (..., T, 3, 3)
    moves: Tensor  # (..., T) bool
    system: System
    limits: tuple[int, float]  # the most iterations; the tolerance, in pixels
    precise: bool


class ShiftedFrames(NamedTuple):
    """Moving frames that are only shifted: a phase in the spectral domain, without kernel or bias; borders wrap."""

    spectrum: Tensor  # (..., T, h, w//2+1)
    weights: Tensor | None  # (..., T, h, w//2+1), spectrum of what is usable
    flat: Tensor  # (..., T) bool
    window: Window

    @classmethod
    def of(cls, texture: Texture, grid: WorkingGrid, taper: float) -> ShiftedFrames:
        """Their spectra, within the band."""
        weights = None if texture.weights is None else rfft2(texture.weights)
        response = band_response(
            grid.frame, grid.size, grid.max_frequency, texture.is_vector, like=grid.radius
        )
        return cls(rfft2(texture.field) * response, weights, texture.flat, Window.of(grid, taper))

    def look(self, warp: Tensor, level: Level, *, precise: bool) -> WarpedSamples:
        """:meth:`values` and :meth:`ground`."""
        ground = for_parts(self.ground(warp, level), level.vector)
        return WarpedSamples(warp, self.values(warp, level, precise=precise), ground)

    def ascend(self, climb: Climb, level: Level) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All steps by one kernel, where there is one: warps, the last reach; if precise, the values before it."""
        start, moves, system, limits, precise = climb
        kernels = None if level.vector else kernels_for(self.spectrum, start, system.weights, level.field)
        if kernels is None:
            return None
        grid = level.grid
        # inner products of fields are those of their spectra
        weighted = rfft2(unflatten(system.weights.unsqueeze(-2) * level.regressors, grid.size))
        shift, reach, seen = kernels.ascend_shifted(
            self.spectrum,
            weighted,
            shift_of(start, grid),
            moves,
            (system.mean, system.inverse, system.solved, system.rest),
            grid.frequencies,
            level.corners,
            grid.size[0] * grid.size[1],
            half_length(grid.frame),
            LONGEST_STEP * grid.spacing(),
            *limits,
        )
        values = level.grid.move(self.spectrum, seen).flatten(-2) if precise else None
        return shifted_by(shift / half_length(grid.frame)), reach, values

    def values(self, warp: Tensor, level: Level, *, precise: bool) -> Tensor:
        """(..., T, n), the frames over the reference, always precise."""
        moved = level.grid.move(self.spectrum, shift_of(warp, level.grid))
        return joined(moved.flatten(-2), level.vector)

    def ground(self, warp: Tensor, level: Level) -> Tensor:
        """(..., T, n) in [0, 1]: the windows, and what is usable, of both."""
        shift = shift_of(warp, level.grid)
        common = level.weights * self.window.common(shift).flatten(-2)
        if self.weights is not None:
            common = common * level.grid.move(self.weights, shift).clamp(0, 1).flatten(-2)
        return common

    def stepped(self, warp: Tensor, increment: Tensor, level: Level) -> Tensor:
        """The step composed to the warp: shifts add up."""
        return warp + F.pad(increment.unsqueeze(-1), (2, 0, 0, 1))

    def slopes(self, warp: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """The values, and their derivatives by x and y of the reference."""
        grid = level.grid
        shifted = shift_phase(self.spectrum, grid.frequencies, -shift_of(warp, grid))
        found = irfft2(shifted, grid.size).flatten(-2), *derivatives_of(shifted, grid)
        values, by_x, by_y = (joined(field, level.vector) for field in found)
        return values, by_x, by_y


class WarpedFrames(NamedTuple):
    """Moving frames under any warp: a cubic B-spline through twice as many samples as the band needs."""

    spline: Tensor  # (..., T, 2h, 2w), its coefficients, continued beyond the border
    weights: Tensor | None  # (..., T, h, w), what is usable, likewise
    flat: Tensor  # (..., T) bool
    taper: float
    projective: bool

    @classmethod
    def of(cls, texture: Texture, grid: WorkingGrid, taper: float, projective: bool) -> WarpedFrames:
        """Their splines, of what is within the band."""
        rows, columns = grid.size
        size = (_OVERSAMPLING * rows, _OVERSAMPLING * columns)
        band = grid.frame, grid.size, grid.max_frequency
        spectrum = rfft2(texture.field) * _spline_gain(*band, texture.is_vector, like=grid.radius)
        # zeros between the positive and the negative frequencies; those of the columns are appended by irfft
        positive = rows - rows // 2
        middle = spectrum.new_zeros((*spectrum.shape[:-2], size[0] - rows, spectrum.shape[-1]))
        coefficients = torch.cat([spectrum[..., :positive, :], middle, spectrum[..., positive:, :]], dim=-2)
        weights = None if texture.weights is None else sampling.continue_border(texture.weights)
        return cls(
            sampling.continue_border(irfft2(coefficients, size)), weights, texture.flat, taper, projective
        )

    def look(self, warp: Tensor, level: Level, *, precise: bool) -> WarpedSamples:
        """:meth:`values` and :meth:`ground`."""
        kernels = None if level.vector else kernels_for(self.spline, self.weights, warp, level.weights)
        if kernels is None:
            ground = for_parts(self.ground(warp, level), level.vector)
            return WarpedSamples(warp, self.values(warp, level, precise=precise), ground)
        ramps = [ramp_length(length, self.taper) for length in level.grid.frame] if self.taper > 0 else []
        given = self.spline, self.weights, warp, level.weights, level.x, level.y, level.grid.frame
        return WarpedSamples(warp, *kernels.look(*given, ramps, self.projective, precise))

    def ascend(self, climb: Climb, level: Level) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All steps by one kernel, where there is one: warps, the last reach; if precise, the values before it."""
        start, moves, system, limits, precise = climb
        kernels = None if level.vector else kernels_for(self.spline, start, system.weights, level.field)
        if kernels is None:
            return None
        equations = system.mean, system.inverse, system.solved, system.rest
        warp, reach, seen = kernels.ascend_warped(
            self.spline,
            start,
            moves,
            system.weights,
            level.products,
            equations,
            level.x,
            level.y,
            level.corners,
            level.grid.frame,
            LONGEST_STEP * level.grid.spacing(),
            self.projective,
            level.motion,
            *limits,
            precise,
        )
        return warp, reach, self.look(seen, level, precise=True).values if precise else None

    def values(self, warp: Tensor, level: Level, *, precise: bool) -> Tensor:
        """(..., T, n), the frames over the reference; bilinear, at a fifth of the cost, unless ``precise``."""
        column, row = self._sources(warp, level, _samples_of(self.spline))
        sample = sampling.spline_at if precise else sampling.bilinear_at
        if not level.vector:
            return sample(self.spline, column, row)
        parts = torch.stack([sample(part, column, row) for part in self.spline])
        return joined(turn_orientations(parts, warp), vector=True)

    def ground(self, warp: Tensor, level: Level) -> Tensor:
        """(..., T, n) in [0, 1]: the windows, and what is usable, of both."""
        height, width = level.grid.frame
        x, y = self._sources(warp, level, (height, width))
        own = tukey(x, width, self.taper) * tukey(y, height, self.taper)
        if self.weights is not None:
            usable = sampling.bilinear_at(
                self.weights, *self._sources(warp, level, _samples_of(self.weights))
            )
            # between two ones lies a one, but for rounding
            own = own * torch.where(usable > 1 - 1e-5, 1.0, usable)
        return torch.minimum(level.weights, own)

    def stepped(self, warp: Tensor, increment: Tensor, level: Level) -> Tensor:
        """The step composed to the warp."""
        return unit_corner(composed(warp, warp_of(increment, level.motion)))

    def slopes(self, warp: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """The values, and their derivatives by x and y of the reference."""
        size = _samples_of(self.spline)
        column, row = self._sources(warp, level, size)
        if level.vector:
            # (what turns with the warp is held fixed)
            parts = zip(
                *(sampling.spline_with_slopes(part, column, row) for part in self.spline), strict=True
            )
            values, by_column, by_row = (
                joined(turn_orientations(torch.stack(both), warp), vector=True) for both in parts
            )
        else:
            values, by_column, by_row = sampling.spline_with_slopes(self.spline, column, row)
        (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-2) for row in invert_warp(warp)[..., None].unbind(-3))
        depth = g * level.x + h * level.y + i
        x, y = (a * level.x + b * level.y + c) / depth, (d * level.x + e * level.y + f) / depth
        depth, x, y = (for_parts(position, level.vector) for position in (depth, x, y))
        height, width = level.grid.frame
        slope_x, slope_y = (
            slope * (half_length(level.grid.frame) * samples / length)
            for slope, samples, length in ((by_column, size[1], width), (by_row, size[0], height))
        )
        by_x = (slope_x * (a - x * g) + slope_y * (d - y * g)) / depth
        by_y = (slope_x * (b - x * h) + slope_y * (e - y * h)) / depth
        return values, by_x, by_y

    def _sources(self, warp: Tensor, level: Level, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(..., T, n) column and row, among ``size`` samples of the frame, that the reference's samples show."""
        inverse = torch.linalg.inv_ex(warp).inverse
        # what is no number, or would overflow below, is far away: every position is one
        x, y, last = inverse.nan_to_num(_NOWHERE).clamp(-_NOWHERE, _NOWHERE)[..., None].unbind(-3)
        half, (height, width) = half_length(level.grid.frame), level.grid.frame
        # the change of units is made on the matrices, which are small
        rows = [
            (row * half + last * ((length - 1) / 2)) * (samples / length)
            for row, samples, length in ((x, size[1], width), (y, size[0], height))
        ]
        if self.projective:
            rows.append(last)
        # not as a matrix product: TF32 would misplace the far end of a frame
        points = [
            torch.addcmul(torch.addcmul(row[..., 2, :], row[..., 0, :], level.x), row[..., 1, :], level.y)
            for row in rows
        ]
        if self.projective:
            # beyond its horizon a homography shows nothing
            depth = torch.where(points[2] > 0, points[2], 1 / _NOWHERE)
            points = [point / depth for point in points[:2]]
        return points[0], points[1]


Frames = ShiftedFrames | WarpedFrames


@keeps_tables
def _spline_gain(
    frame: tuple[int, int], size: tuple[int, int], max_frequency: float, vector: bool, *, like: Tensor
) -> Tensor:
    """(h, w//2+1): the same for the coefficients of a spline through twice as many samples a side."""
    rows, columns = (_OVERSAMPLING * samples for samples in size)
    kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    y, x = torch.fft.fftfreq(rows, **kind), torch.fft.rfftfreq(columns, **kind)[: size[1] // 2 + 1]
    positive = size[0] - size[0] // 2
    y = torch.cat([y[:positive], y[rows - size[0] // 2 :]])
    gain = _OVERSAMPLING**2 / (sampling.spline_response(y)[:, None] * sampling.spline_response(x))
    return gain * band_response(frame, size, max_frequency, vector, like=like)


def shifted_by(shift: Tensor) -> Tensor:
    """(..., 3, 3), of (..., 2)."""
    return unit_matrix(3, like=shift) + F.pad(shift.unsqueeze(-1), (2, 0, 0, 1))


def shift_of(warp: Tensor, grid: WorkingGrid) -> Tensor:
    """(..., 2), the translation (x, y) of a normalised warp, in pixels."""
    return warp[..., :2, 2] * half_length(grid.frame)


def _samples_of(continued: Tensor) -> tuple[int, int]:
    """(rows, columns) of a field before its border was continued."""
    return continued.shape[-2] - 6, continued.shape[-1] - 6
