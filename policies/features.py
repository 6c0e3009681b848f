"""What a frozen vision encoder makes of a frame is computed once and stored, and not in every epoch of every update.

    prepare    frame ── encoder, once ──►  image_features (P, Dv) float32, a column of the rows that rollouts store
    forward    image_features ── adapter ──►  visual tokens; the encoder does not run

Acting and learning read the same numbers. A frame's features depend on that frame alone, to the last bit, so any split
of the environments over workers stores the same ones: it goes through the encoder by itself, or, in a small encoder, in
a group of a fixed size whose numbers were found to be the same at every place.
What was made of the latest frames is kept, since environments show the same frame again, and cloning does in every
epoch. Off where the encoder learns, and where a frame's features are larger than `MOST_BYTES`.
"""

import hashlib
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manako.policies.architectures.model import Model
from manako.policies.pixels import PixelPipeline

COLUMN = "image_features"  # of the rows, and the model's argument
MOST_BYTES = 2**18  # of a frame's features: 4,096 steps of them are 1 GiB
GROUP = 8  # frames of one forward
SMALL = 1_000_000  # parameters of an encoder that is slow by its overhead; a larger one gains nothing by groups
KEPT_BYTES = 2**27  # of the latest frames' features in memory


class FrozenFeatures:
    """The features of frames by a model's encoder, while it is frozen.

    Args:
        model: one whose row says `see`.
        pipeline: frames to the encoder's pixels.
        frame_shape: (H, W, 3) of the frames to come.

    Attributes:
        shape: (P, Dv) of a frame's features.
    """

    def __init__(self, model: Model, pipeline: PixelPipeline, frame_shape: tuple[int, int, int]) -> None:
        assert model.see is not None and model.encoder is not None, "the row names both"
        self.model, self.pipeline, self.see = model, pipeline, model.see
        self.encoder = model.base_vlm.get_submodule(model.encoder)
        self._weights: list[tuple[int, int]] = []
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._groups: dict[int, int] = {}  # threads -> frames of one forward
        blank = pipeline.resize(np.zeros((1, *frame_shape), dtype=np.uint8))
        self.shape = tuple(self._encode(blank).shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the policy keeps its own."""
        return {**self.__dict__, "_kept": OrderedDict()}

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder does not learn."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    @property
    def nbytes(self) -> int:
        """How much a step of one environment stores of them."""
        return math.prod(self.shape) * 4

    def __call__(self, frames: Tensor) -> Tensor:
        """Returns features (B, P, Dv) float32 of frames (B, h, w, 3) uint8 as `PixelPipeline.resize` makes them."""
        return torch.stack(self.each(frames))

    def each(self, frames: Tensor) -> list[Tensor]:
        """Returns the same as B tensors (P, Dv): of a frame that was seen lately the one that is kept, no copy."""
        self._forget_older_weights()
        frames = frames.cpu()
        keys = [hashlib.blake2b(frame.numpy().tobytes(), digest_size=16).digest() for frame in frames]
        places = {key: place for place, key in enumerate(keys)}  # of one frame of each kind
        features = {key: self._kept.pop(key) for key in places if key in self._kept}
        new = [key for key in places if key not in features]
        group = self._group(frames.shape[1:]) if len(new) >= GROUP else 1
        whole = len(new) // group * group
        for part in [new[at : at + group] for at in range(0, whole, group)] + [[key] for key in new[whole:]]:
            encoded = self._encode(frames[[places[key] for key in part]])  # (group, P, Dv)
            features |= zip(part, encoded.unbind(), strict=True)
        self._kept |= features
        while len(self._kept) > max(1, KEPT_BYTES // self.nbytes):
            self._kept.popitem(last=False)
        return [features[key] for key in keys]

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        """Features (B, P, Dv) on the CPU, in the encoder's own precision."""
        vlm = self.model.base_vlm
        pixels = self.pipeline.pixels(frames.to(vlm.device))["pixel_values"]  # (B, 3, h, w)
        with torch.autocast(vlm.device.type, enabled=False):
            return self.see(vlm, pixels).float().cpu()

    def _group(self, shape: torch.Size) -> int:
        """How many frames (h, w, 3) go through the encoder at once: `GROUP` where that changes no bit, else 1."""
        threads = torch.get_num_threads()  # they decide how a product is cut up
        if threads not in self._groups:
            group = 1
            if sum(parameter.numel() for parameter in self.encoder.parameters()) < SMALL:
                rng = np.random.default_rng(0)
                frames = torch.from_numpy(rng.integers(0, 256, (GROUP, *shape), dtype=np.uint8))
                alone = torch.cat([self._encode(frame[None]) for frame in frames])
                group = GROUP if torch.equal(self._encode(frames), alone) else 1
            self._groups[threads] = group
        return self._groups[threads]

    def _forget_older_weights(self) -> None:
        """Loading weights changes their versions, or puts others in their place."""
        tensors = (*self.encoder.parameters(), *self.encoder.buffers())
        weights = [(id(tensor), tensor._version) for tensor in tensors]
        if weights != self._weights:
            self._kept.clear()
            self._groups.clear()
            self._weights = weights
