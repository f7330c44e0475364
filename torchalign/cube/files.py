"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchalign._check import message

NETCDF = (".nc", ".nc4", ".netcdf", ".h5")  # endings of names
_STORE_MARKS = (".zgroup", "zarr.json", ".zmetadata")  # one of these is in every Zarr store


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr store."""
    return any((path / name).exists() for name in _STORE_MARKS)


def check_free(path: Path, overwrite: bool, name: str = "path") -> None:
    """Nothing is overwritten that was not meant to be: files take the place of files, Zarr stores of Zarr stores."""
    if os.path.lexists(path) and not overwrite:
        cure = "pass overwrite=True or choose another name"
        raise FileExistsError(message(name, "a new name", f"{path}, which exists", cure))
    if path.exists() and not (is_store(path) if path.suffix.lower() == ".zarr" else path.is_file()):
        kind = "folder" if path.is_dir() else "file"
        raise FileExistsError(message(name, f"no {kind} of yours", path, "remove it or choose another name"))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or a folder to, which then takes the place of ``path``.

    Whatever happens before the end, nothing is ever seen at ``path`` that is not complete, and what was there
    is there again. Whoever is killed leaves a folder whose name begins with a dot and ends in ``.partial``.
    """
    written = temporary_sibling(path)
    try:
        yield written
        put_in_place(written, path)
    finally:
        discard(written, path)


def write_features(path: Path, kind: str, places: Iterable[Any], told: Iterable[dict[str, Any]]) -> None:
    """A GeoJSON of places of one kind, in degrees, and what is told of each."""
    features = [
        {"type": "Feature", "geometry": {"type": kind, "coordinates": place}, "properties": properties}
        for place, properties in zip(places, told, strict=True)
    ]
    document = {"type": "FeatureCollection", "features": features}
    path.write_text(json.dumps(document, allow_nan=False, default=str), encoding="utf-8")


def plain_number(value: Any) -> Any:
    """What JSON and SQL know; what is not finite is null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def temporary_sibling(path: Path) -> Path:
    """The same name in a new folder beside ``path``, on the same file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)) / path.name


def put_in_place(written: Path, path: Path) -> None:
    """``written``, a temporary sibling, takes the place of ``path``."""
    old = written.with_name(f"{path.name}.old")
    try:
        if path.is_dir():  # a folder cannot be replaced in one step: out of the way first
            os.replace(path, old)
        os.replace(written, path)
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)


def discard(written: Path, path: Path) -> None:
    """Remove a temporary sibling and its folder, unless it keeps the only copy of what was there."""
    if os.path.lexists(path) or not os.path.lexists(written.with_name(f"{path.name}.old")):
        shutil.rmtree(written.parent, ignore_errors=True)
