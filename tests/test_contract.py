"""The contract, run on every aligner. A new method is one line of ALIGNERS."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contract import Behaviour, Case, Results

import torchalign as ta

old = {"weighting": "phase", "contrast": "none", "robust": False, "max_frequency": 0.3}


def cascade(**options):
    return ta.Cascade(ta.PCC(**options), ta.ECC(**options))


ALIGNERS = {
    "PCC": Case(ta.PCC),
    "ECC": Case(ta.ECC, global_search=False),
    "Cascade": Case(cascade),
    "Local": Case(ta.Local),
    # it tells ground from cloud pixel by pixel: rounding moves one or the other across the line
    "LGM": Case(partial(ta.LGM, max_num_keypoints=128), grid=0.002),
}
TOGETHER = {
    "Cascade with Local": Case(lambda **options: ta.Cascade(ta.PCC(**options), ta.Local(**options))),
}
OPTIONS = {
    "PCC classic": Case(partial(ta.PCC, **old), accuracy=0.2, steadiness=0.12),
    "PCC plain": Case(partial(ta.PCC, weighting="none", contrast="none", taper=0.5), steadiness=0.07),
    "PCC grid": Case(partial(ta.PCC, weighting="sqrt", upsample_factor=50), steadiness=0.05, grid=0.02),
    "PCC structure": Case(partial(ta.PCC, contrast="structure", robust=True), accuracy=0.1, steadiness=0.1),
    "ECC structure": Case(
        partial(ta.ECC, motion="affine", contrast="structure"),
        accuracy=0.1,
        steadiness=0.1,
        global_search=False,
    ),
    "PCC gradients": Case(partial(ta.PCC, channel="gradients"), accuracy=0.1, steadiness=0.05),
    "ECC affine": Case(partial(ta.ECC, motion="affine"), accuracy=0.1, steadiness=0.05, global_search=False),
    "ECC homography": Case(
        partial(ta.ECC, motion="homography", robust="none"),
        accuracy=0.1,
        steadiness=0.05,
        global_search=False,
    ),
}


# what they combine is in other cases: affine motion in "ECC structure", the stages of the cascade in TestResults
SLOW = ("Cascade with Local", "PCC structure", "ECC affine")


def each(cases: dict[str, Case], slow: tuple[str, ...] = ()):
    marked = [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, case in cases.items()
    ]
    return pytest.mark.parametrize("case", marked)


@each(ALIGNERS)
class TestResults(Results):
    pass


@each(TOGETHER | OPTIONS, SLOW)
class TestOptions(Results):
    """Of each option all tests, of a few kinds each; and none of what the base class does, whatever the option."""

    test_no_frames = test_masks_broadcast = test_a_bad_frame_in_a_batch_of_series = None
    test_chunks_of_a_long_series_of_references_and_inits = None

    @pytest.mark.parametrize("kind", ["nan", "10000", "alternating"])
    def test_a_bad_frame_is_left_alone_and_leaves_alone(self, case, kind):
        super().test_a_bad_frame_is_left_alone_and_leaves_alone(case, kind)

    @pytest.mark.parametrize("kind", ["0", "3e38", "one pixel"])
    def test_a_bad_reference(self, case, kind):
        super().test_a_bad_reference(case, kind)

    @pytest.mark.parametrize("size", [(1, 40), (5, 7)], ids=str)
    def test_tiny_images(self, case, size):
        super().test_tiny_images(case, size)

    @pytest.mark.parametrize("where", ["wedge", "stripes", "many scattered"])
    def test_missing_pixels_do_not_pull(self, case, where):
        super().test_missing_pixels_do_not_pull(case, where)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_dtypes(self, case, dtype):
        super().test_dtypes(case, dtype)

    @pytest.mark.parametrize("crop", [1000, (96, 79)], ids=str)
    def test_crop_center(self, case, crop):
        super().test_crop_center(case, crop)


@each(ALIGNERS | TOGETHER)
class TestBehaviour(Behaviour):
    pass
