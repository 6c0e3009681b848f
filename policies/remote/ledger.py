"""What a run has spent and may still spend, in one file that threads and processes share.

A request is booked before it is sent, at the most that it can cost, and corrected once its answer tells what it did
cost; so however many are under way, requests and dollars stay within the budget. Amounts are whole picodollars: a price
of 0.15 dollars for a million tokens is 150,000 of them a token, and nothing is rounded. The file stays, as the run's
account.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manako.policies.remote.errors import RemoteError
from manako.policies.remote.settings import RemoteSettings

DOLLAR = 10**12  # picodollars
EMPTY = {"requests": 0, "cached": 0, "spent": 0, "booked": 0, "prompt_tokens": 0, "completion_tokens": 0}


class Ledger:
    """The budget of one run.

    Args:
        settings: with limits and prices.
        file: of the account; None starts a new one in the cache's folder.

    Raises:
        RemoteError: the account of the run is not there.
    """

    def __init__(self, settings: RemoteSettings, file: Path | None = None) -> None:
        self.settings = settings
        if file is None:
            folder = Path(settings.remote_cache) / "accounts"
            file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{os.urandom(4).hex()}.json"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(EMPTY), encoding="utf-8")
            except OSError as error:
                raise RemoteError(
                    f"--remote_cache {settings.remote_cache!r} cannot be written to ({error.strerror}): give a folder "
                    "that can."
                ) from error
        elif not file.is_file():
            raise RemoteError(
                f"The run's account {str(file)!r} is not on this machine, so its budget cannot be kept here: expected "
                "--remote_cache with a folder that all rollout workers see."
            )
        self.file = file

    def price(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Returns the picodollars of so many tokens; 0 where no prices are given."""
        paid = zip(
            (prompt_tokens, completion_tokens),
            (self.settings.remote_input_price, self.settings.remote_output_price),
            strict=True,
        )
        return sum(tokens * round((price or 0.0) * DOLLAR / 1e6) for tokens, price in paid)

    def book(self, most: int) -> None:
        """Counts a request, and sets aside the most that it can cost; waits while others may still turn out cheaper.

        Raises:
            RemoteError: the budget is used up.
        """
        until = time.monotonic() + 2 * self.settings.remote_timeout  # of a process that died nothing comes back
        while True:
            with self._open() as account:
                self._check(account, most, time.monotonic() > until)
                if self._fits(account, most):
                    account["requests"] += 1
                    account["booked"] += most
                    return
            time.sleep(0.02)

    def settle(self, most: int, cost: int, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Puts what a request did cost in place of what was set aside for it."""
        with self._open() as account:
            account["booked"] -= most
            account["spent"] += cost
            account["prompt_tokens"] += prompt_tokens
            account["completion_tokens"] += completion_tokens

    def count_cached(self) -> None:
        """Counts an answer that was there."""
        with self._open() as account:
            account["cached"] += 1

    def read(self) -> dict[str, int]:
        """Returns the account."""
        with self._open() as account:
            return dict(account)

    def in_words(self) -> str:
        """Returns what was asked, for a line of text."""
        account = self.read()
        words = f"{account['requests']:,} requests, {account['cached']:,} answers out of the cache"
        tokens = f"{account['prompt_tokens']:,} + {account['completion_tokens']:,} tokens"
        priced = self.settings.remote_input_price is not None or self.settings.remote_output_price is not None
        return f"{words}, {tokens}" + (f", ${account['spent'] / DOLLAR:.4f}" if priced else "")

    def _check(self, account: dict[str, int], most: int, waited: bool) -> None:
        """Raises where nothing that is under way could make room."""
        limit, cost = self.settings.remote_requests, self.settings.remote_cost
        spent = f"${account['spent'] / DOLLAR:.4f} are spent"
        if limit is not None and account["requests"] >= limit:
            raise RemoteError(f"The budget of --remote_requests {limit:,} is used up ({spent}).")
        if cost is not None and (account["spent"] + most > round(cost * DOLLAR) or waited):
            raise RemoteError(
                f"The budget of --remote_cost {cost:g} is used up: {spent} in {account['requests']:,} requests, and "
                f"the next may cost ${most / DOLLAR:.4f}."
            )

    def _fits(self, account: dict[str, int], most: int) -> bool:
        cost = self.settings.remote_cost
        return cost is None or account["spent"] + account["booked"] + most <= round(cost * DOLLAR)

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """The account, locked against all others; what is changed is written."""
        with self.file.open("r+", encoding="utf-8") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            before = opened.read()
            account = json.loads(before)
            yield account
            after = json.dumps(account)
            if after != before:
                opened.seek(0)
                opened.write(after)
                opened.truncate()
