"""A chat API on this machine, answering as it is told: faults can be scripted, and all that came is kept.

`ChatServer(answer)` calls `answer(body)` for each request, one after another, with the JSON that came; what that
returns is sent:

    "up"                        an answer in text
    {...}                       the whole JSON of a response
    Fault(status, text, ...)    another status, headers, a body that is no JSON, a cut or a slow one
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """Anything but a proper answer."""

    status: int = 200
    text: str = ""
    headers: dict[str, str] = {}
    cut: bool = False  # the connection ends before the text does
    seconds: float = 0.0  # before anything is sent


def completion(text: str | None, tokens: tuple[int, int] | None = (100, 1), **choice: Any) -> dict[str, Any]:
    """A response of the API; `choice` replaces parts of its one choice."""
    message = {"role": "assistant", "content": text}
    made: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
    }
    if tokens is not None:
        made["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return made


def letters(top: dict[str, float], tokens: tuple[int, int] = (100, 1)) -> dict[str, Any]:
    """A response whose first token has these likeliest ones, with their log-probabilities."""
    listed = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top.items()]
    first = max(top, key=lambda token: top[token])
    content = [{"token": first, "logprob": top[first], "bytes": None, "top_logprobs": listed}]
    return completion(first, tokens, logprobs={"content": content}, finish_reason="length")


class ChatServer:
    """A server in threads of this process; `with ChatServer(...) as server`.

    Attributes:
        url: for --remote_url.
        bodies: what came, in order.
        keys: the Authorization headers that came.
        most_at_once: requests that were under way together.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.bodies.append(body)
                    owner.keys.append(self.headers["Authorization"])
                    owner._now += 1
                    owner.most_at_once = max(owner.most_at_once, owner._now)
                    answered = owner.answer(body)
                try:
                    self._send(answered)
                finally:
                    with owner._lock:
                        owner._now -= 1

            def _send(self, answered: Any) -> None:
                if isinstance(answered, str):
                    answered = completion(answered)
                if isinstance(answered, dict):
                    answered = Fault(text=json.dumps(answered), headers={"Content-Type": "application/json"})
                time.sleep(answered.seconds)
                data = answered.text.encode()
                self.send_response(answered.status)
                for name, value in answered.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) + (50 if answered.cut else 0)))
                self.end_headers()
                self.wfile.write(data)
                if answered.cut:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # a client that no longer waits
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
