"""What is taken for a picture: by its space, and by what a reset shows; frames that show nothing."""

import gymnasium as gym
import numpy as np
import pytest

from manako import envs
from manako.envs.check import check_vlm_env
from manako.envs.observation import VLMObservation
from manako.envs.settings import EnvSettings
from manako.experiments.common.environments import dead_frames

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 20, 3)).astype(np.uint8)


class Shows(gym.Env):
    """Observes an array under the bounds of a picture; renders colours."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Discrete(2)
    action_names, instruction = ("a", "b"), "look"

    def __init__(self, observed, key=None, render_mode="rgb_array"):
        self.observed, self.key, self.render_mode = observed, key, render_mode
        box = gym.spaces.Box(0, 255, observed.shape, np.uint8)
        self.observation_space = gym.spaces.Dict({key: box}) if key else box

    def observe(self):
        return {self.key: self.observed} if self.key else self.observed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 0.0, True, False, {}

    def render(self):
        return COLOURS


CODES = {
    "object codes": RNG.integers(0, 11, (16, 16, 3)).astype(np.uint8),
    "one-hot planes": np.eye(3, dtype=np.uint8)[RNG.integers(0, 3, (16, 16))],
    "a map of cells": RNG.integers(0, 4, (40, 40)).astype(np.uint8),
    "counts": RNG.integers(0, 32, (16, 16, 3)).astype(np.uint8),
}
PICTURES = {
    "colours": RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8),
    "a dark one with a light spot": np.pad(np.full((1, 1, 3), 200, np.uint8), ((0, 19), (0, 19), (0, 0))),
    "black at first": np.zeros((16, 16, 3), np.uint8),
    "black and white": (RNG.integers(0, 2, (16, 16)) * 255).astype(np.uint8),
}


@pytest.mark.parametrize("key", [None, "image"])
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_codes_are_no_picture(codes, key):
    env = VLMObservation(Shows(codes, key))
    assert env.image_from == "render()" and (env.reset()[0]["image"] == COLOURS).all()
    asked = VLMObservation(Shows(codes, key), image_source="observation")  # whoever knows better says so
    assert asked.image_from.startswith("observation")
    with pytest.raises(envs.EnvError, match=r"numbers up to 31, which looks like codes.*image_source observation"):
        VLMObservation(Shows(codes, key, render_mode=None))


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_pictures_are_pictures(picture):
    assert VLMObservation(Shows(picture)).image_from == "observation"


def test_minigrids_codes_of_a_whole_board():
    pytest.importorskip("minigrid")
    from minigrid.wrappers import FullyObsWrapper, RGBImgObsWrapper

    for size in (8, 16, 19):
        board = gym.make("MiniGrid-Empty-8x8-v0", render_mode="rgb_array", size=size)
        env = VLMObservation(FullyObsWrapper(board))
        assert env.image_from == "render()" and env.reset(seed=0)[0]["image"].max() > 31
    assert VLMObservation(RGBImgObsWrapper(gym.make("MiniGrid-Empty-8x8-v0"))).image_from == "observation['image']"


def test_check_env_knows(monkeypatch):
    gym.register("tests/Shows-v0", lambda render_mode=None: Shows(CODES["counts"], render_mode=render_mode))
    assert not [fault for fault in check_vlm_env("tests/Shows-v0") if "codes" in fault]
    faults = check_vlm_env("tests/Shows-v0", image_source="observation")
    assert not [fault for fault in faults if not fault.startswith("warning")]


def test_frames_that_show_nothing():
    black, other = np.zeros((4, 8, 8, 3), np.uint8), RNG.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    changing = black + np.arange(4, dtype=np.uint8)[:, None, None, None]  # another colour each: still dead
    for frames in (black, changing):
        assert "single colour in all of 4 frames" in dead_frames(EnvSettings("E"), frames, list("abcd"))
    assert "one frame and instruction 4 times" in dead_frames(EnvSettings("E"), other[[0] * 4], ["go"] * 4)
    assert dead_frames(EnvSettings("E"), other[[0] * 4], ["go", "stop"] * 2) is None
    assert dead_frames(EnvSettings("E"), other, ["go"] * 4) is None
    half = np.concatenate([black[:2], other[:2]])
    assert dead_frames(EnvSettings("E"), half, ["go"] * 4) is None
    assert dead_frames(EnvSettings("E", image_source="blank"), black, list("abcd")) is None


@pytest.mark.parametrize("observed", [PICTURES["colours"], CODES["counts"]], ids=["observed", "rendered"])
def test_black_frames_of_the_size_that_would_be_seen(observed):
    seen, blank = VLMObservation(Shows(observed)), VLMObservation(Shows(observed), image_source="blank")
    assert blank.frame_shape == seen.frame_shape and blank.image_from == f"black in place of {seen.image_from}"
    for env in (seen, blank):
        frames = [env.reset(seed=0)[0]["image"], env.step(0)[0]["image"]]
        assert all(frame.any() == (env is seen) for frame in frames)
    assert observed.any() and COLOURS.any()  # ours are black, theirs are not
    faults = check_vlm_env("tests/Shows-v0", image_source="blank") if "tests/Shows-v0" in gym.registry else []
    assert not [fault for fault in faults if not fault.startswith("warning")]
