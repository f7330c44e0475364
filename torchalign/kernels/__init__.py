"""What a GPU does in one launch: Triton kernels, each equal to a chain of functions of ``functional`` to rounding.

Those functions define what a kernel must give, and do the work wherever a derivative may be asked for or Triton is
missing; :func:`torchalign._host.kernels_for` chooses. A kernel is an operator of ``torch.ops.torchalign``, so that
``torch.compile`` and ``torch.export`` keep it as one, and fake tensors know the shape of what it gives.

No GPU is needed to prove them: with ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors.

Importing this package imports Triton, which comes with torch's CUDA wheels; ``import torchalign`` does not.
"""

from __future__ import annotations

from torchalign.kernels.ascend import Geometry, ascend_shifted, ascend_warped, look
from torchalign.kernels.assess import assess
from torchalign.kernels.blur import blur
from torchalign.kernels.channel import see
from torchalign.kernels.climb import climb
from torchalign.kernels.contrast import contrast, opened, units
from torchalign.kernels.defects import repeated
from torchalign.kernels.divide import climb_divided, overlaps
from torchalign.kernels.local import differentiate, read_splines, weigh
from torchalign.kernels.peak import peak
from torchalign.kernels.resample import resample
from torchalign.kernels.score import score
from torchalign.kernels.texture import coverage, fill
from torchalign.kernels.turn import common_window, pulls, turn

__all__ = [
    "Geometry",
    "ascend_shifted",
    "ascend_warped",
    "assess",
    "blur",
    "climb",
    "climb_divided",
    "common_window",
    "contrast",
    "coverage",
    "differentiate",
    "fill",
    "look",
    "opened",
    "overlaps",
    "peak",
    "pulls",
    "read_splines",
    "repeated",
    "resample",
    "score",
    "see",
    "turn",
    "units",
    "weigh",
]
