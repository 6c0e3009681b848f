"""Says how a folder differs from its manifest, and writes the manifest anew for one that was changed on purpose.

    python experiments/seal_folder.py --folder runs/.../final                   what differs; nothing is written
    python experiments/seal_folder.py --folder runs/.../final --accept true     it is as it should be

Policies and datasets are compared with the SHA-256 sums in their manifest.json before anything in them is read, so one
with an edited file is refused. This is how its owner says that the edit was meant. The weights of a policy are held by
its policy.json as well: weights of one's own making are saved by `policy.save(folder)`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, run_main, section, show  # noqa: E402
from manako.manifest import MANIFEST, faults, write_manifest  # noqa: E402
from manako.settings import setting  # noqa: E402

OURS = ("policy.json", "dataset_info.json", MANIFEST)  # a folder has one of them


@dataclass(frozen=True)
class SealSettings:
    """Which folder is looked at."""

    folder: str | None = setting(
        None, "a policy's folder, such as final/ of a run, or a dataset of collect.py", is_path=True
    )
    accept: bool = setting(False, "write the manifest anew: the files are as they should be")


@dataclass(frozen=True)
class SealCommand:
    """Settings of seal_folder.py."""

    seal: SealSettings = section(SealSettings, "manifest")


def main() -> int:
    """Looks at one folder; returns the exit code: 0 where it is as its manifest says, at last or before."""
    given = read_line()
    folder = Path(str(given.folder))
    if not any(os.path.lexists(folder / name) for name in OURS):
        raise UsageError(f"{given.folder!r} is no policy and no dataset: expected one of {', '.join(OURS)} in it.")
    found = list(faults(folder))
    for fault in found:
        show("differs", fault)
    if not found:
        show("whole", f"{folder} is as its {MANIFEST} says")
        return 0
    if not given.accept:
        raise UsageError(
            f"{str(folder)!r} differs from its {MANIFEST}: use another copy of it, or, if all of this was changed on "
            "purpose, give --accept true."
        )
    try:
        write_manifest(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"The manifest of {str(folder)!r} cannot be written: {error}") from error
    show("accepted", f"{folder}: its {MANIFEST} was written anew")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> SealSettings:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no folder is named.
    """
    given = parse(SealCommand, "Compares a folder with its manifest.", arguments).seal
    if not given.folder:
        raise UsageError("--folder is missing: give a policy's folder or a dataset of experiments/collect.py.")
    return given


if __name__ == "__main__":
    run_main(main)
