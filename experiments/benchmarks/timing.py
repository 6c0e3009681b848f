"""Rates in turns, A B C A B C, compared within a round: what else the machine does then meets all of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Work = Callable[[], float]  # does something once and returns how many units it did


class Spread(NamedTuple):
    """Median and range over the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Returns median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(rates: dict[str, list[float]], of: str, to: str) -> Spread:
    """Returns the ratio of two rates within each round."""
    return spread([a / b for a, b in zip(rates[of], rates[to], strict=True)])


def rate(work: Work, seconds: float) -> float:
    """Returns units a second. A first run shorter than `seconds` only warms up; a longer one is the measurement."""
    start = time.perf_counter()
    units = work()
    took = time.perf_counter() - start
    if took >= seconds:
        return units / took
    units, start = 0.0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        units += work()
    return units / took


def in_turns(works: dict[str, Work], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Returns rates of each work, one a round; a round runs them one after the other."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            rates[name].append(rate(work, seconds))
    return rates


class Clocks(NamedTuple):
    """Two clocks, in seconds."""

    wall: float
    cpu: float  # of all threads of this process: hardly touched by what else the machine does


def clocks() -> Clocks:
    """Returns what they show now."""
    return Clocks(time.perf_counter(), time.process_time())


def since(start: Clocks) -> Clocks:
    """Returns what has passed since."""
    now = clocks()
    return Clocks(now.wall - start.wall, now.cpu - start.cpu)
