"""A data set for workers that are started anew, which import this module and nothing of the tests besides."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

import torchalign as ta


class Frames(Dataset):
    """Misregistered, checked and aligned frames; and whether all that has woken CUDA."""

    def __init__(self):
        self.transform, self.align = ta.RandomMisregistration(), ta.AlignToFirst()
        self.check = ta.AlignmentCheck(action="raise", tolerance=20)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        moved, warp = self.transform(torch.rand(2, 1, 64, 64))
        self.check(moved, moved)
        return self.align(moved), warp, torch.cuda.is_initialized()
