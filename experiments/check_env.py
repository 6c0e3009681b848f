"""What a policy would get from an environment, and everything that is wrong with it.

    python experiments/check_env.py manako/GoTo-v0 --env_kwargs '{"size": 4}'
    python experiments/check_env.py my_module:MyEnv-v0 --instruction "open the door" --action_names left,right,open

It prints the image's shape, the instruction, the action names, where each comes from, the success rule, and every fault
in a sentence. A plugin's module may lie in the current folder. Exit code 0 without faults (warnings allowed), 1 with
faults, 2 for a command line that cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.envs.check import WARNING, check_vlm_env  # noqa: E402
from manako.envs.errors import EnvError  # noqa: E402
from manako.envs.making import make_env  # noqa: E402
from manako.envs.observation import IMAGE_SOURCES  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one environment; return the exit code."""
    options = vars(_parser().parse_args(arguments))
    env_id = options.pop("env_id")
    faults = check_vlm_env(env_id, **options)
    wrong = [fault for fault in faults if not fault.startswith(WARNING)]
    if not wrong:
        describe(env_id, options)
    for fault in faults:
        print(fault if fault.startswith(WARNING) else f"fault: {fault}")
    if wrong:
        print(f"{len(wrong)} fault{'s' if len(wrong) > 1 else ''}")
        return 1
    print("no faults")
    return 0


def describe(env_id: str, options: dict[str, Any]) -> None:
    """Print what the environment shows and offers."""
    try:
        env = make_env(env_id, **options)
    except EnvError as error:
        print(f"cannot be described: {error}")
        return
    observation, _ = env.reset(seed=0)
    print(f"image         {env.frame_shape} uint8, from {env.image_from}")
    print(f"instruction   {observation['instruction']!r}, from {env.instruction_from}")
    print(f"action names  {', '.join(env.action_names)} ({len(env.action_names)}), from {env.action_names_from}")
    print(f"success       {env.success.sentence}")
    env.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check an environment.", epilog="exit code: 0 no faults, 1 faults, 2 bad usage", allow_abbrev=False
    )
    parser.add_argument("env_id", metavar="ID", help="a Gymnasium id, or module:EnvId-v0 for a plugin")
    parser.add_argument("--instruction", help="replaces the environment's own")
    parser.add_argument("--action_names", type=_names, help="comma-separated, one an action")
    parser.add_argument("--env_kwargs", type=_json_object, help="constructor arguments, a JSON object")
    parser.add_argument("--image_source", choices=IMAGE_SOURCES, default="auto")
    parser.add_argument("--success_return", type=float, help="the lowest return of a successful episode")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}), expected an object like '{{\"size\": 4}}'"
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is a JSON {type(value).__name__}, expected an object like '{{\"size\": 4}}'"
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
