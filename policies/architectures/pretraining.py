"""What an architecture learns of frames and captions before it acts, by losses of its own.

    frames (B, H, W, 3) + captions  ─ losses ─►  {"matching": (), "masked words": ()}   their sum is learned
    the same of held-out episodes   ─ measure ─► {"matched": 0.93, ...}                 what it then can do

A row names its pretraining for a stage of run_sft.py (`Model.pretraining`): `represent`, before a language model is
there, or `align` in place of captions said by the language model. Heads that only the losses need belong to the
pretraining and end with it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from manako.policies.errors import PolicyError
from manako.policies.plain_text import as_plain_text

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

    @property
    def base(self) -> Any:
        """The plain model, without PEFT's wrapper."""
        return self.parts.base_vlm

    def train(self, mode: bool = True) -> "Pretraining":
        """Marks the heads as in training; the model's dropout stays off, and what is frozen keeps its statistics."""
        super().train(mode)
        self.vlm.eval()
        return self

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


def plain_captions(captions: Sequence[str], special_tokens: Iterable[str]) -> list[str]:
    """Returns captions as plain data: one line each, no special tokens in them.

    Raises:
        PolicyError: one holds nothing but special tokens.
    """
    tokens = sorted(special_tokens)
    cleaned = {caption: as_plain_text(" ".join(caption.split()), tokens) for caption in set(captions)}
    pattern = "|".join(re.escape(token) for token in tokens if token) or r"\s"
    empty = [caption for caption in cleaned if not re.sub(pattern, "", caption).strip()]
    if empty:
        raise PolicyError(
            f"The caption {empty[0]!r} holds no word: expected a sentence about the frame from the environment's "
            "caption()."
        )
    return [cleaned[caption] for caption in captions]


def next_different(captions: Sequence[str]) -> Tensor:
    """Returns for each caption the place of the next one that says something else, (N,) int64; behind the last is 0.

    Raises:
        PolicyError: all say the same.
    """
    if len(set(captions)) < 2:
        raise PolicyError(
            f"All {len(captions)} captions say {captions[0][:80]!r}: expected an environment whose caption() tells one "
            "frame from another."
        )
    places = range(len(captions))
    following = [[*places[place + 1 :], *places[:place]] for place in places]
    others = [next(j for j in row if captions[j] != captions[i]) for i, row in enumerate(following)]
    return torch.tensor(others)


MakePretraining = Callable[["Model", "Processing"], Pretraining]
