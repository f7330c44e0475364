"""What goes with the frames of a cube, and dask's chunks along time, each worked on by one task.

Only who has lazy cubes needs dask.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from torchalign._host import give_back_memory
from torchalign.cube.labels import CUBE, Array, Cube, axes_of, load

_device_lock = threading.Lock()
_threads_lock = threading.Lock()
_threads_held: list[int] = []  # the number of threads before the first of those who now have one each


def is_lazy(variable: xr.Variable | xr.DataArray) -> bool:
    """Whether it is made of dask's chunks."""
    return variable.chunks is not None


class Companion(NamedTuple):
    """What goes with the frames, such as a mask or a reference: of each frame its own, or one for all."""

    variable: xr.Variable  # over some of the roles
    roles: tuple[str, ...]  # the first is time
    decode: Callable[[Array, torch.device], Tensor]  # from an array with an axis for each role

    @property
    def axes(self) -> tuple[str, ...]:
        """The roles of its arrays; without time where it is the same for all frames."""
        return axes_of(self.variable, self.roles)

    def read(self, device: torch.device, batch: slice) -> Tensor:
        """What belongs to a batch of frames."""
        return self.decode(load(self.variable, self.axes, time=batch), device)


def chunk_sizes(cube: Cube, batch_size: int | None) -> tuple[int, ...]:
    """Frames of every chunk: as the cube has it, or ``batch_size`` each."""
    frames = cube.sizes["time"]
    if batch_size is None:
        chunks = cube.array.chunksizes[cube.dims["time"]]
        return tuple(int(size) for size in chunks) or (0,)
    sizes = [batch_size] * (frames // batch_size) + [frames % batch_size] * (frames % batch_size > 0)
    return tuple(sizes) or (0,)


def share(value: Any) -> Any:
    """One task that hands out a value, so that it travels to each worker once."""
    from dask.delayed import delayed

    return delayed(value, pure=False, traverse=False)


def parts_along_time(
    variable: xr.Variable | None, roles: Sequence[str], chunks: tuple[int, ...]
) -> list[Any]:
    """Per chunk the part of ``variable`` that belongs to it, with an axis for each role; the same without time."""
    if variable is None:
        return [None] * len(chunks)
    present = [role for role in roles if role in variable.dims]
    ordered = variable.transpose(*present)
    expand = tuple(slice(None) if role in present else None for role in roles)
    in_time = "time" in present
    if is_lazy(ordered):
        whole = dict.fromkeys(range(ordered.ndim), -1) | ({present.index("time"): chunks} if in_time else {})
        data = ordered.data.rechunk(whole)[expand]
        # not optimised here: what a mask and the cube have in common is read once
        parts = list(data.to_delayed(optimize_graph=False).ravel())
        return parts if in_time else parts * len(chunks)
    values = ordered.to_numpy()
    if not in_time:
        return [share(values[expand])] * len(chunks)
    edges = np.cumsum((0, *chunks))
    return [share(values[first:last][expand]) for first, last in itertools.pairwise(edges)]


def map_chunks(
    function: Callable[..., tuple[Array, Mapping[str, Array]]],
    shared: Any,
    cube: Cube,
    chunks: tuple[int, ...],
    parts: Sequence[Sequence[Any]],
    fields: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
) -> tuple[Any, dict[str, Any]]:
    """One task a chunk, which is run once for all that it makes; dask arrays, pixels in the order of the cube's own dims.

    ``function`` takes ``shared``, pixels (t, C, H, W) and a part of each of ``parts`` (:func:`parts_along_time`), and
    gives pixels like these and a (t, …) for each of ``fields``, name → the shape of one frame's, and the dtype.
    """
    import dask.array
    from dask.delayed import delayed

    da: Any = dask.array  # which has no types
    task = delayed(function, pure=False, nout=2)
    everyone = share(shared)
    size, dtype = tuple(cube.sizes[role] for role in CUBE[1:]), cube.array.dtype
    made = [
        (frames, task(everyone, raw, *own))
        for frames, raw, *own in zip(
            chunks, parts_along_time(cube.variable, CUBE, chunks), *parts, strict=True
        )
    ]
    pixels = [da.from_delayed(done[0], (frames, *size), dtype=dtype) for frames, done in made]
    tables = {
        name: da.concatenate(
            [da.from_delayed(done[1][name], (frames, *of_one), dtype=kind) for frames, done in made]
        )
        for name, (of_one, kind) in fields.items()
    }
    present = [role for role in CUBE if role in cube.dims]
    whole = xr.Variable(CUBE, da.concatenate(pixels))
    whole = whole if "band" in present else whole.isel(band=0)
    own_order = sorted(present, key=lambda role: cube.array.get_axis_num(cube.dims[role]))
    return whole.transpose(*own_order).data, tables


def rows_after(report: xr.Dataset, jobs: Sequence[Any], chunks: tuple[int, ...]) -> xr.Dataset:
    """A lazy report whose rows come once the job of their chunk is done.

    Dask would else make all of a report first, and keep every chunk of pixels for the jobs that come later.
    """
    import dask.array
    from dask.delayed import delayed

    da: Any = dask.array  # which has no types
    wait = delayed(_first_of, pure=False)
    time = report["status"].dims[0]
    changed = {}
    for name, array in report.data_vars.items():
        if is_lazy(array):
            data = array.transpose(time, ...).data.rechunk({0: chunks})
            parts = data.to_delayed(optimize_graph=False).ravel()
            shapes = [(frames, *data.shape[1:]) for frames in chunks]
            blocks = [
                da.from_delayed(wait(part, job), shape, dtype=data.dtype)
                for part, job, shape in zip(parts, jobs, shapes, strict=True)
            ]
            changed[name] = (array.dims, da.concatenate(blocks), array.attrs)
    return report.assign(changed)


def _first_of(value: Any, job: Any) -> Any:
    return value


def compute_together(values: Any) -> Any:
    """What lazy arrays hold, with tasks that they share run once."""
    import dask.base

    compute: Any = dask.base.compute  # which has no types
    return compute(values)[0]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Within a task: one thread on the CPU, as dask has one task per core; on CUDA, one task at a time.

    With one thread sums are taken in one order, wherever the task runs: results agree to the last bit. What the
    task has freed at its end does not stay in the heap of its thread.
    """
    if device.type != "cpu":
        with _device_lock:
            yield
        return
    # torch's number of threads is each thread's own, and what threads born later start with
    with _threads_lock:
        before = torch.get_num_threads()
        _threads_held.append(max(before, *_threads_held) if _threads_held else before)
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _threads_lock:
            torch.set_num_threads(_threads_held.pop())
        give_back_memory()
