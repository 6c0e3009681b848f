"""`manako/Touch-v0`: touch the object that the instruction names, where the action is a place.

A small board with a few coloured objects, and "touch the blue ball". The action is a cell: it is touched at once,
nothing walks. The named object is worth +1, is taken off the board, and another one is named; `touches` of them in a
row are a success. Any other cell, be it empty or another object's, is worth -1 and ends the episode. So an episode is a
sequence, each frame of which shows what was done, and the same frame with another instruction needs another action.

An episode has no more steps than `touches`, so there is nothing to truncate.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.captions import place_name
from manako.envs.errors import EnvError
from manako.envs.observation import InstructionText
from manako.envs.tiles import FIRST_OBJECT, FLOOR, TILE, draw, paint_tiles, resolve_colors, resolve_shapes
from manako.places import cell_name


class Touch(gym.Env[dict[str, Any], Any]):
    """A board of objects, and an instruction that names one of them.

    Action `row * size + column` touches that cell. `info["success"]` is there at every step.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(
        self,
        size: int = 3,
        num_objects: int = 4,
        touches: int = 3,
        colors: int | Sequence[str] = 4,
        shapes: Sequence[str] = ("ball",),
        render_mode: str | None = None,
    ) -> None:
        """Makes the environment.

        Args:
            size: Cells a side; a cell is 8 pixels.
            num_objects: How many objects, all different.
            touches: How many of them are named, one after another.
            colors: How many colours to draw from, or their names.
            shapes: Names from "ball", "box", "key".
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range, or the objects do not fit.
        """
        for name, value, least in (("size", size, 2), ("num_objects", num_objects, 1), ("touches", touches, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EnvError(f"{name} is {value!r}, expected a whole number from {least} on")
        color_names, shape_names = resolve_colors(colors), resolve_shapes(shapes)
        kinds = [f"{color} {shape}" for shape in shape_names for color in color_names]
        most = min(size * size, len(kinds))
        if num_objects > most:
            raise EnvError(
                f"num_objects is {num_objects}, and at most {most} fit: the board has {size * size} cells, and "
                f"{len(color_names)} colours x {len(shape_names)} shapes make {len(kinds)} different objects"
            )
        if touches > num_objects:
            raise EnvError(
                f"touches is {touches}, and there are {num_objects} objects to name: expected no more touches than "
                "num_objects"
            )
        self.size, self.num_objects, self.touches = size, num_objects, touches
        self.action_names = tuple(cell_name(*divmod(action, size)) for action in range(size * size))
        self.render_mode = render_mode
        self._instructions = [f"touch the {kind}" for kind in kinds]
        self._tiles = paint_tiles(color_names, shape_names)
        self._board = np.full((size, size), FLOOR)  # (rows, columns) tile numbers
        self._order: list[tuple[int, int]] = []  # the objects' cells, the named one first, then those named after it
        self._touched = 0
        side = size * TILE
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (side, side, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(size * size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws the board and the order in which its objects are named."""
        super().reset(seed=seed)
        self._touched = 0
        cells = self.np_random.permutation(self.size * self.size)[: self.num_objects].tolist()
        kinds = self.np_random.permutation(len(self._instructions))[: self.num_objects].tolist()
        self._order = [divmod(cell, self.size) for cell in cells]  # in random order already
        self._board = np.full((self.size, self.size), FLOOR)
        for place, kind in zip(self._order, kinds, strict=True):
            self._board[place] = FIRST_OBJECT + kind
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Touches a cell."""
        right = self._order[0] == divmod(int(action), self.size)
        if right:
            self._touched += 1
        success = self._touched == self.touches
        if right and not success:  # the last one stays, so that the frame still fits the instruction
            self._board[self._order.pop(0)] = FLOOR
        return self._observe(), 1.0 if right else -1.0, success or not right, False, {"success": success}

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        return draw(self._tiles, self._board)

    @property
    def instruction(self) -> str:
        """What is to be touched now."""
        return self._instruction(self._order[0]) if self._order else ""

    def alternative_instruction(self) -> str | None:
        """Returns the name of another object on the present board; None where there is no other."""
        return self._instruction(self._order[1]) if len(self._order) > 1 else None

    def caption(self) -> str:
        """Returns the places of the objects, in words."""
        parts = [
            f"{self._instruction(place).removeprefix('touch the ')} at {place_name(*place, self.size, self.size)}"
            for place in sorted(self._order)
        ]
        return ", ".join(parts) + "."

    def expert_action(self) -> int:
        """Returns the cell of the named object."""
        row, column = self._order[0]
        return row * self.size + column

    def _instruction(self, place: tuple[int, int]) -> str:
        return self._instructions[int(self._board[place]) - FIRST_OBJECT]

    def _observe(self) -> dict[str, Any]:
        return {"image": draw(self._tiles, self._board), "instruction": self.instruction}
