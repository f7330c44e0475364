"""A Gaussian blur of an axis as one kernel."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import cell_of
from torchalign.kernels.launching import kernel, launch, operator
from torchalign.kernels.sampling import padded


@kernel
def blur_frames(
    image,  # (N, H, W)
    weights,  # (radius + 1,), from the middle outwards
    blurred,  # (N, H, W)
    height,
    width,
    radius,
    DOWN: tl.constexpr,  # along y, else along x
    MIRRORED: tl.constexpr,  # beyond the edge the image mirrored at it, else the edge repeated
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of pixels of one frame."""
    frame, place, live, x, y = cell_of(height, width, BLOCK)
    position = y if DOWN else x
    length = height if DOWN else width
    stride = width if DOWN else 1
    plane = frame * height * width
    line = image + plane + place - position * stride
    total = tl.zeros((BLOCK,), COMPUTE)
    for k in range(-radius, radius + 1):
        at = position + k
        if MIRRORED:
            at = tl.where(at < 0, -at, at)
            at = tl.where(at >= length, 2 * (length - 1) - at, at)
        at = padded(at, length, False)
        weight = tl.load(weights + tl.where(k < 0, -k, k))
        total += tl.load(line + at * stride, mask=live, other=0) * weight
    tl.store(blurred + plane + place, total, mask=live)


def blur(image: Tensor, weights: Tensor) -> Tensor:
    """A symmetric filter along x, then along y; the edge is mirrored, or repeated where it is too near."""
    mirrored = weights.shape[0] <= min(image.shape[-2:])
    return _blur_axis(_blur_axis(image, weights, False, mirrored), weights, True, mirrored)


@operator()
def _blur_axis(image: Tensor, weights: Tensor, down: bool, mirrored: bool) -> Iterator[Tensor]:
    blurred = image.new_empty(image.shape)
    yield blurred
    lead, size = image.shape[:-2], image.shape[-2:]
    tensors, numbers = (image, weights, blurred), (*size, weights.shape[0] - 1)
    launch(blur_frames, lead, size, tensors, numbers, DOWN=down, MIRRORED=mirrored)
