"""Which module is which part: rows say it, any_vlm guesses it; and that one file adds a part."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from manako.policies import PolicySource, load_policy
from manako.policies.adapters import ADAPTERS
from manako.policies.architectures import any_vlm, name_parts
from manako.policies.architectures.composed.build import build_vlm
from manako.policies.architectures.composed.parts import see
from manako.policies.encoders import ENCODERS, vit
from manako.policies.language_models import LANGUAGE_MODELS, tiny_llama
from manako.policies.reading import SharedPrefix
from manako.policies.trainable import parameter_groups, part_of
from tests.helpers.foreign_models import FRAME, NAMES, idefics3_folder, llava_folder

EXPECTED = {
    "llava": ("model.vision_tower", ("model.multi_modal_projector",), "model.language_model"),
    "idefics3": ("model.vision_model", ("model.connector",), "model.text_model"),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_foreign_models_parts_are_guessed_as_its_row_names_them(kind, tmp_path):
    folder = {"llava": llava_folder, "idefics3": idefics3_folder}[kind](tmp_path)
    vlm, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model = any_vlm.name_parts(vlm, processor)
    assert model == name_parts(vlm, processor)
    assert (model.encoder, model.adapter, model.decoder) == EXPECTED[kind]
    assert {model.encoder, *model.adapter, model.decoder} <= {name for name, _ in vlm.named_modules()}
    assert (model.placeholder, model.reading) == ("<image>", SharedPrefix)
    assert model.placeholder_id == processor.tokenizer.convert_tokens_to_ids("<image>")


def test_guesses_agree_with_what_the_composed_model_says_of_itself():
    parts = build_vlm("vit", "mlp", "tiny-llama", FRAME)
    assert name_parts(*parts) == any_vlm.name_parts(*parts)._replace(image_counts=False, see=see)


def test_names_are_those_of_the_plain_model_under_lora():
    plain, lora = (load_policy(PolicySource(trainable=trainable), NAMES, FRAME) for trainable in ("full", "lora"))
    again = name_parts(lora.vlm, lora.processor)
    assert again == lora.parts and again.vlm is lora.vlm
    assert again[2:] == plain.parts[2:]
    assert any_vlm.name_parts(lora.vlm, lora.processor)._replace(image_counts=False, see=see) == again


class Layer(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_an_adapter_inside_its_encoder_and_several_of_them():
    """As in the Qwen-VL family; whatever is called like the first adapter found belongs to it."""
    tower = Layer(blocks=nn.Linear(2, 2), merger=Layer(mlp=nn.Linear(2, 2), merger=nn.Linear(2, 2)))
    vlm = Layer(visual=tower, audio=Layer(merger=nn.Linear(2, 2)), language_model=nn.Linear(2, 2))
    assert any_vlm.find_adapter(vlm) == ("visual.merger", "audio.merger")
    assert any_vlm.find_encoder(vlm, any_vlm.find_adapter(vlm)) == "visual"
    assert any_vlm.find_adapter(vlm.language_model) == () and any_vlm.find_encoder(vlm.language_model) is None
    model = name_parts(*build_vlm("vit", "mlp", "tiny-llama", FRAME))._replace(
        vlm=vlm, encoder="visual", adapter=("visual.merger", "audio.merger"), decoder="language_model"
    )
    parts = {name: part_of(name, model) for name, _ in vlm.named_parameters()}
    assert {name for name, part in parts.items() if part == "encoder"} == {"visual.blocks.weight", "visual.blocks.bias"}
    assert {part for name, part in parts.items() if "merger" in name} == {"adapter"}
    assert parts["language_model.weight"] == "language_model"


def test_a_part_is_a_whole_piece_of_a_name():
    model = name_parts(*build_vlm("vit", "mlp", "tiny-llama", FRAME))
    assert part_of("model.adapter.up.weight", model) == "adapter"
    assert part_of("model.adapter_of_text.weight", model) == "language_model"
    assert part_of("base_model.model.model.adapter.modules_to_save.default.up.weight", model) == "adapter"
    assert part_of("base_model.model.model.language_model.q_proj.lora_A.default.weight", model) == "lora"
    assert part_of("lm_head.weight", model) == "language_model"


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora", "value_head"])
def test_parameter_groups_hold_what_learns_once(trainable):
    policy = load_policy(PolicySource(trainable=trainable), NAMES, FRAME)
    learning = [p for p in policy.parameters() if p.requires_grad]
    (one,) = parameter_groups(policy.parts, policy.value_head, 1e-3)
    assert one["lr"] == 1e-3 and all(a is b for a, b in zip(one["params"], learning, strict=True))  # in their order
    groups = parameter_groups(policy.parts, policy.value_head, 1e-3, 1e-2)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in learning}
    assert sum(len(group["params"]) for group in groups) == len(learning)
    own = [group["params"] for group in groups if group["lr"] == 1e-2]
    adapter = [p for name, p in policy.vlm.named_parameters() if ".adapter." in name and p.requires_grad]
    assert [list(map(id, params)) for params in own] == ([list(map(id, adapter))] if adapter else [])


def test_a_new_encoder_and_a_new_language_model_are_a_line_each(monkeypatch):
    monkeypatch.setitem(ENCODERS, "coarse", lambda frame_shape, image_size, patch_size: vit.build(frame_shape, 32, 16))
    monkeypatch.setitem(LANGUAGE_MODELS, "other", tiny_llama.build)
    model, processor = build_vlm("coarse", "linear", "other", FRAME)
    assert model.config.num_image_tokens == processor.num_image_tokens == 4


def test_most_adapters_take_no_statistics():
    features = torch.randn(2, 4, 3)
    for name, kind in ADAPTERS.items():
        adapter = kind(3, 8)
        wants = name == "mlp_zscore"
        assert adapter.is_fitted is not wants and adapter.fit(features) is wants and adapter.is_fitted


def test_any_module_of_the_package_may_be_the_first_that_is_imported():
    """Architectures name their reading, readings know the answers, answers ask the composed model's processor."""
    root = Path(__file__).parents[2]
    files = [path.relative_to(root).with_suffix("") for path in sorted((root / "policies").rglob("*.py"))]
    names = ["manako." + ".".join(file.parts).removesuffix(".__init__") for file in files]
    script = f"""
import importlib, sys
for name in {names}:
    for known in [known for known in sys.modules if known.startswith("manako")]:
        del sys.modules[known]
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
