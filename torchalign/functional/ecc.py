r"""Enhanced correlation coefficient maximisation of whole stacks: masked, robust, differentiable.

The criterion is the enhanced correlation coefficient of Evangelidis & Psarakis: with :math:`\bar m, \bar r` the
warped moving frame and the reference, less their (weighted) means,

.. math:: \rho(W) = \frac{\sum w\, \bar m(W^{-1} p)\, \bar r(p)}{\|\bar m\|_w\, \|\bar r\|_w}

Gain and offset do not change it. It is maximised by the inverse compositional algorithm (Baker & Matthews): the
*reference* is linearised, so its gradients and their products are computed once for all frames and iterations. A
step costs one sampling of the moving frame and a few inner products. In this library's convention the increment is
composed on the left of the warp moving → reference: :math:`W \leftarrow \Delta W \circ W`.

The chain, each link a function:

1. :func:`~torchalign.functional.texture.extract_pyramid`: what is correlated, from coarse to fine. All levels share
   one system of coordinates (the frame's centre is 0, its longer half is 1), so none has a half pixel of its own.
2. :func:`prepare_level`: gradients of the reference and what follows from them.
3. Each level computes weights, then takes steps. The finest level runs twice, first with every fourth sample where
   sampling dominates the cost. A level that lowers the correlation is undone.
4. σ: the sandwich estimate from the scatter of the pulls of small blocks.
5. :func:`implicit_step`: one last step that carries the gradient of the implicit function theorem.

A frame that is only shifted is shifted in the spectral domain, which needs no kernel. Under other warps it is a
cubic B-spline through twice as many samples as the band needs: on a grid that just holds the band, a spline
displaces by 0.05 px, a bilinear or Keys' kernel by 0.13 px; on this one a spline by less than 0.003 px.

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
from torch.nn import functional as F

from torchalign._check import message
from torchalign._host import all_true, carries_gradient, keeps_tables, kernels_for
from torchalign.functional import sampling, uncertainty
from torchalign.functional.affine import (
    are_finite,
    composed,
    finite_warp,
    from_homogeneous,
    invert_warp,
    to_homogeneous,
    unit_corner,
)
from torchalign.functional.common_ground import agreement
from torchalign.functional.fourier import irfft2, rfft2, shift_phase
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
from torchalign.functional.smoothing import block_sums, nanmedian
from torchalign.functional.structure import turn_orientations
from torchalign.functional.texture import Contrast, Texture, extract_pyramid
from torchalign.functional.working_grid import Window, WorkingGrid, ramp_length, tukey, working_size
from torchalign.types import each_field

__all__ = [
    "EnhancedCorrelation",
    "Gradients",
    "Level",
    "Robust",
    "enhanced_correlation",
    "far_level",
    "level_frequencies",
    "prepare_level",
    "prepare_levels",
]

Robust = Literal["agreement", "residual", "none"]
Gradients = Literal["implicit", "unrolled"]

# The coarsest level still has this many samples along the frame's shorter side, and of frames whose finest has
# enough this many; so few of a small frame lead astray.
_COARSEST, _COARSEST_OF_LARGE, _LARGE = 20, 8, 100
# A climb alone comes from as far as this share of the period at the coarsest level's highest frequency; from further
# away all translations are compared first, under no turn and under these, in degrees.
_WITHIN_REACH, _TURNS = 0.25, (-7.0, 7.0)
# Eight parameters fit part of a frame, which then has all of the weight: they are weighted so many times more.
_MORE_WEIGHTS = 2
# Of motions that scale: the share of the mean local variance that is as good as none.
_FLOOR = {"similarity": 0.1, "affine": 0.1, "homography": 0.1}
# Samples of the spline for each sample of the level: at the band's edge four a period.
_OVERSAMPLING = 2
# Where the steps of the first round on the finest level end, in pixels: what a bilinear sampling can tell.
_NEAR = 0.1
# One step moves no point of the frame further than this many samples of its level.
_LONGEST_STEP = 2.0
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
# What is off any hole is at least this share of what is mostly usable, or else its surroundings are taken too.
_LEAST_COVER = 0.5
# The coefficient is divided by what the weights overlap, but for this.
_WEIGHTS_SHARE = 0.5
# A direction along which less than this share of the slope is the ground's is ambiguous.
_LEAST_SHARE = 0.35
# A point farther out than this, in samples, is nowhere.
_NOWHERE = 1e7
# Relative to its trace: what keeps a Hessian with a blind direction from having an inverse without bounds.
_RIDGE = 1e-6
# A direction is blind whose curvature is less than this many ridges, inverted.
_BLIND = 1e-2


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


class Level(NamedTuple):
    """What a level of the pyramid keeps of the reference, see :func:`prepare_level`.

    Attributes:
        grid: the samples, n = h · w of them, or 2h · w of a vector.
        field: (..., 1 or T, h, w), the reference's texture.
        products: (..., 1 or T, (2 + P)(3 + P) / 2, n), of the regressors with each other: the upper triangle, row
            by row. The first regressor is 1, so the first row holds the regressors.
        weights: (..., 1 or T, h · w) in [0, 1]: the window, and what is usable.
        flat: (..., 1 or T) bool.
        x: (h · w,), where the samples are, in halves of the frame from its centre.
        y: (h · w,), likewise.
        corners: (8, P), how each parameter displaces the frame's corners, x of the four and then y, in pixels.
        vector: the texture has two parts, one below the other: field, products and weights are of 2h · w samples.
    """

    grid: WorkingGrid
    field: Tensor
    products: Tensor
    weights: Tensor
    flat: Tensor
    x: Tensor
    y: Tensor
    corners: Tensor
    vector: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the samples; the second part of a vector lies below the first."""
        rows, columns = self.grid.size
        return (2 * rows if self.vector else rows), columns

    @property
    def regressors(self) -> Tensor:
        """(..., 1 or T, 2 + P, n): 1, the texture, and its derivatives by the P parameters."""
        return self.products[..., : 2 + self.corners.shape[-1], :]

    @property
    def texture(self) -> Tensor:
        """(..., 1 or T, n), the field."""
        return self.products[..., 1, :]

    @property
    def squares(self) -> Tensor:
        """(..., 1 or T, n), of the texture."""
        return self.products[..., 2 + self.corners.shape[-1], :]


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
        reference: (..., 1 or T, H, W); or its :func:`prepare_levels` with the same options.
        moving_mask: bool, broadcastable to ``moving``, True = usable; ``None`` if all of it is.
        reference_mask: the same for ``reference``.
        motion: what is estimated; see :data:`~torchalign.functional.motion.MotionModel`.
        init: (..., T, 2 or 3, 3), a warp moving → reference to start from, or (..., T, 2), a shift (x, y) in
            pixels; ``None`` for none. What the motion model lacks (the rotation of an init, for a translation)
            is kept as it is. A frame whose init is no number starts from the identity, and has not converged.
        max_translation: of the frame's centre, in pixels. Where a climb alone does not reach so far, all translations
            are compared first, under a few rotations if the motion has any; one beyond it wins if it fits better by a
            fifth. See :func:`far_level`.
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
        ValueError: the levels are of frames of another size.

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
    textures = _textures(moving, moving_mask, grids, motion, **seen)
    shape = torch.broadcast_shapes(moving.shape[:-2], reference[0].flat.shape)  # type: ignore[no-untyped-call]
    only_shifted = only_shifts(motion, init)
    # (a shift is (..., T, 2))
    homography = motion == "homography" or (init is not None and init.shape[-1] == init.shape[-2] == 3)
    start, finite = _finite_start(init, frame, shape, moving)
    pyramid: list[_ShiftedFrames | _WarpedFrames] = [
        _ShiftedFrames.of(texture, grid, taper)
        if only_shifted
        else _WarpedFrames.of(texture, grid, taper, homography)
        for texture, grid in zip(textures, grids, strict=True)
    ]

    far = far_level(reference, motion, max_translation, init)
    search = _Search(motion, robust, max_iterations, tolerance, max_translation, far)
    finest, frames = reference[0], pyramid[0]
    if gradients == "unrolled":
        state = search.descend(start, reference, pyramid)
        warp = state.warp
    else:
        fixed = each_field((tuple(reference), tuple(pyramid)), Tensor.detach)
        state = search.descend(start.detach(), *fixed)
        warp = state.warp
        if carries_gradient(finest.field, frames[0]):
            warp = implicit_step(state, finest, frames, motion)
        if carries_gradient(start):
            # the optimum does not move with where the search began: the derivative is exactly 0
            warp = warp + 0.0 * (start - start.detach())
    found = each_field(_assess(state, each_field(finest, Tensor.detach), search), Tensor.detach)
    warp = _settle(warp)
    # a shift by itself is the same about any centre
    warp = _shifted_by(_shift_of(warp, finest.grid)) if only_shifted else denormalize(warp, frame)
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
        return _eye(3, like=like).expand(*shape, 3, 3), none
    shifted = init.shape[-1] == 2
    start = _shifted_by(init / half_length(frame)) if shifted else normalize(to_homogeneous(init), frame)
    return finite_warp(start.expand(*shape, 3, 3))


def level_frequencies(
    frame: tuple[int, int], max_frequency: float = 0.25, levels: int | None = None
) -> tuple[float, ...]:
    """The highest frequency of every level, finest first, each half of the one before.

    Args:
        frame: (H, W) in pixels.
        max_frequency: of the finest level, in cycles per pixel.
        levels: how many; ``None`` for as many as leave 20 samples along the shorter side, 8 of frames
            of 100 and more.

    >>> level_frequencies((256, 300)), level_frequencies((128, 128)), level_frequencies((256, 300), levels=1)
    ((0.25, 0.125, 0.0625, 0.03125, 0.015625), (0.25, 0.125), (0.25,))
    """
    if levels is None:
        shortest = min(working_size(frame, max_frequency))
        levels = 1
        least = _COARSEST_OF_LARGE if shortest >= _LARGE else _COARSEST
        while shortest >= least * 2**levels:  # torch.export notes for which sizes this holds
            levels += 1
    return tuple(max_frequency / 2**level for level in range(levels))


def far_level(
    levels: Sequence[Level], motion: MotionModel, max_translation: float, init: Tensor | None = None
) -> int | None:
    """The level on which all translations are compared first; ``None`` where a climb alone reaches far enough.

    Where a shift is sought and there is an init, it was. Arguments as in :func:`enhanced_correlation`.
    """
    near = max_translation <= _WITHIN_REACH / levels[-1].grid.max_frequency
    if near or (motion == "translation" and init is not None):
        return None
    number = len(levels) - 1
    # compared, not computed: a size may be a symbol
    while number > 0 and min(levels[number].grid.size) < _COARSEST:
        number -= 1
    return number


def prepare_levels(
    reference: Tensor,
    mask: Tensor | None = None,
    *,
    motion: MotionModel = "affine",
    max_frequency: float = 0.25,
    levels: int | None = None,
    contrast: Contrast = "local",
    sigma_blur: float = 0.0,
    taper: float = 0.15,
) -> list[Level]:
    """Every level of the reference, finest first, for motions of a kind; arguments as in :func:`enhanced_correlation`."""
    frame = (reference.shape[-2], reference.shape[-1])
    frequencies = level_frequencies(frame, max_frequency, levels)
    grids = [
        WorkingGrid.of(frame, working_size(frame, highest), highest, reference) for highest in frequencies
    ]
    textures = _textures(reference, mask, grids, motion, contrast=contrast, sigma_blur=sigma_blur)
    return [
        prepare_level(texture, grid, motion, taper) for texture, grid in zip(textures, grids, strict=True)
    ]


def _textures(
    image: Tensor,
    mask: Tensor | None,
    grids: Sequence[WorkingGrid],
    motion: MotionModel,
    *,
    contrast: Contrast,
    sigma_blur: float,
) -> list[Texture]:
    """:func:`~torchalign.functional.texture.extract_pyramid`, its fields not weighted yet: a hole's edge would pull.

    Samples beside a hole show what filled it: on the finest level they count nothing where enough are left.
    """
    options: dict[str, Any] = {"contrast": contrast, "blur": sigma_blur, "floor": _FLOOR.get(motion, 0.0)}
    finest, *coarser = (
        texture if texture.detail is None else texture._replace(field=texture.detail)
        for texture in extract_pyramid(image, mask, grids=grids, cover=True, **options)
    )
    if finest.weights is not None and finest.cover is not None:
        enough = torch.sub(finest.cover, finest.weights, alpha=_LEAST_COVER).mean((-2, -1)) >= 0
        weights = torch.where(enough[..., None, None], finest.cover, finest.weights)
        finest = finest._replace(weights=weights)
    return [finest, *coarser]


def prepare_level(texture: Texture, grid: WorkingGrid, motion: MotionModel, taper: float = 0.15) -> Level:
    r"""The reference's derivatives by the parameters, :math:`\nabla r \cdot \partial W / \partial p`, on a grid."""
    vector = texture.is_vector
    band = grid.frame, grid.size, grid.max_frequency
    spectrum = rfft2(texture.field) * _response(*band, vector, like=grid.radius)
    field = _joined(irfft2(spectrum, grid.size), vector, dim=-2)
    slope_x, slope_y = (_joined(slope, vector) for slope in _derivatives_of(spectrum, grid))
    x, y, basis_x, basis_y, corners = _coordinates(grid.frame, grid.size, motion, like=grid.radius)
    basis_x, basis_y = (_for_parts(basis, vector) for basis in (basis_x, basis_y))
    derivatives = slope_x[..., None, :] * basis_x + slope_y[..., None, :] * basis_y  # (..., P, n)
    values = field.flatten(-2)[..., None, :]
    rows = torch.cat([torch.ones_like(values), values, derivatives], dim=-2)
    # row by row of the triangle: views, of which neither memory nor autograd keeps copies
    products = torch.cat(
        [rows, *(rows[..., i : i + 1, :] * rows[..., i:, :] for i in range(1, rows.shape[-2]))], dim=-2
    )
    weights = Window.of(grid, taper).whole.flatten(-2).expand(*texture.flat.shape, -1)
    if texture.weights is not None:
        weights = weights * texture.weights.flatten(-2)
    return Level(grid, field, products, weights, texture.flat, x, y, corners, vector)


class _ShiftedFrames(NamedTuple):
    """Moving frames that are only shifted: a phase in the spectral domain, without kernel or bias; borders wrap."""

    spectrum: Tensor  # (..., T, h, w//2+1)
    weights: Tensor | None  # (..., T, h, w//2+1), spectrum of what is usable
    flat: Tensor  # (..., T) bool
    window: Window

    @classmethod
    def of(cls, texture: Texture, grid: WorkingGrid, taper: float) -> _ShiftedFrames:
        weights = None if texture.weights is None else rfft2(texture.weights)
        response = _response(grid.frame, grid.size, grid.max_frequency, texture.is_vector, like=grid.radius)
        return cls(rfft2(texture.field) * response, weights, texture.flat, Window.of(grid, taper))

    def look(self, warp: Tensor, level: Level, *, precise: bool) -> _WarpedSamples:
        """:meth:`values` and :meth:`ground`."""
        ground = _for_parts(self.ground(warp, level), level.vector)
        return _WarpedSamples(warp, self.values(warp, level, precise=precise), ground)

    def ascend(
        self, start: Tensor, moves: Tensor, system: _System, level: Level, search: _Search, precise: bool
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All steps by one kernel, where there is one: warps, the last reach; if precise, the values before it."""
        kernels = None if level.vector else kernels_for(self.spectrum, start, system.weights, level.field)
        if kernels is None:
            return None
        grid = level.grid
        # inner products of fields are those of their spectra
        weighted = rfft2(_unflatten(system.weights.unsqueeze(-2) * level.regressors, -1, grid.size))
        shift, reach, seen = kernels.ascend_shifted(
            self.spectrum,
            weighted,
            _shift_of(start, grid),
            moves,
            (system.mean, system.inverse, system.solved, system.rest),
            grid.frequencies,
            level.corners,
            grid.size[0] * grid.size[1],
            half_length(grid.frame),
            _LONGEST_STEP * grid.spacing(),
            search.max_iterations,
            search.tolerance,
        )
        values = level.grid.move(self.spectrum, seen).flatten(-2) if precise else None
        return _shifted_by(shift / half_length(grid.frame)), reach, values

    def values(self, warp: Tensor, level: Level, *, precise: bool) -> Tensor:
        """(..., T, n), the frames over the reference, always precise."""
        moved = level.grid.move(self.spectrum, _shift_of(warp, level.grid))
        return _joined(moved.flatten(-2), level.vector)

    def ground(self, warp: Tensor, level: Level) -> Tensor:
        """(..., T, n) in [0, 1]: the windows, and what is usable, of both."""
        shift = _shift_of(warp, level.grid)
        common = level.weights * self.window.common(shift).flatten(-2)
        if self.weights is not None:
            common = common * level.grid.move(self.weights, shift).clamp(0, 1).flatten(-2)
        return common

    def stepped(self, warp: Tensor, increment: Tensor, motion: MotionModel) -> Tensor:
        """The step composed to the warp: shifts add up."""
        return warp + F.pad(increment.unsqueeze(-1), (2, 0, 0, 1))

    def slopes(self, warp: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """The values, and their derivatives by x and y of the reference."""
        grid = level.grid
        shifted = shift_phase(self.spectrum, grid.frequencies, -_shift_of(warp, grid))
        found = irfft2(shifted, grid.size).flatten(-2), *_derivatives_of(shifted, grid)
        values, by_x, by_y = (_joined(field, level.vector) for field in found)
        return values, by_x, by_y


class _WarpedFrames(NamedTuple):
    """Moving frames under any warp: a cubic B-spline through twice as many samples as the band needs."""

    spline: Tensor  # (..., T, 2h, 2w), its coefficients, continued beyond the border
    weights: Tensor | None  # (..., T, h, w), what is usable, likewise
    flat: Tensor  # (..., T) bool
    taper: float
    projective: bool

    @classmethod
    def of(cls, texture: Texture, grid: WorkingGrid, taper: float, projective: bool) -> _WarpedFrames:
        rows, columns = grid.size
        size = (_OVERSAMPLING * rows, _OVERSAMPLING * columns)
        band = grid.frame, grid.size, grid.max_frequency
        spectrum = rfft2(texture.field) * _spline_gain(*band, texture.is_vector, like=grid.radius)
        # zeros between the positive and the negative frequencies; those of the columns are appended by irfft
        positive = rows - rows // 2
        middle = spectrum.new_zeros((*spectrum.shape[:-2], size[0] - rows, spectrum.shape[-1]))
        coefficients = torch.cat([spectrum[..., :positive, :], middle, spectrum[..., positive:, :]], dim=-2)
        weights = None if texture.weights is None else sampling.continue_border(texture.weights)
        return cls(
            sampling.continue_border(irfft2(coefficients, size)), weights, texture.flat, taper, projective
        )

    def look(self, warp: Tensor, level: Level, *, precise: bool) -> _WarpedSamples:
        """:meth:`values` and :meth:`ground`."""
        kernels = None if level.vector else kernels_for(self.spline, self.weights, warp, level.weights)
        if kernels is None:
            ground = _for_parts(self.ground(warp, level), level.vector)
            return _WarpedSamples(warp, self.values(warp, level, precise=precise), ground)
        ramps = [ramp_length(length, self.taper) for length in level.grid.frame] if self.taper > 0 else []
        given = self.spline, self.weights, warp, level.weights, level.x, level.y, level.grid.frame
        return _WarpedSamples(warp, *kernels.look(*given, ramps, self.projective, precise))

    def ascend(
        self, start: Tensor, moves: Tensor, system: _System, level: Level, search: _Search, precise: bool
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All steps by one kernel, where there is one: warps, the last reach; if precise, the values before it."""
        kernels = None if level.vector else kernels_for(self.spline, start, system.weights, level.field)
        if kernels is None:
            return None
        equations = system.mean, system.inverse, system.solved, system.rest
        warp, reach, seen = kernels.ascend_warped(
            self.spline,
            start,
            moves,
            system.weights,
            level.products,
            equations,
            level.x,
            level.y,
            level.corners,
            level.grid.frame,
            _LONGEST_STEP * level.grid.spacing(),
            self.projective,
            search.motion,
            search.max_iterations,
            search.tolerance,
            precise,
        )
        return warp, reach, self.look(seen, level, precise=True).values if precise else None

    def values(self, warp: Tensor, level: Level, *, precise: bool) -> Tensor:
        """(..., T, n), the frames over the reference; bilinear, at a fifth of the cost, unless ``precise``."""
        column, row = self._sources(warp, level, _samples_of(self.spline))
        sample = sampling.spline_at if precise else sampling.bilinear_at
        if not level.vector:
            return sample(self.spline, column, row)
        parts = torch.stack([sample(part, column, row) for part in self.spline])
        return _joined(turn_orientations(parts, warp), vector=True)

    def ground(self, warp: Tensor, level: Level) -> Tensor:
        """(..., T, n) in [0, 1]: the windows, and what is usable, of both."""
        height, width = level.grid.frame
        x, y = self._sources(warp, level, (height, width))
        own = tukey(x, width, self.taper) * tukey(y, height, self.taper)
        if self.weights is not None:
            usable = sampling.bilinear_at(
                self.weights, *self._sources(warp, level, _samples_of(self.weights))
            )
            # between two ones lies a one, but for rounding
            own = own * torch.where(usable > 1 - 1e-5, 1.0, usable)
        return torch.minimum(level.weights, own)

    def stepped(self, warp: Tensor, increment: Tensor, motion: MotionModel) -> Tensor:
        """The step composed to the warp."""
        return unit_corner(composed(warp, warp_of(increment, motion)))

    def slopes(self, warp: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """The values, and their derivatives by x and y of the reference."""
        size = _samples_of(self.spline)
        column, row = self._sources(warp, level, size)
        if level.vector:
            # (what turns with the warp is held fixed)
            parts = zip(
                *(sampling.spline_with_slopes(part, column, row) for part in self.spline), strict=True
            )
            values, by_column, by_row = (
                _joined(turn_orientations(torch.stack(both), warp), vector=True) for both in parts
            )
        else:
            values, by_column, by_row = sampling.spline_with_slopes(self.spline, column, row)
        (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-2) for row in invert_warp(warp)[..., None].unbind(-3))
        depth = g * level.x + h * level.y + i
        x, y = (a * level.x + b * level.y + c) / depth, (d * level.x + e * level.y + f) / depth
        depth, x, y = (_for_parts(position, level.vector) for position in (depth, x, y))
        height, width = level.grid.frame
        slope_x, slope_y = (
            slope * (half_length(level.grid.frame) * samples / length)
            for slope, samples, length in ((by_column, size[1], width), (by_row, size[0], height))
        )
        by_x = (slope_x * (a - x * g) + slope_y * (d - y * g)) / depth
        by_y = (slope_x * (b - x * h) + slope_y * (e - y * h)) / depth
        return values, by_x, by_y

    def _sources(self, warp: Tensor, level: Level, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(..., T, n) column and row, among ``size`` samples of the frame, that the reference's samples show."""
        inverse = torch.linalg.inv_ex(warp).inverse
        # what is no number, or would overflow below, is far away: every position is one
        x, y, last = inverse.nan_to_num(_NOWHERE).clamp(-_NOWHERE, _NOWHERE)[..., None].unbind(-3)
        half, (height, width) = half_length(level.grid.frame), level.grid.frame
        # the change of units is made on the matrices, which are small
        rows = [
            (row * half + last * ((length - 1) / 2)) * (samples / length)
            for row, samples, length in ((x, size[1], width), (y, size[0], height))
        ]
        if self.projective:
            rows.append(last)
        # not as a matrix product: TF32 would misplace the far end of a frame
        points = [
            torch.addcmul(torch.addcmul(row[..., 2, :], row[..., 0, :], level.x), row[..., 1, :], level.y)
            for row in rows
        ]
        if self.projective:
            # beyond its horizon a homography shows nothing
            depth = torch.where(points[2] > 0, points[2], 1 / _NOWHERE)
            points = [point / depth for point in points[:2]]
        return points[0], points[1]


class _System(NamedTuple):
    """The part of the normal equations of one set of weights that does not depend on the moving frame."""

    weights: Tensor  # (..., T, n)
    mean: Tensor  # (..., T, 2 + P), weighted, of the regressors
    inverse: Tensor  # (..., T, P, P), of the Hessian
    solved: Tensor  # (..., T, P), H⁻¹ Gᵀ r̄
    rest: Tensor  # (..., T), ‖r̄‖² − r̄ᵀ P_G r̄: what of the reference its derivatives do not explain
    sound: Tensor  # (..., T) bool, the Hessian has an inverse


class _State(NamedTuple):
    """Where the search stands."""

    warp: Tensor  # (..., T, 3, 3), normalised
    reach: Tensor  # (..., T), of the last step, in pixels
    values: Tensor  # (..., T, n), the moving frame there
    common: Tensor  # (..., T, n) in [0, 1], the ground that both have
    system: _System
    inliers: Tensor | None  # (..., T, h, w)


class _Search(NamedTuple):
    """The options of the search."""

    motion: MotionModel
    robust: Robust
    max_iterations: int
    tolerance: float
    max_translation: float
    far: int | None

    def descend(
        self, start: Tensor, levels: Sequence[Level], pyramid: Sequence[_ShiftedFrames | _WarpedFrames]
    ) -> _State:
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
                if isinstance(frames, _WarpedFrames):
                    # samples are what costs, and every fourth will do to come near
                    rough = _every_second(level)
            for time in range(1 + (_MORE_WEIGHTS if self.motion == "homography" else 0)):
                samples = frames.look(warp, rough, precise=False)
                if time == 0 and number < len(levels) - 1:
                    samples = _better_of(start, samples, rough, frames)
                warp = self._replace(tolerance=near).climb(samples, rough, frames, precise=False).warp
        samples = frames.look(warp, level, precise=True)
        return self.climb(samples, level, frames, precise=True)

    def least_of_blocks(self) -> float:
        """What chance reaches rises with the places and turns that are compared, as the maximum of so many does."""
        turns = 1 if self.motion == "translation" else 1 + len(_TURNS)
        places = max(self.max_translation / 5, 1.0) ** 2 * turns
        return math.sqrt(_LEAST_OF_BLOCKS**2 + 2 * math.log(places))

    def look_far(self, start: Tensor, level: Level, moving: _ShiftedFrames | _WarpedFrames) -> Tensor:
        """(..., T, 3, 3): of all translations, under what else the start does and a few turns, what fits best."""
        still = composed(start.detach(), _shifted_by(-start[..., :2, 2].detach()))
        turns = [still]
        if self.motion != "translation":
            turns += [composed(still, _rotation(degrees, like=still)) for degrees in _TURNS]
        alone, size = level._replace(weights=torch.ones_like(level.weights)), level.grid.size

        def fields(values: Tensor) -> Tensor:
            """(K, ..., T, h, w), of (..., T, n)."""
            return torch.stack([_unflatten(part, -1, size) for part in values.chunk(1 + level.vector, -1)])

        reference = fields(level.texture), _unflatten(level.weights, -1, size)
        limits: dict[str, Any] = {"spacings": level.grid.spacings(), "reach": self.max_translation}
        found = []
        for turn in turns:
            _, values, ground = moving.look(turn, alone, precise=False)
            ground = _unflatten(ground[..., : level.x.shape[0]], -1, size)  # that of both parts
            found.append(best_shift(fields(values), ground, *reference, **limits))
        shifts, heights = (torch.stack(each) for each in zip(*found, strict=True))
        best = heights.argmax(0, keepdim=True)[..., None]
        shift = shifts.gather(0, best.expand(*best.shape[:-1], 2)).squeeze(0)
        turn = torch.stack(turns).gather(0, best[..., None].expand(*best.shape[:-1], 3, 3)).squeeze(0)
        return composed(turn, _shifted_by(shift / half_length(level.grid.frame)))

    def climb(
        self, samples: _WarpedSamples, level: Level, moving: _ShiftedFrames | _WarpedFrames, *, precise: bool
    ) -> _State:
        """Weights, then steps, until none moves a point of a frame by more than the tolerance.

        A frame that has converged stays as it is while others go on. Where it may be read that all have, the
        steps end.
        """
        warp, values, common = samples
        inliers = self._inliers(values, common, level)
        weights = common if inliers is None else common * _for_parts(inliers.flatten(-2), level.vector)
        system = _weighted_system(weights.square(), level)
        moves = (level.flat | moving.flat).logical_not()
        ascended = moving.ascend(warp, moves, system, level, self, precise)
        if ascended is not None:
            warp, reach, found = ascended  # of steps that are not precise only the warp is wanted
            return _State(warp, reach, values if found is None else found, common, system, inliers)
        reach = torch.zeros_like(warp[..., 0, 0])
        for iteration in range(self.max_iterations):
            if iteration > 0:
                # what is said of a frame must not depend on how long the others take
                found = moving.values(warp, level, precise=precise)
                values = _choose_frames(moves[..., None], found, values)
            increment, last = _shorten(_Increment.of(values, level, system).step, level)
            stepped = moving.stepped(warp, increment, self.motion)
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
            return _unflatten(found, -1, size)
        ours, window = values * common, _unflatten(level.weights, -1, size)
        if not level.vector:
            return agreement(_unflatten(ours, -1, size), level.field * window)
        ours, theirs = (
            torch.stack(field.chunk(2, -2)) for field in (_unflatten(ours, -1, level.size), level.field)
        )
        return agreement(ours, theirs * window, vector=True)


class _WarpedSamples(NamedTuple):
    """The moving frames' samples under a warp, over the reference."""

    warp: Tensor  # (..., T, 3, 3)
    values: Tensor  # (..., T, n)
    common: Tensor  # (..., T, n) in [0, 1], the ground that both have


def _better_of(
    start: Tensor, found: _WarpedSamples, level: Level, moving: _ShiftedFrames | _WarpedFrames
) -> _WarpedSamples:
    """The start, where a coarser level lowered the correlation (its clouds have more contrast than the ground)."""
    both = found, moving.look(start, level, precise=False)
    scores = []
    for _, values, common in both:
        weighted = common * values
        product = _inner(weighted, level.texture.unsqueeze(-2))
        norm = torch.linalg.vecdot(weighted, values)[..., None] * _inner(common, level.squares.unsqueeze(-2))
        scores.append(product * torch.rsqrt(norm + torch.finfo(norm.dtype).tiny))
    worse = scores[1] > scores[0]  # (..., T, 1)
    return _WarpedSamples(
        torch.where(worse[..., None], both[1].warp, both[0].warp),
        *(_choose_frames(worse, one, other) for one, other in zip(both[1][1:], both[0][1:], strict=True)),
    )


def _choose_frames(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Frame by frame, of finite (..., T, n): exact, and on the CPU much faster than ``torch.where``."""
    return torch.lerp(second, first, condition.to(first.dtype))


def _every_second(level: Level) -> Level:
    """The level with every second sample along both axes, where there are enough."""
    (rows, columns), grid = level.grid.size, level.grid
    if rows % 2 or columns % 2 or min(rows, columns) < 4 * _COARSEST:
        return level

    def thin(values: Tensor, size: tuple[int, int] = (rows, columns)) -> Tensor:
        return _unflatten(values, -1, size)[..., ::2, ::2].flatten(-2)

    return level._replace(
        grid=WorkingGrid.of(grid.frame, (rows // 2, columns // 2), grid.max_frequency, level.field),
        field=level.field[..., ::2, ::2],
        products=thin(level.products, level.size),
        weights=thin(level.weights),
        x=thin(level.x),
        y=thin(level.y),
    )


def _weights_of_difference(values: Tensor, common: Tensor, level: Level) -> Tensor:
    """Tukey's biweight of the difference of the two textures, in units of its median."""
    difference = values - level.field.flatten(-2)
    # a quarter of the samples gives the same median, and sorting dominates the cost
    known = difference.detach().abs().masked_fill(common < 0.5, torch.nan)[..., ::4]
    spread = nanmedian(known)[..., None].nan_to_num(1.0) / 0.6745
    ratio = difference / (4.685 * spread + torch.finfo(values.dtype).tiny)
    return (1 - ratio.square()).clamp(min=0).square()


def _weighted_system(weights: Tensor, level: Level) -> _System:
    """The normal equations of these weights."""
    parameters = level.corners.shape[-1]
    gram = _inner(weights, level.products)[..., _triangle(2 + parameters, like=weights)]
    mean = gram[..., 0, :] / gram[..., 0, :1].clamp(min=torch.finfo(weights.dtype).tiny)
    centred = torch.addcmul(gram[..., 1:, 1:], gram[..., 1:, :1], mean[..., None, 1:], value=-1)
    against, hessian = centred[..., 0, :], centred[..., 1:, 1:]  # of (..., T, 1 + P, 1 + P)
    ridge = _RIDGE * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = ridge.clamp(min=torch.finfo(ridge.dtype).tiny)
    eye = _eye(parameters, like=weights)
    inverse = torch.linalg.inv_ex(torch.addcmul(hessian, ridge[..., None, None], eye)).inverse
    # in a direction in which nothing changes the ridge is all there is
    spread = inverse.diagonal(dim1=-2, dim2=-1) * ridge[..., None]
    sound = are_finite(inverse) & ((spread > 0) & (spread < _BLIND)).all(-1)
    inverse = inverse.masked_fill(~sound[..., None, None], 0.0)
    solved = (inverse * against[..., None, 1:]).sum(-1)
    rest = against[..., 0] - (against[..., 1:] * solved).sum(-1)
    return _System(weights, mean, inverse, solved, rest, sound)


class _Increment(NamedTuple):
    r"""The step that maximises the coefficient of the linearised reference.

    .. math:: \Delta = H^{-1} G^T (\lambda \bar m - \bar r), \qquad
              \lambda = \frac{\|\bar r\|^2 - \bar r^T P_G \bar r}{\bar m^T \bar r - \bar m^T P_G \bar r}

    with :math:`P_G` the projection on the derivatives (Evangelidis & Psarakis 2008, theorem 1). Where the
    denominator is not positive, the two are far from each other, and λ = 1 makes it a least-squares step.
    """

    step: Tensor  # (..., T, P), Δ
    gain: Tensor  # (..., T), λ
    along: Tensor  # (..., T), its denominator, infinity where it is not positive
    direction: Tensor  # (..., T, P), H⁻¹ Gᵀ m̄

    @classmethod
    def of(cls, values: Tensor, level: Level, system: _System) -> _Increment:
        moments = _inner(system.weights * values, level.regressors)
        moments = torch.addcmul(moments, moments[..., :1], system.mean, value=-1)  # less the means
        along = moments[..., 1] - (moments[..., 2:] * system.solved).sum(-1)
        good = (along > 0) & (system.rest > 0)
        along = torch.where(good, along, torch.inf)
        gain = torch.where(good, system.rest / along, 1.0)
        direction = (system.inverse * moments[..., None, 2:]).sum(-1)
        return cls(gain[..., None] * direction - system.solved, gain, along, direction)


def _shorten(increment: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """No step is longer than a few samples of its level; and how far it moves the farthest corner, in pixels."""
    moved = (increment.detach()[..., None, :] * level.corners).sum(-1)  # (..., T, 8)
    reach = torch.hypot(moved[..., :4], moved[..., 4:]).amax(-1)
    longest = _LONGEST_STEP * level.grid.spacing()
    shorter = longest / reach.clamp(min=longest)
    return increment * shorter[..., None], reach * shorter


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
    seen = _weighted_moments(values, level, system.weights)
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
    sums = block_sums(_unflatten(pulls, -1, size), times)  # (..., T, 2 + P, h / b, w / b)
    calibration = _STRUCTURE_CALIBRATION if level.vector else _SIGMA_CALIBRATION
    scale = calibration * half_length(level.grid.frame) / certainty
    covariance = scale.square()[..., None, None] * _scatter_of_blocks(sums, system)
    if level.vector:
        covariance = covariance + uncertainty.isotropic(_STRUCTURE_ERROR * (1 - seen.correlation))
    root = _unflatten(system.weights, -1, size).sqrt()
    covariance = covariance + uncertainty.isotropic(
        _WEIGHTS_SHARE * uncertainty.weights_error(level.field, root, level.grid)
    )
    sigma = uncertainty.largest_sigma(covariance)
    residual, weights = (_unflatten(field, -1, size) for field in (residual, system.weights))
    share = uncertainty.shared_slope(
        residual, level.field, weights, uncertainty.largest_direction(covariance)
    )

    ground = state.common.square()
    tiny = torch.finfo(values.dtype).tiny
    samples = _INDEPENDENT * ground.sum(-1).square() / torch.linalg.vecdot(ground, ground).clamp(min=tiny)
    common = _weighted_moments(values, level, ground)
    significance = common.correlation * samples.sqrt()

    sound = system.sound & (sigma < torch.inf) & are_finite(state.warp)
    least = _MIN_SIGNIFICANCE_OF_VECTORS if level.vector else _MIN_SIGNIFICANCE
    told = significance >= (least if search.far is None else least + _OF_MANY)
    if search.far is not None and not level.vector:
        told = told & (_significance_of_blocks(values, level, ground, common) >= search.least_of_blocks())
    converged = sound & (state.reach <= search.tolerance) & told
    unknown = uncertainty.isotropic(torch.full_like(sigma, torch.inf))
    covariance = torch.where(sound[..., None, None], covariance, unknown)
    sigma = sigma.masked_fill(~sound, torch.inf)
    ambiguous, found = share < _LEAST_SHARE, (state.warp, sigma, covariance, significance)
    return EnhancedCorrelation(*found, level.flat, converged, ambiguous, state.inliers)


def _significance_of_blocks(values: Tensor, level: Level, ground: Tensor, seen: _Moments) -> Tensor:
    r"""(..., T): the correlation in standard deviations, by the scatter of what blocks of the frame contribute to it.

    .. math:: \frac{\operatorname{artanh} \rho}{\rho} \, \frac{\sum_b u_b}{\sqrt{\sum_b u_b^2}}

    Seven spots on flat ground are seven facts, however many samples they cover. Fisher's transform: that all of them
    fit is worth more than their number.
    """
    products = (values - seen.mean[..., None]) * (level.texture - seen.other_mean[..., None])
    blocks = block_sums(_unflatten(ground * products, -1, level.size), _BLOCK_OF_FACTS).flatten(-2)
    norm = torch.linalg.vector_norm(blocks, dim=-1).clamp(min=torch.finfo(values.dtype).tiny)
    correlation = seen.correlation.clamp(1e-3, 1 - 1e-6)
    return torch.atanh(correlation) / correlation * blocks.sum(-1) / norm


def _scatter_of_blocks(sums: Tensor, system: _System) -> Tensor:
    """(..., T, 2, 2): of what blocks, whose pulls are (..., T, 2 + P, h, w), do to the two translations."""
    lever = system.inverse[..., :2, :]
    mean = system.mean[..., 2:, None]
    moved = torch.matmul(lever, sums[..., 2:, :, :].flatten(-2) - mean * sums[..., :1, :, :].flatten(-2))
    blocks = moved.shape[-1]
    freedom = blocks / max(1, blocks - sums.shape[-3])
    return freedom * torch.matmul(moved, moved.mT)


class _Moments(NamedTuple):
    """Weighted moments of two textures, which are of order 1 and of mean nearly 0, so that sums do not cancel."""

    mean: Tensor
    other_mean: Tensor
    variance: Tensor  # 1 where it vanishes, and so the correlation is 0
    covariance: Tensor
    correlation: Tensor


def _weighted_moments(values: Tensor, level: Level, weights: Tensor) -> _Moments:
    """Of (..., T, n) and the reference's texture; (..., T)."""
    two = level.regressors[..., :2, :]  # 1 and the texture
    total, other = _inner(weights, two).unbind(-1)
    count = total.clamp(min=torch.finfo(weights.dtype).tiny)
    weighted = weights * values
    own, product = _inner(weighted, two).unbind(-1)
    mean, other_mean = own / count, other / count
    variance = torch.linalg.vecdot(weighted, values) / count - mean.square()
    other_square = _inner(weights, level.squares.unsqueeze(-2)).squeeze(-1)
    other_variance = other_square / count - other_mean.square()
    covariance = product / count - mean * other_mean
    flat = (variance <= 1e-6) | (other_variance <= 1e-6)
    variance, other_variance = variance.masked_fill(flat, 1.0), other_variance.masked_fill(flat, 1.0)
    covariance = covariance.masked_fill(flat, 0.0)
    return _Moments(
        mean, other_mean, variance, covariance, covariance * torch.rsqrt(variance * other_variance)
    )


def implicit_step(
    state: _State, level: Level, moving: _ShiftedFrames | _WarpedFrames, motion: MotionModel
) -> Tensor:
    r"""The warp of a search, (..., T, 3, 3), with the derivative of the implicit function theorem.

    At the optimum the increment vanishes, :math:`\Delta(p^*, \theta) = 0` for images θ, hence

    .. math:: \frac{dp^*}{d\theta} = -\Big(\frac{\partial \Delta}{\partial p}\Big)^{-1}
              \frac{\partial \Delta}{\partial \theta}

    with fixed weights. It needs the memory of one step, and the value is bit for bit that of the search.
    """
    warp = state.warp.detach()
    system = _weighted_system(state.system.weights.detach(), level)
    values, by_x, by_y = moving.slopes(warp, level)
    increment, gain, along, direction = _Increment.of(values, level, system)

    # the matrix of the theorem has no derivative of its own
    given = (system, level, gain, along, direction, by_x, by_y)
    system, level, gain, along, direction, by_x, by_y = each_field(given, Tensor.detach)
    # a small increment k composed to the warp shifts the frame on the reference by −(its displacement)
    basis_x, basis_y = (_for_parts(basis, level.vector) for basis in jacobian(motion, level.x, level.y))
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
    return composed(warp, warp_of(step - step.detach(), motion))


# ------------------------------------------------------------------------------------------------- coordinates


@keeps_tables
def _coordinates(
    frame: tuple[int, int], size: tuple[int, int], motion: MotionModel, *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(n,) x and y of the samples, in halves of the frame from its centre, (P, n) their jacobian, (8, P) the corners."""
    (height, width), half = frame, half_length(frame)
    kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    x = (torch.arange(size[1], **kind) * (width / size[1]) - (width - 1) / 2) / half
    y = (torch.arange(size[0], **kind) * (height / size[0]) - (height - 1) / 2) / half
    x, y = x.expand(size).flatten(), y[:, None].expand(size).flatten()
    sign = 2 * torch.arange(4, device=like.device) - 3  # −3, −1, 1, 3: left, left, right, right
    far_x = sign.sign().to(like.dtype) * ((width - 1) / 2 / half)
    far_y = (sign % 4 - 2).to(like.dtype) * ((height - 1) / 2 / half)  # up and down in turns
    return x, y, *jacobian(motion, x, y), half * torch.cat(jacobian(motion, far_x, far_y), dim=-1).mT


def _settle(warp: Tensor) -> Tensor:
    """Set warps within rounding of the identity to the identity; gradients are kept."""
    identity = _eye(3, like=warp)
    fixed, _ = finite_warp(warp.detach())
    none = (fixed - identity).abs().flatten(-2).amax(-1) < 64 * torch.finfo(warp.dtype).eps
    settled = torch.where(none[..., None, None], identity, fixed)
    return settled + (warp - warp.detach()).nan_to_num(0.0)


@keeps_tables
def _eye(length: int, *, like: Tensor) -> Tensor:
    """The unit matrix."""
    return torch.eye(length, dtype=like.dtype, device=like.device)


@keeps_tables
def _rotation(degrees: float, *, like: Tensor) -> Tensor:
    """(3, 3), about the frame's centre."""
    angle = like.new_full((), math.radians(degrees))
    none = torch.zeros_like(angle)
    return to_homogeneous(warp_of(torch.stack([none, none, angle]), "euclidean"))


@keeps_tables
def _triangle(parameters: int, *, like: Tensor) -> Tensor:
    """(P, P): where in the packed upper triangle of a symmetric matrix its entries are."""
    index = torch.arange(parameters, device=like.device)
    low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
    return low * parameters - low * (low - 1) // 2 + high - low


# ----------------------------------------------------------------------------------------- spectra and shapes


@keeps_tables
def _response(
    frame: tuple[int, int], size: tuple[int, int], max_frequency: float, vector: bool, *, like: Tensor
) -> Tensor:
    """(h, w//2+1): the root of the ramp |f|, within the band; 1 for vectors, whose fields have no 1/f spectrum."""
    share = WorkingGrid.of(frame, size, max_frequency, like).radius / max_frequency
    band = share < 1
    return band.to(share.dtype) if vector else share.sqrt() * band


def _for_parts(values: Tensor, vector: bool) -> Tensor:
    """(..., n) from (..., h · w): the same for both parts of a vector."""
    return torch.cat((values, values), -1) if vector else values


def _joined(parts: Tensor, vector: bool, *, dim: int = -1) -> Tensor:
    """(..., n) from a vector's (2, ..., h · w): its parts one after the other; a scalar field as it is."""
    return torch.cat((*parts,), dim) if vector else parts


@keeps_tables
def _spline_gain(
    frame: tuple[int, int], size: tuple[int, int], max_frequency: float, vector: bool, *, like: Tensor
) -> Tensor:
    """(h, w//2+1): the same for the coefficients of a spline through twice as many samples a side."""
    rows, columns = (_OVERSAMPLING * samples for samples in size)
    kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    y, x = torch.fft.fftfreq(rows, **kind), torch.fft.rfftfreq(columns, **kind)[: size[1] // 2 + 1]
    positive = size[0] - size[0] // 2
    y = torch.cat([y[:positive], y[rows - size[0] // 2 :]])
    gain = _OVERSAMPLING**2 / (sampling.spline_response(y)[:, None] * sampling.spline_response(x))
    return gain * _response(frame, size, max_frequency, vector, like=like)


def _derivatives_of(spectrum: Tensor, grid: WorkingGrid) -> tuple[Tensor, Tensor]:
    """(..., n) twice, the derivatives of a field by x and y, per half of the frame."""
    by_x, by_y = (
        irfft2(spectrum * slope, grid.size).flatten(-2)
        for slope in _derivatives_along(grid.frame, grid.size, like=grid.radius)
    )
    return by_x, by_y


@keeps_tables
def _derivatives_along(
    frame: tuple[int, int], size: tuple[int, int], *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(w//2+1,) and (h, 1): iω, per half of the frame."""
    y, x = WorkingGrid.of(frame, size, 0.5, like).frequencies
    omega_x, omega_y = (2 * math.pi * half_length(frame) * frequency for frequency in (x, y[:, None]))
    return 1j * omega_x, 1j * omega_y


def _shifted_by(shift: Tensor) -> Tensor:
    """(..., 3, 3), of (..., 2)."""
    return _eye(3, like=shift) + F.pad(shift.unsqueeze(-1), (2, 0, 0, 1))


def _shift_of(warp: Tensor, grid: WorkingGrid) -> Tensor:
    """(..., 2), the translation (x, y) of a normalised warp, in pixels."""
    return warp[..., :2, 2] * half_length(grid.frame)


def _samples_of(continued: Tensor) -> tuple[int, int]:
    """(rows, columns) of a field before its border was continued."""
    return continued.shape[-2] - 6, continued.shape[-1] - 6


def _unflatten(values: Tensor, dim: int, size: tuple[int, ...]) -> Tensor:
    return values.unflatten(dim, size)  # type: ignore[no-untyped-call]  # torch has no types for it


def _inner(weighted: Tensor, rows: Tensor) -> Tensor:
    """(..., T, n) by (..., 1 or T, K, n): (..., T, K)."""
    if weighted.ndim > 2 and rows.shape[-3] == 1:
        return torch.matmul(weighted, rows.squeeze(-3).mT)
    # frame by frame: its sums do not depend, not even in the last bit, on how many others there are
    return torch.matmul(weighted.unsqueeze(-2), rows.mT).squeeze(-2)
