"""torchalign: multi-temporal image co-registration in PyTorch.

A stack of frames of one place is brought onto a reference, to a hundredth of a pixel, the whole stack in one
batch, and every frame comes back with numbers that say how far it can be trusted::

    import torchalign as ta

    aligned, estimate = ta.PCC()(cube, reference)     # tensors
    aligned, report = ta.align(datacube, "median")    # xarray
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchalign._host import fast_memory
from torchalign.aligner import Aligner
from torchalign.cascade import Cascade
from torchalign.ecc import ECC
from torchalign.functional.warp import warp
from torchalign.lgm import LGM
from torchalign.pcc import PCC
from torchalign.types import Alignment, Estimate, Status

if TYPE_CHECKING:
    from torchalign import datasets as datasets
    from torchalign import html as html
    from torchalign import io as io
    from torchalign import plot as plot
    from torchalign import report as report
    from torchalign import training as training
    from torchalign import xr as xr
    from torchalign.io import open_stack as open_stack
    from torchalign.io import write_stack as write_stack
    from torchalign.report import load_report as load_report
    from torchalign.report import save_report as save_report
    from torchalign.report import summarize as summarize
    from torchalign.report import to_table as to_table
    from torchalign.training import AlignmentCallback as AlignmentCallback
    from torchalign.training import AlignmentCheck as AlignmentCheck
    from torchalign.training import AlignmentLoss as AlignmentLoss
    from torchalign.training import AlignToFirst as AlignToFirst
    from torchalign.training import RandomMisregistration as RandomMisregistration
    from torchalign.training import RandomMisregistration2D as RandomMisregistration2D
    from torchalign.training import RegistrationError as RegistrationError
    from torchalign.training import stream as stream
    from torchalign.xr import align as align
    from torchalign.xr import apply as apply

__version__ = "0.1.0"
__all__ = [
    "ECC",
    "LGM",
    "PCC",
    "AlignToFirst",
    "Aligner",
    "Alignment",
    "AlignmentCallback",
    "AlignmentCheck",
    "AlignmentLoss",
    "Cascade",
    "Estimate",
    "RandomMisregistration",
    "RandomMisregistration2D",
    "RegistrationError",
    "Status",
    "align",
    "apply",
    "fast_memory",
    "load_report",
    "open_stack",
    "save_report",
    "stream",
    "summarize",
    "to_table",
    "warp",
    "write_stack",
]

# where the names live that need more than torch, imported on first use
_LAZY = {
    **dict.fromkeys(("align", "apply"), "torchalign.xr"),
    **dict.fromkeys(("load_report", "save_report", "summarize", "to_table"), "torchalign.report"),
    **dict.fromkeys(("open_stack", "write_stack"), "torchalign.io"),
    **dict.fromkeys(
        (
            "AlignToFirst",
            "AlignmentCallback",
            "AlignmentCheck",
            "AlignmentLoss",
            "RandomMisregistration",
            "RandomMisregistration2D",
            "RegistrationError",
            "stream",
        ),
        "torchalign.training",
    ),
}
# and the modules that are attributes of this one
_MODULES = ("datasets", "html", "io", "plot", "report", "training", "xr")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"torchalign.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'torchalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
