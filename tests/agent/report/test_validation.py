"""The best policy of a training: where it is evaluated, which one is kept by the rule, and what a crash leaves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from manako.agent.checkpoint import verify_folder
from manako.agent.errors import NotFiniteError
from manako.agent.report.callbacks import (
    CheckpointCallback,
    MetricsCallback,
    checkpoints,
    is_validation,
    read_metrics,
    set_aside,
)
from manako.agent.report.validation import RULE, BestPolicy, Place, find_best, is_better
from tests.helpers.small_runs import difference, make_trainer, weights

SAMPLES = 32  # of an iteration


def said(success: float | None, returned: float) -> dict:
    return {"success": success, "return_mean": returned, "episodes": 10}


@pytest.mark.parametrize(
    ("one", "earlier", "better"),
    [
        ((0.6, 0.0), (0.5, 9.0), True),  # success first
        ((0.4, 9.0), (0.5, 0.0), False),
        ((0.5, 0.2), (0.5, 0.1), True),  # then the return
        ((0.5, 0.1), (0.5, 0.2), False),
        ((0.5, 0.1), (0.5, 0.1), False),  # then the earlier one
        ((None, 0.2), (None, 0.1), True),  # nobody says what a success is
        ((None, 0.1), (None, 0.1), False),
        ((0.1, 0.2), (None, 0.1), True),  # not all were judged
        ((None, 0.1), (0.9, 0.2), False),
    ],
)
def test_the_rule(one, earlier, better):
    assert is_better(said(*one), said(*earlier)) is better


def training(run_dir, outcomes, every=64, num_iterations=6, resume=None):
    """A training whose evaluations find what `outcomes` say of each iteration; returns what was heard, and it."""
    trainer = make_trainer(run_dir / ".staging", num_iterations=num_iterations, num_ppo_epochs=1)
    metrics, saver = MetricsCallback(run_dir), CheckpointCallback(trainer, run_dir, every=100, keep=9)
    heard = []

    def play():
        torch.rand(7)  # chance of the process
        found = outcomes[trainer.iteration]
        if isinstance(found, BaseException):
            raise found
        return said(*found)

    place = Place("iteration", "env_steps", lambda number: number * SAMPLES)
    best = BestPolicy(saver, play, run_dir, every, place, lambda: num_iterations, metrics.append, heard.append)
    for callback in (metrics, saver, best):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        saver.restore_signals()
        metrics.board.close()
    return heard, trainer


def validations(run_dir):
    return [row for row in read_metrics(run_dir) if is_validation(row)]


def test_the_best_of_a_training_is_kept_and_each_evaluation_is_a_row(tmp_path):
    outcomes = {2: (0.5, 0.1), 4: (0.7, 0.0), 6: (0.6, 0.9)}
    heard, trainer = training(tmp_path, outcomes)
    assert [(looked.place["iteration"], looked.is_best) for looked in heard] == [(2, True), (4, True), (6, False)]
    rows = validations(tmp_path)
    assert [(row["iteration"], row["env_steps"], row["validation/success"]) for row in rows] == [
        (2, 64, 0.5),
        (4, 128, 0.7),
        (6, 192, 0.6),
    ]
    assert [row["iteration"] for row in read_metrics(tmp_path) if not is_validation(row)] == list(range(1, 7))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    verify_folder(tmp_path / "best")
    assert find_best(tmp_path) == {"rule": RULE, "iteration": 4, "env_steps": 128, "validation": said(0.7, 0.0)}
    kept, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "checkpoints/checkpoint-4"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert not all(torch.equal(kept[name], tensor) for name, tensor in trainer.policy.vlm.state_dict().items())


@pytest.mark.parametrize(
    ("every", "iterations"), [(1, [1, 2, 3, 4, 5]), (32, [1, 2, 3, 4, 5]), (48, [2, 3, 5]), (70, [3, 5]), (999, [5])]
)
def test_where_it_is_evaluated(every, iterations, tmp_path):
    """After the first iterations that fill another `every` steps of 32 each, and after the last."""
    outcomes = {number: (0.5, float(number)) for number in range(1, 6)}
    heard, _ = training(tmp_path, outcomes, every, num_iterations=5)
    assert [looked.place["iteration"] for looked in heard] == iterations


def test_a_training_learns_the_same_with_evaluations_and_without(tmp_path):
    """Although each draws from the process's chance, as a library or an environment may."""
    one = training(tmp_path / "one", {n: (0.1, float(n)) for n in range(1, 7)}, every=32)[1]
    state = torch.get_rng_state()
    other = make_trainer(tmp_path / "other", num_iterations=6, num_ppo_epochs=1)
    other.train()
    assert difference(weights(one.policy), weights(other.policy)) == 0
    assert torch.equal(state, torch.get_rng_state())


def test_an_evaluation_that_did_not_end_is_played_by_the_next_start(tmp_path):
    """Its checkpoint is there, its row is not; in the end all is as in a training in one piece."""
    outcomes = {2: (0.5, 0.1), 4: (0.7, 0.0), 6: (0.7, 0.0)}
    training(tmp_path / "whole", outcomes)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "parts", {**outcomes, 4: KeyboardInterrupt()})
    assert [row["iteration"] for row in validations(tmp_path / "parts")] == [2]
    newest = checkpoints(tmp_path / "parts")[-1]
    assert newest.name == "checkpoint-4" and find_best(tmp_path / "parts")["iteration"] == 2
    training(tmp_path / "parts", outcomes, resume=newest)

    def all_but_times(folder):
        return [
            {name: value for name, value in row.items() if "seconds" not in name and "second" not in name}
            for row in read_metrics(folder)
        ]

    assert all_but_times(tmp_path / "parts") == all_but_times(tmp_path / "whole")
    assert find_best(tmp_path / "parts") == find_best(tmp_path / "whole")
    assert find_best(tmp_path / "parts")["iteration"] == 4


def test_the_last_evaluation_is_played_although_nothing_is_left_to_train(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, {2: (0.5, 0.1), 4: KeyboardInterrupt()}, num_iterations=4)
    heard, trainer = training(tmp_path, {4: (0.9, 0.1)}, num_iterations=4, resume=checkpoints(tmp_path)[-1])
    assert [looked.place["iteration"] for looked in heard] == [4] and trainer.iteration == 4
    assert find_best(tmp_path)["iteration"] == 4


def test_a_start_that_was_killed_between_best_and_its_row_counts_once(tmp_path):
    outcomes = {2: (0.5, 0.1), 4: (0.7, 0.0)}
    training(tmp_path, outcomes, num_iterations=4)
    before = (tmp_path / "best" / "model.safetensors").stat()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "validation/success" in lines[-1]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    heard, _ = training(tmp_path, outcomes, num_iterations=4, resume=checkpoints(tmp_path)[-1])
    assert [looked.is_best for looked in heard] == [True]
    assert [row["iteration"] for row in validations(tmp_path)] == [2, 4]
    assert (tmp_path / "best" / "model.safetensors").stat().st_ino == before.st_ino  # it was whole, and stays


def test_what_an_older_checkpoint_repeats_does_not_replace_the_best(tmp_path):
    """The newest checkpoint was damaged: best/ is of an iteration that comes again."""
    outcomes = {2: (0.5, 0.1), 4: (0.7, 0.0), 6: (0.6, 0.0)}
    training(tmp_path, outcomes)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
    set_aside(tmp_path, 2)
    heard, _ = training(tmp_path, outcomes, resume=tmp_path / "checkpoints/checkpoint-2")
    assert [(looked.place["iteration"], looked.is_best) for looked in heard] == [(4, True), (6, False)]
    assert find_best(tmp_path)["iteration"] == 4


def test_weights_that_are_no_numbers_are_no_policy(tmp_path):
    trainer = make_trainer(tmp_path / ".staging", num_iterations=1, num_ppo_epochs=1)
    saver = CheckpointCallback(trainer, tmp_path, every=1)
    place = Place("iteration", "env_steps", lambda number: number * SAMPLES)
    best = BestPolicy(saver, lambda: said(1.0, 1.0), tmp_path, 1, place, lambda: 1, [].append, [].append)
    trainer.iteration = 1
    with torch.no_grad():
        next(trainer.policy.parameters()).fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="The weights are not finite in iteration 1"):
        best.on_save(None, None, None)
    assert not (tmp_path / "best").exists()


def test_a_damaged_best_is_set_aside_and_said(tmp_path, capsys):
    training(tmp_path, {2: (0.5, 0.1)}, num_iterations=2)
    (tmp_path / "best" / "validation.json").write_text(json.dumps({"iteration": 1}))
    assert find_best(tmp_path) is None and not (tmp_path / "best").exists()
    assert "best is damaged (validation.json is cut short" in capsys.readouterr().out
    assert (tmp_path / "damaged-best" / "model.safetensors").is_file()
    assert find_best(tmp_path / "nowhere") is None
