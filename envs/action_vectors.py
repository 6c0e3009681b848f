"""An environment's action space as a policy sees it, and back: `Discrete` from 0, or a vector of d numbers.

    Discrete(n, start=k)            Discrete(n)                 a number
    MultiDiscrete, any shape        MultiDiscrete (d,) from 0   whole numbers
    MultiBinary, any shape          MultiDiscrete (d,) of 2
    Box of floats, any shape        Box (d,) float32            within its bounds
    Box of whole numbers            MultiDiscrete (d,) from 0   up to 256 values an entry
    Text                            TextCodes (max_length,)     code points

Bounds must be finite: bins are made of them.
"""

import gymnasium as gym
import numpy as np

from manako.envs.errors import EnvError
from manako.spaces import TextCodes

MOST_VALUES = 256  # of an entry of whole numbers
LARGEST = 1e30  # a bound beyond is none


class FlatActions:
    """Translates between an environment's actions and flat ones.

    Args:
        space: the environment's own.
        env_id: for the messages.

    Raises:
        EnvError: its actions cannot be laid flat, or are not bounded.

    Attributes:
        space: the flat one.
    """

    def __init__(self, space: gym.Space, env_id: str) -> None:
        self.own = space
        self._first = np.zeros(0, np.int64)
        if isinstance(space, gym.spaces.Discrete):
            self.space: gym.Space = gym.spaces.Discrete(int(space.n))
            self._first = np.array(int(space.start))
        elif isinstance(space, gym.spaces.MultiDiscrete):
            self.space = gym.spaces.MultiDiscrete(space.nvec.flatten())
            self._first = np.asarray(getattr(space, "start", np.zeros_like(space.nvec))).flatten()
        elif isinstance(space, gym.spaces.MultiBinary):
            self.space = gym.spaces.MultiDiscrete(np.full(int(np.prod(space.shape)), 2))
            self._first = np.zeros(int(np.prod(space.shape)), np.int64)
        elif isinstance(space, gym.spaces.Box):
            self.space = self._of_box(space, env_id)
        elif isinstance(space, gym.spaces.Text):
            self.space = TextCodes(space)
        else:
            raise EnvError(
                f"{env_id} has the action space {space}, and only Discrete, MultiDiscrete, MultiBinary, bounded Box "
                "and Text spaces can be played: wrap the environment so that it offers one of these"
            )
        if self.space.shape == (0,):
            raise EnvError(f"{env_id} has the action space {space} without a number in it: expected one at least")

    def to_env(self, action: np.ndarray | int) -> object:
        """Returns what the environment's own step() takes for a flat action."""
        if isinstance(self.own, gym.spaces.Discrete):
            return int(action) + int(self._first)
        flat = np.asarray(action)
        if isinstance(self.space, TextCodes):
            return self.space.decode(flat)
        if isinstance(self.space, gym.spaces.MultiDiscrete):
            return (flat + self._first).reshape(self.own.shape).astype(self.own.dtype)
        assert isinstance(self.own, gym.spaces.Box)
        return np.clip(flat.reshape(self.own.shape).astype(self.own.dtype), self.own.low, self.own.high)

    def from_env(self, action: object) -> np.ndarray | int:
        """Returns the flat action of the environment's own."""
        if isinstance(self.own, gym.spaces.Discrete):
            return int(action) - int(self._first)  # type: ignore[call-overload]
        if isinstance(self.space, TextCodes):
            if not isinstance(action, str) or not self.own.contains(action):
                raise ValueError(f"it is {action!r}, which is not in {self.own}")
            return self.space.encode(action)
        flat = np.asarray(action, dtype=self.own.dtype).flatten()
        if isinstance(self.space, gym.spaces.MultiDiscrete):
            return flat.astype(np.int64) - self._first
        return flat.astype(np.float32)

    def _of_box(self, space: gym.spaces.Box, env_id: str) -> gym.Space:
        low, high = space.low.flatten().astype(np.float64), space.high.flatten().astype(np.float64)
        usable = (np.abs(low) < LARGEST) & (np.abs(high) < LARGEST) & (low <= high)  # False for NaN
        if not usable.all():
            entry = int(np.flatnonzero(~usable)[0])
            raise EnvError(
                f"{env_id} has a Box of actions whose entry {entry} goes from {low[entry]:g} to {high[entry]:g}: "
                "expected finite bounds, the lower one first, of which bins are made; wrap the environment in "
                "gymnasium.wrappers.RescaleAction or one of your own that bounds it"
            )
        counts = high - low + 1
        if np.issubdtype(space.dtype, np.integer) and (counts <= MOST_VALUES).all():
            self._first = low.astype(np.int64)
            return gym.spaces.MultiDiscrete(counts.astype(np.int64))
        if np.issubdtype(space.dtype, np.integer):
            raise EnvError(
                f"{env_id} has a Box of whole numbers with up to {int(counts.max()):,} values an entry: expected "
                f"{MOST_VALUES} at most, so wrap the environment"
            )
        return gym.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
