"""Rollouts: T steps of N environments played by the current policy, stored as the policy saw them.

The order of the file is the order of events: what a rollout holds, how an action is drawn, how a rollout is collected.
Nothing is rendered, prompted or tokenized again for training. Every random number is a function of (seed, slot,
iteration), so a resumed run and any split of the slots over workers draw the same actions.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from manako.agent.advantages import gae, normalize
from manako.agent.errors import TrainingError
from manako.agent.group_advantages import group_advantages
from manako.policies import PolicyInputs, PolicyOutput, VLMPolicy

Forward = Callable[[PolicyInputs], PolicyOutput]
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
    episode_seeds: list[int]  # N

    def reset(self, seeds: Sequence[int] | None = None) -> Observations:
        """Starts an episode in every slot."""

    def reset_done(self, mask: np.ndarray, seeds: Sequence[int] | None = None) -> Observations:
        """Starts the next episode where `mask` (N,) is True."""

    def start_round(self, number: int) -> Observations:
        """Starts a new episode in every slot; `number` selects the episodes."""

    def expert_actions(self) -> np.ndarray:
        """What the env's scripted expert would do now, (N,)."""

    def step(self, actions: np.ndarray) -> Any:
        """One action (N,) in every slot: observations, rewards, terminated, truncated, success."""

    def state_dict(self) -> dict[str, Any]:
        """The state of every slot, as JSON: `first_slot`, and of N slots each `episodes`, `slots`, `replacements`."""

    def load_state_dict(self, state: Any) -> Observations | None:
        """Brings every slot back to where it was."""

    def close(self) -> None:
        """Ends it."""


class Demonstrator(Protocol):
    """Who chooses the actions in the policy's place: a scripted expert, recorded play, chance, a model far away.

    Known: `ScriptedDemonstrator`, `RecordedDemonstrator` and `RandomPlayer` in agent/trajectories.py. One of your own
    is any function or object that is called like this; here one that asks a service, frame by frame:

        class Remote:
            def __call__(self, env, observations):
                names = [
                    ask(image, instruction, env.action_names)  # (H, W, 3) uint8, text -> one of the names
                    for image, instruction in zip(observations.images, observations.instructions, strict=True)
                ]
                actions = torch.tensor([env.action_names.index(name) for name in names])
                return surely(actions, len(env.action_names))

        collector = RolloutCollector(env, policy, num_steps, seed, demonstrator=Remote(), record=True)
        to_dataset([collector.collect(0)], policy, env_id, "remote", {})

    Locally and with ray-env there is one, which is called for all slots before each of their steps, in order. With
    ray-replica every worker has its own copy (it must pickle) and may repeat a rollout: keep no state there.
    """

    def __call__(self, env: VectorEnv, observations: Observations) -> PolicyOutput:
        """What to do now.

        Args:
            env: N environments; ask them (`action_names`, `expert_actions()`, with the local backend also
                `episode_seeds` and `episode_lengths`, 0 at an episode's start), never step or reset them.
            observations: what they show, (N, H, W, 3) uint8 and N texts.

        Returns:
            Log-probabilities (N, A) float32, from which each slot's action is drawn with the run's random numbers (-inf
            rules an action out, see `surely`), and values (N,) float32, which the recorder keeps; 0 where there are
            none.

        Raises:
            TrainingError: it cannot go on; nothing is made up in its place.
        """


def surely(actions: torch.Tensor, num_actions: int) -> PolicyOutput:
    """These actions (N,) and no others: log-probabilities (N, A) of 0 and -inf, and values (N,) of 0."""
    return PolicyOutput(F.one_hot(actions, num_actions).float().log(), torch.zeros(len(actions)))


@dataclass(frozen=True)
class Episode:
    """A finished episode, and where in its rollout it ended."""

    episode_return: float
    length: int
    success: bool
    step: int = 0
    slot: int = 0  # counted over all workers


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
    bootstrap: PolicyInputs  # N observations after the rollout, then the last ones of F truncated episodes
    bootstrap_at: torch.Tensor  # (F, 2) int64, the (t, slot) of those F
    episodes: list[Episode]  # those that ended during the rollout, in the order of (t, slot)
    version: int  # of the weights that acted: how many updates they had seen
    seconds: float
    seeds: torch.Tensor  # (T, N) int64, of the episode that the step belongs to
    steps: torch.Tensor  # (T, N) int64, number of the step in its episode, from 0
    success: torch.Tensor  # (T, N) bool, the episode ended with this step, successfully
    instructions: list[str]  # T * N, as the env gave them
    images: np.ndarray | None = None  # (T * N, H, W, 3) uint8, the env's own frames, where they are recorded
    expert_actions: torch.Tensor | None = None  # (T, N) int64, what the env's expert would have done, likewise


class Rollouts(Protocol):
    """Where rollouts come from: this process or workers, with the same trajectories for the same seed and weights."""

    num_envs: int
    num_steps: int

    def collect(self, iteration: int) -> Rollout:
        """Plays the T steps of that iteration in every environment."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the last rollout for the log, beside those of every rollout."""

    def state_dict(self) -> dict[str, Any]:
        """Where the environments are, as JSON."""

    def load_state_dict(self, state: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Brings them back; `tensors` are those of `tensors()`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights that a resumed run needs beside the policy's."""

    def close(self) -> None:
        """Ends environments and workers."""


class Samples(NamedTuple):
    """A rollout's samples with their advantages, flat: what minibatches are drawn from."""

    inputs: PolicyInputs
    actions: torch.Tensor  # (T * N,)
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor  # normalised over the whole rollout
    returns: torch.Tensor
    reference: torch.Tensor | None  # (T * N, A)
    importance: torch.Tensor | None = None  # (T * N,) min(1, pi / pi_behaviour), where an older policy acted
    usable: torch.Tensor | None = None  # (T * N,) bool, False = nothing is learned from it; None is all True


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


def by_slots(inputs: PolicyInputs, slots: torch.Tensor, batch: int, largest: int, forward: Forward) -> PolicyOutput:
    """One forward for samples of the same `batch` slots, `largest` samples at most.

    What a forward computes can differ in its last bit with the other samples of its batch. So the samples of a batch
    depend on their slots alone, and a split of the slots over workers into whole batches changes nothing.

    Args:
        inputs: (B, ...) samples.
        slots: (B,) the slot of each.
        batch: slots of one batch.
        largest: samples of one forward.
        forward: the policy, or a reference.
    """
    order = torch.argsort(slots // batch, stable=True)  # (B,)
    _, sizes = torch.unique_consecutive((slots // batch)[order], return_counts=True)
    parts = []
    for group in order.split(sizes.tolist()):
        for rows in group.split(largest):
            part = inputs.select(rows)
            parts.append(forward(part._replace(input_ids=part.input_ids[:, : int(part.lengths.max())])))
    joined = PolicyOutput(*(torch.cat(field) for field in zip(*parts, strict=True)))
    back = torch.argsort(order)
    return PolicyOutput(joined.logprobs[back], joined.values[back])


def merge(fragments: Sequence[Rollout], pad_id: int) -> Rollout:
    """Rollouts of the same T steps in neighbouring slots, as one.

    Args:
        fragments: in the order of their slots.
        pad_id: the token that fills shorter prompts.
    """
    if len(fragments) == 1:
        return fragments[0]
    sizes = [fragment.actions.shape[1] for fragment in fragments]
    steps, total = len(fragments[0].actions), sum(sizes)
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    # row of sample (t, slot) among the fragments' flat samples laid one after another
    rows = torch.cat(
        [
            torch.arange(steps)[:, None] * size + torch.arange(size) + steps * first
            for first, size in zip(firsts, sizes, strict=True)
        ],
        dim=1,
    ).flatten()  # (T * N,)
    final_at = torch.cat(
        [fragment.bootstrap_at + torch.tensor([0, first]) for fragment, first in zip(fragments, firsts, strict=True)]
    )  # (F, 2)
    in_order = torch.argsort(final_at[:, 0] * total + final_at[:, 1])
    now = [fragment.bootstrap.select(torch.arange(size)) for fragment, size in zip(fragments, sizes, strict=True)]
    finals = [
        fragment.bootstrap.select(torch.arange(size, len(fragment.bootstrap.lengths)))
        for fragment, size in zip(fragments, sizes, strict=True)
    ]
    bootstrap = stack_inputs([*now, *finals], pad_id)
    columns = ["actions", "logprobs", "values", "next_values", "rewards", "terminated", "truncated"]
    columns += ["seeds", "steps", "success"]
    texts = [text for fragment in fragments for text in fragment.instructions]
    images = [fragment.images for fragment in fragments if fragment.images is not None]
    advice = [fragment.expert_actions for fragment in fragments if fragment.expert_actions is not None]
    references = [fragment.reference for fragment in fragments if fragment.reference is not None]
    return Rollout(
        **{name: torch.cat([getattr(fragment, name) for fragment in fragments], dim=1) for name in columns},
        inputs=stack_inputs([fragment.inputs for fragment in fragments], pad_id).select(rows),
        reference=torch.cat(references)[rows] if references else None,
        bootstrap=bootstrap.select(torch.cat([torch.arange(total), total + in_order])),
        bootstrap_at=final_at[in_order],
        episodes=sorted((e for f in fragments for e in f.episodes), key=lambda e: (e.step, e.slot)),
        version=fragments[0].version,
        seconds=max(fragment.seconds for fragment in fragments),
        instructions=[texts[row] for row in rows.tolist()],
        images=np.concatenate(images)[rows.numpy()] if images else None,
        expert_actions=torch.cat(advice, dim=1) if advice else None,
    )


class RolloutCollector:
    """Plays the environments with the policy, in this process.

    Args:
        env: N environments that have not been started, or were brought back by `load_state_dict`.
        policy: the policy.
        num_steps: T.
        seed: the run's seed.
        reference: a frozen policy to stay close to; the policy itself stands for itself with its LoRA off.
        max_batch: samples of one forward outside the env loop.
        batch_size: slots of one forward while acting, a divisor of N; all N by default. With the same one, any split
            of the slots over workers gives the same numbers, bit for bit.
        rounds: every rollout starts new episodes in all slots, so that a group's slots play the same ones.
        demonstrator: chooses the actions in the policy's place.
        record: keep the env's own frames.
        ask_expert: keep what the env's expert would do.

    Raises:
        TrainingError: `batch_size` does not divide N.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: VLMPolicy,
        num_steps: int,
        seed: int,
        reference: VLMPolicy | None = None,
        max_batch: int = 256,
        batch_size: int | None = None,
        rounds: bool = False,
        demonstrator: Demonstrator | None = None,
        record: bool = False,
        ask_expert: bool = False,
    ) -> None:
        self.rounds, self.demonstrator, self.record = rounds, demonstrator, record
        self.ask_expert = ask_expert
        self.env, self.policy, self.num_steps, self.seed = env, policy, num_steps, seed
        self.reference, self.max_batch = reference, max_batch
        self.num_envs = env.num_envs
        self.batch_size = batch_size or env.num_envs
        if env.num_envs % self.batch_size:
            raise TrainingError(
                f"batch_size is {batch_size} for {env.num_envs} environments: expected a number that divides them."
            )
        self._observations: Observations | None = None
        self._slots = torch.arange(env.num_envs)

    def collect(self, iteration: int) -> Rollout:
        """Plays T steps in every environment.

        Args:
            iteration: number of the rollout; it selects the random numbers.

        Raises:
            TrainingError: the policy's probabilities are not finite.
        """
        start = time.perf_counter()
        env, policy = self.env, self.policy
        if self.rounds:
            self._observations = env.start_round(iteration)
        elif self._observations is None:
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
        seeds, numbers, success, shown, advice = [], [], [], [], []
        final_inputs: list[PolicyInputs] = []  # last frames of truncated episodes
        final_at: list[tuple[int, int]] = []
        with policy.frozen_weights():
            for t in range(self.num_steps):
                inputs = policy.prepare(self._observations.images, self._observations.instructions)
                if self.demonstrator is None:
                    output = self._forward(inputs, self._slots, policy)
                else:
                    output = self.demonstrator(env, self._observations)
                logprobs = output.logprobs  # (N, A)
                if not torch.isfinite(logprobs).all() and self.demonstrator is None:
                    raise TrainingError(
                        f"The policy's probabilities are not finite in iteration {iteration}, step {t}: expected "
                        "numbers; start again from the last checkpoint with a smaller learning_rate."
                    )
                actions = choose(logprobs, uniforms[t])  # (N,)
                shown.append(self._observations)
                if self.ask_expert:
                    advice.append(torch.from_numpy(env.expert_actions()))
                steps.append((inputs, actions, logprobs.gather(1, actions[:, None])[:, 0], output.values))
                result = env.step(actions.numpy())
                seeds.append(torch.tensor(list(env.episode_seeds)))
                numbers.append(torch.from_numpy(np.asarray(env.episode_lengths, dtype=np.int64)) - 1)
                success.append(torch.from_numpy(np.asarray(result.success)))
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
                                step=t,
                                slot=env.first_slot + int(slot),
                            )
                        )
                    self._observations = env.reset_done(ended)
            last = policy.prepare(self._observations.images, self._observations.instructions)
            values = torch.stack([step[3] for step in steps])  # (T, N)
            # V of the observation that each step returned: the next row's, the last frame's where an episode was cut
            bootstrap = stack_inputs([last, *final_inputs], policy.pad_id)
            places = torch.tensor(final_at, dtype=torch.long).reshape(-1, 2)  # (F, 2)
            if self.demonstrator is None:
                beyond = self._forward(bootstrap, torch.cat([self._slots, places[:, 1]]), policy).values  # (N + F,)
            else:
                beyond = torch.zeros(len(bootstrap.lengths))
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
            bootstrap=bootstrap,
            bootstrap_at=places,
            episodes=episodes,
            version=iteration,
            seconds=time.perf_counter() - start,
            seeds=torch.stack(seeds),
            steps=torch.stack(numbers),
            success=torch.stack(success),
            instructions=[text for seen in shown for text in seen.instructions],
            images=np.concatenate([seen.images for seen in shown]) if self.record else None,
            expert_actions=torch.stack(advice) if advice else None,
        )

    def metrics(self) -> dict[str, float]:
        """Nothing beyond what every rollout has."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the environments are."""
        return self.env.state_dict()

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Brings the environments back to where they were."""
        self._observations = self.env.load_state_dict(state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """None: the policy itself acts."""
        return {}

    def close(self) -> None:
        """Closes the environments."""
        self.env.close()

    def _forward(self, inputs: PolicyInputs, slots: torch.Tensor, forward: Forward) -> PolicyOutput:
        device = self.policy.device

        def on_device(part: PolicyInputs) -> PolicyOutput:
            output = forward(part.to(device))
            return PolicyOutput(output.logprobs.cpu(), output.values.cpu())

        if self.batch_size == self.num_envs == len(slots):
            return on_device(inputs)
        return by_slots(inputs, slots, self.batch_size, max(self.max_batch, self.batch_size), on_device)

    def _reference_logprobs(self, inputs: PolicyInputs) -> torch.Tensor | None:
        if self.reference is None:
            return None
        slots = self._slots.repeat(self.num_steps)  # (T * N,)
        with self.policy.as_reference() if self.reference is self.policy else self.reference.frozen_weights():
            return self._forward(inputs, slots, self.reference).logprobs


def refreshed(rollout: Rollout, policy: VLMPolicy, max_batch: int = 256) -> tuple[Rollout, torch.Tensor]:
    """What the present policy says of a rollout that older weights played.

    Its log-probabilities are those that the update starts from (the proximal policy of Hilton et al. 2021,
    https://arxiv.org/abs/2110.00641), its values those of the present value head.

    Returns:
        The rollout with these, and (T, N) min(1, pi / pi_behaviour), the truncated importance weights of V-trace
        (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561) with both limits at 1.
    """
    shape = rollout.actions.shape
    total = rollout.actions.numel()
    joined = stack_inputs([rollout.inputs, rollout.bootstrap], policy.pad_id)
    with policy.frozen_weights():
        parts = []
        for rows in torch.arange(len(joined.lengths)).split(max_batch):
            output = policy(joined.select(rows).to(policy.device))
            parts.append(PolicyOutput(output.logprobs.cpu(), output.values.cpu()))
    logprobs, values = (torch.cat(field) for field in zip(*parts, strict=True))
    actions = rollout.actions.flatten()[:, None]
    proximal = logprobs[:total].gather(1, actions)[:, 0].view(shape)  # (T, N)
    now = values[:total].view(shape)
    beyond = values[total:]
    next_values = torch.cat([now[1:], beyond[None, : shape[1]]])
    steps, slots = rollout.bootstrap_at.unbind(1)
    next_values[steps, slots] = beyond[shape[1] :]
    importance = (proximal - rollout.logprobs).exp().clamp_max(1.0)  # (T, N)
    return rollout._replace(logprobs=proximal, values=now, next_values=next_values), importance


def with_advantages(
    rollout: Rollout, gamma: float, gae_lambda: float, importance: torch.Tensor | None = None
) -> Samples:
    """Advantages by GAE, normalised over the whole rollout, and everything flat.

    Args:
        rollout: as the policy that is updated sees it.
        gamma: discount per step.
        gae_lambda: lambda of GAE.
        importance: (T, N) weights of `refreshed`, where an older policy acted.
    """
    advantages, returns = gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=gamma,
        gae_lambda=gae_lambda,
        importance=importance,
    )
    return _flat(rollout, normalize(advantages), returns, importance)


def state_digests(inputs: PolicyInputs) -> torch.Tensor:
    """(B,) int64, equal where the policy saw the same frame and prompt."""
    digests = [
        hashlib.blake2b(frame.tobytes() + ids[:length].tobytes(), digest_size=8).digest()
        for frame, ids, length in zip(
            inputs.frames.numpy(), inputs.input_ids.numpy(), inputs.lengths.tolist(), strict=True
        )
    ]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def with_group_advantages(
    rollout: Rollout,
    method: str,
    group_size: int,
    gamma: float,
    step_weight: float,
    importance: torch.Tensor | None = None,
) -> Samples:
    """Advantages by comparison with the other slots of a group, and everything flat; see `group_advantages`."""
    shape = rollout.rewards.shape
    advantages, usable = group_advantages(
        method,
        rollout.rewards,
        rollout.terminated | rollout.truncated,
        torch.arange(shape[1]) // group_size,
        state_digests(rollout.inputs).view(shape) if method == "gigpo" else None,
        gamma,
        step_weight,
    )
    return _flat(rollout, advantages, torch.zeros(shape), importance, usable)


def _flat(
    rollout: Rollout,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    importance: torch.Tensor | None,
    usable: torch.Tensor | None = None,
) -> Samples:
    """The rollout's samples with these (T, N) numbers."""
    return Samples(
        inputs=rollout.inputs,
        actions=rollout.actions.flatten(),
        logprobs=rollout.logprobs.flatten(),
        values=rollout.values.flatten(),
        advantages=advantages.flatten(),
        returns=returns.flatten(),
        reference=rollout.reference,
        importance=None if importance is None else importance.flatten(),
        usable=None if usable is None else usable.flatten(),
    )
