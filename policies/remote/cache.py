"""Answers on disk, one file a request, so that nothing is paid twice and a run goes on where it stopped.

A file is named by the SHA-256 of all that decides the answer: the server's address, the model, the messages with the
frame's PNG bytes, the parameters, and of a sampled answer the number drawn for it. The key is no part of it.
"""

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from manako.bounded import from_json, read_text

log = logging.getLogger("manako.remote")


class AnswerCache:
    """A folder of answers.

    Args:
        folder: where; it is made when the first one is written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @staticmethod
    def name(url: str, body: dict[str, Any]) -> str:
        """Returns the hexadecimal digest of a request."""
        text = json.dumps({"url": url, "request": body}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, name: str) -> Any | None:
        """Returns what was written under a name; None where nothing is, or a damaged file, which a warning names."""
        file = self._file(name)
        try:
            return from_json(read_text(file))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("warning: %s is damaged (%s): its request is sent again", file, type(error).__name__)
            return None

    def write(self, name: str, content: Any) -> None:
        """Writes a file that is whole or not there."""
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        temporary.replace(file)

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
