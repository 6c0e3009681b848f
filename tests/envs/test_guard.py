"""Environments that return and raise what they must not: each is a sentence with its place, in runs and checks."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from manako.envs import EnvError
from manako.envs.check import check_vlm_env
from manako.envs.guard import space_check
from manako.envs.observation import VLMObservation

ROOT = Path(__file__).parents[2]
CHOICE = gym.spaces.Discrete(2)
BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
STEP = (0, 1.0, False, False, {})


class Rude(gym.Env):
    """Does `act()` in the third step, or where `where` says so; `act` returns what the step returns."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Discrete(2)
    action_names, instruction = ("left", "right"), "behave"

    def __init__(self, act=None, where="step", space=CHOICE, render_mode="rgb_array"):
        self.act, self.where, self.observation_space, self.render_mode = act, where, space, render_mode
        self.inside = np.zeros(2, np.float32) if space is BOX else space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.act() if self.where == "reset" else (self.inside, {})

    def step(self, action):
        self.steps += 1
        if self.where == "step" and self.steps == 3:
            return self.act()
        return self.inside, 1.0, False, self.steps == 5, {}

    def render(self):
        if self.where == "render" and self.steps == 3:
            self.act()
        return np.full((16, 16, 3), 50 * self.steps, np.uint8)


gym.register("Rude-v0", Rude)


class OwnError(BaseException):
    """No Exception."""


class Unspeakable(Exception):
    """Cannot even be shown."""

    def __str__(self):
        raise ValueError("no")

    __repr__ = __str__


def throw(error):
    raise error


def deep():
    return deep()


FAULTS = {
    "text as reward": (lambda: (0, "1.0", False, False, {}), "gave the reward '1.0' of type str, expected a number"),
    "no reward": (lambda: (0, None, False, False, {}), "gave the reward None, expected a number"),
    "complex reward": (lambda: (0, 1j, False, False, {}), "gave the reward 1j of type complex"),
    "rewards": (lambda: (0, np.ones(2), False, False, {}), "gave the reward array"),
    "text as flag": (lambda: (0, 1.0, "no", False, {}), "gave 'no' of type str as terminated, expected True or False"),
    "flags": (lambda: (0, 1.0, False, np.zeros(2, bool), {}), r"gave array\(\[False, False\]\) .*as truncated"),
    "no flag": (lambda: (0, 1.0, None, False, {}), "gave None as terminated"),
    "no info": (lambda: (0, 1.0, False, False, None), "gave None as info, expected a dict"),
    "text as success": (
        lambda: (0, 1.0, True, False, {"success": "no"}),
        r"gave 'no' of type str as info\['success'\]",
    ),
    "four values": (
        lambda: (0, 1.0, True, {}),
        r"else than \(observation, reward, terminated, truncated, info\).*got 4",
    ),
    "no tuple": (lambda: None, r"something else than \(observation, reward"),
    "another choice": (lambda: (7, 1.0, False, False, {}), r"it is 7, which is not in Discrete\(2\)"),
    "exit as if well": (lambda: sys.exit(0), r"broke in step\(\) with SystemExit: 0"),
    "its own Ctrl-C": (lambda: throw(KeyboardInterrupt()), r"broke in step\(\) with KeyboardInterrupt"),
    "its own kind": (lambda: throw(OwnError("a b")), r"broke in step\(\) with OwnError: a b"),
    "no memory": (lambda: throw(MemoryError()), r"broke in step\(\) with MemoryError"),
    "no end": (deep, r"broke in step\(\) with RecursionError"),
    "unspeakable": (lambda: throw(Unspeakable()), r"broke in step\(\) with Unspeakable"),
    "another folder": (lambda: os.chdir("/") or STEP, "changed the working directory to '/'"),
}
PLACE = r"\(slot 4, episode seed 11, step 3, action 'right'\)$"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_is_a_sentence_with_its_place_in_a_run_and_in_a_check(fault):
    act, message = FAULTS[fault]
    before = os.getcwd()
    env = VLMObservation(Rude(act))
    env.slot = 4
    env.reset(seed=11)
    env.step(1), env.step(1)
    with pytest.raises(EnvError, match=f"^Rude .*{message}.*{PLACE}"):
        env.step(1)
    found = check_vlm_env("Rude-v0", env_kwargs={"act": act}, steps=20)
    assert [text for text in found if not text.startswith("warning")] and not any("\n" in text for text in found)
    assert os.getcwd() == before


@pytest.mark.parametrize("reward", [1, np.float32(1), np.int8(1), np.bool_(True), np.array(1.0), np.array([1.0])])
def test_what_is_a_number_and_a_flag_is_taken(reward):
    env = VLMObservation(Rude(lambda: (0, reward, np.bool_(False), np.True_, {})))
    env.reset(seed=1)
    env.step(0), env.step(0)
    assert env.step(0)[1:4] == (1.0, False, True)


OBSERVATIONS = {
    "shape": (BOX, np.zeros(3, np.float32), r"has the shape \(3,\), expected \(2,\)"),
    "no array": (BOX, [0.0, 0.0], r"is \[0.0, 0.0\] of type list, expected an array of float32"),
    "NaN": (BOX, np.array([0, np.nan], np.float32), "holds nan, which is not within the bounds"),
    "bounds": (BOX, np.array([0, 2], np.float32), "holds 2.0"),
    "kind": (gym.spaces.Box(0, 255, (2, 2), np.uint8), np.zeros((2, 2)), "is an array of float64, expected uint8"),
    "characters": (gym.spaces.Text(9), "a b", "is a text with ' ', which is not among the space's charset"),
    "length": (gym.spaces.Text(3), "abcd", "is a text of 4 characters, expected 1 to 3"),
    "no text": (gym.spaces.Text(3), 3, "is 3, expected a text"),
    "of a dict": (gym.spaces.Dict(a=BOX), {"a": np.zeros(3)}, r"of 'a' has the shape \(3,\)"),
    "a key": (gym.spaces.Dict(a=BOX), {"b": 1}, "lacks 'a'"),
    "no dict": (gym.spaces.Dict(a=BOX), None, "is None, expected a dict with 'a'"),
    "of a tuple": (gym.spaces.Tuple([BOX]), (np.ones(1),), r"of place 0 has the shape \(1,\)"),
    "choices": (
        gym.spaces.MultiDiscrete([2, 3], start=[1, 0]),
        np.array([1, 3]),
        r"is array\(\[1, 3\]\) .*MultiDiscrete",
    ),
    "too few": (gym.spaces.MultiDiscrete([2, 3]), np.array([1]), r"is array\(\[1\]\) .*not in MultiDiscrete"),
    "flags": (gym.spaces.MultiBinary(2), np.array([0, 2]), r"is array\(\[0, 2\]\) .*not in MultiBinary"),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_an_observation_outside_its_space(kind):
    space, wrong, message = OBSERVATIONS[kind]
    env = VLMObservation(Rude(lambda: (wrong, 1.0, False, False, {}), space=space))
    env.reset(seed=11)
    env.step(1), env.step(1)
    with pytest.raises(EnvError, match=rf"outside its observation_space: it {message}.*episode seed 11, step 3"):
        env.step(1)
    found = check_vlm_env("Rude-v0", env_kwargs={"act": lambda: (wrong, 1.0, False, True, {}), "space": space})
    assert any("outside its observation_space: it " in text for text in found)


def test_the_width_of_numbers_is_no_fault_and_large_arrays_are_looked_at_rarely():
    assert space_check(BOX)(np.zeros(2)) is None
    check = space_check(gym.spaces.Box(0, 1, (100, 100), np.float32))
    wrong = np.full((100, 100), 2.0, np.float32)
    assert sum(check(wrong) is not None for _ in range(640)) == 8 + 10


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: 0, r"else than \(observation, info\)"),
        (lambda: (0, {}, 1), r"else than \(observation, info\)"),
        (lambda: (0, None), "gave None as info"),
        (lambda: sys.exit(0), "SystemExit: 0"),
        (lambda: throw(KeyboardInterrupt()), "KeyboardInterrupt"),
    ],
)
def test_a_reset_that_returns_or_raises_something_else(act, message):
    with pytest.raises(EnvError, match=message):
        VLMObservation(Rude(act, where="reset"))
    assert len(check_vlm_env("Rude-v0", env_kwargs={"act": act, "where": "reset"})) == 1


def test_exit_where_it_draws_and_where_it_is_made():
    env = VLMObservation(Rude(lambda: sys.exit(3), where="render"))
    env.reset(seed=2)
    env.step(0), env.step(0)
    with pytest.raises(EnvError, match=r"its image from render\(\) with SystemExit: 3 \(episode seed 2, step 3"):
        env.step(0)
    gym.register("Leaves-v0", lambda **_: sys.exit(0))
    assert "SystemExit" in check_vlm_env("Leaves-v0")[0]


def test_a_closed_output_is_a_sentence_and_ours_goes_on():
    code = """
import sys
from manako.envs import EnvError
from manako.envs.observation import VLMObservation
from tests.envs.test_guard import STEP, Rude
env = VLMObservation(Rude(lambda: sys.stdout.close() or STEP))
env.reset(seed=2)
env.step(0), env.step(0)
try:
    env.step(0)
except EnvError as error:
    print("goes on", flush=True)
    print(error, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "closed the standard output" in done.stderr and "Traceback" not in done.stderr


def test_chance_that_others_share_is_told():
    def roll():
        random.random()
        return STEP

    found = check_vlm_env("Rude-v0", env_kwargs={"act": roll})
    assert any(text.startswith("warning: Rude-v0 changes the state of `random`") for text in found)


def test_the_users_ctrl_c_while_an_environment_runs_is_the_users():
    """Also where it lands in a handler of our own, whatever that raises."""

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000_000):
            pass
        return STEP

    env = VLMObservation(Rude(interrupted))
    for handler, raised in ((signal.default_int_handler, KeyboardInterrupt), (lambda *_: sys.exit(130), SystemExit)):
        before = signal.signal(signal.SIGINT, handler)
        try:
            env.reset(seed=1)
            env.step(0), env.step(0)
            with pytest.raises(raised):
                env.step(0)
        finally:
            signal.signal(signal.SIGINT, before)
