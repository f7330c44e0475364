"""weights."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

Weights = str | os.PathLike[str] | Mapping[str, Tensor]
