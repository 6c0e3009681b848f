"""Collects rollouts in this process: the current policy plays T steps of N environments.

The order of the file is the order of events: a step is recorded, the steps are transposed once. Every random number is
a function of (seed, slot, iteration), so a resumed run and any split of the slots over workers sample the same actions.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from manako.agent.backends import RolloutPlan
from manako.agent.errors import NotFiniteError, TrainingError
from manako.agent.interfaces import GIVEN_UP, Fault, Shown, Stepped, VectorEnv, ask, remember_for
from manako.agent.rng import action_draws
from manako.agent.rollout import Episode, Record, Rollout, pad_answers, verdict
from manako.policies.interface import LEGAL, Acted, Draws, Policy, Rows

log = logging.getLogger("manako.rollouts")


class _Step(NamedTuple):
    """One step of N environments."""

    shown: Shown  # what was acted on
    inputs: Rows  # what the policy saw of it
    acted: Acted
    masks: np.ndarray | None  # (N, A) bool, what was allowed, for a record
    advice: np.ndarray | None  # (N,) what the expert would have done
    reasons: tuple[str, ...] | None  # N, what the expert thinks
    result: Stepped
    seeds: np.ndarray  # (N,) of the episodes that the step belongs to
    numbers: np.ndarray  # (N,) of the step in its episode, from 0


class RolloutCollector:
    """Plays the environments with the policy, in this process.

    Args:
        env: N environments that have not been started, or were brought back by `load_state_dict`.
        policy: the policy, or a player that cannot learn.
        num_steps: T.
        seed: the run's seed.
        reference: a frozen policy to stay close to; the policy itself stands for itself with its LoRA off.
        max_batch: samples of one forward outside the env loop.
        batch_size: slots of one forward while acting, a divisor of N; all N by default. With the same one, any split
            of the slots over workers gives the same numbers, bit for bit.
        rounds: every rollout starts new episodes in all slots, so that a group's slots play the same ones.
        record: keep what a data set needs, the env's own frames among it.
        ask_expert: keep what the env's expert would do as well.

    Raises:
        TrainingError: `batch_size` does not divide N.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        num_steps: int,
        seed: int,
        reference: Policy | None = None,
        max_batch: int = 256,
        batch_size: int | None = None,
        rounds: bool = False,
        record: bool = False,
        ask_expert: bool = False,
    ) -> None:
        self.env, self.policy, self.num_steps, self.seed = env, policy, num_steps, seed
        self.reference, self.max_batch = reference, max_batch
        self.rounds, self.record, self.ask_expert = rounds, record, ask_expert
        self.num_envs = env.num_envs
        self.batch_size = batch_size or env.num_envs
        if env.num_envs % self.batch_size:
            raise TrainingError(
                f"batch_size is {batch_size} for {env.num_envs} environments: expected a number that divides them."
            )
        remember_for(env, policy)
        self._shown: Shown | None = None
        self._slots = torch.arange(env.num_envs)

    @classmethod
    def from_plan(cls, plan: RolloutPlan, env: VectorEnv) -> Self:
        """Returns the collector that plays a plan in these environments, with the plan's policy."""
        return cls(
            env,
            plan.policy,
            plan.num_steps,
            plan.seed,
            reference=plan.policy if plan.reference else None,
            batch_size=plan.batch_size,
            rounds=plan.rounds,
            record=plan.record,
            ask_expert=plan.ask_expert,
        )

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
            self._shown = env.start_round(iteration)
        elif self._shown is None:
            self._shown = env.reset()
        draws = action_draws(self.seed, range(env.first_slot, env.first_slot + env.num_envs), iteration)
        steps: list[_Step] = []
        episodes: list[Episode] = []
        finals: list[Rows] = []  # last frames of truncated episodes
        final_at: list[tuple[int, int]] = []  # their (t, slot)
        with policy.frozen_weights():
            for t in range(self.num_steps):
                told = ask(env, policy.needs)
                inputs = policy.prepare(self._shown.images, self._shown.instructions, told)
                acted = self._act(inputs, draws)
                if not torch.isfinite(acted.logprobs[acted.mask]).all():
                    raise NotFiniteError(
                        f"The policy's probabilities are not finite in iteration {iteration}, step {t}: expected "
                        "numbers, which a smaller learning_rate keeps."
                    )
                advice = told.get("expert_actions") if self.ask_expert else None
                if self.ask_expert and advice is None:
                    advice = np.asarray(env.expert_actions())
                reasons = env.expert_thoughts() if self.record and advice is not None else None
                masks = env.action_masks if self.record else None
                result = env.step(acted.to_env)
                inputs = policy.see_next(inputs, result.observations.images)
                seeds, numbers = np.array(env.episode_seeds), np.array(env.episode_lengths, dtype=np.int64) - 1
                steps.append(_Step(self._shown, inputs, acted, masks, advice, reasons, result, seeds, numbers))
                self._shown = result.observations
                ended = result.terminated | result.truncated  # (N,)
                anew = ended | result.failed
                if anew.any():
                    episodes += self._ended(result, ended, t)
                    cut = np.flatnonzero(result.truncated & ~result.terminated)
                    if len(cut) and policy.can_learn:
                        texts = [result.observations.instructions[slot] for slot in cut]
                        told = {name: values[cut] for name, values in ask(env, policy.needs).items()}
                        finals.append(policy.prepare(result.observations.images[cut], texts, told))
                        final_at.extend((t, slot) for slot in cut.tolist())
                    self._shown = env.reset_done(anew)
            rollout = self._transpose(steps, finals, final_at)
        seconds, faults = time.perf_counter() - start, env.take_faults()
        return rollout._replace(episodes=episodes, version=iteration, seconds=seconds, faults=faults)

    def metrics(self) -> dict[str, float]:
        """Returns the number of episodes given up so far, since they did not replay."""
        return {GIVEN_UP: self.env.given_up}

    def state_dict(self) -> dict[str, Any]:
        """Returns where the environments are."""
        return self.env.state_dict()

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Brings the environments back to where they were; what does not replay is started anew, with a warning."""
        before = self.env.given_up
        self._shown = self.env.load_state_dict(state)
        warn_given_up(self.env.given_up - before, self.env.num_envs)

    def take_faults(self) -> Sequence[Fault]:
        """Returns what broke in a rollout that broke off, and is in none."""
        return self.env.take_faults()

    def tensors(self) -> dict[str, Tensor]:
        """Returns no weights: the policy itself acts."""
        return {}

    def close(self) -> None:
        """Closes the environments."""
        self.env.close()

    # ---- one step ------------------------------------------------------------------------------------------------

    def _act(self, inputs: Rows, draws: Draws) -> Acted:
        """The actions of all slots, `batch_size` slots in one forward."""
        batches = self._slots.split(self.batch_size)
        if len(batches) == 1:
            return self.policy.act(inputs, draws)
        parts = [self.policy.act(inputs.select(rows), draws.select(rows.tolist())) for rows in batches]
        outcomes = [outcome for part in parts for outcome in part.outcomes or ()]
        return Acted(
            actions=Rows.join([part.actions for part in parts]),
            to_env=np.concatenate([part.to_env for part in parts]),
            logprobs=torch.cat(pad_answers([part.logprobs for part in parts])),
            mask=torch.cat(pad_answers([part.mask for part in parts])),
            values=torch.cat([part.values for part in parts]),
            outcomes=outcomes or None,
            token_values=_joined([part.token_values for part in parts]),
        )

    def _ended(self, result: Stepped, ended: np.ndarray, t: int) -> list[Episode]:
        env = self.env
        return [
            Episode(
                float(env.episode_returns[slot]),
                int(env.episode_lengths[slot]),
                verdict(result.success[slot]),
                step=t,
                slot=env.first_slot + int(slot),
            )
            for slot in np.flatnonzero(ended)
        ]

    # ---- all steps -----------------------------------------------------------------------------------------------

    def _transpose(self, steps: list[_Step], finals: list[Rows], final_at: list[tuple[int, int]]) -> Rollout:
        """T records of N environments as one rollout, with the values of what followed."""
        inputs = Rows.join([step.inputs for step in steps])
        actions = Rows.join([step.acted.actions for step in steps])
        values = torch.stack([step.acted.values for step in steps])  # (T, N)
        bootstrap, next_values = self._bootstrap(values, inputs, finals, final_at)
        truncated = [step.result.truncated & ~step.result.terminated for step in steps]
        failed = torch.from_numpy(np.stack([step.result.failed for step in steps]))  # (T, N)
        outcomes = [outcome for step in steps for outcome in step.acted.outcomes or ()]
        return Rollout(
            inputs=inputs,
            actions=actions,
            logprobs=torch.stack(pad_answers([step.acted.logprobs for step in steps])),
            mask=torch.stack(pad_answers([step.acted.mask for step in steps])),
            values=values,
            next_values=next_values,
            rewards=torch.from_numpy(np.stack([self._paid(step) for step in steps])),
            terminated=torch.from_numpy(np.stack([step.result.terminated for step in steps])),
            truncated=torch.from_numpy(np.stack(truncated)),
            reference=self._reference(inputs, actions),
            bootstrap=bootstrap,
            bootstrap_at=torch.tensor(final_at, dtype=torch.long).reshape(-1, 2),
            episodes=[],
            version=0,
            seconds=0.0,
            outcomes=outcomes or None,
            token_values=_stacked([step.acted.token_values for step in steps]),
            record=self._record(steps) if self.record else None,
            failed=failed if failed.any() else None,
        )

    def _paid(self, step: _Step) -> np.ndarray:
        """Rewards (N,) float32 that are learned from: less what answers without an action cost."""
        rewards = np.asarray(step.result.rewards, dtype=np.float32)
        if step.acted.outcomes is None or not self.policy.illegal_penalty:
            return rewards
        illegal = np.array([outcome != LEGAL for outcome in step.acted.outcomes], dtype=np.float32)
        return rewards - np.float32(self.policy.illegal_penalty) * illegal

    def _bootstrap(
        self, values: Tensor, inputs: Rows, finals: list[Rows], final_at: list[tuple[int, int]]
    ) -> tuple[Rows, Tensor]:
        """V of the observation that each step returned, (T, N): the next row's, the last frame's where it was cut."""
        if not self.policy.can_learn:
            return inputs.select(torch.zeros(0, dtype=torch.long)), torch.zeros_like(values)
        assert self._shown is not None
        told = ask(self.env, self.policy.needs)
        last = self.policy.prepare(self._shown.images, self._shown.instructions, told)
        bootstrap = Rows.join([last, *finals])
        slots = torch.cat([self._slots, torch.tensor([slot for _, slot in final_at], dtype=torch.long)])
        beyond = torch.zeros(len(bootstrap))  # (N + F,)
        for rows in self._batches(slots):
            beyond[rows] = self.policy.predict_values(bootstrap.select(rows))
        next_values = torch.cat([values[1:], beyond[None, : self.num_envs]])  # (T, N)
        for (t, slot), value in zip(final_at, beyond[self.num_envs :], strict=True):
            next_values[t, slot] = value
        return bootstrap, next_values

    def _reference(self, inputs: Rows, actions: Rows) -> Tensor | None:
        """What the reference says of the samples: (T * N, A), or (T * N, S) where there is no closed set."""
        reference = self.reference
        if reference is None:
            return None
        parts: list[tuple[Tensor, Tensor]] = []
        with self.policy.as_reference() if reference is self.policy else reference.frozen_weights():
            for rows in self._batches(self._slots.repeat(self.num_steps)):
                device = reference.device
                said = reference.evaluate_actions(inputs.select(rows).to(device), actions.select(rows).to(device))
                parts.append((rows, (said.logprobs if said.distribution is None else said.distribution).cpu()))
        back = torch.argsort(torch.cat([rows for rows, _ in parts]))
        return torch.cat(pad_answers([logprobs for _, logprobs in parts]))[back]

    def _batches(self, slots: Tensor) -> list[Tensor]:
        """Rows of samples of these slots, in batches that depend on the slots alone.

        What a forward computes can differ in its last bit with the other samples of its batch. So a batch holds samples
        of the same `batch_size` slots, and a split of the slots over workers into whole batches changes nothing.
        """
        order = torch.argsort(slots // self.batch_size, stable=True)  # (B,)
        _, sizes = torch.unique_consecutive((slots // self.batch_size)[order], return_counts=True)
        groups = order.split(sizes.tolist())
        return [rows for group in groups for rows in group.split(max(self.max_batch, self.batch_size))]

    def _thoughts(self, step: _Step) -> Sequence[str] | None:
        """What was thought before each of N actions: by the policy, or by the expert whose action was taken."""
        if not self.policy.plays_expert or step.reasons is None or step.advice is None:
            return self.policy.thoughts(step.acted.actions)
        taken = (step.acted.to_env == step.advice).reshape(self.num_envs, -1).all(1)
        return [reason if same else "" for reason, same in zip(step.reasons, taken, strict=True)]

    def _record(self, steps: list[_Step]) -> Record:
        advice = [step.advice for step in steps if step.advice is not None]
        masks = [step.masks for step in steps if step.masks is not None]
        return Record(
            to_env=np.stack([step.acted.to_env for step in steps]),
            seeds=torch.from_numpy(np.stack([step.seeds for step in steps])),
            steps=torch.from_numpy(np.stack([step.numbers for step in steps])),
            success=torch.from_numpy(np.stack([np.asarray(step.result.success) for step in steps])),
            rewards=torch.from_numpy(np.stack([np.asarray(step.result.rewards, np.float32) for step in steps])),
            instructions=[text for step in steps for text in step.shown.instructions],
            images=np.concatenate([step.shown.images for step in steps]),
            expert_actions=torch.from_numpy(np.stack(advice)) if advice else None,
            last_images={
                (t, slot): step.result.observations.images[slot].copy()
                for t, step in enumerate(steps)
                for slot in np.flatnonzero(step.result.terminated | step.result.truncated).tolist()
            },
            action_masks=torch.from_numpy(np.stack(masks)) if masks else None,
            thoughts=_flat([self._thoughts(step) for step in steps]),
            expert_thoughts=_flat([step.reasons for step in steps]),
        )


def _flat(parts: Sequence[Sequence[str] | None]) -> list[str] | None:
    return None if None in parts else [text for part in parts for text in part or ()]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(pad_answers(given)) if given else None


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(pad_answers(given)) if given else None


def warn_given_up(count: int, slots: int) -> None:
    """Warns of episodes that did not replay, if there are any.

    Args:
        count: of these episodes.
        slots: that were brought back.
    """
    if count:
        log.warning(
            "warning: %d of %d running episodes did not play again as they had, so their slots start new ones: draw "
            "all that is random from self.np_random, and keep versions and env_kwargs, if they are to go on",
            count,
            slots,
        )


def make_rollouts(plan: RolloutPlan) -> RolloutCollector:
    """Returns the backend `local`: all environments in this process."""
    return RolloutCollector.from_plan(plan, plan.make_segment(0, plan.num_envs))
