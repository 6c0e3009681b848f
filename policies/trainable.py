"""What of a VLM learns: one field, `trainable`.

It names parts, joined by "+": `encoder`, `adapter` (projector, connector), `language_model`, `lora` (low-rank updates
of the language model's linear layers, PEFT) and `value_head`; every other part stays as loaded, bit for bit.
Ready-made:

    full      encoder + adapter + language_model + value_head
    adapter   adapter + value_head
    lora      adapter + lora + value_head
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from manako.policies.errors import PolicyError

PARTS = ("encoder", "adapter", "language_model", "lora", "value_head")
READY_MADE = {
    "full": frozenset({"encoder", "adapter", "language_model", "value_head"}),
    "adapter": frozenset({"adapter", "value_head"}),
    "lora": frozenset({"adapter", "lora", "value_head"}),
}

# Where families of VLMs keep the module between encoder and language model.
ADAPTER_NAMES = ("adapter", "multi_modal_projector", "connector", "modality_projection", "aligner", "mlp1", "merger")


def parts_of(trainable: str) -> frozenset[str]:
    """The parts that learn.

    Args:
        trainable: `full`, `adapter`, `lora`, or parts joined by "+".

    Raises:
        PolicyError: an unknown part, or LoRA beside the weights that it is there to spare.
    """
    if trainable in READY_MADE:
        return READY_MADE[trainable]
    parts = trainable.split("+")
    if not set(parts) <= set(PARTS):
        raise PolicyError(
            f"trainable is {trainable!r}: expected one of {', '.join(READY_MADE)}, or parts joined by '+' among "
            f"{', '.join(PARTS)}, such as encoder+adapter."
        )
    if {"lora", "language_model"} <= set(parts):
        raise PolicyError(
            f"trainable is {trainable!r}: LoRA learns in place of the language model's own weights, expected one of "
            "the two."
        )
    return frozenset(parts)


def part_of(name: str, adapter: str | None) -> str:
    """The part that a parameter or module of the VLM belongs to, by its full name.

    Args:
        name: as in `named_parameters`.
        adapter: the adapter's `adapter_name`, None where there is none.
    """
    pieces = name.split(".")
    if any(piece.startswith("lora_") for piece in pieces):
        return "lora"
    if adapter in pieces:
        return "adapter"
    return "encoder" if any("vision" in piece or "visual" in piece for piece in pieces) else "language_model"


def adapter_name(vlm: nn.Module) -> str:
    """The last part of the name of the VLM's adapter module; raises PolicyError where none is known."""
    for name, _ in vlm.named_modules():
        if name.split(".")[-1] in ADAPTER_NAMES:
            return name.split(".")[-1]
    raise PolicyError(
        f"{type(vlm).__name__} has no module named {', '.join(ADAPTER_NAMES)}: its adapter is unknown, use trainable: "
        "full."
    )


def adapter_parameters(vlm: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter that learn."""
    name = adapter_name(vlm)
    return [
        parameter
        for full_name, parameter in vlm.named_parameters()
        if name in full_name.split(".") and parameter.requires_grad
    ]


def give_own_rate(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    """Moves the parameters into groups of their own with another learning rate, before the first step."""
    mine = set(parameters)
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in mine]
        group["params"] = [parameter for parameter in group["params"] if parameter not in mine]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


def set_trainable(vlm: Any, trainable: str, lora_rank: int = 16, lora_alpha: int = 32) -> Any:
    """Marks what learns of a VLM (the value head is the policy's); with LoRA, returns the model wrapped by PEFT.

    Raises:
        PolicyError: see `parts_of`; a rank below 1, or a model in which a part cannot be found.
    """
    parts = parts_of(trainable)
    if trainable == "full":
        vlm.requires_grad_(True)
        return vlm
    name = adapter_name(vlm)
    whole = [name] if "adapter" in parts else []  # modules that learn beside LoRA
    if "encoder" in parts:
        whole.append(encoder_name(vlm, name))
    if "lora" not in parts:
        for full_name, parameter in vlm.named_parameters():
            parameter.requires_grad_(part_of(full_name, name) in parts)
        return vlm
    if lora_rank < 1 or lora_alpha < 1:
        raise PolicyError(f"lora_rank is {lora_rank}, lora_alpha {lora_alpha}: expected 1 or more.")
    targets = _decoder_linears(vlm)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=isinstance(vlm.get_submodule(targets[0]), Conv1D),
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(vlm, config)


def encoder_name(vlm: nn.Module, adapter: str) -> str:
    """The full name of the vision encoder's module.

    Raises:
        PolicyError: there is none whose name says so.
    """
    for name, module in vlm.named_modules():
        if name and part_of(name, adapter) == "encoder" and next(module.parameters(), None) is not None:
            return name
    raise PolicyError(
        f"{type(vlm).__name__} has no module named vision or visual: its encoder is unknown, use trainable: full."
    )


def _decoder_linears(vlm: Any) -> list[str]:
    """Full names of the linear layers inside the language model (the LM head and the encoder stay as they are)."""
    decoder = vlm.get_decoder()
    prefix = next((name for name, module in vlm.named_modules() if module is decoder), None)
    if not prefix:
        raise PolicyError(f"{type(vlm).__name__} names no decoder: LoRA needs one, use trainable: full or adapter.")
    linears = [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[-1] != "lm_head"
    ]
    if not linears:
        raise PolicyError(
            f"The language model of {type(vlm).__name__} has no linear layers for LoRA: use trainable: full or adapter."
        )
    return linears


def parameter_table(vlm: Any, value_head: nn.Module) -> list[tuple[str, int, int]]:
    """(part, parameters, of them learning), in the order of `PARTS`; LoRA only where it is."""
    base = vlm.get_base_model() if hasattr(vlm, "peft_config") else vlm
    adapter = adapter_name(base)
    counts = {part: [0, 0] for part in PARTS}
    parameters = [(part_of(name, adapter), name, parameter) for name, parameter in base.named_parameters()]
    parameters += [("value_head", name, parameter) for name, parameter in value_head.named_parameters()]
    for part, name, parameter in parameters:
        if "original_module" not in name.split("."):  # PEFT's frozen copy of what learns beside LoRA
            counts[part][0] += parameter.numel()
            counts[part][1] += parameter.numel() * parameter.requires_grad
    names = {part: "LoRA" if part == "lora" else part.replace("_", " ") for part in PARTS}
    return [(names[part], total, learning) for part, (total, learning) in counts.items() if total]
