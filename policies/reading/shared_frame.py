"""Samples that share their frame, and the beginning of what follows it, share its forward. The frame stands first.

    prefix (P,)     text before the frame, once for all samples
    frame  (F,)     once for each different frame, G of them; in rollouts those of the step before are still known
    trie   (N,)     what follows: each different beginning once, seeing its own ancestors alone (SpecInfer's tree
                    attention, arXiv:2305.09781)
    hidden (B, L - P - F, D) of the samples, gathered from their places in their frame's trie

Ten decisions on one frame, each prompt the one before and a token more, so cost little more than one. What a model
whose masks or positions are of another kind makes of it is compared with whole prompts before it is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from manako.policies.interface import Rows
from manako.policies.reading.shared_prefix import MakeCache, SharedPrefix

if TYPE_CHECKING:  # architectures name their reading
    from manako.policies.answers.bins import BinCodec
    from manako.policies.answers.closed_set import ActionCodec
    from manako.policies.architectures.model import Model
    from manako.policies.processing import Processing

Layers = list[tuple[Tensor, Tensor]]  # keys and values (heads, places, width) of each layer


class SharedFrame(SharedPrefix):
    """Prefix, frames and tries.

    Args:
        model: see `Reading`.
        codec: see `Reading`.
        processing: see `Reading`.
        prefix_ids: (P,) of `find_prefix`.
        start: place of the first token behind the frame's last one, the same in all prompts.
    """

    def __init__(
        self,
        model: "Model",
        codec: "ActionCodec | BinCodec",
        processing: "Processing",
        prefix_ids: Tensor,
        start: int,
    ) -> None:
        super().__init__(model, codec, processing, prefix_ids)
        self.start = start
        self._frames: dict[bytes, Layers] | None = None  # of the last call, while the weights are frozen

    @property
    def name(self) -> str:
        """What is shared."""
        return f"{len(self.prefix_ids)} tokens shared by all prompts, frame and beginning by those of one frame"

    @contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Keeps the keys and values of prefix and frames inside the block, without gradients."""
        before = self._frames
        with super().frozen_weights():
            self._frames = {}
            try:
                yield
            finally:
                self._frames = before

    def _run_rest(self, inputs: Rows, answers: Tensor, answer_lengths: Tensor) -> tuple[Tensor, MakeCache, None]:
        """See `SharedPrefix`; the hidden states begin behind the frame."""
        lengths, start = inputs["lengths"], self.start
        ids, mask = self.processing.ids_with_answers(inputs, answers, answer_lengths)
        keys = shown(inputs)
        firsts: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            firsts.setdefault(key, row)
        groups = {key: number for number, key in enumerate(firsts)}
        group = torch.tensor([groups[key] for key in keys])  # (B,)
        frames = self._run_frames(inputs, list(firsts.items()))

        rest = [row[start:end] for row, end in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]
        tries = [Trie() for _ in firsts]
        nodes = [tries[number].add(tokens) for number, tokens in zip(group.tolist(), rest, strict=True)]
        longest = ids.shape[1] - start
        places = torch.tensor([row + [0] * (longest - len(row)) for row in nodes])  # (B, L - P - F)
        device = lengths.device
        tokens, depths, sees = (each.to(device) for each in laid_out(tries, self.processing.pad_id))
        past = torch.ones(*sees.shape[:2], start, dtype=torch.bool, device=device)
        cache = DynamicCache(config=self.vlm.config)
        for layer, (one, two) in zip(cache.layers, frames, strict=True):
            layer.lazy_initialization(one, two)
            layer.keys, layer.values = one, two
        hidden = self.vlm.model(
            input_ids=tokens,
            attention_mask=self._as_mask(torch.cat([past, sees], -1)[:, None]),  # (G, 1, N, P + F + N)
            position_ids=start + depths,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (G, N, D)
        group, places = group.to(device), places.to(device)

        def of_samples() -> DynamicCache:
            """Keys and values of whole prompts, (B, heads, L, width)."""
            made = DynamicCache(config=self.vlm.config)
            before = torch.arange(start, device=device).expand(len(places), -1)
            at = torch.cat([before, start + places], 1)  # (B, L)
            for source, layer in zip(cache.layers, made.layers, strict=True):
                own = [each[group[:, None], :, at].transpose(1, 2) for each in (source.keys, source.values)]
                layer.lazy_initialization(*own)
                layer.keys, layer.values = own
            return made

        return hidden[group[:, None], places], of_samples, None

    def _as_mask(self, sees: Tensor) -> Tensor:
        """A bool mask as this model's attention takes it."""
        if self.vlm.config.get_text_config()._attn_implementation == "sdpa":
            return sees
        dtype = self.vlm.dtype
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)

    def _run_frames(self, inputs: Rows, firsts: Sequence[tuple[bytes, int]]) -> Layers:
        """Keys and values (G, heads, P + F, width) of each layer, of the frames that are first seen in these rows."""
        known = self._frames if self._frames is not None else {}
        new = [(key, row) for key, row in firsts if key not in known]
        if not new:
            return _stacked([known[key] for key, _ in firsts])
        rows = torch.tensor([row for _, row in new], device=inputs["lengths"].device)
        own = inputs.select(rows)
        of_frames = own.with_column("lengths", torch.full_like(own["lengths"], self.start))
        _, cache, _ = self._run_given(self.processing.model_inputs(of_frames), len(rows))
        made: Layers = [(layer.keys, layer.values) for layer in cache.layers]
        if self._frames is None:
            return made
        for place, (key, _) in enumerate(new):
            known[key] = [(one[place], two[place]) for one, two in made]
        self._frames = {key: known[key] for key, _ in firsts}
        return _stacked(list(self._frames.values()))


class Trie:
    """Sequences of tokens that share their beginnings.

    Attributes:
        tokens: of its nodes; a node stands behind its parent.
        parents: numbers of the parents, -1 at the beginning.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, tokens: Sequence[int]) -> list[int]:
        """Returns the nodes of a sequence."""
        at, nodes = -1, []
        for token in tokens:
            child = self._children.setdefault((at, token), len(self.tokens))
            if child == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(at)
            at = child
            nodes.append(at)
        return nodes


def laid_out(tries: Sequence[Trie], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens (G, N), depths (G, N), and which nodes each sees, (G, N, N) bool: its ancestors and itself."""
    most = max(len(trie.tokens) for trie in tries)
    tokens = torch.full((len(tries), most), pad_id)
    parents = torch.full((len(tries), most), -1)
    for number, trie in enumerate(tries):
        tokens[number, : len(trie.tokens)] = torch.tensor(trie.tokens)
        parents[number, : len(trie.parents)] = torch.tensor(trie.parents)
    sees = torch.zeros(len(tries), most, most, dtype=torch.bool)
    rows = torch.arange(len(tries))
    for node in range(most):
        parent = parents[:, node]
        sees[rows, node] = sees[rows, parent] & (parent >= 0)[:, None]
        sees[:, node, node] = True
    return tokens, sees.sum(-1) - 1, sees


def shown(inputs: Rows) -> list[bytes]:
    """Returns bytes for each row, equal where the frames are."""
    if inputs.shared is not None:
        return [inputs.shared.shown(row) for row in range(len(inputs))]
    frames = inputs["frames"].cpu().numpy()  # (B, h, w, 3)
    return [frame.tobytes() for frame in frames]


def _stacked(frames: Sequence[Layers]) -> Layers:
    return [
        (torch.stack([one for one, _ in layer]), torch.stack([two for _, two in layer]))
        for layer in zip(*frames, strict=True)
    ]
