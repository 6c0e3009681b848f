"""Every episode ends: by the limit that an environment has, by the one that was given, or by ours."""

import contextlib

import gymnasium as gym
import numpy as np
import pytest

from manako.agent.report.evaluation import evaluate
from manako.envs import EnvError, EpisodeVectorEnv
from manako.envs.limits import DEFAULT_LIMIT, is_default
from manako.envs.making import make_raw_env
from manako.envs.settings import EnvSettings
from tests.helpers.small_envs import Corridor, tiny_policy


class Endless(Corridor):
    """Ends no episode, whatever is done."""

    def __init__(self, max_steps: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(length=9, render_mode=render_mode)
        if max_steps:
            self.max_steps = max_steps

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.place = min(max(self.place, 2), 6)
        place, reward, *_, info = super().step(action)
        return place, reward, False, self.steps == getattr(self, "max_steps", None), info

    def render(self) -> np.ndarray:
        frame = np.zeros((16, 36, 3), np.uint8)
        frame[:, 4 * self.place : 4 * self.place + 4] = 255
        return frame


gym.register("tests/Endless-v0", Endless)
gym.register("tests/Limited-v0", Endless, max_episode_steps=7)


def lengths(steps: int, env_id: str = "tests/Endless-v0", **options) -> tuple[list[int], str]:
    """At which of the first steps an episode is truncated, and the limit in words; no episode is terminated."""
    found = []
    with contextlib.closing(EpisodeVectorEnv(env_id, 1, **options)) as env:
        env.reset()
        for step in range(1, steps + 1):
            result = env.step(np.array([step % 2]))
            assert not result.terminated[0]
            if result.truncated[0]:
                found.append(step)
                env.reset_done(result.truncated)
        return found, env.limit_from


def test_an_environment_without_a_limit_is_given_one():
    found, said = lengths(2 * DEFAULT_LIMIT + 1)
    assert found == [DEFAULT_LIMIT, 2 * DEFAULT_LIMIT]
    assert said.startswith("truncated after 1,000 steps, since the environment has no limit of its own")


@pytest.mark.parametrize(
    ("options", "expected", "said"),
    [
        ({"max_episode_steps": 5}, [5, 10, 15], "truncated after 5 steps"),
        ({"env_kwargs": {"max_episode_steps": 6}}, [6, 12], "truncated after 6 steps"),
        ({"env_id": "tests/Limited-v0"}, [7, 14], "truncated after 7 steps"),
        ({"env_id": "tests/Limited-v0", "max_episode_steps": 9}, [9], "truncated after 9 steps"),
        ({"env_kwargs": {"max_steps": 4}}, [4, 8, 12, 16], "ended by the environment itself"),
    ],
)
def test_whose_limit_holds(options, expected, said):
    found, words = lengths(17, **options)
    assert found == expected and words.startswith(said)


def test_a_larger_count_of_its_own_goes_first():
    found, said = lengths(1201, env_kwargs={"max_steps": 1200})
    assert found == [1200] and said == "ended by the environment itself, truncated after 1,200 steps at most"


def test_two_limits_that_differ_are_refused():
    with pytest.raises(
        EnvError, match=r"env_kwargs for tests/Endless-v0 has max_episode_steps 6, and max_episode_steps"
    ):
        lengths(1, env_kwargs={"max_episode_steps": 6}, max_episode_steps=5)


def test_what_a_recording_says_makes_the_same_environment():
    settings = EnvSettings("tests/Endless-v0", env_kwargs={"max_steps": 99}, max_episode_steps=5)
    assert settings.made_with == {"max_steps": 99, "max_episode_steps": 5}
    assert EnvSettings().made_with is None
    env = make_raw_env("tests/Endless-v0", settings.made_with)
    assert not is_default(env) and is_default(make_raw_env("tests/Endless-v0"))


def test_a_greedy_policy_that_goes_in_circles_is_evaluated():
    env = EpisodeVectorEnv("tests/Endless-v0", 2, max_episode_steps=11)
    played = evaluate(tiny_policy(env), env, [2, 4, 6])
    assert [episode.length for episode in played.episodes] == [11, 11, 11]


@pytest.mark.parametrize("reward", [1e300, 1e38, -2e15, float("inf"), float("nan")])
def test_rewards_that_overflow_are_named_by_env_slot_seed_and_step(reward, monkeypatch):
    monkeypatch.setattr(Endless, "step", lambda self, action: (0, reward, False, False, {}))
    with contextlib.closing(EpisodeVectorEnv("tests/Endless-v0", 2, first_slot=6)) as env:
        env.reset(seeds=[8, 10])
        with pytest.raises(EnvError) as error:
            env.step(np.array([1, 0]))
    text = str(error.value)
    assert f"gave the reward {reward}, expected a finite number up to 1e+15" in text
    assert "tests/Endless-v0" in text and "slot 6, episode seed 8, step 1" in text


def test_close_that_fails_is_only_warned_of(monkeypatch, caplog):
    def broken(self):
        raise RuntimeError("no way out")

    monkeypatch.setattr(Endless, "close", broken)
    env = EpisodeVectorEnv("tests/Endless-v0", 3)
    env.close()
    env.close()
    text = caplog.text
    assert text.count("broke in close() with RuntimeError: no way out (slot 0") == 1 and text.count("3 of 3") == 1
