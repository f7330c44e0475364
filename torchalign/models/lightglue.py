"""LightGlue, batched."""

from __future__ import annotations

from torch import nn

from torchalign.models.weights import Weights

__all__ = ["build_matcher"]


def build_matcher(
    feature_model: str, *, weights: Weights | None = None, allow_download: bool = False
) -> nn.Module:
    """A Module: forward(features0, features1, size) -> Matches. (To come.)"""
    raise NotImplementedError(feature_model)
