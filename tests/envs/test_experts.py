"""Scripted experts and captions: that they are right, in every environment that has them."""

import gymnasium as gym
import numpy as np
import pytest

from manako import envs
from manako.envs import EnvError, EpisodeVectorEnv
from manako.envs.captions import place_name
from manako.envs.experts import _frozen_table, _solve

GOTO = "manako/GoTo-v0"


def play(env_id, episodes, env_kwargs=None):
    """The expert's episodes: their success and lengths."""
    env = EpisodeVectorEnv(env_id, episodes, env_kwargs=env_kwargs)
    env.reset()
    success, lengths = np.zeros(episodes, bool), np.zeros(episodes, int)
    going = np.ones(episodes, bool)
    for step in range(1, 300):
        result = env.step(env.expert_actions())
        ended = result.terminated | result.truncated
        success |= going & (result.success == 1)
        lengths[going & ended] = step
        going &= ~ended
        if not going.any():
            return success, lengths
        env.reset_done(ended)
    raise AssertionError("the expert does not come to an end")


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "longest"),
    [
        ("manako/ColorMatch-v0", None, 1),
        (GOTO, None, 4),
        (GOTO, {"size": 5, "num_objects": 6, "colors": 6}, 15),
        ("FrozenLake-v1", {"is_slippery": False}, 6),
        ("BabyAI-GoToRedBallGrey-v0", None, 40),
    ],
)
def test_experts_succeed_in_every_episode(env_id, env_kwargs, longest):
    if env_id.startswith("BabyAI"):
        pytest.importorskip("minigrid")
    success, lengths = play(env_id, 40, env_kwargs)
    assert success.all() and lengths.max() <= longest


def test_the_goto_expert_takes_a_shortest_way():
    env = gym.make(GOTO, size=4, num_objects=4).unwrapped
    for seed in range(60):
        env.reset(seed=seed)
        best = shortest(env)
        for _ in range(best):
            *_, terminated, _, info = env.step(env.expert_action())
        assert terminated and info["success"]


def shortest(env):
    """Steps to the named object that touch no other, by trying all sequences of growing length."""
    from manako.envs.goto import MOVES

    places, steps = {env.agent}, 0
    while True:
        steps += 1
        following = {
            (row + down, column + right)
            for row, column in places
            for down, right in MOVES.values()
            if 0 <= row + down < env.size and 0 <= column + right < env.size
        }
        if env.target in following:
            return steps
        places = following - env.objects


def test_the_table_of_a_slippery_lake_is_solved_exactly():
    """Against the known value of the best policy of the 4 x 4 lake at gamma 0.99: 0.542 at the start."""
    raw = gym.make("FrozenLake-v1", is_slippery=True).unwrapped
    policy = _solve(_frozen_table(raw.P))
    values = np.zeros(16)
    for _ in range(5000):
        values = np.array(
            [sum(p * (r + 0.99 * (not end) * values[s]) for p, s, r, end in raw.P[i][policy[i]]) for i in range(16)]
        )
    assert abs(values[0] - 0.5420) < 1e-3


def test_an_environment_without_an_expert_or_caption():
    env = EpisodeVectorEnv("CartPole-v1", 1)
    env.reset()
    with pytest.raises(EnvError, match=r"CartPole-v1 has no expert: expected .*expert_action"):
        env.expert_actions()
    with pytest.raises(EnvError, match=r"says nowhere what its frames show: expected a method caption"):
        env.captions()


def test_an_expert_asked_in_the_middle_goes_on_from_there():
    for env_id in (GOTO, "FrozenLake-v1"):
        env = EpisodeVectorEnv(env_id, 3)
        env.reset()
        env.step(np.array([0, 0, 0]))
        assert env.expert_actions().shape == (3,)


def test_captions_say_what_is_there():
    env = gym.make("manako/ColorMatch-v0", colors=["red", "blue"]).unwrapped
    for seed in range(20):
        frame = env.reset(seed=seed)[0]["image"]
        lit = np.argwhere(frame.any(-1))
        place = place_name(lit[0][0] // 8, lit[0][1] // 8, 3, 3)
        assert env.caption() == f"{env.action_names[env.color]} square at {place}."
    goto = gym.make(GOTO).unwrapped
    goto.reset(seed=1)
    kind = goto.instruction.removeprefix("go to the ")
    assert f"{kind} at {place_name(*goto.target, 3, 3)}" in goto.caption()
    assert goto.caption().startswith(f"cross at {place_name(*goto.agent, 3, 3)}, ")
    lake = envs.make_vlm_env("FrozenLake-v1", env_kwargs={"is_slippery": False})
    lake.reset(seed=0)
    lake.step(1)
    around = "edge left, ice below, hole right, ice above"
    assert lake.caption() == f"player at row 2, column 1: {around}. goal at row 4, column 4."


def test_places():
    assert [place_name(row, column, 3, 3) for row, column in ((0, 0), (1, 1), (2, 1), (1, 2))] == [
        "top left",
        "middle",
        "bottom middle",
        "middle right",
    ]
    assert place_name(3, 0, 5, 5) == "row 4, column 1"
