"""A corridor whose steps break by chance that no seed fixes, and which writes down itself what it has played.

With `log` each process appends to a file of its own there: a line for an episode's start, end and break, so that what
a learner has counted can be held against it.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

ENV_ID = "manako/Soak-v0"


class Soak(gym.Env):
    """A bright column that walks left and right; its start is the seed's, its breaks are not.

    Args:
        log: a folder for the lines; "" for none.
        rate: share of the steps that break.
        kind: how: `raise`, `exit` (sys.exit), `die` (os._exit) `hang`, `wait` for ever, or `text` as a reward.
        always: episodes of seeds that this divides break at their second step, each time; 0 for none.
        limit: steps of an episode.
        render_mode: "rgb_array".
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Discrete(12)
    action_names, instruction = ("left", "right"), "walk right"

    def __init__(
        self,
        log: str = "",
        rate: float = 0.01,
        kind: str = "raise",
        always: int = 0,
        limit: int = 20,
        render_mode: str | None = None,
    ) -> None:
        self.log, self.rate, self.kind, self.always, self.limit = log, rate, kind, always, limit
        self.render_mode = render_mode
        self.chance = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        """Starts in the left half."""
        super().reset(seed=seed)
        self.seed, self.steps, self.paid = seed, 0, 0.0
        self.place = int(self.np_random.integers(1, 6))
        self.shade = int(self.np_random.integers(100, 256))
        self._write("start")
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """Walks, or breaks."""
        self.steps += 1
        fixed = self.always and (self.seed or 0) % self.always == 0 and self.steps == 2
        if fixed or self.chance.random() < self.rate:
            self._write("break")
            if self.kind == "text":
                return self.place, "1.0", False, False, {}  # type: ignore[return-value]
            self._break()
        self.place += 1 if action else -1
        reward = 1.0 if self.place == 11 else -0.125  # whose sums are exact
        self.paid += reward
        terminated, truncated = self.place in (0, 11), self.steps >= self.limit
        if terminated or truncated:
            self._write("end")
        return self.place, reward, terminated, truncated and not terminated, {"success": self.place == 11}

    def render(self) -> np.ndarray:
        """Draws the column."""
        frame = np.zeros((16, 48, 3), np.uint8)
        frame[:, 4 * self.place : 4 * self.place + 4] = (self.shade, 80, self.steps)
        return frame

    def _break(self) -> None:
        if self.kind == "exit":
            sys.exit(0)
        if self.kind == "die":
            os._exit(1)
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "wait":  # hears of an exception
            while True:
                time.sleep(0.01)
        raise RuntimeError("the simulator broke")

    def _write(self, what: str) -> None:
        if self.log:
            with (Path(self.log) / f"{os.getpid()}.log").open("a", encoding="utf-8") as opened:
                opened.write(f"{what} {self.seed} {self.steps} {self.paid}\n")


if ENV_ID not in gym.registry:
    gym.register(ENV_ID, "manako.experiments.benchmarks.soak_env:Soak")
