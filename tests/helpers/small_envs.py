"""Short environments for what the project's own do not do, and the tiny policy; light, for rollout workers.

`Corridor` truncates quickly and changes its instruction (and with it the prompt's length) at every step, `Poison` pays
NaN, `Halves` has short successes and long failures, `Drift` moves as no seed says, `Gates` says which actions are
allowed and breaks at any other.
"""

import os
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    from manako.envs import EpisodeVectorEnv
    from manako.policies import VLMPolicy

NAMES = ("left", "right")


class Corridor(gym.Env):
    """A bright column that moves; the instruction counts the steps left, in words of different lengths.

    An episode terminates at either end, with success at the right one, and is truncated after `limit` steps; with
    `both` it does both at once where they meet.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Discrete(2)
    action_names = NAMES

    def __init__(self, length: int = 7, limit: int = 3, both: bool = False, render_mode: str | None = None) -> None:
        self.length, self.limit, self.both, self.render_mode = length, limit, both, render_mode
        self.observation_space = gym.spaces.Discrete(length)
        self.place = self.steps = 0

    @property
    def instruction(self) -> str:
        return "walk right " + "and on " * (self.limit - self.steps)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.steps, self.place = 0, int(self.np_random.integers(1, self.length - 1))
        self.shade = int(self.np_random.integers(100, 256))
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.steps += 1
        self.place += 1 if action else -1
        terminated = self.place in (0, self.length - 1)
        truncated = self.steps >= self.limit and (self.both or not terminated)
        success = self.place == self.length - 1
        return self.place, float(success) - 0.1 * self.steps, terminated, truncated, {"success": success}

    def render(self) -> np.ndarray:
        frame = np.zeros((16, 4 * self.length, 3), np.uint8)
        frame[:, 4 * self.place : 4 * self.place + 4] = (self.shade, 80, self.steps)
        return frame


class Poison(Corridor):
    """Pays NaN at step `at` of an episode."""

    def __init__(self, at: int = 2, render_mode: str | None = None) -> None:
        super().__init__(length=9, limit=4, render_mode=render_mode)
        self.at = at

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        place, reward, terminated, truncated, info = super().step(action)
        return place, float("nan") if self.steps == self.at else reward, terminated, truncated, info


class Halves(gym.Env):
    """Half of the seeds end after 2 steps in success, half after `longest` in failure, whatever is done.

    `is_short(seed)` says which; `forgetful` leaves it to chance instead of the seed.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Discrete(100)
    action_names, instruction = NAMES, "wait"

    def __init__(self, longest: int = 40, forgetful: bool = False, render_mode: str | None = None) -> None:
        self.longest, self.forgetful, self.render_mode = longest, forgetful, render_mode
        self.chance = np.random.default_rng()

    @staticmethod
    def is_short(seed: int) -> bool:
        return bool(np.random.default_rng(seed).integers(2))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.shade = int((self.chance if self.forgetful else np.random.default_rng(seed)).integers(1000))
        short = self.shade % 2 == 1 if self.forgetful else self.is_short(seed or 0)
        self.steps, self.length = 0, 2 if short else self.longest
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.steps += 1
        ended, success = self.steps == self.length, self.length == 2
        return self.steps, float(ended and success), ended, False, {"success": ended and success}

    def render(self) -> np.ndarray:
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[:] = (self.shade % 256, self.shade // 256, self.steps)
        frame[0, 0] = 255
        return frame


class Drift(gym.Env):
    """A bright column that goes one to the left or right by chance that no seed fixes; 20 steps an episode.

    Args:
        folder: a file `exit` in it kills the process at an episode's fourth step, once.
        seeded: chance is the seed's.
        wild: it begins anywhere, whatever the seed, and ends at any step.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Discrete(100)
    action_names, instruction = NAMES, "watch"

    def __init__(
        self, folder: str = "", seeded: bool = False, wild: bool = False, render_mode: str | None = None, **_: Any
    ) -> None:
        self.folder, self.seeded, self.wild, self.render_mode = folder, seeded, wild, render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.chance = self.np_random if self.seeded else np.random.default_rng()
        self.steps, self.place = 0, int(self.chance.integers(20, 40)) if self.wild else 30
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.steps += 1
        if self.folder and self.steps == 4:
            try:
                os.unlink(os.path.join(self.folder, "exit"))
            except FileNotFoundError:
                pass
            else:
                os._exit(1)
        self.place += int(self.chance.choice([-1, 1]))
        over = not 0 < self.place < 63 or self.chance.random() < 0.1 if self.wild else False
        return self.place, float(self.place), bool(over), self.steps == 20 and not self.wild, {}

    def render(self) -> np.ndarray:
        frame = np.zeros((8, 64, 3), np.uint8)
        frame[:, self.place] = 255
        return frame


class Gates(gym.Env):
    """A bright column on five places, with an action mask that only an obedient player meets no error under.

    `left` and `right` are allowed where there is a place, `stay` in every other step, `jump` never: the left end has
    nothing but `right` at times. An episode terminates at the right end, where nothing is allowed, or is truncated.

    Args:
        limit: steps of an episode.
        masked: whether a mask comes.
        broken: the mask of an episode's second step allows nothing.
        jumpy: the expert wants what is never allowed.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space, observation_space = gym.spaces.Discrete(4, start=1), gym.spaces.Discrete(5)
    action_names, instruction = ("left", "right", "stay", "jump"), "walk right"

    def __init__(
        self,
        limit: int = 6,
        masked: bool = True,
        broken: bool = False,
        jumpy: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.limit, self.masked, self.broken, self.jumpy = limit, masked, broken, jumpy
        self.render_mode = render_mode

    def allowed(self) -> np.ndarray:
        if self.place == 4 or (self.broken and self.steps == 2):
            return np.zeros(4, np.int8)
        return np.array([self.place > 0, True, (self.steps + self.place) % 2 == 0, False], np.int8)

    def info(self) -> dict:
        return {"action_mask": self.allowed()} if self.masked else {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.steps, self.place = 0, int(self.np_random.integers(0, 3))
        self.shade = int(self.np_random.integers(100, 256))
        return self.place, self.info()

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        if self.masked and not self.allowed()[action - 1]:
            raise RuntimeError(f"there is no {self.action_names[action - 1]} here")
        self.steps += 1
        self.place = min(4, max(0, self.place + {1: -1, 2: 1}.get(int(action), 0)))
        won = self.place == 4
        return self.place, float(won), won, self.steps >= self.limit and not won, self.info()

    def expert_action(self) -> int:
        return 4 if self.jumpy else 2

    def render(self) -> np.ndarray:
        frame = np.zeros((16, 20, 3), np.uint8)
        frame[:, 4 * self.place : 4 * self.place + 4] = (self.shade, 80, 40 * self.steps)
        return frame


for _id, _kind in (
    ("tests/Gates-v0", Gates),
    ("tests/Corridor-v0", Corridor),
    ("tests/Poison-v0", Poison),
    ("tests/Halves-v0", Halves),
    ("tests/Drift-v0", Drift),
):
    if _id not in gym.registry:  # this file is imported under two names
        gym.register(_id, entry_point=_kind)


def tiny_policy(env: "EpisodeVectorEnv", **source: Any) -> "VLMPolicy":
    """The `tiny` preset for this environment; its value head starts at random, so that values differ."""
    import torch

    from manako.policies import PolicySource, load_policy

    policy = load_policy(PolicySource(**source), env.action_names, env.frame_shape, env.action_space)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        policy.value_head.out.weight.normal_(std=0.3)
    return policy
