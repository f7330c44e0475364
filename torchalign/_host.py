"""The eager CPU: where reading a number costs nothing, caches are small, and fresh memory is slow."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import mmap
import os
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad

from torchalign._check import message

__all__ = [
    "all_finite",
    "all_true",
    "carries_gradient",
    "empty_on_host",
    "fast_memory",
    "full_precision",
    "give_back_memory",
    "in_pieces",
    "is_known",
    "is_on_host",
    "is_transformed",
    "keeps_tables",
    "kernels_for",
    "launches_kernels",
    "map_on_host",
    "may_keep",
    "may_look",
    "may_read",
    "settle_tables",
    "waiting",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Samples of one piece of a computation whose steps stay in the cache.
_PIECE = 2**16
# A result of this many bytes and more is put into huge pages.
_HUGE_RESULT = 2**23
# The memory of the last result that was freed, by its size, up to that many bytes; ``None`` unless asked for.
_RESULTS: dict[int, mmap.mmap] | None = None
_LARGEST_KEPT = 2**29
# Parameters of ``mallopt``, and the variables by which a user sets them, or others that go with them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LIMITS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def is_on_host(tensor: Tensor) -> bool:
    """Whether its numbers may be read: a plain CPU tensor that nobody traces, maps or differentiates."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return False
    return not carries_gradient(tensor)


def may_read(*tensors: Tensor | None) -> bool:
    """Whether :func:`is_on_host` holds for all of them that are there."""
    return all(tensor is None or is_on_host(tensor) for tensor in tensors)


# Whether the host may wait for a device, see `waiting`.
_WAITING: ContextVar[bool] = ContextVar("waiting", default=False)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Within it the host may wait for what a device found, where that is worth it: see :func:`may_look`."""
    token = _WAITING.set(True)
    try:
        yield
    finally:
        _WAITING.reset(token)


def may_look(tensor: Tensor) -> bool:
    """Whether :func:`is_on_host` holds; or nobody traces, maps or differentiates it, and the host may wait for it."""
    if is_on_host(tensor):
        return True
    return may_keep(tensor) and _WAITING.get() and not carries_gradient(tensor)


def all_finite(tensor: Tensor) -> bool:
    """Whether every number is known to be finite: a tensor that may not be read is not asked.

    One sum tells: a NaN or an infinity survives it. (A sum that overflows tells a harmless lie.)
    """
    return is_on_host(tensor) and math.isfinite(float(tensor.sum()))


def all_true(tensor: Tensor) -> bool:
    """Whether all of a bool tensor is known to be True: one that may not be read is not asked."""
    return is_on_host(tensor) and bool(tensor.all())


def launches_kernels(tensor: Tensor) -> bool:
    """Whether an operation on it is a launch on a device: few large ones are then faster than many small ones."""
    return tensor.device.type != "cpu"


def is_known(number: object) -> bool:
    """Whether a size is a number: under torch.export it can be a symbol, which must not be compared."""
    return isinstance(number, (int, float))


def is_transformed(tensor: Tensor) -> bool:
    """Whether it runs under a transform of torch.func (vmap, grad, jvp), which lets nothing but tensors through."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def carries_gradient(*tensors: Tensor) -> bool:
    """Whether a derivative by one of them may be asked for: by autograd, in forward mode, or by torch.func."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def empty_on_host(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` in pages of 2 MiB where the system has them.

    A result of many megabytes is fresh memory. Touching it in pages of 4 KiB for the first time costs more
    than computing it: 0.5 ms for each frame of 1 MiB against 0.28 ms, measured on a virtual machine. After
    :func:`fast_memory`, that of a result which is gone is taken again: what is fresh must be zeroed by the system.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < _HUGE_RESULT or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = None if _RESULTS is None else _RESULTS.pop(size, None)
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    held = (ctypes.c_char * size).from_buffer(memory)  # the tensor keeps it alive
    if _RESULTS is not None and size <= _LARGEST_KEPT:
        weakref.finalize(held, _keep_result, _RESULTS, size, memory).atexit = False
    return torch.frombuffer(held, dtype=dtype).reshape(shape)


def _keep_result(results: dict[int, mmap.mmap], size: int, memory: mmap.mmap) -> None:
    results.clear()  # the last one
    results[size] = memory


def give_back_memory() -> None:
    """What was freed goes back to the system, where glibc would keep it; nothing where there is no glibc.

    glibc has a heap for every thread. Blocks below 32 MiB stay in it once they are freed, out of reach of the
    other threads: of a cube that streams through in chunks, resident memory grows by a chunk's temporaries for
    each thread. Its ``malloc_trim`` gives back whole pages and changes nothing else. Called once a chunk it costs
    milliseconds.
    """
    malloc_trim = _find_in_libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def in_pieces(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, some rows of the first axis at a time where results are large and nobody traces.

    On the eager CPU what one operation writes is then still in the cache when the next one reads it. The last of
    the tensors is as large as the result.
    """
    length = tensors[-1].shape[-1]
    if not may_read(*tensors) or tensors[-1].ndim != 2 or len({len(tensor) for tensor in tensors}) > 1:
        return function(*tensors)
    together = max(1, _PIECE // max(1, length))
    if len(tensors[-1]) <= together:
        return function(*tensors)
    parts = zip(*(tensor.split(together) for tensor in tensors), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([function(*part) for part in parts])


@functools.cache
def fast_memory() -> bool:
    """Freed memory stays with the process from now on; whether glibc took it. For the CPU, and only if you ask.

    A block of frames frees some 30 MiB at its end. glibc hands that back to the system, and the next block takes a
    page fault for every 4 KiB of it, at which threads wait for each other: up to half of the time of a
    :class:`~torchalign.PCC` on two threads. With these limits (``M_MMAP_THRESHOLD`` 32 MiB, ``M_TRIM_THRESHOLD``
    64 MiB, of ``mallopt``) up to 64 MiB stay at the end of each of its heaps, of which a thread has one. They hold
    for the whole process; where its environment names limits, those stand. Without glibc nothing is set. The memory of
    the last aligned cube that was freed, up to 512 MiB, is kept for the next one of its size.

    Much the same is won by torch's own ``THP_MEM_ALLOC_ENABLE=1``, in the environment before its first tensor:
    pages of 2 MiB.

    Example:
        >>> import torchalign as ta
        >>> ta.fast_memory() in (True, False)
        True
    """
    mallopt = _find_in_libc("mallopt")
    if mallopt is None or _memory_is_users(os.environ):
        return False
    global _RESULTS
    _RESULTS = {}
    return bool(mallopt(_MMAP_THRESHOLD, 2**25)) and bool(mallopt(_TRIM_THRESHOLD, 2**26))


def _memory_is_users(environment: Mapping[str, str]) -> bool:
    """Whether the environment tells glibc how to keep memory."""
    if "glibc.malloc." in environment.get("GLIBC_TUNABLES", ""):
        return True
    return any(name in environment for name in _LIMITS)


def map_on_host(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[function(item) for item in items]``, on as many threads as torch has, one core each.

    A chain of small operations gains little when each is split among all cores and waits for the slowest;
    whole blocks of frames do not wait for each other.
    """
    workers = min(torch.get_num_threads(), len(items))
    if workers <= 1:
        return [function(item) for item in items]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        # these modes belong to the thread; a worker starts without the caller's
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(item)

    # a worker's own number of threads is also what threads born later start with: it is put back
    total = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "torchalign", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(total)


@functools.cache
def _find_in_libc(name: str) -> Any:
    """A function of glibc, or nothing where there is none: musl, macOS, Windows."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):  # an interpreter without dynamic loading
        libc = ctypes.CDLL(None)
        return getattr(libc, name, None) if hasattr(libc, "gnu_get_libc_version") else None
    return None


_unpack_dual: Callable[[Tensor], Any] = forward_ad.unpack_dual  # torch leaves it without types


# Triton comes with torch's CUDA wheels; with TRITON_INTERPRET=1 its kernels run on CPU tensors, to be tested.
HAS_TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("TORCHALIGN_KERNELS") != "0"
# where no user's own line is
_INNER = f"{Path(__file__).parent}{os.sep}", f"{Path(str(torch.__file__)).parent}{os.sep}"
_KERNELS_ON = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def kernels_for(*tensors: Tensor | None) -> ModuleType | None:
    """:mod:`torchalign.kernels`, where one launch of it may do what many functions of torch do with these tensors.

    ``None`` where a derivative may be asked for, on other devices, where Triton is missing or does not work, and
    with ``TORCHALIGN_KERNELS=0`` in the environment. The functions of torch define what is right.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not HAS_TRITON or given[0].device.type != _KERNELS_ON or carries_gradient(*given):
        return None
    if torch.jit.is_tracing() or not _runs_triton(given[0].device.index):  # type: ignore[attr-defined, no-untyped-call]
        return None
    from torchalign import kernels

    return kernels


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _runs_triton(index: int | None) -> bool:
    """Whether the GPU is of a kind that Triton knows, from Volta on, and Triton works there."""
    if _KERNELS_ON == "cpu" or not torch.cuda.is_available():  # interpreted, or for a fake GPU
        return True
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (7, 0):
        return False
    if torch._C._len_torch_dispatch_stack():  # nothing is launched there
        return True
    from torchalign import kernels

    index = torch.cuda.current_device() if index is None else index
    works, fault = kernels.work_on(index, tries=not torch.cuda.is_current_stream_capturing())
    if fault:
        expected = f"a Triton of {kernels.OLDEST} or later that compiles for this GPU"
        cure = "all runs without it, and takes several times as long; TORCHALIGN_KERNELS=0 does so without this warning"
        files = [frame.filename for frame in reversed(traceback.extract_stack())]
        level = next((number for number, file in enumerate(files, 1) if not file.startswith(_INNER)), 1)
        warnings.warn(message("kernels", expected, fault, cure), RuntimeWarning, stacklevel=level)
    return works


_lock = threading.Lock()
_products: dict[str, Any] = {"within": 0, "give back": None}


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """FFTs, positions and normal equations need float32, also within a network of another dtype.

    Autocast is off for the thread. TF32 and bfloat16 in matrix products, which lose a thousandth and more of every
    factor, are torch's choice for the whole process: where somebody has chosen them, they are off until the last of
    the threads that are within is out. Compiled code does as it is told.
    """
    autocast = torch.autocast(tensor.device.type, enabled=False)
    if torch.compiler.is_compiling() or tensor.device.type != "cuda":
        return autocast
    return _exact_products(autocast)


@contextlib.contextmanager
def _exact_products(autocast: torch.autocast) -> Iterator[None]:
    with _lock:
        if _products["within"] == 0:
            _products["give back"] = _turn_off_tf32()
        _products["within"] += 1
    try:
        with autocast:
            yield
    finally:
        with _lock:
            _products["within"] -= 1
            if _products["within"] == 0:
                _products["give back"]()


def _turn_off_tf32() -> Callable[[], object]:
    """Turns it off where it is on; and what turns it on again, unless somebody has chosen anew meanwhile.

    From torch 2.9 on one attribute says what cuBLAS does. The older way sets more than that, and where a user has mixed
    the two, it tells something else or refuses to.
    """
    backend = torch.backends.cuda.matmul
    if hasattr(backend, "fp32_precision"):
        read: Callable[[], str] = functools.partial(getattr, backend, "fp32_precision")
        write: Callable[[str], object] = functools.partial(setattr, backend, "fp32_precision")
        off, rest = "ieee", "none"  # off too, or as torch.backends.fp32_precision says and will say
    else:
        read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        off, rest = "highest", "highest"
    chosen = read()
    if chosen in (off, rest):
        return bool
    write(off)

    def give_back() -> None:
        if read() == off:
            write(rest)
            if read() != chosen:
                write(chosen)

    return give_back


# Tables by what they are of, see keeps_tables; those that a stream may still be making; how many numbers they may hold.
_TABLES: dict[Any, Any] = {}
_COMING: dict[Any, tuple[Any, Any]] = {}
_MOST_NUMBERS = 2**24


def keeps_tables(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function of sizes and other plain numbers, whose tensors are made once for each device and dtype.

    The keyword ``like`` says on which device and in which dtype. What is kept is never changed nor dropped
    (a CUDA graph may hold on to it); when the tables are full, others are made anew each time. So they are while
    somebody traces; or records a CUDA graph, whose memory is not ours, before they are known to be made. Until then
    each stream makes its own.
    """

    @functools.wraps(function)
    def kept(*arguments: Any, like: Tensor) -> Result:
        if not may_keep(like) or not _are_known(arguments):
            return function(*arguments, like=like)
        key = (function.__module__, function.__qualname__, arguments, like.dtype, like.device)
        found = _TABLES.get(key)
        if found is not None:
            return found
        if _is_recording(like):
            return function(*arguments, like=like)
        stream = _stream_of(like)
        coming = None if stream is None else _COMING.get((key, stream.stream_id))
        if coming is not None:
            settle_tables()
            return coming[0]
        with torch.inference_mode(False), torch.no_grad():
            found = function(*arguments, like=like)
        numbers = sum(part.numel() for part in pytree.tree_leaves(found) if isinstance(part, Tensor))
        if numbers + _TABLES.get("numbers", 0) <= _MOST_NUMBERS:
            _TABLES["numbers"] = numbers + _TABLES.get("numbers", 0)
            if stream is None:
                _TABLES[key] = found
            else:
                _COMING[key, stream.stream_id] = found, stream.record_event()
        return found

    return kept


def settle_tables() -> None:
    """Tables that a device has made are there for all of its streams, and for what is recorded."""
    for place, (found, made) in list(_COMING.items()):
        if made.query():
            _TABLES.setdefault(place[0], found)
            _COMING.pop(place, None)


def may_keep(like: Tensor) -> bool:
    """Whether tensors of its kind are plain ones that outlive the call: nobody traces, maps or fakes them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    # what is made within a transform of torch.func belongs to it, also where ``like`` does not; its type is Tensor
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._is_functional_tensor(like):
        return False
    return type(like) in (Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()


def _are_known(arguments: Sequence[Any]) -> bool:
    """Whether all of them, and of their parts, are plain numbers or words."""
    return all(
        _are_known(part) if isinstance(part, tuple) else isinstance(part, str) or is_known(part)
        for part in arguments
    )


def _stream_of(like: Tensor) -> Any:
    """On a GPU the stream that makes what is asked for."""
    return torch.cuda.current_stream(like.device) if like.device.type == "cuda" else None


def _is_recording(like: Tensor) -> bool:
    return like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
