"""How long does the whole job take, estimate and warp? torchalign's PCC and satalign's on the same cores.

    python benchmarks/speed.py [--device cuda] [--rounds 7] [--quick]
    python benchmarks/speed.py --update-readme

Every comparison is one process in which the two take turns (A B A B …): what else the machine does hits both.
The process is started with the cores, and the environment, that the comparison is about, since BLAS libraries
read both once. satalign runs in threads, each of which calls OpenBLAS, which starts as many threads again:
that is its default, and it is slow, so it is also measured with one BLAS thread. torchalign uses torch's own
threads, as many as there are cores.

On `--device cuda` torchalign runs there, satalign on all cores of the CPU, as it must.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    add_readme_options,
    cores,
    described,
    machine,
    readme_or_run,
    table,
    versions,
    write_results,
)
from torch import Tensor
from torch.nn import functional as F

import torchalign as ta
from torchalign.datasets import open_demo_scene, simulate_stack
from torchalign.functional.channels import extract_channel
from torchalign.functional.quality import gate
from torchalign.types import Pair

NAME = "speed"
FRAMES, BANDS, SIZE = 256, 4, 256
AIM = 4.0
ONE_BLAS_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS"), "1"
)


def stack(frames: int) -> tuple[Tensor, Tensor]:
    """(T, 4, 256, 256) and its reference: a real chip at whole-pixel shifts. What it shows costs no time."""
    scene = torch.from_numpy(np.array(open_demo_scene().values))
    made = simulate_stack(scene, frames=min(frames, 64), size=(SIZE, SIZE), factor=1, noise=0.003, offset=0.0)
    return made.cube.repeat(math.ceil(frames / 64), 1, 1, 1)[:frames].contiguous(), made.reference


def timed(job: Callable[[], object], device: torch.device) -> float:
    """Seconds: by events on CUDA, which does not wait for the host's clock, else by the clock."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        job()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "median": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "rounds": list(seconds),
    }


# --- jobs: each runs in a process of its own and prints JSON ---


def pair(options: argparse.Namespace) -> dict[str, Any]:
    """torchalign and satalign in turns."""
    from satalign import PCC

    device = torch.device(options.device)
    cube, reference = stack(options.frames)
    numpy_cube, numpy_reference = cube.numpy(), reference.numpy()
    there, there_reference = cube.to(device), reference.to(device)
    aligner = ta.PCC()

    def theirs() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PCC(numpy_cube, numpy_reference, num_threads=cores()).run_multicore()

    def transferred() -> None:
        aligner(cube.to(device), reference.to(device)).aligned.cpu()

    jobs: dict[str, Callable[[], object]] = {
        "torchalign": lambda: aligner(there, there_reference),
        "satalign": theirs,
    }
    if device.type == "cuda":
        jobs["torchalign, with the transfers"] = transferred
    for job in jobs.values():
        timed(job, device)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            seconds[name].append(timed(job, torch.device("cpu") if name == "satalign" else device))
    ratios = [b / a for a, b in zip(seconds["torchalign"], seconds["satalign"], strict=True)]
    return {
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "frames": options.frames,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratio": summary(ratios),
    }


def stages(options: argparse.Namespace) -> dict[str, Any]:
    """Where the time goes, by the public functions that the aligner calls; and the floor under all of it."""
    device = torch.device(options.device)
    cube, reference = (tensor.to(device) for tensor in stack(options.frames))
    aligner = ta.PCC()
    # on the CPU the aligner takes blocks of a million pixels, one a core
    block = options.frames if device.type == "cuda" else max(1, 2**20 // SIZE**2)
    parts = cube.split(block)
    seen_reference = extract_channel(reference[None], aligner.channel)
    prepared = aligner.prepare_reference(seen_reference, None)
    identity = torch.eye(2, 3, device=device)
    steps: dict[str, list[float]] = {}

    def lap(name: str, job: Callable[[], Any]) -> Any:
        results: list[Any] = []
        spent = timed(lambda: results.append(job()), device)
        steps[name][-1] += spent
        return results[0]

    rounds = options.rounds + 1
    for _ in range(rounds):
        for name in (
            "channel",
            "estimate",
            "gate",
            "warp",
            "rfft2",
            "irfft2",
            "ta.warp",
            "grid_sample",
            "whole",
        ):
            steps.setdefault(name, []).append(0.0)
        warps = []
        for part in parts:
            seen = lap("channel", lambda part=part: extract_channel(part, aligner.channel))
            motion = lap(
                "estimate",
                lambda seen=seen: aligner.estimate_motion(
                    Pair(seen, None, seen_reference, None), prepared, None
                ),
            )
            estimate = lap(
                "gate",
                lambda seen=seen, motion=motion: gate(
                    motion.warp, motion.sigma, motion.status, seen, seen_reference, inliers=motion.inliers
                ),
            )
            warps.append(estimate.warp)
            lap("rfft2", lambda seen=seen: torch.fft.rfft2(seen))
            half = torch.zeros(len(part), SIZE // 2, SIZE // 4 + 1, dtype=torch.complex64, device=device)
            lap("irfft2", lambda half=half: torch.fft.irfft2(half))
            moved = identity.expand(len(part), 2, 3) + 0.01
            grid = F.affine_grid(moved, list(part.shape), align_corners=False)
            lap("grid_sample", lambda part=part, grid=grid: _grid_sample(part, grid))
            shifted = identity.repeat(len(part), 1, 1)
            shifted[:, :, 2] = 0.3
            lap("ta.warp", lambda part=part, shifted=shifted: ta.warp(part, shifted))
        warp = torch.cat(warps)
        lap("warp", lambda warp=warp: ta.warp(cube, warp))
        lap("whole", lambda: aligner(cube, reference))
    per_frame = {name: 1e3 * statistics.median(values[1:]) / options.frames for name, values in steps.items()}
    floor = per_frame["rfft2"] + per_frame["irfft2"] + min(per_frame["ta.warp"], per_frame["grid_sample"])
    return {
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "ms_per_frame": per_frame,
        "floor": floor,
        "whole_over_floor": per_frame["whole"] / floor,
    }


def _grid_sample(part: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(part, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flat(options: argparse.Namespace) -> dict[str, Any]:
    """Time per frame against the number of frames."""
    device = torch.device(options.device)
    lengths = [length for length in (16, 64, 256, 1024, 2048) if length <= options.largest]
    cube, reference = (tensor.to(device) for tensor in stack(lengths[-1]))
    aligner = ta.PCC()
    rounds: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(options.rounds + 1):
        for length in lengths:
            # as many frames in every measurement, or the short ones would be all noise
            repeats = max(1, min(256, lengths[-1]) // length)
            spent = timed(
                lambda length=length, repeats=repeats: [
                    aligner(cube[:length], reference) and None for _ in range(repeats)
                ],
                device,
            )
            rounds[length].append(1e3 * spent / (length * repeats))
    return {str(length): summary(values[1:]) for length, values in rounds.items()}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """What `ta.align` needs besides the cube and its result, MiB."""
    import xarray as xr

    device = torch.device(options.device)
    cube, reference = stack(options.frames)
    dims = ("time", "band", "y", "x")
    array = xr.DataArray(cube.numpy(), dims=dims)
    picture = xr.DataArray(reference.numpy(), dims=dims[1:])
    ta.align(array[:2], picture, "pcc", device=options.device, batch_size=2, progress=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _settle()
    aligned, _ = ta.align(
        array, picture, "pcc", device=options.device, batch_size=options.batch_size, progress=False
    )
    peak = _peak()
    return {
        "frames": options.frames,
        "batch_size": options.batch_size,
        "cube_mib": cube.nbytes / 2**20,
        "host_mib": max(0.0, peak - before - aligned.nbytes) / 2**20,
        "device_mib": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
    }


def _settle() -> int:
    """Give back what is free, forget the peak so far; bytes of this process in memory."""
    gc.collect()
    with suppress(OSError, AttributeError):  # Linux with glibc; elsewhere the figures are coarser
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _peak()


def _peak() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or kilobytes * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int | None:
    """Bytes, from the kernel's account of this process."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


JOBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "pair": pair,
    "stages": stages,
    "flat": flat,
    "memory": memory,
}


def start(
    job: str, options: argparse.Namespace, *, core_count: int, environment: Mapping[str, str], **given: int
) -> Any:
    """Run a job in a process that may use only so many cores, and return what it printed."""
    command = [sys.executable, __file__, "--job", job, "--device", options.device]
    given = {"rounds": options.rounds, "largest": options.largest, "threads": core_count, **given}
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    print(f"{job}, {core_count} cores, {given}", file=sys.stderr, flush=True)
    pinned = hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if pinned else set()
    if pinned:
        os.sched_setaffinity(0, sorted(allowed)[:core_count])  # a child inherits it
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, check=True, text=True, stdout=subprocess.PIPE
        )
    finally:
        if pinned:
            os.sched_setaffinity(0, allowed)
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict[str, Any]:
    every = cores()
    counts = [every] if every == 1 or options.device == "cuda" else [every, 1]
    pairs = {}
    for count in counts:
        name = f"{count} core{'s' * (count > 1)}"
        pairs[f"{name}, one BLAS thread"] = start(
            "pair", options, core_count=count, environment=ONE_BLAS_THREAD, frames=options.frames
        )
        if count > 1:  # on one core BLAS has one thread anyway
            # satalign's default is so slow that a third of the rounds must do
            rounds = max(2, options.rounds // 3)
            pairs[f"{name}, default environment"] = start(
                "pair", options, core_count=count, environment={}, frames=options.frames, rounds=rounds
            )
    batches = (8, 32, 128)
    lengths = (128, 512) if options.largest >= 512 else (64, 128)
    return {
        "machine": machine(),
        "versions": versions("torchalign", "torch", "numpy", "satalign", "scikit-image"),
        "device": options.device,
        "load_before": os.getloadavg()[0],
        "frames": options.frames,
        "pairs": pairs,
        # on one core: with more, the aligner's blocks run side by side, and stages cannot be told apart
        "stages": start("stages", options, core_count=counts[-1], environment={}, frames=options.frames),
        "flat": start("flat", options, core_count=every, environment={}),
        "memory": [
            start("memory", options, core_count=every, environment={}, frames=length, batch_size=batch)
            for batch in batches
            for length in lengths
        ],
        "seed": 0,
    }


# --- the report ---


def _milliseconds(seconds: Mapping[str, Any], frames: int) -> str:
    return f"{1e3 * seconds['median'] / frames:.2f} / {1e3 * seconds['p95'] / frames:.2f}"


def report(results: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in results["pairs"].items():
        ratio, frames = entry["ratio"], entry["frames"]
        verdict = "**loss**" if ratio["median"] < 1 else f"{ratio['median']:.1f} ×"
        extra = entry["seconds"].get("torchalign, with the transfers")
        rows.append(
            [
                name,
                _milliseconds(entry["seconds"]["torchalign"], frames),
                *([_milliseconds(extra, frames)] if extra else []),
                _milliseconds(entry["seconds"]["satalign"], frames),
                f"**{verdict}** ({min(ratio['rounds']):.1f}–{max(ratio['rounds']):.1f})".replace(
                    "****", "**"
                ),
                str(len(ratio["rounds"])),
                "met" if ratio["median"] >= AIM else f"**missed** (≥ {AIM:g} ×)",
            ]
        )
    on_cuda = results["device"] == "cuda"
    header = ["", "torchalign", *(["with the transfers"] if on_cuda else []), "satalign"]
    header += ["satalign ÷ torchalign (rounds)", "rounds", "aim"]
    names = ("channel", "estimate", "gate", "warp")
    entry = results["stages"]
    per_frame = entry["ms_per_frame"]
    total = sum(per_frame[stage] for stage in names)
    shares = [
        *(f"{per_frame[stage]:.2f} ({100 * per_frame[stage] / total:.0f} %)" for stage in names),
        f"{per_frame['whole']:.2f}",
        f"{per_frame['rfft2']:.2f} + {per_frame['irfft2']:.2f} + "
        f"{min(per_frame['ta.warp'], per_frame['grid_sample']):.2f} = {entry['floor']:.2f}",
        f"{entry['whole_over_floor']:.1f} ×",
        f"{per_frame['ta.warp']:.2f} / {per_frame['grid_sample']:.2f}",
    ]
    where = "" if on_cuda else f", on {entry['cores']} core"
    times = [entry["median"] for entry in results["flat"].values()]
    kind = "device_mib" if on_cuda else "host_mib"
    lengths = sorted({entry["frames"] for entry in results["memory"]})
    batches = sorted({entry["batch_size"] for entry in results["memory"]})
    used = {(entry["batch_size"], entry["frames"]): entry[kind] for entry in results["memory"]}
    return "\n\n".join(
        [
            f"T = {results['frames']}, C = {BANDS}, {SIZE}², float32, torchalign on {results['device']}. "
            f"{described(results)} Load of the machine before: {results['load_before']:.1f}.",
            "### The whole job, estimate and warp: ms a frame, median / 95th percentile of the rounds",
            table(header, rows),
            f"### Where the time goes, ms a frame{where}; and the floor",
            table(
                [
                    *names,
                    "whole job",
                    "floor: `rfft2` + half-size `irfft2` + bilinear warp",
                    "÷ floor",
                    "`ta.warp` / `grid_sample`",
                ],
                [shares],
            ),
            "The stages are the public functions, called on the aligner's blocks; the floor's warp is the "
            f"faster of `ta.warp` and `grid_sample` of all {BANDS} bands.",
            "### Time a frame against the number of frames, ms, median / 95th percentile",
            table(
                [f"T = {length}" for length in results["flat"]] + ["longest ÷ shortest"],
                [
                    [f"{entry['median']:.2f} / {entry['p95']:.2f}" for entry in results["flat"].values()]
                    + [f"{max(times) / min(times):.2f}"]
                ],
            ),
            "### Peak memory of `ta.align` besides the cube and its result, MiB",
            table(
                ["`batch_size`", *(f"T = {length}" for length in lengths)],
                [[str(batch), *(f"{used[batch, length]:.0f}" for length in lengths)] for batch in batches],
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="of torchalign: cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--largest", type=int, default=2048, help="of the T in the table of time per frame")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 64 frames: does it run?")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    add_readme_options(parser)
    options = parser.parse_args()
    ta.fast_memory()
    if options.quick:
        options.rounds, options.frames, options.largest = 2, 64, 256
    # results of another device stand beside those of the CPU
    name = NAME if options.device == "cpu" else f"{NAME}-{options.device}"
    if options.job:
        torch.set_num_threads(options.threads)  # whatever OMP_NUM_THREADS says
        with torch.no_grad():
            print(json.dumps(JOBS[options.job](options)))
        return
    if readme_or_run(options, name, report):
        return
    path = write_results(name, run(options))
    print(f"{report(json.loads(path.read_text()))}\n\nwritten to {path.name}")


if __name__ == "__main__":
    main()
