"""GRPO, RLOO and GiGPO against examples worked by hand, and learning with them."""

import math

import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.errors import TrainingError
from manako.agent.group_advantages import EPSILON, group_advantages, grpo, returns_to_go, rloo, whole_groups
from manako.agent.ppo_trainer import PPOTrainer
from manako.envs import EpisodeVectorEnv
from tests.helpers.small_policies import ColorNamer
from tests.helpers.small_runs import color_env, corridor_env, difference, indices, ppo_config, tiny_policy, weights

NEVER = [False, False]


def table(*rows):
    """(T, N)."""
    return torch.tensor(rows)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=0)


def test_grpo_by_hand():
    # group 7: returns 1, 2, 3: mean 2, deviation 1; group 4: 5, 5: nothing to compare; group 9: alone
    returns, groups = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 5.0]), torch.tensor([7, 4, 7, 9, 7, 4])
    close(grpo(returns, groups), [-1 / (1 + EPSILON), 0.0, 0.0, 0.0, 1 / (1 + EPSILON), 0.0])


def test_rloo_by_hand():
    # 1 - (2 + 3) / 2 = -1.5; 2 - (1 + 3) / 2 = 0; 3 - (1 + 2) / 2 = 1.5; 4 - 2 = 2 and 2 - 4 = -2
    returns, groups = torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0, 2.0]), torch.tensor([7, 4, 7, 9, 7, 4])
    close(rloo(returns, groups), [-1.5, 2.0, 0.0, 0.0, 1.5, -2.0])


def test_returns_to_go_by_hand():
    rewards, ended = table([1.0], [2.0], [4.0], [8.0]), table([False], [True], [False], [False])
    # 1 + 0.5·2 = 2, 2 | 4 + 0.5·8 = 8, 8
    close(returns_to_go(rewards, ended, 0.5), [[2.0], [2.0], [8.0], [8.0]])


# Two groups of two slots, four steps. Slot 0: episodes of 2 and 2 steps; slot 1: of 3 steps and one cut off;
# slots 2 and 3: one episode of 4 steps, and one of 1 step with the rest cut off.
REWARDS = table([1.0, 0.0, 0.0, 3.0], [1.0, 0.0, 0.0, 9.0], [5.0, 4.0, 0.0, 9.0], [5.0, 9.0, 1.0, 9.0])
ENDED = table(
    [False, False, False, True], [True, False, False, False], [False, True, False, False], [True, False, True, False]
)
GROUPS = torch.tensor([0, 0, 1, 1])
USABLE = [[True, True, True, True], [True, True, True, False], [False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_episodes_are_compared_with_those_of_the_same_number_and_seed(method):
    """First episodes: 2 against 4 in group 0, 1 against 3 in group 1; the second of slot 0 has none to compare with."""
    advantages, usable = group_advantages(method, REWARDS, ENDED, GROUPS)
    assert usable.tolist() == USABLE
    scale = 1.0 if method == "rloo" else 1 / 2 / (math.sqrt(2) + EPSILON)  # deviation of 2 and 4: sqrt 2
    expected = [[-2.0, 2.0, -2.0, 2.0], [-2.0, 2.0, -2.0, 0.0], [0.0, 2.0, -2.0, 0.0], [0.0, 0.0, -2.0, 0.0]]
    close(advantages, [[scale * value for value in row] for row in expected])


def test_gigpo_adds_the_comparison_of_steps_that_saw_the_same():
    """Gamma 0.5: returns to go 1.5, 1 in slot 0; 1, 2, 4 in slot 1. Both begin at state 1; slot 1 returns there."""
    states = table([1, 1, 5, 5], [2, 3, 6, 7], [8, 1, 5, 8], [8, 9, 7, 9])
    plain, _ = group_advantages("grpo", REWARDS, ENDED, GROUPS)
    advantages, usable = group_advantages("gigpo", REWARDS, ENDED, GROUPS, states, gamma=0.5, step_weight=2.0)
    steps = (advantages - plain) / 2
    # state 1 of group 0: 1.5, 1 and 4: mean 13/6, deviation sqrt(((2/3)² + (7/6)² + (11/6)²) / 2) = 1.607275
    close(steps[0, :2], [(1.5 - 13 / 6) / 1.607275, (1 - 13 / 6) / 1.607275])
    close(steps[2, 1], (4 - 13 / 6) / 1.607275)
    assert steps[1, 0] == steps[1, 1] == 0  # nobody else saw states 2 and 3
    # state 5 of group 1: slot 2 at rows 0 and 2 (0.125, 0.5), slot 3 at row 0 (3): not mixed with group 0
    mean = (0.125 + 0.5 + 3) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in (0.125, 0.5, 3)) / 2)
    close(steps[0, 2:], [(0.125 - mean) / deviation, (3 - mean) / deviation])
    assert usable.tolist() == USABLE and not steps[~usable].any()


def test_a_group_takes_part_whole_or_not_at_all():
    """Group 0: its second episodes end in two of three slots; group 1: one first episode is cut off."""
    ends = {0: (1, 3), 1: (2, 4), 2: (3,), 3: (0,), 4: (4,), 5: ()}
    ended = torch.tensor([[row in ends[slot] for slot in range(6)] for row in range(5)])
    rewards = torch.arange(30.0).view(5, 6)
    for method in ("rloo", "grpo", "gigpo"):
        groups, states = torch.tensor([0, 0, 0, 7, 7, 7]), torch.zeros(5, 6, dtype=torch.long)
        advantages, usable = group_advantages(method, rewards, ended, groups, states)
        first = [[row <= (1, 2, 3)[slot] for slot in range(3)] + [False] * 3 for row in range(5)]
        assert usable.tolist() == first and not advantages[~usable].any() and advantages[usable].any()
    assert whole_groups(ended, 3) == 0.5 and whole_groups(ended, 2) == 2 / 3


def test_seeds_that_an_environment_ignores_are_refused(tmp_path):
    env = EpisodeVectorEnv("tests/Halves-v0", 8, group_size=2, env_kwargs={"forgetful": True})
    with pytest.raises(TrainingError, match="rloo compares episodes of one seed, and here episodes are not fixed by"):
        PPOTrainer(tiny_policy(env), ppo_config(tmp_path, advantage="rloo", group_size=2), env)


def test_bad_calls():
    with pytest.raises(TrainingError, match="expected one of gae, grpo, rloo, gigpo"):
        group_advantages("reinforce", REWARDS, ENDED, GROUPS)
    with pytest.raises(TrainingError, match="expected the states' digests"):
        group_advantages("gigpo", REWARDS, ENDED, GROUPS)


def test_the_slots_of_a_group_play_the_same_episodes_in_every_round():
    env = corridor_env(4, {"length": 9, "limit": 6}, seed=2, group_size=2)
    collector = RolloutCollector(env, tiny_policy(env), num_steps=8, seed=2, rounds=True)
    first = []
    for iteration in range(3):
        rollout = collector.collect(iteration)
        frames = rollout.inputs["frames"].view(8, 4, *rollout.inputs["frames"].shape[1:])
        assert torch.equal(frames[0, 0], frames[0, 1]) and torch.equal(frames[0, 2], frames[0, 3])
        assert not torch.equal(frames[0, 0], frames[0, 2])
        assert not torch.equal(indices(rollout)[:, 0], indices(rollout)[:, 1])  # the same seed, other actions
        first.append(frames[0, 0])
    assert not torch.equal(first[0], first[1])


def test_too_few_whole_episodes_are_an_error(tmp_path):
    env = corridor_env(4, {"length": 30, "limit": 20}, group_size=2)
    args = ppo_config(tmp_path, advantage="grpo", group_size=2)
    with pytest.raises(TrainingError, match="Only 0 of 16 samples belong to whole episodes"):
        PPOTrainer(tiny_policy(env), args, env).train()


def test_settings_that_do_not_fit(tmp_path):
    env = color_env()
    with pytest.raises(TrainingError, match="group_size is 3 for 8 environments"):
        PPOTrainer(tiny_policy(env), ppo_config(tmp_path, advantage="rloo", group_size=3), env)
    with pytest.raises(TrainingError, match="advantage is 'a2c'"):
        PPOTrainer(tiny_policy(env), ppo_config(tmp_path, advantage="a2c"), env)


def color_match(policy_of, head, method, folder, **settings):
    """Trains on episodes of one step, and holds that the value head has not learned.

    Returns:
        The share of right answers in each iteration.
    """
    env = EpisodeVectorEnv("manako/ColorMatch-v0", 32, group_size=8, env_kwargs={"size": 2})
    policy = policy_of(env)
    before = weights(policy.get_submodule(head))
    args = {"num_steps": 8, "num_ppo_epochs": 3, "minibatch_size": 64, "group_size": 8, **settings}
    trainer = PPOTrainer(policy, ppo_config(folder, advantage=method, **args), env)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "iteration" in row]
    assert before and difference(weights(policy.get_submodule(head)), before) == 0
    assert "value_loss" not in rows[0]
    return [row["success_rate"] for row in rows]


@pytest.mark.parametrize("method", ["grpo", "rloo", "gigpo"])
def test_they_learn_color_match(method, tmp_path):
    """A linear policy; blind guessing is right one time in four."""
    success = color_match(ColorNamer, "value", method, tmp_path, num_iterations=12, learning_rate=2e-2)
    assert sum(success[:2]) / 2 < 0.5 < 0.9 < sum(success[-3:]) / 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo", "gigpo"])
def test_a_vision_language_model_learns_color_match_with_them(method, tmp_path):
    success = color_match(tiny_policy, "value_head", method, tmp_path, num_iterations=12, learning_rate=1.5e-3)
    assert sum(success[:3]) / 3 < 0.5 < 0.9 < sum(success[-3:]) / 3
