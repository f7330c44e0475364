"""Local means and sums over blocks, and the one median that works on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import keeps_tables, launches_kernels

__all__ = ["block_means", "block_sums", "enlarge", "halve", "nanmedian", "triangle_mean"]


def triangle_mean(image: Tensor, order: int) -> Tensor:
    """Mean with triangular weights over 2·2ⁿ − 1 samples a side: two boxes of 2ⁿ by repeated doubling.

    A chain of 2n additions an axis: much faster than a convolution or a pooling on the CPU. On a GPU two poolings
    are: three kernels instead of 4n + 2.
    """
    length = 2**order
    flat = image.reshape(-1, 1, *image.shape[-2:])
    result = F.pad(flat, (length - 1,) * 4, mode="replicate")
    if launches_kernels(image):
        return F.avg_pool2d(F.avg_pool2d(result, length, 1), length, 1).reshape(image.shape)
    for dim in (-1, -2):
        for _ in range(2):
            for power in range(order):
                count = result.shape[dim] - 2**power
                result = result.narrow(dim, 0, count) + result.narrow(dim, 2**power, count)
    return (result * (1 / length**4)).reshape(image.shape)


def block_sums(image: Tensor, times: int) -> Tensor:
    """Sums over blocks of 2ⁿ × 2ⁿ; what is missing of the last ones is 0.

    Args:
        image: (..., H, W).
        times: n.

    Returns:
        (..., ⌈H / 2ⁿ⌉, ⌈W / 2ⁿ⌉).
    """
    block = 2**times
    missing = [(length + block - 1) // block * block - length for length in image.shape[-2:]]
    if any(missing):
        image = F.pad(image, (0, missing[1], 0, missing[0]))
    if launches_kernels(image) and times > 0:
        flat = image.reshape(-1, 1, *image.shape[-2:])
        sums = F.avg_pool2d(flat, block, divisor_override=1)
        return sums.reshape(*image.shape[:-2], *sums.shape[-2:])
    # halving by slices: much faster than a pooling on the CPU
    for _ in range(times):
        image = image[..., ::2, :] + image[..., 1::2, :]
        image = image[..., ::2] + image[..., 1::2]
    return image


def block_means(image: Tensor, length: int) -> Tensor:
    """Means over blocks of so many samples a side, of what there is of the last ones: (..., ⌈H / n⌉, ⌈W / n⌉)."""
    flat = image.reshape(-1, 1, *image.shape[-2:])
    means = F.avg_pool2d(flat, length, ceil_mode=True, count_include_pad=False)
    return means.reshape(*image.shape[:-2], *means.shape[-2:])


def halve(image: Tensor) -> Tensor:
    """Means of 2 × 2 pixels; the last row or column counts twice where there is no other."""
    height, width = image.shape[-2:]
    if height % 2:
        image = torch.cat((image, image[..., -1:, :]), -2)
    if width % 2:
        image = torch.cat((image, image[..., -1:]), -1)
    image = image[..., ::2, :] + image[..., 1::2, :]
    return 0.25 * (image[..., ::2] + image[..., 1::2])


def nanmedian(values: Tensor, dim: int = -1) -> Tensor:
    """The (lower) median along one dimension, NaN left out; NaN where all are NaN.

    :func:`torch.nanmedian`, but for ``torch.use_deterministic_algorithms(True)``, under which torch refuses medians
    on CUDA, because of their indices: then the same values are found by sorting.

    Args:
        values: any shape.
        dim: along which.

    Returns:
        ``values`` without that dimension.

    >>> nanmedian(torch.tensor([[4.0, torch.nan, 1.0, 3.0, 2.0], [torch.nan] * 5]))
    tensor([2., nan])
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.nanmedian(dim).values
    ordered = values.sort(dim).values  # NaN last
    count = (~ordered.isnan()).sum(dim, keepdim=True)
    return ordered.gather(dim, (count - 1).clamp(min=0) // 2).squeeze(dim)


def enlarge(image: Tensor, times: int, size: tuple[int, int], way: Tensor | None = None) -> Tensor:
    """Bilinear samples of blocks of ``times`` × ``times`` pixels at the pixels.

    Args:
        image: (..., ⌈H / times⌉, ⌈W / times⌉).
        times: pixels of a block a side.
        size: (H, W).
        way: (..., 2), (x, y) in blocks, from each pixel to where it is sampled; beyond the border is what is at it.

    Returns:
        (..., H, W).
    """
    if way is not None:
        y, x = (
            _hats(length, times, image.shape[axis - 2], way[..., 1 - axis, None])
            for axis, length in enumerate(size)
        )
        return torch.matmul(torch.matmul(y, image), x.mT)
    flat = image.reshape(-1, 1, *image.shape[-2:])
    large = F.interpolate(flat, scale_factor=float(times), mode="bilinear", align_corners=False)
    return large[..., : size[0], : size[1]].reshape(*image.shape[:-2], *size)


def _hats(length: int, times: int, blocks: int, way: Tensor) -> Tensor:
    """(..., H, n): what each of n blocks counts at each pixel along an axis, linear between their middles."""
    pixel, middle = _middles(length, times, blocks, like=way)
    return F.relu(1 - ((pixel + way).clamp(0, blocks - 1)[..., None] - middle).abs())


@keeps_tables
def _middles(length: int, times: int, blocks: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels lie, in blocks from the middle of the first one (H,); and the middles (n,)."""
    pixel, middle = (
        torch.arange(count, device=like.device, dtype=like.dtype) for count in (length, blocks)
    )
    return (pixel + 0.5) / times - 0.5, middle
