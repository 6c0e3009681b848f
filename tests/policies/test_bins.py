"""Actions as bins: what they stand for, exact joint probabilities, and what plain transformers computes of them."""

import itertools
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.answers.bins import bin_values
from manako.policies.interface import Draws
from manako.policies.reading import SharedPrefix
from tests.helpers.families import FAMILIES
from tests.helpers.foreign_models import frames
from tests.helpers.own_rows import OWN_ROWS, write
from tests.test_families import of_the_library

BOX = gym.spaces.Box(np.float32([-2, 0, 1]), np.float32([2, 1, 1]))  # the third is always 1
COUNTS = gym.spaces.MultiDiscrete([3, 2, 4])
NAMES = ("torque", "brake", "gear")
SHAPE = (24, 24, 3)
TEXTS = ("go to the far end of the red room and turn left there", "up", "go")


def policy_of(space=BOX, names=NAMES, shape=SHAPE, **source):
    policy = load_policy(PolicySource(**source), names[: space.shape[0]], shape, space)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        policy.base_vlm.get_output_embeddings().weight.mul_(5)  # so that probabilities differ
        policy.value_head.out.weight.normal_(std=0.3)
    return policy


@pytest.fixture(scope="module")
def policy():
    return policy_of()


def draws(count):
    return Draws([np.random.default_rng(number) for number in range(count)])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_linear_bins_by_hand():
    assert bin_values(-2, 2, 5, "linear").tolist() == [-2, -1, 0, 1, 2]
    assert bin_values(0.1, 0.7, 3, "linear").tolist() == pytest.approx([0.1, 0.4, 0.7], abs=1e-12)
    assert bin_values(3, 3, 11, "linear").tolist() == [3]
    for low, high in np.random.default_rng(0).normal(0, 3, (50, 2)):
        for spacing in ("linear", "symlog"):
            values = bin_values(low, high, 7, spacing)
            assert (values[0], values[-1]) == (low, high)  # both bounds, to the last bit


def test_symlog_bins_are_closer_around_the_middle_and_reach_both_ends():
    values = bin_values(-2, 2, 5, "symlog")
    half = 2 * math.expm1(1.5) / math.expm1(3)
    assert values.tolist() == pytest.approx([-2, -half, 0, half, 2], abs=1e-12)
    shifted = bin_values(0, 1, 7, "symlog")
    assert shifted[0] == 0 and shifted[-1] == 1 and shifted[3] == pytest.approx(0.5)
    assert np.diff(shifted)[0] > 2 * np.diff(shifted)[2] and np.allclose(shifted + shifted[::-1], 1)


def test_vectors_become_the_nearest_bins_and_come_back(policy):
    codec = policy.codec
    assert [len(values) for values in codec.values] == [11, 11, 1]
    bins = codec.from_env(np.float32([[-2, 1, 1], [0.15, 0.449, 1], [2, 0, 7]]))
    assert bins.tolist() == [[0, 10, 0], [5, 4, 0], [10, 0, 0]]
    vectors = codec.to_env(bins)
    assert vectors.dtype == np.float32 and np.allclose(vectors, [[-2, 1, 1], [0, 0.4, 1], [2, 0, 1]])
    assert all(BOX.contains(vector) for vector in vectors)
    every = np.stack([np.arange(11), np.arange(11)[::-1], np.zeros(11, int)], 1)
    assert np.array_equal(codec.from_env(codec.to_env(every)), every)
    assert policy.answers(policy.actions_from_env(vectors))[0] == codec.separator.join("AKA")
    assert policy.codec.legend == "torque A = -2 to K = 2, brake A = 0 to K = 1, gear A = 1"
    assert policy.codec.legend in policy.prompt("go")


def test_whole_numbers_are_their_own_bins():
    codec = policy_of(COUNTS).codec
    vectors = np.array([[2, 1, 3], [0, 0, 0]])
    assert codec.from_env(vectors).tolist() == vectors.tolist() == codec.to_env(vectors).tolist()
    assert codec.to_env(vectors).dtype == np.int64
    assert codec.legend == "torque A = 0 to C = 2, brake A = 0 to B = 1, gear A = 0 to D = 3"


# ---- probabilities ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_joint_adds_up_to_one_and_its_entropy_is_that_of_the_list():
    policy = policy_of(COUNTS)
    every = np.array(list(itertools.product(range(3), range(2), range(4))))  # all 24
    inputs = policy.prepare(frames(1, SHAPE, seed=3), TEXTS[:1])
    said = policy.evaluate_actions(inputs.select(torch.zeros(24, dtype=torch.long)), policy.actions_from_env(every))
    joint = said.logprobs.sum(-1)
    assert said.logprobs.shape == said.entropy.shape == (24, 3) and said.is_joint and said.distribution is None
    assert joint.exp().sum().item() == pytest.approx(1, abs=1e-5)
    listed = -(joint.exp() * joint).sum().item()
    chained = (joint.exp()[:, None] * said.entropy).sum().item()  # H(a) + E H(b | a) + E H(c | a, b)
    assert chained == pytest.approx(listed, abs=1e-5) and listed > 0.1
    others = said.logprobs.view(3, 2, 4, 3)[:, :, 0, 1]  # of the second entry, given the first
    assert (others[0] - others[1]).abs().max() > 1e-4  # what was said counts


@torch.no_grad()
@pytest.mark.parametrize("space", [BOX, COUNTS], ids=["box", "counts"])
def test_what_was_drawn_is_judged_as_it_was_drawn(space):
    policy = policy_of(space)
    inputs = policy.prepare(frames(3, SHAPE, seed=3), TEXTS)
    with policy.frozen_weights():
        acted = policy.act(inputs, draws(3))
        halves = [policy.act(inputs.select(torch.tensor(rows)), draws(3).select(rows)) for rows in ([0], [1, 2])]
    said = policy.evaluate_actions(inputs, acted.actions)
    assert acted.logprobs.shape == acted.mask.shape == (3, 3) and acted.mask.all()
    assert (said.logprobs - acted.logprobs).exp().sub(1).abs().max() < 1e-4
    assert torch.allclose(said.values, acted.values, atol=1e-5)
    assert torch.allclose(policy.predict_values(inputs), acted.values, atol=1e-5)
    assert np.concatenate([half.to_env for half in halves]).tolist() == acted.to_env.tolist()
    if space is BOX:
        assert (acted.logprobs[:, 2] == 0).all() and (said.entropy[:, 2] == 0).all()  # one bin is certain


@torch.no_grad()
def test_draws_follow_the_probabilities():
    policy = policy_of(gym.spaces.MultiDiscrete([3]))
    inputs = policy.prepare(frames(1, SHAPE), TEXTS[:1]).select(torch.zeros(400, dtype=torch.long))
    acted = policy.act(inputs, draws(400))
    shares = np.bincount(acted.to_env[:, 0], minlength=3) / 400
    p = policy.evaluate_actions(inputs.select(torch.arange(3)), policy.actions_from_env(np.arange(3)[:, None]))
    assert np.allclose(shares, p.logprobs.exp()[:, 0], atol=0.08)
    best = policy.act(inputs, Draws([]), greedy=True).to_env
    assert (best == p.logprobs[:, 0].argmax().item()).all()


def test_gradients_reach_every_part(policy):
    inputs = policy.prepare(frames(3, SHAPE, seed=3), TEXTS)
    said = policy.evaluate_actions(inputs, policy.actions_from_env(np.float32([[0, 1, 1]] * 3)))
    (-said.logprobs.sum() - said.entropy.sum()).backward()
    reached = {name.split(".")[1] for name, p in policy.vlm.named_parameters() if p.grad is not None and p.grad.any()}
    policy.zero_grad()
    assert {"vision_tower", "adapter", "language_model"} <= reached


FAST = ("tiny", "flamingo", "vision_tokens", "preset_kosmos2", "llava", "qwen2_vl", "gemma3", "paligemma", "blip2_t5")
SLOW = ("preset_blip2", "preset_instructblip", "idefics2", "kosmos2", "mllama", "florence2", "git", "blip2", "qwen3_5")


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_every_family_says_what_plain_transformers_says_of_the_concatenated_tokens(family, tmp_path):
    folder = str(write(family, tmp_path) if family in OWN_ROWS else FAMILIES[family](tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    policy = load_policy(PolicySource(folder), NAMES, (64, 64, 3), COUNTS)
    images = frames(2, (64, 64, 3), seed=3)
    inputs = policy.prepare(images, TEXTS[:2])
    actions = policy.actions_from_env(np.array([[2, 0, 3], [1, 1, 0]]))
    together = policy.evaluate_actions(inputs, actions).logprobs
    with policy.frozen_weights():
        acted = policy.act(inputs, draws(2))
    assert (policy.evaluate_actions(inputs, acted.actions).logprobs - acted.logprobs).abs().max() < 1e-4
    start = list(policy.parts.answer_start)
    for row, (image, text) in enumerate(zip(images, TEXTS[:2], strict=True)):
        given = dict(of_the_library(folder, policy, image, text))
        tokens, length = policy.answer_tokens(actions)[row], given["input_ids"].shape[1]
        if start:
            logits = model(**given, decoder_input_ids=torch.tensor([[*start, *tokens]])).logits[0, len(start) - 1 :]
        else:  # inputs of tokens say of an answer what they say of words
            for name, value in given.items():
                if name == "input_ids":
                    given[name] = torch.cat([value, torch.tensor([tokens])], 1)
                elif value.ndim >= 2 and value.shape[1] == length:
                    more = value[:, -1:].expand(-1, len(tokens), *value.shape[2:])
                    if name == "token_type_ids" and family == "paligemma":
                        more = torch.full_like(more, policy.parts.answer_inputs[name])
                    given[name] = torch.cat([value, more], 1)
            logits = model(**given).logits[0, -len(tokens) - 1 :]
        alone = policy.evaluate_actions(inputs.select(torch.tensor([row])), actions.select(torch.tensor([row])))
        for entry, token in enumerate(tokens):
            labels = policy.codec.tokens[entry]
            expected = logits[entry, labels].log_softmax(-1)[int((labels == token).nonzero()[0, 0])]
            largest = float(logits[entry].abs().max())
            assert abs(alone.logprobs[0, entry] - expected) <= 1e-5 * max(1, largest), (entry, "alone")
            assert abs(together[row, entry] - expected) <= 1e-5 * max(1, largest), (entry, "padded")


def test_a_shared_prefix_is_used_where_it_is_the_familys(policy):
    assert isinstance(policy.reading, SharedPrefix)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_saved_policy_comes_back_with_its_bins(tmp_path):
    policy = policy_of(bins=5, bin_spacing="symlog")
    policy.save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description["action_space"] == {"kind": "Box", "low": [-2, 0, 1], "high": [2, 1, 1]}
    again = load_policy(PolicySource(str(tmp_path)), NAMES, SHAPE, BOX)
    assert again.spec.bins == 5 and np.array_equal(again.codec.values[0], policy.codec.values[0])
    inputs = policy.prepare(frames(2, SHAPE), TEXTS[:2])
    one, other = (p.act(inputs, Draws([]), greedy=True) for p in (policy, again))
    assert torch.equal(one.logprobs, other.logprobs) and np.array_equal(one.to_env, other.to_env)
    wider = load_policy(PolicySource(str(tmp_path), bins=7), NAMES, SHAPE, BOX)
    assert len(wider.codec.values[0]) == 7


def test_a_folder_from_before_there_were_vectors_loads(tmp_path):
    load_policy(PolicySource(), ("a b", "c d"), SHAPE).save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description.pop("action_space") == {"kind": "Discrete", "n": 2}
    for name in ("bins", "bin_spacing"):
        del description["source"][name]
    (tmp_path / "policy.json").write_text(json.dumps(description))
    (tmp_path / "manifest.json").unlink()
    assert load_policy(PolicySource(str(tmp_path)), ("a b", "c d"), SHAPE).codec.names == ("a b", "c d")
    assert load_policy(PolicySource(str(tmp_path)), NAMES, SHAPE, BOX).codec.format == "bins"


def test_lora_goes_on_with_the_bins_that_it_was_trained_with(tmp_path):
    policy = policy_of(trainable="lora", bins=5)
    policy.save(tmp_path)
    again = load_policy(PolicySource(str(tmp_path), trainable="lora"), NAMES, SHAPE, BOX)
    assert again.spec.bins == 5 and again.has_reference


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vilbert", "uniter"])
def test_a_model_that_answers_at_a_mask_says_one_entry(name):
    with pytest.raises(PolicyError, match="answers with one token at a mask, but an action has 3 entries"):
        policy_of(policy=name)
    policy = policy_of(gym.spaces.MultiDiscrete([3]), policy=name)
    acted = policy.act(policy.prepare(frames(2, SHAPE), TEXTS[:2]), draws(2))
    assert acted.to_env.shape == (2, 1)


def test_what_a_tokenizer_or_a_setting_cannot_do_is_said():
    with pytest.raises(PolicyError, match=r"it has 60 labels, and an entry has 99 values\): expected a letter"):
        policy_of(bins=99)
    with pytest.raises(PolicyError, match="action_format is 'choice', and the actions are vectors of 3"):
        policy_of(action_format="choice")
    with pytest.raises(PolicyError, match="predicts no frames of action vectors"):
        policy_of(policy="vision_tokens", next_frame_coef=1.0)
    with pytest.raises(PolicyError, match="have no list of probabilities"):
        policy_of().distribution(None)
