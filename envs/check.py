"""What is wrong with an environment, in sentences: all of it, not only the first thing.

`check_vlm_env` plays an environment from outside, without the wrapper that would stop at its first fault: a few
hundred steps in which every action comes up, then the same seeds again, in the same object and in a new one. It comes
back with sentences, whatever the environment raises. A sentence that starts with "warning: " describes something that
works and is rarely meant.

Command: `python experiments/check_env.py ID`.
"""

import contextlib
import itertools
import numbers
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from manako.envs.action_vectors import FlatActions
from manako.envs.errors import EnvError
from manako.envs.guard import disturbed, folder_now, pass_ours, space_check, unpacked, wrong_flag, wrong_success
from manako.envs.limits import is_default, limit_in_words
from manako.envs.making import find_spec, make_raw_env, make_vlm_env
from manako.envs.masks import KEY, random_actions, read_mask
from manako.envs.observation import (
    MAX_INSTRUCTION_LENGTH,
    ImageSource,
    VLMObservation,
    as_frame,
    is_blank,
    read_picture,
    resolve_actions,
    resolve_image,
    resolve_instruction,
)
from manako.errors import type_and_text
from manako.plain import holds_control_characters
from manako.spaces import TextCodes, is_vector, random_vectors, ranges, vector_in_words

WARNING = "warning: "
LONG_INSTRUCTION = 4_000  # characters
VECTORS = 6  # drawn, of actions that are vectors


def check_vlm_env(
    env_id: str,
    *,
    instruction: str | None = None,
    action_names: Sequence[str] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    image_source: ImageSource = "auto",
    success_return: float | None = None,
    action_masks: bool = True,
    max_episode_steps: int | None = None,
    steps: int = 200,
) -> list[str]:
    """Returns the faults of an environment.

    Args:
        env_id: See `make_vlm_env`, as for the arguments up to `action_masks`.
        instruction: Replaces the environment's own.
        action_names: Replace the environment's own.
        env_kwargs: For the environment's constructor.
        image_source: "auto", "observation", "render" or "blank".
        success_return: The lowest return of a successful episode.
        action_masks: Obey `info["action_mask"]` where the environment gives one.
        max_episode_steps: After so many steps an episode is truncated.
        steps: How many steps to play.

    Returns:
        One sentence a fault, empty if there is none; those that start with "warning: " do not keep it from running.
    """
    try:
        name = find_spec(env_id).id
        env = make_raw_env(env_id, env_kwargs, max_episode_steps)
    except EnvError as error:
        return [str(error)]
    faults = _Faults(name)
    with contextlib.closing(_Closing(env, faults)):
        player = _prepare(env, name, instruction, action_names, image_source, action_masks, faults)
        if player is not None:
            before = _global_chance()
            first = player.play(env, steps)
            if before != _global_chance():
                faults.add(
                    "global chance",
                    "changes the state of `random` or `np.random`, which others of this process share: draw everything "
                    "random from self.np_random",
                    warning=True,
                )
            _judge(first, env, faults)
            if not player.stopped and _compare(first, player.play(env, steps), "a second time in one object", faults):
                with contextlib.suppress(EnvError):  # it could be made once; the last lines try again
                    other = make_raw_env(env_id, env_kwargs, max_episode_steps)
                    with contextlib.closing(_Closing(other, faults)):
                        _compare(first, player.play(other, steps), "in a new object", faults)
    if all(fault.startswith(WARNING) for fault in faults.sentences):
        # Last, the real thing, so that this file cannot be more lenient than the wrapper.
        try:
            made = make_vlm_env(
                env_id,
                instruction=instruction,
                action_names=action_names,
                env_kwargs=env_kwargs,
                image_source=image_source,
                success_return=success_return,
                action_masks=action_masks,
                max_episode_steps=max_episode_steps,
            )
            with contextlib.closing(made):
                made.reset(seed=0)
                made.step(made.action_space.sample() if is_vector(made.action_space) else made.action_mask.argmax())
        except EnvError as error:
            faults.sentences.append(str(error))
    return faults.sentences


def _global_chance() -> tuple[object, object]:
    """The state of the generators that all of a process share."""
    state: Any = np.random.get_state(legacy=False)
    return random.getstate(), (state["state"]["key"].tobytes(), state["state"]["pos"])


class Speed(NamedTuple):
    """What a step takes, in seconds, with its share of the resets; of a picture in the observation `step` is all."""

    step: float
    picture: float

    @property
    def steps_per_second(self) -> float:
        """Of the two."""
        return 1 / (self.step + self.picture)


def measure_speed(env: VLMObservation, seconds: float = 1.0, most_steps: int = 500) -> Speed:
    """Returns what steps of random play take, with the resets between them, and their picture where it is rendered.

    Args:
        env: played, from its next reset on.
        seconds: how long to measure.
        most_steps: after which it stops as well.
    """
    draw, inner = np.random.default_rng(0), env.env
    count = len(env.action_names)
    observation, info = inner.reset(seed=0)
    stepping = drawing = 0.0
    steps = 0
    while steps < most_steps and stepping + drawing < seconds:
        if is_vector(env.action_space):
            action = env.own_action(random_vectors(env.action_space, lambda: draw.random(1))[0])
        else:
            mask = read_mask(info[KEY], count)[None] if env.gives_masks and info.get(KEY) is not None else None
            action = env.own_action(random_actions(draw.random(1), count, mask)[0])
        begun = time.perf_counter()
        observation, _, terminated, truncated, info = inner.step(action)
        stepped = time.perf_counter()
        read_picture(inner, observation, env.image_from)
        stepping, drawing, steps = stepping + stepped - begun, drawing + time.perf_counter() - stepped, steps + 1
        if terminated or truncated:
            begun = time.perf_counter()
            _, info = inner.reset()
            stepping += time.perf_counter() - begun
    return Speed(stepping / steps, drawing / steps)


class _Faults:
    """Sentences about one environment, one for each kind of fault: a wrong value at every step is said once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sentences: list[str] = []
        self._kinds: set[str] = set()

    def add(self, kind: str, what: str, warning: bool = False) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.sentences.append(f"{WARNING if warning else ''}{self.name} {what}")


class _Closing:
    """Closes an environment, and takes an error in its `close()` for a fault."""

    def __init__(self, env: gym.Env, faults: _Faults) -> None:
        self._env, self._faults = env, faults

    def close(self) -> None:
        try:
            self._env.close()
        except BaseException as error:
            pass_ours(error)
            self._faults.add("close", f"broke in close() with {type_and_text(error)}")


class _Moment(NamedTuple):
    """One reset or step, as it was."""

    seed: int
    step: int  # 0 for a reset
    frame: np.ndarray | None  # (H, W, 3) uint8
    text: object
    reward: object
    terminated: bool
    truncated: bool
    mask: np.ndarray | None  # (A,) bool, which actions are allowed; None: it does not say, or is not to be obeyed


class _Player:
    """Plays seeded episodes with a fixed sequence of actions, and notes what breaks the contract."""

    def __init__(
        self,
        names: Sequence[str],
        values: Sequence[Any],
        image_from: str | None,
        instruction: Callable[[gym.Env, Any], object] | None,
        faults: _Faults,
        action_masks: bool = False,
    ) -> None:
        self._names, self._values = names, values  # as the environment's own step() takes them
        self._obeys, self._is_masked = action_masks, False
        self._mask: np.ndarray | None = None
        self._image_from, self._instruction = image_from, instruction
        self._faults = faults
        self._frame_shape: tuple[int, int, int] | None = None
        self._folder: str | None = None
        self._check: Callable[[Any], str | None] = lambda _: None
        self.stopped = False  # an exception ended the play early

    def play(self, env: gym.Env, steps: int) -> list[_Moment]:
        """Plays `steps` steps in episodes with the seeds 0, 1, 2, ..."""
        draw, self._is_masked = np.random.default_rng(0), False
        deck: list[int] = []  # every action once, shuffled: none is left untried
        moments: list[_Moment] = []
        seed, step, ended = -1, 0, True
        for _ in range(steps):
            if ended:
                seed, step = seed + 1, 0
                observation = self.reset(env, seed)
                if self.stopped:
                    return moments
                moments.append(self._moment(env, seed, 0, observation))
            deck = deck or draw.permutation(len(self._names)).tolist()
            result = self._take(env, self._choose(deck, draw))
            if result is None:
                return moments
            step += 1
            observation, reward, terminated, truncated = result
            moments.append(self._moment(env, seed, step, observation, reward, terminated, truncated))
            ended = terminated or truncated
        return moments

    def reset(self, env: gym.Env, seed: int) -> Any:
        """Resets to a seed and returns the observation; a fault in the result sets `stopped`."""
        self._folder, self._check = folder_now(), space_check(env.observation_space)
        try:
            result: Any = env.reset(seed=seed)
        except BaseException as error:
            pass_ours(error)
            wrong = unpacked(error, "(observation, info dict)")
            self._stop(
                f"{wrong}, from reset()" if wrong else f"broke in reset(seed={seed}) with {type_and_text(error)}"
            )
            return None
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
            self._stop(f"returns {_kind(result)} from reset(), expected (observation, info dict)")
            return None
        self._is_masked = self._is_masked or (seed == 0 and KEY in result[1])
        self._allow(result[1], ended=False)
        return result[0]

    def _choose(self, deck: list[int], draw: np.random.Generator) -> int:
        """The next action of the deck that is allowed; by chance where none is left in it."""
        if self._mask is None:
            return deck.pop()
        allowed = [place for place, action in enumerate(deck) if self._mask[action]]
        return deck.pop(allowed[-1]) if allowed else int(draw.choice(np.flatnonzero(self._mask)))

    def _allow(self, info: dict[str, Any], ended: bool) -> None:
        """Reads which actions are allowed; a faulty mask allows all."""
        self._mask = None
        if not self._obeys or info.get(KEY) is None:
            return
        if not self._is_masked:
            self._faults.add("late mask", f"gives info['{KEY}'] after a first reset() without one")
        try:
            mask = read_mask(info[KEY], len(self._names))
        except EnvError as error:
            self._faults.add("mask", str(error))
            return
        if mask.any():
            self._mask = mask
        elif not ended:
            self._faults.add("no action", f"gives info['{KEY}'] that allows none of its {len(mask)} actions")

    def _take(self, env: gym.Env, action: int) -> tuple[Any, object, bool, bool] | None:
        name = self._names[action]
        try:
            result: Any = env.step(self._values[action])
        except BaseException as error:
            pass_ours(error)
            raw = _raw_step(env, self._values[action])
            if raw is not None and (not isinstance(raw, tuple) or len(raw) != 5):
                result = raw  # a wrapper of Gymnasium's stumbled over it
            else:
                self._stop(f"broke in step(), action {name!r}, with {type_and_text(error)}")
                return None
        if not isinstance(result, tuple) or len(result) != 5:
            self._stop(
                f"returns {_kind(result)} from step(), expected (observation, reward, terminated, truncated, info)"
            )
            return None
        observation, reward, terminated, truncated, info = result
        if not isinstance(reward, numbers.Real) or isinstance(reward, bool):
            self._faults.add(
                "reward type", f"gives the reward {reward!r} of type {type(reward).__name__}, expected a number"
            )
        elif not np.isfinite(float(reward)):
            self._faults.add("reward value", f"gives the reward {reward}, expected a finite number")
        for what, flag in (("terminated", terminated), ("truncated", truncated)):
            if wrong := wrong_flag(what, flag):
                self._faults.add(what, wrong.replace("gave", "gives", 1))
        if not isinstance(info, dict):
            self._faults.add("info", f"gives {_kind(info)} as info from step(), expected a dict")
        else:
            ended = bool(np.any(terminated) or np.any(truncated))
            if ended and (wrong := wrong_success(info)):
                self._faults.add("success", wrong.replace("gave", "gives", 1))
            self._allow(info, ended)
        return observation, reward, bool(np.any(terminated)), bool(np.any(truncated))

    def _moment(
        self,
        env: gym.Env,
        seed: int,
        step: int,
        observation: Any,
        reward: object = 0.0,
        terminated: bool = False,
        truncated: bool = False,
    ) -> _Moment:
        if wrong := self._check(observation):
            self._faults.add("space", f"gives an observation outside its observation_space: it {wrong}")
        frame = self._look(env, observation)
        text = self._listen(env, observation)
        if changed := disturbed(self._folder):
            self._faults.add("process", changed)
        return _Moment(seed, step, frame, text, reward, terminated, truncated, self._mask)

    def _look(self, env: gym.Env, observation: Any) -> np.ndarray | None:
        if self._image_from is None:
            return None
        try:
            frame = as_frame(read_picture(env, observation, self._image_from), self._frame_shape)
        except EnvError as error:
            self._faults.add("image", f"{error}, from {self._image_from}")
            return None
        except BaseException as error:
            pass_ours(error)
            self._faults.add("image raises", f"broke in its image from {self._image_from} with {type_and_text(error)}")
            return None
        if self._frame_shape is None:
            height, width, _ = frame.shape
            self._frame_shape = (height, width, 3)
        return frame

    def _listen(self, env: gym.Env, observation: Any) -> object:
        if self._instruction is None:
            return None
        try:
            text = self._instruction(env, observation)
        except BaseException as error:
            pass_ours(error)
            self._faults.add("instruction raises", f"broke in its instruction with {type_and_text(error)}")
            return None
        if not isinstance(text, str):
            self._faults.add("instruction type", f"gives {text!r} as its instruction, expected a string")
        elif not text.strip():
            self._faults.add("instruction empty", "gives an empty instruction")
        elif len(text) > MAX_INSTRUCTION_LENGTH:
            self._faults.add(
                "instruction length",
                f"gives an instruction of {len(text)} characters, expected at most {MAX_INSTRUCTION_LENGTH}",
            )
        elif len(text) > LONG_INSTRUCTION:
            self._faults.add(
                "instruction long",
                f"gives an instruction of {len(text):,} characters, and a model reads so many tokens as it has "
                "positions (tiny 8,192): check_model.py --env says whether yours reads it",
                warning=True,
            )
        elif holds_control_characters(text):
            self._faults.add(
                "instruction characters",
                f"gives an instruction with control characters, {text[:200]!r}: a policy reads them written out",
                warning=True,
            )
        return text

    def _stop(self, what: str) -> None:
        self._faults.add("stop", what)
        self.stopped = True


def _prepare(
    env: gym.Env,
    name: str,
    instruction: str | None,
    action_names: Sequence[str] | None,
    image_source: ImageSource,
    action_masks: bool,
    faults: _Faults,
) -> _Player | None:
    """Finds the actions, the image and the instruction; None where the environment cannot even be played."""
    names: Sequence[str] | None = None
    values: Sequence[Any] = ()
    image_from = None
    try:
        names, flat, _ = resolve_actions(env, name, action_names)
        if is_vector(flat.space):
            names, values = _vectors(flat)
        else:
            values = [flat.to_env(number) for number in range(len(names))]
    except BaseException as error:
        pass_ours(error)
        faults.sentences.append(_sentence(name, "its action names", error))
    if names is None and isinstance(env.action_space, gym.spaces.Discrete):
        start = int(env.action_space.start)
        values = range(start, start + int(env.action_space.n))
        names = tuple(map(str, values))

    probe = _Player((), (), None, None, faults)
    observation = probe.reset(env, 0)
    try:
        image_from = resolve_image(env, name, image_source, observation)
    except BaseException as error:
        pass_ours(error)
        faults.sentences.append(_sentence(name, "its image", error))
    if probe.stopped:
        return None

    def read_anew(env: gym.Env, observation: Any) -> object:
        # A reader belongs to one object, and the play goes on in another.
        return resolve_instruction(env, name, observation, instruction)[0](observation)

    read: Callable[[gym.Env, Any], object] | None = read_anew
    try:
        resolve_instruction(env, name, observation, instruction)
    except BaseException as error:
        pass_ours(error)
        faults.sentences.append(_sentence(name, "its instruction", error))
        read = None
    if names is None:
        # Without actions there is still a first frame and a first instruction to look at.
        _Player((), (), image_from, read, faults)._moment(env, 0, 0, observation)
        return None
    return _Player(names, values, image_from, read, faults, action_masks)


def _vectors(flat: FlatActions) -> tuple[list[str], list[Any]]:
    """Action vectors to play, in words and as the environment takes them: both ends, and some in between."""
    draw = np.random.default_rng(0)
    ends = () if isinstance(flat.space, TextCodes) else np.array(ranges(flat.space)).T  # (2, d)
    made = [*ends, *random_vectors(flat.space, lambda: draw.random(VECTORS))]
    return [vector_in_words(action, flat.space) for action in made], [flat.to_env(action) for action in made]


def _judge(moments: list[_Moment], env: gym.Env, faults: _Faults) -> None:
    """Warns of what an environment rarely means to do."""
    frames = [moment.frame for moment in moments if moment.frame is not None]
    blank = sum(map(is_blank, frames))
    if blank:
        faults.add("blank", f"shows a single colour in {blank} of {len(frames)} frames", warning=True)
    pairs = [(old, new) for old, new in itertools.pairwise(moments) if new.step > 0]
    going_on = [(old, new) for old, new in pairs if not (new.terminated or new.truncated)]
    if frames and going_on and all(_same_view(old, new) for old, new in pairs):
        faults.add(
            "still", f"changes neither its frame nor its instruction in {len(pairs)} steps of any action", warning=True
        )
    if pairs and is_default(env) and not any(new.terminated or new.truncated for _, new in pairs):
        faults.add(
            "endless",
            f"ends no episode in {len(pairs)} steps and is registered without max_episode_steps: its episodes are "
            f"{limit_in_words(env)[1]}",
            warning=True,
        )


def _compare(first: list[_Moment], again: list[_Moment], how: str, faults: _Faults) -> bool:
    """Compares a second play of the same seeds and actions with the first; False where they differ."""
    for old, new in zip(first, again, strict=False):
        for what, same in (
            ("frame", _same_frame(old.frame, new.frame)),
            ("instruction", old.text == new.text),
            ("reward", _same_reward(old.reward, new.reward)),
            ("action mask", _same_frame(old.mask, new.mask)),
            ("end", (old.terminated, old.truncated) == (new.terminated, new.truncated)),
        ):
            if not same:
                faults.add(
                    "seed",
                    f"does not respect its seed: the {what} of step {old.step} of the episode with seed {old.seed} was "
                    f"another when it was played {how}; draw everything random from self.np_random, after "
                    "super().reset(seed=seed)",
                )
                return False
    return True


def _same_frame(old: np.ndarray | None, new: np.ndarray | None) -> bool:
    if old is None or new is None:
        return old is new
    return np.array_equal(old, new)


def _same_reward(old: Any, new: Any) -> bool:
    return bool(np.all((np.asarray(old) == np.asarray(new)) | (np.asarray(old) != np.asarray(old))))


def _same_view(old: _Moment, new: _Moment) -> bool:
    return _same_frame(old.frame, new.frame) and old.text == new.text


def _raw_step(env: gym.Env, action: Any) -> Any:
    """Returns what the unwrapped environment's step returns after a reset, or None if it raises too."""
    try:
        env.unwrapped.reset(seed=0)
        return env.unwrapped.step(action)
    except BaseException as error:
        pass_ours(error)
        return None


def _sentence(name: str, what: str, error: BaseException) -> str:
    return str(error) if isinstance(error, EnvError) else f"{name} broke in {what} with {type_and_text(error)}"


def _kind(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a value of type {type(value).__name__}"
