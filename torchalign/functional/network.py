r"""Positions of all frames of a series from a network of pairs, and what the sun adds to them.

No frame is the reference. Every pair of frames (i, j) that is compared gives a shift :math:`s_{ij}`, and the
positions solve

.. math:: \min_p \sum_{ij} \rho\!\left( \frac{|p_i - p_j - s_{ij}|}{\sqrt{\sigma_{ij}^2 + \tau^2}} \right)

with Huber's ρ. Positions are known up to one common shift, the gauge.

The links, each a function that works alone:

* :func:`cell_contrast`, :func:`similarity`: which frames look alike, all against all in one matrix product.
* :func:`choose_edges`: which pairs are compared. Nothing of it depends on a frame's number.
* :func:`spanning_tree`, :func:`components`: which frames are connected.
* :func:`solve_positions`, :func:`position_variance`: the positions and how well the network fixes them.
* :func:`place_frames`: new frames on old ones that stay where they are.
* :func:`shadow_direction`, :func:`fit_slope`, :func:`season_term`: shading and shadows move with the sun
  and bias the shift. The bias closes round every triangle, so the network cannot see it; parts of the frame with
  different relief disagree about it.

Positions are in float64 and in pixels (x, y). All loops have a fixed number of steps.

References:
    Huber 1964, doi:10.1214/aoms/1177703732 (the loss); Prim 1957, doi:10.1002/j.1538-7305.1957.tb01515.x (the
    tree); Berardino et al. 2002, doi:10.1109/TGRS.2002.803792 (networks of pairs in radar interferometry).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import all_true
from torchalign.functional.fourier import rfft2
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.smoothing import nanmedian
from torchalign.functional.texture import Texture
from torchalign.functional.working_grid import WorkingGrid

__all__ = [
    "Edges",
    "Positions",
    "SeasonTerm",
    "cell_contrast",
    "choose_edges",
    "components",
    "consensus_scores",
    "fit_slope",
    "frame_keys",
    "median_of",
    "place_frames",
    "position_variance",
    "season_term",
    "shadow_direction",
    "similarity",
    "solve_positions",
    "spanning_tree",
    "sum_of_pairs",
]

# Samples of the working grid along a cell: about 6 pixels, so that a shift of a pixel hardly changes a cell.
_CELL = 3
# How often a frame's key runs round [0, 1) over the spread of its projection: frames that look alike lie far apart.
_TURNS = 64.0
# What is left unexplained between two frames, in pixels, at the least: no pair is exact.
_FLOOR = 0.03
# Residuals beyond this many standard deviations count by their length, not by its square.
_HUBER = 1.0
_STEPS = 25
# Longer series are solved by conjugate gradients, so many steps from the last solution on, or until what is left is
# this share of what was asked.
_DENSE, _CONJUGATE_STEPS, _LEFT = 500, 200, 1e-9
# The last solve takes up to so many steps a frame: of a chain of frames as many as there are frames are needed.
_LAST_STEPS = 2
# And the variances of still longer ones by as many vectors of random signs, which tell σ to 5 %.
_DENSE_VARIANCE, _PROBES = 4000, 64
# A frame hangs on the network by at least this much weight: two pairs that agree.
_SUPPORT = 2.0
# The median length of a vector of two normal deviates, in their standard deviations.
_RAYLEIGH = 1.1774
# The season term: frames that make a slope; a block's slope is never surer than this, in pixels; the root mean
# square z of the blocks from which on there is a term (without relief it was at most 4.2, with it 4.9 to 11.8); by
# how much slopes along the shadow must outdo those across it, which phenology makes as large.
_FEWEST_FRAMES, _SLOPE_FLOOR, _SEASON_Z, _ALONG = 12, 0.01, 4.5, 1.1
# The frame's own slope is expected at this many times the blocks' spread, give or take so many times: on simulated
# series with relief it was at −1.0 ± 0.55 of it.
_PRIOR_MEAN, _PRIOR_SPREAD = -1.0, 0.6
_FEWEST_BLOCKS = 3
# Samples of the frames that are scored at once.
_SCORE_SAMPLES = 2**20
# Shadows of a lower sun are not longer, as far as the term is concerned, in degrees.
_LOWEST_SUN = 5.0


class Edges(NamedTuple):
    """Pairs of frames to compare."""

    moving: Tensor  #: (E,) int64, the frame that is moved
    reference: Tensor  #: (E,) int64, the frame it is moved onto
    distinct: Tensor  #: (E,) bool, ``False`` where a pair stands in the list already, or is no pair


class Positions(NamedTuple):
    """What :func:`solve_positions` finds."""

    #: (..., T, 2), float64: the shift that brings a frame to the gauge, the median of the frames that are
    #: connected; 0 for the others
    position: Tensor
    weight: Tensor  #: (..., E), what each pair counts, in [0, 1]; 0 where it is not usable
    precision: Tensor  #: (..., E), the same over its variance, 1 / px²
    residual: Tensor  #: (..., E), length of what a pair says less what the positions say, in pixels
    #: (..., T), root mean square of a frame's residuals per axis, in pixels. It tells how well its pairs agree,
    #: and nothing about an error that all of them share
    closure: Tensor
    support: Tensor  #: (..., T), sum of the weights of a frame's pairs
    component: Tensor  #: (..., T) int64, frames with the same number hang together
    connected: Tensor  #: (..., T) bool, in the largest component and with enough support


class SeasonTerm(NamedTuple):
    """What :func:`season_term` finds."""

    #: (), shift along the shadow per unit of cot(elevation), in pixels; 0 where there is no term
    slope: Tensor
    sigma: Tensor  #: (), its 1-σ error
    significance: Tensor  #: (), root mean square z of the blocks' slopes against that of the frame
    present: Tensor  #: () bool, blocks disagree about the sun's part so much that the scene must have relief
    #: (T,), how far the blocks of a frame disagree beyond their own errors, per axis, in pixels
    spread: Tensor
    blocks: Tensor  #: (T,), from how many blocks


# --- which frames look alike ---


def cell_contrast(field: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Local contrast in coarse cells, from which the similarity of frames is computed.

    The means over cells of 3 × 3 samples and their weights, both (T, n), of a texture's field and weights (T, h, w).
    """
    cell = min(_CELL, field.shape[-2], field.shape[-1])
    features = F.avg_pool2d(field[:, None], cell).flatten(1)
    if weights is None:
        return features, torch.ones_like(features)
    return features, F.avg_pool2d(weights.expand_as(field)[:, None], cell).flatten(1)


def similarity(features: Tensor, weights: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Tensor:
    r"""The correlation of all frames with all, times the root of the share of ground that both show.

    .. math:: \frac{\sum w_i f_i\, w_j f_j}{\sqrt{\sum w_i f_i^2 w_j \sum w_i w_j f_j^2}}
        \sqrt{\tfrac{1}{n} \sum w_i w_j}

    Args:
        features: (T, n), of :func:`cell_contrast`.
        weights: (T, n).
        others: the same two of S other frames; by default, these.

    Returns:
        (T, T or S), in [−1, 1].

    >>> wave = torch.arange(6.0).cos()[None]
    >>> similarity(torch.cat([wave, -wave]), torch.ones(2, 6)).round()
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    other_features, other_weights = (features, weights) if others is None else others
    weighted, other_weighted = features * weights, other_features * other_weights
    product = weighted @ other_weighted.mT
    energy = (features * weighted) @ other_weights.mT
    other_energy = weights @ (other_features * other_weighted).mT
    tiny = torch.finfo(features.dtype).eps ** 2
    area = (weights @ other_weights.mT / weights.shape[-1]).clamp(0, 1)
    return (product / (energy * other_energy + tiny).sqrt()).clamp(-1, 1) * area.sqrt()


def frame_keys(features: Tensor, weights: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1) drawn from the frames themselves, for links that no frame's place in the series decides.

    A fixed projection of a frame's contrast, (T, n) of :func:`cell_contrast`, scaled by its size, many times round: as
    good as random, yet the same for the same frame. (T, count), float64.
    """
    seen = (features * weights).double()
    place = torch.arange(1, seen.shape[-1] + 1, device=seen.device, dtype=torch.float64)
    draw = torch.arange(1, count + 1, device=seen.device, dtype=torch.float64)
    # the fractions of n² · irrational are spread evenly, and those of different draws are unrelated
    angle = (place.square() * (0.5 * (math.sqrt(5) - 1)))[:, None] * (draw * math.sqrt(2) + 1)
    directions = torch.cos(2 * math.pi * angle.frac())
    length = seen.square().sum(-1, keepdim=True).sqrt() + torch.finfo(torch.float64).tiny
    turned = seen @ directions / length * _TURNS
    return turned - turned.floor()


# --- which pairs are compared ---


def choose_edges(
    likeness: Tensor, keys: Tensor, *, neighbours: int = 6, empty: Tensor | None = None
) -> Edges:
    """Each frame's most similar ones, rings through all frames, and the maximum spanning tree.

    Neighbours give precise pairs; rings, one for each of a frame's keys, tie seasons together that look unlike;
    the tree leaves no frame out. Frames are brought in another order without changing which pairs there are, nor
    which of the two is moved.

    Args:
        likeness: (T, T), of :func:`similarity`.
        keys: (T, n ≥ 1), of :func:`frame_keys`; the first decides which frame is moved, each of the others orders
            the frames round a ring.
        neighbours: how many of the most similar frames each is compared with.
        empty: (T,) bool, frames that show nothing: they stay at the end of every ring.

    Returns:
        :class:`Edges`, a fixed number of them for a number of frames.
    """
    frames = likeness.shape[-1]
    device = likeness.device
    number = torch.arange(frames, device=device)
    others = likeness.masked_fill(number[:, None] == number, -torch.inf)
    near = others.topk(min(neighbours, max(frames - 1, 0)), -1).indices  # (T, k)
    first = [number[:, None].expand_as(near).flatten()]
    second = [near.flatten()]
    if keys.shape[-1] > 1:
        rings = keys[:, 1:] if empty is None else keys[:, 1:].masked_fill(empty[:, None], 2.0)
        order = rings.argsort(0)  # (T, n)
        first.append(order.flatten())
        second.append(order.roll(-1, 0).flatten())
    first.append(number)
    second.append(spanning_tree(likeness))
    one, other = torch.cat(first), torch.cat(second)
    swap = keys[one, 0] < keys[other, 0]
    moving, reference = torch.where(swap, other, one), torch.where(swap, one, other)
    code = torch.maximum(one, other) * frames + torch.minimum(one, other)
    ordered, place = code.sort(stable=True)
    again = torch.cat([torch.zeros_like(ordered[:1], dtype=torch.bool), ordered[1:] == ordered[:-1]])
    repeated = torch.zeros_like(again).scatter(0, place, again)
    return Edges(moving, reference, ~repeated & (one != other))


def spanning_tree(likeness: Tensor) -> Tensor:
    """The maximum spanning tree of a complete graph (T, T), by Prim's method, in T − 1 steps.

    (T,) int64, the frame that each hangs on; the first one on itself.

    >>> spanning_tree(torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.8], [0.1, 0.8, 1.0]]))
    tensor([0, 0, 1])
    """
    frames = likeness.shape[-1]
    number = torch.arange(frames, device=likeness.device)
    likeness = likeness.detach()
    parent = torch.zeros_like(number)
    reached = number == 0
    best = likeness[:1].squeeze(0) if frames else likeness.new_zeros(0)
    for _ in range(frames - 1):
        chosen = best.masked_fill(reached, -torch.inf).argmax(-1, keepdim=True)  # (1,)
        reached = reached | (number == chosen)
        row = likeness.index_select(0, chosen).squeeze(0)
        nearer = (row > best) & ~reached
        best = torch.where(nearer, row, best)
        parent = torch.where(nearer, chosen, parent)
    return parent


def components(edges: Edges, usable: Tensor, frames: int) -> Tensor:
    """(..., T) int64: the smallest number of a frame that each is connected with, by the pairs that count (..., E).

    >>> edges = Edges(torch.tensor([1, 3, 4]), torch.tensor([0, 2, 3]), torch.ones(3, dtype=torch.bool))
    >>> components(edges, torch.tensor([True, True, False]), 5)
    tensor([0, 0, 2, 2, 4])
    """
    lead = usable.shape[:-1]
    label = torch.arange(frames, device=usable.device).expand(*lead, frames)
    one, other = edges.moving.expand(usable.shape), edges.reference.expand(usable.shape)
    # a label's own frame is hooked, too, and labels are followed: the reach doubles with every step
    for _ in range(2 * max(frames, 1).bit_length() + 2):
        ends = label.gather(-1, one), label.gather(-1, other)
        least = torch.minimum(*ends)
        least = torch.where(usable, least, frames)
        for index in (one, other, *ends):
            label = label.scatter_reduce(-1, index, least, "amin")
        label = label.gather(-1, label)
    return label


# --- positions ---


def solve_positions(
    shift: Tensor, sigma: Tensor, usable: Tensor, edges: Edges, frames: int, *, steps: int = _STEPS
) -> Positions:
    """Robust least squares on the network: Huber's loss by reweighting, a fixed number of solves.

    Redescending losses are no better here: they choose one of two seasons. What pairs leave unexplained beyond
    their own σ, τ, is estimated along the way, and is at least 0.03 px.

    Args:
        shift: (..., E, 2), what each pair says, moving → reference, in pixels.
        sigma: (..., E), its 1-σ error per axis.
        usable: (..., E) bool, the pairs that count.
        edges: E pairs.
        frames: T.
        steps: how often the weights are taken anew.

    Returns:
        :class:`Positions`. Differentiable by ``shift``, for the weights that were found.
    """
    usable = usable & edges.distinct & shift.isfinite().all(-1) & sigma.isfinite()
    shift = torch.where(usable[..., None], shift, 0.0).double()
    variance = torch.where(usable, sigma, 1.0).detach().double().square()
    component = components(edges, usable, frames)
    pairs = usable.double()
    degree = sum_of_pairs(edges, pairs, frames)
    roots = (component == torch.arange(frames, device=component.device)) & (degree > 0)
    count = pairs.sum(-1).clamp(min=1)
    freedom = (count - (degree > 0).sum(-1) + roots.sum(-1)).clamp(min=1) / count
    typical = _median(variance, usable)

    weight, excess = pairs, torch.full_like(count, _FLOOR**2)
    fixed = shift.detach()
    residual = torch.zeros_like(variance)
    position = fixed.new_zeros(*fixed.shape[:-2], frames, 2)
    for _ in range(steps):
        position = _solve_pairs(weight / (variance + excess[..., None]), fixed, edges, component, position)
        residual = _residual(fixed, position, edges).norm(dim=-1)
        middle = _median(residual, usable) / _RAYLEIGH
        excess = (middle.square() / freedom - typical).nan_to_num(0.0).clamp(min=_FLOOR**2)
        deviation = residual / (variance + excess[..., None]).sqrt()
        weight = pairs * (_HUBER / deviation.clamp(min=_HUBER))
    precision = weight / (variance + excess[..., None])
    position = _solve_pairs(precision, shift, edges, component, position, steps=_LAST_STEPS * frames)
    residual = _residual(fixed, position.detach(), edges).norm(dim=-1)

    support = sum_of_pairs(edges, weight, frames)
    scatter = sum_of_pairs(edges, precision * residual.square(), frames)
    total = sum_of_pairs(edges, precision, frames)
    closure = (scatter / (2 * total).clamp(min=torch.finfo(total.dtype).tiny)).sqrt()
    # of components of one size, the one with more weight
    size = _over_component(component, 1 + 0.5 * support / (2 * count + 1)[..., None])
    main = component.gather(-1, size.argmax(-1, keepdim=True)) if frames else component
    connected = (component == main) & (support >= min(_SUPPORT, max(frames - 1, 1)) - 1e-6)
    gauge = median_of(position, connected)
    position = torch.where(connected[..., None], position - gauge[..., None, :], 0.0)
    return Positions(position, weight, precision, residual, closure, support, component, connected)


def position_variance(positions: Positions, edges: Edges) -> Tensor:
    """(..., T), px², float64: how well the network fixes each frame against the mean of its component, per axis.

    The diagonal of the inverse of the network's Laplacian; for more than 4,000 frames an estimate of it, to a tenth.
    """
    component, precision = positions.component, positions.precision.detach()
    frames = component.shape[-1]
    if frames > _DENSE_VARIANCE:
        return _probed_variance(precision, edges, positions)
    matrix, held = _laplacian(precision, edges, component)
    factor = torch.linalg.cholesky_ex(matrix).L
    identity = torch.eye(frames, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    half = torch.linalg.solve_triangular(factor, identity, upper=False)
    size = _over_component(component, torch.ones_like(positions.support))
    return (half.square().sum(-2) - 1 / (held * size)).clamp(min=0)


def _probed_variance(precision: Tensor, edges: Edges, positions: Positions) -> Tensor:
    """The same for a long series: the mean of z · L⁻¹ z over random signs z.

    The signs are drawn from the rank of the positions: a frame's number decides among equals alone.
    """
    component = positions.component
    draw = torch.arange(1, _PROBES + 1, device=component.device, dtype=torch.float64)[:, None]
    place = positions.position.detach().sum(-1)
    rank = torch.argsort(place, dim=-1, stable=True).argsort(-1) + 1
    noise = (torch.sin(12.9898 * rank[..., None, :] + 78.233 * draw) * 43758.5453).remainder(1)
    signs = torch.where(noise < 0.5, -1.0, 1.0).double()
    right = _without_mean(component, signs)
    steps = _LAST_STEPS * component.shape[-1]
    found = _conjugate_gradients(precision, right, torch.zeros_like(right), edges, steps)
    found = _without_mean(component, found)
    # no less than if all other frames were known
    degree = sum_of_pairs(edges, precision, component.shape[-1])
    own = torch.where(degree > 0, 1 / degree.clamp(min=1e-12), 0.0)
    return torch.maximum((signs * found).mean(-2), own)


def place_frames(shift: Tensor, sigma: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New frames, each on old ones that stay where they are: a robust weighted mean.

    Args:
        shift: (..., n, 2), where each of n old frames says that the new one lies, in pixels.
        sigma: (..., n), 1-σ errors per axis.
        usable: (..., n) bool.

    Returns:
        position (..., 2), its variance per axis (...,), closure (...,) and support (...,), all float64.

    >>> said = torch.tensor([[1.0, 0.0], [1.02, 0.0], [0.98, 0.0], [40.0, 0.0]])
    >>> place_frames(said, torch.full((4,), 0.1), torch.ones(4, dtype=torch.bool))[0].round(decimals=1)
    tensor([1., 0.], dtype=torch.float64)
    """
    usable = usable & shift.isfinite().all(-1) & sigma.isfinite()
    shift = torch.where(usable[..., None], shift, 0.0).double()
    variance = torch.where(usable, sigma, 1.0).double().square() + _FLOOR**2
    known = usable.double()
    tiny = torch.finfo(variance.dtype).tiny
    # from the median: a mean of few is pulled away by one
    position = median_of(shift, usable)
    weight, residual = known, torch.zeros_like(variance)
    for step in range(_STEPS + 1):
        residual = (shift - position[..., None, :]).norm(dim=-1)
        excess = _median(residual, usable).nan_to_num(0.0).square() / _RAYLEIGH**2
        total = torch.maximum(variance, excess[..., None].expand_as(variance))
        weight = known * (_HUBER / (residual / total.sqrt()).clamp(min=_HUBER))
        precision = weight / total
        if step < _STEPS:
            share = precision / (precision.sum(-1, keepdim=True) + tiny)
            position = (share[..., None] * shift).sum(-2)
    whole = precision.sum(-1)
    closure = ((precision * residual.square()).sum(-1) / (2 * whole + tiny)).sqrt()
    return position, 1 / (whole + tiny), closure, weight.sum(-1)


def _solve_pairs(
    precision: Tensor, shift: Tensor, edges: Edges, component: Tensor, start: Tensor, *, steps: int = 0
) -> Tensor:
    """(..., T, 2): weighted least squares, up to a shift of every component."""
    frames = component.shape[-1]
    pulled = (precision[..., None] * shift).mT  # (..., 2, E)
    right = sum_of_pairs(edges, pulled, frames, sign=-1.0)
    if frames > _DENSE:
        steps = max(steps, _CONJUGATE_STEPS)
        return _LongSolve.apply(right, start.mT, precision, component, edges, steps).mT
    matrix, _ = _laplacian(precision, edges, component)
    # (cholesky_solve would wait for a GPU)
    factor = torch.linalg.cholesky_ex(matrix).L
    half = torch.linalg.solve_triangular(factor, right.mT, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


class _LongSolve(torch.autograd.Function):
    """:func:`_conjugate_gradients`, whose derivative by the right side is another solve: L is symmetric."""

    @staticmethod
    def forward(
        right: Tensor, start: Tensor, precision: Tensor, component: Tensor, edges: Edges, steps: int
    ) -> Tensor:
        return _conjugate_gradients(precision, right, start, edges, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, precision, component, ctx.edges, ctx.steps = inputs
        ctx.save_for_backward(precision, component)

    @staticmethod
    def backward(ctx: Any, by_position: Tensor) -> tuple[Tensor | None, ...]:
        precision, component = ctx.saved_tensors
        # L is singular along a shift of a whole component
        right = _without_mean(component, by_position)
        found = _conjugate_gradients(precision, right, torch.zeros_like(right), ctx.edges, ctx.steps)
        return found, None, None, None, None, None


def _conjugate_gradients(
    precision: Tensor, right: Tensor, start: Tensor, edges: Edges, steps: int = _CONJUGATE_STEPS
) -> Tensor:
    """(..., K, T): L x = right for the network's Laplacian, preconditioned by its diagonal, in fixed steps.

    The right side sums to 0 over every component, where L is singular. What has converged stays as it is.
    """
    frames = right.shape[-1]
    degree = sum_of_pairs(edges, precision, frames)[..., None, :]
    scale = torch.where(degree > 0, 1 / degree.clamp(min=1e-12), 0.0)

    def laplacian(vector: Tensor) -> Tensor:
        difference = vector.index_select(-1, edges.moving) - vector.index_select(-1, edges.reference)
        return sum_of_pairs(edges, precision[..., None, :] * difference, frames, sign=-1.0)

    found, left = start, right - laplacian(start)
    direction = scale * left
    energy = (left * direction).sum(-1, keepdim=True)
    least = (_LEFT**2 * (right * scale * right)).sum(-1, keepdim=True).detach()
    for _ in range(steps):
        going = energy.detach() > least
        if all_true(~going):
            break
        pushed = laplacian(direction)
        step = energy / torch.where(going, (direction * pushed).sum(-1, keepdim=True), 1.0)
        step = torch.where(going, step, 0.0)
        found, left = found + step * direction, left - step * pushed
        ahead = scale * left
        now = (left * ahead).sum(-1, keepdim=True)
        direction = ahead + torch.where(going, now / torch.where(going, energy, 1.0), 0.0) * direction
        energy = now
    return found


def _laplacian(precision: Tensor, edges: Edges, component: Tensor) -> tuple[Tensor, Tensor]:
    """(..., T, T): the network's Laplacian, the mean of every component held at 0, by how much (..., 1)."""
    frames = component.shape[-1]
    scale = precision.sum(-1, keepdim=True) / max(frames, 1)
    scale = torch.where(scale > 0, scale, 1.0)
    flat = torch.zeros(*precision.shape[:-1], frames * frames, dtype=precision.dtype, device=precision.device)
    for one, other in ((edges.moving, edges.reference), (edges.reference, edges.moving)):
        flat = flat.index_add(-1, one * frames + other, -precision)
        flat = flat.index_add(-1, one * frames + one, precision)
    together = component[..., :, None] == component[..., None, :]
    held = together * (scale / together.sum(-1).clamp(min=1))[..., None]
    return flat.view(*precision.shape[:-1], frames, frames) + held, scale


def _over_component(component: Tensor, values: Tensor) -> Tensor:
    """(..., T): the sum of values over each frame's component."""
    return torch.zeros_like(values).scatter_add(-1, component, values).gather(-1, component)


def _without_mean(component: Tensor, values: Tensor) -> Tensor:
    """(..., K, T) less the mean over each frame's component (..., T)."""
    place = component[..., None, :].expand(values.shape)
    return values - _over_component(place, values) / _over_component(place, torch.ones_like(values))


def _residual(shift: Tensor, position: Tensor, edges: Edges) -> Tensor:
    return shift - position.index_select(-2, edges.moving) + position.index_select(-2, edges.reference)


def sum_of_pairs(edges: Edges, values: Tensor, frames: int, *, sign: float = 1.0) -> Tensor:
    """(..., E) → (..., T): the sum over the pairs of every frame, times ``sign`` where it is the reference."""
    total = torch.zeros(*values.shape[:-1], frames, dtype=values.dtype, device=values.device)
    one, other = (end.expand(values.shape) for end in (edges.moving, edges.reference))
    return total.scatter_add(-1, one, values).scatter_add(-1, other, sign * values)


def _median(values: Tensor, usable: Tensor) -> Tensor:
    """Along the last dimension, of what is usable; of an even number the mean of the two in the middle; NaN of none."""
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.nan)
    values = values.masked_fill(~usable, torch.nan)
    return 0.5 * (nanmedian(values) - nanmedian(-values))


def median_of(vectors: Tensor, usable: Tensor) -> Tensor:
    """(..., T, 2) → (..., 2): the median of those that are usable, (..., T), along each axis; 0 if none is."""
    return _median(vectors.mT, usable[..., None, :]).nan_to_num(0.0)


def consensus_scores(
    texture: Texture,
    shift: Tensor,
    accepted: Tensor,
    *,
    size: tuple[int, int],
    max_frequency: float = 0.25,
    reach: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """Correlation of every frame with the mean of all other accepted ones, aligned: after and before.

    Args:
        texture: of T frames, (T, h, w).
        shift: (T, 2), in pixels, 0 where not accepted.
        accepted: (T,) bool.
        size: (H, W) of the frames.
        max_frequency: of the texture.
        reach: pixels along each border that are left out.

    Returns:
        Both (T,), in [−1, 1]; 0 where there is no other frame.
    """
    field = texture.field
    grid = WorkingGrid.of(size, (field.shape[-2], field.shape[-1]), max_frequency, field)
    rows, columns = (
        slice(edge, length - edge)
        for length, edge in (
            (length, min(math.ceil(reach * length / pixels), length // 4))
            for length, pixels in zip(field.shape[-2:], size, strict=True)
        )
    )
    known = accepted.to(field.dtype)[:, None, None]

    def look(part: slice) -> tuple[Tensor, ...]:
        """The fields and their weights, aligned, and as they came."""
        now = field[part]
        moved = grid.move(rfft2(now), shift[part])
        weight = own = torch.ones_like(now)
        if texture.weights is not None:
            own = texture.weights.expand_as(field)[part]
            weight = grid.move(rfft2(own), shift[part]).clamp(0, 1)
        return tuple(values[..., rows, columns] for values in (moved, weight, now, own))

    step = max(1, _SCORE_SAMPLES // max(1, field.shape[-2] * field.shape[-1]))
    parts = [slice(first, first + step) for first in range(0, field.shape[0], step)]
    total = share = torch.zeros_like(field[:1, rows, columns]).sum(0)
    for part in parts:
        moved, weight, _, _ = look(part)
        total = total + (known[part] * moved).sum(0)
        share = share + (known[part] * weight).sum(0)
    scores = [field.new_zeros(2, 0)]
    for part in parts:
        moved, weight, now, own = look(part)
        others = total - known[part] * moved
        others = others / (share - known[part] * weight).clamp(min=0.5)
        aligned = normalized_cross_correlation(moved, others, weight > 0.5)
        as_it_came = normalized_cross_correlation(now, others, own > 0.5)
        scores.append(torch.stack((aligned, as_it_came)))
    after, before = torch.cat(scores, -1)
    return torch.where(accepted, after, before), before


# --- the sun's part ---


def shadow_direction(sun: Tensor) -> Tensor:
    r"""(T, 2), float64: where shadows point and how long they are, :math:`\cot(el)\,(-\sin az, \cos az)`, (x, y).

    Of elevation and azimuth in degrees (T, 2), the latter clockwise from the image's up. NaN where they are unknown, or
    where the sun is down.

    >>> shadow_direction(torch.tensor([[45.0, 180.0]])).round(decimals=3)  # from the south: shadows point up
    tensor([[-0., -1.]], dtype=torch.float64)
    """
    elevation, azimuth = sun.double().deg2rad().unbind(-1)
    up = elevation > 0
    elevation = elevation.clamp(min=math.radians(_LOWEST_SUN))
    along = torch.stack([-azimuth.sin(), azimuth.cos()], -1)
    return torch.where(up[..., None], along / elevation.tan()[..., None], torch.nan)


def fit_slope(
    position: Tensor, direction: Tensor, usable: Tensor, *, steps: int = 20
) -> tuple[Tensor, Tensor]:
    r"""The robust slope b of :math:`p = a + b\,u`, and its 1-σ error, both (...,).

    For vectors p (..., T, 2) and u (T, 2) that are usable (..., T); the weights are taken anew in so many steps.
    """
    known = usable.to(position.dtype)
    position = torch.where(usable[..., None], position, 0.0)
    tiny = torch.finfo(position.dtype).tiny
    weight = known
    slope = variance = torch.zeros_like(known[..., 0])
    for _ in range(steps):
        share = (weight / (weight.sum(-1, keepdim=True) + tiny))[..., None]
        centred = position - (share * position).sum(-2, keepdim=True)
        along = direction - (share * direction).sum(-2, keepdim=True)
        energy = (weight[..., None] * along.square()).sum((-2, -1)) + tiny
        slope = (weight[..., None] * along * centred).sum((-2, -1)) / energy
        residual = (centred - slope[..., None, None] * along).norm(dim=-1)
        middle = _median(residual, usable).nan_to_num(0.0) / _RAYLEIGH
        freedom = (2 * known.sum(-1) - 3).clamp(min=1)
        variance = (weight * residual.square()).sum(-1) / freedom / energy
        weight = known / (residual / (2 * middle[..., None] + 1e-9)).clamp(min=1)
    return slope, variance.sqrt()


def season_term(
    positions: Positions, blocks: Positions, block_variance: Tensor, direction: Tensor | None
) -> SeasonTerm:
    r"""The shift that shading and shadows add to positions, from parts of the frame that disagree about it.

    The slope of each block's position, less the frame's, against :func:`shadow_direction` is free of the frames'
    own displacements, which all blocks share. Where it is significant over all of them, and larger along the shadow
    than across it (phenology, whose course resembles the sun's, knows no direction), the scene has relief. How far
    the frame as a whole follows the shadow then has two witnesses: its own slope, which chance displacements blur,
    and the blocks' spread s. Shadows grow away from the sun, and what they hide seems to move with them, so the
    shift that brings a frame back is expected at −s, give or take 0.6 s.

    Args:
        positions: of the whole frames.
        blocks: of B parts of them, (B, T), from the same pairs.
        block_variance: (B, T), px² per axis, what a block's position cannot know by itself.
        direction: (T, 2), of :func:`shadow_direction`, or ``None`` where the sun is unknown.

    Returns:
        :class:`SeasonTerm`.
    """
    usable = blocks.connected & positions.connected
    enough = usable.sum(-1) >= _FEWEST_FRAMES  # (B,)
    usable = usable & enough[:, None]
    apart = (blocks.position - positions.position).detach()
    apart = torch.where(usable[..., None], apart - median_of(apart, usable)[:, None], 0.0)

    count = usable.sum(0)
    excess = torch.where(usable, 0.5 * apart.square().sum(-1) - block_variance, 0.0).sum(0)
    spread = (excess / count.clamp(min=1)).clamp(min=0).sqrt()
    enough_blocks = count >= _FEWEST_BLOCKS
    worst = torch.where(enough_blocks, spread, 0.0).amax() if spread.numel() else spread.sum()
    spread = torch.where(enough_blocks, spread, worst)

    zero = spread.new_zeros(())
    if direction is None:
        return SeasonTerm(zero, zero, zero, zero > 0, spread, count)
    known = direction.isfinite().all(-1)
    direction = torch.where(known[:, None], direction, 0.0)
    slopes, sigmas = fit_slope(apart, direction, usable & known)
    turned = torch.stack([-direction[:, 1], direction[:, 0]], -1)
    across, across_sigmas = fit_slope(apart, turned, usable & known)
    there = enough.double()
    number = there.sum().clamp(min=1)
    along = ((there * (slopes.square() - sigmas.square())).sum() / number).clamp(min=0)
    beside = ((there * (across.square() - across_sigmas.square())).sum() / number).clamp(min=0)
    scores = there * slopes / torch.hypot(sigmas, torch.full_like(sigmas, _SLOPE_FLOOR))
    significance = (scores.square().sum() / number).sqrt()
    present = (significance > _SEASON_Z) & (along > _ALONG**2 * beside)
    excess = torch.where(present, along - beside, 0.0)

    slope, sigma = fit_slope(positions.position.detach(), direction, positions.connected & known)
    prior, measured = _PRIOR_SPREAD**2 * excess, sigma.square() + torch.finfo(sigma.dtype).tiny
    found = (prior * slope + measured * _PRIOR_MEAN * excess.sqrt()) / (prior + measured)
    left = (prior * measured / (prior + measured)).sqrt()
    return SeasonTerm(found, left, significance, present, spread, count)
