"""What a run that ends badly keeps: its last good iteration, as a checkpoint that is any other's, byte by byte."""

import json
import time
from pathlib import Path

import pytest
import torch

from manako.agent.checkpoint import verify_folder
from manako.agent.errors import NotFiniteError
from manako.agent.report.callbacks import CheckpointCallback, Clock, checkpoints
from manako.envs import EnvError
from tests.helpers.small_runs import difference, make_trainer, weights


def trainer_of(run_dir: Path, every: int = 100, **settings):
    trainer = make_trainer(run_dir / ".staging", **{"num_iterations": 4, **settings})
    saver = CheckpointCallback(trainer, run_dir, every, keep=4)
    trainer.add_callback(saver)
    return trainer, saver


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Checkpoints of all four iterations."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder, every=1)[0].train()
    return folder


def fail(trainer, iteration: int, where: str, error: Exception) -> None:
    """Lets `error` come in that iteration: while it is played, in its third update, or from a callback at its end."""
    if where == "collect":
        collect = trainer.collector.collect

        def broken(number):
            rollout = collect(number)  # the environments have moved on
            if number == iteration:
                raise error
            return rollout

        trainer.collector.collect = broken
    elif where == "update":
        loss, calls = trainer.compute_loss, []

        def broken_loss(*args, **kwargs):
            calls.append(trainer.iteration)
            if trainer.iteration == iteration and calls.count(iteration) == 3:
                raise error
            return loss(*args, **kwargs)

        trainer.compute_loss = broken_loss
    else:
        log = trainer.log

        def broken_log(logs, start_time=None):
            log(logs, start_time)
            if trainer.iteration == iteration + 1:
                raise error

        trainer.log = broken_log


def end_badly(run_dir: Path, where: str, error: Exception, iteration: int = 2, **settings):
    trainer, saver = trainer_of(run_dir, **settings)
    fail(trainer, iteration, where, error)
    with pytest.raises(type(error)):
        trainer.train()
    saver.restore_signals()
    saver.keep_last(error)
    return trainer


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("collect", EnvError("broke")),
        ("update", NotFiniteError("nan")),
        ("update", MemoryError()),
        ("callback", OSError("disk")),
    ],
)
def test_the_last_iteration_is_kept_whatever_ends_a_run(where, error, undisturbed, tmp_path):
    end_badly(tmp_path, where, error)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    verify_folder(tmp_path / "checkpoints/checkpoint-2")
    one, other = undisturbed / "checkpoints/checkpoint-2", tmp_path / "checkpoints/checkpoint-2"
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for name in ("model.safetensors", "rollout_state.json", "scheduler.pt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other)]
    for state in states:
        for row in state["log_history"]:
            del row["rollout_seconds"], row["rollout_steps_per_second"]
    assert states[0] == states[1]
    if where == "collect":  # what goes on from it ends where the undisturbed run did
        resumed, _ = trainer_of(tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(other))
        last = "checkpoints/checkpoint-4/model.safetensors"
        assert (tmp_path / "again" / last).read_bytes() == (undisturbed / last).read_bytes()


def test_weights_that_broke_unseen_are_not_kept(tmp_path):
    """The third iteration's rollout is no number: what the second update left is broken, what the first left is not."""
    trainer, saver = trainer_of(tmp_path, every=1)
    fail(trainer, 2, "collect", NotFiniteError("nan"))
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    saver.restore_signals()
    saver.keep_last(error.value)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-1", "damaged-checkpoint-2"] and trainer.iteration == 1


def test_nothing_is_kept_of_nothing(tmp_path):
    end_badly(tmp_path, "update", NotFiniteError("nan"), iteration=0)
    assert not checkpoints(tmp_path)


def test_too_large_to_copy_an_update_is_lost_and_a_rollout_not(tmp_path, monkeypatch):
    monkeypatch.setattr("manako.agent.rescue.MOST_BYTES", 1000)
    end_badly(tmp_path / "update", "update", NotFiniteError("nan"))
    assert not checkpoints(tmp_path / "update")
    end_badly(tmp_path / "rollout", "collect", EnvError("broke"))
    assert [path.name for path in checkpoints(tmp_path / "rollout")] == ["checkpoint-2"]


def test_another_learning_rate_and_length_hold_when_a_run_goes_on(undisturbed, tmp_path):
    """Linear decay over 4 iterations of 4 updates from 1e-3; from the third on 2e-4 over 8."""
    resumed, _ = trainer_of(tmp_path, learning_rate=2e-4, num_iterations=8)
    rates: list[float] = []
    log = resumed.log
    resumed.log = lambda logs, start=None: (rates.append(logs.get("learning_rate")), log(logs, start))[1]
    resumed.train(resume_from_checkpoint=str(undisturbed / "checkpoints/checkpoint-2"))
    updates = resumed.state.global_step // 8
    expected = [2e-4 * (1 - (updates * (iteration + 1) - 1) / (8 * updates)) for iteration in range(2, 8)]
    assert [rate for rate in rates if rate is not None] == pytest.approx(expected)
    first = torch.load(undisturbed / "checkpoints/checkpoint-2/scheduler.pt", weights_only=True)
    assert first["base_lrs"] == [1e-3] * len(first["base_lrs"])


def test_a_prolonged_run_of_constant_rate_is_the_longer_one(tmp_path):
    short, _ = trainer_of(tmp_path / "short", num_iterations=2, lr_scheduler_type="constant")
    short.train()
    longer, _ = trainer_of(tmp_path / "longer", num_iterations=4, lr_scheduler_type="constant")
    longer.train(resume_from_checkpoint=str(tmp_path / "short/checkpoints/checkpoint-2"))
    whole, _ = trainer_of(tmp_path / "whole", num_iterations=4, lr_scheduler_type="constant")
    whole.train()
    assert difference(weights(longer.policy), weights(whole.policy)) == 0


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("manako.agent.report.callbacks.time.monotonic", lambda: now[0])
    clock = Clock(2)
    now[0] = 119
    assert not clock.due()
    now[0] = 120
    assert clock.due()
    now[0] = 150  # writing it took 30 s, so that the next is due after 600
    clock.saved(120)
    now[0] = 749
    assert not clock.due()
    now[0] = 750
    assert clock.due()


def test_the_clock_saves_what_the_number_of_iterations_does_not(tmp_path):
    trainer = make_trainer(tmp_path / ".staging", num_iterations=3)
    saver = CheckpointCallback(trainer, tmp_path, every=100, keep=2, minutes=1e-6)
    trainer.add_callback(saver)
    started = time.monotonic()
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]  # at once, and the last
    assert 0.01 < saver.clock.seconds < 20 * (time.monotonic() - started)
