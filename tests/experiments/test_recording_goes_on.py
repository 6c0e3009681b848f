"""A recording that is stopped, or broken off by a fault, goes on with the same command and ends as it would have."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.data.under_way import UnderWay
from manako.agent.errors import TrainingError
from manako.envs import EpisodeVectorEnv
from manako.envs.faults import fault_of
from manako.experiments import collect
from manako.policies.interface import PolicySpec
from tests.experiments.test_run_ppo import run


@pytest.fixture
def words(tmp_path):
    """Settings of a recording into a folder of that name."""

    def of(name: str, **settings) -> list[str]:
        given = {"env": "manako/GoTo-v0", "output": tmp_path / name, "episodes": 12, "num_envs": 4, "num_steps": 4}
        given |= {"player": "policy", "policy": "tiny", "torch_threads": 1, **settings}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    return of


def content(folder: Path) -> list[dict]:
    return list(load_from_disk(str(folder)))


def at_rollout(number: int, happens: Callable[[], object], patch) -> list[int]:
    """Lets something happen before that rollout of a start; returns which ones are played."""
    plays, played = RolloutCollector.collect, []

    def played_or_not(self, iteration):
        played.append(iteration)
        if len(played) == number:
            happens()
        return plays(self, iteration)

    patch.setattr(RolloutCollector, "collect", played_or_not)
    return played


def breaks() -> None:
    raise OSError("the cable was pulled")


def test_it_goes_on_after_a_fault_and_after_a_signal(words, tmp_path, monkeypatch, capfd):
    assert run(words("whole"), monkeypatch, collect.main) == 0
    with monkeypatch.context() as patch:
        at_rollout(3, breaks, patch)
        assert run(words("parts"), patch, collect.main) == 1
    out, err = capfd.readouterr()
    assert "episodes are kept in" in out and "the same command goes on from there" in out
    assert err.count("\n") == 1 and "error: OSError: the cable was pulled; the traceback is in " in err
    assert "in breaks" in (tmp_path / "parts.under_way" / "error.txt").read_text()
    assert not (tmp_path / "parts").exists()

    with monkeypatch.context() as patch:
        played = at_rollout(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert run(words("parts"), patch, collect.main) == 130
    assert played == [2, 3, 4]
    assert run(words("parts", num_steps=5), monkeypatch, collect.main) == 2
    assert "num_steps was 4, and is 5" in capfd.readouterr().err
    assert run(words("parts"), monkeypatch, collect.main) == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize(
    "settings",
    [{"player": "expert", "error_rate": 0.4}, {"env": "manako/Spell-v0", "action_format": "text", "episodes": 4}],
)
def test_words_and_experts_are_kept_too(settings, words, tmp_path, monkeypatch):
    assert run(words("whole", **settings), monkeypatch, collect.main) == 0
    with monkeypatch.context() as patch:
        at_rollout(2, breaks, patch)
        assert run(words("parts", **settings), patch, collect.main) == 1
    assert run(words("parts", **settings), monkeypatch, collect.main) == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["0.npz", "state.json"])
def test_what_is_damaged_is_refused_and_left(name, words, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at_rollout(2, breaks, patch)
        assert run(words("parts"), patch, collect.main) == 1
    file = tmp_path / "parts.under_way" / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]):
        file.write_bytes(damaged)
        assert run(words("parts"), monkeypatch, collect.main) == 2
        assert "parts.under_way" in capfd.readouterr().err and file.read_bytes() == damaged
    file.write_bytes(whole)
    with pytest.raises(TrainingError, match="is of a recording with other settings"):
        UnderWay(file.parent, {"env": "another"})


def test_failed_episodes_and_faults_come_back(tmp_path):
    """What an episode that was given up leaves in a rollout: without it the episode would count as played."""
    env = EpisodeVectorEnv("manako/GoTo-v0", 2)
    player = RandomPlayer(PolicySpec(env.action_names, env.frame_shape))
    rollout = RolloutCollector(env, player, 3, 0, record=True).collect(0)
    failed = torch.tensor([[False, False], [False, True], [False, False]])
    rollout = rollout._replace(failed=failed, faults=[fault_of(1, 7, 2, True, RuntimeError("the motor broke"))])
    kept = UnderWay(tmp_path / "kept", {})
    kept.add(rollout, env.state_dict())
    kept.write()
    again = UnderWay(tmp_path / "kept", {}).rollouts[0]
    assert torch.equal(again.failed, failed) and torch.equal(again.rewards, rollout.rewards)
    assert [fault._asdict() for fault in again.faults] == [fault._asdict() for fault in rollout.faults]
