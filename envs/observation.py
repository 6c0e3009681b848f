"""Any Gymnasium environment as what a vision-language policy sees: an image and an instruction.

`VLMObservation` turns whatever the environment observes into `{"image", "instruction"}` and numbers the actions
from 0. Where each part comes from, first match first:

image         `image_source="observation"` or `"render"` if given. Else ("auto") the observation, or its `image`
              key, where that is a picture: a `Box` of uint8 with bounds 0 and 255, of shape (H, W, 3), (H, W, 1) or
              (H, W), at least 16 pixels on each side, and not dark as codes are: of numbers below 32 alone. Else
              `render()`, an rgb_array. This keeps symbolic grids out: MiniGrid observes (7, 7, 3) uint8 object codes,
              with `FullyObsWrapper` of a whole board, and others planes of zeros and ones, which no encoder can see.
              Where it is wrong, `image_source` says so. `image_source="blank"` blackens what "auto" finds: whoever
              trains on it learns what the text alone gives, which is the control of what the image is worth.
instruction   the `instruction` argument; the attribute `mission` or `instruction` of the outermost wrapper that has
              one; the observation's `mission` or `instruction` key; the attribute of the environment itself; the task
              description in `envs/tasks.py`. Attributes and keys are read again after each reset and step.
action names  the `action_names` argument; an `action_names` attribute; `get_action_meanings()`; an `actions` enum; the
              task description. Of wrappers and the environment the outermost that has one is heard.
action mask   `info["action_mask"]` of reset and step, (A,) of bool or of 0 and 1, unless `action_masks` is False: what
              it does not allow is not done. A first reset without one means that the environment gives none.

Actions that are no single choice are vectors, laid flat (`action_vectors.py`): their names are those of the entries,
`action 1`, `action 2` ... where nobody names them.

Left out: several pictures in one observation, and channel-first pictures (use `image_source="render"`, or transpose
them in a wrapper of yours).
"""

import enum
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np

from manako.envs.action_vectors import FlatActions
from manako.envs.attributes import attribute_of, owner_of
from manako.envs.captions import caption_of
from manako.envs.errors import EnvBrokeError, EnvError
from manako.envs.experts import make_expert
from manako.envs.faults import HangError
from manako.envs.guard import (
    STEP,
    disturbed,
    folder_now,
    pass_ours,
    space_check,
    unpacked,
    wrong_flag,
    wrong_info,
    wrong_reward,
    wrong_success,
)
from manako.envs.limits import limit_in_words, time_limit
from manako.envs.masks import KEY, read_mask
from manako.envs.tasks import TASKS, success_rule, task_of
from manako.errors import type_and_text
from manako.plain import holds_control_characters, written_out
from manako.spaces import TextCodes, action_shape, is_skip, is_vector, vector_in_words

ImageSource = Literal["auto", "observation", "render", "blank"]
IMAGE_SOURCES: tuple[ImageSource, ...] = ("auto", "observation", "render", "blank")
BLANK = "black in place of "  # before where the image would come from

MOST_OF_CODES = 31  # a uint8 grid of no larger number is taken for symbols, unless all of it is 0
MIN_IMAGE_SIDE = 16  # pixels; a smaller uint8 grid is taken for symbols
MOST_SKIPPED = 32  # turns of an episode without an action; the last of them truncates it
LARGEST_REWARD = 1e15  # squares of an episode's sum of larger ones overflow float32
MAX_INSTRUCTION_LENGTH = 65_536  # characters; beyond it the text is a fault, not an instruction


class InstructionText(gym.spaces.Text):
    """The space of instructions: any Unicode text without control characters, newline, tab and return excepted.

    `gymnasium.spaces.Text` lists its characters one by one and knows only letters and digits by default.
    Samples are short printable ASCII.
    """

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        """Makes the space; `seed` is for its samples."""
        printable = "".join(chr(code) for code in range(32, 127))
        super().__init__(MAX_INSTRUCTION_LENGTH, min_length=0, charset=printable, seed=seed)

    def contains(self, x: Any) -> bool:
        """Returns whether `x` is a clean text of an allowed length."""
        return isinstance(x, str) and len(x) <= self.max_length and not holds_control_characters(x)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Samples up to 64 characters of printable ASCII."""
        if mask is not None or probability is not None:
            return super().sample(mask, probability)
        return super().sample(mask=(int(self.np_random.integers(0, 65)), None))

    def __eq__(self, other: object) -> bool:
        """Returns True for another instance: all are the same space."""
        return isinstance(other, InstructionText)

    __hash__ = None  # type: ignore[assignment]  # as gymnasium.spaces.Text

    def __repr__(self) -> str:
        """Returns the space's name without its characters."""
        return f"InstructionText({self.max_length})"


def missing_package(error: Exception) -> str:
    """Returns Gymnasium's advice on a missing package; for pygame, ours (the maintained pygame-ce replaces it)."""
    return 'pip install "manako[toy]"' if "pygame" in str(error) else str(error)


def resolve_actions(
    env: gym.Env, env_id: str, action_names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], FlatActions, str]:
    """Finds the names of an environment's actions, or of the entries of its action vectors.

    Args:
        env: The environment; it need not have been reset.
        env_id: Its id, for `TASKS` and for the messages.
        action_names: The caller's names, which go first.

    Returns:
        The names, the actions laid flat, and where the names came from.

    Raises:
        EnvError: The actions cannot be laid flat, there are no names, not one an action, or two alike.
    """
    space, flat = env.action_space, FlatActions(env.action_space, env_id)
    if not isinstance(space, gym.spaces.Discrete):
        count = 1 if isinstance(flat.space, TextCodes) else action_shape(flat.space)[0]
        entries, source = _entry_names(env, env_id, count, action_names)
        return entries, flat, source
    n, start = int(space.n), int(space.start)
    task = TASKS.get(env_id)
    if task is not None and task.action_names is not None and len(task.action_names) != n:
        task = None  # it was made with other actions
    attribute, meanings = attribute_of(env, "action_names"), attribute_of(env, "get_action_meanings")
    actions = attribute_of(env, "actions")
    names: Iterable[Any]
    if action_names is not None:
        names, source = action_names, "the action_names argument"
    elif attribute is not None:
        names, source = attribute, "the 'action_names' attribute"
    elif callable(meanings):
        names, source = meanings(), "get_action_meanings()"
    elif isinstance(actions, enum.EnumMeta):
        members: list[Any] = sorted(actions, key=lambda member: member.value)
        numbers = [member.value for member in members]
        if numbers != list(range(start, start + n)):
            raise EnvError(
                f"{env_id} has an 'actions' enum with the values {numbers}, and its action space runs from {start} to "
                f"{start + n - 1}: give one member an action, or an 'action_names' attribute"
            )
        names, source = [member.name for member in members], "the 'actions' enum"
    elif task is not None and task.action_names is not None:
        names, source = task.action_names, "the task description"
    else:
        raise EnvError(
            f"{env_id} does not name its {n} actions: give them on the command line (action_names), or give the "
            "environment an 'action_names' attribute"
        )
    return _checked(names, n, source, env_id), flat, source


def _entry_names(env: gym.Env, env_id: str, count: int, argument: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """The names of a vector's entries, and where they came from."""
    task, attribute = TASKS.get(env_id), attribute_of(env, "action_names")
    of_task = None if task is None else task.action_names
    if of_task is not None and len(of_task) != count:
        of_task = None  # of the environment's other form
    for names, source in (
        (argument, "the action_names argument"),
        (attribute, "the 'action_names' attribute"),
        (of_task, "the task description"),
    ):
        if names is not None:
            return _checked(names, count, source, env_id), source
    return ("action",) if count == 1 else tuple(f"action {entry}" for entry in range(1, count + 1)), "their numbers"


def _checked(names: Iterable[Any], n: int, source: str, env_id: str) -> tuple[str, ...]:
    names = names if isinstance(names, str) else tuple(names)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise EnvError(f"{env_id}: {source} is {names!r}, expected a sequence of {n} strings")
    names = tuple(written_out(name).strip() for name in names)
    if len(names) != n:
        raise EnvError(f"{env_id} has {n} actions, and {source} gives {len(names)} names {names}: give one an action")
    if len(set(names)) != n or "" in names:
        raise EnvError(f"{env_id}: {source} gives {names}, and each action needs a name of its own that is not empty")
    return names


def is_picture(space: gym.Space) -> bool:
    """Returns whether values of this space are pictures: uint8, (H, W), (H, W, 1) or (H, W, 3), 16 px or more."""
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8:
        return False
    if len(space.shape) not in (2, 3) or (len(space.shape) == 3 and space.shape[2] not in (1, 3)):
        return False
    return min(space.shape[:2]) >= MIN_IMAGE_SIDE and int(space.low.max()) == 0 and int(space.high.min()) == 255


def holds_codes(picture: Any) -> bool:
    """Returns whether a value of a picture's space is no picture but numbers of things, or flags: dark as none is."""
    return isinstance(picture, np.ndarray) and picture.size > 0 and 0 < picture.max() <= MOST_OF_CODES


def is_blank(frame: np.ndarray) -> bool:
    """Returns whether a frame (H, W, 3) is of a single colour."""
    return bool((frame == frame[0, 0]).all())


def resolve_image(env: gym.Env, env_id: str, image_source: ImageSource = "auto", observation: Any = None) -> str:
    """Decides where the image comes from: `"observation"`, `"observation['image']"` or `"render()"`, or black for one.

    Args:
        env: the environment.
        env_id: its id, for the messages.
        image_source: which of them; "auto" decides.
        observation: what a reset returned, for "auto"; None looks at the space alone.

    Raises:
        EnvError: Neither the observation nor `render()` gives one, or not the one asked for.
    """
    if image_source not in IMAGE_SOURCES:
        raise EnvError(f"image_source is {image_source!r}, expected one of {', '.join(IMAGE_SOURCES)}")
    if image_source == "blank":
        return BLANK + resolve_image(env, env_id, "auto", observation)
    space = env.observation_space
    if image_source != "render":
        auto, codes = image_source == "auto", False
        if isinstance(space, gym.spaces.Dict) and "image" in space.spaces and is_picture(space["image"]):
            codes = auto and isinstance(observation, dict) and holds_codes(observation.get("image"))
            if not codes:
                return "observation['image']"
        elif is_picture(space):
            codes = auto and holds_codes(observation)
            if not codes:
                return "observation"
        if codes and env.render_mode != "rgb_array":
            raise EnvError(
                f"{env_id} observes an array of numbers up to {MOST_OF_CODES}, which looks like codes and not like a "
                f"picture, and its render mode is {env.render_mode!r}: expected 'rgb_array' and a render(), or "
                "image_source observation where it is a picture"
            )
        if image_source == "observation":
            raise EnvError(
                f"{env_id} was asked for the image in its observation, and its observation space {space} is no picture "
                f"(uint8 from 0 to 255, (H, W, 3), (H, W, 1) or (H, W), {MIN_IMAGE_SIDE} pixels or more a side), nor "
                "has it an 'image' key that is one: use image_source render"
            )
    if env.render_mode != "rgb_array":
        raise EnvError(
            f"{env_id} has no picture to show: its observation is none, and its render mode is {env.render_mode!r} "
            "instead of 'rgb_array'; add 'rgb_array' to metadata['render_modes'], take a render_mode argument and "
            "return (H, W, 3) uint8 from render()"
        )
    return "render()"


def read_picture(env: gym.Env, observation: Any, image_from: str) -> Any:
    """Returns the picture from where `resolve_image` found it."""
    if image_from.startswith(BLANK):
        return np.zeros_like(read_picture(env, observation, image_from.removeprefix(BLANK)))
    if image_from == "render()":
        return env.render()
    return observation["image"] if image_from == "observation['image']" else observation


def as_frame(picture: Any, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Copies a picture into a fresh frame (H, W, 3) uint8; grey values are repeated over the three channels.

    Args:
        picture: An array of uint8, (H, W, 3), (H, W, 1) or (H, W).
        shape: What the frame must measure; None takes any size.

    Raises:
        EnvError: It is something else. The text lacks its subject: the caller names the environment.
    """
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        got = f"an array of {picture.dtype}" if isinstance(picture, np.ndarray) else f"a {type(picture).__name__}"
        raise EnvError(f"gave {got} as its image, expected a uint8 array of shape (H, W, 3)")
    got_shape = picture.shape
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = np.repeat(picture, 3, axis=2)
    if picture.shape != shape:
        if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise EnvError(f"gave an image of shape {got_shape}, expected (H, W, 3)")
        if shape is not None:
            raise EnvError(
                f"gave an image of shape {got_shape} after frames of shape {shape}, expected one size in every frame "
                "of every episode"
            )
    return np.array(picture, order="C")  # a copy: the environment may draw into the same array again


def resolve_instruction(
    env: gym.Env, env_id: str, observation: Any, argument: str | None = None
) -> tuple[Callable[[Any], object], str]:
    """Finds out where the instruction is.

    Args:
        env: The environment, after a reset.
        env_id: Its id, for `TASKS` and for the messages.
        observation: What the reset returned.
        argument: The caller's instruction, which goes first.

    Returns:
        A function that reads it, given the newest observation, and its source in words.

    Raises:
        EnvError: There is none.
    """
    task, said = TASKS.get(env_id), owner_of(env, "mission", "instruction")
    if argument is not None:
        return (lambda _: argument), "the instruction argument"
    if said is not None and said[0] is not env.unwrapped:
        wrapper, name = said
        return functools.partial(_read_attribute, wrapper, name), f"{type(wrapper).__name__}'s {name!r} attribute"
    if isinstance(observation, dict):
        for key in ("mission", "instruction"):
            if key in observation:
                return operator.itemgetter(key), f"observation[{key!r}]"
    if said is not None:
        return functools.partial(_read_attribute, *said), f"the {said[1]!r} attribute"
    if task is not None and task.instruction is not None:
        text = task.instruction
        return (lambda _: text), "the task description"
    raise EnvError(
        f"{env_id} says nowhere what to do: give an instruction on the command line, or give the environment a "
        "'mission' key in its observation or an 'instruction' attribute"
    )


def _read_attribute(env: gym.Env, name: str, _: Any) -> object:
    return getattr(env, name)


class VLMObservation(gym.Wrapper):
    """Observes `Dict(image=Box uint8 (H, W, 3), instruction=InstructionText)`, acts with `Discrete(A)` from 0.

    Other actions than a single choice are vectors (d,): a `MultiDiscrete` from 0 on, or a `Box` of float32.

    The constructor resets the environment once, without a seed, to learn the size of its frames. Frames are always
    fresh arrays. Whatever the environment raises, and every frame, text or reward that breaks the contract, becomes
    an `EnvError` that names the environment, the episode's seed, the step and the action.

    Attributes:
        env_id: The registered id.
        action_names: One name an action, (A,), or an entry of a vector, (d,).
        frame_shape: (H, W, 3).
        success_return: The lowest return of a successful episode, or None (see `success`).
        success: The rule that judges an episode at its end.
        gives_masks: Whether the environment says which actions are allowed, and is obeyed.
        action_mask: (A,) bool, those allowed now; all of them where it does not say, or the episode has ended.
        image_from: Where the image comes from, in words; likewise `instruction_from` and `action_names_from`.
        limit: After how many steps an episode is truncated; `limit_from` says it in words.
        slot: The number of this environment among several, for the messages; None for a single one.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        instruction: str | None = None,
        action_names: Sequence[str] | None = None,
        image_source: ImageSource = "auto",
        success_return: float | None = None,
        action_masks: bool = True,
    ) -> None:
        """Wraps `env`; the arguments override what the environment says of itself. `action_masks` obeys its masks.

        Raises:
            EnvError: It has no picture, no instruction, no action names or no discrete actions.
        """
        super().__init__(env)
        spec = env.spec
        self.env_id: str = spec.id if spec is not None else type(env.unwrapped).__name__
        self.limit: int | None = None
        self.limit_from = "not limited"
        if time_limit(env):
            self.limit, self.limit_from = limit_in_words(env)
        self.slot: int | None = None
        self._seed: int | None = None
        self._step = 0
        self._action: Any = None
        self._skipped = 0
        self._last: tuple[dict[str, Any], dict[str, Any]] | None = None  # what was shown, and its info

        self.action_names, self._flat, self.action_names_from = resolve_actions(env, self.env_id, action_names)
        self.action_space = self._flat.space
        task = task_of(self.env_id)
        self.success = success_rule(task, spec.reward_threshold if spec is not None else None, success_return)
        self.success_return = self.success.threshold

        self._check_observation = space_check(env.observation_space)
        observation, info = self._reset_env(None, None)
        self._obeys_masks = action_masks
        self.gives_masks = action_masks and KEY in info
        self.action_mask = np.ones(len(self.action_names), bool)
        self.image_from = resolve_image(env, self.env_id, image_source, observation)
        self._read_instruction, self.instruction_from = resolve_instruction(env, self.env_id, observation, instruction)
        self._raw_text: object = None
        self._clean_text = ""
        height, width, _ = self._frame(observation, None).shape
        self.frame_shape: tuple[int, int, int] = (height, width, 3)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, self.frame_shape, np.uint8), instruction=InstructionText()
        )
        self._observe(observation)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode."""
        observation, info = self._reset_env(seed, options)
        self._take_mask(info, ended=False)
        self._skipped = 0
        self._last = self._observe(observation), info
        return self._last

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Takes one of the actions 0 to A - 1, or a vector (d,), or with `SKIP` none.

        The environment is not stepped then: a turn without an action shows the same again and pays nothing. The last
        of `MOST_SKIPPED` of them truncates the episode, which is no success then.
        """
        if is_skip(self.action_space, action) and self._last is not None:
            self._skipped += 1
            (shown, info), over = self._last, self._skipped == MOST_SKIPPED
            return shown, 0.0, False, over, {**info, "is_success": False} if over else info
        self._step += 1
        taken = self._checked_vector(action) if is_vector(self.action_space) else self._checked_choice(int(action))
        try:
            observation, reward, terminated, truncated, info = self.env.step(self._flat.to_env(taken))
        except BaseException as error:
            self._broke("step()", error, STEP)
        # one test of the usual types, since this is done in every step
        if not (type(reward) is float and type(terminated) is bool and type(truncated) is bool and type(info) is dict):
            self._refuse(
                wrong_reward(reward)
                or wrong_flag("terminated", terminated)
                or wrong_flag("truncated", truncated)
                or wrong_info(info)
            )
        value = reward.item() if isinstance(reward, np.ndarray) else float(reward)
        ended = bool(terminated or truncated)
        if not abs(value) <= LARGEST_REWARD:
            self._fail(f"gave the reward {value}, expected a finite number up to {LARGEST_REWARD:g}: divide it")
        if ended:
            self._refuse(wrong_success(info))
        self._take_mask(info, ended)
        self._last = self._observe(observation), info
        return self._last[0], value, bool(terminated), bool(truncated), info

    def _checked_vector(self, action: Any) -> np.ndarray:
        """An action (d,), a copy."""
        taken = np.array(action, dtype=self.action_space.dtype)
        self._action = taken
        if not self.action_space.contains(taken):
            what = vector_in_words(taken, self.action_space)
            self._fail(f"got the action {what}, which is not in {self.action_space}: expected one within it")
        return taken

    def _checked_choice(self, number: int) -> int:
        self._action = number
        if not 0 <= number < len(self.action_names):
            self._fail(f"got the action {number}, expected 0 to {len(self.action_names) - 1}")
        if not self.action_mask[number]:
            self._fail(
                f"got an action that its action_mask does not allow: expected {' or '.join(self._allowed_names())}, or "
                "action_masks false, which plays without masks"
            )
        return number

    def own_action(self, action: Any) -> Any:
        """Returns what the environment's own step() takes for an action, as it is."""
        return self._flat.to_env(action)

    def expert(self) -> Callable[[Any], Any]:
        """Returns a scripted expert from here to the episode's end: last action (None at first) -> action, from 0 on.

        Raises:
            EnvError: The environment has none.
        """
        expert, flat = make_expert(self.env, self.env_id), self._flat

        def act(before: Any) -> Any:
            try:
                action = flat.from_env(expert(None if before is None else flat.to_env(before)))
            except BaseException as error:
                self._broke("its expert", error)
            if not isinstance(action, int):
                if not self.action_space.contains(action):
                    wanted = vector_in_words(action, self.action_space)
                    self._fail(f"has an expert that wants {wanted}, expected {self.action_space}")
                return action
            if 0 <= action < len(self.action_names) and not self.action_mask[action]:
                self._fail(
                    f"has an expert that wants {self.action_names[action]!r}, which its action_mask does not allow: "
                    f"expected {' or '.join(self._allowed_names())}, so repair one of the two, or give action_masks "
                    "false"
                )
            return action

        return act

    def expert_thought(self) -> str | None:
        """Returns why the expert does what it does now, from the environment's `expert_thought()`; None without one."""
        method = attribute_of(self.env, "expert_thought")
        if method is None:
            return None
        try:
            thought = method()
        except BaseException as error:
            self._broke("expert_thought()", error)
        if not isinstance(thought, str):
            self._fail(f"gave {thought!r} as its expert's thought, expected a text")
        return written_out(thought)

    def caption(self) -> str:
        """Returns what the frame shows, in words.

        Raises:
            EnvError: The environment does not say.
        """
        return written_out(caption_of(self.env, self.env_id))

    def alternative_instruction(self) -> str | None:
        """Returns another instruction valid now, from the environment's method of this name; None without one."""
        method = attribute_of(self.env, "alternative_instruction")
        if method is None:
            return None
        try:
            text = method()
        except BaseException as error:
            self._broke("alternative_instruction()", error)
        return None if text is None else written_out(str(text))

    def close(self) -> None:
        """Closes the environment."""
        try:
            self.env.close()
        except BaseException as error:
            self._broke("close()", error)

    def _reset_env(self, seed: int | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        self._seed, self._step, self._action = seed, 0, None
        self._folder = folder_now()
        try:
            observation, info = self.env.reset(seed=seed, options=options)
        except BaseException as error:
            self._broke("reset()", error, "(observation, info)")
        self._refuse(wrong_info(info))
        return observation, info

    def _take_mask(self, info: Any, ended: bool) -> None:
        """Reads which actions are allowed; after an episode's end nothing need be."""
        if not self._obeys_masks:
            return
        self.action_mask = np.ones(len(self.action_names), bool)
        if info.get(KEY) is None:
            return
        if is_vector(self.action_space):
            self._fail(
                f"gave info['{KEY}'], which can be obeyed where the action is one choice, and here it is a vector: "
                "expected none, or action_masks false"
            )
        if not self.gives_masks:
            self._fail(
                f"gave info['{KEY}'] after a first reset() without one: expected one from the first reset() on, or "
                "action_masks false"
            )
        try:
            mask = read_mask(info[KEY], len(self.action_names))
        except EnvError as error:
            self._fail(f"{error}; action_masks false plays without it")
        if mask.any():
            self.action_mask = mask
        elif not ended:
            self._fail(
                f"gave info['{KEY}'] that allows none of its {len(mask)} actions: expected one at least, or the "
                "episode's end"
            )

    def _allowed_names(self) -> list[str]:
        return [repr(name) for name, allowed in zip(self.action_names, self.action_mask, strict=True) if allowed]

    def _observe(self, observation: Any) -> dict[str, Any]:
        if wrong := self._check_observation(observation):
            self._fail(f"gave an observation outside its observation_space: it {wrong}")
        shown = {"image": self._frame(observation, self.frame_shape), "instruction": self._instruction(observation)}
        self._refuse(disturbed(self._folder))
        return shown

    def _frame(self, observation: Any, shape: tuple[int, int, int] | None) -> np.ndarray:
        if shape is not None and self.image_from.startswith(BLANK):
            return np.zeros(shape, np.uint8)  # nothing is drawn for it
        try:
            picture = read_picture(self.env, observation, self.image_from)
        except BaseException as error:
            self._broke(f"its image from {self.image_from}", error)
        try:
            return as_frame(picture, shape)
        except EnvError as error:
            self._fail(f"{error}, from {self.image_from}")

    def _instruction(self, observation: Any) -> str:
        try:
            text = self._read_instruction(observation)
        except BaseException as error:
            self._broke(f"its instruction from {self.instruction_from}", error)
        if text is not self._raw_text:
            if not isinstance(text, str):
                self._fail(f"gave {text!r} as the instruction from {self.instruction_from}, expected a string")
            if len(text) > MAX_INSTRUCTION_LENGTH:
                self._fail(f"gave an instruction of {len(text)} characters, expected at most {MAX_INSTRUCTION_LENGTH}")
            self._raw_text, self._clean_text = text, written_out(str(text))
        return self._clean_text

    def _refuse(self, wrong: str | None) -> None:
        """Fails where something is wrong."""
        if wrong is not None:
            self._fail(wrong)

    def _broke(self, where: str, error: BaseException, expected: str | None = None) -> NoReturn:
        """Fails with an error of the environment's; `expected` is what it should have returned."""
        pass_ours(error)
        wrong = unpacked(error, expected) if expected is not None else None
        if wrong is not None:
            self._fail(f"{wrong}, from {where}", error)
        if isinstance(error, gym.error.DependencyNotInstalled):
            self._fail(f"needs a package that is not installed: {missing_package(error)}", error)
        what = "did not return in time" if isinstance(error, HangError) else f"with {type_and_text(error)}"
        self._fail(f"broke in {where} {what}", error, EnvBrokeError)

    def _fail(self, what: str, cause: BaseException | None = None, kind: type[EnvError] = EnvError) -> NoReturn:
        place = [] if self.slot is None else [f"slot {self.slot}"]
        place += ["unseeded episode" if self._seed is None else f"episode seed {self._seed}", f"step {self._step}"]
        if isinstance(self._action, np.ndarray):
            place.append(f"action {vector_in_words(self._action, self.action_space)}")
        elif self._action is not None:
            named = 0 <= self._action < len(self.action_names)
            place.append(f"action {self.action_names[self._action]!r}" if named else f"action {self._action}")
        raise kind(f"{self.env_id} {what} ({', '.join(place)})") from cause
