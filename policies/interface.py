"""The interface: all that `agent/` knows of a policy, for PPO, rollouts, workers, evaluation, datasets and TRL.

Legend: B samples, S tokens of an answer (1 for a closed set whose actions are one choice), A actions, (H, W, 3) frames.

A policy is asked in this order: `prepare` turns frames and instructions into rows, which rollouts store as they are;
`act` samples actions from them; `evaluate_actions` computes the log-probabilities of those actions again, by the same
forward, with gradients. Players that cannot learn (scripted, random, recorded) are policies too: `can_learn` is False.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from manako.policies.answers.illegal import LEGAL as LEGAL
from manako.policies.answers.illegal import OUTCOMES as OUTCOMES
from manako.policies.answers.text import TextAnswers
from manako.policies.errors import PolicyError
from manako.policies.shared_frames import SharedFrames
from manako.policies.source import BINS, SYSTEM, ActionFormat, BinSpacing

Messages = list[dict[str, Any]]  # a chat: {"role": ..., "content": [{"type": "text", "text": ...}, ...]}


NEXT_CODES = "next_codes"  # column of what a step returned, which is no part of what was seen before it
ACTION_MASK = "action_mask"  # column (B, A) bool of which actions were allowed, where the environment says it


class Rows:
    """Tensors of B samples that belong together; `agent/` moves rows about and never looks inside.

    Args:
        columns: name -> (B, ...) tensor.
        fillers: for each ragged column, whose rows are padded on the right of dimension 1, the value that pads it.
        shared: several frames of each sample, and what is made of them, each different one once; read like columns.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        fillers: Mapping[str, float] | None = None,
        shared: SharedFrames | None = None,
    ) -> None:
        self.columns, self.fillers, self.shared = dict(columns), dict(fillers or {}), shared

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.columns or (self.shared is not None and name in self.shared)

    def __getitem__(self, name: str) -> Tensor:
        """Returns a column (B, ...); of shared frames (B, k, ...)."""
        if name not in self.columns and self.shared is not None:
            return self.shared[name]
        return self.columns[name]

    @property
    def nbytes(self) -> int:
        """What these samples take of memory."""
        shared = 0 if self.shared is None else self.shared.used().nbytes
        return sum(column.nbytes for column in self.columns.values()) + shared

    def with_column(self, name: str, column: Tensor) -> "Rows":
        """Returns the same with one more column (B, ...), or another in its place."""
        return Rows({**self.columns, name: column}, self.fillers, self.shared)

    def select(self, rows: Tensor) -> "Rows":
        """Returns the samples at these rows, (B',) int64 or (B,) bool."""
        shared = None if self.shared is None else self.shared.select(rows)
        return Rows({name: column[rows] for name, column in self.columns.items()}, self.fillers, shared)

    def to(self, device: torch.device | str) -> "Rows":
        """Returns the same on another device."""
        shared = None if self.shared is None else self.shared.to(device)
        return Rows({name: column.to(device) for name, column in self.columns.items()}, self.fillers, shared)

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """Returns the samples one after another; ragged columns are padded with their filler to the longest."""
        fillers = parts[0].fillers
        joined = {}
        for name in parts[0].columns:
            columns = [part.columns[name] for part in parts]
            if name in fillers:
                longest = max(column.shape[1] for column in columns)
                columns = [
                    nn.functional.pad(
                        column, (0, 0) * (column.ndim - 2) + (0, longest - column.shape[1]), value=fillers[name]
                    )
                    for column in columns
                ]
            joined[name] = torch.cat(columns)
        shared = [part.shared for part in parts if part.shared is not None]
        return Rows(joined, fillers, SharedFrames.join(shared) if shared else None)

    def digests(self) -> Tensor:
        """Returns (B,) int64, equal where all that was seen is, padding and what came after aside."""
        digests = []
        for row in range(len(self)):
            digest = hashlib.blake2b(digest_size=8)
            for name, column in sorted(self.columns.items()):
                if name == NEXT_CODES:
                    continue
                value = column[row]
                if name in self.fillers:
                    kept = (
                        (value != self.fillers[name]).flatten(1).any(1)
                        if value.ndim > 1
                        else value != self.fillers[name]
                    )
                    value = value[: int(kept.nonzero()[-1]) + 1 if kept.any() else 0]
                digest.update(f"{name}{tuple(value.shape)}".encode())
                digest.update(value.contiguous().cpu().numpy().tobytes())
            if self.shared is not None:
                digest.update(self.shared.shown(row))
            digests.append(int.from_bytes(digest.digest(), "little", signed=True))
        return torch.tensor(digests, dtype=torch.int64)

    def __reduce__(self) -> tuple:
        """Pickles rows as NumPy arrays, which need no copy on the way between processes."""
        columns = {name: column.cpu().numpy() for name, column in self.columns.items()}
        return _unpickled, (columns, self.fillers, None if self.shared is None else self.shared.arrays())


def _unpickled(arrays: dict[str, np.ndarray], fillers: dict[str, float], shared: Any = None) -> Rows:
    # a copy: shared memory is read-only
    columns = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return Rows(columns, fillers, None if shared is None else SharedFrames.of_arrays(*shared))


class Draws:
    """Uniform random numbers for B slots, each slot's own, consumed in order.

    A slot's numbers do not depend on who else is drawn for, so any split of slots over workers samples the same
    actions.

    Args:
        rngs: B generators; slots may share one, which then serves them in their order.
    """

    def __init__(self, rngs: Sequence[np.random.Generator]) -> None:
        self.rngs = tuple(rngs)

    def __len__(self) -> int:
        return len(self.rngs)

    def next(self) -> np.ndarray:
        """Returns (B,) float64 in [0, 1), the next number of each slot."""
        return np.array([rng.random() for rng in self.rngs])

    def select(self, rows: Sequence[int]) -> "Draws":
        """Returns the draws of these slots alone."""
        return Draws([self.rngs[row] for row in rows])


class Acted(NamedTuple):
    """What a policy did."""

    actions: Rows  # what evaluate_actions takes back
    to_env: np.ndarray  # (B,) int64 | (B, d) int64 | (B, d) float32: what env.step is given
    logprobs: Tensor  # (B, S) float32
    mask: Tensor  # (B, S) bool, True = sampled by the policy, so learned from
    values: Tensor  # (B,) float32, 0 where there is no critic
    outcomes: Sequence[str] | None = None  # of text answers, such as "legal" or "unparsed": counted and paid
    token_values: Tensor | None = None  # (B, S) float32, at the token before each; None: no critic on tokens


class Evaluated(NamedTuple):
    """What a policy now says of actions that were taken."""

    logprobs: Tensor  # (B, S) float32
    entropy: Tensor  # (B, S) in nats; exact for closed sets
    values: Tensor  # (B,) float32
    distribution: Tensor | None = None  # (B, A) log-probabilities where the set is closed
    losses: Mapping[str, Tensor] = {}  # a policy's own, (), such as the next frame's: the trainer adds and logs them
    token_values: Tensor | None = None  # (B, S) float32, see `Acted`
    is_joint: bool = False  # True: the tokens are the entries of one action, which has one ratio


@dataclass(frozen=True)
class PolicySpec:
    """What a policy is made for, and its prompt; saved as policy.json.

    Args:
        action_names: the A actions, in the env's order; of vectors (d,) the entries.
        frame_shape: (H, W, 3) of the env's frames.
        action_format: see `manako.policies.answers.closed_set`.
        system: the prompt's system text; `{actions}` stands for the list of actions.
        text: of answers in text, else None.
        frames: how many of the episode's last frames it is shown, the present one among them.
        history: how many of the episode's last actions and rewards the prompt tells.
        image_first: the frames stand before the instruction, so that samples of one frame share their forward.
        vectors: the space of action vectors, `MultiDiscrete` or `Box`; None: an action is one of the A.
        bins: how many an entry of a `Box` has.
        bin_spacing: see `manako.policies.answers.bins`.
    """

    action_names: tuple[str, ...]
    frame_shape: tuple[int, int, int]
    action_format: ActionFormat = "auto"
    system: str = SYSTEM
    text: TextAnswers | None = None
    frames: int = 1
    history: int = 0
    image_first: bool = False
    vectors: gym.Space | None = None
    bins: int = BINS
    bin_spacing: BinSpacing = "linear"

    @property
    def action_space(self) -> gym.Space:
        """The env's action space."""
        return gym.spaces.Discrete(len(self.action_names)) if self.vectors is None else self.vectors


class Policy(nn.Module, ABC):
    """Decides what to do in B environments.

    Attributes:
        spec: what it was made for.
        can_learn: False for remote, scripted, random and recorded players.
        plays_expert: whether its actions are those of the env's expert, and so its thoughts are the expert's.
        learns_text: False for a model that says one token at a mask: losses on the tokens of a text are not for it.
        needs: names of what the environments tell beside frame and instruction, for `prepare`: "expert_actions",
            "episode_seeds", "episode_steps", "past_frames", "past_turns", "uncounted", "action_masks"; the last comes
            where the environments say what is allowed.
        illegal_penalty: what an answer that names no action costs, taken off the reward that is learned from.
        model: the language model with its adapters, as TRL's trainers take it; None where there is none.
        processor: its processor; None where there is none.
    """

    spec: PolicySpec
    can_learn: ClassVar[bool] = False
    plays_expert: ClassVar[bool] = False
    learns_text: bool = True
    needs: tuple[str, ...] = ()
    illegal_penalty: float = 0.0
    model: Any = None
    processor: Any = None

    @abstractmethod
    def prepare(
        self, images: np.ndarray, instructions: Sequence[str], told: Mapping[str, np.ndarray] | None = None
    ) -> Rows:
        """Returns what the policy sees, on the CPU.

        Args:
            images: (B, H, W, 3) uint8.
            instructions: B texts.
            told: for names of `needs` an array (B, ...) each; without the past, these are first frames of episodes.

        Raises:
            PolicyError: frames of another shape than the policy was made for, or a text that it cannot read.
        """

    def see_next(self, inputs: Rows, images: np.ndarray) -> Rows:
        """Returns the rows with what a policy that predicts keeps of the frames that followed; by default nothing.

        Args:
            inputs: B rows of `prepare`.
            images: (B, H, W, 3) uint8, which the step returned; at an episode's end its last frame.
        """
        return inputs

    @abstractmethod
    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns B actions: sampled with the numbers of `draws`, or the greedy ones; no gradient, on the CPU."""

    def evaluate_actions(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns what the policy now says of these actions, by the forward of `act`; gradients flow.

        Raises:
            PolicyError: a player that cannot learn.
        """
        raise PolicyError(
            f"{type(self).__name__} cannot learn: expected a policy with a model, such as the preset tiny."
        )

    def shared_work(self, inputs: Rows) -> Tensor | None:
        """Returns numbers (B,) int64, equal where samples cost less in one forward; None where it does not matter."""
        return None

    def own_losses(self, inputs: Rows, actions: Rows) -> Mapping[str, Tensor]:
        """Returns the policy's own losses on steps, (), as `evaluate_actions` has them; none by default."""
        return {}

    def forward(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns what `evaluate_actions` does; mixed precision and data parallelism wrap this method."""
        return self.evaluate_actions(inputs, actions)

    def predict_values(self, inputs: Rows) -> Tensor:
        """Returns the values (B,) float32, on the CPU; 0 where there is no critic."""
        return torch.zeros(len(inputs))

    def frozen_weights(self) -> AbstractContextManager[None]:
        """Keeps the weights as they are, without gradients, inside the block."""
        return torch.no_grad()

    @property
    def has_reference(self) -> bool:
        """Whether `as_reference` works."""
        return False

    def as_reference(self) -> AbstractContextManager[None]:
        """Makes the policy what it was when training started, inside the block.

        Raises:
            PolicyError: it does not keep what it was.
        """
        raise PolicyError("This policy does not keep what it was: expected trainable: lora for a reference.")

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return torch.device("cpu")

    def parameter_groups(
        self, learning_rate: float, adapter_learning_rate: float | None = None
    ) -> list[dict[str, Any]]:
        """Returns the parameters that learn as groups for an optimizer, each {"params": [...], "lr": rate}."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": learning_rate}]

    def fit_adapter(self, images: np.ndarray) -> list[str]:
        """Gives adapters that learn and want statistics those of the frames (N, H, W, 3).

        Returns:
            The names of the adapters that were fitted.
        """
        return []

    def actions_from_env(self, to_env: np.ndarray, thoughts: Sequence[str] | None = None) -> Rows:
        """Returns what `evaluate_actions` takes for actions (B, ...) as an environment is given them.

        Args:
            to_env: the actions.
            thoughts: what a policy that writes says before each; nothing by default.
        """
        raise PolicyError(f"{type(self).__name__} has no actions to evaluate: expected a policy that can learn.")

    def padding_share(self) -> float | None:
        """Returns which share of the tokens of updates was padding, since it was last asked; None: not counted."""
        return None

    def writes(self, actions: Rows) -> bool:
        """Returns whether these actions are answers in text that it wrote itself."""
        return False

    def thoughts(self, actions: Rows) -> list[str] | None:
        """Returns what was thought before each of B actions; None of a policy that says none."""
        return None

    def prompt(self, instruction: str, turns: np.ndarray | None = None) -> str:
        """Returns the whole prompt as text, for datasets.

        Args:
            instruction: the environment's.
            turns: (history, 2) of what was done before, as `past_turns` of `prepare`; None: an episode's start.
        """
        raise PolicyError(f"{type(self).__name__} has no prompt: expected a policy with a language model.")

    def messages(self, instruction: str, turns: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Returns the chat that TRL's trainers are given; the processor's template renders it to `prompt`."""
        raise PolicyError(f"{type(self).__name__} has no prompt: expected a policy with a language model.")

    def pretraining(self, stage: str) -> Any:
        """Returns the model's own losses on frames and captions for a stage of run_sft.py.

        Returns:
            A `manako.policies.architectures.pretraining.Pretraining`, or None where the architecture has none.
        """
        return None

    def training_inputs(
        self, images: np.ndarray, prompts: Sequence[Messages], completions: Sequence[Messages]
    ) -> dict[str, Tensor]:
        """Returns what `model` is given of B prompts, each followed by its completion, for TRL's losses.

        Args:
            images: (B, H, W, 3) uint8, one for each prompt, or (B, k, H, W, 3), the last k frames.
            prompts: chat messages.
            completions: the answers' messages.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask` (B, L), 1 in the last where a completion is; and
            whatever else the model takes.

        Raises:
            PolicyError: frames of another shape, or a chat template that puts something between prompt and completion.
        """
        raise PolicyError(f"{type(self).__name__} has no model to train on text: expected one with a language model.")

    def answers(self, actions: Rows) -> list[str]:
        """Returns the text of each action, for datasets, pairs and figures."""
        raise PolicyError(f"{type(self).__name__} has no answers: expected a policy with a language model.")

    def answer_tokens(self, actions: Rows) -> list[list[int]]:
        """Returns the token ids of each action's answer."""
        raise PolicyError(f"{type(self).__name__} has no answers: expected a policy with a language model.")

    def prompt_tokens(self, instruction: str, turns: np.ndarray | None = None) -> list[int]:
        """Returns the token ids of the whole prompt, image placeholders among them."""
        raise PolicyError(f"{type(self).__name__} has no prompt: expected a policy with a language model.")

    def save(self, folder: Path | str) -> None:
        """Writes all that makes this policy into a folder, which is made where it is missing."""
        raise PolicyError(f"{type(self).__name__} has nothing to save: expected a policy that can learn.")

    def load_weights(self, folder: Path) -> None:
        """Reads the weights that `save` wrote, into the same policy.

        Raises:
            PolicyError: files missing or damaged, or of another policy.
        """
        raise PolicyError(f"{type(self).__name__} has no weights: expected a policy that can learn.")

    def describe(self) -> list[tuple[str, str]]:
        """Returns what a run's header says of it: (heading, text) lines."""
        return []


def sample_categorical(logprobs: Tensor, uniforms: np.ndarray) -> Tensor:
    """Samples actions by inverting the distribution function.

    Args:
        logprobs: (B, A).
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64.
    """
    probabilities = logprobs.double().exp()  # (B, A)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.as_tensor(uniforms, device=logprobs.device)[:, None] * cumulative[:, -1:]
    last = logprobs.shape[-1] - 1 - (probabilities > 0).int().flip(-1).argmax(-1)  # that can be drawn at all, (B,)
    return torch.minimum((cumulative <= drawn).sum(-1), last)


def allow(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns log-probabilities (B, A) renormalised over the actions that are allowed; -inf for the others.

    No gradient flows to what is not allowed. Where one action alone is allowed, it has log-probability 0.

    Args:
        logprobs: (B, A).
        mask: (B, A) bool, True = allowed, with a True in each row.
    """
    return logprobs.masked_fill(~mask, -torch.inf).log_softmax(-1)


def entropy(logp: Tensor) -> Tensor:
    """Returns -sum p log p in nats of closed sets of actions: (B, A) normalised log-probabilities -> (B,)."""
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def act_categorical(logprobs: Tensor, values: Tensor, draws: Draws, greedy: bool) -> Acted:
    """Returns one action of a closed set for each row of log-probabilities (B, A), with S = 1.

    A greedy action takes no random number.
    """
    logprobs, values = logprobs.cpu(), values.cpu()
    index = logprobs.argmax(-1) if greedy else sample_categorical(logprobs, draws.next())  # (B,)
    taken = logprobs.gather(1, index[:, None])  # (B, 1)
    return Acted(Rows({"index": index}), index.numpy(), taken, torch.ones_like(taken, dtype=torch.bool), values)
