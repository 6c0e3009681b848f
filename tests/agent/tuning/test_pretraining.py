"""An architecture's own losses in the Trainer and in run_sft.py: what is logged, what stays, what is refused."""

import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from manako.agent.data.trajectories import save_trajectories
from manako.agent.errors import TrainingError
from manako.agent.tuning.pretraining import PretrainingTrainer
from manako.experiments import run_sft
from manako.experiments.common.command_line import run_main
from manako.policies.trainable import part_of
from tests.helpers.small_envs import Corridor
from tests.helpers.small_runs import GOTO, expert_trajectories, goto_policy, weights


class Same(Corridor):
    """Says of every frame the same."""

    def caption(self):
        return "grey."


gym.register("tests/Same-v0", Same)
CAPTIONS = ["red ball at left.", "blue box at right."] * 4


def frames(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8))


def make_trainer(folder, trainable, **given):
    policy = goto_policy(policy="uniter", trainable=trainable)
    options = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(output_dir=str(folder / ".staging"), logging_nan_inf_filter=False, **options)
    policy.value_head.requires_grad_(False)
    return policy, PretrainingTrainer(policy, policy.pretraining("align"), args, frames(8), CAPTIONS, folder, **given)


@pytest.mark.parametrize("trainable", ["full", "adapter"])
def test_a_step_changes_what_learns_and_the_heads_and_logs_every_loss(trainable, tmp_path):
    policy, trainer = make_trainer(tmp_path, trainable)
    before, heads = weights(policy.vlm), trainer.model.matching[0].weight.detach().clone()
    trainer.train()
    changed = {
        part_of(name, policy.parts) for name, value in weights(policy.vlm).items() if (value != before[name]).any()
    }
    assert changed == ({"encoder", "adapter", "language_model"} if trainable == "full" else {"adapter"})
    assert not torch.equal(heads, trainer.model.matching[0].weight)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows == trainer.rows
    assert all(row["loss"] == pytest.approx(row["masked_words"] + row["matching"], rel=1e-4) for row in rows)
    assert not policy.vlm.training and not (tmp_path / ".staging").exists()


def test_the_adapter_has_its_own_learning_rate(tmp_path):
    policy, trainer = make_trainer(tmp_path, "full", adapter_learning_rate=1e-30)
    before = weights(policy)
    trainer.train()
    after = weights(policy)
    assert torch.equal(before["vlm.model.adapter.proj.weight"], after["vlm.model.adapter.proj.weight"])
    assert not torch.equal(before["vlm.lm_head.weight"], after["vlm.lm_head.weight"])


def test_a_loss_that_is_not_finite_stops(tmp_path):
    _, trainer = make_trainer(tmp_path, "full")
    torch.nn.init.constant_(trainer.model.matching[2].weight, torch.nan)
    with pytest.raises(TrainingError, match="The loss is not finite at step 1: expected a number"):
        trainer.train()


# ---- the command -----------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, **given):
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run_sft.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(run_sft.main)
    return ended.value.code, *capsys.readouterr()


def test_align_says_what_it_measured_before_and_after_and_cloning_goes_on(tmp_path, monkeypatch, capsys):
    given = {"stage": "align", "policy": "vilbert", "env": GOTO, "captions": 16, "batch_size": 8}
    monkeypatch.setattr("manako.experiments.common.sft_training.MEASURED_FRAMES", 16)
    code, out, error = run(monkeypatch, capsys, **given, output_dir=tmp_path / "align")
    assert code == 0, error
    report = json.loads((tmp_path / "align/report.json").read_text())
    assert report["held_out"]["frames"] == 16 and report["examples"] == 16
    assert set(report["held_out"]["before"]) == set(report["held_out"]["after"])
    assert "16 frames of held-out episodes, before -> after:" in out
    matched = [report["held_out"][when]["matching"] for when in ("before", "after")]
    assert f"  {'matching':26} {matched[0]:.3f} -> {matched[1]:.3f}" in out
    assert report["trained_parameters"] > 300_000  # auto stands for everything
    assert not any("matching" in name for name in weights(goto_policy(policy=str(tmp_path / "align/final"))))


def test_blip2_from_representation_by_alignment_to_acting(tmp_path, monkeypatch, capsys):
    """Each stage begins with what the one before it wrote, and teaches what the paper says."""
    monkeypatch.setattr("manako.experiments.common.sft_training.MEASURED_FRAMES", 8)
    save_trajectories(expert_trajectories(2, 4, 0.0, "expert"), tmp_path / "data")
    given = {"env": GOTO, "captions": 8, "batch_size": 4}
    act = {
        "stage": "instruct",
        "dataset": tmp_path / "data",
        "loss": "actions",
        "trainable": "full",
        "eval_episodes": 0,
    }
    stages = {
        "represent": {**given, "policy": "blip2"},
        "align": {**given, "policy": tmp_path / "represent", "trainable": "adapter"},
        "instruct": {**act, "policy": tmp_path / "align", "batch_size": 4, "gif_episodes": 0},
    }
    found = {"start": weights(goto_policy(policy="blip2").vlm)}
    for stage, words in stages.items():
        code, _, error = run(monkeypatch, capsys, **{"stage": stage, **words}, output_dir=tmp_path / stage)
        assert code == 0, error
        found[stage] = weights(goto_policy(policy=str(tmp_path / stage / "final")).vlm)
    for before, after, still in (("start", "represent", ".proj."), ("represent", "align", None)):
        moved = {name for name in found[after] if not torch.equal(found[before][name], found[after][name])}
        assert moved and all(name.startswith("model.adapter.") for name in moved)
        assert not still or not any(still in name for name in moved)
    assert not torch.equal(found["align"]["lm_head.weight"], found["instruct"]["lm_head.weight"])
    report = json.loads((tmp_path / "represent/report.json").read_text())["held_out"]
    assert set(report["after"]) == {
        "caption of a frame",
        "frame of a caption",
        "matching",
        "words",
        "words, other frame",
    }
    lines = [json.loads(line) for line in (tmp_path / "represent/metrics.jsonl").open()]
    assert all({"contrast", "matching", "words"} <= set(line) for line in lines) and len(lines) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"stage": "represent", "policy": "vilbert"},
            "--stage represent came, but VilbertForMaskedLM of --policy vilbert learns nothing by itself before a "
            "language model reads it: expected --stage align, or an architecture with such a stage.",
        ),
        ({"stage": "represent", "policy": "tiny"}, "--stage represent came, but ManakoForConditionalGeneration of"),
        ({"stage": "align", "policy": "uniter", "env": "tests/Corridor-v0"}, "says nowhere what its frames show"),
        ({"stage": "align", "policy": "uniter", "env": "tests/Same-v0"}, "captions say 'grey.': expected an"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(given, message, tmp_path, monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, **{"captions": 8, **given}, output_dir=tmp_path / "out")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
