"""CUDA graphs: a call that comes again in the same shape is recorded once and played back, in one launch.

As called, the host needs some 17 µs for each of several hundred launches; see ``benchmarks/launches.py``.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchalign._check import message
from torchalign._host import carries_gradient, settle_tables
from torchalign.aligner import Aligner

__all__ = ["LEAST_CALLS", "Graphs", "may_record", "recorded", "used_by"]

# The first call of a shape runs as it is, the second is recorded and played, the third one gains.
LEAST_CALLS = 3
# Shapes, or choices of what is given, that are kept at a time; the one that was asked for longest ago goes.
_MOST_SHAPES = 3

Function = Callable[..., Any]


class Recorder(Protocol):
    """What records calls: a GPU, or its double in a test."""

    def apart(self) -> AbstractContextManager[object]:
        """Where recorded memory is written and read: after all that was asked for before, and before what follows."""

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """Where the results of a call will lie, not yet computed; and what computes them, again and again."""

    def hand_over(self, tensor: Tensor) -> None:
        """A result that was made apart is the caller's, who reads it where all else is done."""


def used_by(tensor: Tensor, device: torch.device, stream: Any = None) -> None:
    """Its memory is not to be given to others before the stream, or the current one, is done with it."""
    if tensor.device.type == "cuda":
        tensor.record_stream(stream or torch.cuda.current_stream(device))


@functools.cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    """Where recordings are played, and where they are made; always the same.

    What libraries keep for the second is made while it records, and belongs to recordings alone.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


_one_recording = threading.Lock()


class _CudaRecorder:
    """A GPU, and the memory that all recordings share: one is played at a time, and its results are copied first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._playing, self._recording = _streams(device)
        self._memory = torch.cuda.graph_pool_handle()

    @contextmanager
    def apart(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self._device)
        self._playing.wait_stream(here)
        try:
            with torch.cuda.stream(self._playing):  # also left where a recording has failed on its own
                yield
        finally:
            here.wait_stream(self._playing)

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        with _one_recording:
            torch.cuda.synchronize(self._device)
            settle_tables()  # else they would be made again each time that this is played
            collects = gc.isenabled()
            gc.disable()  # a graph of somebody else's that is freed meanwhile would end the recording
            try:
                graph = torch.cuda.CUDAGraph()
                # other threads may use the GPU meanwhile
                options: dict[str, Any] = {"pool": self._memory, "stream": self._recording}
                with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
                    found = call()
            except BaseException:
                # else torch goes on as if it recorded, and keeps what other streams have used; or it does not, or is
                # a version without this call
                with suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(self._device.index, self._memory)
                raise
            finally:
                if collects:
                    gc.enable()
        return found, graph.replay

    def hand_over(self, tensor: Tensor) -> None:
        # it was made where all calls of the process are played: freed, its memory would at once be another thread's
        used_by(tensor, self._device)


def _recorder_for(device: torch.device) -> Recorder | None:
    """Only CUDA records."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _CudaRecorder(
        device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
    )


def may_record(function: object) -> bool:
    """Whether a function is known to be one of tensors alone, so that what Python does in it need not be repeated.

    An aligner, its ``estimate``, or a ``functools.partial`` of them, unless a channel is a function of the user's.
    """
    if isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", function)
    if not isinstance(owner, Aligner):
        return False
    channels = (getattr(part, "channel", None) for part in owner.modules())
    return not any(callable(channel) and not isinstance(channel, nn.Module) for channel in channels)


def recorded(function: Function, device: torch.device, calls: int) -> Function:
    """The function; or, where so many calls of one shape on the device pay for it, its recordings."""
    recorder = _recorder_for(device) if calls >= LEAST_CALLS else None
    return function if recorder is None else Graphs(function, recorder)


@dataclass
class _Shape:
    given: list[Tensor | None]  # where a recording reads
    found: Any = None  # where it writes
    play: Callable[[], object] | None = None


class _RecordingError(Exception):
    """It says why."""


class Graphs:
    """A function of tensors (and ``None``) that is recorded when it is called with the same shapes again.

    Results are copies: the next call does not overwrite them. Where a gradient is asked for, the function runs as it is
    called; where it cannot be recorded too, after a warning. What is kept is freed with this object.
    """

    def __init__(self, function: Function, recorder: Recorder) -> None:
        self._function = function
        self._recorder: Recorder | None = recorder
        self._shapes: OrderedDict[Any, _Shape] = OrderedDict()

    def __call__(self, *given: Tensor | None) -> Any:
        """What the function gives."""
        recorder = self._recorder
        if recorder is None or carries_gradient(*_tensors_in(given)):
            return self._function(*given)
        try:
            with recorder.apart():
                found = self._run(recorder, given)
            for tensor in _tensors_in(tree_leaves(found)):
                recorder.hand_over(tensor)
            return found
        except (_RecordingError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
        self._give_up()
        cure = "all runs as it is called; graph=False does so without this warning"
        text = message("graph", "what a CUDA graph can record", reason, cure)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return self._function(*given)

    def _run(self, recorder: Recorder, given: Sequence[Tensor | None]) -> Any:
        key = _key(given)
        shape = self._shapes.pop(key, None)
        if shape is None:  # maybe it never comes again
            while len(self._shapes) >= _MOST_SHAPES:
                self._shapes.popitem(last=False)
            contiguous = {"memory_format": torch.contiguous_format}
            shape = _Shape([None if one is None else one.detach().clone(**contiguous) for one in given])
            found = self._function(*shape.given)
            if carries_gradient(*_tensors_in(tree_leaves(found))):  # by a parameter
                self._give_up()
                return found
            self._shapes[key] = shape
            return tree_map_only(Tensor, torch.clone, found)
        self._shapes[key] = shape
        for own, tensor in zip(shape.given, given, strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor)
        if shape.play is None:
            shape.found, shape.play = self._record(recorder, shape.given)
        shape.play()
        return tree_map_only(Tensor, torch.clone, shape.found)

    def _record(self, recorder: Recorder, given: Sequence[Tensor | None]) -> tuple[Any, Callable[[], object]]:
        function, complaints = self._function, list[RuntimeError]()

        def call() -> Any:
            try:
                return function(*given)
            except RuntimeError as error:
                complaints.append(error)  # that the recording ended badly only follows from it
                raise

        try:
            return recorder.record(call)
        except RuntimeError as error:
            raise _RecordingError(str([*complaints, error][0])) from error

    def _give_up(self) -> None:
        self._recorder = None
        self._shapes.clear()


def _tensors_in(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _key(given: Sequence[Tensor | None]) -> Any:
    """What a recording is of: shapes and dtypes, and the modes that a caller may change in between."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
    return modes, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in given)
