"""The one loop over the frames of a cube, batch by batch: an eager cube is one chunk, dask has several.

:class:`AlignFrames` and :class:`WarpFrames` are what is done to a batch.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from torchalign._check import check_kind, message
from torchalign._graphs import may_record, recorded
from torchalign._host import give_back_memory, waiting
from torchalign.aligner import Aligner
from torchalign.cascade import Cascade
from torchalign.cube.chunks import Companion, chunk_sizes, is_lazy, map_chunks, parts_along_time, undisturbed
from torchalign.cube.labels import CUBE, MASK, Array, Cube, load
from torchalign.cube.pixels import Pixels, keep_nodata
from torchalign.cube.reference import ReferenceSource
from torchalign.cube.solution import Remaining, promised_fields, report_fields, unpack_field
from torchalign.ecc import ECC
from torchalign.functional.affine import identity_warp, to_homogeneous
from torchalign.functional.defects import exclude_defects, suspects
from torchalign.functional.misfit import misfit
from torchalign.functional.phase import phase_correlation
from torchalign.functional.shift_field import is_zero
from torchalign.functional.warp import Interpolation, PaddingMode, Resampled, resample
from torchalign.lgm import LGM
from torchalign.local import Local
from torchalign.pcc import PCC
from torchalign.types import Estimate, ShiftField, Status

_CPU_BATCH_BYTES, _CUDA_BATCH_BYTES = 2**26, 2**30
_MARGIN_SHARE = 0.05  # of a frame's side, which may be left out when it is measured again
_IN_VAIN = 3  # so many batches in a row that are played and then aligned all the same: no more are played
_TASK_BATCH_BYTES = 2**24  # of each of dask's tasks on the CPU, several of which run side by side


# --- the loop ---


@dataclass(frozen=True)
class Operation(ABC):
    """What is done to a batch of frames; it travels to dask's workers."""

    pixels: Pixels
    device: torch.device | str | None
    batch_size: int | None

    makes_pixels = True

    def find_device(self) -> torch.device:
        """Where to compute, on the machine that does."""
        return find_device(self.device, None)

    def on(self, device: torch.device, batches: int, fixed: Mapping[int, Tensor | None]) -> Operation:
        """With all that it computes with there, so many whole batches; and the companions that all of them share."""
        return self

    def promised(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """What it tells of every frame: the shape and the dtype of one."""
        return {}

    def as_promised(self, fields: dict[str, Array]) -> dict[str, Array]:
        """Fields of the promised shapes; dask has made its arrays of them before anything was computed."""
        return fields

    @abstractmethod
    def run(
        self, raw: Array, device: torch.device, *companions: Tensor | None
    ) -> tuple[Array, dict[str, Array]]:
        """Pixels like raw, (t, C, H, W), and what is told of each frame."""


def run(
    operation: Operation,
    cube: Cube,
    companions: Sequence[Companion | None],
    advance: Callable[[int], object] = lambda frames: None,
) -> tuple[Any, dict[str, Any]]:
    """Pixels in the order of the cube's own dims, and what is told of each frame; dask arrays if it is lazy."""
    if is_lazy(cube.array):
        chunks = chunk_sizes(cube, operation.batch_size)
        kinds = [None if one is None else (one.axes, one.roles, one.decode) for one in companions]
        parts = [
            [None] * len(chunks) if one is None else parts_along_time(one.variable, one.axes, chunks)
            for one in companions
        ]
        return map_chunks(_run_chunk, (operation, kinds), cube, chunks, parts, operation.promised())
    values = np.empty(cube.array.shape, cube.array.dtype) if operation.makes_pixels else None
    out = None if values is None else cube.view(values)
    fields = _run_batches(operation, cube.variable, companions, out, _CPU_BATCH_BYTES, advance)
    give_back_memory()
    return values, fields


def _run_chunk(
    shared: tuple[Operation, Sequence[Any]], raw: Array, *parts: Array | None
) -> tuple[Array, dict[str, Array]]:
    """A task of dask: the pixels of a chunk, (t, C, H, W), and its rows of the report."""
    operation, kinds = shared
    companions = [
        None if part is None or kind is None else Companion(xr.Variable(kind[0], part), *kind[1:])
        for kind, part in zip(kinds, parts, strict=True)
    ]
    with undisturbed(operation.find_device()), torch.no_grad():
        out = np.empty_like(raw) if operation.makes_pixels else None
        frames = xr.Variable(CUBE, raw)
        fields = _run_batches(operation, frames, companions, out, _TASK_BATCH_BYTES)
    return raw if out is None else out, operation.as_promised(fields)


def _run_batches(
    operation: Operation,
    frames: xr.Variable,
    companions: Sequence[Companion | None],
    out: Array | None,
    budget: int,
    advance: Callable[[int], object] = lambda frames: None,
) -> dict[str, Array]:
    """Put pixels into out, (T, C, H, W), and return what is told of each frame."""
    device = operation.find_device()
    count, made = frames.sizes["time"], []
    step = _frames_at_a_time(operation, frames, device, budget)
    fixed = {
        place: None if one is None else one.read(device, slice(None))
        for place, one in enumerate(companions)
        if one is None or "time" not in one.axes
    }  # once for all frames
    operation = operation.on(device, count // step, fixed)
    for first in range(0, max(count, 1), step):  # an empty cube is one empty batch
        batch = slice(first, first + step)
        raw = load(frames, CUBE, time=batch)
        own = [
            fixed[place] if one is None or place in fixed else one.read(device, batch)
            for place, one in enumerate(companions)
        ]
        values, fields = operation.run(raw, device, *own)
        if out is not None:
            out[batch] = values
        made.append(fields)
        advance(len(raw))
    return {name: np.concatenate([fields[name] for fields in made]) for name in made[0]}


def _frames_at_a_time(operation: Operation, frames: xr.Variable, device: torch.device, budget: int) -> int:
    """As the user says, or what fits the budget, in bytes of the CPU."""
    if operation.batch_size is not None:
        return operation.batch_size
    samples = int(np.prod([frames.sizes.get(role, 1) for role in CUBE[1:]]))
    if device.type == "cuda":
        budget = min(_CUDA_BATCH_BYTES, torch.cuda.mem_get_info(device)[0] // 16)
    return max(1, budget // max(1, samples * operation.pixels.compute.itemsize))


# --- what goes with the frames ---


def mask_companion(usable: xr.Variable | None) -> Companion | None:
    """A mask, (t, H, W) or (H, W), each of the sizes maybe 1."""
    return None if usable is None else Companion(usable, MASK, _decode_mask)


def _decode_mask(values: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(values)).to(device)


def reference_companion(source: ReferenceSource, cube: Cube) -> Companion:
    """Pixels of a reference, (C, H, W), or (t, C, H, W) with one per frame."""
    shape = tuple(cube.sizes[role] for role in CUBE[1:])
    return Companion(source.variable, CUBE, partial(_decode_reference, source.pixels, shape))


def _decode_reference(pixels: Pixels, shape: tuple[int, ...], values: Array, device: torch.device) -> Tensor:
    decoded = pixels.decode(values, device)
    return decoded.expand(*decoded.shape[:-3], *shape)  # one band, or one row, for all


# --- align ---


@dataclass(frozen=True)
class AlignFrames(Operation):
    """Estimate, resample and measure again; with ``makes_pixels=False``, estimate only."""

    aligner: nn.Module
    verify: bool
    metres: dict[str, float]  # of a pixel
    makes_pixels: bool = True
    nodes: tuple[int, int] | None = None  # of the field of local shifts, if the aligner makes one
    graph: bool = True  # where there is CUDA, and it pays
    align: Callable[..., Any] | None = None  # of a batch, where it is recorded
    spoilt: bool | None = None  # whether the reference has defects; None where each batch has its own
    # of the last batches that were played: whether they were suspect, and aligned twice
    lately: deque[bool] = field(init=False, default_factory=lambda: deque(maxlen=_IN_VAIN))

    def find_device(self) -> torch.device:
        """Where the aligner is, if nobody says otherwise."""
        return find_device(self.device, self.aligner)

    def on(self, device: torch.device, batches: int, fixed: Mapping[int, Tensor | None]) -> AlignFrames:
        """With the aligner there, whose calls may be recorded; a reference for all is looked at once."""
        there = replace(self, aligner=place_module(self.aligner, device))
        if fixed.keys() >= {0, 2}:
            there = replace(there, spoilt=_has_defects(there.aligner, fixed[0], fixed[2]))
        if not self.graph or not may_record(there.aligner):
            return there
        align = recorded(there._align_and_look, device, batches)
        return there if align == there._align_and_look else replace(there, align=align)

    @property
    def _rows(self) -> int:
        """Of the warps that the aligner makes; of a lazy cube they must be known beforehand."""
        motions = {str(getattr(part, "motion", "")) for part in self.aligner.modules()}
        return 3 if "homography" in motions else 2

    def promised(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """The fields of a report."""
        residual = self.verify and self.makes_pixels
        how: dict[str, Any] = {"residual": residual, "metres": self.metres, "nodes": self.nodes}
        return promised_fields(self.pixels.compute, self._rows, **how)

    def as_promised(self, fields: dict[str, Array]) -> dict[str, Array]:
        """With warps of the rows that were promised."""
        warp, rows = fields["warp"], self._rows
        if warp.shape[1] < rows:
            warp = to_homogeneous(torch.from_numpy(warp)).numpy()
        elif warp.shape[1] > rows:
            if not (warp[:, 2] == (0, 0, 1)).all():
                cure = 'give its class an attribute motion = "homography", so that it is known beforehand'
                raise ValueError(message("aligner", "warps (T, 2, 3)", f"homographies {warp.shape}", cure))
            warp = warp[:, :2]
        return fields | {"warp": warp}

    def run(
        self, raw: Array, device: torch.device, *companions: Tensor | None
    ) -> tuple[Array, dict[str, Array]]:
        """The companions: the reference, two masks, and warps to start from."""
        frames = self.pixels.decode(raw, device)
        reference, usable, reference_usable, init = companions
        given = frames, reference, usable, reference_usable, None if init is None else init.to(frames)
        size = (raw.shape[-2], raw.shape[-1])
        # what is suspect the host sees before it asks for more
        if self.align is None or self.spoilt or sum(self.lately) == _IN_VAIN:
            suspect, result = self.spoilt or self._look(*given[:-1]), None
        else:  # all in one launch; what is then suspect, which is rare, is aligned once more
            *result, suspect = self.align(*given)
            self.lately.append(bool(suspect))
        if suspect:
            with waiting():
                result = self._align(*given)
        aligned, found, left = result or self._align(*given)
        del frames, given  # what is large is given back before more of it is made
        if aligned is None:
            return raw, report_fields(found, None, size, self.metres)
        encoded = self.pixels.encode(aligned, raw)
        rejected = ~found.valid.cpu().numpy()
        encoded[rejected] = raw[rejected]
        return encoded, report_fields(found, left, size, self.metres)

    def _align(
        self,
        frames: Tensor,
        reference: Tensor | None,
        usable: Tensor | None,
        reference_usable: Tensor | None,
        init: Tensor | None,
    ) -> tuple[Tensor | None, Estimate, Remaining | None]:
        """Pixels, unless none are made; the estimate; and what is measured again. Of tensors alone."""
        options = {"mask": usable, "reference_mask": reference_usable}
        options |= {} if init is None else {"init": init}
        if not self.makes_pixels:
            return None, estimate_only(self.aligner, frames, reference, **options), None
        aligned, found = self.aligner(frames, reference, **options)
        if getattr(self.aligner, "fill_value", None) is not None:
            aligned = keep_nodata(aligned, frames, found.warp, found.field)
        left = None
        if self.verify and reference is not None:
            left = _measure_again(self.aligner, aligned, usable, found, reference, reference_usable)
        return aligned, found, left

    def _align_and_look(self, *given: Any) -> tuple[Any, ...]:
        return *self._align(*given), self._look(*given[:-1])

    def _look(
        self,
        frames: Tensor,
        reference: Tensor | None,
        usable: Tensor | None,
        reference_usable: Tensor | None,
    ) -> Tensor | None:
        """bool: whether fills or hot pixels are likely in the frames, or in references of their own."""
        looks = [_look_for_defects(self.aligner, frames, usable)]
        looks += [_look_for_defects(self.aligner, reference, reference_usable)] if self.spoilt is None else []
        suspect = [look[2].any() for look in looks if look is not None]
        return reduce(torch.logical_or, suspect) if suspect else None


def estimate_only(module: nn.Module, *frames: Tensor | None, **options: Any) -> Estimate:
    """Without resampling, where the module can."""
    only: Any = getattr(module, "estimate", None)
    found: Estimate = only(*frames, **options) if only else module(*frames, **options)[1]
    return found


def _looks_itself(frames: Tensor) -> bool:
    """Whether an aligner looks for defects without being told to, since there is nobody to wait for."""
    return frames.device.type == "cpu"


def _look_for_defects(
    module: nn.Module, images: Tensor | None, known: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """The channel, what of it is usable, and where fills or hot pixels are likely; ``None`` if nobody is to be told."""
    if images is None or _looks_itself(images) or not isinstance(module, Aligner):
        return None
    if not module.expects_defects:
        return None
    channel, usable = module._extract_channel(images if images.ndim == 4 else images[None], known)
    suspect = suspects(channel, usable)
    return None if suspect is None else (channel, usable, suspect)


def _has_defects(module: nn.Module, images: Tensor | None, known: Tensor | None) -> bool:
    """Whether, looked at closely, they are there."""
    look = _look_for_defects(module, images, known)
    if look is None or not bool(look[2].any()):
        return False
    channel, usable, _ = look
    good = exclude_defects(channel, usable)
    if good is None:
        return True
    return not torch.equal(good, torch.ones_like(good) if usable is None else usable.expand_as(good))


def _margin(module: nn.Module, found: Estimate, size: tuple[int, int]) -> int:
    """So many pixels at the borders are all that shifts can bring in from outside; 0 where that is not known."""
    if not isinstance(module, Aligner) or found.field is not None or found.warp.shape[-2] != 2:
        return 0
    stages = [part for part in module.modules() if isinstance(part, Aligner)]
    if any(getattr(stage, "motion", "translation") != "translation" for stage in stages):
        return 0
    margin = math.ceil(max(stage.max_translation for stage in stages)) + 1
    return margin if margin <= _MARGIN_SHARE * min(size) else 0


def _measure_again(
    module: nn.Module,
    aligned: Tensor,
    usable: Tensor | None,
    found: Estimate,
    reference: Tensor,
    reference_usable: Tensor | None,
) -> Remaining:
    """How far aligned frames, and their parts, still are from the reference."""
    if not len(aligned):
        return Remaining(aligned.new_empty(0, 2), aligned.new_empty(0))
    if reference_usable is not None:
        masks = -1 if reference_usable.ndim == 3 else 1
        reference_usable = reference_usable.expand(masks, *reference.shape[-2:])
    seen, margin = None, _margin(module, found, (aligned.shape[-2], aligned.shape[-1]))
    if usable is None and margin:  # without a mask a correlation costs half
        within = slice(margin, -margin)
        aligned, reference = aligned[..., within, within], reference[..., within, within]
        reference_usable = None if reference_usable is None else reference_usable[..., within, within]
    else:
        inside = aligned.new_ones(len(aligned), 1, *aligned.shape[-2:])
        if usable is not None:
            inside = inside * usable.reshape(-1, 1, *usable.shape[-2:])
        # the mask moved with its frame, and borders are repeated beyond it
        options: dict[str, Any] = {"interpolation": "nearest", "padding_mode": "zeros", "field": found.field}
        seen = resample(inside, found.warp, **options).values.squeeze(1) > 0
    # the channel and the crop are those of the estimate; a module of another kind is taken to see the mean
    channel_source = module if isinstance(module, Aligner) else PCC()
    moving, moving_usable = channel_source._extract_channel(aligned, seen)
    frames = reference if reference.ndim == 4 else reference[None]
    still, still_usable = channel_source._extract_channel(frames, reference_usable)
    contrast = channel_source.score_contrast
    remaining = phase_correlation(moving, still, moving_usable, still_usable, contrast=contrast)
    measured = found.valid & remaining.converged & ~remaining.flat & ~remaining.outside
    apart = misfit(moving, still, moving_usable, still_usable, contrast=contrast)
    # it may be why a frame is ambiguous, and does not depend on where the whole lies
    told = found.valid | (found.status == int(Status.AMBIGUOUS))
    shift = remaining.shift.masked_fill(~measured[:, None], torch.nan)
    return Remaining(shift, apart.masked_fill(~told, torch.nan))


# --- apply ---


@dataclass(frozen=True)
class WarpFrames(Operation):
    """Resample with warps that are known."""

    interpolation: Interpolation
    padding_mode: PaddingMode
    fill_value: float | None

    def run(
        self, raw: Array, device: torch.device, *companions: Tensor | None
    ) -> tuple[Array, dict[str, Array]]:
        """The companions: warps, which are on the host, a mask, and a field's coefficients and lattice."""
        warp, usable, *parts = companions
        assert warp is not None
        identity = identity_warp(homography=warp.shape[-2] == 3, dtype=warp.dtype)
        moved = (warp != identity).flatten(1).any(1)
        field = None
        if parts and parts[0] is not None and parts[1] is not None:
            field = unpack_field(parts[0], parts[1])
            moved = moved | ~is_zero(field)
            field = ShiftField(*(part.to(device, self.pixels.compute) for part in field))
        kept = moved.numpy()[:, None, None, None]
        # read while they are on the host: of shifts a GPU needs a line of indices, not an image
        shifts = warp.shape[-2] == 2 and bool((warp[..., :2] == identity[..., :2]).all())
        warp = warp.to(device, self.pixels.compute)
        move = partial(resample, warp=warp[..., 2] if shifts else warp, field=field)
        options: dict[str, Any] = {"padding_mode": self.padding_mode, "mask": usable}
        if self.interpolation == "nearest":
            return np.where(kept, self._copy(raw, partial(move, **options), device), raw), {}
        frames = self.pixels.decode(raw, device)
        options |= {"interpolation": self.interpolation, "fill_value": self.fill_value}
        aligned = move(frames, **options).values
        if self.fill_value is not None:
            aligned = keep_nodata(aligned, frames, warp, field)
        return np.where(kept, self.pixels.encode(aligned, raw), raw), {}

    def _copy(self, raw: Array, move: Callable[..., Resampled], device: torch.device) -> Array:
        """Pixels copied as they are: torch has few operations for unsigned integers, but bits are bits."""
        native = np.array(raw, dtype=self.pixels.native, order="C")
        kind = np.dtype(f"i{native.itemsize}") if native.dtype.kind == "u" else native.dtype
        fill = self.fill_value
        if fill is not None:
            if np.isnan(fill) and self.pixels.dtype.kind != "f":
                fill = self.pixels.nodata[0]  # checked: there is one
            fill = np.array(fill).astype(native.dtype).view(kind)[()].item()
        bits = torch.from_numpy(native.view(kind)).to(device)
        copied = move(bits, interpolation="nearest", fill_value=fill).values
        return copied.cpu().numpy().view(native.dtype).astype(raw.dtype)


def resampling_of(module: object) -> dict[str, Any]:
    """How a module resamples, as :class:`WarpFrames` takes it; a module of another kind as :func:`torchalign.apply`."""
    usual = {"interpolation": "bilinear", "padding_mode": "border", "fill_value": None}
    return {name: getattr(module, name, value) for name, value in usual.items()}


# --- with what, where, and how many at a time ---

# What `aligner=` knows by name.
ALIGNERS: dict[str, Callable[[], nn.Module]] = {
    "auto": lambda: Cascade(PCC(), ECC()),
    "cross": lambda: PCC(contrast="structure"),
    "pcc": PCC,
    "ecc": ECC,
    "local": lambda: Cascade(PCC(), Local()),
    "lgm": LGM,
}


def find_aligner(aligner: object) -> nn.Module:
    """A module, as it is or by its name."""
    if isinstance(aligner, str):
        if aligner not in ALIGNERS:
            expected = f"a module, or in this release one of {', '.join(map(repr, ALIGNERS))}"
            raise ValueError(message("aligner", expected, repr(aligner), "choose one of these"))
        aligner = ALIGNERS[aligner]()
    if not isinstance(aligner, nn.Module):
        cure = "make an instance, for example torchalign.PCC()"
        raise TypeError(message("aligner", "a torch.nn.Module or a name", repr(aligner), cure))
    return aligner


def find_device(device: torch.device | str | None, module: nn.Module | None) -> torch.device:
    """Of this machine: what was asked for, where the module is if that is not the CPU, else CUDA or the CPU."""
    if device is None:
        state = [] if module is None else [*module.parameters(), *module.buffers()]
        moved = [tensor.device for tensor in state if tensor.device.type != "cpu"]
        device = moved[0] if moved else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        cure = 'use device="cpu", or None to choose'
        raise ValueError(message("device", "a torch device of this machine", repr(device), cure)) from error


def place_module(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself if it is on the device, else a copy of it there."""
    there = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    return module if there else copy.deepcopy(module).to(device)


@contextmanager
def progress_bar(
    progress: bool | None, work: Cube | int, word: str, unit: str = "frame"
) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of units done, of a cube its frames; no bar of nothing or of a lazy cube."""
    check_kind("progress", progress, bool, "True or False", "give a bool")
    if isinstance(work, Cube):
        work = 0 if is_lazy(work.array) else work.sizes["time"]  # dask has bars of its own
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ImportError(message("progress", "tqdm", "no such package", "pip install tqdm")) from None
        progress = False
    if progress is False or not work:
        yield lambda done: None
        return
    # delay: seconds until it shows; disable=None: only on a terminal or in a notebook
    options: dict[str, Any] = {} if progress else {"delay": 2.0, "disable": None}
    with tqdm(total=work, desc=word, unit=unit, **options) as bar:
        yield bar.update
