"""Intervals for an evaluation's success rates and mean returns, and a test of two policies on the same episodes.

A success rate gets a Wilson interval, which stays inside [0, 1] and is honest at 0 of n and n of n. A mean return gets
a bootstrap interval, since returns are seldom normal. Two policies that played the same seeds are compared episode by
episode, which takes the luck of the seeds out of the difference. NumPy only, so that reports need no torch.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from manako.agent.errors import TrainingError

Interval = tuple[float, float]  # (low, high)

_BLOCK = 1_000_000  # resampled values held at a time


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Returns the score interval of a success rate (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes: episodes that succeeded, 0 to `n`.
        n: episodes, at least 1.
        confidence: share of such intervals that hold the true rate, in (0, 1).

    Returns:
        (low, high), both in [0, 1].

    Raises:
        TrainingError: no episodes, more successes than episodes, or a confidence outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise TrainingError(f"{successes} successes of {n} episodes: expected 0 <= successes <= n and n >= 1.")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    rate = successes / n
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    center = rate + z**2 / (2 * n)
    half = z * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    scale = 1 + z**2 / n
    # rounding alone must not take an interval past the rate that was seen
    return max(0.0, min(rate, (center - half) / scale)), min(1.0, max(rate, (center + half) / scale))


def bootstrap_interval(values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Returns the percentile bootstrap interval of the mean (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Args:
        values: (n,) one number an episode, n >= 1.
        confidence: in (0, 1).
        resamples: how many times n values are drawn with replacement.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        (low, high), in the unit of `values`.

    Raises:
        TrainingError: no values, a value that is not finite, or a bad confidence or number of resamples.
    """
    sample = _sample(values)
    if resamples < 1:
        raise TrainingError(f"resamples is {resamples}: expected at least 1, and 10000 for steady limits.")
    tail = (1 - _checked(confidence)) / 2
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    rows = max(1, _BLOCK // len(sample))
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(sample), size=(min(rows, resamples - start), len(sample)))
        means.append(sample[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise TrainingError(f"confidence is {confidence}: expected a share between 0 and 1, such as 0.95.")
    return confidence


def _sample(values: ArrayLike) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0 or not np.isfinite(sample).all():
        raise TrainingError(
            f"values is an array of shape {sample.shape} with {int((~np.isfinite(sample)).sum())} values that are not "
            "finite: expected (n,) numbers, one an episode, n >= 1."
        )
    return sample


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Returns the p-value of equal success: the exact two-sided McNemar test of two policies on the same episodes.

    Only episodes that one of the two solved count: under equality each falls to either side like a fair coin
    (McNemar 1947; the exact binomial form).

    Args:
        one: success in each episode.
        other: of the other policy, in the same order.

    Raises:
        TrainingError: unequal numbers of episodes.
    """
    if len(one) != len(other):
        raise TrainingError(f"{len(one)} and {len(other)} episodes came: expected the same ones for both policies.")
    better = sum(a and not b for a, b in zip(one, other, strict=True))
    worse = sum(b and not a for a, b in zip(one, other, strict=True))
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_permutation(one: Sequence[float], other: Sequence[float], resamples: int = 10_000, seed: int = 0) -> float:
    """Returns the p-value of equal mean returns: the two-sided sign-flip test of two policies on the same episodes.

    Under equality each episode's difference is as likely of the other sign (Fisher 1935). All 2^n ways of signs are
    counted where they are no more than `resamples`; else as many are drawn, and the one that came is one more.

    Args:
        one: return of each episode.
        other: of the other policy, in the same order.
        resamples: how many ways are drawn.
        seed: of the draws.

    Raises:
        TrainingError: unequal numbers of episodes, none, or a return that is not finite.
    """
    if len(one) != len(other):
        raise TrainingError(f"{len(one)} and {len(other)} episodes came: expected the same ones for both policies.")
    differences = _sample(one) - _sample(other)
    n = len(differences)
    if 2**n <= resamples:
        ways, came = (np.arange(2**n)[:, None] >> np.arange(n)) & 1, 0  # (2^n, n)
    else:
        ways, came = np.random.default_rng(seed).integers(2, size=(resamples, n)), 1
    sums = np.abs((2 * ways - 1) @ differences)
    least = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()  # equal but for rounding counts as equal
    return float((came + (sums >= least).sum()) / (came + len(ways)))


# measure -> the test of two policies on the same episodes, in words and as a function
TESTS: dict[str, tuple[str, Callable[[Sequence[Any], Sequence[Any]], float]]] = {
    "success": ("McNemar's exact test, two-sided", mcnemar),
    "return": ("sign-flip permutation test, two-sided", paired_permutation),
}
