"""Policies on disk: what transformers and PEFT write, plus value_head.safetensors and policy.json.

A folder written by `save_policy` is a model folder: `AutoModelForImageTextToText.from_pretrained` (all weights) or
`PeftModel.from_pretrained` (LoRA) load it, and `load_policy` makes a policy of it again. policy.json holds SHA-256
digests, of what learns and of the base that does not, so that weights that silently did not load are an error.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from manako.errors import first_line
from manako.policies.adapters import ZScoreMLPAdapter
from manako.policies.architectures.composed.presets import (
    LANGUAGE_MODELS,
    LOADING_ERRORS,
    PRESETS,
    VISION_ENCODERS,
    build_vlm,
    check_complete,
    quietly,
)
from manako.policies.errors import PolicyError
from manako.policies.source import SYSTEM, PolicySource
from manako.policies.trainable import parts_of, set_trainable
from manako.policies.vlm_policy import PolicySpec, VLMPolicy

POLICY_FILE, VALUE_HEAD_FILE = "policy.json", "value_head.safetensors"
LORA_CONFIG_FILE, LORA_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
FORMAT = 1
DESCRIPTION = {  # what policy.json holds beside its format
    "action_names": list,
    "frame_shape": list,
    "action_format": str,
    "system": str,
    "learned_sha256": str,
    "source": dict,
    "base_sha256": str | None,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(source: PolicySource, action_names: Sequence[str], frame_shape: tuple[int, int, int]) -> VLMPolicy:
    """The policy of a preset, a folder or a Hub id, for these actions and frames.

    A folder of `save_policy` also brings its value head, and its system text and action format where the source leaves
    them at their defaults.

    Raises:
        PolicyError: nothing loadable there, damaged files, or parts that do not fit.
    """
    if source.dtype not in DTYPES:
        raise PolicyError(f"dtype is {source.dtype!r}: expected one of {', '.join(DTYPES)}.")
    parts = parts_of(source.trainable)
    source = _with_whole_paths(source)
    dtype, base_sha, head = DTYPES[source.dtype], None, None
    folder = Path(source.policy)
    if source.policy in PRESETS:
        vlm, processor = _build_preset(source, frame_shape)
    else:
        of_presets = ("vision_encoder", "adapter", "language_model", "image_size", "patch_size")
        given = [name for name in of_presets if getattr(source, name) is not None]
        if given:
            raise PolicyError(
                f"{', '.join(given)} came, but only a preset ({', '.join(PRESETS)}) has parts to choose, not "
                f"{source.policy!r}: leave it out, or start from a preset."
            )
        if (folder / POLICY_FILE).is_file():
            saved, description = _read_description(folder)
            source = _fill_in(source, action_names, description)
            vlm, processor, head = _load_own(folder, saved, description)
            if isinstance(vlm, PeftModel) and parts ^ parts_of(saved.trainable) <= {"value_head"}:
                if source.dtype != saved.dtype:
                    raise PolicyError(
                        f"dtype is {source.dtype}, but the LoRA weights in {folder} belong to a {saved.dtype} model: "
                        f"expected dtype: {saved.dtype}, or trainable: full, which merges them."
                    )
                # from here on it is what it was: LoRA on the same base
                source = replace(
                    saved, system=source.system, action_format=source.action_format, trainable=source.trainable
                )
                base_sha = description["base_sha256"]
            elif isinstance(vlm, PeftModel):
                vlm = vlm.float().merge_and_unload()
        else:
            vlm, processor = _load_any(source.policy, dtype)
        if folder.is_dir() and base_sha is None:
            source = replace(source, policy=str(folder.resolve()))
    if base_sha is None:
        vlm = vlm.to(dtype)
        if "lora" in parts:
            base_sha = digest(vlm.state_dict())
        with quietly():
            vlm = set_trainable(vlm, source.trainable, source.lora_rank, source.lora_alpha)
        if "lora" not in parts and (frozen := _frozen(vlm)):
            base_sha = digest(frozen)
    height, width, channels = frame_shape
    spec = PolicySpec(tuple(action_names), (height, width, channels), source.action_format, source.system)
    with quietly():
        policy = VLMPolicy(vlm, processor, spec)
    if head is not None:
        _fill(policy.value_head, head, folder)
    policy.value_head.requires_grad_("value_head" in parts)
    policy.origin = {"source": asdict(source), "base_sha256": base_sha}
    return policy


def save_policy(policy: VLMPolicy, folder: Path) -> None:
    """Writes the policy into a folder that exists."""
    with quietly():
        if policy.has_lora:
            policy.vlm.save_pretrained(folder, save_embedding_layers=False)
        else:  # False: else a ViT's keys are written under their old names, which do not load strictly
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
    _, description = _read_description(folder)
    if policy.has_lora:
        lora = _read(folder / LORA_FILE)
        try:
            unexpected = set_peft_model_state_dict(policy.vlm, lora).unexpected_keys
        except (RuntimeError, KeyError, ValueError) as error:
            raise PolicyError(
                f"The LoRA weights in {folder} do not fit this policy ({detail(error)}): use the settings of its run."
            ) from error
        if unexpected:
            raise PolicyError(
                f"{folder} holds weights that this policy lacks, such as {unexpected[0]}: use the settings of its run."
            )
    else:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            state.update(_read(file))
        # a tied LM head is not written: it is the embedding matrix
        tied = policy.vlm.all_tied_weights_keys
        state |= {name: state[source] for name, source in tied.items() if name not in state and source in state}
        _fill(policy.vlm, state, folder)
    _fill(policy.value_head, _read(folder / VALUE_HEAD_FILE), folder)
    whole = policy.has_lora or description["base_sha256"] in (None, digest(_frozen(policy.vlm)))
    if not whole or digest(learned(policy)) != description["learned_sha256"]:
        raise PolicyError(
            f"The weights loaded from {folder} are not the saved ones: the folder belongs to another model or "
            "trainable setting; use the settings of its run."
        )


def learned(policy: VLMPolicy) -> dict[str, torch.Tensor]:
    """Every tensor that learns, by name."""
    return _learned(policy.vlm, policy.value_head.state_dict())


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _frozen(vlm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What does not learn of a model."""
    return {name: parameter for name, parameter in vlm.named_parameters() if not parameter.requires_grad}


def _learned(vlm: torch.nn.Module, value_head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What learns or was fitted of a model, and the value head, which is no part of its files."""
    of_model: dict[str, torch.Tensor] = {
        f"vlm.{name}": parameter for name, parameter in vlm.named_parameters() if parameter.requires_grad
    }
    for name, module in vlm.named_modules():
        if isinstance(module, ZScoreMLPAdapter):
            of_model |= {f"vlm.{name}.{key}": buffer for key, buffer in module.named_buffers()}
    return of_model | {f"value_head.{name}": tensor for name, tensor in value_head.items()}


def _with_whole_paths(source: PolicySource) -> PolicySource:
    """The source with the parts' folders as they are found from anywhere."""
    places: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name, names in (("vision_encoder", VISION_ENCODERS), ("language_model", LANGUAGE_MODELS))
        if (value := getattr(source, name)) and value not in names and Path(value).is_dir()
    }
    return replace(source, **places)


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


def _read_description(folder: Path) -> tuple[PolicySource, dict[str, Any]]:
    """The source in policy.json, and all of it."""
    try:
        description = json.loads((folder / POLICY_FILE).read_text())
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r}, this version reads {FORMAT}")
        for key, kind in DESCRIPTION.items():
            if not isinstance(description[key], kind):
                raise ValueError(f"{key} is {description[key]!r}")
        saved = PolicySource(**description["source"])
        if saved.dtype not in DTYPES:
            raise ValueError(f"dtype is {saved.dtype!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{folder / POLICY_FILE} is damaged ({first_line(error)}): use another checkpoint."
        ) from error
    return saved, description


def _fill_in(source: PolicySource, action_names: Sequence[str], description: dict[str, Any]) -> PolicySource:
    """What the source leaves at its defaults is as it was when the folder was written."""
    if source.system == SYSTEM:
        source = replace(source, system=description["system"])
    if source.action_format == "auto" and list(action_names) == description["action_names"]:
        source = replace(source, action_format=description["action_format"])
    return source


def _load_own(
    folder: Path, saved: PolicySource, description: dict[str, Any]
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Model, processor and value head of a folder of `save_policy`, checked against its digests."""
    if (folder / LORA_CONFIG_FILE).is_file():
        base, processor = _build_base(folder, saved, description)
        try:
            with quietly():
                vlm = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise PolicyError(
                f"The LoRA weights in {folder} cannot be read ({detail(error)}): use another checkpoint."
            ) from error
    else:
        vlm, processor = _load_any(str(folder), DTYPES[saved.dtype])
        vlm = set_trainable(vlm, saved.trainable)
    head = _read(folder / VALUE_HEAD_FILE)
    whole = isinstance(vlm, PeftModel) or description["base_sha256"] in (None, digest(_frozen(vlm)))
    if not whole or digest(_learned(vlm, head)) != description["learned_sha256"]:
        raise PolicyError(
            f"The weights in {folder} are not the ones that policy.json names: files were changed or mixed up; use "
            "another checkpoint."
        )
    return vlm, processor, head


def _build_base(folder: Path, saved: PolicySource, description: dict[str, Any]) -> tuple[Any, Any]:
    """The model that the LoRA weights in `folder` belong to, built again and compared."""
    try:
        if saved.policy in PRESETS:
            base, processor = _build_preset(saved, tuple(description["frame_shape"]))
            base = base.to(DTYPES[saved.dtype])
        elif (Path(saved.policy) / LORA_CONFIG_FILE).is_file():  # LoRA on a policy whose own LoRA was merged
            base, processor, _ = _load_own(Path(saved.policy), *_read_description(Path(saved.policy)))
            base = base.float().merge_and_unload().to(DTYPES[saved.dtype])
        else:
            base, processor = _load_any(saved.policy, DTYPES[saved.dtype])
    except PolicyError as error:
        raise PolicyError(f"The base of the LoRA weights in {folder} cannot be loaded: {error}") from error
    if digest(base.state_dict()) != description["base_sha256"]:
        raise PolicyError(
            f"The LoRA weights in {folder} belong to another base model than {saved.policy!r} gives here: install the "
            "versions of its run, or merge the weights there."
        )
    return base, processor


def _load_any(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Any folder or Hub id that AutoModelForImageTextToText and AutoProcessor load."""
    if ("/" in name or name.startswith(".")) and not Path(name).exists() and name.count("/") != 1:
        raise PolicyError(
            f"There is no folder {name!r}: expected a preset ({', '.join(PRESETS)}), a model folder or a Hub id."
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise PolicyError(f"The folder {name!r} holds no config.json: expected a model folder or a run's checkpoint.")
    try:
        with quietly():
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            vlm, loading = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
    except ImportError as error:
        raise PolicyError(
            f"The processor of {name!r} needs a package that is not installed ({first_line(error)}); processors with a "
            "video part (SmolVLM, Qwen-VL, InternVL) need torchvision."
        ) from error
    except LOADING_ERRORS as error:
        raise PolicyError(
            f"No vision-language model at {name!r}: expected a preset ({', '.join(PRESETS)}), a model folder or a Hub "
            f"id ({first_line(error)})."
        ) from error
    check_complete(name, loading)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise PolicyError(f"{name!r} has no processor for images and text: expected a vision-language model's folder.")
    return vlm.eval(), processor


def _fill(module: torch.nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Loads every weight of `module`; raises PolicyError where names or sizes differ."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise PolicyError(
            f"The weights in {folder} do not fit this policy ({detail(error)}): use the settings of its run."
        ) from error


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{file} cannot be read ({first_line(error)}): use another checkpoint.") from error


def detail(error: Exception) -> str:
    """The part of an error's message that says which weight: torch and PEFT put it into the second line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    lines = [line.strip().rstrip(".:") for line in str(error).strip().splitlines()]
    return (lines[1] if len(lines) > 1 else first_line(error))[:160]
