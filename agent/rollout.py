"""What a rollout is: T steps of N environments, stored as the policy saw them, and how those of several workers join.

Nothing is rendered, prompted or tokenized again for training. What is learned from stands in `Rollout`; what a data set
keeps beside it (frames, seeds, the expert's advice) in its `record`, where one was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manako.agent.png import Png, pixels_of
from manako.policies.interface import Rows

if TYPE_CHECKING:
    from manako.agent.interfaces import Fault


@dataclass(frozen=True)
class Episode:
    """A finished episode, and where in its rollout it ended."""

    episode_return: float
    length: int
    success: bool | None  # None: nobody says what a success is here
    step: int = 0
    slot: int = 0  # counted over all workers


def verdict(success: int) -> bool | None:
    """Returns what an environment's number says of an ended episode (see `Stepped.success`)."""
    return None if success < 0 else bool(success)


def success_rate(success: Sequence[bool | None]) -> float | None:
    """Returns the share of successes; None where there are no episodes, or some that nobody judged.

    Over the judged ones alone it would be wrong: there are environments that speak of success only where there is one.
    """
    judged = [won for won in success if won is not None]
    return sum(judged) / len(judged) if judged and len(judged) == len(success) else None


class Record(NamedTuple):
    """What a data set keeps of T steps of N environments beside what is learned from; flat in the order of (T, N)."""

    to_env: np.ndarray  # (T, N, ...) the actions as the environments were given them
    seeds: Tensor  # (T, N) int64, of the episode that the step belongs to
    steps: Tensor  # (T, N) int64, number of the step in its episode, from 0
    success: Tensor  # (T, N) int8, see `Stepped`
    rewards: Tensor  # (T, N) float32, what the environments paid
    instructions: list[str]  # T * N, as the env gave them
    images: np.ndarray | list[Png]  # (T * N, H, W, 3) uint8, the env's own frames; T * N files once packed
    expert_actions: Tensor | None  # (T, N) int64, what the env's expert would have done
    last_images: Mapping[tuple[int, int], np.ndarray | Png] = {}  # (t, slot) of a step that ended its episode
    action_masks: Tensor | None = None  # (T, N, A) bool, what was allowed; None where the env does not say
    thoughts: list[str] | None = None  # T * N, what the player said it thought
    expert_thoughts: list[str] | None = None  # T * N, what the env's expert thinks


class Rollout(NamedTuple):
    """T steps of N environments; rows are flat, in the order of (T, N)."""

    inputs: Rows  # T * N samples
    actions: Rows  # T * N
    logprobs: Tensor  # (T, N, S) float32, of the tokens of the actions taken
    mask: Tensor  # (T, N, S) bool, True = sampled by the policy
    values: Tensor  # (T, N) float32
    next_values: Tensor  # (T, N) float32, of the observation that the step returned
    rewards: Tensor  # (T, N) float32, less what answers without an action cost
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    reference: Tensor | None  # (T * N, A) log-probabilities of the reference policy, or (T * N, S) of what was sampled
    bootstrap: Rows  # N observations after the rollout, then the last ones of F truncated episodes; none of a player's
    bootstrap_at: Tensor  # (F, 2) int64, the (t, slot) of those F
    episodes: list[Episode]  # those that ended during the rollout, in the order of (t, slot)
    version: int  # of the weights that acted: how many updates they had seen
    seconds: float
    outcomes: list[str] | None = None  # T * N, of text answers
    token_values: Tensor | None = None  # (T, N, S) float32, see `Acted`
    record: Record | None = None
    failed: Tensor | None = None  # (T, N) bool, the environment broke: no sample, its episode is lost; None: nowhere
    faults: Sequence["Fault"] = ()  # what environments broke with, also where an episode was brought back

    @property
    def cut(self) -> Tensor:
        """(T, N) bool: no trace goes on from this step to the next row, though the episode has not terminated.

        A step before one that failed is as good as truncated: what it returned was seen, and its value stands in
        `next_values`. The failed step itself is no sample, and what follows it is another episode.
        """
        if self.failed is None:
            return self.truncated
        before = torch.cat([self.failed[1:], torch.zeros_like(self.failed[:1])])
        return self.truncated | self.failed | (before & ~self.terminated)


def pad_answers(parts: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors (..., S_i) as (..., S), filled with 0 and False to the longest answer."""
    longest = max(part.shape[-1] for part in parts)
    return [F.pad(part, (0, longest - part.shape[-1])) for part in parts]


def merge(fragments: Sequence[Rollout]) -> Rollout:
    """Returns rollouts of the same T steps in neighbouring slots as one.

    Args:
        fragments: in the order of their slots.
    """
    if len(fragments) == 1:
        return fragments[0]
    sizes = [fragment.rewards.shape[1] for fragment in fragments]
    steps = len(fragments[0].rewards)
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    # row of sample (t, slot) among the fragments' flat samples laid one after another
    rows = torch.cat(
        [
            torch.arange(steps)[:, None] * size + torch.arange(size) + steps * first
            for first, size in zip(firsts, sizes, strict=True)
        ],
        dim=1,
    ).flatten()  # (T * N,)
    bootstrap, bootstrap_at = _merge_bootstrap(fragments, sizes, firsts)
    columns = ("values", "next_values", "rewards", "terminated", "truncated")
    references = [fragment.reference for fragment in fragments if fragment.reference is not None]
    outcomes = [fragment.outcomes for fragment in fragments if fragment.outcomes is not None]
    records = [fragment.record for fragment in fragments if fragment.record is not None]
    token_values = [fragment.token_values for fragment in fragments if fragment.token_values is not None]
    said = [outcome for part in outcomes for outcome in part]
    return Rollout(
        **{name: torch.cat([getattr(fragment, name) for fragment in fragments], dim=1) for name in columns},
        inputs=Rows.join([fragment.inputs for fragment in fragments]).select(rows),
        actions=Rows.join([fragment.actions for fragment in fragments]).select(rows),
        logprobs=torch.cat(pad_answers([fragment.logprobs for fragment in fragments]), dim=1),
        mask=torch.cat(pad_answers([fragment.mask for fragment in fragments]), dim=1),
        reference=torch.cat(pad_answers(references))[rows] if references else None,
        bootstrap=bootstrap,
        bootstrap_at=bootstrap_at,
        episodes=sorted((e for f in fragments for e in f.episodes), key=lambda e: (e.step, e.slot)),
        version=fragments[0].version,
        seconds=max(fragment.seconds for fragment in fragments),
        outcomes=[said[row] for row in rows.tolist()] if outcomes else None,
        token_values=torch.cat(pad_answers(token_values), dim=1) if token_values else None,
        record=_merge_records(records, rows, firsts) if records else None,
        failed=_merge_failed(fragments),
        faults=[fault for fragment in fragments for fault in fragment.faults],
    )


def _merge_failed(fragments: Sequence[Rollout]) -> Tensor | None:
    if all(fragment.failed is None for fragment in fragments):
        return None
    none = [torch.zeros_like(fragment.terminated) for fragment in fragments]
    parts = [zeros if part.failed is None else part.failed for part, zeros in zip(fragments, none, strict=True)]
    return torch.cat(parts, dim=1)


def _merge_bootstrap(fragments: Sequence[Rollout], sizes: list[int], firsts: list[int]) -> tuple[Rows, Tensor]:
    """The bootstrap of all slots, and the places (F, 2) of its truncated episodes."""
    if not len(fragments[0].bootstrap):
        return fragments[0].bootstrap, fragments[0].bootstrap_at
    total = sum(sizes)
    places = [
        fragment.bootstrap_at + torch.tensor([0, first]) for fragment, first in zip(fragments, firsts, strict=True)
    ]
    final_at = torch.cat(places)  # (F, 2)
    in_order = torch.argsort(final_at[:, 0] * total + final_at[:, 1])
    now = [fragment.bootstrap.select(torch.arange(size)) for fragment, size in zip(fragments, sizes, strict=True)]
    finals = [
        fragment.bootstrap.select(torch.arange(size, len(fragment.bootstrap)))
        for fragment, size in zip(fragments, sizes, strict=True)
    ]
    joined = Rows.join([*now, *finals])
    return joined.select(torch.cat([torch.arange(total), total + in_order])), final_at[in_order]


def _in_order(parts: Sequence[list[str] | None], rows: Tensor) -> list[str] | None:
    """Texts of all slots in the order of (T, N); None where a part has none."""
    said = [text for part in parts for text in part or ()]
    return None if None in parts else [said[row] for row in rows.tolist()]


def _merge_records(records: Sequence[Record], rows: Tensor, firsts: Sequence[int]) -> Record:
    """The records of all slots; `rows` and `firsts` as in `merge`."""
    texts = [text for record in records for text in record.instructions]
    advice = [record.expert_actions for record in records if record.expert_actions is not None]
    masks = [record.action_masks for record in records if record.action_masks is not None]
    return Record(
        to_env=np.concatenate([record.to_env for record in records], axis=1),
        seeds=torch.cat([record.seeds for record in records], dim=1),
        steps=torch.cat([record.steps for record in records], dim=1),
        success=torch.cat([record.success for record in records], dim=1),
        rewards=torch.cat([record.rewards for record in records], dim=1),
        instructions=[texts[row] for row in rows.tolist()],
        images=np.concatenate([pixels_of(record.images) for record in records])[rows.numpy()],
        expert_actions=torch.cat(advice, dim=1) if advice else None,
        last_images={
            (t, first + slot): image
            for record, first in zip(records, firsts, strict=True)
            for (t, slot), image in record.last_images.items()
        },
        action_masks=torch.cat(masks, dim=1) if masks else None,
        thoughts=_in_order([record.thoughts for record in records], rows),
        expert_thoughts=_in_order([record.expert_thoughts for record in records], rows),
    )
