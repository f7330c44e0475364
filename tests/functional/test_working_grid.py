"""The window against SciPy's, and what of it two displaced frames have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import windows

from torchalign.functional.working_grid import Window, WorkingGrid, tukey


@pytest.mark.parametrize(
    ("length", "taper", "share"),
    [(120, 0.5, 0.5), (121, 1.0, 1.0), (200, 0.01, 16 / 200), (20, 0.1, 0.5), (90, 0.0, 0.0)],
    ids=str,
)
def test_the_window_is_scipys(length, taper, share):
    # its first and last samples, which are 0, lie on the outer edges of the frame: pixel centres between them
    expected = windows.tukey(2 * length + 1, share)[1::2]
    found = tukey(torch.arange(length, dtype=torch.float64), length, taper)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_common_ground_is_where_both_frames_lie():
    like = torch.zeros((), dtype=torch.float64)
    grid = WorkingGrid.of((40, 50), (40, 50), 0.5, like)
    # content that moves 3 to the right and 2 up shows nothing of the first columns and the last rows
    common = Window.of(grid, 0.0).common(torch.tensor([3.0, -2.0], dtype=torch.float64))
    expected = np.zeros((40, 50))
    expected[:-2, 3:] = 1
    assert np.array_equal(common.numpy(), expected)
    soft = Window.of(grid, 0.5)
    still = soft.common(torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(still, soft.whole(), atol=1e-12, rtol=0)
