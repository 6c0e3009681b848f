"""What a policy would get from an environment, and everything that is wrong with it.

    python experiments/check_env.py manako/GoTo-v0 --env_kwargs '{"size": 4}'
    python experiments/check_env.py my_module:MyEnv-v0 --instruction "open the door" --action_names left,right,open

It prints the image's shape, the instruction, the action names, where each comes from, whether action masks come, the
success rule, the speed, and every fault in a sentence. A plugin's module may lie in the current folder. Exit code 0
without faults (warnings allowed), 1 with faults, 2 for a command line that cannot be read.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.envs.check import WARNING, Speed, check_vlm_env, measure_speed  # noqa: E402
from manako.envs.errors import EnvError  # noqa: E402
from manako.envs.making import make_vlm_env  # noqa: E402
from manako.envs.observation import VLMObservation  # noqa: E402
from manako.envs.settings import EnvSettings  # noqa: E402
from manako.errors import type_and_text  # noqa: E402
from manako.experiments.common.command_line import parse, run_main, section  # noqa: E402
from manako.spaces import actions_in_words, is_vector  # noqa: E402

SLOW_PICTURE = 0.001  # seconds; a quicker one is not worth a word


@dataclass(frozen=True)
class CheckCommand:
    """Settings of check_env.py."""

    environment: EnvSettings = section(EnvSettings, "environment", without=("num_envs",))


def main() -> int:
    """Checks one environment; returns the exit code."""
    settings = read_line()
    print(f"checking      {settings.env}: 200 steps, and the same twice again", flush=True)
    faults = check_vlm_env(settings.env, **settings.options())
    wrong = [fault for fault in faults if not fault.startswith(WARNING)]
    if not wrong:
        describe(settings)
    for fault in faults:
        print(fault if fault.startswith(WARNING) else f"fault: {fault}")
    if wrong:
        print(f"{len(wrong)} fault{'s' if len(wrong) > 1 else ''}")
        return 1
    print("no faults")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> EnvSettings:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Checks an environment; exit code 0 without faults."
    return parse(CheckCommand, about, arguments, positional="env").environment


def describe(settings: EnvSettings) -> None:
    """Prints what the environment shows and offers."""
    try:
        env = make_vlm_env(settings.env, **settings.options())
    except EnvError as error:
        print(f"cannot be described: {error}")
        return
    observation, _ = env.reset(seed=0)
    print(f"image         {env.frame_shape} uint8, from {env.image_from}")
    print(f"instruction   {observation['instruction']!r}, from {env.instruction_from}")
    actions = actions_in_words(env.action_space, env.action_names)
    count = "" if is_vector(env.action_space) else f" ({len(env.action_names)})"
    print(f"action names  {actions}{count}, from {env.action_names_from}")
    allowed = f"info['action_mask'], obeyed: {env.action_mask.sum()} of {len(env.action_mask)} actions at the start"
    print(f"action masks  {allowed if env.gives_masks else 'none'}")
    print(f"episodes      {env.limit_from}")
    print(f"success       {env.success.sentence}")
    try:
        print_speed(measure_speed(env), env)
    except Exception as error:  # whatever it does in later steps, which the check above looks at
        print(f"speed         not measured: {type_and_text(error)}")
    env.close()


def print_speed(speed: Speed, env: VLMObservation) -> None:
    """Prints steps a second, and where the picture is what costs, what to do about it."""
    rendered = env.image_from == "render()"
    of_picture = f", {1000 * speed.picture:.2f} ms its picture" if rendered else ", its picture with it"
    print(f"speed         {speed.steps_per_second:,.0f} steps/s: {1000 * speed.step:.2f} ms a step{of_picture}")
    if rendered and speed.picture > max(SLOW_PICTURE, 2 * speed.step):
        height, width, _ = env.frame_shape
        print(
            f"{WARNING}rendering is the cost: {speed.picture / (speed.step + speed.picture):.0%} of a step, for a "
            f"frame of {height} x {width} that a small policy sees at 64 x 64 or less; draw it smaller (an argument of "
            "the constructor, by --env_kwargs: MiniGrid's is tile_size), or observe the image instead of rendering it"
        )


if __name__ == "__main__":
    run_main(main)
