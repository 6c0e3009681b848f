"""What a run leaves while it goes on: metrics that survive a crash, checkpoints that are kept, cut and set aside."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manako.agent.checkpoint import verify_folder
from manako.agent.report.callbacks import (
    CheckpointCallback,
    MetricsCallback,
    checkpoints,
    cut_metrics,
    read_metrics,
    set_aside,
)
from manako.manifest import write_manifest
from manako.policies.errors import PolicyError
from tests.helpers.small_runs import difference, make_trainer, weights

STAGING = ".staging"


def folders(run_dir: Path, *names: str) -> None:
    for name in names:
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        (run_dir / "checkpoints" / name / "weights").write_text(name)


def run(run_dir: Path, every: int = 1, keep: int = 2, **settings):
    """A trainer with both callbacks, not yet trained."""
    trainer = make_trainer(run_dir / STAGING, **settings)
    trainer.add_callback(MetricsCallback(run_dir))
    saver = CheckpointCallback(trainer, run_dir, every, keep)
    trainer.add_callback(saver)
    return trainer, saver


def test_metrics_go_to_the_file_and_to_tensorboard(tmp_path):
    trainer, _ = run(tmp_path, num_iterations=3)
    trainer.train()
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3] and "epoch" not in rows[0]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("success_rate", "entropy", "approx_kl", "learning_rate"):
        events = board.Scalars(key)
        assert [event.step for event in events] == [32, 64, 96]
        assert [event.value for event in events] == pytest.approx([row[key] for row in rows])


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "env_steps": 8}\n{"iteration": 2, "env_')
    assert read_metrics(tmp_path) == [{"iteration": 1, "env_steps": 8}]
    cut_metrics(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1, "env_steps": 8}\n'


@pytest.mark.parametrize(
    "line", ["[1]", '{"iteration": 2}', '{"iteration": 2, "env_', "[" * 5_000, '{"a": ' + "9" * 5_000 + "}", "\x00"]
)
def test_another_line_that_is_no_row_is_left_out_and_said(line, tmp_path, capsys):
    """It is not the end of what is read, which lost all rows behind it."""
    good = [json.dumps({"iteration": iteration, "env_steps": 8 * iteration}) for iteration in (1, 3)]
    (tmp_path / "metrics.jsonl").write_text(f"{good[0]}\n{line}\n{good[1]}\n")
    cut_metrics(tmp_path, 5)
    assert "has lost the rows of 3 iterations, such as 2" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == good


def test_rows_past_the_checkpoint_are_cut(tmp_path):
    lines = [json.dumps({"iteration": iteration, "env_steps": 8 * iteration}) for iteration in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    cut_metrics(tmp_path, 3)
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    def log(iteration: int, value: float) -> None:
        callback = MetricsCallback(tmp_path)
        row = {"iteration": iteration, "env_steps": 10 * iteration, "entropy": value}
        callback.on_log(None, None, None, row)
        callback.on_train_end(None, None, None)

    for iteration in (1, 2, 3):
        log(iteration, 1.0)
    cut_metrics(tmp_path, 1)
    log(2, 5.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("entropy")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 5.0)]


def test_the_newest_checkpoints_are_kept_and_whole(tmp_path):
    trainer, _ = run(tmp_path, every=2, keep=2, num_iterations=7, num_ppo_epochs=1)
    trainer.train()
    kept = checkpoints(tmp_path)
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-7"]  # the last iteration is always saved
    for path in kept:
        verify_folder(path)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "rollout_state.json"} <= {
        path.name for path in kept[0].iterdir()
    }
    assert not list((tmp_path / STAGING).iterdir())


def test_checkpoints_are_ordered_by_number_and_others_left_alone(tmp_path):
    folders(tmp_path, "checkpoint-10", "checkpoint-9", "checkpoint-best", "damaged-checkpoint-3")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_damaged_checkpoints_are_set_aside(tmp_path):
    folders(tmp_path, "checkpoint-2", "checkpoint-4", "checkpoint-6", "damaged-checkpoint-6")
    assert [path.name for path in set_aside(tmp_path, 2)] == ["damaged-checkpoint-4", "damaged-checkpoint-6"]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "checkpoints/damaged-checkpoint-6/weights").read_text() == "checkpoint-6"


def test_a_first_signal_ends_the_iteration_and_saves(tmp_path, capfd):
    trainer, saver = run(tmp_path, every=100, num_iterations=5)
    before = signal.getsignal(signal.SIGTERM)
    collect = trainer.collector.collect

    def signalled(iteration):
        if iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(iteration)

    trainer.collector.collect = signalled
    trainer.train()
    assert saver.interrupted and trainer.iteration == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping at the end of this iteration" in capfd.readouterr().err


def test_a_second_signal_ends_at_once(tmp_path):
    trainer, saver = run(tmp_path, num_iterations=5)
    before = signal.getsignal(signal.SIGINT)
    collect = trainer.collector.collect

    def signalled(iteration):
        for _ in range(2 * (iteration == 1)):
            os.kill(os.getpid(), signal.SIGINT)
        return collect(iteration)

    trainer.collector.collect = signalled
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saver.restore_signals()
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    """A weight that silently does not load is an error: transformers' own loading goes on without it."""
    trainer, _ = run(tmp_path, num_iterations=1)
    trainer.train()
    (folder,) = checkpoints(tmp_path)
    description = json.loads((folder / "policy.json").read_text())
    description["learned_sha256"] = "0" * 64
    (folder / "policy.json").write_text(json.dumps(description))
    write_manifest(folder)
    again, _ = run(tmp_path / "again", num_iterations=2)
    with pytest.raises(PolicyError, match="are not the saved ones"):
        again.train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_brings_weights_optimizer_and_environments_back(tmp_path):
    trainer, _ = run(tmp_path, every=1, num_iterations=2)
    trainer.train()
    again, _ = run(tmp_path / "again", num_iterations=2)
    again.train(resume_from_checkpoint=str(checkpoints(tmp_path)[-1]))  # nothing is left to do but to load
    assert again.iteration == 2
    assert difference(weights(trainer.policy), weights(again.policy)) == 0
    assert again.collector.state_dict() == trainer.collector.state_dict()
    for one, other in zip(
        trainer.optimizer.state_dict()["state"].values(), again.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_logs_without_an_iteration_are_no_rows(tmp_path):
    callback = MetricsCallback(tmp_path)
    callback.on_log(None, SimpleNamespace(), None, {"train_runtime": 3.0})
    callback.on_log(None, SimpleNamespace(), None, None)
    callback.on_train_end(None, None, None)
    assert not (tmp_path / "metrics.jsonl").exists()
