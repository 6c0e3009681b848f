"""manako (眼): vision-language models that act.

The packages `manako.agent`, `.envs`, `.policies` and `.experiments` are folders of the repository: in a checkout they
lie beside this one, so the folder above is put on this package's path; an installed wheel has them inside.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

if (Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(Path(__file__).parents[1]))

_FRONT = {
    "make_env": "manako.envs",
    "held_out_seeds": "manako.envs",
    "PolicySource": "manako.policies",
    "load_policy": "manako.policies",
    "PPOConfig": "manako.agent.ppo_config",
    "PPOTrainer": "manako.agent.ppo_trainer",
    "evaluate": "manako.agent.report.evaluation",
}


def __getattr__(name: str) -> Any:
    """Returns one of the few names that a script of one's own starts from, imported when it is asked for."""
    if name in _FRONT:
        return getattr(import_module(_FRONT[name]), name)
    raise AttributeError(f"module 'manako' has no attribute {name!r}: expected one of {', '.join(_FRONT)}")
