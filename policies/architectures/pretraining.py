"""What an architecture learns of frames and captions before it acts, by losses of its own.

    frames (B, H, W, 3) + captions  ─ losses ─►  {"matching": (), "masked words": ()}   their sum is learned
    the same of held-out episodes   ─ measure ─► {"matched": 0.93, ...}                 what it then can do

A row names its pretraining for a stage of run_sft.py (`Model.pretraining`): `represent`, before a language model is
there, or `align` in place of captions said by the language model. Heads that only the losses need belong to the
pretraining and end with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from manako.policies.architectures.model import Model
    from manako.policies.processing import Processing


class Pretraining(nn.Module, ABC):
    """Losses of a model on frames and what is on them.

    Args:
        model: what learns of it requires gradients.
        processing: frames to the model's pixels.

    Attributes:
        learns: what `trainable: auto` stands for, see `manako.policies.trainable`.
        needs_captions: False where it learns of frames alone; captions are then empty.
    """

    learns: ClassVar[str] = "adapter"
    needs_captions: ClassVar[bool] = True

    def __init__(self, model: "Model", processing: "Processing") -> None:
        super().__init__()
        self.parts, self.processing = model, processing
        self.vlm: Any = model.vlm

    @abstractmethod
    def losses(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns the losses by name, () each, with gradients; chance is torch's global generator.

        Args:
            images: (B, H, W, 3) uint8.
            captions: B texts.
        """

    @abstractmethod
    def measure(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """Returns by name what the model can do on frames (N, H, W, 3) that it was not trained on; no chance in it."""

    def pixels(self, images: np.ndarray) -> dict[str, Tensor]:
        """Returns the model's inputs that are made of frames (B, H, W, 3) uint8, on its device."""
        pipeline = self.processing.pipeline
        return pipeline.pixels(pipeline.resize(images).to(self.vlm.device))


MakePretraining = Callable[["Model", "Processing"], Pretraining]
