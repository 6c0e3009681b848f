"""Frames of which every sample has several, each different one held once, however many samples show it.

    pool     frame of key a, frame of key b, ...      (h, w, 3) each, and with them what else is made of a frame alone
    index    (B, k) int64: which k of the pool a sample shows, oldest first

A rollout's samples share most of their frames with their neighbours: k frames a sample are stored in the room of one.
Parts of a pool are views of what a step prepared; nothing is copied when samples are selected or joined.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class SharedFrames:
    """k frames of each of B samples.

    Args:
        keys: of the M frames of the pool, all different; equal content has an equal key.
        pool: name -> M tensors (...), such as `frames` (h, w, 3) uint8.
        index: (B, k) int64 into the pool, on the CPU.
    """

    def __init__(self, keys: Sequence[bytes], pool: Mapping[str, Sequence[Tensor]], index: Tensor) -> None:
        self.keys, self.pool, self.index = tuple(keys), {name: tuple(parts) for name, parts in pool.items()}, index

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, name: str) -> bool:
        return name in self.pool

    def __getitem__(self, name: str) -> Tensor:
        """Returns (B, k, ...), gathered."""
        parts = self.pool[name]
        return torch.stack([parts[place] for place in self.index.flatten().tolist()]).unflatten(0, self.index.shape)

    @property
    def nbytes(self) -> int:
        """Of the pool and the index."""
        return self.index.nbytes + sum(part.nbytes for parts in self.pool.values() for part in parts)

    def select(self, rows: Tensor) -> "SharedFrames":
        """Returns the samples at these rows, (B',) int64 or (B,) bool, with the same pool."""
        return SharedFrames(self.keys, self.pool, self.index[rows.cpu()])

    def with_parts(self, name: str, parts: Sequence[Tensor]) -> "SharedFrames":
        """Returns the same with one more tensor of each of the M frames."""
        return SharedFrames(self.keys, {**self.pool, name: parts}, self.index)

    def used(self) -> "SharedFrames":
        """Returns the same samples with a pool of their own frames alone."""
        places, index = torch.unique(self.index, return_inverse=True)
        if len(places) == len(self.keys):
            return self
        kept = places.tolist()
        pool = {name: [parts[place] for place in kept] for name, parts in self.pool.items()}
        return SharedFrames([self.keys[place] for place in kept], pool, index)

    def to(self, device: torch.device | str) -> "SharedFrames":
        """Returns the same on another device, where the frames in use go as one tensor."""
        there = torch.empty(0, device=device).device  # `cuda` is the present one of several
        if all(part.device == there for parts in self.pool.values() for part in parts[:1]):
            return self
        own = self.used()
        moved = {name: torch.stack(parts).to(device).unbind() for name, parts in own.pool.items()}
        return SharedFrames(own.keys, moved, own.index)

    @staticmethod
    def join(parts: Sequence["SharedFrames"]) -> "SharedFrames":
        """Returns the samples one after another; a frame that several parts hold is kept once."""
        places: dict[bytes, int] = {}
        pool: dict[str, list[Tensor]] = {name: [] for name in parts[0].pool}
        index = []
        for part in map(SharedFrames.used, parts):
            moved = []
            for number, key in enumerate(part.keys):
                place = places.setdefault(key, len(places))
                moved.append(place)
                if place == len(pool["frames"]):
                    for name, kept in pool.items():
                        kept.append(part.pool[name][number])
            index.append(torch.tensor(moved, dtype=torch.int64)[part.index])
        return SharedFrames(list(places), pool, torch.cat(index))

    def shown(self, row: int) -> bytes:
        """Returns bytes that are equal where the k frames of two samples are."""
        return b"".join(self.keys[place] for place in self.index[row].tolist())

    def arrays(self) -> tuple[tuple[bytes, ...], dict[str, np.ndarray], np.ndarray]:
        """Returns keys, pool and index of the frames in use, for the way between processes."""
        own = self.used()
        pool = {name: torch.stack(parts).cpu().numpy() for name, parts in own.pool.items()}
        return own.keys, pool, own.index.numpy()

    @staticmethod
    def of_arrays(keys: Sequence[bytes], pool: Mapping[str, np.ndarray], index: np.ndarray) -> "SharedFrames":
        """Returns what `arrays` gave away, in memory of its own."""
        parts = {name: torch.from_numpy(np.array(array)).unbind() for name, array in pool.items()}
        return SharedFrames(keys, parts, torch.from_numpy(np.array(index)))
