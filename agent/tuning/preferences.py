"""Preference pairs from trajectories, in the form that TRL's DPO and KTO trainers take.

    expert    at each step where the player did something else than the expert: the expert's action over the player's
    state     of the actions taken on the same observation (frame and instruction): the one with the highest mean
              return to go, over the others
    return    of two episodes from the same seed: where they first part, the action of the one with the higher return
    branch    at a step, other actions are tried: the seed is played again to that step, another action taken, and the
              policy goes on from there; the action with the higher return is preferred
    remote    at a step, a model behind an API is asked which is better, what was done or another action, in both
              orders; where it says the same twice, that action is preferred

A step whose answer named no action (see `steps_with_actions`) says nothing, whatever stood in for it.

Each row: {"prompt", "chosen", "rejected", "images"}; equal returns make no pair.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from manako.agent.data.pasts import NO_ROW, past_rows, past_turns
from manako.agent.data.trajectories import steps_with_actions
from manako.agent.errors import TrainingError
from manako.agent.png import picture
from manako.agent.tuning.supervised import (
    MESSAGES,
    answers_of,
    assistant_message,
    prompt_columns,
    stored_frames,
    stored_thoughts,
)
from manako.policies.interface import Policy

FEATURES = Features({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "images": List(Image())})
UNPAIRED = Features({"prompt": MESSAGES, "completion": MESSAGES, "label": Value("bool"), "images": List(Image())})
Pair = tuple[int, int, int]  # row of the trajectories, chosen action, rejected action
# frames (H, W, 3), instructions and two actions each -> the better of the two; None where that is not said
Judge = Callable[[Sequence[np.ndarray], Sequence[str], Sequence[tuple[int, int]]], list[int | None]]


def allowed_actions(trajectories: Dataset) -> list[tuple[bool, ...]] | None:
    """Returns for each row which of the A actions were allowed; None where the data do not say."""
    if "action_mask" not in trajectories.column_names:
        return None
    return [tuple(mask) for mask in trajectories["action_mask"]]


def expert_pairs(trajectories: Dataset) -> list[Pair]:
    """Returns the expert's action over the player's, wherever they differ.

    Raises:
        TrainingError: the trajectories do not say what the expert would have done.
    """
    experts, actions = trajectories["expert_action"], trajectories["action"]
    if min(experts) < 0:
        raise TrainingError(
            "These trajectories know no expert: expected an environment that has one, or --pairs return."
        )
    steps = zip(experts, actions, steps_with_actions(trajectories), strict=True)
    return [(row, best, taken) for row, (best, taken, chosen) in enumerate(steps) if chosen and best != taken]


def state_pairs(trajectories: Dataset, frames: int = 1, history: int = 0) -> list[Pair]:
    """Returns the best action known in a state over the one taken, at each step that took another.

    A state is what the policy is shown and told: the last frames, an instruction, what was done before, and what is
    allowed where the data say it. Its actions are ranked by the mean of the rewards from there to the end of the
    episode, over all steps that took them; of equal ones the lowest is the best, and they make no pair.

    Args:
        trajectories: of `agent.data.trajectories`.
        frames: how many the policy is shown.
        history: how many actions and rewards it is told.
    """
    pngs = [frame["bytes"] for frame in stored_frames(trajectories)]
    before, turns = past_rows(trajectories, frames - 1), past_turns(trajectories, history)
    masks = allowed_actions(trajectories) or [()] * len(trajectories)
    states = [
        (png, text, tuple(None if row == NO_ROW else pngs[row] for row in rows), done.tobytes(), mask)
        for png, text, rows, done, mask in zip(pngs, trajectories["instruction"], before, turns, masks, strict=True)
    ]
    actions, episodes, rewards = trajectories["action"], trajectories["episode"], trajectories["reward"]
    to_go = list(rewards)
    for row in reversed(range(len(to_go) - 1)):
        if episodes[row] == episodes[row + 1]:
            to_go[row] += to_go[row + 1]
    paid: dict[Any, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    known = steps_with_actions(trajectories)
    for state, action, value, chosen in zip(states, actions, to_go, known, strict=True):
        if chosen:
            paid[state][action].append(value)
    means = {
        state: {action: math.fsum(values) / len(values) for action, values in sorted(of_state.items())}
        for state, of_state in paid.items()
    }
    best = {state: max(of_state, key=of_state.__getitem__) for state, of_state in means.items()}
    return [
        (row, best[state], taken)
        for row, (state, taken, chosen) in enumerate(zip(states, actions, known, strict=True))
        if chosen and means[state][best[state]] > means[state][taken]
    ]


def return_pairs(trajectories: Dataset) -> list[Pair]:
    """Returns the action of the episode with the higher return, where two episodes of the same seed first part."""
    starts: dict[int, list[int]] = defaultdict(list)  # seed -> first rows of its episodes
    for row, (seed, step) in enumerate(zip(trajectories["seed"], trajectories["step"], strict=True)):
        if step == 0:
            starts[seed].append(row)
    actions, episodes, returns = trajectories["action"], trajectories["episode"], trajectories["episode_return"]
    known, pairs = steps_with_actions(trajectories), []
    for rows in starts.values():
        for number, first in enumerate(rows):
            for second in rows[number + 1 :]:
                if returns[first] == returns[second]:
                    continue
                step = 0
                while _inside(episodes, first, step) and _inside(episodes, second, step):
                    if actions[first + step] != actions[second + step]:
                        better, worse = (first, second) if returns[first] > returns[second] else (second, first)
                        if known[better + step] and known[worse + step]:
                            pairs.append((better + step, actions[better + step], actions[worse + step]))
                        break
                    step += 1
    return pairs


def _inside(episodes: list[int], first: int, step: int) -> bool:
    return first + step < len(episodes) and episodes[first + step] == episodes[first]


def judged_pairs(
    trajectories: Dataset, judge: Judge, num_actions: int, steps_per_episode: int, seed: int
) -> list[Pair]:
    """Returns what a judge prefers at some steps of each episode, of the action taken and another one.

    Args:
        trajectories: whose frames are looked at.
        judge: says which of two actions is better.
        num_actions: A.
        steps_per_episode: steps to ask about, sampled among those whose action was chosen.
        seed: of that sample, and of the other actions.
    """
    generator = np.random.default_rng(seed)
    actions, texts = trajectories["action"], trajectories["instruction"]
    episodes, of_episode = trajectories["episode"], defaultdict(list)
    for row in np.flatnonzero(steps_with_actions(trajectories)).tolist():
        of_episode[episodes[row]].append(row)
    rows: list[int] = []
    for steps in of_episode.values():
        rows += sorted(generator.permutation(steps)[:steps_per_episode].tolist())
    others = [(actions[row] + 1 + int(generator.integers(num_actions - 1))) % num_actions for row in rows]
    frames = [picture(frame["bytes"]) for frame in stored_frames(trajectories.select(rows))]
    both = [(actions[row], other) for row, other in zip(rows, others, strict=True)]
    better = judge(frames, [texts[row] for row in rows], both)
    return [(row, best, sum(two) - best) for row, best, two in zip(rows, better, both, strict=True) if best is not None]


def branch_pairs(
    trajectories: Dataset, env: Any, act: Callable[[Any], np.ndarray], steps_per_episode: int, seed: int
) -> list[Pair]:
    """Returns the best action over the worst at some steps of each episode, where every allowed action is tried.

    Args:
        trajectories: of an env that plays the same again from a seed.
        env: A environments, one for each action; they are reset to the episode's seed and brought to the step.
        act: actions (A,) for what these environments show, to go on to the end.
        steps_per_episode: steps to branch at, sampled.
        seed: of that sample.

    Raises:
        TrainingError: the env does not play an episode again as it is in the trajectories.
    """
    generator = np.random.default_rng(seed)
    actions, seeds, numbers = trajectories["action"], trajectories["seed"], trajectories["step"]
    frames = stored_frames(trajectories)
    first, pairs = 0, []
    while first < len(actions):
        length = 1
        while first + length < len(actions) and numbers[first + length]:
            length += 1
        for step in sorted(generator.permutation(length)[:steps_per_episode].tolist()):
            frame = picture(frames[first + step]["bytes"])
            returns = _branch(env, seeds[first], actions[first : first + step], frame, act)
            best, worst = int(np.nanargmax(returns)), int(np.nanargmin(returns))
            if returns[best] > returns[worst]:
                pairs.append((first + step, best, worst))
        first += length
    return pairs


def _branch(env: Any, seed: int, before: list[int], frame: np.ndarray, act: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Returns (A,) of the episodes that do the same up to a step, then each another action, then what `act` says.

    NaN stands for an action that is not allowed there.
    """
    count = env.num_envs
    observations = env.reset(seeds=[seed] * count)
    for action in before:
        result = env.step(np.full(count, action))
        observations = result.observations
        if (result.terminated | result.truncated).any():
            break
    if (env.episode_lengths != len(before)).any() or (observations.images != frame).any():  # (A, H, W, 3), (H, W, 3)
        raise TrainingError(
            f"The episode of seed {seed} did not play again to its step {len(before)} as it was recorded: expected an "
            "environment that replays, or --pairs expert, state or return."
        )
    allowed = np.ones(count, bool) if env.action_masks is None else env.action_masks[0]  # one state, A times
    returns, going = np.full(count, np.nan), allowed.copy()
    actions = np.where(allowed, np.arange(count), allowed.argmax())
    while True:
        result = env.step(actions)
        returns = np.where(going, env.episode_returns, returns)
        ended = result.terminated | result.truncated
        going &= ~ended
        if not going.any():
            return returns
        # those that have ended start again and are not looked at
        observations = env.reset_done(ended, seeds=[seed] * int(ended.sum())) if ended.any() else result.observations
        actions = act(observations)


def pair_dataset(trajectories: Dataset, pairs: list[Pair], policy: Policy) -> Dataset:
    """Returns the pairs as a dataset for DPO, without those of an action that was not allowed.

    Raises:
        TrainingError: there are no pairs.
    """
    masks = allowed_actions(trajectories)
    if masks is not None:
        pairs = [pair for pair in pairs if masks[pair[0]][pair[1]] and masks[pair[0]][pair[2]]]
    if not pairs:
        raise TrainingError(
            "No two actions could be told apart (all returns are equal, player and expert agree, or the judge says "
            "neither): expected pairs, so collect with --group_size, with a weaker player, or choose other --pairs."
        )
    rows = [row for row, _, _ in pairs]
    better, worse = ([pair[which] for pair in pairs] for which in (1, 2))
    return Dataset.from_dict(
        {
            **prompt_columns(trajectories, policy, rows),
            "chosen": _messages(trajectories, policy, rows, better),
            "rejected": _messages(trajectories, policy, rows, worse),
        },
        features=FEATURES,
    )


def _messages(trajectories: Dataset, policy: Policy, rows: list[int], actions: list[int]) -> list[Any]:
    """Answers that name actions, each behind the thought of whoever took it there: the player, or the expert."""
    taken, thoughts = trajectories["action"], stored_thoughts(trajectories, "thought")
    experts, reasons = trajectories["expert_action"], stored_thoughts(trajectories, "expert_thought")
    behind = [
        thoughts[row] if action == taken[row] else reasons[row] if action == experts[row] else ""
        for row, action in zip(rows, actions, strict=True)
    ]
    return [assistant_message(text) for text in answers_of(policy, actions, behind)]


def unpaired(pairs: Dataset) -> Dataset:
    """Returns the same for KTO: each answer by itself, with a label."""

    def convert(batch: dict[str, list]) -> dict[str, list]:
        return {
            "prompt": [prompt for prompt in batch["prompt"] for _ in range(2)],
            "completion": [text for both in zip(batch["chosen"], batch["rejected"], strict=True) for text in both],
            "label": [True, False] * len(batch["prompt"]),
            "images": [images for images in batch["images"] for _ in range(2)],
        }

    return pairs.map(convert, batched=True, remove_columns=pairs.column_names, features=UNPAIRED)
