"""Does a model fit? Asked of its configuration before a weight is read, and of a loaded one before it is trained.

    weights      each parameter once, however often the model uses it (tied embeddings)
    gradients    of what learns
    moments      AdamW's two of each gradient
    cache        keys and values of a prompt, where a reading keeps them
    rows         what a rollout stores of an env step

Left out, since they depend on the batch: activations, and what the libraries themselves take.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from manako.policies.errors import PolicyError
from manako.policies.interface import Rows
from manako.policies.pretrained import quietly

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# limit, use, and the part of the use that the kernel gives back: of cgroups v2 and v1
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Needed(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    moments: int

    @property
    def training(self) -> int:
        """What training adds to the weights."""
        return self.gradients + self.moments


def needed(model: nn.Module) -> Needed:
    """Returns what the parameters of a model need, as they are marked to learn; one on the meta device will do."""
    sizes = [
        (parameter.numel() * parameter.element_size(), parameter.requires_grad) for parameter in model.parameters()
    ]
    learning = sum(size for size, learns in sizes if learns)
    return Needed(sum(size for size, _ in sizes), learning, 2 * learning)


def without_weights(config: Any, dtype: torch.dtype, auto: Any = AutoModelForImageTextToText) -> Any:
    """Returns the model of a configuration on the meta device: shapes, and not one number."""
    with quietly(), torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def cache_bytes(cache: Any) -> int:
    """Returns the bytes of all keys and values of a cache: layers x 2 x batch x heads x tokens x width of a head."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def row_bytes(rows: Rows) -> int:
    """Returns the bytes of one sample of rows; of frames that samples share, its part."""
    return rows.nbytes // len(rows)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Returns the bytes that are free on a GPU, or of the machine's memory, within the limit of its container."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_free_of_cgroups()])


def check_room(name: str, config: Any, dtype: torch.dtype, auto: Any = AutoModelForImageTextToText) -> None:
    """Checks that a model's weights fit into this machine's memory, where models are loaded whatever they run on.

    A quantized model is not asked, for its configuration does not say how much it takes; neither is one that cannot be
    built of its configuration, which loading it says better.

    Raises:
        PolicyError: they do not.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        model = without_weights(config, dtype, auto)
        tables = sum(buffer.nbytes for buffer in model.buffers())  # such as masks of all positions
        weights = max(needed(model).weights, tables)
    except Exception:  # a configuration that makes no model: reading its weights says so
        return
    _check_weights(repr(name), weights, dtype, torch.device("cpu"))


def check_frame_room(side: int, patch: int, width: int = 0, heads: int = 0) -> None:
    """Checks that an encoder of this size can see one frame: pixels, positions and scores of attention, in float32.

    Args:
        side: of the square that it sees, in pixels.
        patch: side of its patches.
        width: of its positions.
        heads: of attention between patches; 0 where there is none.

    Raises:
        PolicyError: it takes more memory than there is.
    """
    patches = (side // patch) ** 2
    need, free = 4 * (3 * side**2 + width * patches + heads * patches**2), free_memory()
    if need > free:
        raise PolicyError(
            f"image_size {side:,} with patches of {patch:,} makes {patches:,} patches of a frame: seeing one takes "
            f"{in_words(need)}, and {in_words(free)} of memory are free on this machine; expected a smaller image_size "
            "or a larger patch_size."
        )


def check_lora_room(sides: Iterable[tuple[int, int]], rank: int) -> None:
    """Checks that LoRA's matrices can be made and learn.

    Args:
        sides: the matrices that they are for, (in, out) each.
        rank: of LoRA.

    Raises:
        PolicyError: they take more memory than there is.
    """
    numbers = sum(rank * (ins + outs) for ins, outs in sides)
    need, free = 4 * 4 * numbers, free_memory()  # float32: the matrices, their gradients and AdamW's moments
    if need > free:
        raise PolicyError(
            f"LoRA of rank {rank:,} does not fit: its {numbers:,} parameters take {in_words(need)} with gradients and "
            f"AdamW's moments, and {in_words(free)} of memory are free on this machine; expected a smaller --lora_rank."
        )


def check_rollout_room(rows: Rows, num_envs: int, num_steps: int, device: torch.device | str) -> None:
    """Checks that a rollout's rows can be kept.

    Args:
        rows: of one sample or more.
        num_envs: N.
        num_steps: T.
        device: where they are kept.

    Raises:
        PolicyError: they take more memory than there is.
    """
    need, free = row_bytes(rows) * num_envs * num_steps, free_memory(device)
    if need > free:
        raise PolicyError(
            f"A rollout does not fit: {num_envs:,} environments x {num_steps:,} steps of {in_words(row_bytes(rows))} "
            f"take {in_words(need)}, and {in_words(free)} are free {_on(torch.device(device))}; expected a smaller "
            "--num_envs or --num_steps."
        )


def check_place(model: nn.Module, name: str, device: torch.device | str) -> None:
    """Checks that a loaded model fits where it is moved to.

    Raises:
        PolicyError: it does not.
    """
    if torch.device(device).type != "cpu":  # where it is already
        parameter = max(model.parameters(), key=torch.numel)
        _check_weights(repr(name), needed(model).weights, parameter.dtype, torch.device(device))


def check_training_room(model: nn.Module, trainable: str, device: torch.device | str) -> None:
    """Checks that a loaded model can learn where it is: gradients and AdamW's moments of what is marked.

    Raises:
        PolicyError: they do not fit.
    """
    need, free = needed(model), free_memory(device)
    if need.training <= free:
        return
    smaller = "" if {"lora", "adapter"} & {*trainable.split("+")} else "--trainable lora or adapter, "
    raise PolicyError(
        f"Training does not fit: with trainable: {trainable}, gradients and AdamW's moments need "
        f"{in_words(need.training)} beside the weights, and {in_words(free)} are free {_on(torch.device(device))}; "
        f"expected {smaller}--dtype bfloat16, or a machine with more memory."
    )


def in_words(count: float) -> str:
    """Returns bytes in the unit in which a person says them, `1.5 GiB`."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"


def _free_of_cgroups() -> list[int]:
    """Bytes left below each limit that this process is under: its control groups' and those above them."""
    found = []
    for line in OWN_CGROUP.read_text(encoding="utf-8").splitlines() if OWN_CGROUP.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CGROUPS / controllers
        own = top / path.lstrip("/")
        found += [_free_of(folder) for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return [free for free in found if free is not None]


def _free_of(folder: Path) -> int | None:
    """Bytes left below a control group's limit; None where it has none."""
    for limit, use, given_back in CGROUP_FILES:
        if not (folder / limit).is_file() or (most := (folder / limit).read_text(encoding="utf-8").strip()) == "max":
            continue
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(0, int(most) - int((folder / use).read_text(encoding="utf-8")) + int(stat.get(given_back, 0)))
    return None


def _check_weights(name: str, weights: int, dtype: torch.dtype, device: torch.device) -> None:
    free = free_memory(device)
    if weights <= free:
        return
    half = weights * torch.bfloat16.itemsize // dtype.itemsize
    smaller = f"--dtype bfloat16 ({in_words(half)}), " if half <= free else ""
    raise PolicyError(
        f"The weights of {name} do not fit: they need {in_words(weights)} in {str(dtype).removeprefix('torch.')}, and "
        f"{in_words(free)} of memory are free {_on(device)}; expected {smaller}a smaller model, or a machine with more "
        "memory."
    )


def _on(device: torch.device) -> str:
    return "on this machine" if device.type == "cpu" else f"on {device.type}"
