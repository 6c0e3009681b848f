"""Stage `represent` of vision tokens: the frame tokenizer learns to draw what it has rounded to codes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manako.policies.architectures.pretraining import Pretraining


class Reconstruction(Pretraining):
    """The mean squared error between pixels and what is drawn of their codes; pixels are scaled by their processor."""

    learns = "encoder"
    needs_captions = False

    def losses(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns the error, ()."""
        return {"reconstruction": self._tokenizer.reconstruct(self.pixels(images)["pixel_values"])[0]}

    @torch.no_grad()
    def measure(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """Returns the error as a share of the pixels' variance, and how many different codes the frames have."""
        pixels = self.pixels(images)["pixel_values"]
        error, codes = self._tokenizer.reconstruct(pixels)
        return {"error / variance": float(error / pixels.var()), "codes used": float(len(codes.unique()))}

    @property
    def _tokenizer(self) -> Any:
        return self.parts.base_vlm.model.vision_tower
