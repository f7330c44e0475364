"""Local means and sums over blocks, and the one median that works on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import is_known, keeps_tables, launches_kernels

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
    """(..., H, W) → (..., ⌈H / 2ⁿ⌉, ⌈W / 2ⁿ⌉): sums over blocks of 2ⁿ × 2ⁿ; what is missing of the last ones is 0."""
    block = 2**times
    missing = [(length + block - 1) // block * block - length for length in image.shape[-2:]]
    if any(missing):
        image = F.pad(image, (0, missing[1], 0, missing[0]))
    if launches_kernels(image) and times > 0:
        flat = image.reshape(-1, 1, *image.shape[-2:])
        sums = F.avg_pool2d(flat, block, divisor_override=1)
        return sums.reshape(*image.shape[:-2], *sums.shape[-2:])
    # rows are summed, columns halved by slices: much faster than a pooling on the CPU
    rows = image.shape[-2] // block
    image = image.reshape(*image.shape[:-2], rows, block, image.shape[-1]).sum(-2)
    for _ in range(times):
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

    >>> nanmedian(torch.tensor([[4.0, torch.nan, 1.0, 3.0, 2.0], [torch.nan] * 5]))
    tensor([2., nan])
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.nanmedian(dim).values
    ordered = values.sort(dim).values  # NaN last
    count = (~ordered.isnan()).sum(dim, keepdim=True)
    return ordered.gather(dim, (count - 1).clamp(min=0) // 2).squeeze(dim)


def enlarge(image: Tensor, times: int, size: tuple[int, int]) -> Tensor:
    """(..., ⌈H / n⌉, ⌈W / n⌉) → (..., H, W): blocks of n × n pixels, n ``times``, read bilinearly at the pixels."""
    flat = image.reshape(-1, 1, *image.shape[-2:])
    large = F.interpolate(flat, scale_factor=float(times), mode="bilinear", align_corners=False)
    return large[..., : size[0], : size[1]].reshape(*image.shape[:-2], *size)


def between_blocks(
    shift: Tensor, times: int, size: tuple[int, int], spacings: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """What samples blocks as :func:`enlarge` does, at samples that are moved: the matrices Y and X of Y · image · Xᵀ.

    Args:
        shift: (..., 2), (x, y) in pixels, from each sample to where it is read; beyond the middle of the outermost
            blocks is what is there.
        times: samples of a block a side, the last ones of which may lie beyond the border.
        size: (H, W), samples.
        spacings: along y and x, of the samples, in pixels; of the other sign to read against the shift.

    Returns:
        (..., H, ⌈H / times⌉) and (..., W, ⌈W / times⌉).

    >>> y, x = between_blocks(torch.tensor([1.0, 0.0]), 1, (2, 3), (2.0, 2.0))
    >>> y @ torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]) @ x.mT
    tensor([[0.5000, 1.5000, 2.0000],
            [1.0000, 3.0000, 4.0000]])
    """
    sample, axis, scale, first, last, middle = _middles(times, size, spacings, like=shift)
    place = torch.addcmul(sample, shift.index_select(-1, axis), scale).clamp(first, last)
    hats = F.relu(1 - (place[..., None] - middle).abs())
    rows, columns = ((length + times - 1) // times for length in size)
    return hats[..., : size[0], :rows], hats[..., size[0] :, :columns]


@keeps_tables
def _middles(
    times: int, size: tuple[int, int], spacings: tuple[float, float], *, like: Tensor
) -> tuple[Tensor, ...]:
    """Of the samples of both axes (H + W,): place, which part of a shift moves it, how far; the first and last block.

    And (n,), the middles of the blocks. All in blocks, from the middle of the first one.
    """
    y, x = (torch.arange(length, device=like.device, dtype=like.dtype) for length in size)
    first = torch.zeros_like(torch.cat((y, x)))
    axis, last, scale = (
        torch.cat((torch.full_like(y, along_y), torch.full_like(x, along_x)))
        for along_y, along_x in (
            (1, 0),
            [(length - 1) // times for length in size],
            [1 / (times * spacing) for spacing in spacings],
        )
    )
    # of symbols, one of which would have to be chosen, no less
    longest = max(size) if all(map(is_known, size)) else sum(size)
    middle = torch.arange((longest + times - 1) // times, device=like.device, dtype=like.dtype)
    return (torch.cat((y, x)) + 0.5) / times - 0.5, axis.to(torch.int64), scale, first, last, middle
