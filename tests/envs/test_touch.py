"""Touch: played by looking at its pictures and reading its instructions alone, the way a policy must."""

import collections
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from manako import envs
from manako.envs.captions import caption_of, place_name
from manako.envs.experts import make_expert
from manako.envs.tiles import COLORS, FIRST_OBJECT, SHAPES, TILE, paint_tiles

SETTINGS = [
    {},
    {"size": 5, "num_objects": 12, "touches": 7, "shapes": SHAPES},
    {"size": 2, "num_objects": 4, "touches": 4},
    {"size": 4, "num_objects": 1, "touches": 1, "colors": ("pink", "cyan")},
]


def make(**kwargs) -> gym.Env:
    return gym.make("manako/Touch-v0", render_mode="rgb_array", **kwargs)


def read_board(frame, colors, shapes):
    """Read the objects' cells off a frame."""
    names = list(COLORS)[:colors] if isinstance(colors, int) else list(colors)
    tiles = paint_tiles(names, shapes)
    kinds = [f"{color} {shape}" for shape in shapes for color in names]
    objects = {}
    for row, column in np.ndindex(frame.shape[0] // TILE, frame.shape[1] // TILE):
        patch = frame[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        number = next(n for n, tile in enumerate(tiles) if np.array_equal(tile, patch))
        if number >= FIRST_OBJECT:
            objects[kinds[number - FIRST_OBJECT]] = (row, column)
    return objects


def wanted_by(instruction: str) -> str:
    assert instruction.startswith("touch the ")
    return instruction.removeprefix("touch the ")


def looking(observation, env, **kwargs):
    """The objects on the frame, and the action that the instruction asks for."""
    objects = read_board(observation["image"], kwargs.get("colors", 4), kwargs.get("shapes", ("ball",)))
    row, column = objects[wanted_by(observation["instruction"])]
    return objects, env.unwrapped.action_names.index(f"row {row + 1}, column {column + 1}")


@pytest.mark.parametrize("kwargs", SETTINGS)
def test_gymnasium_checker_has_nothing_to_say(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(**kwargs).unwrapped)


@pytest.mark.parametrize("kwargs", SETTINGS)
def test_our_checker_finds_no_fault(kwargs):
    assert envs.check_vlm_env("manako/Touch-v0", env_kwargs=kwargs) == []


@pytest.mark.parametrize("kwargs", SETTINGS)
def test_it_is_solved_by_looking_and_reading_and_by_its_expert(kwargs):
    env = make(**kwargs)
    own = env.unwrapped
    asked = collections.Counter()
    for seed in range(60):
        observation, info = env.reset(seed=seed)
        expert = make_expert(env, "manako/Touch-v0")
        assert info == {"success": False}
        for touch in range(1, own.touches + 1):
            objects, action = looking(observation, env, **kwargs)
            asked[action] += 1
            assert len(objects) == own.num_objects - touch + 1
            other = own.alternative_instruction()
            assert (other is None) == (len(objects) == 1)
            assert other is None or (other != observation["instruction"] and wanted_by(other) in objects)
            assert action == expert(None)
            places = {f"{kind} at {place_name(*cell, own.size, own.size)}" for kind, cell in objects.items()}
            said = caption_of(env, "manako/Touch-v0")
            assert len(said) == len(", ".join(places) + ".") and all(place in said for place in places)
            observation, reward, terminated, truncated, info = env.step(action)
            last = touch == own.touches
            assert (reward, terminated, truncated, info) == (1.0, last, False, {"success": last})
    assert len(asked) == own.size**2
    assert max(asked.values()) < 0.4 * sum(asked.values())  # no constant answer does well


def test_any_other_cell_ends_the_episode():
    env = make()
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        _, action = looking(observation, env)
        for wrong in set(range(9)) - {action}:
            for before in (0, 1):
                observation, _ = env.reset(seed=seed)
                if before:
                    observation = env.step(action)[0]
                if wrong == looking(observation, env)[1]:
                    continue
                after, reward, terminated, truncated, info = env.step(wrong)
                assert (reward, terminated, truncated, info) == (-1.0, True, False, {"success": False})
                assert np.array_equal(after["image"], observation["image"])


def test_the_frame_or_the_instruction_alone_is_not_enough():
    """What is asked for is any object of the frame, and any cell of the board, alike."""
    env = make()
    by_text, ranks = collections.defaultdict(collections.Counter), collections.Counter()
    for seed in range(900):
        observation, _ = env.reset(seed=seed)
        objects, action = looking(observation, env)
        by_text[observation["instruction"]][action] += 1
        ranks[sorted(objects.values()).index(divmod(action, 3))] += 1
    for cells in by_text.values():
        assert len(cells) == 9 and max(cells.values()) < 0.2 * sum(cells.values())  # 1 / 9, and chance
    assert len(ranks) == 4 and max(ranks.values()) < 0.3 * 900  # 1 / 4, and chance


def test_random_play_succeeds_as_often_as_it_computes():
    """Without objects to tell apart chance is (1 / cells) ** touches."""
    env = make(size=2, num_objects=3, touches=2)
    rng, wins, games = np.random.default_rng(0), 0, 4000
    for seed in range(games):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, ended, _, info = env.step(int(rng.integers(4)))
        wins += info["success"]
    assert abs(wins / games - 1 / 16) < 4 * (1 / 16 * 15 / 16 / games) ** 0.5


def test_all_chance_comes_from_the_seed():
    runs = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)
        env = make()
        runs.append(
            [(seen["image"].tobytes(), seen["instruction"]) for seen in (env.reset(seed=s)[0] for s in range(9))]
        )
    assert runs[0] == runs[1] and len(set(runs[0])) == 9


def test_render_shows_the_observation_and_neither_is_drawn_over():
    env = make()
    observation, _ = env.reset(seed=3)
    kept = observation["image"].copy()
    env.render()[:] = 0
    after = env.step(env.unwrapped.expert_action())[0]
    assert np.array_equal(observation["image"], kept) and not np.array_equal(after["image"], kept)
    assert np.array_equal(env.render(), after["image"])


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"size": 1}, "size is 1, expected a whole number from 2 on"),
        ({"size": 2.5}, "size is 2.5"),
        ({"num_objects": 0}, "num_objects is 0"),
        ({"touches": 0}, "touches is 0"),
        ({"touches": True}, "touches is True"),
        ({"touches": 5}, "touches is 5, and there are 4 objects to name"),
        ({"num_objects": 5}, "at most 4 fit"),
        ({"size": 2, "num_objects": 5, "colors": 8}, "at most 4 fit: the board has 4 cells"),
        ({"colors": ("red", "octarine")}, "octarine"),
        ({"shapes": ("ball", "cone")}, "cone"),
    ],
)
def test_it_refuses_what_cannot_be_drawn(kwargs, says):
    with pytest.raises(envs.EnvError, match=says):
        envs.make_vlm_env("manako/Touch-v0", env_kwargs=kwargs)
