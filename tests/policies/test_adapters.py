"""Adapters with queries of their own, and rows made of them: the library's numbers, text, folders, what is refused."""

import pytest
import torch
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.adapters import ADAPTERS, Text
from manako.policies.adapters.qformer import InstructQFormerAdapter, QFormerAdapter, places
from manako.policies.adapters.resampler import InstructResamplerAdapter, ResamplerAdapter
from manako.policies.architectures.composed.build import build_vlm
from manako.policies.architectures.composed.processing import ADAPTER_TEXT
from manako.policies.encoders import build_encoder, eva_qformer
from manako.policies.features import COLUMN
from manako.policies.trainable import part_of
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, blip2_folder, frames, llava_folder

VISION, WIDTH, BATCH, PATCHES, LENGTH = 24, 32, 2, 5, 6
READING = [name for name in sorted(ADAPTERS) if ADAPTERS[name].wants_text]
PRESETS = ("blip2", "instructblip", "minigpt4", "llava")


def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind(VISION, WIDTH).eval()


def features(seed=0):
    return torch.randn(BATCH, PATCHES, VISION, generator=torch.Generator().manual_seed(seed))


def text(lengths=(LENGTH, 3), seed=1):
    """Embeddings (B, T, D), and a mask that ends at the lengths."""
    embeddings = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Text(embeddings, torch.arange(LENGTH) < torch.tensor(lengths)[:, None])


def load(policy, trainable="full", **source):
    return load_policy(PolicySource(policy=str(policy), trainable=trainable, lora_rank=2, **source), NAMES, FRAME)


# ---- adapters against the library --------------------------------------------------------------------------------


@torch.no_grad()
def test_queries_that_read_text_are_those_of_the_librarys_instructblip():
    """Its word and position tables are filled with what the adapter makes of the language model's embeddings."""
    adapter, words = make(InstructQFormerAdapter), torch.randn(50, WIDTH)
    config = adapter.qformer.config
    options = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "encoder_hidden_size")
    own = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(
            **{name: getattr(config, name) for name in options},
            cross_attention_frequency=1,
            vocab_size=50,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()
    weights = {
        name.replace("layernorm", "embeddings.layernorm", 1) if name.startswith("layernorm") else name: value
        for name, value in adapter.qformer.state_dict().items()
    }
    left = own.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and all("_embeddings" in name for name in left.missing_keys)
    own.embeddings.word_embeddings.weight.copy_(adapter.text_proj(words))
    mask = torch.tensor([[1] * LENGTH, [1] * 3 + [0] * 3])
    own.embeddings.position_embeddings.weight[:LENGTH] = places(mask[:1].bool(), words)[0]
    ids = torch.randint(0, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    queries = adapter.queries.expand(BATCH, -1, -1)
    seen = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), mask], dim=1)
    states = own(ids, attention_mask=seen, query_embeds=queries, encoder_hidden_states=features()).last_hidden_state
    expected = adapter.proj(states[:, : queries.shape[1]])
    torch.testing.assert_close(adapter(features(), Text(words[ids], mask.bool())), expected)


@torch.no_grad()
@pytest.mark.parametrize("with_text", [False, True])
def test_latents_are_those_of_the_librarys_resampler(with_text):
    """Of the features, and of the text as if it were more of them."""
    adapter = make(InstructResamplerAdapter if with_text else ResamplerAdapter)
    own = Idefics2PerceiverResampler(adapter.resampler.config).eval()
    own.load_state_dict(adapter.resampler.state_dict())
    read = text()
    context, seen = adapter.proj(features()), torch.ones(BATCH, PATCHES, dtype=torch.long)
    if with_text:
        words = adapter.text_proj(read.embeddings) + places(read.mask, read.embeddings)
        context, seen = torch.cat([context, words], dim=1), torch.cat([seen, read.mask.long()], dim=1)
    torch.testing.assert_close(adapter(features(), read if with_text else None), own(context, seen))


@torch.no_grad()
def test_text_that_is_masked_throughout_is_no_text():
    plain, reading = make(ResamplerAdapter), make(InstructResamplerAdapter)
    reading.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(reading(features(), text((0, 0))), plain(features()))


def test_places_by_hand():
    """Two tokens behind one of padding, width 4: sin and cos of 0 and 1, at rates 1 and 1/100."""
    made = places(torch.tensor([[False, True, True]]), torch.zeros(4))[0, 1:]
    expected = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.841471, 0.540302, 0.01, 0.99995]])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", READING)
def test_padding_of_the_text_changes_nothing_and_another_text_does(name):
    adapter, read = make(ADAPTERS[name]), text((LENGTH, 3))
    here = adapter(features(), read)
    short = Text(read.embeddings[1:, :3], read.mask[1:, :3])
    torch.testing.assert_close(here[1:], adapter(features()[1:], short))
    filler = torch.full((1, 2, WIDTH), 7.0)
    left = Text(torch.cat([filler, short.embeddings], 1), torch.tensor([[False] * 2 + [True] * 3]))
    torch.testing.assert_close(here[1:], adapter(features()[1:], left))
    assert (here - adapter(features(), text(seed=2))).square().mean().sqrt() > 0.05
    assert (here - adapter(features(3), read)).square().mean().sqrt() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", [QFormerAdapter, ResamplerAdapter])
def test_tokens_of_one_frame_differ(kind):
    made = make(kind)(features())
    assert made.shape == (BATCH, 16, WIDTH) and made.std(1).mean() > 0.1


# ---- text from the prompt to the adapter -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reading():
    return build_vlm("eva", "instruct_qformer", "tiny-llama", FRAME)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_say_alone_and_together_the_same(reading, side, tmp_path):
    model, _ = reading
    reading[1].save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)  # that the adapter reads text is saved
    processor.tokenizer.padding_side = side
    texts, images = ["go <image> :", "move to the far end of the room <image> :"], list(frames(2))
    together = processor(text=texts, images=[[image] for image in images], return_tensors="pt", padding=True)
    before = [processor.tokenizer(text.split("<image>")[0]).input_ids for text in texts]
    for row, ids in enumerate(before):
        assert together["text_input_ids"][row, : len(ids)].tolist() == ids
        assert together["text_attention_mask"][row].sum() == len(ids)
    last = together["attention_mask"].cumsum(1).argmax(1)
    places_ = (together["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**together, position_ids=places_).logits[torch.arange(2), last]
    for row in range(2):
        alone = processor(text=texts[row], images=images[row], return_tensors="pt")
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[row], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapter_without_its_text_says_so(reading):
    model, processor = reading
    given = dict(processor(text="go <image> :", images=frames(1)[0], return_tensors="pt"))
    del given["text_input_ids"]
    with pytest.raises(ValueError, match="No text_input_ids came, but the adapter 'instruct_qformer' reads"):
        model(**given)
    _, other = build_vlm("eva", "qformer", "tiny-llama", FRAME)
    assert not set(ADAPTER_TEXT) & set(other(text="go <image> :", images=frames(1)[0], return_tensors="pt"))


@torch.no_grad()
@pytest.mark.parametrize("adapter", READING)
def test_stored_features_and_text_together_say_what_pixels_say(adapter):
    policy = load("instructblip", "adapter", adapter=adapter)
    assert policy.processing.stores_features and policy.processing.of_text == ADAPTER_TEXT
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    assert COLUMN in inputs.columns
    stored = policy.distribution(inputs)[0]
    del inputs.columns[COLUMN]
    torch.testing.assert_close(stored, policy.distribution(inputs)[0])
    inputs.columns["text_input_ids"] = inputs["text_input_ids"].flip(0)  # the adapter's alone
    inputs.columns["text_attention_mask"] = inputs["text_attention_mask"].flip(0)
    assert (policy.distribution(inputs)[0] - stored).abs().max() > 1e-2


@torch.no_grad()
def test_generate_with_a_cache_says_the_same(reading):
    model, processor = reading
    given = processor(text="go to the end <image> :", images=frames(1)[0], return_tensors="pt")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**given, **options, use_cache=use) for use in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


# ---- presets and folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_trainable_marks_the_adapter_alone(preset):
    policy = load(preset, "adapter")
    parts = {name: part_of(name, policy.parts) for name, p in policy.vlm.named_parameters() if p.requires_grad}
    assert set(parts.values()) == {"adapter"}
    assert set(parts) == {name for name, _ in policy.vlm.named_parameters() if name.startswith("model.adapter.")}
    if preset == "minigpt4":
        assert set(parts) == {"model.adapter.proj.weight", "model.adapter.proj.bias"}


@pytest.fixture(scope="module")
def places_of(tmp_path_factory):
    """Folders: two BLIP-2 of the library, of which one compares and does not speak, and a run of the preset."""
    root = tmp_path_factory.mktemp("blip2")
    whole, compares, run = root / "whole", root / "compares", root / "run"
    blip2_folder(whole)
    torch.manual_seed(1)
    other = Blip2ForImageTextRetrieval(Blip2Config.from_pretrained(whole))
    torch.nn.init.normal_(other.query_tokens)
    other.save_pretrained(compares)
    AutoProcessor.from_pretrained(whole).save_pretrained(compares)
    load("blip2", "full", seed=3).save(run)
    return {"whole": whole, "compares": compares, "run": run}


@torch.no_grad()
@pytest.mark.parametrize("place", ["whole", "compares", "run"])
def test_minigpt4_sees_as_the_folders_blip2_does(place, places_of):
    policy = load("minigpt4", "adapter", vision_encoder=str(places_of[place]))
    pixels = policy.processing.pipeline.pixels(policy.prepare(frames(2), INSTRUCTIONS[:2])["frames"])["pixel_values"]
    seen = policy.vlm.model.get_vision_features(pixels)
    if place == "run":
        own = load(places_of[place]).vlm.model
        expected = own.adapter.qformer(
            own.adapter.queries.expand(2, -1, -1), encoder_hidden_states=own.get_vision_features(pixels)
        ).last_hidden_state
    elif place == "whole":
        own = Blip2Model.from_pretrained(places_of[place]).eval()
        expected = own.get_qformer_features(pixels)
    else:
        own = Blip2ForImageTextRetrieval.from_pretrained(places_of[place]).eval()
        expected = own.qformer(
            own.query_tokens.expand(2, -1, -1), encoder_hidden_states=own.vision_model(pixels).last_hidden_state
        ).last_hidden_state
    torch.testing.assert_close(seen, expected)
    assert (seen[0] - seen[1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("place", ["whole", "compares", "run"])
def test_a_folders_eva_is_an_encoder(place, places_of):
    encoder, _ = build_encoder(str(places_of[place]), FRAME)
    pixels = torch.randn(1, 3, 32, 32)
    own = {"whole": Blip2ForConditionalGeneration, "compares": Blip2ForImageTextRetrieval}.get(place)
    vision = load(places_of[place]).vlm.model.vision_tower if own is None else own.from_pretrained(places_of[place])
    vision = (vision if own is None else vision.vision_model).eval()
    assert torch.equal(encoder.eval()(pixels).last_hidden_state, vision(pixels).last_hidden_state)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_minigpt4_of_a_folder_is_saved_and_found_again(trainable, places_of, tmp_path):
    policy = load("minigpt4", trainable, vision_encoder=str(places_of["whole"]))
    policy.save(tmp_path / "saved")
    again = load(tmp_path / "saved", trainable)
    inputs = policy.prepare(frames(2), INSTRUCTIONS[:2])
    assert all(map(torch.equal, policy.distribution(inputs), again.distribution(inputs)))


# ---- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["flamingo", "uniter", "vilbert"])
@pytest.mark.parametrize("adapter", READING)
def test_a_row_that_gives_no_text_refuses_an_adapter_that_reads_some(row, adapter):
    with pytest.raises(PolicyError, match=f"'{adapter}' reads the prompt's text, but .* the frame alone") as caught:
        load(row, adapter=adapter)
    assert "\n" not in str(caught.value) and "qformer, resampler." in str(caught.value)


def test_minigpt4_says_which_folders_it_takes(places_of, tmp_path):
    load("tiny").save(tmp_path / "tiny")
    load("instructblip").save(tmp_path / "reads")
    llava_folder(tmp_path / "llava")
    for place, came in (
        ("tiny", "a policy of vit and mlp"),
        ("reads", "a policy of blip_2_vision_model and instruct_qformer"),
        ("llava", "a llava"),
        ("nowhere", "There is no folder"),
    ):
        with pytest.raises(PolicyError, match=f"{came}.*expected .* of a BLIP-2") as caught:
            load("minigpt4", vision_encoder=str(tmp_path / place))
        assert "\n" not in str(caught.value)
    with pytest.raises(PolicyError, match="Q-Former are taken"):
        eva_qformer.load(str(tmp_path / "llava"))


def test_a_blip2_without_its_queries_is_incomplete(places_of, tmp_path):
    model = Blip2ForConditionalGeneration.from_pretrained(places_of["whole"])
    weights = {name: value for name, value in model.state_dict().items() if name != "query_tokens"}
    model.save_pretrained(tmp_path, state_dict=weights)
    AutoProcessor.from_pretrained(places_of["whole"]).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="lacks 1 of the model's weights, such as query_tokens"):
        load("minigpt4", vision_encoder=str(tmp_path))
