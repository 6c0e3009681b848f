"""UNITER and ViLBERT: the library's numbers at the mask, the contract of every row, and what a mask cannot say."""

import sys

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LxmertForPreTraining,
    VisualBertForPreTraining,
)
from trl import DPOConfig, KTOConfig, SFTConfig

from manako.agent.errors import TrainingError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.tuning.forgetting import measure_retention
from manako.agent.tuning.supervised import demonstrated_actions
from manako.agent.tuning.trainers import (
    PolicyCloningTrainer,
    PolicyDPOTrainer,
    PolicyKTOTrainer,
    PolicySFTTrainer,
)
from manako.envs import EpisodeVectorEnv
from manako.experiments import check_model, run_dpo, run_sft
from manako.experiments.common import model_check
from manako.experiments.common.command_line import run_main
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.architectures.masked import MASK_TOKEN, grid_boxes
from manako.policies.reading import WholePrompt
from manako.policies.trainable import part_of
from tests.helpers.foreign_models import FRAME, NAMES, TURNS, frames
from tests.helpers.small_runs import GOTO, expert_trajectories, ppo_config, weights

ROWS = ("uniter", "vilbert")
INSTRUCTIONS = ("go to the far end of the red room and turn left there", "up")


def load(row, names=NAMES, shape=FRAME, **source):
    return load_policy(PolicySource(policy=str(row), lora_rank=2, **source), names, shape)


@pytest.fixture(scope="module")
def policies():
    return {row: load(row) for row in ROWS}


@pytest.fixture(scope="module")
def trajectories():
    return expert_trajectories(4, 4, 0.5, "expert, wrong 50%")


# ---- the library's numbers -------------------------------------------------------------------------------------------


def in_the_library(vlm, kind, renamed):
    """The library's own class with the weights of one of ours."""
    library = kind(vlm.config.text_config).eval()
    state = {}
    for name, tensor in vlm.state_dict().items():
        begins = next((begins for begins in renamed if name.startswith(begins)), None)
        if begins:
            state[renamed[begins] + name.removeprefix(begins)] = tensor
    found = library.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    others = ("pooler", "seq_relationship", "predictions.bias", "answer_head", "obj_predict_head")
    assert all(any(other in key for other in others) for key in found.missing_keys), found.missing_keys
    return library


def visual_bert(vlm, ids, features):
    renamed = {
        "model.language_model.": "visual_bert.",
        "model.adapter.proj.": "visual_bert.embeddings.visual_projection.",
        "transform.": "cls.predictions.transform.",
        "lm_head.": "cls.predictions.decoder.",
    }
    library = in_the_library(vlm, VisualBertForPreTraining, renamed)
    return library(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        visual_embeds=features,
        visual_attention_mask=torch.ones(features.shape[:2], dtype=torch.long),
    ).prediction_logits[:, : ids.shape[1]]


def lxmert(vlm, ids, features):
    renamed = {
        "model.language_model.": "lxmert.",
        "model.adapter.proj.": "lxmert.encoder.visn_fc.visn_fc.",
        "transform.": "cls.predictions.transform.",
        "lm_head.weight": "cls.predictions.decoder.weight",
        "lm_head.bias": "cls.predictions.bias",
    }
    library = in_the_library(vlm, LxmertForPreTraining, renamed)
    thirds = [[x / 3, y / 3, (x + 1) / 3, (y + 1) / 3] for y in range(3) for x in range(3)]  # 24 x 24 pixels, patch 8
    return library(
        input_ids=ids, attention_mask=torch.ones_like(ids), visual_feats=features, visual_pos=torch.tensor([thirds])
    ).prediction_logits


@torch.no_grad()
@pytest.mark.parametrize(("row", "library"), [("uniter", visual_bert), ("vilbert", lxmert)])
def test_a_row_says_at_its_mask_what_the_librarys_class_says(row, library):
    policy = load(row, shape=(24, 24, 3))
    vlm, processor = policy.base_vlm, policy.processor
    torch.nn.init.normal_(vlm.lm_head.bias)  # at 0 it would not be missed
    images = frames(2, (24, 24, 3), seed=3)
    together = policy.distribution(policy.prepare(images, INSTRUCTIONS))[0]  # (B, A), the second one padded
    rows = torch.tensor(policy.codec.token_ids)[:, 0]
    for image, instruction, logprobs in zip(images, INSTRUCTIONS, together, strict=True):
        ids = processor.tokenizer(policy.prompt(instruction), return_tensors="pt")["input_ids"]
        assert ids[0, -1] == processor.tokenizer.mask_token_id and (ids == ids[0, -1]).sum() == 1
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        features = vlm.model.vision_tower(pixels).last_hidden_state[:, 1:]  # without the class token
        expected = library(vlm, ids, features)
        assert torch.allclose(vlm(ids, pixels).logits, expected, rtol=0, atol=1e-5)
        assert torch.allclose(logprobs, expected[0, -1, rows].log_softmax(-1), rtol=0, atol=1e-5)


def test_boxes_are_the_grids_and_the_whole_frame_where_there_is_none():
    assert grid_boxes(2, 8, 16).tolist() == [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    assert grid_boxes(2, 16, 8).tolist() == [[0, 0, 1, 0.5], [0, 0.5, 1, 1]]
    assert grid_boxes(4, 16, 16)[1:3].tolist() == [[0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1]]
    assert grid_boxes(7, 24, 24).tolist() == [[0, 0, 1, 1]] * 7


# ---- the contract of every row ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_frame_and_instruction_both_count_and_padding_does_not(row, policies):
    policy = policies[row]
    assert policy.checked.hold and isinstance(policy.reading, WholePrompt)
    images = frames(2, FRAME, seed=3)
    short = policy.distribution(policy.prepare(images, INSTRUCTIONS))[0][1]
    alone = policy.distribution(policy.prepare(images[1:], INSTRUCTIONS[1:]))[0][0]
    assert torch.allclose(short, alone, rtol=0, atol=1e-5)
    other_frame = policy.distribution(policy.prepare(images[:1], INSTRUCTIONS[1:]))[0][0]
    other_text = policy.distribution(policy.prepare(images[1:], ["down"]))[0][0]
    assert (other_frame - alone).abs().max() > 3e-4 and (other_text - alone).abs().max() > 3e-4


def settings(folder, kind=SFTConfig):
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "max_length": None}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return kind(output_dir=str(folder / ".staging"), gradient_checkpointing=False, bf16=False, **options)


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora"])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_learns_what_is_marked_by_ppo_and_by_cloning_and_is_saved(row, trainable, trajectories, tmp_path):
    env = EpisodeVectorEnv(GOTO, 4, seed=0)
    policy = load(row, env.action_names, env.frame_shape, trainable=trainable)
    parts = {name: part_of(name, policy.parts) for name in weights(policy.vlm)}
    torch.nn.init.normal_(policy.value_head.out.weight)  # at 0 the values send no gradient on

    def moved(train):
        start = weights(policy.vlm)
        train()
        return {parts[name] for name, now in weights(policy.vlm).items() if not torch.equal(now, start[name])}

    learning = {
        "full": {"encoder", "adapter", "language_model"},
        "adapter": {"adapter"},
        "lora": {"adapter", "lora"},
    }[trainable]
    config = ppo_config(tmp_path / "ppo", num_iterations=1, num_steps=2, minibatch_size=4)
    assert moved(PPOTrainer(policy, config, env).train) == learning  # stops where the first ratio is not 1
    data = demonstrated_actions(trajectories)
    cloning = PolicyCloningTrainer(policy, settings(tmp_path), data, tmp_path)
    assert moved(cloning.train) == learning and cloning.rows[0]["grad_norm"] > 0

    inputs = policy.prepare(frames(2, env.frame_shape), INSTRUCTIONS)
    after = policy.distribution(inputs)
    policy.save(tmp_path / "saved")
    again = load(tmp_path / "saved", env.action_names, env.frame_shape, trainable=trainable)
    assert all(map(torch.equal, again.distribution(inputs), after))
    if trainable == "full":
        with torch.no_grad():
            given = policy.processing.model_inputs(inputs)
            vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
            assert torch.equal(vlm(**given).logits, policy.vlm(**given).logits)
        processor = AutoProcessor.from_pretrained(tmp_path / "saved")
        messages = policy.messages("up")
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == policy.prompt("up")
        assert policy.prompt("up").endswith(MASK_TOKEN)


@pytest.mark.parametrize("row", ROWS)
def test_every_part_of_a_row_can_be_swapped_but_the_language_model_it_has_not(row):
    names = {load(row, vision_encoder="convnext", adapter="mlp").vlm.config.vision_config.model_type}
    assert names == {"convnext"}
    with pytest.raises(PolicyError, match=f"{row} has no language model of its own to replace") as caught:
        load(row, language_model="tiny-llama")
    assert "\n" not in str(caught.value)


# ---- what a mask cannot say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_an_answer_of_several_tokens_is_refused_and_auto_takes_labels(row):
    with pytest.raises(PolicyError, match="answers with one token at a mask, but '.+ .+' takes 3: ") as caught:
        load(row, TURNS, action_format="trie")
    assert "\n" not in str(caught.value)
    assert load(row, TURNS).codec.format == "choice"
    assert load(row, NAMES, action_format="trie").codec.format == "trie"  # one token each


@pytest.mark.parametrize("row", ROWS)
def test_text_is_neither_generated_nor_learned(row, policies, trajectories, tmp_path):
    policy = policies[row]
    inputs = policy.processing.model_inputs(policy.prepare(frames(1, FRAME), ["up"]))
    with pytest.raises(PolicyError, match="cannot generate: it says one token") as caught:
        policy.vlm.generate(**inputs, max_new_tokens=2)
    assert "\n" not in str(caught.value) and not policy.vlm.can_generate()
    assert not policy.learns_text and measure_retention(policy).why_not is not None
    data = demonstrated_actions(trajectories)
    for kind, config in (
        (PolicySFTTrainer, SFTConfig),
        (PolicyDPOTrainer, DPOConfig),
        (PolicyKTOTrainer, KTOConfig),
    ):
        with pytest.raises(
            TrainingError, match="spelled captions, --loss tokens, DPO and KTO are not for it"
        ) as caught:
            kind(policy, settings(tmp_path, config), data, tmp_path)
        assert "\n" not in str(caught.value)


def test_the_commands_ask_for_no_text_and_say_why(monkeypatch, capsys, tmp_path):
    def run(command, *words):
        monkeypatch.setattr(sys, "argv", [command.__name__, *words])
        with pytest.raises(SystemExit) as stop:
            run_main(command.main)
        return stop.value.code, *capsys.readouterr()

    monkeypatch.setattr(model_check, "TIMES", 0)
    code, out, _ = run(check_model, "uniter", "--num_envs", "2", "--num_steps", "2")
    assert code == 0 and "not asked: it answers with one token at a mask" in out
    folder = tmp_path / "run"
    for command, words in ((run_sft, ["--dataset", "none"]), (run_dpo, ["--pairs", "expert"])):
        code, _, error = run(command, "--policy", "vilbert", *words, "--output_dir", str(folder))
        assert code == 2 and "VilbertForMaskedLM answers with one token at a mask" in error
        assert len(error.strip().splitlines()) == 1 and not folder.exists()
