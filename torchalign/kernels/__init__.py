"""What a GPU does in one launch: Triton kernels, each equal to a chain of functions of ``functional`` to rounding.

Those functions define what a kernel must give, and do the work wherever a derivative may flow or Triton is missing;
:func:`torchalign._host.kernels_for` chooses. A kernel is an operator of ``torch.ops.torchalign``, so that
``torch.compile`` and ``torch.export`` keep it as one, and fake tensors know the shape of what it gives.

No GPU is needed to prove them: with ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors.

Importing this package imports Triton, which comes with torch's CUDA wheels; ``import torchalign`` does not.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
import warnings
from pathlib import Path

import torch
import triton

from torchalign.kernels.alike import alike
from torchalign.kernels.ascend import Geometry, ascend_shifted, ascend_warped, look
from torchalign.kernels.assess import assess
from torchalign.kernels.blur import blur
from torchalign.kernels.channel import see
from torchalign.kernels.climb import climb
from torchalign.kernels.contrast import contrast, shares, units
from torchalign.kernels.defects import repeated
from torchalign.kernels.divide import climb_divided, overlaps
from torchalign.kernels.local import differentiate, read_splines, weigh
from torchalign.kernels.peak import peak
from torchalign.kernels.resample import resample
from torchalign.kernels.score import score
from torchalign.kernels.texture import coverage, fill
from torchalign.kernels.turn import common_window, cross, pulls, turn

__all__ = [
    "Geometry",
    "alike",
    "ascend_shifted",
    "ascend_warped",
    "assess",
    "blur",
    "climb",
    "climb_divided",
    "common_window",
    "contrast",
    "coverage",
    "cross",
    "differentiate",
    "fill",
    "look",
    "overlaps",
    "peak",
    "pulls",
    "read_splines",
    "repeated",
    "resample",
    "score",
    "see",
    "shares",
    "turn",
    "units",
    "weigh",
    "work_on",
]

# The oldest that knows all that the kernels are written in; torch 2.7 brings it.
_OLDEST = (3, 3)


# Of the GPUs: whether a kernel has run, and until when that stands.
_known: dict[int, tuple[bool, float]] = {}
_PAUSE = 5.0  # seconds: an aligner asks some 30 times a call, and a try may compile
_trying = threading.Lock()
_INNER = f"{Path(__file__).parents[1]}{os.sep}", f"{Path(str(torch.__file__)).parent}{os.sep}"


def work_on(index: int, *, tries: bool = True) -> bool:
    """Whether a kernel compiles and is launched on a GPU. Where not, a warning says why, once for each.

    Triton wants a compiler of C at its first launch, which slim images lack: that stays so. Memory or a disk that is
    full, and other troubles, may pass: seconds later it is tried again. Without ``tries`` what is known is told.
    """
    with _trying:
        works, stands = _known.get(index, (True, 0.0))
        if not tries or time.monotonic() < stands:
            return works
        try:
            if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
                raise ImportError(f"Triton {triton.__version__}, which is too old")
            with torch.no_grad():
                ones = torch.ones(1, 1, device=torch.device("cuda", index))
                blur(ones, ones[0])
            _known[index] = True, math.inf
            return True
        except Exception as error:  # whatever Triton, the compilers it calls or the driver complain of
            stays = isinstance(error, (ImportError, triton.CompilationError)) or "C compiler" in str(error)
            _known[index] = False, math.inf if stays else time.monotonic() + _PAUSE
            got = f"{type(error).__name__}: {error}".splitlines()[0]
    if works:  # nothing was known against it
        expected = f"a Triton of {'.'.join(map(str, _OLDEST))} or later that compiles for this GPU"
        cure = "all runs without it, and takes several times as long; TORCHALIGN_KERNELS=0 does so without this warning"
        files = [frame.filename for frame in reversed(traceback.extract_stack())]
        level = next((number for number, file in enumerate(files, 1) if not file.startswith(_INNER)), 1)
        warnings.warn(f"kernels: expected {expected}, got {got}; {cure}", RuntimeWarning, stacklevel=level)
    return False
