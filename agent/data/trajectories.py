"""Trajectories as data: what rollouts of any backend played, as a Hugging Face `datasets` folder.

One row a step, episodes whole and in order. The frame is the env's own, as PNG inside the dataset; the rest is what the
policy saw (prompt), did (action, tokens, log-probability) and was paid. An episode replays from its seed to the same
frames. `datasets.load_from_disk` opens the folder anywhere; what holds for all rows stands as JSON in
`dataset.info.description`.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, load_from_disk

from manako.agent.data.recordings import Recording
from manako.agent.errors import TrainingError
from manako.agent.rollout import Observations, Rollout, surely
from manako.errors import text_of
from manako.policies import PolicyOutput, VLMPolicy

FORMAT = 1
FEATURES = Features(
    {
        "image": Image(),
        "instruction": Value("string"),
        "prompt": Value("string"),
        "action": Value("int64"),  # index of action_name
        "action_name": Value("string"),
        "action_tokens": List(Value("int64")),
        "logprob": Value("float32"),
        "value": Value("float32"),
        "reward": Value("float32"),
        "terminated": Value("bool"),
        "truncated": Value("bool"),
        "success": Value("bool"),  # of the whole episode, in every row of it
        "episode_return": Value("float32"),  # likewise
        "expert_action": Value("int64"),  # index, -1 where the env has no expert
        "env_id": Value("string"),
        "seed": Value("int64"),  # of the episode
        "episode": Value("int64"),  # number in this dataset
        "step": Value("int64"),  # in the episode, from 0
        "policy": Value("string"),  # who played
    }
)


class ScriptedDemonstrator:
    """The env's scripted expert, wrong with a given probability: then any other action, each alike.

    Args:
        error_rate: in [0, 1].
    """

    def __init__(self, error_rate: float = 0.0) -> None:
        if not 0 <= error_rate <= 1:
            raise TrainingError(f"error_rate is {error_rate}: expected a number from 0 to 1.")
        self.error_rate = error_rate

    def __call__(self, env: Any, observations: Observations) -> PolicyOutput:
        """Log-probabilities (N, A) and values 0."""
        actions, count = torch.from_numpy(env.expert_actions()), len(env.action_names)
        probabilities = torch.full((len(actions), count), self.error_rate / (count - 1))
        probabilities.scatter_(1, actions[:, None], 1 - self.error_rate)
        return PolicyOutput(probabilities.log(), torch.zeros(len(actions)))


class RandomPlayer:
    """Every action alike."""

    def __call__(self, env: Any, observations: Observations) -> PolicyOutput:
        """Log-probabilities (N, A) and values 0."""
        slots, count = len(observations.instructions), len(env.action_names)
        return PolicyOutput(torch.full((slots, count), 1 / count).log(), torch.zeros(slots))


class RecordedDemonstrator:
    """Plays recordings again: slot k those of `queues[k]`, one after another, and after the last the first again.

    The slots' episodes must have the recordings' seeds: `EpisodeVectorEnv(seed_lists=demonstrator.seed_lists)`. It
    keeps count of them, so it plays in one process and from the start.

    Args:
        queues: the recordings of each slot, N; see `in_slots`.

    Attributes:
        seed_lists: the seeds of the same, N.
        quota: how many recordings each slot has, N; with it `to_dataset` takes every recording once.
        num_steps: steps after which all have been played to their end, and a step more: with that one a recording that
            is too short is noticed.
    """

    def __init__(self, queues: Sequence[Sequence[Recording]]) -> None:
        self.queues = queues
        self.seed_lists = [[recording.seed for recording in queue] for queue in queues]
        self.quota = [len(queue) for queue in queues]
        self.num_steps = 1 + max(sum(len(recording.actions) for recording in queue) for queue in queues)
        self._started = [0] * len(queues)  # episodes
        self._played = [0] * len(queues)  # steps of the present ones

    def __call__(self, env: Any, observations: Observations) -> PolicyOutput:
        """Log-probabilities (N, A), 0 for the recorded action and -inf for all others, and values 0.

        Raises:
            TrainingError: an episode goes on after its recording's end, or the other way round, or has another seed.
        """
        actions = [
            self._next(slot, int(step), seed)
            for slot, (step, seed) in enumerate(zip(env.episode_lengths, env.episode_seeds, strict=True))
        ]
        return surely(torch.tensor(actions), len(env.action_names))

    def _next(self, slot: int, step: int, seed: int) -> int:
        if step == 0:
            if self._started[slot] and self._played[slot] < len(self._present(slot).actions):
                recording, last = self._present(slot), self._played[slot] - 1
                raise TrainingError(
                    f"The recording in {recording.place} (seed {recording.seed}) goes on for {len(recording.actions)} "
                    f"actions, and the episode has ended with step {last}: expected the environment and env_kwargs "
                    "that it was played in, and no action after the end."
                )
            self._started[slot] += 1
        recording = self._present(slot)
        if seed != recording.seed:
            raise TrainingError(
                f"Slot {slot} plays an episode of seed {seed}, and the recording in {recording.place} is of "
                f"{recording.seed}: expected an environment that was given the demonstrator's seed_lists."
            )
        if step == len(recording.actions):
            raise TrainingError(
                f"The recording in {recording.place} (seed {recording.seed}) ends before step {step}, and the episode "
                "goes on: expected the environment and env_kwargs that it was played in, and all actions to the end."
            )
        self._played[slot] = step + 1
        return recording.actions[step]

    def _present(self, slot: int) -> Recording:
        return self.queues[slot][(self._started[slot] - 1) % len(self.queues[slot])]


def to_dataset(
    rollouts: Sequence[Rollout],
    policy: VLMPolicy,
    env_id: str,
    player: str,
    about: dict[str, Any],
    quota: Sequence[int] | None = None,
) -> Dataset:
    """The whole episodes in consecutive rollouts of the same slots.

    Args:
        rollouts: recorded (with their images), one after another.
        policy: whose prompts and tokens they were played with.
        env_id: the environment.
        player: who chose the actions.
        about: what else holds for all rows, for JSON.
        quota: how many episodes to take of each slot, its first ones; all by default.

    Raises:
        TrainingError: no episode ended in them.
    """
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    count = 0
    for slot in range(rollouts[0].actions.shape[1]):
        episode: list[tuple[Rollout, int]] = []
        before = count
        for rollout in rollouts:
            for t in range(len(rollout.actions)):
                if rollout.steps[t, slot] == 0:
                    episode = []
                episode.append((rollout, t))
                ended = bool(rollout.terminated[t, slot] | rollout.truncated[t, slot])
                whole = ended and len(episode) == int(rollout.steps[t, slot]) + 1  # seen from its beginning
                if whole and (quota is None or count - before < quota[slot]):
                    _add(columns, episode, slot, policy, env_id, player, count)
                    count += 1
                if ended:
                    episode = []
    if not count:
        raise TrainingError("No episode ended in what was recorded: expected more steps, or shorter episodes.")
    dataset = Dataset.from_dict(columns, features=FEATURES)
    dataset.info.description = json.dumps(
        {
            "format": FORMAT,
            "env_id": env_id,
            "action_names": list(policy.spec.action_names),
            "frame_shape": list(policy.spec.frame_shape),
            "player": player,
            "episodes": count,
            **about,
        }
    )
    return dataset


def _add(
    columns: dict[str, list[Any]],
    episode: list[tuple[Rollout, int]],
    slot: int,
    policy: VLMPolicy,
    env_id: str,
    player: str,
    number: int,
) -> None:
    last, end = episode[-1]
    total = sum(float(rollout.rewards[t, slot]) for rollout, t in episode)
    for rollout, t in episode:
        row = t * rollout.actions.shape[1] + slot
        action = int(rollout.actions[t, slot])
        assert rollout.images is not None
        values = {
            "image": {"bytes": _png(rollout.images[row]), "path": None},
            "instruction": rollout.instructions[row],
            "prompt": policy.prompts.render(policy.prompts.clean(rollout.instructions[row])),
            "action": action,
            "action_name": policy.spec.action_names[action],
            "action_tokens": list(policy.codec.token_ids[action]),
            "logprob": float(rollout.logprobs[t, slot]),
            "value": float(rollout.values[t, slot]),
            "reward": float(rollout.rewards[t, slot]),
            "terminated": bool(rollout.terminated[t, slot]),
            "truncated": bool(rollout.truncated[t, slot]),
            "success": bool(last.success[end, slot]),
            "episode_return": total,
            "expert_action": int(rollout.expert_actions[t, slot]) if rollout.expert_actions is not None else -1,
            "env_id": env_id,
            "seed": int(rollout.seeds[t, slot]),
            "episode": number,
            "step": int(rollout.steps[t, slot]),
            "policy": player,
        }
        for name, value in values.items():
            columns[name].append(value)


def _png(frame: np.ndarray) -> bytes:
    from PIL import Image as Picture

    buffer = io.BytesIO()
    Picture.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def episode_success(dataset: Dataset) -> list[bool]:
    """Of each episode, in order."""
    return [won for won, step in zip(dataset["success"], dataset["step"], strict=True) if step == 0]


def save_trajectories(dataset: Dataset, folder: Path) -> None:
    """Writes the dataset to a folder that must not exist; it is whole or not there."""
    from manako.agent.checkpoint import write_folder

    write_folder(folder, lambda place: dataset.save_to_disk(str(place)))


def load_trajectories(
    folder: str,
    env_id: str | None = None,
    action_names: Sequence[str] | None = None,
    frame_shape: Sequence[int] | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """A dataset of `save_trajectories`, and what holds for all its rows.

    Args:
        folder: where it lies.
        env_id: the environment that it must be of.
        action_names: the actions that it must be of.
        frame_shape: (H, W, 3) of the frames that it must hold.

    Raises:
        TrainingError: no dataset there, an empty one, other columns, no images, another environment, other actions or
            frames.
    """
    if not Path(folder).is_dir():
        raise TrainingError(
            f"There is no folder {folder!r}: expected trajectories, which experiments/collect.py writes."
        )
    try:
        dataset = load_from_disk(folder)
        about = json.loads(dataset.info.description) if isinstance(dataset, Dataset) else None
    except Exception as error:  # whatever pyarrow and datasets raise
        reason = text_of(error)[:200]
        raise TrainingError(
            f"{folder!r} holds no trajectories ({reason}): expected a dataset of experiments/collect.py."
        ) from error
    missing = [name for name in FEATURES if name not in getattr(dataset, "column_names", ())]
    if missing or not isinstance(about, dict) or not {"env_id", "action_names", "frame_shape"} <= set(about):
        named = f"the column {missing[0]!r} is missing" if missing else "it does not say of which environment it is"
        raise TrainingError(
            f"{folder!r} holds no trajectories ({named}): expected a dataset of experiments/collect.py."
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
    if frame_shape is not None and list(frame_shape) != about["frame_shape"]:
        raise TrainingError(
            f"The dataset {folder!r} has frames of {' x '.join(map(str, about['frame_shape']))}, but the environment "
            f"shows {' x '.join(map(str, frame_shape))}: use the env_kwargs that it was collected with, "
            f"{about.get('env_kwargs')}."
        )
    return dataset, about
