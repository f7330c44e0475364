"""Synthetic misregistration in the shape of a kornia augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kornia.augmentation import GeometricAugmentationBase2D
from torch import Tensor

from torchalign._check import show_shared
from torchalign.functional.affine import invert_warp, to_homogeneous
from torchalign.training.misregistration import Misregistering, RandomMisregistration, misregister

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RandomMisregistration2D(GeometricAugmentationBase2D):
    """:class:`~torchalign.training.misregistration.RandomMisregistration` for kornia: (B, C, H, W), batched.

    It composes in ``kornia.augmentation.AugmentationSequential`` with masks, boxes and key points.

    Two matrices that are each other's inverse, each in the words of its library:
    ``transform_matrix`` (B, 3, 3), kornia's, maps the points of the input to those of the output;
    ``warp`` (B, 3, 3), torchalign's, maps moving (the output) → reference (the input): what an aligner should find.

    Masks are always moved by the nearest pixel. Options raise what they raise there.

    Args:
        max_translation: of the frame's centre, in pixels, in a uniformly random direction.
        same_on_batch: one warp for the whole batch.
        keepdim: give (C, H, W) back as (C, H, W).
        **shared: options of both.

    Example:
        >>> augment = ta.RandomMisregistration2D(max_translation=1.5)
        >>> moved = augment(torch.rand(4, 3, 64, 64))
        >>> moved.shape, augment.transform_matrix.shape
        (torch.Size([4, 3, 64, 64]), torch.Size([4, 3, 3]))
    """

    def __init__(
        self,
        max_translation: float = 1.0,
        *,
        same_on_batch: bool = False,
        keepdim: bool = False,
        **shared: Unpack[Misregistering],
    ) -> None:
        # kornia's own p would move a part of the batch and read how large it is; here, p draws identities
        super().__init__(p=1.0, same_on_batch=same_on_batch, keepdim=keepdim)
        for name in shared.keys() - Misregistering.__annotations__.keys():
            raise TypeError(f"RandomMisregistration2D.__init__() got an unexpected keyword argument {name!r}")
        other = RandomMisregistration(max_translation, **shared)
        self._draw = other.draw
        self.flags = {"kernel": other.kernel, "padding_mode": other.padding_mode}

    @property
    def warp(self) -> Tensor:
        """(B, 3, 3), moving → reference, of the last call."""
        return to_homogeneous(self._params["warp"])

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The warps of a batch (B, C, H, W); kornia's hook."""
        count, size = batch_shape[0], (batch_shape[-2], batch_shape[-1])
        drawn = 1 if self.same_on_batch else count
        warp = self._draw((drawn,), size, self.device)
        return {"warp": warp.expand(count, *warp.shape[1:])}

    def compute_transformation(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]
    ) -> Tensor:
        """(B, 3, 3), input → output; kornia's hook."""
        return to_homogeneous(invert_warp(_sent(params["warp"], input))).to(input.dtype)

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Move the batch; kornia's hook."""
        # from the parameters, not kornia's matrix, which has the precision of the input
        return misregister(input, _sent(params["warp"], input), **_resampling(flags))

    def apply_transform_mask(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Move labels by the nearest pixel; kornia's hook."""
        return self.apply_transform(input, params, {**flags, "kernel": "nearest"})

    def inverse_transform(
        self,
        input: Tensor,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Bring the batch back, by kornia's matrix of the way back; kornia's hook."""
        if transform is None:
            raise TypeError("transform: expected the matrix of the way back, got None; call .inverse(output)")
        return misregister(input, invert_warp(transform.to(input.dtype)), **_resampling(flags))


show_shared(RandomMisregistration2D, RandomMisregistration, Misregistering.__annotations__)


def _sent(warp: Tensor, like: Tensor) -> Tensor:
    """To the device of the images; kornia draws on the host, which needs not wait: so small a copy is buffered."""
    return warp.to(like.device, non_blocking=like.device.type == "cuda")


def _resampling(flags: dict[str, Any]) -> dict[str, Any]:
    """What belongs here; kornia's containers put more into the flags."""
    return {name: flags[name] for name in ("kernel", "padding_mode")}
