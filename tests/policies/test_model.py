"""The composed VLM and its processor: every pair of parts, saving and loading, and the tools that must work on it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from manako.policies import PolicyError
from manako.policies.adapters import ADAPTERS, Adapter
from manako.policies.architectures.composed import ManakoConfig, ManakoModel, ManakoProcessor
from manako.policies.architectures.composed.build import build_vlm
from manako.policies.architectures.composed.processing import PLAIN_TEMPLATE, special_vocabulary, vlm_chat_template
from manako.policies.architectures.presets import ENCODER_NAMES
from manako.policies.encoders import ENCODERS
from tests.helpers.foreign_models import FRAME, NAMES, byte_tokenizer, frames, text_folder, vision_folder

SMALL_ENCODERS = [name for name in ENCODERS if name != "efficientnet_lite0"]  # it has a test of its own
TEXTS = ("go to the red ball", "open the blue door")


def ask(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]}]


def say(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def encode(processor, images, texts):
    """Prompts and frames as a user of transformers would encode them."""
    rendered = [processor.apply_chat_template(ask(text), add_generation_prompt=True, tokenize=False) for text in texts]
    return processor(text=rendered, images=[[image] for image in images], padding=True, return_tensors="pt")


def tiny(vision_encoder="vit", adapter="mlp", language_model="tiny-llama", frame_shape=FRAME, **sizes):
    return build_vlm(vision_encoder, str(adapter), str(language_model), frame_shape, **sizes)


def last_hidden(model, inputs):
    with torch.no_grad():
        return model.model(**inputs).last_hidden_state[:, -1]  # (B, D)


def assert_same_model(one, other, inputs):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(one(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@pytest.mark.parametrize("vision_encoder", SMALL_ENCODERS)
def test_every_pair_of_parts(vision_encoder, adapter):
    model, processor = tiny(vision_encoder, adapter)
    inputs = encode(processor, frames(2), TEXTS)
    outputs = model(**inputs, output_hidden_states=True)
    assert model.config.num_image_tokens == processor.num_image_tokens == 16  # 32 / 8 squared
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [16, 16]
    assert outputs.logits.shape == (*inputs["input_ids"].shape, len(processor.tokenizer))
    assert outputs.hidden_states[-1].shape == (*inputs["input_ids"].shape, 64)
    assert type(model.model.adapter) is ADAPTERS[adapter]
    kept = model(**inputs, logits_to_keep=1).logits
    assert torch.allclose(kept, outputs.logits[:, -1:], atol=1e-5)


@pytest.mark.parametrize("vision_encoder", SMALL_ENCODERS)
def test_the_output_depends_on_the_image_and_on_the_instruction(vision_encoder):
    """A policy from scratch can only learn what its last hidden state tells apart: a thing moved, a word changed."""
    model, processor = tiny(vision_encoder)
    left, right = np.zeros((2, *FRAME), dtype=np.uint8)
    left[8:16, :8], right[8:16, 24:] = (255, 0, 0), (255, 0, 0)
    red, blue = "go to the red ball", "go to the blue ball"
    here, there, other = last_hidden(model, encode(processor, [left, right, left], [red, red, blue]))
    for changed in (there, other):
        # queries gather all patches, so that one thing that moved is a smaller part of what they say
        assert (changed - here).norm() / here.norm() > (0.03 if vision_encoder == "eva_qformer" else 0.1)


def test_the_seed_decides_the_weights_and_nothing_else():
    before = torch.get_rng_state()
    one, same, other = (tiny(seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.adapter.up.weight"], other["model.adapter.up.weight"])
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_generate_never_emits_a_special_token():
    model, processor = tiny()
    tokenizer = processor.tokenizer
    inputs = encode(processor, frames(1), TEXTS[:1])
    length = inputs["input_ids"].shape[1]
    never = set(special_vocabulary(tokenizer).values()) - {tokenizer.eos_token_id}
    assert model.config.image_token_id in never
    ended = 0
    for seed in range(8):
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs, do_sample=True, temperature=5.0, top_k=0, max_new_tokens=16, num_return_sequences=48
        )
        for row in ids[:, length:].tolist():
            until = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            ended += until < len(row)
            assert not never.intersection(row[:until])
    assert ended > 0  # the end token is left, or generation would never stop


def test_generate_never_emits_what_stands_for_no_text(tmp_path):
    """Rows that pad the vocabulary and special tokens without a role are suppressed as well."""
    text_folder(tmp_path, "llama")
    model, processor = tiny(language_model=tmp_path)
    wide, _ = tiny(language_model=text_folder(tmp_path / "wide", "llama", vocab_size=512))
    tokenizer = processor.tokenizer
    special = set(special_vocabulary(tokenizer).values()) - {tokenizer.eos_token_id}
    assert {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<image>")} <= special
    assert set(model.generation_config.suppress_tokens) == special
    assert set(wide.generation_config.suppress_tokens) == special | set(range(len(tokenizer), 512))


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("vision_encoder", SMALL_ENCODERS)
def test_saved_folders_load_by_the_auto_classes(vision_encoder, original_format, tmp_path):
    model, processor = tiny(vision_encoder)
    inputs = encode(processor, frames(2), TEXTS)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ManakoConfig)
    assert (config.vision_config.model_type, config.num_image_tokens) == (model.config.vision_config.model_type, 16)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert_same_model(model, loaded, inputs)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, ManakoModel)
    assert torch.equal(last_hidden(model, inputs), base(**inputs).last_hidden_state[:, -1])
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded_processor, ManakoProcessor)
    again = encode(loaded_processor, frames(2), TEXTS)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "qwen2"])
def test_a_pretrained_language_model(kind, tmp_path):
    """The composed model answers a text as the language model does; tied weights stay tied through a folder."""
    options = {"tie_word_embeddings": True} if kind == "llama_tied" else {}
    text_folder(tmp_path / "text", kind.removesuffix("_tied"), **options)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    model, processor = tiny(language_model=tmp_path / "text")
    ids = torch.tensor([processor.tokenizer.encode("go to the red ball")])
    with torch.no_grad():
        logits = own(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits[..., : logits.shape[-1]], logits, atol=1e-4)
    tied = kind != "llama"
    inputs = encode(processor, frames(2), TEXTS)
    model.save_pretrained(tmp_path / "vlm")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    assert_same_model(model, loaded, inputs)
    for either in (model, loaded):
        assert (either.lm_head.weight is either.get_input_embeddings().weight) == tied
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id  # it had none of its own
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=True)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_a_language_model_whose_logits_are_no_plain_product_is_refused(tmp_path):
    text_folder(tmp_path, "gemma2")  # caps its logits
    with pytest.raises(PolicyError, match="makes its logits by more than one matrix .* choose another one"):
        tiny(language_model=tmp_path)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_pretrained_vision_encoder(kind, tmp_path):
    """Of two towers the vision tower is taken; class and register tokens are dropped, one feature a patch stays."""
    model, processor = tiny(vision_folder(tmp_path / "vision", kind).as_posix())
    assert model.config.num_image_tokens == 16
    inputs = encode(processor, frames(2, (40, 56, 3)), TEXTS)
    whole = AutoModel.from_pretrained(tmp_path / "vision")
    tower = whole.vision_model if kind == "clip" else whole
    with torch.no_grad():
        expected = tower(pixel_values=inputs["pixel_values"]).last_hidden_state[:, -16:]  # (B, P, Dv)
        assert torch.equal(model.model.get_vision_features(inputs["pixel_values"]), expected)
    one, other = last_hidden(model, encode(processor, frames(2), [TEXTS[0]] * 2))
    assert (one - other).norm() / one.norm() > 0.05
    model.save_pretrained(tmp_path / "vlm")
    assert_same_model(model, AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm"), inputs)


def test_parts_saved_in_half_precision(tmp_path):
    model, processor = tiny(vision_folder(tmp_path / "vision", "clip", torch.bfloat16).as_posix())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(**encode(processor, frames(1), TEXTS[:1]))


class Pooled(Adapter):
    """Four visual tokens whatever the number of patches."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.proj = torch.nn.Linear(vision_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(F.adaptive_avg_pool1d(features.mT, 4).mT)


def test_features_are_standardised_by_what_was_fitted():
    """By hand; the last channel hardly varies, so it is divided by a tenth of the mean deviation instead of its own."""
    torch.manual_seed(0)
    adapter, plain = ADAPTERS["mlp_zscore"](3, 8), ADAPTERS["mlp"](3, 8)
    plain.load_state_dict({name: tensor for name, tensor in adapter.state_dict().items() if "feature" not in name})
    features = torch.randn(6, 4, 3) * torch.tensor([1.0, 5.0, 1e-6]) + torch.tensor([10.0, -3.0, 7.0])
    assert torch.equal(adapter(features), plain(features)) and not adapter.is_fitted
    adapter.fit(features)
    rows = features.reshape(-1, 3)
    deviation = rows.std(0)
    deviation[2] = deviation.mean() / 10
    assert adapter.is_fitted
    torch.testing.assert_close(adapter(features), plain((features - rows.mean(0)) / deviation))


def test_a_new_adapter_is_a_class_and_a_name(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "pooled", Pooled)
    model, processor = tiny(adapter="pooled")
    inputs = encode(processor, frames(1), TEXTS[:1])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == processor.num_image_tokens == 4
    model(**inputs).logits.sum().backward()
    assert model.model.adapter.proj.weight.grad.norm() > 0


@pytest.mark.parametrize("vision_encoder", SMALL_ENCODERS)
def test_the_loss_reaches_every_part(vision_encoder):
    model, processor = tiny(vision_encoder)
    inputs = encode(processor, frames(2), TEXTS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    outputs = model(**inputs, labels=labels)
    by_hand = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(outputs.loss, by_hand, atol=1e-5)
    outputs.loss.backward()
    # a pooler comes after the patches, a ConvNeXt's last norm after its maps: neither is read
    unread = ("pooler", "post_layernorm", "vision_tower.layernorm")
    for name, parameter in model.named_parameters():
        if not any(part in name for part in unread):
            assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_a_wrong_number_of_placeholders_is_an_error():
    model, processor = tiny()
    inputs = encode(processor, frames(1), TEXTS[:1])
    inputs["input_ids"][0, -1] = model.config.image_token_id
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 17, features: 16"):
        model(**inputs)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"vision_encoder": "vitt"},
            "No vision encoder at 'vitt': expected vit, clip_vit, eva, eva_qformer, convnext, efficientnet_lite0, a",
        ),
        ({"language_model": "lama"}, "No language model at 'lama': expected tiny-llama, smollm2, a folder or a Hub id"),
        (
            {"adapter": "conv"},
            "Unknown adapter 'conv': expected one of instruct_qformer, instruct_resampler, linear, mlp",
        ),
        ({"image_size": 30, "patch_size": 8}, "image_size 30 is no multiple of patch_size 8"),
        ({"image_size": 4}, "image_size 4 is no multiple of patch_size 8"),
        ({"vision_encoder": "convnext", "patch_size": 1}, "image_size 32 is no multiple of patch_size 1"),
        ({"vision_encoder": "other", "image_size": 32}, "are for the small encoders, not for 'other'"),
    ],
)
def test_unknown_parts_are_named(arguments, sentence):
    with pytest.raises(PolicyError, match=sentence) as caught:
        tiny(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("patch_size", "tokens"), [(4, 64), (16, 4), (None, 16)])
@pytest.mark.parametrize("vision_encoder", [name for name in SMALL_ENCODERS if name != "eva_qformer"])  # K is fixed
def test_sizes_of_the_small_encoders(vision_encoder, patch_size, tokens):
    assert tiny(vision_encoder, patch_size=patch_size)[0].config.num_image_tokens == tokens


def test_frames_that_an_encoder_cannot_see(tmp_path):
    """A ViT of fixed size behind a processor that keeps the frame's proportions."""
    folder = vision_folder(tmp_path, "siglip")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    tiny(str(folder))
    with pytest.raises(PolicyError, match=r"cannot see frames of shape \(32, 48, 3\)"):
        tiny(str(folder), frame_shape=(32, 48, 3))


@pytest.mark.parametrize("part", ["vision_encoder", "language_model"])
def test_a_part_with_missing_weights_is_refused(part, tmp_path):
    """The library fills them with random numbers and goes on."""
    from safetensors.torch import load_file, save_file

    folder = text_folder(tmp_path, "llama") if part == "language_model" else vision_folder(tmp_path, "siglip")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(weights) if "layers.1" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="lacks 1 of the model's weights, such as .*layers.1"):
        tiny(**{part: str(folder)})


# ---- the processor -----------------------------------------------------------------------------------------------


def test_the_chat_template_renders_one_placeholder():
    _, processor = tiny()
    text = processor.apply_chat_template(ask("go"), add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>go<image><|assistant|>"
    ids = processor(text=[text], images=[[frames(1)[0]]])["input_ids"][0]
    assert processor.tokenizer.decode(ids) == "<|user|>go" + "<image>" * 16 + "<|assistant|>"


def test_a_text_models_own_template_is_kept(tmp_path):
    text_folder(tmp_path, "llama")
    _, processor = tiny(language_model=tmp_path)
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos_token="<|endoftext|>")
    tokenizer.chat_template = processor.tokenizer.chat_template
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go to the red ball"}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    for generation in (True, False):
        expected = tokenizer.apply_chat_template(plain, add_generation_prompt=generation, tokenize=False)
        for messages in (plain, parts):
            rendered = processor.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
            assert rendered == expected
    shown = processor.apply_chat_template(ask("go"), add_generation_prompt=True, tokenize=False)
    assert shown == "<|im_start|>user\ngo<image><|im_end|>\n<|im_start|>assistant\n"


def test_a_text_model_without_a_template(tmp_path):
    text_folder(tmp_path, "llama", template=None)
    _, processor = tiny(language_model=tmp_path)
    assert vlm_chat_template(None).endswith(PLAIN_TEMPLATE)
    shown = processor.apply_chat_template(ask("go"), add_generation_prompt=True, tokenize=False)
    assert shown == "go<image>\nAnswer:"


# ---- TRL's trainers ----------------------------------------------------------------------------------------------


def image_dataset(**columns):
    from datasets import Dataset
    from PIL import Image

    images = [[Image.fromarray(frame)] for frame in frames(4)]
    return Dataset.from_dict({"prompt": [ask(TEXTS[0])] * 4, "images": images, **columns})


def trainer_settings(folder):
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
    }


def test_supervised_fine_tuning(tmp_path):
    from trl import SFTConfig, SFTTrainer

    model, processor = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dataset = image_dataset(completion=[say(name) for name in NAMES])
    settings = SFTConfig(**trainer_settings(tmp_path))
    trainer = SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    answers = {processor.tokenizer.decode(row[row != -100]).removesuffix("<|end|>") for row in batch["labels"]}
    assert answers == set(NAMES)
    trainer.train()
    for name, tensor in model.state_dict().items():
        assert "pooler" in name or not torch.equal(tensor, before[name]), name


def test_preference_optimisation(tmp_path):
    """TRL copies the model as its reference from the folder, which needs `auto_map` and AutoModelForCausalLM."""
    from trl import DPOConfig, DPOTrainer

    tiny()[0].save_pretrained(tmp_path / "model")
    tiny()[1].save_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    dataset = image_dataset(chosen=[say("up")] * 4, rejected=[say("down")] * 4)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**trainer_settings(tmp_path / "run"), logging_steps=1),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(tmp_path / "model"),
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - np.log(2)) < 1e-4  # the model still is its reference


def test_the_light_list_of_encoders_is_the_tables():
    assert tuple(ENCODERS) == ENCODER_NAMES
