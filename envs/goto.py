"""`manako/GoTo-v0`: walk to the object that the instruction names.

A white cross on a small board, a few coloured objects, and "go to the blue ball". The named object is worth +1, any
other -1, and both end the episode; so does running out of 3 x size steps, as a truncation. Every step adds `shaping`
times its progress towards the named object (walking distance saved), so that a random walk already says where to go.
The same frame with another instruction needs another action: neither the picture nor the text is enough alone.

The step limit lives here and not in a `TimeLimit` because it follows `size`.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.captions import place_name
from manako.envs.errors import EnvError
from manako.envs.observation import InstructionText
from manako.envs.tiles import AGENT, FIRST_OBJECT, FLOOR, TILE, draw, paint_tiles, resolve_colors, resolve_shapes

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # name -> (rows, columns)
STEPS_PER_CELL = 3  # an episode lasts at most this many times `size`


class GoTo(gym.Env[dict[str, Any], Any]):
    """A board with an agent, some objects, and an instruction that names one of them.

    Every object that an instruction can name can be reached in time. `info["success"]` is there at every step.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names = tuple(MOVES)

    def __init__(
        self,
        size: int = 3,
        num_objects: int = 2,
        colors: int | Sequence[str] = 4,
        shapes: Sequence[str] = ("ball",),
        shaping: float = 0.2,
        render_mode: str | None = None,
    ) -> None:
        """Makes the environment.

        Args:
            size: Cells a side; a cell is 8 pixels.
            num_objects: How many objects, all different.
            colors: How many colours to draw from, or their names.
            shapes: Names from "ball", "box", "key".
            shaping: Reward for each cell nearer to the named object, and its loss for each farther; 0 for none.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range, or the objects do not fit.
        """
        for name, value, least in (("size", size, 2), ("num_objects", num_objects, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EnvError(f"{name} is {value!r}, expected a whole number from {least} on")
        if not 0 <= shaping < float("inf"):
            raise EnvError(f"shaping is {shaping!r}, expected a number from 0 on")
        color_names, shape_names = resolve_colors(colors), resolve_shapes(shapes)
        kinds = [f"{color} {shape}" for shape in shape_names for color in color_names]
        most = min(size * size - 1, len(kinds))
        if num_objects > most:
            raise EnvError(
                f"num_objects is {num_objects}, and at most {most} fit: the board has {size * size - 1} cells beside "
                f"the agent's, and {len(color_names)} colours x {len(shape_names)} shapes make {len(kinds)} different "
                "objects"
            )
        self.size, self.num_objects, self.shaping = size, num_objects, float(shaping)
        self.max_steps = STEPS_PER_CELL * size
        self.render_mode = render_mode
        self.instruction = ""
        self._alternative: str | None = None
        self._instructions = [f"go to the {kind}" for kind in kinds]
        self._tiles = paint_tiles(color_names, shape_names)
        self._board = np.full((size, size), FLOOR)  # (rows, columns) tile numbers
        self.objects: set[tuple[int, int]] = set()
        self.agent = self.target = (0, 0)  # (row, column)
        self._steps = 0
        side = size * TILE
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (side, side, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws the board and the object to name."""
        super().reset(seed=seed)
        self._steps = 0
        numbers = self.np_random.permutation(self.size * self.size)[: self.num_objects + 1].tolist()
        kinds = self.np_random.permutation(len(self._instructions))[: self.num_objects].tolist()
        self.agent, *places = [divmod(number, self.size) for number in numbers]
        self.objects = set(places)
        self._board = np.full((self.size, self.size), FLOOR)
        self._board[self.agent] = AGENT
        for place, kind in zip(places, kinds, strict=True):
            self._board[place] = FIRST_OBJECT + kind

        # The kinds are in random order already; the draw here spares those that others wall off.
        open_to = self._reachable()
        named = [
            (place, self._instructions[kind]) for place, kind in zip(places, kinds, strict=True) if place in open_to
        ]
        self.target, self.instruction = named[int(self.np_random.integers(len(named)))]
        others = [text for _, text in named if text != self.instruction]
        self._alternative = others[0] if others else None
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves one cell; the border holds the agent back."""
        self._steps += 1
        before = self._distance()
        (row, column), (down, right) = self.agent, MOVES[self.action_names[int(action)]]
        place = (min(max(row + down, 0), self.size - 1), min(max(column + right, 0), self.size - 1))
        self._board[self.agent] = FLOOR
        self._board[place] = AGENT
        self.agent = place
        success = place == self.target
        terminated = place in self.objects
        reward = self.shaping * (before - self._distance())
        if terminated:
            reward += 1.0 if success else -1.0
        truncated = not terminated and self._steps >= self.max_steps
        return self._observe(), reward, terminated, truncated, {"success": success}

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        return draw(self._tiles, self._board)

    def alternative_instruction(self) -> str | None:
        """Returns the name of another object on this board, the same all episode long; None where there is no other."""
        return self._alternative

    def caption(self) -> str:
        """Returns the places of the agent and of every object, in words."""
        parts = [f"cross at {place_name(*self.agent, self.size, self.size)}"]
        for row, column in sorted(self.objects - {self.agent}):
            kind = self._instructions[int(self._board[row, column]) - FIRST_OBJECT].removeprefix("go to the ")
            parts.append(f"{kind} at {place_name(row, column, self.size, self.size)}")
        return ", ".join(parts) + "."

    def expert_action(self) -> int:
        """Returns the first move of a shortest path to the named object that touches no other."""
        frontier, seen = [(self.agent, -1)], {self.agent}
        while frontier:
            edge = []
            for (row, column), first in frontier:
                for number, (down, right) in enumerate(MOVES.values()):
                    place = (row + down, column + right)
                    if place == self.target:
                        return number if first < 0 else first
                    inside = 0 <= place[0] < self.size and 0 <= place[1] < self.size
                    if inside and place not in seen and place not in self.objects:
                        seen.add(place)
                        edge.append((place, number if first < 0 else first))
            frontier = edge
        return 0  # unreachable: the named object always has a way

    def expert_thought(self) -> str:
        """Returns where the agent is and where the named object."""
        places = [place_name(*cell, self.size, self.size) for cell in (self.agent, self.target)]
        return f"cross {places[0]}, {self.instruction.removeprefix('go to the ')} {places[1]}"

    def _observe(self) -> dict[str, Any]:
        return {"image": draw(self._tiles, self._board), "instruction": self.instruction}

    def _distance(self) -> int:
        return abs(self.agent[0] - self.target[0]) + abs(self.agent[1] - self.target[1])

    def _reachable(self) -> set[tuple[int, int]]:
        """The cells that the agent can step on in time, before an object ends the episode."""
        seen, frontier = {self.agent}, [self.agent]
        for _ in range(self.max_steps):
            edge = []
            for row, column in frontier:
                for down, right in MOVES.values():
                    place = (row + down, column + right)
                    if place not in seen and 0 <= place[0] < self.size and 0 <= place[1] < self.size:
                        seen.add(place)
                        if place not in self.objects:
                            edge.append(place)
            frontier = edge
        return seen
