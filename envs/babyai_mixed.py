"""`manako/MixedLocal-v0`: the five tasks on which BALROG measures BabyAI, as a level of `manako/BabyAI-v0`.

Written from the rules of `BabyAI-MixedTrainLocal-v0`, which MiniGrid's releases do not have (BALROG installs a fork):

goto               one room of 6 x 6 free cells; "go to the red ball"
pickup             the same; "pick up the red ball"
open               two rooms, a locked door between them, its key in the agent's; "open the door", or the door's colour
putnext            one room; "put the red ball next to the blue key"
pick_up_seq_go_to  one room; "pick up the red ball, then go to the blue key", or "go to ... after you pick up ..."

There are as many objects as the task names, and `num_dists` more (0 in BALROG, 8 in its fork). All of them can be
reached; doors are yellow, green, blue or purple. BALROG names no held-out pair: that is `missions: train` of
`manako/BabyAI-v0`. The limit is BabyAI's: 64 steps, and 128 in the last three. `task: all` draws one in every episode.
"""

from typing import Any

from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.envs.babyai.core.verifier import (
    AfterInstr,
    BeforeInstr,
    GoToInstr,
    ObjDesc,
    OpenInstr,
    PickupInstr,
    PutNextInstr,
)

from manako.envs.errors import EnvError

TASKS = ("goto", "pickup", "open", "putnext", "pick_up_seq_go_to")
DOORS = ("yellow", "green", "blue", "purple")
NAMED = {"goto": 1, "pickup": 1, "open": 0, "putnext": 2, "pick_up_seq_go_to": 2}  # how many objects a task names


class MixedLocal(RoomGridLevel):
    """One of five tasks in a room, or in two where a door has to be opened."""

    instrs: Any  # one of the package's instructions

    def __init__(self, task: str = "all", num_dists: int = 0, room_size: int = 8, **kwargs: Any) -> None:
        """Makes the level.

        Args:
            task: One of `TASKS`, or "all".
            num_dists: Objects beside those that the task names.
            room_size: Cells a side, walls included.
            kwargs: Of MiniGrid's environments.

        Raises:
            EnvError: A parameter is out of range.
        """
        if task not in (*TASKS, "all"):
            raise EnvError(f"task is {task!r}, expected one of {', '.join(TASKS)}, or all")
        if isinstance(num_dists, bool) or not isinstance(num_dists, int) or num_dists < 0:
            raise EnvError(f"num_dists is {num_dists!r}, expected a whole number from 0 on")
        self.tasks = TASKS if task == "all" else (task,)
        self.task, self.num_dists = self.tasks[0], num_dists
        columns = 2 if task in ("open", "all") else 1  # "all": of the largest board
        super().__init__(num_rows=1, num_cols=columns, room_size=room_size, **kwargs)

    def _gen_grid(self, width: int, height: int) -> None:
        """Draws the task, and the board as wide as it needs."""
        self.task = self._rand_elem(self.tasks)
        self.num_cols = 2 if self.task == "open" else 1
        self.width = (self.room_size - 1) * self.num_cols + 1
        super()._gen_grid(self.width, height)

    def gen_mission(self) -> None:
        """Draws objects, agent and instruction; BabyAI calls it again where they are no good."""
        if self.task == "open":
            self.instrs = self._locked_door()
            return
        self.place_agent()
        objs = self.add_distractors(num_distractors=self.num_dists + NAMED[self.task], all_unique=False)
        self.check_objs_reachable()
        first = self._rand_elem(objs)
        one = ObjDesc(first.type, first.color)
        if self.task == "goto":
            self.instrs = GoToInstr(one)
        elif self.task == "pickup":
            self.instrs = PickupInstr(one)
        else:
            same = [obj for obj in objs if (obj.type, obj.color) == (first.type, first.color)]
            # of its own kind where there are two of them
            second = self._rand_elem(objs if len(same) > 1 else [obj for obj in objs if obj is not first])
            other = ObjDesc(second.type, second.color)
            if self.task == "putnext":
                self.instrs = PutNextInstr(one, other)
            elif self._rand_bool():
                self.instrs = BeforeInstr(PickupInstr(one), GoToInstr(other))
            else:
                self.instrs = AfterInstr(GoToInstr(other), PickupInstr(one))

    def _locked_door(self) -> OpenInstr:
        color, locked = self._rand_elem(DOORS), self._rand_int(0, 2)
        self.add_door(locked, 0, 0 if locked == 0 else 2, color, locked=True)
        self.add_object(1 - locked, 0, "key", color)
        self.add_distractors(1 - locked, 0, self.num_dists, all_unique=False)
        self.place_agent(1 - locked, 0)
        self.check_objs_reachable()
        return OpenInstr(ObjDesc("door", self._rand_elem([None, color])))
