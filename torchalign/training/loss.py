"""Losses that fall as images come to lie on each other."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchalign._check import check_floating, check_number, check_option, check_warp, message
from torchalign.aligner import Aligner
from torchalign.functional.affine import center_displacement
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.warp import resample
from torchalign.pcc import PCC
from torchalign.training.measure import aligner_or, check_samples

Kind = Literal["ecc", "zncc", "shift"]
Reduction = Literal["mean", "sum", "none"]


class AlignmentLoss(nn.Module):
    r"""How badly two batches of images are registered, differentiably.

    * ``"zncc"``: :math:`1 - \rho`, with ρ the zero-normalised cross-correlation over what is usable in both, of
      every band by itself, then the mean over bands. In [0, 2].
    * ``"ecc"``: :math:`\lVert \bar x / \lVert \bar x \rVert - \bar r / \lVert \bar r \rVert \rVert^2 = 2 - 2 \rho`,
      the criterion of Evangelidis & Psarakis, ρ taken over all bands at once, with one mean each: relations between
      bands count. In [0, 4].
    * ``"shift"``: :math:`\sqrt{|t|^2 + \epsilon^2} - \epsilon` in pixels, ε = 0.01, with t the displacement that an
      aligner finds, by the implicit function theorem; 0 (and no gradient) for samples without a match. It sees
      any shift within the aligner's reach, where the other two see only what is within half a wavelength.

    ``warp`` moves the first images before they are compared, and gets a gradient too: a network that predicts warps
    is trained by ``loss(moving, reference, warp)``.

    Invariant to gain and offset. In float32 or float64, under autocast too. A sample without usable pixels or
    without texture costs what unrelated images do (1, 2 or 0), with no gradient and no NaN.

    Args:
        kind: ``"zncc"``, ``"ecc"`` or ``"shift"``.
        reduction: ``"mean"`` or ``"sum"`` over samples, or ``"none"``.
        aligner: of ``"shift"``; ``None``: ``ta.PCC()``.
        interpolation: of ``warp``; ``"bicubic"`` or ``"bilinear"``.
        max_shift: samples of ``"shift"`` whose ``|t|`` is larger cost no more than this, with no gradient; pixels.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is unknown or out of range.

    References:
        Evangelidis & Psarakis 2008, doi:10.1109/TPAMI.2008.113.

    Example:
        >>> image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> loss = ta.AlignmentLoss("zncc")
        >>> float(loss(2 * image + 1, image)) < 1e-5, float(loss(image.roll(1, -1), image)) > 0.9
        (True, True)
    """

    def __init__(
        self,
        kind: Kind = "zncc",
        *,
        reduction: Reduction = "mean",
        aligner: Aligner | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        max_shift: float = 5.0,
    ) -> None:
        super().__init__()
        aligner = aligner_or(aligner, PCC)
        self.kind = check_option("kind", kind, Kind)
        self.reduction = check_option("reduction", reduction, Reduction)
        self.interpolation = check_option("interpolation", interpolation, Literal["bilinear", "bicubic"])
        self.max_shift = check_number("max_shift", max_shift, minimum=0, inclusive=False)
        self.aligner = aligner if kind == "shift" else None

    def forward(
        self,
        moving: Tensor,
        reference: Tensor,
        warp: Tensor | None = None,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            moving: (..., C, H, W), floating; leading dimensions are samples.
            reference: the same shape and dtype.
            warp: (..., 2, 3) or (..., 3, 3), moving → reference; ``None``: they are compared as they lie.
            mask: bool, broadcastable to (..., H, W), True = usable; NaN and ±inf are unusable without it.
            reference_mask: the same.

        Returns:
            (), or (...) for ``reduction="none"``.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: a shape or a device does not fit.
        """
        check_floating("moving", moving, "(..., C, H, W)")
        check_floating("reference", reference, "(..., C, H, W)")
        check_samples(moving, reference, mask, reference_mask)
        expected, got = (
            f"{image.dtype} {tuple(image.shape)} on {image.device}" for image in (moving, reference)
        )
        if expected != got:
            error = ValueError if moving.dtype == reference.dtype else TypeError
            raise error(message("reference", expected, got, "convert it, move it, or give the same bands"))
        if warp is not None:
            check_warp("warp", warp, moving.shape[:-3], moving)
        with torch.autocast(moving.device.type, enabled=False):
            kind = torch.promote_types(moving.dtype, torch.float32)
            moving, usable = _finite(moving.to(kind), mask)
            reference, other = _finite(reference.to(kind), reference_mask)
            if warp is not None:
                # a frame is (1, C, H, W), its warp (1, 2, 3)
                moved = resample(
                    moving.unsqueeze(-4), warp.to(kind).unsqueeze(-3), interpolation=self.interpolation,
                    mask=usable.unsqueeze(-3),
                )  # fmt: skip
                moving, usable = moved.values.squeeze(-4), moved.validity.squeeze(-3)
            if self.kind == "shift":
                loss = self._shift(moving, reference, usable, other)
            else:
                both = (usable & other).unsqueeze(-3).expand(moving.shape)
                if self.kind == "ecc":
                    flat = [image.flatten(-3, -2) for image in (moving, reference, both)]
                    loss = 2 - 2 * normalized_cross_correlation(*flat)
                else:
                    loss = 1 - normalized_cross_correlation(moving, reference, both).mean(-1)
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def _shift(self, moving: Tensor, reference: Tensor, usable: Tensor, other: Tensor) -> Tensor:
        assert self.aligner is not None
        estimate = self.aligner.estimate(
            moving.unsqueeze(-4), reference.unsqueeze(-4), usable.unsqueeze(-3), other.unsqueeze(-3)
        )
        shift = center_displacement(estimate.warp.squeeze(-3), (moving.shape[-2], moving.shape[-1]))
        epsilon = 1e-2
        length = (shift.square().sum(-1) + epsilon**2).sqrt() - epsilon
        matched = estimate.valid.squeeze(-1)
        return torch.where(matched, length, 0.0).clamp(max=self.max_shift)

    def extra_repr(self) -> str:
        """The options."""
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("kind", "reduction", "interpolation")
        }
        if self.kind == "shift":
            options["max_shift"] = self.max_shift
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _finite(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(..., C, H, W), 0 where a band is not finite or the mask says so; and where it is usable (..., H, W)."""
    usable = image.isfinite().all(-3)
    usable = usable if mask is None else usable & mask
    return torch.where(usable.unsqueeze(-3), image, 0.0), usable
