"""Local features of whole stacks: an image (B, H, W) and where it is usable → K keypoints a frame.

:func:`build_extractor` makes one by name. Every extractor is a Module that

- stretches each frame between its 1st and 99th percentile, so that any units will do (raw reflectance starves
  networks that were trained on [0, 1]);
- finds its K highest keypoints, always K rows, to a fraction of a pixel (``valid`` says which of them are any);
- drops what is at the border, under a mask or beside it;
- treats every frame alone, and has no loop over frames and no wait for a GPU. (On the CPU frames are worked on one
  by one, one core each, because their maps then stay in the cache.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchalign._check import check_floating, check_mask, check_option, check_whole, message
from torchalign._host import all_true, is_on_host, map_on_host
from torchalign.functional import keypoints, sift
from torchalign.models.superpoint import CELL, SuperPointNet
from torchalign.models.weights import Weights, check_placed, load_into, load_weights
from torchalign.types import Fields, combine, each_field

__all__ = [
    "ALIKED",
    "DISK",
    "SIFT",
    "DenseExtractor",
    "DoGHardNet",
    "Extractor",
    "FeatureModel",
    "Features",
    "SuperPoint",
    "XFeat",
    "build_extractor",
    "count_valid_rows",
    "filled_rows",
]

# Smaller frames are continued, by what is not usable.
_LEAST_SIDE = 16
# Keypoints of networks nearer than this to something unusable, in pixels, are dropped.
_MASK_REACH = 4

FeatureModel = Literal[
    "superpoint",
    "disk",
    "aliked",
    "aliked-n16",
    "aliked-n16rot",
    "aliked-n32",
    "aliked-t16",
    "sift",
    "doghardnet",
    "xfeat",
]


class Features(NamedTuple):
    """K keypoints of every frame, one row each; rows that are not ``valid`` hold numbers of no meaning, never NaN."""

    keypoints: Tensor  #: (B, K, 2), (x, y) in pixels of the image, integers at pixel centres
    scores: Tensor  #: (B, K), of the detector, 0 where not valid
    descriptors: Tensor  #: (B, K, D), unit length; 0 where not valid
    valid: Tensor  #: (B, K) bool
    scales: Tensor | None = None  #: (B, K), σ in pixels, where the detector knows scales
    #: (B, K), radians from +x towards +y (down the image), where it knows orientations
    orientations: Tensor | None = None


def filled_rows(fields: Fields, count: int) -> Fields:
    """Tuples of tensors (B, K, ...) with ``count`` rows: what is missing is 0."""
    missing = count - fields[0].shape[1]
    if not missing:
        return fields
    return each_field(fields, lambda field: F.pad(field, (0, 0) * (field.ndim - 2) + (0, missing)))


def count_valid_rows(valid: Tensor) -> int:
    """How many of the rows of (B, K) may hold a keypoint of any frame: up to the last, or all if it may not be read."""
    if not is_on_host(valid) or not len(valid):
        return valid.shape[-1]
    rows = torch.arange(1, valid.shape[-1] + 1, device=valid.device)
    return max(1, int((valid * rows).amax()))


class Extractor(nn.Module, ABC):
    """The one base class: check → stretch → :meth:`extract`. Always in evaluation mode; weights are not trained.

    Args:
        max_num_keypoints: K.
    """

    def __init__(self, max_num_keypoints: int = 1024) -> None:
        super().__init__()
        self.max_num_keypoints = check_whole("max_num_keypoints", max_num_keypoints)

    @abstractmethod
    def extract(self, image: Tensor, usable: Tensor | None, empty: Tensor) -> Features:
        """Features of stretched images (B, H, W) in [0, 1]; ``empty`` (B,) bool frames have none."""

    def forward(self, image: Tensor, usable: Tensor | None = None) -> Features:
        """The K keypoints of every frame.

        Args:
            image: (B, H, W), floating, in any units; NaN and ±inf are not usable.
            usable: (B, H, W) bool, or what broadcasts to it, True = usable.

        Raises:
            TypeError: not a floating image, or not a bool mask; weights of less than float32.
            ValueError: another shape; weights on another device.
        """
        check_floating("image", image, "(B, H, W)")
        if image.ndim != 3 or min(image.shape[-2:]) < 1:
            raise ValueError(
                message("image", "shape (B, H, W)", tuple(image.shape), "one channel, e.g. image.mean(-3)")
            )
        check_placed(type(self).__name__, self, image)
        usable = check_mask("usable", usable, image.shape, image)
        if usable is not None:
            usable = usable.expand(image.shape)
        if image.dtype.itemsize < 4:
            image = image.float()
        with torch.autocast(image.device.type, enabled=False):
            if not is_on_host(image) or len(image) < 2:
                return self._extract(image, usable)
            blocks = [slice(frame, frame + 1) for frame in range(len(image))]
            parts = map_on_host(
                lambda rows: self._extract(image[rows], None if usable is None else usable[rows]), blocks
            )
            return combine(torch.cat, parts)

    def _extract(self, image: Tensor, usable: Tensor | None) -> Features:
        """The keypoints of frames of any size and in any units."""
        height, width = image.shape[-2:]
        if min(height, width) < _LEAST_SIDE:
            missing = (0, max(0, _LEAST_SIDE - width), 0, max(0, _LEAST_SIDE - height))
            usable = torch.ones_like(image, dtype=torch.bool) if usable is None else usable
            image, usable = F.pad(image, missing), F.pad(usable, missing)
        stretched, usable, empty = keypoints.stretch_contrast(image, usable)
        return self.extract(stretched, None if all_true(usable) else usable, empty)

    def train(self, mode: bool = True) -> Extractor:
        """Stays in evaluation mode, whatever the module around does: batch statistics are not to be touched."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The options."""
        return f"max_num_keypoints={self.max_num_keypoints}"


class SIFT(Extractor):
    """The scale-invariant feature transform, see :mod:`torchalign.functional.sift`; needs no weights.

    Args:
        max_num_keypoints: K.
        upright: descriptors are not rotated to the dominant orientation. They are more distinctive where frames
            are not rotated against each other by more than some 15°.
        unsigned: directions of gradients modulo π: descriptors, of 64 numbers, do not change where the contrast is
            reversed. For pairs of different sensors.

    Example:
        >>> frame = torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0))
        >>> features = SIFT(64)(torch.nn.functional.avg_pool2d(frame, 5, 1, 2))
        >>> features.keypoints.shape, features.descriptors.shape, bool(features.valid.all())
        (torch.Size([1, 64, 2]), torch.Size([1, 64, 128]), True)
    """

    def __init__(
        self, max_num_keypoints: int = 1024, *, upright: bool = False, unsigned: bool = False
    ) -> None:
        super().__init__(max_num_keypoints)
        self.upright = upright
        self.unsigned = unsigned

    def extract(self, image: Tensor, usable: Tensor | None, empty: Tensor) -> Features:
        """See :meth:`Extractor.extract`."""
        space = sift.scale_space(image)
        blobs = sift.detect_blobs(space, usable, self.max_num_keypoints)
        count = count_valid_rows(blobs.valid)
        blobs = each_field(blobs, lambda field: field[:, :count])
        orientation = (
            None if self.upright else sift.dominant_orientation(space, blobs, unsigned=self.unsigned)
        )
        descriptors = self._describe(image, space, blobs, orientation)
        if orientation is None:
            orientation = torch.zeros_like(blobs.sigma)
        features = Features(blobs.points, blobs.response, descriptors, blobs.valid, blobs.sigma, orientation)
        return filled_rows(features, self.max_num_keypoints)

    def _describe(
        self, image: Tensor, space: sift.ScaleSpace, blobs: sift.Blobs, orientation: Tensor | None
    ) -> Tensor:
        """Unit descriptors (B, K, D) of keypoints, without an orientation upright."""
        return sift.describe(space, blobs, orientation, unsigned=self.unsigned)

    def extra_repr(self) -> str:
        """The options."""
        return f"{super().extra_repr()}, upright={self.upright}, unsigned={self.unsigned}"


class DoGHardNet(SIFT):
    """SIFT's keypoints, described by HardNet, kornia's network. Mishchuk et al. 2017, arXiv:1705.10872.

    Args:
        network: :class:`kornia.feature.HardNet` with its weights.
        max_num_keypoints: K.
    """

    def __init__(self, network: nn.Module, max_num_keypoints: int = 1024) -> None:
        super().__init__(max_num_keypoints)
        self.network: Any = network.requires_grad_(False)  # kornia's, without types
        self.train(False)

    def _describe(
        self, image: Tensor, space: sift.ScaleSpace, blobs: sift.Blobs, orientation: Tensor | None
    ) -> Tensor:
        assert orientation is not None  # never upright
        patches = sift.patches_at(image, blobs.points, blobs.sigma, orientation, side=self.network.patch_size)
        dtype = next(self.network.parameters()).dtype
        described = self.network(patches.flatten(0, 1).unsqueeze(1).to(dtype)).unflatten(0, patches.shape[:2])
        return F.normalize(described.to(image.dtype), dim=-1) * blobs.valid.unsqueeze(-1)


class DenseExtractor(Extractor):
    """Extractors whose network has a score of every pixel: SuperPoint, DISK, ALIKED, XFeat.

    :meth:`maps` runs the network, :meth:`describe` reads its descriptors at the points found.

    Args:
        network: with its weights; that of :mod:`kornia.feature`, but for SuperPoint.
        max_num_keypoints: K.
        threshold: least score of a keypoint.

    Attributes:
        multiple: of the sides that the network wants; the image is continued by its last row and column.
        least: side that the network wants at least.
        radius: of the neighbourhood in which a keypoint is the only one, and its least distance from the border.
        threshold: least score of a keypoint, unless another is given.
    """

    multiple = 8
    least = 32
    radius = 2
    threshold = 0.0

    def __init__(
        self, network: nn.Module, max_num_keypoints: int = 1024, *, threshold: float | None = None
    ) -> None:
        super().__init__(max_num_keypoints)
        self.network: Any = network.requires_grad_(False)  # kornia's, without types
        if threshold is not None:
            self.threshold = threshold
        self.train(False)

    @abstractmethod
    def maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From (B, H, W), sides fit for the network.

        Returns:
            ``(peaks, scores, features)``: (B, H, W), whose maxima are the keypoints and whose quadratics place them
            between the pixels; (B, H, W), by which they are ranked, valid where above ``threshold``; what
            :meth:`describe` reads.
        """

    @abstractmethod
    def describe(self, features: Tensor, points: Tensor) -> Tensor:
        """Unit descriptors (B, K, D) at points (B, K, 2)."""

    def extract(self, image: Tensor, usable: Tensor | None, empty: Tensor) -> Features:
        """See :meth:`Extractor.extract`."""
        dtype = image.dtype
        height, width = image.shape[-2:]
        peaks, scores, features = self.maps(self._padded(image.to(next(self.network.parameters()).dtype)))
        peaks, scores = peaks[..., :height, :width], scores[..., :height, :width]
        border = self.radius
        maxima = keypoints.strict_maxima(peaks, self.radius)[
            ..., border : height - border, border : width - border
        ]
        allowed = F.pad(maxima, (border,) * 4) & ~empty.view(-1, 1, 1)
        if usable is not None:
            allowed = allowed & keypoints.erode(usable, _MASK_REACH)
        value, index = keypoints.highest(scores.flatten(1), allowed.flatten(1), self.max_num_keypoints)
        valid = value > self.threshold
        rows = count_valid_rows(valid)
        value, index, valid = value[:, :rows], index[:, :rows], valid[:, :rows]
        points = keypoints.pixel_of(index, width) + keypoints.quadratic_offset(peaks, index)
        descriptors = self.describe(features, points) * valid.unsqueeze(-1)
        found = (points, torch.where(valid, value, 0.0), descriptors)
        found = each_field(found, lambda field: field.to(dtype))
        return filled_rows(Features(*found, valid), self.max_num_keypoints)

    def _padded(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        wanted = (max(self.least, -(-side // self.multiple) * self.multiple) for side in (height, width))
        down, right = (side - have for side, have in zip(wanted, (height, width), strict=True))
        return F.pad(image.unsqueeze(1), (0, right, 0, down), mode="replicate").squeeze(1)


class SuperPoint(DenseExtractor):
    """SuperPoint, see :mod:`torchalign.models.superpoint`. DeTone et al. 2018, arXiv:1712.07629."""

    multiple = CELL
    radius = 4
    threshold = 5e-4

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenseExtractor.maps`."""
        peaks, descriptors = self.network(image.unsqueeze(1).expand(-1, self.network.channels, -1, -1))
        return peaks, peaks.exp(), descriptors

    def describe(self, features: Tensor, points: Tensor) -> Tensor:
        """See :meth:`DenseExtractor.describe`."""
        return self.network.sample(features, points)


class DISK(DenseExtractor):
    """DISK, kornia's network; its scores are logits. Tyszkiewicz et al. 2020, arXiv:2006.13566."""

    multiple = 16

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenseExtractor.maps`."""
        logits, descriptors = self.network.heatmap_and_dense_descriptors(_as_rgb(image))
        return logits.squeeze(1), logits.squeeze(1), descriptors

    def describe(self, features: Tensor, points: Tensor) -> Tensor:
        """See :meth:`DenseExtractor.describe`; read at the nearest pixel, as the network was trained."""
        # a row that is not valid may lie half a pixel beyond the edge
        x, y = points.round().long().unbind(-1)
        x, y = x.clamp(0, features.shape[-1] - 1), y.clamp(0, features.shape[-2] - 1)
        index = y * features.shape[-1] + x
        read = features.flatten(2).gather(2, index.unsqueeze(1).expand(-1, features.shape[1], -1))
        return F.normalize(read, dim=1).transpose(1, 2)


class ALIKED(DenseExtractor):
    """ALIKED, kornia's network; deformable convolutions by torchvision. Zhao et al. 2023, arXiv:2304.03608.

    The threshold is below ALIKED's own (0.2): landscapes score low.
    """

    multiple = 32
    threshold = 0.01

    def __init__(
        self, network: nn.Module, max_num_keypoints: int = 1024, *, threshold: float | None = None
    ) -> None:
        _use_torchvision(network)
        super().__init__(network, max_num_keypoints, threshold=threshold)

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenseExtractor.maps`."""
        network = self.network
        first = network.block1(_as_rgb(image))
        second = network.block2(network.pool2(first))
        third = network.block3(network.pool4(second))
        fourth = network.block4(network.pool4(third))
        levels = (
            network.gate(network.conv1(first)),
            network.upsample2(network.gate(network.conv2(second))),
            network.upsample8(network.gate(network.conv3(third))),
            network.upsample32(network.gate(network.conv4(fourth))),
        )
        features = torch.cat(levels, 1)
        scores = torch.sigmoid(network.score_head(features)).squeeze(1)
        # F.normalize took a third of all this time: a few channels at once stay in the cache
        squares = [part.square().sum(1, keepdim=True) for part in torch.split(features, 8, 1)]
        square = torch.cat(squares, 1).sum(1, keepdim=True)
        scale = square.clamp(min=1e-24).rsqrt()
        return scores, scores, features * scale if torch.is_grad_enabled() else features.mul_(scale)

    def describe(self, features: Tensor, points: Tensor) -> Tensor:
        """See :meth:`DenseExtractor.describe`.

        From the 3 × 3 features of every keypoint the head predicts 16 or 32 places around it, reads the features
        there, and sums them through a matrix each.
        """
        head = self.network.desc_head
        batch, channels, height, width = features.shape
        count, side = points.shape[1], head.kernel_size
        # the patch of a keypoint: that of its pixel, moved into the image (by one more than it takes, as trained)
        x, y = (points.long() - side // 2).clamp(min=0).unbind(-1)
        x, y = x.clamp(max=width - 1 - side), y.clamp(max=height - 1 - side)
        steps = torch.arange(side, device=features.device)
        window = (steps[:, None] * width + steps).flatten()  # (9,)
        index = ((y * width + x).unsqueeze(-1) + window).flatten(1)
        patches = features.flatten(2).gather(2, index.unsqueeze(1).expand(-1, channels, -1))
        patches = (
            patches.view(batch, channels, count, side, side).transpose(1, 2).flatten(0, 1)
        )  # (B·K, C, 3, 3)
        reach = max(height, width) / 4
        offsets = (
            head.offset_conv(patches).clamp(-reach, reach).view(batch, count, 2, head.n_pos).transpose(2, 3)
        )

        places = points.unsqueeze(2) + offsets  # (B, K, 16, 2)
        grid = _between_centres(places, (height, width))
        read = F.grid_sample(features, grid, align_corners=True)  # (B, C, K, 16)
        # the head's 1 × 1 convolution and its matrices, over the last axis
        read = F.selu(read.permute(0, 2, 3, 1) @ head.sf_conv.weight.flatten(1).T)
        return F.normalize(read.flatten(2) @ head.agg_weights.flatten(0, 1), dim=-1)


class XFeat(DenseExtractor):
    """XFeat, the network of kornia's. Potje et al. 2024, arXiv:2404.19174.

    The threshold is of the probability; keypoints are ranked by its product with their reliability.
    """

    multiple = 32

    def __init__(self, network: nn.Module, max_num_keypoints: int = 1024, *, threshold: float = 0.05) -> None:
        super().__init__(network, max_num_keypoints, threshold=0.0)
        self.least_probability = threshold

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DenseExtractor.maps`."""
        features, logits, reliability = self.network(image.unsqueeze(1))
        peaks = F.pixel_shuffle(logits.log_softmax(1)[:, :-1], 8).squeeze(1)
        y, x = (torch.arange(side, device=image.device, dtype=features.dtype) for side in image.shape[-2:])
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(image), -1, -1, -1)
        reliability = F.grid_sample(reliability, _between_centres(grid, image.shape), align_corners=False)
        probability = peaks.exp()
        scores = torch.where(probability > self.least_probability, probability * reliability.squeeze(1), 0.0)
        return peaks, scores, F.normalize(features, dim=1)

    def describe(self, features: Tensor, points: Tensor) -> Tensor:
        """See :meth:`DenseExtractor.describe`."""
        size = (8 * features.shape[-2], 8 * features.shape[-1])
        # (read from edge to edge, though placed between centres: so the network was trained)
        grid = _between_centres(points.unsqueeze(2), size)
        read = F.grid_sample(features, grid, mode="bicubic", align_corners=False)
        return F.normalize(read.squeeze(-1), dim=1).transpose(1, 2)


def _between_centres(points: Tensor, size: Sequence[int]) -> Tensor:
    """Points (..., 2) on the scale of ``grid_sample``, -1 and 1 at the outer pixels' centres."""
    x, y = points.unbind(-1)
    return torch.stack((x * (2 / (size[-1] - 1)) - 1, y * (2 / (size[-2] - 1)) - 1), -1)


def _as_rgb(image: Tensor) -> Tensor:
    return image.unsqueeze(1).expand(-1, 3, -1, -1)


class _DeformableConv2d(nn.Module):
    """A convolution that reads its 3 × 3 neighbours at places of their own, which another convolution predicts."""

    def __init__(self, offset_conv: Any, regular_conv: Any) -> None:
        super().__init__()
        self.offset_conv, self.regular_conv = offset_conv, regular_conv

    def forward(self, image: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        reach = max(image.shape[-2:]) / 4
        offset = self.offset_conv(image).clamp(-reach, reach)
        weight, bias = self.regular_conv.weight, self.regular_conv.bias
        return deform_conv2d(image, offset, weight, bias, padding=(1, 1))


def _use_torchvision(network: nn.Module) -> None:
    """Exchange kornia's deformable convolutions, which gather in Python, for torchvision's kernel."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "DeformableConv2d":
                setattr(parent, name, _DeformableConv2d(child.offset_conv, child.regular_conv))


def build_extractor(
    name: FeatureModel,
    *,
    max_num_keypoints: int = 1024,
    weights: Weights | None = None,
    allow_download: bool = False,
) -> Extractor:
    """The extractor of that name, in evaluation mode, on the CPU.

    Args:
        name: one of :data:`FeatureModel`; ``"aliked"`` is ``"aliked-n16"``.
        max_num_keypoints: K, rows a frame.
        weights: a path, a state dict, or the name of other weights for the same network; ``None`` looks where
            :func:`torchalign.models.weights.find_weights` says.
        allow_download: fetch them from their official place if they are nowhere else.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        FileNotFoundError: no weights; says where they were looked for, and under which licence they are.

    Example:
        >>> build_extractor("sift", max_num_keypoints=512)
        SIFT(max_num_keypoints=512, upright=False, unsigned=False)
    """
    check_option("feature_model", name, FeatureModel)
    if name == "sift":
        if weights is not None:
            raise ValueError(message("weights", "None for sift", type(weights).__name__, "it has none"))
        return SIFT(max_num_keypoints)
    entry = "aliked-n16" if name == "aliked" else name
    tensors = load_weights(entry, weights, allow_download=allow_download)
    if name == "superpoint":
        return SuperPoint(SuperPointNet.from_state_dict(tensors), max_num_keypoints)
    from kornia import feature  # here: importing torchalign does not import kornia

    kinds: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
        "disk": (DISK, feature.DISK),
        "xfeat": (XFeat, lambda: feature.XFeat().net),
        "doghardnet": (DoGHardNet, lambda: feature.HardNet(pretrained=False)),
    }
    extractor, build = kinds.get(name, (ALIKED, lambda: feature.ALIKED(entry)))
    with torch.device("cpu"):
        network = build()
    load_into(network, tensors, f"weights for {name}")
    found: Extractor = extractor(network, max_num_keypoints)
    return found
