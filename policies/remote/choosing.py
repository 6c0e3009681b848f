"""Which of some named choices a model takes for a frame: by letters where the server gives logprobs, else by its text.

Letters: the choices are listed as `A: up, B: down`, one token is asked for, and of its likeliest tokens those that
spell a letter (with or without a space) are renormalised over all letters. A letter that is not among them gets the
most that it can have: the probability of the least likely listed token, or an equal share of what the list leaves, if
that is less.
Text: the answer is read by `answers/parsing.py`. Either way an answer can name nothing, which has an outcome.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from manako.policies.answers.choice import LABELS, Choice
from manako.policies.answers.illegal import CUT, LEGAL, REFUSED, UNPARSED
from manako.policies.answers.parsing import parse_action
from manako.policies.remote.client import RemoteClient, Reply, Request
from manako.policies.remote.errors import RemoteError
from manako.policies.remote.pictures import data_url, most_tokens

log = logging.getLogger("manako.remote")
BY_LETTER = "Answer with the letter of one of them and nothing else."
BY_NAME = "Answer with the name of one of them and nothing else."


@dataclass(frozen=True)
class Question:
    """A frame and what is asked about it.

    Args:
        system: the system text; `{actions}` stands for the list of choices.
        frame: (H, W, 3) uint8.
        text: what the user says beside the frame; may be empty.
        choices: their names.
        seed: number of the draw that samples an answer in text; None asks for the likeliest.
    """

    system: str
    frame: np.ndarray
    text: str
    choices: tuple[str, ...]
    seed: int | None = None


class Chosen(NamedTuple):
    """What a model took.

    Attributes:
        outcome: see `answers/illegal.py`.
        logprobs: (A,) over the choices, from letters; None from text, or where the outcome is not legal.
        choice: the one that its text names; None likewise.
        text: what it said.
    """

    outcome: str
    logprobs: np.ndarray | None
    choice: int | None
    text: str


class Chooser:
    """Asks questions of a server.

    Args:
        client: of the server.
    """

    def __init__(self, client: RemoteClient) -> None:
        self.client, self.settings = client, client.settings

    def choose(self, questions: Sequence[Question]) -> list[Chosen]:
        """Returns what the model takes in each.

        Raises:
            RemoteError: the budget is used up, or the server gives no answers, or none in the way that was asked for.
        """
        replies: list[Reply | None] = [None] * len(questions)
        way = self.settings.remote_answers
        by_letter = way != "text" and all(len(question.choices) <= len(LABELS) for question in questions)
        if by_letter and (way == "letters" or self.client.gives_logprobs):
            replies = self.client.ask_all([self.request(question, by_letter=True) for question in questions])
        if way == "letters" and None in replies:
            raise RemoteError(
                f"--remote_answers is letters, and {self.client.host} gives no logprobs for up to {len(LABELS)} "
                "choices: expected --remote_answers auto or text."
            )
        lettered = [reply is not None for reply in replies]
        rest = [number for number, reply in enumerate(replies) if reply is None]
        texts = self.client.ask_all([self.request(questions[number], by_letter=False) for number in rest])
        for number, reply in zip(rest, texts, strict=True):
            replies[number] = reply
        return [
            _by_letter(reply, question.choices) if letter else _by_text(reply, question.choices)
            for reply, question, letter in zip(replies, questions, lettered, strict=True)
            if reply is not None
        ]

    def request(self, question: Question, by_letter: bool) -> Request:
        """Returns what the server is sent."""
        listed = Choice().legend(question.choices) if by_letter else ", ".join(question.choices)
        system = f"{question.system.replace('{actions}', listed)} {BY_LETTER if by_letter else BY_NAME}"
        side, tokens = self.settings.remote_image_side, self.settings.remote_image_tokens
        content: list[dict] = [{"type": "text", "text": question.text}] if question.text.strip() else []
        content.append({"type": "image_url", "image_url": {"url": data_url(question.frame, side)}})
        sampled = question.seed is not None and not by_letter
        return Request(
            messages=[{"role": "system", "content": system}, {"role": "user", "content": content}],
            most_tokens=1 if by_letter else self.settings.remote_max_tokens,
            # letters are sampled here, from probabilities as they are
            temperature=1.0 if by_letter else self.settings.remote_temperature if sampled else 0.0,
            image_tokens=most_tokens(question.frame.shape, side) if tokens is None else tokens,
            seed=question.seed if sampled else None,
            logprobs=by_letter,
        )


def letter_logprobs(top: Sequence[tuple[str, float]], count: int) -> np.ndarray | None:
    """Returns log-probabilities (count,) over the first letters; None where the list holds none of them.

    Args:
        top: the likeliest tokens and their log-probabilities.
        count: of letters.
    """
    given = np.zeros(count)
    for token, logprob in top:
        label = token.strip()
        if len(label) == 1 and label in LABELS[:count]:
            given[LABELS.index(label)] += math.exp(min(logprob, 0.0))
    if not given.any():
        return None
    missing = given == 0
    if missing.any():
        listed = [math.exp(min(logprob, 0.0)) for _, logprob in top]
        given[missing] = max(min(min(listed), (1 - sum(listed)) / missing.sum()), np.finfo(np.float32).tiny)
    return np.log(given / given.sum())


def _by_letter(reply: Reply, choices: Sequence[str]) -> Chosen:
    logprobs = None if reply.is_refused or reply.top is None else letter_logprobs(reply.top, len(choices))
    if logprobs is None:
        return Chosen(REFUSED if reply.is_refused else UNPARSED, None, None, reply.text)
    return Chosen(LEGAL, logprobs, None, reply.text)


def _by_text(reply: Reply, choices: Sequence[str]) -> Chosen:
    if reply.is_refused or reply.is_cut:
        return Chosen(REFUSED if reply.is_refused else CUT, None, None, reply.text)
    index = parse_action(reply.text, choices)
    return Chosen(UNPARSED if index is None else LEGAL, None, index, reply.text)
