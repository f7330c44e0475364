"""The one base class: check → channel → estimate → gate → warp."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from torchalign._check import (
    check_bands,
    check_crop,
    check_cube,
    check_fill,
    check_mask,
    check_number,
    check_option,
    check_reference,
    check_warp,
    show_shared,
)
from torchalign._host import (
    all_finite,
    all_true,
    empty_on_host,
    full_precision,
    is_transformed,
    map_on_host,
    may_look,
    may_read,
)
from torchalign.functional.affine import change_origin, finite_warp, scaled, split_at_center, unit_corner
from torchalign.functional.channels import Channel, center_crop, check_channel, extract_channel, see_channel
from torchalign.functional.defects import LEAST_ENLARGED, enlargement, remove_defects
from torchalign.functional.motion import MotionModel
from torchalign.functional.quality import gate_stages, rejected
from torchalign.functional.shift_field import move_origin
from torchalign.functional.smoothing import triangle_mean
from torchalign.functional.structure import orientation_field
from torchalign.functional.texture import Contrast
from torchalign.functional.warp import Interpolation, PaddingMode, resample
from torchalign.types import (
    Alignment,
    Estimate,
    Fields,
    Motion,
    Pair,
    ShiftField,
    Status,
    combine,
    each_field,
)

__all__ = [
    "Aligner",
    "Block",
    "Job",
    "Judged",
    "Motion",
    "Pair",
    "SharedOptions",
    "full_precision",
    "rows_for_frames",
    "some_frames",
    "undo_init",
    "with_lead",
]

# Eager CPU: pixels of one block of frames. Fewer cost calls, more leave the cache.
_BLOCK_PIXELS = 2**20


class SharedOptions(TypedDict, total=False):
    """The options that :class:`Aligner` takes, by which a type checker knows the ``**shared`` of a method."""

    channel: Channel
    rgb_bands: Sequence[int]
    crop_center: int | Sequence[int] | None
    max_translation: float
    min_score: float | None
    interpolation: Interpolation
    padding_mode: PaddingMode
    fill_value: float | None


class Aligner(nn.Module, ABC):
    """Options that every method shares, and the way from a cube to an alignment.

    A method implements :meth:`estimate_motion`, and says in ``motion`` what it can move. Its constructor takes its
    own options and ``**shared``, which it hands on; its signature and its docstring then show those options too.

    Args:
        channel: the image of the bands that is registered: a band index, ``"mean"``, ``"luminance"``,
            ``"rgb_mean"``, ``"gradients"``, or a callable or Module (..., C, H, W) → (..., H, W), which is given
            what lies under a mask too. All bands are warped.
        rgb_bands: the indices of R, G, B.
        crop_center: estimate from the central int or (h, w) pixels only; the whole frame is warped.
        max_translation: limit of the displacement of the frame's centre, in pixels.
        min_score: frames that score lower are left alone (``LOW_SCORE``).
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        padding_mode: what enters from outside the frame: ``"border"``, ``"zeros"`` or ``"reflection"``.
        fill_value: or this value instead.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range or unknown.
    """

    motion: MotionModel = "translation"
    # Whether fills, hot pixels and enlarged frames are looked for; a probe that was made has none.
    expects_defects: bool = True

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "__init__" in vars(cls):
            show_shared(cls, Aligner, SharedOptions.__annotations__)

    def __init__(
        self,
        *,
        channel: Channel = "mean",
        rgb_bands: Sequence[int] = (3, 2, 1),
        crop_center: int | Sequence[int] | None = None,
        max_translation: float = 5.0,
        min_score: float | None = None,
        interpolation: Interpolation = "bilinear",
        padding_mode: PaddingMode = "border",
        fill_value: float | None = None,
    ) -> None:
        super().__init__()
        check_channel(channel)
        check_fill("fill_value", fill_value)
        self.channel = channel
        self.rgb_bands = check_bands(rgb_bands)
        self.crop_center = check_crop(crop_center)
        self.max_translation = check_number(
            "max_translation", max_translation, minimum=0, inclusive=False, maximum=1e6
        )
        self.min_score = check_number("min_score", min_score, minimum=-1, maximum=1, optional=True)
        self.interpolation = check_option("interpolation", interpolation, Interpolation)
        self.padding_mode = check_option("padding_mode", padding_mode, PaddingMode)
        self.fill_value = fill_value

    def forward(
        self,
        cube: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
        *,
        init: Tensor | None = None,
    ) -> Alignment:
        """Align every frame of ``cube`` with ``reference``; arguments and errors as in :meth:`estimate`.

        Returns:
            ``Alignment(aligned, estimate)``: all bands resampled once, in the cube's dtype; frames that were not
            accepted come back bit for bit.
        """
        check_cube(cube)
        # one region around all of it: torch.export can save no size that is handed from one to the next
        with full_precision(cube):
            return self._align(self._check(cube, reference, mask, reference_mask, init))

    def _align(self, job: Any) -> Alignment:
        blocks = self._blocks(job)
        if len(blocks) == 1:
            return self._align_block(job)
        aligned = empty_on_host(job.cube.shape, job.cube.dtype)

        def align(part: slice) -> Estimate:
            # a block that was just estimated is still in the cache
            return self._align_block(job.part(part), aligned[part]).estimate

        return Alignment(aligned, combine(torch.cat, self._map(align, blocks)))

    def _align_block(self, job: Any, out: Tensor | None = None) -> Alignment:
        estimate, only_shifts, finite = self._estimate(job)
        warp = estimate.warp[..., :2, 2] if only_shifts else estimate.warp
        resampling = {"mask": job.mask, "out": out, "field": estimate.field, "finite": finite}
        aligned = resample(job.cube, warp, **resampling, **self._resampling()).values
        if self.fill_value is not None:
            # the fill is for what a warp leaves empty; a frame without a warp stays as it came
            kept = torch.where(estimate.valid[..., None, None, None], aligned, job.cube)
            aligned = kept if out is None else out.copy_(kept)
        return Alignment(aligned, estimate)

    def estimate(
        self,
        cube: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
        init: Tensor | None = None,
    ) -> Estimate:
        """Estimate without resampling.

        Args:
            cube: (..., T, C, H, W), floating.
            reference: (..., C, H, W), or (..., T, C, H, W) for one per frame; the cube's dtype and device.
            mask: bool, broadcastable to (..., T, H, W), True = usable. NaN and ±inf are unusable without it.
            reference_mask: bool, broadcastable to (..., T, H, W).
            init: (..., T, 2, 3) or (..., T, 3, 3), an earlier warp to start from.

        Returns:
            :class:`~torchalign.types.Estimate`.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: a shape or a device does not fit.
        """
        check_cube(cube)
        with full_precision(cube):
            job = self._check(cube, reference, mask, reference_mask, init)
            blocks = self._blocks(job)
            if len(blocks) == 1:
                return self._estimate(job).estimate
            return combine(torch.cat, self._map(lambda part: self._estimate(job.part(part)).estimate, blocks))

    def prepare_reference(self, image: Tensor, usable: Tensor | None) -> Any:
        """What the method needs of the reference, made once for all frames that share it.

        Args:
            image: (..., 1 or T, H, W), finite: unusable pixels hold 0.
            usable: (..., 1 or T, H, W) bool, or ``None`` if all of it is.

        Returns:
            Anything; by default nothing.
        """
        return None

    @property
    def score_contrast(self) -> Contrast:
        """What frames are compared by: ``"local"``, or across sensors ``"structure"``."""
        return "structure" if getattr(self, "contrast", None) == "structure" else "local"

    def score_image(self, image: Tensor, usable: Tensor | None) -> Tensor:
        """What of the channel the gate correlates, by :attr:`score_contrast`.

        Args:
            image: (..., T, H, W), finite: unusable pixels hold 0.
            usable: (..., T, H, W) bool, or ``None`` if all of it is.

        Returns:
            (..., T, H, W), the image; or for ``"structure"`` (2, ..., T, H, W), the orientation of its gradients.
        """
        if self.score_contrast != "structure":
            return image
        return triangle_mean(orientation_field(image, usable), 1)

    def field_nodes(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Nodes (n, m) of the field of local shifts over frames of (H, W); ``None`` where there is no field."""
        return None

    @abstractmethod
    def estimate_motion(self, pair: Pair, prepared: Any, init: Tensor | None) -> Motion:
        """The method: the warp of every frame, before the gate.

        Args:
            pair: the frames and their reference.
            prepared: what :meth:`prepare_reference` made of the two.
            init: (..., T, 2 or 3, 3) in the coordinates of the pair; or (..., T, 2), a shift (x, y) in pixels; or
                ``None``.
        """

    def _check(
        self, cube: Any, reference: Any, mask: Any = None, reference_mask: Any = None, init: Any = None
    ) -> Any:
        reference = check_reference(reference, cube)
        batch, size = cube.shape[:-3], cube.shape[-2:]
        mask = check_mask("mask", mask, (*batch, *size), cube)
        reference_mask = check_mask("reference_mask", reference_mask, (*batch, *size), cube)
        if init is not None:
            check_warp("init", init, batch, cube)
        if mask is not None:
            mask = mask.expand(*batch, *size)
        image, usable = self._extract_channel(reference, reference_mask)
        # what all blocks share is prepared once, the rest with its block
        shared = image.shape[0] == 1 and (usable is None or usable.shape[0] == 1)
        prepared = self.prepare_reference(image, usable) if shared else None
        return Job(cube, mask, image, usable, prepared, init)

    def _blocks(self, job: Any) -> list[slice]:
        """The blocks along the first axis that are estimated together: everything in one, except on the eager CPU."""
        # first of all the host: under a trace, the number of frames must not be asked for
        if not may_read(*job.tensors(), *self.parameters()):
            return [slice(None)]
        rows, pixels = job.cube.shape[0], math.prod(job.cube.shape[1:-3]) * math.prod(job.cube.shape[-2:])
        limit = self._block_pixels()
        if pixels <= limit // 16:  # calls cost more than the cache does
            limit *= 2
        block = max(1, limit // max(1, pixels))
        if rows <= block:
            return [slice(None)]
        return [slice(first, min(first + block, rows)) for first in range(0, rows, block)]

    def _block_pixels(self) -> int:
        return _BLOCK_PIXELS

    def _map(self, function: Callable[[slice], Estimate], blocks: list[slice]) -> list[Estimate]:
        """Run blocks in parallel, unless the channel is a user's callable, which may not be thread-safe."""
        return list(map(function, blocks)) if callable(self.channel) else map_on_host(function, blocks)

    def _estimate(self, job: Any) -> Judged:
        """The estimate of a block."""
        block = self._prepare_block(job)
        motion = self._find_motion(job, block)
        estimate = self._judge([motion], [self.max_translation], job, block)
        factor = self._common_enlargement(job, block)
        # the mean of all bands, where it was looked at, tells of each
        finite = self.channel == "mean" and self.crop_center is None and block.usable is None
        return Judged(self._with_true_samples(estimate, factor, job, block), motion.only_shifts, finite)

    def _common_enlargement(self, job: Job, block: Block) -> Tensor:
        """(..., T), the factor by which a frame and its reference were enlarged; 1 where not both were, alike."""
        if not self.expects_defects:
            return torch.ones_like(block.moving[..., 0, 0], dtype=torch.int64)
        own = enlargement(block.moving, block.usable)
        if all_true(own == 1):
            return own
        return torch.where(own == enlargement(job.reference, job.usable), own, 1)

    def _with_true_samples(self, estimate: Estimate, factor: Tensor, job: Job, block: Block) -> Estimate:
        """Frames that were enlarged as their reference was, estimated from every k-th pixel.

        Their pixel grid is a pattern that fits itself at no motion. Every k-th pixel of an interpolated image is a
        filtered sample of what it was made from: its grid is the true one. Where the factor may not be read (on a
        device), of several series at once, with local shifts, or if several channels are asked, such a frame is
        ``AMBIGUOUS``.
        """
        if all_true(factor == 1):
            return estimate
        # a field found on a coarser lattice is no field of the frame
        if not may_read(factor) or factor.ndim != 1 or estimate.field is not None:
            return flagged(estimate, factor > 1)
        parts, order = [], []
        for k in sorted(set(factor.tolist())):
            rows = (factor == k).nonzero().squeeze(-1)
            order.append(rows)
            # of true samples, half as many are needed
            if k == 1 or min(block.moving.shape[-2:]) < LEAST_ENLARGED * k // 2:
                part = estimate.map(functools.partial(torch.index_select, dim=0, index=rows))
                parts.append(part if k == 1 else flagged(part, torch.ones_like(part.valid)))
            else:
                parts.append(self._estimate_every(int(k), rows, job, block))
        back = torch.cat(order).argsort()
        return combine(torch.cat, parts).map(lambda field: field[back])

    def _estimate_every(self, k: int, rows: Tensor, job: Job, block: Block) -> Estimate:
        """The estimate of some frames from every k-th pixel of the channel, in pixels of the whole frame."""
        coarse = self._at_scale(1 / k)
        pair = each_field(some_frames(block.pair(job), rows), lambda image: image[..., ::k, ::k].contiguous())
        init = block.init
        if init is not None and block.finite is not None:
            init = torch.where(block.finite[..., None, None], init, torch.nan)
        init = None if init is None else scaled(init[rows], 1 / k)
        part = Job(pair.moving.unsqueeze(-3), pair.usable, pair.reference, pair.reference_usable, None, init)
        found = coarse._estimate(coarse._job_of(part)).estimate
        warp, covariance = scaled(found.warp, k), k * k * found.covariance
        return block.of_whole_frame(found._replace(warp=warp, sigma=k * found.sigma, covariance=covariance))

    def _job_of(self, job: Job) -> Any:
        """The job of one channel, in the form that :meth:`_estimate` takes."""
        return job

    def _at_scale(self, scale: float) -> Aligner:
        """The same method for one band, whose pixels are as many times as short."""
        other = copy.copy(self)
        # a shallow copy shares the dictionary of its modules, of which the channel may be one
        other.__dict__["_modules"] = {
            name: module for name, module in self._modules.items() if name != "channel"
        }
        other.channel, other.crop_center = 0, None
        other.max_translation = self.max_translation * scale
        limit = getattr(self, "max_sigma", None)
        if isinstance(limit, float):
            vars(other)["max_sigma"] = limit * scale
        return other

    def _prepare_block(self, job: Job) -> Block:
        """What a method is given of a block: the channel, cropped, and an init in its coordinates."""
        moving, usable = self._extract_channel(job.cube, job.mask)
        _, origin = center_crop(job.cube, self.crop_center)
        init, finite = (None, None) if job.init is None else finite_warp(job.init.to(moving.dtype))
        if init is not None and origin != (0, 0):
            init = change_origin(init, origin)
        prepared = job.prepared
        if prepared is None:
            prepared = self.prepare_reference(job.reference, job.usable)
        return Block(moving, usable, prepared, init, finite, origin)

    def _find_motion(self, job: Job, block: Block) -> Motion:
        """The method's motion; a frame whose init was not finite has not converged."""
        motion = self.estimate_motion(block.pair(job), block.prepared, block.init)
        if block.finite is None:
            return motion
        return motion._replace(status=torch.where(block.finite, motion.status, int(Status.NOT_CONVERGED)))

    def _judge(
        self, motions: Sequence[Motion], max_translations: Sequence[float], job: Job, block: Block
    ) -> Estimate:
        """The gate's verdict, in the coordinates of the whole frame."""
        moving = self.score_image(block.moving, block.usable)
        estimate = gate_stages(
            motions,
            moving,
            self.score_image(job.reference, job.usable),
            vector=moving.ndim > block.moving.ndim,
            moving_usable=block.usable,
            reference_usable=job.usable,
            max_translations=max_translations,
            min_score=self.min_score,
        )
        if estimate.field is None and is_transformed(estimate.warp):
            estimate = estimate._replace(field=ShiftField.empty_like(estimate.warp))
        return block.of_whole_frame(estimate)

    def _resampling(self) -> dict[str, Any]:
        return {
            "interpolation": self.interpolation,
            "padding_mode": self.padding_mode,
            "fill_value": self.fill_value,
        }

    def _extract_channel(self, cube: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The channel in float32 or float64, cropped, 0 where unusable; and where it is usable."""
        window, _ = center_crop(cube, self.crop_center)
        if mask is not None:
            mask = center_crop(mask.expand(*mask.shape[:-2], *cube.shape[-2:]), self.crop_center)[0]
        found = see_channel(window, mask, self.channel, rgb_bands=self.rgb_bands)
        image, usable = self._finite_channel(window, mask) if found is None else found
        # on a device, and in a program, it would cost more than all else, unless ta.align has seen some
        asked = self.expects_defects and may_look(image.detach())
        return remove_defects(image, usable) if asked else (image, usable)

    def _finite_channel(self, window: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if window.dtype.itemsize < 4 and not callable(self.channel):
            window = window.float()
        # a masked value must not reach its neighbours either
        if mask is not None and self.channel == "gradients":
            window = torch.where(mask.unsqueeze(-3), window, torch.nan)
        image = extract_channel(window, self.channel, rgb_bands=self.rgb_bands)
        if image.dtype.itemsize < 4:
            image = image.float()
        usable = None
        if mask is not None or not all_finite(image):
            given, image = image, image.nan_to_num(0.0, 0.0, 0.0)
            usable = image == given
            if mask is not None:
                usable, image = usable & mask, torch.where(mask, image, 0.0)
        return image, usable

    def extra_repr(self) -> str:
        """The options, as they are written in the constructor."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        named = {
            name: getattr(self, name)
            for name in inspect.signature(type(self)).parameters
            if hasattr(self, name)
        }
        return {name: value for name, value in named.items() if not isinstance(value, nn.Module)}


class Judged(NamedTuple):
    """What is known of a block."""

    estimate: Estimate
    only_shifts: bool  # its warps are translations for any data
    finite: bool = False  # all bands are known to be, for these data


class Job(NamedTuple):
    """A checked call: what is estimated from, or a block of it along the first axis."""

    cube: Tensor  # (..., T, C, H, W)
    mask: Tensor | None  # (..., T, H, W)
    reference: Tensor  # (..., 1 or T, h, w), the channel, cropped
    usable: Tensor | None  # (..., 1 or T, h, w), of the reference
    prepared: Any  # what the method made of a reference that all blocks share, or ``None``
    init: Tensor | None

    def tensors(self) -> list[Tensor]:
        """The tensors that are not ``None``."""
        return [tensor for tensor in self if isinstance(tensor, Tensor)]

    def part(self, rows: slice) -> Job:
        """The job of some of the frames."""
        return some_frames(self._replace(prepared=None), rows)._replace(prepared=self.prepared)


class Block(NamedTuple):
    """What of a block a method is given."""

    moving: Tensor  # (..., T, h, w), the channel, cropped
    usable: Tensor | None
    prepared: Any
    init: Tensor | None  # in the coordinates of the crop
    finite: Tensor | None  # (..., T) bool, where an init was; ``None`` without one
    origin: tuple[int, int]  # (x, y) of the crop

    def pair(self, job: Job) -> Pair:
        """The frames of the block, and the reference of its job."""
        return Pair(self.moving, self.usable, job.reference, job.usable)

    def is_over(self, other: Block) -> bool:
        """Whether both are the same crop."""
        return self.origin == other.origin and self.moving.shape[-2:] == other.moving.shape[-2:]

    def of_whole_frame(self, estimate: Estimate) -> Estimate:
        """An estimate over the crop in the coordinates of the whole frame."""
        if self.origin == (0, 0):
            return estimate
        corner = (-self.origin[0], -self.origin[1])
        back = unit_corner(change_origin(estimate.warp, corner))
        # the conjugate of an identity is one but for rounding; a rejected frame's must be exact
        warp = torch.where(estimate.valid[..., None, None], back, estimate.warp)
        field = None if estimate.field is None else move_origin(estimate.field, corner)
        return estimate._replace(warp=warp, field=field)


def flagged(estimate: Estimate, ambiguous: Tensor) -> Estimate:
    """Reset accepted frames that turn out to be ambiguous to the identity."""
    status = torch.where(ambiguous & estimate.valid, int(Status.AMBIGUOUS), estimate.status)
    return rejected(estimate._replace(status=status))


def undo_init(
    init: Tensor | None, moving: Tensor, usable: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The frames with what an init does about their centre undone, for methods that find what is left.

    Args:
        init: as :meth:`Aligner.estimate_motion` is given it.
        moving: (..., T, H, W).
        usable: (..., T, H, W) bool, or ``None``.

    Returns:
        ``(moving, usable, start, about_centre)``: the frames, resampled unless the init is a translation; where
        they are usable; the init's translation (..., T, 2), or ``None``; the warp that was undone
        (..., T, 2 or 3, 3), or ``None``.
    """
    if init is None or init.shape[-1] == 2:
        return moving, usable, init, None
    start, about_centre = split_at_center(init, (moving.shape[-2], moving.shape[-1]))
    undone = resample(moving.unsqueeze(-3), about_centre, interpolation="bicubic", mask=usable)
    return undone.values.squeeze(-3).nan_to_num(), undone.validity, start, about_centre


def rows_for_frames(parts: Fields, have: Sequence[int], lead: Sequence[int]) -> Fields:
    """Of references (..., 1 or T), flattened, what each of the frames (..., T), flattened, is compared with.

    Args:
        parts: a tuple of tensors, whose first axis is that of the references.
        have: the shape that was flattened.
        lead: that of the frames.
    """

    def expand(part: Tensor) -> Tensor:
        rest = part.shape[1:]
        return part.reshape(*have, *rest).expand(*lead, *rest).reshape(-1, *rest)

    return each_field(parts, expand)


def some_frames(parts: Fields, rows: slice | Tensor) -> Fields:
    """Some rows of a tuple of tensors; what has one is for all frames and stays."""
    return each_field(parts, lambda part: part if part.shape[0] == 1 else part[rows])


def with_lead(parts: Fields, lead: Sequence[int]) -> Fields:
    """A tuple of tensors (N, ...), of N flattened frames, as (*lead, ...)."""
    return each_field(parts, lambda part: part.reshape(*lead, *part.shape[1:]))
