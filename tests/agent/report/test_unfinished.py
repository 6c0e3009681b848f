"""An evaluation that is stopped at any step goes on from there, and ends with what one that nobody stopped gives."""

from pathlib import Path

import pytest

from manako.agent.report.evaluation import evaluate_all
from manako.agent.report.unfinished import Unfinished, policy_digest
from manako.envs import held_out_seeds
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import color_env, corridor_env


def evaluation(make_env, file: Path, stop_at: int | None, sample: bool = False, most_steps: int | None = None):
    """Returns all rows and how many steps of theirs were asked for; None where it was stopped before their end."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_at

    env = make_env(num_envs=3)
    policy = tiny_policy(env)
    kept = Unfinished(file, {"policy": policy_digest(policy), "sample": sample}, stop)
    try:
        return evaluate_all(policy, env, held_out_seeds(6), sample, most_steps=most_steps, kept=kept), asked
    except KeyboardInterrupt:
        return None, asked


@pytest.mark.parametrize(
    ("make_env", "sample", "most_steps", "stop_at"), [(color_env, True, None, 3), (corridor_env, False, 40, 8)]
)
def test_stopped_again_and_again_it_gives_the_same(make_env, sample, most_steps, stop_at, tmp_path):
    whole, steps = evaluation(make_env, tmp_path / "whole", None, sample, most_steps)
    file, total, stops = tmp_path / "parts", 0, 0
    for _ in range(100):
        parts, asked = evaluation(make_env, file, stop_at, sample, most_steps)  # a few steps at a time
        total += asked
        stops += parts is None
        if parts is not None:
            break
    assert parts == whole
    assert stops > 1 and total == steps + stops  # no step was played twice but the one at which it was stopped


def test_that_of_another_policy_is_not_read(tmp_path):
    file = tmp_path / "file"
    evaluation(color_env, file, 3)
    assert Unfinished(file, {"policy": "another"}).found is False
    env = color_env(3)
    assert Unfinished(file, {"policy": policy_digest(tiny_policy(env)), "sample": False}).found


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_a_damaged_file_begins_anew(content, tmp_path):
    (tmp_path / "file").write_text(content)
    kept = Unfinished(tmp_path / "file", {"seed": 1})
    assert not kept.found and not kept.rows


def test_it_is_written_by_the_clock_too(tmp_path, monkeypatch):
    monkeypatch.setattr("manako.agent.report.unfinished.SECONDS", 0.0)
    env = color_env(3)
    policy, rows = tiny_policy(env), []

    def killed(row, result):
        rows.append(row)
        raise MemoryError

    kept = Unfinished(tmp_path / "file", {})
    with pytest.raises(MemoryError):
        evaluate_all(policy, env, held_out_seeds(8), done=killed, kept=kept)
    assert list(Unfinished(tmp_path / "file", {}).rows) == rows == ["policy"]
