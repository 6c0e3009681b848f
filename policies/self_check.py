"""Does a policy compute what plain transformers computes? Asked once, when a policy is made, and by check_model.py.

The reference is the library's own way, `model(**processor(text, images))`, one prompt after the other; behind several
tokens of an answer it is the library's own `generate`, made to say them. Compared with it, for two prompts of unequal
length: what the model is given (equal to the last bit), and what it makes of that, alone and in a padded batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from manako.errors import first_line
from manako.policies.errors import PolicyError
from manako.policies.interface import Rows
from manako.policies.pixels import in_words
from manako.policies.processing import Processing
from manako.policies.reading import Read, Reading
from manako.policies.reading.reading import what_the_head_sees

TOLERANCE = {torch.float32: 1e-5}  # share of the largest number; the rounding of other types is coarser
COARSE = 0.1
NOISE, MOST_NOISE = 8, 1e-3  # times what the model differs from itself by rounding, and at most that


class Differences(NamedTuple):
    """How far a policy's numbers are from the library's, as a share of the largest one."""

    alone: float
    padded: float
    tolerance: float

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.alone, self.padded)

    @property
    def hold(self) -> bool:
        """Whether the policy computes what the library computes; a number that is not finite does not hold."""
        return self.worst <= self.tolerance


class Expected(NamedTuple):
    """What the library says where the answer of one prompt is read."""

    hidden: Tensor  # (1, D)
    logits: list[Tensor]  # for each branching node of the codec's token trie (1, children)
    largest: list[float]  # for each of these nodes the largest logit of the vocabulary, without its sign


class Library:
    """What plain transformers says about some prompts and frames.

    Args:
        processing: its processor and its model.
        codec: the actions' tokens.
        texts: B prompts, rendered.
        frames: (B, H, W, 3) uint8.

    Raises:
        PolicyError: the library's own forward, or `generate`, fails, or makes numbers that say nothing of the image.
    """

    def __init__(self, processing: Processing, codec: Any, texts: Sequence[str], frames: np.ndarray) -> None:
        self.processing, self.codec = processing, codec
        self.model, self.vlm = processing.model, processing.model.base_vlm
        self.inputs = [
            processing.call([text], frame[None]) for text, frame in zip(texts, frames, strict=True)
        ]  # of the processor
        try:
            with torch.no_grad():
                self.reads = [self._read(self._place(given)) for given in self.inputs]
                if self.model.image_counts:
                    self._look_at_images(texts[0], frames)
        except PolicyError:
            raise
        except Exception as error:  # a model that its own processor's inputs do not fit
            raise PolicyError(
                f"{type(self.vlm).__name__} does not take what {type(processing.processor).__name__} makes "
                f"of {in_words(processing.frame_shape, processing.processor)} "
                f"({type(error).__name__}: {first_line(error)}): expected the processor of this model, frames that it "
                "takes, and a model that acts by text; give larger frames, or another model."
            ) from error

    def compare(self, reading: Reading, alone: Sequence[Rows], together: Rows) -> Differences:
        """Returns how far a reading's numbers are from the library's.

        Args:
            reading: how the model is run.
            alone: each prompt and frame, on the model's device.
            together: all of them, padded.
        """
        with torch.no_grad():
            each = [_off(reading.read(rows), 0, right) for rows, right in zip(alone, self.reads, strict=True)]
            batch = reading.read(together)
        padded = max(_off(batch, row, expected) for row, expected in enumerate(self.reads))
        found = Differences(max(each), padded, TOLERANCE.get(self.vlm.dtype, COARSE))
        if found.hold:
            return found
        return found._replace(tolerance=max(found.tolerance, min(NOISE * self._noise, MOST_NOISE)))

    def unequal_input(self, alone: Sequence[Rows]) -> str | None:
        """Returns the name of an input of the model that is not what the processor makes, or None."""
        for rows, made in zip(alone, self.inputs, strict=True):
            given, expected = self.processing.model_inputs(rows), self._place(made)
            for name in expected.keys() | given.keys():
                one, other = given.get(name), expected.get(name)
                if one is None or other is None or one.shape != other.shape or not torch.equal(one, other):
                    return name
        return None

    def _place(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        placed = {name: value.to(self.vlm.device) for name, value in given.items()}
        return {
            name: value.to(self.vlm.dtype) if value.is_floating_point() else value for name, value in placed.items()
        }

    def _read(self, given: dict[str, Tensor]) -> "Expected":
        start = self._start(len(given["input_ids"]))
        with what_the_head_sees(self.vlm) as seen:
            first = self.vlm(**given, **start, use_cache=False).logits[:, -1]  # (1, V)
        behind = [self._generate(given, branch.path) if branch.path else first for branch in self.codec.branches]
        branches = zip(behind, self.codec.branches, strict=True)
        expected = Expected(
            hidden=seen[0][:, -1],
            logits=[logits[:, list(branch.children)] for logits, branch in branches],
            largest=[float(logits.abs().max()) for logits in behind],
        )
        if not all(numbers.isfinite().all() for numbers in (expected.hidden, *expected.logits)):
            raise PolicyError(
                f"{type(self.vlm).__name__} makes numbers that are not finite of a prompt and an image: expected whole "
                "weights and an image processor that divides by no 0; copy or download the folder again."
            )
        return expected

    def _look_at_images(self, text: str, frames: np.ndarray) -> None:
        """Raises PolicyError where one text with different images makes the same, all in one batch.

        Of several images a prompt, each is exchanged alone.
        """
        if frames.ndim == 5:  # (B, k, H, W, 3)
            variants = [frames[:1]]
            for number in range(frames.shape[1]):
                other = frames[:1].copy()
                other[0, number] = frames[1, number]
                variants.append(other)
        else:
            variants = [frame[None] for frame in frames]
        given = [self._place(self.processing.call([text], variant)) for variant in variants]
        if any(len({one[name].shape for one in given}) > 1 for name in given[0]):
            return
        batch = {name: torch.cat([one[name] for one in given]) for name in given[0]}
        with what_the_head_sees(self.vlm) as seen:
            self.vlm(**batch, **self._start(len(given)), use_cache=False)
        said = seen[0][:, -1]  # (B, D)
        same = [torch.equal(said[0], other) for other in said[1:]]
        if frames.ndim == 5 and any(same):
            raise PolicyError(
                f"--frames {frames.shape[1]} came, but of so many images a prompt {type(self.vlm).__name__} does not "
                f"see number {same.index(True) + 1}: expected --frames 1, or a model that reads several, such as the "
                "preset tiny."
            )
        if all(same):
            raise PolicyError(
                f"{type(self.vlm).__name__} makes the same of every image: expected weights and an image processor by "
                "which the image decides; copy or download the folder again, or use another model."
            )

    @functools.cached_property
    def _noise(self) -> float:
        """How much the model differs from itself: in a batch of three, and with its inputs rounded once more."""
        given, expected = self._place(self.inputs[0]), self.reads[0]
        three = {name: torch.cat([value] * 3) for name, value in given.items()}
        generator = torch.Generator().manual_seed(0)

        def rounded(value: Tensor) -> Tensor:
            ulps = torch.randn(value.shape, generator=generator).to(value)
            return value * (1 + torch.finfo(value.dtype).eps * ulps)

        other = {name: rounded(value) if value.is_floating_point() else value for name, value in given.items()}
        hook = self.vlm.get_input_embeddings().register_forward_hook(lambda module, given, output: rounded(output))
        with torch.no_grad(), what_the_head_sees(self.vlm) as seen:
            try:
                self.vlm(**other, **self._start(1), use_cache=False)
            finally:
                hook.remove()
            self.vlm(**three, **self._start(3), use_cache=False)
        return max(share(numbers[:1, -1], expected.hidden) for numbers in seen)

    def _start(self, batch: int) -> dict[str, Tensor]:
        if not self.model.answer_start:
            return {}
        return {"decoder_input_ids": torch.tensor([self.model.answer_start] * batch, device=self.vlm.device)}

    def _generate(self, given: dict[str, Tensor], path: tuple[int, ...]) -> Tensor:
        """Logits (1, V) behind the path, which the library's `generate` is made to say."""
        out = self.vlm.generate(
            **given,
            **self._start(1),
            do_sample=False,
            num_beams=1,
            min_new_tokens=len(path) + 1,
            max_new_tokens=len(path) + 1,
            logits_processor=LogitsProcessorList([_Says(path)]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.logits[len(path)]


class _Says(LogitsProcessor):
    """Makes `generate` say the tokens of a path."""

    def __init__(self, path: tuple[int, ...]) -> None:
        self.path, self.said = path, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (B, V) that leave one token."""
        if self.said < len(self.path):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.path[self.said]] = 0.0
        self.said += 1
        return scores


def share(numbers: Tensor, expected: Tensor, largest: float | None = None) -> float:
    """Returns the largest difference as a share of the largest expected number, or of another one."""
    numbers, expected = numbers.float(), expected.float()
    if not numbers.isfinite().all() or not expected.isfinite().all():
        return math.inf
    largest = float(expected.abs().max()) if largest is None else largest
    return float((numbers - expected).abs().max()) / max(1e-3, largest)


def _off(read: Read, row: int, expected: Expected) -> float:
    of_nodes = zip(read.logits, expected.logits, expected.largest, strict=True)
    off = [share(numbers[row : row + 1], right, largest) for numbers, right, largest in of_nodes]
    return max(share(read.hidden[row : row + 1], expected.hidden), *off)
