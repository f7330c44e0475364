"""Resample a stack of frames by its warps, once, without letting bad pixels leak.

Convention:
    Points ``(x, y)`` in pixels, x right, y down, integers at pixel **centres**. A warp maps moving →
    reference, so ``aligned(p) = frame(warp⁻¹ p)``: the matrix of ``cv2.warpAffine(frame, M)`` without flags.
    Nothing is ever normalised to [−1, 1], hence there is no ``align_corners``.

Precision:
    A source position is kept as output pixel + displacement, ``x + d(x, y)``, and only d is computed in
    floating point: ``warp⁻¹ − I`` from closed forms that do not cancel. Whole pixels are then exact integers
    and the fraction has the precision of the *displacement*, not of the coordinate: a shift of 3.3 px at x =
    10980 is good to 2e-7 px, where a coordinate in float32 has steps of 1e-3 px. An identity or a
    whole-pixel shift copies.

Three ways to the same numbers: in general, taps are gathered with integer indices (:class:`_Gather`), all frames
at once, on any device, traceable and differentiable; what is known to be a translation is taken by rows and
columns (:class:`_Lines`). In eager mode on the CPU, where reading a number costs nothing, blocks that fit into
the cache are walked, and translations are sliced instead of gathered (:class:`_Slices`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._check import check_floating
from torchalign._host import empty_on_host, is_on_host

__all__ = ["Interpolation", "PaddingMode", "Resampled", "resample", "resample_lattice", "translate", "warp"]

Scalar = TypeVar("Scalar", Tensor, float)
Interpolation = Literal["nearest", "bilinear", "bicubic"]
PaddingMode = Literal["border", "zeros", "reflection"]

# Keys' kernel with A = −1/2 leaves planes in place. OpenCV's and torch's −3/4 leaves 1 % less error on a real
# scene, but misplaces long waves by up to 0.047 px (Lanczos-3, cut to six taps: 0.019 px), against 0.0006 px
# here: more than the registration's own error. Measured by benchmarks/interpolation.py.
_CUBIC_A = -0.5
# Beyond this many pixels a displacement is cut: no frame is that large, and indices stay far from overflow.
_FARTHEST = 2.0**22
# Eager CPU: output samples (bands × pixels) of one block, so that its temporaries stay in the cache.
_BLOCK_SAMPLES = 2**18
# Eager CPU: slicing a frame costs some 30 µs of calls; smaller frames are gathered, many at a time.
_SMALLEST_SLICED = 2**12


class Resampled(NamedTuple):
    """What :func:`resample` returns.

    Attributes:
        values: (..., T, C, H, W), in the cube's dtype.
        validity: (..., T, H, W) bool, True where all bands come from usable pixels inside their frame.
    """

    values: Tensor
    validity: Tensor


def resample(
    cube: Tensor,
    warp: Tensor,
    *,
    interpolation: Interpolation = "bilinear",
    padding_mode: PaddingMode = "border",
    fill_value: float | None = None,
    mask: Tensor | None = None,
) -> Resampled:
    r"""Resample every frame by its warp, and say which output pixels can be trusted.

    .. math:: aligned(p) = \frac{\sum_q k(W^{-1} p - q)\; u(q)\; frame(q)}{\sum_q k(W^{-1} p - q)\; u(q)}

    with k the interpolation kernel and u = 1 on usable pixels, 0 on masked, NaN and infinite ones (per band).

    * An output pixel is *valid* if the source pixel nearest to it lies inside the frame and is usable. Its
      value is then interpolated from usable pixels only. (A bicubic kernel that meets an unusable pixel
      gives way to the bilinear one there: with negative weights the quotient above can be anything.)
    * Where the nearest source pixel is unusable, the output is ``fill_value``, or if that is ``None`` a copy
      of that pixel: NaN stays NaN, a nodata value stays that value, a masked cloud moves with its frame. A
      footprint neither grows nor blends into its surroundings.
    * Outside the frame (the nearest position is beyond the border pixels) the output is ``fill_value``, or
      if that is ``None`` what ``padding_mode`` says. It is not valid in either case.

    Bands of integer or bool dtype are computed in float32 (float64 for 32 and 64 bits), rounded half to
    even, and clamped to the dtype's range; with ``interpolation="nearest"`` they are copied, never computed,
    so label rasters keep their classes. Half and bfloat16 cubes are computed in float32. The whole is
    differentiable with respect to a floating ``cube`` and, but for ``"nearest"``, to ``warp``.

    A position that is no number (a singular warp, the horizon of a homography) counts as outside.

    Args:
        cube: (..., T, C, H, W).
        warp: (..., T, 2, 3) or (..., T, 3, 3), moving → reference, in pixels, floating, on the cube's
            device; leading dimensions broadcast against the cube's. float64 is worth its cost only where
            displacements reach hundreds of pixels.
        interpolation: ``"nearest"``, ``"bilinear"``, or ``"bicubic"`` (Keys, A = −1/2). The last two place
            long waves to within 0.001 px; bilinear also blurs, most of all half-way between pixels.
        padding_mode: ``"border"`` (the nearest border pixel), ``"zeros"``, or ``"reflection"`` (about the
            frame's outer edge, half a pixel beyond the border's centres).
        fill_value: what stands where nothing valid does; must be representable in the cube's dtype.
        mask: bool, broadcastable to (..., T, H, W), True = usable.

    Returns:
        :class:`Resampled`, the values and their validity.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or an option does not fit.

    Example:
        >>> from torchalign.functional.affine import translation_warp
        >>> frame = torch.tensor([[0.0, 1.0, 2.0, float("nan"), 4.0]])
        >>> shift = translation_warp(torch.tensor([[0.25, 0.0]]))
        >>> values, validity = resample(frame[None, None], shift)
        >>> values.flatten(), validity.flatten()
        (tensor([0.0000, 0.7500, 1.7500,    nan, 4.0000]), tensor([ True,  True,  True, False,  True]))
    """
    _check_cube(cube)
    _check_motion(warp, cube, "warp", ((2, 3), (3, 3)))
    return _resample(cube, warp, interpolation, padding_mode, fill_value, mask)


def warp(
    cube: Tensor,
    warp: Tensor,
    *,
    interpolation: Interpolation = "bilinear",
    padding_mode: PaddingMode = "border",
    fill_value: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The values of :func:`resample` alone, which see for every argument and every rule.

    Args:
        cube: (..., T, C, H, W).
        warp: (..., T, 2, 3) or (..., T, 3, 3), moving → reference.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        padding_mode: ``"border"``, ``"zeros"`` or ``"reflection"``.
        fill_value: what stands where nothing valid does.
        mask: bool, broadcastable to (..., T, H, W), True = usable.

    Returns:
        (..., T, C, H, W), in the cube's dtype.

    Example:
        >>> frame = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> warp(frame, torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])).flatten()
        tensor([0.0000, 0.5000, 1.5000, 2.5000])
    """
    return resample(
        cube, warp, interpolation=interpolation, padding_mode=padding_mode, fill_value=fill_value, mask=mask
    ).values


def resample_into(
    out: Tensor,
    cube: Tensor,
    warp: Tensor,
    *,
    interpolation: Interpolation = "bilinear",
    padding_mode: PaddingMode = "border",
    fill_value: float | None = None,
    mask: Tensor | None = None,
) -> None:
    """The values of :func:`resample` for frames on the eager CPU, into a part of a larger, contiguous result."""
    _resample(cube, warp, interpolation, padding_mode, fill_value, mask, out=out)


def resample_lattice(
    cube: Tensor,
    warp: Tensor,
    step: int,
    *,
    interpolation: Interpolation = "bilinear",
    mask: Tensor | None = None,
) -> Resampled:
    """Every ``step``-th pixel of :func:`resample`'s result along both axes, for the price of those.

    Args:
        cube: (..., T, C, H, W).
        warp: (..., T, 2, 3) or (..., T, 3, 3), moving → reference; or (..., T, 2), the shifts of :func:`translate`.
        step: of the lattice, in pixels; its first point is the first pixel.
        interpolation: as in :func:`resample`.
        mask: as in :func:`resample`.

    Returns:
        :class:`Resampled`, of ⌈H / step⌉ × ⌈W / step⌉ pixels.

    Example:
        >>> frame = torch.arange(6.0).reshape(1, 1, 1, 6)
        >>> resample_lattice(frame, torch.tensor([[[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]]]), 2).values.flatten()
        tensor([0.5000, 2.5000, 4.5000])
    """
    return _resample(cube, warp, interpolation, "border", None, mask, step=step)


def translate(
    cube: Tensor,
    shift: Tensor,
    *,
    interpolation: Interpolation = "bilinear",
    padding_mode: PaddingMode = "border",
    fill_value: float | None = None,
    mask: Tensor | None = None,
) -> Resampled:
    """Equal to :func:`resample` with ``translation_warp(shift)``, but known to be a translation beforehand.

    Then a frame's indices and weights are one row and one column instead of an image, which saves a GPU most
    of its index traffic. (On the CPU, in eager mode, ``resample`` finds translations by itself.)

    Args:
        cube: (..., T, C, H, W).
        shift: (..., T, 2), the displacement (x, y) of the content in pixels, moving → reference: a warp's
            ``[..., :2, 2]``.
        interpolation: as in :func:`resample`.
        padding_mode: as in :func:`resample`.
        fill_value: as in :func:`resample`.
        mask: as in :func:`resample`.

    Returns:
        :class:`Resampled`.

    Example:
        >>> frame = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> translate(frame, torch.tensor([[0.5, 0.0]])).values.flatten()
        tensor([0.0000, 0.5000, 1.5000, 2.5000])
    """
    _check_cube(cube)
    _check_motion(shift, cube, "shift", ((2,),))
    return _resample(cube, shift, interpolation, padding_mode, fill_value, mask)


# ----------------------------------------------------------------------------------------- checks (host only)


def _check_cube(cube: Tensor) -> None:
    if not isinstance(cube, Tensor):
        raise TypeError(
            f"cube: expected a torch.Tensor (..., T, C, H, W), got {type(cube).__name__}; "
            f"wrap it with torch.as_tensor"
        )
    if cube.dtype.is_complex:
        raise TypeError(
            f"cube: expected a real dtype, got {cube.dtype}; warp cube.real and cube.imag as two bands"
        )
    if cube.ndim < 4:
        raise ValueError(
            f"cube: expected shape (..., T, C, H, W), got {tuple(cube.shape)}; add the missing dimensions, "
            f"e.g. frames[:, None] for one band (T, H, W)"
        )
    if cube.shape[-1] == 0 or cube.shape[-2] == 0:
        raise ValueError(f"cube: expected frames of at least one pixel, got {tuple(cube.shape)}")


def _check_motion(motion: Tensor, cube: Tensor, name: str, endings: tuple[tuple[int, ...], ...]) -> None:
    expected = " or ".join("(..., T, " + ", ".join(map(str, ending)) + ")" for ending in endings)
    check_floating(name, motion, expected)
    if motion.device != cube.device:
        raise ValueError(
            f"{name}: expected the cube's device, {cube.device}, got {motion.device}; "
            f"move it with .to(cube.device)"
        )
    ending = len(endings[0])
    if motion.ndim < ending or tuple(motion.shape[-ending:]) not in endings:
        raise ValueError(
            f"{name}: expected shape {expected}, got {tuple(motion.shape)}; "
            f"build a warp with torchalign.functional.affine.translation_warp or identity_warp"
        )
    if not _broadcasts(motion.shape[:-ending], cube.shape[:-3]):
        raise ValueError(
            f"{name}: expected leading dimensions that broadcast to the cube's {tuple(cube.shape[:-3])}, "
            f"got {tuple(motion.shape[:-ending])}; give one {name} per frame"
        )


def _check_options(
    cube: Tensor, interpolation: str, padding_mode: str, fill_value: float | None, mask: Tensor | None
) -> None:
    for name, value, choices in (
        ("interpolation", interpolation, get_args(Interpolation)),
        ("padding_mode", padding_mode, get_args(PaddingMode)),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    if fill_value is not None and not cube.dtype.is_floating_point:
        lowest, highest = (0, 1) if cube.dtype == torch.bool else _integer_range(cube.dtype)
        if not lowest <= fill_value <= highest or fill_value != int(fill_value):
            raise ValueError(
                f"fill_value: expected a whole number in {lowest} … {highest} for a cube of {cube.dtype}, "
                f"got {fill_value}; choose another one, or convert the cube with .float()"
            )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask: expected a bool tensor, True = usable, got {kind}; compare first, e.g. mask > 0"
        )
    if mask.device != cube.device:
        raise ValueError(
            f"mask: expected the cube's device, {cube.device}, got {mask.device}; "
            f"move it with .to(cube.device)"
        )
    expected = (*cube.shape[:-3], *cube.shape[-2:])
    if not _broadcasts(mask.shape, expected):
        raise ValueError(
            f"mask: expected a shape that broadcasts to (..., T, H, W), here {tuple(expected)}, "
            f"got {tuple(mask.shape)}; insert dimensions of size 1 with mask[:, None]"
        )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``shape`` can be expanded to ``target``."""
    if len(shape) > len(target):
        return False
    return all(have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False))


def _integer_range(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return int(limits.min), int(limits.max)


# ---------------------------------------------------------------------------------------------- where to look


class _Positions(NamedTuple):
    """Source positions of the output pixels, whole and fractional part, broadcastable to (..., T, H, W)."""

    column: Tensor  # int64, ⌊x⌋
    row: Tensor  # int64, ⌊y⌋
    x_fraction: Tensor  # 0 … 1, x − ⌊x⌋
    y_fraction: Tensor

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Column and row of the nearest source pixel, int64; a tie goes right and down."""
        return self.column + (self.x_fraction >= 0.5), self.row + (self.y_fraction >= 0.5)

    def inside(self, size: tuple[int, int]) -> Tensor:
        """(..., T, h, w) bool: where the nearest source pixel is one of the frame's."""
        column, row = self.nearest()
        # axis by axis: of translations these are lines
        return ((row >= 0) & (row < size[0])) & ((column >= 0) & (column < size[1]))


def _positions(
    motion: Tensor, size: tuple[int, int], rows: tuple[int, int], dtype: torch.dtype, step: int = 1
) -> _Positions:
    """Source positions of every ``step``-th of the output rows rows[0] … rows[1] − 1, and of the columns.

    Shifts are (..., T, 2), warps (..., T, 2|3, 3).
    """
    column = torch.arange(0, size[1], step, device=motion.device)[None, :]  # (1, w)
    row = torch.arange(*rows, step, device=motion.device)[:, None]  # (h, 1)
    # Float32 at least, whatever autocast or the cube say: half a mantissa is half a pixel at the far edge.
    motion = motion.to(torch.promote_types(motion.dtype, dtype))
    if motion.shape[-1] == 2:
        x_displacement, y_displacement = _bounded(-motion[..., None, None]).unbind(-3)  # (..., T, 1, 1)
    else:
        x_displacement, y_displacement = _displacement(motion, column.to(motion.dtype), row.to(motion.dtype))
    x_whole, x_fraction = _split(x_displacement, dtype)
    y_whole, y_fraction = _split(y_displacement, dtype)
    return _Positions(column + x_whole, row + y_whole, x_fraction, y_fraction)


def _bounded(displacement: Tensor) -> Tensor:
    """What is no number, or too far to be one of int64, is nowhere near the frame."""
    return displacement.nan_to_num(_FARTHEST).clamp(-_FARTHEST, _FARTHEST)


def _split(displacement: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    whole = displacement.floor()
    return whole.to(torch.int64), (displacement - whole).to(dtype)


def _displacement(warp: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""``warp⁻¹ p − p`` for p = (x, y), two tensors (..., T, h, W), bounded.

    With D = A − I, exact in floating point near the identity, ``A⁻¹ − I = −adj(A) D / det A``: no two large
    numbers are ever subtracted from each other. The same goes for the homography, written out.
    """
    entries = warp.flatten(-2)[..., None, None].unbind(-3)  # 6 or 9 of (..., T, 1, 1)
    if len(entries) == 6:
        a, b, c, d, e, f = entries  # [[a, b, c], [d, e, f]]
        determinant = a * e - b * d
        # a line along x and one along y, of which all is made that can be: of image size there is one addition
        across = (b * d - e * (a - 1)) * x + (b * f - e * c), -b * y
        down = -d * x + (d * c - a * f), (b * d - a * (e - 1)) * y

        def near_or_nowhere(line: Tensor) -> Tensor:
            line = line / determinant
            # with one sign, so that two that are too far do not cancel
            return torch.where(line.abs() <= 0.5 * _FARTHEST, line, _FARTHEST)

        x_displacement, y_displacement = (
            near_or_nowhere(along_x) + near_or_nowhere(along_y) for along_x, along_y in (across, down)
        )
        return x_displacement, y_displacement
    a, b, c, d, e, f, g, h, i = entries
    # adj(H) = [[ei − fh, ch − bi, bf − ce], [fg − di, ai − cg, cd − af], [dh − eg, bg − ah, ae − bd]]
    depth = (d * h - e * g) * x + (b * g - a * h) * y + (a * e - b * d)
    perspective = (d * h - e * g) * x + (b * g - a * h) * y  # depth − adj(H)₂₂
    x_numerator = (e * (i - a) - f * h + b * d - perspective) * x + (c * h - b * i) * y + (b * f - c * e)
    y_numerator = (f * g - d * i) * x + (a * (i - e) - c * g + b * d - perspective) * y + (c * d - a * f)
    return _bounded(x_numerator / depth), _bounded(y_numerator / depth)


# --------------------------------------------------------------------------------------- kernels and samplers


def _cubic_weights(fraction: Scalar, *, magnitudes: bool = False) -> tuple[Scalar, ...]:
    """Keys' weights of the pixels at −1, 0, 1, 2 from ⌊x⌋, or their magnitudes; (0, 1, 0, 0) at fraction 0."""
    a, rest = _CUBIC_A, 1 - fraction
    weights = (
        ((a * fraction - 2 * a) * fraction + a) * fraction,
        ((a + 2) * fraction - (a + 3)) * fraction * fraction + 1,
        ((a + 2) * rest - (a + 3)) * rest * rest + 1,
        ((a * rest - 2 * a) * rest + a) * rest,
    )
    return tuple(abs(weight) for weight in weights) if magnitudes else weights


def _padded(index: Tensor, length: int, padding_mode: PaddingMode) -> Tensor:
    """Indices into a line of ``length`` pixels, which is continued beyond its ends."""
    if padding_mode == "reflection":  # … 1 0 | 0 1 2 … L−1 | L−1 L−2 …, period 2L
        index = index.remainder(2 * length)
        index = torch.minimum(index, 2 * length - 1 - index)
    return index.clamp(0, length - 1)


class _Sampler(Protocol):
    """Reads planes (..., T, C, H, W) at the output's source positions; outside is padded."""

    def nearest(self, planes: Tensor) -> Tensor: ...

    def bilinear(self, planes: Tensor) -> Tensor: ...

    def bicubic(self, planes: Tensor, *, magnitudes: bool = False) -> Tensor: ...

    def inside(self) -> Tensor: ...


class _Gather:
    """Any positions, any device, all frames at once: integer indices into flattened frames."""

    def __init__(self, positions: _Positions, size: tuple[int, int], padding_mode: PaddingMode) -> None:
        self.positions = positions
        self.size = size
        self.padding_mode: PaddingMode = padding_mode
        # a band dimension for the weights, (..., T, 1, h, W)
        self.x_fraction = positions.x_fraction.unsqueeze(-3)
        self.y_fraction = positions.y_fraction.unsqueeze(-3)

    def _take(self, planes: Tensor, column: Tensor, row: Tensor) -> Tensor:
        """Pixels at padded (column, row): (..., T, C, H, W) → (..., T, C, h, W)."""
        index = row * self.size[1] + column  # (..., T, h, W)
        shape = index.shape[-2:]
        index = index.flatten(-2).unsqueeze(-2)  # (..., T, 1, h·W)
        flat = planes.flatten(-2)  # (..., T, C, H·W)
        taken = flat.gather(-1, index.expand(*flat.shape[:-1], index.shape[-1]))
        return taken.reshape(*taken.shape[:-1], *shape)

    def nearest(self, planes: Tensor) -> Tensor:
        column, row = self.positions.nearest()
        (height, width), mode = self.size, self.padding_mode
        return self._take(planes, _padded(column, width, mode), _padded(row, height, mode))

    def _taps(self, planes: Tensor) -> Callable[[int, int], Tensor]:
        """(..., T, C, h, W) of the pixel so far right and down, −1 … 2, from those at or before the positions."""
        (height, width), (column, row) = self.size, self.positions[:2]
        if self.padding_mode == "reflection":
            return lambda right, down: self._take(
                planes,
                _padded(column + right, width, "reflection"),
                _padded(row + down, height, "reflection"),
            )
        # the border is continued once, so far that all taps of a position further out lie on it: one index then
        # serves all taps, which differ by where the planes are taken to begin
        line = width + 7
        flat = F.pad(planes.reshape(-1, 1, height, width), (4, 3, 4, 3), mode="replicate")
        flat = flat.reshape(*planes.shape[:-2], (height + 7) * line)
        index = (row.clamp(-3, height) + 3) * line + (column.clamp(-3, width) + 3)  # (..., T, h, W)
        shape = index.shape[-2:]
        index = index.flatten(-2).unsqueeze(-2)
        index = index.expand(*flat.shape[:-1], index.shape[-1])
        length = flat.shape[-1] - 3 * (line + 1)

        def tap(right: int, down: int) -> Tensor:
            taken = flat.narrow(-1, (down + 1) * line + right + 1, length).gather(-1, index)
            return taken.reshape(*taken.shape[:-1], *shape)

        return tap

    def bilinear(self, planes: Tensor) -> Tensor:
        tap = self._taps(planes)
        # lerp keeps constants exact, and the left pixel at fraction 0
        above = torch.lerp(tap(0, 0), tap(1, 0), self.x_fraction)
        below = torch.lerp(tap(0, 1), tap(1, 1), self.x_fraction)
        return torch.lerp(above, below, self.y_fraction)

    def bicubic(self, planes: Tensor, *, magnitudes: bool = False) -> Tensor:
        x_weights = _cubic_weights(self.x_fraction, magnitudes=magnitudes)
        y_weights = _cubic_weights(self.y_fraction, magnitudes=magnitudes)
        tap = self._taps(planes)
        total: Tensor | None = None
        for down, y_weight in zip((-1, 0, 1, 2), y_weights, strict=True):
            line = x_weights[0] * tap(-1, down)
            for right, x_weight in zip((0, 1, 2), x_weights[1:], strict=True):
                line = torch.addcmul(line, x_weight, tap(right, down))
            total = y_weight * line if total is None else torch.addcmul(total, y_weight, line)
        assert total is not None
        return total

    def inside(self) -> Tensor:
        return self.positions.inside(self.size)


def _overhang(offset: int, count: int, length: int) -> tuple[int, int, int, int]:
    """Indices offset … offset + count − 1, clamped to a line of ``length`` pixels.

    Returns:
        How often the first of the pixels that are met is repeated, that pixel, the one after the last, and how
        often the last is repeated.
    """
    first = min(max(offset, 0), length - 1)
    last = min(max(offset + count, first + 1), length)
    before = min(max(0, -offset), count - 1) if offset < length else 0
    return before, first, last, count - before - (last - first)


class _Slices:
    """One translation, known on the host: whole pixels are slices, fractions one pass along each axis.

    That takes a quarter of the time of gathering four taps.
    """

    def __init__(self, shift: tuple[float, float], size: tuple[int, int], step: int = 1) -> None:
        self.size = size
        self.step = step
        (self.column, self.x_fraction), (self.row, self.y_fraction) = (
            (math.floor(-component), -component - math.floor(-component)) for component in shift
        )

    @staticmethod
    def _run(offset: int, length: int, taps: int) -> tuple[int, int]:
        """First and last + 1 output index whose ``taps`` sources, from index + offset on, are all inside."""
        first = min(max(0, -offset), length)
        return first, max(first, min(length, length - offset - taps + 1))

    def _copy(self, planes: Tensor, column: int, row: int, height: int, width: int) -> Tensor:
        """planes[..., y + row, x + column] for (height, width) outputs, indices clamped to the frame."""
        (left, first_x, last_x, right), (top, first_y, last_y, bottom) = (
            _overhang(offset, count, length)
            for offset, count, length in ((column, width, self.size[1]), (row, height, self.size[0]))
        )
        body = planes[..., first_y:last_y, first_x:last_x]
        if not (left or right or top or bottom):
            return body
        lead = body.shape[:-2]
        if body.dtype in (torch.float32, torch.float64):
            flat = body.reshape(-1, 1, *body.shape[-2:])
            padded = F.pad(flat, (left, right, top, bottom), mode="replicate")
            return padded.reshape(*lead, height, width)
        rows = (body[..., :1, :].expand(*lead, top, -1), body, body[..., -1:, :].expand(*lead, bottom, -1))
        body = torch.cat(rows, dim=-2)
        columns = (
            body[..., :1].expand(*lead, height, left),
            body,
            body[..., -1:].expand(*lead, height, right),
        )
        return torch.cat(columns, dim=-1)

    def _nearest_offset(self) -> tuple[int, int]:
        return self.column + (self.x_fraction >= 0.5), self.row + (self.y_fraction >= 0.5)

    def _thin(self, planes: Tensor) -> Tensor:
        return planes if self.step == 1 else planes[..., :: self.step, :: self.step]

    def nearest(self, planes: Tensor) -> Tensor:
        return self._thin(self._copy(planes, *self._nearest_offset(), *self.size))

    def bilinear(self, planes: Tensor, out: Tensor | None = None) -> Tensor:
        return self._thin(self._bilinear(planes, out))

    def _bilinear(self, planes: Tensor, out: Tensor | None) -> Tensor:
        height, width = self.size
        first_x, last_x = self._run(self.column, width, 2)
        first_y, last_y = self._run(self.row, height, 2)
        if first_x >= last_x or first_y >= last_y:  # nearly or wholly outside: pad first
            padded = self._copy(planes, self.column, self.row, height + 1, width + 1)
            above = torch.lerp(padded[..., :-1], padded[..., 1:], self.x_fraction)
            return torch.lerp(above[..., :-1, :], above[..., 1:, :], self.y_fraction, out=out)
        source = planes[..., first_y + self.row : last_y + self.row + 1, :]  # the rows that are met
        if self.x_fraction == 0 and self.column == 0:
            lines = source
        else:
            left = source[..., first_x + self.column : last_x + self.column]
            right = source[..., first_x + self.column + 1 : last_x + self.column + 1]
            lines = torch.empty_like(source, memory_format=torch.contiguous_format)
            if self.x_fraction == 0:
                lines[..., first_x:last_x] = left
            else:
                torch.lerp(left, right, self.x_fraction, out=lines[..., first_x:last_x])
            lines[..., :first_x] = source[..., :1]
            lines[..., last_x:] = source[..., -1:]
        if out is None:
            out = torch.empty_like(planes, memory_format=torch.contiguous_format)
        if self.y_fraction == 0:
            out[..., first_y:last_y, :] = lines[..., :-1, :]
        else:
            torch.lerp(
                lines[..., :-1, :], lines[..., 1:, :], self.y_fraction, out=out[..., first_y:last_y, :]
            )
        # clamped rows: above the first source row lies row 0 alone, below the last one the last row alone
        out[..., :first_y, :] = lines[..., :1, :]
        out[..., last_y:, :] = lines[..., -1:, :]
        return out

    def bicubic(self, planes: Tensor, *, magnitudes: bool = False) -> Tensor:
        height, width = self.size
        padded = self._copy(planes, self.column - 1, self.row - 1, height + 3, width + 3)
        x_weights = _cubic_weights(self.x_fraction, magnitudes=magnitudes)
        y_weights = _cubic_weights(self.y_fraction, magnitudes=magnitudes)
        # rows first: of these a lattice skips whole ones
        lines = padded[..., : height : self.step, :] * y_weights[0]  # (..., h, W + 3)
        for tap in (1, 2, 3):
            lines.add_(padded[..., tap : tap + height : self.step, :], alpha=y_weights[tap])
        total = lines[..., :width] * x_weights[0]  # (..., h, W)
        for tap in (1, 2, 3):
            total.add_(lines[..., tap : tap + width], alpha=x_weights[tap])
        return total if self.step == 1 else total[..., :: self.step]

    def inside(self) -> Tensor:
        height, width = self.size
        column, row = self._nearest_offset()
        first_x, last_x = self._run(column, width, 1)
        first_y, last_y = self._run(row, height, 1)
        inside = torch.zeros(height, width, dtype=torch.bool, device="cpu")
        inside[first_y:last_y, first_x:last_x] = True
        return self._thin(inside)


class _Lines:
    """Many translations at once: rows are taken whole, then columns, by one line of indices a frame and axis.

    Of a lattice most rows are never touched. Eager on the CPU :class:`_Slices` is faster, but for a lattice, where
    slicing frame by frame costs as much as the sampling itself.
    """

    def __init__(self, positions: _Positions, size: tuple[int, int], padding_mode: PaddingMode) -> None:
        self.positions = positions  # columns (..., T, 1, w), rows (..., T, h, 1), fractions (..., T, 1, 1)
        self.size = size
        self.padding_mode: PaddingMode = padding_mode
        self.x_fraction = positions.x_fraction.unsqueeze(-3)
        self.y_fraction = positions.y_fraction.unsqueeze(-3)

    def _rows(self, planes: Tensor, row: Tensor, taps: range) -> tuple[Tensor, ...]:
        """(..., T, C, H, W) → for each tap (..., T, C, h, W), the rows (..., T, h, 1), so far down."""
        (height, width), lead = self.size, planes.shape[:-2]
        index = _padded(row.mT + _column_of(taps, row), height, self.padding_mode)  # (..., T, taps, h)
        first = torch.arange(math.prod(lead), device=planes.device).reshape(lead) * height
        index = first[..., None, None] + index.unsqueeze(-3)  # (..., T, C, taps, h)
        taken = planes.reshape(-1, width).index_select(0, index.flatten())
        return taken.reshape(*index.shape, width).unbind(-3)

    def _columns(self, lines: Tensor, column: Tensor, taps: range) -> tuple[Tensor, ...]:
        """(..., T, C, h, W) → for each tap (..., T, C, h, w), the columns (..., T, 1, w), so far right."""
        index = _padded(
            column + _column_of(taps, column), self.size[1], self.padding_mode
        )  # (..., T, taps, w)
        shape = (*lines.shape[:-1], *index.shape[-2:])
        index = index.flatten(-2)[..., None, None, :]
        taken = lines.gather(-1, index.expand(*lines.shape[:-1], index.shape[-1]))
        return taken.reshape(shape).unbind(-2)

    def nearest(self, planes: Tensor) -> Tensor:
        column, row = self.positions.nearest()
        (lines,) = self._rows(planes, row, range(1))
        return self._columns(lines, column, range(1))[0]

    def bilinear(self, planes: Tensor) -> Tensor:
        column, row = self.positions[:2]
        # lerp keeps constants exact, and the pixel above or on the left at fraction 0
        above, below = self._rows(planes, row, range(2))
        left, right = self._columns(torch.lerp(above, below, self.y_fraction), column, range(2))
        return torch.lerp(left, right, self.x_fraction)

    def bicubic(self, planes: Tensor, *, magnitudes: bool = False) -> Tensor:
        column, row = self.positions[:2]
        x_weights = _cubic_weights(self.x_fraction, magnitudes=magnitudes)
        y_weights = _cubic_weights(self.y_fraction, magnitudes=magnitudes)
        lines = _combination(y_weights, self._rows(planes, row, range(-1, 3)))
        return _combination(x_weights, self._columns(lines, column, range(-1, 3)))

    def inside(self) -> Tensor:
        return self.positions.inside(self.size)


def _column_of(taps: range, like: Tensor) -> Tensor:
    return torch.arange(taps.start, taps.stop, device=like.device)[:, None]


def _combination(weights: Sequence[Tensor], taps: Sequence[Tensor]) -> Tensor:
    total = weights[0] * taps[0]
    for weight, tap in zip(weights[1:], taps[1:], strict=True):
        total = torch.addcmul(total, weight, tap)
    return total


# ------------------------------------------------------------------------------------------- putting together


def _resample(
    cube: Tensor,
    motion: Tensor,
    interpolation: Interpolation,
    padding_mode: PaddingMode,
    fill_value: float | None,
    mask: Tensor | None,
    out: Tensor | None = None,
    step: int = 1,
) -> Resampled:
    """``motion`` is a shift (..., T, 2) or a warp (..., T, 2|3, 3); ``out`` may take the values on the host."""
    _check_options(cube, interpolation, padding_mode, fill_value, mask)
    lead, size = cube.shape[:-3], (cube.shape[-2], cube.shape[-1])
    ending = motion.shape[-1:] if motion.shape[-1] == 2 else motion.shape[-2:]
    motion = motion.expand(*lead, *ending)
    if mask is not None:
        mask = mask.expand(*lead, *size).unsqueeze(-3)  # (..., T, 1, H, W)
    options = _Options(interpolation, padding_mode, fill_value, step)
    on_host = is_on_host(cube) and is_on_host(motion) and (mask is None or is_on_host(mask))
    if on_host:
        return _resample_on_host(cube, motion, mask, options, out)
    positions = _positions(motion, size, (0, size[0]), _compute_dtype(cube.dtype), step)
    kind = _Lines if motion.shape[-1] == 2 else _Gather
    result = _combine(_prepare(cube, mask, options), kind(positions, size, padding_mode), options)
    if out is not None:
        out.copy_(result.values)
    return result


class _Options(NamedTuple):
    interpolation: Interpolation
    padding_mode: PaddingMode
    fill_value: float | None
    step: int = 1  # of the lattice of output pixels


class _Planes(NamedTuple):
    """Frames, and what interpolation reads of them."""

    frames: Tensor  # (..., T, C, H, W), as given
    usable: Tensor | None  # (..., T, 1 or C, H, W) bool; None if every pixel is
    source: Tensor  # the frames in the dtype of computation, 0 where unusable


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 where float32 cannot hold the values."""
    if dtype == torch.float64 or (not dtype.is_floating_point and dtype.itemsize >= 4):
        return torch.float64
    return torch.float32


def _prepare(frames: Tensor, mask: Tensor | None, options: _Options, *, on_host: bool = False) -> _Planes:
    usable = mask
    # One number tells whether a frame is wholly finite: a NaN or an infinity survives every sum. (A sum that
    # overflows tells a harmless lie: the longer way gives the same values.)
    finite = not frames.dtype.is_floating_point or (on_host and math.isfinite(float(frames.sum())))
    if not finite:
        usable = frames.isfinite() if mask is None else frames.isfinite() & mask
    if on_host and usable is not None and bool(usable.all()):
        usable = None
    if options.interpolation == "nearest":
        return _Planes(frames, usable, frames)
    source = frames.to(_compute_dtype(frames.dtype))
    # where, not a product: 0 · NaN is NaN, in the gradient too
    return _Planes(frames, usable, source if usable is None else torch.where(usable, source, 0.0))


def _combine(planes: _Planes, sampler: _Sampler, options: _Options) -> Resampled:
    """Interpolate among usable pixels, copy where there is nothing to interpolate, fill."""
    inside = sampler.inside()  # (..., T, h, W)
    values, near_usable = _values(planes, sampler, options, inside)
    return Resampled(values, inside if near_usable is None else inside & near_usable.all(-3))


def _values(
    planes: _Planes, sampler: _Sampler, options: _Options, inside: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The values alone, and where the nearest pixels are usable."""
    near_usable = None if planes.usable is None else sampler.nearest(planes.usable)  # (..., T, 1 or C, h, W)
    if options.interpolation == "nearest":
        values = _as_signed(sampler.nearest, planes.frames)
    else:
        values = _interpolate(planes, near_usable, sampler, options.interpolation)
    if options.fill_value is None and options.padding_mode != "zeros":
        return values, near_usable
    within = (sampler.inside() if inside is None else inside).unsqueeze(-3)
    if options.fill_value is None:
        return _keep_where(within, values, 0), near_usable
    good = within if near_usable is None else within & near_usable
    return _keep_where(good, values, options.fill_value), near_usable


def _interpolate(
    planes: _Planes, near_usable: Tensor | None, sampler: _Sampler, interpolation: Interpolation
) -> Tensor:
    frames, usable, source = planes
    if usable is None or near_usable is None:
        values = sampler.bicubic(source) if interpolation == "bicubic" else sampler.bilinear(source)
        return _restore(values, frames, sampler)
    weight = usable.to(source.dtype)
    # The nearest pixel weighs 1/4 or more, so near_usable guards the division.
    values = sampler.bilinear(source) / torch.where(near_usable, sampler.bilinear(weight), 1.0)
    if interpolation == "bicubic":
        met_unusable = sampler.bicubic(1 - weight, magnitudes=True) > 0
        values = torch.where(met_unusable, values, sampler.bicubic(source))
    values = _restore(values, frames, sampler)
    return torch.where(near_usable, values, _as_signed(sampler.nearest, frames))


def _restore(values: Tensor, frames: Tensor, sampler: _Sampler) -> Tensor:
    """Back to the dtype of ``frames``; integers rounded half to even, and clamped, never wrapped."""
    dtype = frames.dtype
    if dtype.is_floating_point:
        return values.to(dtype)
    if dtype == torch.bool:
        return values > 0.5  # one half is rounded to 0, the even one
    lowest, highest = _integer_range(dtype)
    if dtype.itemsize < 8:
        return values.round().clamp(lowest, highest).to(dtype)
    highest -= (highest + 1) // 2**53 - 1  # the largest float64 within the range
    rounded = values.round().clamp(float(lowest), float(highest)).to(dtype)
    # float64 holds no more than 2⁵³: a pixel that was copied is copied as an integer
    nearest = _as_signed(sampler.nearest, frames)
    return torch.where(values == nearest.to(values.dtype), nearest, rounded)


def _as_signed(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a function that only moves values; torch indexes few of the unsigned dtypes, but all signed."""
    signed = _SIGNED.get(tensor.dtype)
    return function(tensor) if signed is None else function(tensor.view(signed)).view(tensor.dtype)


def _keep_where(condition: Tensor, values: Tensor, otherwise: float) -> Tensor:
    filling = torch.full((), otherwise, dtype=values.dtype, device=values.device)
    return torch.where(condition, values, filling)


# ------------------------------------------------------------------------------------------ eager, on the CPU


def _resample_on_host(
    cube: Tensor, motion: Tensor, mask: Tensor | None, options: _Options, out: Tensor | None = None
) -> Resampled:
    """Block by block: frame by frame if it is large, many frames at once if they are small.

    Given ``out``, the values alone are made, and written there.
    """
    lead, (bands, height, width) = cube.shape[:-3], cube.shape[-3:]
    count = math.prod(lead)
    frames = cube.reshape(count, bands, height, width)
    motion = motion.reshape(count, *motion.shape[len(lead) :])
    masks = None if mask is None else mask.reshape(count, 1, height, width)
    step = options.step
    shape = (count, bands, len(range(0, height, step)), len(range(0, width, step)))
    values = empty_on_host(shape, cube.dtype) if out is None else out.view(shape)
    validity = torch.empty((count, *shape[-2:]), dtype=torch.bool, device="cpu")

    samples = bands * height * width
    shifts: list[tuple[float, float] | None] = [None] * count
    if options.padding_mode != "reflection" and samples >= _SMALLEST_SLICED:
        shifts = _host_shifts(motion)
    if options == _CUBIC_LATTICE._replace(step=step) and step > 1 and bands == 1 and None not in shifts:
        planes = _prepare(frames, masks, options, on_host=True)
        if planes.usable is None and planes.source is planes.frames:
            moved = motion if motion.ndim == 2 else motion[:, :2, 2]
            positions = _positions(moved, (height, width), (0, height), planes.source.dtype, step)
            lattice = _Lines(positions, (height, width), options.padding_mode)
            sampled = lattice.bicubic(planes.source).reshape(*lead, *shape[1:])
            return Resampled(sampled, lattice.inside().reshape(*lead, *shape[-2:]))
    together = max(1, _BLOCK_SAMPLES // (height * width))  # bands
    gathered = []
    for index, shift in enumerate(shifts):
        if shift is None:
            gathered.append(index)
            continue
        planes = _prepare(frames[index], None if masks is None else masks[index], options, on_host=True)
        sampler = _Slices(shift, (height, width), step)
        if options == _PLAIN and planes.usable is None and planes.source is planes.frames:
            for first in range(0, bands, together):  # the hot case: no mask, and nothing is copied
                chosen = slice(first, first + together)
                sampler.bilinear(planes.source[chosen], out=values[index, chosen])
            if out is None:
                validity[index] = sampler.inside()
        elif out is None:
            values[index], validity[index] = _combine(planes, sampler, options)
        else:
            values[index], _ = _values(planes, sampler, options)

    together = max(1, _BLOCK_SAMPLES // max(1, samples))  # frames
    # whole steps of the lattice
    rows = height if together > 1 else step * max(1, _BLOCK_SAMPLES // max(1, bands * width))
    for first in range(0, len(gathered), together):
        block = gathered[first : first + together]
        if block[-1] - block[0] == len(block) - 1:
            frame: slice | list[int] = slice(block[0], block[-1] + 1)  # neighbours: a view
        else:
            frame = block
        planes = _prepare(frames[frame], None if masks is None else masks[frame], options, on_host=True)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            compute = _compute_dtype(cube.dtype)
            positions = _positions(motion[frame], (height, width), (top, bottom), compute, step)
            gather = _Gather(positions, (height, width), options.padding_mode)
            lines = slice(top // step, -(-bottom // step))
            if out is None:
                values[frame, :, lines], validity[frame, lines] = _combine(planes, gather, options)
            else:
                values[frame, :, lines], _ = _values(planes, gather, options)
    return Resampled(values.reshape(*lead, *shape[1:]), validity.reshape(*lead, *shape[-2:]))


def _host_shifts(motion: Tensor) -> list[tuple[float, float] | None]:
    """Each frame's shift (x, y), from (N, 2) or (N, 2|3, 3); None where it is more than one, or no number."""
    shifts: list[tuple[float, float] | None] = []
    for row in motion.flatten(1).to(torch.promote_types(motion.dtype, torch.float32)).tolist():
        if len(row) == 2:
            shift = (row[0], row[1])
            is_translation = True
        else:
            shift = (row[2], row[5])
            is_translation = (
                row[:2] + row[3:5] + row[6:] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0][: len(row) - 2]
            )
        is_translation = is_translation and all(abs(component) <= _FARTHEST for component in shift)
        shifts.append(shift if is_translation else None)
    return shifts


_PLAIN = _Options("bilinear", "border", None)
_CUBIC_LATTICE = _Options("bicubic", "border", None)
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
