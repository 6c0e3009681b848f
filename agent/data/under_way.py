"""Where a recording is, on disk, so that one that is stopped goes on where it was: no step is played twice.

    0.npz, 1.npz    the rollouts so far, in their order: arrays, and texts as JSON; no pickle
    state.json      what makes it this recording and no other, where the environments are after the last rollout, the
                    SHA-256 sums of the files that count, and of itself

A rollout is written once; state.json comes last. The episodes that are being played come back by their actions, so what
is recorded is what would have been without the stop. An expert that has made a plan plans anew.
"""

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manako.agent.checkpoint import disk_refused
from manako.agent.data.trajectories import NO_INPUTS
from manako.agent.errors import TrainingError
from manako.agent.interfaces import ToldFault
from manako.agent.png import Png, png_of
from manako.agent.rollout import Episode, Record, Rollout
from manako.errors import full_text
from manako.manifest import sha256
from manako.policies.interface import Rows

SECONDS = 120.0  # between two writings
STATE = "state.json"
TENSORS = ("logprobs", "mask", "values", "next_values", "rewards", "terminated", "truncated")
OF_RECORD = ("seeds", "steps", "success", "rewards", "expert_actions", "action_masks")  # tensors too
TEXTS = ("instructions", "thoughts", "expert_thoughts")


class UnderWay:
    """The folder of one recording.

    Args:
        folder: its place.
        identity: what it is of, as JSON.

    Attributes:
        rollouts: those so far, of former starts too.
        state: where the environments are after the last one that was written before this start; None for a new one.

    Raises:
        TrainingError: another recording lies there, or a damaged one.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.rollouts: list[Rollout] = []
        self.state: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None  # after the last rollout
        self._sums: list[str] = []  # of the rollouts' files
        self._when = time.monotonic()
        if folder.exists():
            self._read()

    def add(self, rollout: Rollout, state: dict[str, Any]) -> None:
        """Takes the next rollout, and where the environments are after it; writes by the clock."""
        self.rollouts.append(rollout)
        self._last = state
        if time.monotonic() - self._when >= SECONDS:
            self.write()

    def write(self) -> None:
        """Writes what is not written yet.

        Raises:
            DiskError: the disk refuses.
        """
        if self._last is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number in range(len(self._sums), len(self.rollouts)):
                place = self.folder / f"{number}.npz"
                with place.with_suffix(".tmp").open("wb") as file:
                    np.savez_compressed(file, **_packed(self.rollouts[number]))
                os.replace(place.with_suffix(".tmp"), place)
                self._sums.append(sha256(place))
            body = {"identity": self.identity, "env": self._last, "rollouts": self._sums}
            temporary = self.folder / f"{STATE}.tmp"
            temporary.write_text(json.dumps({**body, "sha256": _sum_of(body)}), encoding="utf-8")
            os.replace(temporary, self.folder / STATE)
        except OSError as error:
            raise disk_refused(self.folder, error) from error
        self._when = time.monotonic()

    @property
    def is_there(self) -> bool:
        """Whether there is something on disk to go on with."""
        return bool(self._sums)

    def end(self) -> None:
        """Removes the folder: what it held is elsewhere."""
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            file.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()

    def _read(self) -> None:
        try:
            body = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            if body.pop("sha256") != _sum_of(body):
                raise ValueError(f"{STATE} has changed since it was written")
            rollouts = []
            for number, expected in enumerate(body["rollouts"]):
                if sha256(self.folder / f"{number}.npz") != expected:
                    raise ValueError(f"{number}.npz has changed since it was written")
                with np.load(self.folder / f"{number}.npz", allow_pickle=False) as content:
                    rollouts.append(_unpacked({name: content[name] for name in content.files}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"{str(self.folder)!r} cannot be gone on with ({full_text(error)}): expected what a stopped "
                "recording has left, so remove it and begin anew, or give another --output."
            ) from error
        was, now = body["identity"], self.identity
        if was != now:
            other = next(name for name in {**was, **now} if was.get(name) != now.get(name))
            raise TrainingError(
                f"{str(self.folder)!r} is of a recording with other settings ({other} was {was.get(other)!r}, and is "
                f"{now.get(other)!r}): give them to go on with it, remove it, or give another --output."
            )
        self.rollouts, self._sums = rollouts, body["rollouts"]
        self.state = self._last = body["env"]


def _sum_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _packed(rollout: Rollout) -> dict[str, Any]:
    """What `to_dataset` reads of a rollout, as arrays by name."""
    record = rollout.record
    assert record is not None, "a recording keeps records"
    arrays = {name: getattr(rollout, name).numpy() for name in TENSORS}
    arrays |= {f"actions.{name}": column.numpy() for name, column in rollout.actions.columns.items()}
    arrays |= {f"record.{name}": of.numpy() for name in OF_RECORD if (of := getattr(record, name)) is not None}
    if rollout.failed is not None:
        arrays["failed"] = rollout.failed.numpy()
    last = sorted(record.last_images)
    files = [*map(png_of, record.images), *(png_of(record.last_images[place]) for place in last)]
    distinct = {file: number for number, file in enumerate(dict.fromkeys(files))}
    arrays |= {
        "record.to_env": record.to_env,
        "frames": np.frombuffer(b"".join(distinct), np.uint8),
        "frames.sizes": np.array([len(file) for file in distinct]),
        "frames.numbers": np.array([distinct[file] for file in files]),
    }
    said = {
        "texts": {name: getattr(record, name) for name in TEXTS},
        "last": last,
        "outcomes": rollout.outcomes,
        "fillers": rollout.actions.fillers,
        "episodes": [vars(episode) for episode in rollout.episodes],
        "faults": [fault._asdict() for fault in rollout.faults],
        "version": rollout.version,
        "seconds": rollout.seconds,
    }
    return {**arrays, "said": np.frombuffer(json.dumps(said).encode(), np.uint8)}


def _unpacked(arrays: dict[str, np.ndarray]) -> Rollout:
    said = json.loads(arrays["said"].tobytes())
    columns = {name[8:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("actions.")}
    tensors = {name: torch.from_numpy(arrays[name]) for name in TENSORS}
    ends = arrays["frames.sizes"].cumsum()[:-1]
    distinct = [Png(part.tobytes()) for part in np.split(arrays["frames"], ends)]
    files = [distinct[number] for number in arrays["frames.numbers"].tolist()]
    shown = len(files) - len(said["last"])
    of_record: dict[str, Any] = {
        name: torch.from_numpy(arrays[f"record.{name}"]) if f"record.{name}" in arrays else None for name in OF_RECORD
    }
    record = Record(
        to_env=arrays["record.to_env"],
        images=files[:shown],
        last_images={(t, slot): file for (t, slot), file in zip(said["last"], files[shown:], strict=True)},
        **of_record,
        **said["texts"],
    )
    return Rollout(
        inputs=NO_INPUTS,
        actions=Rows(columns, said["fillers"]),
        reference=None,
        bootstrap=NO_INPUTS,
        bootstrap_at=torch.zeros(0, 2, dtype=torch.long),
        episodes=[Episode(**episode) for episode in said["episodes"]],
        failed=torch.from_numpy(arrays["failed"]) if "failed" in arrays else None,
        faults=[ToldFault(**fault) for fault in said["faults"]],
        version=said["version"],
        seconds=said["seconds"],
        outcomes=said["outcomes"],
        record=record,
        **tensors,
    )
