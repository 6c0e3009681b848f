"""Does a policy see and hear: how far what it acts on moves when the frame, or the instruction, is exchanged.

    h (B, D)     the state at which the answer is read, each scaled to mean 0 and standard deviation 1
    change       root mean square of h(frame, instruction) - h(another frame, instruction); the same of instructions
                 0: they make no difference; sqrt(2): the two states have nothing in common

It needs no training, and says before one whether there is anything to learn from: small models whose weights the
library draws small act on a state that hardly moves, and PPO does not find what moves it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manako.policies.vlm_policy import VLMPolicy

LEAST = 0.1  # below, PPO alone moved nothing in 25,000 steps of GoTo; FrozenLake is learned at 0.02


class Sensitivity(NamedTuple):
    """Changes of the state that is read; None where there is nothing to exchange."""

    frame: float | None
    instruction: float | None

    @property
    def text(self) -> str:
        """Both in words."""
        changes = {"frame": self.frame, "instruction": self.instruction}
        told = [f"another {name} moves it by {change:.2f}" for name, change in changes.items() if change is not None]
        alone = [f"there is one {name}" for name, change in changes.items() if change is None]
        return f"{', '.join([*told, *alone])} (its standard deviation is 1)"

    @property
    def warnings(self) -> list[str]:
        """What is wrong with it, in sentences."""
        found = []
        for name, change, lack in (("frame", self.frame, "blind"), ("instruction", self.instruction, "deaf")):
            if change is not None and change < LEAST:
                found.append(
                    f"the policy starts {lack}: another {name} moves the state that it acts on by {change:.2f}, and "
                    f"those below {LEAST} learned late or not at all by PPO alone; if success does not rise, clone an "
                    "expert first (run_sft.py)"
                )
        return found


@torch.no_grad()
def sensitivity(policy: VLMPolicy, images: np.ndarray, instructions: Sequence[str]) -> Sensitivity:
    """Returns how far the state that is read moves.

    Args:
        policy: whose model is asked.
        images: (B, H, W, 3) uint8, of the environment.
        instructions: B texts.
    """
    before = _states(policy, images, instructions)
    frames = _others([image.tobytes() for image in images])
    texts = _others(instructions)
    frame = None if frames is None else _change(before, _states(policy, images[frames], instructions))
    heard = None if texts is None else [instructions[row] for row in texts]
    return Sensitivity(frame, None if heard is None else _change(before, _states(policy, images, heard)))


def _others(values: Sequence[object]) -> list[int] | None:
    """For each row the next one with another value; None where all have the same."""
    rows = range(len(values))
    others = [
        next((row for row in (*rows[place:], *rows[:place]) if values[row] != values[place]), -1) for place in rows
    ]
    return None if -1 in others else others


def _states(policy: VLMPolicy, images: np.ndarray, instructions: Sequence[str]) -> Tensor:
    inputs = policy.prepare(images, instructions).to(policy.device)
    hidden = policy.reading.read_hidden(inputs).float()  # (B, D)
    centred = hidden - hidden.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _change(before: Tensor, after: Tensor) -> float:
    return float((after - before).square().mean().sqrt())
