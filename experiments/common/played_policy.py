"""The command line of a runner that plays a policy: evaluate.py and imagine.py. No torch here."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from manako.envs.settings import EnvSettings
from manako.experiments.common.command_line import (
    CommandLine,
    UsageError,
    check,
    check_new_file,
    checked_sections,
    known_settings,
    read_command_line,
)
from manako.experiments.common.named_modules import check_named
from manako.experiments.common.run_folder import is_run, policy_folder, read_run_settings
from manako.experiments.common.settings import OF_PRESETS, EvaluateCommand, ImagineCommand, PPOCommand
from manako.policies import PolicySource
from manako.policies.remote.settings import REMOTE

Played = TypeVar("Played", EvaluateCommand, ImagineCommand)  # settings to which a run's are added


def read_played(
    kind: type[Played], description: str, expected: str, arguments: Sequence[str] | None
) -> CommandLine[Played]:
    """Returns the settings of these words, by default of this program's command line.

    Args:
        kind: of the settings.
        description: of the program, for --help.
        expected: what --policy may be, for the sentence where it is missing.
        arguments: the words.

    Raises:
        UsageError: no policy, or files of results that exist.
    """
    line = read_command_line(kind, description, arguments)
    if "policy" not in line.given:
        raise UsageError(f"--policy is missing: give {expected}.")
    check_new_file(line.settings.run.output, "--output")
    check_new_file(line.settings.run.gif, "--gif")
    return line


def with_the_runs(line: CommandLine[Played]) -> Played:
    """Returns the settings, with those of the run in which the policy lies where none were given."""
    given, command = line.given, line.settings
    if command.policy.policy == REMOTE:
        return command
    folder, policy = Path(command.policy.policy), policy_folder(command.policy.policy)
    run = next((place for place in (folder, folder.parent, folder.parent.parent) if is_run(place)), None)
    if not folder.is_dir() or run is None:
        return command
    file = run / "config.yaml"
    written = read_run_settings(file)
    shared = {part: values for part, values in written.items() if part not in ("sft", "dpo", "run", REMOTE)}
    sections = checked_sections(PPOCommand, shared, str(file))
    played, source = sections.get("environment", {}), sections.get("policy", {})
    if "env" in given and command.environment.env != played.get("env"):
        played = {}  # another environment: nothing of the run's fits
    played.pop("num_envs", None)
    of_policy = {name: value for name, value in source.items() if name not in ("policy", *OF_PRESETS)}
    environment = EnvSettings(**{**played, **_given(command.environment, given)})
    check_named(environment.env, f"The run {str(run)!r}")
    policy_source = PolicySource(**{**of_policy, **_given(command.policy, given), "policy": policy})
    seed: dict[str, Any] = {} if "seed" in given else {"seed": _seed(written.get("run"), str(file))}
    return dataclasses.replace(
        command, environment=environment, policy=policy_source, run=dataclasses.replace(command.run, **seed)
    )


def _seed(run: Any, source: str) -> int:
    """The seed in a run's own section, whose other settings are not this runner's."""
    if not isinstance(run, dict) or "seed" not in run:
        raise UsageError(f"{source} says no seed in its section run: use another copy of the run, or give --seed.")
    check(known_settings(PPOCommand), {"seed": run["seed"]}, source)
    return int(run["seed"])


def _given(settings: EnvSettings | PolicySource, given: frozenset[str]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(settings)} & given
    return {name: getattr(settings, name) for name in names}
