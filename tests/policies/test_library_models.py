"""Models and processors by transformers' Auto classes, with and without torchvision."""

import importlib.util
import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from manako.policies import PolicySource, load_policy
from manako.policies.library_models import load_config, load_processor, load_without_video
from tests.helpers.families import FAMILIES
from tests.helpers.foreign_models import NAMES, frames

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
WITH_VIDEO = ("llava_onevision", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
BY_TORCHVISION = (*WITH_VIDEO, "pixtral", "mistral3")  # what AutoProcessor loads with torchvision alone


def inputs(processor, folder):
    """What a processor makes of two chats and frames."""
    made = []
    for image, text in zip(frames(2, (160, 64, 3)), ("go", "turn left at the ball"), strict=True):
        chat = [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        made.append(processor(text=[prompt], images=[[Image.fromarray(image)]], return_tensors="pt"))
    return made


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("family", BY_TORCHVISION)
def test_what_the_library_does_not_load_without_torchvision_is_loaded(family, tmp_path):
    folder = str(FAMILIES[family](tmp_path))
    with pytest.raises(ImportError, match=r"[Tt]orchvision"):
        AutoProcessor.from_pretrained(folder)
    processor = load_processor(folder, load_config(folder))
    assert processor.image_processor is not None and processor.tokenizer is not None
    assert all(len(made["input_ids"][0]) > 10 and "pixel_values" in made for made in inputs(processor, folder))


@pytest.mark.skipif(not HAS_TORCHVISION, reason="the whole processors need torchvision")
@pytest.mark.parametrize("family", BY_TORCHVISION)
def test_a_processor_without_its_video_part_makes_what_the_whole_one_makes(family, tmp_path):
    folder = str(FAMILIES[family](tmp_path))
    whole = AutoProcessor.from_pretrained(folder)
    without = load_without_video(folder, load_config(folder), ImportError())
    assert type(without) is not type(whole) and type(without).__name__ == type(whole).__name__
    for one, other in zip(inputs(without, folder), inputs(whole, folder), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "smolvlm"])
def test_a_saved_folder_keeps_what_is_said_of_videos(family, tmp_path):
    """So that it loads with torchvision, too; of both kinds of files that folders have."""
    folder = FAMILIES[family](tmp_path / "folder")
    policy = load_policy(PolicySource(policy=str(folder)), NAMES, (64, 64, 3))
    policy.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    newer, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    said = json.loads(newer.read_text()).get("video_processor") if newer.is_file() else None
    said = said or json.loads(older.read_text())
    kept = saved["video_processor"]
    assert said["image_mean"] == kept["image_mean"]
    assert HAS_TORCHVISION or kept == said
    assert saved["processor_class"] == type(policy.processor).__name__
    again = load_policy(PolicySource(policy=str(tmp_path / "saved")), NAMES, (64, 64, 3))
    rows = policy.prepare(frames(1, (64, 64, 3)), ["go"])
    with torch.no_grad():
        assert torch.equal(again.distribution(rows)[0], policy.distribution(rows)[0])
