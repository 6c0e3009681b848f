"""Policies on disk: what transformers and PEFT write, plus value_head.safetensors and policy.json.

A folder written by `save_policy` is a model folder: `AutoModelForImageTextToText.from_pretrained` (all weights) or
`PeftModel.from_pretrained` (LoRA) load it, and `load_policy` makes a policy of it again. policy.json holds SHA-256 digests, of
what learns and, with LoRA, of the base it belongs to, so that weights that silently did not load are an error.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from .actions import ActionFormat
from .errors import PolicyError
from .policy import PolicySpec, VLMPolicy
from .presets import PRESETS, build_vlm
from .prompts import SYSTEM
from .training import Trainable, set_trainable

POLICY_FILE, VALUE_HEAD_FILE = "policy.json", "value_head.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class PolicySource:
    """Where a policy's model comes from, and what of it learns.

    Args:
        policy: a preset's name, a folder (of this module or of any VLM), or a Hub id.
        vision_encoder: replaces the preset's encoder.
        adapter: replaces the preset's adapter.
        language_model: replaces the preset's language model.
        image_size: see `policies.presets.build_vlm`.
        patch_size: see `policies.presets.build_vlm`.
        trainable: `full`, `adapter` or `lora`.
        lora_rank: rank of the LoRA matrices.
        lora_alpha: their scale is lora_alpha / lora_rank.
        dtype: of the weights, `float32` or `bfloat16`.
        action_format: see `policies.actions`.
        system: the prompt's system text.
        seed: of random weights.
    """

    policy: str = "tiny"
    vision_encoder: str | None = None
    adapter: str | None = None
    language_model: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    trainable: Trainable = "full"
    lora_rank: int = 16
    lora_alpha: int = 32
    dtype: str = "float32"
    action_format: ActionFormat = "auto"
    system: str = SYSTEM
    seed: int = 0


def load_policy(
    source: PolicySource, action_names: tuple[str, ...], frame_shape: tuple[int, int, int]
) -> VLMPolicy:
    """The policy of a preset, a folder or a Hub id, for these actions and frames.

    Raises:
        PolicyError: nothing loadable there, damaged files, or parts that do not fit.
    """
    spec = PolicySpec(tuple(action_names), tuple(frame_shape), source.action_format, source.system)
    folder = Path(source.policy)
    own = (folder / POLICY_FILE).is_file()
    if source.policy in PRESETS:
        vlm, processor = _build_preset(source, frame_shape)
    else:
        replaced = [name for name in ("vision_encoder", "adapter", "language_model") if getattr(source, name)]
        if replaced:
            raise PolicyError(
                f"{', '.join(replaced)} can replace a part of a preset ({', '.join(PRESETS)}), not of {source.policy!r}."
            )
        vlm, processor = _load_own(folder, source) if own else _load_any(source)
    vlm = vlm.to(getattr(torch, source.dtype))
    if hasattr(vlm, "peft_config") and source.trainable != "lora":
        vlm = vlm.merge_and_unload()
    base_sha = None
    if not hasattr(vlm, "peft_config"):
        base_sha = digest(vlm.state_dict()) if source.trainable == "lora" else None
        vlm = set_trainable(vlm, source.trainable, source.lora_rank, source.lora_alpha)
    else:
        base_sha = json.loads((folder / POLICY_FILE).read_text())["base_sha256"]
        source = PolicySource(**{**asdict(source), **json.loads((folder / POLICY_FILE).read_text())["source"]})
    policy = VLMPolicy(vlm, processor, spec)
    if own:
        policy.value_head.load_state_dict(_read(folder / VALUE_HEAD_FILE))
    if folder.is_dir():
        source = PolicySource(**{**asdict(source), "policy": str(folder.resolve()) if not own else source.policy})
    policy.origin = {"source": asdict(source), "base_sha256": base_sha}
    return policy


def save_policy(policy: VLMPolicy, folder: Path) -> None:
    """Writes the policy into a folder that exists."""
    # save_original_format=False: else a ViT's keys are written under their old names and do not load strictly
    if policy.has_lora:
        policy.vlm.save_pretrained(folder, save_embedding_layers=False)
    else:
        policy.vlm.save_pretrained(folder, save_original_format=False)
    policy.processor.save_pretrained(folder)
    safetensors.torch.save_file(policy.value_head.state_dict(), folder / VALUE_HEAD_FILE)
    description = {
        "format": FORMAT,
        "action_names": list(policy.spec.action_names),
        "frame_shape": list(policy.spec.frame_shape),
        "action_format": policy.codec.format,
        "system": policy.spec.system,
        "learned_sha256": digest(learned(policy)),
        **policy.origin,
    }
    (folder / POLICY_FILE).write_text(json.dumps(description, indent=2))


def load_weights(policy: VLMPolicy, folder: Path) -> None:
    """Reads the weights that `save_policy` wrote back into the same policy, and checks that all of them arrived.

    Raises:
        PolicyError: files missing or damaged, or weights that differ from the saved ones.
    """
    if policy.has_lora:
        try:
            result = set_peft_model_state_dict(policy.vlm, load_peft_weights(str(folder), device="cpu"))
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"The LoRA weights in {folder} cannot be read ({error}): use another checkpoint.") from error
        if result.unexpected_keys:
            raise PolicyError(f"{folder} holds weights that this policy lacks, such as {result.unexpected_keys[0]}.")
    else:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            state.update(_read(file))
        unexpected = policy.vlm.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise PolicyError(f"{folder} holds weights that this policy lacks, such as {unexpected[0]}.")
        policy.vlm.tie_weights()
    policy.value_head.load_state_dict(_read(folder / VALUE_HEAD_FILE))
    saved = json.loads((folder / POLICY_FILE).read_text())["learned_sha256"]
    if digest(learned(policy)) != saved:
        raise PolicyError(
            f"The weights loaded from {folder} are not the saved ones: the folder belongs to another model or trainable "
            "setting; use the settings of its run."
        )


def learned(policy: VLMPolicy) -> dict[str, torch.Tensor]:
    """Every tensor that learns, by name."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(name.encode())
        total.update(tensor.view(torch.uint8).numpy().data if tensor.ndim else tensor[None].view(torch.uint8).numpy().data)
    return total.hexdigest()


def _build_preset(source: PolicySource, frame_shape: tuple[int, int, int]) -> tuple[Any, Any]:
    preset = PRESETS[source.policy]
    return build_vlm(
        source.vision_encoder or preset.vision_encoder,
        source.adapter or preset.adapter,
        source.language_model or preset.language_model,
        frame_shape,
        source.image_size,
        source.patch_size,
        source.seed,
    )


def _load_own(folder: Path, source: PolicySource) -> tuple[Any, Any]:
    """A folder of `save_policy`: all weights, or LoRA on a base that is built again and compared."""
    try:
        description = json.loads((folder / POLICY_FILE).read_text())
        saved_source = PolicySource(**description["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{folder / POLICY_FILE} is damaged ({error}): use another checkpoint.") from error
    if not (folder / "adapter_config.json").is_file():
        return _load_any(source)
    plain = PolicySource(**{**asdict(saved_source), "trainable": "full"})
    if saved_source.policy in PRESETS:
        base, processor = _build_preset(plain, tuple(description["frame_shape"]))
    else:
        base, processor = _load_any(plain)
    base = base.to(getattr(torch, saved_source.dtype))
    if digest(base.state_dict()) != description["base_sha256"]:
        raise PolicyError(
            f"The LoRA weights in {folder} belong to another base model than {saved_source.policy!r} gives here: install "
            "the versions of its run, or merge the weights there."
        )
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=True), processor
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(f"The LoRA weights in {folder} cannot be read ({error}): use another checkpoint.") from error


def _load_any(source: PolicySource) -> tuple[Any, Any]:
    """Any folder or Hub id that AutoModelForImageTextToText and AutoProcessor load."""
    name = source.policy
    if ("/" in name or name.startswith(".")) and not Path(name).exists() and name.count("/") != 1:
        raise PolicyError(f"There is no folder {name!r}: expected a preset ({', '.join(PRESETS)}), a folder or a Hub id.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise PolicyError(f"The folder {name!r} holds no config.json: expected a model folder or a run's checkpoint.")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        processor = AutoProcessor.from_pretrained(name)
        vlm = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, source.dtype))
    except ImportError as error:
        raise PolicyError(
            f"The processor of {name!r} needs a package that is not installed ({_sentence(error)}); processors with a video "
            "part (SmolVLM, Qwen-VL, InternVL) need torchvision."
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PolicyError(
            f"No vision-language model at {name!r}: expected a preset ({', '.join(PRESETS)}), a model folder or a Hub id "
            f"({_sentence(error)})."
        ) from error
    finally:
        logging.set_verbosity(level)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise PolicyError(f"{name!r} has no processor for images and text: expected a vision-language model's folder.")
    return vlm.eval(), processor


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{file} cannot be read ({error}): use another checkpoint.") from error


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
