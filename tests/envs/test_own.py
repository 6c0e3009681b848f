"""GoTo and ColorMatch: played by looking at their pictures alone, the way a policy must."""

import collections
import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from manako import envs
from manako.envs.tiles import AGENT, COLORS, FIRST_OBJECT, SHAPES, TILE, draw, paint_tiles

MOVES = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}  # up, down, left, right


def make(env_id: str, **kwargs) -> gym.Env:
    return gym.make(env_id, render_mode="rgb_array", **kwargs)


def read_board(frame, colors=4, shapes=("ball",)):
    """Read the agent's cell and the objects' cells off a frame."""
    names = list(COLORS)[:colors]
    tiles = paint_tiles(names, shapes)
    kinds = [f"{color} {shape}" for shape in shapes for color in names]
    agent, objects = None, {}
    for row, column in np.ndindex(frame.shape[0] // TILE, frame.shape[1] // TILE):
        patch = frame[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        number = next(n for n, tile in enumerate(tiles) if np.array_equal(tile, patch))
        if number == AGENT:
            agent = (row, column)
        elif number >= FIRST_OBJECT:
            objects[kinds[number - FIRST_OBJECT]] = (row, column)
    return agent, objects


def shortest_path(agent, objects, wanted, size):
    """The actions of a shortest way to `wanted` that touches no other object; None without a way."""
    blocked = set(objects.values()) - {objects[wanted]}
    queue, seen = collections.deque([(agent, [])]), {agent}
    while queue:
        (row, column), path = queue.popleft()
        if (row, column) == objects[wanted]:
            return path
        for action, (down, right) in MOVES.items():
            place = (row + down, column + right)
            if place not in seen and place not in blocked and min(place) >= 0 and max(place) < size:
                seen.add(place)
                queue.append((place, [*path, action]))
    return None


def wanted_by(instruction: str) -> str:
    assert instruction.startswith("go to the ")
    return instruction.removeprefix("go to the ")


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("manako/GoTo-v0", {}),
        ("manako/GoTo-v0", {"size": 5, "num_objects": 6, "colors": 3, "shapes": ("ball", "box", "key"), "shaping": 0}),
        ("manako/GoTo-v0", {"size": 2, "num_objects": 1, "colors": ("pink", "cyan")}),
        ("manako/ColorMatch-v0", {}),
        ("manako/ColorMatch-v0", {"size": 5, "colors": 8}),
    ],
)
def test_gymnasium_checker_has_nothing_to_say(env_id, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id, **kwargs).unwrapped)


@pytest.mark.parametrize("env_id", ["manako/GoTo-v0", "manako/ColorMatch-v0"])
def test_all_chance_comes_from_the_seed(env_id):
    runs = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)
        env = make(env_id)
        frames = [env.reset(seed=seed)[0] for seed in range(20)]
        runs.append([(frame["image"].tobytes(), frame["instruction"]) for frame in frames])
    assert runs[0] == runs[1]
    assert len({frame for frame, _ in runs[0]}) > 5


@pytest.mark.parametrize("env_id", ["manako/GoTo-v0", "manako/ColorMatch-v0"])
def test_render_shows_the_observation_and_neither_is_drawn_over(env_id):
    env = make(env_id)
    observation, _ = env.reset(seed=3)
    kept = observation["image"].copy()
    assert np.array_equal(env.render(), observation["image"])
    env.render()[:] = 0
    after = env.step(1)[0]
    assert np.array_equal(observation["image"], kept)
    assert np.array_equal(env.render(), after["image"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"size": 6, "num_objects": 4, "colors": 8},
        {"size": 3, "num_objects": 8, "shapes": SHAPES},
        {"size": 2, "num_objects": 3},
        {"size": 4, "num_objects": 12, "colors": 4, "shapes": SHAPES},
    ],
)
def test_goto_is_solved_by_looking_and_reading(kwargs):
    env = make("manako/GoTo-v0", **{"shaping": 0.0, **kwargs})
    size, shapes = env.unwrapped.size, kwargs.get("shapes", ("ball",))
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        agent, objects = read_board(observation["image"], kwargs.get("colors", 4), shapes)
        assert len(objects) == env.unwrapped.num_objects
        for instruction in (observation["instruction"], env.unwrapped.alternative_instruction()):
            if instruction is not None:
                assert shortest_path(agent, objects, wanted_by(instruction), size) is not None
        path = shortest_path(agent, objects, wanted_by(observation["instruction"]), size)
        assert len(path) <= 3 * size
        for action in path[:-1]:
            _, reward, terminated, truncated, info = env.step(action)
            assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
        _, reward, terminated, truncated, info = env.step(path[-1])
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_goto_punishes_another_object():
    env = make("manako/GoTo-v0", shaping=0.0)
    seen = 0
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        agent, objects = read_board(observation["image"])
        other = wanted_by(env.unwrapped.alternative_instruction())
        assert other in objects and other != wanted_by(observation["instruction"])
        for action in shortest_path(agent, objects, other, 3):
            _, reward, terminated, _, info = env.step(action)
        assert (reward, terminated, info["success"]) == (-1.0, True, False)
        seen += 1
    assert seen == 30


def test_goto_needs_the_instruction_on_equal_frames():
    """On one frame, the first step that solves one instruction fails the other."""
    env = make("manako/GoTo-v0", size=2, colors=2, shaping=0.0)
    by_frame = collections.defaultdict(dict)
    for seed in range(200):
        observation, _ = env.reset(seed=seed)
        by_frame[observation["image"].tobytes()][observation["instruction"]] = seed
    pairs = [tuple(seeds.values()) for seeds in by_frame.values() if len(seeds) == 2]
    decided = 0
    for first, second in pairs:
        for action in MOVES:
            env.reset(seed=first)
            reward = env.step(action)[1]
            env.reset(seed=second)
            assert env.step(action)[1] == -reward  # both move alike; what it is worth depends on the words
            decided += reward > 0
    assert decided > 5


def test_goto_shaping_pays_for_progress():
    env = make("manako/GoTo-v0", size=4, num_objects=1, shaping=0.2)
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        agent, objects = read_board(observation["image"])
        target = objects[wanted_by(observation["instruction"])]
        if agent[0] in (0, 3) or abs(agent[0] - target[0]) < 2:
            continue
        towards, away = (0, 1) if target[0] < agent[0] else (1, 0)
        assert env.step(towards)[1] == pytest.approx(0.2, abs=1e-9)
        assert env.step(away)[1] == pytest.approx(-0.2, abs=1e-9)
        break
    else:
        pytest.fail("no board with room for the test")
    env.reset(seed=0)
    total, terminated = 0.0, False
    agent, objects = read_board(env.render())
    target = next(iter(objects.values()))
    for action in shortest_path(agent, objects, next(iter(objects)), 4):
        _, reward, terminated, _, _ = env.step(action)
        total += reward
    assert terminated
    distance = abs(agent[0] - target[0]) + abs(agent[1] - target[1])
    assert total == pytest.approx(1 + 0.2 * distance, abs=1e-9)


def test_goto_border_clamps_and_the_step_limit_follows_the_size():
    for size in (2, 3, 5):
        env = make("manako/GoTo-v0", size=size, num_objects=1, shaping=0.2)
        for seed in range(100):
            observation, _ = env.reset(seed=seed)
            agent, _ = read_board(observation["image"])
            if agent[0] == 0:
                break
        for step in range(1, 3 * size + 1):
            after, reward, terminated, truncated, _ = env.step(0)
            assert np.array_equal(after["image"], observation["image"])
            assert (reward, terminated, truncated) == (0.0, False, step == 3 * size)


def test_goto_without_a_second_object_has_no_alternative():
    env = make("manako/GoTo-v0", num_objects=1)
    env.reset(seed=0)
    assert env.unwrapped.alternative_instruction() is None


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"size": 1}, "size is 1"),
        ({"size": 2.5}, "size is 2.5"),
        ({"num_objects": 0}, "num_objects is 0"),
        ({"num_objects": 5}, "at most 4 fit"),
        ({"size": 2, "num_objects": 4}, "at most 3 fit"),
        ({"colors": 1}, "colors is 1"),
        ({"colors": 9}, "colors is 9"),
        ({"colors": ("red", "octarine")}, "octarine"),
        ({"colors": ("red", "red")}, "different names"),
        ({"shapes": ("ball", "cone")}, "cone"),
        ({"shapes": ()}, "at least 1"),
        ({"shaping": -1}, "shaping is -1"),
        ({"shaping": float("nan")}, "shaping is nan"),
    ],
)
def test_goto_refuses_what_cannot_be_drawn(kwargs, says):
    with pytest.raises(envs.EnvError, match=says):
        envs.make_vlm_env("manako/GoTo-v0", env_kwargs=kwargs)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"size": 1}, "size is 1"), ({"colors": ["mauve", "red"]}, "mauve"), ({"answers": 0}, "answers is 0")],
)
def test_color_match_refuses_what_cannot_be_drawn(kwargs, says):
    with pytest.raises(envs.EnvError, match=says):
        envs.make_vlm_env("manako/ColorMatch-v0", env_kwargs=kwargs)


def test_color_match_is_solved_by_looking_only():
    env = make("manako/ColorMatch-v0")
    names = env.unwrapped.action_names
    answers, cells = collections.Counter(), set()
    for seed in range(300):
        frame = env.reset(seed=seed)[0]["image"]  # (24, 24, 3)
        rows, columns = np.nonzero(frame.any(axis=2))
        assert len(rows) == TILE * TILE
        color = next(name for name in names if COLORS[name] == tuple(frame[rows[0], columns[0]].tolist()))
        answers[color] += 1
        cells.add((rows[0], columns[0]))
        wrong = (names.index(color) + 1) % 4
        for action, reward in ((names.index(color), 1.0), (wrong, 0.0)):
            env.reset(seed=seed)
            after, got, terminated, truncated, info = env.step(action)
            assert (got, terminated, truncated, info["success"]) == (reward, True, False, reward == 1.0)
            assert np.array_equal(after["image"], frame)
    assert len(cells) == 9
    assert max(answers.values()) < 300 * 0.33  # no constant answer does well


def test_color_match_shows_the_square_once_where_it_is_named_several_times():
    env = make("manako/ColorMatch-v0", answers=3)
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        color = env.unwrapped.expert_action()
        assert observation["image"].any()
        for wrong in (None, 0, 2):
            env.reset(seed=seed)
            for step in range(3):
                observation, reward, terminated, _, info = env.step((color + (step == wrong)) % 4)
                assert not observation["image"].any() and reward == float(step != wrong)
                assert terminated == (step == 2) and info["success"] == (terminated and wrong is None)
        assert env.unwrapped.caption() == "a dark board."


def test_colors_by_name_set_the_actions():
    env = envs.make_vlm_env("manako/ColorMatch-v0", env_kwargs={"colors": ["pink", "cyan", "red"]})
    assert env.action_names == ("pink", "cyan", "red")


def test_every_tile_is_told_apart():
    tiles = paint_tiles(tuple(COLORS), SHAPES).astype(int)
    for one, other in itertools.combinations(tiles, 2):
        assert (np.abs(one - other).max(axis=2) > 40).sum() >= 4  # pixels


def test_a_board_is_drawn_tile_by_tile():
    tiles = paint_tiles(("red", "blue"), ("ball",))
    frame = draw(tiles, np.array([[0, 1, 0], [2, 0, 3]]))
    assert frame.shape == (16, 24, 3) and frame.flags.c_contiguous
    assert np.array_equal(frame[:8, 8:16], tiles[1])
    assert np.array_equal(frame[8:, :8], tiles[2])
    assert np.array_equal(frame[8:, 16:], tiles[3])


def test_experts_say_what_they_see():
    env = make("manako/GoTo-v0", size=3, num_objects=1)
    env.reset(seed=0)
    inner = env.unwrapped
    inner.agent, inner.target, inner.instruction = (0, 0), (2, 1), "go to the red ball"
    assert inner.expert_thought() == "cross top left, red ball bottom middle"
    env = make("manako/ColorMatch-v0", answers=2)
    env.reset(seed=0)
    color = env.unwrapped.action_names[env.unwrapped.expert_action()]
    assert env.unwrapped.expert_thought().startswith(f"{color} square at ")
    env.step(0)
    assert env.unwrapped.expert_thought() == "a dark board"
