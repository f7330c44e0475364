"""Stripes of a detector: what is constant along an axis lies on a line of the spectrum, and stays where it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchalign._host import all_true, keeps_tables
from torchalign.functional.fourier import unit_circle
from torchalign.functional.working_grid import WorkingGrid

__all__ = ["lines_of", "without_stripes"]

# Lines of the spectrum, up to so many bins wide to either side, are of stripes where this share of them stays, and
# that by so many standard deviations; the ground's way must turn them by more than the root of the last.
_LINE, _STATIC, _STATIC_SIGMAS, _LEAST_WAY = 2, 0.28, 2.0, 1e-3


def without_stripes(
    power: Tensor, still: Tensor, grid: WorkingGrid, shift: Tensor, fixed_at: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""The cross-power, and the reference, without the lines of columns, or rows, that stay while the ground moves.

    What is constant along an axis, as the gains of a detector's columns are, has its spectrum L on a line. Turned by
    the ground's shift, what moves with it is real; what stays has the phase of the way t between the two,

    .. math:: \sum \sin(\omega t)\, \mathrm{Im}\, L / \sum \sin^2(\omega t)\, |L|

    of the line: 0 for the ground, 1 for a pattern of the detector.
    """
    way, fixed = shift.detach(), power.detach()
    rows, columns, _ = lines_of(grid.frame, grid.size, like=grid.radius)
    near_rows, near_columns, axis, omega, parts = _line_parts(grid.frame, grid.size, like=grid.radius)

    def turned(way: Tensor) -> Tensor:
        return unit_circle(way.index_select(-1, axis) * omega)

    columns_line = (_lowest(fixed) * near_rows).sum(-2)
    rows_line = (fixed[..., : _LINE + 1] * near_columns).sum(-1)
    line = torch.cat((columns_line, rows_line), -1)
    turn = turned(way)
    across = (line * turn).imag
    sine = (turn if fixed_at is None else turned(way - fixed_at.detach())).imag
    pull, size = sine * across, line.abs()
    sums = torch.matmul(
        torch.stack((pull, pull.square(), sine.square() * size, size), -2), parts
    )  # (..., 4, 2)
    pulled, square, whole, all_of_it = sums.unbind(-2)
    # (where nothing moves both are the same)
    least = torch.maximum(_STATIC * whole, _STATIC_SIGMAS * square.sqrt())
    static = (pulled > least) & (whole > _LEAST_WAY * all_of_it)
    if all_true(~static):
        return power, still
    kept = (1 - static[..., :1, None] * rows) * (1 - static[..., 1:, None] * columns)
    return power * kept, still * kept


def _lowest(spectrum: Tensor) -> Tensor:
    """The rows (dim −2) of the lowest frequencies of either sign, each once."""
    first = _LINE + 1
    return torch.cat((spectrum[..., :first, :], spectrum[..., first:, :][..., -_LINE:, :]), -2)


@keeps_tables
def _line_parts(frame: tuple[int, int], size: tuple[int, int], *, like: Tensor) -> tuple[Tensor, ...]:
    """Of the samples of the line along x, and that along y: which part of a shift turns them, their ω, whose they are.

    Before them the lowest rows, and columns, of :func:`lines_of`.
    """
    rows, columns, _ = lines_of(frame, size, like=like)
    y, x = WorkingGrid.of(frame, size, 0.5, like).frequencies
    first = torch.cat((torch.ones_like(x), torch.zeros_like(y)))
    omega, parts = 2 * math.pi * torch.cat((x, y)), torch.stack((first, 1 - first), -1)
    return _lowest(rows), columns[..., : _LINE + 1], (first == 0).to(torch.int64), omega, parts


@keeps_tables
def lines_of(frame: tuple[int, int], size: tuple[int, int], *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, 1), (1, w//2+1): 1 at the frequencies of what is constant along y, or x, as far as windows spread it.

    And (h, w//2+1): 1 off both.
    """
    grid = WorkingGrid.of(frame, size, 0.5, like)
    y, x = (
        (frequency.abs() * length < torch.sym_min(float(_LINE), samples / 32) + 0.5).to(like.dtype)
        for frequency, length, samples in zip(grid.frequencies, frame, size, strict=True)
    )
    rows, columns = y[:, None], x[None]
    return rows, columns, (1 - rows) * (1 - columns)
