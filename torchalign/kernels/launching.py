"""How a kernel is launched, and how that becomes an operator of torch."""

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

# Numbers that say how many or which. Triton compiles a kernel anew for a number that is 1, and for one that 16 divides,
# which lets it load several values at a time; of these it gains nothing.
_COUNTS = (  # noqa: SIM905
    "stack group repeat steps iterations lines bands first_band second_band third_band radius pad each each_field "
    "each_weight height rows usable_rows tall wide every_row every_column"
).split()


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` of a function that is launched: for one size of frames it is compiled once."""
    return triton.jit(function, do_not_specialize=_COUNTS)


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


@functools.cache
def block_length(kernel: Any) -> int:
    """How many places of a frame a kernel takes at a time."""
    return int(inspect.signature(kernel.fn).parameters["BLOCK"].default)


def launch(
    kernel: Any,
    lead: Sequence[int],
    size: Sequence[int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float | tuple[int, ...]] = (),
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
            read, as its constant HAS_ and the tensor's name tells it. The first floating one says in what it computes.
        numbers: integers, tuples of them, or for arguments that are annotated so floats.
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
    there = {
        f"HAS_{name.upper()}": one is not None for name, one in zip(kernel.arg_names, tensors, strict=False)
    }
    follows = {
        "COMPUTE": compute,
        "TINY": limits.tiny,
        "EPSILON": limits.eps,
        "BLOCK": block,
        **there,
        **constants,
    }
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


def strided_frames(
    lead: Sequence[int], cube: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(N, C, H, W) and (N, H, W) of a cube and its mask, as they lie; and the four and the three strides."""
    count, frames = math.prod(lead), expanded(lead, 3, cube)[0]
    frames = frames.reshape(count, *cube.shape[-3:])
    if mask is None:
        return frames, None, (frames.stride(), (0, 0, 0))
    masks = expanded(lead, 2, mask)[0].reshape(count, *mask.shape[-2:])
    return frames, masks, (frames.stride(), masks.stride())


def entries_of(motion: Tensor) -> int:
    """2 of shifts (..., 2), 6 of affine warps (..., 2, 3), 9 of homographies (..., 3, 3)."""
    return 2 if motion.shape[-1] == 2 else 3 * motion.shape[-2]
