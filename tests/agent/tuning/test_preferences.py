"""Preference pairs against trajectories written by hand, and branches against the environment itself."""

import io

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as Picture

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.data.trajectories import to_dataset
from manako.agent.errors import TrainingError
from manako.agent.tuning.preferences import (
    branch_pairs,
    expert_pairs,
    pair_dataset,
    return_pairs,
    state_pairs,
    unpaired,
)
from manako.envs import EpisodeVectorEnv
from manako.policies.interface import PolicySpec
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import goto_policy

GOTO = "manako/GoTo-v0"


def episodes(*rows):
    """(seed, actions, expert's actions, return) of each episode, as a dataset of its steps."""
    columns = {"seed": [], "step": [], "episode": [], "action": [], "expert_action": [], "episode_return": []}
    for number, (seed, actions, experts, total) in enumerate(rows):
        for step, (action, expert) in enumerate(zip(actions, experts, strict=True)):
            for name, value in zip(columns, (seed, step, number, action, expert, total), strict=True):
                columns[name].append(value)
    return Dataset.from_dict(columns)


def test_the_experts_action_is_preferred_where_the_player_did_another():
    data = episodes((7, [0, 1, 2], [0, 3, 2], 1.0), (8, [1], [0], 0.0))
    assert expert_pairs(data) == [(1, 3, 1), (3, 0, 1)]
    with pytest.raises(TrainingError, match="know no expert"):
        expert_pairs(episodes((7, [0], [-1], 1.0)))


def test_a_step_whose_answer_named_no_action_says_nothing():
    """Whatever stood in for it: an unparsed step is no pair's row, nor the side that is worse."""
    data = episodes((7, [0, 1, 2], [0, 3, 2], 1.0), (7, [0, 2, 1], [1, 0, 2], 0.0))
    assert expert_pairs(data) and return_pairs(data) == [(1, 1, 2)]
    said = data.add_column("outcome", ["legal", "cut", "legal", "legal", "legal", "refused"])
    assert expert_pairs(said) == [(3, 1, 0), (4, 0, 2)] and return_pairs(said) == []
    assert return_pairs(data.add_column("outcome", [None] * 4 + ["unparsed", None])) == []


def test_the_better_of_two_episodes_is_preferred_where_they_first_part():
    data = episodes(
        (7, [0, 1, 2], [0, 0, 0], 1.0),  # rows 0 to 2
        (7, [0, 3], [0, 0], -1.0),  # rows 3 and 4: parts from the first at step 1
        (9, [0, 3], [0, 0], 5.0),  # another seed
        (7, [0, 1], [0, 0], 2.0),  # rows 7 and 8: never does something else than the first
        (7, [2], [0], 1.0),  # row 9: as good as the first, worse than the last, better than the second
    )
    assert sorted(return_pairs(data)) == [(1, 1, 3), (7, 0, 2), (8, 1, 3), (9, 2, 0)]


def test_at_the_same_sight_the_action_that_paid_more_on_average_is_preferred():
    """Sight A: action 0 is followed by 1 and 3 (mean 2), action 1 by 2.5; sight B: both are followed by 0.5."""
    steps = [  # sight, instruction, episode, action, reward
        ("A", "go", 0, 0, 0.5),
        ("B", "go", 0, 0, 0.5),
        ("A", "go", 1, 0, 3.0),
        ("A", "go", 2, 1, 2.0),
        ("B", "go", 2, 1, 0.5),
        ("A", "stay", 3, 2, 9.0),  # another instruction is another state
    ]
    frames = {"A": np.zeros((2, 2, 3), np.uint8), "B": np.ones((2, 2, 3), np.uint8)}
    columns = {
        "image": [{"bytes": png(frames[sight]), "path": None} for sight, *_ in steps],
        "instruction": [text for _, text, *_ in steps],
        "episode": [episode for _, _, episode, _, _ in steps],
        "action": [action for *_, action, _ in steps],
        "reward": [reward for *_, reward in steps],
    }
    data = Dataset.from_dict(columns).cast_column("image", Image())
    assert state_pairs(data) == [(0, 1, 0), (2, 1, 0)]
    assert state_pairs(data.add_column("outcome", ["legal"] * 2 + ["cut"] + ["legal"] * 3)) == [(0, 1, 0)]
    assert state_pairs(data.add_column("outcome", ["legal"] * 3 + ["cut"] + ["legal"] * 2)) == []


def png(frame):
    buffer = io.BytesIO()
    Picture.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def policy():
    return goto_policy()


@pytest.fixture(scope="module")
def trajectories(policy):
    env = EpisodeVectorEnv(GOTO, 4)
    collector = RolloutCollector(env, RandomPlayer(policy.spec), 30, seed=0, record=True, ask_expert=True)
    return to_dataset([collector.collect(0)], policy, GOTO, "random", {})


def test_branches_try_every_action_and_go_on_to_the_end(trajectories):
    """Going on as the expert does, the best branch is a shortest way: its action is one of an expert's worth."""
    env = EpisodeVectorEnv(GOTO, 4)
    pairs = branch_pairs(trajectories, env, lambda _: env.expert_actions(), steps_per_episode=2, seed=0)
    assert len(pairs) > 10
    for row, chosen, rejected in pairs:
        returns = []
        for action in range(4):  # each branch by itself
            single = EpisodeVectorEnv(GOTO, 1)
            single.reset(seeds=[trajectories["seed"][row]])
            step = trajectories["step"][row]
            for before in trajectories["action"][row - step : row]:
                single.step(np.array([before]))
            result = single.step(np.array([action]))
            while not (result.terminated[0] or result.truncated[0]):
                result = single.step(single.expert_actions())
            returns.append(float(single.episode_returns[0]))
        assert chosen == int(np.argmax(returns)) and rejected == int(np.argmin(returns))


def test_an_environment_that_does_not_replay_is_not_branched_from():
    """Its column has drifted to another place by the step at which other actions would be tried."""
    env = EpisodeVectorEnv("tests/Drift-v0", 2)
    player = RandomPlayer(PolicySpec(env.action_names, env.frame_shape))
    policy = tiny_policy(env)
    rollout = RolloutCollector(env, player, 20, 0, record=True).collect(0)
    recorded = to_dataset([rollout], policy, "tests/Drift-v0", "random", {})
    with pytest.raises(TrainingError, match=r"The episode of seed \d+ did not play again to its step \d+ as it"):
        branch_pairs(recorded, env, lambda _: np.zeros(2, np.int64), steps_per_episode=20, seed=0)


def test_rows_for_trl(trajectories, policy):
    pairs = expert_pairs(trajectories)
    data = pair_dataset(trajectories, pairs, policy)
    names = policy.spec.action_names
    row, chosen, rejected = pairs[3]
    assert data[3]["chosen"][0]["content"][0]["text"] == names[chosen]
    assert data[3]["rejected"][0]["content"][0]["text"] == names[rejected]
    assert data[3]["images"][0].tobytes() == trajectories[row]["image"].tobytes()
    single = unpaired(data)
    assert len(single) == 2 * len(data) and single["label"][:4] == [True, False] * 2
    assert single[6]["completion"] == data[3]["chosen"] and single[7]["completion"] == data[3]["rejected"]
    with pytest.raises(TrainingError, match="No two actions could be told apart"):
        pair_dataset(trajectories, [], policy)
