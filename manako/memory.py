"""What the last steps of N episodes have shown, and what was done and paid: for policies that are told of it.

    frames    before the present one, oldest first; black where the episode had not begun, for a first frame that were
              repeated would look like standing still
    turns     actions and rewards before the present step, oldest first; NO_ACTION where there was none

Nothing is copied: a past frame is the array that the step returned. An episode begins with nothing of the one before.
Environments and Ray's learner keep one; `in_words` is how a turn stands in a prompt.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

NO_ACTION = -2  # before an episode's first step; -1 is a turn in which none was taken


class Memory:
    """The past of N running episodes.

    Args:
        num_envs: N.
        frames: how many before the present one are kept.
        turns: how many before the present step are kept.

    Attributes:
        turns: (N, turns, 2) float64, index of the action and reward.
    """

    def __init__(self, num_envs: int, frames: int = 0, turns: int = 0) -> None:
        self.frames = frames
        self.turns = np.zeros((num_envs, turns, 2))  # (N, turns, 2)
        self._past: list[deque[np.ndarray]] = [deque(maxlen=frames) for _ in range(num_envs)]
        self._black: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """How many frames and turns it keeps."""
        return self.frames, self.turns.shape[1]

    def start(self, slot: int, image: np.ndarray) -> None:
        """Begins an episode.

        Args:
            slot: which.
            image: (H, W, 3) uint8, its first frame.
        """
        if self._black is None or self._black.shape != image.shape:
            self._black = np.zeros_like(image)
        self._past[slot].extend([self._black] * self.frames)
        self.turns[slot] = NO_ACTION, 0.0

    def step(self, slot: int, image: np.ndarray, action: int, reward: float) -> None:
        """Takes in a step.

        Args:
            slot: which.
            image: (H, W, 3) uint8, what was shown before it.
            action: its index.
            reward: what it paid.
        """
        self._past[slot].append(image)
        if self.turns.shape[1]:
            self.turns[slot, :-1] = self.turns[slot, 1:].copy()
            self.turns[slot, -1] = action, np.float32(reward)  # as rollouts and data sets store it

    def past_frames(self) -> np.ndarray:
        """Returns (N, frames, H, W, 3) uint8, oldest first."""
        return np.stack([np.stack(past) for past in self._past])

    def load(self, slots: slice, frames: np.ndarray | None, turns: np.ndarray) -> None:
        """Takes over what another memory of the same size knows of some slots.

        Args:
            slots: which.
            frames: (n, frames, H, W, 3) of its `past_frames`; None where it keeps none.
            turns: (n, turns, 2).
        """
        self.turns[slots] = turns
        for past, images in zip(self._past[slots], () if frames is None else frames, strict=frames is not None):
            past.extend(images)


def before(frames: Sequence[np.ndarray], at: int, count: int) -> np.ndarray:
    """Returns the frames (count, H, W, 3) before one of an episode, black where there are fewer.

    Args:
        frames: of one episode, (H, W, 3) each, in order.
        at: number of the present one.
        count: how many.
    """
    past = np.zeros((count, *frames[0].shape), np.uint8)
    for place, number in enumerate(range(at - count, at)):
        if number >= 0:
            past[place] = frames[number]
    return past


def turns_before(actions: Sequence[int], rewards: Sequence[float], at: int, count: int) -> np.ndarray:
    """Returns the turns (count, 2) float64 before a step of an episode, as `Memory.turns` has them.

    Args:
        actions: of one episode, in order.
        rewards: what they paid.
        at: number of the step.
        count: how many.
    """
    known = [
        (actions[number], rewards[number]) if number >= 0 else (NO_ACTION, 0.0) for number in range(at - count, at)
    ]
    return np.array(known, np.float64).reshape(count, 2)


def in_words(turns: np.ndarray | None, action_names: Sequence[str]) -> str:
    """Returns turns (turns, 2) as a sentence, such as `Done: up, left (reward 1).`

    Args:
        turns: oldest first; None: of an episode's start.
        action_names: (A,).
    """
    said = [
        (action_names[int(action)] if action >= 0 else "no action") + (f" (reward {reward:.3g})" if reward else "")
        for action, reward in ([] if turns is None else turns.tolist())
        if action != NO_ACTION
    ]
    return f"Done: {', '.join(said) or 'nothing'}."
