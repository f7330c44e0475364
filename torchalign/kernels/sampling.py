"""Where an output pixel lies in its frame, and what is read there: the pieces that kernels share.

Convention:
    As in :mod:`torchalign.functional.warp`: a source position is output pixel + displacement, and only the
    displacement is computed in floating point. Products are never contracted to fused multiply-adds (kernels are
    launched with ``enable_fp_fusion=False``): a determinant that is 0 must be 0 here too.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

# beyond this many pixels a displacement is cut, as in functional.warp
_FARTHEST = tl.constexpr(2.0**22)

# Numbers that say how many or which. Triton compiles a kernel anew for a number that is 1, and for one that 16 divides,
# which lets it load several values at a time; of these it gains nothing.
_COUNTS = (  # noqa: SIM905
    "stack group repeat steps iterations lines bands first_band second_band third_band radius pad each each_field "
    "each_weight height rows usable_rows tall wide every_row every_column"
).split()


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` of a function that is launched: for one size of frames it is compiled once."""
    return triton.jit(function, do_not_specialize=_COUNTS)


@triton.jit
def block_of(count, BLOCK: tl.constexpr):
    """The frame of a program, its block of the frame's ``count`` places, and which of these exist."""
    blocks = tl.cdiv(count, BLOCK)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return frame, place, place < count


@triton.jit
def cell_of(rows, columns, BLOCK: tl.constexpr):
    """The same of a frame of rows × columns, and column and row of each place."""
    frame, place, live = block_of(rows * columns, BLOCK)
    return frame, place, live, place % columns, place // columns


@triton.jit
def load_complex(spectrum, place, live):
    """Real and imaginary parts of some of a spectrum's bins."""
    real = tl.load(spectrum + 2 * place, mask=live, other=0)
    return real, tl.load(spectrum + 2 * place + 1, mask=live, other=0)


@triton.jit
def store_complex(spectrum, place, live, real, imaginary):
    """The same, written."""
    tl.store(spectrum + 2 * place, real, mask=live)
    tl.store(spectrum + 2 * place + 1, imaginary, mask=live)


@triton.jit
def load_pair(pairs, place):
    """Of pairs the x and the y at a place."""
    return tl.load(pairs + 2 * place), tl.load(pairs + 2 * place + 1)


@triton.jit
def store_pair(pairs, place, x, y):
    """The same, written."""
    tl.store(pairs + 2 * place, x)
    tl.store(pairs + 2 * place + 1, y)


@triton.jit
def load_row(row, COMPUTE: tl.constexpr):
    """Three entries of a matrix."""
    return tl.load(row).to(COMPUTE), tl.load(row + 1).to(COMPUTE), tl.load(row + 2).to(COMPUTE)


@triton.jit
def load_matrix(warp, COMPUTE: tl.constexpr):
    """All nine, row by row."""
    a, b, c = load_row(warp, COMPUTE)
    d, e, f = load_row(warp + 3, COMPUTE)
    g, h, i = load_row(warp + 6, COMPUTE)
    return a, b, c, d, e, f, g, h, i


@triton.jit
def wave_of(place, live, columns, fy, fx, shift_x, shift_y):
    """The frequencies (y, x) of a block of bins, and cosine and sine of the phase of a shift there."""
    y = tl.load(fy + place // columns, mask=live, other=0)
    x = tl.load(fx + place % columns, mask=live, other=0)
    cycles = x * shift_x + y * shift_y
    # within half a turn, where sine and cosine are at their best
    angle = (cycles - tl.floor(cycles + 0.5)) * 6.283185307179586
    return y, x, tl.cos(angle), tl.sin(angle)


@triton.jit
def is_finite(values):
    """Neither NaN nor infinite."""
    return tl.abs(values) < float("inf")


@triton.jit
def lerp(first, second, share):
    """torch.lerp: exact for constants, and at shares 0 and 1."""
    step = second - first
    return tl.where(share < 0.5, first + share * step, second - step * (1 - share))


@triton.jit
def divide(numerator, denominator):
    """Rounded as torch rounds it."""
    if numerator.dtype == tl.float64:  # noqa: SIM108
        quotient = numerator / denominator
    else:
        quotient = tl.div_rn(numerator, denominator)
    return quotient


@triton.jit
def bounded(displacement):
    """What is no number, or too far, is nowhere near the frame."""
    known = tl.where(displacement == displacement, displacement, _FARTHEST)
    return tl.minimum(tl.maximum(known, -_FARTHEST), _FARTHEST)


@triton.jit
def _near_or_nowhere(line, determinant):
    line = divide(line, determinant)
    return tl.where(tl.abs(line) <= 0.5 * _FARTHEST, line, _FARTHEST)


@triton.jit
def displacement(motion, x, y, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    """``warp⁻¹ p − p`` for p = (x, y), see functional.warp._displacement: term by term what is written there."""
    if KIND == 0:
        dx = bounded(-tl.load(motion).to(COMPUTE)) + tl.zeros_like(x)
        dy = bounded(-tl.load(motion + 1).to(COMPUTE)) + tl.zeros_like(y)
    else:
        a, b, c = load_row(motion, COMPUTE)
        d, e, f = load_row(motion + 3, COMPUTE)
        if KIND == 1:
            determinant = a * e - b * d + tl.zeros_like(x)
            dx = _near_or_nowhere(
                (b * d - e * (a - 1)) * x + (b * f - e * c), determinant
            ) + _near_or_nowhere(-b * y, determinant)
            dy = _near_or_nowhere(-d * x + (d * c - a * f), determinant) + _near_or_nowhere(
                (b * d - a * (e - 1)) * y, determinant
            )
        else:
            g, h, i = load_row(motion + 6, COMPUTE)
            depth = (d * h - e * g) * x + (b * g - a * h) * y + (a * e - b * d)
            perspective = (d * h - e * g) * x + (b * g - a * h) * y
            across = (e * (i - a) - f * h + b * d - perspective) * x + (c * h - b * i) * y + (b * f - c * e)
            down = (f * g - d * i) * x + (a * (i - e) - c * g + b * d - perspective) * y + (c * d - a * f)
            dx = bounded(divide(across, depth))
            dy = bounded(divide(down, depth))
    return dx, dy


@triton.jit
def source_of(
    motion, x, y, height, width, local, samples, live,
    LOCAL: tl.constexpr, KIND: tl.constexpr, POSITION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Whole and fractional source positions, the nearest pixel, and whether it is one of the frame's.

    ``LOCAL``: with shifts on top of the motion, those along y ``samples`` places after those along x.
    """
    dx, dy = displacement(motion, x.to(POSITION), y.to(POSITION), KIND, POSITION)
    if LOCAL:
        dx = bounded(dx + tl.load(local, mask=live, other=0).to(POSITION))
        dy = bounded(dy + tl.load(local + samples, mask=live, other=0).to(POSITION))
    whole_x = tl.floor(dx)
    whole_y = tl.floor(dy)
    fx = (dx - whole_x).to(COMPUTE)
    fy = (dy - whole_y).to(COMPUTE)
    column = x + whole_x.to(tl.int32)
    row = y + whole_y.to(tl.int32)
    near_column = column + (fx >= 0.5).to(tl.int32)
    near_row = row + (fy >= 0.5).to(tl.int32)
    inside = (near_column >= 0) & (near_column < width) & (near_row >= 0) & (near_row < height)
    return column, row, fx, fy, near_column, near_row, inside


@triton.jit
def padded(index, length, REFLECT: tl.constexpr):
    """Indices into a line of ``length`` pixels, which is continued beyond its ends."""
    if REFLECT:  # … 1 0 | 0 1 2 … L−1 | L−1 L−2 …, period 2L
        period = 2 * length
        index = ((index % period) + period) % period
        index = tl.minimum(index, period - 1 - index)
    return tl.minimum(tl.maximum(index, 0), length - 1)


@triton.jit
def neighbour(x, y, i, j, rows, columns):
    """The place of the sample that lies i columns and j rows further, the border continued."""
    return padded(y + j, rows, False) * columns + padded(x + i, columns, False)


@triton.jit
def triangle(i, j, REACH: tl.constexpr):
    """That sample's weight in a triangular mean over 2 ``REACH`` + 1 samples a side."""
    far_y = tl.where(j < 0, -j, j)
    far_x = tl.where(i < 0, -i, i)
    return ((REACH + 1 - far_y) * (REACH + 1 - far_x)) * (1.0 / (REACH + 1) ** 4)


@triton.jit
def cubic_weight(fraction, TAP: tl.constexpr):
    """Keys' weight, A = −1/2, of the pixel at ``TAP`` − 1 from ⌊x⌋."""
    rest = 1 - fraction
    if TAP == 0:
        weight = ((-0.5 * fraction + 1.0) * fraction - 0.5) * fraction
    elif TAP == 1:
        weight = (1.5 * fraction - 2.5) * fraction * fraction + 1
    elif TAP == 2:
        weight = (1.5 * rest - 2.5) * rest * rest + 1
    else:
        weight = ((-0.5 * rest + 1.0) * rest - 0.5) * rest
    return weight


@triton.jit
def read(
    pixels, usable, at, at_mask, live, COMPUTE: tl.constexpr, FLOATING: tl.constexpr, MASKED: tl.constexpr
):
    """Pixels, 0 where they are unusable; and where they are usable (1 and 0)."""
    values = tl.load(pixels + at, mask=live).to(COMPUTE)
    good = live
    if FLOATING:
        good = good & is_finite(values)
    if MASKED:
        good = good & (tl.load(usable + at_mask, mask=live, other=0) != 0)
    return tl.where(good, values, 0.0), good


@triton.jit
def interpolate(
    pixels, usable, column, row, fx, fy, height, width, strides, mask_strides, live,
    INTERPOLATION: tl.constexpr, REFLECT: tl.constexpr, FLOATING: tl.constexpr, MASKED: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The bilinear value and the share of it that is usable; the bicubic one, and what of it met unusable pixels.

    Strides are those of rows and columns. ``INTERPOLATION`` is 1 (bilinear alone) or 2.
    """
    total = tl.zeros_like(fx)
    met = tl.zeros_like(fx)
    for j in tl.static_range(4):
        if INTERPOLATION == 2 or (j == 1 or j == 2):
            at_row = padded(row + (j - 1), height, REFLECT).to(INDEX)
            weight_y = cubic_weight(fy, j)
            line = tl.zeros_like(fx)
            met_line = tl.zeros_like(fx)
            for i in tl.static_range(4):
                if INTERPOLATION == 2 or (i == 1 or i == 2):
                    at_column = padded(column + (i - 1), width, REFLECT).to(INDEX)
                    at = at_row * strides[0] + at_column * strides[1]
                    at_mask = at_row * mask_strides[0] + at_column * mask_strides[1]
                    tap, good = read(pixels, usable, at, at_mask, live, COMPUTE, FLOATING, MASKED)
                    share = good.to(COMPUTE)
                    if INTERPOLATION == 2:
                        weight_x = cubic_weight(fx, i)
                        line += weight_x * tap
                        if FLOATING or MASKED:
                            met_line += tl.abs(weight_x) * (1 - share)
                    if i == 1:
                        left = tap
                        left_share = share
                    elif i == 2:
                        level = lerp(left, tap, fx)
                        level_share = lerp(left_share, share, fx)
            if INTERPOLATION == 2:
                total += weight_y * line
                if FLOATING or MASKED:
                    met += tl.abs(weight_y) * met_line
            if j == 1:
                above = level
                above_share = level_share
            elif j == 2:
                linear = lerp(above, level, fy)
                linear_share = lerp(above_share, level_share, fy)
    return linear, linear_share, total, met


def operator(
    takes: Callable[[Tensor], bool] = lambda first: True,
) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Any]]:
    """Makes of a function that launches a kernel the operator of ``torch.ops.torchalign`` of its name.

    The function yields what it gives, still empty: fake tensors need no more. What follows fills it.

    Args:
        takes: whether the kernel takes the first tensor; where not, ``None`` is given.
    """

    def register(function: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        (given,) = get_args(signature.return_annotation)

        def run(*arguments: Any) -> Any:
            filling = function(*arguments)
            made = next(filling)
            next(filling, None)
            return made

        run.__signature__ = signature.replace(return_annotation=given)  # type: ignore[attr-defined]
        name = function.__name__.lstrip("_")
        made = torch.library.custom_op(f"torchalign::{name}", run, mutates_args=())
        made.register_fake(lambda *arguments: next(function(*arguments)))

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return made(*arguments) if takes(arguments[0]) else None

        return call

    return register


def planes_of(most: int) -> Callable[[Tensor], bool]:
    """Whether a plane has no more samples than one program may walk: of more, torch is faster."""
    return lambda image: image.shape[-2] * image.shape[-1] <= most


def strided_frames(
    lead: Sequence[int], cube: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """(N, C, H, W) and (N, H, W) of a cube and its mask, as they lie; and the four and three strides."""
    count, frames = math.prod(lead), expanded(lead, 3, cube)[0]
    frames = frames.reshape(count, *cube.shape[-3:])
    if mask is None:
        return frames, None, (*frames.stride(), 0, 0, 0)
    masks = expanded(lead, 2, mask)[0].reshape(count, *mask.shape[-2:])
    return frames, masks, (*frames.stride(), *masks.stride())


def kind_of(motion: Tensor) -> int:
    """KIND: 0 for shifts (..., 2), 1 for affine warps (..., 2, 3), 2 for homographies (..., 3, 3)."""
    return 0 if motion.shape[-1] == 2 else motion.shape[-2] - 1


@functools.cache
def block_length(kernel: Any) -> int:
    """How many places of a frame a kernel takes at a time."""
    return int(inspect.signature(kernel.fn).parameters["BLOCK"].default)


def launch(
    kernel: Any,
    lead: Sequence[int],
    size: Sequence[int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float] = (),
    *,
    strided: bool = False,
    **constants: Any,
) -> None:
    """Run a kernel where its tensors lie.

    Args:
        kernel: its arguments are the tensors, then the numbers.
        lead: (..., T); nothing runs where there are no frames.
        size: (h, w) of a frame, for a program that takes a block of it; () for one that takes a whole frame.
        tensors: bool ones are seen as bytes, 0 and 1, complex ones as pairs; ``None`` is one that the kernel does not
            read. The first floating one says in what the kernel computes.
        numbers: integers, or for arguments that are annotated so floats.
        strided: the kernel knows how they lie; else contiguous ones are made of them.
        constants: beside those that follow from the others.
    """
    block = block_length(kernel)
    programs = math.prod(lead) * triton.cdiv(math.prod(size), block)
    if programs == 0:
        return
    known = [tensor for tensor in tensors if tensor is not None]
    floating = next(tensor.dtype for tensor in known if tensor.is_floating_point() or tensor.is_complex())
    limits = torch.finfo(floating)

    def given(tensor: Tensor | None) -> Tensor:
        tensor = known[0] if tensor is None else tensor
        tensor = tensor if strided else tensor.contiguous()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor

    compute = tl.float64 if floating in (torch.float64, torch.complex128) else tl.float32
    follows = {"COMPUTE": compute, "TINY": limits.tiny, "EPSILON": limits.eps, "BLOCK": block, **constants}
    wanted = {name: value for name, value in follows.items() if name in kernel.arg_names}
    # Triton launches on the device that is the current one; the tensors may lie on another
    index = known[0].device.index if known[0].device.type == "cuda" else -1
    with torch.cuda.device(index):
        kernel[(programs,)](*map(given, tensors), *numbers, enable_fp_fusion=False, **wanted)


def expanded(lead: Sequence[int], own: int, *parts: Tensor | None) -> tuple[Any, ...]:
    """Parts of ``own`` dimensions of their own, with these leading ones; ``None`` stays so."""
    return tuple(
        None if part is None else part.expand(*lead, *part.shape[part.ndim - own :]) for part in parts
    )


def by_group(lead: Sequence[int], own: int, *parts: Tensor | None) -> tuple[Any, ...]:
    """What is given once for all frames (..., T), or for each: (..., 1 or T, ...), and how many frames share it.

    Args:
        lead: (..., T).
        own: how many dimensions a part has of its own.
        parts: of which ``None`` stays so. All are shared, or none is.

    Returns:
        The parts, with these leading dimensions, and the number.
    """
    alone = [part is None or part.ndim == own or part.shape[-own - 1] == 1 for part in parts]
    shared = all(alone) and len(lead) > 0
    kept = (*lead[:-1], 1) if shared else lead
    return *expanded(kept, own, *parts), lead[-1] if shared else 1


@triton.jit
def spline_weight(fraction, TAP: tl.constexpr):
    """Of a cubic B-spline, of the coefficient at ``TAP`` − 1 from ⌊x⌋; the four sum to 1."""
    rest = 1 - fraction
    right = ((0.5 - fraction * (1 / 3)) * fraction + 0.5) * fraction + (1 / 6)
    first = rest * rest * rest * (1 / 6)
    last = fraction * fraction * fraction * (1 / 6)
    if TAP == 0:
        weight = first
    elif TAP == 1:
        weight = 1 - right - first
    elif TAP == 2:
        weight = right - last
    else:
        weight = last
    return weight
