"""Is Ray's head still there? Asked from beside, since Ray itself waits for a minute, and then ends the process.

Once the head is lost, Ray's own calls hang: what then ends a run asks `lost()` first, and leaves the rest alone. The
processes of a cluster of our own are ended here, with those that their parents left behind.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from typing import Any

import psutil

EVERY = 1.0  # seconds between two looks
PATIENCE = 10.0  # seconds that the head of another's cluster may not answer

_watch: "HeadWatch | None" = None


def lost() -> str | None:
    """Returns what is gone, in words; None while Ray's head answers, or where there is none."""
    return None if _watch is None else _watch.lost


class HeadWatch:
    """Looks at the head of the cluster that this process is connected to, for the length of a block.

    Args:
        own: whether the cluster is of our own, so that its processes are this one's children.
    """

    def __init__(self, own: bool) -> None:
        from ray._private import worker

        self.own = own
        self.lost: str | None = None
        node: Any = worker._global_node
        self._processes = {
            name: info.process for name, infos in (node.all_processes if own else {}).items() for info in infos
        }
        host, _, port = str(node.gcs_address).rpartition(":")
        self._address = host.strip("[]"), int(port)
        self._family: set[psutil.Process] = (
            set()
        )  # descendants that were seen; each is told from a later one of its pid
        self._answered = time.monotonic()
        self._stop = threading.Event()

    def __enter__(self) -> "HeadWatch":
        global _watch
        _watch = self
        threading.Thread(target=self._look, name="ray head watch", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        global _watch
        self._stop.set()
        if self.lost is not None:
            self._clear()
        _watch = None

    def _look(self) -> None:
        while not self._stop.wait(EVERY) and self.lost is None:
            if self.own:
                self._see_family()
                dead = [name for name in ("gcs_server", "raylet") if self._is_dead(name)]
                if dead:
                    self.lost = f"its {' and '.join(dead)} has ended"
            elif self._answers():
                self._answered = time.monotonic()
            elif time.monotonic() - self._answered > PATIENCE:
                self.lost = f"{self._address[0]}:{self._address[1]} has not answered for {PATIENCE:g} s"

    def _see_family(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._family |= set(psutil.Process().children(recursive=True))

    def _is_dead(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is not None

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=3).close()
        except OSError:
            return False
        return True

    def _clear(self) -> None:
        """Ends what is left of a cluster of our own, and this process before Ray's own ending, which would hang."""
        if self.own:
            self._see_family()
            for process in self._family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        atexit.register(_leave)  # the last one to be registered is the first one to be called


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)
