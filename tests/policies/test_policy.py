"""The policy: one forward for acting and learning, the same by its short way and by the model's own.

The short way (shared prefix, action rows) is compared with the whole forward in log-probabilities, values and the
gradient of every parameter, for the models of this project and for foreign ones.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from manako.policies import PolicyError, PolicySource, PolicySpec, VLMPolicy, load_policy
from manako.policies.architectures import any_vlm, name_parts
from manako.policies.architectures.composed import ManakoProcessor
from manako.policies.architectures.composed.build import build_vlm
from manako.policies.architectures.composed.processing import special_vocabulary, vlm_chat_template
from manako.policies.interface import Rows
from manako.policies.reading import SharedPrefix, WholePrompt
from manako.policies.reading.shared_prefix import PROBES
from tests.helpers.foreign_models import (
    FRAME,
    INSTRUCTIONS,
    NAMES,
    TURNS,
    byte_tokenizer,
    frames,
    idefics3_folder,
    llava_folder,
    text_folder,
)

MODELS = ("tiny", "convnext", "llava", "idefics3", "gpt2", "plain")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny": PolicySource(),
        "convnext": PolicySource(vision_encoder="convnext", adapter="linear"),
        "llava": PolicySource(policy=str(llava_folder(folder / "llava"))),
        "idefics3": PolicySource(policy=str(idefics3_folder(folder / "idefics3"))),
        "gpt2": PolicySource(language_model=str(text_folder(folder / "gpt2", "gpt2"))),
        "plain": PolicySource(language_model=str(text_folder(folder / "plain", "qwen2", template=None))),
    }


@pytest.fixture(params=MODELS)
def source(request, sources):
    return sources[request.param]


def loud(policy):
    """A value head that has learned something."""
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.value_head.out.weight)
    return policy


class Output(NamedTuple):
    logprobs: torch.Tensor  # (B, A)
    values: torch.Tensor  # (B,)


def read(policy, inputs, whole=False):
    """What the policy says of its inputs, by its own reading or by whole prompts."""
    reading = policy.whole_prompt if whole else None
    return Output(*policy.distribution(inputs, reading))


def gradients(policy, output):
    """The gradient of a loss in which every output counts differently, by parameter."""
    policy.zero_grad()
    weights = torch.linspace(-1, 2, output.logprobs.numel()).view_as(output.logprobs)
    (output.logprobs * weights).sum().add((output.values**2).sum()).backward()
    return {name: value.grad.clone() for name, value in policy.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("names", [NAMES, TURNS])
def test_the_short_way_is_the_whole_way(source, names):
    policy = loud(load_policy(PolicySource(**{**vars(source), "action_format": "trie"}), names, FRAME))
    assert isinstance(policy.reading, SharedPrefix) and len(policy.reading.prefix_ids) > 5
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    assert len(set(inputs["lengths"].tolist())) == 3
    short, whole = read(policy, inputs), read(policy, inputs, whole=True)
    assert torch.allclose(short.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)
    assert torch.allclose(short.values, whole.values, atol=1e-4, rtol=1e-5)
    got, expected = gradients(policy, short), gradients(policy, read(policy, inputs, whole=True))
    assert got.keys() == expected.keys() and len(got) > 20
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        # softmax does not see a bias of the keys: its gradient is rounding noise
        scale = value.abs().max() if "k_proj.bias" not in name else largest
        assert scale > 0, name
        assert (got[name] - value).abs().max() <= 1e-4 * scale, name


@torch.no_grad()
def test_other_samples_of_the_batch_do_not_matter(source):
    policy = loud(load_policy(source, NAMES, FRAME))
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    together = read(policy, inputs)
    for row in range(3):
        alone = read(policy, policy.prepare(frames(3)[row : row + 1], INSTRUCTIONS[row : row + 1]))
        assert torch.allclose(alone.logprobs[0], together.logprobs[row], atol=1e-5)
        assert torch.allclose(alone.values[0], together.values[row], atol=1e-4)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(read(policy, inputs.select(order)).logprobs, together.logprobs[order], atol=1e-5)


@torch.no_grad()
def test_padding_does_not_matter(source):
    policy = loud(load_policy(source, TURNS, FRAME))
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    word = policy.processor.tokenizer.encode("red", add_special_tokens=False)[0]
    padded = torch.nn.functional.pad(inputs["input_ids"], (0, 7), value=policy.processing.pad_id)
    beyond = torch.arange(padded.shape[1]) >= inputs["lengths"][:, None]
    wider = Rows({**inputs.columns, "input_ids": padded}, inputs.fillers)
    other = Rows({**inputs.columns, "input_ids": padded.masked_fill(beyond, word)}, inputs.fillers)
    expected = read(policy, inputs)
    for whole in (False, True):
        for given in (wider, other):
            output = read(policy, given, whole)
            assert torch.allclose(output.logprobs, expected.logprobs, atol=1e-5)
            assert torch.allclose(output.values, expected.values, atol=1e-4)


@torch.no_grad()
def test_the_answer_depends_on_frame_and_instruction(source):
    policy = loud(load_policy(source, NAMES, FRAME))
    output = read(policy, policy.prepare(frames(2)[[0, 1, 0]], ["go", "go", "turn left"]))
    for other in (1, 2):
        assert (output.logprobs[0] - output.logprobs[other]).abs().max() > 1e-3
        assert (output.values[0] - output.values[other]).abs() > 1e-2


@torch.no_grad()
def test_every_instruction_follows_the_same_prefix(source):
    """Also those whose first character a tokenizer might join with the text before."""
    policy = load_policy(source, NAMES, FRAME)
    odd = [*PROBES, "...", "\n\n", "0", "?!", "  x", "Answer", "go", "é", "🙂", "'", "user", ":", "</s>"]
    inputs = policy.prepare(frames(len(odd)), odd)
    assert (inputs["input_ids"][:, : len(policy.reading.prefix_ids)] == policy.reading.prefix_ids).all()
    assert torch.allclose(read(policy, inputs).logprobs, read(policy, inputs, whole=True).logprobs, atol=1e-5)


@torch.no_grad()
def test_a_prefix_ends_before_what_a_tokenizer_may_join():
    model, processor = build_vlm("vit", "mlp", "tiny-llama", FRAME)
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<image>")
    tokenizer = byte_tokenizer(special, split=False, pad_token="<|pad|>", eos_token="<|end|>")
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    processor = ManakoProcessor(processor.image_processor, tokenizer, 16, vlm_chat_template(None))
    policy = VLMPolicy(name_parts(model, processor), PolicySpec(NAMES, FRAME))
    inputs = policy.prepare(frames(3), ["go", "red", ""])
    joined = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert any(token.endswith("go") and len(token) > 2 for token in joined)  # the line's end and the instruction
    assert isinstance(policy.reading, SharedPrefix)
    assert torch.allclose(read(policy, inputs).logprobs, read(policy, inputs, whole=True).logprobs, atol=1e-5)


def test_what_is_stored_is_what_the_policy_sees(source):
    policy = load_policy(source, NAMES, FRAME)
    images = frames(2)
    inputs = policy.prepare(images, ["go to the red ball", "go"])
    assert isinstance(inputs, Rows)
    assert inputs["input_ids"].dtype == inputs["lengths"].dtype == torch.int64 and inputs["frames"].dtype == torch.uint8
    text = policy.processor.tokenizer.decode(inputs["input_ids"][0])
    assert policy.codec.legend in text and text.count("go to the red ball") == 1
    rows = inputs.select(torch.tensor([1]))
    assert rows["lengths"].tolist() == [inputs["lengths"][1]] and torch.equal(rows["frames"][0], inputs["frames"][1])
    moved = inputs.to(torch.device("cpu"))
    assert all(torch.equal(moved[name], column) for name, column in inputs.columns.items())


# ---- the value head ----------------------------------------------------------------------------------------------


def test_values_start_at_zero(source):
    policy = load_policy(source, NAMES, FRAME)
    output = read(policy, policy.prepare(frames(3), INSTRUCTIONS))
    assert torch.equal(output.values, torch.zeros(3)) and output.values.dtype == torch.float32
    (output.values - 1).square().sum().backward()
    assert policy.value_head.out.weight.grad.norm() > 0


# ---- falling back ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_wrong_prefix_is_not_used_and_the_header_says_why(part, monkeypatch):
    right = SharedPrefix.run_prefix

    def wrong(self):
        cache = right(self)
        for layer in cache.layers:
            setattr(layer, part, getattr(layer, part) * 1.1)
        return cache

    expected = load_policy(PolicySource(), NAMES, FRAME)
    monkeypatch.setattr(SharedPrefix, "run_prefix", wrong)
    policy = load_policy(PolicySource(), NAMES, FRAME)
    assert isinstance(policy.reading, WholePrompt) and "differs from the model's own forward" in policy.why_whole
    assert dict(expected.describe())["forward"].startswith(expected.reading.name) and expected.why_whole is None
    assert f"whole prompts (no shared prefix: {policy.why_whole})" in dict(policy.describe())["forward"]
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    assert torch.allclose(read(policy, inputs).logprobs, read(expected, inputs, whole=True).logprobs, atol=1e-6)
    with policy.frozen_weights():
        assert torch.allclose(read(policy, inputs).logprobs, read(expected, inputs, whole=True).logprobs, atol=1e-6)


@torch.no_grad()
def test_a_model_without_the_expected_parts_reads_whole_prompts(monkeypatch):
    def missing(self):
        raise AttributeError("no attribute 'model'")

    monkeypatch.setattr(SharedPrefix, "run_prefix", missing)
    policy = load_policy(PolicySource(), NAMES, FRAME)
    assert isinstance(policy.reading, WholePrompt)
    assert policy.why_whole == "the model refused it, AttributeError: no attribute 'model'"


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 4096])
def test_a_sliding_window_shorter_than_the_prompts_reads_whole_prompts(window, tmp_path):
    """Its cache forgets what the short way needs; the answers stay the model's own."""
    source = PolicySource(policy=str(llava_folder(tmp_path, MistralConfig, sliding_window=window)))
    policy = load_policy(source, TURNS, FRAME)
    assert isinstance(policy.reading, WholePrompt if window == 8 else SharedPrefix)
    inputs = policy.prepare(frames(1), ["go"])
    pixels = policy.processing.pipeline.pixels(inputs["frames"])
    (branch,) = policy.codec.branches
    logits = policy.vlm(input_ids=inputs["input_ids"], **pixels).logits[0, -1, list(branch.children)]
    assert torch.allclose(read(policy, inputs).logprobs[0], logits.log_softmax(-1), atol=1e-5)


@torch.no_grad()
def test_an_instruction_longer_than_the_window_reads_whole_prompts_for_that_batch(tmp_path):
    """The check at construction has seen shorter ones."""
    policy = load_policy(
        PolicySource(policy=str(llava_folder(tmp_path, MistralConfig, sliding_window=140))), TURNS, FRAME
    )
    assert isinstance(policy.reading, SharedPrefix)
    inputs = policy.prepare(frames(2), ["go", "go to the red ball " * 20])
    assert inputs["lengths"][0] < 140 < inputs["lengths"][1]
    assert policy.reading.is_beyond_window(inputs)
    short, whole = read(policy, inputs), read(policy, inputs, whole=True)
    assert torch.equal(short.logprobs, whole.logprobs) and torch.equal(short.values, whole.values)


# ---- dropout, frozen weights, precision --------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_dropout_is_off_when_acting_and_when_learning(trainable, tmp_path):
    folder = text_folder(tmp_path, "llama", attention_dropout=0.5)
    policy = load_policy(PolicySource(language_model=str(folder), trainable=trainable), NAMES, FRAME)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    acting = read(policy, inputs)
    assert policy.train() is policy and policy.training
    assert not any(module.training for module in policy.vlm.modules())
    learning, again = read(policy, inputs), read(policy, inputs)
    assert torch.equal(learning.logprobs, acting.logprobs) and torch.equal(again.logprobs, acting.logprobs)
    policy.vlm.train()  # the dropout is real
    assert not torch.allclose(read(policy, inputs).logprobs, acting.logprobs, atol=1e-3)


def test_frozen_weights_keep_the_prefix_until_weights_change(monkeypatch):
    policy = load_policy(PolicySource(), NAMES, FRAME)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    before = read(policy, inputs).logprobs
    calls = []
    run = SharedPrefix.run_prefix
    monkeypatch.setattr(SharedPrefix, "run_prefix", lambda self: calls.append(1) or run(self))
    with policy.frozen_weights():
        for _ in range(3):
            output = read(policy, inputs)
        assert len(calls) == 1
        assert not output.logprobs.requires_grad
        assert torch.equal(output.logprobs, before)
    with torch.no_grad():
        for parameter in policy.vlm.model.language_model.layers[0].parameters():
            parameter.mul_(1.5)
    after = read(policy, inputs)
    assert len(calls) == 2 and after.logprobs.requires_grad
    assert not torch.allclose(after.logprobs, before, atol=1e-4)
    assert torch.allclose(after.logprobs, read(policy, inputs, whole=True).logprobs, atol=1e-5)
    with pytest.raises(KeyError), policy.frozen_weights():
        raise KeyError
    assert read(policy, inputs).logprobs.requires_grad


@torch.no_grad()
def test_half_precision():
    policy = load_policy(PolicySource(dtype="bfloat16"), NAMES, FRAME)
    single = load_policy(PolicySource(), NAMES, FRAME)
    assert policy.vlm.dtype == torch.bfloat16 and isinstance(policy.reading, SharedPrefix)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    output, expected = read(policy, inputs), read(single, inputs)
    assert output.logprobs.dtype == output.values.dtype == torch.float32
    assert torch.allclose(output.logprobs.exp().sum(-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(output.logprobs, expected.logprobs, atol=0.25)


# ---- what cannot be used -----------------------------------------------------------------------------------------


def test_frames_of_another_shape():
    policy = load_policy(PolicySource(), NAMES, FRAME)
    with pytest.raises(PolicyError, match=r"shape \(40, 40, 3\) came, but this policy was built for \(32, 32, 3\)"):
        policy.prepare(np.zeros((2, 40, 40, 3), dtype=np.uint8), ["go", "go"])


def test_an_instruction_longer_than_the_model_reads(sources):
    policy = load_policy(sources["gpt2"], NAMES, FRAME)
    read(policy, policy.prepare(frames(1), ["go " * 40]))
    with pytest.raises(PolicyError, match="tokens, but the model reads at most 299: shorten the instruction"):
        policy.prepare(frames(1), ["xyz " * 300])
    tiny = load_policy(sources["tiny"], NAMES, FRAME)
    assert tiny.prepare(frames(1), ["目" * 2600])["lengths"] > 7800  # three bytes each
    with pytest.raises(PolicyError, match="tokens, but the model reads at most"):
        tiny.prepare(frames(1), ["目" * 3000])


def test_a_tokenizer_that_joins_the_prefix_with_an_instruction(monkeypatch):
    policy = load_policy(PolicySource(), NAMES, FRAME)
    ids = policy.prompts.encode("go")
    monkeypatch.setattr(policy.prompts, "encode", lambda instruction, past: (*ids[:10], 9, *ids[10:]))
    with pytest.raises(PolicyError, match="joins the text before the instruction with the instruction 'go'"):
        policy.prepare(frames(1), ["go"])


def test_a_processor_without_an_image_token():
    model, processor = build_vlm("vit", "mlp", "tiny-llama", FRAME)
    del processor.image_token
    with pytest.raises(PolicyError, match="names no image token: expected a vision-language model"):
        any_vlm.name_parts(model, processor)


def test_a_policy_without_lora_is_no_reference():
    policy = load_policy(PolicySource(), NAMES, FRAME)
    with pytest.raises(PolicyError, match="no LoRA to switch off"), policy.as_reference():
        pass


@pytest.mark.parametrize("action_format", ["token", "choice", "trie"])
def test_no_special_token_can_be_chosen(source, action_format):
    source = PolicySource(**{**vars(source), "action_format": action_format})
    policy = load_policy(source, ("go", "up"), FRAME)
    special = set(special_vocabulary(policy.processor.tokenizer).values()) | {policy.parts.placeholder_id}
    assert not special.intersection(child for branch in policy.codec.branches for child in branch.children)


def test_a_tokenizer_without_padding(tmp_path):
    """Padding is never read, so any id will do."""
    folder = llava_folder(tmp_path)
    tokenizer = byte_tokenizer(("<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"))
    tokenizer.save_pretrained(folder)
    policy = load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    assert torch.allclose(read(policy, inputs).logprobs, read(policy, inputs, whole=True).logprobs, atol=1e-5)
