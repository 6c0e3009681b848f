"""BabyAI and MiniGrid levels as a policy sees them, beside MiniGrid's own."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from manako import envs
from manako.envs.babyai import HELD_OUT, NAMES
from manako.envs.babyai_mixed import TASKS

MIXED = "manako/MixedLocal-v0"


def make(**kwargs) -> gym.Env:
    return gym.make("manako/BabyAI-v0", render_mode="rgb_array", disable_env_checker=True, **kwargs).unwrapped


def own(level: str, **kwargs) -> gym.Env:
    """The same level without anything of ours; asking for it imports minigrid."""
    envs.making.find_spec(level)
    return gym.make(level, render_mode="rgb_array", disable_env_checker=True, **kwargs)


def play(env: gym.Env, most: int = 10_000):
    """Plays the bot's actions; returns the rewards and the last step."""
    rewards: list[float] = []
    while True:
        observation, reward, terminated, truncated, info = env.step(env.expert_action())
        rewards.append(reward)
        if terminated or truncated or len(rewards) == most:
            return rewards, (observation, terminated, truncated, info)


@pytest.mark.parametrize("kwargs", [{}, {"view": "map"}, {"level": MIXED, "missions": "train"}])
def test_the_checkers_have_nothing_to_say(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(**kwargs), skip_render_check=True)
    assert envs.check_vlm_env("manako/BabyAI-v0", env_kwargs=kwargs) == []


@pytest.mark.parametrize(
    ("level", "tile"),
    [
        ("BabyAI-GoToLocal-v0", 8),
        ("BabyAI-UnlockLocal-v0", 6),
        ("MiniGrid-LavaGapS7-v0", 8),
        ("MiniGrid-DoorKey-6x6-v0", 12),
    ],
)
@pytest.mark.parametrize("view", ["agent", "map"])
def test_frames_rewards_and_ends_are_minigrids_own(level, tile, view):
    """The frame equals MiniGrid's own render of the same state, whatever is done, carried, opened or seen."""
    env, plain = make(level=level, tile_size=tile, view=view), own(level, tile_size=tile, agent_pov=view == "agent")
    rng, carried, opened = np.random.default_rng(0), False, False
    numbers = [list(NAMES.values()).index(name) for name in env.action_names]
    for seed in range(6):
        shown, said = env.reset(seed=seed), plain.reset(seed=seed)
        assert shown[0]["instruction"] == said[0]["mission"] and shown[1] == {"success": False}
        assert np.array_equal(shown[0]["image"], plain.render())
        for _ in range(60):
            by_bot = level.startswith("BabyAI-") and rng.random() < 0.8
            action = env.expert_action() if by_bot else int(rng.integers(len(numbers)))
            observation, *mine, info = env.step(action)
            _, *theirs, _ = plain.step(numbers[action])
            assert mine == theirs and info["success"] == (theirs[0] > 0)
            assert np.array_equal(observation["image"], plain.render()) and observation["image"].dtype == np.uint8
            raw = plain.unwrapped
            carried |= raw.carrying is not None
            opened |= any(cell is not None and cell.type == "door" and cell.is_open for cell in raw.grid.grid)
            if any(theirs[1:]):
                break
    assert level != "BabyAI-UnlockLocal-v0" or (carried and opened)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"level": "BabyAI-GoToRedBall-v0"},
        {"level": "BabyAI-GoToLocal-v0", "missions": "train"},
        {"level": "BabyAI-GoToDoor-v0", "missions": "held_out"},
        {"level": "BabyAI-PickupLoc-v0"},
        *({"level": MIXED, "level_kwargs": {"task": task}, "missions": "train"} for task in TASKS),
    ],
)
def test_the_bot_succeeds_and_a_success_is_what_minigrid_pays_for(kwargs):
    env, successes, count = make(**kwargs), 0, 50
    for seed in range(count):
        env.reset(seed=seed)
        rewards, (_, terminated, _, info) = play(env)
        assert not any(rewards[:-1]) and info["success"] == (rewards[-1] > 0)
        assert not info["success"] or (
            terminated and rewards[-1] == pytest.approx(1 - 0.9 * len(rewards) / env.max_steps)
        )
        successes += info["success"]
    assert successes >= 0.98 * count


def test_a_mission_that_fails_is_no_success_and_running_out_of_steps_is_a_truncation():
    env, rng = make(level="BabyAI-OpenDoorDebug-v0"), np.random.default_rng(0)  # opening another door fails it
    ends = set()
    for seed in range(60):
        env.reset(seed=seed)
        terminated = truncated = False
        info: dict = {}
        while not (terminated or truncated):
            # a door that is in front is opened
            action = 5 if rng.random() < 0.3 else int(rng.choice(3, p=[0.15, 0.15, 0.7]))
            _, reward, terminated, truncated, info = env.step(action)
            assert info["success"] == (reward > 0)
        ends.add((terminated, info["success"]))
    assert {(True, True), (True, False)} <= ends
    env = make(level=MIXED, level_kwargs={"task": "pickup"})
    env.reset(seed=0)
    steps = [env.step(0) for _ in range(64)]
    assert [step[3] for step in steps] == [False] * 63 + [True] and not any(step[2] for step in steps)
    assert not any(step[4]["success"] for step in steps)


def test_an_episode_is_its_seeds_and_the_unseeded_one_after_it_is_another():
    for kwargs in ({"missions": "train"}, {"missions": "held_out"}, {"level": MIXED, "missions": "train"}):
        one, other = make(**kwargs), make(**kwargs)
        other.reset(seed=99)
        for seed in range(20):
            (a, _), (b, _) = one.reset(seed=seed), other.reset(seed=seed)
            assert a["instruction"] == b["instruction"] and np.array_equal(a["image"], b["image"])
        again = [one.reset()[0]["image"].tobytes() for _ in range(10)]
        assert len(set(again)) > 5


@pytest.mark.parametrize("kwargs", [{}, {"level": "BabyAI-GoToDoor-v0"}, {"level": MIXED}])
def test_training_never_names_a_held_out_pair_and_the_held_out_missions_always_do(kwargs):
    def missions(which):
        env = make(missions=which, **kwargs)
        return [env.reset(seed=seed)[0]["instruction"] for seed in range(300)]

    named = {
        which: [sum(pair in text for pair in HELD_OUT) for text in missions(which)]
        for which in ("train", "all", "held_out")
    }
    assert not any(named["train"]) and all(named["held_out"])
    assert 0.05 < np.mean(np.array(named["all"]) > 0) < 0.6  # so leaving them out leaves something out
    plain, filtered = missions("all"), missions("train")
    kept = [(a, b) for a, b, names in zip(plain, filtered, named["all"], strict=True) if not names]
    assert all(a == b for a, b in kept)  # a mission that may be trained is the same with and without the filter


def test_other_pairs_can_be_held_out_and_what_does_not_exist_is_refused():
    env = make(level="BabyAI-GoToObj-v0", missions="held_out", held_out=["blue box"])
    assert {env.reset(seed=seed)[0]["instruction"] for seed in range(10)} == {"go to the blue box"}
    with pytest.raises(
        envs.EnvError, match="none of 1,000 missions of BabyAI-GoToRedBallNoDists-v0 names yellow box or"
    ):
        make(level="BabyAI-GoToRedBallNoDists-v0", missions="held_out").reset(seed=0)


def test_actions_have_balrogs_names_in_minigrids_order_and_only_the_kept_ones():
    assert make().action_names == ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
    assert make(level="MiniGrid-DoorKey-5x5-v0").action_names[-1] == "done"
    env = make(level="MiniGrid-DoorKey-5x5-v0", actions=("toggle", "left", "forward"))
    assert env.action_names == ("turn left", "go forward", "toggle")
    env.reset(seed=0)
    before = env._level.agent_dir
    env.step(0)
    assert env._level.agent_dir == (before - 1) % 4


def test_another_instruction_names_another_object_of_the_same_level():
    env = make()
    for seed in range(30):
        env.reset(seed=seed)
        other = env.alternative_instruction()
        cells = {f"{cell.color} {cell.type}" for cell in env._level.grid.grid if cell is not None}
        assert other is None or (
            other != env.instruction and other.removeprefix("go to the ").removeprefix("go to a ") in cells
        )
    assert make(level="MiniGrid-DoorKey-5x5-v0").alternative_instruction() is None


def test_the_bot_finds_its_way_back_from_wrong_actions():
    env, rng, successes = make(level=MIXED), np.random.default_rng(0), 0
    for seed in range(60):
        env.reset(seed=seed)
        terminated = truncated = False
        info = {"success": False}
        while not (terminated or truncated):
            action = env.expert_action()
            if rng.random() < 0.15:
                action = int(rng.integers(3))
            _, _, terminated, truncated, info = env.step(action)
        successes += info["success"]
    assert successes >= 57


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"view": "top"}, "view is 'top', expected agent or map"),
        ({"missions": "test"}, "missions is 'test', expected all or train or held_out"),
        ({"tile_size": 2}, "tile_size is 2, expected a whole number of pixels from 4 on"),
        ({"held_out": ["pink ball"]}, "expected pairs of a colour and an object"),
        ({"actions": ["left", "jump"]}, "expected different ones of left, right"),
        ({"actions": []}, "expected different ones of left, right"),
        ({"level": "BabyAI-GoToLokal-v0"}, "did you mean"),
        ({"level": "CartPole-v1"}, "CartPole-v1 is no level of MiniGrid or BabyAI"),
        ({"level_kwargs": {"rooms": 3}}, "could not be made with level_kwargs {'rooms': 3}"),
        ({"level": MIXED, "level_kwargs": {"task": "sing"}}, "task is 'sing', expected one of goto"),
        ({"level": MIXED, "level_kwargs": {"num_dists": -1}}, "num_dists is -1, expected a whole number"),
    ],
)
def test_what_cannot_be_played_is_refused(kwargs, says):
    with pytest.raises(envs.EnvError, match=says.replace("{", r"\{")):
        envs.make_vlm_env("manako/BabyAI-v0", env_kwargs=kwargs)


def test_a_level_without_a_bot_and_an_action_that_is_missing_say_so():
    env = make(level="MiniGrid-DoorKey-5x5-v0")
    env.reset(seed=0)
    with pytest.raises(envs.EnvError, match="has no expert: expected a level of BabyAI"):
        env.expert_action()
    env = make(level=MIXED, level_kwargs={"task": "pickup"}, actions=("left", "right", "forward"))
    env.reset(seed=0)
    with pytest.raises(envs.EnvError, match="wants 'pickup' for 'pick up .*: add it"):
        play(env)


@pytest.mark.parametrize("task", TASKS)
def test_balrogs_tasks_are_as_balrog_has_them(task):
    """By hand from BALROG's rules: objects, limits, sentences, and that all can be reached."""
    limit = 64 if task in ("goto", "pickup") else 128
    objects = {"goto": 1, "pickup": 1, "open": 1, "putnext": 2, "pick_up_seq_go_to": 2}[task]
    begins = {
        "goto": "go to the ",
        "pickup": "pick up the ",
        "open": "open ",
        "putnext": "put ",
        "pick_up_seq_go_to": "",
    }
    env, said = make(level=MIXED, level_kwargs={"task": task}, missions="train"), set()
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        level = env._level
        cells = [cell.type for cell in level.grid.grid if cell is not None and cell.type != "wall"]
        doors = cells.count("door")
        assert (len(cells) - doors, doors) == (objects, int(task == "open"))
        assert env.max_steps == limit and (level.width, level.height) == (15 if task == "open" else 8, 8)
        assert observation["instruction"].startswith(begins[task]) and observation["image"].shape == (56, 56, 3)
        said.add(observation["instruction"])
    if task == "open":
        assert "open the door" in said and "open the blue door" in said
        assert not any(color in text for text in said for color in ("red", "grey"))
    if task == "pick_up_seq_go_to":
        assert any(", then go to" in text for text in said) and any("after you pick up" in text for text in said)
