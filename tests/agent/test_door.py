"""A policy of one's own, by the public interface alone: it plays, is evaluated and learns with everything of agent/.

The policies stand in tests/helpers/small_policies.py: one of a closed set (S = 1), and two that answer in two tokens.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, RecordedPlayer, ScriptedPlayer
from manako.agent.data.recordings import Recording
from manako.agent.errors import TrainingError
from manako.agent.ppo_loop import train_ppo
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.evaluation import evaluate, evaluate_all
from manako.agent.rollout import merge
from manako.agent.samples import recompute_logprobs
from manako.envs import HELD_OUT, episode_seed
from manako.policies.interface import PolicySpec, Rows
from tests.helpers.rollout_equality import close_enough, same_bits
from tests.helpers.small_policies import ColorNamer, TwoTokens, TwoTokensRuled
from tests.helpers.small_runs import color_env, corridor_env, ppo_config, weights

SEEDS = [episode_seed(0, HELD_OUT, 0, episode) for episode in range(40)]


POLICIES = [ColorNamer, TwoTokens, TwoTokensRuled]


def settings(folder, **others):
    defaults = {"num_iterations": 10, "num_steps": 8, "num_ppo_epochs": 4, "minibatch_size": 64, "learning_rate": 1e-2}
    return ppo_config(folder, **{**defaults, "gamma": 0.0, **others})


def logged(trainer):
    return [row for row in trainer.state.log_history if "iteration" in row]


# ---- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_of_one_s_own_learns_to_name_colors(kind, tmp_path):
    """Blind guessing is right one time in four; where the second token is ruled, one colour cannot be named."""
    env = color_env(32)
    policy = kind(env)
    before = weights(policy)
    trainer = PPOTrainer(policy, settings(tmp_path), env)
    trainer.train()
    rows = logged(trainer)
    assert len(rows) == 10 and all(math.isfinite(row["loss"]) for row in rows)
    assert all(row["first_ratio_error"] < 1e-5 for row in rows)
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(policy).items())
    success = [row["success_rate"] for row in rows]
    assert success[0] < 0.5 and success[-1] > (0.65 if kind is TwoTokensRuled else 0.85)
    if kind is TwoTokensRuled:
        assert all(row["outcome/legal"] + row["outcome/ruled"] == 1 for row in rows)


@pytest.mark.parametrize("kind", POLICIES)
def test_the_trainer_and_the_loop_are_the_same_for_it(kind, tmp_path):
    args = settings(tmp_path, num_iterations=2, seed=3)
    env = color_env(16, seed=3)
    trainer = PPOTrainer(kind(env), args, env)
    trainer.train()
    env = color_env(16, seed=3)
    policy = kind(env)
    rows = list(train_ppo(policy, RolloutCollector(env, policy, args.num_steps, args.seed), args))
    trained = weights(trainer.policy)
    assert all(torch.equal(weight, trained[name]) for name, weight in weights(policy).items())
    assert [row["loss"] for row in rows] == [row["loss"] for row in logged(trainer)]


def test_gradient_accumulation_changes_nothing_for_two_tokens(tmp_path):
    """A mean over all drawn tokens of a micro-batch would weigh them otherwise than their minibatch."""
    runs = []
    for parts in (1, 4):
        env = color_env(16)
        trainer = PPOTrainer(
            TwoTokensRuled(env), settings(tmp_path, num_iterations=2, gradient_accumulation_steps=parts), env
        )
        trainer.train()
        runs.append(weights(trainer.policy))
    assert all(torch.allclose(weight, runs[1][name], atol=2e-6) for name, weight in runs[0].items())


def test_a_policy_s_own_loss_is_learned_and_logged(tmp_path):
    class Dreamer(ColorNamer):
        def evaluate_actions(self, inputs, actions):
            said = super().evaluate_actions(inputs, actions)
            return said._replace(losses={"dream": (self.dream - 1).square().sum()})

        def heads(self):
            super().heads()
            self.dream = nn.Parameter(torch.zeros(1))

    env = color_env(16)
    trainer = PPOTrainer(Dreamer(env), settings(tmp_path, num_iterations=3), env)
    trainer.train()
    dreams = [row["dream"] for row in logged(trainer)]
    assert 1 >= dreams[0] > dreams[1] > dreams[2] and trainer.policy.dream.item() > 0.1


@pytest.mark.parametrize("learn", ["trainer", "loop"])
def test_all_that_it_learns_from_is_moved_to_its_device_first(learn, tmp_path, monkeypatch):
    """Rollouts lie on the CPU. Here every device is the CPU, so what was moved is told by a mark."""
    move = Rows.to

    def marked(rows, device):
        moved = move(rows, device)
        moved.device = device
        return moved

    class Elsewhere(ColorNamer):
        def evaluate_actions(self, inputs, actions):
            assert inputs.device == actions.device == self.device
            return super().evaluate_actions(inputs, actions)

    monkeypatch.setattr(Rows, "to", marked)
    args = settings(tmp_path, num_iterations=1)
    env = color_env(16)
    policy = Elsewhere(env)
    if learn == "trainer":
        PPOTrainer(policy, args, env).train()
    else:
        list(train_ppo(policy, RolloutCollector(env, policy, args.num_steps, args.seed), args))
    rollout = RolloutCollector(color_env(16), policy, 3, seed=0, reference=Elsewhere(env)).collect(0)
    recompute_logprobs(rollout, policy)


# ---- it plays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POLICIES)
def test_any_split_plays_the_same_rollout(kind):
    """Forwards of 2 slots, in one collector of 8 or in two of 4, and of all 8: the first two to the last bit."""
    how = {"num_steps": 6, "seed": 2, "record": True}
    policy = kind(color_env(8))
    whole = RolloutCollector(color_env(8, seed=2), policy, **how).collect(0)
    by_two = RolloutCollector(color_env(8, seed=2), policy, batch_size=2, **how).collect(0)
    parts = [
        RolloutCollector(color_env(4, seed=2, first_slot=first), policy, batch_size=2, **how).collect(0)
        for first in (0, 4)
    ]
    same_bits(by_two, merge(parts))
    close_enough(by_two, whole)
    tokens = 1 if kind is ColorNamer else 2
    assert whole.logprobs.shape == whole.mask.shape == (6, 8, tokens)
    if kind is TwoTokensRuled:
        first = whole.actions["tokens"][:, 0].view(6, 8)
        assert torch.equal(whole.mask[..., 1], first != 0) and not whole.mask.all()
        assert whole.outcomes == ["legal" if chosen else "ruled" for chosen in whole.mask[..., 1].flatten().tolist()]
    else:
        assert whole.mask.all() and whole.outcomes is None
    assert len(set(whole.record.to_env.flatten().tolist())) == (3 if kind is TwoTokensRuled else 4)


@pytest.mark.parametrize("kind", POLICIES)
def test_what_it_said_is_what_it_says_again(kind):
    """And older weights' whole answers are weighed by the product of their drawn tokens' ratios."""
    env = color_env(8)
    policy = kind(env)
    rollout = RolloutCollector(env, policy, 6, seed=0).collect(0)
    again, importance = recompute_logprobs(rollout, policy, max_batch=5)
    assert torch.allclose(again.logprobs, rollout.logprobs, atol=1e-6)
    assert torch.allclose(importance, torch.ones(6, 8), atol=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    moved, importance = recompute_logprobs(rollout, policy)
    ratio = torch.where(rollout.mask, (moved.logprobs - rollout.logprobs).exp(), 1.0).prod(-1)  # (T, N)
    assert torch.allclose(importance, ratio.clamp_max(1.0), atol=1e-6) and importance.min() < 0.9


@pytest.mark.parametrize("kind", POLICIES)
def test_it_is_evaluated(kind):
    env = color_env(8, split=HELD_OUT)
    policy = kind(env)
    rows = evaluate_all(policy, env, SEEDS)
    assert len(rows["policy"].episodes) == len(SEEDS)
    assert rows["policy"] == evaluate(policy, color_env(3, split=HELD_OUT), SEEDS)  # greedy, whatever the split
    drawn = [evaluate(policy, env, SEEDS, sample=True, seed=seed).episodes for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_another_policy_is_its_reference(tmp_path):
    """Without a closed set the reference is asked for the same tokens, (T * N, S)."""
    env = color_env(16)
    policy, reference = TwoTokensRuled(env), TwoTokensRuled(env)
    with torch.no_grad():
        reference.first.bias += torch.tensor([1.0, 0.0])
    trainer = PPOTrainer(policy, settings(tmp_path, num_iterations=2, kl_coef=0.1), env, reference=reference)
    trainer.train()
    rows = logged(trainer)
    assert all(math.isfinite(row["reference_kl"]) and row["reference_kl"] > 0.01 for row in rows)
    rollout = RolloutCollector(color_env(16), policy, 3, seed=0, reference=reference, batch_size=4).collect(0)
    said = reference.evaluate_actions(rollout.inputs, rollout.actions).logprobs
    assert rollout.reference.shape == (48, 2) and torch.allclose(rollout.reference, said, atol=1e-6)


# ---- players do not learn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [ScriptedPlayer, RandomPlayer, lambda spec: RecordedPlayer(spec, [[Recording(0, (1,), "line 1")]])],
    ids=["ScriptedPlayer", "RandomPlayer", "RecordedPlayer"],
)
def test_players_are_refused_in_one_sentence(make, tmp_path):
    env = color_env(8)
    player = make(PolicySpec(env.action_names, env.frame_shape))
    name = type(player).__name__
    with pytest.raises(
        TrainingError, match=f"^{name} is a player that cannot learn: expected a policy with weights"
    ) as e:
        PPOTrainer(player, settings(tmp_path), env)
    text = str(e.value)
    assert "\n" not in text and ". " not in text and text.endswith(".")


class Impossible(TwoTokensRuled):
    """Where the rule speaks, the policy itself would never have said it: a log-probability of minus infinity."""

    def act(self, inputs, draws, greedy=False):
        acted = super().act(inputs, draws, greedy)
        return acted._replace(logprobs=acted.logprobs.masked_fill(~acted.mask, -np.inf))

    def evaluate_actions(self, inputs, actions):
        said, first = super().evaluate_actions(inputs, actions), actions["tokens"][:, 0]
        undrawn = torch.stack([torch.zeros_like(first), first == 0], 1).bool()
        return said._replace(logprobs=said.logprobs.masked_fill(undrawn, -np.inf))


def test_what_stands_at_a_token_that_was_not_drawn_is_nobody_s_answer(tmp_path):
    runs = []
    for kind in (TwoTokensRuled, Impossible):
        env = color_env(16)
        policy, reference = kind(env), kind(env)
        with torch.no_grad():
            reference.first.bias += torch.tensor([1.0, 0.0])
        trainer = PPOTrainer(policy, settings(tmp_path, num_iterations=2, kl_coef=0.1), env, reference=reference)
        trainer.train()
        runs.append((weights(policy), [row["loss"] for row in logged(trainer)]))
        rollout = RolloutCollector(color_env(16), policy, 3, seed=0).collect(0)
        assert not rollout.mask.all() and torch.isfinite(recompute_logprobs(rollout, policy)[1]).all()
    (ruled, losses), (impossible, same) = runs
    assert losses == same and all(torch.equal(weight, impossible[name]) for name, weight in ruled.items())


def test_probabilities_that_are_not_finite_where_they_were_drawn_stop_the_rollout():
    class Broken(TwoTokens):
        def act(self, inputs, draws, greedy=False):
            acted = super().act(inputs, draws, greedy)
            acted.logprobs[0, 1] = np.nan
            return acted

    env = color_env(8)
    with pytest.raises(TrainingError, match="not finite in iteration 0, step 0"):
        RolloutCollector(env, Broken(env), 4, seed=0).collect(0)


def test_a_policy_that_learns_is_told_what_it_needs_wherever_it_prepares(tmp_path):
    """At each step, after the rollout, and at the last frame of an episode that was cut off."""

    class Counting(ColorNamer):
        needs = ("episode_steps",)

        def prepare(self, images, instructions, told=None):
            asked.append(told["episode_steps"].tolist())
            assert len(asked[-1]) == len(images) == len(instructions)
            return super().prepare(images, instructions)

    asked = []
    env = corridor_env(2, {"length": 41, "limit": 3})
    rollout = RolloutCollector(env, Counting(env), 4, seed=0).collect(0)
    assert rollout.truncated[2].all() and len(rollout.bootstrap) == 4
    assert asked == [[0, 0], [1, 1], [2, 2], [3, 3], [0, 0], [1, 1]]
