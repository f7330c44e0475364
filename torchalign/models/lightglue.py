r"""LightGlue in batches: all pairs at once, padded and masked, with the results of one pair at a time.

The layers are kornia's and so are the weights; the forward pass is written anew, because theirs is for one pair
(padding changes its results, batches lose the early stop). What differs:

- Padding takes part in nothing: it is masked in self-attention, in cross-attention and in the assignment.
- What is known of the reference alone (its projection, positions and first self-attention) is computed once.
- Attention goes through ``scaled_dot_product_attention``, without a K × K matrix in memory.
- A pair that is sure of 95 % of its points stops early, as in the paper. On the CPU, where reading a number costs
  nothing, pairs are worked on one at a time without any padding, on a core each, and simply stop: batches do not
  pay there. Elsewhere every pair takes all layers, but one that is sure stays as it is: the matches are the same.
- Points are not pruned on the way: how many remain would be a shape that depends on the data.
- A frame without keypoints has no matches.

References:
    Lindenberger, Sarlin & Pollefeys 2023, arXiv:2306.13643.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchalign._check import message
from torchalign._host import is_on_host, map_on_host
from torchalign.functional.matching import Matches
from torchalign.models.extractors import Features
from torchalign.models.weights import Weights, check_placed, load_into, load_weights
from torchalign.types import combine, each_field

__all__ = ["LightGlue", "build_matcher"]

# The weights' name of every feature model that there are any for, and what differs from LightGlue's defaults.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "superpoint": ("lightglue-superpoint", {"input_dim": 256}),
    "disk": ("lightglue-disk", {"input_dim": 128}),
    "aliked": ("lightglue-aliked", {"input_dim": 128}),
    "aliked-n16": ("lightglue-aliked", {"input_dim": 128}),
    # Trained with n16. On a real pair, of 256 keypoints of n16, n16rot and n32 218, 211 and 135 were matched, 212,
    # 187 and 129 of them within a pixel of the truth.
    "aliked-n16rot": ("lightglue-aliked", {"input_dim": 128}),
    "aliked-n32": ("lightglue-aliked", {"input_dim": 128}),
    "sift": ("lightglue-sift", {"input_dim": 128, "add_scale_ori": True}),
    "doghardnet": (
        "lightglue-doghardnet",
        {"input_dim": 128, "add_scale_ori": True, "depth_confidence": -1.0},
    ),
    "xfeat": (
        "lightglue-xfeat",
        {"input_dim": 64, "descriptor_dim": 96, "n_layers": 6, "num_heads": 1, "depth_confidence": -1.0},
    ),
}


class _Tokens(NamedTuple):
    """One side of the pairs on its way through the layers."""

    states: Tensor  # (B, K, D)
    positions: Tensor  # (2, B, 1, K, D / heads), cosines and sines
    valid: Tensor | None  # (B, K); None: all


class LightGlue(nn.Module):
    """Matches of local features by attention within and between two sets of keypoints.

    Args:
        network: :class:`kornia.feature.LightGlue` with its weights.
        threshold: least probability of a match.
        depth_confidence: share of a pair's points that must be sure for it to stop early; ≤ 0 for never.
    """

    network: Any  # kornia's, without types

    def __init__(self, network: nn.Module, *, threshold: float = 0.1, depth_confidence: float = 0.95) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.threshold = threshold
        self.depth_confidence = depth_confidence
        self.with_scales = self.network.posenc.Wr.in_features == 4
        self.train(False)

    def forward(self, features0: Features, features1: Features, size: Sequence[int]) -> Matches:
        """Matches of every frame's keypoints among the reference's.

        Args:
            features0: of B frames, (B, K, …).
            features1: of one reference for all, (1, M, …), or of one for each, (B, M, …).
            size: (H, W) of the images.

        Raises:
            ValueError: numbers of frames that do not fit; no scales where the weights want them; weights on another
                device.
            TypeError: weights of less than float32.
        """
        check_placed("LightGlue", self, features0.keypoints)
        batch, batch1 = len(features0.keypoints), len(features1.keypoints)
        if batch1 not in (1, batch):
            cure = "give one for all frames, or one each"
            raise ValueError(message("features1", f"1 or {batch} references", batch1, cure))
        with torch.autocast(features0.keypoints.device.type, enabled=False):
            if is_on_host(features0.descriptors) and is_on_host(features1.descriptors):
                return self._one_by_one(features0, features1, size)
            tokens0, tokens1 = self._tokens(features0, size), self._tokens(features1, size)
            states, positions, valid = tokens1
            states, positions = states.expand(batch, -1, -1), positions.expand(-1, batch, -1, -1, -1)
            tokens1 = _Tokens(states, positions, None if valid is None else valid.expand(batch, -1))
            return self._match(tokens0, tokens1, stop=False)

    def _one_by_one(self, features0: Features, features1: Features, size: Sequence[int]) -> Matches:
        """The eager CPU: every pair as it would be alone, without padding."""
        count = features0.keypoints.shape[1]
        references = [_valid_of_frame(features1, row) for row in range(len(features1.keypoints))]
        prepared = [(self._tokens(reference, size, padded=False), places) for reference, places in references]

        def pair(row: int) -> Matches:
            index = torch.full((count,), -1, dtype=torch.int64, device=features0.keypoints.device)
            weight = features0.descriptors.new_zeros(count)
            features, places0 = _valid_of_frame(features0, row)
            tokens1, places1 = prepared[row % len(prepared)]
            if len(places0) and len(places1):
                found = self._match(self._tokens(features, size, padded=False), tokens1, stop=True)
                matched = found.index[0] >= 0
                index[places0] = torch.where(matched, places1[found.index[0].clamp(min=0)], -1)
                weight[places0] = found.weight[0].to(weight)
            return Matches(index, weight)

        rows = map_on_host(pair, range(len(features0.keypoints)))
        if not rows:
            empty = torch.zeros_like(features0.scores)
            return Matches(empty.long(), empty)
        return combine(torch.stack, rows)

    def _tokens(self, features: Features, size: Sequence[int], *, padded: bool = True) -> _Tokens:
        """Projected descriptors and positions, after the first self-attention, which is within one side."""
        dtype = self.network.posenc.Wr.weight.dtype
        x, y = features.keypoints.unbind(-1)
        places = torch.stack((x - size[1] / 2, y - size[0] / 2), -1) / (max(size) / 2)
        scales, orientations = features.scales, features.orientations
        if self.with_scales:
            if scales is None or orientations is None:
                expected, cure = "scales and orientations", "these weights are for SIFT-like features"
                raise ValueError(message("features", expected, "None", cure))
            # LightGlue was trained with OpenCV's "size", twice σ
            places = torch.cat((places, 2 * scales.unsqueeze(-1), orientations.unsqueeze(-1)), -1)
        states = self.network.input_proj(features.descriptors.to(dtype))
        tokens = _Tokens(states, self.network.posenc(places.to(dtype)), features.valid if padded else None)
        return self._attend_within(0, tokens)

    def _attend_within(self, layer: int, tokens: _Tokens) -> _Tokens:
        block = self.network.transformers[layer].self_attn
        return tokens._replace(states=block(tokens.states, tokens.positions, _key_mask(tokens.valid)))

    def _attend_across(self, layer: int, tokens0: _Tokens, tokens1: _Tokens) -> tuple[_Tokens, _Tokens]:
        block = self.network.transformers[layer].cross_attn

        def heads(states: Tensor) -> Tensor:
            return states.view(*states.shape[:-1], block.heads, -1).transpose(1, 2)

        keys0, keys1 = heads(block.to_qk(tokens0.states)), heads(block.to_qk(tokens1.states))
        values0, values1 = heads(block.to_v(tokens0.states)), heads(block.to_v(tokens1.states))

        def update(states: Tensor, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=_key_mask(valid))
            if valid is not None:
                attended = attended.nan_to_num()  # where there is nothing to attend to
            message_in = block.to_out(attended.transpose(1, 2).flatten(-2))
            return states + block.ffn(torch.cat((states, message_in), -1))

        return (
            tokens0._replace(states=update(tokens0.states, keys0, keys1, values1, tokens1.valid)),
            tokens1._replace(states=update(tokens1.states, keys1, keys0, values0, tokens0.valid)),
        )

    def _match(self, tokens0: _Tokens, tokens1: _Tokens, *, stop: bool) -> Matches:
        """All layers, then the assignment; with ``stop`` (one pair, readable) as soon as it is sure."""
        last = len(self.network.transformers) - 1
        done = tokens0.states.new_zeros(len(tokens0.states), dtype=torch.bool)
        projected: tuple[Tensor, ...] | None = None
        stops = self.depth_confidence > 0
        for layer in range(last + 1):
            ahead0, ahead1 = tokens0, tokens1
            if layer > 0:  # else done already
                ahead0, ahead1 = self._attend_within(layer, ahead0), self._attend_within(layer, ahead1)
            ahead0, ahead1 = self._attend_across(layer, ahead0, ahead1)
            if stop or not stops:
                tokens0, tokens1 = ahead0, ahead1
                if stops and layer < last and bool(self._is_sure(layer, tokens0, tokens1).all()):
                    last = layer
                    break
                continue
            # pairs that are done stay as they are, and keep the assignment of the layer they stopped at
            stays = done[:, None, None]
            tokens0 = tokens0._replace(states=torch.where(stays, tokens0.states, ahead0.states))
            tokens1 = tokens1._replace(states=torch.where(stays, tokens1.states, ahead1.states))
            now = self._project(layer, tokens0.states, tokens1.states)
            if projected is not None:
                pairs_of = zip(projected, now, strict=True)
                now = tuple(torch.where(stays, kept, new) for kept, new in pairs_of)
            projected = now
            if layer < last:
                done = done | self._is_sure(layer, tokens0, tokens1)
        if projected is None:
            projected = self._project(last, tokens0.states, tokens1.states)
        pairs = None
        if tokens0.valid is not None and tokens1.valid is not None:
            pairs = tokens0.valid.unsqueeze(2) & tokens1.valid.unsqueeze(1)
        return _assign(projected, pairs, self.threshold)

    def _is_sure(self, layer: int, tokens0: _Tokens, tokens1: _Tokens) -> Tensor:
        """(B,) bool: enough of a pair's points would not change their match any more."""
        bound = self.network.confidence_thresholds[layer]
        unsure = tokens0.states.new_zeros(len(tokens0.states))
        total = torch.zeros_like(unsure)
        for tokens in (tokens0, tokens1):
            doubts = self.network.token_confidence[layer].token(tokens.states).squeeze(-1) < bound
            valid = torch.ones_like(doubts) if tokens.valid is None else tokens.valid
            unsure = unsure + (doubts & valid).sum(-1)
            total = total + valid.sum(-1)
        return 1 - unsure / total.clamp(min=1) > self.depth_confidence

    def _project(self, layer: int, *sides: Tensor) -> tuple[Tensor, ...]:
        """What the assignment compares, (B, K, D) each, and the log-odds (B, K, 1) that a point has a match."""
        head = self.network.log_assignment[layer]
        compared = [head.final_proj(states) / states.shape[-1] ** 0.25 for states in sides]
        return *compared, *(head.matchability(states) for states in sides)

    def train(self, mode: bool = True) -> LightGlue:
        """Stays in evaluation mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The options."""
        return f"threshold={self.threshold}, depth_confidence={self.depth_confidence}"


def build_matcher(
    feature_model: str, *, weights: Weights | None = None, allow_download: bool = False
) -> LightGlue:
    """LightGlue for the features of that name, in evaluation mode, on the CPU.

    Args:
        feature_model: ``"superpoint"`` (official weights), ``"disk"``, ``"aliked"`` (= ``"aliked-n16"``; its
            weights also serve ``"aliked-n16rot"`` and, with fewer matches, ``"aliked-n32"``), ``"sift"``,
            ``"doghardnet"`` or ``"xfeat"``: there are no weights for others.
        weights: a path, a state dict, or the name of other weights; ``None`` looks where
            :func:`torchalign.models.weights.find_weights` says.
        allow_download: fetch them from their official place if they are nowhere else.

    Raises:
        ValueError: no such weights, or some that do not fit.
        FileNotFoundError: no file; says where it was looked for, and under which licence it is.
    """
    if feature_model not in _MODELS:
        expected = f"one of {tuple(_MODELS)}, which LightGlue was trained for"
        cure = "choose one of these, or matcher_model='guided'"
        raise ValueError(message("feature_model", expected, repr(feature_model), cure))
    name, options = _MODELS[feature_model]
    tensors = _current_names(load_weights(name, weights, allow_download=allow_download))
    options = dict(options)
    depth_confidence = options.pop("depth_confidence", 0.95)
    network = _build_network(options)
    load_into(network, tensors, f"weights for {name}")
    return LightGlue(network, depth_confidence=depth_confidence)


# --------------------------------------------------------------------------------------------------------- pieces


def _build_network(options: Mapping[str, Any]) -> nn.Module:
    """The layers of kornia, without its download and without its side effect."""
    from kornia.feature import LightGlue as Layers  # here: importing torchalign does not import kornia

    # their constructor switches flash attention off for the whole process
    sdpa: Any = torch.backends.cuda
    layers: Any = Layers
    flash = sdpa.flash_sdp_enabled()
    try:
        with torch.device("cpu"):
            return layers(None, flash=False, width_confidence=-1, **options)
    finally:
        sdpa.enable_flash_sdp(flash)


def _current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of older files as the layers have them now; without what belongs to other networks, or to none."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("matcher.")
        name = re.sub(r"^(self_attn|cross_attn)\.(\d+)\.", r"transformers.\2.\1.", name)
        if not name.startswith("extractor.") and not re.fullmatch(r"log_assignment\.\d+\.r", name):
            renamed[name] = tensor
    return renamed


def _key_mask(valid: Tensor | None) -> Tensor | None:
    """(B, 1, 1, K): what every head of every query may attend to."""
    return None if valid is None else valid[:, None, None, :]


def _valid_of_frame(features: Features, row: int) -> tuple[Features, Tensor]:
    """The valid keypoints of one frame, as a batch of one, and their places. Reads numbers: on the CPU only."""
    places = features.valid[row].nonzero().squeeze(-1)
    return each_field(features, lambda field: field[row : row + 1, places]), places


def _assign(projected: tuple[Tensor, ...], pairs: Tensor | None, threshold: float) -> Matches:
    r"""Mutual best matches of probability above ``threshold``.

    .. math:: \log P_{ij} = \log\sigma(z_i) + \log\sigma(z_j) + \log\mathrm{softmax}_j\, S_{ij}
              + \log\mathrm{softmax}_i\, S_{ij}
    """
    states0, states1, logit0, logit1 = projected
    similarity = states0 @ states1.mT
    if pairs is not None:
        similarity = similarity.masked_fill(~pairs, torch.finfo(similarity.dtype).min)
    score = similarity.log_softmax(2) + similarity.log_softmax(1)
    score = score + F.logsigmoid(logit0) + F.logsigmoid(logit1).transpose(1, 2)
    if pairs is not None:
        score = score.masked_fill(~pairs, -torch.inf)
    best, there = score.max(2)
    back = score.argmax(1)
    mutual = back.gather(1, there) == torch.arange(there.shape[1], device=there.device)
    weight = best.exp()
    matched = mutual & (weight > threshold)
    return Matches(torch.where(matched, there, -1), torch.where(matched, weight, 0.0))
