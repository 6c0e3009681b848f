"""A model behind a chat API in the runners: its settings checked, who asks it, and what is said where it stops.

No torch here but inside functions: the settings are checked before it is loaded.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym

from manako.envs.settings import EnvSettings
from manako.experiments.common.command_line import UsageError, known_settings
from manako.policies.plain_text import as_plain_text
from manako.policies.remote.client import check_settings
from manako.policies.remote.errors import RemoteError
from manako.policies.remote.settings import REMOTE, RemoteSettings
from manako.spaces import is_vector

if TYPE_CHECKING:
    from manako.policies import PolicySource
    from manako.policies.remote_policy import RemotePolicy


def check_flags(kind: type, given: frozenset[str], flag: str, value: str) -> None:
    """Checks that settings of a server come only where one is asked.

    Args:
        kind: of the runner's settings.
        given: names of the settings that came.
        flag: that says whether a server is asked.
        value: what came for it.

    Raises:
        UsageError: the first setting that nobody would read.
    """
    names = {name for name, setting in known_settings(kind).items() if setting.section == REMOTE}
    if value != REMOTE and names & given:
        raise UsageError(f"--{min(names & given)} is for --{flag} remote, and --{flag} is {value}: leave it out.")


@contextlib.contextmanager
def asking(settings: RemoteSettings | None) -> Iterator[None]:
    """Checks the settings of a server, if one is asked, and says at the end of an error how the run goes on.

    Raises:
        UsageError: settings that cannot be used, or the server or the budget ends the run.
    """
    if settings is not None:
        check_settings(settings)
    try:
        yield
    except RemoteError as error:
        raise UsageError(f"{error} {_goes_on(settings)}") from None
    except KeyboardInterrupt:
        if settings is not None:
            print(_goes_on(settings), file=sys.stderr)
        raise


def _goes_on(settings: RemoteSettings | None) -> str:
    where = settings.remote_cache if settings is not None else "the cache"
    return (
        f"All answers are kept in {where}, so the same command goes on where it stopped, into another output where a "
        f"folder is there already: {shlex.join(['python', *sys.argv])}"
    )


def with_whole_path(settings: RemoteSettings) -> RemoteSettings:
    """Returns the settings for any working folder, such as a worker's."""
    return dataclasses.replace(settings, remote_cache=str(Path(settings.remote_cache).resolve()))


def make_remote_policy(
    source: "PolicySource",
    settings: RemoteSettings,
    environment: EnvSettings,
    action_names: tuple[str, ...],
    frame_shape: tuple[int, int, int],
    action_space: gym.Space,
) -> "RemotePolicy":
    """Returns the policy of a server for an environment.

    Raises:
        UsageError: a replaced instruction that would be changed, or actions without names.
        PolicyError: settings that cannot be used.
    """
    from manako.policies import PolicySource
    from manako.policies.interface import PolicySpec
    from manako.policies.remote_policy import RemotePolicy

    if is_vector(action_space):
        raise UsageError(
            f"{environment.env} has the actions {action_space}, and a model behind a chat API names one of a list: "
            "expected an environment of Discrete actions."
        )
    text = environment.instruction
    if text is not None and as_plain_text(text, []) != text:
        raise UsageError(f"--instruction {text!r} holds control characters: expected plain text.")
    for name in ("frames", "history"):
        if getattr(source, name) != getattr(PolicySource(), name):
            raise UsageError(
                f"--{name} came, but a model behind a chat API is shown the present frame alone: leave it out."
            )
    spec = PolicySpec(action_names, frame_shape, system=source.system)
    return RemotePolicy(spec, settings, illegal_action=source.illegal_action)
