"""Stacks with known shifts, made from real scenes, and the real chip of the demo.

Two ways to the truth, neither of which interpolates a frame with a kernel that an aligner could be using:

* :func:`simulate_stack`, by *decimation*: windows of a high-resolution scene are cut at integer offsets and
  averaged in blocks of ``factor`` × ``factor`` pixels, so that two frames differ by exactly
  ``offset / factor`` pixels, with the aliasing of a real sensor. Every accuracy figure of shifts is made with it.
  :func:`simulate_warped_stack` does the same for warps to homographies: the *scene* is warped, at its own
  resolution, and averaged then; a kernel's error there is a ``factor``-th of what it would be in the frame.
* :func:`demo_stack`, by a *Fourier shift* of a small real chip that cannot spare the pixels of a decimation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from torchalign._check import check_number, check_option, check_whole, message, require
from torchalign.functional.affine import change_origin, invert_warp
from torchalign.functional.motion import MotionModel
from torchalign.functional.warp import warp

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "DemoStack",
    "SimulatedStack",
    "WarpedStack",
    "demo_stack",
    "open_demo_scene",
    "simulate_stack",
    "simulate_warped_stack",
]


def __dir__() -> list[str]:
    return sorted(__all__)


_Floats = NDArray[np.floating[Any]]

_LARGEST = 1e6  # of shifts, offsets and noise: anything finite

_DEMO_PIXEL_METRES = 10.0
_DEMO_START, _DEMO_REVISIT_DAYS = "2024-01-05", 10
# Clouds are white, a little less so towards the infrared; shadows keep the blue of the sky.
_CLOUD_COLOUR = (1.02, 1.0, 0.985, 0.94)
_SHADOW_COLOUR = (0.55, 0.48, 0.44, 0.42)


class SimulatedStack(NamedTuple):
    """A stack with its truth.

    Attributes:
        cube: (T, C, H, W) float32, the moving frames.
        reference: (C, H, W) float32.
        shift: (T, 2) float32, the true translation (x, y) of the warp moving → reference, in pixels.
        clear: (T, H, W) bool, False under the simulated clouds.
    """

    cube: Tensor
    reference: Tensor
    shift: Tensor
    clear: Tensor


class WarpedStack(NamedTuple):
    """A stack with its truth.

    Attributes:
        cube: (T, C, H, W) float32, the moving frames.
        reference: (C, H, W) float32.
        warp: (T, 3, 3) float64, the true warp moving → reference in pixels, its last entry 1.
    """

    cube: Tensor
    reference: Tensor
    warp: Tensor


class DemoStack(NamedTuple):
    """A labelled stack with its truth.

    Attributes:
        cube: (time, band, y, x) float32 reflectance, NaN for nodata.
        shift: (time, axis) float64, the true translation of the warp moving → reference in pixels, axis
            being "x" (right) and "y" (down); the first frame is the reference, its shift is 0.
        clear: (time, y, x) bool, False under clouds and their shadows, and where there is no data.
    """

    cube: xr.DataArray
    shift: xr.DataArray
    clear: xr.DataArray


def simulate_stack(
    scene: Tensor,
    *,
    frames: int = 64,
    size: tuple[int, int] = (256, 256),
    factor: int = 5,
    max_shift: float = 3.0,
    gain: tuple[float, float] = (0.7, 1.3),
    offset: float = 0.1,
    noise: float = 0.01,
    cloud_fraction: float = 0.0,
    cloud_brightness: tuple[float, float] = (0.8, 1.0),
    cloud_scale: float | None = None,
    blur: float = 0.0,
    origin: tuple[int, int] | None = None,
    seed: int = 0,
) -> SimulatedStack:
    """Cut a stack with exactly known sub-pixel shifts out of one high-resolution scene.

    Frame t shows the ground displaced by ``-shift[t]``, so that ``aligned(p) = frame(p - shift[t])`` is the
    reference. Shifts are whole multiples of ``1 / factor`` pixel. The stack is made on the CPU.

    Args:
        scene: (C, Hs, Ws) floating, real values of about [0, 1].
        frames: T.
        size: (H, W) of the frames.
        factor: block size of the averaging, in scene pixels.
        max_shift: shifts are uniform in ± this many pixels, in x and y.
        gain: range of the random gain, per frame and band.
        offset: the random offset is uniform in ± this, per frame and band.
        noise: standard deviation of the Gaussian noise, on frames and reference.
        cloud_fraction: fraction of every frame under opaque clouds.
        cloud_brightness: range of the brightness of a frame's clouds, on the scale of the scene.
        cloud_scale: σ of the blur that makes the blobs of the clouds, in frame pixels; default: a twentieth
            of the frame's shorter side. Small values make many small clouds.
        blur: σ of a Gaussian blur of the scene before the decimation, in *frame* pixels; makes smooth
            scenes.
        origin: (y, x) of the reference's window in the scene; default: centred.
        seed: of every random choice.

    Raises:
        TypeError: the scene is no floating tensor.
        ValueError: the scene is too small for size, factor and max_shift; origin is so near the scene's edge
            that a shifted window would leave it; any other argument out of its range.

    Example:
        The ground at (10, 12) in the reference lies ``shift`` to the left and above in the frame:

        >>> scene = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> stack = simulate_stack(scene, frames=3, size=(32, 32), factor=1, noise=0, gain=(1, 1), offset=0)
        >>> x, y = stack.shift[0].int().tolist()
        >>> bool(stack.cube[0, 0, 12 - y, 10 - x] == stack.reference[0, 12, 10])
        True
    """
    _check_scene(scene)
    size = _whole_pair("size", size, "(H, W)", 1)
    check_whole("frames", frames, minimum=0)
    check_whole("factor", factor, minimum=1)
    _check_bounded(max_shift=max_shift, offset=offset, noise=noise)
    check_number("cloud_fraction", cloud_fraction, minimum=0.0, maximum=1.0)
    _check_ranges(gain=gain, cloud_brightness=cloud_brightness)
    height, width = size
    channels, scene_height, scene_width = scene.shape
    margin = round(max_shift * factor)
    needed = (height * factor + 2 * margin, width * factor + 2 * margin)
    if scene_height < needed[0] or scene_width < needed[1]:
        expected = f"at least {needed} pixels for size={size}, factor={factor}, max_shift={max_shift}"
        cure = "lower size, factor or max_shift"
        raise ValueError(message("scene", expected, (scene_height, scene_width), cure))
    if origin is None:
        origin = ((scene_height - height * factor) // 2, (scene_width - width * factor) // 2)
    else:
        origin = _check_origin(origin, (scene_height - needed[0], scene_width - needed[1]), margin)
    smallest = min(scene_height, scene_width)
    _check_blur("blur", blur, smallest / factor)
    cloud_scale = min(size) / 20 if cloud_scale is None else cloud_scale
    _check_blur("cloud_scale", cloud_scale, min(size), inclusive=False)
    scene = scene.detach().to(torch.device("cpu"), torch.float32)
    if blur:
        scene = _gaussian_blur(scene, blur * factor)
    generator = torch.Generator().manual_seed(seed)

    def window(dy: int, dx: int) -> Tensor:
        top, left = origin[0] + dy, origin[1] + dx
        cut = scene[None, :, top : top + height * factor, left : left + width * factor]
        return F.avg_pool2d(cut, factor)[0]  # (C, H, W)

    steps = torch.randint(-margin, margin + 1, (frames, 2), generator=generator)  # scene pixels, (x, y)
    gains = _uniform(gain, (frames, channels, 1, 1), generator)
    offsets = _uniform((-offset, offset), (frames, channels, 1, 1), generator)
    # a window cut further right shows the ground further left: frame(p) = scene(p + step)
    windows = [window(dy, dx) for dx, dy in steps.tolist()]
    cube = torch.stack(windows) if windows else scene.new_empty(0, channels, height, width)
    cube = gains * cube + offsets
    clear = torch.ones(frames, height, width, dtype=torch.bool)
    if cloud_fraction:
        cube, clear = _cover_with_clouds(cube, cloud_fraction, cloud_brightness, cloud_scale, generator)
    cube = cube + noise * torch.randn(cube.shape, generator=generator)
    reference = window(0, 0) + noise * torch.randn(channels, height, width, generator=generator)
    return SimulatedStack(cube, reference, steps.to(torch.float32) / factor, clear)


def _uniform(
    within: tuple[float, float],
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform random numbers."""
    return within[0] + (within[1] - within[0]) * torch.rand(*shape, generator=generator, dtype=dtype)


def _cover_with_clouds(
    cube: Tensor, fraction: float, brightness: tuple[float, float], scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Opaque clouds over a fraction of every frame (T, C, H, W), and where it stays clear, (T, H, W)."""
    frames, _, height, width = cube.shape
    field = _gaussian_blur(torch.randn(frames, height, width, generator=generator), scale)
    # frame by frame: torch.quantile refuses more than 2²⁴ values at once
    levels = [frame.quantile(fraction) for frame in field]
    clear = field > torch.stack([*levels, field.new_empty(())])[:-1, None, None]  # T may be 0
    bright = _uniform(brightness, (frames, 1, 1, 1), generator)
    return torch.where(clear[:, None], cube, bright), clear


def simulate_warped_stack(
    scene: Tensor,
    *,
    motion: MotionModel = "affine",
    frames: int = 16,
    size: tuple[int, int] = (256, 256),
    factor: int = 5,
    max_shift: float = 3.0,
    max_rotation: float = 5.0,
    max_scale: float = 0.05,
    max_shear: float = 0.03,
    max_perspective: float = 2e-4,
    gain: tuple[float, float] = (0.7, 1.3),
    offset: float = 0.1,
    noise: float = 0.01,
    seed: int = 0,
) -> WarpedStack:
    """Cut a stack with known warps out of one high-resolution scene.

    ``frame(p) = reference(warp · p)``. The scene is warped on its own pixels, of which a pixel of a frame averages
    ``factor`` × ``factor``: no frame has been through a resampling. Warps are drawn about the frame's centre,
    every term uniformly in ± its limit; what the motion model lacks is left out. The stack is made on the CPU.

    Args:
        scene: (C, Hs, Ws) floating, real values of about [0, 1].
        motion: ``"translation"``, ``"euclidean"``, ``"similarity"``, ``"affine"`` or ``"homography"``.
        frames: T.
        size: (H, W) of the frames.
        factor: block size of the averaging, in scene pixels.
        max_shift: of the frame's centre, in pixels, in x and y.
        max_rotation: in degrees.
        max_scale: relative; scales are 1 ± this.
        max_shear: what is added to the displacement in x for each pixel in y.
        max_perspective: entries of the third row, per pixel from the centre.
        gain: range of the random gain, per frame and band.
        offset: the random offset is uniform in ± this, per frame and band.
        noise: standard deviation of the Gaussian noise, on frames and reference.
        seed: of every random choice.

    Raises:
        TypeError: the scene is no floating tensor.
        ValueError: the scene is too small for size and factor; any other argument out of its range.

    Example:
        >>> scene = torch.rand(1, 200, 200, generator=torch.Generator().manual_seed(0))
        >>> stack = simulate_warped_stack(scene, motion="euclidean", frames=2, size=(48, 48), factor=3)
        >>> linear = stack.warp[0, :2, :2]
        >>> bool((linear @ linear.mT - torch.eye(2)).abs().max() < 1e-6)
        True
    """
    _check_scene(scene)
    check_option("motion", motion, MotionModel)
    size = _whole_pair("size", size, "(H, W)", 1)
    check_whole("frames", frames, minimum=0)
    check_whole("factor", factor, minimum=1)
    _check_bounded(max_shift=max_shift, offset=offset, noise=noise)
    check_number("max_rotation", max_rotation, minimum=0.0, maximum=180.0)
    check_number("max_scale", max_scale, minimum=0.0, maximum=0.9)
    check_number("max_shear", max_shear, minimum=0.0, maximum=1.0)
    # at 1 / (W + H) a corner could be on the horizon
    check_number("max_perspective", max_perspective, minimum=0.0, maximum=0.5 / sum(size))
    _check_ranges(gain=gain)
    # a border that is averaged away, so that what a warp fetches from outside is mostly ground
    margin = 8 * factor
    needed = (size[0] * factor + 2 * margin, size[1] * factor + 2 * margin)
    room = tuple(length - need for length, need in zip(scene.shape[-2:], needed, strict=True))
    if min(room) < 0:
        expected = f"at least {needed} pixels for size={size}, factor={factor}"
        raise ValueError(message("scene", expected, tuple(scene.shape[-2:]), "lower size or factor"))
    top, left = room[0] // 2, room[1] // 2
    window = scene.detach().to(torch.device("cpu"), torch.float32)
    window = window[None, :, top : top + needed[0], left : left + needed[1]]
    generator = torch.Generator().manual_seed(seed)

    limits = (max_shift, max_rotation, max_scale, max_shear, max_perspective)
    truth = _draw_warps(motion, frames, size, limits, generator)

    # pixel p of a frame is centred on pixel factor · p + start of the window
    start = margin + (factor - 1) / 2
    to_window = torch.tensor([[factor, 0, start], [0, factor, start], [0, 0, 1]], dtype=torch.float64)
    back = invert_warp(to_window @ truth @ torch.linalg.inv(to_window))

    def averaged(image: Tensor) -> Tensor:
        return F.avg_pool2d(image[..., margin : needed[0] - margin, margin : needed[1] - margin], factor)

    bands = scene.shape[0]
    # one frame at a time: they are large at the scene's resolution
    moved = [
        averaged(warp(window, one[None], interpolation="bicubic", padding_mode="reflection")) for one in back
    ]
    cube = torch.cat(moved) if moved else window.new_empty(0, bands, *size)
    gains = _uniform(gain, (frames, bands, 1, 1), generator, torch.float64)
    offsets = _uniform((-offset, offset), (frames, bands, 1, 1), generator, torch.float64)
    cube = (gains * cube + offsets).float() + noise * torch.randn(cube.shape, generator=generator)
    reference = averaged(window)[0]
    reference = reference + noise * torch.randn(reference.shape, generator=generator)
    return WarpedStack(cube, reference, truth)


def _draw_warps(
    motion: MotionModel,
    frames: int,
    size: tuple[int, int],
    limits: tuple[float, float, float, float, float],
    generator: torch.Generator,
) -> Tensor:
    """(T, 3, 3) float64 about the centre: shift, rotation, scale, shear, perspective uniform in ± their limits."""
    max_shift, max_rotation, max_scale, max_shear, max_perspective = limits

    def within(limit: float, *motions: MotionModel) -> Tensor:
        # drawn for every model: the others stay the same
        drawn = _uniform((-limit, limit), (frames,), generator, torch.float64)
        return drawn if motion in motions else torch.zeros_like(drawn)

    linear: tuple[MotionModel, ...] = ("affine", "homography")
    angle = within(math.radians(max_rotation), "euclidean", "similarity", *linear)
    scale = 1 + within(max_scale, "similarity", *linear)
    shear = within(max_shear, *linear)
    shift = [within(max_shift, motion) for _ in "xy"]
    tilt = [within(max_perspective, "homography") for _ in "xy"]
    rows = [
        torch.stack([scale * angle.cos(), shear - scale * angle.sin(), shift[0]], dim=-1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), shift[1]], dim=-1),
        torch.stack([*tilt, torch.ones_like(angle)], dim=-1),
    ]
    warp = change_origin(torch.stack(rows, dim=-2), (-(size[1] - 1) / 2, -(size[0] - 1) / 2))
    return warp / warp[..., 2:, 2:]


def _check_scene(scene: object) -> None:
    if not isinstance(scene, Tensor) or not scene.is_floating_point():
        got = scene.dtype if isinstance(scene, Tensor) else type(scene).__name__
        cure = "convert it: scene.float() / 255"
        raise TypeError(message("scene", "a floating torch.Tensor (C, H, W)", got, cure))
    if scene.ndim != 3 or scene.shape[0] < 1:
        cure = "add a band axis: scene[None]"
        raise ValueError(message("scene", "shape (C, H, W)", tuple(scene.shape), cure))


def _check_bounded(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value, minimum=0.0, maximum=_LARGEST)


def _check_ranges(**ranges: tuple[float, float]) -> None:
    for name, pair in ranges.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not pair[0] <= pair[1]:
            raise ValueError(message(name, "(low, high)", pair, "put the smaller number first"))


def _whole_pair(name: str, pair: object, expected: str, minimum: int) -> tuple[int, int]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(message(name, expected, repr(pair), f"give two whole numbers ≥ {minimum}"))
    return check_whole(name, pair[0], minimum=minimum), check_whole(name, pair[1], minimum=minimum)


def _check_blur(name: str, sigma: float, smallest: float, *, inclusive: bool = True) -> None:
    # the kernel reaches 3 σ beyond the border, where the image is reflected, once
    check_number(name, sigma, minimum=0.0, maximum=max(0.0, (smallest - 2) / 3), inclusive=inclusive)


def _check_origin(origin: tuple[int, int], room: tuple[int, int], margin: int) -> tuple[int, int]:
    """``room``: how many scene pixels a window and its margins can move, (y, x)."""
    origin = _whole_pair("origin", origin, "(y, x)", 0)
    if not all(margin <= value <= margin + free for value, free in zip(origin, room, strict=True)):
        expected = f"y in {margin} … {margin + room[0]} and x in {margin} … {margin + room[1]}"
        cure = "move it inwards, lower max_shift, or leave it out for the scene's centre"
        raise ValueError(message("origin", f"{expected}, so that shifted windows stay inside", origin, cure))
    return origin


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (..., H, W) with reflected borders."""
    from kornia.filters import gaussian_blur2d

    kernel = 2 * int(3 * sigma + 0.5) + 1
    flat = image.reshape(-1, 1, *image.shape[-2:])
    return gaussian_blur2d(flat, (kernel, kernel), (sigma, sigma)).reshape(image.shape)


# --- the demo ---


def open_demo_scene() -> xr.DataArray:
    """The real Sentinel-2 L2A chip that the package spyndex carries; no network is used.

    Returns:
        (band, y, x) float32 surface reflectance, 4 × 300 × 300 at 10 m: B02 (blue), B03 (green), B04 (red),
        B08 (near infrared). The chip carries no georeference: y and x are metres from its lower left corner,
        at pixel centres, y falling with the rows.

    Raises:
        ImportError: spyndex is not installed.

    Example:
        >>> scene = open_demo_scene()
        >>> scene.sizes["band"], scene.sizes["y"], float(scene.x[1] - scene.x[0])
        (4, 300, 10.0)
    """
    import xarray as xr

    require("open_demo_scene", "demo", "spyndex")
    from spyndex import datasets

    chip = datasets.open("sentinel")
    # spyndex calls the axes (band, x, y); the rows of the picture are its second axis
    values = np.asarray(chip.values, dtype=np.float32) / np.float32(10_000)  # digital numbers to reflectance
    coords = {"band": [str(name) for name in chip["band"].values], **_demo_grid(values.shape[1:])}
    attrs = {"long_name": "surface reflectance", "units": "1", "source": "Sentinel-2 L2A, package spyndex"}
    return xr.DataArray(values, coords, ("band", "y", "x"), "reflectance", attrs)


def demo_stack(
    *,
    frames: int = 16,
    size: tuple[int, int] = (256, 256),
    max_shift: float = 3.0,
    noise: float = 0.003,
    seed: int = 0,
    scene: xr.DataArray | None = None,
) -> DemoStack:
    """A real place as a sensor with a pointing problem would see it, with the truth.

    The first frame is clear, lies exactly on the grid and serves as the reference. One frame is overcast (no
    ground is visible: to be flagged, not aligned), one was cut by the edge of the swath (NaN), every other
    one of the rest has clouds with shadows, the clouds alone over a twelfth to two fifths of it. Each frame
    has its own gain (±15 %, and ±5 % per band), offset per band (±0.004) and Gaussian noise.

    **How the shifts are made.** The chip is too small for the decimation of :func:`simulate_stack`: by 3, the
    least that gives useful fractions, frames of 92² with shifts in thirds of a pixel would be left. So the
    chip is extended to twice its size by mirroring, which makes it periodic without a jump; its Fourier
    transform is multiplied by exp(2πi f·shift), which moves every frequency by exactly the shift, whatever
    the fraction, without the blur of a bilinear or bicubic kernel and without being the kernel that an
    aligner resamples with; and the frame is cut from the middle, so that real ground enters at its borders.

    **What this is not.** The aliasing of the chip moves with the ground, where a sensor's stays on its grid.
    Shifts are a little easier to find than in nature; accuracy is measured on :func:`simulate_stack`.

    Args:
        frames: T, at least 4.
        size: (H, W) of the frames.
        max_shift: shifts are uniform in ± this many pixels, in x and y.
        noise: standard deviation of the Gaussian noise, in reflectance.
        seed: of every random choice.
        scene: (band, y, x) reflectance without NaN; default: :func:`open_demo_scene`.

    Raises:
        ImportError: no scene is given and spyndex is not installed.
        ValueError: fewer than 4 frames; a scene too small for size and max_shift; another bad value.

    Example:
        >>> stack = demo_stack(frames=5, size=(64, 64))
        >>> dict(stack.cube.sizes), stack.shift.shape
        ({'time': 5, 'band': 4, 'y': 64, 'x': 64}, (5, 2))
        >>> stack.clear.mean(("y", "x")).values.round(1).min()
        np.float64(0.0)
    """
    import xarray as xr

    check_whole("frames", frames, minimum=4)
    check_whole("seed", seed, minimum=0)
    size = _whole_pair("size", size, "(H, W)", 1)
    _check_bounded(max_shift=max_shift, noise=noise)
    if scene is None:
        scene = open_demo_scene()
    if not isinstance(scene, xr.DataArray) or {*scene.dims} != {"band", "y", "x"}:
        kind = f"{type(scene).__name__} with {getattr(scene, 'dims', 'no dims')}"
        raise TypeError(message("scene", "a DataArray over band, y, x", kind, "name its dims so"))
    scene = scene.transpose("band", "y", "x")
    needed = tuple(length + 2 * math.ceil(max_shift) for length in size)
    if scene.sizes["y"] < needed[0] or scene.sizes["x"] < needed[1]:
        got = (scene.sizes["y"], scene.sizes["x"])
        raise ValueError(message("scene", f"at least {needed} pixels", got, "lower size or max_shift"))
    random = np.random.default_rng(seed)
    bands = scene.sizes["band"]
    shift = random.uniform(-max_shift, max_shift, (frames, 2))  # (x, y)
    shift[0] = 0.0
    ground = _fourier_shift(scene.values.astype(np.float64), shift, size)  # (T, C, H, W)
    gain = random.uniform(0.85, 1.15, (frames, 1, 1, 1)) * random.uniform(0.95, 1.05, (frames, bands, 1, 1))
    offset = random.uniform(-0.004, 0.004, (frames, bands, 1, 1))
    gain[0], offset[0] = 1.0, 0.0
    values = gain * ground + offset
    clear = np.ones((frames, *size), dtype=bool)

    overcast, cut = frames - frames // 4, frames // 2 - 1  # never 0, never the same
    others = [number for number in range(1, frames) if number not in (overcast, cut)]
    fractions = dict.fromkeys([overcast], 1.0) | {number: random.uniform(0.08, 0.4) for number in others[::2]}
    for number, fraction in fractions.items():
        values[number], clear[number] = _add_clouds(values[number], fraction, random)
    values += random.normal(0.0, noise, values.shape)
    rows, columns = np.indices(size)
    # the swath's edge runs from north to south-west
    beyond = columns / size[1] + 0.25 * rows / size[0] > 0.93
    values[cut, :, beyond] = np.nan
    clear[cut] &= ~beyond

    start = np.datetime64(_DEMO_START, "ns")
    time = start + np.arange(frames) * np.timedelta64(_DEMO_REVISIT_DAYS, "D")
    grid = _demo_grid(size)
    coords = {"time": time, "band": scene["band"].values, **grid}
    attrs = {"long_name": "surface reflectance", "units": "1"}
    cube = xr.DataArray(values.astype(np.float32), coords, ("time", "band", "y", "x"), "reflectance", attrs)
    truth = {"long_name": "true displacement, right and down", "units": "pixel"}
    return DemoStack(
        cube,
        xr.DataArray(shift, {"time": time, "axis": ["x", "y"]}, ("time", "axis"), "true_shift", truth),
        xr.DataArray(clear, {"time": time, **grid}, ("time", "y", "x"), "clear"),
    )


def _demo_grid(size: tuple[int, ...]) -> dict[str, tuple[str, _Floats, dict[str, str]]]:
    """Coordinates of pixel centres in metres from the lower left corner."""
    centres = [_DEMO_PIXEL_METRES * (np.arange(length) + 0.5) for length in size]
    y, x = {"long_name": "northing from the corner"}, {"long_name": "easting from the corner"}
    return {"y": ("y", centres[0][::-1], y | {"units": "m"}), "x": ("x", centres[1], x | {"units": "m"})}


def _fourier_shift(scene: _Floats, shift: _Floats, size: tuple[int, int]) -> _Floats:
    """frame(p) = scene(p + shift) for the frame in the middle: (C, Hs, Ws), (T, 2) → (T, C, H, W)."""
    height, width = scene.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    mirrored = np.pad(scene, ((0, 0), (0, height), (0, width)), mode="symmetric")  # (C, 2·Hs, 2·Ws)
    spectrum = np.fft.rfft2(mirrored)
    phase_y = 2j * np.pi * np.fft.fftfreq(2 * height)[:, None]  # radians/cycle * cycles/pixel
    phase_x = 2j * np.pi * np.fft.rfftfreq(2 * width)
    frames = np.empty((len(shift), len(scene), *size))
    for frame, (x, y) in zip(frames, shift, strict=True):
        moved = np.fft.irfft2(spectrum * np.exp(phase_x * x) * np.exp(phase_y * y), s=mirrored.shape[-2:])
        frame[:] = moved[:, top : top + size[0], left : left + size[1]]
    return frames


def _add_clouds(
    ground: _Floats, fraction: float, random: np.random.Generator
) -> tuple[_Floats, NDArray[np.bool_]]:
    """Clouds over a fraction of (C, H, W), and their shadows to the north-west; and where it stayed clear."""
    bands, height, width = ground.shape
    colours = np.array([_CLOUD_COLOUR, _SHADOW_COLOUR])  # bands beyond the fourth look like the fourth
    cloud_colour, shadow_colour = colours[:, np.minimum(np.arange(bands), 3), None, None]
    shape = _fractal(height, width, 2.0, random)
    level = np.quantile(shape, 1.0 - fraction) if fraction < 1.0 else shape.min() - 1.0
    ramp = np.clip((shape - level) / 0.6 + 0.3, 0.0, 1.0)
    opacity = ramp * ramp * (3.0 - 2.0 * ramp)  # soft edges, without a kink; (H, W)
    # the sun stands in the south-east: what rises towards it is bright
    relief = _fractal(height, width, 1.7, random) + 0.5 * shape
    light = np.gradient(relief, axis=0) + np.gradient(relief, axis=1)
    light = np.clip(light / light.std(), -2.0, 2.0)
    brightness = 0.3 + 0.07 * np.clip(shape - level, 0.0, 2.0) - 0.04 * light
    reach = max(1, min(height, width) // 20)
    shadow = np.roll(opacity, (-reach, -reach), axis=(0, 1)) * (1.0 - opacity)
    shaded = ground * (1.0 - 0.9 * shadow * (1.0 - shadow_colour))
    clouded = shaded + opacity * (np.clip(brightness, 0.15, 0.6) * cloud_colour - shaded)
    return clouded, (opacity < 0.02) & (shadow < 0.05)


def _fractal(height: int, width: int, slope: float, random: np.random.Generator) -> _Floats:
    """A periodic random field of unit variance whose amplitude falls as frequency^-slope."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    # nothing larger than a third of the frame, or one half would always be clouded
    amplitude = np.maximum(frequency, 3.0 / max(height, width)) ** -slope
    amplitude[0, 0] = 0.0
    field = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * amplitude, s=(height, width))
    return np.asarray(field / max(float(field.std()), 1e-12))
