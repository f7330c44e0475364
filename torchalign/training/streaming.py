"""Cubes that are larger than the GPU's memory: copied there, computed and copied back, all at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchalign._check import check_kind, check_number, message
from torchalign._graphs import may_record, recorded, used_by

__all__ = ["stream"]


class _Device:
    """The GPU, and its streams: one for copies there, one for copies back; work runs on the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.back = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on(self, side: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(side)

    def event(self, side: Any = None) -> Any:
        """All that was asked of a stream until now."""
        return (side or torch.cuda.current_stream(self.device)).record_event()

    def wait(self, event: Any, side: Any = None) -> None:
        """A stream goes on only after an event; the host does not wait."""
        (side or torch.cuda.current_stream(self.device)).wait_event(event)

    def pinned(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)

    def used_by(self, tensor: Tensor, side: Any = None) -> None:
        used_by(tensor, self.device, side)


class _Batch(NamedTuple):
    parts: list[Tensor | None]  # on the device
    ready: Any  # event: they are there


def stream(
    function: Callable[..., Any],
    *cubes: Tensor | None,
    batch_size: int,
    device: torch.device | str | None = None,
    buffers: int = 2,
    graph: bool | None = None,
) -> Iterator[Any]:
    """Apply ``function`` to one part of the cubes after the other, on a device that could not hold them.

    While part i is computed, part i + 1 is copied there and the result of part i − 1 back, each on a CUDA stream of
    its own, through ``buffers`` pinned buffers of the host: the copies cost no time as long as the work takes
    longer. A result is given out as soon as it has arrived, in order::

        aligner, reference = ta.PCC(), reference.to("cuda")
        run = ta.stream(functools.partial(aligner, reference=reference), cube, batch_size=64, device="cuda")
        for first, (aligned, estimate) in zip(range(0, len(cube), 64), run):
            out[first : first + 64] = aligned

    An aligner is recorded as a CUDA graph at the second part, and the next ones are one launch each; the last,
    shorter part runs as it is called, as all do where a gradient is asked for. The graph holds one more part and its
    result, and what a call needs, until all parts are done.

    On the CPU the same parts are computed in the same order, without copies. A function that gives out the same
    memory again must clone it: the copy to the host may still be on its way.

    Args:
        function: takes the parts of the cubes, on the device; returns a tensor, or tuples, lists and dicts of them.
        cubes: (T, ...), on the host, each of the same T; or ``None``, which is handed on. A memory-mapped cube
            (``torch.from_file``, ``numpy.memmap``) is read part by part.
        batch_size: frames in a part.
        device: where to compute; ``None``: the first GPU, or else the CPU.
        buffers: parts on their way at the same time, at least 2: device memory for so many parts and results.
        graph: whether to record three and more whole parts. By default only what is known to do the same to every part:
            an aligner, its ``estimate``, and a ``functools.partial`` of them. ``True``: any function; what it does in
            Python, such as to take the next of a list, is then done for the first two parts alone.

    Yields:
        What ``function`` returned for every part, on the host, not pinned: yours to keep.

    Raises:
        TypeError: a cube is no tensor, or a number is none.
        ValueError: cubes of different T, not on the host, or none; a number is out of range.

    Example:
        >>> cube = torch.rand(10, 3, 32, 32)
        >>> parts = stream(lambda part: part.mean((1, 2, 3)), cube, batch_size=4, device="cpu")
        >>> [len(part) for part in parts]
        [4, 4, 2]
    """
    check_number("batch_size", batch_size, minimum=1)
    check_number("buffers", buffers, minimum=2)
    if graph is not None:
        check_kind("graph", graph, bool, "True, False or None", "give a bool")
    length = _length(cubes)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(message("device", "cpu or cuda", device, "streams and pinned memory are CUDA's"))
    parts = [slice(first, first + int(batch_size)) for first in range(0, length, int(batch_size))]
    if place.type == "cpu":
        return (function(*(None if cube is None else cube[part] for cube in cubes)) for part in parts)
    if graph or (graph is None and may_record(function)):
        function = recorded(function, place, length // int(batch_size))
    return _run(function, cubes, parts, _Device(place), int(buffers))


def _run(
    function: Callable[..., Any],
    cubes: Sequence[Tensor | None],
    parts: Sequence[slice],
    device: _Device,
    buffers: int,
) -> Iterator[Any]:
    """The order in which things are asked for; who waits for what is said by events."""
    pinned: list[list[Tensor | None]] = [[None] * len(cubes) for _ in range(buffers)]
    free: list[Any] = [None] * buffers  # the copy out of a pinned buffer is done
    coming: list[_Batch] = []
    going: list[tuple[Any, Any]] = []  # results on the host, and the event of their arrival

    def fetch(index: int) -> None:
        number = index % buffers
        if free[number] is not None:
            free[number].synchronize()  # the host is about to write into it
        with device.on(device.there):
            there = [
                None if cube is None else _send(cube[parts[index]], pinned[number], which, device)
                for which, cube in enumerate(cubes)
            ]
        free[number] = device.event(device.there)
        coming.append(_Batch(there, free[number]))

    for index in range(min(buffers - 1, len(parts))):
        fetch(index)
    for index in range(len(parts)):
        # asked for before the work on this part is, so that the copy runs beside it
        if index + buffers - 1 < len(parts):
            fetch(index + buffers - 1)
        batch = coming.pop(0)
        device.wait(batch.ready)
        result = function(*batch.parts)
        for part in batch.parts:
            if part is not None:
                device.used_by(part)
        going.append(_bring_back(result, device))
        if len(going) == buffers:
            yield _arrived(*going.pop(0))
    while going:
        yield _arrived(*going.pop(0))


def _send(part: Tensor, pinned: list[Tensor | None], which: int, device: _Device) -> Tensor:
    """A part on its way to the device, through a pinned buffer that is used again and again."""
    buffer = pinned[which]
    if buffer is None:
        buffer = pinned[which] = device.pinned(part.shape, part.dtype)
    buffer = buffer[: part.shape[0]]  # the last part may be shorter
    buffer.copy_(part)
    return device.send(buffer)


def _bring_back(result: Any, device: _Device) -> tuple[Any, Any]:
    """The result on its way to the host, and the event of its arrival."""
    device.wait(device.event(), device.back)

    def receive(tensor: Tensor) -> Tensor:
        host = device.pinned(tensor.shape, tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        device.used_by(tensor, device.back)
        return host

    with device.on(device.back):
        host = tree_map_only(Tensor, receive, result)
    return host, device.event(device.back)


def _arrived(host: Any, event: Any) -> Any:
    event.synchronize()
    # pinned memory is scarce: what is kept is not
    return tree_map_only(Tensor, lambda tensor: tensor.clone(), host)


def _length(cubes: Sequence[Tensor | None]) -> int:
    given = [cube for cube in cubes if cube is not None]
    for cube in given:
        if not isinstance(cube, Tensor):
            raise TypeError(
                message("cubes", "tensors (T, ...)", type(cube).__name__, "wrap with torch.from_numpy")
            )
        if cube.device.type != "cpu":
            raise ValueError(
                message("cubes", "tensors on the host", cube.device, "what fits there needs no stream")
            )
    lengths = {cube.shape[0] if cube.ndim else None for cube in given}
    if len(lengths) != 1 or None in lengths:
        expected = "one or more of the same number of frames"
        cure = "close over what is not cut, e.g. the reference"
        raise ValueError(message("cubes", expected, sorted(map(str, lengths)), cure))
    return int(next(iter(given)).shape[0])
