"""The text that all prompts begin with is computed once, at batch size 1, and expanded over the batch, with gradients.

    prefix (P,)   its keys and values, for all samples
    rest (B, L)   instruction, visual tokens, cue: right-padded, causal, read at each sample's last token
    hidden (B, D) -> the actions' rows of the LM head (B, A); below the root of a token trie its tokens run on the
                  prompt's cache

A model whose attention is not causal over this layout would get other numbers, so `why_not` compares it with the
model's own forward over whole prompts, on two prompts of unequal length, before it is used.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from manako.errors import first_line
from manako.policies.answers.closed_set import ActionCodec
from manako.policies.interface import Rows
from manako.policies.pixels import PixelPipeline
from manako.policies.reading.reading import Read, Reading

if TYPE_CHECKING:  # architectures name their reading
    from manako.policies.architectures.model import Model

# The prefix is what all these instructions leave alone: a tokenizer may join the text before the instruction with its
# first character.
PROBES = ("a", "b c", "", "X", "1", ".", ")", '"', "'s", "-", "é", "目")


def find_prefix(encode: Callable[[str], tuple[int, ...]], placeholder_id: int, special_ids: list[int]) -> Tensor:
    """Returns the ids (P,) that all prompts share before the first image placeholder.

    Args:
        encode: instruction -> token ids of its prompt.
        placeholder_id: the token that visual tokens replace.
        special_ids: the tokenizer's special tokens, with which no text is joined.
    """
    prompts = [encode(text) for text in PROBES]
    columns = zip(*prompts, strict=False)  # the tokens of all prompts at the same place
    same = list(itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    end = min(len(same), *(prompt.index(placeholder_id) for prompt in prompts))
    if end and prompts[0][end - 1] not in special_ids:
        end = max(0, end - 2)  # other instructions may be joined with the last of the text before them
    return torch.tensor(prompts[0][:end], dtype=torch.long)


class SharedPrefix(Reading):
    """Prefix cache and action rows.

    Args:
        model: see `Reading`.
        codec: see `Reading`.
        pipeline: see `Reading`.
        pad_id: see `Reading`.
        prefix_ids: (P,) of `find_prefix`.
    """

    def __init__(
        self, model: "Model", codec: ActionCodec, pipeline: PixelPipeline, pad_id: int, prefix_ids: Tensor
    ) -> None:
        super().__init__(model, codec, pipeline, pad_id)
        self.prefix_ids = prefix_ids
        self._prefix = tuple(prefix_ids.tolist())
        self._rows = torch.tensor([token for branch in codec.branches for token in branch.children])
        self._kept: DynamicCache | None = None

    @property
    def name(self) -> str:
        """How many tokens are shared."""
        return f"{len(self.prefix_ids)} tokens shared by all prompts"

    def read(self, inputs: Rows) -> Read:
        """Returns hidden states and logits."""
        hidden, cache = self._run_rest(inputs)
        return Read(hidden, self._branch_logits(hidden, cache, inputs["lengths"]))

    def read_hidden(self, inputs: Rows) -> Tensor:
        """Returns the hidden states (B, D) at the prompts' last tokens."""
        return self._run_rest(inputs)[0]

    def accepts(self, prompt: tuple[int, ...]) -> bool:
        """Returns whether the prompt begins with the prefix."""
        return prompt[: len(self._prefix)] == self._prefix

    @contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Keeps the prefix's keys and values inside the block, without gradients."""
        with torch.no_grad():
            before, self._kept = self._kept, self.run_prefix()
            try:
                yield
            finally:
                self._kept = before

    @torch.no_grad()
    def why_not(self, inputs: Rows, whole_prompt: Reading) -> str | None:
        """Returns why it must not be used, in words, or None where it gives what whole prompts give.

        Args:
            inputs: prompts of unequal length, on the model's device.
            whole_prompt: reads the same by the model's own forward.
        """
        if not self._prefix:
            return "the prompts share nothing before the image"
        expected = whole_prompt.read(inputs)
        try:
            read = self.read(inputs)
        except Exception as error:  # a model without `.model`, or with a cache of its own: said in the run's header
            return f"the model refused it, {type(error).__name__}: {first_line(error)}"
        tolerance = 1e-3 if self.vlm.dtype == torch.float32 else 0.1
        pairs = [(read.hidden, expected.hidden), *zip(read.logits, expected.logits, strict=True)]
        off = max(float((a - b).abs().max()) / max(1e-3, float(b.abs().max())) for a, b in pairs)
        return (
            None if off <= tolerance else f"it differs from the model's own forward by {off:.1g} of the largest value"
        )

    def run_prefix(self) -> DynamicCache:
        """Returns keys and values of the prefix, batch size 1."""
        cache = DynamicCache(config=self.vlm.config)
        self.vlm.model(input_ids=self.prefix_ids.to(self.vlm.device)[None], past_key_values=cache, use_cache=True)
        return cache

    def _run_rest(self, inputs: Rows) -> tuple[Tensor, DynamicCache]:
        """Hidden states (B, D) at the last token, and keys and values of the whole prompts."""
        prefix = self._kept if self._kept is not None else self.run_prefix()
        lengths, shared = inputs["lengths"], len(self.prefix_ids)
        ids = inputs["input_ids"][:, : int(lengths.max())]
        cache = self._expand(prefix, len(ids))
        extra = {name: values[:, shared:] for name, values in self.model.extra_inputs(ids).items()}
        hidden = self.vlm.model(
            input_ids=ids[:, shared:],
            past_key_values=cache,
            use_cache=True,
            **self.pipeline.pixels(inputs["frames"]),
            **extra,
        ).last_hidden_state  # (B, L - P, D)
        return hidden[torch.arange(len(ids), device=ids.device), lengths - shared - 1], cache

    def _expand(self, prefix: DynamicCache, batch: int) -> DynamicCache:
        """A cache whose layers are views of the prefix's, repeated over the batch; gradients add up in the one copy."""
        cache = DynamicCache(config=self.vlm.config)
        for source, layer in zip(prefix.layers, cache.layers, strict=True):
            layer.lazy_initialization(source.keys, source.values)
            layer.keys = source.keys.expand(batch, -1, -1, -1)
            layer.values = source.values.expand(batch, -1, -1, -1)
        return cache

    def _branch_logits(self, hidden: Tensor, cache: DynamicCache, lengths: Tensor) -> list[Tensor]:
        """Logits (B, children) of each branching node."""
        at_node: dict[tuple[int, ...], Tensor] = {(): hidden}  # (B, D) each
        for path in self.codec.path_tokens:
            below = self._run_path(path, cache, lengths)  # (B, path, D)
            for depth in range(1, len(path) + 1):
                at_node[path[:depth]] = below[:, depth - 1]
        head = self.vlm.get_output_embeddings()
        rows = self._rows.to(head.weight.device)
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

    def _run_path(self, path: tuple[int, ...], cache: DynamicCache, lengths: Tensor) -> Tensor:
        """Hidden states (B, path, D) of a path's tokens behind the prompts."""
        batch, seen = len(lengths), cache.get_seq_length()
        attended = torch.cat(
            [
                torch.arange(seen, device=lengths.device) < lengths[:, None],
                torch.ones(batch, len(path), dtype=torch.bool, device=lengths.device),
            ],
            dim=1,
        )  # (B, seen + path)
        branch_cache = DynamicCache(config=self.vlm.config)
        for source, layer in zip(cache.layers, branch_cache.layers, strict=True):
            layer.lazy_initialization(source.keys, source.values)
            layer.keys, layer.values = source.keys, source.values
        return self.vlm.model(
            input_ids=torch.tensor(path, device=lengths.device).expand(batch, -1),
            attention_mask=attended.long(),
            position_ids=lengths[:, None] + torch.arange(len(path), device=lengths.device),
            past_key_values=branch_cache,
            use_cache=True,
        ).last_hidden_state
