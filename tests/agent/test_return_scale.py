"""Rewards in their own running unit: by hand, beside gymnasium's running deviation, and in runs paid in other units."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd

from manako.agent.collector import RolloutCollector
from manako.agent.errors import TrainingError
from manako.agent.group_advantages import group_advantages
from manako.agent.ppo_trainer import ROLLOUT_STATE, PPOTrainer
from manako.agent.return_scale import LIMIT, ReturnScale
from manako.envs import EpisodeVectorEnv
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import color_env, difference, ppo_config, weights


def paid(factor, env="manako/GoTo-v0", render_mode=None):
    return gym.wrappers.TransformReward(gym.make(env, render_mode=render_mode), lambda reward: reward * factor)


gym.register("tests/Paid-v0", paid)


def steps(rewards, ended):
    return torch.tensor(rewards, dtype=torch.float32), torch.tensor(ended)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_three_steps_of_two_environments_by_hand():
    scale = ReturnScale(gamma=0.5, num_envs=2)
    scale.update(*steps([[1, 0], [2, 4], [0, 2]], [[False, False], [True, False], [False, True]]))
    # first env: 1, 2 + 0.5 = 2.5, ended, 0; second: 0, 4, 2 + 2 = 4, ended
    paid = [1, 2.5, 0, 0, 4, 4]
    mean = 11.5 / 6
    deviation = math.sqrt(sum((x - mean) ** 2 for x in paid) / 6)
    assert (scale.count, scale.mean) == (6, pytest.approx(mean)) and scale.deviation == pytest.approx(deviation)
    assert scale.paid.tolist() == [0, 0]
    scale.update(*steps([[3, -1]], [[False, False]]))
    paid += [3, -1]
    mean = sum(paid) / 8
    assert scale.deviation == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in paid) / 8))
    scale.update(*steps([[0, 0]], [[False, False]]))
    assert scale.paid.tolist() == [1.5, -0.5]  # of episodes that go on


def test_the_deviation_is_gymnasiums():
    """Its running mean and variance, as `NormalizeReward` feeds them; its count starts at 1e-4."""
    rng = np.random.default_rng(0)
    rewards, ended = rng.normal(3, 20, (60, 5)), rng.random((60, 5)) < 0.2
    theirs, returns = RunningMeanStd(epsilon=1e-12, shape=()), np.zeros(5)
    ours = ReturnScale(0.9, 5)
    for part in range(0, 60, 12):
        ours.update(torch.from_numpy(rewards[part : part + 12]), torch.from_numpy(ended[part : part + 12]))
    for reward, end in zip(rewards, ended, strict=True):
        returns = returns * 0.9 + reward
        theirs.update(returns)
        returns[end] = 0
    assert ours.deviation == pytest.approx(float(theirs.var) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("rewards", "deviation"),
    [
        ([[0, 0], [0, 0]], 1),  # nothing paid yet
        ([[0.1, 0.1], [0.1, 0.1]], 0.1),  # all equal: their size, not the rounding of their mean
        ([[-7, -7], [-7, -7]], 7),
        ([[1e-30, 0], [0, 0]], math.sqrt(3) / 4 * 1e-30),
    ],
)
def test_what_cannot_be_divided_by(rewards, deviation):
    scale = ReturnScale(0.9, 2)
    scale.update(*steps(rewards, [[True, True], [True, True]]))
    assert scale.deviation == pytest.approx(deviation)


def test_a_rare_reward_is_limited_and_the_environments_numbers_stay():
    env = EpisodeVectorEnv("tests/Paid-v0", 8, env_kwargs={"factor": 1.0}, seed=0)
    rollout = RolloutCollector(env, tiny_policy(env), 16, seed=0).collect(0)
    scale = ReturnScale(0.9, 8)
    scale.update(torch.zeros(2000, 8), torch.ones(2000, 8, dtype=torch.bool))
    scaled = scale(rollout)
    assert scaled.rewards.abs().max() == LIMIT and (scaled.rewards == rollout.rewards / scale.deviation).any()
    assert scaled.episodes == rollout.episodes


def test_rewards_that_are_no_numbers():
    with pytest.raises(TrainingError, match="1 rewards are not finite"):
        ReturnScale(0.9, 2).update(*steps([[1, math.nan]], [[False, False]]))


def test_episodes_that_are_compared_stay_different_and_those_of_equal_returns_equal():
    env = EpisodeVectorEnv("tests/Paid-v0", 4, env_kwargs={"factor": 1.0}, seed=0)
    rollout = RolloutCollector(env, tiny_policy(env), 3, seed=0).collect(0)
    ended = torch.tensor([[False] * 4] * 2 + [[True] * 4])
    none = torch.zeros(3, 4, dtype=torch.bool)
    paid = torch.tensor([[0.0] * 4, [0.0] * 4, [1.0, 3.0, 0.0, 0.0]])
    rare = rollout._replace(rewards=paid, terminated=ended, truncated=none)
    scale = ReturnScale(0.9, 4, restarts=True)
    scale.update(torch.zeros(3000, 4), torch.ones(3000, 4, dtype=torch.bool))
    one, three = scale(rare).rewards[-1, :2].tolist()
    assert one > LIMIT and three / one == pytest.approx(3)
    # returns of 0 by rewards that cancel: rounding is no advantage
    cancel = torch.tensor([[0.3, 0.1, 0.5, 0.7], [-0.3, 0.2, -0.1, -0.7], [0, -0.3, -0.4, 0]])
    for rewards in (cancel, scale(rare._replace(rewards=cancel)).rewards):
        advantages, usable = group_advantages("grpo", rewards, ended, torch.zeros(4, dtype=torch.int64))
        assert usable.all() and advantages.abs().max() < 0.1


def test_rollouts_of_new_episodes_carry_nothing_over():
    scale = ReturnScale(1.0, 1, restarts=True)
    for _ in range(2):
        scale.update(*steps([[1], [1]], [[False], [False]]))
    assert scale.mean == 1.5


# ---- in training -----------------------------------------------------------------------------------------------------


def trained(folder, factor, **settings):
    env = EpisodeVectorEnv("tests/Paid-v0", 8, env_kwargs={"factor": factor}, seed=0, group_size=4)
    defaults = {"num_iterations": 3, "num_steps": 16, "minibatch_size": 64, "group_size": 4}
    trainer = PPOTrainer(tiny_policy(env), ppo_config(folder, **{**defaults, **settings}), env)
    trainer.train()
    return weights(trainer.policy), [row for row in trainer.state.log_history if "iteration" in row]


@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo", "gigpo"])
def test_the_unit_of_reward_changes_no_bit(advantage, tmp_path):
    """By powers of two, which round nothing; what is reported stays in the environment's unit."""
    before, rows = trained(tmp_path / "1", 1.0, advantage=advantage)
    for factor in (2.0**-20, 128.0):
        after, others = trained(tmp_path / str(factor), factor, advantage=advantage)
        assert all(torch.equal(before[name], after[name]) for name in before)
        for row, other in zip(rows, others, strict=True):
            assert other["episode_return"] == pytest.approx(factor * row["episode_return"], rel=1e-6)
            assert other["return_deviation"] == factor * row["return_deviation"]


def test_other_units_change_rounding_alone(tmp_path):
    before = trained(tmp_path / "1", 1.0)[0]
    assert difference(before, trained(tmp_path / "100", 100.0)[0]) < 1e-4
    as_they_are = trained(tmp_path / "off", 1.0, scale_returns=False)[0]
    assert difference(as_they_are, trained(tmp_path / "off100", 100.0, scale_returns=False)[0]) > 1e-3


def test_a_checkpoint_holds_the_unit(tmp_path):
    env = color_env()
    trainer = PPOTrainer(tiny_policy(env), ppo_config(tmp_path / "run"), env)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / ROLLOUT_STATE).read_text())["return_scale"]
    again = ReturnScale(trainer.args.gamma, 8)
    again.load_state_dict(saved)
    assert again.count == 2 * 4 * 8 and again.deviation == trainer.scale.deviation != 1
    assert torch.equal(again.paid, trainer.scale.paid)
