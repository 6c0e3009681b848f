"""Policies on disk: what transformers and PEFT write, plus value_head.safetensors and policy.json.

A folder written by `save_policy` is a model folder: `AutoModelForImageTextToText.from_pretrained` (all weights) or
`PeftModel.from_pretrained` (LoRA) load it, and `load_policy` makes a policy of it again. policy.json holds SHA-256
digests, of what learns and of the base that does not, so that weights that silently did not load are an error; the
manifest holds the sums of all files, and no folder with a policy.json or a manifest is read that differs from it.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError

from manako.bounded import json_object, read_text, shown
from manako.errors import first_line
from manako.manifest import write_manifest
from manako.policies.adapters import Adapter
from manako.policies.default_trainable import POLICY_FILE
from manako.policies.errors import PolicyError
from manako.policies.pretrained import quietly
from manako.policies.source import PolicySource
from manako.settings import check_settings
from manako.spaces import space_to_json

if TYPE_CHECKING:
    from manako.policies.vlm_policy import VLMPolicy

VALUE_HEAD_FILE = "value_head.safetensors"
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
LARGEST_SIDE = 2**14  # of a frame, in pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_policy(policy: "VLMPolicy", folder: Path) -> None:
    """Writes the policy into a folder that exists, and the manifest of all that is there then."""
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
        "action_format": policy.format if policy.spec.vectors is None else "auto",
        "action_space": space_to_json(policy.spec.action_space),
        "system": policy.spec.system,
        "learned_sha256": digest(learned(policy)),
        **policy.origin,
    }
    (folder / POLICY_FILE).write_text(json.dumps(description, indent=2), encoding="utf-8")
    try:
        write_manifest(folder, deep=False)
    except ValueError as error:
        raise PolicyError(str(error)) from error


def load_weights(policy: "VLMPolicy", folder: Path) -> None:
    """Reads the weights that `save_policy` wrote back into the same policy, and checks that all of them arrived.

    Raises:
        PolicyError: files missing or damaged, or weights that differ from the saved ones.
    """
    _, description = read_description(folder)
    if policy.has_lora:
        lora = read_tensors(folder / LORA_FILE)
        try:
            unexpected = set_peft_model_state_dict(policy.vlm, lora).unexpected_keys
        except (RuntimeError, KeyError, ValueError) as error:
            raise PolicyError(
                f"The LoRA weights in {folder} do not fit this policy ({weight_fault(error)}): use the settings of its "
                "run."
            ) from error
        if unexpected:
            raise PolicyError(
                f"{folder} holds weights that this policy lacks, such as {unexpected[0]}: use the settings of its run."
            )
    else:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            state.update(read_tensors(file))
        # a tied LM head is not written: it is the embedding matrix
        tied = policy.vlm.all_tied_weights_keys
        state |= {name: state[source] for name, source in tied.items() if name not in state and source in state}
        fill(policy.vlm, state, folder)
    fill(policy.value_head, read_tensors(folder / VALUE_HEAD_FILE), folder)
    whole = policy.has_lora or description["base_sha256"] in (None, digest(frozen_of(policy.vlm)))
    if not whole or digest(learned(policy)) != description["learned_sha256"]:
        raise PolicyError(
            f"The weights loaded from {folder} are not the saved ones: the folder belongs to another model or "
            "trainable setting; use the settings of its run."
        )


def learned(policy: "VLMPolicy") -> dict[str, torch.Tensor]:
    """Returns every tensor that learns, by name."""
    return learned_of(policy.vlm, policy.value_head.state_dict())


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256 over names and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def frozen_of(vlm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns what does not learn of a model."""
    return {name: parameter for name, parameter in vlm.named_parameters() if not parameter.requires_grad}


def learned_of(vlm: torch.nn.Module, value_head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what learns or was fitted of a model, and the value head, which is no part of its files."""
    of_model: dict[str, torch.Tensor] = {
        f"vlm.{name}": parameter for name, parameter in vlm.named_parameters() if parameter.requires_grad
    }
    for name, module in vlm.named_modules():
        if isinstance(module, Adapter):
            of_model |= {f"vlm.{name}.{key}": buffer for key, buffer in module.named_buffers()}
    return of_model | {f"value_head.{name}": tensor for name, tensor in value_head.items()}


def read_description(folder: Path) -> tuple[PolicySource, dict[str, Any]]:
    """Returns the source in a folder's policy.json, and all of it.

    Raises:
        PolicyError: it is missing, damaged, or of another format.
    """
    try:
        description = json_object(read_text(folder / POLICY_FILE))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r}, this version reads {FORMAT}")
        for key, kind in DESCRIPTION.items():
            if not isinstance(description[key], kind):
                raise ValueError(f"{key} is {shown(description[key])}")
        names, shape = description["action_names"], description["frame_shape"]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"action_names is {shown(names)}")
        if len(shape) != 3 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in shape):
            raise ValueError(f"frame_shape is {shown(shape)}")
        saved = PolicySource(**description["source"])
        check_settings(saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{folder / POLICY_FILE} is damaged ({first_line(error)}): use another checkpoint."
        ) from error
    return saved, description


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file; raises PolicyError where it cannot be read."""
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{file} cannot be read ({first_line(error)}): use another checkpoint.") from error


def fill(module: torch.nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Loads every weight of `module` from a state read in `folder`; raises PolicyError where names or sizes differ."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise PolicyError(
            f"The weights in {folder} do not fit this policy ({weight_fault(error)}): use the settings of its run."
        ) from error


def weight_fault(error: Exception) -> str:
    """Returns the part of an error's message that says which weight: torch and PEFT put it into the second line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    lines = [line.strip().rstrip(".:") for line in str(error).strip().splitlines()]
    return (lines[1] if len(lines) > 1 else first_line(error))[:160]
