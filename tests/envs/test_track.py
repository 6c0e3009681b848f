"""Track: followed by looking at two frames in a row, and hopeless for whoever looks at one."""

import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from manako import envs
from manako.envs.tiles import FIRST_OBJECT, TILE, paint_tiles

MOVES = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}  # up, down, left, right


def make(**kwargs) -> gym.Env:
    return gym.make("manako/Track-v0", render_mode="rgb_array", **kwargs)


def place_in(frame):
    """The cell of the ball in a frame."""
    ball = paint_tiles(("red",), ("ball",))[FIRST_OBJECT]
    cells = np.ndindex(frame.shape[0] // TILE, frame.shape[1] // TILE)
    found = [
        (row, column)
        for row, column in cells
        if np.array_equal(frame[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE], ball)
    ]
    assert len(found) == 1
    return found[0]


def bounced(before, now, size):
    """The move that follows two places in a row."""
    down, right = now[0] - before[0], now[1] - before[1]
    assert abs(down) + abs(right) == 1
    if not (0 <= now[0] + down < size and 0 <= now[1] + right < size):
        down, right = -down, -right
    return next(action for action, move in MOVES.items() if move == (down, right))


@pytest.mark.parametrize("kwargs", [{}, {"size": 2, "steps": 2}, {"size": 6, "steps": 9}])
def test_the_checkers_have_nothing_to_say(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(**kwargs).unwrapped)
    assert envs.check_vlm_env("manako/Track-v0", env_kwargs=kwargs) == []


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_two_frames_in_a_row_say_where_the_ball_goes(size):
    env = make(size=size)
    for seed in range(80):
        frames = [env.reset(seed=seed)[0]["image"]]
        action, total, terminated, steps = 0, 0.0, False, 0
        while not terminated:
            observation, reward, terminated, truncated, info = env.step(action)
            steps, total = steps + 1, total + reward
            assert not truncated and reward == (1.0 if steps > 1 else 0.0)
            frames.append(observation["image"])
            action = bounced(place_in(frames[-2]), place_in(frames[-1]), size)
        assert steps == 6 and total == 5.0 and info["success"]


def test_its_expert_is_right_and_a_mistake_costs_the_success():
    env = make()
    for seed, wrong in itertools.product(range(30), (None, 1, 2, 5)):
        env.reset(seed=seed)
        paid = []
        for step in range(6):
            action = env.unwrapped.expert_action()
            _, reward, terminated, _, info = env.step((action + (step == wrong)) % 4)
            paid.append(reward)
        assert terminated and info["success"] == (wrong is None)
        assert paid == [0.0] + [-1.0 if step == wrong else 1.0 for step in range(1, 6)]


def test_whoever_sees_one_frame_at_a_time_never_succeeds():
    """The best answer to each cell, of all 4^16: no cell's answer serves both ways through it."""
    env = make()
    routes = set()
    for seed in range(400):
        frame, route = env.reset(seed=seed)[0]["image"], []
        for step in range(6):
            place, direction = place_in(frame), env.unwrapped.expert_action()
            route += [(place, direction)] * (step > 0)
            frame = env.step(0)[0]["image"]
        routes.add(tuple(route))
    assert len(routes) == 2 * 4 * 6  # rows and columns, and where on the way there and back one begins
    for route in routes:  # a cell that is passed both ways within the judged steps
        directions = {}
        for place, direction in route:
            directions.setdefault(place, set()).add(direction)
        assert max(map(len, directions.values())) == 2


def test_what_is_said_changes_nothing_that_is_shown():
    one, other = make(), make()
    for seed in range(20):
        shown = [one.reset(seed=seed)[0]["image"], other.reset(seed=seed)[0]["image"]]
        assert np.array_equal(*shown)
        for step in range(6):
            assert np.array_equal(one.step(step % 4)[0]["image"], other.step(3 - step % 4)[0]["image"])


def test_starts_are_equally_likely_and_named_in_words():
    env = make()
    seen = set()
    for seed in range(300):
        frame = env.reset(seed=seed)[0]["image"]
        seen.add((place_in(frame), env.unwrapped.expert_action()))
        assert env.unwrapped.caption().startswith("red ball at ")
    assert {place for place, _ in seen} == set(itertools.product(range(4), range(4)))
    inner = {direction for place, direction in seen if place == (1, 2)}
    assert inner == set(MOVES)


@pytest.mark.parametrize(
    ("kwargs", "says"), [({"size": 1}, "size is 1"), ({"steps": 1}, "steps is 1"), ({"size": 2.5}, "size is 2.5")]
)
def test_what_cannot_be_played_is_refused(kwargs, says):
    with pytest.raises(envs.EnvError, match=f"{says}, expected a whole number from 2 on"):
        envs.make_vlm_env("manako/Track-v0", env_kwargs=kwargs)
