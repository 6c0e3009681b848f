"""Policies that are shown several frames and told what was done: saved, loaded, refused, and features once a frame."""

import json

import numpy as np
import pytest
import torch

from manako.memory import NO_ACTION
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.features import COLUMN
from manako.policies.interface import Draws, Rows
from tests.helpers.small_policies import ColorNamer

NAMES, SHAPE = ("up", "down", "left", "right"), (24, 24, 3)


def load(policy="tiny", **source):
    return load_policy(PolicySource(policy=str(policy), **source), NAMES, SHAPE)


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def told(past, turns=None):
    return {"past_frames": past, **({} if turns is None else {"past_turns": turns})}


def ask(policy, inputs):
    with torch.no_grad():
        return policy.distribution(inputs)[0]


def test_without_a_past_it_is_an_episode_s_start():
    policy = load(frames=3, history=2)
    now = pictures(2)
    start = policy.prepare(now, ["go", "stay"])
    black = told(np.zeros((2, 2, *SHAPE), np.uint8), np.tile([NO_ACTION, 0.0], (2, 2, 1)))
    same = policy.prepare(now, ["go", "stay"], black)
    assert torch.equal(start["frames"], same["frames"]) and torch.equal(start["input_ids"], same["input_ids"])
    assert "go\nDone: nothing." in policy.prompt("go")
    assert policy.needs == ("action_masks", "past_frames", "past_turns")
    assert load().needs == ("action_masks",) and ColorNamer.needs == ()
    assert load(frames=2).needs[1:] == ("past_frames",) and load(history=1).needs[1:] == ("past_turns",)


def test_of_a_longer_memory_it_takes_the_latest():
    policy, now, past = load(frames=3, history=1), pictures(1), pictures(4, seed=1)[None]
    turns = np.array([[[3, 0.0], [1, 0.5]]])
    long = policy.prepare(now, ["go"], told(past, turns))
    short = policy.prepare(now, ["go"], told(past[:, 2:], turns[:, 1:]))
    assert torch.equal(long["frames"], short["frames"]) and torch.equal(long["input_ids"], short["input_ids"])
    assert torch.equal(long["frames"][0], torch.from_numpy(np.concatenate([past[0, 2:], now])))


def test_prompts_say_what_was_done_and_any_reward():
    policy = load(history=3)
    said = policy.prompt("go to it", np.array([[NO_ACTION, 0.0], [2, 0.25], [0, 0.0]]))
    assert "go to it\nDone: left (reward 0.25), up.<image>" in said
    assert policy.messages("go", np.array([[1, 1.0]]))[1]["content"][0]["text"] == "go\nDone: down (reward 1)."
    with pytest.raises(PolicyError, match="special token"):
        policy.prompts.prompt("go", "Done: <|user|>.")


def test_a_run_keeps_its_past_without_a_flag(tmp_path):
    policy = load(frames=3, history=2)
    policy.save(tmp_path)
    again = load(tmp_path)
    assert again.spec.frames == 3 and again.spec.history == 2
    assert load(tmp_path, frames=3).spec.frames == 3
    inputs = policy.prepare(pictures(2), ["go", "stay"], told(pictures(4, seed=1).reshape(2, 2, *SHAPE)))
    assert torch.equal(ask(policy, inputs), ask(again, inputs))
    for given, learned in (({"frames": 2}, "--frames 3"), ({"history": 5}, "--history 2")):
        name = next(iter(given))
        with pytest.raises(PolicyError, match=rf"--{name} {given[name]} came, but .* learned with {learned}: leave it"):
            load(tmp_path, **given)


def test_a_run_from_before_there_was_a_past_loads_and_may_be_given_one(tmp_path):
    load().save(tmp_path)
    file = tmp_path / "policy.json"
    description = json.loads(file.read_text())
    assert description["source"].pop("frames") == 1 and description["source"].pop("history") == 0
    file.write_text(json.dumps(description))
    (tmp_path / "manifest.json").unlink()
    assert load(tmp_path).spec.frames == 1
    more = load(tmp_path, frames=2, history=1)
    assert more.spec.frames == 2 and more.spec.history == 1


def test_lora_keeps_its_past(tmp_path):
    load(trainable="lora", frames=2, history=1).save(tmp_path)
    again = load(tmp_path, trainable="lora")
    assert again.spec.frames == 2 and again.spec.history == 1 and again.has_lora


@pytest.mark.parametrize("preset", ["flamingo", "kosmos2", "uniter", "vilbert"])
def test_rows_that_read_one_image_say_so(preset):
    says = "--frames 4 came, but \\w+ reads one image a prompt: expected --frames 1, or a model that reads several"
    with pytest.raises(PolicyError, match=says):
        load(preset, frames=4)
    assert load(preset, history=2).needs == ("action_masks", "past_turns")


def test_a_prompt_that_grew_too_long_names_the_flag():
    policy = load(frames=4)
    policy.max_length = 40
    with pytest.raises(PolicyError, match="reads at most 40: give a smaller --frames, or shorten the instruction"):
        policy.prepare(pictures(1), ["go"])
    policy = load(history=4)
    policy.max_length = 30
    with pytest.raises(PolicyError, match="give a smaller --history, or shorten"):
        policy.prepare(pictures(1), ["go"], {"past_turns": np.zeros((1, 4, 2))})


@pytest.mark.parametrize("adapter", ["mlp", "resampler", "instruct_qformer"])
def test_each_frame_goes_through_the_adapter_by_itself(adapter):
    """The visual tokens of k images are those of each alone; an adapter that reads the prompt reads the same text."""
    policy = load(frames=2, adapter=adapter)
    inputs = policy.prepare(pictures(2), ["go", "go to the far end"], told(pictures(2, seed=1)[:, None]))
    given = policy.processing.model_inputs(inputs)
    text = {name: given[name] for name in ("text_input_ids", "text_attention_mask") if name in given}
    vlm = policy.base_vlm.model
    with torch.no_grad():
        made = vlm._adapt(
            vlm.get_vision_features(given["pixel_values"]),
            vlm.text_for_adapter(text.get("text_input_ids"), text.get("text_attention_mask")),
        )
        for prompt in range(2):
            for number in range(2):
                pixels = given["pixel_values"][2 * prompt + number][None]
                own = {name: value[prompt : prompt + 1] for name, value in text.items()}
                alone = vlm.get_image_features(pixels, **own)
                assert torch.allclose(made[2 * prompt + number], alone[0], atol=1e-5)


def test_features_of_a_frozen_encoder_are_kept_once_a_frame():
    policy = load(frames=3, trainable="adapter")
    encoded, encode = [], policy.processing.features._encode

    def counted(frames):
        encoded.append(len(frames))
        return encode(frames)

    policy.processing.features._encode = counted
    shown = pictures(6, seed=7)
    parts = []
    for t in range(2, 6):
        parts.append(policy.prepare(shown[t : t + 1], ["go"], told(shown[None, t - 2 : t])))
    assert sum(encoded) == 6  # and not 12
    rows = Rows.join(parts)
    features = rows.shared.pool[COLUMN]
    assert len(features) == 6 and rows[COLUMN].shape[:2] == (4, 3)
    assert features[2].data_ptr() == parts[0].shared.pool[COLUMN][2].data_ptr()
    whole = load(frames=3)
    assert COLUMN not in whole.prepare(shown[:1], ["go"])
    assert torch.allclose(ask(policy, rows), ask(whole, rows), atol=1e-5)


def test_acting_on_a_half_of_the_slots_is_acting_on_all():
    policy = load(frames=2, history=1)
    past = told(pictures(4, seed=1)[:, None], np.array([[[n, 0.5 * n]] for n in range(4)], float))
    inputs = policy.prepare(pictures(4), ["go"] * 4, past)
    whole = policy.act(inputs, Draws([]), greedy=True)
    for rows in (torch.arange(2), torch.arange(2, 4)):
        half = policy.act(inputs.select(rows), Draws([]), greedy=True)
        assert half.to_env.tolist() == whole.to_env[rows.numpy()].tolist()
        assert torch.allclose(half.logprobs, whole.logprobs[rows], atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("frames", 0), ("frames", 17), ("history", -1)])
def test_limits_stand_with_the_setting(name, value):
    field = PolicySource.__dataclass_fields__[name]
    limits = field.metadata["limits"]
    assert not limits["ge"] <= value <= limits["le"]
