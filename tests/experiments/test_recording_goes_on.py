"""A recording that is stopped, or whose environment breaks, goes on with the same command and ends as it would have."""

import json
import os
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from datasets import load_from_disk

from manako.agent.collector import RolloutCollector
from manako.agent.data.under_way import UnderWay
from manako.agent.errors import TrainingError
from manako.experiments import collect
from tests.experiments.test_run_ppo import run


class Flaky(gym.Env):
    """Walks to the right end; breaks from the step of that number on, while a file is there."""

    metadata = {"render_modes": ["rgb_array"]}
    action_names, mission, steps = ("left", "right"), "walk right", 0
    observation_space, action_space = gym.spaces.Discrete(6), gym.spaces.Discrete(2)

    def __init__(self, fault: str = "", at: int = 0, render_mode: str | None = None) -> None:
        self.fault, self.at, self.render_mode, self.place = Path(fault or "/nowhere"), at, render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(4))
        return self.place, {}

    def step(self, action):
        Flaky.steps += 1
        if Flaky.steps >= self.at and self.fault.exists():
            raise RuntimeError("the motor broke")
        self.place = max(self.place + 2 * int(action) - 1, 0)
        return self.place, float(self.place == 5), self.place == 5, False, {}

    def expert_action(self):
        return 1

    def render(self):
        frame = np.zeros((8, 24, 3), np.uint8)
        frame[:, 4 * self.place : 4 * self.place + 4] = 200
        return frame


gym.register("tests/Flaky-v0", Flaky, max_episode_steps=30)


@pytest.fixture
def words(tmp_path):
    """Settings of a recording into a folder of that name."""

    def of(name: str, **settings) -> list[str]:
        kwargs = json.dumps({"fault": str(tmp_path / "fault"), "at": 60})
        given = {"env": "tests/Flaky-v0", "env_kwargs": kwargs, "output": tmp_path / name, "episodes": 12}
        given |= {"num_envs": 4, "num_steps": 4, "player": "policy", "policy": "tiny", "torch_threads": 1, **settings}
        Flaky.steps = 0
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    return of


def content(folder: Path) -> list[dict]:
    return list(load_from_disk(str(folder)))


def test_it_goes_on_after_an_environment_that_broke_and_after_a_signal(words, tmp_path, monkeypatch, capfd):
    assert run(words("whole"), monkeypatch, collect.main) == 0
    (tmp_path / "fault").touch()
    assert run(words("parts"), monkeypatch, collect.main) == 1
    out, err = capfd.readouterr()
    assert "episodes are kept in" in out and "the same command goes on from there" in out
    assert err.count("\n") == 1 and "the motor broke (slot" in err and "episode seed" in err
    assert not (tmp_path / "parts").exists()
    (tmp_path / "fault").unlink()

    plays, calls = RolloutCollector.collect, []

    def interrupted(self, iteration):
        calls.append(iteration)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plays(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutCollector, "collect", interrupted)
        assert run(words("parts"), patch, collect.main) == 130
    assert calls[0] > 0, "it began again"
    assert run(words("parts", num_steps=5), monkeypatch, collect.main) == 2  # other settings
    assert "num_steps was 4, and is 5" in capfd.readouterr().err
    assert run(words("parts"), monkeypatch, collect.main) == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_an_experts_word_and_its_errors_are_kept_too(words, tmp_path, monkeypatch):
    settings = {"player": "expert", "error_rate": 0.4, "num_steps": 3}
    assert run(words("whole", **settings), monkeypatch, collect.main) == 0
    (tmp_path / "fault").touch()
    assert run(words("parts", **settings), monkeypatch, collect.main) == 1
    (tmp_path / "fault").unlink()
    assert run(words("parts", **settings), monkeypatch, collect.main) == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["identity.json", "0.npz", "state.json"])
def test_what_is_damaged_is_refused_and_left(name, words, tmp_path, monkeypatch, capfd):
    (tmp_path / "fault").touch()
    assert run(words("parts"), monkeypatch, collect.main) == 1
    file = tmp_path / "parts.under_way" / name
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        assert run(words("parts"), monkeypatch, collect.main) == 2
        assert "cannot be gone on with" in capfd.readouterr().err and file.read_bytes() == damaged
    with pytest.raises(TrainingError, match="is of a recording with other settings"):
        file.write_bytes(whole)
        UnderWay(file.parent, {"env": "another"})
