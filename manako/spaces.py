"""Action spaces as a policy sees them: one choice of A (`Discrete`), or a vector of d numbers laid flat.

A vector is a `MultiDiscrete` (whole numbers from 0 on), a `Box` of float32 with finite bounds, or a text as the code
points of its characters (`TextCodes`). Light: no torch here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

SKIP = -1  # in place of one choice
END, SKIPPED = -1, -2  # code points behind a text's last character, and in place of a text
CODES = 0x110000  # code points that there are


class TextCodes(gym.spaces.MultiDiscrete):
    """Texts as vectors (max_length,) int64 of code points, `END` behind the last one.

    Args:
        text: the environment's own space.
    """

    def __init__(self, text: gym.spaces.Text) -> None:
        self.text = text
        count = int(text.max_length)
        super().__init__(np.full(count, CODES - SKIPPED), start=np.full(count, SKIPPED))

    def contains(self, x: Any) -> bool:
        """Returns whether these are the code points of one of the texts."""
        codes = np.asarray(x)
        if codes.shape != self.shape or (codes < END).any():
            return False
        ends = np.flatnonzero(codes == END)
        return not (len(ends) and (codes[ends[0] :] != END).any()) and self.text.contains(self.decode(codes))

    def sample(self, mask: Any = None, probability: Any = None) -> np.ndarray:
        """Returns the vector of one of the texts."""
        return self.encode(self.text.sample(mask, probability))

    def encode(self, text: str) -> np.ndarray:
        """Returns the vector of a text, which must not be longer than the longest."""
        codes = np.full(self.shape, END, np.int64)
        codes[: len(text)] = [ord(character) for character in text]
        return codes

    @staticmethod
    def decode(codes: Any) -> str:
        """Returns the text of a vector."""
        return "".join(chr(int(code)) for code in np.asarray(codes) if code >= 0)

    @property
    def skipped(self) -> np.ndarray:
        """The vector that stands for no text."""
        return np.full(self.shape, SKIPPED, np.int64)

    def __eq__(self, other: object) -> bool:
        """Returns whether it holds the same texts."""
        return isinstance(other, TextCodes) and self.text == other.text

    __hash__ = None  # type: ignore[assignment]  # as gymnasium.spaces.MultiDiscrete

    def __repr__(self) -> str:
        """Returns what texts they are."""
        return f"Text({self.text.min_length}, {self.text.max_length}, {len(self.text.character_list)} characters)"


def is_skip(space: gym.Space, action: Any) -> bool:
    """Returns whether this stands in place of an action: the environment is not stepped."""
    if isinstance(space, TextCodes):
        return int(np.asarray(action)[0]) == SKIPPED
    return not is_vector(space) and int(action) == SKIP


def is_vector(space: gym.Space) -> bool:
    """Returns whether actions are vectors (d,), and not one choice."""
    return not isinstance(space, gym.spaces.Discrete)


def action_shape(space: gym.Space) -> tuple[int, ...]:
    """Returns () for one choice, (d,) for a vector."""
    return tuple(space.shape or ()) if is_vector(space) else ()


def action_dtype(space: gym.Space) -> type[np.generic]:
    """Returns float32 for a `Box`, else int64."""
    return np.float32 if isinstance(space, gym.spaces.Box) else np.int64


def random_vectors(space: gym.Space, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns vectors (N, d), each entry uniform over its values.

    Args:
        space: of vectors.
        draw: gives (N,) numbers in [0, 1), an entry after the other.
    """
    if isinstance(space, TextCodes):
        return _random_texts(space, draw)
    uniforms = np.stack([draw() for _ in range(action_shape(space)[0])], 1)  # (N, d)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return (uniforms * space.nvec).astype(np.int64)
    assert isinstance(space, gym.spaces.Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return np.clip(low + uniforms * (high - low), low, high).astype(np.float32)


def _random_texts(space: TextCodes, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Texts as vectors (N, d): each length alike, and each character."""
    shortest, longest, characters = space.text.min_length, space.text.max_length, space.text.character_list
    lengths = shortest + (draw() * (longest - shortest + 1)).astype(np.int64)  # (N,)
    places = np.stack([(draw() * len(characters)).astype(np.int64) for _ in range(longest)], 1)  # (N, d)
    codes = np.array([ord(character) for character in characters], np.int64)[places]
    return np.where(np.arange(longest) < lengths[:, None], codes, END)


def ranges(space: gym.Space) -> list[tuple[float, float]]:
    """Returns the least and the largest value of each of a vector's d entries."""
    if isinstance(space, gym.spaces.MultiDiscrete):
        return [(0, int(count) - 1) for count in space.nvec]
    assert isinstance(space, gym.spaces.Box)
    return list(zip(space.low.tolist(), space.high.tolist(), strict=True))


def shares(space: gym.Space, vectors: np.ndarray) -> np.ndarray:
    """Returns how far vectors (B, d) are from the least to the largest value of each entry, in [0, 1]; 0 if equal.

    Of texts it is (B, 1), zeros: they have no place between others.
    """
    if isinstance(space, TextCodes):
        return np.zeros((len(vectors), 1))
    low, high = np.array(ranges(space), np.float64).T
    return (vectors - low) / np.where(high > low, high - low, 1)


def short_number(value: float) -> str:
    """Returns a number in a few characters."""
    return f"{value:.4g}"


def vector_in_words(action: Sequence[float] | np.ndarray, space: gym.Space | None = None) -> str:
    """Returns a vector's numbers, or the text that it is."""
    if isinstance(space, TextCodes):
        return "no text" if np.asarray(action)[0] == SKIPPED else repr(TextCodes.decode(action))
    return "[" + ", ".join(short_number(value) for value in np.ravel(action).tolist()) + "]"


def actions_in_words(space: gym.Space, names: Sequence[str]) -> str:
    """Returns the names of A actions, or what each entry of a vector is."""
    if not is_vector(space):
        return ", ".join(names)
    if isinstance(space, TextCodes):
        return text_in_words(space)
    kind = "whole numbers" if isinstance(space, gym.spaces.MultiDiscrete) else "numbers"
    spans = zip(names, ranges(space), strict=True)
    entries = ", ".join(f"{name} from {short_number(low)} to {short_number(high)}" for name, (low, high) in spans)
    return f"{len(names)} {kind}: {entries}"


def text_in_words(space: TextCodes) -> str:
    """Returns how long texts are, and of which characters where these are few."""
    characters = "".join(space.text.character_list)
    span = f"{space.text.min_length} to {space.text.max_length} characters"
    return f"a text of {span}" + (f" among {characters}" if len(characters) <= 32 else "")


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Returns a space as JSON."""
    if isinstance(space, TextCodes):
        text = space.text
        characters = "".join(text.character_list)
        return {"kind": "Text", "min": int(text.min_length), "max": int(text.max_length), "characters": characters}
    if isinstance(space, gym.spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, gym.spaces.Box):
        return {"kind": "Box", "low": space.low.tolist(), "high": space.high.tolist()}
    assert isinstance(space, gym.spaces.Discrete)
    return {"kind": "Discrete", "n": int(space.n)}


def space_from_json(description: dict[str, Any]) -> gym.Space:
    """Returns the space of `space_to_json`.

    Raises:
        ValueError: it is none.
    """
    kind = description.get("kind")
    if kind == "MultiDiscrete":
        return gym.spaces.MultiDiscrete(description["nvec"])
    if kind == "Box":
        return gym.spaces.Box(np.float32(description["low"]), np.float32(description["high"]), dtype=np.float32)
    if kind == "Text":
        given = {"min_length": description["min"], "charset": description["characters"]}
        return TextCodes(gym.spaces.Text(description["max"], **given))
    if kind == "Discrete":
        return gym.spaces.Discrete(description["n"])
    raise ValueError(f"action_space is of kind {kind!r}")
