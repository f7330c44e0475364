"""Ground truth. Every scene knows its shift exactly, without the interpolation kernel of any aligner.

* `Waves`: a sum of plane waves, evaluated at any coordinate: the truth is analytic, at every fraction.
* `fractal`: a high-resolution field with the 1/f spectrum of landscapes, to be decimated by `simulate_stack`:
  aliased, like a sensor, and available without the real data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchalign.datasets import SimulatedStack, simulate_stack
from torchalign.functional.affine import invert_warp, transform_points, translation_warp

__all__ = [
    "Pairs",
    "Waves",
    "assert_derivative",
    "centre_errors",
    "corner_errors",
    "fractal",
    "fractal_stack",
    "pairs",
    "quantiles",
    "scene_with_field",
    "shift_errors",
    "shifts_of",
]


class Pairs(NamedTuple):
    """Frames, their reference, and the warp moving → reference."""

    cube: Tensor  # (T, C, H, W)
    reference: Tensor  # (C, H, W)
    warp: Tensor  # (T, 2, 3)


class Waves:
    """`count` plane waves per band in random directions, wavelengths from `shortest` to `longest` pixels.

    Amplitudes grow with the wavelength, as in landscapes. Values are about 0.5 ± 0.15.
    """

    def __init__(
        self, bands: int = 1, *, count: int = 200, shortest: float = 3.5, longest: float = 40.0, seed: int = 0
    ):
        random = torch.Generator().manual_seed(seed)

        def uniform(low, high):
            return low + (high - low) * torch.rand(bands, count, 1, 1, generator=random, dtype=torch.float64)

        wavelength = torch.exp(uniform(math.log(shortest), math.log(longest)))
        direction = uniform(0, 2 * math.pi)
        self.omega_x = 2 * math.pi / wavelength * direction.cos()  # radians per pixel
        self.omega_y = 2 * math.pi / wavelength * direction.sin()
        self.phase = uniform(0, 2 * math.pi)
        amplitude = wavelength.sqrt()
        self.amplitude = 0.15 * amplitude / (0.5 * amplitude.square().sum(1, keepdim=True)).sqrt()

    def at(self, points: Tensor) -> Tensor:
        """The scene at (H, W, 2) points (x, y): (C, H, W) float64."""
        value = torch.full((len(self.phase), *points.shape[:-1]), 0.5, dtype=torch.float64)
        waves = (self.omega_x, self.omega_y, self.phase, self.amplitude)
        for omega_x, omega_y, phase, amplitude in zip(*(wave.unbind(1) for wave in waves), strict=True):
            # one wave at a time stays in the cache
            value += amplitude * (omega_x * points[..., 0] + omega_y * points[..., 1] + phase).cos()
        return value


def _pixels(size: tuple[int, int]) -> Tensor:
    """(H, W, 2), (x, y) of the pixel centres."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    return torch.stack((x, y), -1)


def pairs(
    warps: Tensor | Sequence[Sequence[float]],
    size: tuple[int, int] = (96, 104),
    *,
    bands: int = 1,
    dtype: torch.dtype = torch.float32,
    scene: Waves | None = None,
    **waves: float,
) -> Pairs:
    """Frames of an analytic scene seen through warps (T, 2, 3), or shifts (T, 2), moving → reference."""
    warps = torch.as_tensor(warps, dtype=torch.float64)
    if warps.shape[-1] == 2:
        warps = translation_warp(warps)
    scene = scene or Waves(bands, **waves)
    points = _pixels(size)
    # frame(p) = reference(warp p)
    frames = [scene.at(transform_points(warp, points.reshape(-1, 2)).reshape(points.shape)) for warp in warps]
    reference = scene.at(points)
    cube = torch.stack(frames) if frames else reference.new_empty(0, *reference.shape)
    return Pairs(cube.to(dtype), reference.to(dtype), warps)


def waving(points: Tensor, amplitude: float, *, seed: int = 0) -> Tensor:
    """A smooth field at (..., 2) points, of wavelengths around 100 pixels."""
    random = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(2, 2, generator=random, dtype=torch.float64)
    x, y = points[..., 0], points[..., 1]
    u = torch.sin(2 * torch.pi * (x / 110 + y / 180) + phase[0, 0]) + 0.3 * torch.cos(y / 14 + phase[0, 1])
    v = 0.6 * torch.sin(2 * torch.pi * (y / 95 - x / 230) + phase[1, 0])
    return amplitude * torch.stack((u, v), -1)


def scene_with_field(
    size: tuple[int, int],
    amplitude: float = 1.0,
    shift=(0.4, -0.3),
    *,
    frames=1,
    dtype=torch.float32,
    noise=0.002,
):
    """Frames for which frame(q + u(q) − shift) is the reference at q; and u, (T, 2, H, W)."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    points, scene = torch.stack((x, y), -1), Waves(1, shortest=4.0, longest=30.0, seed=2)
    cube, fields = [], []
    random = torch.Generator().manual_seed(3)
    for seed in range(frames):
        there = points
        for _ in range(25):  # the reference's point of a pixel of the frame: q = p − u(q) + shift
            there = points - waving(there, amplitude, seed=seed) + torch.tensor(shift)
        frame = scene.at(there)[0]
        cube.append(1.2 * frame - 0.1 + noise * torch.randn(*size, generator=random, dtype=torch.float64))
        fields.append(waving(points, amplitude, seed=seed).movedim(-1, 0))
    return torch.stack(cube).to(dtype), scene.at(points).to(dtype), torch.stack(fields)


def fractal(
    size: tuple[int, int] = (1320, 1320), *, bands: int = 3, slope: float = 1.6, seed: int = 0
) -> Tensor:
    """(C, H, W) float32 in [0, 1]: amplitude ∝ frequency^-slope, bands alike but not the same, and hard edges.

    The edges (fields: a second field, cut into levels) give it the aliasing of a real scene.
    """
    random = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.rfftfreq(size[1]), torch.fft.fftfreq(size[0])[:, None])
    amplitude = frequency.clamp(min=1 / 128) ** -slope

    def field():
        noise = torch.randn(*size, generator=random)
        grey = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=size)
        return (grey - grey.mean()) / grey.std()

    shared, fields = field(), (2 * field()).round() / 2
    stack = torch.stack([0.8 * shared + 0.3 * field() + 0.7 * fields for _ in range(bands)])
    return (0.4 + 0.1 * stack).clamp(0, 1)


_fractal = functools.lru_cache(maxsize=8)(fractal)


def fractal_stack(
    frames: int = 16, *, size: tuple[int, int] = (256, 256), bands: int = 3, **options
) -> SimulatedStack:
    """`simulate_stack` on the fractal scene, decimated by 5."""
    needed = max(size) * 5 + 2 * math.ceil(options.get("max_shift", 3.0) * 5)
    side = 64 * math.ceil(needed / 64)
    return simulate_stack(_fractal((side, side), bands=bands), frames=frames, size=size, **options)


def shifts_of(estimate) -> Tensor:
    """(..., T, 2): the translation (x, y) of an estimate."""
    return estimate.warp[..., :2, 2]


def shift_errors(estimate, shift: Tensor) -> Tensor:
    """(..., T): distance between the estimated and the true shift, in pixels."""
    return (shifts_of(estimate) - shift.to(estimate.warp)).norm(dim=-1)


def centre_errors(warp: Tensor, truth: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., T): how far apart two warps put the frame's centre, in pixels; any motion model."""
    centre = torch.tensor([[(size[1] - 1) / 2, (size[0] - 1) / 2]], dtype=torch.float64)
    there = transform_points(invert_warp(truth.double()), centre.expand(*truth.shape[:-2], 1, 2))
    return (transform_points(warp.double(), there) - centre).norm(dim=-1).squeeze(-1)


def corner_errors(warp: Tensor, truth: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., T): how far apart two warps put the corner that they disagree most on, in pixels; any motion model."""
    bottom, right = size[0] - 1, size[1] - 1
    corners = torch.tensor([[0, 0], [right, 0], [0, bottom], [right, bottom]], dtype=torch.float64)
    found, expected = (transform_points(one.double(), corners) for one in (warp, truth))
    return (found - expected).norm(dim=-1).amax(-1)


def quantiles(errors: Tensor) -> tuple[float, float]:
    """The median and the 95th percentile."""
    return float(errors.median()), float(errors.quantile(0.95))


def assert_derivative(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *, directions: int = 4, tolerance: float = 1e-5
) -> None:
    """The derivative along random directions, by autograd and by central differences, agree relatively."""
    random = torch.Generator().manual_seed(11)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    for _ in range(directions):
        cotangent = torch.randn(output.shape, generator=random, dtype=output.dtype)
        slopes = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
        for i, slope in enumerate(slopes):
            direction = torch.randn(inputs[i].shape, generator=random, dtype=inputs[i].dtype)
            step = 1e-6 * direction
            with torch.no_grad():
                ahead, behind = (
                    function(*(tensor + sign * step if j == i else tensor for j, tensor in enumerate(inputs)))
                    for sign in (1, -1)
                )
            expected = ((ahead - behind) * cotangent).sum() / 2e-6
            found = (slope * direction).sum()
            # against the size of a typical such product, for one may be 0 by chance
            size = slope.norm() + 1e-30
            assert abs(float((found - expected) / size)) < tolerance, (
                f"input {i}: {found:.8g}, not {expected:.8g}"
            )
