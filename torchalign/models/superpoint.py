"""SuperPoint (DeTone et al. 2018, arXiv:1712.07629): one shared encoder, a detector head, a descriptor head.

Two layouts of weights are loaded, told apart by their names:

- the official one, ``conv1a`` … ``convDb``: convolution, ReLU;
- the open re-implementation's, ``backbone.*``, ``detector.*``, ``descriptor.*``: convolution, ReLU, batch
  normalisation; with any number of input channels.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchalign._check import message
from torchalign.models.weights import load_into

__all__ = ["CELL", "SuperPointNet"]

CELL = 8  # pixels of the image a side of a cell of the coarse maps
_WIDTHS = (64, 64, 128, 128)  # channels of the encoder's four stages, halved in size between
_HEAD = 256
# Where the official layout's layers are in this one.
_OFFICIAL = re.compile(r"conv([1-4PD])([ab])\.(.+)")
_HOMES = {"P": "detector", "D": "descriptor"} | {str(stage + 1): f"backbone.{stage}" for stage in range(4)}


class SuperPointNet(nn.Module):
    """The network: (B, C, H, W), sides multiples of 8 → where keypoints are, and their descriptors.

    Args:
        channels: C, 1 but for special sensors.
        batch_norm: the open re-implementation's layout.
    """

    def __init__(self, channels: int = 1, *, batch_norm: bool = False) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, size: int = 3, *, activate: bool = True) -> nn.Sequential:
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            parts["conv"] = nn.Conv2d(inputs, outputs, size, padding=size // 2)
            if activate:  # but in the last layer of a head
                parts["relu"] = nn.ReLU()
            if batch_norm:
                parts["bn"] = nn.BatchNorm2d(outputs, eps=1e-3)
            return nn.Sequential(parts)

        def head(outputs: int) -> nn.Sequential:
            return nn.Sequential(layer(_WIDTHS[-1], _HEAD), layer(_HEAD, outputs, 1, activate=False))

        self.channels = channels
        self.batch_norm = batch_norm
        pairs = zip((channels, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        self.backbone = nn.Sequential(
            *(nn.Sequential(layer(inputs, outputs), layer(outputs, outputs)) for inputs, outputs in pairs)
        )
        self.detector = head(CELL**2 + 1)
        self.descriptor = head(_HEAD)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of a keypoint at every pixel (B, H, W); unit descriptors of cells (B, 256, H/8, W/8)."""
        for number, stage in enumerate(self.backbone):
            image = stage(image if number == 0 else F.max_pool2d(image, 2))
        # 64 pixels of a cell, and "none of them"
        logits = self.detector(image).log_softmax(1)[:, :-1]
        return F.pixel_shuffle(logits, CELL).squeeze(1), F.normalize(self.descriptor(image), dim=1)

    def sample(self, descriptors: Tensor, points: Tensor) -> Tensor:
        """Unit descriptors (B, K, 256) at points (B, K, 2), (x, y) in pixels of the image."""
        height, width = descriptors.shape[-2:]

        def place(coordinate: Tensor, cells: int) -> Tensor:
            if self.batch_norm:
                return (coordinate + 0.5) * (2 / (CELL * cells)) - 1
            # the official sampling, which matchers were trained with, scales by a bit less than a cell
            return (coordinate - CELL / 2 + 0.5) * (2 / (CELL * cells - CELL / 2 - 0.5)) - 1

        grid = torch.stack((place(points[..., 0], width), place(points[..., 1], height)), -1)
        read = F.grid_sample(descriptors, grid.unsqueeze(1), align_corners=not self.batch_norm)
        return F.normalize(read.squeeze(2), dim=1).transpose(1, 2)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> SuperPointNet:
        """The network that these weights are for, strictly loaded.

        Raises:
            ValueError: they are of neither layout.
        """
        if "conv1a.weight" in tensors:
            tensors = {_open_name(name): tensor for name, tensor in tensors.items()}
        first = tensors.get("backbone.0.0.conv.weight")
        if first is None or first.ndim != 4:
            expected = "names like conv1a.weight or backbone.0.0.conv.weight"
            got, cure = f"{list(tensors)[:3]} …", "give weights of SuperPoint"
            raise ValueError(message("weights for superpoint", expected, got, cure))
        with torch.device("cpu"):
            network = cls(first.shape[1], batch_norm="backbone.0.0.bn.weight" in tensors)
        load_into(network, tensors, "weights for superpoint")
        return network


def _open_name(name: str) -> str:
    """``conv2b.bias`` → ``backbone.1.1.conv.bias``, ``convPa.weight`` → ``detector.0.conv.weight``."""
    match = _OFFICIAL.fullmatch(name)
    return f"{_HOMES[match[1]]}.{'ab'.index(match[2])}.conv.{match[3]}" if match else name
