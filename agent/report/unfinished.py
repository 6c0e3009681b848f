"""Where an evaluation is, on disk, so that one that is stopped goes on where it was: no episode is played twice.

Kept are the finished rows, and of the row under way its episodes' results, its chance, and the environments' state: the
episodes that are being played come back by their actions. So the result is that of an evaluation that nobody stopped.
A file of another evaluation (another policy, environment, number of episodes ...) is not read, and is written anew.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from manako.policies.interface import Policy

SECONDS = 10.0  # between two writings


class Unfinished:
    """The file of one evaluation.

    Args:
        file: its place.
        identity: what makes it this evaluation and no other, as JSON.
        stop: says whether the evaluation is to stop, asked before each step.

    Attributes:
        rows: those that are done, by their condition.
        found: whether there was something to go on with.
    """

    def __init__(self, file: Path, identity: dict[str, Any], stop: Callable[[], bool] = lambda: False) -> None:
        self.file, self.stop = file, stop
        self.identity = json.loads(json.dumps(identity))
        self.rows: dict[str, Any] = {}
        self._row: str | None = None
        self._state: dict[str, Any] | None = None
        self._written = time.monotonic()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        self.found = isinstance(content, dict) and content.get("identity") == self.identity
        if self.found:
            self.rows, self._row, self._state = content["rows"], content["row"], content["state"]

    def state_of(self, row: str) -> dict[str, Any] | None:
        """Returns where a row was; None where it had not begun."""
        return self._state if self._row == row else None

    def at(self, row: str, state: Callable[[], dict[str, Any]]) -> None:
        """Hears of each step, and writes where the row is: by the clock, and when it is to stop.

        Raises:
            KeyboardInterrupt: it is to stop.
        """
        stops = self.stop()
        if stops or time.monotonic() - self._written >= SECONDS:
            self._row, self._state = row, state()
            self._write()
        if stops:
            raise KeyboardInterrupt

    def done(self, row: str, result: Any) -> None:
        """Keeps a row that is done."""
        self.rows[row], self._row, self._state = result, None, None
        self._write()

    def end(self) -> None:
        """Removes the file: the results are elsewhere."""
        self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"identity": self.identity, "rows": self.rows, "row": self._row, "state": self._state}
        temporary = self.file.with_name(self.file.name + ".tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, self.file)
        self._written = time.monotonic()


def policy_digest(policy: Policy) -> str:
    """Returns a digest of all weights, by which two policies are told apart."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in policy.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
