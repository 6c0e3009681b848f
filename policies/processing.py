"""What the model is given: all that its processor makes of a prompt and a frame, and nothing else.

    text  ─ processor ─►  input_ids (L,), and whatever else it says of the tokens: token_type_ids (L,),
                          cross_attention_mask (L, 1, tiles), qformer_input_ids (Q,) ...   stored as rows
    frame ─ processor ─►  pixel_values, image_grid_thw, pixel_attention_mask ...           made at each forward

Which input is of the text and which of the image is not known by name: two texts of unequal length are processed, and
what changes is of the text. So a processor's own defaults, and inputs that no one here has heard of, reach the model.
`self_check.py` compares the result with the library's.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from manako.policies.architectures.model import Model
from manako.policies.features import COLUMN, FrozenFeatures
from manako.policies.interface import Rows
from manako.policies.pixels import PixelPipeline
from manako.policies.reading.reading import behind
from manako.policies.shared_frames import SharedFrames

NOT_READ = ("labels",)  # for a loss, not for what the model says
OWN = ("input_ids", "attention_mask")  # made here, of ids and lengths


class Processing:
    """A model's processor for frames of one shape.

    Args:
        model: the model, its processor, and what its answers' tokens are told.
        frame_shape: (H, W, 3) of the frames to come.
        texts: two prompts of unequal length.
        frames: how many of them a prompt has, k.

    Attributes:
        of_tokens: names of the inputs with a value for each token of the prompt.
        of_text: names of the further inputs that the text decides.
        pipeline: frames to all other inputs.
        features: stands for the pixels of rows that hold features, while the encoder is frozen; None: pixels do.
        pad_id: the token that fills shorter prompts.
    """

    def __init__(
        self, model: Model, frame_shape: tuple[int, int, int], texts: tuple[str, str], frames: int = 1
    ) -> None:
        self.model, self.processor = model, model.processor
        self.frame_shape, self.frames = frame_shape, frames
        shape = (1, frames, *frame_shape) if frames > 1 else (1, *frame_shape)
        self._example = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)  # (1, H, W, 3)
        self._lately: OrderedDict[bytes, Tensor] = OrderedDict()  # resized frames, by their content
        self._most = 0
        self._text = texts[0]
        self._nests_images = model.nests_images is not False
        try:
            short, long = (self.call([text], self._example) for text in texts)
        except (TypeError, ValueError):  # some processors want one list of images
            if model.nests_images is not None:
                raise
            self._nests_images = False
            short, long = (self.call([text], self._example) for text in texts)
        changing = [name for name in short if name not in OWN and not _equal(short[name], long.get(name))]
        lengths = short["input_ids"].shape[1], long["input_ids"].shape[1]
        self.of_tokens = tuple(name for name in changing if (short[name].shape[1], long[name].shape[1]) == lengths)
        self.of_text = tuple(name for name in changing if name not in self.of_tokens)
        self.pipeline = PixelPipeline(model.processor.image_processor, frame_shape, self._of_frames, frames)
        self.features: FrozenFeatures | None = None
        tokenizer = self.processor.tokenizer
        self.pad_id = tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at frames of its own."""
        return {**self.__dict__, "_lately": OrderedDict()}

    def call(self, texts: Sequence[str], frames: np.ndarray) -> dict[str, Tensor]:
        """Returns what the library's processor makes of B texts and frames (B, H, W, 3) uint8, or (B, k, H, W, 3)."""
        several = frames if frames.ndim == 5 else frames[:, None]  # (B, k, H, W, 3)
        pictures: list[Any] = [[Image.fromarray(frame) for frame in of_text] for of_text in several]
        images = pictures if self._nests_images else [picture for of_text in pictures for picture in of_text]
        begins = self._first_tokens()
        # a text that writes the first token itself must not get a second one
        options = {"add_special_tokens": False} if any(texts[0].startswith(token) for token in begins) else {}
        made = self.processor(text=list(texts), images=images, return_tensors="pt", **options)
        return {name: value for name, value in made.items() if torch.is_tensor(value) and name not in NOT_READ}

    def tokenize(self, text: str) -> dict[str, Tensor]:
        """Returns the inputs of one prompt that the text decides, without a batch dimension: `input_ids` (L,), ..."""
        made = self.call([text], self._example)
        return {name: made[name][0] for name in ("input_ids", *self.of_tokens, *self.of_text)}

    def go_on(self, text: str, answer: str) -> tuple[int, ...]:
        """Returns the tokens by which the tokenizer goes on from a prompt with an answer.

        They are those of prompt and answer less those of the prompt: an answer tokenized alone may be another one,
        since tokenizers of the Llama 2 kind put a space before what they are given. Where no token begins where the
        prompt ends, since the tokenizer joins the two, or where the processor writes something behind the text, they
        are the tokens of the answer behind the prompt's last ones.
        """
        tokenizer = self.processor.tokenizer
        if self.model.answer_start:  # an answer of its own, which the decoder begins with
            return tuple(tokenizer.encode(answer.lstrip(" "), add_special_tokens=False))
        before = self.call([text], self._example)["input_ids"][0].tolist()
        whole = self.call([text + answer], self._example)["input_ids"][0].tolist()
        if whole[: len(before)] == before:
            return tuple(whole[len(before) :])
        for start in range(len(before) - 1, max(-1, len(before) - 4), -1):  # such as PaliGemma's line end
            end = tokenizer.decode(before[start:])
            tail = tokenizer.encode(end, add_special_tokens=False)
            joined = tokenizer.encode(end + answer, add_special_tokens=False)
            if tail == before[start:] and joined[: len(tail)] == tail:
                return tuple(joined[len(tail) :])
        return tuple(tokenizer.encode(answer, add_special_tokens=False))

    def rows(self, prompts: Sequence[dict[str, Tensor]], images: np.ndarray) -> Rows:
        """Returns rows of B prompts of `tokenize` and frames uint8: what rollouts store.

        Args:
            prompts: B.
            images: (B, H, W, 3), or (B, k, H, W, 3), which the rows share.
        """
        lengths = torch.tensor([len(prompt["input_ids"]) for prompt in prompts])  # (B,)
        fillers = {"input_ids": self.pad_id, **dict.fromkeys([*self.of_tokens, *self.of_text], 0)}
        columns = {}
        for name, filler in fillers.items():
            values = [prompt[name] for prompt in prompts]
            longest = max(len(value) for value in values)
            columns[name] = torch.stack([pad(value, 0, longest - len(value), filler) for value in values])
        columns["lengths"] = lengths
        if images.ndim == 5:
            return Rows(columns, fillers, self._shared(images))
        return Rows({**columns, "frames": self.pipeline.resize(images)}, fillers)

    def _shared(self, images: np.ndarray) -> SharedFrames:
        """Frames (B, k, H, W, 3), each different one resized and held once; those of the last calls are known."""
        flat = images.reshape(-1, *images.shape[2:])  # (B k, H, W, 3)
        keys = [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in flat]
        places = {key: place for place, key in reversed(list(enumerate(keys)))}  # the first of each
        new = [key for key in places if key not in self._lately]
        if new:
            resized = self.pipeline.resize(flat[[places[key] for key in new]])
            self._lately |= zip(new, resized.unbind(), strict=True)
        for key in places:
            self._lately.move_to_end(key)
        self._most = max(self._most, 2 * len(keys))
        while len(self._lately) > self._most:
            self._lately.popitem(last=False)
        numbers = {key: number for number, key in enumerate(places)}
        index = torch.tensor([numbers[key] for key in keys]).view(images.shape[:2])  # (B, k)
        return SharedFrames(list(places), {"frames": [self._lately[key] for key in places]}, index)

    def model_inputs(self, inputs: Rows, answer: Sequence[int] | Tensor = ()) -> dict[str, Tensor]:
        """Returns the keyword arguments of the model's forward: prompts on the left, the answer's tokens behind each.

        Args:
            inputs: B rows of `rows`, on the model's device.
            answer: tokens that follow every prompt, or (B, K) those of each.

        Returns:
            `input_ids` and `attention_mask` (B, L + answer), and all else that the processor makes.
        """
        lengths = inputs["lengths"]
        answers = behind(answer, lengths)
        return self.with_answers(inputs, answers, torch.full_like(lengths, answers.shape[1]))

    def with_answers(self, inputs: Rows, answers: Tensor, answer_lengths: Tensor) -> dict[str, Tensor]:
        """Returns the same with an answer of its own for each prompt.

        Args:
            inputs: B rows of `rows`, on the model's device.
            answers: (B, K) int64, padded on the right.
            answer_lengths: (B,).
        """
        lengths = inputs["lengths"]
        width, longest = int(lengths.max()), answers.shape[1]
        rows = torch.arange(len(lengths), device=lengths.device)
        places = lengths[:, None] + torch.arange(longest, device=lengths.device)  # (B, K)
        ids, mask = self.ids_with_answers(inputs, answers, answer_lengths)
        columns = {}
        for name in self.of_tokens:
            column = pad(inputs[name][:, :width], 1, longest, 0)
            if longest:  # an answer's tokens are told what the prompt's last one is, unless the architecture knows more
                last = column[rows, lengths - 1]  # (B, ...)
                if name in self.model.answer_inputs:
                    last = torch.full_like(last, self.model.answer_inputs[name])
                column[rows[:, None], places] = last[:, None].expand(-1, longest, *last.shape[1:])
            columns[name] = column
        columns |= {name: inputs[name] for name in self.of_text}
        given = {"input_ids": ids, "attention_mask": mask.long(), **self.pixels(inputs), **columns}
        return {name: self._cast(value) for name, value in given.items()}

    def ids_with_answers(self, inputs: Rows, answers: Tensor, answer_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens of prompts and answers (B, L + K), and which of them are no padding (B, L + K) bool."""
        lengths, longest = inputs["lengths"], answers.shape[1]
        places = lengths[:, None] + torch.arange(longest, device=lengths.device)  # (B, K)
        ids = pad(inputs["input_ids"][:, : int(lengths.max())], 1, longest, self.pad_id).scatter(1, places, answers)
        mask = torch.arange(ids.shape[1], device=ids.device) < (lengths + answer_lengths)[:, None]
        return (ids.masked_fill(~mask, self.pad_id) if longest else ids), mask

    def training_inputs(self, inputs: Rows, answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Returns the model's inputs with an answer of its own for each prompt, and where the answers are.

        Args:
            inputs: B rows of `rows`.
            answers: their tokens.

        Returns:
            As of `model_inputs`, and `completion_mask` (B, L). Of an encoder-decoder `input_ids`, `attention_mask` and
            `completion_mask` are of the decoder, `encoder_input_ids` and `encoder_attention_mask` of the prompts.
        """
        start = self.model.answer_start
        lengths = torch.tensor([len(start) + len(answer) for answer in answers])  # (B,)
        longest = int(lengths.max())
        padded = torch.tensor(
            [[*start, *answer] + [self.pad_id] * (longest - len(start) - len(answer)) for answer in answers]
        )  # (B, K)
        if start:
            given = self.model_inputs(inputs)
            places = torch.arange(longest)
            mask = (places < lengths[:, None]).long()
            return {
                **given,
                "encoder_input_ids": given["input_ids"],
                "encoder_attention_mask": given["attention_mask"],
                "input_ids": padded,
                "attention_mask": mask,
                "completion_mask": mask * (places >= len(start)),
            }
        given = self.with_answers(inputs, padded, lengths)
        places = torch.arange(given["input_ids"].shape[1])
        return {**given, "completion_mask": given["attention_mask"] * (places >= inputs["lengths"][:, None])}

    @property
    def stores_features(self) -> bool:
        """Whether the encoder's features are stored beside the frames, and are what the model is given."""
        return self.features is not None and self.features.is_frozen

    def with_features(self, inputs: Rows) -> Rows:
        """Returns the rows with the features of their frames, where these are stored."""
        shared = inputs.shared
        if self.features is None or not self.stores_features:
            return inputs
        if shared is None:
            return inputs.with_column(COLUMN, self.features(inputs["frames"]))
        each = self.features.each(torch.stack(shared.pool["frames"]))
        return Rows(inputs.columns, inputs.fillers, shared.with_parts(COLUMN, each))

    def seen(self, frames: Tensor) -> Tensor | None:
        """Returns features (B, P, Dv) float32, on the CPU, of resized frames, or None where they are not stored."""
        return self.features(frames) if self.features is not None and self.stores_features else None

    def pixels(self, inputs: Rows) -> dict[str, Tensor]:
        """Returns the inputs that are made of the rows' frames, or the features that stand for them."""
        if self.stores_features and COLUMN in inputs:
            features = self._cast(inputs[COLUMN])  # (B, P, Dv), or (B, k, P, Dv)
            return {COLUMN: features.flatten(0, 1) if features.ndim == 4 else features}
        return {name: self._cast(value) for name, value in self.pipeline.pixels(inputs["frames"]).items()}

    def _of_frames(self, frames: np.ndarray) -> dict[str, Tensor]:
        """All inputs that the text does not decide, of frames (B, H, W, 3), or (B, k, H, W, 3)."""
        made = self.call([self._text] * len(frames), frames)
        return {name: made[name] for name in made if name not in (*OWN, *self.of_tokens, *self.of_text)}

    def _first_tokens(self) -> list[str]:
        tokenizer = self.processor.tokenizer
        return [str(token) for token in (tokenizer.bos_token, tokenizer.cls_token) if token]

    def _cast(self, value: Tensor) -> Tensor:
        """Pixels in the model's precision; some models do it themselves, others refuse."""
        return value.to(self.model.base_vlm.dtype) if value.is_floating_point() else value


def pad(tensor: Tensor, dim: int, count: int, filler: float) -> Tensor:
    """Returns the tensor with `count` more places at the end of a dimension."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, count), value=filler)


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)
