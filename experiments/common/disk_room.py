"""Is there room on the disk for what a run will keep? Asked before anything is played."""

import os
import shutil
from pathlib import Path

from manako.experiments.common.command_line import UsageError
from manako.policies.interface import Policy

MOMENTS = 2  # of AdamW, as large as what learns
REST = 16 * 2**20  # bytes of everything else: tokenizer, pictures, metrics, the libraries' own files


def checkpoint_bytes(policy: Policy) -> int:
    """Returns about how large a checkpoint is: what is saved of the policy, and the optimizer's moments."""
    learns = sum(weight.numel() * weight.element_size() for weight in policy.parameters() if weight.requires_grad)
    return policy_bytes(policy) + MOMENTS * learns


def policy_bytes(policy: Policy) -> int:
    """Returns about how large a policy is on the disk: all of it, or, with LoRA, what learns."""
    with_lora = getattr(policy, "has_lora", False)
    weights = [weight for weight in policy.parameters() if weight.requires_grad or not with_lora]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def check_disk_room(policy: Policy, run_dir: Path, kept: int, best: bool = False) -> None:
    """Raises where a run's folder will be larger than what is free.

    Args:
        policy: with what learns marked.
        run_dir: the run folder; it need not be there.
        kept: how many checkpoints are kept; one more is there while a new one is written, and final/ beside them.
        best: best/ is kept as well; there are two of them while a new one is written.

    Raises:
        UsageError: how much is needed, and how much there is.
    """
    there = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.exists())
    checkpoint = checkpoint_bytes(policy)
    held = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file() and not file.is_symlink())
    needed = (kept + 1) * checkpoint * bool(kept) + (3 if best else 1) * policy_bytes(policy) + REST - held
    free = shutil.disk_usage(there).free
    if needed > free:
        checkpoints = f"{kept} checkpoints of {_size(checkpoint)}, one more while it is written, and " if kept else ""
        beside = ", best/ and one more while it is written" if best else ""
        fewer = ", or run: keep_checkpoints: 1 in a --config file" if kept > 1 else ""
        raise UsageError(
            f"The run needs about {_size(needed)} on the disk of {os.fspath(there)!r} ({checkpoints}final/{beside}), "
            f"and {_size(free)} is free: make room, or give another --output_dir{fewer}."
        )


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
