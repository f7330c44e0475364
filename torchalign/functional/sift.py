r"""SIFT in fixed shapes: K keypoints a frame, whole stacks at once, without a loop over frames or a wait for a GPU.

The chain, each link a function that works alone:

1. :func:`scale_space`: Gaussian octaves from the doubled image, six levels each.
2. :func:`detect_blobs`: the strongest extrema of the differences of Gaussians over place and scale, refined by the
   quadratic through their 27 neighbours; weak ones and edges are dropped.
3. :func:`dominant_orientation`: the maximum of the density of gradient directions around a keypoint.
4. :func:`describe`: 4 × 4 cells of 8 directions each, as the square root of shares (RootSIFT).

Convention:
    points (x, y) in pixels of the image, integers at pixel centres. Orientations in radians from +x towards +y,
    down the image. Descriptors in OpenCV's order: cells row by row, in each eight directions from +x towards
    **-y**.

It is no chain of kornia's parts: their detector lists the extrema that are there, which waits for a GPU and makes
shapes that depend on the data, and their descriptors resample a patch for each, where here the gradients are read from
the level of the blob.

Bias: blobs are found where their differences of Gaussians peak, not on the grid; on frames decimated from a real
scene the mode of the displacements has no pull towards whole pixels beyond 0.01 px.

References:
    Lowe 2004, doi:10.1023/B:VISI.0000029664.99615.94; Arandjelović & Zisserman 2012,
    doi:10.1109/CVPR.2012.6248018 (RootSIFT).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import keeps_tables, kernels_for
from torchalign.functional.keypoints import erode, highest, running_largest
from torchalign.functional.sampling import bilinear

__all__ = [
    "Blobs",
    "ScaleSpace",
    "describe",
    "detect_blobs",
    "dominant_orientation",
    "patches_at",
    "scale_space",
]

_INTERVALS = 3  # scales an octave (Lowe's choice)
_LEVELS = _INTERVALS + 3
_BASE_SIGMA = 1.6  # of an octave's first level, in its own pixels
_CAMERA_SIGMA = 0.5  # of the image as it comes
# An octave is worth it while its shorter side has this many pixels.
_MIN_SIDE = 24
# The least absolute difference of Gaussians, of an image in [0, 1].
_MIN_CONTRAST = 0.002
# Extrema nearer to the edge of their octave than this, in its pixels, are dropped.
_BORDER = 5
# So are those nearer to something unusable, in multiples of the octave's coarsest σ.
_MASK_REACH = 2.5
# Of extrema as strong as this many times K the K best that pass all tests are kept.
_SPARE = 2
# The quadratic may put an extremum this far from its sample; further off it belongs to another, or to noise.
_MAX_OFFSET = 0.8

# Orientation: samples a side, their spacing and the σ of their weight, in σ of the keypoint; harmonics kept of the
# density of directions and the σ of its smoothing in radians; angles at which its maximum is looked for.
_ORIENTATION_SIDE, _ORIENTATION_STEP, _ORIENTATION_SIGMA = 10, 0.9, 1.5
_HARMONICS, _SMOOTHING, _ANGLES = 8, 0.2, 72
# Descriptor: cells a side, their width in σ, directions, samples a side (a bit beyond the cells, whose weights are
# linear ramps), and the bound that keeps single strong gradients from ruling.
_CELLS, _CELL_WIDTH, _DIRECTIONS, _SAMPLES, _CLAMP = 4, 3.0, 8, 16, 0.2


class ScaleSpace(NamedTuple):
    """Octaves of an image, finest first; octave o has pixels of ``2^(o-1)`` image pixels, aligned at (0, 0)."""

    levels: Tensor  #: (B, N), the six (h, w) Gaussian levels of all octaves, one after another
    sizes: list[tuple[int, int]]  #: (h, w) of every octave


class Blobs(NamedTuple):
    """K keypoints a frame, strongest first."""

    points: Tensor  #: (B, K, 2)
    #: (B, K), scale in pixels of the image: of the Gaussian level they were found in, after refinement
    sigma: Tensor
    response: Tensor  #: (B, K), the absolute difference of Gaussians there; 0 where not valid
    octave: Tensor  #: (B, K) int64, where their gradients are read
    level: Tensor  #: likewise
    valid: Tensor  #: (B, K) bool


def scale_space(image: Tensor) -> ScaleSpace:
    """Gaussian octaves: σ = 1.6 · 2^(i/3) octave pixels at level i = 0 … 5; the next octave starts from level 3.

    Args:
        image: (B, H, W), float32 or float64.
    """
    height, width = image.shape[-2:]
    doubled = F.interpolate(
        image.unsqueeze(1),
        size=(max(2 * height - 1, 1), max(2 * width - 1, 1)),
        mode="bilinear",
        align_corners=True,
    ).squeeze(1)
    first = _blur(doubled, math.sqrt(_BASE_SIGMA**2 - (2 * _CAMERA_SIGMA) ** 2))
    ratio = 2 ** (1 / _INTERVALS)
    steps = [_BASE_SIGMA * ratio**i * math.sqrt(ratio**2 - 1) for i in range(_LEVELS - 1)]
    octaves, sizes = [], []
    while True:
        levels = [first]
        for sigma in steps:
            levels.append(_blur(levels[-1], sigma))
        octaves += [level.flatten(1) for level in levels]
        sizes.append((first.shape[-2], first.shape[-1]))
        first = levels[_INTERVALS][..., ::2, ::2]
        if min(first.shape[-2:]) < _MIN_SIDE:
            return ScaleSpace(torch.cat(octaves, 1), sizes)


def detect_blobs(
    space: ScaleSpace, usable: Tensor | None, count: int, *, max_edge_ratio: float = 10.0
) -> Blobs:
    """The ``count`` strongest extrema of the differences of Gaussians.

    Args:
        space: of (B, H, W) images.
        usable: (B, H, W) bool, or ``None``. Blobs that see something unusable are dropped.
        count: K.
        max_edge_ratio: the largest ratio of the principal curvatures; beyond is an edge.
    """
    cells, shapes = [], []
    octaves = torch.split(space.levels, [_LEVELS * height * width for height, width in space.sizes], 1)
    for number, (levels, size) in enumerate(zip(octaves, space.sizes, strict=True)):
        strength, sub = _extrema(levels.view(-1, _LEVELS, *size), _allowed(usable, number, size))
        shapes.append((strength.shape[-2], strength.shape[-1]))
        cells.append((strength.flatten(1), sub.flatten(1)))
    strength, sub = (torch.cat(part, 1) for part in zip(*cells, strict=True))
    value, index = highest(strength, strength > 0, _SPARE * count)
    octave, level, y, x = _place(index, sub.gather(1, index), shapes)
    level, y, x = level + 1, y + _BORDER, x + _BORDER
    height, width, start = _layout(space.sizes, _LEVELS, octave)
    centre = start + (level * height + y) * width + x
    inside = (y < height - 1) & (x < width - 1)  # there is one where the value is not -inf
    centre = torch.where(inside, centre, start + (height + 1) * width + 1)
    offset, contrast, edge = _quadratic(space.levels, centre, width, height * width)

    valid = value.isfinite() & inside & (offset.abs() <= _MAX_OFFSET).all(-1)
    valid = valid & (contrast.abs() >= _MIN_CONTRAST) & (edge < (max_edge_ratio + 1) ** 2 / max_edge_ratio)
    response, order = highest(contrast.abs(), valid, count)
    valid = response.isfinite()
    octave, level = octave.gather(1, order), level.gather(1, order)
    offset = offset.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
    offset = torch.where(valid.unsqueeze(-1), offset, 0.0)
    place = torch.stack((x, y), -1).gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    pixel = torch.exp2(octave.to(offset) - 1)
    return Blobs(
        points=(place.to(offset) + offset[..., :2]) * pixel.unsqueeze(-1),
        sigma=_BASE_SIGMA * torch.exp2((level + offset[..., 2]) / _INTERVALS) * pixel,
        response=torch.where(valid, response, 0.0),
        octave=octave,
        level=level,
        valid=valid,
    )


def dominant_orientation(space: ScaleSpace, blobs: Blobs, *, unsigned: bool = False) -> Tensor:
    r"""The direction of most gradient around every keypoint, (B, K) radians; ``unsigned`` modulo π.

    The density of directions φ, weighted by magnitude and a Gaussian of 1.5 σ, is kept as its first harmonics

    .. math:: d(\phi) = \mathrm{Re} \sum_m e^{-m^2 s^2/2} \, c_m \, e^{i m \phi}, \qquad
              c_m = \sum_j w_j |g_j| e^{-i m \phi_j}

    whose maximum is found on a grid of 5° and refined by a parabola: a smoothed histogram without bins. Even
    harmonics alone do not tell a direction from the opposite one.
    """
    grid = _square(_ORIENTATION_SIDE, _ORIENTATION_STEP, blobs.points)
    weight = torch.exp(-grid.square().sum(0) / (2 * _ORIENTATION_SIGMA**2))
    along_x, along_y = _gradients_at(
        space, blobs, *(blobs.sigma.unsqueeze(-1) * part for part in grid), between=True
    )
    magnitude = _norm(along_x, along_y)
    cosine, sine = along_x / magnitude, along_y / magnitude
    real, imaginary = along_x * weight, along_y * weight
    harmonics = []
    for m in range(1, _HARMONICS + 1):
        if m > 1:
            real, imaginary = (
                torch.addcmul(real * cosine, imaginary, sine, value=-1),
                torch.addcmul(real * sine, imaginary, cosine),
            )
        if unsigned and m % 2:
            continue
        smoothing = math.exp(-((m * _SMOOTHING) ** 2) / 2)
        harmonics += [smoothing * real.sum(-1), smoothing * imaginary.sum(-1)]
    angle = torch.arange(_ANGLES, device=real.device, dtype=real.dtype) * (2 * math.pi / _ANGLES)
    kept = range(2, _HARMONICS + 1, 2) if unsigned else range(1, _HARMONICS + 1)
    waves = [wave(m * angle) for m in kept for wave in (torch.cos, torch.sin)]
    density = torch.stack(harmonics, -1) @ torch.stack(waves)  # (B, K, 72)
    best = density.argmax(-1, keepdim=True)
    before, top, after = (density.gather(-1, (best + step) % _ANGLES).squeeze(-1) for step in (-1, 0, 1))
    curvature = before + after - 2 * top
    offset = torch.where(
        curvature < 0, (before - after) / (2 * torch.where(curvature < 0, curvature, 1.0)), 0.0
    )
    return (best.squeeze(-1) + offset) * (2 * math.pi / _ANGLES)


def describe(
    space: ScaleSpace, blobs: Blobs, orientation: Tensor | None, *, unsigned: bool = False
) -> Tensor:
    """What the gradients around every keypoint look like, (B, K, 128), unit length; 0 where not valid.

    ``unsigned`` directions, modulo π, are the same where the contrast is reversed: (B, K, 64). An orientation is
    then known modulo π too: of every cell and the one opposite the sum and the difference's size are kept, which
    half a turn does not change.

    Args:
        space: as given to :func:`detect_blobs`.
        blobs: the keypoints.
        orientation: (B, K) radians, or ``None`` for upright descriptors, which tell more where nothing is rotated.
        unsigned: directions modulo π.
    """
    reach = (_CELLS + 1) * _CELL_WIDTH  # linear ramps end a cell's width beyond the outermost centres
    x, y = grid = _square(_SAMPLES, reach / _SAMPLES, blobs.points)
    sigma = blobs.sigma.unsqueeze(-1)
    # (samples lie 2 pixels apart, in cells 8 pixels wide: half a pixel does not matter, for directions it would)
    if orientation is None:
        along_x, along_y = _gradients_at(space, blobs, sigma * x, sigma * y, between=False)
    else:
        cosine, sine = orientation.cos().unsqueeze(-1), orientation.sin().unsqueeze(-1)
        rotated = sigma * (cosine * x - sine * y), sigma * (sine * x + cosine * y)
        along_x, along_y = _gradients_at(space, blobs, *rotated, between=False)
        along_x, along_y = (
            torch.addcmul(cosine * along_x, sine, along_y),
            torch.addcmul(cosine * along_y, sine, along_x, value=-1),
        )
    half = _CELLS * _CELL_WIDTH / 2
    magnitude = _norm(along_x, along_y) * torch.exp(-grid.square().sum(0) / (2 * half**2))

    # each sample votes for the two directions beside its own …
    direction = torch.atan2(-along_y, along_x) * (_DIRECTIONS / (2 * math.pi)) + _DIRECTIONS
    lower = direction.floor()
    share = magnitude * (direction - lower)
    bins = lower.long().unsqueeze(-2)
    votes = magnitude.new_zeros(*magnitude.shape[:2], _DIRECTIONS, magnitude.shape[2])
    votes = votes.scatter_(-2, bins & (_DIRECTIONS - 1), (magnitude - share).unsqueeze(-2))
    votes = votes.scatter_(-2, (bins + 1) & (_DIRECTIONS - 1), share.unsqueeze(-2))
    # … and in the four cells around it
    centres = (torch.arange(_CELLS, device=grid.device, dtype=grid.dtype) - (_CELLS - 1) / 2) * _CELL_WIDTH
    ramp = (1 - (grid.unsqueeze(-1) - centres).abs() / _CELL_WIDTH).clamp(min=0)  # (2, 256, 4)
    cells = (ramp[1, :, :, None] * ramp[0, :, None, :]).flatten(1)  # (256, 16), y then x
    histogram = (votes @ cells).transpose(-1, -2).flatten(2)  # (B, K, 128)

    histogram = F.normalize(histogram, dim=-1).clamp(max=_CLAMP)
    shares = F.normalize(histogram, p=1, dim=-1)
    # sqrt has no slope at 0, where most of the shares are
    if unsigned:
        shares = shares.unflatten(-1, (_CELLS**2, 2, _DIRECTIONS // 2)).sum(-2)  # type: ignore[no-untyped-call]
        if orientation is not None:
            one, other = shares.chunk(2, -2)
            other = other.flip(-2)
            shares = torch.cat((one + other, (one - other).abs()), -2)
        shares = shares.flatten(-2)
    root = torch.where(shares > 0, torch.where(shares > 0, shares, 1.0).sqrt(), 0.0)
    return F.normalize(root, dim=-1) * blobs.valid.unsqueeze(-1)


def patches_at(
    image: Tensor, points: Tensor, sigma: Tensor, orientation: Tensor, *, side: int = 32, reach: float = 6.0
) -> Tensor:
    """Square patches around keypoints, as large as their scale and rotated with them: for descriptors by networks.

    Each is read bilinearly from the image averaged over 1, 2, 4, … pixels, so that its samples are hardly further
    apart than the pixels they are read from are wide.

    Args:
        image: (B, H, W).
        points: (B, K, 2), (x, y) in pixels.
        sigma: (B, K), scales in pixels.
        orientation: (B, K), radians: the patch's x axis.
        side: of a patch, in samples.
        reach: half its width, in σ.

    Returns:
        (B, K, side, side).

    Example:
        >>> ramp = torch.arange(64.0).expand(1, 64, 64)
        >>> patch = patches_at(
        ...     ramp, torch.tensor([[[32.0, 32.0]]]), torch.tensor([[1.0]]), torch.zeros(1, 1), side=4
        ... )
        >>> patch[0, 0, 0]
        tensor([27.5000, 30.5000, 33.5000, 36.5000])
    """
    levels = [image]
    while min(levels[-1].shape[-2:]) >= 2 * _MIN_SIDE:
        levels.append(F.avg_pool2d(levels[-1], 2))
    sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
    flat = torch.cat([level.flatten(1) for level in levels], 1)
    step = 2 * reach * sigma / side  # pixels between samples
    level = step.clamp(min=1).log2().floor().clamp(max=len(levels) - 1).long()
    height, width, start = (part.unsqueeze(-1) for part in _layout(sizes, 1, level))
    x, y = _square(side, 2 * reach / side, points)
    sigma, cosine, sine = (part.unsqueeze(-1) for part in (sigma, orientation.cos(), orientation.sin()))
    pixel = torch.exp2(level.to(x)).unsqueeze(-1)
    # a pixel of level l has its centre among those of the 2^l pixels it is the mean of
    x, y = (
        (points[..., axis].unsqueeze(-1) + sigma * rotated + 0.5) / pixel - 0.5
        for axis, rotated in enumerate((cosine * x - sine * y, sine * x + cosine * y))
    )
    # the nearest edge beyond it; the last row and column are read from the pixels before them
    x, y = (place.clamp(min=0).minimum((length - 1.001).to(x)) for place, length in ((x, width), (y, height)))
    left, top = x.long(), y.long()
    corner = (start + top * width + left).flatten(1)
    row = width.expand_as(left).flatten(1)
    patches = bilinear(lambda i, j: flat.gather(1, corner + i + j * row).view(x.shape), x - left, y - top)
    return patches.view(*patches.shape[:-1], side, side)


# -------------------------------------------------------------------------------------------------- pieces


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, H, W) to 3 σ; the edge is mirrored, or repeated where there is nothing to mirror."""
    radius = math.ceil(3 * sigma)
    height, width = image.shape[-2:]
    mode = "reflect" if radius < min(height, width) else "replicate"

    kernels = kernels_for(image)
    if kernels is not None:
        return kernels.blur(image, _gaussian(sigma, radius, like=image))
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights]

    def along(image: Tensor, axis: int, size: int) -> Tensor:
        # Sums of shifted views: a convolution would be computed in 19 bits (TF32) on many GPUs, too few for
        # differences of levels; and on a CPU one of a single channel takes 2 to 3 times as long.
        result = image.narrow(axis, radius, size) * weights[0]
        for k in range(1, radius + 1):
            result.add_(image.narrow(axis, radius - k, size), alpha=weights[k])
            result.add_(image.narrow(axis, radius + k, size), alpha=weights[k])
        return result

    rows = F.pad(image.unsqueeze(1), (radius, radius, 0, 0), mode=mode).squeeze(1)
    columns = F.pad(along(rows, -1, width).unsqueeze(1), (0, 0, radius, radius), mode=mode).squeeze(1)
    return along(columns, -2, height)


@keeps_tables
def _gaussian(sigma: float, radius: int, *, like: Tensor) -> Tensor:
    """(radius + 1,), from the middle outwards; with their mirror image they sum to 1."""
    distance = torch.arange(radius + 1, device=like.device, dtype=torch.float64)
    weights = torch.exp(-distance.square() / (2 * sigma**2))
    return (weights / (2 * weights.sum() - 1)).to(like.dtype)


def _allowed(usable: Tensor | None, octave: int, size: tuple[int, int]) -> Tensor | None:
    """(B, h, w) bool, on the grid of an octave: nothing unusable is seen by its coarsest blobs."""
    if usable is None:
        return None
    eroded = erode(usable, math.ceil(_MASK_REACH * _BASE_SIGMA * 2**octave))
    if octave == 0:
        fine = eroded.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return fine[..., : size[0], : size[1]]
    return eroded[..., :: 2 ** (octave - 1), :: 2 ** (octave - 1)][..., : size[0], : size[1]]


def _extrema(levels: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Absolute value at the extrema, 0 elsewhere, as the largest in every 2 × 2 cell; and which of the four it is.

    Two extrema are never neighbours, so a cell holds one at most. An extremum of either sign is a maximum of the
    absolute value. The border is left out: cell (0, 0) starts at (5, 5).

    Returns:
        (B, 3, ⌈(h-10)/2⌉, ⌈(w-10)/2⌉), strength and int64 0 … 3 as 2·dy + dx.
    """
    height, width = levels.shape[-2:]
    rows, columns = height - 2 * _BORDER, width - 2 * _BORDER
    if min(rows, columns) < 1:
        nothing = levels.new_zeros(levels.shape[0], _INTERVALS, 1, 1)
        return nothing, torch.zeros_like(nothing, dtype=torch.int64)
    levels = levels[..., _BORDER - 1 : height - _BORDER + 1, _BORDER - 1 : width - _BORDER + 1]
    size = (levels[:, 1:] - levels[:, :-1]).abs_()
    around = size
    for dim in (1, -1, -2):
        around = running_largest(around, 3, dim)
    centre = size[:, 1:-1, 1:-1, 1:-1]
    # the quadratic adds a little to the contrast
    is_extremum = (centre >= around) & (centre > 0.8 * _MIN_CONTRAST)
    if allowed is not None:
        is_extremum = is_extremum & allowed[:, None, _BORDER:-_BORDER, _BORDER:-_BORDER]
    strength = F.pad(torch.where(is_extremum, centre, 0.0), (0, columns % 2, 0, rows % 2))
    top = torch.maximum(strength[..., 0::2, 0::2], strength[..., 0::2, 1::2])
    bottom = torch.maximum(strength[..., 1::2, 0::2], strength[..., 1::2, 1::2])
    best = torch.maximum(top, bottom)
    right = torch.where(bottom > top, strength[..., 1::2, 1::2] == best, strength[..., 0::2, 1::2] == best)
    return best, 2 * (bottom > top).long() + right.long()


def _place(
    index: Tensor, sub: Tensor, shapes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Octave, level 0 … 2, y, x of places in the concatenated 2 × 2 cells of all octaves."""
    octave = torch.zeros_like(index)
    bound = 0
    for rows, columns in shapes[:-1]:
        bound += _INTERVALS * rows * columns
        octave = octave + (index >= bound)
    height, width, start = _layout(shapes, _INTERVALS, octave)
    local = index - start
    level = local // (height * width)
    local = local - level * height * width
    y = local // width
    return octave, level, 2 * y + sub // 2, 2 * (local - y * width) + sub % 2


def _layout(shapes: list[tuple[int, int]], levels: int, octave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Height, width and start of a keypoint's octave in maps of all octaves one after another."""
    # (a table to look it up in would have to be sent to the device, which waits for it)
    height, width, start = (torch.zeros_like(octave) for _ in range(3))
    begin = 0
    for number, (rows, columns) in enumerate(shapes):
        here = octave == number
        height, width = torch.where(here, rows, height), torch.where(here, columns, width)
        start = torch.where(here, begin, start)
        begin += levels * rows * columns
    return height, width, start


def _quadratic(levels: Tensor, centre: Tensor, row: Tensor, plane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offset (x, y, scale) of the extremum, the value there, trace² / determinant of the Hessian in the plane."""

    def at(dx: int, dy: int, ds: int) -> Tensor:
        index = centre + dx + dy * row + ds * plane
        return levels.gather(1, index + plane) - levels.gather(1, index)

    middle = at(0, 0, 0)
    ends = [(at(*step), at(*(-d for d in step))) for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    gradient = torch.stack([(after - before) / 2 for after, before in ends], -1)
    xx, yy, ss = (after + before - 2 * middle for after, before in ends)
    xy = (at(1, 1, 0) + at(-1, -1, 0) - at(1, -1, 0) - at(-1, 1, 0)) / 4
    xs = (at(1, 0, 1) + at(-1, 0, -1) - at(1, 0, -1) - at(-1, 0, 1)) / 4
    ys = (at(0, 1, 1) + at(0, -1, -1) - at(0, 1, -1) - at(0, -1, 1)) / 4
    # Cramer's rule: the adjugate is symmetric
    a, b, c = yy * ss - ys * ys, xs * ys - xy * ss, xy * ys - xs * yy
    d, e, f = xx * ss - xs * xs, xy * xs - xx * ys, xx * yy - xy * xy
    determinant = xx * a + xy * b + xs * c
    adjugate = torch.stack((a, b, c, b, d, e, c, e, f), -1).view(*middle.shape, 3, 3)
    safe = torch.where(determinant != 0, determinant, 1.0)
    offset = -(adjugate @ gradient.unsqueeze(-1)).squeeze(-1) / safe.unsqueeze(-1)
    offset = torch.where((determinant != 0).unsqueeze(-1), offset, torch.inf)
    finite = torch.where(offset.isfinite(), offset, 0.0)
    value = middle + (gradient * finite).sum(-1) / 2
    edge = torch.where(f > 0, (xx + yy).square() / torch.where(f > 0, f, 1.0), torch.inf)
    return offset, value, edge


def _square(side: int, step: float, like: Tensor) -> Tensor:
    """(2, side²), x and y: a square of points around 0."""
    line = (torch.arange(side, device=like.device, dtype=like.dtype) - (side - 1) / 2) * step
    return torch.stack((line.repeat(side), line.repeat_interleave(side)))


def _gradients_at(
    space: ScaleSpace, blobs: Blobs, x: Tensor, y: Tensor, *, between: bool
) -> tuple[Tensor, Tensor]:
    """Gradients in x and y, (B, K, S), doubled, at offsets (B, K, S) in image pixels from every keypoint.

    At the nearest pixel, or ``between`` pixels as their bilinear mean.
    """
    height, width, start = (part.unsqueeze(-1) for part in _layout(space.sizes, _LEVELS, blobs.octave))
    scale = torch.exp2(1 - blobs.octave.to(x)).unsqueeze(-1)  # octave pixels an image pixel
    # every pixel that is read lies inside: the outermost gradients are those one or two pixels from the edge
    last = 2.001 if between else 2.0
    x = ((x + blobs.points[..., :1]) * scale).clamp(min=1).minimum((width - last).to(x))
    y = ((y + blobs.points[..., 1:]) * scale).clamp(min=1).minimum((height - last).to(y))
    left, top = (x.long(), y.long()) if between else (x.round().long(), y.round().long())
    start = start + blobs.level.unsqueeze(-1) * height * width
    corner = (start + top * width + left).flatten(1)
    row = width.expand_as(left).flatten(1)

    def at(dx: int, dy: int) -> Tensor:
        return space.levels.gather(1, corner + dx + dy * row).view(x.shape)

    if not between:
        return at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)
    samples = {(i, j): at(i, j) for j in range(-1, 3) for i in range(-1, 3) if i in (0, 1) or j in (0, 1)}
    fractions = x - left, y - top
    return (
        bilinear(lambda i, j: samples[i + 1, j] - samples[i - 1, j], *fractions),
        bilinear(lambda i, j: samples[i, j + 1] - samples[i, j - 1], *fractions),
    )


def _norm(x: Tensor, y: Tensor) -> Tensor:
    """Length of vectors; never 0, so that it may be divided by and has a slope."""
    return torch.addcmul(x.square(), y, y).add(1e-20).sqrt()
