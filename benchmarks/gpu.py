"""What does a GPU make of it? Frames per second and the share of the memory bandwidth, stage by stage.

    python benchmarks/gpu.py                       # on the GPU; a minute; writes results/gpu.json
    python benchmarks/gpu.py --compile "PCC()"     # and by torch.compile; minutes; added to results/gpu.json
    python benchmarks/gpu.py --update-readme
    python benchmarks/gpu.py --device cpu --quick  # the same on the CPU, to see that it runs; writes nothing

* **Stages**: channel, reference, estimate, gate, the whole of `PCC()`, and what a general warp costs; each alone,
  repeated, timed by CUDA events. Each is given what it gets inside of the whole: on a GPU that is a mask too, for
  to see that all is finite would be to wait. The *floor* of a stage is the time that its input, read once, and its
  output, written once, take at the measured bandwidth of the device (a large copy); the fraction is floor ÷ time:
  100 % would be a kernel that does nothing but move memory.
* **Every aligner**: the whole job by the wall clock, how many kernels that are, and the device memory it takes;
  then the same in one launch, a CUDA graph, by `torch.cuda.make_graphed_callables`; and, with `--compile`, by
  `torch.compile`.
* **As called**: `ta.align` and `ta.stream` by the wall clock, recording themselves, and with `graph=False`.
* **Streaming**: a cube on the host, larger than a part, through `ta.stream`, by the wall clock; against the copies
  alone (the same cube through `ta.stream`, there and back, nothing computed: pinned buffers and all) and the work
  alone: what of the shorter one is hidden behind the longer one. Below 0 the two were in each other's way.
* **In training**: `AlignmentCheck` on 32 × 4 × 256² against forward and backward of a ResNet-18, in turns.
* **Beside it**: the same `PCC()` and `ECC()` on this machine's CPU, and satalign's if it is installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xarray as xr
from common import (
    add_readme_options,
    cores,
    described,
    machine,
    read_results,
    readme_or_run,
    table,
    versions,
    write_results,
)
from torch import Tensor, nn

import torchalign as ta
from torchalign.training.probe import texture

NAME, BANDS = "gpu", 4


def stack(frames: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(T, 4, size, size) and its reference; whole-pixel shifts, which cost what others do."""
    ground = texture(1, (size + 8, size + 8))[0]
    places = [(t % 7, (3 * t) % 7) for t in range(min(frames, 49))]
    cut = torch.stack([ground[y : y + size, x : x + size] for y, x in places])
    cube = cut[:, None].expand(-1, BANDS, -1, -1).repeat(-(-frames // len(places)), 1, 1, 1)[:frames]
    return cube.to(device), cube[0].to(device)


def seconds(job: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of several runs; the first, which plans and compiles, is not counted."""
    job()
    spent = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            job()
            end.record()
            torch.cuda.synchronize(device)
            spent.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            job()
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def elapsed(job: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The same by the wall clock, from an idle device to an idle device: for what the host has a part in."""
    return seconds(finished(job, device), torch.device("cpu"), rounds)


def finished(job: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The job, and the wait for its end."""

    def whole() -> None:
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bandwidth(device: torch.device, rounds: int, quick: bool) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.zeros(2**24 if quick else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * size_of(source) / seconds(lambda: target.copy_(source), device, rounds)


def stages(frames: int, size: int, device: torch.device, rounds: int, rate: float) -> dict[str, Any]:
    cube, reference = stack(frames, size, device)
    aligner = ta.PCC()
    call = aligner._check(cube, reference, None, None, None)
    seen = aligner._prepare_block(call)

    def estimate() -> Any:
        return aligner.estimate_motion(seen.pair(call), seen.prepared, None)

    motion = estimate()

    def judge() -> Any:
        return aligner._judge([motion], [aligner.max_translation], call, seen)

    warp = judge().warp + 1e-3 * torch.randn(frames, 2, 3, device=device)
    masks = 0 if seen.usable is None else size_of(seen.usable)
    plane = size_of(seen.moving) + masks
    jobs: dict[str, tuple[Callable[[], object], int]] = {
        "channel, and what of it is finite": (
            lambda: aligner._extract_channel(cube, None),
            size_of(cube) + plane,
        ),
        "reference": (lambda: aligner.prepare_reference(call.reference, call.usable), plane // frames),
        "estimate": (estimate, plane),
        "gate": (judge, plane),
        "affine warp, bilinear": (lambda: ta.warp(cube, warp), 2 * size_of(cube)),
        "affine warp, bicubic": (lambda: ta.warp(cube, warp, interpolation="bicubic"), 2 * size_of(cube)),
        "whole, `PCC()`": (lambda: aligner(cube, reference), 2 * size_of(cube)),
    }
    found = {}
    for name, (job, moved) in jobs.items():
        spent = seconds(job, device, rounds)
        found[name] = {"frames_per_second": frames / spent, "of_bandwidth": moved / rate / spent}
    return found


def aligners(frames: int, size: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """The whole job of every method, as it is called and in one launch."""
    cube, reference = stack(frames, size, device)
    makes: dict[str, Callable[[], ta.Aligner]] = {
        "PCC()": ta.PCC,
        "ECC()": ta.ECC,
        'ECC(motion="affine")': lambda: ta.ECC(motion="affine"),
        'ECC(motion="homography")': lambda: ta.ECC(motion="homography"),
        "Cascade(PCC(), ECC())": lambda: ta.Cascade(ta.PCC(), ta.ECC()),
        "LGM()": ta.LGM,
        'LGM(motion="affine")': lambda: ta.LGM(motion="affine"),
    }
    found = {}
    for name, make in makes.items():
        aligner = make().to(device)

        def job(aligner: ta.Aligner = aligner) -> object:
            return aligner(cube, reference)

        entry: dict[str, Any] = {"frames_per_second": frames / elapsed(job, device, rounds)}
        if device.type == "cuda":
            entry |= {"kernels": kernels(job), "mib": memory(job, device)}
            graphed = one_launch(make().to(device), cube, reference)
            spent = elapsed(lambda graphed=graphed: graphed(cube, reference), device, rounds)
            entry |= {"graph_frames_per_second": frames / spent}
        found[name] = entry
    return found


def one_launch(aligner: ta.Aligner, cube: Tensor, reference: Tensor) -> Callable[..., Any]:
    return torch.cuda.make_graphed_callables(aligner, (cube, reference))  # type: ignore[no-untyped-call]


def as_called(frames: int, size: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Frames per second of a cube of 16 batches on the host through `ta.align` and `ta.stream`."""
    part = max(1, frames // 4)
    values, reference = stack(16 * part, size, torch.device("cpu"))
    cube = xr.DataArray(values.numpy(), dims=("time", "band", "y", "x"))
    aligner = functools.partial(ta.PCC().to(device), reference=reference.to(device))
    found = {}
    for graph in (True, False):
        options: dict[str, Any] = {"batch_size": part, "device": device, "graph": graph}
        named = "" if graph else ", graph=False"

        def aligned(options: dict[str, Any] = options, **more: Any) -> None:
            ta.align(cube, reference.numpy(), "pcc", progress=False, **options, **more)

        def streamed(options: dict[str, Any] = options) -> None:
            for _ in ta.stream(aligner, values, **options):
                pass

        jobs: dict[str, Callable[[], object]] = {
            f'ta.align(cube, reference, "pcc"{named})': aligned,
            f'ta.align(cube, reference, "pcc", verify=False{named})': functools.partial(
                aligned, verify=False
            ),
            f"ta.stream(partial(PCC(), reference=reference), cube{named})": streamed,
        }
        found |= {name: len(values) / elapsed(job, device, rounds) for name, job in jobs.items()}
    return found


def compiled(name: str, frames: int, size: int, device: torch.device, rounds: int) -> dict[str, float]:
    """By torch.compile, whole."""
    cube, reference = stack(frames, size, device)
    whole = torch.compile({"PCC()": ta.PCC, "ECC()": ta.ECC}[name]().to(device), fullgraph=True)
    job = finished(lambda: whole(cube, reference), device)
    start = time.perf_counter()
    job()
    found = {"compiling": time.perf_counter() - start}
    return found | {"frames_per_second": frames / elapsed(job, device, rounds)}


def kernels(job: Callable[[], object]) -> int:
    """How many kernels and copies one call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profile.events())


def memory(job: Callable[[], object], device: torch.device) -> float:
    """MiB of device memory that a call takes beyond what it is given."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    job()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def streaming(frames: int, size: int, device: torch.device, rounds: int) -> dict[str, float]:
    part = max(1, frames // 4)
    cube, _ = stack(2 * frames, size, torch.device("cpu"))
    there, reference = stack(part, size, device)
    aligner = functools.partial(ta.PCC().to(device), reference=reference)
    played: Callable[..., Any] = ta.PCC().to(device)
    if device.type == "cuda":
        played = one_launch(ta.PCC().to(device), there, reference)
    parts = -(-len(cube) // part)

    def through(work: Callable[[Tensor], object]) -> Callable[[], None]:
        def job() -> None:
            for _ in ta.stream(work, cube, batch_size=part, device=device):
                pass

        return job

    spent = {
        "copies": elapsed(through(lambda frames: frames), device, rounds),
        "work": parts * elapsed(lambda: played(there, reference), device, rounds),
        "streamed": elapsed(through(aligner), device, rounds),
    }
    shorter = min(spent["copies"], spent["work"])
    hidden = (spent["copies"] + spent["work"] - spent["streamed"]) / shorter if shorter else 0.0
    return spent | {"frames_per_second": len(cube) / spent["streamed"], "hidden": hidden}


def training(size: int, device: torch.device, rounds: int, batch: int = 32) -> dict[str, float]:
    """The check of a batch against a training step on it, in turns."""
    from torchvision.models import resnet18

    model = resnet18()
    model.conv1 = nn.Conv2d(BANDS, 64, 7, stride=2, padding=3, bias=False)
    model = model.to(device)
    moving, reference = stack(batch, size, device)
    reference = reference.expand_as(moving)
    check, whole = ta.AlignmentCheck(), ta.AlignmentCheck(samples=batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(moving).square().mean().backward()

    jobs = {
        "step": finished(step, device),
        "check": finished(lambda: check(moving, reference), device),
        "check_all": finished(lambda: whole(moving, reference), device),
    }
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(1 + rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:  # the first one plans
                spent[name].append(time.perf_counter() - start)
    found = {name: statistics.median(times) for name, times in spent.items()}
    return found | {"batch": batch, "samples": min(batch, check.samples)}


def beside(frames: int, size: int, rounds: int) -> dict[str, float]:
    """Frames per second on this machine's CPU: torchalign's and satalign's."""
    cube, reference = stack(frames, size, torch.device("cpu"))
    found = {}
    for name, aligner in {"PCC": ta.PCC(), "ECC": ta.ECC()}.items():
        spent = seconds(lambda aligner=aligner: aligner(cube, reference), torch.device("cpu"), rounds)
        found[f"torchalign.{name} on the CPU"] = frames / spent
    try:
        import satalign
    except ImportError:
        return found
    arrays = cube.numpy(), reference.numpy()

    def theirs(kind: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind(*arrays, num_threads=cores()).run_multicore()

    for name in ("PCC", "ECC"):
        kind = getattr(satalign, name)
        spent = seconds(lambda kind=kind: theirs(kind), torch.device("cpu"), max(1, rounds // 2))
        found[f"satalign.{name} on the CPU"] = frames / spent
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    rate = bandwidth(device, options.rounds, options.quick)
    with torch.no_grad():
        results: dict[str, Any] = {
            "machine": machine(),
            "versions": versions("torchalign", "torch", "numpy", "satalign"),
            "device": options.device,
            "frames": options.frames,
            "size": options.size,
            "bandwidth": rate,
            "stages": stages(options.frames, options.size, device, options.rounds, rate),
            "aligners": aligners(options.frames, options.size, device, options.rounds),
            "as_called": as_called(options.frames, options.size, device, options.rounds),
            "streaming": streaming(options.frames, options.size, device, options.rounds),
            "beside_frames": min(options.frames, 64),
            "beside": beside(min(options.frames, 64), options.size, max(1, options.rounds // 2)),
        }
    results["training"] = training(
        options.size, device, max(1, options.rounds // 2), 4 if options.quick else 32
    )
    return results


def report(results: Mapping[str, Any]) -> str:
    where = results["machine"].get("gpu", "the CPU") if results["device"] == "cuda" else "the CPU"
    stream, check = results["streaming"], results["training"]
    rows = [
        [name, f"{entry['frames_per_second']:,.0f}", f"{100 * entry['of_bandwidth']:.1f} %"]
        for name, entry in results["stages"].items()
    ]
    rows += [
        [f"`{name}`, {results['beside_frames']} frames", f"{rate:,.0f}", ""]
        for name, rate in results["beside"].items()
    ]
    return "\n\n".join(
        [
            f"{results['frames']} frames of {BANDS} × {results['size']}² on {where}; "
            f"a copy moves {results['bandwidth'] / 1e9:,.0f} GB/s. {described(results)}",
            table(["stage", "frames per second", "of the bandwidth"], rows),
            aligner_table(results["aligners"], results["frames"]),
            *compiled_lines(results.get("compiled", {})),
            *called_table(results.get("as_called", {})),
            f"Streamed from the host, one launch a part: {stream['frames_per_second']:,.0f} frames per second"
            + (
                f"; {100 * stream['hidden']:.0f} % of the shorter of copies and work is hidden behind the longer."
                if results["device"] == "cuda"
                else "; on the CPU there is nothing to hide."
            ),
            training_line(check),
        ]
    )


def aligner_table(found: dict[str, Any], frames: int) -> str:
    if "kernels" not in found["PCC()"]:
        rows = [[f"`{name}`", f"{entry['frames_per_second']:,.0f}"] for name, entry in found.items()]
        return table(["whole job", "frames per second"], rows)
    rows = [
        [
            f"`{name}`",
            f"{entry['frames_per_second']:,.0f}",
            f"{1e3 * frames / entry['frames_per_second']:.1f}",
            str(entry["kernels"]),
            f"{entry['graph_frames_per_second']:,.0f}",
            f"{entry['mib'] / frames:.1f}",
        ]
        for name, entry in found.items()
    ]
    return table(
        [
            "whole job",
            "frames per second",
            "ms a call",
            "kernels",
            "frames per second as a CUDA graph",
            "MiB a frame",
        ],
        rows,
    )


def beside_model(results: Mapping[str, Any]) -> str:
    """One launch as it was measured, beside what launches.py says of 256 frames of 4 × 256²."""
    counted = read_results("launches")
    rows = []
    for name, entry in results["aligners"].items():
        own = counted["aligners"].get(name, {}).get("triton")
        if own is None or "kernels" not in entry:
            continue
        rows.append(
            [
                f"`{name}`",
                f"{entry['kernels']} ({own['launches']})",
                f"{entry['graph_frames_per_second']:,.0f} ({counted['frames'] / own['seconds']:,.0f})",
                f"{entry['frames_per_second']:,.0f}",
            ]
        )
    return table(["measured (model)", "kernels", "frames per second, one launch", "as called"], rows)


def compiled_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}` by `torch.compile`: {entry['frames_per_second']:,.0f} frames per second, after "
        f"{entry['compiling']:.0f} s of compiling."
        for name, entry in found.items()
    ]


def called_table(found: Mapping[str, float]) -> list[str]:
    rows = [[f"`{name}`", f"{rate:,.0f}"] for name, rate in found.items()]
    return [table(["16 batches of a cube on the host, as called", "frames per second"], rows)] if rows else []


def training_line(found: dict[str, float]) -> str:
    share, whole = (100 * found[name] / found["step"] for name in ("check", "check_all"))
    return (
        f"`AlignmentCheck` of {found['samples']} samples of a batch of {found['batch']} (its default): "
        f"{1e3 * found['check']:.0f} ms, {share:.1f} % of a training step of a ResNet-18 on that batch "
        f"({1e3 * found['step']:.0f} ms); of every sample: {1e3 * found['check_all']:.0f} ms, {whole:.1f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--only", choices=["training"], help="measure this part alone, print it, write nothing"
    )
    parser.add_argument(
        "--compile",
        choices=["PCC()", "ECC()"],
        help="by torch.compile alone, added to the last results: minutes",
    )
    parser.add_argument(
        "--quick", action="store_true", help="8 frames of 64², 1 round, nothing written: does it run?"
    )
    add_readme_options(parser)
    options = parser.parse_args()
    if readme_or_run(options, NAME, report):
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here, or a build of torch without CUDA; try --device cpu --quick")
    if options.quick:
        options.frames, options.size, options.rounds = 8, 64, 1
    if options.only:
        found = training(
            options.size, torch.device(options.device), options.rounds, 4 if options.quick else 32
        )
        print(training_line(found))
        return
    if options.compile:
        device, adding = torch.device(options.device), options.device == "cuda" and not options.quick
        results = read_results(NAME) if adding else {}
        if adding and (results["frames"], results["size"]) != (options.frames, options.size):
            raise SystemExit(f"the last results are of {results['frames']} frames of {results['size']}²")
        with torch.no_grad():
            found = compiled(options.compile, options.frames, options.size, device, options.rounds)
        print("\n".join(compiled_lines({options.compile: found})))
        if adding:
            write_results(
                NAME, results | {"compiled": results.get("compiled", {}) | {options.compile: found}}
            )
        return
    results = run(options)
    if not options.quick and options.device == "cuda":
        path = write_results(NAME, results)
        print(f"written to {path.name}")
        results = json.loads(path.read_text())
    print(report(results))
    if options.device == "cuda" and (options.frames, options.size) == (256, 256):
        print(beside_model(results))


if __name__ == "__main__":
    main()
