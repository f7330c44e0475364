"""Local: a smooth field of local shifts on top of a global warp, never worse than it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchalign._check import check_floating, check_number, check_whole, message
from torchalign.aligner import (
    Aligner,
    Job,
    Judged,
    Motion,
    Pair,
    SharedOptions,
    flagged,
    full_precision,
    rows_for_frames,
    with_lead,
)
from torchalign.functional.affine import translation_warp
from torchalign.functional.local import (
    Ground,
    LatticeOptions,
    LocalShifts,
    Mosaic,
    acceptable,
    estimate_shifts,
    lattice_size,
    prepare_ground,
)
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.uncertainty import largest_sigma
from torchalign.functional.warp import resample
from torchalign.pcc import PCC
from torchalign.types import ShiftField, Status

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Local"]

# Eager CPU: pixels of one block of frames, whose samples are read sixteen times a round from the cache.
_BLOCK_PIXELS = 2**19
# Of tie points whose error nobody told, in pixels.
_TIE_SIGMA = 0.1


class Local(Aligner):
    r"""Local shifts: terrain, jitter of the platform, errors of a DEM, what one warp of the whole frame leaves.

    .. math:: aligned(q) = frame(W^{-1} q + u(q)), \qquad
        \hat u = \arg\min_u \sum_q \frac{w(q)}{s^2(q)} \big(r(q) - m_u(q)\big)^2
        + \lambda \, (\|\nabla^3 u\|^2 + \mu \|\nabla^2 u\|^2 + \mu \|\nabla u\|^2)

    with u a cubic B-spline over a lattice of nodes, :math:`r, m_u` the local contrast of the reference and of the
    frame read through the field, w where the two show the same ground, :math:`s^2` the local variance of what
    differs, and λ the likeliest of eight, frame by frame (its marginal likelihood). It is
    :func:`~torchalign.functional.local.estimate_shifts`.

    Alone it starts from the translation that :class:`~torchalign.pcc.PCC` finds, from ``init`` on. Last in a
    cascade it starts from what the stages before it found: ``Cascade(PCC(), Local())``. The estimate's ``warp``
    stays that global one, its ``field`` holds the shifts on top of it, and the cube is resampled once, by both.

    **Never worse than the warp.** A field is kept only if the frame is clearly likelier with it (by 20 nats) and its
    score, on the same ground, no more than 0.001 lower, if it is nowhere longer than ``max_deviation``, and if it
    folds nothing (Jacobian above 0.5). Otherwise the frame comes out as without it, bit for bit.

    ``field.sigma`` predicts the error of the field at every node, per axis; it is large where there is nothing to
    see (water, clouds), where the field goes on smoothly from around. It does not know a step (a seam between two
    images): within a node of one the field is a ramp.

    Bias: on real scenes without any local shift 0.003 px; frequencies beyond 0.32 cycles per pixel are not used.
    What varies within less than two nodes is smoothed over: choose a smaller ``spacing`` for jitter, at the price
    of more noise. Between dates that differ by season or by the sun's elevation the shadows and crowns that move
    are local shifts too, which no image can tell from those of the ground.

    Args:
        spacing: pixels from one node to the next, a whole number, at least 8.
        smoothness: λ, in px⁻², a number > 0, or ``"auto"``. 1/√λ is about how much the field's bend changes
            from node to node: 0.17 px for λ = 36.
        max_deviation: limit of the field's length, in pixels.
        tie_points: (K, 4) or (K, 5), points that somebody measured: (x, y) on the reference, (x, y) of the same
            ground in the frame, and σ per axis (0.1 if it is missing), in pixels. They hold for all frames; to give
            each its own, call frame by frame. The field weighs them and the images by their errors.
        **shared: those of every method, see :class:`~torchalign.aligner.Aligner`.

    ``max_translation`` limits the warp. Beyond a crop the field keeps the value at its border.

    Status: that of the warp. A field that is not kept is no failure: its coefficients are 0 and its σ is inf.
    ``sigma`` and ``covariance`` of a frame with a field are those of warp and field together at its centre.

    References:
        Lucas & Kanade 1981; Unser 1999, doi:10.1109/79.799930; MacKay 1992, doi:10.1162/neco.1992.4.3.415.

    Example:
        >>> import torchalign as ta
        >>> scene = torch.rand(1, 3, 220, 220, generator=torch.Generator().manual_seed(0))
        >>> scene = torch.nn.functional.avg_pool2d(scene, 9, 1, 4)
        >>> reference, cube = scene[0, :, 16:208, 16:208], scene[:, :, 18:210, 13:205]
        >>> estimate = ta.Local().estimate(cube, reference)
        >>> estimate.warp[0, :, 2].round(decimals=2), estimate.field.coefficients.abs().max() < 0.01
        (tensor([-3.,  2.]), tensor(True))
    """

    tie_points: Tensor | None

    def __init__(
        self,
        *,
        spacing: int = 24,
        smoothness: float | Literal["auto"] = "auto",
        max_deviation: float = 3.0,
        tie_points: Tensor | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**shared)
        self.spacing = check_whole("spacing", spacing, minimum=8, maximum=4096)
        if not isinstance(smoothness, str):
            check_number("smoothness", smoothness, minimum=0, inclusive=False, maximum=1e9)
        elif smoothness != "auto":
            raise ValueError(message("smoothness", '"auto" or a number > 0', repr(smoothness), 'give "auto"'))
        self.smoothness = smoothness if isinstance(smoothness, str) else float(smoothness)
        self.max_deviation = check_number(
            "max_deviation", max_deviation, minimum=0, inclusive=False, maximum=1e6
        )
        self.register_buffer("tie_points", None, persistent=False)
        if tie_points is not None:
            self.tie_points = _check_tie_points(tie_points)
            if self.crop_center is not None:
                cure = "leave crop_center out, or crop the cube and move the points"
                raise ValueError(message("crop_center", "None with tie_points", self.crop_center, cure))
        self.start = PCC(max_translation=self.max_translation)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """To another device or dtype; tie points keep their digits."""
        points = self.tie_points
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if points is not None and self.tie_points is not None and self.tie_points.dtype != points.dtype:
            self.tie_points = points.to(self.tie_points.device)
        return self

    def _options(self) -> dict[str, Any]:
        shape = None if self.tie_points is None else tuple(self.tie_points.shape)
        return super()._options() | {"tie_points": shape}

    def field_nodes(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the lattice over the crop, see :meth:`Aligner.field_nodes`."""
        crop = size if self.crop_center is None else self.crop_center
        return lattice_size((min(size[0], crop[0]), min(size[1], crop[1])), self.spacing)

    def _block_pixels(self) -> int:
        return _BLOCK_PIXELS

    def prepare_reference(self, image: Tensor, usable: Tensor | None) -> _PreparedLocal:
        """What PCC and the field need of the reference, see :meth:`Aligner.prepare_reference`."""
        size = image.shape[-2:]
        mask = None if usable is None else usable.expand(image.shape).reshape(-1, *size)
        ground = prepare_ground(image.reshape(-1, *size), mask, spacing=self.spacing)
        return _PreparedLocal(self.start.prepare_reference(image, usable), ground)

    def estimate_motion(self, pair: Pair, prepared: _PreparedLocal, init: Tensor | None) -> Motion:
        """See :meth:`Aligner.estimate_motion`: the field on top of ``init``; not trusted where it is not kept."""
        if init is None:
            begun = self.start.estimate_motion(pair, prepared.start, None)
        else:
            warp = translation_warp(init) if init.shape[-1] == 2 else init
            status = torch.zeros_like(warp[..., 0, 0], dtype=torch.int64)
            begun = Motion(warp, status.to(warp.dtype), status, only_shifts=init.shape[-1] == 2)
        return self._add_shifts(begun, pair, prepared.ground)

    def global_method(self) -> PCC:
        """The method that finds the warp where nothing comes before."""
        return PCC(**{name: getattr(self, name) for name in SharedOptions.__annotations__})

    def add_tile(self, mosaic: Mosaic, index: int, cube: Tensor, reference: Tensor, warp: Tensor) -> None:
        """One of the mosaic's windows: (N, C, h, w) of frames and reference, and the warps of the whole frames."""
        with full_precision(cube):
            job = self._check(cube, reference, None, None, None)
            block = self._prepare_block(job)
            options = self._lattice_options(block.moving)
            ground = block.prepared.ground.tiles[0]
            mosaic.add(index, block.moving, ground, warp.to(block.moving), block.usable, options)

    def compare(self, cube: Tensor, reference: Tensor, warp: Tensor, field: ShiftField) -> Tensor:
        """(N, 2): correlations with the reference under the warps alone, and with the field, over the same ground."""
        with full_precision(cube):
            moving, usable = self._extract_channel(cube, None)
            still, known = self._extract_channel(reference, None)
            options: dict[str, Any] = {"interpolation": "bicubic", "mask": usable}
            parts = [resample(moving.unsqueeze(-3), warp, field=one, **options) for one in (None, field)]
            ground = parts[0].validity & parts[1].validity
            ground = ground if known is None else ground & known
            scores = [normalized_cross_correlation(part.values.squeeze(-3), still, ground) for part in parts]
            return torch.stack(scores, -1)

    def field_of(self, found: LocalShifts) -> tuple[ShiftField, Tensor]:
        """The field of every frame (N,), and whether it may be kept."""
        corner = torch.full_like(found.coefficients[:, :, 0, 0], -self.spacing)
        field = ShiftField(found.coefficients, found.sigma, corner, -corner)
        return field, acceptable(found, self.max_deviation)

    def _lattice_options(self, like: Tensor) -> LatticeOptions:
        points = None if self.tie_points is None else self.tie_points.to(like)
        return LatticeOptions(self.spacing, None if self.smoothness == "auto" else self.smoothness, points)

    def _add_shifts(self, begun: Motion, pair: Pair, ground: Ground) -> Motion:
        moving, usable, reference, _ = pair
        lead, size = moving.shape[:-2], moving.shape[-2:]
        warp = begun.warp[..., :2, 2] if begun.only_shifts else begun.warp
        if math.prod(reference.shape[:-2]) != 1:  # one for all stays one
            ground = rows_for_frames(ground, reference.shape[:-2], lead)
        found = estimate_shifts(
            moving.reshape(-1, *size),
            ground,
            warp.reshape(-1, *warp.shape[len(lead) :]),
            None if usable is None else usable.expand(moving.shape).reshape(-1, *size),
            **self._lattice_options(moving)._asdict(),
        )
        field, kept = self.field_of(found)
        field, kept, covariance, inliers = with_lead((field, kept, found.covariance, found.inliers), lead)
        status = torch.where((begun.status == 0) & ~kept, int(Status.NOT_CONVERGED), begun.status)
        sigma = largest_sigma(covariance)
        return Motion(begun.warp, sigma, status, inliers, begun.only_shifts, covariance, field)

    def _estimate(self, job: Job) -> Judged:
        """The warp and the field are judged one after the other, as two stages; together they are one method."""
        block = self._prepare_block(job)
        begun = self.start._find_motion(job, block._replace(prepared=block.prepared.start))
        local = self._add_shifts(begun, block.pair(job), block.prepared.ground)
        estimate = self._judge([begun, local], [self.max_translation] * 2, job, block)
        estimate = flagged(estimate, self._common_enlargement(job, block) > 1)
        return Judged(estimate._replace(stage=estimate.stage.clamp(max=0)), begun.only_shifts)


def _check_tie_points(points: Tensor) -> Tensor:
    """(K, 5) float64."""
    expected = "finite numbers (K, 4) or (K, 5), on the reference, in the frame, and σ > 0"
    cure = "see torchalign.Local"
    check_floating(
        "tie_points", points, "(K, 4) or (K, 5)", "convert them with torch.as_tensor(points).float()"
    )
    if points.ndim != 2 or points.shape[1] not in {4, 5}:
        raise ValueError(message("tie_points", expected, tuple(points.shape), cure))
    points = points.detach().double()
    if points.shape[1] == 4:
        points = torch.cat((points, torch.full_like(points[:, :1], _TIE_SIGMA)), 1)
    if not bool(points.isfinite().all() & (points[:, 4] > 0).all()):
        raise ValueError(message("tie_points", expected, "other numbers", cure))
    return points


class _PreparedLocal(NamedTuple):
    start: Any
    ground: Ground
