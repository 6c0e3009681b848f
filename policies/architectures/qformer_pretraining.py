"""BLIP-2's first stage (arXiv:2301.12597, section 3.1): a Q-Former learns of frames what captions can say.

    python experiments/run_sft.py --stage represent --policy blip2 --env manako/GoTo-v0 --captions 4000 --epochs 4

    queries (K) ──────── self-attention, cross-attention to the frame's features, feed-forward (queries') ─► (B, K, D)
    [CLS|DEC] caption ── the same self-attention ─────────────────────────────── feed-forward (captions') ─► (B, L, D)

               queries see  captions see
    contrast   queries      captions      max over queries of cos(query, [CLS]) / temperature: which is whose
    matching   both         both          two classes by each query, averaged; wrong pairs are those that look right
    words      queries      queries and   after [DEC], each word from the frame's queries and the words before it
                            words before

The encoder is frozen. The queries' half of each layer is the adapter's own; so is the captions' half where the adapter
reads instructions (their words are the language model's frozen embeddings), else it is new, with words of its own, and
ends with the training. Then `--stage align` teaches queries and projection to speak to the frozen language model, which
is the paper's second stage, and `--stage instruct` to act.

Equal captions are not each other's wrong answer: for contrast all of them are right, for matching none is drawn. Left
out: smoothed labels and features of other GPUs; the temperature is learned as its logarithm.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from manako.policies.adapters.qformer import InstructQFormerAdapter, places
from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.architectures.pretraining import Pretraining, next_different, plain_captions

if TYPE_CHECKING:
    from manako.policies.architectures.model import Model
    from manako.policies.processing import Processing

COMPARED_WIDTH = 64  # of the space in which frames and captions are compared
TEMPERATURE = 0.07  # at the start, as in the paper's code
CLS, DEC = 0, 1  # what stands before a caption that is compared or judged, and before one that is said
MEASURED_AT_ONCE = 64
TIE = 1e-6  # similarities that differ by less are equal


class Texts(NamedTuple):
    """B captions as tokens, padded on the right; the first place is for [CLS] or [DEC]."""

    ids: Tensor  # (B, L) int64; the first one is not read
    mask: Tensor  # (B, L) bool, True where a token is, the first one included


class QFormerPretraining(Pretraining):
    """Contrast, matching and words, by the adapter's Q-Former; the encoder is as it is.

    Args:
        model: a composed one whose adapter is a Q-Former.
        processing: see `Pretraining`.

    Attributes:
        joint: queries and captions in one; its queries' half is the adapter's.
    """

    def __init__(self, model: "Model", processing: "Processing") -> None:
        super().__init__(model, processing)
        self.tokenizer = model.processor.tokenizer
        config = self.adapter.qformer.config
        width, count = config.hidden_size, self.base.get_input_embeddings().num_embeddings
        self.joint = self.adapter.qformer if config.use_qformer_text_input else with_text(self.adapter.qformer)
        if not config.use_qformer_text_input:
            self.words = nn.Embedding(count, width)
        self.starts = nn.Parameter(torch.randn(2, width))  # [CLS], [DEC]
        self.to_compare = nn.ModuleList([nn.Linear(width, COMPARED_WIDTH) for _ in ("frame", "caption")])
        self.matching = nn.Linear(width, 2)
        self.say = nn.Linear(width, count)
        self.log_temperature = nn.Parameter(torch.tensor(TEMPERATURE).log())

    @property
    def adapter(self) -> Any:
        """The Q-Former with its queries and projection."""
        return self.base.model.adapter

    def losses(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns the losses `contrast`, `matching` and `words`, see `Pretraining`.

        Raises:
            PolicyError: a caption without a word.
        """
        texts, features = self._texts(captions), self._see(images)
        logits, seen = self._say(texts, features)  # what the queries see of a frame no caption changes
        similarity = compare(self._frames_of(seen), self._captions_of(texts))  # (B, B)
        equal = equal_captions(captions, captions).to(similarity.device)
        frame, caption, is_right = pairs(similarity.detach() / self.temperature.detach(), equal)
        judged = self._judge(Texts(texts.ids[caption], texts.mask[caption]), features[frame])  # (3 B or less, 2)
        return {
            "contrast": contrast_loss(similarity / self.temperature, equal),
            "matching": F.cross_entropy(judged, is_right),
            "words": F.cross_entropy(logits[texts.mask[:, 1:]], texts.ids[:, 1:][texts.mask[:, 1:]]),
        }

    @torch.no_grad()
    def measure(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """Returns the accuracies of finding a frame's caption, and a caption's frame, among all N; of matching, right
        and wrong pairs alike, so that chance is 0.5; and of words, beside their frame and beside another's.

        Raises:
            PolicyError: all captions say the same, so that nothing is to be found.
        """
        other, texts = next_different(captions), self._texts(captions)
        frames, said = [], []
        hits: dict[str, list[Tensor]] = {"own": [], "other": [], "right": [], "wrong": []}
        for rows in torch.arange(len(captions)).split(MEASURED_AT_ONCE):
            some = Texts(texts.ids[rows], texts.mask[rows])
            own, exchanged = self._see(images[rows.numpy()]), self._see(images[other[rows].numpy()])
            for name, features in (("own", own), ("other", exchanged)):
                logits, seen = self._say(some, features)
                frames += [self._frames_of(seen)] if name == "own" else []
                hits[name].append((logits.argmax(-1) == some.ids[:, 1:])[some.mask[:, 1:]])
            for name, features in (("right", own), ("wrong", exchanged)):
                hits[name].append(self._judge(some, features).argmax(-1) == (name == "right"))
            said.append(self._captions_of(some))
        similarity = compare(torch.cat(frames), torch.cat(said)).cpu()
        equal = equal_captions(captions, captions)
        found = {name: float(torch.cat(parts).float().mean()) for name, parts in hits.items()}
        return {
            "caption of a frame": retrieval(similarity, equal),
            "frame of a caption": retrieval(similarity.T, equal),
            "matching": (found["right"] + found["wrong"]) / 2,
            "words": found["own"],
            "words, other frame": found["other"],
        }

    @property
    def temperature(self) -> Tensor:
        """What similarities are divided by, ()."""
        return self.log_temperature.exp()

    def _texts(self, captions: Sequence[str]) -> Texts:
        """Captions, special tokens in them left out, between a first place and the end token."""
        cleaned = plain_captions(captions, special_vocabulary(self.tokenizer))
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows = [[0, *self.tokenizer.encode(text, add_special_tokens=False), *end] for text in cleaned]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # (B, L)
        mask = torch.arange(longest) < lengths[:, None]
        return Texts(ids.to(self.base.device), mask.to(self.base.device))

    def _embed(self, texts: Texts, start: int) -> Tensor:
        """(B, L, D) of captions behind [CLS] or [DEC]."""
        if isinstance(self.adapter, InstructQFormerAdapter):
            words = self.adapter.text_proj(self.base.get_input_embeddings()(texts.ids[:, 1:]))
        else:
            words = self.words(texts.ids[:, 1:])
        embedded = torch.cat([self.starts[start].expand(len(words), 1, -1), words], 1)
        return embedded + places(texts.mask, embedded)

    def _see(self, images: np.ndarray) -> Tensor:
        """Features (B, P, Dv) of frames (B, H, W, 3)."""
        stored = self.processing.seen(self.processing.pipeline.resize(images))
        if stored is not None:
            return stored.to(self.vlm.device, self.vlm.dtype)
        return self.base.model.get_vision_features(**self.pixels(images))

    def _joint(self, texts: Texts, start: int, features: Tensor, queries_see: bool, causal: bool) -> Tensor:
        """States (B, K + L, D) of queries and caption."""
        queries = self.adapter.queries.expand(len(features), -1, -1)  # (B, K, D)
        return self.joint(
            query_embeds=torch.cat([queries, self._embed(texts, start)], 1),
            query_length=queries.shape[1],
            attention_mask=sees(texts.mask, queries.shape[1], queries_see, causal).to(queries.dtype),
            encoder_hidden_states=features,
        ).last_hidden_state

    def _say(self, texts: Texts, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, L - 1, V) of each caption's words after those before, and the queries' states (B, K, D)."""
        states = self._joint(texts, DEC, features, queries_see=False, causal=True)
        queries, captions = states[:, : -texts.ids.shape[1]], states[:, -texts.ids.shape[1] :]
        return self.say(captions[:, :-1]), queries

    def _judge(self, texts: Texts, features: Tensor) -> Tensor:
        """Logits (B, 2) of no match and match."""
        states = self._joint(texts, CLS, features, queries_see=True, causal=False)
        return self.matching(states[:, : -texts.ids.shape[1]]).mean(1)

    def _frames_of(self, queries: Tensor) -> Tensor:
        """Frames to compare, (B, K, C), each of length 1, of the queries' states (B, K, D)."""
        return F.normalize(self.to_compare[0](queries), dim=-1)

    def _captions_of(self, texts: Texts) -> Tensor:
        """Captions to compare, (B, C), each of length 1."""
        states = self.joint(
            query_embeds=self._embed(texts, CLS),
            query_length=0,
            attention_mask=sees(texts.mask, 0, False, False).to(self.starts.dtype),
        ).last_hidden_state
        return F.normalize(self.to_compare[1](states[:, 0]), dim=-1)


def with_text(qformer: Blip2QFormerModel) -> Blip2QFormerModel:
    """Returns a Q-Former that reads text as well: what queries go through is shared with the given one."""
    config = copy.deepcopy(qformer.config)
    config.use_qformer_text_input = True
    joint = Blip2QFormerModel(config).to(qformer.device, qformer.dtype)
    joint.layernorm = qformer.layernorm
    for new, own in zip(joint.encoder.layer, qformer.encoder.layer, strict=True):
        for name, module in own.named_children():
            setattr(new, name, module)
    return joint


def sees(mask: Tensor, queries: int, queries_see: bool, causal: bool) -> Tensor:
    """Returns what is added to attention, (B, 1, K + L, K + L): 0 where a place (row) sees another one, else -inf-like.

    Args:
        mask: (B, L) bool, True where a caption has a token.
        queries: K.
        queries_see: whether queries see the caption; the caption always sees the queries.
        causal: whether a token of the caption sees the tokens before it alone.
    """
    length = mask.shape[1]
    allowed = torch.ones(queries + length, queries + length, dtype=torch.bool, device=mask.device)
    allowed[:queries, queries:] = queries_see
    if causal:
        allowed[queries:, queries:] = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    keys = F.pad(mask, (queries, 0), value=True)  # (B, K + L)
    whole = allowed & keys[:, None]  # (B, K + L, K + L)
    return torch.zeros(whole.shape, device=mask.device).masked_fill(~whole, torch.finfo(torch.float16).min)[:, None]


def compare(frames: Tensor, captions: Tensor) -> Tensor:
    """Returns the similarity (N, M) of frames (N, K, C) and captions (M, C): that of the most similar query."""
    return torch.einsum("nkc,mc->nmk", frames, captions).max(-1).values


def equal_captions(one: Sequence[str], other: Sequence[str]) -> Tensor:
    """Returns whether captions are the same, (N, M) bool."""
    return torch.tensor([[a == b for b in other] for a in one])


def contrast_loss(logits: Tensor, equal: Tensor) -> Tensor:
    """Returns -sum_j q_ij log p_ij, averaged over frames and over captions, (): q is uniform over equal captions.

    Args:
        logits: (B, B), frames by captions.
        equal: (B, B) bool, symmetric.
    """
    targets = equal / equal.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def pairs(logits: Tensor, equal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns right and wrong pairs to be judged: each frame with its caption, with one drawn for it, and vice versa.

    A wrong one is drawn by its likelihood, exp(logit), among those with another caption; where there is none, the pair
    is left out.

    Args:
        logits: (B, B), frames by captions.
        equal: (B, B) bool.

    Returns:
        Rows of frames, rows of captions and whether they are right, (M,) int64 each.
    """
    places = torch.arange(len(logits), device=logits.device)
    has = places[~equal.all(1)]  # equal is symmetric: the same for frames and captions
    frame, caption = [places], [places]
    if len(has):
        for drawn_for, drawn, table in ((frame, caption, logits), (caption, frame, logits.T)):
            weights = table[has].masked_fill(equal[has], -torch.inf).softmax(-1)
            drawn_for.append(has)
            drawn.append(torch.multinomial(weights, 1)[:, 0])
    is_right = torch.zeros(len(places) + 2 * len(has), dtype=torch.int64, device=logits.device)
    is_right[: len(places)] = 1
    return torch.cat(frame), torch.cat(caption), is_right


def retrieval(similarity: Tensor, equal: Tensor) -> float:
    """Returns how often the most similar column is right; of several that tie one would be drawn.

    Args:
        similarity: (N, M).
        equal: (N, M) bool, True where a column is a right answer.
    """
    best = similarity >= similarity.max(1, keepdim=True).values - TIE
    return float(((best & equal).sum(1) / best.sum(1)).mean())
