"""The VLM policy: frames and instructions in, probabilities of the actions and a value out.

One forward serves acting and learning. It takes what the rollout stored (prompt ids, frames as uint8), never text:

    prefix (P,)   the text that all prompts begin with: its keys and values are computed once at batch size 1 and
                  expanded over the batch, with gradients
    rest (B, L)   instruction, visual tokens, cue: right-padded, causal, read at each sample's last token
    hidden (B, D) -> rows of the LM head (B, A) -> log-probabilities, and -> value head (B,)

A model whose attention is not causal over this layout would get other numbers, so at construction the short way is
compared with the model's own whole forward on two prompts; where they differ the whole forward is used (`uses_prefix`
is then False). Dropout is off here, in rollouts and in updates, since PPO compares the two.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from manako.policies.adapters import Adapter
from manako.policies.answers.closed_set import ActionCodec
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError
from manako.policies.pixels import PixelPipeline
from manako.policies.prompts import PromptBuilder
from manako.policies.source import SYSTEM, ActionFormat

# The constant prefix is what all these instructions leave alone: a tokenizer may join the text before the instruction
# with its first character.
PROBES = ("a", "b c", "", "X", "1", ".", ")", '"', "'s", "-", "é", "目")


class PolicyInputs(NamedTuple):
    """What the policy saw; stored in rollouts as is."""

    input_ids: torch.Tensor  # (B, L) int64, whole prompts, right-padded
    lengths: torch.Tensor  # (B,) int64, prompt lengths
    frames: torch.Tensor  # (B, h, w, 3) uint8, resized where the pixel pipeline allows

    def select(self, rows: torch.Tensor) -> "PolicyInputs":
        """The samples at these rows."""
        return PolicyInputs(*(field[rows] for field in self))

    def to(self, device: torch.device) -> "PolicyInputs":
        """The same on another device."""
        return PolicyInputs(*(field.to(device) for field in self))


class PolicyOutput(NamedTuple):
    """What the policy answers."""

    logprobs: torch.Tensor  # (B, A) float32, exact and normalised
    values: torch.Tensor  # (B,) float32


@dataclass(frozen=True)
class PolicySpec:
    """Everything but the weights that makes a policy; saved as policy.json.

    Args:
        action_names: the A actions, in the env's order.
        frame_shape: (H, W, 3) of the env's frames.
        action_format: see actions.py.
        system: the prompt's system text; `{actions}` stands for the list of actions.
    """

    action_names: tuple[str, ...]
    frame_shape: tuple[int, int, int]
    action_format: ActionFormat = "auto"
    system: str = SYSTEM


class ValueHead(nn.Module):
    """Last hidden state (B, D) -> value (B,), float32; starts at 0, so the first advantages are the rewards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, D) -> values (B,)."""
        return self.out(self.norm(hidden.float())).squeeze(-1)


class VLMPolicy(nn.Module):
    """A vision-language model that acts by naming one of a closed set of actions.

    Args:
        model: a model that `AutoModelForImageTextToText` loads (ours or any other), its processor and its parts' names.
        spec: actions, frame shape and prompt.
        check: compare the short forward with the whole one and fall back if they differ.

    Raises:
        PolicyError: the processor or the tokenizer cannot serve these actions or frames.
    """

    def __init__(self, model: Model, spec: PolicySpec, check: bool = True) -> None:
        super().__init__()
        self.model_parts = model
        self.vlm = model.vlm
        processor = self.processor = model.processor
        self.spec = spec
        base = self.base_vlm
        self.value_head = ValueHead(base.get_output_embeddings().weight.shape[1]).to(base.device)
        self.image_token, self.image_token_id = model.placeholder, model.placeholder_id
        example = np.zeros(spec.frame_shape, dtype=np.uint8)  # (H, W, 3)
        self.prompts = PromptBuilder(processor, self.image_token, spec.system, example, model.render)
        self.codec = ActionCodec(processor.tokenizer, spec.action_names, spec.action_format, self.prompts.lead)
        self.prompts.legend = self.codec.legend
        self.pipeline = PixelPipeline(processor.image_processor, spec.frame_shape)
        self.pad_id = processor.tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = processor.tokenizer.eos_token_id or 0
        self.prefix_ids = self._find_prefix()  # (P,)
        self._prefix = tuple(self.prefix_ids.tolist())
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = positions - max(map(len, self.codec.token_ids)) if positions else math.inf
        rows = torch.tensor([token for branch in self.codec.branches for token in branch.children])
        self.register_buffer("action_rows", rows, persistent=False)  # (children of all branches,)
        self.origin: dict[str, Any] = {}  # where the model came from; saving.py fills and saves it
        self._kept_prefix: DynamicCache | None = None
        self.uses_prefix = len(self.prefix_ids) > 0
        self.eval()
        if check and not self._short_way_agrees():
            self.uses_prefix = False

    @property
    def base_vlm(self) -> Any:
        """The model itself, without PEFT's wrapper."""
        return self.vlm.get_base_model() if self.has_lora else self.vlm

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

    def prepare(self, images: np.ndarray, instructions: Sequence[str]) -> PolicyInputs:
        """Frames (N, H, W, 3) uint8 and N instructions -> what the policy sees, on the CPU.

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
        lengths = torch.tensor([len(row) for row in ids])  # (N,)
        padded = torch.full((len(ids), int(lengths.max())), self.pad_id)  # (N, L)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        return PolicyInputs(padded, lengths, self.pipeline.geometry(images))

    @torch.no_grad()
    def fit_adapter(self, images: np.ndarray) -> bool:
        """Gives an adapter that learns, and has a `fit` and no statistics yet, those of the frames (N, H, W, 3) uint8.

        Returns:
            Whether there was one.
        """
        adapters = [
            module
            for module in self.vlm.modules()
            if isinstance(module, Adapter)
            and not module.is_fitted
            and all(parameter.requires_grad for parameter in module.parameters())
        ]
        if adapters:
            frames = self.pipeline.geometry(images).to(self.device)
            see = self.base_vlm.model.get_vision_features
            features = torch.cat([see(**self.pipeline.pixels(part)) for part in frames.split(32)])  # (N, P, Dv)
            for adapter in adapters:
                adapter.fit(features)
        return bool(adapters)

    def forward(self, inputs: PolicyInputs) -> PolicyOutput:
        """Log-probabilities (B, A) and values (B,) for stored inputs; gradients flow where they are enabled."""
        final, logits = self._short_way(inputs) if self.uses_prefix else self._whole_way(inputs)
        return PolicyOutput(self.codec.action_logprobs(logits), self.value_head(final))

    def whole_forward(self, inputs: PolicyInputs) -> PolicyOutput:
        """The same numbers by the model's own forward over whole prompts, without the shared prefix."""
        final, logits = self._whole_way(inputs)
        return PolicyOutput(self.codec.action_logprobs(logits), self.value_head(final))

    def _short_way(self, inputs: PolicyInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states (B, D) at the last token and each branch's logits, by prefix cache and action rows."""
        prefix = self._kept_prefix if self._kept_prefix is not None else self._run_prefix()
        longest = int(inputs.lengths.max())
        rest = inputs.input_ids[:, len(self.prefix_ids) : longest]  # (B, L)
        last = inputs.lengths - len(self.prefix_ids) - 1  # (B,)
        cache = self._expand(prefix, len(rest))
        hidden = self.base_vlm.model(
            input_ids=rest, past_key_values=cache, use_cache=True, **self.pipeline.pixels(inputs.frames)
        ).last_hidden_state  # (B, L, D)
        final = hidden[torch.arange(len(rest), device=rest.device), last]  # (B, D)
        return final, self._branch_logits(final, cache, inputs.lengths)

    def _whole_way(self, inputs: PolicyInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same by the model's own forward; one pass for each longest path of the token trie."""
        pixels = self.pipeline.pixels(inputs.frames)
        rows = torch.arange(len(inputs.lengths), device=inputs.lengths.device)
        passes = []
        for path in self.codec.path_tokens or ((),):  # prompts followed by the path, (B, L + path)
            ids = F.pad(inputs.input_ids, (0, len(path)), value=self.pad_id)
            for offset, token in enumerate(path):
                ids[rows, inputs.lengths + offset] = token
            mask = torch.arange(ids.shape[1], device=ids.device) < (inputs.lengths + len(path))[:, None]  # (B, L)
            outputs = self.base_vlm(
                input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False, **pixels
            )
            passes.append((path, outputs))
        logits = []
        for branch in self.codec.branches:
            outputs = next(out for path, out in passes if path[: len(branch.path)] == branch.path)
            logits.append(outputs.logits[rows, inputs.lengths - 1 + len(branch.path)][:, list(branch.children)])
        return self.model_parts.last_hidden(passes[0][1])[rows, inputs.lengths - 1], logits

    @contextlib.contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Inside: no gradients, and the prefix's keys and values are kept, since no weight changes."""
        with torch.no_grad():
            self._kept_prefix = self._run_prefix() if self.uses_prefix else None
            try:
                yield
            finally:
                self._kept_prefix = None

    @property
    def has_lora(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.vlm, "peft_config")

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside: LoRA is off and the adapter is the original one, as the policy was when training started.

        Raises:
            PolicyError: the policy has no LoRA to switch off.
        """
        if not self.has_lora:
            raise PolicyError("This policy has no LoRA to switch off: expected trainable: lora for a reference.")
        with torch.no_grad(), self.vlm.disable_adapter():
            kept, self._kept_prefix = self._kept_prefix, self._run_prefix() if self.uses_prefix else None
            try:
                yield
            finally:
                self._kept_prefix = kept

    def _find_prefix(self) -> torch.Tensor:
        """The ids that all prompts share before the first image token."""
        prompts = [self.prompts.encode(text) for text in PROBES]
        if self.image_token_id not in prompts[0]:
            raise PolicyError(
                f"The rendered prompt holds no image token {self.image_token!r}: expected a processor that puts one "
                "where the image stands; use another model."
            )
        columns = zip(*prompts, strict=False)  # the tokens of all prompts at the same place
        same = list(itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        end = min(len(same), *(prompt.index(self.image_token_id) for prompt in prompts))
        if end and prompts[0][end - 1] not in self.processor.tokenizer.all_special_ids:
            end = max(0, end - 2)  # other instructions may be joined with the last of the text before them
        return torch.tensor(prompts[0][:end], dtype=torch.long)

    def _check_prompt(self, tokens: tuple[int, ...], instruction: str) -> None:
        if self.uses_prefix and tokens[: len(self._prefix)] != self._prefix:
            raise PolicyError(
                f"The tokenizer joins the text before the instruction with the instruction {instruction[:200]!r}: "
                "expected one that begins with a letter, change it."
            )
        if len(tokens) > self.max_length:
            raise PolicyError(
                f"The prompt with the instruction {instruction[:200]!r} has {len(tokens)} tokens, but the model reads "
                f"at most {self.max_length}: shorten the instruction."
            )

    def _run_prefix(self) -> DynamicCache:
        """Keys and values of the constant prefix, batch size 1."""
        cache = DynamicCache(config=self.base_vlm.config)
        self.base_vlm.model(input_ids=self.prefix_ids.to(self.device)[None], past_key_values=cache, use_cache=True)
        return cache

    def _expand(self, prefix: DynamicCache, batch: int) -> DynamicCache:
        """A cache whose layers are views of the prefix's, repeated over the batch; gradients add up in the one copy."""
        cache = DynamicCache(config=self.base_vlm.config)
        for source, layer in zip(prefix.layers, cache.layers, strict=True):
            layer.lazy_initialization(source.keys, source.values)
            layer.keys = source.keys.expand(batch, -1, -1, -1)
            layer.values = source.values.expand(batch, -1, -1, -1)
        return cache

    def _branch_logits(self, final: torch.Tensor, cache: DynamicCache, lengths: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, children) of each branching node; below the root, its tokens run on the prompt's cache."""
        at_node: dict[tuple[int, ...], torch.Tensor] = {(): final}
        base, batch = self.base_vlm, len(final)
        for path in self.codec.path_tokens:
            tokens = torch.tensor(path, device=final.device).expand(batch, -1)  # (B, path)
            seen = cache.get_seq_length()
            steps = torch.arange(len(path), device=final.device)
            mask = torch.cat(
                [
                    torch.arange(seen, device=final.device) < lengths[:, None],
                    torch.ones(batch, len(path), dtype=torch.bool, device=final.device),
                ],
                dim=1,
            )  # (B, seen + path), True = attended
            branch_cache = DynamicCache(config=base.config)
            for source, layer in zip(cache.layers, branch_cache.layers, strict=True):
                layer.lazy_initialization(source.keys, source.values)
                layer.keys, layer.values = source.keys, source.values
            hidden = base.model(
                input_ids=tokens,
                attention_mask=mask.long(),
                position_ids=lengths[:, None] + steps,
                past_key_values=branch_cache,
                use_cache=True,
            ).last_hidden_state  # (B, path, D)
            for depth in range(1, len(path) + 1):
                at_node[path[:depth]] = hidden[:, depth - 1]
        head = base.get_output_embeddings()
        rows = self.action_rows
        weight = head.weight[rows]  # (children of all branches, D)
        bias = None if head.bias is None else head.bias[rows]
        logits, start = [], 0
        for branch in self.codec.branches:
            stop = start + len(branch.children)
            logits.append(
                F.linear(at_node[branch.path], weight[start:stop], None if bias is None else bias[start:stop])
            )
            start = stop
        return logits

    @torch.no_grad()
    def _short_way_agrees(self) -> bool:
        """Whether the short way gives what the model's own forward gives, on two prompts of unequal length."""
        if not self.uses_prefix:
            return False
        frames = np.random.default_rng(0).integers(0, 256, (2, *self.spec.frame_shape), dtype=np.uint8)
        inputs = self.prepare(frames, ["go", "go to the far end of the room and wait"]).to(self.device)
        whole, whole_logits = self._whole_way(inputs)
        try:
            short, short_logits = self._short_way(inputs)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            return False  # a model without `.model`, or with a cache of its own
        tolerance = 1e-3 if self.base_vlm.dtype == torch.float32 else 0.1
        pairs = [(short, whole), *zip(short_logits, whole_logits, strict=True)]
        return all(float((a - b).abs().max()) <= tolerance * max(1e-3, float(b.abs().max())) for a, b in pairs)
