"""Rollouts: T steps of N environments played by the current policy, stored as the policy saw them.

The order of the file is the order of events: what a rollout holds, how an action is drawn, how a rollout is collected.
Nothing is rendered, prompted or tokenized again for training. Every random number is a function of (seed, slot,
iteration), so a resumed run and any split of the slots over workers draw the same actions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from agent.advantages import gae, normalize
from agent.errors import TrainingError
from policies import PolicyInputs, VLMPolicy

ACTIONS, SHUFFLES = 11, 12  # what a random stream is for; 0 and 1 are the episodes' seeds


class Observations(Protocol):
    """What N environments show."""

    @property
    def images(self) -> np.ndarray:
        """(N, H, W, 3) uint8."""

    @property
    def instructions(self) -> tuple[str, ...]:
        """N texts."""


class VectorEnv(Protocol):
    """The part of `envs.EpisodeVectorEnv` that learning needs; agent/ does not import envs/."""

    num_envs: int
    first_slot: int
    action_names: tuple[str, ...]
    episode_returns: np.ndarray  # (N,)
    episode_lengths: np.ndarray  # (N,)

    def reset(self, seeds: Sequence[int] | None = None) -> Observations:
        """Starts an episode in every slot."""

    def reset_done(self, mask: np.ndarray, seeds: Sequence[int] | None = None) -> Observations:
        """Starts the next episode where `mask` (N,) is True."""

    def step(self, actions: np.ndarray) -> Any:
        """One action (N,) in every slot: observations, rewards, terminated, truncated, success."""

    def replaced_instructions(self) -> tuple[str, ...]:
        """For each slot a valid instruction other than its own."""

    def state_dict(self) -> dict[str, Any]:
        """The state of every slot, as JSON."""

    def load_state_dict(self, state: Any) -> Observations | None:
        """Brings every slot back to where it was."""


@dataclass(frozen=True)
class Episode:
    """A finished episode."""

    episode_return: float
    length: int
    success: bool


class Rollout(NamedTuple):
    """T steps of N environments; inputs are flat, in the order of (T, N)."""

    inputs: PolicyInputs  # T * N samples
    actions: torch.Tensor  # (T, N) int64
    logprobs: torch.Tensor  # (T, N) float32, of the actions taken
    values: torch.Tensor  # (T, N) float32
    next_values: torch.Tensor  # (T, N) float32, of the observation that the step returned
    rewards: torch.Tensor  # (T, N) float32
    terminated: torch.Tensor  # (T, N) bool
    truncated: torch.Tensor  # (T, N) bool
    reference: torch.Tensor | None  # (T * N, A) log-probabilities of the reference policy
    episodes: list[Episode]  # those that ended during the rollout
    seconds: float


class Samples(NamedTuple):
    """A rollout's samples with their advantages, flat: what minibatches are drawn from."""

    inputs: PolicyInputs
    actions: torch.Tensor  # (T * N,)
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor  # normalised over the whole rollout
    returns: torch.Tensor
    reference: torch.Tensor | None  # (T * N, A)


def stream(seed: int, *key: int) -> np.random.Generator:
    """The random stream of that key."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))


def choose(logprobs: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
    """Actions (N,) from log-probabilities (N, A) and uniform numbers (N,), by inverting the distribution function."""
    cumulative = logprobs.double().exp().cumsum(-1)  # (N, A)
    drawn = torch.as_tensor(uniforms, device=logprobs.device)[:, None] * cumulative[:, -1:]
    return (cumulative <= drawn).sum(-1).clamp_max(logprobs.shape[-1] - 1)


def stack_inputs(inputs: Sequence[PolicyInputs], pad_id: int) -> PolicyInputs:
    """Joins samples along the batch, padding prompts on the right to the longest."""
    longest = max(item.input_ids.shape[1] for item in inputs)
    ids = [F.pad(item.input_ids, (0, longest - item.input_ids.shape[1]), value=pad_id) for item in inputs]
    return PolicyInputs(
        torch.cat(ids), torch.cat([item.lengths for item in inputs]), torch.cat([item.frames for item in inputs])
    )


class RolloutCollector:
    """Plays the environments with the policy.

    Args:
        env: N environments that have not been started, or were brought back by `load_state_dict`.
        policy: the policy.
        num_steps: T.
        seed: the run's seed.
        reference: a frozen policy to stay close to; the policy itself stands for itself with its LoRA off.
        max_batch: samples of one forward outside the env loop.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: VLMPolicy,
        num_steps: int,
        seed: int,
        reference: VLMPolicy | None = None,
        max_batch: int = 256,
    ) -> None:
        self.env, self.policy, self.num_steps, self.seed = env, policy, num_steps, seed
        self.reference, self.max_batch = reference, max_batch
        self._observations: Observations | None = None

    def collect(self, iteration: int) -> Rollout:
        """Plays T steps in every environment.

        Args:
            iteration: number of the rollout; it selects the random numbers.

        Raises:
            TrainingError: the policy's probabilities are not finite.
        """
        start = time.perf_counter()
        env, policy, device = self.env, self.policy, self.policy.device
        if self._observations is None:
            self._observations = env.reset()
        uniforms = np.stack(
            [
                stream(self.seed, ACTIONS, env.first_slot + slot, iteration).random(self.num_steps)
                for slot in range(env.num_envs)
            ],
            axis=1,
        )  # (T, N)
        steps: list[tuple[PolicyInputs, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        rewards, terminated, truncated, episodes = [], [], [], []
        final_inputs: list[PolicyInputs] = []  # last frames of truncated episodes
        final_at: list[tuple[int, int]] = []
        with policy.frozen_weights():
            for t in range(self.num_steps):
                inputs = policy.prepare(self._observations.images, self._observations.instructions)
                output = policy(inputs.to(device))
                logprobs = output.logprobs.cpu()  # (N, A)
                if not torch.isfinite(logprobs).all():
                    raise TrainingError(
                        f"The policy's probabilities are not finite in iteration {iteration}, step {t}: expected "
                        "numbers; start again from the last checkpoint with a smaller learning_rate."
                    )
                actions = choose(logprobs, uniforms[t])  # (N,)
                steps.append((inputs, actions, logprobs.gather(1, actions[:, None])[:, 0], output.values.cpu()))
                result = env.step(actions.numpy())
                rewards.append(torch.from_numpy(np.asarray(result.rewards, dtype=np.float32)))
                terminated.append(torch.from_numpy(result.terminated))
                truncated.append(torch.from_numpy(result.truncated & ~result.terminated))
                self._observations = result.observations
                ended = result.terminated | result.truncated
                if ended.any():
                    cut = np.flatnonzero(result.truncated & ~result.terminated)
                    if len(cut):
                        final_inputs.append(
                            policy.prepare(
                                result.observations.images[cut], [result.observations.instructions[i] for i in cut]
                            )
                        )
                        final_at.extend((t, slot) for slot in cut.tolist())
                    for slot in np.flatnonzero(ended):
                        episodes.append(
                            Episode(
                                float(env.episode_returns[slot]),
                                int(env.episode_lengths[slot]),
                                bool(result.success[slot]),
                            )
                        )
                    self._observations = env.reset_done(ended)
            last = policy.prepare(self._observations.images, self._observations.instructions)
            values = torch.stack([step[3] for step in steps])  # (T, N)
            # V of the observation that each step returned: the next row's, the last frame's where an episode was cut
            beyond = self._values([last, *final_inputs])
            next_values = torch.cat([values[1:], beyond[None, : env.num_envs]])  # (T, N)
            for (row, place), value in zip(final_at, beyond[env.num_envs :], strict=True):
                next_values[row, place] = value
            inputs = stack_inputs([step[0] for step in steps], policy.pad_id)
            reference = self._reference_logprobs(inputs)
        return Rollout(
            inputs=inputs,
            actions=torch.stack([step[1] for step in steps]),
            logprobs=torch.stack([step[2] for step in steps]),
            values=values,
            next_values=next_values,
            rewards=torch.stack(rewards),
            terminated=torch.stack(terminated),
            truncated=torch.stack(truncated),
            reference=reference,
            episodes=episodes,
            seconds=time.perf_counter() - start,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the environments are."""
        return self.env.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Brings the environments back to where they were."""
        self._observations = self.env.load_state_dict(state)

    def _values(self, batches: list[PolicyInputs]) -> torch.Tensor:
        joined = stack_inputs(batches, self.policy.pad_id)
        parts = [
            self.policy(joined.select(rows).to(self.policy.device)).values.cpu()
            for rows in torch.arange(len(joined.lengths)).split(self.max_batch)
        ]
        return torch.cat(parts)

    def _reference_logprobs(self, inputs: PolicyInputs) -> torch.Tensor | None:
        if self.reference is None:
            return None
        with self.policy.as_reference() if self.reference is self.policy else self.reference.frozen_weights():
            parts = [
                self.reference(inputs.select(rows).to(self.policy.device)).logprobs.cpu()
                for rows in torch.arange(len(inputs.lengths)).split(self.max_batch)
            ]
        return torch.cat(parts)


def with_advantages(rollout: Rollout, gamma: float, gae_lambda: float) -> Samples:
    """Advantages by GAE, normalised over the whole rollout, and everything flat."""
    advantages, returns = gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    return Samples(
        inputs=rollout.inputs,
        actions=rollout.actions.flatten(),
        logprobs=rollout.logprobs.flatten(),
        values=rollout.values.flatten(),
        advantages=normalize(advantages).flatten(),
        returns=returns.flatten(),
        reference=rollout.reference,
    )
