"""Batches in which samples of one frame stand together, for a policy that reads a frame once for all of them."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from manako.agent.rng import SHUFFLES, make_rng, shuffled


class OneFrameTogether(Sampler[int]):
    """Rows in a random order, anew in each epoch, those of a frame together as far as `shuffled` keeps them so.

    Args:
        data: with `image` (PNG bytes).
        batch: rows of a batch.
        seed: of the order.
    """

    def __init__(self, data: Dataset, batch: int, seed: int) -> None:
        self.groups, self.batch, self.seed, self.epoch = frames_shown(data), batch, seed, 0

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        yield from shuffled(len(self), self.groups, self.batch, make_rng(self.seed, SHUFFLES, self.epoch)).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Goes to an epoch's order; the Trainer says when."""
        self.epoch = epoch


def frames_shown(data: Dataset) -> torch.Tensor:
    """Returns (B,) int64, equal where rows hold the same frame."""
    found = np.empty(len(data), np.int64)
    at = 0
    for part in data.select_columns(["image"]).with_format("arrow").iter(batch_size=4096):
        for png in part["image"].combine_chunks().field("bytes").to_pylist():
            found[at] = int.from_bytes(hashlib.blake2b(png, digest_size=8).digest(), signed=True)
            at += 1
    return torch.from_numpy(found)
