"""What of a VLM learns: one field, `trainable`.

`full`: every weight. `adapter`: the adapter (projector, connector) alone. `lora`: low-rank updates of the language
model's linear layers (PEFT) and the adapter; everything else stays as loaded. The value head always learns.
"""

from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import PolicyError

Trainable = Literal["full", "adapter", "lora"]
TRAINABLE = ("full", "adapter", "lora")

# Where families of VLMs keep the module between encoder and language model.
ADAPTER_NAMES = ("adapter", "multi_modal_projector", "connector", "modality_projection", "aligner", "mlp1", "merger")


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


def set_trainable(vlm: Any, trainable: Trainable, lora_rank: int = 16, lora_alpha: int = 32) -> Any:
    """Marks what learns; with `lora`, returns the model wrapped by PEFT.

    Raises:
        PolicyError: an unknown mode, a rank below 1, or a model whose adapter or decoder cannot be found.
    """
    if trainable not in TRAINABLE:
        raise PolicyError(f"trainable is {trainable!r}: expected one of {', '.join(TRAINABLE)}.")
    if trainable == "full":
        vlm.requires_grad_(True)
        return vlm
    name = adapter_name(vlm)
    if trainable == "adapter":
        vlm.requires_grad_(False)
        for module_name, module in vlm.named_modules():
            if module_name.split(".")[-1] == name:
                module.requires_grad_(True)
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
        modules_to_save=[name],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(vlm, config)


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
    """(part, parameters, of them learning) for encoder, adapter, language model, LoRA and value head."""
    base = vlm.get_base_model() if hasattr(vlm, "peft_config") else vlm
    adapter = adapter_name(base)
    counts: dict[str, list[int]] = {part: [0, 0] for part in ("encoder", "adapter", "language model", "LoRA")}
    seen: set[int] = set()
    for name, parameter in base.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        pieces = name.split(".")
        if any(piece.startswith("lora_") for piece in pieces):
            part = "LoRA"
        elif adapter in pieces:
            if "original_module" in pieces:
                continue  # PEFT's frozen copy of the adapter
            part = "adapter"
        elif any("vision" in piece or "visual" in piece for piece in pieces):
            part = "encoder"
        else:
            part = "language model"
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() * parameter.requires_grad
    head = sum(parameter.numel() for parameter in value_head.parameters())
    rows = [(part, total, learning) for part, (total, learning) in counts.items() if total]
    return [*rows, ("value head", head, head)]
