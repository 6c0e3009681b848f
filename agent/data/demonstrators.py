"""Players that act in a policy's place and cannot learn: the env's scripted expert, chance, recorded play.

Each is a `Policy`: what it must be told beside frame and instruction stands in `needs`, and `act` draws with the run's
random numbers. Environments refuse what their action mask does not allow: a player of such ones needs "action_masks".
A model behind a chat API is `manako.policies.remote_policy`. One of your own, here a rule of the frame:

    class Brightest(Player):
        def prepare(self, images, instructions, told=None):
            columns = images.sum((1, 3)).reshape(len(images), len(self.spec.action_names), -1)
            return Rows({"index": torch.from_numpy(columns.sum(-1).argmax(1))})

        def act(self, inputs, draws, greedy=False):
            return self.deterministic(inputs["index"])

    collector = RolloutCollector(env, Brightest(policy.spec), num_steps, seed, record=True)
    to_dataset([collector.collect(0)], policy, env_id, "brightest", {})

Locally and with ray-env there is one, which is asked for all slots before each of their steps, in order. With
ray-replica every worker has its own copy (it must pickle) and may repeat a rollout: keep no state there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from manako.agent.data.recordings import Recording
from manako.agent.errors import TrainingError
from manako.policies.interface import Acted, Draws, Policy, PolicySpec, Rows, act_categorical
from manako.spaces import TextCodes, action_dtype, is_vector, random_vectors, ranges


class Player(Policy):
    """A policy without weights.

    Args:
        spec: of the policy in whose place it plays.
    """

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec

    def prepare(
        self, images: np.ndarray, instructions: Sequence[str], told: Mapping[str, np.ndarray] | None = None
    ) -> Rows:
        """Returns rows of what it was told, (B, ...) each, and `slot` (B,)."""
        columns = {name: torch.from_numpy(np.array(values)) for name, values in (told or {}).items()}
        return Rows({"slot": torch.arange(len(images)), **columns})

    def sample_from(self, probabilities: Tensor, draws: Draws, greedy: bool = False) -> Acted:
        """Returns actions sampled from probabilities (B, A), or the greedy ones; values are 0."""
        return act_categorical(probabilities.log(), torch.zeros(len(probabilities)), draws, greedy)

    def deterministic(self, actions: Tensor) -> Acted:
        """Returns these actions, (B,) int64 or vectors (B, d), at log-probability 0."""
        if actions.ndim > 1:
            return self.vectors(actions.numpy(), torch.zeros(actions.shape))
        one = torch.nn.functional.one_hot(actions, len(self.spec.action_names)).float()  # (B, A)
        return self.sample_from(one, Draws([]), greedy=True)

    def vectors(self, vectors: np.ndarray, logprobs: Tensor) -> Acted:
        """Returns action vectors (B, d) with log-probabilities (B, d), densities where they are continuous."""
        taken = vectors.astype(action_dtype(self.spec.action_space))
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        return Acted(Rows({"vectors": torch.from_numpy(taken)}), taken, logprobs.float(), mask, torch.zeros(len(taken)))

    def chance(self, draws: Draws) -> tuple[np.ndarray, Tensor]:
        """Returns vectors (B, d) uniform over all, and their log-probabilities (B, d)."""
        space = self.spec.action_space
        if isinstance(space, TextCodes):
            return random_vectors(space, draws.next), torch.zeros(len(draws), *space.shape)  # not asked for
        wide = np.array([high - low for low, high in ranges(space)]) + isinstance(space, gym.spaces.MultiDiscrete)
        logprobs = -np.log(np.where(wide > 0, wide, 1))  # of 1 / values, or of the density
        return random_vectors(space, draws.next), torch.from_numpy(logprobs).expand(len(draws), -1)


class ScriptedPlayer(Player):
    """The env's scripted expert, wrong with a given probability: then any other allowed action, each alike.

    Of vectors, wrong is any one in the space.
    Where nothing but the expert's action is allowed, it is right.

    Args:
        spec: see `Player`.
        error_rate: in [0, 1].
    """

    needs = ("expert_actions", "action_masks")
    plays_expert = True

    def __init__(self, spec: PolicySpec, error_rate: float = 0.0) -> None:
        super().__init__(spec)
        if not 0 <= error_rate <= 1:
            raise TrainingError(f"error_rate is {error_rate}: expected a number from 0 to 1.")
        self.error_rate = error_rate

    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns the expert's actions, or with `error_rate` others."""
        experts, count = inputs["expert_actions"], len(self.spec.action_names)
        if is_vector(self.spec.action_space):
            if not self.error_rate or greedy:
                return self.deterministic(experts)
            wrong = draws.next() < self.error_rate  # (B,)
            others, logprobs = self.chance(draws)
            taken = np.where(wrong[:, None], others, experts.numpy())
            right = torch.zeros_like(logprobs)
            logprobs = torch.where(torch.from_numpy(wrong)[:, None], logprobs, right)
            chosen = np.log(np.where(wrong, self.error_rate, 1 - self.error_rate)) / taken.shape[1]  # of which it was
            return self.vectors(taken, logprobs + torch.from_numpy(chosen)[:, None])
        if "action_masks" in inputs.columns:
            allowed = inputs["action_masks"].scatter(1, experts[:, None], False).float()  # (B, A), the others
            left = allowed.sum(1, keepdim=True)  # (B, 1)
            share = torch.where(left > 0, self.error_rate, 0.0)
            probabilities = allowed * share / left.clamp_min(1)
            probabilities.scatter_(1, experts[:, None], 1 - share)
            return self.sample_from(probabilities, draws, greedy)
        probabilities = torch.full((len(experts), count), self.error_rate / (count - 1))
        probabilities.scatter_(1, experts[:, None], 1 - self.error_rate)
        return self.sample_from(probabilities, draws, greedy)


class RandomPlayer(Player):
    """Every action that is allowed alike."""

    needs = ("action_masks",)

    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns uniform actions; there is no greedy one, so `greedy` samples as well."""
        if is_vector(self.spec.action_space):
            return self.vectors(*self.chance(draws))
        if "action_masks" in inputs.columns:
            allowed = inputs["action_masks"].float()
            return self.sample_from(allowed / allowed.sum(1, keepdim=True), draws)
        count = len(self.spec.action_names)
        return self.sample_from(torch.full((len(inputs), count), 1 / count), draws)


class RecordedPlayer(Player):
    """Plays recordings again: slot k those of `queues[k]`, one after another, and after the last the first again.

    The slots' episodes must have the recordings' seeds: `EpisodeVectorEnv(seed_lists=player.seed_lists)`. It keeps
    count of them, so it plays in one process and from the start.

    Args:
        spec: see `Player`.
        queues: the recordings of each slot, N; see `split_over_slots`.

    Attributes:
        seed_lists: the seeds of the same, N.
        quota: how many recordings each slot has, N; with it `to_dataset` takes every recording once.
        num_steps: steps after which all have been played to their end, and a step more: with that one a recording that
            is too short is noticed.
    """

    needs = ("episode_seeds", "episode_steps")

    def __init__(self, spec: PolicySpec, queues: Sequence[Sequence[Recording]]) -> None:
        super().__init__(spec)
        self.queues = queues
        self.seed_lists = [[recording.seed for recording in queue] for queue in queues]
        self.quota = [len(queue) for queue in queues]
        self.num_steps = 1 + max(sum(len(recording.actions) for recording in queue) for queue in queues)
        self._started = [0] * len(queues)  # episodes
        self._played = [0] * len(queues)  # steps of the current ones

    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns the recorded actions.

        Raises:
            TrainingError: an episode goes on after its recording's end, or the other way round, or has another seed.
        """
        steps, seeds = inputs["episode_steps"].tolist(), inputs["episode_seeds"].tolist()
        actions = [self._next(slot, *now) for slot, now in enumerate(zip(steps, seeds, strict=True))]
        return self.deterministic(torch.tensor(actions))

    def _next(self, slot: int, step: int, seed: int) -> Any:
        if step == 0:
            if self._started[slot] and self._played[slot] < len(self._current(slot).actions):
                recording, last = self._current(slot), self._played[slot] - 1
                raise TrainingError(
                    f"The recording in {recording.place} (seed {recording.seed}) goes on for {len(recording.actions)} "
                    f"actions, and the episode has ended with step {last}: expected the environment and env_kwargs "
                    "that it was played in, and no action after the end."
                )
            self._started[slot] += 1
        recording = self._current(slot)
        if seed != recording.seed:
            raise TrainingError(
                f"Slot {slot} plays an episode of seed {seed}, and the recording in {recording.place} is of "
                f"{recording.seed}: expected an environment that was given the player's seed_lists."
            )
        if step == len(recording.actions):
            raise TrainingError(
                f"The recording in {recording.place} (seed {recording.seed}) ends before step {step}, and the episode "
                "goes on: expected the environment and env_kwargs that it was played in, and all actions to the end."
            )
        self._played[slot] = step + 1
        return recording.actions[step]

    def _current(self, slot: int) -> Recording:
        return self.queues[slot][(self._started[slot] - 1) % len(self.queues[slot])]
