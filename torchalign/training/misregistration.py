"""Synthetic misregistration: random sub-pixel warps, known exactly, in the shape of a torchvision transform.

:func:`random_warp` draws, :func:`misregister` moves; :class:`RandomMisregistration` (torchvision) is a shell around
them, :class:`~torchalign.training.kornia.RandomMisregistration2D` (kornia) one around that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2

from torchalign._check import check_kind, check_number, check_option, message
from torchalign._host import is_on_host
from torchalign.functional.affine import (
    change_origin,
    identity_warp,
    invert_warp,
    rescale_warp,
    to_homogeneous,
    transform_points,
)
from torchalign.functional.motion import MotionModel
from torchalign.functional.warp import PaddingMode, resample

Per = Literal["frame", "sample"]
Kernel = Literal["sinc", "bicubic", "bilinear", "nearest"]

# Taps of the sinc on either side.
_REACH = 8

# torchvision has had key points since 0.23
_KeyPoints: type[Any] | None = getattr(tv_tensors, "KeyPoints", None)


def random_warp(
    batch_shape: Sequence[int],
    size: tuple[int, int],
    *,
    max_translation: float = 1.0,
    max_deformation: float = 1.0,
    motion: MotionModel = "translation",
    p: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Random warps, moving → reference.

    The frame's centre moves by a vector uniform in the disc of radius ``max_translation``. About the centre, with
    r half the frame's diagonal, every motion model is scaled so that no pixel moves by more than
    ``max_deformation`` against the centre, whatever the model and the size of the frame:

    ================  =============================================================================
    ``"euclidean"``   rotation by an angle uniform in ± d / r
    ``"similarity"``  rotation and zoom, each uniform in ± d / (r √2)
    ``"affine"``      A = I + E, the four entries of E uniform in ± d / (2 r)
    ``"homography"``  half of that, and a perspective q uniform in the disc of radius d / (2 r²)
    ================  =============================================================================

    (A first-order bound: exact to d / r, a few per mille.)

    Args:
        batch_shape: leading sizes of the result.
        size: (H, W) of the frames.
        max_translation: in pixels.
        max_deformation: d, in pixels; of no effect for ``motion="translation"``.
        motion: ``"translation"``, ``"euclidean"``, ``"similarity"``, ``"affine"`` or ``"homography"``.
        p: probability that a row is not the exact identity.
        generator: draws on its device; ``None``: torch's default generator of ``device``.
        device: of the result.
        dtype: of the result, float32 or float64.

    Returns:
        (*batch_shape, 2, 3), or (*batch_shape, 3, 3) for a homography.

    Example:
        >>> warp = random_warp((1000,), (64, 64), max_translation=2.0, generator=torch.Generator().manual_seed(0))
        >>> warp.shape, bool((warp[:, :, 2].norm(dim=-1) <= 2).all())
        (torch.Size([1000, 2, 3]), True)
    """
    height, width = size
    shape = tuple(batch_shape)
    source = device if generator is None else generator.device
    draws = torch.rand(*shape, 9, generator=generator, device=source, dtype=torch.float64).to(device)
    half = 0.5 * math.hypot(height, width)
    share = max_deformation / half  # of a pixel's distance from the centre that it may move by
    linear = torch.eye(2, dtype=torch.float64, device=draws.device).expand(*shape, 2, 2)
    uniform = 2 * draws - 1  # [−1, 1)
    if motion == "euclidean":
        linear = _turned_by(share * uniform[..., 0])
    elif motion == "similarity":
        scale = 1 + share / math.sqrt(2) * uniform[..., 1]
        linear = scale[..., None, None] * _turned_by(share / math.sqrt(2) * uniform[..., 0])
    elif motion in ("affine", "homography"):
        part = 0.5 if motion == "affine" else 0.25
        linear = linear + part * share * uniform[..., :4].reshape(*shape, 2, 2)
    warp = torch.cat((linear, max_translation * _in_disc(draws[..., 4:6])[..., None]), -1)  # (..., 2, 3)
    if motion == "homography":
        perspective = 0.5 * share / half * _in_disc(draws[..., 6:8])
        warp = to_homogeneous(warp)
        warp = torch.cat((warp[..., :2, :], torch.cat((perspective, warp[..., 2, 2:]), -1)[..., None, :]), -2)
    # drawn about the centre, said from the top-left pixel
    warp = change_origin(warp, (-(width - 1) / 2, -(height - 1) / 2))
    identity = identity_warp(homography=motion == "homography", dtype=warp.dtype, device=warp.device)
    return torch.where((draws[..., 8] < p)[..., None, None], warp, identity).to(dtype)


def misregister(
    frames: Tensor, warp: Tensor, *, kernel: Kernel = "sinc", padding_mode: PaddingMode = "reflection"
) -> Tensor:
    """Move frames so that ``warp`` (moving → reference) brings them back: ``moved(p) = frame(warp p)``.

    A bicubic kernel misplaces waves of 4 … 6 pixels by 0.045 … 0.02 px (as does a bilinear one): more than is to
    be found. ``"sinc"`` therefore upsamples twice by a windowed sinc of 16 taps, which is symmetric and has no
    phase error, and is bicubic on the finer grid: 0.005 … 0.002 px at twice the cost. Near pixels that are no
    numbers it gives way to the bicubic kernel, which keeps them apart.

    Args:
        frames: (..., C, H, W); integers are rounded and clamped.
        warp: (..., 2, 3) or (..., 3, 3), one per frame, or (..., C, 2|3, 3), one per band.
        kernel: ``"sinc"``, ``"bicubic"``, ``"bilinear"``, or ``"nearest"`` for labels.
        padding_mode: what enters from outside.

    Returns:
        (..., C, H, W), in the dtype of ``frames``. An identity is a copy.
    """
    by_band = warp.ndim == frames.ndim
    cube = frames.unsqueeze(-3) if by_band else frames.unsqueeze(-4)  # (..., C, 1, H, W) or (..., 1, C, H, W)
    way_there = invert_warp(warp if by_band else warp.unsqueeze(-3))
    if kernel != "sinc":
        return resample(cube, way_there, interpolation=kernel, padding_mode=padding_mode).values.reshape(
            frames.shape
        )
    values = cube.to(torch.promote_types(cube.dtype, torch.float32))
    nonfinite = ~values.isfinite()
    fine = _upsample(_upsample(torch.where(nonfinite, 0.0, values), -1, padding_mode), -2, padding_mode)
    # fine pixel 2 i is pixel i: about the centre of the first pixel, scaling is linear
    rows = 1 + (torch.arange(3, device=way_there.device) < 2).to(way_there.dtype)  # 2, 2, 1
    fine_way = way_there * rows[: way_there.shape[-2], None] / rows
    moved = resample(fine, fine_way, interpolation="bicubic", padding_mode=padding_mode, step=2).values
    if not (is_on_host(nonfinite) and not bool(nonfinite.any())):
        plain = resample(cube, way_there, interpolation="bicubic", padding_mode=padding_mode).values
        reach = F.max_pool2d(
            nonfinite.to(torch.float32).flatten(0, -4), 2 * _REACH + 1, stride=1, padding=_REACH
        ).reshape(nonfinite.shape)
        near = resample(reach, way_there, interpolation="nearest", padding_mode="border").values > 0
        moved = torch.where(near, plain.to(moved.dtype), moved)
    moved = moved.reshape(frames.shape)
    if frames.dtype.is_floating_point:
        return moved.to(frames.dtype)
    if frames.dtype == torch.bool:
        return moved > 0.5
    limits = torch.iinfo(frames.dtype)
    return moved.round().clamp(limits.min, limits.max).to(frames.dtype)


def _upsample(image: Tensor, dim: int, padding_mode: PaddingMode) -> Tensor:
    """Twice as long: every sample, followed by the one half-way to the next."""
    length = image.shape[dim]
    index = torch.arange(1 - _REACH, length + _REACH, device=image.device)
    if padding_mode == "reflection":  # about the outer edge
        index = index % (2 * length)
        index = torch.minimum(index, 2 * length - 1 - index)
    extended = image.index_select(dim, index.clamp(0, length - 1))
    if padding_mode == "zeros":
        inside = ((index >= 0) & (index < length)).to(image.dtype)
        extended = extended * (inside if dim == -1 else inside[:, None])
    between = torch.zeros_like(image)
    for tap, weight in enumerate(_half_way()):
        between = between + weight * extended.narrow(dim, tap, length)
    return torch.stack((image, between), dim).flatten(dim - 1, dim)


@functools.cache
def _half_way() -> list[float]:
    """Weights of the taps of the sinc half-way between the middle two, under a Kaiser window; they add up to 1."""
    x = np.arange(2 * _REACH) - _REACH + 0.5
    weights = np.sinc(x) * np.i0(6.0 * np.sqrt(1 - (x / _REACH) ** 2))
    values: list[float] = (weights / weights.sum()).tolist()
    return values


class Misregistering(TypedDict, total=False):
    """The options of :class:`RandomMisregistration` that its twin for kornia takes as ``**shared``."""

    max_deformation: float
    motion: MotionModel
    p: float
    kernel: Kernel
    padding_mode: PaddingMode
    generator: torch.Generator | None


class RandomMisregistration(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Move frames by random sub-pixel warps and tell the warps: a torchvision v2 transform.

    To train and to test against misregistration: of one input of a model against the other, of the dates of a
    series among each other, of an image against its label.

    Every ``Image``, ``Video``, ``Mask``, ``BoundingBoxes`` and ``KeyPoints`` of a sample (and, as in all of
    torchvision, a plain tensor where there is no ``Image`` or ``Video``) is moved by the same warps; masks by the
    nearest pixel, their classes unchanged (so a label is up to half a pixel off its image: move it as an image, one
    band a class, where that counts). Inputs of another size (a 20 m band beside 10 m bands) move by the
    same share of their frame. To misregister an image against its label, call the transform on the image alone.

    Bias: the returned warp is true to 0.005 px at all wavelengths above 4 px (``kernel="sinc"``). Zooms stay
    within ``max_deformation`` pixels a frame, so nothing is undersampled that was not before.

    Args:
        max_translation: of the frame's centre, in pixels, in a uniformly random direction.
        max_deformation: how far any pixel may move against the centre, in pixels, for motions beyond translation.
        motion: ``"translation"``, ``"euclidean"``, ``"similarity"``, ``"affine"`` or ``"homography"``.
        p: probability that a frame (or sample) moves at all.
        per: ``"frame"``: every (C, H, W) moves on its own; ``"sample"``: all T frames of (T, C, H, W) together.
        same_on_bands: ``False`` moves every band on its own (band-to-band misregistration); masks, boxes and key
            points then stay where they are.
        return_warp: return ``(sample, warp)``; ``False`` returns the sample alone, for a ``v2.Compose`` in which
            nobody needs the truth.
        kernel: of images, see :func:`misregister`.
        padding_mode: what enters from outside the frame.
        generator: a source of randomness of its own; ``None``: torch's default, which ``torch.manual_seed`` seeds
            and a DataLoader seeds in its workers. In a worker, a given generator is mixed with the worker's seed,
            or all workers and epochs would draw the same.

    Returns:
        The sample, and ``warp`` (..., 2, 3) or (..., 3, 3), one per frame (per band: (..., C, 2|3, 3)), float32,
        **moving → reference**: what brings the moved frame back, what an aligner should find, with the moved
        frame moving and the original as reference. For the first image of the sample.

    Raises:
        TypeError: an option has the wrong type; a PIL image (put ``v2.ToImage()`` before).
        ValueError: an option is out of range; inputs whose leading dimensions do not fit each other.

    Example:
        >>> frame = torch.rand(3, 64, 64)
        >>> moved, warp = ta.RandomMisregistration(max_translation=1.5)(frame)
        >>> moved.shape, warp.shape
        (torch.Size([3, 64, 64]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        max_translation: float = 1.0,
        *,
        max_deformation: float = 1.0,
        motion: MotionModel = "translation",
        p: float = 1.0,
        per: Per = "frame",
        same_on_bands: bool = True,
        return_warp: bool = True,
        kernel: Kernel = "sinc",
        padding_mode: PaddingMode = "reflection",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_translation = check_number("max_translation", max_translation, minimum=0, maximum=1e6)
        self.max_deformation = check_number("max_deformation", max_deformation, minimum=0, maximum=1e6)
        self.motion = check_option("motion", motion, MotionModel)
        self.p = check_number("p", p, minimum=0, maximum=1)
        self.per = check_option("per", per, Per)
        self.same_on_bands = bool(same_on_bands)
        self.return_warp = bool(return_warp)
        self.kernel = check_option("kernel", kernel, Kernel)
        self.padding_mode = check_option("padding_mode", padding_mode, PaddingMode)
        self._randomness = Randomness(generator)

    def forward(self, *inputs: Any) -> Any:
        """Move one sample, of any structure, and return it, and the warp."""
        flat, spec = tree_flatten(inputs if len(inputs) > 1 else inputs[0])
        chosen = self._needs_transform_list(flat)
        params = self.make_params([item for item, moves in zip(flat, chosen, strict=True) if moves])
        moved = [
            self.transform(item, params) if moves else item for item, moves in zip(flat, chosen, strict=True)
        ]
        sample = tree_unflatten(moved, spec)
        return (sample, params["warp"]) if self.return_warp else sample

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The warp of the sample, drawn for its first image; torchvision's hook."""
        frames = next((item for item in flat_inputs if _is_image(item)), None)
        if frames is None:
            found = [type(item).__name__ for item in flat_inputs]
            cure = "convert PIL images with v2.ToImage()"
            raise TypeError(message("sample", "a tensor, Image or Video", found, cure))
        if frames.ndim < 3:
            cure = "add the band axis: image[None]"
            raise ValueError(message("image", "shape (..., C, H, W)", tuple(frames.shape), cure))
        lead, bands, size = tuple(frames.shape[:-3]), frames.shape[-3], tuple(frames.shape[-2:])
        drawn = lead
        if lead and self.per == "sample":
            drawn = (*lead[:-1], 1)
        if not self.same_on_bands:
            drawn = (*drawn, bands)
        warp = self.draw(drawn, (size[0], size[1]), frames.device)
        if lead and self.per == "sample":
            warp = warp.expand(*lead, *warp.shape[len(lead) :])
        return {"warp": warp, "size": size, "lead": lead}

    def draw(self, batch_shape: Sequence[int], size: tuple[int, int], device: torch.device) -> Tensor:
        """Warps of frames (H, W), by the options, see :func:`random_warp`."""
        return random_warp(
            batch_shape,
            size,
            max_translation=self.max_translation,
            max_deformation=self.max_deformation,
            motion=self.motion,
            p=self.p,
            generator=self._randomness.here(),
            device=device,
        )

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Move one input; torchvision's hook."""
        size, lead = params["size"], params["lead"]
        if _is_image(inpt):
            if tuple(inpt.shape[:-3]) != lead:
                expected, cure = f"leading dimensions {lead}", "call once for each"
                raise ValueError(message("images", expected, tuple(inpt.shape[:-3]), cure))
            warp = self._at_size(params["warp"], size, tuple(inpt.shape[-2:]))
            return _like(
                inpt, misregister(_as_tensor(inpt), warp, kernel=self.kernel, padding_mode=self.padding_mode)
            )
        if not self.same_on_bands:
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            return _like(inpt, self._move_mask(_as_tensor(inpt), params))
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return self._move_boxes(inpt, params)
        if _KeyPoints is not None and isinstance(inpt, _KeyPoints):
            way = self._corner_way(params, inpt.canvas_size)
            return _like(inpt, transform_points(way, _as_tensor(inpt).to(way.dtype)).to(inpt.dtype))
        got, cure = type(inpt).__name__, "put v2.ToImage() before"
        raise TypeError(message("sample", "tensors and tv_tensors", got, cure))

    def _move_mask(self, mask: Tensor, params: dict[str, Any]) -> Tensor:
        """(..., H, W), (..., N, H, W): labels of the frames of leading dimensions ``...``."""
        lead = params["lead"]
        if tuple(mask.shape[: len(lead)]) != lead or mask.ndim - len(lead) not in (2, 3):
            expected = f"shape {(*lead, 'H', 'W')} or {(*lead, 'N', 'H', 'W')}"
            cure = "give one mask per frame"
            raise ValueError(message("mask", expected, tuple(mask.shape), cure))
        warp = self._at_size(params["warp"], params["size"], tuple(mask.shape[-2:]))
        bands = mask if mask.ndim - len(lead) == 3 else mask.unsqueeze(-3)
        return misregister(bands, warp, kernel="nearest", padding_mode=self.padding_mode).reshape(mask.shape)

    def _move_boxes(self, boxes: Any, params: dict[str, Any]) -> Any:
        """The box around a box's moved corners."""
        if boxes.format.value not in ("XYXY", "XYWH", "CXCYWH"):
            cure = "convert them with v2.functional"
            raise ValueError(message("boxes", "XYXY, XYWH or CXCYWH", boxes.format.value, cure))
        xyxy = v2.functional.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
        way = self._corner_way(params, boxes.canvas_size)
        corners = _as_tensor(xyxy)[..., [[0, 1], [2, 1], [0, 3], [2, 3]]].to(way.dtype)  # (N, 4, 2)
        moved = transform_points(way, corners.flatten(-3, -2)).reshape(corners.shape)
        around = torch.cat((moved.amin(-2), moved.amax(-2)), -1)  # (N, 4)
        if not boxes.is_floating_point():
            around = around.round()
        around = v2.functional.clamp_bounding_boxes(_like(xyxy, around.to(boxes.dtype)))
        return v2.functional.convert_bounding_box_format(around, new_format=boxes.format)

    def _corner_way(self, params: dict[str, Any], canvas: tuple[int, int]) -> Tensor:
        """The way of points reference → moving, with (0, 0) the frame's corner, as boxes have it."""
        if params["lead"]:
            cure = "move them frame by frame"
            raise ValueError(message("boxes", "a sample of one image", f"frames {params['lead']}", cure))
        warp = self._at_size(params["warp"], params["size"], tuple(canvas))
        return change_origin(invert_warp(warp), (-0.5, -0.5))

    @staticmethod
    def _at_size(warp: Tensor, size: tuple[int, ...], other: tuple[int, ...]) -> Tensor:
        return warp if size == other else rescale_warp(warp, (other[1] / size[1], other[0] / size[0]))


class Randomness:
    """A generator that draws its own numbers in every worker of a DataLoader, and in every epoch.

    A worker gets a copy of the generator as it was when the worker started: without the worker's seed mixed in,
    all workers, and all epochs, would draw the same.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        check_kind("generator", generator, torch.Generator, "a torch.Generator", "None is torch's own")
        self.generator = generator
        self._worker_seed: int | None = None

    def here(self) -> torch.Generator | None:
        """The generator to draw from."""
        worker = get_worker_info()
        if self.generator is not None and worker is not None and worker.seed != self._worker_seed:
            # an odd constant spreads neighbouring seeds over all 64 bits
            self.generator.manual_seed(
                (self.generator.initial_seed() * 0x9E3779B97F4A7C15 + worker.seed) % 2**63
            )
            self._worker_seed = worker.seed
        return self.generator


def _turned_by(angle: Tensor) -> Tensor:
    """(..., 2, 2)."""
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((torch.stack((cosine, -sine), -1), torch.stack((sine, cosine), -1)), -2)


def _in_disc(draws: Tensor) -> Tensor:
    """Two numbers in [0, 1) (..., 2) as a point of the unit disc, uniformly."""
    return torch.view_as_real(torch.polar(draws[..., 0].sqrt(), 2 * math.pi * draws[..., 1]))


def _is_image(item: object) -> bool:
    if isinstance(item, tv_tensors.TVTensor):
        return isinstance(item, (tv_tensors.Image, tv_tensors.Video))
    return isinstance(item, Tensor)


def _as_tensor(item: Any) -> Tensor:
    plain: Tensor = item.as_subclass(Tensor) if isinstance(item, tv_tensors.TVTensor) else item
    return plain


def _like(item: Any, moved: Tensor) -> Any:
    return tv_tensors.wrap(moved, like=item) if isinstance(item, tv_tensors.TVTensor) else moved
