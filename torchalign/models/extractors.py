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
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchalign._check import check_floating, check_mask, check_number, check_option, message
from torchalign._host import is_on_host, map_on_host
from torchalign.functional.keypoints import stretch_contrast
from torchalign.functional.sift import describe, detect_blobs, dominant_orientation, scale_space
from torchalign.models.weights import Weights

__all__ = ["SIFT", "Extractor", "FeatureModel", "Features", "build_extractor"]

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
    """K keypoints of every frame, one row each; rows that are not ``valid`` hold numbers of no meaning, never NaN.

    Attributes:
        keypoints: (B, K, 2), (x, y) in pixels of the image, integers at pixel centres.
        scores: (B, K), of the detector, 0 where not valid.
        descriptors: (B, K, D), unit length; 0 where not valid.
        valid: (B, K) bool.
        scales: (B, K), σ in pixels, where the detector knows scales.
        orientations: (B, K), radians from +x towards +y (down the image), where it knows orientations.
    """

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    valid: Tensor
    scales: Tensor | None = None
    orientations: Tensor | None = None


class Extractor(nn.Module, ABC):
    """The one base class: check → stretch → :meth:`extract`. Always in evaluation mode; weights are not trained.

    Args:
        max_num_keypoints: K.
    """

    def __init__(self, max_num_keypoints: int = 1024) -> None:
        super().__init__()
        check_number("max_num_keypoints", max_num_keypoints, minimum=1)
        if int(max_num_keypoints) != max_num_keypoints:
            raise ValueError(message("max_num_keypoints", "a whole number", max_num_keypoints, "give an int"))
        self.max_num_keypoints = int(max_num_keypoints)

    @abstractmethod
    def extract(self, image: Tensor, usable: Tensor | None, empty: Tensor) -> Features:
        """Features of stretched images (B, H, W) in [0, 1]; ``empty`` (B,) bool frames have none."""

    def forward(self, image: Tensor, usable: Tensor | None = None) -> Features:
        """The K keypoints of every frame.

        Args:
            image: (B, H, W), floating, in any units; NaN and ±inf are not usable.
            usable: (B, H, W) bool, or what broadcasts to it, True = usable.

        Raises:
            TypeError: not a floating image, or not a bool mask.
            ValueError: another shape.
        """
        check_floating("image", image, "(B, H, W)")
        if image.ndim != 3 or min(image.shape[-2:]) < 1:
            raise ValueError(
                message("image", "shape (B, H, W)", tuple(image.shape), "one channel, e.g. image.mean(-3)")
            )
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
            return Features(
                *(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))
            )

    def _extract(self, image: Tensor, usable: Tensor | None) -> Features:
        stretched, seen, empty = stretch_contrast(image, usable)
        if usable is None and is_on_host(image) and bool(seen.all()):
            seen = None  # nothing to stay away from
        return self.extract(stretched, seen, empty)

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
        upright: descriptors are not turned with the dominant orientation: they tell more, where frames are not
            turned against each other by more than some 15°.

    Example:
        >>> frame = torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0))
        >>> features = SIFT(64)(torch.nn.functional.avg_pool2d(frame, 5, 1, 2))
        >>> features.keypoints.shape, features.descriptors.shape, bool(features.valid.all())
        (torch.Size([1, 64, 2]), torch.Size([1, 64, 128]), True)
    """

    def __init__(self, max_num_keypoints: int = 1024, *, upright: bool = False) -> None:
        super().__init__(max_num_keypoints)
        self.upright = upright

    def extract(self, image: Tensor, usable: Tensor | None, empty: Tensor) -> Features:
        """See :meth:`Extractor.extract`."""
        space = scale_space(image)
        blobs = detect_blobs(space, usable, self.max_num_keypoints)
        orientation = None if self.upright else dominant_orientation(space, blobs)
        descriptors = describe(space, blobs, orientation)
        if orientation is None:
            orientation = torch.zeros_like(blobs.sigma)
        return Features(blobs.points, blobs.response, descriptors, blobs.valid, blobs.sigma, orientation)

    def extra_repr(self) -> str:
        """The options."""
        return f"{super().extra_repr()}, upright={self.upright}"


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
        SIFT(max_num_keypoints=512, upright=False)
    """
    check_option("feature_model", name, FeatureModel)
    if name == "sift":
        if weights is not None:
            raise ValueError(message("weights", "None for sift", type(weights).__name__, "it has none"))
        return SIFT(max_num_keypoints)
    raise NotImplementedError(name)
