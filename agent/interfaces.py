"""What learning needs of environments, and what it gets rollouts from; `agent/` imports no environment."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from manako.memory import Memory

if TYPE_CHECKING:
    import torch

    from manako.agent.rollout import Rollout
    from manako.policies.interface import Policy


class Shown(Protocol):
    """What N environments show."""

    @property
    def images(self) -> np.ndarray:
        """(N, H, W, 3) uint8."""

    @property
    def instructions(self) -> tuple[str, ...]:
        """N texts."""


class Stepped(Protocol):
    """What one step of N environments gave."""

    @property
    def observations(self) -> Shown:
        """What the step returned: an episode's last frame where it ended."""

    @property
    def rewards(self) -> np.ndarray:
        """(N,)."""

    @property
    def terminated(self) -> np.ndarray:
        """(N,) bool."""

    @property
    def truncated(self) -> np.ndarray:
        """(N,) bool."""

    @property
    def success(self) -> np.ndarray:
        """(N,) int8: 1 where an episode ended with this step in success, -1 where nobody says what one is, 0 else."""

    @property
    def failed(self) -> np.ndarray:
        """(N,) bool: the environment broke, and its episode is given up: no step was taken and nothing was paid."""


class Fault(Protocol):
    """What an environment broke with, and what became of its episode; a NamedTuple."""

    @property
    def sentence(self) -> str:
        """What happened, and where."""

    @property
    def given_up(self) -> bool:
        """Whether the episode was lost; else it was played again, and goes on."""

    def _asdict(self) -> dict[str, Any]: ...


class ToldFault(NamedTuple):
    """A `Fault` of which no environment is at hand: told by a lost worker's learner, or by a former start's files."""

    slot: int
    seed: int
    step: int
    given_up: bool
    sentence: str
    traceback: str


class VectorEnv(Protocol):
    """The part of `manako.envs.EpisodeVectorEnv` that learning needs."""

    num_envs: int
    first_slot: int
    action_names: tuple[str, ...]
    episode_returns: np.ndarray  # (N,)
    episode_lengths: np.ndarray  # (N,)
    episode_seeds: list[int]  # N
    digests: list[str]  # N, of all that the current episodes have shown and paid so far
    given_up: int  # episodes that did not replay, so far
    memory: Memory  # of the current episodes, as far as `remember` asked for it

    @property
    def started(self) -> list[int]:
        """N, how many episodes each slot has started."""

    def remember(self, frames: int = 0, turns: int = 0) -> None:
        """Keeps so many past frames and turns of each episode; called before `reset`."""

    @property
    def action_masks(self) -> np.ndarray | None:
        """(N, A) bool, which actions are allowed now; None where the environments do not say."""

    def reset(self, seeds: Sequence[int] | None = None) -> Shown:
        """Starts an episode in every slot."""

    def reset_done(self, mask: np.ndarray, seeds: Sequence[int] | None = None) -> Shown:
        """Starts the next episode where `mask` (N,) is True."""

    def start_round(self, number: int) -> Shown:
        """Starts a new episode in every slot; `number` selects the episodes."""

    def expert_actions(self) -> np.ndarray:
        """Returns what the env's scripted expert would do now, (N,)."""

    def uncounted(self) -> np.ndarray:
        """Returns (N,) bool, True where it is known that nobody counts a slot's episode."""

    def expert_thoughts(self) -> tuple[str, ...] | None:
        """Returns why the expert acts so, N texts, asked after `expert_actions`; None where nobody says it."""

    def step(self, actions: np.ndarray) -> Stepped:
        """Takes one action (N, ...) in every slot."""

    def take_faults(self) -> "Sequence[Fault]":
        """Returns the faults that were survived since the last call."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON: `first_slot`, and of N slots each `episodes`, `slots`, `replacements`."""

    def load_state_dict(self, state: Any) -> Shown | None:
        """Brings every slot back to where it was; an episode that does not replay is given up and started anew."""

    def close(self) -> None:
        """Closes the environments."""


NOT_FIXED = "episodes are not fixed by seed"
SEEDED = "expected an environment that draws everything random from self.np_random, or --advantage gae"


class EvaluationEnv(VectorEnv, Protocol):
    """Environments that can also say what another instruction would be, and whether they follow their seeds."""

    action_space: gym.Space  # Discrete, or of vectors (d,): MultiDiscrete, Box of float32

    def follows_seeds(self) -> bool:
        """Says whether a seed fixes how an episode begins; starts some, so it is asked between episodes."""

    def replaced_instructions(self) -> tuple[str, ...]:
        """Returns for each slot a valid instruction other than its own."""

    def random_actions(self, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns an action for each slot, of those allowed each alike; `draw` gives (N,) numbers in [0, 1)."""


# What an environment tells beside frame and instruction, by the name that `Policy.needs` asks for it.
TOLD: dict[str, Callable[[VectorEnv], np.ndarray | None]] = {
    "action_masks": lambda env: env.action_masks,  # (N, A) bool; None: nobody says what is allowed
    "expert_actions": lambda env: np.asarray(env.expert_actions()),  # (N,)
    "episode_seeds": lambda env: np.array(env.episode_seeds),  # (N,)
    "episode_steps": lambda env: np.array(env.episode_lengths),  # (N,) steps taken, 0 at an episode's start
    "past_frames": lambda env: env.memory.past_frames(),  # (N, frames, H, W, 3), oldest first, see `manako.memory`
    "past_turns": lambda env: env.memory.turns.copy(),  # (N, turns, 2), index of the action and reward, oldest first
    "uncounted": lambda env: env.uncounted(),  # (N,) bool, slots that play on beyond what was asked for
}


def remember_for(env: VectorEnv, policy: "Policy") -> None:
    """Makes environments keep the past that a policy is told of; called before they are reset."""
    frames = policy.spec.frames - 1 if "past_frames" in policy.needs else 0
    turns = policy.spec.history if "past_turns" in policy.needs else 0
    if frames or turns:
        env.remember(frames, turns)


def ask(env: VectorEnv, needs: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns what a policy needs to be told, by name, without what the environments do not say."""
    told = {name: TOLD[name](env) for name in needs}
    return {name: values for name, values in told.items() if values is not None}


GIVEN_UP = "episodes_given_up"  # of `Rollouts.metrics`: episodes that did not replay, so far


class RolloutSource(Protocol):
    """What the algorithm alone needs: N environments that are played for T steps at a time."""

    num_envs: int
    num_steps: int

    def collect(self, iteration: int) -> "Rollout":
        """Plays the T steps of that iteration in every environment."""


class Rollouts(RolloutSource, Protocol):
    """Where a run's rollouts come from: this process or workers, with the same trajectories for seed and weights."""

    def metrics(self) -> dict[str, float]:
        """Returns numbers of the last rollout for the log, beside those of every rollout."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the environments are, as JSON."""

    def load_state_dict(self, state: Any, tensors: "dict[str, torch.Tensor]") -> None:
        """Brings them back; `tensors` are those of `tensors()`."""

    def take_faults(self) -> "Sequence[Fault]":
        """Returns what broke in a rollout that broke off, and is in none."""

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Returns weights that a resumed run needs beside the policy's."""

    def close(self) -> None:
        """Ends environments and workers."""
