r"""From matched points to a motion: mutual matches, robust fits of whole batches, windows that refine them.

The chain, each link a function that works alone:

1. :func:`mutual_matches`: points that are each other's nearest in description, among those that lie near where
   they are expected (guided) or anywhere.
2. :func:`consensus`: every hypothesis of a fixed table is drawn from the fewest matches that define the motion, and
   the one that most matches support wins; for a translation this is the mode of the displacements.
3. :func:`reweighted_fit`: Gauss–Newton steps with Tukey's weights, at a scale estimated from the residuals.
4. :func:`significance`: how far the number of agreeing matches exceeds what chance would give.
5. :func:`window_ascent`, for more than a translation: small windows around the inliers of both images are
   correlated, and the sum of their correlations is maximised over the parameters of the motion. Keypoints are
   accurate to 0.1 px, the windows to 0.01 px. (For a translation all of the ground is one window, see
   :mod:`torchalign.functional.phase`.)

Nothing here depends on a random generator, and nothing waits for the device: the numbers of hypotheses and of steps
are fixed, a point without a match has weight 0.

Convention:
    ``points`` are of the moving frame, ``targets`` of the reference, both (x, y) in pixels; a warp maps
    moving → reference. A *motion* is changed by a small :math:`\delta` on its left, :math:`W \leftarrow \Delta W`,
    whose parameters displace the content by so many pixels at the frame's longer edge, seen from its centre.

References:
    Fischler & Bolles 1981, doi:10.1145/358669.358692 (RANSAC); Torr & Zisserman 2000, doi:10.1006/cviu.1999.0832
    (scoring by residuals); Chum, Matas & Kittler 2003, doi:10.1007/978-3-540-45243-0_31 (local optimisation);
    Beaton & Tukey 1974, doi:10.1080/00401706.1974.10489171; Hartley & Zisserman 2004, *Multiple View Geometry*.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign.functional import affine
from torchalign.functional.fourier import rfft2
from torchalign.functional.motion import PARAMETERS, MotionModel, denormalize, half_length, jacobian, warp_of
from torchalign.functional.peak import derivatives_at, multiplicity, wave_orders
from torchalign.functional.phase import cross_power
from torchalign.functional.uncertainty import isotropic, largest_sigma
from torchalign.functional.working_grid import tukey

__all__ = [
    "Correspondences",
    "Matches",
    "MotionFit",
    "WindowFit",
    "consensus",
    "mutual_matches",
    "reweighted_fit",
    "significance",
    "window_ascent",
]

# The number of matches that define a motion.
_MINIMAL: dict[MotionModel, int] = {
    "translation": 1, "euclidean": 2, "similarity": 2, "affine": 3, "homography": 4,
}  # fmt: skip

# A match this near to where the motion puts it, in pixels, agrees with it.
INLIER_RADIUS = 1.0
# Matches that take part in the search for a consensus (the best described); all take part in the fit.
_SEARCHED = 512
# Hypotheses of each kind; so many of best score are fitted and scored again.
_HYPOTHESES, _OPTIMISED = 512, 4
# Radius of a hypothesis' support, in pixels: keypoints scatter by half a pixel, and a minimal fit extrapolates.
_MODE_RADIUS, _SUPPORT_RADIUS = 1.25, 3.0
# Minimal fits that zoom by more than this, or whose points lie nearer than this share of the frame, are none.
_LARGEST_ZOOM, _LEAST_BASELINE = 3.0, 0.05
# Tukey's constant (95 % efficient), and the mean square of normal residuals in the plane under these weights.
_TUKEY, _TUKEY_VARIANCE = 4.685, 0.8214
# Limits of the scale σ of residuals, in pixels.
_LEAST_SCALE, _LARGEST_SCALE = 0.05, 0.6
# Errors on simulated frames of all kinds exceed what the windows' scatter predicts (benchmarks/features.py).
_SIGMA_CALIBRATION = 1.3
# The side of a window, in pixels.
_WINDOW = 32
# The last step of an ascent that has converged is shorter than this, in pixels.
_ASCENT_TOLERANCE = 2e-2


class Matches(NamedTuple):
    """Which point of the other image belongs to each point."""

    #: (..., K) int64, into the other image's points; −1 if none
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    weight: Tensor  #: (..., K), in [0, 1]; 0 if none


class Correspondences(NamedTuple):
    """Matched points of frames."""

    points: Tensor  #: (..., K, 2) of the moving frame
    targets: Tensor  #: (..., K, 2), their matches in the reference
    weight: Tensor  #: (..., K) ≥ 0, 0 for no match
    size: tuple[int, int]  #: (H, W) of the frames

    def for_each(self) -> Correspondences:
        """The same for several warps of every frame, (..., n, 2|3, 3)."""
        points, targets, weight, size = self
        return Correspondences(points.unsqueeze(-3), targets.unsqueeze(-3), weight.unsqueeze(-2), size)

    def residuals(self, warp: Tensor) -> Tensor:
        """(..., K, 2): targets less mapped points; large where a point is at infinity."""
        return (self.targets - affine.mapped(warp, self.points)).nan_to_num(1e6, 1e6, 1e6)


class MotionFit(NamedTuple):
    """A motion and what supports it, one row a frame."""

    warp: Tensor  #: (..., 2, 3), or (..., 3, 3) for a homography; the identity where there is nothing to fit
    weight: Tensor  #: (..., K) in [0, 1], Tukey's weight of each match times its own
    inliers: Tensor  #: (...,), number of matches within :data:`INLIER_RADIUS`
    matches: Tensor  #: (...,), number of matches
    #: (..., 2, 2), of the displacement of the frame's centre, px²; infinite where the matches do not define the
    #: motion
    covariance: Tensor


class WindowFit(NamedTuple):
    """What :func:`window_ascent` finds, one row a frame."""

    #: (..., 2, 3) or (..., 3, 3), to be applied after the motion the images were brought together with
    warp: Tensor
    converged: Tensor  #: (...,) bool
    covariance: Tensor  #: (..., 2, 2), of the displacement of the frame's centre, px²


# ---------------------------------------------------------------------------------------------------- matches


def mutual_matches(
    similarity: Tensor,
    valid: Tensor,
    other_valid: Tensor,
    *,
    expected: Tensor | None = None,
    others: Tensor | None = None,
    radius: float | None = None,
) -> Matches:
    """Pairs that are each other's most similar, among the valid, near to where they are expected.

    Args:
        similarity: (..., K, L), of every point with every other, larger is more similar.
        valid: (..., K) bool.
        other_valid: (..., L) bool.
        expected: (..., K, 2), where each point should lie in the other image; ``None`` for anywhere.
        others: (..., L, 2), where the others lie.
        radius: in pixels, around ``expected``.

    Returns:
        :class:`Matches`, of weight 1 or 0.

    Example:
        >>> similarity = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.2]])
        >>> every = torch.ones(3, dtype=torch.bool)
        >>> mutual_matches(similarity, every[:2], every).index
        tensor([ 0, -1])
        >>> line = torch.tensor([[0.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
        >>> mutual_matches(similarity, every[:2], every, expected=line[:2], others=line, radius=2.0).index
        tensor([0, 1])
    """
    allowed = valid.unsqueeze(-1) & other_valid.unsqueeze(-2)  # (..., K, L)
    if expected is not None and others is not None and radius is not None:
        dx, dy = ((expected[..., :, None, axis] - others[..., None, :, axis]) for axis in (0, 1))
        allowed = allowed & (dx.square() + dy.square() <= radius**2)
    similarity = similarity.masked_fill(~allowed, -torch.inf)
    best, index = similarity.max(-1)  # (..., K)
    # (the place of a column's maximum costs a CPU ten times as much as its value)
    mutual = (best == similarity.amax(-2).gather(-1, index)) & (best > -torch.inf)
    # of several that are as similar to the same one, the first
    count = similarity.shape[-2]
    own = torch.arange(count, device=similarity.device).expand(index.shape)
    claim = torch.where(mutual, own, count)
    first = claim.new_full((*claim.shape[:-1], similarity.shape[-1]), count)
    first = first.scatter_reduce(-1, index, claim, "amin")
    mutual = mutual & (first.gather(-1, index) == own)
    return Matches(torch.where(mutual, index, -1), mutual.to(similarity.dtype))


# ------------------------------------------------------------------------------------------------------- fits


def consensus(matched: Correspondences, *, motion: MotionModel = "translation") -> Tensor:
    r"""The motion that most matches agree with.

    Of the matches, best first, a fixed low-discrepancy table draws 512 sets of the fewest that define
    the motion (1 for a translation, 2, 2, 3, 4; for more than a similarity, as many similarities besides, since
    two right matches are drawn more often than four). Each is scored by

    .. math:: \sum_i w_i \left(1 - \|W p_i - q_i\|^2 / c^2\right)_+

    For a translation that is a kernel estimate of the density of displacements, at the displacements, with
    Epanechnikov's kernel, and its maximum the mode. The best few of the others are fitted to their support and
    scored again.

    Args:
        matched: points and their matches.
        motion: what the frames may do.

    Returns:
        (..., 2, 3), or (..., 3, 3) for a homography. Finite; the identity if nothing defines a motion.

    Example:
        >>> points = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 100
        >>> targets = points + torch.tensor([3.0, -2.0])
        >>> targets[::2] = targets[::2].flip(0)  # half of the matches are wrong
        >>> consensus(Correspondences(points, targets, torch.ones(60), (100, 100)))[:, 2]
        tensor([ 3., -2.])
    """
    order = matched.weight.argsort(dim=-1, descending=True, stable=True)[..., :_SEARCHED]  # (..., S)
    count = (matched.weight > 0).sum(-1, keepdim=True).clamp(max=order.shape[-1])  # (..., 1)
    weight, size = matched.weight.gather(-1, order), matched.size
    points, targets = (
        tensor.gather(-2, order.unsqueeze(-1).expand(*order.shape, 2)) for tensor in matched[:2]
    )

    def drawn(number: int) -> tuple[Tensor, Tensor]:
        """(..., N, number, 2) points and targets, from the fixed table."""
        table = _table(_HYPOTHESES, number, weight)  # (N, number)
        rank = (table * count[..., None]).long().minimum((count[..., None] - 1).clamp(min=0))
        flat = rank.flatten(-2).unsqueeze(-1).expand(*rank.shape[:-2], _HYPOTHESES * number, 2)
        shape = (*rank.shape, 2)
        return points.gather(-2, flat).reshape(shape), targets.gather(-2, flat).reshape(shape)

    if motion == "translation":
        moved = targets - points
        sample, sample_target = drawn(1)
        shifts = (sample_target - sample).squeeze(-2)  # (..., N, 2)
        dx, dy = (shifts[..., :, None, axis] - moved[..., None, :, axis] for axis in (0, 1))  # (..., N, S)
        square = dx.square() + dy.square()
        score = ((1 - square / _MODE_RADIUS**2).clamp(min=0) * weight.unsqueeze(-2)).sum(-1)
        best = score.argmax(-1)[..., None, None].expand(*score.shape[:-1], 1, 2)
        shift = shifts.gather(-2, best).squeeze(-2)
        return affine.translation_warp(torch.where(count > 0, shift, 0.0))

    # (made where it is used: a copy from the host would wait for the device)
    centre = torch.stack([points.new_full((), (side - 1) / 2) for side in (size[1], size[0])])
    longest = max(size)
    homography = motion == "homography"
    kinds: list[MotionModel] = [motion] if motion in ("euclidean", "similarity") else ["similarity", motion]
    warps, fine = [], []
    for kind in kinds:
        own, other = drawn(_MINIMAL[kind])
        warp, sound = _minimal(own - centre, other - centre, kind, longest)
        if homography and warp.shape[-2] == 2:
            warp = affine.to_homogeneous(warp)
        warps.append(warp)
        fine.append(sound & (count >= _MINIMAL[kind]))
    warp, sound = affine.change_origin(torch.cat(warps, -3), -centre), torch.cat(fine, -1)  # (..., N, 2|3, 3)
    identity = affine.identity_warp(homography=homography, device=warp.device, dtype=warp.dtype)
    warp = torch.where(sound[..., None, None], warp, identity)

    best_matched = Correspondences(points, targets, weight, size).for_each()

    def support(warp: Tensor) -> Tensor:
        """(..., n): the score of (..., n, 2|3, 3) warps."""
        square = best_matched.residuals(warp).square().sum(-1)
        return ((1 - square / _SUPPORT_RADIUS**2).clamp(min=0) * weight.unsqueeze(-2)).sum(-1)

    score = support(warp).masked_fill(~sound, -1.0)
    chosen = score.topk(min(_OPTIMISED, score.shape[-1]), -1).indices[..., None, None]
    candidates = warp.gather(-3, chosen.expand(*chosen.shape[:-2], *warp.shape[-2:]))
    # from a support as wide as the errors that a minimal, or too simple, motion makes at the frame's edge
    grown = candidates
    for share in (0.03, 0.02, 0.015, 0.01):
        grown, _ = _step(grown, best_matched, motion, max(share * longest, _SUPPORT_RADIUS))
    candidates = torch.cat((candidates, grown), -3)
    best = support(candidates).argmax(-1)[..., None, None, None]
    return candidates.gather(-3, best.expand(*best.shape[:-3], 1, *warp.shape[-2:])).squeeze(-3)


def reweighted_fit(
    warp: Tensor, matched: Correspondences, *, motion: MotionModel = "translation", steps: int = 12
) -> MotionFit:
    r"""Least squares with Tukey's weights, from a start that a part of the matches agrees with.

    .. math:: \min_W \sum_i w_i\, \rho\!\left(\|W p_i - q_i\| / 4.685\,\hat\sigma\right)

    by Gauss–Newton steps, :math:`\hat\sigma` measured anew at each from the residuals under its weights.

    Args:
        warp: (..., 2, 3) or (..., 3, 3), the start.
        matched: points and their matches.
        motion: what the frames may do.
        steps: number of steps.

    Returns:
        :class:`MotionFit`.

    Example:
        >>> points = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 100
        >>> targets = 1.1 * points + torch.tensor([3.0, -2.0])
        >>> targets[::3] += 40
        >>> matched = Correspondences(points, targets, torch.ones(60), (100, 100))
        >>> start = consensus(matched, motion="similarity")
        >>> fit = reweighted_fit(start, matched, motion="similarity")
        >>> fit.warp[0].round(decimals=3), fit.inliers
        (tensor([1.1000, 0.0000, 3.0000]), tensor(40.))
    """
    weight = matched.weight
    scale = torch.full_like(weight[..., 0], _LARGEST_SCALE)
    for _ in range(steps):
        warp, (inner, square) = _step(warp, matched, motion, _TUKEY * scale)
        variance = 0.5 * (inner * square).sum(-1) / inner.sum(-1).clamp(min=torch.finfo(weight.dtype).tiny)
        scale = (variance / _TUKEY_VARIANCE).sqrt().clamp(_LEAST_SCALE, _LARGEST_SCALE)
    square = matched.residuals(warp).square().sum(-1)
    inner = weight * _biweight(square, _TUKEY * scale)
    used = weight > 0
    normal, _ = _normal_equations(warp, matched._replace(weight=inner), motion)
    # of the displacement of the centre, where the other parameters displace nothing
    covariance = _invert(normal)
    freedom = inner.sum(-1) - 0.5 * PARAMETERS[motion]
    spread = 0.5 * (inner * square).sum(-1) / freedom.clamp(min=0.5) / _TUKEY_VARIANCE
    determined = (freedom > 0) & affine.are_finite(covariance)
    rows = determined[..., None, None]
    centre = spread[..., None, None] * torch.where(rows, covariance[..., :2, :2], 0.0)
    centre = torch.where(rows, centre, isotropic(torch.full_like(spread, torch.inf)))
    near, count = (some.to(weight.dtype).sum(-1) for some in (used & (square <= INLIER_RADIUS**2), used))
    return MotionFit(warp, inner, near, count, centre)


def significance(
    inliers: Tensor, matches: Tensor, chance: float | Tensor, *, motion: MotionModel = "translation"
) -> Tensor:
    r"""How many standard deviations of a Poisson law the agreeing matches exceed what chance would give.

    .. math:: z = \frac{k - m - E}{\sqrt{E + 1}}, \qquad E = (n - m)\,p

    with k of n matches agreeing (``inliers``, ``matches``), m the matches that any motion of the kind can be made to
    agree with, and p the chance that a wrong match agrees: the area within :data:`INLIER_RADIUS` over the area where it
    may lie. Since the motion was chosen for its k, unrelated images reach larger values than a normal variable does.
    All are (...,).

    Example:
        >>> significance(torch.tensor(25.0), torch.tensor(101.0), 0.15)
        tensor(2.2500)
    """
    fixed = _MINIMAL[motion]
    expected = (matches - fixed).clamp(min=0) * chance
    return (inliers - fixed - expected) / (expected + 1) ** 0.5


# ---------------------------------------------------------------------------------------------------- windows


def window_ascent(
    moving: Tensor,
    reference: Tensor,
    points: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    *,
    motion: MotionModel = "translation",
    max_frequency: float = 0.25,
    windows: int = 128,
    steps: int = 5,
) -> WindowFit:
    r"""The small remaining motion between two images that maximises the correlation of windows.

    .. math:: \max_\delta \sum_w \omega_w\, C_w(J_w \delta), \qquad
              C_w(t) = \sum_f |f|\, \mathrm{Re}\, M_w^*(f) R_w(f)\, e^{2\pi i f \cdot t}

    with :math:`C_w` the correlation of window w as a function of a continuous shift (see
    :mod:`torchalign.functional.phase`), :math:`J_w \delta` the displacement of its centre under the motion's
    parameters, and :math:`\omega_w = \rho_w^2` its squared coefficient of correlation there, 0 if negative.
    Newton's steps take gradient and Hessian of all windows together, so a window that sees a road tells how far off
    it is across, and is not asked along it. Differentiable with respect to both images as
    :func:`~torchalign.functional.peak.refine_peak` is.

    Args:
        moving: (..., h, w), a :func:`texture <torchalign.functional.texture.extract_texture>` of the moving frame,
            resampled onto the reference.
        reference: (..., h, w), that of the reference, broadcastable.
        points: (..., K, 2), where windows may lie, (x, y) in pixels of the frame.
        weight: (..., K) ≥ 0; the windows lie at the points of most weight, none where it is 0.
        size: (H, W) of the frame.
        motion: what the frames may do.
        max_frequency: of the textures, in cycles per pixel.
        windows: how many, of 32² pixels.
        steps: of Newton's method.

    Returns:
        :class:`WindowFit`.
    """
    rows, columns = moving.shape[-2:]
    step_y, step_x = size[0] / rows, size[1] / columns  # pixels per sample
    height, width = (
        min(max(4, round(_WINDOW / step)), samples) for step, samples in ((step_y, rows), (step_x, columns))
    )
    weight, chosen = weight.topk(min(windows, weight.shape[-1]), -1)  # (..., n)
    points = points.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, 2)).detach()
    left = (points[..., 0] / step_x - (width - 1) / 2).round().long().clamp(0, columns - width)
    top = (points[..., 1] / step_y - (height - 1) / 2).round().long().clamp(0, rows - height)
    inside_y, inside_x = (torch.arange(length, device=moving.device) for length in (height, width))
    index = (top[..., None, None] + inside_y[:, None]) * columns + left[..., None, None] + inside_x
    shape = index.shape  # (..., n, height, width)
    kind = {"device": moving.device, "dtype": moving.dtype}
    frequencies = torch.fft.fftfreq(height, step_y, **kind), torch.fft.rfftfreq(width, step_x, **kind)
    radius = torch.hypot(frequencies[1], frequencies[0][:, None])
    taper = tukey(inside_y.to(moving.dtype), height, 1.0)[:, None] * tukey(
        inside_x.to(moving.dtype), width, 1.0
    )

    def spectra(field: Tensor) -> Tensor:
        """(..., n, height, width//2+1)."""
        flat = field.flatten(-2).expand(*shape[:-3], rows * columns)
        return rfft2(flat.gather(-1, index.flatten(-3)).reshape(shape) * taper)

    first, second = spectra(moving), spectra(reference)
    power = cross_power(first, second, radius, max_frequency)
    both = (radius * (radius < max_frequency)) * multiplicity(frequencies[1])
    norms = [(both * (part.real.square() + part.imag.square())).sum((-2, -1)) for part in (first, second)]
    energy = (norms[0] * norms[1]).detach().sqrt() + torch.finfo(moving.dtype).tiny

    centres = torch.stack((left + 0.5 * (width - 1), top + 0.5 * (height - 1)), -1).to(moving.dtype)
    centres = torch.stack((step_x * centres[..., 0], step_y * centres[..., 1]), -1)  # in pixels
    by_motion = _jacobian(centres, size, motion)  # (..., n, 2, P)
    ascent = _Ascent(frequencies, wave_orders(frequencies), by_motion, (weight > 0).to(energy), energy)

    delta = moving.new_zeros(*shape[:-3], PARAMETERS[motion])
    for _ in range(steps):
        step, *_ = ascent.newton(power.detach(), delta)
        delta = delta + step.detach()
    step, definite, hessian, pulls, emphasis = ascent.newton(power, delta)
    delta = delta + step
    # identical frames are at exactly 0: what rounding leaves there is taken off, and its gradient kept
    none = (delta.detach().abs() < 64 * torch.finfo(delta.dtype).eps).all(-1, keepdim=True)
    delta = torch.where(none, delta - delta.detach(), delta)

    emphasis, inverse = emphasis.detach(), _invert(hessian.detach())
    covariance = inverse @ _scatter(pulls.detach(), left / width, top / height) @ inverse
    used = (emphasis > 0).to(energy).sum(-1)
    freedom = used - 0.5 * PARAMETERS[motion]
    inflated = _SIGMA_CALIBRATION**2 * used / freedom.clamp(min=0.5)
    centre = inflated[..., None, None] * covariance[..., :2, :2]
    centre = torch.where(
        affine.are_finite(centre)[..., None, None], centre, isotropic(torch.full_like(used, torch.inf))
    )
    converged = definite & (freedom >= 1) & (step.detach().abs().amax(-1) < _ASCENT_TOLERANCE)
    converged = converged & largest_sigma(centre).isfinite()
    return WindowFit(_warp_of_increment(delta, size, motion), converged, centre)


class _Ascent(NamedTuple):
    """What Newton's steps on the sum of all windows' correlations need."""

    frequencies: tuple[Tensor, Tensor]
    orders: tuple[Tensor, Tensor]
    jacobian: Tensor  # (..., n, 2, P), displacement of the windows' centres by each parameter
    used: Tensor  # (..., n), 1 or 0
    energy: Tensor  # (..., n), the correlation of a window with itself

    def newton(self, power: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A step from delta (..., P), whether the Hessian is negative definite, its negative (..., P, P).

        And of every window its pull (..., n, P) and weight ω (..., n).
        """
        shift = (self.jacobian * delta[..., None, None, :]).sum(-1)  # (..., n, 2)
        derivatives = derivatives_at(power, self.frequencies, shift, self.orders)  # (..., n, 3, 3)
        correlation = (derivatives[..., 0, 0].detach() / self.energy).clamp(0, 1)
        emphasis = self.used * correlation.square()
        slope = torch.stack((derivatives[..., 0, 1], derivatives[..., 1, 0]), -1)  # (..., n, 2)
        mixed = derivatives[..., 1, 1]
        rows = ((derivatives[..., 0, 2], mixed), (mixed, derivatives[..., 2, 0]))
        curvature = torch.stack([torch.stack(row, -1) for row in rows], -2)  # (..., n, 2, 2)
        pulls = emphasis[..., None] * (self.jacobian * slope.unsqueeze(-1)).sum(-2)
        weighted = emphasis[..., None, None] * torch.matmul(curvature, self.jacobian)
        hessian = torch.matmul(self.jacobian.mT, weighted).sum(-3)
        step, definite = _solve_definite(-hessian, pulls.sum(-2))
        return step.clamp(-0.5, 0.5), definite, -hessian, pulls, emphasis


def _scatter(pulls: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """(..., P, P), of pulls (..., n, P) of windows at (..., n), in units of their size.

    Errors of overlapping windows are correlated (Conley 1999): pulls are paired by the share of ground in common.
    """
    along_x, along_y = (
        (1 - (place.unsqueeze(-1) - place.unsqueeze(-2)).abs().to(pulls.dtype)).clamp(min=0)
        for place in (left, top)
    )
    return torch.matmul(pulls.mT, torch.matmul(along_x * along_y, pulls))


# ----------------------------------------------------------------------------------------- steps towards a motion


def _jacobian(points: Tensor, size: tuple[int, int], motion: MotionModel) -> Tensor:
    """(..., 2, P): displacement of points (..., 2), in pixels, by each parameter of :func:`_warp_of_increment`."""
    half = half_length(size)
    x, y = ((points[..., axis] - (size[1 - axis] - 1) / 2) / half for axis in (0, 1))
    return torch.stack(jacobian(motion, x, y, dim=-1), -2)


def _warp_of_increment(delta: Tensor, size: tuple[int, int], motion: MotionModel) -> Tensor:
    """The warp of parameters (..., P) that displace the frame's longer edge by so many pixels."""
    return denormalize(warp_of(delta / half_length(size), motion), size)


def _biweight(square: Tensor, radius: Tensor | float) -> Tensor:
    """Tukey's weights of residuals whose squares are (..., K); 0 from ``radius`` (...,) on."""
    if isinstance(radius, Tensor):
        radius = radius.unsqueeze(-1)
    return (1 - square / radius**2).clamp(min=0).square()


def _normal_equations(warp: Tensor, matched: Correspondences, motion: MotionModel) -> tuple[Tensor, Tensor]:
    """(..., P, P) and (..., P), of the increment that least squares asks for."""
    residual = matched.residuals(warp)  # (..., K, 2)
    used = matched.weight > 0
    # the jacobian where the points are mapped to; 0 for unused ones, since 0 · ∞ is NaN
    mapped = torch.where(used.unsqueeze(-1), matched.targets - residual, 0.0)
    by_motion = _jacobian(mapped, matched.size, motion)
    weighted = (by_motion * matched.weight[..., None, None]).flatten(-3, -2)  # (..., 2K, P)
    by_motion = by_motion.flatten(-3, -2)
    residual = torch.where(used.unsqueeze(-1), residual, 0.0).flatten(-2)
    return torch.matmul(weighted.mT, by_motion), torch.matmul(weighted.mT, residual.unsqueeze(-1)).squeeze(-1)


def _step(
    warp: Tensor, matched: Correspondences, motion: MotionModel, radius: Tensor | float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One Gauss–Newton step under Tukey's weights; and these weights, and the squared residuals, before it."""
    residual = matched.residuals(warp)
    square = residual.square().sum(-1)
    inner = matched.weight * _biweight(square, radius)
    if motion == "translation":  # the weighted mean
        total = inner.sum(-1, keepdim=True).clamp(min=torch.finfo(inner.dtype).tiny)
        delta = (inner.unsqueeze(-1) * residual).sum(-2) / total
        return warp + F.pad(delta.unsqueeze(-1), (2, 0)), (inner, square)
    delta, _ = _solve_definite(*_normal_equations(warp, matched._replace(weight=inner), motion))
    warp = affine.composed(warp, _warp_of_increment(delta, matched.size, motion))
    return affine.unit_corner(warp), (inner, square)


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor of (..., P, P) and a ridge of rounding's size; 1, and False, where it is not definite."""
    count = matrix.shape[-1]
    eye = torch.eye(count, device=matrix.device, dtype=matrix.dtype)
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    matrix = matrix + (4 * torch.finfo(matrix.dtype).eps * trace.abs() + torch.finfo(matrix.dtype).tiny) * eye
    factor, failed = torch.linalg.cholesky_ex(matrix.detach())
    definite = (failed == 0) & (trace.squeeze((-2, -1)) > 0) & affine.are_finite(factor)
    return torch.linalg.cholesky_ex(torch.where(definite[..., None, None], matrix, eye)).L, definite


def _solve_definite(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """matrix⁻¹ · right, 0 where the matrix is not positive definite; and whether it is."""
    factor, definite = _factor(matrix)
    # on CUDA torch.cholesky_solve and torch.cholesky_inverse wait for the device, two triangles do not
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(-1), upper=False)
    solution = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
    return torch.where(definite.unsqueeze(-1) & solution.isfinite(), solution, 0.0), definite


def _invert(matrix: Tensor) -> Tensor:
    """The inverse; infinite where the matrix is not positive definite."""
    factor, definite = _factor(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    half = torch.linalg.solve_triangular(factor, eye, upper=False)
    return torch.where(definite[..., None, None], torch.matmul(half.mT, half), torch.inf)


def _table(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) in [0, 1): evenly spread (one column), or Roberts' low-discrepancy sequence."""
    n = torch.arange(rows, device=like.device, dtype=torch.float64)
    if columns == 1:
        return ((n + 0.5) / rows).to(like.dtype).unsqueeze(-1)
    root = 2.0
    for _ in range(40):
        root = (1 + root) ** (1 / (columns + 1))
    steps = root ** -(torch.arange(columns, device=like.device, dtype=torch.float64) + 1)
    return (0.5 + (n[:, None] + 1) * steps).frac().to(like.dtype)


def _minimal(points: Tensor, targets: Tensor, motion: MotionModel, longest: int) -> tuple[Tensor, Tensor]:
    """The motions through (..., m, 2) → (..., m, 2): warps (..., 2|3, 3), and whether they can be meant."""
    least = _LEAST_BASELINE * longest
    if motion in ("euclidean", "similarity"):
        base, image = points[..., 1, :] - points[..., 0, :], targets[..., 1, :] - targets[..., 0, :]
        length = base.square().sum(-1)
        safe = torch.where(length > 0, length, 1.0)
        # as complex numbers, the quotient image / base
        real = (base * image).sum(-1) / safe
        imaginary = (base[..., 0] * image[..., 1] - base[..., 1] * image[..., 0]) / safe
        zoom = torch.hypot(real, imaginary)
        sound = (length >= least**2) & (zoom <= _LARGEST_ZOOM) & (zoom >= 1 / _LARGEST_ZOOM)
        if motion == "euclidean":
            positive = torch.where(zoom > 0, zoom, 1.0)
            real, imaginary = real / positive, imaginary / positive
            # a rigid motion keeps lengths
            sound = sound & ((zoom - 1).abs() * length.sqrt() <= 2 * _SUPPORT_RADIUS)
        linear = torch.stack((real, -imaginary, imaginary, real), -1).reshape(*real.shape, 2, 2)
        middle, target = points.mean(-2), targets.mean(-2)
        offset = target - (linear * middle.unsqueeze(-2)).sum(-1)
        return torch.cat((linear, offset.unsqueeze(-1)), -1), sound
    # columns (x, y, 1); with the first three, barycentric coordinates
    source, image = (torch.cat((side, torch.ones_like(side[..., :1])), -1).mT for side in (points, targets))
    inverse, area = affine.adjugate(source[..., :3])
    safe = torch.where(area == 0, 1.0, area)[..., None, None]
    _, image_area = affine.adjugate(image[..., :3])
    zoom = image_area.abs() / torch.where(area == 0, 1.0, area).abs()
    sound = (area.abs() >= least**2) & (zoom <= _LARGEST_ZOOM**2) & (zoom >= _LARGEST_ZOOM**-2)
    # a picture is not mirrored
    sound = sound & (area * image_area > 0)
    if motion == "affine":
        return affine.multiply(image, inverse / safe)[..., :2, :], sound
    # a projective basis: the three points scaled so that their sum is the fourth
    own = affine.multiply(inverse / safe, source[..., 3:])  # (..., 3, 1)
    image_inverse, _ = affine.adjugate(image[..., :3])
    image_safe = torch.where(image_area == 0, 1.0, image_area)[..., None, None]
    other = affine.multiply(image_inverse / image_safe, image[..., 3:])
    # no three in line, and the same side of the horizon
    sound = sound & (own.abs().amin((-2, -1)) > 0.1) & (own * other > 0).all(-1).all(-1)
    ratio = other / torch.where(own == 0, 1.0, own)
    warp = affine.multiply(image[..., :3] * ratio.mT, inverse / safe)
    corner = warp[..., 2:, 2:]
    return warp / torch.where(corner == 0, 1.0, corner), sound & (corner.squeeze((-2, -1)) > 0)
