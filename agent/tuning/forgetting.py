"""What fine-tuning makes a language model forget: perplexity of plain text, and questions with one right answer.

Both look at the language model inside the policy, text only, without an image. The text is the opening of two books in
the public domain; the questions are common knowledge that a model of 135 million parameters mostly has. They are few on
purpose: seconds on a CPU, a comparison of before and after, no benchmark of the model.
"""

from dataclasses import dataclass
from typing import Any

import torch

from manako.errors import first_line
from manako.policies.interface import Policy

TEXTS = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, and "
    "what is the use of a book, thought Alice, without pictures or conversations? So she was considering in her "
    "own mind (as well as she could, for the hot day made her feel very sleepy), whether the pleasure of making a "
    "daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with "
    "pink eyes ran close by her.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters.",
)
# beginning, right answer, wrong ones
QUESTIONS = (
    ("The capital of France is", " Paris", (" London", " Rome", " Berlin")),
    ("The capital of Japan is", " Tokyo", (" Beijing", " Madrid", " Cairo")),
    ("The capital of Italy is", " Rome", (" Paris", " Vienna", " Oslo")),
    ("The opposite of hot is", " cold", (" red", " tall", " fast")),
    ("The opposite of up is", " down", (" blue", " over", " big")),
    ("The colour of grass is", " green", (" purple", " black", " orange")),
    ("The colour of a clear sky is", " blue", (" brown", " pink", " green")),
    ("A week has seven", " days", (" years", " legs", " doors")),
    ("A year has twelve", " months", (" hours", " weeks", " eyes")),
    ("Two plus two equals", " four", (" seven", " nine", " twelve")),
    ("Water freezes and becomes", " ice", (" fire", " sand", " gold")),
    ("A baby cat is called a", " kitten", (" puppy", " calf", " lamb")),
    ("A baby dog is called a", " puppy", (" kitten", " chick", " foal")),
    ("Bees make", " honey", (" milk", " steel", " paper")),
    ("The sun rises in the", " east", (" west", " night", " north")),
    ("We see with our eyes and hear with our", " ears", (" feet", " hands", " knees")),
    ("The first president of the United States was George", " Washington", (" Lincoln", " Churchill", " Napoleon")),
    ("The author of Hamlet is William", " Shakespeare", (" Newton", " Einstein", " Mozart")),
    ("The largest ocean on Earth is the", " Pacific", (" Atlantic", " Arctic", " Baltic")),
    ("The planet that we live on is called", " Earth", (" Mars", " Venus", " Jupiter")),
)


@dataclass(frozen=True)
class Retention:
    """What the language model still knows.

    Attributes:
        perplexity: of the texts, per token; None where the model reads no text alone.
        probes: share of the questions whose right answer is the most probable of four, in [0, 1]; None as well.
        why_not: why they were not measured.
    """

    perplexity: float | None = None
    probes: float | None = None
    why_not: str | None = None

    def summary(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return {"perplexity": self.perplexity, "probes": self.probes}


@torch.no_grad()
def measure_retention(policy: Policy) -> Retention:
    """Returns what the language model inside the policy still knows, with its LoRA on.

    A model that needs an image beside a text, has too few positions, or answers by an encoder-decoder is not measured.
    """
    model = policy.model
    if not policy.learns_text:
        return Retention(why_not="it answers with one token at a mask")
    if getattr(model.config.get_text_config(), "is_encoder_decoder", False):
        return Retention(why_not="an encoder-decoder does not go on from a text")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(policy.processor.tokenizer.encode(text)) for text in TEXTS)
    if positions is not None and longest > positions:
        return Retention(why_not=f"the text has {longest} tokens, the model reads {positions}")
    was_training = model.training
    model.eval()
    try:
        return _measure(policy)
    except Exception as error:  # families refuse a text without an image each in its own way
        return Retention(why_not=f"the model takes no such text alone, {type(error).__name__}: {first_line(error)}")
    finally:
        model.train(was_training)


def _measure(policy: Policy) -> Retention:
    model, tokenizer = policy.model, policy.processor.tokenizer
    loss, tokens = 0.0, 0
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        logprobs = _logprobs(model, ids, policy.device)
        loss -= float(logprobs.sum())
        tokens += len(logprobs)
    right = 0
    for start, answer, others in QUESTIONS:
        scores = [_score(model, tokenizer, start, ending, policy.device) for ending in (answer, *others)]
        right += scores[0] > max(scores[1:])
    return Retention(perplexity=float(torch.tensor(loss / tokens).exp()), probes=right / len(QUESTIONS))


def _logprobs(model: Any, ids: list[int], device: torch.device) -> torch.Tensor:
    """Log p of each token (L - 1,) given those before it, float32."""
    row = torch.tensor([ids], device=device)
    logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(ids) : -1].float()  # (L - 1, V)
    return logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]


def _score(model: Any, tokenizer: Any, start: str, ending: str, device: torch.device) -> float:
    """Mean log p of the ending's tokens."""
    before = tokenizer.encode(start, add_special_tokens=False)
    whole = tokenizer.encode(start + ending, add_special_tokens=False)
    return float(_logprobs(model, whole, device)[len(before) - 1 :].mean())
