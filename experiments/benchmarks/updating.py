"""The variants of one update step, and what the trainer costs beside the plain loop.

ours             shared prefix
whole prompts    every prompt by the model's own forward
batch 1          the same, one sample at a time, gradients added up
"""

import copy
from typing import NamedTuple

import torch

from manako.agent.collector import RolloutCollector
from manako.agent.losses import ppo_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_loop import train_ppo
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.rollout import Rollout
from manako.envs import EpisodeVectorEnv
from manako.experiments.benchmarks.acting import Bench
from manako.experiments.benchmarks.timing import Clocks, Spread, Work, clocks, since, spread
from manako.experiments.benchmarks.workload import Workload
from manako.policies import VLMPolicy
from manako.policies.interface import Evaluated, entropy
from manako.policies.reading import Reading


class Learner:
    """Optimizer steps on one minibatch at learning rate 0: the same arithmetic, the same weights for all variants."""

    def __init__(self, bench: Bench, args: PPOConfig) -> None:
        self.policy, self.args, self.samples = bench.policy, args, bench.samples()
        self.parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, eps=args.adam_epsilon, weight_decay=0.0, fused=True)
        self.gradient_norm = 0.0

    def step(self, reading: Reading, part: int) -> float:
        """Runs forward, backward and AdamW over the minibatch in parts of `part` samples; returns B."""
        batch = len(self.samples.values)
        for rows in torch.arange(batch).split(part):
            samples = self.samples.select(rows)
            logprobs, values = self.policy.distribution(samples.inputs, reading)  # (B, A), (B,)
            taken = logprobs.gather(1, samples.actions["index"][:, None])  # (B, 1)
            evaluated = Evaluated(taken, entropy(logprobs)[:, None], values, logprobs)
            loss, _, _ = ppo_loss(evaluated, samples, self.args)
            (loss * (len(rows) / batch)).backward()
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return batch


UPDATES = ("ours", "whole prompts", "batch 1")


def update_work(learner: Learner, name: str, norms: dict[str, float]) -> Work:
    """Returns work: one of the three variants of an update, which notes the gradient's norm."""
    batch, policy = len(learner.samples.values), learner.policy
    whole = policy.whole_prompt
    reading = policy.reading if name == "ours" else whole
    part = 1 if name == "batch 1" else batch

    def work() -> float:
        samples = learner.step(reading, part)
        norms[name] = learner.gradient_norm
        return samples

    return work


class LoopUpdates:
    """The updates of `manako.agent.ppo_loop` on its own copy of the policy, one for each rollout that it is handed.

    Args:
        policy: copied.
        args: of PPO.
        num_envs: N of the rollouts.
    """

    def __init__(self, policy: VLMPolicy, args: PPOConfig, num_envs: int) -> None:
        self.policy, self.num_envs, self.num_steps = copy.deepcopy(policy), num_envs, args.num_steps
        self._rollout: Rollout | None = None
        self._loop = train_ppo(self.policy, self, args)

    def collect(self, iteration: int) -> Rollout:
        """Returns the rollout at hand; the loop asks for it."""
        assert self._rollout is not None
        return self._rollout

    def update(self, rollout: Rollout) -> dict[str, float | None]:
        """Learns from the rollout of the next iteration and returns its metrics."""
        self._rollout = rollout
        return next(self._loop)


class _InTurns(RolloutCollector):
    """A collector that clocks what the trainer does between two rollouts, and has the plain loop do the same next."""

    def __init__(self, env: EpisodeVectorEnv, policy: VLMPolicy, args: PPOConfig, loop: LoopUpdates) -> None:
        super().__init__(env, policy, args.num_steps, args.seed)
        self.loop = loop
        self.trainer_clocks: list[Clocks] = []
        self.bare_clocks: list[Clocks] = []
        self.weight_difference = 0.0
        self._last: Rollout | None = None
        self._left = clocks()

    def collect(self, iteration: int) -> Rollout:
        if self._last is not None:
            self.trainer_clocks.append(since(self._left))
            start = clocks()
            self.loop.update(self._last)
            self.bare_clocks.append(since(start))
            self.weight_difference = max(
                float((ours - bare).detach().abs().max())
                for ours, bare in zip(self.policy.parameters(), self.loop.policy.parameters(), strict=True)
            )
        self._last = super().collect(iteration)
        self._left = clocks()
        return self._last


class Overhead(NamedTuple):
    """The trainer's update beside the plain loop's (`manako.agent.ppo_loop`) on the same minibatches."""

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
    collector = _InTurns(env, policy, args, LoopUpdates(policy, args, env.num_envs))
    PPOTrainer(policy, args, rollouts=collector).train()
    env.close()
    ours, bare = collector.trainer_clocks[1:], collector.bare_clocks[1:]
    return Overhead(
        percent=spread([100 * (a.wall / b.wall - 1) for a, b in zip(ours, bare, strict=True)]),
        cpu_percent=spread([100 * (a.cpu / b.cpu - 1) for a, b in zip(ours, bare, strict=True)]),
        trainer_seconds=spread([a.wall for a in ours]),
        bare_seconds=spread([b.wall for b in bare]),
        weight_difference=collector.weight_difference,
    )


def trainer_args(workload: Workload, folder: str) -> PPOConfig:
    """Returns settings of the trainer for the overhead's measurement."""
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
