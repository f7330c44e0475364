"""Which interpolation kernel moves a satellite image most truly, and at what cost?

Ground truth without any kernel: windows of a real 30 m scene at whole-pixel offsets, averaged in blocks of
5 × 5. Two such windows, offset by k pixels, differ by exactly k / 5 of a block, with the aliasing of a real
sensor. Each kernel moves one onto the other; what is left is its error (RMS, in percent of the scene's
standard deviation).

The bias is how far a kernel misplaces a long wave (32 px), the worst over all fractions of a pixel: what a
registration to a hundredth of a pixel would lose again in the last step.

    python benchmarks/interpolation.py [--data ../shared/data] [--size 256] [--threads 1]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from torchalign.functional.warp import resample

BLOCK = 5
MARGIN = 16  # pixels left out at the border: kernels may differ there, and a Fourier shift wraps around


def simulate(scene: np.ndarray, size: int, offsets: list[tuple[int, int]], blur: float) -> Tensor:
    """(N, C, size, size): the scene seen at offsets (x, y), in fifths of a pixel, in float64."""
    height, width = scene.shape[1:]
    top, left = (height - size * BLOCK) // 2, (width - size * BLOCK) // 2
    image = torch.from_numpy(scene).double()
    if blur:
        taps = torch.exp(-0.5 * (torch.arange(-4 * blur * BLOCK, 4 * blur * BLOCK + 1) / (blur * BLOCK)) ** 2)
        taps = (taps / taps.sum()).double()
        image = functional.conv2d(image[:, None], taps[None, None, :, None], padding=(len(taps) // 2, 0))
        image = functional.conv2d(image, taps[None, None, None, :], padding=(0, len(taps) // 2))[:, 0]
    frames = []
    for x, y in offsets:
        window = image[:, top + y : top + y + size * BLOCK, left + x : left + x + size * BLOCK]
        frames.append(functional.avg_pool2d(window, BLOCK))
    return torch.stack(frames)


def convolve(cube: Tensor, shift: Tensor, kernel: Callable[[Tensor], Tensor], reach: int) -> Tensor:
    """Move by |shift| < 1 with any separable kernel of ``2 · reach`` taps, borders clamped."""
    for axis, dim in ((0, -1), (1, -2)):
        position = -shift[:, axis]
        whole = position.floor()
        offsets = torch.arange(1 - reach, reach + 1, dtype=cube.dtype)
        weights = kernel(offsets - (position - whole)[:, None])  # (T, 2 · reach)
        weights = weights / weights.sum(-1, keepdim=True)
        length = cube.shape[dim]
        moved = torch.zeros_like(cube)
        for tap in range(2 * reach):
            index = torch.arange(length)[None] + whole[:, None].long() + tap + 1 - reach  # (T, length)
            index = index.clamp(0, length - 1)[:, None, None, :]
            index = index.expand_as(cube) if dim == -1 else index.transpose(-1, -2).expand_as(cube)
            moved = moved + weights[:, tap, None, None, None] * cube.gather(dim, index)
        cube = moved
    return cube


def keys(a: float) -> Callable[[Tensor], Tensor]:
    def kernel(x: Tensor) -> Tensor:
        x = x.abs()
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))

    return kernel


def lanczos(reach: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(x.abs() < reach, torch.sinc(x) * torch.sinc(x / reach), 0.0)


def fourier(cube: Tensor, shift: Tensor) -> Tensor:
    height, width = cube.shape[-2:]
    y, x = torch.fft.fftfreq(height, dtype=cube.dtype), torch.fft.rfftfreq(width, dtype=cube.dtype)
    cycles = shift[:, 0, None, None] * x + shift[:, 1, None, None] * y[:, None]  # (T, H, W//2+1)
    ramp = torch.polar(torch.ones_like(cycles), -2 * torch.pi * cycles)[:, None]
    return torch.fft.irfft2(torch.fft.rfft2(cube) * ramp, s=(height, width))


def grid_sample(cube: Tensor, shift: Tensor, mode: str = "bilinear") -> Tensor:
    frames, _, height, width = cube.shape
    scale = torch.tensor([2 / width, 2 / height], dtype=cube.dtype)
    theta = torch.cat((torch.eye(2, dtype=cube.dtype).expand(frames, 2, 2), (-shift * scale)[..., None]), -1)
    grid = functional.affine_grid(theta, list(cube.shape), align_corners=False)
    return functional.grid_sample(cube, grid, mode=mode, padding_mode="border", align_corners=False)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nearest": lambda cube, shift: resample(cube, shift, interpolation="nearest").values,
    "bilinear": lambda cube, shift: resample(cube, shift).values,
    "bicubic (Keys, A = −1/2)": lambda cube, shift: resample(cube, shift, interpolation="bicubic").values,
    "bicubic, A = −3/4 (torch, OpenCV)": lambda cube, shift: convolve(cube, shift, keys(-0.75), 2),
    "Lanczos-2": lambda cube, shift: convolve(cube, shift, lanczos(2), 2),
    "Lanczos-3": lambda cube, shift: convolve(cube, shift, lanczos(3), 3),
    "Fourier": fourier,
    "grid_sample bilinear": grid_sample,
    "grid_sample bicubic": lambda cube, shift: grid_sample(cube, shift, "bicubic"),
}
# No ready implementation: the time of an experiment in this file would say nothing about the kernel.
UNTIMED = ("bicubic, A = −3/4 (torch, OpenCV)", "Lanczos-2", "Lanczos-3")


def error(
    method: Callable[[Tensor, Tensor], Tensor], frames: Tensor, offsets: list[tuple[int, int]]
) -> float:
    """RMS over all shifts and bands, in percent of the band's standard deviation."""
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    reference = frames[0][inner]
    aligned = method(frames[1:], torch.tensor(offsets[1:], dtype=frames.dtype) / BLOCK)
    residual = (aligned[inner] - reference) / reference.std(dim=(-2, -1), keepdim=True)
    return 100 * float(residual.square().mean().sqrt())


def bias(method: Callable[[Tensor, Tensor], Tensor], wavelength: int = 32) -> float:
    """Largest displacement error of a wave along x, in pixels: the phase of the transfer function."""
    shift = torch.zeros(40, 2, dtype=torch.float64)
    shift[:, 0] = torch.linspace(-0.5, 0.5, 40, dtype=torch.float64)
    x = torch.arange(8 * wavelength, dtype=torch.float64)
    angle = 2 * torch.pi / wavelength * x
    cube = torch.stack((angle.cos(), angle.sin()))[None, :, None].repeat(40, 1, 8 * MARGIN, 1)
    moved = method(cube, shift)[:, :, 4 * MARGIN, MARGIN:-MARGIN]  # (40, 2, W)
    wanted = angle[MARGIN:-MARGIN] - 2 * torch.pi / wavelength * shift[:, :1]
    transfer = (torch.complex(moved[:, 0], moved[:, 1]) * torch.polar(torch.ones_like(wanted), -wanted)).mean(
        -1
    )
    return float(transfer.angle().abs().max()) * wavelength / (2 * torch.pi)


def milliseconds(method: Callable[[Tensor, Tensor], Tensor], frames: int = 16, repeats: int = 9) -> float:
    """Median time of one frame of 4 × 256², float32."""
    cube, shift = torch.rand(frames, 4, 256, 256), torch.rand(frames, 2) * 4 - 2
    method(cube, shift)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        method(cube, shift)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2] / frames


def main() -> None:
    default = Path(__file__).resolve().parents[1] / "../shared/data"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default, help="folder with landsat7_rgb.tif")
    parser.add_argument("--size", type=int, default=256, help="frame size after decimation")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.data / "landsat7_rgb.tif"
    if not path.exists():
        parser.error(f"{path} does not exist; give its folder with --data")
    scene = np.asarray(Image.open(path), dtype=np.float32).transpose(2, 0, 1)  # (3, H, W)

    # every fraction of a pixel in fifths on both axes, whole pixels left out
    offsets = [(0, 0)] + [(x, y) for x in range(-2, 3) for y in range(-2, 3) if (x, y) != (0, 0)]
    sharp = simulate(scene, arguments.size, offsets, blur=0.0)
    smooth = simulate(scene, arguments.size, offsets, blur=0.5)

    threads = f"{arguments.threads} thread(s), {platform.machine()}, {len(sharp) - 1} shifts"
    print(f"torch {torch.__version__}, {threads}\n")
    print(
        "| kernel | error, as sensed (%) | blurred, σ ½ px (%) | bias (px) | ms per 4×256² | × grid_sample |"
    )
    print("|---|---|---|---|---|---|")
    times = {name: milliseconds(method) for name, method in METHODS.items() if name not in UNTIMED}
    for name, method in METHODS.items():
        errors = [error(method, frames, offsets) for frames in (sharp, smooth)]
        cost = "– | –"
        if name in times:
            cost = f"{times[name]:.2f} | {times[name] / times['grid_sample bilinear']:.2f}"
        print(f"| {name} | {errors[0]:.2f} | {errors[1]:.2f} | {bias(method):.4f} | {cost} |")


if __name__ == "__main__":
    main()
