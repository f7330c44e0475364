r"""Enhanced correlation coefficient maximisation of whole stacks: masked, robust, differentiable.

The criterion is the enhanced correlation coefficient of Evangelidis & Psarakis: with :math:`\bar m, \bar r` the
warped moving frame and the reference, less their (weighted) means,

.. math:: \rho(W) = \frac{\sum w\, \bar m(W^{-1} p)\, \bar r(p)}{\|\bar m\|_w\, \|\bar r\|_w}

Gain and offset do not change it. It is maximised by the inverse compositional algorithm (Baker & Matthews): the
*reference* is linearised, so its gradients and their products are computed once for all frames and iterations. A
step costs one sampling of the moving frame and a few inner products. In this library's convention the increment is
composed on the left of the warp moving → reference: :math:`W \leftarrow \Delta W \circ W`.

The chain, each link a function:

1. :func:`~torchalign.functional.levels.prepare_levels`: what is correlated, from coarse to fine, the gradients of the
   reference and what follows from them.
2. :mod:`torchalign.functional.moving_frames`: the frames under a warp.
3. :mod:`torchalign.functional.normal_equations`: each level computes weights, then takes steps. The finest level runs
   twice, first with every fourth sample where sampling dominates the cost. A level that lowers the correlation is undone.
4. σ: the sandwich estimate from the scatter of the pulls of small blocks.
5. :func:`implicit_step`: one last step that carries the gradient of the implicit function theorem.

References:
    Evangelidis & Psarakis 2008, doi:10.1109/TPAMI.2008.113; Baker & Matthews 2004,
    doi:10.1023/B:VISI.0000011205.11775.fd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchalign._check import message
from torchalign._host import all_true, carries_gradient, keeps_tables
from torchalign.functional import uncertainty
from torchalign.functional.affine import (
    are_finite,
    composed,
    finite_warp,
    from_homogeneous,
    to_homogeneous,
    unit_matrix,
)
from torchalign.functional.common_ground import agreement
from torchalign.functional.levels import (
    Level,
    every_second,
    extract_textures,
    far_level,
    for_parts,
    inner,
    prepare_levels,
    unflatten,
)
from torchalign.functional.masked_correlation import best_shift
from torchalign.functional.motion import (
    MotionModel,
    denormalize,
    half_length,
    jacobian,
    normalize,
    only_shifts,
    warp_of,
)
from torchalign.functional.moving_frames import (
    Climb,
    Frames,
    ShiftedFrames,
    WarpedFrames,
    WarpedSamples,
    shift_of,
    shifted_by,
)
from torchalign.functional.normal_equations import (
    Increment,
    Moments,
    System,
    scatter_of_blocks,
    shorten,
    weighted_moments,
    weighted_system,
)
from torchalign.functional.smoothing import block_sums, nanmedian
from torchalign.functional.texture import Contrast
from torchalign.types import each_field

__all__ = ["EnhancedCorrelation", "Gradients", "Robust", "enhanced_correlation", "implicit_step"]

Robust = Literal["agreement", "residual", "none"]
Gradients = Literal["implicit", "unrolled"]

# From beyond the reach of a climb all translations are compared first, under no turn and under these, in degrees.
_TURNS = (-7.0, 7.0)
# Eight parameters fit part of a frame, which then has all of the weight: they are weighted so many times more.
_MORE_WEIGHTS = 2
# Where the steps of the first round on the finest level end, in pixels: what a bilinear sampling can tell.
_NEAR = 0.1
# A correlation must stand this many standard deviations out of that of unrelated scenes.
_MIN_SIGNIFICANCE = 5.0
# Of vectors, the parts of which are not independent of each other, this many (benchmarks/sensors.py).
_MIN_SIGNIFICANCE_OF_VECTORS = 6.0
# And this many more where it is the best of many places.
_OF_MANY = 1.0
# Then blocks of 2² samples a side must tell it as well: chance has so many standard deviations within 5 pixels.
_BLOCK_OF_FACTS, _LEAST_OF_BLOCKS = 2, 2.2
# Share of a level's samples that are independent.
_INDEPENDENT = 0.35
# Blocks of 2³ samples a side, whose pulls are taken to be independent.
_BLOCK = 3
# Errors on simulated frames of all kinds exceed what the sandwich predicts by this factor.
_SIGMA_CALIBRATION = 1.1
# Across sensors: the factor; and, each showing edges of its own, an error of so many pixels per axis for what is not
# in common (benchmarks/sensors.py).
_STRUCTURE_CALIBRATION, _STRUCTURE_ERROR = 1.3, 0.25
# The coefficient is divided by what the weights overlap, but for this.
_WEIGHTS_SHARE = 0.5
# A direction along which less than this share of the slope is the ground's is ambiguous.
_LEAST_SHARE = 0.35


class EnhancedCorrelation(NamedTuple):
    """What :func:`enhanced_correlation` finds, one row a frame.

    Attributes:
        warp: (..., T, 2, 3), or (..., T, 3, 3) for a homography (or where ``init`` was one).
        sigma: (..., T), predicted 1-σ error of the displacement of the frame's centre, in pixels, along the larger
            axis of ``covariance``.
        covariance: (..., T, 2, 2), of the displacement of the frame's centre, px².
        significance: (..., T), the correlation in standard deviations of that of unrelated scenes.
        flat: (..., T) bool, no texture or too few usable pixels in frame or reference.
        converged: (..., T) bool, the last step was short, the Hessian has an inverse, the correlation is
            significant, and where all translations were compared, enough parts of the frame tell it.
        ambiguous: (..., T) bool, along some direction the slope of the reference is noise.
        inliers: (..., T, h, w), weights in [0, 1] over the reference: where both show the same ground. ``None``
            if not asked for (``robust="none"``).
    """

    warp: Tensor
    sigma: Tensor
    covariance: Tensor
    significance: Tensor
    flat: Tensor
    converged: Tensor
    ambiguous: Tensor
    inliers: Tensor | None


def enhanced_correlation(
    moving: Tensor,
    reference: Tensor | Sequence[Level],
    moving_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    motion: MotionModel = "affine",
    init: Tensor | None = None,
    max_translation: float = 0.0,
    levels: int | None = None,
    max_iterations: int = 4,
    tolerance: float = 0.02,
    max_frequency: float = 0.25,
    contrast: Contrast = "local",
    sigma_blur: float = 0.0,
    taper: float = 0.15,
    robust: Robust = "agreement",
    gradients: Gradients = "implicit",
) -> EnhancedCorrelation:
    """The warp that brings every moving frame onto the reference. See the module's docstring.

    Args:
        moving: (..., T, H, W), float32 or float64, finite.
        reference: (..., 1 or T, H, W); or its levels, see
            :func:`~torchalign.functional.levels.prepare_levels`, with the same options.
        moving_mask: bool, broadcastable to ``moving``, True = usable; ``None`` if all of it is.
        reference_mask: the same for ``reference``.
        motion: what is estimated; see :data:`~torchalign.functional.motion.MotionModel`.
        init: (..., T, 2 or 3, 3), a warp moving → reference to start from, or (..., T, 2), a shift (x, y) in
            pixels; ``None`` for none. What the motion model lacks (the rotation of an init, for a translation)
            is kept as it is. A frame whose init is no number starts from the identity, and has not converged.
        max_translation: of the frame's centre, in pixels. Where a climb alone does not reach so far, all translations
            are compared first, under a few rotations if the motion has any; one beyond it wins if it fits better by a
            fifth. See :func:`~torchalign.functional.levels.far_level`.
        levels: of the pyramid; ``None`` for as many as leave 20 samples along the shorter side, 8 of frames
            of 100 and more.
        max_iterations: on each level, and for each set of weights.
        tolerance: a frame has converged when a step moves no point of it by more, in pixels.
        max_frequency: the band that is used on the finest level, in cycles per pixel.
        contrast: ``"local"``, ``"none"`` or ``"structure"``, see
            :func:`~torchalign.functional.texture.extract_texture`. Orientations turn as the warp does.
        sigma_blur: σ in pixels of a Gaussian that both images are blurred with.
        taper: share of each axis over which the window falls off, in [0, 1].
        robust: ``"agreement"`` weights samples by the local correlation of the two frames around them,
            ``"residual"`` by Tukey's biweight of their difference, ``"none"`` alike.
        gradients: ``"implicit"`` by the implicit function theorem at the optimum, ``"unrolled"`` through all
            iterations.

    Returns:
        :class:`EnhancedCorrelation`. Never NaN, whatever the data.

    Raises:
        ValueError: the levels are of frames of another size, or for another motion.

    Example:
        >>> grid = torch.arange(96.0)
        >>> def scene(x, y):
        ...     waves = torch.tensor([[0.5, 0.4], [0.31, -0.77], [-0.9, 0.1], [0.2, 0.9], [0.7, 0.6]])
        ...     return sum(torch.sin(a * x + b * y + 7 * a) for a, b in waves)
        >>> reference = scene(grid, grid[:, None])[None]
        >>> moving = scene(1.01 * grid + 0.8, 1.01 * grid[:, None] - 0.6)[None]
        >>> enhanced_correlation(moving, reference, motion="similarity").warp.round(decimals=2)
        tensor([[[ 1.0100, -0.0000,  0.8000],
                 [ 0.0000,  1.0100, -0.6000]]])
    """
    frame = (moving.shape[-2], moving.shape[-1])
    seen: dict[str, Any] = {"contrast": contrast, "sigma_blur": sigma_blur}
    if isinstance(reference, Tensor):
        band: dict[str, Any] = {"max_frequency": max_frequency, "levels": levels}
        reference = prepare_levels(reference, reference_mask, motion=motion, taper=taper, **band, **seen)
    grids = [level.grid for level in reference]
    if grids[0].frame != frame:
        expected, cure = f"levels of frames of {frame}", "prepare_levels of that size"
        raise ValueError(message("reference", expected, grids[0].frame, cure))
    if reference[0].motion != motion:
        expected, cure = f"levels for {motion}", "prepare_levels for that motion"
        raise ValueError(message("reference", expected, reference[0].motion, cure))
    textures = extract_textures(moving, moving_mask, grids, motion, **seen)
    shape = torch.broadcast_shapes(moving.shape[:-2], reference[0].flat.shape)  # type: ignore[no-untyped-call]
    only_shifted = only_shifts(motion, init)
    # (a shift is (..., T, 2))
    homography = motion == "homography" or (init is not None and init.shape[-1] == init.shape[-2] == 3)
    start, finite = _finite_start(init, frame, shape, moving)
    pyramid: list[Frames] = [
        ShiftedFrames.of(texture, grid, taper)
        if only_shifted
        else WarpedFrames.of(texture, grid, taper, homography)
        for texture, grid in zip(textures, grids, strict=True)
    ]

    far = far_level(reference, max_translation, init)
    search = _Search(robust, max_iterations, tolerance, max_translation, far)
    finest, frames = reference[0], pyramid[0]
    if gradients == "unrolled":
        state = search.descend(start, reference, pyramid)
        warp = state.warp
    else:
        fixed = each_field((tuple(reference), tuple(pyramid)), Tensor.detach)
        state = search.descend(start.detach(), *fixed)
        warp = state.warp
        if carries_gradient(finest.field, frames[0]):
            warp = implicit_step(state, finest, frames)
        if carries_gradient(start):
            # the optimum does not move with where the search began: the derivative is exactly 0
            warp = warp + 0.0 * (start - start.detach())
    found = each_field(_assess(state, each_field(finest, Tensor.detach), search), Tensor.detach)
    warp = _settle(warp)
    # a shift by itself is the same about any centre
    warp = shifted_by(shift_of(warp, finest.grid)) if only_shifted else denormalize(warp, frame)
    return found._replace(
        warp=warp if homography else from_homogeneous(warp),
        flat=(finest.flat | frames.flat).expand(shape),
        converged=found.converged & finite,
        inliers=state.inliers,
    )


def _finite_start(
    init: Tensor | None, frame: tuple[int, int], shape: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalised (..., T, 3, 3), the identity where an init is no number; and where (..., T) it is one."""
    if init is None:
        none = torch.ones(*shape, dtype=torch.bool, device=like.device)
        return unit_matrix(3, like=like).expand(*shape, 3, 3), none
    shifted = init.shape[-1] == 2
    start = shifted_by(init / half_length(frame)) if shifted else normalize(to_homogeneous(init), frame)
    return finite_warp(start.expand(*shape, 3, 3))


class _State(NamedTuple):
    """Where the search stands."""

    warp: Tensor  # (..., T, 3, 3), normalised
    reach: Tensor  # (..., T), of the last step, in pixels
    values: Tensor  # (..., T, n), the moving frame there
    common: Tensor  # (..., T, n) in [0, 1], the ground that both have
    system: System
    inliers: Tensor | None  # (..., T, h, w)


class _Search(NamedTuple):
    """The options of the search."""

    robust: Robust
    max_iterations: int
    tolerance: float
    max_translation: float
    far: int | None

    def descend(self, start: Tensor, levels: Sequence[Level], pyramid: Sequence[Frames]) -> _State:
        """From the coarsest level to the finest; there once more, with weights and samples from nearby."""
        if self.far is not None:
            level, frames = levels[self.far], pyramid[self.far]
            found = frames.look(self.look_far(start, level, frames), level, precise=False)
            start = _better_of(start, found, level, frames).warp
        warp = start
        for number in reversed(range(len(levels))):
            level = rough = levels[number]
            frames, near = pyramid[number], _NEAR * level.grid.spacing()
            if number == 0:
                near = max(_NEAR, self.tolerance)
                if isinstance(frames, WarpedFrames):
                    # samples are what costs, and every fourth will do to come near
                    rough = every_second(level)
            for time in range(1 + (_MORE_WEIGHTS if level.motion == "homography" else 0)):
                samples = frames.look(warp, rough, precise=False)
                if time == 0 and number < len(levels) - 1:
                    samples = _better_of(start, samples, rough, frames)
                warp = self._replace(tolerance=near).climb(samples, rough, frames, precise=False).warp
        samples = frames.look(warp, level, precise=True)
        return self.climb(samples, level, frames, precise=True)

    def least_of_blocks(self, level: Level) -> float:
        """What chance reaches rises with the places and turns that are compared, as the maximum of so many does."""
        turns = 1 if level.motion == "translation" else 1 + len(_TURNS)
        places = max(self.max_translation / 5, 1.0) ** 2 * turns
        return math.sqrt(_LEAST_OF_BLOCKS**2 + 2 * math.log(places))

    def look_far(self, start: Tensor, level: Level, moving: Frames) -> Tensor:
        """(..., T, 3, 3): of all translations, under what else the start does and a few turns, what fits best."""
        still = composed(start.detach(), shifted_by(-start[..., :2, 2].detach()))
        turns = [still]
        if level.motion != "translation":
            turns += [composed(still, _rotation(degrees, like=still)) for degrees in _TURNS]
        alone, size = level._replace(weights=torch.ones_like(level.weights)), level.grid.size

        def fields(values: Tensor) -> Tensor:
            """(K, ..., T, h, w), of (..., T, n)."""
            return torch.stack([unflatten(part, size) for part in values.chunk(1 + level.vector, -1)])

        reference = fields(level.texture), unflatten(level.weights, size)
        limits: dict[str, Any] = {"spacings": level.grid.spacings(), "reach": self.max_translation}
        found = []
        for turn in turns:
            _, values, ground = moving.look(turn, alone, precise=False)
            ground = unflatten(ground[..., : level.x.shape[0]], size)  # that of both parts
            found.append(best_shift(fields(values), ground, *reference, **limits))
        shifts, heights = (torch.stack(each) for each in zip(*found, strict=True))
        best = heights.argmax(0, keepdim=True)[..., None]
        shift = shifts.gather(0, best.expand(*best.shape[:-1], 2)).squeeze(0)
        turn = torch.stack(turns).gather(0, best[..., None].expand(*best.shape[:-1], 3, 3)).squeeze(0)
        return composed(turn, shifted_by(shift / half_length(level.grid.frame)))

    def climb(self, samples: WarpedSamples, level: Level, moving: Frames, *, precise: bool) -> _State:
        """Weights, then steps, until none moves a point of a frame by more than the tolerance.

        A frame that has converged stays as it is while others go on. Where it may be read that all have, the
        steps end.
        """
        warp, values, common = samples
        inliers = self._inliers(values, common, level)
        weights = common if inliers is None else common * for_parts(inliers.flatten(-2), level.vector)
        system = weighted_system(weights.square(), level)
        moves = (level.flat | moving.flat).logical_not()
        limits = self.max_iterations, self.tolerance
        ascended = moving.ascend(Climb(warp, moves, system, limits, precise), level)
        if ascended is not None:
            warp, reach, found = ascended  # of steps that are not precise only the warp is wanted
            return _State(warp, reach, values if found is None else found, common, system, inliers)
        reach = torch.zeros_like(warp[..., 0, 0])
        for iteration in range(self.max_iterations):
            if iteration > 0:
                # what is said of a frame must not depend on how long the others take
                found = moving.values(warp, level, precise=precise)
                values = _choose_frames(moves[..., None], found, values)
            increment, last = shorten(Increment.of(values, level, system).step, level)
            stepped = moving.stepped(warp, increment, level)
            warp = torch.where(moves[..., None, None], stepped, warp)
            reach = torch.where(moves, last, reach)
            moves = moves & (last > self.tolerance)
            if all_true(~moves):
                break
        return _State(warp, reach, values, common, system, inliers)

    def _inliers(self, values: Tensor, common: Tensor, level: Level) -> Tensor | None:
        """(..., T, h, w), how much a sample shows the same in both."""
        if self.robust == "none":
            return None
        size = level.grid.size
        if self.robust == "residual":
            found = _weights_of_difference(values, common, level)
            # a vector is an inlier if both its parts are
            found = torch.minimum(*found.chunk(2, -1)) if level.vector else found
            return unflatten(found, size)
        ours, window = values * common, unflatten(level.weights, size)
        if not level.vector:
            return agreement(unflatten(ours, size), level.field * window)
        ours, theirs = (
            torch.stack(field.chunk(2, -2)) for field in (unflatten(ours, level.size), level.field)
        )
        return agreement(ours, theirs * window, vector=True)


def _better_of(start: Tensor, found: WarpedSamples, level: Level, moving: Frames) -> WarpedSamples:
    """The start, where a coarser level lowered the correlation (its clouds have more contrast than the ground)."""
    both = found, moving.look(start, level, precise=False)
    scores = []
    for _, values, common in both:
        weighted = common * values
        product = inner(weighted, level.texture.unsqueeze(-2))
        norm = torch.linalg.vecdot(weighted, values)[..., None] * inner(common, level.squares.unsqueeze(-2))
        scores.append(product * torch.rsqrt(norm + torch.finfo(norm.dtype).tiny))
    worse = scores[1] > scores[0]  # (..., T, 1)
    return WarpedSamples(
        torch.where(worse[..., None], both[1].warp, both[0].warp),
        *(_choose_frames(worse, one, other) for one, other in zip(both[1][1:], both[0][1:], strict=True)),
    )


def _choose_frames(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Frame by frame, of finite (..., T, n): exact, and on the CPU much faster than ``torch.where``."""
    return torch.lerp(second, first, condition.to(first.dtype))


def _weights_of_difference(values: Tensor, common: Tensor, level: Level) -> Tensor:
    """Tukey's biweight of the difference of the two textures, in units of its median."""
    difference = values - level.field.flatten(-2)
    # a quarter of the samples gives the same median, and sorting dominates the cost
    known = difference.detach().abs().masked_fill(common < 0.5, torch.nan)[..., ::4]
    spread = nanmedian(known)[..., None].nan_to_num(1.0) / 0.6745
    ratio = difference / (4.685 * spread + torch.finfo(values.dtype).tiny)
    return (1 - ratio.square()).clamp(min=0).square()


def _assess(state: _State, level: Level, search: _Search) -> EnhancedCorrelation:
    r"""How far the optimum can be trusted.

    σ is the sandwich estimate: at the optimum every sample pulls, by :math:`w\,(\alpha \bar m - \bar r)\,\bar G`,
    and the pulls sum to zero; those of neighbours are alike, so their sums over blocks are taken to be independent,

    .. math:: \mathrm{Cov} = H^{-1} \Big( \sum_b s_b s_b^T \Big) H^{-1}

    of which the displacement of the frame's centre is told. Noise makes H larger than the curvature that it stands
    for, and the weights favour samples whose noise happens to agree: divided by the fourth power of the
    correlation, σ fits what simulated frames of all kinds err (``benchmarks/accuracy.py``). The significance is
    the correlation over the whole common ground, inliers or not, in units of its standard deviation between
    unrelated scenes.
    """
    system, values = state.system, state.values
    seen = weighted_moments(values, level, system.weights)
    # α m̄ − r̄, α by least squares
    slope = seen.covariance / seen.variance
    offset = seen.other_mean - slope * seen.mean
    residual = torch.addcmul(offset[..., None] - level.texture, slope[..., None], values)
    pull, certainty = residual, seen.correlation.square().square()
    if level.vector:
        # across sensors little is common: r̄ is to be told of m̄ by what it is multiplied with there, not the
        # other way round, and then nothing is to be divided by
        correlation = seen.correlation.square().clamp(min=torch.finfo(values.dtype).eps)
        gain = slope / correlation
        pull = gain[..., None] * (values - seen.mean[..., None]) - (
            level.texture - seen.other_mean[..., None]
        )
        certainty = torch.ones_like(certainty)
    pulls = (system.weights * pull).unsqueeze(-2) * level.regressors  # (..., T, 2 + P, n)
    size = level.size
    # blocks of 8 × 8 samples, smaller ones where there would be less than 8 a side
    times = 0
    while times < _BLOCK and min(size) >= 16 * 2**times:  # compared, not computed: a size may be a symbol
        times += 1
    sums = block_sums(unflatten(pulls, size), times)  # (..., T, 2 + P, h / b, w / b)
    calibration = _STRUCTURE_CALIBRATION if level.vector else _SIGMA_CALIBRATION
    scale = calibration * half_length(level.grid.frame) / certainty
    covariance = scale.square()[..., None, None] * scatter_of_blocks(sums, system)
    if level.vector:
        covariance = covariance + uncertainty.isotropic(_STRUCTURE_ERROR * (1 - seen.correlation))
    root = unflatten(system.weights, size).sqrt()
    covariance = covariance + uncertainty.isotropic(
        _WEIGHTS_SHARE * uncertainty.weights_error(level.field, root, level.grid)
    )
    sigma = uncertainty.largest_sigma(covariance)
    residual, weights = (unflatten(field, size) for field in (residual, system.weights))
    share = uncertainty.shared_slope(
        residual, level.field, weights, uncertainty.largest_direction(covariance)
    )

    ground = state.common.square()
    tiny = torch.finfo(values.dtype).tiny
    samples = _INDEPENDENT * ground.sum(-1).square() / torch.linalg.vecdot(ground, ground).clamp(min=tiny)
    common = weighted_moments(values, level, ground)
    significance = common.correlation * samples.sqrt()

    sound = system.sound & (sigma < torch.inf) & are_finite(state.warp)
    least = _MIN_SIGNIFICANCE_OF_VECTORS if level.vector else _MIN_SIGNIFICANCE
    told = significance >= (least if search.far is None else least + _OF_MANY)
    if search.far is not None and not level.vector:
        told = told & (
            _significance_of_blocks(values, level, ground, common) >= search.least_of_blocks(level)
        )
    converged = sound & (state.reach <= search.tolerance) & told
    unknown = uncertainty.isotropic(torch.full_like(sigma, torch.inf))
    covariance = torch.where(sound[..., None, None], covariance, unknown)
    sigma = sigma.masked_fill(~sound, torch.inf)
    ambiguous, found = share < _LEAST_SHARE, (state.warp, sigma, covariance, significance)
    return EnhancedCorrelation(*found, level.flat, converged, ambiguous, state.inliers)


def _significance_of_blocks(values: Tensor, level: Level, ground: Tensor, seen: Moments) -> Tensor:
    r"""(..., T): the correlation in standard deviations, by the scatter of what blocks of the frame contribute to it.

    .. math:: \frac{\operatorname{artanh} \rho}{\rho} \, \frac{\sum_b u_b}{\sqrt{\sum_b u_b^2}}

    Seven spots on flat ground are seven facts, however many samples they cover. Fisher's transform: that all of them
    fit is worth more than their number.
    """
    products = (values - seen.mean[..., None]) * (level.texture - seen.other_mean[..., None])
    blocks = block_sums(unflatten(ground * products, level.size), _BLOCK_OF_FACTS).flatten(-2)
    norm = torch.linalg.vector_norm(blocks, dim=-1).clamp(min=torch.finfo(values.dtype).tiny)
    correlation = seen.correlation.clamp(1e-3, 1 - 1e-6)
    return torch.atanh(correlation) / correlation * blocks.sum(-1) / norm


def implicit_step(state: _State, level: Level, moving: Frames) -> Tensor:
    r"""The warp of a search, (..., T, 3, 3), with the derivative of the implicit function theorem.

    At the optimum the increment vanishes, :math:`\Delta(p^*, \theta) = 0` for images θ, hence

    .. math:: \frac{dp^*}{d\theta} = -\Big(\frac{\partial \Delta}{\partial p}\Big)^{-1}
              \frac{\partial \Delta}{\partial \theta}

    with fixed weights. It needs the memory of one step, and the value is bit for bit that of the search.
    """
    warp = state.warp.detach()
    system = weighted_system(state.system.weights.detach(), level)
    values, by_x, by_y = moving.slopes(warp, level)
    increment, gain, along, direction = Increment.of(values, level, system)

    # the matrix of the theorem has no derivative of its own
    given = (system, level, gain, along, direction, by_x, by_y)
    system, level, gain, along, direction, by_x, by_y = each_field(given, Tensor.detach)
    # a small increment k composed to the warp shifts the frame on the reference by −(its displacement)
    basis_x, basis_y = (for_parts(basis, level.vector) for basis in jacobian(level.motion, level.x, level.y))
    moved = -(by_x[..., None, :] * basis_x + by_y[..., None, :] * basis_y)  # (..., T, P, n)
    change = torch.matmul(system.weights[..., None, :] * moved, level.regressors.mT)  # (..., T, P, 2 + P)
    change = change - change[..., :1] * system.mean[..., None, :]
    gain_by = (
        -gain[..., None]
        / along[..., None]
        * (change[..., 1] - (change[..., 2:] * system.solved[..., None, :]).sum(-1))
    )
    matrix = gain_by[..., None, :] * direction[..., :, None] + gain[..., None, None] * (
        system.inverse @ change[..., 2:].mT
    )
    inverse = torch.linalg.inv_ex(matrix).inverse
    inverse = torch.where(are_finite(inverse)[..., None, None], inverse, 0.0)
    step = -(inverse * increment[..., None, :]).sum(-1)
    return composed(warp, warp_of(step - step.detach(), level.motion))


def _settle(warp: Tensor) -> Tensor:
    """Set warps within rounding of the identity to the identity; gradients are kept."""
    identity = unit_matrix(3, like=warp)
    fixed, _ = finite_warp(warp.detach())
    none = (fixed - identity).abs().flatten(-2).amax(-1) < 64 * torch.finfo(warp.dtype).eps
    settled = torch.where(none[..., None, None], identity, fixed)
    return settled + (warp - warp.detach()).nan_to_num(0.0)


@keeps_tables
def _rotation(degrees: float, *, like: Tensor) -> Tensor:
    """(3, 3), about the frame's centre."""
    angle = like.new_full((), math.radians(degrees))
    none = torch.zeros_like(angle)
    return to_homogeneous(warp_of(torch.stack([none, none, angle]), "euclidean"))
