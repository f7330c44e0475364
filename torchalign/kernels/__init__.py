# ruff: noqa: F401 (who is handed this package looks the operators up in it)
"""What a GPU does in one launch: Triton kernels, each equal to a chain of functions of ``functional`` to rounding.

Those functions define what a kernel must give, and do the work wherever a derivative may flow or Triton is missing;
:func:`torchalign._host.kernels_for` chooses. A kernel is an operator of ``torch.ops.torchalign``, so that
``torch.compile`` and ``torch.export`` keep it as one, and fake tensors know the shape of what it gives. Shapes are
written beside the arguments of the kernel: an operator takes leading dimensions (..., T) where that has N frames.

No GPU is needed to prove them: with ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors.

Importing this package imports Triton, which comes with torch's CUDA wheels; ``import torchalign`` does not.
"""

from __future__ import annotations

import math
import threading
import time

import torch
import triton

from torchalign.kernels.alike import alike
from torchalign.kernels.ascend import ascend_shifted, ascend_warped, look
from torchalign.kernels.assess import assess
from torchalign.kernels.blur import blur
from torchalign.kernels.channel import see
from torchalign.kernels.climb import climb, overlaps
from torchalign.kernels.defects import repeated
from torchalign.kernels.local import differentiate, read_splines, weigh
from torchalign.kernels.peak import peak
from torchalign.kernels.resample import resample
from torchalign.kernels.score import score
from torchalign.kernels.texture import contrast, coverage, fill, shares, units
from torchalign.kernels.turn import common_window, cross, pulls, turn

# The oldest Triton that knows all that the kernels are written in; torch 2.7 brings it.
OLDEST = "3.3"

# Of the GPUs: whether a kernel has run, and until when that stands.
_known: dict[int, tuple[bool, float]] = {}
_PAUSE = 5.0  # seconds: an aligner asks some 30 times a call, and a try may compile
_trying = threading.Lock()


def work_on(index: int, *, tries: bool = True) -> tuple[bool, str]:
    """Whether a kernel compiles and is launched on a GPU; and why not, once for each.

    Triton wants a compiler of C at its first launch, which slim images lack: that stays so. Memory or a disk that is
    full, and other troubles, may pass: seconds later it is tried again. Without ``tries`` what is known is told.
    """
    with _trying:
        works, stands = _known.get(index, (True, 0.0))
        if not tries or time.monotonic() < stands:
            return works, ""
        try:
            oldest, own = (tuple(map(int, name.split(".")[:2])) for name in (OLDEST, triton.__version__))
            if own < oldest:
                raise ImportError(f"Triton {triton.__version__}, which is too old")
            with torch.no_grad():
                ones = torch.ones(1, 1, device=torch.device("cuda", index))
                blur(ones, ones[0])
            _known[index] = True, math.inf
            return True, ""
        except Exception as error:  # whatever Triton, the compilers it calls or the driver complain of
            stays = isinstance(error, (ImportError, triton.CompilationError)) or "C compiler" in str(error)
            _known[index] = False, math.inf if stays else time.monotonic() + _PAUSE
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return False, reason if works else ""  # where something was known against it, it has been told
