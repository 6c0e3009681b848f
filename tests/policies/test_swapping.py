"""Another encoder or adapter under a trained language model: what stays is bit-equal, what is new is said."""

import pytest
import torch

from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.trainable import parameter_table
from tests.helpers.foreign_models import FRAME, NAMES, frames
from tests.helpers.small_runs import weights


def load(place, **source):
    return load_policy(PolicySource(policy=str(place), lora_rank=2, **source), NAMES, FRAME)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder whose weights are no preset's."""
    folder = tmp_path_factory.mktemp("trained")
    policy = load("tiny", seed=7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    policy.save(folder)
    return folder, weights(policy.base_vlm)


def equal_parts(policy, before):
    """The parts whose weights are those of `before`."""
    now = weights(policy.base_vlm)
    parts = {"encoder": "model.vision_tower", "adapter": "model.adapter", "language_model": "model.language_model"}
    found = {
        part: [name in before and torch.equal(before[name], value) for name, value in now.items() if place in name]
        for part, place in {**parts, "head": "lm_head"}.items()
    }
    return {part for part, same in found.items() if all(same)}


@pytest.mark.parametrize("encoder", ["convnext", "eva", "clip_vit", "vit"])
def test_a_new_encoder_under_a_trained_adapter_and_language_model(encoder, trained, tmp_path):
    folder, before = trained
    policy = load(folder, vision_encoder=encoder, trainable="encoder", seed=1)
    assert equal_parts(policy, before) == {"adapter", "language_model", "head"}
    assert torch.equal(policy.value_head.out.bias, torch.full((1,), 0.01))
    assert policy.describe()[0] == ("replaced", "vision encoder: new")
    learning = {part for part, _, count in parameter_table(policy.parts, policy.value_head) if count}
    assert learning == {"encoder"}
    inputs = policy.prepare(frames(2), ["go up", "go down"])
    policy.save(tmp_path)
    assert torch.equal(load(tmp_path).distribution(inputs)[0], policy.distribution(inputs)[0])


def test_a_new_adapter(trained):
    folder, before = trained
    policy = load(folder, adapter="instruct_qformer")
    assert equal_parts(policy, before) == {"encoder", "language_model", "head"}
    assert policy.describe()[0] == ("replaced", "adapter: new") and "text_input_ids" in policy.processing.of_text


def test_lora_on_a_run_with_a_new_encoder_finds_its_base_again(trained, tmp_path):
    policy = load(trained[0], vision_encoder="convnext", trainable="lora")
    with torch.no_grad():
        for name, parameter in policy.vlm.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    inputs = policy.prepare(frames(2), ["go up", "go down"])
    policy.save(tmp_path)
    again = load(tmp_path, trainable="lora")
    assert again.has_lora and torch.equal(again.distribution(inputs)[0], policy.distribution(inputs)[0])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"language_model": "smollm2"}, "its vision_encoder and adapter; leave it out"),
        ({"image_size": 16}, "name one by --vision_encoder"),
        ({"adapter": "glue"}, "Unknown adapter 'glue'"),
        ({"vision_encoder": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_put_in(source, said, trained):
    with pytest.raises(PolicyError, match=said):
        load(trained[0], **source)


def test_rows_that_are_not_composed_keep_their_parts(tmp_path):
    load("uniter").save(tmp_path)
    with pytest.raises(PolicyError, match="UniterForMaskedLM: only a preset"):
        load(tmp_path, vision_encoder="convnext")
