"""A policy behind an OpenAI-compatible chat API, as GPT-4V is: it acts, records and judges, and cannot learn.

Each frame is a request: the instruction and the frame as PNG in, one action out, by letters or by text (see
`remote/choosing.py`). A sampled action belongs to the random number of its (seed, slot, step), by which letters are
drawn here and which is the seed of an answer in text; so equal frames in different places are different samples, and
the same run asks the same again, of which the answers are kept (`remote/cache.py`).

Left out: log-probabilities of answers in text, which are 0 under a mask that says that nothing is learned from them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from manako.policies.answers.illegal import LEGAL, SKIP, stands_in
from manako.policies.errors import PolicyError
from manako.policies.interface import (
    ACTION_MASK,
    Acted,
    Draws,
    Evaluated,
    Policy,
    PolicySpec,
    Rows,
    entropy,
    sample_categorical,
)
from manako.policies.plain_text import as_plain_text
from manako.policies.remote.choosing import Chooser, Chosen, Question
from manako.policies.remote.client import RemoteClient
from manako.policies.remote.ledger import DOLLAR, Ledger
from manako.policies.remote.settings import RemoteSettings

SEEDS = 2**31  # servers take seeds below this


class RemotePolicy(Policy):
    """A model of a server that names one of a closed set of actions.

    Args:
        spec: actions, frame shape and system text.
        settings: of the server.
        account: file of the run's budget, which another process has begun; None begins one.
        illegal_action: action for an answer that names none; by default the environment is not stepped then.

    Raises:
        PolicyError: settings that cannot be used.

    Attributes:
        ledger: what the run has spent.
        chooser: asks the server.
    """

    needs = ("uncounted", "action_masks")

    def __init__(
        self,
        spec: PolicySpec,
        settings: RemoteSettings,
        account: Path | None = None,
        illegal_action: str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.settings = spec, settings
        self.stands_in = stands_in(spec.action_names, illegal_action)
        self.chooser, self.ledger = make_chooser(settings, account)

    def prepare(
        self, images: np.ndarray, instructions: Sequence[str], told: Mapping[str, np.ndarray] | None = None
    ) -> Rows:
        """Returns rows of `frames` (B, H, W, 3) uint8, `text` (B, L) uint8 (UTF-8), and `asked` (B,) bool.

        Not asked is a slot whose episode nobody counts.

        Raises:
            PolicyError: frames of another shape than the policy was made for.
        """
        if images.shape[1:] != self.spec.frame_shape:
            raise PolicyError(f"Frames of {images.shape[1:]} came: expected {self.spec.frame_shape}.")
        texts = [as_plain_text(instruction, []).encode() for instruction in instructions]
        longest = max(map(len, texts), default=0)
        text = np.frombuffer(b"".join(each.ljust(longest, b"\0") for each in texts), np.uint8)
        asked = ~np.asarray((told or {}).get("uncounted", np.zeros(len(images), bool)))
        columns = {
            "frames": torch.from_numpy(images.copy()),
            "text": torch.from_numpy(text.reshape(len(texts), longest).copy()),
            "asked": torch.from_numpy(asked),
        }
        if told is not None and "action_masks" in told:
            columns[ACTION_MASK] = torch.from_numpy(np.array(told["action_masks"], bool))  # (B, A)
        return Rows(columns, {"text": 0})

    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns the actions that the server names, each with its outcome; see `answers/illegal.py` for the others.

        Raises:
            PolicyError: the budget is used up, or the server gives no answers.
        """
        uniforms = np.zeros(len(inputs)) if greedy else draws.next()  # (B,)
        greedy = greedy or self.settings.remote_temperature == 0
        asked = inputs["asked"].nonzero()[:, 0].tolist()
        questions = [self._question(inputs, row, None if greedy else int(uniforms[row] * SEEDS)) for row in asked]
        count = len(self.spec.action_names)
        index = torch.zeros(len(inputs), dtype=torch.int64)
        logprobs = torch.zeros(len(inputs), count).log_softmax(-1)  # (B, A)
        taken, mask = torch.zeros(len(inputs), 1), torch.zeros(len(inputs), 1, dtype=torch.bool)
        outcomes = [LEGAL] * len(inputs)
        for row, chosen in zip(asked, self.chooser.choose(questions), strict=True):
            outcomes[row] = chosen.outcome
            index[row], logprobs[row] = self._action(chosen, self._allowed(inputs, row), uniforms[row], greedy)
            if chosen.logprobs is not None:
                taken[row], mask[row] = logprobs[row, index[row]], True
        return Acted(
            Rows({"index": index, "logprobs": logprobs}),
            index.numpy(),
            taken,
            mask,
            torch.zeros(len(inputs)),
            outcomes,
        )

    def evaluate_actions(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns what was said when these actions were taken, for figures; nothing is asked, and nothing learns."""
        logprobs = actions["logprobs"]
        taken = logprobs.gather(1, actions["index"][:, None].clamp_min(0))
        return Evaluated(taken, entropy(logprobs)[:, None], torch.zeros(len(inputs)), logprobs)

    def describe(self) -> list[tuple[str, str]]:
        """Returns who is asked, how, and within which budget."""
        settings = self.settings
        ways = {"auto": "letters where the server gives logprobs, else text", "letters": "letters", "text": "text"}
        model = f"{settings.remote_model} at {settings.remote_url}, by {ways[settings.remote_answers]}"
        return [
            ("remote", f"{model}, {settings.remote_concurrency} requests at a time"),
            ("budget", budget_in_words(self.chooser, self.most_cost())),
            ("answers", f"kept in {settings.remote_cache}: what is there costs nothing"),
        ]

    def most_cost(self) -> int:
        """Returns the most that an answer can cost, in picodollars, with an instruction of usual length."""
        frame = np.zeros(self.spec.frame_shape, np.uint8)
        question = Question(self.spec.system, frame, "x" * 200, self.spec.action_names)
        return most_cost(self.chooser, question)

    def _question(self, inputs: Rows, row: int, seed: int | None) -> Question:
        text = bytes(inputs["text"][row].tolist()).rstrip(b"\0").decode()
        frame = inputs["frames"][row].numpy()
        names = np.array(self.spec.action_names, object)
        return Question(self.spec.system, frame, text, tuple(names[self._allowed(inputs, row)]), seed)

    def _allowed(self, inputs: Rows, row: int) -> np.ndarray:
        """The actions that are offered, (n,) int64."""
        if ACTION_MASK not in inputs:
            return np.arange(len(self.spec.action_names))
        return np.flatnonzero(inputs[ACTION_MASK][row].numpy())

    def _action(self, chosen: Chosen, allowed: np.ndarray, uniform: float, greedy: bool) -> tuple[int, torch.Tensor]:
        """The action for the environment, and log-probabilities (A,): of its letters, else all on the action."""
        logprobs = torch.full((len(self.spec.action_names),), -torch.inf)  # (A,)
        if chosen.logprobs is not None:
            logprobs[allowed] = torch.from_numpy(chosen.logprobs).float()
            if greedy:
                return int(logprobs.argmax()), logprobs
            logprobs = (logprobs / self.settings.remote_temperature).log_softmax(-1)
            return int(sample_categorical(logprobs[None], np.array([uniform]))[0]), logprobs
        index = self.stands_in if chosen.choice is None else int(allowed[chosen.choice])
        if index == SKIP:  # nothing is known of any action
            return SKIP, torch.zeros_like(logprobs).log_softmax(-1)
        logprobs[index] = 0.0
        return index, logprobs


def make_chooser(settings: RemoteSettings, account: Path | None = None) -> tuple[Chooser, Ledger]:
    """Returns who asks the server, and the account of it."""
    from manako.policies.remote.client import check_settings

    check_settings(settings)
    ledger = Ledger(settings, account)
    return Chooser(RemoteClient(settings, ledger)), ledger


def most_cost(chooser: Chooser, question: Question) -> int:
    """Returns the most that an answer can cost either way, in picodollars."""
    ways = (True, False) if chooser.settings.remote_answers == "auto" else (False,)
    return max(chooser.client.most_cost(chooser.request(question, by_letter=way)) for way in ways)


def budget_in_words(chooser: Chooser, most: int) -> str:
    """Returns the limits, the most that a request can cost, and for how many that is enough."""
    settings = chooser.settings
    parts = ["any number of requests" if settings.remote_requests is None else f"{settings.remote_requests:,} requests"]
    if settings.remote_cost is not None:
        parts.append(f"${settings.remote_cost:g}")
    if settings.remote_input_price is None or settings.remote_output_price is None:
        return f"{parts[0]}; prices are not given, so dollars are not counted"
    enough = f", so for {settings.remote_cost * DOLLAR // most:,.0f} at least" if settings.remote_cost and most else ""
    return f"{' and '.join(parts)}; a request costs ${most / DOLLAR:.5f} at most{enough}"


def count_outcomes(outcomes: Sequence[str]) -> dict[str, int]:
    """Returns how often each outcome came, the most frequent first."""
    return dict(Counter(outcomes).most_common())
