"""The text that all prompts begin with is computed once, at batch size 1, and expanded over the batch, with gradients.

    prefix (P,)   its keys and values, for all samples
    rest (B, L)   instruction, visual tokens, cue: right-padded, causal, read at each sample's last token
    hidden (B, D) -> the actions' rows of the LM head (B, A); below the root of a token trie its tokens run on the
                  prompt's cache

A model whose attention is not causal over this layout would get other numbers, so it is compared with the library's own
forward over whole prompts before it is used (`self_check.py`).
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from manako.policies.interface import Rows
from manako.policies.reading.going_on import GoingOn, Said, SaidAll
from manako.policies.reading.reading import Choose, Read, Reading, behind
from manako.policies.reading.whole_prompt import WholePrompt

if TYPE_CHECKING:  # architectures name their reading
    from manako.policies.answers.bins import BinCodec
    from manako.policies.answers.closed_set import ActionCodec
    from manako.policies.architectures.model import Model
    from manako.policies.processing import Processing

MakeCache = Callable[[], DynamicCache]  # keys and values, made where they are needed

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
        processing: see `Reading`.
        prefix_ids: (P,) of `find_prefix`.
    """

    def __init__(
        self, model: "Model", codec: "ActionCodec | BinCodec", processing: "Processing", prefix_ids: Tensor
    ) -> None:
        super().__init__(model, codec, processing)
        self.prefix_ids = prefix_ids
        self._prefix = tuple(prefix_ids.tolist())
        self._rows = torch.tensor([token for branch in codec.branches for token in branch.children])
        self._kept: DynamicCache | None = None
        self._whole_prompt = WholePrompt(model, codec, processing)
        self.start = len(prefix_ids)  # place in a prompt of the first of the hidden states that `_run_rest` gives
        self.longest_answer = max(map(len, codec.path_tokens), default=0)

    @property
    def name(self) -> str:
        """How many tokens are shared."""
        return f"{len(self.prefix_ids)} tokens shared by all prompts"

    def read(self, inputs: Rows) -> Read:
        """Returns hidden states and logits."""
        if self.is_beyond_window(inputs):
            return self._whole_prompt.read(inputs)
        hidden, cache, last = self._run_prompts(inputs)
        return Read(hidden, self._branch_logits(hidden, cache, inputs["lengths"], last))

    def read_vectors(self, inputs: Rows, answers: Tensor) -> Read:
        """Returns hidden states and logits, by one pass over what follows the prefix, answers among it."""
        if self.is_beyond_window(inputs):
            return self._whole_prompt.read_vectors(inputs, answers)
        hidden = self._run_prompts(inputs, answers)[0]  # (B, 1 + K, D)
        head = self._head()
        return Read(hidden[:, 0], [head(entry, hidden[:, entry]) for entry in range(hidden.shape[1])])

    def say_vector(self, inputs: Rows, choose: Choose) -> Tensor:
        """Has an answer said token by token, on the prompt's cache."""
        if self.is_beyond_window(inputs):
            return self._whole_prompt.say_vector(inputs, choose)
        hidden, cache, last = self._run_prompts(inputs)
        head, at, said = self._head(), hidden, []
        for entry in range(len(self.codec.branches)):
            said.append(choose(entry, head(entry, at)))
            if entry + 1 < len(self.codec.branches):
                at = self._run_path(torch.stack(said, 1), cache(), inputs["lengths"], last)[:, -1]
        return hidden

    def read_hidden(self, inputs: Rows) -> Tensor:
        """Returns the hidden states (B, D) at the prompts' last tokens."""
        return self._whole_prompt.read_hidden(inputs) if self.is_beyond_window(inputs) else self._run_prompts(inputs)[0]

    def go_on(self, inputs: Rows) -> GoingOn:
        """Returns the prompts with their keys and values, to which each token adds its own."""
        if self.is_beyond_window(inputs):
            return self._whole_prompt.go_on(inputs)
        return _Cached(self, inputs)

    def read_answers(self, inputs: Rows, answers: Tensor, lengths: Tensor, asked: Tensor) -> SaidAll:
        """Returns what the model says of whole answers, in one forward behind the prefix."""
        if self.is_beyond_window(inputs, answers.shape[1]):
            return self._whole_prompt.read_answers(inputs, answers, lengths, asked)
        hidden, _, _ = self._run_rest(inputs, answers, lengths)
        first = inputs["lengths"] - self.start - 1  # (B,) the prompt's last token
        places = first[:, None] + torch.arange(answers.shape[1], device=answers.device)  # (B, S)
        before = hidden[torch.arange(len(answers), device=answers.device)[:, None], places]  # (B, S, D)
        return SaidAll(before, self.vlm.get_output_embeddings()(before[asked]))

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

    def is_beyond_window(self, inputs: Rows, answer: int | None = None) -> bool:
        """Returns whether a layer's sliding window is shorter than these prompts and their answers.

        Its cache then drops keys that are read again. The check at construction has seen two prompts; longer ones must
        not depend on how families mask such windows.
        """
        return int(inputs["lengths"].max()) + (self.longest_answer if answer is None else answer) >= self._window

    @functools.cached_property
    def _window(self) -> float:
        """How many tokens every layer remembers."""
        layers = DynamicCache(config=self.vlm.config).layers
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=math.inf)

    def run_prefix(self) -> DynamicCache:
        """Returns keys and values of the prefix, batch size 1."""
        cache = DynamicCache(config=self.vlm.config)
        self.vlm.model(input_ids=self.prefix_ids.to(self.vlm.device)[None], past_key_values=cache, use_cache=True)
        return cache

    def _run_prompts(self, inputs: Rows, answers: Tensor | None = None) -> tuple[Tensor, MakeCache, Tensor]:
        """Hidden states (B, D) at the last token, keys and values of whole prompts, position (..., B) of that token.

        With answers (B, K) behind the prompts, the hidden states are (B, 1 + K, D), from that token on.
        """
        lengths = inputs["lengths"]
        behind_them = lengths.new_zeros(len(lengths), 0) if answers is None else answers
        hidden, cache, positions = self._run_rest(inputs, behind_them, torch.full_like(lengths, behind_them.shape[1]))
        rows = torch.arange(len(lengths), device=lengths.device)
        last = lengths - 1 if positions is None else positions[..., rows, lengths - 1]
        place = lengths - self.start - 1  # (B,)
        if answers is None:
            return hidden[rows, place], cache, last
        places = place[:, None] + torch.arange(answers.shape[1] + 1, device=lengths.device)
        return hidden[rows[:, None], places], cache, last

    def _run_rest(
        self, inputs: Rows, answers: Tensor, answer_lengths: Tensor
    ) -> tuple[Tensor, MakeCache, Tensor | None]:
        """Hidden states (B, L - P, D) behind the prefix, keys and values of all, positions (..., B, L) if counted.

        Args:
            inputs: B rows.
            answers: (B, K) int64 behind the prompts.
            answer_lengths: (B,) of them.
        """
        given = self.processing.with_answers(inputs, answers, answer_lengths)
        hidden, cache, positions = self._run_given(given, len(answers))
        return hidden, lambda: cache, positions

    def _run_given(self, given: dict[str, Tensor], batch: int) -> tuple[Tensor, DynamicCache, Tensor | None]:
        """The same of what the model is given."""
        prefix = self._kept if self._kept is not None else self.run_prefix()
        shared = len(self.prefix_ids)
        cache = self._expand(prefix, batch)
        positions = None if self.model.positions is None else self.model.positions(self.vlm, given)  # (..., B, L)
        cut = [name for name in self.processing.of_tokens if name not in self.model.by_place]
        rest = {name: given[name][:, shared:] for name in ("input_ids", *cut)}
        others = {name: value for name, value in given.items() if name not in rest and name != "attention_mask"}
        if positions is not None:
            others["position_ids"] = positions[..., shared:]
        hidden = self.vlm.model(**rest, **others, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden, cache, positions

    def _expand(self, prefix: DynamicCache, batch: int) -> DynamicCache:
        """A cache whose layers are views of the prefix's, repeated over the batch; gradients add up in the one copy."""
        cache = DynamicCache(config=self.vlm.config)
        for source, layer in zip(prefix.layers, cache.layers, strict=True):
            layer.lazy_initialization(source.keys, source.values)
            layer.keys = source.keys.expand(batch, -1, -1, -1)
            layer.values = source.values.expand(batch, -1, -1, -1)
            if layer.is_sliding:
                layer.cumulative_length = source.cumulative_length
        return cache

    def _branch_logits(self, hidden: Tensor, cache: MakeCache, lengths: Tensor, last: Tensor) -> list[Tensor]:
        """Logits (B, children) of each branching node."""
        at_node: dict[tuple[int, ...], Tensor] = {(): hidden}  # (B, D) each
        for path in self.codec.path_tokens:
            below = self._run_path(path, cache(), lengths, last)  # (B, path, D)
            for depth in range(1, len(path) + 1):
                at_node[path[:depth]] = below[:, depth - 1]
        head = self._head()
        return [head(number, at_node[branch.path]) for number, branch in enumerate(self.codec.branches)]

    def _head(self) -> Callable[[int, Tensor], Tensor]:
        """The LM head's rows of the branches: number of a branch, hidden states (B, D) -> logits (B, children)."""
        head = self.vlm.get_output_embeddings()
        rows = self._rows.to(head.weight.device)
        weight = head.weight[rows]  # (children of all branches, D)
        bias = None if head.bias is None else head.bias[rows]
        ends = list(itertools.accumulate(len(branch.children) for branch in self.codec.branches))

        def of_branch(number: int, hidden: Tensor) -> Tensor:
            own = slice(ends[number] - len(self.codec.branches[number].children), ends[number])
            return F.linear(hidden, weight[own], None if bias is None else bias[own])

        return of_branch

    def _run_path(self, path: tuple[int, ...] | Tensor, cache: DynamicCache, lengths: Tensor, last: Tensor) -> Tensor:
        """Hidden states (B, path, D) of a path's tokens behind the prompts, the same for all or (B, path)."""
        branch_cache = copy.copy(cache)  # with what a model keeps beside keys and values, such as the images seen
        branch_cache.layers = [copy.copy(layer) for layer in cache.layers]  # they make new tensors of the old
        return self.run_tokens(behind(path, lengths), branch_cache, lengths, last, cache.get_seq_length())

    def run_tokens(self, tokens: Tensor, cache: DynamicCache, lengths: Tensor, last: Tensor, width: int) -> Tensor:
        """Hidden states (B, n, D) of tokens (B, n) that go on behind the prompts, whose cache they are added to.

        Args:
            tokens: (B, n).
            cache: of the prompts, and of what was said behind them.
            lengths: (B,) of the prompts.
            last: position (..., B) of the last token so far.
            width: how many places the padded prompts take in the cache.
        """
        seen = cache.get_seq_length() + tokens.shape[1]
        places = torch.arange(seen, device=lengths.device)
        attended = (places < lengths[:, None]) | (places >= width)  # (B, seen)
        return self.vlm.model(
            input_ids=tokens,
            attention_mask=attended.long(),
            position_ids=last[..., None] + 1 + torch.arange(tokens.shape[1], device=lengths.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


class _Cached(GoingOn):
    """Keys and values of prompts and of what was said behind them."""

    def __init__(self, reading: SharedPrefix, inputs: Rows) -> None:
        self.reading, self.lengths = reading, inputs["lengths"]
        hidden, cache, self.last = reading._run_prompts(inputs)
        self.cache = cache()
        self.width = self.cache.get_seq_length()
        self.now = self._said(hidden)

    def say(self, tokens: Tensor) -> Said:
        """Takes the next token of each answer."""
        hidden = self.reading.run_tokens(tokens[:, None], self.cache, self.lengths, self.last, self.width)
        self.last = self.last + 1
        self.now = self._said(hidden[:, 0])
        return self.now

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.lengths, self.last = self.lengths[rows], self.last[..., rows]
        self.now = Said(self.now.hidden[rows], self.now.logits[rows])

    def _said(self, hidden: Tensor) -> Said:
        return Said(hidden, self.reading.vlm.get_output_embeddings()(hidden))
