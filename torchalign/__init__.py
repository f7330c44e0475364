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

from torchalign.aligner import Aligner
from torchalign.cascade import Cascade
from torchalign.ecc import ECC
from torchalign.functional.warp import warp
from torchalign.pcc import PCC
from torchalign.types import Alignment, Estimate, Status

if TYPE_CHECKING:
    from torchalign.training import AlignmentCallback as AlignmentCallback
    from torchalign.training import AlignmentCheck as AlignmentCheck
    from torchalign.training import AlignmentLoss as AlignmentLoss
    from torchalign.training import AlignToFirst as AlignToFirst
    from torchalign.training import RandomMisregistration as RandomMisregistration
    from torchalign.training import RandomMisregistration2D as RandomMisregistration2D
    from torchalign.training import RegistrationError as RegistrationError
    from torchalign.training import stream as stream
    from torchalign.xr import align as align

__version__ = "0.1.0"
__all__ = [
    "ECC",
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
    "stream",
    "warp",
]

# where the names live that need more than torch, imported on first use
_LAZY = {
    "AlignToFirst": "torchalign.training",
    "AlignmentCallback": "torchalign.training",
    "AlignmentCheck": "torchalign.training",
    "AlignmentLoss": "torchalign.training",
    "RandomMisregistration": "torchalign.training",
    "RandomMisregistration2D": "torchalign.training",
    "RegistrationError": "torchalign.training",
    "align": "torchalign.xr",
    "stream": "torchalign.training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'torchalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
