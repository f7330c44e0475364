r"""Read samples at any position: which samples lie around it, and how a kernel weights them.

A *tap* is a sample at a whole distance from the one at or before a position. An interpolation is a sum of taps,

.. math:: f(x, y) = \sum_j k(y - j) \sum_i k(x - i)\, f_{ij}

and all kernels here (bilinear, Keys' bicubic, the cubic B-spline and its slope) are weights of two or four taps
along each axis. What differs is how taps are taken: :class:`Taps` gathers them around any positions,
:class:`Lines` takes whole rows and then columns where all positions of a frame are shifted alike, and
:class:`Slices` copies them where the shift is a number on the host.

References:
    Keys 1981, doi:10.1109/TASSP.1981.1163711; Unser 1999, doi:10.1109/79.799930 (B-splines); Sigg & Hadwiger
    2005, in GPU Gems 2, chapter 20 (their taps two by two).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import in_pieces, keeps_tables, launches_kernels

__all__ = [
    "Gather",
    "Lines",
    "PaddingMode",
    "Sampler",
    "Slices",
    "Taps",
    "bilinear",
    "bilinear_at",
    "continue_border",
    "cubic_weights",
    "spline_at",
    "spline_response",
    "spline_slopes",
    "spline_weights",
    "spline_with_slopes",
    "weighted_sum",
]

Scalar = TypeVar("Scalar", Tensor, float)
PaddingMode = Literal["border", "zeros", "reflection"]
# The sample so far right and down of the one at or before each position.
Tap = Callable[[int, int], Tensor]

# Keys' kernel with A = −1/2 leaves planes in place. OpenCV's and torch's −3/4 leaves 1 % less error on a real
# scene, but misplaces long waves by up to 0.047 px (Lanczos-3, cut to six taps: 0.019 px), against 0.0006 px
# here: more than the registration's own error. Measured by benchmarks/interpolation.py.
_CUBIC_A = -0.5
# Its weights of the taps −1, 0, 1, 2 by the third, second, first and zeroth power of the fraction.
_CUBIC = (
    (_CUBIC_A, _CUBIC_A + 2, -_CUBIC_A - 2, -_CUBIC_A),
    (-2 * _CUBIC_A, -_CUBIC_A - 3, 2 * _CUBIC_A + 3, _CUBIC_A),
    (_CUBIC_A, 0.0, -_CUBIC_A, 0.0),
    (0.0, 1.0, 0.0, 0.0),
)
# Fields are continued by so many samples: all taps of a position further out lie on the border.
_MARGIN = 3


# ------------------------------------------------------------------------------------------------------- kernels


def bilinear(tap: Tap, x: Tensor, y: Tensor) -> Tensor:
    """Of two by two taps; x and y are the fractions. A constant stays one, and fraction 0 copies."""
    above = torch.lerp(tap(0, 0), tap(1, 0), x)
    below = torch.lerp(tap(0, 1), tap(1, 1), x)
    return torch.lerp(above, below, y)


def weighted_sum(tap: Tap, across: Sequence[Tensor], down: Sequence[Tensor]) -> Tensor:
    """Of four by four taps, −1 … 2 along each axis, by the weights along x and y."""
    total: Tensor | None = None
    for j, weight in enumerate(down, -1):
        line = across[0] * tap(-1, j)
        for i in (0, 1, 2):
            line = torch.addcmul(line, across[i + 1], tap(i, j))
        total = weight * line if total is None else torch.addcmul(total, weight, line)
    assert total is not None
    return total


def cubic_weights(fraction: Scalar) -> tuple[Scalar, ...]:
    """Keys' weights of the taps −1, 0, 1, 2; (0, 1, 0, 0) at fraction 0."""
    if isinstance(fraction, Tensor):
        table = _cubic_table(like=fraction)
        third, second, first, constant = table.reshape(4, 4, *[1] * fraction.ndim)
        weights = torch.addcmul(second, third, fraction)
        weights = torch.addcmul(constant, torch.addcmul(first, weights, fraction), fraction)
        return weights.unbind()
    return tuple(
        ((c * fraction + b) * fraction + a) * fraction + d for c, b, a, d in zip(*_CUBIC, strict=True)
    )


@keeps_tables
def _cubic_table(*, like: Tensor) -> Tensor:
    # filled, not copied: a copy from the host waits for the device
    numbers = [
        torch.full((), number, dtype=like.dtype, device=like.device) for row in _CUBIC for number in row
    ]
    return torch.stack(numbers).reshape(4, 4)


def spline_weights(fraction: Tensor) -> tuple[Tensor, ...]:
    """The cubic B-spline's weights of the coefficients −1, 0, 1, 2; they sum to 1."""
    rest = 1 - fraction
    first, last = rest * rest * rest * (1 / 6), fraction * fraction * fraction * (1 / 6)
    right = _right_share(fraction)
    return first, 1 - right - first, right - last, last


def spline_slopes(fraction: Tensor) -> tuple[Tensor, ...]:
    """The derivatives of :func:`spline_weights`."""
    rest = 1 - fraction
    return (
        -0.5 * rest * rest,
        (1.5 * fraction - 2) * fraction,
        (2 - 1.5 * rest) * rest,
        0.5 * fraction * fraction,
    )


def spline_response(frequency: Tensor) -> Tensor:
    """Of the samples of a cubic B-spline, (1, 4, 1) / 6; frequencies in cycles per sample."""
    return (2 + (2 * math.pi * frequency).cos()) / 3


def _right_share(fraction: Tensor) -> Tensor:
    """A B-spline's weight of the two right taps together: 1/6 + (f + f²)/2 − f³/3."""
    return ((0.5 - fraction * (1 / 3)) * fraction + 0.5) * fraction + (1 / 6)


# ------------------------------------------------------------------------------------------ fields, any positions


def continue_border(field: Tensor) -> Tensor:
    """(..., h, w) → (..., h + 6, w + 6): the border is continued so far that no tap lies beyond it."""
    flat = F.pad(field.reshape(-1, 1, *field.shape[-2:]), (_MARGIN,) * 4, mode="replicate")
    return flat.reshape(*field.shape[:-2], *flat.shape[-2:])


class Taps(NamedTuple):
    """Samples of continued fields around whole positions; beyond the border is the border.

    One index serves all taps: they differ by where the fields are taken to begin.
    """

    fields: Tensor  # (..., m), flattened
    width: int  # of the continued lines
    first: Tensor  # (..., n), index of the tap (−1, −1)

    @classmethod
    def around(cls, continued: Tensor, column: Tensor, row: Tensor) -> Taps:
        """Of (..., h + 6, w + 6) around int64 (..., n), −2 … h and −2 … w; leading dimensions broadcast."""
        line = continued.shape[-1]
        first = (row + 2) * line + (column + 2)
        lead = torch.broadcast_shapes(continued.shape[:-2], first.shape[:-1])  # type: ignore[no-untyped-call]
        fields = continued.expand(*lead, *continued.shape[-2:]).flatten(-2)
        return cls(fields, line, first.expand(*lead, first.shape[-1]))

    def at(self, right: int, down: int) -> Tensor:
        """(..., n): the samples so far, −1 … 2, from those at the positions."""
        begin = (down + 1) * self.width + right + 1
        length = self.fields.shape[-1] - (3 * self.width + 3)
        return self.fields.narrow(-1, begin, length).gather(-1, self.first)


def bilinear_at(continued: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """A field between its samples.

    Args:
        continued: (..., h + 6, w + 6), see :func:`continue_border`.
        column: (..., n), positions among the h × w samples, any finite number.
        row: (..., n).

    Returns:
        (..., n).
    """
    if launches_kernels(continued):
        return _look_up(continued, column, row)
    return in_pieces(lambda *given: bilinear(*_surroundings(*given)), continued, column, row)


def spline_at(continued: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """A cubic B-spline between its coefficients, which are given as the samples are to :func:`bilinear_at`."""
    if launches_kernels(continued):
        # each look-up is of two by two of the taps
        (left, right, along), (top, bottom, down) = _neighbours(column), _neighbours(row)
        above, below = (
            torch.lerp(_look_up(continued, left, line), _look_up(continued, right, line), along)
            for line in (top, bottom)
        )
        return torch.lerp(above, below, down)

    def sample(*given: Tensor) -> Tensor:
        tap, x, y = _surroundings(*given)
        return weighted_sum(tap, spline_weights(x), spline_weights(y))

    return in_pieces(sample, continued, column, row)


def spline_with_slopes(continued: Tensor, column: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`spline_at` and its derivatives by column and row, tap by tap: differentiable in every mode."""
    tap, x, y = _surroundings(continued, column, row)
    across, across_slope = spline_weights(x), spline_slopes(x)
    down, down_slope = spline_weights(y), spline_slopes(y)
    value = by_column = by_row = torch.zeros_like(column)
    for j in range(4):
        line = line_slope = torch.zeros_like(column)
        for i in range(4):
            sample = tap(i - 1, j - 1)
            line = line + across[i] * sample
            line_slope = line_slope + across_slope[i] * sample
        value = value + down[j] * line
        by_column = by_column + down[j] * line_slope
        by_row = by_row + down_slope[j] * line
    return value, by_column, by_row


def _surroundings(continued: Tensor, column: Tensor, row: Tensor) -> tuple[Tap, Tensor, Tensor]:
    """The taps around positions, and the positions' fractions."""
    height, width = continued.shape[-2] - 2 * _MARGIN, continued.shape[-1] - 2 * _MARGIN
    column, row = column.clamp(-1, width), row.clamp(-1, height)
    left, top = column.floor(), row.floor()
    taps = Taps.around(continued, left.to(torch.int64), top.to(torch.int64))
    return taps.at, column - left, row - top


def _look_up(continued: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """:func:`bilinear_at` as one launch on a device."""
    height, width = continued.shape[-2:]
    # pixel centres to torch's corners, spelled out: align_corners=False, and the margin
    shift = 2 * _MARGIN + 1
    x, y = column * (2 / width) + (shift / width - 1), row * (2 / height) + (shift / height - 1)
    shape = torch.broadcast_shapes(continued.shape[:-2], column.shape[:-1])  # type: ignore[no-untyped-call]
    flat = continued.expand(*shape, height, width).reshape(-1, 1, height, width)
    at = torch.stack([x, y], dim=-1).expand(*shape, -1, 2).reshape(-1, 1, column.shape[-1], 2)
    found = F.grid_sample(flat, at, mode="bilinear", padding_mode="border", align_corners=False)
    return found.reshape(*shape, column.shape[-1])


def _neighbours(position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where to look up the two left and the two right taps of a cubic B-spline; the weight of the right ones."""
    whole = position.floor()
    fraction = position - whole
    first, _, _, last = spline_weights(fraction)
    right = _right_share(fraction)
    return whole - first / (1 - right), whole + 1 + last / right, right


# --------------------------------------------------------------------------------------- frames, for every pixel


class Sampler(Protocol):
    """Reads planes (..., T, C, H, W) at the output's source positions; outside is padded."""

    def inside(self) -> Tensor:
        """(..., T, h, w) bool: where the nearest source pixel is one of the frame's; a tie goes right and down."""

    def nearest(self, planes: Tensor) -> Tensor:
        """(..., T, C, h, w), of any dtype: values are only moved."""

    def around(self, planes: Tensor) -> Any:
        """What lies at the taps of all positions, read once for all kernels."""

    def bilinear(self, taps: Any) -> Tensor:
        """(..., T, C, h, w), of what lies around."""

    def bicubic(self, taps: Any) -> Tensor:
        """(..., T, C, h, w), of what lies around."""

    def all_usable(self, taps: Any) -> Tensor:
        """(..., T, C, h, w) bool: all that a bicubic kernel meets is 1, not 0."""


def _padded(index: Tensor, length: int, padding_mode: PaddingMode) -> Tensor:
    """Indices into a line of ``length`` pixels, which is continued beyond its ends."""
    if padding_mode == "reflection":  # … 1 0 | 0 1 2 … L−1 | L−1 L−2 …, period 2L
        index = index.remainder(2 * length)
        index = torch.minimum(index, 2 * length - 1 - index)
    return index.clamp(0, length - 1)


class _Positioned:
    """Source positions of output pixels: ⌊x⌋ and ⌊y⌋, int64, x − ⌊x⌋ and y − ⌊y⌋, that broadcast to (..., T, h, w)."""

    def __init__(self, positions: Sequence[Tensor], size: tuple[int, int], padding_mode: PaddingMode) -> None:
        self.column, self.row, x, y = positions
        self.near = self.column + (x >= 0.5), self.row + (y >= 0.5)
        self.size = size
        self.padding_mode: PaddingMode = padding_mode
        # a band dimension for the weights: (..., T, 1, h, w), or (..., T, 1, 1, 1) of shifts
        self.x, self.y, self.dtype = x.unsqueeze(-3), y.unsqueeze(-3), x.dtype

    def inside(self) -> Tensor:
        """See :class:`Sampler`."""
        column, row = self.near
        # axis by axis: of translations these are lines
        return ((row >= 0) & (row < self.size[0])) & ((column >= 0) & (column < self.size[1]))


class Gather(_Positioned):
    """Any positions, any device, all frames at once: integer indices into flattened frames."""

    def nearest(self, planes: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return self._take(planes, *self.near)

    def around(self, planes: Tensor) -> Tap:
        """See :class:`Sampler`."""
        planes, column, row = planes.to(self.dtype), self.column, self.row
        if self.padding_mode == "reflection":
            return lambda right, down: self._take(planes, column + right, row + down)
        shape = torch.broadcast_shapes(column.shape[-2:], row.shape[-2:])  # type: ignore[no-untyped-call]
        row, column = row.clamp(-2, self.size[0]), column.clamp(-2, self.size[1])
        lines = (part.expand(*part.shape[:-2], *shape).flatten(-2).unsqueeze(-2) for part in (column, row))
        taps = Taps.around(continue_border(planes), *lines)

        def tap(right: int, down: int) -> Tensor:
            taken = taps.at(right, down)
            return taken.reshape(*taken.shape[:-1], *shape)

        return tap

    def bilinear(self, taps: Tap) -> Tensor:
        """See :class:`Sampler`."""
        return bilinear(taps, self.x, self.y)

    def bicubic(self, taps: Tap) -> Tensor:
        """See :class:`Sampler`."""
        return weighted_sum(taps, cubic_weights(self.x), cubic_weights(self.y))

    def all_usable(self, taps: Tap) -> Tensor:
        """See :class:`Sampler`."""
        lines = [_all_usable([taps(right, down) for right in range(-1, 3)], self.x) for down in range(-1, 3)]
        return _all_usable(lines, self.y) > 0

    def _take(self, planes: Tensor, column: Tensor, row: Tensor) -> Tensor:
        """Pixels at any (column, row): (..., T, C, H, W) → (..., T, C, h, w)."""
        (height, width), mode = self.size, self.padding_mode
        index = _padded(row, height, mode) * width + _padded(column, width, mode)  # (..., T, h, w)
        flat = planes.flatten(-2)  # (..., T, C, H·W)
        flat_index = index.flatten(-2).unsqueeze(-2)  # (..., T, 1, h·w)
        taken = flat.gather(-1, flat_index.expand(*flat.shape[:-1], flat_index.shape[-1]))
        return taken.reshape(*taken.shape[:-1], *index.shape[-2:])


class _Windows:
    """Kernels over windows: all pixels from the tap −1 of the first position to the tap 2 of the last.

    Positions lie ``step`` pixels apart, so that each tap along an axis is a slice of the window.
    """

    step: int
    dtype: torch.dtype  # of the computation
    x: Any  # a number, or (..., T, 1, 1, 1)
    y: Any

    def bilinear(self, taps: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        _, above, below, _ = self._along(taps.to(self.dtype), rows=True)
        _, left, right, _ = self._along(torch.lerp(above, below, self.y), rows=False)
        return torch.lerp(left, right, self.x)

    def bicubic(self, taps: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        lines = _sum_of_lines(cubic_weights(self.y), self._along(taps, rows=True))
        return _sum_of_lines(cubic_weights(self.x), self._along(lines, rows=False))

    def all_usable(self, taps: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        lines = _all_usable(self._along(taps, rows=True), self.y)
        return _all_usable(self._along(lines, rows=False), self.x) > 0

    def _along(self, window: Tensor, *, rows: bool) -> list[Tensor]:
        span = window.shape[-2 if rows else -1] - 3
        places = [slice(tap, tap + span, self.step) for tap in range(4)]
        return [window[..., place, :] if rows else window[..., place] for place in places]


def _sum_of_lines(weights: Sequence[Any], taps: Sequence[Tensor]) -> Tensor:
    total = taps[0] * weights[0]
    for weight, tap in zip(weights[1:], taps[1:], strict=True):
        total = (
            torch.addcmul(total, weight, tap) if isinstance(weight, Tensor) else total.add_(tap, alpha=weight)
        )
    return total


def _all_usable(taps: Sequence[Tensor], fraction: Any) -> Tensor:
    """Not 0 where none of four taps is 0, or, at fraction 0, where only the second weighs, that one is not."""
    before, own, after, last = taps
    return own * (before * after * last + (fraction == 0))


class Lines(_Positioned, _Windows):
    """Frames that are shifted: rows are taken whole, then columns, by one line of indices a frame and axis.

    Of columns (..., T, 1, w) and rows (..., T, h, 1), each ``step`` pixels from the next.
    """

    def __init__(
        self, positions: Sequence[Tensor], size: tuple[int, int], padding_mode: PaddingMode, step: int = 1
    ) -> None:
        super().__init__(positions, size, padding_mode)
        self.step = step

    def nearest(self, planes: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        column, row = self.near
        return self._read(planes, column.squeeze(-2), row.squeeze(-1))

    def around(self, planes: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        column, row = (
            first + torch.arange(-1, (count - 1) * self.step + 3, device=first.device)
            for first, count in (
                (self.column[..., 0], self.column.shape[-1]),
                (self.row[..., 0, :], self.row.shape[-2]),
            )
        )
        return self._read(planes, column, row)

    def _read(self, planes: Tensor, column: Tensor, row: Tensor) -> Tensor:
        """Rows (..., T, n) and columns (..., T, m): (..., T, C, H, W) → (..., T, C, n, m)."""
        (height, width), lead = self.size, planes.shape[:-2]
        first = torch.arange(math.prod(lead), device=planes.device).reshape(lead) * height
        index = first[..., None] + _padded(row, height, self.padding_mode).unsqueeze(-2)
        lines = planes.reshape(-1, width).index_select(0, index.flatten()).reshape(*index.shape, width)
        index = _padded(column, width, self.padding_mode)[..., None, None, :]
        return lines.gather(-1, index.expand(*lines.shape[:-1], index.shape[-1]))


class Slices(_Windows):
    """One shift (x, y), known on the host: whole pixels are slices, fractions one pass along each axis.

    The fast path of the eager CPU: it takes a quarter of the time of gathering four taps.
    """

    def __init__(
        self, shift: tuple[float, float], size: tuple[int, int], dtype: torch.dtype, step: int = 1
    ) -> None:
        self.size, self.dtype, self.step = size, dtype, step
        (self.column, self.x), (self.row, self.y) = (
            (math.floor(-component), -component - math.floor(-component)) for component in shift
        )

    def _nearest(self) -> tuple[int, int]:
        return self.column + (self.x >= 0.5), self.row + (self.y >= 0.5)

    def overlap(self) -> tuple[slice, slice]:
        """The rows and columns of the lattice whose nearest source pixel is one of the frame's."""
        column, row = self._nearest()
        rows, columns = _overlap(row, self.size[0], 1), _overlap(column, self.size[1], 1)
        # the first of the lattice at or after a pixel
        top, bottom, left, right = (-(-place // self.step) for place in (*rows, *columns))
        return slice(top, bottom), slice(left, right)

    def inside(self) -> Tensor:
        """See :class:`Sampler`."""
        height, width = (-(-length // self.step) for length in self.size)
        inside = torch.zeros((height, width), dtype=torch.bool, device="cpu")
        inside[self.overlap()] = True
        return inside

    def nearest(self, planes: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        column, row = self._nearest()
        moved = _shift_line(_shift_line(planes, -1, column), -2, row)
        return moved if self.step == 1 else moved[..., :: self.step, :: self.step]

    def shift(self, planes: Tensor, out: Tensor) -> None:
        """All pixels, :meth:`bilinear` to the last bit, in two runs through memory: rows first, as there."""
        _shift_line(_shift_line(planes, -2, self.row, self.y), -1, self.column, self.x, out=out)

    def around(self, planes: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        height, width = self.size
        # beyond the border lies the border, so no offset need be larger
        row, column = (
            min(max(offset, -length - 2), length + 1)
            for offset, length in zip((self.row, self.column), self.size, strict=True)
        )
        margins = (max(0, 1 - column), max(0, column + 2), max(0, 1 - row), max(0, row + 2))
        padded = F.pad(planes.to(self.dtype).reshape(-1, 1, height, width), margins, mode="replicate")
        top, left = max(0, row - 1), max(0, column - 1)
        # as far as the last position's taps
        bottom, right = (
            top + height + 3 - (height - 1) % self.step,
            left + width + 3 - (width - 1) % self.step,
        )
        window = padded[..., top:bottom, left:right]
        return window.reshape(*planes.shape[:-2], *window.shape[-2:])


def _overlap(offset: int, length: int, taps: int) -> tuple[int, int]:
    """First and last + 1 output index whose ``taps`` sources, from index + offset on, are all inside."""
    first = min(max(0, -offset), length)
    return first, max(first, min(length, length - offset - taps + 1))


def _shift_line(
    planes: Tensor, dim: int, offset: int, fraction: float = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """Along one axis, what lies at index + offset + fraction; beyond the border is the border."""
    length, taps = planes.shape[dim], 1 if fraction == 0 else 2
    if offset == 0 and fraction == 0 and out is None:
        return planes
    first, last = _overlap(offset, length, taps)
    planes = planes.contiguous()
    if out is None:
        out = torch.empty_like(planes, memory_format=torch.contiguous_format)
    if last > first:
        # in one run through memory: what comes from the line before, or after, is written over
        stride = 1 if dim == -1 else planes.shape[-1]
        begin, end = max(0, -offset) * stride, planes.numel() - max(0, offset + taps - 1) * stride
        within = out.view(-1)[begin:end]
        sources = [
            planes.view(-1).narrow(0, begin + (offset + tap) * stride, end - begin) for tap in range(taps)
        ]
        if taps == 2:
            torch.lerp(sources[0], sources[1], fraction, out=within)
        else:
            within.copy_(sources[0])
    if first > 0:
        out.narrow(dim, 0, first).copy_(planes.narrow(dim, 0, 1))
    if last < length:
        out.narrow(dim, last, length - last).copy_(planes.narrow(dim, length - 1, 1))
    return out
