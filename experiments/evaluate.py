"""Evaluates a policy on held-out seeds, beside a random policy and two controls.

    python experiments/evaluate.py --policy runs/.../final
    python experiments/evaluate.py --policy tiny --env FrozenLake-v1 --env_kwargs '{"is_slippery": false}'

A run's folder, or a checkpoint in it, brings its environment and settings along. Prints the table of run_ppo.py and,
with --output, writes it as JSON; --gif draws episodes. An existing file is never overwritten.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.envs.settings import EnvSettings  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    UsageError,
    check_new_file,
    checked_sections,
    read_command_line,
    read_yaml,
    run_main,
    show,
)
from manako.experiments.common.run_folder import is_run, policy_folder  # noqa: E402
from manako.experiments.common.settings import (  # noqa: E402
    OF_PRESETS,
    EvaluateCommand,
    ImagineCommand,
    PPOCommand,
)
from manako.policies import PolicySource  # noqa: E402

Played = TypeVar("Played", EvaluateCommand, ImagineCommand)  # settings to which a run's are added


def main() -> int:
    """Runs one evaluation; returns the exit code."""
    line = read_line()
    command = with_the_runs(line)
    show("evaluating", f"{line.settings.policy.policy} on {command.environment.env}")
    from manako.experiments.common.evaluating import run_evaluation  # torch and all

    return run_evaluation(command, line.settings.policy.policy)


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[EvaluateCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no policy, or files of results that exist.
    """
    line = read_command_line(EvaluateCommand, "Evaluates a policy on held-out seeds, with controls.", arguments)
    if "policy" not in line.given:
        raise UsageError("--policy is missing: give a run folder, a checkpoint, a model folder, a Hub id or a preset.")
    check_new_file(line.settings.run.output, "--output")
    check_new_file(line.settings.run.gif, "--gif")
    return line


def with_the_runs(line: CommandLine[Played]) -> Played:
    """Returns the settings, with those of the run in which the policy lies where none were given."""
    given, command = line.given, line.settings
    folder, policy = Path(command.policy.policy), policy_folder(command.policy.policy)
    run = next((place for place in (folder, folder.parent, folder.parent.parent) if is_run(place)), None)
    if not folder.is_dir() or run is None:
        return command
    file = run / "config.yaml"
    written = read_yaml(file)
    shared = {part: values for part, values in written.items() if part not in ("sft", "dpo", "run")}
    sections = checked_sections(PPOCommand, shared, str(file))
    played, source = sections.get("environment", {}), sections.get("policy", {})
    if "env" in given and command.environment.env != played.get("env"):
        played = {}  # another environment: nothing of the run's fits
    played.pop("num_envs", None)
    of_policy = {name: value for name, value in source.items() if name not in ("policy", *OF_PRESETS)}
    environment = EnvSettings(**{**played, **_given(command.environment, given)})
    policy_source = PolicySource(**{**of_policy, **_given(command.policy, given), "policy": policy})
    seed = {} if "seed" in given else {"seed": written["run"]["seed"]}
    return dataclasses.replace(
        command, environment=environment, policy=policy_source, run=dataclasses.replace(command.run, **seed)
    )


def _given(settings: EnvSettings | PolicySource, given: frozenset[str]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(settings)} & given
    return {name: getattr(settings, name) for name in names}


if __name__ == "__main__":
    run_main(main)
