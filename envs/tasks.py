"""What to tell a policy about environments that do not say it themselves, and when an episode counts as a success.

Gymnasium's classic environments have numbered actions and no text. `TASKS` gives each an instruction and
action names, and says what a success is where the environment does not. Where nobody says it, no episode is a success
or a failure, and returns are reported. It is a table of data and nothing else: an environment of yours needs no row
here, because an attribute of its own or the command line says the same (the order is in `envs/observation.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """The description of one Gymnasium id.

    Attributes:
        instruction: What the policy reads.
        action_names: One name an action, in the order of the action numbers, or an entry of an action vector; where an
            environment is made with other actions, so many as there are not names, they say nothing.
        success_return: An episode succeeds from this return on; None leaves it to the other rules, or undefined.
        success_terminated: True where an episode must also terminate to succeed: the goal ends it, and running out
            of steps early would otherwise look like a good return.
    """

    instruction: str | None
    action_names: tuple[str, ...] | None
    success_return: float | None = None
    success_terminated: bool = False


_FROZEN_LAKE = Task(
    "cross the frozen lake to the gift without falling into a hole",
    ("left", "down", "right", "up"),
    success_return=1.0,  # paid for the gift alone
)
_CLIFF = Task(
    "walk along the cliff to the cookie without falling off",
    ("up", "right", "down", "left"),
    success_return=-99.0,  # a fall costs 100
    success_terminated=True,
)

TASKS: dict[str, Task] = {
    "FrozenLake-v1": _FROZEN_LAKE,
    "FrozenLake8x8-v1": _FROZEN_LAKE,
    "CliffWalking-v1": _CLIFF,
    "CliffWalkingSlippery-v1": _CLIFF,
    "Taxi-v4": Task(
        "drive the taxi to the passenger, pick them up and drop them off at the building",
        ("south", "north", "east", "west", "pick up", "drop off"),
        success_terminated=True,  # only a delivery terminates
    ),
    "Blackjack-v1": Task(
        "beat the dealer without going over 21", ("stick", "hit"), success_return=1.0
    ),  # a draw pays 0
    "CartPole-v1": Task("keep the pole upright on the cart", ("left", "right"), success_return=475.0),
    "MountainCar-v0": Task("swing the car up the hill to the flag", ("left", "none", "right"), success_terminated=True),
    "Acrobot-v1": Task(
        "swing the tip of the two links above the line", ("left", "none", "right"), success_terminated=True
    ),
    "LunarLander-v3": Task(
        "land the module on the pad between the flags",
        ("none", "left", "main", "right"),
        success_return=200.0,
    ),
    "Pendulum-v1": Task("swing the pole up and hold it upright", ("torque",)),
    "MountainCarContinuous-v0": Task("swing the car up the hill to the flag", ("force",), success_terminated=True),
    "CarRacing-v3": Task("drive along the grey road", ("steering", "gas", "brake")),
    # Atari names its own actions. Its measure is the score: from where on it is a success, if anywhere, is for the
    # command line to say (success_return).
    "ALE/Pong-v5": Task("win the rally: hit the ball past the other paddle", None),
    "ALE/Boxing-v5": Task("box: land more punches than the opponent", None),
    "ALE/Freeway-v5": Task("bring the chicken across the road", None),
    "ALE/Breakout-v5": Task("break the bricks with the ball", None),
    "ALE/SpaceInvaders-v5": Task("shoot the invaders", None),
    "ALE/MsPacman-v5": Task("eat the pellets and avoid the ghosts", None),
    "ALE/Qbert-v5": Task("jump on every cube to change its colour", None),
}

# MiniGrid and BabyAI pay 1 - 0.9 * steps / limit for a task that is done, so 0.1 at least, and nothing or -1 else; they
# say their instruction and actions themselves.
_GRID = Task(None, None, success_return=0.05)
FAMILIES: dict[str, Task] = {"MiniGrid-": _GRID, "BabyAI-": _GRID}


def task_of(env_id: str) -> Task | None:
    """Returns the description of an id, or of the family that its name begins with; None where there is none."""
    family = next((task for start, task in FAMILIES.items() if env_id.startswith(start)), None)
    return TASKS.get(env_id, family)


@dataclass(frozen=True)
class SuccessRule:
    """Decides at the end of an episode whether it was a success, where somebody says what one is.

    In this order: a threshold that the caller gave; the environment's own `info["is_success"]` or `info["success"]`, in
    the info of the episode's last step; the task description; the registered `reward_threshold`. Where none of these
    is there, the episode is neither a success nor a failure.

    Attributes:
        sentence: The rule in words.
        threshold: The lowest successful return; None where no return decides.
        needs_termination: Whether the episode must have terminated.
        trusts_info: Whether the environment's own verdict, where it gives one, goes first.
    """

    sentence: str
    threshold: float | None
    needs_termination: bool
    trusts_info: bool

    def __call__(self, episode_return: float, terminated: bool, info: Mapping[str, Any]) -> bool | None:
        """Judges one finished episode by its return, its last `terminated` and its last `info`; None: nobody says."""
        if self.trusts_info:
            for key in ("is_success", "success"):
                if info.get(key) is not None:
                    return bool(info[key])
        if self.needs_termination and not terminated:
            return False
        if self.threshold is not None:
            return bool(episode_return >= self.threshold)
        return True if self.needs_termination else None


def success_rule(task: Task | None, reward_threshold: float | None, success_return: float | None) -> SuccessRule:
    """Makes the rule for one environment.

    Args:
        task: Its description in `TASKS`, if it has one.
        reward_threshold: The threshold it is registered with, if any.
        success_return: The caller's threshold, which overrides everything else.
    """
    if success_return is not None:
        return SuccessRule(f"the episode's return is at least {success_return:g}", success_return, False, False)
    needs_termination = task is not None and task.success_terminated
    threshold = task.success_return if task is not None else None
    if threshold is None and not needs_termination:
        threshold = reward_threshold
    if needs_termination:
        by_return = "the episode terminates by itself"
        if threshold is not None:
            by_return += f" with a return of at least {threshold:g}"
    elif threshold is not None:
        by_return = f"the episode's return is at least {threshold:g}"
    else:
        by_return = "undefined, and returns are reported (--success_return defines it)"
    sentence = f"info['is_success'] or info['success'] where the environment gives one, else {by_return}"
    return SuccessRule(sentence, threshold, needs_termination, True)
