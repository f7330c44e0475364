"""What would a GPU be asked for? Launches and bytes of every aligner, counted on a machine that has none.

    python benchmarks/launches.py                  # a minute; writes results/launches.json
    python benchmarks/launches.py --only PCC       # one aligner, stage by stage; writes nothing
    python benchmarks/launches.py --update-readme

Tensors on a fake CUDA device (``FakeTensorMode``) run through the aligners: shapes and devices are real, values are
not. Every operator that is no view is one launch; it moves what it reads (an expanded tensor once, a gather no more
than four times what it gives) and what it writes. An operator of ``torchalign.kernels`` is one launch: it reads its
tensors and writes its results once. Copies to and from the host are not counted, for there are none.

* **Model**: t = 3.3 µs × launches + bytes ÷ 2.5 TB/s, which agreed to 8 % with what an H100 took in one launch (a
  CUDA graph), aligner by aligner. As called, the host needs some 17 µs a launch and more.
* **Floor**: the cube read and written once.
* **Peak**: the largest sum of tensors alive at a time, beside the cube and the reference, in cubes; what operators
  take inside themselves is not in it.
* **Without Triton**: the same with the functions of torch alone, as where Triton is missing or a gradient is asked.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.utils._pytree as pytree
from common import (
    add_readme_options,
    read_results,
    table,
    update_readme,
    versions,
    write_results,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import torchalign as ta

NAME = "launches"
FRAMES, BANDS, SIZE = 256, 4, 256
# seconds a launch, bytes a second: fitted to results/gpu.json, see the docstring
LAUNCH, BANDWIDTH = 3.3e-6, 2.5e12

ALIGNERS: dict[str, Callable[[], ta.Aligner]] = {
    "PCC()": ta.PCC,
    "ECC()": ta.ECC,
    'ECC(motion="affine")': lambda: ta.ECC(motion="affine"),
    'ECC(motion="homography")': lambda: ta.ECC(motion="homography"),
    "Cascade(PCC(), ECC())": lambda: ta.Cascade(ta.PCC(), ta.ECC()),
    "LGM()": ta.LGM,
    'LGM(motion="affine")': lambda: ta.LGM(motion="affine"),
    "Local()": ta.Local,
}

# what allocates, renames or asks, and launches nothing
_NOTHING = (
    "aten.empty",
    "aten.new_empty",
    "aten.detach",
    "aten.alias",
    "aten._unsafe_view",
    "aten.lift_fresh",
    "aten.set_",
    "aten.is_same_size",
    "prim.",
)
_GATHERS = ("aten.gather", "aten.index_select", "aten.index.", "aten.grid_sampler")
# the outermost of these functions on the stack names the stage
_STAGES = {
    "prepare_reference": "reference",
    "_see": "channel",
    "gate_stages": "gate",
    "translate": "warp",
    "resample": "warp",
    "phase_correlation": "phase correlation",
    "align_ecc": "ECC",
    "estimate_shifts": "local shifts",
}


class Launch(NamedTuple):
    """One operator: what it is called, bytes, and the functions of torchalign that it was called from."""

    name: str
    moved: int
    stack: tuple[tuple[str, str], ...]  # (module, function), outermost first

    @property
    def stage(self) -> str:
        """The part of a call that it belongs to."""
        for _, function in self.stack:
            if function in _STAGES:
                return _STAGES[function]
        inner = [entry for entry in self.stack if entry[0].startswith(("functional", "models"))]
        return inner[0][1].strip("_") if inner else "the call itself"


class Counter(TorchDispatchMode):
    """Lists launches, and follows what is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def leave_out(self, *tensors: Tensor) -> None:
        """What is there before the call counts for no peak."""
        self._before |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        written = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        self._follow(written)
        name = str(operator)
        if _is_view(operator) or name.startswith(_NOTHING):
            return out
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        writes = sum(map(size_of, written))
        if name.startswith(_GATHERS):
            reads = sum(min(size_of(tensor), 4 * writes) for tensor in read)
        elif name.startswith("aten.copy_"):
            reads = size_of(read[1])
        elif name.startswith(("aten.fill_", "aten.zero_")):
            reads = 0
        else:
            reads = sum(map(size_of, read))
        self.launches.append(Launch(name, reads + writes, _stack()))
        return out

    def _follow(self, tensors: list[Tensor]) -> None:
        grown = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._alive.get(storage._cdata)
            if storage._cdata not in self._before and (known is None or known[0].expired()):
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                grown = True
        if grown:  # no view or write in place makes a peak
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def _is_view(operator: Any) -> bool:
    aliases = [value.alias_info for value in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def size_of(tensor: Tensor) -> int:
    """Bytes; what is expanded counts once."""
    samples = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        samples *= length if stride else 1
    return samples


def _stack() -> tuple[tuple[str, str], ...]:
    found, frame = [], sys._getframe(2)
    while frame is not None:
        found.append(_place(frame.f_code))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(place for place in reversed(found) if place is not None)


@functools.cache
def _place(code: CodeType) -> tuple[str, str] | None:
    """The module and the function, if they are torchalign's."""
    path = Path(code.co_filename)
    if "torchalign" not in path.parts[:-1]:
        return None
    package = len(path.parts) - 1 - path.parts[::-1].index("torchalign")
    return ".".join(path.with_suffix("").parts[package + 1 :]), code.co_name


def count(
    make: Callable[[], Any],
    *,
    frames: int = FRAMES,
    bands: int = BANDS,
    size: tuple[int, int] = (SIZE, SIZE),
    triton: bool = True,
) -> Counter:
    """What one call launches; a first one, whose constants are kept, is not counted."""
    if torch.version.cuda is None:
        raise SystemExit("fake CUDA tensors need a build of torch with CUDA; this one has none")
    with (
        torch.backends.cudnn.flags(enabled=False),
        mock.patch("torchalign._host.HAS_TRITON", triton),
        mock.patch("torchalign._host.may_keep", return_value=True),  # as it is where nothing is fake
        mock.patch("torchalign._host._stream_of", return_value=None),
        mock.patch("torchalign._host._is_recording", return_value=False),
        mock.patch.dict("torchalign._host._TABLES", clear=True),
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # about the missing driver
        model = make().to("cuda")
        cube = torch.empty(frames, bands, *size, device="cuda")
        reference = torch.empty(bands, *size, device="cuda")
        model(cube, reference)
        with Counter() as counter:
            counter.leave_out(cube, reference)
            model(cube, reference)
    return counter


def summary(counter: Counter, cube: int) -> dict[str, Any]:
    """The counts, whole and by stage."""
    stages: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0])
    for launch in counter.launches:
        stages[launch.stage][0] += 1
        stages[launch.stage][1] += launch.moved
    moved = sum(launch.moved for launch in counter.launches)
    return {
        "launches": len(counter.launches),
        "gigabytes": moved / 1e9,
        "seconds": LAUNCH * len(counter.launches) + moved / BANDWIDTH,
        "peak_cubes": counter.peak / cube,
        "stages": {
            name: {"launches": int(number), "gigabytes": bytes_ / 1e9}
            for name, (number, bytes_) in sorted(stages.items(), key=lambda entry: -entry[1][0])
        },
    }


def run(names: list[str]) -> dict[str, Any]:
    """All that is asked for, with Triton and without."""
    cube = 4 * FRAMES * BANDS * SIZE**2
    found = {}
    for name in names:
        found[name] = {
            "triton": summary(count(ALIGNERS[name]), cube),
            "torch": summary(count(ALIGNERS[name], triton=False), cube),
        }
        print(f"{name}: {found[name]['triton']['launches']} launches", flush=True)
    return {
        "versions": versions("torchalign", "torch"),
        "frames": FRAMES,
        "bands": BANDS,
        "size": SIZE,
        "floor_gigabytes": 2 * cube / 1e9,
        "aligners": found,
    }


def report(results: Mapping[str, Any]) -> str:
    """For benchmarks/README.md."""
    floor = results["floor_gigabytes"]
    rows = []
    for name, found in results["aligners"].items():
        own, plain = found["triton"], found["torch"]
        rows.append(
            [
                f"`{name}`",
                f"{own['launches']:,}",
                f"{own['gigabytes']:.3g}",
                f"{own['gigabytes'] / floor:.1f} ×",
                f"{1e3 * own['seconds']:.2f}",
                f"{results['frames'] / own['seconds']:,.0f}",
                f"{own['peak_cubes']:.1f}",
                f"{plain['launches']:,} / {plain['gigabytes']:.3g}",
            ]
        )
    header = ["whole job", "launches", "GB", "of the floor", "ms in one launch, model", "frames per second"]
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join(
        [
            f"{results['frames']} frames of {results['bands']} × {results['size']}², float32, no mask, counted on "
            f"fake CUDA tensors; the cube read and written once is {floor:.2f} GB. {packages}.",
            table([*header, "peak, cubes", "torch alone: launches / GB"], rows),
            "`PCC()` by stage:",
            stage_table(results["aligners"]["PCC()"]),
        ]
    )


def stage_table(found: Mapping[str, Any]) -> str:
    """One aligner, stage by stage."""
    names = list(dict.fromkeys([*found["triton"]["stages"], *found["torch"]["stages"]]))
    none = {"launches": 0, "gigabytes": 0.0}
    rows = []
    for name in names:
        own, plain = (found[way]["stages"].get(name, none) for way in ("triton", "torch"))
        rows.append(
            [
                name,
                f"{own['launches']}",
                f"{own['gigabytes']:.2f}",
                f"{plain['launches']}",
                f"{plain['gigabytes']:.2f}",
            ]
        )
    return table(["stage", "launches", "GB", "launches, torch alone", "GB, torch alone"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="the aligners whose name begins so, by stage; nothing is written")
    add_readme_options(parser)
    options = parser.parse_args()
    if options.update_readme or options.check_readme:
        update_readme(NAME, report(read_results(NAME)), check=options.check_readme)
        return
    if options.only:
        names = [name for name in ALIGNERS if name.startswith(options.only)]
        for name, found in run(names)["aligners"].items():
            for way in ("triton", "torch"):
                own = found[way]
                print(
                    f"{name}, {way}: {own['launches']} launches, {own['gigabytes']:.2f} GB, "
                    f"{1e3 * own['seconds']:.2f} ms, peak {own['peak_cubes']:.1f} cubes"
                )
            print(stage_table(found))
        return
    path = write_results(NAME, run(list(ALIGNERS)))
    print(f"written to {path.name}")
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
