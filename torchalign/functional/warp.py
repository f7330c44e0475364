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

How pixels are read is :mod:`torchalign.functional.sampling`'s. In eager mode on the CPU blocks that fit into the
cache are walked, and frames whose warp turns out to be a translation are sliced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchalign._check import check_fill, check_floating, check_option, message
from torchalign._host import all_finite, all_true, empty_on_host, kernels_for, may_read
from torchalign.functional.sampling import Gather, Lines, PaddingMode, Sampler, Slices
from torchalign.functional.shift_field import field_at, is_zero, lattice_shifts
from torchalign.types import ShiftField

__all__ = ["Interpolation", "PaddingMode", "Resampled", "resample", "warp"]

Interpolation = Literal["nearest", "bilinear", "bicubic"]

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
    step: int = 1,
    out: Tensor | None = None,
    field: ShiftField | None = None,
    finite: bool = False,
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
            displacements reach hundreds of pixels. Or (..., T, 2), the shift (x, y) of a translation, a warp's
            ``[..., :2, 2]``: what is known to be one costs a GPU one row and one column of indices a frame.
        interpolation: ``"nearest"``, ``"bilinear"``, or ``"bicubic"`` (Keys, A = −1/2). The last two place
            long waves to within 0.001 px; bilinear also blurs, most of all half-way between pixels.
        padding_mode: ``"border"`` (the nearest border pixel), ``"zeros"``, or ``"reflection"`` (about the
            frame's outer edge, half a pixel beyond the border's centres).
        fill_value: what stands where nothing valid does; must be representable in the cube's dtype.
        mask: bool, broadcastable to (..., T, H, W), True = usable.
        step: only every so many-th pixel of the result along both axes, from the first on: ⌈H / step⌉ × ⌈W / step⌉
            pixels, for the price of those.
        out: a contiguous tensor that takes the values, and is returned: fresh memory costs as much as a bilinear
            interpolation does. Not differentiable.
        field: local shifts on top of the warp, ``aligned(p) = frame(W⁻¹ p + field(p))``, leading dimensions
            broadcast against the cube's; frames that it does not shift are bit for bit as without it.
        finite: no value is NaN or infinite, as the caller knows: spares a look at all of them.

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
    _check(cube, warp, mask)
    _check_options(cube, interpolation, padding_mode, fill_value)
    if field is not None:
        _check_field(field, cube)
        field = None if 0 in field.coefficients.shape[-2:] else _expand_field(field, cube.shape[:-3])
    lead, size = cube.shape[:-3], (cube.shape[-2], cube.shape[-1])
    warp = warp.expand(*lead, *warp.shape[-1 if warp.shape[-1] == 2 else -2 :])
    mask = None if mask is None else mask.expand(*lead, *size)
    kernels = kernels_for(cube, warp, mask, *(field or ()))
    if kernels is not None:
        place = warp.to(torch.promote_types(warp.dtype, torch.float32))
        local = None if field is None else lattice_shifts(field, size, step, place)
        found = kernels.resample(cube, warp, mask, interpolation, padding_mode, fill_value, step, local)
        if found is not None:
            return Resampled(found[0] if out is None else out.copy_(found[0]), found[1])
    mask = None if mask is None else mask.unsqueeze(-3)  # (..., T, 1, H, W)
    options = _Options(interpolation, padding_mode, fill_value, step, finite)
    if may_read(cube, warp, mask, *(field or ())):
        return _resample_in_blocks(cube, warp, mask, options, out, field)
    planes = _prepare(cube, mask, options)
    where = warp, size, (0, size[0]), cube.dtype, options
    result = _combine(planes, _sampler(*where, field), options)
    if field is not None:
        # where nothing is moved, the result is bit for bit that without a field
        plain, unmoved = _combine(planes, _sampler(*where), options), is_zero(field)[..., None, None]
        values = torch.where(unmoved.unsqueeze(-1), plain.values, result.values)
        result = Resampled(values, torch.where(unmoved, plain.validity, result.validity))
    return result if out is None else Resampled(out.copy_(result.values), result.validity)


def warp(
    cube: Tensor,
    warp: Tensor,
    *,
    interpolation: Interpolation = "bilinear",
    padding_mode: PaddingMode = "border",
    fill_value: float | None = None,
    mask: Tensor | None = None,
    field: ShiftField | None = None,
) -> Tensor:
    """The values of :func:`resample` alone; see there for all arguments and rules.

    Args:
        cube: (..., T, C, H, W).
        warp: (..., T, 2, 3) or (..., T, 3, 3), moving → reference; or (..., T, 2), a shift.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        padding_mode: ``"border"``, ``"zeros"`` or ``"reflection"``.
        fill_value: what stands where nothing valid does.
        mask: bool, broadcastable to (..., T, H, W), True = usable.
        field: local shifts on top of the warp, an estimate's.

    Returns:
        (..., T, C, H, W), in the cube's dtype.

    Example:
        >>> frame = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> warp(frame, torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])).flatten()
        tensor([0.0000, 0.5000, 1.5000, 2.5000])
    """
    return resample(
        cube,
        warp,
        interpolation=interpolation,
        padding_mode=padding_mode,
        fill_value=fill_value,
        mask=mask,
        field=field,
    ).values


# ----------------------------------------------------------------------------------------- checks (host only)


def _check(cube: object, warp: Tensor, mask: object) -> None:
    if not isinstance(cube, Tensor):
        expected, cure = "a torch.Tensor (..., T, C, H, W)", "wrap it with torch.as_tensor"
        raise TypeError(message("cube", expected, type(cube).__name__, cure))
    if cube.dtype.is_complex:
        raise TypeError(
            message("cube", "a real dtype", cube.dtype, "warp cube.real and cube.imag as two bands")
        )
    shape = tuple(cube.shape)
    if cube.ndim < 4:
        cure = "add the missing dimensions, e.g. frames[:, None] for one band (T, H, W)"
        raise ValueError(message("cube", "shape (..., T, C, H, W)", shape, cure))
    if 0 in shape[-2:]:
        raise ValueError(message("cube", "frames of at least one pixel", shape, "leave out empty frames"))
    expected = "(..., T, 2, 3), (..., T, 3, 3) or (..., T, 2)"
    check_floating("warp", warp, expected)
    _check_device("warp", warp, cube)
    shift = warp.shape[-1:] == (2,)
    lead = tuple(warp.shape[: -1 if shift else -2])
    if not (shift or warp.shape[-2:] in ((2, 3), (3, 3))) or not _broadcasts(lead, shape[:-3]):
        expected = f"shape {expected}, of leading dimensions that broadcast to the cube's {shape[:-3]}"
        cure = "build one warp per frame with torchalign.functional.affine.translation_warp or identity_warp"
        raise ValueError(message("warp", expected, tuple(warp.shape), cure))
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(message("mask", "a bool tensor, True = usable", kind, "compare first, e.g. mask > 0"))
    _check_device("mask", mask, cube)
    if not _broadcasts(tuple(mask.shape), (*shape[:-3], *shape[-2:])):
        expected = f"a shape that broadcasts to (..., T, H, W), here {(*shape[:-3], *shape[-2:])}"
        cure = "insert dimensions of size 1 with mask[:, None]"
        raise ValueError(message("mask", expected, tuple(mask.shape), cure))


def _check_field(field: object, cube: Tensor) -> None:
    if not isinstance(field, ShiftField):
        cure = "give an estimate's field, or build a torchalign.types.ShiftField"
        raise TypeError(message("field", "a ShiftField", type(field).__name__, cure))
    lead = tuple(cube.shape[:-3])
    endings = {"coefficients": 3, "sigma": 2, "origin": 1, "spacing": 1}
    for (part, ending), tensor in zip(endings.items(), field, strict=True):
        name = f"field.{part}"
        check_floating(name, tensor, "of a ShiftField")
        _check_device(name, tensor, cube)
        if tensor.ndim < ending or not _broadcasts(tuple(tensor.shape[: tensor.ndim - ending]), lead):
            expected = f"leading dimensions that broadcast to the cube's {lead}"
            raise ValueError(message(name, expected, tuple(tensor.shape), "give one field per frame"))
    shape = tuple(field.coefficients.shape)
    if shape[-3] != 2 or 0 < min(shape[-2:]) < 3:
        expected, cure = "shape (..., T, 2, n, m) of at least 3 nodes a side", "x first, then y"
        raise ValueError(message("field.coefficients", expected, shape, cure))


def _expand_field(field: ShiftField, lead: torch.Size) -> ShiftField:
    coefficients, sigma, origin, spacing = field
    return ShiftField(
        coefficients.expand(*lead, *coefficients.shape[-3:]),
        sigma.expand(*lead, *sigma.shape[-2:]),
        origin.expand(*lead, 2),
        spacing.expand(*lead, 2),
    )


def _check_device(name: str, tensor: Tensor, cube: Tensor) -> None:
    if tensor.device != cube.device:
        expected, cure = f"the cube's device, {cube.device}", "move it with .to(cube.device)"
        raise ValueError(message(name, expected, tensor.device, cure))


def _check_options(cube: Tensor, interpolation: str, padding_mode: str, fill_value: float | None) -> None:
    check_option("interpolation", interpolation, Interpolation)
    check_option("padding_mode", padding_mode, PaddingMode)
    check_fill("fill_value", fill_value)
    if fill_value is None or cube.dtype.is_floating_point:
        return
    lowest, highest = (0, 1) if cube.dtype == torch.bool else _integer_range(cube.dtype)
    if not lowest <= fill_value <= highest or fill_value != int(fill_value):
        expected = f"a whole number in {lowest} … {highest} for a cube of {cube.dtype}"
        cure = "choose another one, or convert the cube with .float()"
        raise ValueError(message("fill_value", expected, fill_value, cure))


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``shape`` can be expanded to ``target``."""
    if len(shape) > len(target):
        return False
    return all(have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False))


def _integer_range(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return int(limits.min), int(limits.max)


# ---------------------------------------------------------------------------------------------- where to look


def _sampler(
    motion: Tensor,
    size: tuple[int, int],
    rows: tuple[int, int],
    dtype: torch.dtype,
    options: _Options,
    field: ShiftField | None = None,
) -> Gather | Lines:
    """Of the lattice's pixels in the output rows rows[0] … rows[1] − 1; shifts (..., T, 2) or warps."""
    column = torch.arange(0, size[1], options.step, device=motion.device)[None, :]  # (1, w)
    row = torch.arange(*rows, options.step, device=motion.device)[:, None]  # (h, 1)
    dtype = _compute_dtype(dtype)
    # Float32 at least, even under autocast: half precision is half a pixel off at the far edge.
    motion = motion.to(torch.promote_types(motion.dtype, dtype))
    x, y = column.to(motion.dtype), row.to(motion.dtype)
    only_shifted = motion.shape[-1] == 2
    if only_shifted:
        x_displacement, y_displacement = _bounded(-motion[..., None, None]).unbind(-3)  # (..., T, 1, 1)
    else:
        x_displacement, y_displacement = backward_displacement(motion, x, y)
    if field is not None:
        field = ShiftField(*(part.to(motion.dtype) for part in field))
        x_shift, y_shift = field_at(field, x[0], y[:, 0])
        x_displacement, y_displacement = (
            _bounded(x_displacement + x_shift),
            _bounded(y_displacement + y_shift),
        )
    x_whole, y_whole = x_displacement.floor(), y_displacement.floor()
    positions = (
        column + x_whole.to(torch.int64),
        row + y_whole.to(torch.int64),
        (x_displacement - x_whole).to(dtype),
        (y_displacement - y_whole).to(dtype),
    )
    if only_shifted and field is None:
        return Lines(positions, size, options.padding_mode, options.step)
    return Gather(positions, size, options.padding_mode)


def _bounded(displacement: Tensor) -> Tensor:
    """Put positions that are NaN, or too far for int64, far outside the frame."""
    return displacement.nan_to_num(_FARTHEST).clamp(-_FARTHEST, _FARTHEST)


def backward_displacement(warp: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
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


# ------------------------------------------------------------------------------------------- putting together


class _Options(NamedTuple):
    interpolation: Interpolation
    padding_mode: PaddingMode
    fill_value: float | None
    step: int  # of the lattice of output pixels
    finite: bool = False  # every value is known to be


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


def _prepare(frames: Tensor, mask: Tensor | None, options: _Options) -> _Planes:
    floating = frames.dtype.is_floating_point and not options.finite and not all_finite(frames)
    if not floating and (mask is None or all_true(mask)):
        mask = None
    nearest = options.interpolation == "nearest"
    given = source = frames if nearest else frames.to(_compute_dtype(frames.dtype))
    usable = mask
    if floating:
        source = given.nan_to_num(0.0, 0.0, 0.0)
        usable = source == given if mask is None else (source == given) & mask
    if nearest:
        return _Planes(frames, usable, frames)
    # where, not a product: 0 · NaN is NaN, in the gradient too
    return _Planes(frames, usable, source if mask is None else torch.where(mask, source, 0.0))


def _combine(planes: _Planes, sampler: Sampler, options: _Options) -> Resampled:
    """Interpolate among usable pixels, copy where there is nothing to interpolate, fill."""
    inside = sampler.inside()  # (..., T, h, w)
    near_usable = None if planes.usable is None else sampler.nearest(planes.usable)  # (..., T, 1 or C, h, w)
    validity = inside if near_usable is None else inside & near_usable.all(-3)
    if options.interpolation == "nearest":
        values = _as_signed(sampler.nearest, planes.frames)
    else:
        values = _interpolate(planes, near_usable, sampler, options)
    within = inside.unsqueeze(-3)
    if options.fill_value is not None:
        good = within if near_usable is None else within & near_usable
        return Resampled(_keep_where(good, values, options.fill_value), validity)
    if options.padding_mode == "zeros":
        values = _keep_where(within, values, 0)
    return Resampled(values, validity)


def _interpolate(planes: _Planes, near_usable: Tensor | None, sampler: Sampler, options: _Options) -> Tensor:
    frames, usable, source = planes
    bicubic = options.interpolation == "bicubic"
    taps = sampler.around(source)
    if usable is None or near_usable is None:
        return _restore(sampler.bicubic(taps) if bicubic else sampler.bilinear(taps), frames, sampler)
    weights = sampler.around(usable)
    # The nearest pixel weighs 1/4 or more where it is usable; elsewhere it guards the division.
    values = sampler.bilinear(taps) / sampler.bilinear(weights).clamp(min=0.25)
    if bicubic:
        values = torch.where(sampler.all_usable(weights), sampler.bicubic(taps), values)
    values = _restore(values, frames, sampler)
    if options.fill_value is not None:  # it stands where nothing near is usable
        return values
    return torch.where(near_usable, values, _as_signed(sampler.nearest, frames))


def _restore(values: Tensor, frames: Tensor, sampler: Sampler) -> Tensor:
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


def _resample_in_blocks(
    cube: Tensor,
    motion: Tensor,
    mask: Tensor | None,
    options: _Options,
    out: Tensor | None,
    field: ShiftField | None,
) -> Resampled:
    """Frame by frame if they are large, many at once if they are small."""
    lead, (bands, height, width) = cube.shape[:-3], cube.shape[-3:]
    count, size, step = math.prod(lead), (height, width), options.step
    frames = cube.reshape(count, bands, height, width)
    motion = motion.reshape(count, *motion.shape[len(lead) :])
    masks = None if mask is None else mask.reshape(count, 1, height, width)
    shape = (count, bands, len(range(0, height, step)), len(range(0, width, step)))
    values = empty_on_host(shape, cube.dtype) if out is None else out.view(shape)
    validity = torch.zeros((count, *shape[-2:]), dtype=torch.bool, device="cpu")

    sliced = options.padding_mode != "reflection" and bands * height * width >= _SMALLEST_SLICED
    shifts = _shifts(motion) if sliced else {}
    bicubic = options[:3] == ("bicubic", "border", None)
    plain = bicubic or options[:4] == ("bilinear", "border", None, 1)
    moved = [False] * count
    if field is not None:
        field = ShiftField(*(part.reshape(count, *part.shape[len(lead) :]) for part in field))
        moved = (~is_zero(field)).tolist()
        shifts = {index: shift for index, shift in shifts.items() if not moved[index]}
    for index, shift in shifts.items():
        planes = _prepare(frames[index], None if masks is None else masks[index], options)
        sampler = Slices(shift, size, _compute_dtype(cube.dtype), step)
        if not plain or planes.usable is not None or planes.source is not planes.frames:
            values[index], validity[index] = _combine(planes, sampler, options)
            continue
        # the hot case: no mask, and nothing is copied
        validity[index][sampler.overlap()] = True
        if bicubic:
            values[index] = sampler.bicubic(sampler.around(planes.source))
            continue
        together = max(1, _BLOCK_SAMPLES // (height * width))  # bands
        for first in range(0, bands, together):
            part = slice(first, first + together)
            sampler.shift(planes.source[part], values[index, part])

    rest = [index for index in range(count) if index not in shifts]
    parts = [[index for index in rest if moved[index] is local] for local in (False, True)]
    for block, (top, bottom) in (block for part in parts for block in _blocks(part, bands, size, step)):
        # neighbours are a view
        neighbours = block[-1] - block[0] == len(block) - 1
        chosen: slice | list[int] = slice(block[0], block[-1] + 1) if neighbours else block
        planes = _prepare(frames[chosen], None if masks is None else masks[chosen], options)
        local = (
            None if field is None or not moved[block[0]] else ShiftField(*(part[chosen] for part in field))
        )
        gather = _sampler(motion[chosen], size, (top, bottom), cube.dtype, options, local)
        lines = slice(top // step, -(-bottom // step))
        values[chosen, :, lines], validity[chosen, lines] = _combine(planes, gather, options)
    return Resampled(values.reshape(*lead, *shape[1:]), validity.reshape(*lead, *shape[-2:]))


def _blocks(
    frames: list[int], bands: int, size: tuple[int, int], step: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Some of the frames and a range of output rows, of about :data:`_BLOCK_SAMPLES` samples."""
    height, width = size
    line = max(1, bands * -(-width // step))  # samples of an output row
    together = max(1, _BLOCK_SAMPLES // (line * max(1, -(-height // step))))  # frames
    # whole steps of the lattice
    rows = height if together > 1 else step * max(1, _BLOCK_SAMPLES // line)
    for first in range(0, len(frames), together):
        for top in range(0, height, rows):
            yield frames[first : first + together], (top, min(top + rows, height))


def _shifts(motion: Tensor) -> dict[int, tuple[float, float]]:
    """Of (N, 2) or (N, 2|3, 3): the frames that are only shifted, and the shift (x, y)."""
    shifts = {}
    for index, row in enumerate(
        motion.flatten(1).to(torch.promote_types(motion.dtype, torch.float32)).tolist()
    ):
        x, y = row if len(row) == 2 else (row[2], row[5])
        identity = [1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0, 1.0][: len(row)]
        if (len(row) == 2 or row == identity) and abs(x) <= _FARTHEST and abs(y) <= _FARTHEST:
            shifts[index] = (x, y)
    return shifts


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
