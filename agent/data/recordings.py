"""Recordings: episodes as seeds and actions, by whoever played them.

A recording is a text file of JSON lines. A line may say what was played from there on; every other is a whole episode:

    {"env_id": "manako/GoTo-v0", "env_kwargs": {"size": 4}}
    {"seed": 12, "actions": ["up", "left", "left"]}
    {"seed": 12, "actions": ["left", "up", 2]}

`seed` is what the env is reset with, a whole number from 0 to 2147483647; several lines may have the same. `actions`
are all actions from there to the episode's end, each by its name or by its number from 0 on; a vector is a list of
numbers. `env_id` and `env_kwargs` (either may be left out) must be those that the recording is read for; joined files
have such a line more than once. There are no other keys, and empty lines count for nothing.

The frames are not stored: they come from playing the episodes again, which is also the proof that the recording is one
of this env. A folder of trajectories (`agent.data.trajectories`) is a recording too, by its seeds and actions. No torch
here, so that a window to play in opens at once.
"""

import difflib
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

from manako.agent.errors import TrainingError
from manako.bounded import BadText, from_json, read_text
from manako.spaces import TextCodes, action_dtype, is_vector, ranges

SEEDS = 2**31  # some environments take no larger ones
EXAMPLE = '{"seed": 12, "actions": ["up", "left"]}'


@dataclass(frozen=True)
class Recording:
    """One episode.

    Args:
        seed: what the env is reset with.
        actions: indices, or vectors (d,) of numbers, to the end of the episode.
        place: where it is written, in words.
    """

    seed: int
    actions: tuple[Any, ...]
    place: str


def read_recordings(
    path: str,
    env_id: str,
    action_names: Sequence[str],
    env_kwargs: Mapping[str, Any] | None = None,
    action_space: gym.Space | None = None,
) -> list[Recording]:
    """Returns the episodes of a file of JSON lines, or of a folder of trajectories, in their order.

    Args:
        path: the file or folder.
        env_id: the environment that they must be of, where the recording says so.
        action_names: its actions, (A,).
        env_kwargs: likewise the arguments of its constructor.
        action_space: its actions, where they may be vectors.

    Raises:
        TrainingError: it cannot be read, holds no episode, is of something else, or a line is wrong; the first fault.
    """
    if Path(path).is_dir():
        return _from_trajectories(path, env_id, action_names, env_kwargs, action_space)
    try:
        text = read_text(Path(path)).removeprefix("\ufeff")
    except (OSError, BadText) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"The recording {path!r} cannot be read ({reason}): expected a file with lines such as {EXAMPLE}."
        ) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    recordings = []
    for number, line in lines:
        place = f"line {number} of {path!r}"
        values = _json_object(line, place)
        if "seed" not in values and ("env_id" in values or "env_kwargs" in values):
            _check_keys(values, ("env_id", "env_kwargs"), place)
            _check_env(values, env_id, env_kwargs, f"The recording {path!r}")
        else:
            recordings.append(_episode(values, action_names, place, action_space))
    if not recordings:
        raise TrainingError(f"The recording {path!r} holds no episode: expected lines such as {EXAMPLE}.")
    return recordings


def append_recording(
    path: str, recording: Recording, env_id: str, action_names: Sequence[str], env_kwargs: Mapping[str, Any] | None
) -> None:
    """Adds an episode to a file, which is made with its first line where there is none.

    Raises:
        TrainingError: the disk refuses.
    """
    file = Path(path)
    line = _json_line(seed=recording.seed, actions=[action_names[action] for action in recording.actions])
    try:
        before = file.read_bytes() if file.exists() else b""
        if not before:
            line = _json_line(env_id=env_id, env_kwargs=dict(env_kwargs or {})) + line
        elif not before.endswith(b"\n"):  # an editor left the last line open
            line = "\n" + line
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(line)
    except OSError as error:
        raise TrainingError(
            f"The recording {path!r} cannot be written ({error.strerror or error}): expected a file on a disk that "
            "takes it."
        ) from error


def split_over_slots(recordings: Sequence[Recording], num_slots: int) -> list[Sequence[Recording]]:
    """Returns neighbouring recordings for each slot, as many for each but the last; fewer slots for too few of them."""
    size = -(-len(recordings) // num_slots)
    return [recordings[first : first + size] for first in range(0, len(recordings), size)]


def _from_trajectories(
    folder: str,
    env_id: str,
    action_names: Sequence[str],
    env_kwargs: Mapping[str, Any] | None,
    action_space: gym.Space | None,
) -> list[Recording]:
    from manako.agent.data.trajectories import load_trajectories

    rows, about = load_trajectories(folder, env_id, action_names, action_space=action_space)
    arguments = about.get("env_kwargs")  # as on the command line
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    _check_env({"env_kwargs": arguments}, env_id, env_kwargs, f"The dataset {folder!r}")
    seeds: dict[int, int] = {}
    actions: dict[int, list[Any]] = {}
    for episode, seed, action in zip(rows["episode"], rows["seed"], rows["action"], strict=True):
        seeds[episode] = seed
        actions.setdefault(episode, []).append(action)
    return [Recording(seeds[e], tuple(actions[e]), f"episode {e} of {folder!r}") for e in actions]


def _json_line(**values: Any) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        values = from_json(line)
    except BadText as error:
        at = error.__cause__
        reason = f"{at.msg}, column {at.colno}" if isinstance(at, json.JSONDecodeError) else str(error)
        raise TrainingError(f"No JSON in {place} ({reason}): expected such as {EXAMPLE}.") from error
    if not isinstance(values, dict):
        raise TrainingError(f"A JSON {type(values).__name__} in {place}: expected such as {EXAMPLE}.")
    return values


def _check_keys(values: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in values:
        if key not in known:
            raise TrainingError(f"There is no key {reprlib.repr(key)} ({place}): expected {' and '.join(known)}.")


def _check_env(values: Mapping[str, Any], env_id: str, env_kwargs: Mapping[str, Any] | None, named: str) -> None:
    recorded_id = values.get("env_id", env_id)
    if recorded_id != env_id:
        raise TrainingError(f"{named} is of {recorded_id}: expected one of {env_id}, or give --env {recorded_id}.")
    expected = dict(env_kwargs or {})
    arguments = values.get("env_kwargs", expected)
    if (arguments or {}) != expected:
        raise TrainingError(
            f"{named} was played with env_kwargs {json.dumps(arguments)}: expected {json.dumps(expected)}, or give "
            f"--env_kwargs '{json.dumps(arguments)}'."
        )


def _episode(
    values: Mapping[str, Any], action_names: Sequence[str], place: str, action_space: gym.Space | None
) -> Recording:
    _check_keys(values, ("seed", "actions"), place)
    seed: Any = values.get("seed")
    actions: Any = values.get("actions")
    if not _is_index(seed, SEEDS):
        raise TrainingError(f"The seed in {place} is {reprlib.repr(seed)}: expected a whole number below {SEEDS}.")
    if not isinstance(actions, list) or not actions:
        raise TrainingError(f"The actions in {place} are {reprlib.repr(actions)}: expected a list, as in {EXAMPLE}.")
    names = list(action_names)
    if action_space is not None and is_vector(action_space):
        return Recording(seed, _vectors(actions, action_space, f"{place} (seed {seed})"), place)
    for step, action in enumerate(actions):
        if action not in names and not _is_index(action, len(names)):
            _refuse_action(action, names, f"step {step} in {place} (seed {seed})")
    return Recording(
        seed, tuple(names.index(action) if isinstance(action, str) else action for action in actions), place
    )


def _vectors(actions: list[Any], space: gym.Space, place: str) -> tuple[list[float], ...]:
    if isinstance(space, TextCodes):
        for step, action in enumerate(actions):
            if not isinstance(action, str) or not space.text.contains(action):
                raise TrainingError(
                    f"The action of step {step} in {place} is {reprlib.repr(action)}: expected one in {space}."
                )
        return tuple(space.encode(action).tolist() for action in actions)
    for step, action in enumerate(actions):
        numbers = isinstance(action, list) and all(isinstance(n, int | float) and n == n for n in action)
        if not numbers or not space.contains(np.array(action, action_dtype(space))):
            raise TrainingError(
                f"The action of step {step} in {place} is {reprlib.repr(action)}: expected a list of "
                f"{len(ranges(space))} numbers in {space}."
            )
    return tuple(actions)


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _refuse_action(action: Any, names: list[str], place: str) -> NoReturn:
    near = difflib.get_close_matches(action.lower(), names, 1) if isinstance(action, str) else []
    hint = f"did you mean {near[0]!r}?" if near else f"expected a number from 0 to {len(names) - 1}, or one of these."
    raise TrainingError(f"The action of {place} is {reprlib.repr(action)}, and the env has {', '.join(names)}: {hint}")
