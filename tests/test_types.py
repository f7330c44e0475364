"""Results: a ``None`` among tensors, rows put through functions, batches of loaders."""

from __future__ import annotations

import inspect
import math

import torch
from torch.utils.data import DataLoader

import torchalign as ta
from torchalign.functional.uncertainty import isotropic, largest_sigma
from torchalign.types import ShiftField, combine


def estimate_of(frames: int, first: float = 0.0) -> ta.Estimate:
    number = first + torch.arange(frames, dtype=torch.float32)
    warp = torch.eye(2, 3).expand(frames, 2, 3) + number[:, None, None]
    whole = torch.zeros(frames, dtype=torch.int64)
    return ta.Estimate(warp, number, number, number, isotropic(number), whole, whole)


def shifts_of(frames: int, value: float) -> ShiftField:
    points = torch.full((frames, 2), value)
    return ShiftField(torch.full((frames, 2, 3, 4), value), torch.full((frames, 3, 4), value), points, points)


def test_parts_are_joined_with_their_fields_and_without():
    first, second = estimate_of(2), estimate_of(3, 2.0)
    joined = combine(torch.cat, [first, second])
    assert joined.field is None
    torch.testing.assert_close(joined.score, torch.arange(5.0))
    assert joined.covariance.shape == (5, 2, 2)
    local = [part._replace(field=shifts_of(len(part.score), k)) for k, part in enumerate((first, second))]
    field = combine(torch.cat, local).field
    assert [tuple(tensor.shape) for tensor in field] == [(5, 2, 3, 4), (5, 3, 4), (5, 2), (5, 2)]
    assert field.sigma[:, 0, 0].tolist() == [0, 0, 1, 1, 1]
    assert first.map(lambda rows: rows[1:]).field is None
    assert local[0].map(lambda rows: rows[1:]).field.coefficients.shape == (1, 2, 3, 4)


def test_a_loader_makes_batches():
    parts = [estimate_of(2, float(k)) for k in range(4)]
    (batch,) = DataLoader(parts, batch_size=4)
    assert isinstance(batch, ta.Estimate)
    assert batch.field is None
    torch.testing.assert_close(batch.warp, torch.stack([part.warp for part in parts]))
    local = [part._replace(field=shifts_of(2, 1.0)) for part in parts]
    (batch,) = DataLoader(local, batch_size=4)
    assert batch.field.coefficients.shape == (4, 2, 2, 3, 4)


def test_transforms_see_nothing_but_tensors():
    scene = torch.rand(2, 3, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    aligner = ta.PCC()
    mapped = torch.vmap(aligner)(scene, scene[:, 0]).estimate
    assert mapped.field.coefficients.shape == (2, 3, 2, 0, 0)
    assert aligner(scene, scene[:, 0]).estimate.field is None


def test_the_larger_axis_is_the_root_of_the_larger_eigenvalue():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(50, 2, 2, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT
    expected = torch.linalg.eigvalsh(covariance)[:, 1].sqrt()
    torch.testing.assert_close(largest_sigma(covariance), expected)
    assert largest_sigma(isotropic(torch.tensor(3.0))) == 3
    assert math.isinf(isotropic(torch.tensor(math.inf))[0, 0])
    assert isotropic(torch.tensor(math.inf))[0, 1] == 0


def test_what_takes_the_same_shows_the_same():
    """Arguments are written and explained once, and shown by every function that takes them."""
    for like, shown in ((ta.LGM.matches, ta.PCC.estimate),):
        own, other = inspect.signature(like), inspect.signature(shown)
        assert own.parameters == other.parameters
        assert own.return_annotation != other.return_annotation
        said = shown.__doc__.partition("Args:")[2].partition("Returns:")[0]
        assert said.split() == like.__doc__.partition("Args:")[2].partition("Returns:")[0].split()
