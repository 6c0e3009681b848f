"""The ways of one update step, and what the trainer costs beside a bare loop.

ours, whole prompts, batch 1    shared prefix; whole prompts; whole prompts one sample at a time, gradients added up
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

from manako.agent.losses import entropy, policy_loss, value_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.rollout import SHUFFLES, Rollout, RolloutCollector, Samples, stream, with_advantages
from manako.envs import EpisodeVectorEnv
from manako.experiments.benchmarks.acting import Bench
from manako.experiments.benchmarks.timing import Clocks, Spread, Work, clocks, since, spread
from manako.experiments.benchmarks.workload import Workload
from manako.policies import PolicyInputs, PolicyOutput, VLMPolicy


def ppo_loss(policy_output: PolicyOutput, samples: Samples, args: PPOConfig) -> torch.Tensor:
    """The loss of `PPOTrainer.compute_loss` without its metrics."""
    logprobs = policy_output.logprobs.gather(1, samples.actions[:, None])[:, 0]  # (B,)
    actor, _ = policy_loss(logprobs, samples.logprobs, samples.advantages, args.clip_range)
    critic = value_loss(policy_output.values, samples.values, samples.returns, args.clip_range_vf)
    return actor + args.vf_coef * critic - args.ent_coef * entropy(policy_output.logprobs).mean()


def select(samples: Samples, rows: torch.Tensor) -> Samples:
    """The samples at these rows; no reference."""
    return Samples(
        inputs=samples.inputs.select(rows),
        actions=samples.actions[rows],
        logprobs=samples.logprobs[rows],
        values=samples.values[rows],
        advantages=samples.advantages[rows],
        returns=samples.returns[rows],
        reference=None,
    )


class Learner:
    """Optimizer steps on one minibatch, at learning rate 0: the same arithmetic, and all ways see the same weights."""

    def __init__(self, bench: Bench, args: PPOConfig) -> None:
        self.policy, self.args, self.samples = bench.policy, args, bench.samples()
        self.parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, eps=args.adam_epsilon, weight_decay=0.0, fused=True)
        self.gradient_norm = 0.0

    def step(self, forward: Callable[[PolicyInputs], PolicyOutput], part: int) -> float:
        """Forward, backward and AdamW over the minibatch in parts of `part` samples; returns B."""
        batch = len(self.samples.actions)
        for rows in torch.arange(batch).split(part):
            samples = select(self.samples, rows)
            (ppo_loss(forward(samples.inputs), samples, self.args) * (len(rows) / batch)).backward()
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return batch


UPDATES = ("ours", "whole prompts", "batch 1")


def update_work(learner: Learner, name: str, norms: dict[str, float]) -> Work:
    """One of the three ways of an update; notes the gradient's norm."""
    batch = len(learner.samples.actions)
    forward = learner.policy if name == "ours" else learner.policy.whole_forward
    part = 1 if name == "batch 1" else batch

    def work() -> float:
        samples = learner.step(forward, part)
        norms[name] = learner.gradient_norm
        return samples

    return work


class BareLoop:
    """PPO's update as a plain PyTorch loop on its own copy of the policy: the measure of the trainer's overhead."""

    def __init__(self, policy: VLMPolicy, args: PPOConfig, num_samples: int) -> None:
        self.policy, self.args, self.num_samples = copy.deepcopy(policy), args, num_samples
        self.parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0, fused=True
        )
        steps = args.num_iterations * args.num_ppo_epochs * num_samples // args.minibatch_size
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / steps))

    def update(self, rollout: Rollout, iteration: int) -> None:
        """The minibatches that the trainer draws from this rollout, in its order."""
        samples = with_advantages(rollout, self.args.gamma, self.args.gae_lambda)
        for epoch in range(self.args.num_ppo_epochs):
            order = stream(self.args.seed, SHUFFLES, iteration, epoch).permutation(self.num_samples)
            for rows in torch.from_numpy(order).split(self.args.minibatch_size):
                minibatch = select(samples, rows)
                ppo_loss(self.policy(minibatch.inputs), minibatch, self.args).backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


class _InTurns(RolloutCollector):
    """A collector that clocks what the trainer does between two rollouts, and has the bare loop do the same next."""

    def __init__(self, env: EpisodeVectorEnv, policy: VLMPolicy, args: PPOConfig, bare: BareLoop) -> None:
        super().__init__(env, policy, args.num_steps, args.seed)
        self.bare = bare
        self.trainer_clocks: list[Clocks] = []
        self.bare_clocks: list[Clocks] = []
        self.weight_difference = 0.0
        self._last: Rollout | None = None
        self._left = clocks()

    def collect(self, iteration: int) -> Rollout:
        if self._last is not None:
            self.trainer_clocks.append(since(self._left))
            start = clocks()
            self.bare.update(self._last, iteration - 1)
            self.bare_clocks.append(since(start))
            self.weight_difference = max(
                float((mine - theirs).detach().abs().max())
                for mine, theirs in zip(self.policy.parameters(), self.bare.policy.parameters(), strict=True)
            )
        self._last = super().collect(iteration)
        self._left = clocks()
        return self._last


class Overhead(NamedTuple):
    """The trainer's update beside the bare loop's on the same minibatches."""

    percent: Spread
    cpu_percent: Spread  # the same in CPU time
    trainer_seconds: Spread
    bare_seconds: Spread
    weight_difference: float  # largest difference of a weight after the same updates: 0 says that both did the same


def trainer_overhead(bench: Bench, args: PPOConfig) -> Overhead:
    """Trains for `repeats` + 2 iterations; the first is a warm-up, and the last one's end is not seen.

    Args:
        bench: the policy, which learns.
        args: made by `trainer_args`.
    """
    policy = copy.deepcopy(bench.policy)
    env = EpisodeVectorEnv(bench.workload.env, bench.workload.num_envs, seed=args.seed)
    collector = _InTurns(env, policy, args, BareLoop(policy, args, env.num_envs * args.num_steps))
    PPOTrainer(policy, args, rollouts=collector).train()
    env.close()
    mine, bare = collector.trainer_clocks[1:], collector.bare_clocks[1:]
    return Overhead(
        percent=spread([100 * (a.wall / b.wall - 1) for a, b in zip(mine, bare, strict=True)]),
        cpu_percent=spread([100 * (a.cpu / b.cpu - 1) for a, b in zip(mine, bare, strict=True)]),
        trainer_seconds=spread([a.wall for a in mine]),
        bare_seconds=spread([b.wall for b in bare]),
        weight_difference=collector.weight_difference,
    )


def trainer_args(workload: Workload, folder: str) -> PPOConfig:
    """Settings of the trainer for the overhead's measurement."""
    return PPOConfig(
        output_dir=folder,
        num_iterations=workload.repeats + 2,
        num_steps=workload.overhead_steps,
        num_ppo_epochs=workload.overhead_epochs,
        minibatch_size=workload.minibatch_size,
        learning_rate=1e-4,
        seed=workload.seed,
        report_to="none",
        use_cpu=True,
    )
