"""SFT, DPO and KTO with TRL on policies: what learns, what stays bit for bit, and what other libraries load."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import ScriptedPlayer
from manako.agent.data.trajectories import save_trajectories, to_dataset
from manako.agent.errors import TrainingError
from manako.agent.tuning.forgetting import PROBES, measure_retention
from manako.agent.tuning.preferences import expert_pairs, pair_dataset, unpaired
from manako.agent.tuning.supervised import CAPTION_PROMPT, captions, check_tokens, demonstrated_actions, demonstrations
from manako.agent.tuning.trainers import (
    PolicyCloningTrainer,
    PolicyDPOTrainer,
    PolicyKTOTrainer,
    PolicySFTTrainer,
    frozen_copy,
)
from manako.envs import EpisodeVectorEnv
from manako.experiments import collect, run_dpo, run_ladder, run_sft
from manako.experiments.common.collecting import play_until
from manako.experiments.common.command_line import UsageError, run_main
from manako.experiments.common.ladder_report import compare_steps, print_report
from manako.policies import save_policy
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import corridor_env, difference, goto_policy, weights

ROOT, GOTO = Path(__file__).parents[3], "manako/GoTo-v0"
SMALL = {"eval_episodes": 4, "gif_episodes": 0}


def make_policy(trainable="full", policy="tiny"):
    return goto_policy(policy=str(policy), trainable=trainable)


def settings(folder, kind=SFTConfig, **given):
    defaults = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "max_length": None}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    defaults |= {"gradient_checkpointing": False, "bf16": False}
    return kind(output_dir=str(folder / ".staging"), **{**defaults, **given})


def played(num_envs, num_steps, error_rate, player):
    """What the scripted expert plays, as a dataset."""
    policy, env = make_policy(), EpisodeVectorEnv(GOTO, num_envs)
    expert = ScriptedPlayer(policy.spec, error_rate)
    collector = RolloutCollector(env, expert, num_steps, seed=0, record=True, ask_expert=True)
    return to_dataset([collector.collect(0)], policy, GOTO, player, {})


@pytest.fixture(scope="module")
def trajectories():
    return played(8, 8, 0.5, "expert, wrong 50%")


def parts(policy):
    """Copies of all parameters, by part."""
    found = {}
    for name, tensor in weights(policy).items():
        part = next(
            (part for part in ("lora", "value_head", "vision_tower", "original_module", "adapter") if part in name),
            "llm",
        )
        found.setdefault(part, {})[name] = tensor
    return found


def sft_trainer(loss, policy, trajectories, folder, **given):
    if loss == "actions":
        return PolicyCloningTrainer(policy, settings(folder, **given), demonstrated_actions(trajectories), folder)
    return PolicySFTTrainer(policy, settings(folder, **given), demonstrations(trajectories, policy), folder)


@pytest.mark.parametrize("loss", ["tokens", "actions"])
@pytest.mark.parametrize(
    ("trainable", "learns"),
    [("adapter", {"adapter"}), ("lora", {"lora", "adapter"}), ("full", {"adapter", "vision_tower", "llm"})],
)
def test_what_learns_changes_and_all_else_stays_bit_for_bit(trainable, learns, loss, trajectories, tmp_path):
    policy = make_policy(trainable)
    before = parts(policy)
    sft_trainer(loss, policy, trajectories, tmp_path).train()
    after = parts(policy)
    moved = {part for part in before if difference(before[part], after[part]) > 0}
    assert moved == learns
    assert not policy.vlm.training


def test_the_loss_is_on_the_answer_and_the_prompt_is_the_policys(trajectories, tmp_path):
    policy = make_policy()
    data = demonstrations(trajectories, policy)
    trainer = PolicySFTTrainer(policy, settings(tmp_path, per_device_train_batch_size=1), data, tmp_path)
    for number in range(5):
        batch = trainer.data_collator([data[number]])
        check_tokens(batch, policy, data[number], trajectories["instruction"][number])
        trained = batch["labels"][0][batch["labels"][0] != -100].tolist()
        answer = policy.codec.token_ids[trajectories["action"][number]]
        assert tuple(trained[: len(answer)]) == answer and len(trained) <= len(answer) + 1  # and the end
    with pytest.raises(TrainingError, match="not what this policy acts on"):
        check_tokens(batch, policy, data[4], "go somewhere else")


def test_only_labelled_positions_are_scored_and_the_numbers_are_trls(trajectories, tmp_path, monkeypatch):
    from trl.kernels import chunked_logprob

    scored = []
    fold = chunked_logprob._forward_tile
    monkeypatch.setattr(
        chunked_logprob,
        "_forward_tile",
        lambda tile, *rest, **named: (scored.append(len(tile)), fold(tile, *rest, **named)),
    )
    runs = {}
    for name in ("ours", "TRL's"):
        if name == "TRL's":
            monkeypatch.setattr("manako.agent.tuning.trainers.score_labels_only", lambda model: None)
        torch.manual_seed(0)
        policy = make_policy()
        pairs = pair_dataset(trajectories, expert_pairs(trajectories), policy)
        trainer = PolicyDPOTrainer(policy, settings(tmp_path, DPOConfig), pairs, tmp_path)
        trainer.train()
        runs[name] = policy, trainer.rows, sum(scored)
        scored.clear()
    (ours, rows, few), (theirs, their_rows, many) = runs.values()
    assert 0 < 5 * few < many
    assert difference(weights(ours), weights(theirs)) < 1e-4
    for row, other in zip(rows, their_rows, strict=True):
        assert all(
            abs(row[key] - other[key]) < 1e-4 for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm")
        )
    assert "forward" not in ours.vlm.__dict__


@pytest.mark.parametrize("loss", ["tokens", "actions"])
def test_after_training_in_bf16_the_model_is_itself_again(loss, trajectories, tmp_path):
    policy = make_policy("adapter")
    sft_trainer(loss, policy, trajectories, tmp_path, bf16=True).train()
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        logits = policy.vlm(input_ids=ids).logits
        hidden = policy.vlm.model(input_ids=ids).last_hidden_state
        assert torch.equal(logits, policy.vlm.lm_head(hidden))  # no autocast is left around it


def test_a_few_steps_make_the_demonstrations_likelier(trajectories, tmp_path):
    policy = make_policy()
    data = demonstrations(trajectories, policy, only_success=True)
    assert 0 < len(data) < len(trajectories)
    trainer = PolicySFTTrainer(policy, settings(tmp_path, max_steps=40, learning_rate=3e-3), data, tmp_path)
    trainer.train()
    assert trainer.rows[-1]["loss"] < 0.5 * trainer.rows[0]["loss"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40 and not (tmp_path / ".staging").exists()


def test_cloning_is_the_policys_own_probability_and_like_rows_are_computed_once(trajectories, tmp_path):
    """Loss, share and gradient are those of the rows one by one; a batch with every row three times is no dearer."""
    policy = make_policy("adapter")
    data = demonstrated_actions(trajectories)
    trainer = PolicyCloningTrainer(policy, settings(tmp_path), data, tmp_path)
    rows = [data[number] for number in range(8)]
    batch = trainer.collate(rows * 3)
    sights = {(row["image"]["bytes"], row["instruction"]) for row in rows}
    assert len(batch["inputs"]) == len(sights) and len(batch["action"]) == len(batch["observation"]) == 24
    trainer.compute_loss(policy.vlm, batch).backward()
    mine = {name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None}
    policy.zero_grad()
    frames = np.stack([np.asarray(frame) for frame in trajectories[:8]["image"]])
    logprobs, _ = policy.distribution(policy.prepare(frames, trajectories[:8]["instruction"]))
    actions = torch.tensor(trajectories[:8]["action"])
    loss = -logprobs[torch.arange(8), actions].mean()
    loss.backward()
    torch.testing.assert_close(trainer.compute_loss(policy.vlm, batch), loss)
    assert mine and all("adapter" in name for name in mine)
    for name, parameter in policy.named_parameters():
        if name in mine:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-5)
    trainer.train()
    share = (logprobs.argmax(1) == actions).float().mean().item()
    assert trainer._metrics["eval"]["action_accuracy"] == [share, share]
    assert all(0 <= row["action_accuracy"] <= 1 for row in trainer.rows) and len(trainer.rows) == 3


def test_cloning_learns_what_the_expert_does(trajectories, tmp_path):
    policy = make_policy()
    right = trajectories.filter(lambda row: row["action"] == row["expert_action"])
    batch = {"per_device_train_batch_size": 64, "max_steps": 40, "learning_rate": 1e-3}
    trainer = sft_trainer("actions", policy, right, tmp_path, **batch)
    trainer.train()
    assert trainer.rows[-1]["action_accuracy"] > 0.9 and trainer.rows[-1]["loss"] < 0.5 * trainer.rows[0]["loss"]


def test_cloning_by_several_processes_is_refused(trajectories, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    with pytest.raises(TrainingError, match="started by 2 processes: expected one, or --loss tokens"):
        sft_trainer("actions", make_policy(), trajectories, tmp_path)


def test_captions_train_the_adapter_alone(tmp_path):
    policy = make_policy("adapter")
    env = EpisodeVectorEnv(GOTO, 8)
    data = captions(env.reset().images, env.captions())
    assert data[0]["prompt"][0]["content"][0]["text"] == CAPTION_PROMPT
    trainer = PolicySFTTrainer(policy, settings(tmp_path), data, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = [policy.processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert all(text.startswith("cross at ") for text in trained)


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_preferences_against_the_policy_as_it_was(method, trainable, trajectories, tmp_path):
    from trl import KTOConfig

    policy = make_policy(trainable)
    pairs = pair_dataset(trajectories, expert_pairs(trajectories), policy)
    before = weights(policy)
    if method == "dpo":
        args = settings(tmp_path, DPOConfig, max_steps=12, learning_rate=5e-3)
        trainer = PolicyDPOTrainer(policy, args, pairs, tmp_path)
        trainer.train()
        assert abs(trainer.rows[0]["loss"] - 0.6931) < 1e-3  # the model still is its reference
        assert sum(row["loss"] for row in trainer.rows[-3:]) / 3 < 0.685
    else:
        trainer = PolicyKTOTrainer(policy, settings(tmp_path, KTOConfig), unpaired(pairs), tmp_path)
        trainer.train()
    assert difference(before, weights(policy)) > 0


def test_trls_own_trainer_takes_the_pairs_without_us(trajectories, tmp_path):
    policy = make_policy()
    save_policy(policy, tmp_path)
    pair_dataset(trajectories, expert_pairs(trajectories), policy).save_to_disk(str(tmp_path / "pairs"))
    trainer = DPOTrainer(
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        args=settings(tmp_path, DPOConfig),
        train_dataset=load_from_disk(str(tmp_path / "pairs")),
        processing_class=AutoProcessor.from_pretrained(tmp_path),
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - 0.6931) < 1e-3


def test_lora_off_is_the_base_and_plain_peft_loads_the_folder(trajectories, tmp_path):
    base = make_policy()
    save_policy(base, folder := tmp_path / "base") if (tmp_path / "base").mkdir() is None else None
    policy = make_policy("lora", folder)
    PolicySFTTrainer(policy, settings(tmp_path), demonstrations(trajectories, policy), tmp_path).train()
    env = EpisodeVectorEnv(GOTO, 8)
    seen = env.reset()
    inputs = policy.prepare(seen.images, seen.instructions)
    with torch.no_grad():
        tuned, merged = policy.distribution(inputs)[0], frozen_copy(policy)
        start, _ = base.distribution(inputs)
        with policy.as_reference():
            assert torch.equal(policy.distribution(inputs)[0], start)
    assert not torch.equal(tuned, start)
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    (tmp_path / "lora").mkdir()
    save_policy(policy, tmp_path / "lora")
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), str(tmp_path / "lora"))
    mine = {name: tensor for name, tensor in policy.vlm.state_dict().items() if "lora" in name}
    assert mine and all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in mine.items())


def test_forgetting_is_seen():
    policy = make_policy()
    before = measure_retention(policy)
    assert before == measure_retention(policy) and before.perplexity > 100 and 0 <= before.probes <= 1
    with torch.no_grad():
        policy.base_vlm.get_output_embeddings().weight.mul_(-30)
    assert measure_retention(policy).perplexity > 10 * before.perplexity
    assert len({start for start, _, _ in PROBES}) == len(PROBES) == 20


# ---- the runners -----------------------------------------------------------------------------------------------------


def run(name, folder, **given):
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / name), *words], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_ladder_from_demonstrations_to_ppo(tmp_path):
    """All four runners, one after another, and the report that compares them."""
    small = {"eval_episodes": SMALL["eval_episodes"], "gif_episodes": SMALL["gif_episodes"]}
    assert set(SMALL) <= {*small, "torch_threads"}
    ladder = {
        "common": {
            "environment": {"env": GOTO, "num_envs": 8},
            "policy": {"policy": "tiny", "trainable": "full"},
            "sft": {"batch_size": 16},
            "run": SMALL,
        },
        "steps": [
            {"name": "demos", "runner": "collect", "run": {"episodes": 30, "error_rate": 0.3}},
            {"name": "sft", "runner": "sft", "sft": {"dataset": "demos"}},
            {"name": "dpo", "runner": "dpo", "dpo": {"episodes": 20, "num_steps": 10, "batch_size": 16, "rounds": 2}},
            {"name": "kto", "runner": "dpo", "dpo": {"method": "kto", "pairs": "branch", "episodes": 20}},
            {"name": "ppo", "runner": "ppo", "policy": {"policy": "sft"}, "run": {"total_steps": 64}},
        ],
    }
    (tmp_path / "ladder.yaml").write_text(json.dumps(ladder))
    done = run("run_ladder.py", tmp_path, ladder="ladder.yaml", output_dir="out", eval_episodes=6)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["step"] for row in report["steps"]] == ["start", "sft", "dpo", "kto", "ppo"]
    for row in report["steps"][1:]:
        assert row["episodes"] == 6 and row["trained_parameters"] > 200_000
        assert row["seconds"] > 0 and row["perplexity"] > 1
    assert [row["from"] for row in report["steps"]] == [None, "start", "sft", "dpo", "sft"]
    rounds = json.loads((tmp_path / "out/dpo/report.json").read_text())["rounds"]
    assert [row["round"] for row in rounds] == [1, 2] and all(row["pairs"] > 0 for row in rounds)
    pairs = [(pair["step"], pair["against"]) for pair in report["comparisons"]]
    assert pairs[:3] == [("sft", "start"), ("dpo", "start"), ("dpo", "sft")] and len(pairs) == 10
    assert report["demonstrations"]["demos"]["episodes"] >= 30 and "ppo against sft" in done.stdout
    before = (tmp_path / "out/sft/final/model.safetensors").stat().st_mtime
    done = run("run_ladder.py", tmp_path, resume="out", eval_episodes=6, sample="true")
    drawn = json.loads((tmp_path / "out/report_sampled.json").read_text())
    assert drawn["sampled_actions"] and len(drawn["steps"]) == 5 and not report["sampled_actions"]
    assert done.returncode == 0 and (tmp_path / "out/sft/final/model.safetensors").stat().st_mtime == before


def test_align_and_instruct_as_programs(recorded, tmp_path):
    done = run(
        "run_sft.py", tmp_path, stage="align", adapter="mlp_zscore", captions=16, batch_size=8, output_dir="align"
    )
    assert done.returncode == 0, done.stderr
    assert "standardises features by 16 frames" in done.stdout
    assert json.loads((tmp_path / "align/report.json").read_text())["trained_parameters"] == 8320
    given = {"policy": "align", "dataset": recorded / "right", "trainable": "adapter", "loss": "actions", **SMALL}
    done = run(
        "run_sft.py", tmp_path, **given, epochs=3, warmup_steps=2, lr_scheduler_type="constant", output_dir="instruct"
    )
    assert done.returncode == 0, done.stderr
    assert "actions right" in done.stdout and "standardises" not in done.stdout  # by what align gave it
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "instruct/metrics.jsonl").open()]
    assert rates == [0, 1e-4, *[2e-4] * (len(rates) - 2)] and len(rates) > 2
    assert json.loads((tmp_path / "instruct/report.json").read_text())["loss"] > 0


@pytest.fixture(scope="module")
def recorded(trajectories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    save_trajectories(trajectories, folder / "wrong")
    right = played(4, 9, 0.0, "expert")
    save_trajectories(right, folder / "right")
    return folder


@pytest.mark.parametrize(
    ("runner", "words", "message"),
    [
        (run_sft, ["--env", "manako/ColorMatch-v0", "--dataset", "wrong"], "is of manako/GoTo-v0: expected one of"),
        (run_sft, ["--env_kwargs", '{"size": 4}', "--dataset", "wrong"], "but the environment shows 32 x 32 x 3"),
        (run_dpo, ["--pairs", "expert", "--dataset", "right"], "No two actions could be told apart"),
        (run_dpo, ["--pairs", "return", "--dataset", "right"], "No two actions could be told apart"),
        (run_dpo, ["--action_names", "n,s,w,e", "--dataset", "wrong"], "expected n, s, w, e"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    runner, words, message, recorded, tmp_path, monkeypatch, capsys
):
    *flags, name = words
    monkeypatch.setattr(
        sys, "argv", ["run", *flags, str(recorded / name), "--trainable", "full", "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        run_main(runner.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_environments_without_an_end_are_refused(monkeypatch):
    monkeypatch.setattr("manako.experiments.common.collecting.PATIENCE", 7)
    env = corridor_env(8, {"length": 200, "limit": 100})
    collector = RolloutCollector(env, tiny_policy(env), 1, 0, rounds=True)
    with pytest.raises(UsageError, match="No episode of Corridor ended in 8 steps of 8 environments"):
        play_until(collector, 1, "Corridor")


def test_every_step_is_compared_with_all_before_it():
    """Three episodes more and none less: p = 2 / 2**3."""
    won = {"a": [False] * 3 + [True], "b": [True] * 4, "c": [True] * 4}
    assert compare_steps(won) == [
        {"step": "b", "against": "a", "difference": 0.75, "p": 0.25},
        {"step": "c", "against": "a", "difference": 0.75, "p": 0.25},
        {"step": "c", "against": "b", "difference": 0.0, "p": 1.0},
    ]


@pytest.mark.parametrize(("starts", "sampled", "tested"), [(1, False, False), (1, True, True), (9, False, True)])
def test_one_start_played_by_likeliest_actions_is_no_sample(starts, sampled, tested, capsys):
    row = {"from": None, "episodes": 20, "starts": starts, "success": 0.5, "success_ci95": [0.3, 0.7]}
    row |= {"return_mean": 0.5, "seconds": 1.0, "trained_parameters": 7, "perplexity": 30.0, "probes": 0.9}
    result = {"env": "Lake", "sampled_actions": sampled, "demonstrations": {}}
    result["steps"] = [{**row, "step": "start"}, {**row, "step": "sft"}]
    result["comparisons"] = [{"step": "sft", "against": "start", "difference": 0.1, "p": 0.25}]
    print_report(result, Path("report.json"))
    assert ("sft against start: +10.0 points, p = 0.25" in capsys.readouterr().out) == tested


BAD = {
    "no dataset": (run_sft, {"output_dir": "a"}, "--dataset is missing"),
    "no such dataset": (run_sft, {"output_dir": "a", "dataset": "nowhere"}, "There is no folder 'nowhere'"),
    "dataset to align": (
        run_sft,
        {"output_dir": "a", "stage": "align", "dataset": "x"},
        "is for --stage instruct",
    ),
    "actions to align": (
        run_sft,
        {"output_dir": "a", "stage": "align", "loss": "actions"},
        "for --stage instruct",
    ),
    "no captions": (run_sft, {"output_dir": "a", "stage": "align", "env": "CartPole-v1"}, "a method caption()"),
    "unknown pairs": (run_dpo, {"output_dir": "a", "pairs": "luck"}, "--pairs is 'luck': expected one of expert"),
    "no output": (collect, {}, "--output is missing"),
    "error of nobody": (
        collect,
        {"output": "a", "player": "random", "error_rate": 0.5},
        "--error_rate is the expert's",
    ),
    "no expert": (collect, {"output": "a", "env": "CartPole-v1"}, "CartPole-v1 has no expert"),
    "group": (collect, {"output": "a", "group_size": 3}, "expected a divisor"),
    "no ladder": (run_ladder, {}, "--ladder and --output_dir are needed"),
    "a flat ladder": (run_ladder, {"ladder": "flat.yaml", "output_dir": "a"}, "unknown section 'env'"),
    "a ladder's step": (run_ladder, {"ladder": "step.yaml", "output_dir": "a"}, "has the unknown key 'gamma' in sft"),
    "a ladder's key": (
        run_ladder,
        {"ladder": "key.yaml", "output_dir": "a"},
        "unknown key 'gama' in ppo: no runner has",
    ),
    "a strange ladder": (run_ladder, {"ladder": "strange.yaml", "output_dir": "a"}, "Step 1 of strange.yaml"),
}


@pytest.mark.parametrize(("runner", "given", "message"), BAD.values(), ids=BAD)
def test_bad_input(runner, given, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "strange.yaml").write_text("steps: [{name: a, runner: fly}]")
    (tmp_path / "flat.yaml").write_text("common: {env: Lake-v0}\nsteps: [{name: a, runner: sft, dataset: b}]")
    (tmp_path / "step.yaml").write_text("steps: [{name: a, runner: sft, sft: {gamma: 1}}]")
    (tmp_path / "key.yaml").write_text("common: {ppo: {gama: 1}}\nsteps: [{name: a, runner: sft}]")
    monkeypatch.chdir(tmp_path)
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(runner.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()
