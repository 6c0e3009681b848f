"""Environments as a vision-language policy sees them: an image, an instruction, and actions with names.

Importing this package registers the environments of ours, `manako/GoTo-v0` among them, and settles two things with SDL,
which draws Gymnasium's classic environments: it may not catch SIGTERM (it would swallow the signal that stops a run),
and on a machine without a screen it does not look for one. Nothing here imports torch.
"""

import os
import sys

import gymnasium

os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")
if sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

from manako.envs.check import check_vlm_env  # SDL reads the variables when it is loaded
from manako.envs.errors import EnvError
from manako.envs.making import make_vlm_env
from manako.envs.observation import VLMObservation
from manako.envs.tasks import TASKS, Task
from manako.envs.vector import (
    HELD_OUT,
    TRAINING,
    VALIDATION,
    EpisodeVectorEnv,
    Observations,
    StepResult,
    episode_seed,
    held_out_seeds,
    make_env,
    training_seeds,
    validation_seeds,
)

CARD_STEPS = 300  # as Gym Cards has it
for _id, _entry_point, _limit in (
    ("manako/BabyAI-v0", "manako.envs.babyai:BabyAI", None),
    ("manako/Blackjack-v0", "manako.envs.cards.blackjack:Blackjack", CARD_STEPS),
    ("manako/ColorMatch-v0", "manako.envs.color_match:ColorMatch", None),
    ("manako/EZPoints-v0", "manako.envs.cards.points:EZPoints", CARD_STEPS),
    ("manako/GoTo-v0", "manako.envs.goto:GoTo", None),
    ("manako/MixedLocal-v0", "manako.envs.babyai_mixed:MixedLocal", None),
    ("manako/NumberLine-v0", "manako.envs.cards.number_line:NumberLine", CARD_STEPS),
    ("manako/Pendulum-v0", "manako.envs.pendulum:Pendulum", 200),
    ("manako/Points24-v0", "manako.envs.cards.points:Points24", CARD_STEPS),
    ("manako/Relay-v0", "manako.envs.relay:Relay", None),
    ("manako/Slide-v0", "manako.envs.slide:Slide", None),
    ("manako/Spell-v0", "manako.envs.spell:Spell", None),
    ("manako/Touch-v0", "manako.envs.touch:Touch", None),
    ("manako/Track-v0", "manako.envs.track:Track", None),
):
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_entry_point, max_episode_steps=_limit)

__all__ = [
    "HELD_OUT",
    "TASKS",
    "TRAINING",
    "VALIDATION",
    "EnvError",
    "EpisodeVectorEnv",
    "Observations",
    "StepResult",
    "Task",
    "VLMObservation",
    "check_vlm_env",
    "episode_seed",
    "held_out_seeds",
    "make_env",
    "make_vlm_env",
    "training_seeds",
    "validation_seeds",
]
