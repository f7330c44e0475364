"""In the training loop: misregister on purpose, check augmentations, losses, align inside a model, stream.

What each needs besides torch is imported on first use: torchvision for :class:`RandomMisregistration` and
:class:`AlignmentCheck`, kornia for :class:`RandomMisregistration2D`, torchmetrics for :class:`RegistrationError`,
lightning for :class:`AlignmentCallback`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchalign._check import message

if TYPE_CHECKING:
    from torchalign.training.check import AlignmentCheck as AlignmentCheck
    from torchalign.training.embed import AlignToFirst as AlignToFirst
    from torchalign.training.kornia import RandomMisregistration2D as RandomMisregistration2D
    from torchalign.training.lightning import AlignmentCallback as AlignmentCallback
    from torchalign.training.loss import AlignmentLoss as AlignmentLoss
    from torchalign.training.metric import RegistrationError as RegistrationError
    from torchalign.training.misregistration import RandomMisregistration as RandomMisregistration
    from torchalign.training.streaming import stream as stream

_HOMES = {
    "AlignToFirst": "embed",
    "AlignmentCallback": "lightning",
    "AlignmentCheck": "check",
    "AlignmentLoss": "loss",
    "RandomMisregistration": "misregistration",
    "RandomMisregistration2D": "kornia",
    "RegistrationError": "metric",
    "stream": "streaming",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            home = importlib.import_module(f"torchalign.training.{_HOMES[name]}")
        except ModuleNotFoundError as error:
            cure = 'pip install "torchalign[training]"'
            expected = f"the package {error.name}"
            raise ImportError(message(name, expected, "no such package", cure)) from error
        return getattr(home, name)
    raise AttributeError(f"module 'torchalign.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
