"""ECC and Cascade against OpenCV's ECC and satalign's: how far off, is it said, and how long does it take?

Ground truth without an interpolation kernel, as in `accuracy.py`: frames of a real 30 m scene, averaged in blocks
of 5 × 5, at whole-pixel offsets (`simulate_stack`), or after the scene itself was warped (`simulate_warped_stack`).
Every method gets the mean of the bands.

    python benchmarks/ecc.py [--scene ../shared/data/landsat7_rgb.tif] [--frames 64] [--rounds 7] [--quick]
    python benchmarks/ecc.py --times  # 4 minutes, quiet: the times alone, anew
    python benchmarks/ecc.py --update-readme

`cv2.findTransformECC` returns reference → moving; its warps are inverted here. satalign takes the same matrix for
moving → reference and so doubles the misregistration: its **sign is corrected here**, which is more than its users
get. Each of its frames is a job of its own, since OpenCV overwrites the matrix that satalign starts the next from.

Flags: torchalign's `status`; OpenCV's exceptions; satalign's `warning_status`. Errors are those of unflagged
frames. A **loss** is a condition where a peer's median or 95th percentile is lower than that of the default, a
flagged frame counting as an infinite error; for the speed, where the peer's time is lower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accuracy import LIMIT, SILENT, Found, Part, Protocol, figures, open_scene
from common import (
    HERE,
    add_readme_options,
    cores,
    described,
    machine,
    percent,
    pixels,
    read_results,
    readme_or_run,
    table,
    versions,
    write_results,
)
from speed import ONE_BLAS_THREAD, summary, timed
from torch import Tensor
from torch.nn import functional as F

import torchalign as ta
from torchalign import aligner as aligner_module
from torchalign.datasets import simulate_stack, simulate_warped_stack
from torchalign.functional import ecc, levels, moving_frames
from torchalign.functional.affine import identity_warp, invert_warp, to_homogeneous, transform_points

NAME = "ecc"
AUTO, ALONE = "Cascade(PCC(), ECC())", "ECC()"
OPENCV, EARLY, FROM_PCC = "OpenCV, 100 iterations", "OpenCV, EPS 1e-4", "OpenCV, 100 iterations from PCC"
MULTI_SCALE, SATALIGN = "OpenCV, multi-scale", "satalign.ECC, sign corrected"
ITERATIONS = (cv2.TERM_CRITERIA_COUNT, 100, 0.0)  # satalign's default
STOPPED_EARLY = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-4)
FAR, FAR_LIMIT, NEAR = 20.0, 32.0, 0.05
BLURS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
SPEED_FRAMES, AIMS = 64, {"whole": 30.0, "translation": 2.0, "affine": 1.5}
QUIET = 1.5  # load of the machine beyond which times are marked
STAGES = ("channel", "textures", "search", "assess", "gate", "warp")


# --- the methods: warps moving → reference, (T, 3, 3), and what was flagged ---


def torchalign(part: Part, aligner: ta.Aligner) -> tuple[Tensor, Tensor, Tensor]:
    estimate = aligner.estimate(part.cube, part.reference, part.mask)
    return to_homogeneous(estimate.warp), ~estimate.valid, estimate.sigma


def own(motion: str, limit: float = LIMIT) -> dict[str, ta.Aligner]:
    options: dict[str, Any] = {"motion": motion, "max_translation": limit}
    return {
        AUTO: ta.Cascade(ta.PCC(max_translation=limit), ta.ECC(**options)),
        ALONE: ta.ECC(**options),
        'ECC(robust="residual")': ta.ECC(robust="residual", **options),
        'ECC(robust="none")': ta.ECC(robust="none", **options),
    }


def opencv(
    part: Part,
    motion: str,
    criteria: tuple[int, int, float] = ITERATIONS,
    *,
    multi_scale: bool = False,
    from_pcc: bool = False,
) -> tuple[Tensor, Tensor]:
    """Its ECC with its Gaussian of 5 pixels, from the identity or the shift that `PCC()` found."""
    reference = part.reference.mean(0).numpy()
    start = to_homogeneous(identity_warp(len(part.cube)))
    if from_pcc:
        first = ta.PCC(max_translation=part.limit)
        start = to_homogeneous(first.estimate(part.cube, part.reference, part.mask).warp)
    rows = 3 if motion == "homography" else 2
    everywhere = np.full(reference.shape, 255, np.uint8)
    warps, flagged = [], []
    for number, (moving, begin) in enumerate(zip(part.cube.mean(1).numpy(), invert_warp(start), strict=True)):
        mask = None if part.mask is None else 255 * part.mask[number].numpy().astype(np.uint8)
        given = begin[:rows].numpy().copy()
        mode = getattr(cv2, f"MOTION_{motion.upper()}")
        try:
            if multi_scale:
                parameters = cv2.ECCParameters()
                parameters.motionType = mode
                # with values of about 1 it meets NaN in every frame: it is given those of 8 bit, as floats
                # (OpenCV 5.0 does not heed the moving frame's mask, however it is given)
                scaled = [np.float32(255) * image for image in (reference, moving)]
                masks = (everywhere, mask) if mask is not None else ()
                _, found = cv2.findTransformECCMultiScale(*scaled, given, parameters, *masks)
            elif mask is not None:
                _, found = cv2.findTransformECCWithMask(
                    reference, moving, everywhere, mask, given, mode, criteria, 5
                )
            else:
                _, found = cv2.findTransformECC(reference, moving, given, mode, criteria, None, 5)
            inverse = to_homogeneous(torch.from_numpy(found).double())
            warps.append(torch.linalg.inv_ex(inverse).inverse)
            flagged.append(not bool(warps[-1].isfinite().all()))
        except cv2.error:
            warps.append(torch.eye(3, dtype=torch.float64))
            flagged.append(True)
    return torch.stack(warps), torch.tensor(flagged)


def satalign(part: Part) -> tuple[Tensor, Tensor]:
    from satalign import ECC

    warps, flagged = [], []
    for frame in part.cube.numpy():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = ECC(frame[None], part.reference.numpy(), max_translations=part.limit)
            _, warp = job.run()
        warps.append(invert_warp(to_homogeneous(torch.from_numpy(warp[0].copy()).double())))
        flagged.append(job.warning_status)
    return torch.stack(warps), torch.tensor(flagged)


def peers(motion: str) -> dict[str, Callable[[Part], tuple[Tensor, Tensor]]]:
    found: dict[str, Callable[[Part], tuple[Tensor, Tensor]]] = {
        OPENCV: lambda part: opencv(part, motion),
        EARLY: lambda part: opencv(part, motion, STOPPED_EARLY),
        FROM_PCC: lambda part: opencv(part, motion, from_pcc=True),
    }
    if hasattr(cv2, "findTransformECCMultiScale"):
        found[MULTI_SCALE] = lambda part: opencv(part, motion, multi_scale=True)
    if motion == "translation":
        found[SATALIGN] = satalign
    return found


def measure_shifts(part: Part, names: list[str] | None = None) -> dict[str, Found]:
    measured = {}
    for name, aligner in own("translation", part.limit).items():
        if names is None or name in names:
            warp, flagged, sigma = torchalign(part, aligner)
            measured[name] = Found(warp[:, :2, 2], flagged, sigma)
    for name, method in peers("translation").items():
        if names is None or name in names:
            warp, flagged = method(part)
            measured[name] = Found(warp[:, :2, 2], flagged)
    return measured


# --- what is measured ---


def shifts(protocol: Protocol) -> dict[str, Any]:
    """Translations: clean and under clouds."""
    rows = {}
    for name, fraction, mask in (
        ("clean", 0.0, False),
        ("20 % cloud", 0.2, False),
        ("50 % cloud", 0.5, False),
        ("50 % cloud, mask given", 0.5, True),
    ):
        made = simulate_stack(
            protocol.scene,
            frames=protocol.frames,
            size=(protocol.size, protocol.size),
            factor=protocol.factor,
            cloud_fraction=fraction,
            seed=protocol.seed,
        )
        part = Part(made.cube, made.reference, made.shift, made.clear if mask else None)
        rows[name] = {method: figures(found, part.shift) for method, found in measure_shifts(part).items()}
        say(name, rows[name][AUTO])
    return rows


def bias(protocol: Protocol) -> dict[str, Any]:
    """Mean signed error against the fraction of a pixel of the true shift, per axis."""
    made = simulate_stack(
        protocol.scene,
        frames=4 * protocol.frames,
        size=(protocol.size, protocol.size),
        factor=protocol.factor,
        seed=protocol.seed + 99,
    )
    part = Part(made.cube, made.reference, made.shift)
    steps = (made.shift * protocol.factor).round().long() % protocol.factor  # (T, 2)
    rows = {}
    for name, found in measure_shifts(part, [AUTO, ALONE, EARLY, OPENCV, SATALIGN]).items():
        error, kept = (found.shift - made.shift).double(), ~found.flagged
        rows[name] = {
            axis: [
                float(error[kept & (steps[:, column] == step), column].mean())
                for step in range(protocol.factor)
            ]
            for column, axis in enumerate("xy")
        }
    return {"fractions": [step / protocol.factor for step in range(protocol.factor)], "bias": rows}


def corner_errors(warp: Tensor, truth: Tensor, size: int) -> Tensor:
    """(T,), how far off the worst corner of a frame is put, in pixels."""
    last = size - 1.0
    corners = torch.tensor([[0, 0], [last, 0], [0, last], [last, last]], dtype=torch.float64)
    apart = transform_points(warp.double(), corners) - transform_points(truth, corners)
    return apart.norm(dim=-1).amax(-1)


def warps(protocol: Protocol) -> dict[str, Any]:
    """Rotations to 5°, scales of 0.95 … 1.05, shear 0.03, shifts to 3 px, perspective: the worst corner."""
    ground = protocol.scene.mean(0, keepdim=True)
    options: dict[str, Any] = {"frames": protocol.frames // 2, "size": (protocol.size, protocol.size)}
    nothing = torch.zeros(1, protocol.size, protocol.size)
    clouds = simulate_stack(nothing, factor=1, max_shift=0, cloud_fraction=0.2, offset=0, noise=0, **options)
    rows = {}
    for motion in ("euclidean", "affine", "homography"):
        made = simulate_warped_stack(
            ground, motion=motion, factor=protocol.factor, seed=protocol.seed, **options
        )
        clouded = torch.where(clouds.clear[:, None], made.cube, clouds.cube)
        none = torch.zeros(len(made.cube), 1, dtype=torch.float64)
        for name, cube in ((motion, made.cube), (f"{motion}, 20 % cloud", clouded)):
            part = Part(cube, made.reference, none, limit=2 * LIMIT)
            row = {}
            for method, aligner in own(motion, part.limit).items():
                warp, flagged, _ = torchalign(part, aligner)
                row[method] = figures(
                    Found(corner_errors(warp, made.warp, protocol.size)[:, None], flagged), none
                )
            for method, peer in peers(motion).items():
                warp, flagged = peer(part)
                row[method] = figures(
                    Found(corner_errors(warp, made.warp, protocol.size)[:, None], flagged), none
                )
            rows[name] = row
            say(name, row[ALONE])
    return rows


def reach(protocol: Protocol, trials: int) -> dict[str, Any]:
    """Shifts to 20 px of smooth and sharp scenes: who arrives, and is it said where not?"""
    frames = max(1, trials // len(BLURS))
    rows = {}
    for noise, names in ((0.002, None), (0.01, [AUTO, ALONE])):
        found: dict[str, list[Found]] = {}
        truths, by_blur = [], {}
        for number, blur in enumerate(BLURS):
            made = simulate_stack(
                protocol.scene,
                frames=frames,
                size=(protocol.size, protocol.size),
                factor=protocol.factor,
                max_shift=FAR / math.sqrt(2),
                blur=blur,
                noise=noise,
                seed=protocol.seed + number,
            )
            part = Part(made.cube, made.reference, made.shift, limit=FAR_LIMIT)
            truths.append(made.shift)
            measured = measure_shifts(part, names)
            for method, one in measured.items():
                found.setdefault(method, []).append(one)
            by_blur[str(blur)] = _arrived(measured[AUTO], made.shift)
        truth = torch.cat(truths)
        joined = {
            method: Found(torch.cat([one.shift for one in each]), torch.cat([one.flagged for one in each]))
            for method, each in found.items()
        }
        rows[str(noise)] = {
            "methods": {method: _arrived(one, truth) for method, one in joined.items()},
            "by_blur": by_blur,
        }
        print(f"cascade, noise {noise}: {rows[str(noise)]['methods'][AUTO]}", file=sys.stderr, flush=True)
    return rows


def _arrived(found: Found, truth: Tensor) -> dict[str, Any]:
    errors = (found.shift.double() - truth.double()).norm(dim=-1)
    near = ~found.flagged & (errors <= NEAR)
    accepted = errors[~found.flagged]
    return {
        "trials": len(truth),
        "near": int(near.sum()),
        "flagged": int(found.flagged.sum()),
        "wrong_unflagged": int((~found.flagged & (errors > SILENT)).sum()),
        "worst_unflagged": float(accepted.max()) if len(accepted) else None,
    }


def losses(rows: Mapping[str, Any], default: str) -> list[dict[str, Any]]:
    lost = []
    for condition, row in rows.items():
        for figure in ("median", "p95"):
            theirs = {
                name: entry[f"{figure}_strict"] for name, entry in row.items() if name in peers("translation")
            }
            name = min(theirs, key=lambda peer: float(theirs[peer]))
            ours = row[default][f"{figure}_strict"]
            if theirs[name] < ours:
                entry = {"condition": condition, "figure": figure, "peer": name}
                lost.append(entry | {"theirs": theirs[name], "ours": ours, "default": default})
    return lost


def say(name: str, row: Mapping[str, Any]) -> None:
    print(f"{name}: {pixels(row['median'])} / {pixels(row['p95'])}", file=sys.stderr, flush=True)


# --- time: each job runs in a process of its own, started with its cores, and prints JSON ---


def speed_stack(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    protocol = open_scene(options.scene, SPEED_FRAMES, 0)
    room = min(protocol.scene.shape[-2:]) // (SIDE + 6)
    factor = min(protocol.factor, room)
    made = simulate_stack(protocol.scene, frames=SPEED_FRAMES, size=(SIDE, SIDE), factor=factor)
    return made.cube, made.reference


SIDE = 256


def whole(options: argparse.Namespace) -> dict[str, Any]:
    """Estimate and warp, all bands, in turns with satalign's default run."""
    from satalign import ECC

    cube, reference = speed_stack(options)
    numpy_cube, numpy_reference = cube.numpy(), reference.numpy()

    def theirs(*, multicore: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = ECC(numpy_cube, numpy_reference, num_threads=cores())
            job.run_multicore() if multicore else job.run()

    jobs: dict[str, Callable[[], object]] = {
        ALONE: lambda aligner=ta.ECC(): aligner(cube, reference),  # noqa: B008
        AUTO: lambda aligner=ta.Cascade(ta.PCC(), ta.ECC()): aligner(cube, reference),  # noqa: B008
        "satalign.ECC": lambda: theirs(multicore=False),
    }
    if cores() > 1:
        jobs["satalign.ECC, run_multicore"] = lambda: theirs(multicore=True)
    return in_turns(jobs, options.rounds)


def estimates(options: argparse.Namespace) -> dict[str, Any]:
    """The estimate alone, in turns with OpenCV stopped early, which is given the channel ready-made."""
    cube, reference = speed_stack(options)
    channel, target = cube.mean(1).numpy(), reference.mean(0).numpy()

    def one(moving: np.ndarray, motion: str) -> bool:
        try:
            mode = getattr(cv2, f"MOTION_{motion.upper()}")
            cv2.findTransformECC(target, moving, np.eye(2, 3, dtype=np.float32), mode, STOPPED_EARLY, None, 5)
        except cv2.error:
            return False
        return True

    def theirs(motion: str, threads: int) -> int:
        cv2.setNumThreads(threads)
        return sum(one(moving, motion) for moving in channel)

    def side_by_side(motion: str) -> int:
        cv2.setNumThreads(1)
        with ThreadPoolExecutor(cores()) as pool:
            return sum(pool.map(lambda moving: one(moving, motion), channel))

    measured = {}
    for motion in ("translation", "affine"):
        jobs: dict[str, Callable[[], object]] = {
            "torchalign": lambda aligner=ta.ECC(motion=motion): aligner.estimate(cube, reference),  # noqa: B008
            "OpenCV, one thread": lambda motion=motion: theirs(motion, 1),
        }
        if cores() > 1:
            jobs["OpenCV, its threads"] = lambda motion=motion: theirs(motion, cores())
            jobs["OpenCV, a frame a core"] = lambda motion=motion: side_by_side(motion)
        measured[motion] = in_turns(jobs, options.rounds) | {"threw": len(channel) - theirs(motion, 1)}
    return measured


def in_turns(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Every round begins with the next job, so that none always comes after the same one, whose threads linger."""
    cpu = torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent = timed(jobs[name], cpu)
            if number:  # the first round warms up
                seconds[name].append(spent)
    return {"cores": cores(), "seconds": {name: summary(values) for name, values in seconds.items()}}


def stages(options: argparse.Namespace) -> dict[str, Any]:
    """Shares of the whole job, on one core, where blocks do not run side by side; and the floor under it."""
    cube, reference = speed_stack(options)
    measured = {}
    for motion in ("translation", "affine"):
        aligner = ta.ECC(motion=motion)
        aligner(cube, reference)
        spent: dict[str, list[float]] = {}
        total = []
        for _ in range(options.rounds):
            with watched() as (watch, samplings):
                total.append(timed(lambda aligner=aligner: aligner(cube, reference), torch.device("cpu")))
            for name in STAGES:
                spent.setdefault(name, []).append(watch[name])
        per_frame = {name: 1e3 * float(np.median(values)) / len(cube) for name, values in spent.items()}
        needed = 1e3 * sum(count * sampling_cost(size) for size, count in samplings.items()) / len(cube)
        warp = 1e3 * warp_cost(cube) / len(cube)
        measured[motion] = {
            "ms_per_frame": per_frame,
            "whole": 1e3 * float(np.median(total)) / len(cube),
            "samplings_per_frame": {f"{h} × {w}": count / len(cube) for (h, w), count in samplings.items()},
            "floor": {"samplings": needed, "warp": warp},
        }
    return measured


@contextmanager
def watched() -> Iterator[tuple[dict[str, float], dict[tuple[int, int], int]]]:
    """Adds up what the functions that the aligner calls take, and how many frames are sampled at what size."""
    spent = dict.fromkeys(STAGES, 0.0)
    samplings: dict[tuple[int, int], int] = {}
    places: list[tuple[Any, str, str]] = [
        (aligner_module, "extract_channel", "channel"),
        (levels, "extract_pyramid", "textures"),
        (levels, "prepare_level", "textures"),
        (moving_frames.ShiftedFrames, "of", "textures"),
        (moving_frames.WarpedFrames, "of", "textures"),
        (ecc._Search, "climb", "search"),
        (ecc, "_better_of", "search"),
        (moving_frames.ShiftedFrames, "look", "search"),
        (moving_frames.WarpedFrames, "look", "search"),
        (ecc, "_assess", "assess"),
        (aligner_module, "gate_stages", "gate"),
        (aligner_module, "resample", "warp"),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in places]
    before += [
        (owner, "values", owner.__dict__["values"])
        for owner in (moving_frames.ShiftedFrames, moving_frames.WarpedFrames)
    ]

    inside = dict.fromkeys(
        STAGES, 0
    )  # how deep: a function within one of the same stage is not counted again

    def watch(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            start = time.perf_counter()
            inside[stage] += 1
            result = function(*given, **options)
            inside[stage] -= 1
            if not inside[stage]:
                spent[stage] += time.perf_counter() - start
            return result

        return call

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(moving: Any, warp: Tensor, level: Any, *, precise: bool) -> Any:
            size = level.grid.size
            samplings[size] = samplings.get(size, 0) + math.prod(warp.shape[:-2])
            return function(moving, warp, level, precise=precise)

        return call

    try:
        for owner, name, stage in places:
            called = watch(getattr(owner, name), stage)
            setattr(owner, name, staticmethod(called) if name == "of" else called)
        for owner in (moving_frames.ShiftedFrames, moving_frames.WarpedFrames):
            owner.values = count(owner.values)
        yield spent, samplings
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def sampling_cost(size: tuple[int, int]) -> float:
    """Seconds of one bilinear sampling of one band of a frame, of 16 at once."""
    field = torch.rand(16, 1, *size)
    grid = F.affine_grid(identity_warp(16) + 0.01, [16, 1, *size], align_corners=False)
    return _cost(lambda: _grid_sample(field, grid)) / 16


def warp_cost(cube: Tensor) -> float:
    """Seconds of one bilinear warp of all bands of all frames."""
    block = cube[:16]
    grid = F.affine_grid(identity_warp(len(block)) + 0.01, list(block.shape), align_corners=False)
    return _cost(lambda: _grid_sample(block, grid)) * len(cube) / len(block)


def _grid_sample(field: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(field, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _cost(job: Callable[[], object]) -> float:
    job()
    return float(np.median([timed(job, torch.device("cpu")) for _ in range(9)]))


JOBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "whole": whole,
    "estimates": estimates,
    "stages": stages,
}


def start(job: str, options: argparse.Namespace, core_count: int) -> Any:
    """Run a job in a process that may use only so many cores, and return what it printed."""
    command = [sys.executable, __file__, "--job", job, "--scene", str(options.scene)]
    command += ["--rounds", str(options.rounds), "--threads", str(core_count)]
    print(f"{job}, {core_count} cores", file=sys.stderr, flush=True)
    pinned = hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if pinned else set()
    if pinned:
        os.sched_setaffinity(0, sorted(allowed)[:core_count])  # a child inherits it
    try:
        done = subprocess.run(
            command, env={**os.environ, **ONE_BLAS_THREAD}, check=True, text=True, stdout=subprocess.PIPE
        )
    finally:
        if pinned:
            os.sched_setaffinity(0, allowed)
    return json.loads(done.stdout.splitlines()[-1])


def times(options: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    counts = sorted({1, cores()}, reverse=True)
    return {
        "load_before": load,
        "busy": load > QUIET,
        "rounds": options.rounds,
        "whole": {str(count): start("whole", options, count) for count in counts},
        "estimates": {str(count): start("estimates", options, count) for count in counts},
        "stages": start("stages", options, 1),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.times:
        results = read_results(NAME)
        if results["machine"] != machine():
            raise SystemExit("the last results are another machine's: measure all of it")
        return results | {"speed": times(options)}
    protocol = open_scene(options.scene, options.frames, options.seed)
    spent = times(options)
    with torch.no_grad():
        shifted, warped = shifts(protocol), warps(protocol)
        return {
            "machine": machine(),
            "versions": versions("torchalign", "torch", "numpy", "satalign", "opencv-python-headless"),
            "scene": protocol.name,
            "frames": protocol.frames,
            "size": protocol.size,
            "factor": protocol.factor,
            "seed": protocol.seed,
            "shifts": shifted,
            "bias": bias(protocol),
            "warps": warped,
            # where a scene is too small for shifts of 20 px, there is no such table
            "reach": reach(protocol, options.trials) if protocol.far else None,
            "losses": losses(shifted, AUTO) + losses(warped, ALONE),
            "speed": spent,
        }


# --- the report ---


def _pair(row: Mapping[str, Any]) -> str:
    flagged = f" ({percent(row['flagged'], row['frames'])})" if row["flagged"] else ""
    return f"{pixels(row['median'])} / {pixels(row['p95'])}{flagged}"


def _errors(rows: Mapping[str, Any], default: str) -> str:
    names = list(next(iter(rows.values())))
    cells = [
        [condition, *(f"**{_pair(row[name])}**" if name == default else _pair(row[name]) for name in names)]
        for condition, row in rows.items()
    ]
    return table(["condition", *(_code(name) for name in names)], cells)


def _silent(rows: Mapping[str, Any]) -> str:
    names = list(next(iter(rows.values())))
    return table(
        ["condition", *(_code(name) for name in names)],
        [
            [condition, *(str(row[name]["wrong"] - row[name]["wrong_and_flagged"]) for name in names)]
            for condition, row in rows.items()
        ],
    )


def _code(name: str) -> str:
    return f"`{name}`" if name.endswith(")") else name


def _worst_bias(axes: Mapping[str, list[float]]) -> float:
    return max(abs(value) for values in axes.values() for value in values)


def _ratio(entry: Mapping[str, Any], ours: str, theirs: str) -> float:
    """The median over the rounds of how many times as fast ours is."""
    pairs = zip(entry["seconds"][ours]["rounds"], entry["seconds"][theirs]["rounds"], strict=True)
    return float(np.median([b / a for a, b in pairs]))


def _speed_rows(times: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for count, entry in times["whole"].items():
        for ours in (ALONE, AUTO):
            for theirs in (name for name in entry["seconds"] if name.startswith("satalign")):
                rows.append(_speed_row("whole job", count, entry, ours, theirs, AIMS["whole"]))
    for count, motions in times["estimates"].items():
        for motion, entry in motions.items():
            for theirs in (name for name in entry["seconds"] if name.startswith("OpenCV")):
                # the aim is on all cores, against one thread of OpenCV
                aimed = theirs == "OpenCV, one thread" and (int(count) > 1 or len(times["estimates"]) == 1)
                what = f"estimate, {motion}"
                rows.append(
                    _speed_row(what, count, entry, "torchalign", theirs, AIMS[motion] if aimed else None)
                )
    return rows


def _speed_row(
    what: str, count: str, entry: Mapping[str, Any], ours: str, theirs: str, aim: float | None
) -> list[str]:
    def milliseconds(name: str) -> str:
        seconds = entry["seconds"][name]
        return f"{1e3 * seconds['median'] / SPEED_FRAMES:.2f} / {1e3 * seconds['p95'] / SPEED_FRAMES:.2f}"

    ratio = _ratio(entry, ours, theirs)
    if ours == "torchalign":
        own_name = '`ECC(motion="affine")`' if what.endswith("affine") else f"`{ALONE}`"
    else:
        own_name = f"`{ours}`"
    verdict = "" if aim is None else ("met" if ratio >= aim else "**missed**") + f" (≥ {aim:g} ×)"
    return [
        what,
        count,
        own_name,
        milliseconds(ours),
        theirs,
        milliseconds(theirs),
        f"**{ratio:.1f} ×**" if ratio >= 1 else f"**loss** ({ratio:.2f} ×)",
        verdict,
    ]


def report(results: Mapping[str, Any]) -> str:
    times = results["speed"]
    load = f"Load of the machine before: {times['load_before']:.1f}"
    load = (
        f"**Measured on a busy machine**, the times are too long, the ratios rough. {load}"
        if times["busy"]
        else load
    )
    return "\n\n".join(
        [
            f"{results['scene']}; decimated by {results['factor']}, {results['frames']} frames of "
            f"{results['size']}², shifts ± 3 px, gain 0.7–1.3 and offset ± 0.1, noise 0.01. "
            f"Seed {results['seed']}. {described(results)}",
            "### Translation, pixels: median / 95th percentile (flagged)",
            _errors(results["shifts"], AUTO),
            f"Wrong by more than {SILENT} px and not flagged, frames of {results['frames']}:",
            _silent(results["shifts"]),
            "### Bias against the true fraction of a pixel, clean frames, pixels: x / y",
            table(
                ["method", *(f"{fraction:.1f}" for fraction in results["bias"]["fractions"]), "worst"],
                [
                    [
                        _code(name),
                        *(f"{x:+.4f} / {y:+.4f}" for x, y in zip(axes["x"], axes["y"], strict=True)),
                        f"{_worst_bias(axes):.4f}",
                    ]
                    for name, axes in results["bias"]["bias"].items()
                ],
            ),
            "### Other motions: the worst corner of a frame, pixels, median / 95th percentile (flagged)",
            f"{results['frames'] // 2} frames; rotations to 5°, scales 0.95–1.05, shear 0.03, shifts to 3 px, "
            "perspective 2e-4 per pixel, as far as the model has them; the scene is warped at its own resolution, "
            "then averaged. "
            "All but the cascade, and OpenCV from PCC, start from the identity.",
            _errors(results["warps"], ALONE),
            f"Wrong by more than {SILENT} px at a corner and not flagged, frames of {results['frames'] // 2}:",
            _silent(results["warps"]),
            *_report_reach(results["reach"]),
            "### Time, ms a frame, median / 95th percentile of the rounds; ratios round by round",
            f"T = {SPEED_FRAMES}, {SIDE}², float32, {times['rounds']} rounds in turns; OpenCV is stopped early "
            "(EPS 1e-4) and is given the channel ready-made; satalign as it comes. BLAS has one thread. "
            f"{load}.",
            table(
                ["what", "cores", "torchalign", "ms", "peer", "ms", "peer ÷ torchalign", "aim"],
                _speed_rows(times),
            ),
            "### Where the time of `ECC` goes, ms a frame, on one core; and the floor",
            table(
                [
                    "motion",
                    *STAGES,
                    "rest",
                    "whole job",
                    "samplings a frame",
                    "floor: samplings + warp",
                    "÷ floor",
                ],
                [_stage_row(motion, entry) for motion, entry in times["stages"].items()],
            ),
            "Floor: as many bilinear samplings of one band, at the sizes of the levels, as the search made, and "
            "one warp of all bands, all by `grid_sample`.",
            "### Losses",
            _report_losses(results),
        ]
    )


def _stage_row(motion: str, entry: Mapping[str, Any]) -> list[str]:
    per_frame, whole_job = entry["ms_per_frame"], entry["whole"]
    floor = entry["floor"]["samplings"] + entry["floor"]["warp"]
    rest = whole_job - sum(per_frame.values())
    return [
        motion,
        *(f"{per_frame[name]:.2f} ({100 * per_frame[name] / whole_job:.0f} %)" for name in STAGES),
        f"{rest:.2f}",
        f"{whole_job:.2f}",
        ", ".join(f"{count:.1f} of {size}" for size, count in entry["samplings_per_frame"].items()),
        f"{entry['floor']['samplings']:.2f} + {entry['floor']['warp']:.2f} = {floor:.2f}",
        f"{whole_job / floor:.1f} ×",
    ]


def _report_reach(reached: Mapping[str, Any] | None) -> list[str]:
    if reached is None:
        return ["### Shifts to 20 px", "Not run: the scene is too small for them."]
    lines = [f"### Shifts to {FAR:g} px, scenes blurred by σ = {BLURS[0]}–{BLURS[-1]:g} px: who arrives"]
    for noise, rows in reached.items():
        trials = rows["methods"][AUTO]["trials"]
        lines += [
            f"{trials} trials, noise {noise}, `max_translation={FAR_LIMIT:g}`:",
            table(
                [
                    "method",
                    f"within {NEAR} px",
                    "flagged",
                    f"wrong (> {SILENT} px), not flagged",
                    "worst not flagged, px",
                ],
                [
                    [
                        _code(name),
                        f"{row['near']} ({percent(row['near'], row['trials'])})",
                        str(row["flagged"]),
                        str(row["wrong_unflagged"]),
                        pixels(row["worst_unflagged"]),
                    ]
                    for name, row in rows["methods"].items()
                ],
            ),
            table(
                [f"`{AUTO}`", *(f"σ {blur}" for blur in rows["by_blur"])],
                [
                    [
                        f"within {NEAR} px / flagged",
                        *(
                            f"{row['near']} / {row['flagged']} of {row['trials']}"
                            for row in rows["by_blur"].values()
                        ),
                    ],
                    [
                        "worst not flagged, px",
                        *(pixels(row["worst_unflagged"]) for row in rows["by_blur"].values()),
                    ],
                ],
            ),
        ]
    return lines


def _report_losses(results: Mapping[str, Any]) -> str:
    lines = [
        f"- **loss**, {loss['condition']}, {loss['figure']}: {loss['peer']} {pixels(loss['theirs'])} px, "
        f"`{loss['default']}` {pixels(loss['ours'])} px"
        for loss in results["losses"]
    ]
    lines += [
        f"- **loss**, {row[0]}, {row[1]} cores: {row[4]} {row[5]} ms, {row[2]} {row[3]} ms"
        for row in _speed_rows(results["speed"])
        if "loss" in row[6]
    ]
    return "\n".join(lines) or "None in this run: no peer is ahead in median, 95th percentile or time."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scene", type=Path, default=HERE.parent / "../shared/data/landsat7_rgb.tif", help="an RGB GeoTIFF"
    )
    parser.add_argument("--frames", type=int, default=64, help="per condition")
    parser.add_argument("--trials", type=int, default=200, help="of shifts to 20 px")
    parser.add_argument("--rounds", type=int, default=7, help="of the timings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 frames, 20 trials, 2 rounds: does it run?")
    parser.add_argument("--times", action="store_true", help="the times alone, into the last results")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    add_readme_options(parser)
    options = parser.parse_args()
    ta.fast_memory()
    if options.quick:
        options.frames, options.trials, options.rounds = 8, 20, 2
    if readme_or_run(options, NAME, report):
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.job:
        with torch.no_grad():
            print(json.dumps(JOBS[options.job](options)))
        return
    path = write_results(NAME, run(options))
    print(f"{report(json.loads(path.read_text()))}\n\nwritten to {path.name}")


if __name__ == "__main__":
    main()
