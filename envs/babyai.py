"""`manako/BabyAI-v0`: any level of MiniGrid and BabyAI (extra `minigrid`), drawn as small as a policy needs it.

The levels themselves can be played by their own ids. This one adds what training on them asks for:

view      `agent`, the default: the 7 x 7 cells that the agent sees, it looks up and stands in the middle of the lowest
          row, as BabyAI and BALROG show it; frames are of one size in every level, and left is always left. It is put
          together from the codes that a step returns anyway, so nothing is rendered twice, and equals MiniGrid's own
          `get_pov_render` pixel by pixel. `map`: the whole board from above, MiniGrid's `get_full_render`, in which
          nothing is hidden; `highlight` lights up what the agent sees there.
tile_size 8 pixels a cell: one patch of a small ViT.
actions   named as in BALROG ("turn left", "pick up" ...); `actions` keeps only some of them. By default all but `done`,
          which no BabyAI level needs, and all seven in a MiniGrid level.
missions  `train` keeps the pairs of `held_out`, a colour with an object, out of every mission: a reset draws from the
          episode's own seed until none of them is named. `held_out` draws until one is. Objects of a held-out pair
          still lie about in training, nothing is ever said of them. `all`, the default, takes what comes.

A success is a positive reward: MiniGrid pays it for a task that is done and for nothing else. What a level prints while
it is drawn ("Sampling rejected") is not shown. The step limit is the level's own; BabyAI's follows the mission.
"""

import contextlib
import functools
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.errors import EnvError
from manako.envs.making import find_spec
from manako.envs.observation import InstructionText
from manako.errors import type_and_text

# MiniGrid's action -> what a policy says, in the order of MiniGrid's numbers
NAMES = {
    "left": "turn left",
    "right": "turn right",
    "forward": "go forward",
    "pickup": "pick up",
    "drop": "drop",
    "toggle": "toggle",
    "done": "done",
}
VIEWS = ("agent", "map")
MISSIONS = ("all", "train", "held_out")
# never trained by Carta et al. (2023), nor shown by BALROG
HELD_OUT = ("yellow box", "red key", "red door", "green ball", "grey door")
MOST_DRAWS = 1_000  # missions that a reset draws
_PAIR = re.compile(r"\b(red|green|blue|purple|yellow|grey) (ball|box|key|door)\b")


class BabyAI(gym.Env[dict[str, Any], Any]):
    """A level of MiniGrid or BabyAI as frames, a mission and named actions.

    `info["success"]` is there at every step. BabyAI's own bot is the expert where the level is one of BabyAI's.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        level: str = "BabyAI-GoToLocal-v0",
        view: str = "agent",
        tile_size: int = 8,
        highlight: bool = True,
        actions: Sequence[str] | None = None,
        missions: str = "all",
        held_out: Sequence[str] = HELD_OUT,
        level_kwargs: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Makes the environment.

        Args:
            level: A registered id of MiniGrid or BabyAI.
            view: "agent" or "map".
            tile_size: Pixels a side of a cell.
            highlight: Light up what the agent sees on the map; the agent's own view always is.
            actions: Which of "left", "right", "forward", "pickup", "drop", "toggle", "done" there are.
            missions: "all", "train" or "held_out".
            held_out: Pairs such as "yellow box" that training never names.
            level_kwargs: Arguments of the level's constructor.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range, the level is none of MiniGrid's, or `minigrid` is missing.
        """
        for name, value, allowed in (("view", view, VIEWS), ("missions", missions, MISSIONS)):
            if value not in allowed:
                raise EnvError(f"{name} is {value!r}, expected {' or '.join(allowed)}")
        if isinstance(tile_size, bool) or not isinstance(tile_size, int) or tile_size < 4:
            raise EnvError(f"tile_size is {tile_size!r}, expected a whole number of pixels from 4 on")
        if isinstance(held_out, str) or not all(isinstance(p, str) and _PAIR.fullmatch(p) for p in held_out):
            raise EnvError(f"held_out is {held_out!r}, expected pairs of a colour and an object such as 'yellow box'")
        self._level = _make_level(level, dict(level_kwargs or {}))
        self.level, self.view, self.tile_size, self.highlight = level, view, tile_size, highlight
        self.missions, self.held_out = missions, tuple(held_out)
        if actions is None:
            actions = [name for name in NAMES if name != "done" or not hasattr(self._level, "gen_mission")]
        if isinstance(actions, str) or not actions or len(set(actions)) < len(actions) or set(actions) - set(NAMES):
            raise EnvError(f"actions is {actions!r}, expected different ones of {', '.join(NAMES)}")
        self._actions = [list(NAMES).index(name) for name in NAMES if name in actions]  # MiniGrid's numbers, in order
        self.action_names = tuple(list(NAMES.values())[number] for number in self._actions)
        self.render_mode = render_mode
        self.instruction = ""
        self._codes = np.zeros((0, 0, 3), np.uint8)  # (columns, rows, 3), what the agent sees
        self._bot: Any = None
        self._done: list[int] = []  # what was done since the bot was last asked
        self._advice: int | None = None
        self._frame = np.zeros(0, np.uint8)
        side = self._level.agent_view_size
        width, height = (side, side) if view == "agent" else (self._level.width, self._level.height)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (height * tile_size, width * tile_size, 3), np.uint8),
            instruction=InstructionText(),
        )
        self.action_space = gym.spaces.Discrete(len(self._actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws a level and its mission; all draws come from the one seed.

        Raises:
            EnvError: None of `MOST_DRAWS` missions is one of those that were asked for.
        """
        super().reset(seed=seed)
        for _ in range(MOST_DRAWS):
            with contextlib.redirect_stdout(io.StringIO()):
                observation, _ = self._level.reset(seed=seed)
            seed = None  # the next draw goes on where this one ended
            mission = str(observation["mission"])
            if self.missions == "all" or self._names_held_out(mission) == (self.missions == "held_out"):
                break
        else:
            wanted = "names" if self.missions == "held_out" else "is without"
            raise EnvError(
                f"none of {MOST_DRAWS:,} missions of {self.level} {wanted} {' or '.join(self.held_out)}: expected "
                f"missions all, or other pairs in held_out (its last mission was {mission!r})"
            )
        self.instruction = mission
        self._bot, self._done, self._advice = None, [], None
        return self._observe(observation), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Takes one of the kept actions."""
        number = self._actions[int(action)]
        self._done.append(number)
        self._advice = None
        observation, reward, terminated, truncated, _ = self._level.step(number)
        return self._observe(observation), float(reward), bool(terminated), bool(truncated), {"success": reward > 0}

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        return self._frame

    def close(self) -> None:
        """Closes the level."""
        self._level.close()

    @property
    def max_steps(self) -> int:
        """After how many steps the level truncates an episode."""
        return int(self._level.max_steps)

    def expert_action(self) -> int:
        """Returns what BabyAI's bot would do now.

        The bot follows what was done. Where a wrong action has led it to a state that it has no plan for, another bot
        looks at the level anew.

        Raises:
            EnvError: The level is none of BabyAI's, the bot has no plan for it, or its action is not among `actions`.
        """
        if self._advice is None:
            self._advice = self._ask_bot()
        if self._advice not in self._actions:
            raise EnvError(
                f"the bot of {self.level} wants {list(NAMES)[self._advice]!r} for {self.instruction!r}, expected one "
                f"of actions {[list(NAMES)[number] for number in self._actions]}: add it"
            )
        return self._actions.index(self._advice)

    def alternative_instruction(self) -> str | None:
        """Returns the mission with another object of the level in place of its first; None where there is no other."""
        named = _PAIR.search(self.instruction)
        if named is None:
            return None
        cells = [cell for cell in self._level.grid.grid if cell is not None]
        doors = named[2] == "door"
        kinds = {f"{cell.color} {cell.type}" for cell in cells if (cell.type == "door") == doors}
        others = sorted(kind for kind in kinds if _PAIR.fullmatch(kind) and kind not in self.instruction)
        return self.instruction.replace(named[0], others[0], 1) if others else None

    def _names_held_out(self, mission: str) -> bool:
        return any(pair[0] in self.held_out for pair in _PAIR.finditer(mission))

    def _observe(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        if self.view == "agent":
            self._frame = draw_codes(observation["image"], self.tile_size)
        else:
            self._frame = self._level.get_full_render(self.highlight, self.tile_size)
        return {"image": self._frame, "instruction": self.instruction}

    def _ask_bot(self) -> int:
        from minigrid.utils.baby_ai_bot import BabyAIBot

        if not hasattr(self._level, "instrs"):
            raise EnvError(f"{self.level} has no expert: expected a level of BabyAI, whose bot is one")
        if self._bot is not None and len(self._done) == 1:
            with contextlib.suppress(Exception):  # its plan does not fit what was done: the next one's will
                return self._replanned(self._done[0])
        try:
            self._bot = BabyAIBot(self._level)
            return self._replanned(None)
        except Exception as error:
            raise EnvError(
                f"the bot of {self.level} has no plan for {self.instruction!r}: {type_and_text(error)}"
            ) from error

    def _replanned(self, before: int | None) -> int:
        action = int(self._bot.replan(before))
        self._done = []
        return action


def draw_codes(codes: np.ndarray, tile_size: int) -> np.ndarray:
    """Draws what an agent sees, as MiniGrid's `get_pov_render` does.

    Args:
        codes: (columns, rows, 3) uint8 of MiniGrid's observation: object, colour and state of each cell.
        tile_size: Pixels a side of a cell.

    Returns:
        (rows x tile_size, columns x tile_size, 3) uint8.
    """
    numbers, tiles = _tiles(tile_size)
    columns, rows, _ = codes.shape
    shown = numbers[codes[..., 0], codes[..., 1], codes[..., 2]]  # (columns, rows)
    shown[columns // 2, rows - 1] += len(tiles) // 2  # with the agent on it
    picture = tiles[shown.T]  # (rows, columns, tile, tile, 3)
    return picture.swapaxes(1, 2).reshape(rows * tile_size, columns * tile_size, 3)


@functools.lru_cache(maxsize=8)
def _tiles(tile_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of a cell's tile (objects, colours, states), and the tiles (2 n, tile, tile, 3), the agent on n."""
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import WorldObj

    numbers = np.zeros((len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX)), np.int64)
    unseen = {"unseen": False, "empty": True}  # -> lit up
    looks: list[tuple[Any, bool]] = [(None, lit) for lit in unseen.values()]
    numbers[OBJECT_TO_IDX["empty"]] = 1
    kinds = [kind for kind in OBJECT_TO_IDX if kind not in (*unseen, "agent")]
    for kind, color, state in itertools.product(kinds, COLOR_TO_IDX.values(), STATE_TO_IDX.values()):
        if state and kind != "door":
            continue
        numbers[OBJECT_TO_IDX[kind], color, state] = len(looks)
        looks.append((WorldObj.decode(OBJECT_TO_IDX[kind], color, state), True))
    tiles = [
        Grid.render_tile(cell, agent_dir=agent, highlight=lit, tile_size=tile_size)
        for agent in (None, 3)
        for cell, lit in looks
    ]
    return numbers, np.stack(tiles).astype(np.uint8)


def _make_level(level: str, kwargs: dict[str, Any]) -> Any:
    """Makes the level without Gymnasium's wrappers.

    Raises:
        EnvError: There is no such level, it is none of MiniGrid's, or it refuses its arguments.
    """
    try:
        from minigrid.minigrid_env import MiniGridEnv
    except ImportError as error:
        raise EnvError(
            f'manako/BabyAI-v0 needs minigrid, which could not be imported ({error}): pip install "manako[minigrid]"'
        ) from error
    spec = find_spec(level)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made = gym.make(spec, disable_env_checker=True, **kwargs).unwrapped
    except TypeError as error:
        raise EnvError(f"{level} could not be made with level_kwargs {kwargs}: {type_and_text(error)}") from error
    if not isinstance(made, MiniGridEnv):
        raise EnvError(f"{level} is no level of MiniGrid or BabyAI: expected an id such as BabyAI-GoToLocal-v0")
    return made
