"""Requests to a chat API: several at a time, sent again after faults that pass, paid within the budget, kept on disk.

The library `openai` speaks to the server; its own retries are off, since each attempt is a request of the budget. What
a server does not know (logprobs, a seed, a temperature, one of the two names for the longest answer) is left out from
then on, and that is kept beside its answers. The key is read from the environment when it is used; it is taken out of
everything that a server says before that is kept or shown, and no exception of the library leaves this file.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from manako.errors import full_text
from manako.policies.remote.cache import AnswerCache
from manako.policies.remote.errors import RemoteError
from manako.policies.remote.ledger import Ledger
from manako.policies.remote.settings import RemoteSettings

log = logging.getLogger("manako.remote")
TOP_LOGPROBS = 20  # the most that the API gives
MESSAGE_TOKENS = 32  # more than a chat format puts around a message
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not waited for
FIRST_WAIT, WAIT_LIMIT = 0.5, 30.0  # seconds between attempts, doubled each time
LIMITS = ("max_completion_tokens", "max_tokens")  # two names of one parameter, which no server is sure to know
DEFAULT_KEY = "OPENAI_API_KEY"
OPENAI = "api.openai.com"
SHORTEST_KEY = 6  # characters; what is shorter, such as a local server's "none", is no secret
CAN_DO_WITHOUT = ("logprobs", "seed", "temperature")  # parameters of a request


@dataclass(frozen=True)
class Request:
    """What is asked.

    Args:
        messages: of the chat, with the frame as a data URL.
        most_tokens: of the answer.
        temperature: of its sampling.
        image_tokens: most tokens that the server may count for the frame.
        seed: number of the draw, for a sampled answer.
        logprobs: ask for the likeliest first tokens.
    """

    messages: list[dict[str, Any]]
    most_tokens: int
    temperature: float
    image_tokens: int
    seed: int | None = None
    logprobs: bool = False


class Reply(NamedTuple):
    """What a model said.

    Attributes:
        text: its answer.
        is_cut: it was cut off at its longest length.
        is_refused: the model declined, or a filter took the answer away.
        top: of the first token: (token, log-probability); None where they were not asked for.
    """

    text: str
    is_cut: bool
    is_refused: bool
    top: list[tuple[str, float]] | None


class _Fault(NamedTuple):
    """An attempt without an answer."""

    text: str
    passes: bool = False  # worth another attempt
    is_paid: bool = True  # perhaps
    wait: float | None = None  # seconds, as the server asks
    refuses: bool = False  # the request as it was put


class RemoteClient:
    """Asks one model of one server.

    Args:
        settings: which, how, and at what cost.
        ledger: the run's account.

    Raises:
        RemoteError: settings that cannot be used, or `openai` is not installed.
    """

    def __init__(self, settings: RemoteSettings, ledger: Ledger) -> None:
        check_settings(settings)
        try:
            import openai  # noqa: F401
        except ImportError:
            raise RemoteError(
                "A remote policy needs the package openai, which is not installed: pip install -e '.[remote]'."
            ) from None
        self.settings, self.ledger = settings, ledger
        self.cache = AnswerCache(settings.remote_cache)
        self.url = settings.remote_url.rstrip("/")
        self.host = urlsplit(self.url).netloc
        self._about = self.cache.name(self.url, {"model": settings.remote_model})  # what this server does not know
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.without: set[str] = set(self.cache.read(self._about) or ())
        self._openai: Any = None

    @property
    def gives_logprobs(self) -> bool:
        """Whether it is not known that the server gives none."""
        return "logprobs" not in self.without

    def most_cost(self, request: Request) -> int:
        """Returns the most that a request can cost, in picodollars: a token has at least a byte."""
        return self.ledger.price(_most_prompt_tokens(request), request.most_tokens)

    def ask_all(self, requests: Sequence[Request]) -> list[Reply | None]:
        """Returns the replies, equal requests asked once; None where logprobs were asked of a server without them.

        After an error no further request is begun; those that are under way come to their end and are kept.

        Raises:
            RemoteError: the budget is used up, or the server gives no answer.
        """
        names = [self.cache.name(self.url, self._body(request)) for request in requests]
        distinct = {name: request for name, request in zip(names, requests, strict=True)}
        self._stop.clear()
        futures: dict[str, Future[Reply | None]] = {}
        pool = ThreadPoolExecutor(min(self.settings.remote_concurrency, len(distinct) or 1))
        try:
            futures |= {name: pool.submit(self._ask, request) for name, request in distinct.items()}
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            failed = [f for f in futures.values() if f.done() and not f.cancelled() and f.exception() is not None]
            if failed or not all(future.done() for future in futures.values()):
                self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failed:
            raise failed[0].exception()  # type: ignore[misc]
        return [futures[name].result() for name in names]

    def redacted(self, value: Any) -> Any:
        """Returns a text, or the texts in a JSON value, without the key."""
        if isinstance(value, dict):
            return {self.redacted(name): self.redacted(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.redacted(each) for each in value]
        key = self._key()
        if not isinstance(value, str) or len(key) < SHORTEST_KEY:
            return value
        for form in (key, json.dumps(key)[1:-1], key.replace("/", "\\/")):
            value = value.replace(form, "<key>")
        return value

    # ---- one request ---------------------------------------------------------------------------------------------

    def _ask(self, request: Request) -> Reply | None:
        """The reply out of the cache or of the server."""
        attempts = 0
        while True:
            if request.logprobs and not self.gives_logprobs:
                return None
            body = self._body(request)
            name = self.cache.name(self.url, body)
            kept = self.cache.read(name)
            reply = None if kept is None else _read(kept, request.logprobs)
            if isinstance(reply, Reply):
                self.ledger.count_cached()
                return reply
            if kept is not None:
                log.warning("warning: the cached answer %s holds no answer: its request is sent again", name)
            if self._stop.is_set():
                raise RemoteError("Stopped.")
            sent = {part: value for part, value in body.items() if part != "seed" or "seed" not in self.without}
            answered = self._attempt(name, sent, request)
            if isinstance(answered, Reply):
                return answered
            if answered.refuses and self._do_without(sent, answered.text):
                continue
            attempts += 1
            self._wait_or_raise(answered, attempts)

    def _attempt(self, name: str, body: dict[str, Any], request: Request) -> Reply | _Fault:
        """Sends a request once, pays for it and keeps its answer."""
        most = self.most_cost(request)
        self.ledger.book(most)
        sent = self._send(body)
        if isinstance(sent, _Fault):
            self.ledger.settle(most, most if sent.is_paid else 0)
            return sent
        reply = _read(sent, request.logprobs)
        counted = _usage(sent)
        if isinstance(reply, Reply):
            self.cache.write(name, sent)
        if counted is None:
            self.ledger.settle(most, most)
        else:
            self.ledger.settle(most, self.ledger.price(*counted), *counted)
            self._check_bound(request, *counted)
        return reply

    def _send(self, body: dict[str, Any]) -> dict[str, Any] | _Fault:
        """What the server sent, or what went wrong; no exception of the library gets out."""
        import openai

        try:
            answer = self._client().chat.completions.with_raw_response.create(**body)
            text, status = answer.http_response.text, answer.http_response.status_code
        except openai.APIStatusError as error:
            return self._status_fault(error.response)
        except openai.APITimeoutError:
            return _Fault(f"no answer in {self.settings.remote_timeout:g} s", passes=True)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return _Fault(self._quoted(f"{type(cause).__name__}: {full_text(cause)}"), passes=True)
        except Exception as error:  # whatever the library makes of bytes that are no answer
            return _Fault(self._quoted(f"{type(error).__name__}: {full_text(error)}"), passes=True)
        try:
            value = self.redacted(json.loads(text))
        except (ValueError, RecursionError):
            return _Fault(f"status {status} without JSON: {self._quoted(text)}", passes=True)
        return value if isinstance(value, dict) else _Fault(f"JSON, but no object: {self._quoted(text)}", passes=True)

    def _status_fault(self, response: Any) -> _Fault:
        """What a status other than 200 means."""
        status, text = response.status_code, self._quoted(response.text)
        if status == 401:
            return _Fault(
                f"refuses the key in {self.settings.remote_key} (401: {text}): expected a valid one in that variable",
                is_paid=False,
            )
        if status in (403, 404):
            return _Fault(
                f"answers {status} ({text}): expected a model that this key may use, and an address with "
                "/chat/completions below it; look at --remote_model and --remote_url",
                is_paid=False,
            )
        if status == 429 and "insufficient_quota" in text:
            return _Fault(f"says that the account has no more quota ({text})", is_paid=False)
        if status in (408, 409, 429) or status >= 500:
            asked = _retry_after(response.headers)
            return _Fault(f"answers {status} ({text})", passes=True, is_paid=status >= 500, wait=asked)
        return _Fault(f"refuses the request ({status}: {text})", is_paid=False, refuses=True)

    def _do_without(self, sent: dict[str, Any], text: str) -> bool:
        """Leaves out what a refusal names; False where it names nothing that can be left out."""
        with self._lock:
            if any(name in self.without and name in sent for name in (*CAN_DO_WITHOUT, *LIMITS)):
                return True  # another thread has learned it while this request was under way
            limits = () if set(LIMITS) & self.without else LIMITS  # a server without either name takes neither
            refused = next((name for name in (*CAN_DO_WITHOUT, *limits) if name in sent and name in text), None)
            if refused is None:
                return False
            self.without.add(refused)
            self.cache.write(self._about, sorted(self.without))
            instead = "; its answers are read as text" if refused == "logprobs" else ""
            log.warning("note: %s is asked without %s: it %s%s", self.host, refused, text, instead)
            return True

    def _wait_or_raise(self, fault: _Fault, attempts: int) -> None:
        """Waits before another attempt.

        Raises:
            RemoteError: there is none.
        """
        if not fault.passes:
            raise RemoteError(f"The server {self.host} {fault.text}.")
        if attempts > self.settings.remote_retries:
            raise RemoteError(
                f"The server {self.host} gave no answer in {attempts} attempts, the last time: {fault.text}; look at "
                "it, or give more --remote_retries or a longer --remote_timeout."
            )
        backoff = min(FIRST_WAIT * 2 ** (attempts - 1), WAIT_LIMIT) * random.uniform(0.75, 1.25)
        seconds = backoff if fault.wait is None else fault.wait
        if seconds > LONGEST_WAIT:
            raise RemoteError(f"The server {self.host} asks to wait for {seconds:,.0f} s: {fault.text}.")
        if self._stop.wait(seconds):
            raise RemoteError("Stopped.")

    def _check_bound(self, request: Request, prompt_tokens: int, completion_tokens: int) -> None:
        """Raises where the server counts more than was set aside: then the budget of dollars would not hold."""
        if self.settings.remote_cost is None:
            return
        most = _most_prompt_tokens(request)
        if prompt_tokens > most:
            needed = request.image_tokens + prompt_tokens - most
            raise RemoteError(
                f"The server {self.host} counted {prompt_tokens:,} tokens of a prompt where at most {most:,} were "
                f"expected, so --remote_cost cannot be kept: give --remote_image_tokens {needed} or more."
            )
        if completion_tokens > request.most_tokens:
            raise RemoteError(
                f"The server {self.host} counted {completion_tokens:,} tokens of an answer where {request.most_tokens} "
                "were asked for, so --remote_cost cannot be kept: use another server, or leave it out."
            )

    # ---- what is sent --------------------------------------------------------------------------------------------

    def _body(self, request: Request) -> dict[str, Any]:
        """The request as this server takes it; a seed stays where it takes none, as the number of the draw."""
        body: dict[str, Any] = {"model": self.settings.remote_model, "messages": request.messages}
        first, second = LIMITS if self.host == OPENAI else LIMITS[::-1]
        body[second if first in self.without else first] = request.most_tokens
        if "temperature" not in self.without:
            body["temperature"] = request.temperature
        if request.seed is not None:
            body["seed"] = request.seed
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body

    def _client(self) -> Any:
        import openai

        with self._lock:
            if self._openai is None:
                self._openai = openai.OpenAI(
                    base_url=self.url,
                    api_key=self._key() or "none",
                    max_retries=0,
                    timeout=self.settings.remote_timeout,
                )
            return self._openai

    def _key(self) -> str:
        return os.environ.get(self.settings.remote_key, "")

    def _quoted(self, text: str) -> str:
        """What a server said, in one line, without the key and not too long."""
        try:
            text = json.dumps(self.redacted(json.loads(text)), ensure_ascii=False)
        except (ValueError, RecursionError):
            text = self.redacted(text)
        return " ".join(text.split())[:300] or "nothing"


def check_settings(settings: RemoteSettings) -> None:
    """Checks what must hold before anything is asked.

    Raises:
        RemoteError: no model, an address that is none, a key where its variable's name belongs, no key where one is
            needed, or a budget of dollars without prices.
    """
    if not settings.remote_model:
        raise RemoteError("--remote_model is missing: give the server's name of the model, such as gpt-4o-mini.")
    if not settings.remote_key.isidentifier() or settings.remote_key.startswith("sk"):
        raise RemoteError(
            f"--remote_key names no environment variable: expected a name such as {DEFAULT_KEY}; the key itself stands "
            "in that variable, never on a command line."
        )
    parts = urlsplit(settings.remote_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in settings.remote_url:
        raise RemoteError(
            "--remote_url is no plain address: expected http or https, a host and a path, without a name, password or "
            "query, such as http://localhost:8000/v1."
        )
    if not os.environ.get(settings.remote_key) and (settings.remote_key != DEFAULT_KEY or parts.hostname == OPENAI):
        named = DEFAULT_KEY if settings.remote_key == DEFAULT_KEY else "that --remote_key names"
        raise RemoteError(f"The environment variable {named} is not set: expected the server's key in it.")
    priced = settings.remote_input_price is not None and settings.remote_output_price is not None
    if settings.remote_cost is not None and not priced:
        raise RemoteError(
            f"--remote_cost is {settings.remote_cost:g}, and the price of {settings.remote_model} is not known: give "
            "--remote_input_price and --remote_output_price in US dollars for a million tokens."
        )


def _most_prompt_tokens(request: Request) -> int:
    """An upper bound: each token of a text stands for a byte or more."""
    texts = [
        part["text"]
        for message in request.messages
        for part in (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        if part["type"] == "text"
    ]
    return sum(len(text.encode()) for text in texts) + MESSAGE_TOKENS * len(request.messages) + request.image_tokens


def _read(sent: Any, logprobs: bool) -> Reply | _Fault:
    """The reply in a response of the API; a fault where it is none."""
    try:
        choice = sent["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content") or ""
        refusal = message.get("refusal") or ""
        assert isinstance(text, str) and isinstance(refusal, str)
        refused = bool(refusal) or reason == "content_filter"
        if not logprobs or refused:
            return Reply(refusal or text, reason == "length", refused, None)
        content = (choice.get("logprobs") or {}).get("content")
        if not content:
            return _Fault("gives no logprobs with its answer", refuses=True)
        top = [(str(each["token"]), float(each["logprob"])) for each in content[0]["top_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError):
        return _Fault(f"JSON without an answer: {json.dumps(sent)[:200]}", passes=True)
    return Reply(text, False, False, top)


def _usage(sent: dict[str, Any]) -> tuple[int, int] | None:
    """Tokens of prompt and answer as the server counts them; None where it does not."""
    usage: Any = sent.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int) and isinstance(answer, int) and prompt >= 0 and answer >= 0:
        return prompt, answer
    return None


def _retry_after(headers: Any) -> float | None:
    """The seconds that a server asks to wait for, given in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None
