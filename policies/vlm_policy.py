"""The VLM policy: frames and instructions in, probabilities of a closed set of actions and a value out.

In order of execution: `prepare` makes the rows that rollouts store (prompt ids, frames as uint8), never to be rendered,
prompted or tokenized again; `distribution` is the one forward, which `act` samples from and `evaluate_actions`
differentiates. How the model is run over the rows is its `reading`: a prefix that all prompts share, checked here
against whole prompts, or whole prompts. Dropout is off, in rollouts and in updates, since PPO compares the two.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manako.policies.adapters import Adapter
from manako.policies.answers.closed_set import ActionCodec
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError
from manako.policies.interface import Acted, Draws, Evaluated, Policy, PolicySpec, Rows, act_categorical, entropy
from manako.policies.pixels import PixelPipeline
from manako.policies.prompts import PromptBuilder
from manako.policies.reading import Reading, SharedPrefix, WholePrompt
from manako.policies.reading.shared_prefix import find_prefix
from manako.policies.saving import load_weights, save_policy
from manako.policies.trainable import parameter_groups


class ValueHead(nn.Module):
    """Hidden states to values; the last layer starts at zero, so that the first values are 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns values (B,) of hidden states (B, D)."""
        return self.out(self.norm(hidden.float())).squeeze(-1)


class VLMPolicy(Policy):
    """A vision-language model that acts by naming one of a closed set of actions.

    Args:
        model: the model and what stands where in it.
        spec: actions, frame shape and prompt.
        check: compare the shared prefix with whole prompts, and do without it where they differ.

    Raises:
        PolicyError: the processor or the tokenizer cannot serve these actions or frames.

    Attributes:
        vlm: the model, with PEFT around it where there is LoRA.
        parts: what stands where in it.
        reading: how it is run.
        whole_prompt: the model's own forward, which `reading` is compared with.
        why_whole: why it reads whole prompts although its architecture names a faster reading; None where it does not.
        origin: where the model came from; loading.py fills it, saving.py writes it.
    """

    can_learn = True

    def __init__(self, model: Model, spec: PolicySpec, check: bool = True) -> None:
        super().__init__()
        self.vlm, self.processor, self.parts, self.spec = model.vlm, model.processor, model, spec
        self.value_head = ValueHead(self.base_vlm.get_output_embeddings().weight.shape[1]).to(self.base_vlm.device)
        tokenizer = self.processor.tokenizer
        example = np.zeros(spec.frame_shape, dtype=np.uint8)  # (H, W, 3)
        self.prompts = PromptBuilder(model, spec.system, example)
        self.codec = ActionCodec(tokenizer, spec.action_names, spec.action_format, self.prompts.lead)
        self.prompts.legend = self.codec.legend
        self.pipeline = PixelPipeline(self.processor.image_processor, spec.frame_shape)
        self.pad_id = tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = positions - max(map(len, self.codec.token_ids)) if positions else math.inf
        self.origin: dict[str, Any] = {}
        self.why_whole: str | None = None
        self.eval()
        self.whole_prompt = WholePrompt(self.parts, self.codec, self.pipeline, self.pad_id)
        self.reading: Reading
        self.reading = self._select_reading(check)

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """What TRL's trainers train."""
        return self.vlm

    @property
    def base_vlm(self) -> Any:
        """The model itself, without PEFT's wrapper."""
        return self.parts.base_vlm

    @property
    def has_lora(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.vlm, "peft_config")

    @property
    def config(self) -> Any:
        """The model's configuration; transformers' Trainer asks for it."""
        return self.base_vlm.config

    @property
    def device(self) -> torch.device:
        """Where the value head, and with it the model's output, lives."""
        return self.value_head.out.weight.device

    def train(self, mode: bool = True) -> "VLMPolicy":
        """Marks the policy as in training; dropout stays off, for the ratio of PPO must start at 1."""
        super().train(mode)
        self.vlm.eval()
        return self

    # ---- from a frame to an action -------------------------------------------------------------------------------

    def prepare(
        self, images: np.ndarray, instructions: Sequence[str], told: Mapping[str, np.ndarray] | None = None
    ) -> Rows:
        """Returns rows of `input_ids` (B, L) int64, `lengths` (B,) int64 and `frames` (B, h, w, 3) uint8, resized.

        Raises:
            PolicyError: frames of another shape than the policy was built for, or an instruction that the tokenizer or
                the model cannot hold.
        """
        if images.shape[1:] != tuple(self.spec.frame_shape):
            raise PolicyError(
                f"Frames of shape {images.shape[1:]} came, but this policy was built for "
                f"{tuple(self.spec.frame_shape)}: load it again for these frames."
            )
        ids = [self.prompts.encode(instruction) for instruction in instructions]
        for tokens, instruction in zip(ids, instructions, strict=True):
            self._check_prompt(tokens, instruction)
        lengths = torch.tensor([len(row) for row in ids])  # (B,)
        longest = int(lengths.max())
        padded = torch.tensor([[*row, *[self.pad_id] * (longest - len(row))] for row in ids])  # (B, L)
        columns = {"input_ids": padded, "lengths": lengths, "frames": self.pipeline.resize(images)}
        return Rows(columns, fillers={"input_ids": self.pad_id})

    def distribution(self, inputs: Rows, reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities (B, A) and values (B,), float32; gradients flow where they are enabled.

        Args:
            inputs: of `prepare`, on the policy's device.
            reading: another reading than the policy's own, to compare the two.
        """
        hidden, logits = (reading or self.reading).read(inputs)
        return self.codec.action_logprobs(logits), self.value_head(hidden)

    @torch.no_grad()
    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns B actions with S = 1: sampled, or the greedy ones."""
        logprobs, values = self.distribution(inputs.to(self.device))
        return act_categorical(logprobs, values, draws, greedy)

    def evaluate_actions(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns log-probabilities and entropy (B, 1), values (B,) and the distribution (B, A)."""
        logprobs, values = self.distribution(inputs)
        taken = logprobs.gather(1, actions["index"][:, None])  # (B, 1)
        return Evaluated(taken, entropy(logprobs)[:, None], values, logprobs)

    @torch.no_grad()
    def predict_values(self, inputs: Rows) -> Tensor:
        """Returns the values (B,) on the CPU."""
        return self.value_head(self.reading.read_hidden(inputs.to(self.device))).cpu()

    # ---- weights -------------------------------------------------------------------------------------------------

    @contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Computes what the prompts share once inside the block, without gradients, since no weight changes."""
        with self.reading.frozen_weights():
            yield

    def parameter_groups(
        self, learning_rate: float, adapter_learning_rate: float | None = None
    ) -> list[dict[str, Any]]:
        """Returns what learns as one group, or the adapter as a group of its own where it has its own rate."""
        return parameter_groups(self.parts, self.value_head, learning_rate, adapter_learning_rate)

    @torch.no_grad()
    def fit_adapter(self, images: np.ndarray) -> list[str]:
        """Gives adapters that learn and want statistics those of the frames (N, H, W, 3) uint8, once.

        Returns:
            The names of the adapters that were fitted.
        """
        wanting = {
            name: module
            for name, module in self.vlm.named_modules()
            if isinstance(module, Adapter) and not module.is_fitted
            if all(parameter.requires_grad for parameter in module.parameters())
        }
        if not wanting:
            return []
        frames = self.pipeline.resize(images).to(self.device)
        see = self.base_vlm.model.get_vision_features
        features = torch.cat([see(**self.pipeline.pixels(part)) for part in frames.split(32)])  # (N, P, Dv)
        return [name for name, adapter in wanting.items() if adapter.fit(features)]

    @property
    def has_reference(self) -> bool:
        """Whether there is LoRA to switch off."""
        return self.has_lora

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Switches LoRA off and the original adapter on inside the block: the policy as it was when training started.

        Raises:
            PolicyError: the policy has no LoRA to switch off.
        """
        if not self.has_lora:
            raise PolicyError("This policy has no LoRA to switch off: expected trainable: lora for a reference.")
        with torch.no_grad(), self.vlm.disable_adapter(), self.reading.frozen_weights():
            yield

    # ---- in words ------------------------------------------------------------------------------------------------

    def actions_from_env(self, to_env: np.ndarray) -> Rows:
        """Returns the rows of actions (B,) int64."""
        return Rows({"index": torch.as_tensor(np.asarray(to_env), dtype=torch.int64)})

    def prompt(self, instruction: str) -> str:
        """Returns the whole prompt of the cleaned instruction as text, one image placeholder in it."""
        return self.prompts.render(self.prompts.clean(instruction))

    def prompt_tokens(self, instruction: str) -> list[int]:
        """Returns the same as token ids, placeholders expanded."""
        return list(self.prompts.encode(instruction))

    def messages(self, instruction: str) -> list[dict[str, Any]]:
        """Returns the same as chat messages."""
        return self.prompts.messages(self.prompts.clean(instruction))

    def answers(self, actions: Rows) -> list[str]:
        """Returns what the policy says for each action."""
        return [self.codec.answers[index] for index in actions["index"].tolist()]

    def answer_tokens(self, actions: Rows) -> list[list[int]]:
        """Returns the same as token ids."""
        return [list(self.codec.token_ids[index]) for index in actions["index"].tolist()]

    def describe(self) -> list[tuple[str, str]]:
        """Returns how actions are said and how the model is run, for a run's header."""
        off = f" (no shared prefix: {self.why_whole})" if self.why_whole else ""
        pixels = "table" if self.pipeline.is_table else "the library's processor"
        dtype = str(self.base_vlm.dtype).removeprefix("torch.")
        return [
            ("answers", f"as {self.codec.format}"),
            ("forward", f"{self.reading.name}{off}; pixels by {pixels}; {self.device}, {dtype}"),
        ]

    # ---- on disk -------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Writes a model folder, see `manako.policies.saving`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_policy(self, folder)

    def load_weights(self, folder: Path) -> None:
        """Reads the weights that `save` wrote."""
        load_weights(self, folder)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _select_reading(self, check: bool) -> Reading:
        """The reading that the architecture names where it holds here, else whole prompts."""
        rest = (self.codec, self.pipeline, self.pad_id)
        if self.parts.reading is not SharedPrefix:
            return self.parts.reading(self.parts, *rest)
        if self.parts.placeholder_id not in self.prompts.encode(""):
            raise PolicyError(
                f"The rendered prompt holds no image token {self.parts.placeholder!r}: expected a processor that puts "
                "one where the image stands; use another model."
            )
        special = self.processor.tokenizer.all_special_ids
        shared = SharedPrefix(self.parts, *rest, find_prefix(self.prompts.encode, self.parts.placeholder_id, special))
        if check:
            frames = np.random.default_rng(0).integers(0, 256, (2, *self.spec.frame_shape), dtype=np.uint8)
            self.reading = shared  # `prepare` asks it
            examples = self.prepare(frames, ["go", "go to the far end of the room and wait"])
            self.why_whole = shared.why_not(examples.to(self.device), self.whole_prompt)
        elif not len(shared.prefix_ids):
            self.why_whole = "the prompts share nothing before the image"
        return self.whole_prompt if self.why_whole else shared

    def _check_prompt(self, tokens: tuple[int, ...], instruction: str) -> None:
        if not self.reading.accepts(tokens):
            raise PolicyError(
                f"The tokenizer joins the text before the instruction with the instruction {instruction[:200]!r}: "
                "expected one that begins with a letter, change it."
            )
        if len(tokens) > self.max_length:
            raise PolicyError(
                f"The prompt with the instruction {instruction[:200]!r} has {len(tokens)} tokens, but the model reads "
                f"at most {self.max_length}: shorten the instruction."
            )
