"""SFT, DPO and KTO with TRL on policies: what learns, what stays bit for bit, and what other libraries load."""

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig

from manako.agent.errors import TrainingError
from manako.agent.tuning.forgetting import QUESTIONS, Retention, measure_retention
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
from manako.experiments.common.progress import print_retention
from manako.policies import save_policy
from tests.helpers.families import FAMILIES
from tests.helpers.small_runs import GOTO, difference, expert_trajectories, goto_policy, weights


def make_policy(trainable="full", policy="tiny"):
    return goto_policy(policy=str(policy), trainable=trainable)


def settings(folder, kind=SFTConfig, **given):
    defaults = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "max_length": None}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    defaults |= {"gradient_checkpointing": False, "bf16": False}
    return kind(output_dir=str(folder / ".staging"), **{**defaults, **given})


@pytest.fixture(scope="module")
def trajectories():
    return expert_trajectories(8, 8, 0.5, "expert, wrong 50%")


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
    runs = {}
    for name in ("ours", "TRL's"):
        if name == "TRL's":
            monkeypatch.setattr("manako.agent.tuning.trainers.score_labels_only", lambda model: None)
        torch.manual_seed(0)
        policy = make_policy()
        pairs = pair_dataset(trajectories, expert_pairs(trajectories), policy)
        trainer = PolicyDPOTrainer(policy, settings(tmp_path, DPOConfig), pairs, tmp_path)
        seen = []
        policy.vlm.lm_head.register_forward_hook(lambda head, given, out, seen=seen: seen.append(given[0].shape[:2]))
        trainer.train()
        runs[name] = policy, trainer.rows, seen
    (ours, rows, scored), (theirs, their_rows, _) = runs.values()
    assert [shape[1] for shape in scored] == [2 * 8, 2 * 8, 2 * (len(pairs) - 2 * 8)]  # two answers of one token a row
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


@pytest.mark.parametrize(("loss", "trainable"), [("tokens", "lora"), ("tokens", "full"), ("actions", "lora")])
def test_in_mid_training_it_acts_as_from_its_folder_and_goes_on_as_it_was(loss, trainable, trajectories, tmp_path):
    """In bfloat16: without autocast, TRL's head, dropout; then all of that again."""
    images, instructions = np.stack(list(map(np.asarray, trajectories["image"][:4]))), trajectories["instruction"][:4]
    heard = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before = [module.training for module in policy.modules()], dict(policy.vlm.__dict__)
            with trainer.acting(), torch.no_grad():
                heard.append(policy.distribution(policy.prepare(images, instructions))[0])
            (tmp_path / str(state.global_step)).mkdir()
            save_policy(policy, tmp_path / str(state.global_step))
            assert before == ([module.training for module in policy.modules()], dict(policy.vlm.__dict__))

    def to_train(folder):
        torch.manual_seed(0)  # of LoRA
        made = make_policy(trainable)
        return made, sft_trainer(loss, made, trajectories, folder, bf16=True)

    policy, trainer = to_train(tmp_path)
    trainer.add_callback(Looks())
    trainer.train()
    assert len(heard) == 3 and (heard[0] - heard[2]).abs().max() > 1e-4
    for step, said in enumerate(heard, 1):
        again = make_policy(trainable, tmp_path / str(step))
        with torch.no_grad():
            assert torch.equal(again.distribution(again.prepare(images, instructions))[0], said)
    alone, other = to_train(tmp_path / "alone")
    other.train()
    assert difference(weights(alone), weights(policy)) == 0


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
    assert len({start for start, _, _ in QUESTIONS}) == len(QUESTIONS) == 20


@pytest.mark.parametrize(
    ("family", "why_not"),
    [
        ("qwen2_5_vl", None),
        ("blip2_t5", "an encoder-decoder does not go on from a text"),
        ("kosmos2", "the text has 538 tokens, the model reads 300"),
    ],
)
def test_what_a_model_of_another_kind_still_knows(family, why_not, tmp_path):
    """It is measured, or the reason is said; nobody's run ends in a traceback behind its training."""
    folder = FAMILIES[family](tmp_path)
    retention = measure_retention(goto_policy(policy=str(folder)))
    assert retention.why_not == why_not
    assert (retention.perplexity is None) == (retention.probes is None) == (why_not is not None)


def test_a_model_that_takes_no_text_alone_is_not_measured(tmp_path, monkeypatch):
    policy = goto_policy()

    def refuse(*args, **kwargs):
        raise ValueError("You have to specify pixel_values")

    monkeypatch.setattr(policy.model, "forward", refuse)
    retention = measure_retention(policy)
    assert retention == Retention(
        why_not="the model takes no such text alone, ValueError: You have to specify pixel_values"
    )
    console = Console(record=True, width=200)
    print_retention(console, retention, retention)
    assert "not measured: the model takes no such text alone" in console.export_text()
