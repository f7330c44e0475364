"""LGM: local features, matched, fitted and refined, the whole stack in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from torchalign._check import check_bool, check_cube, check_option, check_whole, like, message
from torchalign._host import is_on_host
from torchalign.aligner import (
    Aligner,
    Job,
    Pair,
    SharedOptions,
    full_precision,
    rows_for_frames,
    some_frames,
    undo_init,
    with_lead,
)
from torchalign.functional import affine, matching
from torchalign.functional.common_ground import agreement, fill_small_holes, shared_ground
from torchalign.functional.fourier import rfft2
from torchalign.functional.matching import INLIER_RADIUS, Matches, MotionFit
from torchalign.functional.motion import MotionModel, only_shifts
from torchalign.functional.phase import phase_correlation
from torchalign.functional.texture import Texture, extract_texture
from torchalign.functional.uncertainty import largest_sigma
from torchalign.functional.warp import resample
from torchalign.functional.working_grid import WorkingGrid
from torchalign.models.extractors import (
    SIFT,
    FeatureModel,
    Features,
    build_extractor,
    count_valid_rows,
    filled_rows,
)
from torchalign.models.weights import Weights
from torchalign.types import Motion, Status, combine, each_field

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LGM", "MatchedPoints"]

Matcher = Literal["guided", "mnn", "lightglue"]
Seen = Literal["local", "structure"]

_KEYPOINTS = 1024
# Where parts of the frame disagree, a translation that is known no better than this, in pixels, is ambiguous.
_LARGEST_SIGMA = 0.15

# A guided match may lie so far, in pixels, beyond what `max_translation` allows: a keypoint is not exact, and what
# is a little too far should be found to be.
_MARGIN = 3.0
# Radius of the second, guided matching around a first fit of more than a translation.
_SECOND_RADIUS = 6.0
_MAX_FREQUENCY = 0.25
# How far, in pixels, the peak of the correlation may lie from the whole pixel of the matches.
_REACH = 1.5
# Frames with a shorter side, in pixels, have no keypoints.
_LEAST_SIDE = 16
# Eager CPU: pixels of one block of frames, whose similarities of all points with all are what takes memory.
_BLOCK_PIXELS = 2**18
_BLOCK_SIMILARITIES = 2**22
# A translation beyond the limit must have so many times the matches of the one within.
_OUTSIDE_MARGIN = 1.2
# Matches must exceed what chance brings about by so much, see `significance`; unrelated scenes stay below
# (XFeat in 200 pairs: 5.3 at most).
_LEAST_EVIDENCE = 6.0


class MatchedPoints(NamedTuple):
    """Tie points, one row a frame; see :meth:`LGM.matches`.

    Attributes:
        points: (..., T, K, 2), (x, y) in pixels of the frame.
        reference_points: (..., T, K, 2), their matches in the reference.
        matched: (..., T, K) bool: whether a point has a match. Where not, both points are the frame's.
        weight: (..., T, K) in [0, 1]: how well the match agrees with the frame's motion; 0 where none was found.
    """

    points: Tensor
    reference_points: Tensor
    matched: Tensor
    weight: Tensor


class LGM(Aligner):
    r"""Motions of any size from local features: keypoints, matched, robustly fitted, refined by correlation.

    What correlation cannot give: shifts of any length, rotations, changes of scale. In five steps, which are
    functions of :mod:`torchalign.functional.matching`:

    1. keypoints and their descriptors, a fixed number for every frame (``feature_model``);
    2. matches (``matcher_model``). ``"guided"``: the mutually most similar among those that ``max_translation``
       allows; for more than a translation the mutually most similar of all, then once more around the first fit;
    3. the motion that most matches agree with, then Tukey-weighted least squares;
    4. a verdict on whether that many could agree by chance;
    5. correlation (``refine``): where the fit brings both to the same ground, cloud and change are separated
       from it pixel by pixel (:func:`~torchalign.functional.common_ground.shared_ground`). A translation is the
       peak of :func:`~torchalign.functional.phase.phase_correlation` over all the ground that both show. A richer
       motion is the one under which 128 windows of 32² pixels, at the matches that agree, correlate best.

    Bias: keypoints scatter by 0.1 to 0.5 px, and pull to the grid where a model does not place them between the
    pixels. After step 5 the bias is that of :class:`~torchalign.pcc.PCC`, less than 0.01 px; for more than a
    translation the frame is resampled (bicubic) before it is correlated, which adds about as much. See
    ``benchmarks/README.md``.

    ``max_translation`` bounds the displacement of the frame's *centre*. A rotation about a corner moves the centre
    far: raise the limit where frames may be rotated or shifted by much, the search costs the same.

    Args:
        feature_model: a name that :func:`~torchalign.models.extractors.build_extractor` knows, or a Module
            (image (B, H, W), usable (B, H, W) bool or None) →
            :class:`~torchalign.models.extractors.Features`. ``"sift"`` needs no weights.
        matcher_model: ``"guided"``, ``"mnn"`` (mutually most similar, wherever), ``"lightglue"``, or a Module
            (features, reference features, (H, W)) → :class:`~torchalign.functional.matching.Matches`.
        max_num_keypoints: of every frame. A Module finds its own number.
        motion: ``"translation"``, ``"euclidean"``, ``"similarity"``, ``"affine"`` or ``"homography"``.
        refine: do step 5. ``None`` is no for structure, else yes.
        contrast: ``"local"`` for one sensor. ``"structure"`` across sensors: directions in SIFT's descriptors count
            modulo π, and the gate compares the orientation of gradients, see :class:`~torchalign.PCC`. Step 5
            compares brightness: let ``ECC(contrast="structure")`` refine,
            ``Cascade(LGM(contrast="structure", motion=…), ECC(contrast="structure", motion=…))``.
        batch_size: frames whose features are held at a time; default: all (on the CPU, blocks of a few). Bounds the
            memory.
        feature_weights: of a named feature model: a path or a state dict; default: where they are found.
        matcher_weights: the same of LightGlue.
        allow_download: fetch missing weights from their official address.
        **shared: those of every method, see :class:`~torchalign.aligner.Aligner`.

    Raises:
        FileNotFoundError: weights that are needed are not here.

    Status: ``NO_TEXTURE`` without keypoints; ``TOO_FAR`` where many more matches agree on a translation beyond
    ``max_translation``; ``TOO_FEW_MATCHES`` where no more agree than chance could bring about; ``NOT_CONVERGED`` where
    a refined translation is known no better than to 0.15 px; then what the gate says.

    An ``init`` is undone about the frame's centre before features are extracted, and guided matches lie around
    its translation.

    References:
        Lowe 2004, doi:10.1023/B:VISI.0000029664.99615.94 (SIFT); Lindenberger et al. 2023, arXiv:2306.13643
        (LightGlue); for the fit, see :mod:`torchalign.functional.matching`.
    """

    def __init__(
        self,
        *,
        feature_model: FeatureModel | nn.Module = "sift",
        matcher_model: Matcher | nn.Module = "guided",
        max_num_keypoints: int = _KEYPOINTS,
        motion: MotionModel = "translation",
        refine: bool | None = None,
        contrast: Seen = "local",
        batch_size: int | None = None,
        feature_weights: Weights | None = None,
        matcher_weights: Weights | None = None,
        allow_download: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(**shared)
        self.motion = check_option("motion", motion, MotionModel)
        max_num_keypoints = check_whole("max_num_keypoints", max_num_keypoints)
        if isinstance(feature_model, nn.Module):
            own = getattr(feature_model, "max_num_keypoints", None)
            if max_num_keypoints not in (_KEYPOINTS, own):
                expected = f"no other number than that of {type(feature_model).__name__}, which finds its own"
                raise ValueError(message("max_num_keypoints", expected, max_num_keypoints, "leave it out"))
            max_num_keypoints = own if isinstance(own, int) else max_num_keypoints
        self.max_num_keypoints = max_num_keypoints
        self.batch_size = None if batch_size is None else check_whole("batch_size", batch_size)
        self.contrast = check_option("contrast", contrast, Seen)
        structure = contrast == "structure"
        self.refine = not structure if refine is None else refine
        check_bool("refine", self.refine)
        if structure and refine:
            cure = 'leave it out, and refine by ECC(contrast="structure") in a Cascade'
            raise ValueError(message("refine", 'False or None with contrast="structure"', refine, cure))
        if structure and isinstance(feature_model, str) and feature_model != "sift":
            expected, cure = '"sift" or a Module with contrast="structure"', "the others describe brightness"
            raise ValueError(message("feature_model", expected, repr(feature_model), cure))
        if structure and matcher_model == "lightglue":
            expected, cure = '"guided", "mnn" or a Module with contrast="structure"', "it matches brightness"
            raise ValueError(message("matcher_model", expected, repr(matcher_model), cure))
        check_bool("allow_download", allow_download)
        if not isinstance(matcher_model, nn.Module) and matcher_model not in get_args(Matcher):
            expected = f"one of {get_args(Matcher)} or a Module"
            raise ValueError(message("matcher_model", expected, repr(matcher_model), "choose one"))
        for name, weights, model, named in (
            ("feature_weights", feature_weights, feature_model, isinstance(feature_model, str)),
            ("matcher_weights", matcher_weights, matcher_model, matcher_model == "lightglue"),
        ):
            if weights is not None and not named:
                got = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
                expected = f"None with {got}, which takes none"
                raise ValueError(message(name, expected, _described(weights), "leave it out"))
        self.feature_model = feature_model if isinstance(feature_model, str) else type(feature_model).__name__
        self.matcher_model = matcher_model if isinstance(matcher_model, str) else type(matcher_model).__name__
        self.feature_weights = _described(feature_weights)
        self.matcher_weights = _described(matcher_weights)
        self.allow_download = allow_download
        if isinstance(feature_model, nn.Module):
            self.extractor = feature_model
        elif feature_model == "sift" and feature_weights is None:
            # frames that are not rotated are better described without a guess of their orientation
            upright = motion == "translation"
            self.extractor = SIFT(self.max_num_keypoints, upright=upright, unsigned=structure)
        else:
            self.extractor = build_extractor(
                feature_model,
                max_num_keypoints=self.max_num_keypoints,
                weights=feature_weights,
                allow_download=allow_download,
            )
        self.matcher: nn.Module | None = None
        if isinstance(matcher_model, nn.Module):
            self.matcher = matcher_model
        elif matcher_model == "lightglue":
            from torchalign.models.lightglue import build_matcher  # a network, of which most have no need

            self.matcher = build_matcher(
                self.feature_model, weights=matcher_weights, allow_download=allow_download
            )

    def prepare_reference(self, image: Tensor, usable: Tensor | None) -> _Reference | None:
        """The reference's keypoints and texture, see :meth:`Aligner.prepare_reference`."""
        if _is_nothing(image):
            return None
        images, masks = image.reshape(-1, *image.shape[-2:]), _flat(usable, image)
        parts = [
            self._extract(images[rows], None if masks is None else masks[rows])
            for rows in self._slices(images, self.max_num_keypoints)
        ]
        features = _trimmed(combine(torch.cat, parts))
        texture = extract_texture(image, usable, max_frequency=_MAX_FREQUENCY) if self.refine else None
        return _Reference(features, texture, tuple(image.shape[:-2]))

    def estimate_motion(self, pair: Pair, prepared: _Reference | None, init: Tensor | None) -> Motion:
        """See :meth:`Aligner.estimate_motion`."""
        moving = pair.moving
        lead = moving.shape[:-2]
        if prepared is None or _is_nothing(moving):
            homography = self.motion == "homography"
            warp = affine.identity_warp(
                *lead, homography=homography, device=moving.device, dtype=moving.dtype
            )
            status = torch.full(lead, int(Status.NO_TEXTURE), device=moving.device)
            return Motion(warp, torch.full_like(warp[..., 0, 0], torch.inf), status)
        parts = [self._find(part) for part in self._parts(pair, prepared, init)]
        found = with_lead(combine(torch.cat, parts), lead)
        return found._replace(only_shifts=only_shifts(self.motion, init))

    @like(Aligner.estimate)
    def matches(self, cube: Tensor, reference: Tensor, *given: Any, **named: Any) -> MatchedPoints:
        """The tie points that the estimate is made from, for pictures and for export; errors as of :meth:`estimate`.

        Returns:
            :class:`MatchedPoints`, in pixels of the whole frame.
        """
        check_cube(cube)
        with full_precision(cube):
            job = self._check(cube, reference, *given, **named)
            return combine(torch.cat, [self._tie_points(job.part(rows)) for rows in self._blocks(job)])

    def _block_pixels(self) -> int:
        return _BLOCK_PIXELS

    def _extract(self, image: Tensor, usable: Tensor | None) -> Features:
        """Keypoints of (N, H, W), in the dtype of the image."""
        # keypoints are chosen, not computed: gradients reach the images through the refinement
        image = image.detach()  # those of forward mode, which no_grad lets through
        with torch.no_grad():
            if usable is not None:  # a descriptor is as wide as many pixels: one that is missing spoils none
                image, usable = fill_small_holes(image, usable)
            features: Features = self.extractor(image, usable)
        return features._replace(
            keypoints=features.keypoints.to(image.dtype), descriptors=features.descriptors.to(image.dtype)
        )

    def _parts(self, pair: Pair, prepared: _Reference, init: Tensor | None) -> list[_Part]:
        """The frames (N, H, W), in parts of ``batch_size``, each with what it needs of the reference."""
        moving, usable, reference, reference_usable = pair
        lead = moving.shape[:-2]
        features, texture, have = prepared
        if math.prod(have) != 1:  # one for all stays one
            features = rows_for_frames(features, have, lead)
        field, weights = (None, None) if texture is None else texture[:2]
        images = (reference, reference_usable, field, weights)
        images = each_field(images, lambda image: image.reshape(-1, *image.shape[-2:]))
        start = None if init is None else init.reshape(-1, *init.shape[len(lead) :])
        frames = moving.reshape(-1, *moving.shape[-2:])
        references = rows_for_frames(images, have, lead)
        whole = _Part(frames, _flat(usable, moving), features, *references, start)
        keypoints = max(self.max_num_keypoints, features.keypoints.shape[-2])
        return [some_frames(whole, rows) for rows in self._slices(frames, keypoints)]

    def _slices(self, frames: Tensor, keypoints: int) -> list[slice]:
        """Which of the frames (N, H, W) are worked on at a time."""
        count = self.batch_size
        if is_on_host(frames.detach()):  # small frames have as many similarities as large ones
            most = max(1, _BLOCK_SIMILARITIES // keypoints**2)
            count = most if count is None else min(count, most)
        # without a limit the number of frames is not asked for: a trace may leave it open
        if count is None or frames.shape[0] <= count:
            return [slice(None)]
        return [slice(first, first + count) for first in range(0, frames.shape[0], count)]

    def _correspond(self, part: _Part) -> _Found:
        """Keypoints, matches, the motion they agree on, and whether it is significant."""
        size = (part.moving.shape[-2], part.moving.shape[-1])
        moving, usable, start, about_centre = undo_init(part.init, part.moving, part.usable)
        features, others = self._extract(moving.detach(), usable), part.features
        rows = features.keypoints.shape[-2]
        features = _trimmed(features)
        everyone = others.keypoints.expand(moving.shape[0], -1, -1)  # (N, K, 2)
        points, motion = features.keypoints, self.motion
        area = size[0] * size[1]
        everywhere = math.pi * INLIER_RADIUS**2 / area

        def fit(
            matches: Matches, chance: float, warp: Tensor | None = None
        ) -> tuple[MotionFit, Tensor, Tensor]:
            targets = everyone.gather(-2, matches.index.clamp(min=0).unsqueeze(-1).expand(points.shape))
            weight = matches.weight * (matches.index >= 0)
            matched = matching.Correspondences(points, targets, weight, size)
            if warp is None:
                warp = matching.consensus(matched, motion=motion)
            found = matching.reweighted_fit(warp, matched, motion=motion)
            return (
                found,
                matching.significance(found.inliers, found.matches, min(1.0, chance), motion=motion),
                targets,
            )

        too_far = torch.zeros_like(features.valid[..., 0])
        if self.matcher is not None:
            matches: Matches = self.matcher(features, others, size)
            found, evidence, targets = fit(matches, everywhere)
        else:
            similarity = torch.matmul(features.descriptors, others.descriptors.mT)  # (N, K, L)
            valid = (features.valid, others.valid)
            limit = self.max_translation + _MARGIN

            def match(expected: Tensor | None = None, radius: float | None = None) -> Matches:
                there = others.keypoints
                return matching.mutual_matches(
                    similarity, *valid, expected=expected, others=there, radius=radius
                )

            matches = match()
            if self.matcher_model == "mnn":
                found, evidence, targets = fit(matches, everywhere)
            elif motion == "translation":
                anywhere, far_evidence, _ = fit(matches, everywhere)
                matches = match(points if start is None else points + start.unsqueeze(-2), limit)
                found, evidence, targets = fit(matches, (INLIER_RADIUS / limit) ** 2)
                beyond = anywhere.warp[..., 2].norm(dim=-1) > self.max_translation
                clearly = anywhere.inliers > _OUTSIDE_MARGIN * found.inliers
                too_far = beyond & clearly & (far_evidence >= _LEAST_EVIDENCE)
            else:
                if start is not None:
                    matches = match(points + start.unsqueeze(-2), limit)
                found, _, _ = fit(matches, everywhere)
                matches = match(affine.transform_points(found.warp, points), _SECOND_RADIUS)
                found, evidence, targets = fit(matches, (INLIER_RADIUS / _SECOND_RADIUS) ** 2, found.warp)

        status = torch.where(evidence >= _LEAST_EVIDENCE, 0, int(Status.TOO_FEW_MATCHES))
        status = torch.where(too_far, int(Status.TOO_FAR), status)
        empty = ~(features.valid.any(-1) & others.valid.any(-1))
        status = torch.where(empty, int(Status.NO_TEXTURE), status)
        return _Found(points, targets, matches.index >= 0, found, status, about_centre, rows)

    def _find(self, part: _Part) -> Motion:
        """The motion of the matches; refined by correlation, where that brings both to the same ground."""
        found = self._correspond(part)
        warp, covariance, inliers = found.fit.warp, found.fit.covariance, None
        if self.refine and self.motion == "translation":
            return self._correlated(part, found, warp.detach())
        if self.refine:
            ground = None
            for _ in range(2):  # windows that show the same ground do not pull; after the first pass they do
                warp, covariance, inliers, ground = self._ascended(
                    part, found, warp.detach(), covariance, ground
                )
        sigma = largest_sigma(covariance)
        return Motion(found.whole(warp), sigma, found.status, inliers, covariance=covariance)

    def _on_reference(self, part: _Part, found: _Found, warp: Tensor) -> tuple[Tensor, Tensor]:
        """The frames (N, H, W) on the reference, and where both are usable."""
        moved = resample(
            part.moving.unsqueeze(-3), found.whole(warp), interpolation="bicubic", mask=part.usable
        )
        usable = moved.validity if part.reference_usable is None else moved.validity & part.reference_usable
        return moved.values.squeeze(-3), usable

    def _correlated(self, part: _Part, found: _Found, rough: Tensor) -> Motion:
        """A translation: the whole of the ground that both show, correlated."""
        size = (part.moving.shape[-2], part.moving.shape[-1])
        assert part.texture is not None
        # by whole pixels, the rest in the spectral domain: nothing is interpolated
        whole = rough[..., 2].round()
        left = rough[..., 2] - whole
        moved, usable = self._on_reference(part, found, affine.translation_warp(whole))
        on_it, there = self._on_reference(part, found, rough)
        with torch.no_grad():
            field = extract_texture(moved, usable, max_frequency=_MAX_FREQUENCY).field
            grid = WorkingGrid.of(size, (field.shape[-2], field.shape[-1]), _MAX_FREQUENCY, field)
            same = agreement(grid.move(rfft2(field), left), part.texture, fine=True)
        ground = usable & shared_ground(on_it, part.reference, same, usable & there)
        texture = Texture(part.texture, part.weights, torch.zeros_like(found.status, dtype=torch.bool))
        refined = phase_correlation(
            moved,
            texture,
            ground,
            max_translation=_REACH,
            max_frequency=_MAX_FREQUENCY,
            start=left,
            fixed_at=-whole,
        )
        assert refined.inliers is not None
        better = refined.converged
        shift = torch.where(better.unsqueeze(-1), whole + refined.shift, rough[..., 2])
        covariance = torch.where(better[..., None, None], refined.covariance, found.fit.covariance)
        status = torch.where(
            (found.status == 0) & better & refined.ambiguous, int(Status.AMBIGUOUS), found.status
        )
        warp, sigma = found.whole(affine.translation_warp(shift)), largest_sigma(covariance)
        known = sigma.square() - torch.where(better, refined.misfit, 0.0) <= _LARGEST_SIGMA**2
        status = torch.where((status == 0) & ~known, int(Status.NOT_CONVERGED), status)
        distorted = sigma > _LARGEST_SIGMA
        return Motion(warp, sigma, status, refined.inliers, covariance=covariance, distorted=distorted)

    def _ascended(
        self, part: _Part, found: _Found, rough: Tensor, covariance: Tensor, ground: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A richer motion: windows around the matches that agree."""
        size = (part.moving.shape[-2], part.moving.shape[-1])
        assert part.texture is not None
        moved, usable = self._on_reference(part, found, rough)
        shared = usable if ground is None else usable & ground
        texture = extract_texture(moved, shared, max_frequency=_MAX_FREQUENCY)
        assert texture.weights is not None
        # holes must lie on the same ground in both, else their pattern is correlated
        field, reference_field = texture.field, part.texture * texture.weights
        if part.weights is not None:
            field = field * part.weights
        refined = matching.window_ascent(
            field,
            reference_field,
            found.targets,
            found.fit.weight,
            size,
            motion=self.motion,
            max_frequency=_MAX_FREQUENCY,
        )
        better = refined.converged
        warp = torch.where(better[..., None, None], affine.compose_warps(rough, refined.warp), rough)
        same = agreement(field.detach(), reference_field, fine=True)
        ground = shared_ground(moved.detach(), part.reference, same, usable)
        inliers = agreement(field, reference_field)
        covariance = torch.where(better[..., None, None], refined.covariance, covariance)
        return warp, covariance, inliers, ground

    def _tie_points(self, job: Job) -> MatchedPoints:
        """Those of a block."""
        block = self._prepare_block(job)
        lead = block.moving.shape[:-2]
        if block.prepared is None or _is_nothing(block.moving):
            nowhere = block.moving.new_zeros(*lead, self.max_num_keypoints, 2)
            none = torch.zeros_like(nowhere[..., 0], dtype=torch.bool)
            return MatchedPoints(nowhere, nowhere, none, nowhere[..., 0])
        parts = self._parts(block.pair(job), block.prepared, block.init)
        return with_lead(
            combine(torch.cat, [self._tie_points_of(part, block.origin) for part in parts]), lead
        )

    def _tie_points_of(self, part: _Part, origin: tuple[int, int]) -> MatchedPoints:
        found = self._correspond(part)
        points = found.points
        if found.about_centre is not None:
            points = affine.transform_points(affine.invert_warp(found.about_centre), points)
        points = points.nan_to_num(0.0, 0.0, 0.0)  # an init may be singular
        offset = torch.stack([points.new_full((), side) for side in origin])
        targets = torch.where(found.matched.unsqueeze(-1), found.targets, points)
        weight = found.fit.weight * (found.status == 0).unsqueeze(-1)
        return filled_rows(
            MatchedPoints(points + offset, targets + offset, found.matched, weight), found.rows
        )


class _Reference(NamedTuple):
    features: Features  # of B frames
    texture: Texture | None
    lead: tuple[int, ...]  # the shape of these B


class _Part(NamedTuple):
    """N frames, and what each is compared with."""

    moving: Tensor  # (N, H, W)
    usable: Tensor | None  # (N, H, W)
    features: Features  # of the reference, of one row for all or one each
    reference: Tensor  # (N, H, W)
    reference_usable: Tensor | None  # (N, H, W)
    texture: Tensor | None  # (N, h, w), of the reference
    weights: Tensor | None  # (N, h, w)
    init: Tensor | None  # (N, 2|3, 3), or shifts (N, 2)


class _Found(NamedTuple):
    points: Tensor  # (N, K, 2), in the frame as it was extracted from
    targets: Tensor  # (N, K, 2)
    matched: Tensor  # (N, K) bool
    fit: MotionFit
    status: Tensor  # (N,)
    about_centre: Tensor | None  # what of an init was undone before
    rows: int  # K before those were dropped in which no frame has a keypoint

    def whole(self, warp: Tensor) -> Tensor:
        """A warp of the points' frames as one of the frames that came."""
        return warp if self.about_centre is None else affine.compose_warps(self.about_centre, warp)


def _is_nothing(image: Tensor) -> bool:
    """No frames, or frames too small for a keypoint and its surroundings."""
    return min(image.shape[-2:]) < _LEAST_SIDE or 0 in image.shape


def _flat(usable: Tensor | None, image: Tensor) -> Tensor | None:
    return None if usable is None else usable.expand(image.shape).reshape(-1, *image.shape[-2:])


def _trimmed(features: Features) -> Features:
    """Without the last rows, where no frame has a keypoint, if that may be read: what follows grows as K²."""
    count = count_valid_rows(features.valid)
    return each_field(features, lambda field: field[:, :count])


def _described(weights: Weights | None) -> str | None:
    """Weights as a repr shows them."""
    return "a state dict" if isinstance(weights, Mapping) else None if weights is None else str(weights)
