"""The correlation divided by the overlap of its weights: what is correlated for it, and its ascent, a kernel each."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from torchalign.kernels.climb import MOST_BINS, derivatives, newton_step, settled
from torchalign.kernels.sampling import block_of, by_group, divide, kernel, launch, operator


@kernel
def overlap_frames(
    own,  # (N, h, w), the window of the ground in common, over the moving frame
    other,  # (N, h, w), over the reference
    moved,  # (N, h, w), the weights over the moving frame
    weights,  # (N, h, w), over the reference
    cover,  # (N, h, w), of the moving frame
    other_cover,  # (N or 1 a group, h, w)
    moving,  # (N, h, w)
    reference,  # (N or 1 a group, h, w)
    fields,  # (2, 3, N, h, w)
    stack,  # frames in all
    group,
    samples,
    COVERED: tl.constexpr,
    OTHER_COVERED: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: a block of samples of one frame."""
    frame, place, live = block_of(samples, BLOCK)
    here = frame * samples + place
    there = frame // group * samples + place
    weight = tl.load(own + here, mask=live, other=0)
    share = tl.load(moved + here, mask=live, other=0)
    weight *= tl.minimum(tl.maximum(share, 0.0), 1.0)
    if COVERED:
        weight *= tl.load(cover + here, mask=live, other=0)
    value = tl.load(moving + here, mask=live, other=0)
    step = tl.cast(stack, tl.int64) * samples
    tl.store(fields + here, weight * value, mask=live)
    tl.store(fields + step + here, weight * value * value, mask=live)
    tl.store(fields + 2 * step + here, weight, mask=live)
    weight = tl.load(other + here, mask=live, other=0) * tl.load(weights + here, mask=live, other=0)
    if OTHER_COVERED:
        weight *= tl.load(other_cover + there, mask=live, other=0)
    value = tl.load(reference + there, mask=live, other=0)
    tl.store(fields + 3 * step + here, weight * value, mask=live)
    tl.store(fields + 4 * step + here, weight, mask=live)
    tl.store(fields + 5 * step + here, weight * value * value, mask=live)


@kernel
def divided_frames(
    spectra,  # (2, 3, N, h, w//2+1, 2)
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    start,  # (N, 2)
    found,  # (N, 4)
    stack,  # frames in all
    bins,
    columns,
    steps,
    COMPUTE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: one frame. See functional.phase._divided_step."""
    frame = tl.program_id(0).to(tl.int64)
    shift_x = tl.load(start + 2 * frame)
    shift_y = tl.load(start + 2 * frame + 1)
    step_x = tl.zeros_like(shift_x)
    step_y = tl.zeros_like(shift_y)
    peak = shift_x == shift_x
    for _ in range(steps):
        gx = tl.zeros_like(shift_x)
        gy = tl.zeros_like(shift_x)
        hxx = tl.zeros_like(shift_x)
        hyy = tl.zeros_like(shift_x)
        hxy = tl.zeros_like(shift_x)
        peak = shift_x == shift_x
        for which in range(3):
            own = spectra + (which * stack + frame) * bins * 2
            other = own + tl.cast(stack, tl.int64) * bins * 6
            value, x1, y1, xx, yy, xy = derivatives(
                own, other, bins, columns, fy, fx, shift_x, shift_y, True, COMPUTE, BLOCK
            )
            peak = peak & (value > 0)
            safe = tl.where(value > 0, value, 1.0)
            share = tl.where(which == 0, 1.0, -0.5).to(COMPUTE)
            x1 = divide(x1, safe)
            y1 = divide(y1, safe)
            gx += share * x1
            gy += share * y1
            hxx += share * (divide(xx, safe) - x1 * x1)
            hyy += share * (divide(yy, safe) - y1 * y1)
            hxy += share * (divide(xy, safe) - x1 * y1)
        determinant = hxx * hyy - hxy * hxy
        peak = peak & (hxx < 0) & (determinant > 0)
        step_x, step_y = newton_step(gx, gy, hxx, hyy, hxy, determinant, peak, 0.3)
        shift_x += step_x
        shift_y += step_y
    out = found + 4 * frame
    tl.store(out, settled(shift_x, EPSILON))
    tl.store(out + 1, settled(shift_y, EPSILON))
    tl.store(out + 2, tl.sqrt(step_x * step_x + step_y * step_y))
    tl.store(out + 3, peak.to(COMPUTE))


def overlaps(
    windows: tuple[Tensor, Tensor],
    moved: Tensor,
    weights: Tensor,
    covers: tuple[Tensor | None, Tensor | None],
    moving: Tensor,
    reference: Tensor,
) -> Tensor:
    """See :func:`torchalign.functional.phase._divided_fields`.

    Args:
        windows: (..., T, h, w) each, of the ground in common, over the moving frame and over the reference.
        moved: (..., T, h, w), the weights over the moving frame.
        weights: (..., T, h, w), over the reference.
        covers: (..., T, h, w) and (..., 1 or T, h, w), or ``None``.
        moving: (..., T, h, w).
        reference: (..., 1 or T, h, w).

    Returns:
        (2, 3, ..., T, h, w).
    """
    return _overlaps(*windows, moved, weights, *covers, moving, reference)


@operator("overlaps", lambda moved: moved.new_empty((2, 3, *moved.shape)))
def _overlaps(
    own: Tensor,
    other: Tensor,
    moved: Tensor,
    weights: Tensor,
    cover: Tensor | None,
    other_cover: Tensor | None,
    moving: Tensor,
    reference: Tensor,
) -> Tensor:
    fields = moved.new_empty((2, 3, *moved.shape))
    lead, size = moved.shape[:-2], moved.shape[-2:]
    reference, other_cover, group = by_group(lead, 2, reference, other_cover)
    own, other, moved, weights, moving = (
        part.expand(*lead, *size) for part in (own, other, moved, weights, moving)
    )
    cover = None if cover is None else cover.expand(*lead, *size)
    launch(
        overlap_frames,
        math.prod(lead),
        (own, other, moved, weights, cover, other_cover, moving, reference, fields),
        (math.prod(lead), group, size[0] * size[1]),
        samples=size[0] * size[1],
        COVERED=cover is not None,
        OTHER_COVERED=other_cover is not None,
    )
    return fields


def climb_divided(
    spectra: Tensor, frequencies: tuple[Tensor, Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Newton's ascent, see :func:`torchalign.functional.phase._refine_divided`.

    Args:
        spectra: (2, 3, ..., H, W//2+1), of what is correlated.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        start: (..., 2), (x, y) in pixels.
        steps: at least one, each of at most 0.3 pixels an axis.

    Returns:
        The shift (..., 2); the length (...,) of the last step; and whether that was one to a maximum. ``None``
        where the spectra are too large for one program.
    """
    if spectra.shape[-2] * spectra.shape[-1] > MOST_BINS:
        return None
    parts = torch.view_as_real(spectra.resolve_conj())
    found = _climb_divided(parts, *frequencies, start.expand(*spectra.shape[2:-2], 2).to(parts.dtype), steps)
    return found[..., :2], found[..., 2], found[..., 3] > 0


@operator("climb_divided", lambda spectra: spectra.new_empty((*spectra.shape[2:-3], 4)))
def _climb_divided(spectra: Tensor, fy: Tensor, fx: Tensor, start: Tensor, steps: int) -> Tensor:
    found = spectra.new_empty((*spectra.shape[2:-3], 4))
    rows, columns = spectra.shape[-3:-1]
    frames = math.prod(spectra.shape[2:-3])
    launch(divided_frames, frames, (spectra, fy, fx, start, found), (frames, rows * columns, columns, steps))
    return found
