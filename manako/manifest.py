"""Manifests: what files a folder of ours holds, each with its size and SHA-256 sum, looked at before any is read.

    {"format": 1, "files": {"model.safetensors": {"sha256": "9f86d0...", "bytes": 880472}, ...}}

`manifest.json` lies in checkpoints, in final/ and every other folder of `save_policy`, and in trajectories. A folder
that is read is compared with it as a whole: files that are missing, cut short or changed are faults, and so are files
that it does not name, since a library would read them, too. Hidden files, pictures and texts for people are nobody's
input (what the Hub's client and a desktop put beside a download), and folders of which it names no file are others'.
A README.md is left out of it, so that it can be completed and edited.
Nothing outside the folder is opened, whatever a manifest or a link says; only the Hub's own cache, whose files are
links, is followed to where it keeps them.

Each file is hashed once a process: its sum is kept while size, times and inode are the same.
"""

import hashlib
import json
import os
import shlex
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from manako.errors import first_line

MANIFEST = "manifest.json"
CARD = "README.md"  # of a model: for people alone, written again when it is known how good the model is
FORMAT = 1
FOR_PEOPLE = (".md", ".png", ".gif", ".jpg")  # files that nothing of ours and no library reads
READ_IN_FOLDER = "additional_chat_templates"  # the one folder in a model's that a library looks into
LARGEST = 64 * 2**20  # bytes of a manifest
RACY = 2 * 10**9  # nanoseconds: a file that is younger could change without another time

_sums: dict[tuple[Any, ...], str] = {}


def write_manifest(folder: Path, trusted: bool = False, deep: bool = True) -> list[Path]:
    """Writes the manifest of the files in a folder, in place of one that is there.

    Args:
        folder: filled.
        deep: with those of the folders in it; else these are somebody else's, such as a trainer's checkpoints.
        trusted: what a manifest there says of files that are older than it is believed and not hashed again: the same
            process has just written both.

    Returns:
        The files, the manifest last.

    Raises:
        OSError: the disk refuses.
        ValueError: something in the folder is no file, or there is a manifest.json that is none; in one sentence.
    """
    file = folder / MANIFEST
    contents = sorted(path for path in (folder.rglob("*") if deep else folder.iterdir()) if path != file)
    for path in contents:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            kind = "a link" if path.is_symlink() else "no file"
            raise ValueError(f"{path} is {kind}: expected files, so copy what it points to.")
    files = [path for path in contents if path.is_file()]
    known, since = _written_before(folder) if trusted and os.path.lexists(file) else ({}, 0)
    entries = {}
    for path in files:
        name, about = path.relative_to(folder).as_posix(), path.stat()
        if name == CARD:
            continue
        believed = known.get(name, {}).get("bytes") == about.st_size and about.st_mtime_ns <= since
        entries[name] = known[name] if believed else {"sha256": sha256(path), "bytes": about.st_size}
    temporary = file.with_name(f".{MANIFEST}.tmp")
    temporary.write_text(_text({"format": FORMAT, "files": entries}), encoding="utf-8")
    temporary.replace(file)
    return [*files, file]


def _written_before(folder: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a manifest that is there, and when it was written."""
    try:
        return _read(folder), (folder / MANIFEST).stat().st_mtime_ns
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / MANIFEST} exists already: expected a folder without one, it is written here."
        ) from error


def is_manifest(folder: Path) -> bool:
    """Says whether there is a manifest.json in this form; other programs have files of that name."""
    try:
        return bool(_read(folder))
    except (OSError, ValueError, RecursionError):
        return False


def is_sealed(folder: Path, name: str) -> bool:
    """Says whether a folder's manifest holds the sum of that file, so that it may not change."""
    try:
        return name in _read(folder)
    except (OSError, ValueError, RecursionError):
        return False


def fault(folder: Path, needed: Iterable[str] = ()) -> str | None:
    """Returns what is wrong with a folder in words, None where it is as its manifest says.

    Args:
        folder: of a manifest.
        needed: names of files that have to be there, whatever the manifest says; `a|b` is one of the two.
    """
    return next(faults(folder, needed), None)


def faults(folder: Path, needed: Iterable[str] = ()) -> Iterator[str]:
    """Yields all that `fault` can find, the first one first."""
    try:
        entries = _read(folder)
    except FileNotFoundError:
        yield f"{MANIFEST} is missing"
        return
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        yield f"{MANIFEST} cannot be read ({first_line(error)})"
        return
    except ValueError as error:
        yield str(error)
        return
    for name, entry in entries.items():
        try:
            found = _fault_of(folder, name, entry)
        except FileNotFoundError:
            found = f"{name} is missing"
        except OSError as error:
            found = f"{name} cannot be read ({error.strerror or error})"
        if found:
            yield found
    for names in needed:
        if not any(name in entries for name in names.split("|")):
            yield f"{MANIFEST} does not name {names.replace('|', ' or ')}, which has to be there"
    within = {READ_IN_FOLDER, *(name.split("/")[0] for name in entries if "/" in name)}
    for name in sorted(_held(folder) - {MANIFEST, *entries}):
        if "/" in name and name.split("/")[0] not in within:
            continue  # in a folder of somebody else's
        yield f"{name} is there, which {MANIFEST} does not name"


def seal_command(folder: Path) -> str:
    """Returns the command by which a person says that a folder is as it should be."""
    return shlex.join(["python", "experiments/seal_folder.py", "--folder", str(folder)])


def sha256(file: Path) -> str:
    """Returns the sum of a file, as `sha256sum` writes it."""
    about = file.stat()
    key = (os.path.realpath(file), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key in _sums:
        return _sums[key]
    before = time.time_ns()
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if max(about.st_mtime_ns, about.st_ctime_ns) < before - RACY:
        _sums[key] = found
    return found


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"sha256", "bytes"}, checked for its form."""
    file = folder / MANIFEST
    about = file.stat()
    if not (_is_inside(file, folder) and stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST):
        raise ValueError(f"{MANIFEST} is no file of this folder, or larger than any of ours")
    text = file.read_bytes().decode("utf-8")
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is not of format {FORMAT}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(map(_is_entry, entries, entries.values())):
        raise ValueError(f"{MANIFEST} does not list files with their sha256 and bytes")
    if text != _text(manifest):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    return entries


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _is_entry(name: str, entry: Any) -> bool:
    inside = bool(name) and name == Path(name).as_posix() and ".." not in Path(name).parts and "\0" not in name
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("bytes")) is int
        and inside
        and name not in (".", MANIFEST)
        and not Path(name).is_absolute()
    )


def _fault_of(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    file = folder / name
    if not _is_inside(file, folder):
        return f"{name} is a link that leads out of the folder"
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        return f"{name} is no file"
    if about.st_size != entry["bytes"]:
        what = "cut short" if about.st_size < entry["bytes"] else "longer than it was"
        return f"{name} is {what}, {about.st_size} bytes where {entry['bytes']} were written"
    if sha256(file) != entry["sha256"]:
        return f"{name} has changed since it was written (its SHA-256 sum is another)"
    return None


def _is_inside(file: Path, folder: Path) -> bool:
    """Says whether a file lies in its folder, or where the Hub's cache keeps the files of such a folder."""
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")


def _held(folder: Path) -> set[str]:
    """What lies in a folder and could be read by someone, by its path from there."""
    found = set()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            if not name.startswith(".") and not name.lower().endswith(FOR_PEOPLE) and not name.startswith("LICENSE"):
                found.add((Path(place) / name).relative_to(folder).as_posix())
    return found
