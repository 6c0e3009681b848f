"""The tasks by which UNITER (arXiv:1909.11740) and ViLBERT (arXiv:1908.02265) meet images and words.

    python experiments/run_sft.py --stage align --policy uniter --env manako/GoTo-v0 --captions 4000 --epochs 4

    <|user|> red <|mask|> at top left. <|assistant|> <|mask|> + its frame ──────► MLM head ─► "ball"     masked words
    <|user|> red  ball    at top left. <|assistant|> <|mask|> + its frame, or ──► first state ─► 0 | 1       matching
                                                    another caption's             pooler, 2-way head

A caption stands where the instruction stands when the policy acts, in the same chat template and without a system text.
Masked words are read by the MLM head that acting uses. Matching is read at the first token, as in the papers, so that
the state at the last `<|mask|>`, where the answer is read, is not made to say match or no match.

Left out: masked regions and UNITER's alignment of words and regions, which need a detector's classes. The matching
head ends with the training.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.architectures.pretraining import Pretraining, next_different, plain_captions
from manako.policies.errors import PolicyError

if TYPE_CHECKING:
    from manako.policies.architectures.model import Model
    from manako.policies.processing import Processing

MASKED = 0.15  # of a caption's tokens, as BERT has it; of these
BY_MASK, BY_CHANCE = 0.8, 0.1  # become [MASK], become any word; the rest stay
EXCHANGED = 0.5  # of the captions, for matching
MEASURED_AT_ONCE = 64
Visual = tuple[Tensor, Tensor]  # visual tokens (B, K, D) and where in the frame each of them is, (K, 4)


class Texts(NamedTuple):
    """B captions as tokens, padded on the right."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64, 1 where text is
    is_word: Tensor  # (B, L) bool, True where a word of the caption may be masked


class MaskedPretraining(Pretraining):
    """Masked words and image-text matching of a `MaskedVLM`; all of it learns.

    Args:
        model: see `Pretraining`.
        processing: see `Pretraining`.
    """

    learns: ClassVar[str] = "full"

    def __init__(self, model: "Model", processing: "Processing") -> None:
        super().__init__(model, processing)
        width, self.longest = self.base.lm_head.in_features, self.base.config.text_config.max_position_embeddings
        self.matching = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
        self.tokenizer = model.processor.tokenizer
        self.special = special_vocabulary(self.tokenizer)
        self.mask_id = self.tokenizer.mask_token_id
        self.word_ids = torch.tensor(sorted({*range(len(self.tokenizer))} - {*self.special.values()}))

    def losses(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns the losses `masked_words` and `matching`, see `Pretraining`.

        Raises:
            PolicyError: a caption without a word, or longer than the model reads.
        """
        texts, visual = self._texts(captions), self._see(images)
        masked, is_masked = self._mask(texts)
        order = exchange(len(captions))
        judged = self._judge(_rows(texts, order), visual)  # (B, 2)
        is_right = torch.tensor([captions[j] == caption for caption, j in zip(captions, order.tolist(), strict=True)])
        return {
            "masked_words": masked_word_loss(self._words(masked, visual), texts.ids, is_masked),
            "matching": F.cross_entropy(judged, is_right.long().to(judged.device)),
        }

    @torch.no_grad()
    def measure(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """Returns the accuracies of masked words, beside their frame and beside another's, and of matching.

        The masks are the same at each call. Matching counts right and wrong pairs alike: chance is 0.5.

        Raises:
            PolicyError: all captions say the same, so that no pair is wrong.
        """
        other = next_different(captions)
        texts = self._texts(captions)
        masked, is_masked = self._mask(texts, torch.Generator().manual_seed(0))
        hits: dict[str, list[Tensor]] = {"own": [], "other": [], "right": [], "wrong": []}
        for rows in torch.arange(len(captions)).split(MEASURED_AT_ONCE):
            seen = {"own": self._see(images[rows.numpy()]), "other": self._see(images[other[rows].numpy()])}
            for name, visual in seen.items():
                said = self._words(_rows(masked, rows), visual).argmax(-1)  # (B, L)
                hits[name].append((said == texts.ids[rows])[is_masked[rows]])
            for name, visual in (("right", seen["own"]), ("wrong", seen["other"])):
                hits[name].append(self._judge(_rows(texts, rows), visual).argmax(-1) == (name == "right"))
        found = {name: float(torch.cat(parts).float().mean()) for name, parts in hits.items()}
        return {
            "masked words": found["own"],
            "masked words, other frame": found["other"],
            "matching": (found["right"] + found["wrong"]) / 2,
        }

    def _texts(self, captions: Sequence[str]) -> Texts:
        """Captions as the model reads them, special tokens in them left out."""
        prompts = [
            self.parts.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": caption}]}], add_generation_prompt=True
            )
            for caption in plain_captions(captions, self.special)
        ]
        made = self.tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt").to(self.base.device)
        ids, mask = made["input_ids"], made["attention_mask"]  # (B, L)
        if ids.shape[1] > self.longest:
            raise PolicyError(
                f"The caption {captions[int(mask.sum(1).argmax())][:80]!r} takes {ids.shape[1]} tokens, but "
                f"{type(self.base).__name__} reads at most {self.longest}: expected a shorter sentence from the "
                "environment's caption()."
            )
        is_word = torch.isin(ids, self.word_ids.to(ids.device))
        return Texts(ids, mask, is_word)

    def _mask(self, texts: Texts, generator: torch.Generator | None = None) -> tuple[Texts, Tensor]:
        """The captions with masked words, and where they are, (B, L) bool."""
        ids, is_masked = mask_words(texts.ids.cpu(), texts.is_word.cpu(), self.mask_id, self.word_ids, generator)
        return texts._replace(ids=ids.to(texts.ids.device)), is_masked.to(texts.ids.device)

    def _see(self, images: np.ndarray) -> Visual:
        """Visual tokens (B, K, D) of frames (B, H, W, 3), and their boxes (K, 4)."""
        pixels = self.pixels(images)["pixel_values"]
        return self.base.model.see(pixels.to(self.base.dtype))

    def _states(self, texts: Texts, visual: Visual) -> Tensor:
        """States (B, L, D) of captions beside what is seen."""
        return self.base.model.encode(texts.ids, texts.mask, *visual)

    def _words(self, texts: Texts, visual: Visual) -> Tensor:
        """Logits (B, L, V) of the words."""
        return self.base.read_words(self._states(texts, visual))

    def _judge(self, texts: Texts, visual: Visual) -> Tensor:
        """Logits (B, 2) of no match and match."""
        return self.matching(self._states(texts, visual)[:, 0])


def mask_words(
    ids: Tensor, is_word: Tensor, mask_id: int, word_ids: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hides some words, by BERT's rule.

    Args:
        ids: (B, L) int64.
        is_word: (B, L) bool, True where a token may be hidden; at least one in each row.
        mask_id: of the token that hides a word.
        word_ids: (W,) int64, the words that may stand in place of another one.
        generator: of the choice; None: torch's own.

    Returns:
        The ids (B, L) with `MASKED` of the words hidden, in each row at least one: `BY_MASK` of them by the mask, and
        `BY_CHANCE` by any word, the others seen as they are; and which (B, L) bool.
    """
    drawn = torch.rand(ids.shape, generator=generator).masked_fill(~is_word, 2.0)
    is_masked = is_word & ((drawn < MASKED) | (drawn == drawn.min(1, keepdim=True).values))
    how = torch.rand(ids.shape, generator=generator)
    words = word_ids[torch.randint(len(word_ids), ids.shape, generator=generator)]
    hidden = torch.where(how < BY_MASK, mask_id, torch.where(how < BY_MASK + BY_CHANCE, words, ids))
    return torch.where(is_masked, hidden, ids), is_masked


def masked_word_loss(logits: Tensor, ids: Tensor, is_masked: Tensor) -> Tensor:
    """Returns -log p of the hidden words, () averaged over them: logits (B, L, V), ids (B, L), (B, L) bool."""
    return F.cross_entropy(logits[is_masked], ids[is_masked])


def exchange(count: int) -> Tensor:
    """Returns for each of B places whose caption stands there, (B,) int64: half of them pass theirs around."""
    order = torch.arange(count)
    chosen = torch.randperm(count)[: max(2, round(EXCHANGED * count))]
    order[chosen] = chosen.roll(1)
    return order


def _rows(texts: Texts, rows: Tensor) -> Texts:
    return Texts(*(value[rows] for value in texts))
