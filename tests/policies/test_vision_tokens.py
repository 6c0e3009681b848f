"""Vision tokens: codes as the reference library makes them, the next frame's loss by hand, and who learns what."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from vector_quantize_pytorch import FSQ as ReferenceFSQ

from manako.agent.collector import RolloutCollector
from manako.agent.ppo_loop import train_ppo
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.rollout import merge
from manako.envs import EpisodeVectorEnv
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.architectures.vision_tokens.configuration import FrameTokenizerConfig
from manako.policies.architectures.vision_tokens.frame_tokenizer import FSQ, FrameTokenizer
from manako.policies.interface import NEXT_CODES
from manako.policies.trainable import parameter_table, part_of
from tests.helpers.foreign_models import INSTRUCTIONS, NAMES, frames, text_folder
from tests.helpers.small_runs import ppo_config, weights

GOTO, FRAME = "manako/GoTo-v0", (24, 24, 3)


def load(policy="vision_tokens", trainable="full", **source):
    return load_policy(PolicySource(policy=policy, trainable=trainable, lora_rank=2, **source), NAMES, FRAME)


@pytest.fixture(scope="module")
def policy():
    """Weights that are large enough for a wrong place to be loud."""
    made = load(next_frame_coef=1.0)
    torch.nn.init.normal_(made.base_vlm.model.adapter.head.weight, generator=torch.Generator().manual_seed(0))
    return made


# ---- frames and codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[8, 5, 5], [4, 3], [7, 6, 5, 5]])
def test_codes_values_and_gradients_are_the_reference_s(levels):
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(50, 20, len(levels), generator=generator)).requires_grad_()
    again = z.detach().clone().requires_grad_()
    points, codes = FSQ(levels)(z)
    expected, indices = ReferenceFSQ(levels)(again)
    assert torch.equal(codes, indices.long()) and len(codes.unique()) > 10
    torch.testing.assert_close(points, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        FSQ(levels).points(codes), ReferenceFSQ(levels).indices_to_codes(indices), atol=0, rtol=0
    )
    weight = torch.randn(points.shape, generator=generator)
    (points * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(z.grad, again.grad, atol=1e-6, rtol=1e-5)


def test_a_code_says_what_is_in_its_own_patch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = FrameTokenizer(FrameTokenizerConfig(image_size=24, patch_size=8))
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 3
    other = pixels.clone()
    other[:, :, 8:16, 16:24] = -other[:, :, 8:16, 16:24]  # second row, third column
    points, codes = tokenizer.quantize(pixels)
    changed, _ = tokenizer.quantize(other)
    assert (points != changed).any(-1)[0].nonzero().flatten().tolist() == [5]
    drawn, drawn_other = tokenizer.draw_codes(codes), tokenizer.draw(changed)
    torch.testing.assert_close(drawn, tokenizer.draw(points))
    assert torch.equal(drawn[..., :8, :], drawn_other[..., :8, :])
    assert not torch.equal(drawn[..., 8:16, 16:], drawn_other[..., 8:16, 16:])


# ---- the next frame ----------------------------------------------------------------------------------------------


def by_hand(policy, inputs, actions, following):
    """-log p of each next code (B, P), every sample alone through the language model's embeddings."""
    vlm, losses = policy.base_vlm, []
    words, table = vlm.get_input_embeddings(), vlm.model.adapter
    for row, action in enumerate(actions):
        ids = inputs["input_ids"][row, : inputs["lengths"][row]]
        pixels = policy.processing.pipeline.pixels(inputs["frames"][row : row + 1])["pixel_values"]
        now = vlm.model.vision_tower.quantize(pixels)[1].flatten()  # (P,), or (k P,)
        prompt = words(ids)
        prompt[ids == vlm.config.image_token_id] = table.embedding(now)
        answer = words(torch.tensor(policy.codec.token_ids[action]))
        whole = torch.cat([prompt, answer, table.embedding(following[row])])[None]
        hidden = vlm.model.language_model(inputs_embeds=whole).last_hidden_state[0]
        first = len(prompt) + len(answer) - 1
        said = table.head(hidden[first : first + len(following[row])]).log_softmax(-1)
        losses.append([-said[place, code].item() for place, code in enumerate(following[row].tolist())])
    return torch.tensor(losses)


def test_the_loss_is_the_sum_by_hand(policy):
    images, after = frames(3, FRAME), frames(3, FRAME, seed=1)
    inputs = policy.see_next(policy.prepare(images, INSTRUCTIONS), after)
    assert inputs[NEXT_CODES].shape == (3, 9) and not torch.equal(inputs[NEXT_CODES], policy.next_frame.codes(images))
    with torch.no_grad():
        expected = by_hand(policy, inputs, [2, 0, 3], inputs[NEXT_CODES])
        other = by_hand(policy, inputs, [1, 0, 3], inputs[NEXT_CODES])
    assert (expected - other)[0].abs().min() > 1e-4 and torch.equal(expected[1:], other[1:])  # the action counts
    actions = policy.actions_from_env(torch.tensor([2, 0, 3]).numpy())
    evaluated = policy.evaluate_actions(inputs, actions)
    torch.testing.assert_close(evaluated.losses["next_frame_loss"].detach(), expected.mean(), rtol=1e-4, atol=1e-5)
    evaluated.losses["next_frame_loss"].backward()
    learned = {part_of(name, policy.parts) for name, p in policy.vlm.named_parameters() if p.grad is not None}
    assert learned == {"adapter", "language_model"}
    policy.zero_grad()
    with torch.no_grad():
        assert not policy.evaluate_actions(inputs, actions).losses  # nothing is computed that nobody learns from


@torch.no_grad()
def test_of_several_frames_the_next_one_is_said_behind_all_of_them():
    policy = load(frames=3, next_frame_coef=1.0)
    past = {"past_frames": np.stack([frames(2, FRAME, seed=seed) for seed in (5, 6, 7)])}
    inputs = policy.see_next(policy.prepare(frames(3, FRAME), INSTRUCTIONS, past), frames(3, FRAME, seed=1))
    assert inputs[NEXT_CODES].shape == (3, 9)
    expected = by_hand(policy, inputs, [2, 0, 3], inputs[NEXT_CODES])
    torch.testing.assert_close(policy.next_frame.loss(inputs, [2, 0, 3]), expected.mean(), rtol=1e-4, atol=1e-5)
    said = policy.next_frame.imagine(inputs, [2, 0, 3])
    again = policy.next_frame.logits(inputs, [2, 0, 3], said).argmax(-1)  # each behind those that were said
    assert torch.equal(again, said)


@torch.no_grad()
def test_what_is_imagined_is_the_likeliest_code_after_code(policy):
    inputs, actions = policy.prepare(frames(3, FRAME), INSTRUCTIONS), [2, 0, 3]
    said = torch.zeros(3, 9, dtype=torch.long)
    for place in range(9):
        said[:, place] = policy.next_frame.logits(inputs, actions, said)[:, place].argmax(-1)
    assert torch.equal(policy.next_frame.imagine(inputs, actions), said) and len(said.unique()) > 3
    pictures = policy.next_frame.pictures(said)
    assert pictures.shape == (3, 24, 24, 3) and pictures.dtype.name == "uint8"


# ---- as a policy -------------------------------------------------------------------------------------------------


def test_the_encoder_learns_alone_or_not_at_all():
    table = {part: learns for part, _, learns in parameter_table(load().parts, load().value_head)}
    assert table["encoder"] == 0 < min(table["adapter"], table["language model"])
    alone = load(trainable="encoder")
    assert {part_of(n, alone.parts) for n, p in alone.vlm.named_parameters() if p.requires_grad} == {"encoder"}
    with pytest.raises(PolicyError, match="expected encoder alone, in run_sft.py --stage represent"):
        load(trainable="encoder+language_model")
    lora = load(trainable="lora")
    assert {part_of(n, lora.parts) for n, p in lora.vlm.named_parameters() if p.requires_grad} == {"lora", "adapter"}


def test_what_does_not_fit_is_a_sentence():
    with pytest.raises(PolicyError, match="--next_frame_coef is 0.5, but .* predicts no frames: expected 0"):
        load("tiny", next_frame_coef=0.5)
    for part in ({"vision_encoder": "vit"}, {"adapter": "mlp"}):
        with pytest.raises(PolicyError, match="codes of its own tokenizer: leave it out"):
            load(**part)


def test_no_answer_and_no_text_holds_a_code(policy):
    """Codes have tables of their own: the vocabulary ends before them, and a placeholder in a text is none."""
    words = len(policy.processor.tokenizer)
    assert policy.base_vlm.get_output_embeddings().out_features == words
    assert max(max(ids) for ids in policy.codec.token_ids) < words
    image = policy.base_vlm.config.image_token_id
    tokens = policy.prompt_tokens("go to the <image><image> box")
    assert tokens.count(image) == 9 and tokens != policy.prompt_tokens("go to the box")
    assert image in policy.base_vlm.generation_config.suppress_tokens


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_any_language_model_reads_codes(kind, tmp_path):
    folder = text_folder(tmp_path, kind)
    made = load(language_model=str(folder), next_frame_coef=1.0)
    inputs = made.see_next(made.prepare(frames(3, FRAME), INSTRUCTIONS), frames(3, FRAME, seed=1))
    with torch.no_grad():
        expected = by_hand(made, inputs, [2, 0, 3], inputs[NEXT_CODES]).mean() if kind != "gpt2" else None
        loss = made.next_frame.loss(inputs, [2, 0, 3])
    assert 0 < loss < 30 and made.next_frame.imagine(inputs, [2, 0, 3]).shape == (3, 9)
    if expected is not None:
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


# ---- learning ----------------------------------------------------------------------------------------------------


def goto(slots=4, first=0):
    return EpisodeVectorEnv(GOTO, slots, seed=3, first_slot=first)


def test_a_rollout_holds_the_frames_that_followed(policy):
    rollout = RolloutCollector(goto(), policy, 12, seed=3, record=True).collect(0)
    now = policy.next_frame.codes(rollout.record.images).view(12, 4, 9)
    following = rollout.inputs[NEXT_CODES].view(12, 4, 9)
    ended = rollout.terminated | rollout.truncated
    assert ended.any() and torch.equal(following[:-1][~ended[:-1]], now[1:][~ended[:-1]])
    assert set(rollout.record.last_images) == {tuple(place) for place in ended.nonzero().tolist()}
    for (t, slot), image in rollout.record.last_images.items():
        assert torch.equal(policy.next_frame.codes(image[None])[0], following[t, slot])
    halves = [RolloutCollector(goto(2, first), policy, 12, seed=3, record=True).collect(0) for first in (0, 2)]
    merged = merge(halves)
    assert torch.equal(merged.inputs[NEXT_CODES], rollout.inputs[NEXT_CODES])
    assert merged.record.last_images.keys() == rollout.record.last_images.keys()
    alone = policy.prepare(rollout.record.images, rollout.record.instructions)
    assert torch.equal(rollout.inputs.digests(), alone.digests())  # what came later is no part of what was seen


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_ppo_learns_it_too_and_both_trainers_agree(coef, tmp_path):
    settings = ppo_config(tmp_path / "ppo", num_steps=8, minibatch_size=16, seed=3)
    trainer = PPOTrainer(load(next_frame_coef=coef), settings, goto())
    start = weights(trainer.policy.vlm)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "iteration" in row]
    other = load(next_frame_coef=coef)
    rows = list(train_ppo(other, RolloutCollector(goto(), other, 8, 3), settings))
    assert all(torch.equal(one, two) for one, two in zip(trainer.policy.parameters(), other.parameters(), strict=True))
    assert max(row["first_ratio_error"] for row in rows) < 1e-5
    moved = {name for name, now in weights(trainer.policy.vlm).items() if not torch.equal(now, start[name])}
    assert {part_of(name, trainer.policy.parts) for name in moved} == {"adapter", "language_model"}
    assert ("model.adapter.head.weight" in moved) == bool(coef)
    for row, same in zip(rows, logged, strict=True):
        assert row.get("next_frame_loss") == same.get("next_frame_loss") and ("next_frame_loss" in row) == bool(coef)
    images = frames(3, FRAME)
    trainer.policy.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert torch.equal(again.next_frame.codes(images), trainer.policy.next_frame.codes(images))
    inputs = again.prepare(images, INSTRUCTIONS)
    with torch.no_grad():
        assert torch.equal(again.distribution(inputs)[0], trainer.policy.distribution(inputs)[0])
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(plain.model.adapter.head.weight, trainer.policy.base_vlm.model.adapter.head.weight)


def test_more_codes_than_a_precision_can_number_are_refused():
    with pytest.raises(PolicyError, match=r"give 280 codes: expected 256 at most"):
        FrameTokenizer(FrameTokenizerConfig(levels=[8, 7, 5]))
