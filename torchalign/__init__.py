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

if TYPE_CHECKING:
    from torchalign import datasets as datasets
    from torchalign import functional as functional
    from torchalign import html as html
    from torchalign import io as io
    from torchalign import models as models
    from torchalign import plot as plot
    from torchalign import report as report
    from torchalign import training as training
    from torchalign import types as types
    from torchalign import xr as xr
    from torchalign._host import fast_memory as fast_memory
    from torchalign.aligner import Aligner as Aligner
    from torchalign.cascade import Cascade as Cascade
    from torchalign.ecc import ECC as ECC
    from torchalign.functional.warp import warp as warp
    from torchalign.groupwise import Groupwise as Groupwise
    from torchalign.io import open_stack as open_stack
    from torchalign.io import write_stack as write_stack
    from torchalign.lgm import LGM as LGM
    from torchalign.local import Local as Local
    from torchalign.pcc import PCC as PCC
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
    from torchalign.types import Alignment as Alignment
    from torchalign.types import Estimate as Estimate
    from torchalign.types import ShiftField as ShiftField
    from torchalign.types import Status as Status
    from torchalign.xr import align as align
    from torchalign.xr import apply as apply
    from torchalign.xr import extend as extend

__version__ = "0.1.0"

# Where the names live. Nothing is imported before the first use, not even torch, so that the command line can
# answer Ctrl-C while it is imported.
_CORE = ("aligner", "cascade", "ecc", "groupwise", "lgm", "local", "pcc")
_MODULES = (
    *_CORE,
    "datasets",
    "functional",
    "html",
    "io",
    "models",
    "plot",
    "report",
    "training",
    "types",
    "xr",
)
_HOMES = {
    "Aligner": "aligner",
    "Cascade": "cascade",
    "ECC": "ecc",
    "Groupwise": "groupwise",
    "LGM": "lgm",
    "Local": "local",
    "PCC": "pcc",
    "fast_memory": "_host",
    "warp": "functional.warp",
    **dict.fromkeys(("Alignment", "Estimate", "ShiftField", "Status"), "types"),
    **dict.fromkeys(("align", "apply", "extend"), "xr"),
    **dict.fromkeys(("load_report", "save_report", "summarize", "to_table"), "report"),
    **dict.fromkeys(("open_stack", "write_stack"), "io"),
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
        "training",
    ),
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _MODULES:
        raise AttributeError(f"module 'torchalign' has no attribute {name!r}")
    for module in _CORE:
        importlib.import_module(f"torchalign.{module}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"torchalign.{_HOMES[name]}"), name)
    return importlib.import_module(f"torchalign.{name}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
