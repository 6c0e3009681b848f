"""Rows of datasets to what a model takes, for TRL's SFT, DPO and KTO trainers.

TRL's own collators tokenize prompt and answer apart, which makes other tokens of an answer where a tokenizer puts a
space before what it is given, and they know two of the inputs that processors make beside ids, mask and pixels. Here
the policy says what its model takes, as it does when it acts (`Policy.training_inputs`).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from manako.policies.interface import Policy

Row = dict[str, Any]
OF_KL = ("input_ids", "attention_mask", "completion_mask")  # what TRL's KTO takes of the unrelated answers


class Collator:
    """What the three have in common.

    Args:
        policy: whose prompts the rows hold.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def inputs(self, rows: list[Row], answers: list[Any]) -> dict[str, Tensor]:
        """Returns the inputs of the rows' prompts and frames, each followed by its answer."""
        images = np.stack([[np.asarray(image.convert("RGB")) for image in row["images"]] for row in rows])
        frames = images[:, 0] if images.shape[1] == 1 else images  # (B, H, W, 3), or (B, k, H, W, 3)
        prompts = [with_parts(row["prompt"]) for row in rows]
        return self.policy.training_inputs(frames, prompts, [with_parts(answer) for answer in answers])


class SFTCollator(Collator):
    """Rows of prompt, completion and image: the loss is on the completion alone."""

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Returns the model's inputs and `labels` (B, L)."""
        batch = self.inputs(rows, [row["completion"] for row in rows])
        completion_mask = batch.pop("completion_mask")
        return {**batch, "labels": batch["input_ids"].masked_fill(completion_mask == 0, -100)}


class DPOCollator(Collator):
    """Rows of prompt, chosen and rejected answer, and image."""

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Returns the inputs of the B chosen answers, then of the B rejected ones, as TRL wants them."""
        return self.inputs(rows * 2, [row[name] for name in ("chosen", "rejected") for row in rows])


class KTOCollator(Collator):
    """Rows of prompt, answer, image and whether the answer is liked."""

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Returns the inputs; `label`, B booleans; and ids and masks of the same prompts before another's answer."""
        answers = [row["completion"] for row in rows]
        # all in one batch, so that what the processor says of the tokens serves both
        both = self.inputs(rows * 2, answers + answers[-1:] + answers[:-1])
        batch: dict[str, Any] = {name: value[: len(value) // 2] for name, value in both.items()}
        batch |= {f"KL_{name}": both[name][len(rows) :] for name in OF_KL}
        return {**batch, "label": torch.tensor([row["label"] for row in rows])}


def with_parts(messages: list[Row]) -> list[Row]:
    """Returns messages without the empty fields that a dataset's column gives every part."""
    return [
        {
            "role": message["role"],
            "content": [
                {key: value for key, value in part.items() if value is not None} for part in message["content"]
            ],
        }
        for message in messages
    ]
