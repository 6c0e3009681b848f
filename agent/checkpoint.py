"""Checkpoint folders that are either whole or not there.

A folder is filled beside its final place under a name that starts with `.tmp-`, every file is synced to disk, a
`manifest.json` with the size and the SHA-256 sum of each file is added, and only then is the folder renamed, which
a file system does in one piece. A crash at any moment leaves the previous checkpoints as they were and at most one
`.tmp-` folder, which the next write removes. What is inside a checkpoint is its writer's business.

    {"format": 1, "files": {"model.safetensors": {"sha256": "9f86d0...", "bytes": 880472}, ...}}

One process writes into a folder of checkpoints. Files that the manifest does not name are not looked at.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from manako.agent.errors import TrainingError

MANIFEST = "manifest.json"
FORMAT = 1
TEMPORARY = ".tmp-"

_OLDER = "use an older checkpoint"


def write_folder(final_path: Path | str, writer: Callable[[Path], None]) -> None:
    """Lets `writer` fill a folder, and puts it at `final_path` once all of it is on disk.

    Args:
        final_path: must not exist; its parents are made.
        writer: is given an empty temporary folder beside `final_path`. If it raises, the folder is removed.

    Raises:
        TrainingError: `final_path` exists already, or the disk refused (full, read-only).
    """
    final_path = Path(final_path)
    temporary = final_path.with_name(TEMPORARY + final_path.name)
    _refuse_existing(final_path)
    try:
        final_path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final_path.parent)
        temporary.mkdir()
        writer(temporary)
        _seal(temporary, final_path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _disk_refused(final_path, error) from error
        raise


def finalize_folder(folder: Path | str, final_path: Path | str) -> None:
    """Puts a folder that something else has filled at `final_path`, as `write_folder` does.

    Args:
        folder: on the file system of `final_path`; it is moved, not copied.
        final_path: must not exist; its parents are made.

    Raises:
        TrainingError: `folder` is no folder, `final_path` exists already, or the disk refused.
    """
    folder, final_path = Path(folder), Path(final_path)
    if not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder: expected one that holds the files of {final_path.name}.")
    _refuse_existing(final_path)
    try:
        final_path.parent.mkdir(parents=True, exist_ok=True)
        _seal(folder, final_path)
        _remove_leftovers(final_path.parent)
    except OSError as error:
        raise _disk_refused(final_path, error) from error


def verify_folder(path: Path | str) -> None:
    """Reads every file of a checkpoint and compares it with the manifest.

    Args:
        path: a folder that `write_folder` or `finalize_folder` made.

    Raises:
        TrainingError: names the first file that is missing, cut short, longer or changed.
    """
    path = Path(path)
    for name, expected in _read_manifest(path).items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                what = "cut short" if size < expected["bytes"] else "longer than it was"
                raise TrainingError(
                    f"Checkpoint {path} is damaged: {name} is {what}, {size} bytes where {expected['bytes']} were "
                    f"written; {_OLDER}."
                )
            if _sha256(file) != expected["sha256"]:
                raise TrainingError(
                    f"Checkpoint {path} is damaged: {name} has changed since it was written (its SHA-256 sum is "
                    f"another); {_OLDER}."
                )
        except FileNotFoundError:
            raise TrainingError(f"Checkpoint {path} is damaged: {name} is missing; {_OLDER}.") from None
        except OSError as error:
            raise TrainingError(f"Checkpoint {path}: {name} cannot be read ({error}); {_OLDER}.") from error


def latest_checkpoint(run_dir: Path | str) -> Path | None:
    """Returns the whole checkpoint of the highest iteration in `run_dir`/checkpoints/checkpoint-<iteration>.

    Damaged ones are passed over with a warning that names the fault.

    Args:
        run_dir: a run folder.

    Returns:
        The folder, verified, or None where there is no whole one.
    """
    found = [
        (int(match[1]), path)
        for path in Path(run_dir).glob("checkpoints/checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    for _, path in sorted(found, reverse=True):
        try:
            verify_folder(path)
        except TrainingError as error:
            warnings.warn(f"Passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def _refuse_existing(final_path: Path) -> None:
    if os.path.lexists(final_path):
        raise TrainingError(
            f"{final_path} exists already: a checkpoint is never overwritten, so remove it or choose another run."
        )


def _disk_refused(final_path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{final_path} could not be written ({error}): expected a writable disk with room for it; the checkpoints "
        "before it are untouched, so make room and resume from the last one."
    )


def _remove_leftovers(parent: Path) -> None:
    for leftover in parent.glob(TEMPORARY + "*"):
        shutil.rmtree(leftover)


def _seal(folder: Path, final_path: Path) -> None:
    """Syncs the files, adds the manifest, renames; what a crash leaves is `folder` or `final_path`, whole."""
    if (folder / MANIFEST).exists():
        raise TrainingError(f"{folder / MANIFEST} exists already: expected a folder without one, it is written here.")
    contents = sorted(folder.rglob("*"))
    files = [path for path in contents if path.is_file()]
    links = [path for path in contents if path.is_symlink()]
    if links:
        raise TrainingError(f"{links[0]} is a link: expected files, so copy what it points to.")
    manifest = {
        "format": FORMAT,
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in files
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in contents if path.is_dir()), folder]:
        _sync(path)
    _refuse_existing(final_path)  # made by someone else while the writer worked
    os.replace(folder, final_path)
    _sync(final_path.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, dict]:
    """File name -> {"sha256", "bytes"}, checked for its form."""
    if not path.is_dir():
        raise TrainingError(f"Checkpoint {path} is not a folder: expected one with a {MANIFEST}; look at the path.")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise TrainingError(f"Checkpoint {path} is damaged: {MANIFEST} is missing; {_OLDER}.") from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"Checkpoint {path} is damaged: {MANIFEST} cannot be read ({error}); {_OLDER}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TrainingError(
            f"Checkpoint {path}: {MANIFEST} is not of format {FORMAT}: expected one written by this version; {_OLDER}."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, entry in files.items()
    ):
        raise TrainingError(
            f"Checkpoint {path} is damaged: {MANIFEST} does not list files with their sha256 and bytes; {_OLDER}."
        )
    return files
