"""Names that the docstrings' examples use without importing them (`pytest --doctest-modules torchalign`)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_names(request, doctest_namespace):
    if request.node.__class__.__name__ != "DoctestItem":
        return
    import torchalign

    doctest_namespace.update(torch=torch, ta=torchalign)
