"""Trajectories as data: what rollouts of any backend played, as a Hugging Face `datasets` folder.

One row a step, episodes whole and in order. The frame is the env's own, as PNG inside the dataset; the rest is what the
policy saw (prompt), did (action, tokens, log-probability) and was paid. An episode replays from its seed to the same
frames. `datasets.load_from_disk` opens the folder anywhere; what holds for all rows stands as JSON in
`dataset.info.description`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, load_from_disk

from manako.agent.checkpoint import write_folder
from manako.agent.errors import TrainingError
from manako.agent.png import packed, pixels_of, png_of
from manako.agent.rollout import Record, Rollout, verdict
from manako.bounded import json_object, read_text, shown
from manako.errors import full_text
from manako.manifest import MANIFEST, fault, seal_command
from manako.memory import turns_before
from manako.policies.interface import Policy, Rows
from manako.spaces import TextCodes, is_vector, short_number, space_to_json

FORMAT = 1
FEATURES = Features(
    {
        "image": Image(),
        "instruction": Value("string"),
        "prompt": Value("string"),
        "action": Value("int64"),  # index of action_name; -1 where an answer named none and the env was not stepped
        "action_name": Value("string"),
        "action_tokens": List(Value("int64")),
        "logprob": Value("float32"),
        "value": Value("float32"),
        "reward": Value("float32"),
        "terminated": Value("bool"),
        "truncated": Value("bool"),
        "success": Value("bool"),  # of the whole episode, in every row of it; None where nobody says what one is
        "episode_return": Value("float32"),  # likewise
        "expert_action": Value("int64"),  # index, -1 where the env has no expert
        "env_id": Value("string"),
        "seed": Value("int64"),  # of the episode
        "episode": Value("int64"),  # number in this dataset
        "step": Value("int64"),  # in the episode, from 0
        "policy": Value("string"),  # who played
        "last_image": Image(),  # what an episode's last step returned, in its last row
        "outcome": Value("string"),  # of the answer, such as "unparsed"; None where there is only an action
        "thought": Value("string"),  # what the player said it thought; None where it said nothing
        "expert_thought": Value("string"),  # what the env's expert thinks, where it says it
    }
)
VECTORS = {  # in place of the indices, where actions are vectors
    "action": List(Value("float32")),  # as the env is given it; action_name are its numbers
    "expert_action": List(Value("float32")),  # None where the env has no expert
}
TAKEN = "taken"  # column: what was done, where `action` is what the expert would have done
LATER = ("last_image", "outcome", "thought", "expert_thought")  # columns that older datasets lack
MASKS = {"action_mask": List(Value("bool"))}  # of A actions, which were allowed; only of an env that says it


NO_INPUTS = Rows({"": torch.zeros(0)})


def without_inputs(rollout: Rollout) -> Rollout:
    """Returns a rollout with what a data set needs of it alone, and the frames of its record, if any, as PNG."""
    record = rollout.record
    if record is not None:
        files = packed(pixels_of(record.images), rollout.rewards.shape[1])
        lasts = {place: png_of(frame) for place, frame in record.last_images.items()}
        record = record._replace(images=files, last_images=lasts)
    return rollout._replace(
        inputs=NO_INPUTS,
        reference=None,
        bootstrap=NO_INPUTS,
        bootstrap_at=torch.zeros(0, 2, dtype=torch.long),
        record=record,
    )


def to_dataset(
    rollouts: Sequence[Rollout],
    policy: Policy,
    env_id: str,
    player: str,
    about: dict[str, Any],
    quota: Sequence[int] | None = None,
) -> Dataset:
    """Returns the whole episodes in consecutive rollouts of the same slots, a row a step.

    One that the environment's fault has cut off is left out, and no later one stands in its place.

    Args:
        rollouts: with their records, one after another.
        policy: whose prompts and tokens the rows get; a player that cannot learn has none.
        env_id: the environment.
        player: who took the actions.
        about: what else holds for all rows, for JSON.
        quota: how many episodes to take of each slot, its first ones; all by default.

    Raises:
        TrainingError: no episode ended in them.
    """
    masked = _record(rollouts[0]).action_masks is not None
    vectors = VECTORS if is_vector(policy.spec.action_space) else {}
    features = Features({**FEATURES, **vectors, **(MASKS if masked else {})})
    columns: dict[str, list[Any]] = {name: [] for name in features}
    rows_of_actions = [_texts(rollout, policy) for rollout in rollouts]
    count = 0
    for slot in range(rollouts[0].rewards.shape[1]):
        episode: list[tuple[int, int]] = []  # (number of the rollout, t)
        seen = 0  # episodes that are over, lost ones among them
        for number, rollout in enumerate(rollouts):
            record = _record(rollout)
            for t in range(len(rollout.rewards)):
                if record.steps[t, slot] == 0:
                    episode = []
                episode.append((number, t))
                if rollout.failed is not None and rollout.failed[t, slot]:
                    episode, seen = [], seen + 1
                    continue
                ended = bool(rollout.terminated[t, slot] | rollout.truncated[t, slot])
                whole = ended and len(episode) == int(record.steps[t, slot]) + 1  # seen from its beginning
                if whole and (quota is None or seen < quota[slot]):
                    last = verdict(int(record.success[t, slot]))
                    history = policy.spec.history  # 0 where actions are vectors
                    actions = [int(_record(rollouts[n]).to_env[at, slot]) if history else 0 for n, at in episode]
                    paid = [float(_record(rollouts[n]).rewards[at, slot]) for n, at in episode]
                    for step, (n, at) in enumerate(episode):
                        turns = turns_before(actions, paid, step, history)
                        row = _row(rollouts[n], at, slot, policy, turns, *rows_of_actions[n])
                        row |= {"success": last, "episode_return": sum(paid), "episode": count}
                        row |= {"env_id": env_id, "policy": player}
                        for name in features:
                            columns[name].append(row[name])
                    count += 1
                if ended:
                    episode, seen = [], seen + whole
    if not count:
        raise TrainingError("No episode ended in what was recorded: expected more steps, or shorter episodes.")
    dataset = Dataset.from_dict(columns, features=features)
    dataset.info.description = json.dumps(
        {
            "format": FORMAT,
            "env_id": env_id,
            "action_names": list(policy.spec.action_names),
            **({"action_space": space_to_json(policy.spec.action_space)} if vectors else {}),
            "frame_shape": list(policy.spec.frame_shape),
            "player": player,
            "episodes": count,
            **about,
        }
    )
    return dataset


def _record(rollout: Rollout) -> Record:
    if rollout.record is None:
        raise TrainingError("These rollouts keep no record: expected a collector made with record=True.")
    return rollout.record


def _texts(rollout: Rollout, policy: Policy) -> tuple[list[str], list[list[int]]]:
    """What the policy says for each of the T * N actions, and the tokens of it."""
    record = _record(rollout)
    if rollout.outcomes is not None and policy.writes(rollout.actions):
        actions = rollout.actions  # what it wrote itself
    else:
        actions = policy.actions_from_env(record.to_env.reshape(-1, *record.to_env.shape[2:]), record.thoughts)
    return policy.answers(actions), policy.answer_tokens(actions)


def _row(
    rollout: Rollout,
    t: int,
    slot: int,
    policy: Policy,
    turns: np.ndarray,
    answers: list[str],
    tokens: list[list[int]],
) -> dict[str, Any]:
    """One step, without what holds for its whole episode."""
    record, flat = _record(rollout), t * rollout.rewards.shape[1] + slot
    last = record.last_images.get((t, slot))
    action = record.to_env[t, slot].tolist()
    vector, expert = isinstance(action, list), None
    if record.expert_actions is not None:
        expert = record.expert_actions[t, slot].tolist()
    mask = None if record.action_masks is None else record.action_masks[t, slot].tolist()
    return {
        "image": {"bytes": png_of(record.images[flat]), "path": None},
        "instruction": record.instructions[flat],
        "prompt": policy.prompt(record.instructions[flat], turns),
        "action": action,
        "action_name": _named(action, policy, vector),
        "action_tokens": tokens[flat],
        "logprob": float(rollout.logprobs[t, slot][rollout.mask[t, slot]].sum()),
        "value": float(rollout.values[t, slot]),
        "reward": float(record.rewards[t, slot]),
        "terminated": bool(rollout.terminated[t, slot]),
        "truncated": bool(rollout.truncated[t, slot]),
        "expert_action": -1 if expert is None and not vector else expert,
        "seed": int(record.seeds[t, slot]),
        "step": int(record.steps[t, slot]),
        "last_image": None if last is None else {"bytes": png_of(last), "path": None},
        "action_mask": mask,
        "thought": None if record.thoughts is None else record.thoughts[flat],
        "expert_thought": None if record.expert_thoughts is None else record.expert_thoughts[flat],
        "outcome": None if rollout.outcomes is None else rollout.outcomes[flat],
    }


def _named(action: Any, policy: Policy, is_vector: bool) -> str:
    """An action in words; "" where the environment was not stepped."""
    if isinstance(policy.spec.action_space, TextCodes):
        return policy.spec.action_space.decode(action)
    if is_vector:
        return ", ".join(map(short_number, action))
    return policy.spec.action_names[action] if action >= 0 else ""


def episode_success(dataset: Dataset) -> list[bool | None]:
    """Returns whether each episode was a success, in order; None where nobody says what one is."""
    return [won for won, step in zip(dataset["success"], dataset["step"], strict=True) if step == 0]


def episode_returns(dataset: Dataset) -> list[float]:
    """Returns each episode's return, in order."""
    return [paid for paid, step in zip(dataset["episode_return"], dataset["step"], strict=True) if step == 0]


def steps_with_actions(dataset: Dataset) -> list[bool]:
    """Returns for each step whether its action was chosen: False where an answer named none and another stood in."""
    if "outcome" not in dataset.column_names:
        return [True] * len(dataset)
    return [outcome in (None, "legal") for outcome in dataset["outcome"]]


def save_trajectories(dataset: Dataset, folder: Path) -> None:
    """Writes the dataset to a folder that must not exist; it is whole or not there."""
    write_folder(folder, lambda place: dataset.save_to_disk(str(place)))


def without_masks(dataset: Dataset) -> Dataset:
    """Returns the dataset without what it says of allowed actions, as for --action_masks false."""
    return dataset.remove_columns([name for name in MASKS if name in dataset.column_names])


def with_the_experts_actions(dataset: Dataset) -> Dataset:
    """Returns the dataset with what the env's expert would have done in place of what was done, to be imitated.

    Raises:
        TrainingError: the env has no expert.
    """
    experts = dataset["expert_action"][:]
    if any(action is None or action == -1 for action in experts):
        raise TrainingError(
            "These trajectories know no expert: expected an environment that has one, or --target taken."
        )
    replaced = [name for name in ("action", "action_name", "thought", "outcome") if name in dataset.column_names]
    kept = dataset.remove_columns(replaced).add_column(TAKEN, dataset["action"][:], feature=dataset.features["action"])
    features = {name: dataset.features[name] for name in ("action", "action_name")}
    if "expert_thought" in dataset.column_names:
        kept = kept.add_column("thought", dataset["expert_thought"][:], feature=dataset.features["expert_thought"])
    names = json.loads(dataset.info.description)["action_names"]
    texts = json.loads(dataset.info.description).get("action_space", {}).get("kind") == "Text"
    said = [
        TextCodes.decode(action)
        if texts
        else ", ".join(map(short_number, action))
        if isinstance(action, list)
        else names[action]
        for action in experts
    ]
    kept = kept.add_column("action", experts, feature=features["action"])
    return kept.add_column("action_name", said, feature=features["action_name"])


def check_whole(folder: Path) -> None:
    """Compares a dataset with its manifest.

    Raises:
        TrainingError: something was changed, is missing, or was added.
    """
    if not (folder / "dataset_info.json").is_file() and not os.path.lexists(folder / MANIFEST):
        return  # no dataset at all, which loading says
    found = fault(folder, ("dataset_info.json", "state.json"))
    if found:
        raise TrainingError(
            f"The dataset {str(folder)!r} is damaged: {found}; use another copy of it (if it was changed on purpose, "
            f"`{seal_command(folder)}` shows what differs and writes the manifest anew)."
        )


def load_trajectories(
    folder: str,
    env_id: str | None = None,
    action_names: Sequence[str] | None = None,
    frame_shape: Sequence[int] | None = None,
    action_space: gym.Space | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """Returns a dataset of `save_trajectories`, and what holds for all its rows.

    Args:
        folder: where it lies.
        env_id: the environment that it must be of.
        action_names: the actions that it must be of.
        frame_shape: (H, W, 3) of the frames that it must hold.
        action_space: the space of the actions that it must be of, where they may be vectors.

    Raises:
        TrainingError: no dataset there, an empty one, other columns, no images, another environment, other actions or
            frames.
    """
    if not Path(folder).is_dir():
        raise TrainingError(
            f"There is no folder {folder!r}: expected trajectories, which experiments/collect.py writes."
        )
    check_whole(Path(folder))
    try:
        for name in ("state.json", "dataset_info.json"):
            json_object(read_text(Path(folder) / name))
        dataset = load_from_disk(folder)
        about = json.loads(dataset.info.description) if isinstance(dataset, Dataset) else None
    except Exception as error:  # whatever pyarrow and datasets raise
        reason = full_text(error)[:200]
        raise TrainingError(
            f"{folder!r} holds no trajectories ({reason}): expected a dataset of experiments/collect.py."
        ) from error
    missing = [name for name in FEATURES if name not in (*LATER, *getattr(dataset, "column_names", ()))]
    if missing or not isinstance(about, dict) or not {"env_id", "action_names", "frame_shape"} <= set(about):
        named = f"the column {missing[0]!r} is missing" if missing else "it does not say of which environment it is"
        raise TrainingError(
            f"{folder!r} holds no trajectories ({named}): expected a dataset of experiments/collect.py."
        )
    for name, kind in (("action_names", str), ("frame_shape", int)):
        if not isinstance(about[name], list) or not all(type(each) is kind for each in about[name]):
            raise TrainingError(
                f"{folder!r} holds no trajectories ({name} is {shown(about[name])}): expected a dataset of "
                "experiments/collect.py."
            )
    if len(dataset) == 0:
        raise TrainingError(f"The dataset {folder!r} is empty: expected at least one episode, so collect again.")
    lacking = sum(frame is None for frame in dataset.cast_column("image", Image(decode=False))["image"])
    if lacking:
        raise TrainingError(
            f"The dataset {folder!r} has no images in {lacking:,} of {len(dataset):,} rows: expected a frame in every "
            "row, so collect again."
        )
    if env_id is not None and about["env_id"] != env_id:
        raise TrainingError(f"The dataset {folder!r} is of {about['env_id']}: expected one of {env_id}.")
    if action_names is not None and list(action_names) != about["action_names"]:
        raise TrainingError(
            f"The dataset {folder!r} has the actions {', '.join(about['action_names'])}: expected "
            f"{', '.join(action_names)}."
        )
    if action_space is not None:
        expected = space_to_json(action_space) if is_vector(action_space) else None
        if about.get("action_space") != expected:
            raise TrainingError(
                f"The dataset {folder!r} has actions of {about.get('action_space') or 'one choice'}: expected "
                f"{expected or 'one choice'}, so collect again in this environment."
            )
    if frame_shape is not None and list(frame_shape) != about["frame_shape"]:
        raise TrainingError(
            f"The dataset {folder!r} has frames of {' x '.join(map(str, about['frame_shape']))}, but the environment "
            f"shows {' x '.join(map(str, frame_shape))}: use the env_kwargs that it was collected with, "
            f"{about.get('env_kwargs')}."
        )
    return dataset, about
