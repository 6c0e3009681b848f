"""What of a VLM learns: one field, `trainable`.

It names parts, joined by "+": `encoder`, `adapter` (projector, connector), `language_model`, `lora` (low-rank updates
of the language model's linear layers, PEFT) and `value_head`; every other part stays as loaded, bit for bit.
Ready-made:

    full      encoder + adapter + language_model + value_head
    adapter   adapter + value_head
    lora      adapter + lora + value_head

Which module is which part, the architecture's row says (`manako.policies.architectures`).
"""

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from manako.policies.architectures.any_vlm import ADAPTER_NAMES
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError
from manako.policies.room import check_lora_room

PARTS = ("encoder", "adapter", "language_model", "lora", "value_head")
READY_MADE = {
    "full": frozenset({"encoder", "adapter", "language_model", "value_head"}),
    "adapter": frozenset({"adapter", "value_head"}),
    "lora": frozenset({"adapter", "lora", "value_head"}),
}


def parts_of(trainable: str) -> frozenset[str]:
    """Returns the parts that learn.

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


def part_of(name: str, model: Model) -> str:
    """Returns the part that a parameter or module belongs to, by its full name.

    Args:
        name: as in `model.vlm.named_parameters()`.
        model: its names are prefixes of `name`; what none of them covers, such as the LM head, is the language model's.
    """
    name = name.removeprefix("base_model.model.")  # PEFT's wrapper
    if any(piece.startswith("lora_") for piece in name.split(".")):
        return "lora"
    if any(_is_in(name, part) for part in model.adapter):  # some adapters are inside their encoder
        return "adapter"
    return "encoder" if model.encoder and _is_in(name, model.encoder) else "language_model"


def set_trainable(model: Model, trainable: str, lora_rank: int = 16, lora_alpha: int = 32) -> Model:
    """Marks what learns of a VLM; the value head is the policy's.

    Args:
        model: without LoRA.
        trainable: see `parts_of`.
        lora_rank: rank of the LoRA matrices.
        lora_alpha: their scale is lora_alpha / lora_rank.

    Returns:
        The model; with LoRA its `vlm` is wrapped by PEFT.

    Raises:
        PolicyError: see `parts_of`; a rank below 1, or a model in which a part is not known.
    """
    parts = parts_of(trainable)
    if model.encoder_learns_alone and "encoder" in parts and parts != {"encoder"}:
        if trainable != "full":
            raise PolicyError(
                f"trainable is {trainable!r}, but {type(model.base_vlm).__name__} reads codes of its encoder, through "
                "which nothing learns: expected encoder alone, in run_sft.py --stage represent, or other parts."
            )
        parts = parts - {"encoder"}
    elif trainable == "full":
        model.vlm.requires_grad_(True)
        return model
    kind = type(model.base_vlm).__name__
    if "adapter" in parts and not model.adapter:
        raise _unknown_adapter(model)
    if "encoder" in parts and model.encoder is None:
        raise PolicyError(f"{kind} has no module named vision or visual: its encoder is unknown, use trainable: full.")
    if "lora" not in parts:
        for name, parameter in model.vlm.named_parameters():
            parameter.requires_grad_(part_of(name, model) in parts)
        return model
    if lora_rank < 1 or lora_alpha < 1:
        raise PolicyError(f"lora_rank is {lora_rank}, lora_alpha {lora_alpha}: expected 1 or more.")
    targets = _decoder_linears(model)
    check_lora_room((_sides(model.vlm.get_submodule(target)) for target in targets), lora_rank)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=isinstance(model.vlm.get_submodule(targets[0]), Conv1D),
        modules_to_save=_whole_modules(model, parts) or None,
        task_type="CAUSAL_LM" if model.base_vlm.can_generate() else None,
    )
    return model._replace(vlm=get_peft_model(model.vlm, config))


def adapter_parameters(model: Model) -> list[nn.Parameter]:
    """Returns the parameters of the adapter that learn.

    Raises:
        PolicyError: the adapter is not known.
    """
    if not model.adapter:
        raise _unknown_adapter(model)
    return [
        parameter
        for name, parameter in model.vlm.named_parameters()
        if part_of(name, model) == "adapter" and parameter.requires_grad
    ]


def parameter_groups(
    model: Model, value_head: nn.Module, learning_rate: float, adapter_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Returns what learns as groups for an optimizer, {"params": [...], "lr": rate}.

    Args:
        model: after `set_trainable`.
        value_head: learns where its parameters say so.
        learning_rate: of everything but the adapter.
        adapter_learning_rate: of the adapter, a group of its own; None: as everything else.

    Raises:
        PolicyError: a rate for an adapter that is not known.
    """
    learning = [p for module in (model.vlm, value_head) for p in module.parameters() if p.requires_grad]
    of_adapter = adapter_parameters(model) if adapter_learning_rate is not None else []
    separate = set(of_adapter)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if p not in separate], "lr": learning_rate},
        {"params": of_adapter, "lr": adapter_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def parameter_table(model: Model, value_head: nn.Module) -> list[tuple[str, int, int]]:
    """Returns (part, parameters, of them learning), in the order of `PARTS`; LoRA only where it is."""
    counts = {part: [0, 0] for part in PARTS}
    parameters = [(part_of(name, model), name, parameter) for name, parameter in model.vlm.named_parameters()]
    parameters += [("value_head", name, parameter) for name, parameter in value_head.named_parameters()]
    for part, name, parameter in parameters:
        if "original_module" not in name.split("."):  # PEFT's frozen copy of what learns beside LoRA
            counts[part][0] += parameter.numel()
            counts[part][1] += parameter.numel() * parameter.requires_grad
    names = {part: "LoRA" if part == "lora" else part.replace("_", " ") for part in PARTS}
    return [(names[part], total, learning) for part, (total, learning) in counts.items() if total]


def _sides(linear: nn.Module) -> tuple[int, int]:
    """In and out, in either order."""
    weight: Any = linear.weight
    rows, columns = weight.shape
    return int(rows), int(columns)


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _unknown_adapter(model: Model) -> PolicyError:
    return PolicyError(
        f"{type(model.base_vlm).__name__} has no module named {', '.join(ADAPTER_NAMES)}: its adapter is unknown, use "
        "trainable: full, or lora+value_head."
    )


def _whole_modules(model: Model, parts: frozenset[str]) -> list[str]:
    """Full names of the modules that learn beside LoRA: PEFT saves no bare parameters, and no lists but their items."""
    modules = dict(model.vlm.named_modules())
    names = [*(model.adapter if "adapter" in parts else ()), *([str(model.encoder)] if "encoder" in parts else [])]
    return [
        whole
        for name in names
        if name in modules
        for whole in (
            [f"{name}.{item}" for item, _ in modules[name].named_children()]
            if isinstance(modules[name], nn.ModuleList)
            else [name]
        )
    ]


def _decoder_linears(model: Model) -> list[str]:
    """Full names of the linear layers inside the language model (the LM head and the encoder stay as they are)."""
    kind = type(model.base_vlm).__name__
    if not model.decoder:
        raise PolicyError(f"{kind} names no decoder: LoRA needs one, use trainable: full or adapter.")
    linears = [
        f"{model.decoder}.{name}"
        for name, module in model.vlm.get_submodule(model.decoder).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[-1] != "lm_head"
    ]
    if not linears:
        raise PolicyError(
            f"The language model of {kind} has no linear layers for LoRA: use trainable: full or adapter."
        )
    return linears
