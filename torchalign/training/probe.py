"""Run an augmentation on one and the same texture in every slot of a sample, and see what it does to them.

A label mask cannot be correlated with its image, nor one date with another to a hundredth of a pixel under clouds.
A texture that stands in the place of each of them can.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2

from torchalign._check import message
from torchalign._host import is_on_host
from torchalign.functional.affine import change_origin
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.warp import resample

# Why a sample may slip: a way of resizing, or against what it was measured.
Cause = Literal["nearest", "resized crop", "align_corners", "claim", "pairs"]
Claim = Tensor | np.ndarray[Any, Any] | Callable[[Any], Any]

# Shorter sides are not images: numbers, boxes, matrices.
_LEAST_SIDE = 16
# An output smaller than the texture's longest wave may be all of one grey by chance.
_LEAST_BLANK = 48
# The longest wave of the texture, in pixels, and how fast shorter ones fall off.
_LONGEST, _SLOPE = 48.0, 1.3
# Where its shortest waves are damped to 1/e, in cycles per pixel; and those that black and white is cut from.
_BAND, _SMOOTH_BAND = 0.3, 0.2
# Side of the boxes, and their places, as shares of the frame, whose motion tells torchvision's geometry.
_BOX, _BOX_PLACES = 2.0, ((0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (0.7, 0.7))
# Boxes that no affine map fits better, in pixels, tell nothing.
_LEAST_FIT = 0.02
# How well an image must correlate with what a resizing makes of the texture, to be made by it.
_LEAST_ALIKE = 0.9995
# What says where things are, beside an image.
_POINTS = (tv_tensors.BoundingBoxes, getattr(tv_tensors, "KeyPoints", tv_tensors.BoundingBoxes))
# Whose modules they may be.
_TORCH = ("torchvision.", "torch.")


class NothingToCompareError(ValueError):
    """A single image without a claim went in, or of several too few came out."""


class Given(NamedTuple):
    """What an augmentation is called with."""

    sample: tuple[Any, ...]
    named: dict[str, Any]

    def to(self, step: Callable[..., Any]) -> Any:
        """What a step makes of it."""
        return step(*self.sample, **self.named)

    def after(self, steps: Sequence[Callable[..., Any]]) -> Given:
        """What the next step is given once these have been called, one after the other."""
        if not steps:
            return self
        out = self.to(chained(steps))
        if isinstance(out, dict) and not self.sample:
            return Given((), out)
        return Given(tuple(out) if len(self.sample) > 1 else (out,), {})


class ProbePair(NamedTuple):
    """Two images that should lie on each other."""

    moving: Tensor  # (n, 1, H, W)
    reference: Tensor  # (n, 1, H, W)
    usable: Tensor | None  # (n, H, W) bool, where they may be compared
    blank: Tensor  # (n,) bool, one of them or both show nothing, though the texture was put in
    cause: Cause | None = None  # why they may not, where that is known


class _Slot(NamedTuple):
    """An image, video or mask of a sample, in words."""

    is_label: bool
    size: tuple[int, int]
    batch: int | None = None  # samples, or None where there is one, without a batch axis
    channels_last: bool = False  # numpy and PIL
    is_video: bool = False  # known as one, which a tensor (T, C, H, W) is not


def probe(
    augment: Callable[..., Any], given: Given, matrix: Claim | None = None, *, samples: int = 8
) -> list[ProbePair]:
    """What an augmentation makes of a texture, in pairs that should be registered.

    Args:
        augment: the augmentation; it runs as a copy, if it can be copied.
        given: shows the structure: which are images, of which size.
        matrix: the claimed geometry, see :meth:`~torchalign.training.check.AlignmentCheck.wrap`.
        samples: at most so many of a batch.

    Returns:
        The second and every further slot against the first, and the first against the claim.

    Raises:
        ValueError: no image goes in, or none comes out.
        NothingToCompareError: there is neither, or fewer come out than went in.
    """
    flat, spec = tree_flatten(tuple(given))
    slots, batch = _find_slots(flat)
    count = min(batch, samples) if batch else 1
    largest = max((slot.size for slot in slots.values()), key=math.prod)
    first = flat[next(iter(slots))]
    device = first.device if isinstance(first, Tensor) else torch.device("cpu")
    # beside a label the image too is black and white: a label can show no greys, and all are to show the same
    labels = any(slot.is_label for slot in slots.values())
    ground = texture(count, largest, device, black_and_white=labels)

    shown = {index: _shown(slot, ground, count) for index, slot in slots.items()}
    probes = []
    for index, item in enumerate(flat):
        if index in slots:
            probes.append(_filled(item, slots[index], shown[index]))
        elif batch and isinstance(item, Tensor) and item.ndim and item.shape[0] == batch:
            probes.append(item[:count])
        else:
            probes.append(item)
    args, kwargs = tree_unflatten(probes, spec)
    augment = copied(augment)
    # what no box goes with need not be where boxes are: image and mask by the nearest pixel are off it both alike
    located = len(slots) == 1 or any(isinstance(item, _POINTS) for item in flat)
    boxes = _boxes(augment, largest) if located and matrix is None and not batch else None
    # a transform of torchvision takes any structure, boxes beside the sample too
    out = augment(*args, boxes) if boxes is not None else augment(*args, **kwargs)
    moved = None
    if boxes is not None:
        out, moved = out[:-1], out[-1]

    images = (_read_image(item, batched=bool(batch)) for item in tree_flatten(out)[0])
    results = [image for image in images if image is not None]
    if not results:
        cure = "return images as they were given"
        raise ValueError(message("augmentation", "an image", type(out).__name__, cure))
    anchor = results[0][:, :1]
    pairs = []
    known = _resized_crop(augment, labels)
    resizings: list[Cause | None] = [None] * len(results)
    if len(shown) == len(results):
        resizings = [
            _resizing(*each) for each in zip(shown.values(), (image[:, :1] for image in results), strict=True)
        ]
    for number, result in enumerate(results):
        for other in torch.split(result, 1, 1)[number == 0 :]:
            # the finer one on the grid of the coarser; both show the same ground, corner to corner
            size = min(other.shape[-2:], anchor.shape[-2:], key=math.prod)
            pair = ProbePair(
                _resized(other, size), _resized(anchor, size), None, _blank(other) | _blank(anchor)
            )
            pairs.append(pair._replace(cause=resizings[number] or resizings[0] or known))
    claimed = _claimed(augment, matrix, boxes, moved, device)
    if not pairs and claimed is None and len(slots) > 1:
        expected = f"as many images and masks as went in, {len(slots)}"
        cure = "return every one of them, or give matrix= to check what is left against"
        raise NothingToCompareError(message("augmentation", expected, len(results), cure))
    if claimed is not None:
        source = _resized(ground[:, None], next(iter(slots.values())).size)
        against = _against_claim(anchor, source, claimed)
        pairs.append(against._replace(cause=known or (None if pairs else "claim")))
    if not pairs:
        expected = "two images or masks, or a claimed matrix"
        cure = "give matrix=, or augment the image together with its mask"
        raise NothingToCompareError(message("sample", expected, "a single image", cure))
    return pairs


def texture(
    count: int, size: tuple[int, int], device: torch.device | str = "cpu", *, black_and_white: bool = False
) -> Tensor:
    """(count, H, W) in [0, 1]: noise with the spectrum of a landscape, the same in every call."""
    return _texture(count, size, black_and_white).to(device)


@functools.lru_cache(maxsize=8)
def _texture(count: int, size: tuple[int, int], black_and_white: bool) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(count, *size, generator=generator)
    frequency = torch.hypot(torch.fft.rfftfreq(size[1]), torch.fft.fftfreq(size[0])[:, None])
    # pixels are averages, the shortest waves are damped; outlines must be smooth, or the nearest pixel frays them
    damping = torch.exp(-((frequency / (_SMOOTH_BAND if black_and_white else _BAND)) ** 2))
    amplitude = frequency.clamp(min=1 / _LONGEST) ** -_SLOPE * damping
    image = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=size)
    image = (image - image.mean((-2, -1), keepdim=True)) / image.std((-2, -1), keepdim=True)
    return (image > 0).to(torch.float32) if black_and_white else (0.5 + image / 5).clamp(0, 1)


@contextlib.contextmanager
def isolated_randomness(*given: Any) -> Iterator[None]:
    """Put the random states of torch (CPU, and the devices of the tensors given), numpy and Python back."""
    tensors = [item for item in tree_flatten(given)[0] if isinstance(item, Tensor) and item.is_cuda]
    devices = sorted({tensor.get_device() for tensor in tensors})
    python, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpys)  # noqa: NPY002


def copied(augment: Callable[..., Any]) -> Callable[..., Any]:
    """A copy, with generators and parameters of its own; or the thing itself if it cannot be copied."""
    try:
        return copy.deepcopy(augment)
    except (TypeError, RuntimeError, AttributeError):
        return augment


def steps_of(pipeline: Any) -> list[tuple[str, Callable[..., Any]]]:
    """(name, step) of everything that is called one after the other."""
    keys = getattr(pipeline, "data_keys", None)
    inner: Any = None
    if type(pipeline).__name__ in ("Compose", "Sequential") and hasattr(pipeline, "transforms"):
        inner = list(pipeline.transforms)
    elif isinstance(pipeline, (list, tuple)):
        inner = list(pipeline)
    elif isinstance(pipeline, nn.Sequential):
        inner = list(pipeline.children())
        if keys is not None:  # kornia's, whose steps take one input; the container brings the others along
            container: Any = type(pipeline)
            names = ("same_on_batch", "keepdim", "extra_args")  # the last tells how masks are resampled
            own = {
                name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None
            }
            return [(_name(step), container(step, data_keys=list(keys), **own)) for step in inner]
    if inner is None:
        return [(_name(pipeline), pipeline)]
    return [step for part in inner for step in steps_of(part)]


def chained(steps: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The steps, one after the other, as one; torchvision's remain torchvision's, which knows boxes."""
    if all(isinstance(step, v2.Transform) for step in steps):
        return cast(Callable[..., Any], v2.Compose(list(steps)))

    def run(*sample: Any, **named: Any) -> Any:
        given = Given(sample, named)
        for step in steps[:-1]:
            given = given.after([step])
        return given.to(steps[-1])

    return run


def _name(step: Any) -> str:
    if isinstance(step, nn.Module):
        return " ".join(repr(step).split())
    return getattr(step, "__qualname__", None) or " ".join(repr(step).split())


# ------------------------------------------------------------------------------------------------------ the sample


def _find_slots(flat: Sequence[Any]) -> tuple[dict[int, _Slot], int]:
    """The images and masks of a sample by their position, and how many samples are in the batch (0: no batch)."""
    slots = {index: slot for index, slot in enumerate(map(_slot_of, flat)) if slot is not None}
    if not slots:
        kinds = [type(item).__name__ for item in flat]
        cure = "give the augmentation's own arguments"
        raise ValueError(message("sample", "at least one image", kinds, cure))
    batch = max((slot.batch or 0 for slot in slots.values()), default=0)
    if batch:
        # (samples, features) is no image
        slots = {
            i: slot
            for i, slot in slots.items()
            if not (_is_flat(flat[i]) and len(flat[i]) == batch != slot.size[1])
        }
    if batch and any(_is_flat(flat[index]) for index in slots):
        # one label (H, W) for an image (T, C, H, W) or (C, T, H, W): a series of one place, not a batch
        slots, batch = {index: slot._replace(batch=None) for index, slot in slots.items()}, 0
    # labels beside a batch of images are a batch too, in whatever type they come
    for index, slot in slots.items():
        item = flat[index]
        if slot.batch is None and isinstance(item, Tensor) and item.ndim == 3 and len(item) == batch:
            slots[index] = slot._replace(is_label=True, batch=batch)
    return slots, batch


def _slot_of(item: Any) -> _Slot | None:
    if isinstance(item, Tensor):
        if item.ndim < 2 or min(item.shape[-2:]) < _LEAST_SIDE or item.dtype.is_complex:
            return None
        size = (item.shape[-2], item.shape[-1])
        if isinstance(item, tv_tensors.Mask):
            return _Slot(True, size)
        known, is_video = isinstance(item, tv_tensors.TVTensor), isinstance(item, tv_tensors.Video)
        if known and not (is_video or isinstance(item, tv_tensors.Image)):
            return None
        is_label = not known and (
            not (item.dtype.is_floating_point or item.dtype == torch.uint8) or item.ndim == 2
        )
        batched = item.ndim >= (3 if is_label else 5 if is_video else 4)
        return _Slot(is_label, size, item.shape[0] if batched else None, is_video=is_video)
    if isinstance(item, np.ndarray):
        if item.ndim not in (2, 3) or min(item.shape[:2]) < _LEAST_SIDE or item.dtype.kind not in "fiub":
            return None
        return _Slot(item.ndim == 2, (item.shape[0], item.shape[1]), channels_last=True)
    if type(item).__module__.startswith("PIL.") and hasattr(item, "getbands"):
        return _Slot(item.mode == "1", (item.height, item.width), channels_last=True)
    return None


def _filled(item: Any, slot: _Slot, image: Tensor) -> Any:
    """The item with the texture (n, 1, H, W) in it."""
    if slot.channels_last:
        filled = np.array(item, order="C")  # of numpy or PIL
        floating = isinstance(item, np.ndarray) and filled.dtype.kind not in "iu"
        single = (1 if slot.is_label or floating else 255) * image[0, 0].cpu().numpy()
        filled[...] = single.astype(filled.dtype)[(...,) + (None,) * (filled.ndim - 2)]
        return filled if isinstance(item, np.ndarray) else sys.modules["PIL.Image"].fromarray(filled)
    if slot.batch is None:
        image = image[0, 0]  # (H, W)
    else:
        item = item[: len(image)]
        image = image[:, 0].reshape(len(image), *(1,) * (item.ndim - 3), *slot.size)
    if not (slot.is_label or item.dtype.is_floating_point):
        image = (255 * image).round()
    values = image.to(item.dtype).expand(item.shape).clone()
    return tv_tensors.wrap(values, like=item) if isinstance(item, tv_tensors.TVTensor) else values


def _is_flat(item: Any) -> bool:
    """A tensor (H, W)."""
    return isinstance(item, Tensor) and item.ndim == 2


def _shown(slot: _Slot, ground: Tensor, count: int) -> Tensor:
    """The texture as a slot has it, (n, 1, H, W)."""
    image = _resized(ground[: (slot.batch and count) or 1, None], slot.size)
    return (image > 0.5).to(image.dtype) if slot.is_label else image


def _resized_crop(augment: Any, labels: bool) -> Cause | None:
    """What a random crop that resizes, if that is all there is, is known for: its parts are not seen in its output."""
    if isinstance(augment, nn.Module) and len(steps_of(augment)) == 1:
        for part in augment.modules():
            if type(part).__name__ == "RandomResizedCrop":
                if type(part).__module__.startswith("torchvision."):
                    return "resized crop" if labels else None
                flags: Any = getattr(part, "flags", {})  # kornia's
                return "align_corners" if flags.get("align_corners") else None
    return None


def _resizing(before: Tensor, after: Tensor) -> Cause | None:
    """The convention of PyTorch by which an image (n, 1, H, W) was resized, if it is one that slips."""
    if before.shape[0] != after.shape[0] or before.shape[-2:] == after.shape[-2:] or not is_on_host(after):
        return None
    size, best, found = after.shape[-2:], _LEAST_ALIKE, ""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("", {"mode": "nearest-exact"}),
        ("nearest", {"mode": "nearest"}),
    ]
    for antialias in (False, True):
        options: dict[str, Any] = {"mode": "bilinear", "antialias": antialias}
        ways += [("", options), ("align_corners", {**options, "align_corners": True})]
    for name, options in ways:
        expected = F.interpolate(before, size=size, **options)
        alike = float(normalized_cross_correlation(expected, after).mean())
        if alike > best:
            best, found = alike, name
    return cast(Cause, found) if found else None


def _read_image(item: Any, *, batched: bool) -> Tensor | None:
    """What came out, as (n, frames, H, W)."""
    slot = _slot_of(item)
    if slot is None:
        return None
    if slot.channels_last:
        values = torch.from_numpy(np.array(item, dtype=np.float32))
        return (values if values.ndim == 2 else values.mean(-1))[None, None]
    values = item.as_subclass(Tensor).to(torch.promote_types(item.dtype, torch.float32)).detach()
    if not batched:
        values = values[None]
    if values.ndim == 3:
        return values[:, None]  # (n, H, W)
    if values.ndim == 5 and not batched and not slot.is_video:
        return values.flatten(1, 2)  # (1, T, C, H, W) or (1, C, T, H, W): every plane by itself
    if slot.is_label and values.shape[1] > 1:  # one band a class
        classes = torch.arange(values.shape[1], device=values.device, dtype=values.dtype)
        return (values * classes[:, None, None]).sum(1, keepdim=True)
    if values.ndim == 4 and not slot.is_video:
        return values.mean(1, keepdim=True)
    return values.mean(-3)  # (n, T, H, W)


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """(n, 1, H, W) of another size; itself where it is of that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode="bilinear", antialias=True)


# ------------------------------------------------------------------------------------------------------- the claim


def _claimed(
    augment: Any, matrix: Claim | None, boxes: Any, moved: Any, device: torch.device
) -> Tensor | None:
    """(1 or n, 2 or 3, 3), points of the input → points of the output; ``None`` if nothing is claimed."""
    claimed: Any = None
    if matrix is not None:
        claimed = matrix(augment) if callable(matrix) else matrix
    elif boxes is not None:
        claimed = _affine_of_boxes(boxes, moved)
    else:
        try:
            claimed = getattr(augment, "transform_matrix", None)
        except RuntimeError as error:  # kornia's mixes say so, instead of having none
            if "not supported" not in str(error):
                raise
    if claimed is None:
        return None
    if not isinstance(claimed, (Tensor, np.ndarray)) or tuple(claimed.shape[-2:]) not in ((2, 3), (3, 3)):
        shape = tuple(getattr(claimed, "shape", ()))
        expected, cure = "a tensor or array (2, 3) or (3, 3)", "what is no claim would go unchecked"
        raise TypeError(message("matrix", expected, f"{type(claimed).__name__} {shape}", cure))
    claimed = torch.as_tensor(claimed).detach().to(device, torch.float32)
    return claimed if claimed.ndim == 3 else claimed[None]


def _boxes(augment: Any, size: tuple[int, int]) -> Any:
    """Small boxes beside the sample, if the augmentation is torchvision's through and through."""
    if not isinstance(augment, v2.Transform):
        return None
    # a step of one's own may know nothing of boxes, and a filter of boxes may drop them, or take one set only
    parts = [augment, *augment.modules(), *(step for _, step in steps_of(augment))]
    names = ("Lambda", "SanitizeBoundingBoxes", "RandomIoUCrop")
    if not all(
        type(part).__module__.startswith(_TORCH) and type(part).__name__ not in names for part in parts
    ):
        return None
    centres = torch.tensor([[x * size[1], y * size[0]] for x, y in _BOX_PLACES])
    values = torch.cat((centres - _BOX / 2, centres + _BOX / 2), -1)
    options: dict[str, Any] = {"format": "XYXY", "canvas_size": size}
    with contextlib.suppress(TypeError):  # the mode of clamping is newer than the boxes
        return tv_tensors.BoundingBoxes(values, clamping_mode=None, **options)
    return tv_tensors.BoundingBoxes(values, **options)


def _affine_of_boxes(before: Any, after: Any) -> Tensor | None:
    """The affine map between the centres of boxes, in pixels whose centres are integers."""
    if after is None or after.shape != before.shape:
        return None
    old, new = (
        0.5 * (boxes.as_subclass(Tensor)[:, :2] + boxes.as_subclass(Tensor)[:, 2:]).double()
        for boxes in (before, after)
    )
    homogeneous = torch.cat((old, torch.ones_like(old[:, :1])), -1)
    solution = torch.linalg.lstsq(homogeneous, new).solution  # (3, 2)
    if float((homogeneous @ solution - new).abs().max()) > _LEAST_FIT:
        return None
    # boxes count from the frame's corner
    return change_origin(solution.T, (0.5, 0.5))[None]


def _against_claim(out: Tensor, source: Tensor, claimed: Tensor) -> ProbePair:
    """The output, and what the claimed geometry makes of the input: where that lies inside the input's frame."""
    count, size, full = out.shape[0], out.shape[-2:], source.shape[-2:]
    claimed = claimed.expand(count, *claimed.shape[1:])
    linear = claimed[:, :2, :2]
    zoom = (linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]).abs().sqrt()
    source = _blur_each(source, 0.5 * (zoom.clamp(min=1e-3) ** -2 - 1).clamp(min=0).sqrt())
    padding = [max(0, size[1] - full[1]), max(0, size[0] - full[0])]
    source = F.pad(source, (0, padding[0], 0, padding[1]))
    inside = torch.zeros(source.shape[-2:], dtype=torch.bool, device=source.device)
    inside[: full[0], : full[1]] = True
    expected, valid = resample(source, claimed.to(source.dtype), interpolation="bicubic", mask=inside)
    window = (..., slice(size[0]), slice(size[1]))
    return ProbePair(out, expected[window], valid[window], _blank(out))


def _blank(image: Tensor) -> Tensor:
    """(n,) bool: one grey all over, or no number. Of small outputs nothing is said."""
    if min(image.shape[-2:]) < _LEAST_BLANK:
        return torch.zeros(image.shape[0], dtype=torch.bool, device=image.device)
    known = image.isfinite()
    highest = torch.where(known, image, -torch.inf).flatten(1).amax(-1)
    lowest = torch.where(known, image, torch.inf).flatten(1).amin(-1)
    return ~(highest > lowest)


def _blur_each(image: Tensor, sigma: Tensor) -> Tensor:
    """(n, 1, H, W), each by its own σ (n,), in pixels: what an antialiased reduction does to it."""
    height, width = image.shape[-2:]
    fx = torch.fft.rfftfreq(2 * width, device=image.device)
    fy = torch.fft.fftfreq(2 * height, device=image.device)[:, None]
    gain = torch.exp(-2 * (math.pi * sigma[:, None, None, None] * torch.hypot(fx, fy)) ** 2)
    mirrored = torch.cat((image, image.flip(-1)), -1)
    mirrored = torch.cat((mirrored, mirrored.flip(-2)), -2)
    blurred = torch.fft.irfft2(torch.fft.rfft2(mirrored) * gain, s=mirrored.shape[-2:])
    return blurred[..., :height, :width]
