"""PPO in one piece: collect, advantages, epochs of minibatches, an optimizer step each. Plain PyTorch, CleanRL's order.

`PPOTrainer` does the same inside transformers' Trainer, which adds mixed precision, gradient accumulation, callbacks
and checkpoints; tests/agent/test_ppo_loop.py holds the two together bit for bit, and the benchmark times one beside
the other. To read the algorithm, read this file from top to bottom; to run it:

    policy = load_policy(PolicySource(), env.action_names, env.frame_shape)
    rollouts = RolloutCollector(env, policy, settings.num_steps, settings.seed)
    for metrics in train_ppo(policy, rollouts, settings):
        print(metrics["iteration"], metrics["episode_return"])
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manako.agent.episodes import EpisodeCount, means
from manako.agent.errors import TrainingError
from manako.agent.interfaces import RolloutSource
from manako.agent.losses import ent_coef_at, ppo_loss
from manako.agent.return_scale import ReturnScale
from manako.agent.rng import SHUFFLES, make_rng, shuffled
from manako.agent.rollout import Rollout
from manako.agent.samples import (
    Samples,
    recompute_logprobs,
    with_advantages,
    with_group_advantages,
    with_token_advantages,
)
from manako.policies.interface import Policy

if TYPE_CHECKING:
    from manako.agent.ppo_config import PPOConfig


def train_ppo(policy: Policy, rollouts: RolloutSource, settings: "PPOConfig") -> Iterator[dict[str, float | None]]:
    """Trains the policy, and yields each iteration's metrics.

    Args:
        policy: what of it requires gradients learns.
        rollouts: N environments, T steps a rollout.
        settings: of PPO.

    Raises:
        TrainingError: a loss that is not finite, or too few samples.
    """
    num_samples = rollouts.num_envs * rollouts.num_steps  # N * T
    num_minibatches = num_samples // settings.minibatch_size
    updates_per_iteration = settings.num_ppo_epochs * num_minibatches
    total_updates = settings.num_iterations * updates_per_iteration
    groups = policy.parameter_groups(settings.learning_rate, settings.adapter_learning_rate)
    optimizer = torch.optim.AdamW(groups, eps=settings.adam_epsilon, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, (total_updates - step) / total_updates)
    )
    scale = return_scale(settings, rollouts.num_envs)

    ended = EpisodeCount(rounds=settings.advantage != "gae")
    for iteration in range(settings.num_iterations):
        rollout = rollouts.collect(iteration)
        samples = samples_of(rollout, policy, settings, scale, lag=iteration - rollout.version)
        ent_coef = ent_coef_at(settings, iteration)
        measured: list[dict[str, Tensor]] = []
        for minibatch in minibatches(samples, settings, iteration, num_minibatches, policy):
            minibatch = minibatch.to(policy.device)
            evaluated = policy.evaluate_actions(minibatch.inputs, minibatch.actions)
            loss, parts, ratio = ppo_loss(evaluated, minibatch, settings, ent_coef)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"The loss is {loss.item()} in iteration {iteration}: expected a number, so lower learning_rate."
                )
            measured.append({**parts, "ratio_error": (ratio - 1).abs().max()})
            if settings.target_kl is not None and parts["approx_kl"] > 1.5 * settings.target_kl:
                break  # this minibatch is not learned from
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
        while schedule.last_epoch < (iteration + 1) * updates_per_iteration:
            schedule.step()  # what a stopped update leaves out counts as done
        yield {
            "iteration": iteration + 1,
            "env_steps": (iteration + 1) * num_samples,
            "first_ratio_error": measured[0]["ratio_error"].item(),
            **means(ended.take(rollout)),
            **{name: torch.stack([part[name].detach() for part in measured]).mean().item() for name in measured[0]},
        }


def return_scale(settings: "PPOConfig", num_envs: int) -> ReturnScale | None:
    """Returns the unit of rewards, or None where they are taken as they are."""
    return ReturnScale(settings.gamma, num_envs, settings.advantage != "gae") if settings.scale_returns else None


def samples_of(rollout: Rollout, policy: Policy, settings: "PPOConfig", scale: ReturnScale | None, lag: int) -> Samples:
    """Returns the rollout's samples with their advantages.

    Args:
        rollout: what was played.
        policy: the one that learns; it judges anew what weights `lag` updates older played.
        settings: of PPO.
        scale: the unit of rewards so far.
        lag: updates since the weights that acted.
    """
    importance = None
    if lag:
        rollout, importance = recompute_logprobs(rollout, policy)
    if scale is not None:
        rollout = scale(rollout)
    if settings.advantage == "gae" and settings.token_credit != "step":
        return with_token_advantages(rollout, settings.token_credit, settings.gamma, settings.gae_lambda)
    if settings.advantage == "gae":
        return with_advantages(rollout, settings.gamma, settings.gae_lambda, importance)
    return with_group_advantages(
        rollout, settings.advantage, settings.group_size, settings.gamma, settings.step_weight, importance
    )


def minibatches(
    samples: Samples, settings: "PPOConfig", iteration: int, parts: int, policy: Policy | None = None
) -> Iterator[Samples]:
    """Yields the usable samples in `parts` minibatches, shuffled anew in each PPO epoch.

    Args:
        samples: of a rollout.
        settings: of PPO.
        iteration: from 0 on.
        parts: how many.
        policy: samples that share its work are shuffled together.

    Raises:
        TrainingError: fewer usable samples than minibatches.
    """
    kept = torch.arange(len(samples.values))
    if samples.usable is not None:
        kept = kept[samples.usable]
    if len(kept) < parts:
        raise TrainingError(
            f"Only {len(kept)} of {len(samples.values)} samples belong to whole episodes that can be compared, too few "
            f"for {parts} minibatches: expected a num_steps in which episodes end."
        )
    groups = None if policy is None else policy.shared_work(samples.inputs.select(kept))
    for epoch in range(settings.num_ppo_epochs):
        order = shuffled(len(kept), groups, len(kept) // parts, make_rng(settings.seed, SHUFFLES, iteration, epoch))
        for rows in kept[torch.from_numpy(order)].tensor_split(parts):
            yield samples.select(rows)
