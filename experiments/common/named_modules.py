"""Whose code is run: the module of `module:EnvId-v0` is imported only where the user has named it.

    --env my_env:Corridor-v0      on this command line (or in a --config given as text): imported, and remembered
    a run's config.yaml, a --config file, a ladder, a dataset      may have come from elsewhere: what they name is
                                  imported where this user has named it on this machine before, else refused

What is remembered is the module's name with the place where it was found, so that a module of the same name that came
with a download is another. The list lies in the user's own folder (XDG_STATE_HOME, by default ~/.local/state), and no
download can bring it along. Where it cannot be written, `--env` has to be given each time. Nothing is imported here.
"""

import contextlib
import importlib.util
import os
import stat
import sys
from pathlib import Path

from manako.experiments.common.command_line import UsageError

LIST = Path("manako") / "named_modules"
LARGEST = 2**20  # bytes of the list
OURS = "manako"


def module_of(env: str) -> str | None:
    """Returns the module that an environment's name asks for, None for none or one of this project."""
    name = env.rpartition(":")[0]
    return name if name and name.split(".")[0] != OURS else None


def remember(env: str) -> None:
    """Writes down that the user has named this environment's module."""
    name = module_of(env)
    line = None if name is None else _line(name)
    if line is None or line in _known():
        return
    file = _file()
    with contextlib.suppress(OSError):  # a home that cannot be written to: it is named again next time
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(line + "\n")


def is_named(env: str) -> bool:
    """Says whether this environment asks for no module, or for one that the user has named here before."""
    name = module_of(env)
    return name is None or _line(name) in _known()


def check_named(env: str, source: str, repair: str | None = None) -> None:
    """Raises where a file asks for a module that the user has not named.

    Args:
        env: `module:EnvId-v0`, or a name without a module.
        source: the file, for the sentence.
        repair: what to do about it; by default the flag.

    Raises:
        UsageError: which module it is, where it lies, and how to name it.
    """
    if is_named(env):
        return
    name = module_of(env)
    place = _origin(str(name))
    where = f"which lies in {place}" if place else "which is not here"
    raise UsageError(
        f"{source} asks for the module {name!r}, {where} and was never named by you: it is code that would be run, so "
        f"look at it, and {repair or f'give --env {env}'}."
    )


def _line(name: str) -> str | None:
    """How a module is remembered; None where it is not found, or cannot be written in a line."""
    place = _origin(name)
    return f"{name} in {place}" if place and f"{name}{place}".isprintable() else None


def _origin(name: str) -> str | None:
    """Where the module's package or file lies; found as the import would, current folder last, and not imported."""
    top, here = name.split(".")[0], os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        importlib.invalidate_caches()
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module without a spec
        return None
    finally:
        if added:
            sys.path.remove(here)
    if found is None:
        return None
    if found.has_location and found.origin:
        return os.path.realpath(found.origin)
    places = list(found.submodule_search_locations or ())  # of a folder without __init__.py
    return os.path.realpath(places[0]) if places else found.origin


def _file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / LIST


def _known() -> set[str]:
    """What is in the list, where it is a file of this user that nobody else can write to."""
    try:
        descriptor = os.open(_file(), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return set()
    try:
        about = os.fstat(descriptor)
        mine = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not (mine and stat.S_ISREG(about.st_mode)):
            return set()
        return set(os.read(descriptor, LARGEST).decode(errors="replace").split("\n"))
    finally:
        os.close(descriptor)
