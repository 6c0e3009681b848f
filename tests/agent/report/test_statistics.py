"""Intervals against textbook values and distributions small enough to enumerate."""

from itertools import product

import numpy as np
import pytest

from manako.agent.errors import TrainingError
from manako.agent.report.statistics import bootstrap_interval, paired_permutation, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "low", "high"),
    [
        (8, 10, 0.95, 0.4902, 0.9433),
        (81, 263, 0.95, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
        (20, 20, 0.95, 0.8389, 1.0),
    ],
)
def test_wilson_textbook(successes, n, confidence, low, high):
    assert wilson_interval(successes, n, confidence) == pytest.approx((low, high), abs=5e-5)


def test_wilson_holds_the_rate_and_narrows():
    for n in range(1, 60):
        for successes in (0, n // 2, n):
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
    wide, narrow = wilson_interval(8, 10, 0.99), wilson_interval(8, 10, 0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(successes, n):
    with pytest.raises(TrainingError, match=f"{successes} successes of {n} episodes: expected"):
        wilson_interval(successes, n)


def test_bootstrap_of_two_values():
    # the mean of two draws from {0, 1} is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval([0, 1], confidence=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval([3.5]) == (3.5, 3.5)


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=2000)
    half = 1.96 * values.std() / 2000**0.5
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.005)
    assert high == pytest.approx(values.mean() + half, abs=0.005)


def test_bootstrap_depends_on_the_seed_alone():
    values = np.arange(50.0) ** 2
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(list(values), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_bootstrap_refuses(values):
    with pytest.raises(TrainingError, match=r"values is an array of shape .* expected \(n,\) numbers"):
        bootstrap_interval(values)


def test_bad_settings_are_refused():
    with pytest.raises(TrainingError, match="confidence is 95: expected a share between 0 and 1"):
        bootstrap_interval([1.0], confidence=95)
    with pytest.raises(TrainingError, match="confidence is 0"):
        wilson_interval(1, 2, confidence=0)
    with pytest.raises(TrainingError, match="resamples is 0"):
        bootstrap_interval([1.0], resamples=0)


def test_paired_permutation_by_hand_and_by_enumeration():
    assert paired_permutation([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == 0.25  # 2 of the 8 ways of signs
    assert paired_permutation([1.0, 0.0], [0.0, 1.0]) == 1
    assert paired_permutation([5.0] * 4, [5.0] * 4) == 1
    one, other = np.random.default_rng(1).normal([[0.5], [0]], 1, (2, 10))
    ways = [abs(sum(s * d for s, d in zip(signs, one - other, strict=True))) for signs in product((1, -1), repeat=10)]
    exact = sum(way >= ways[0] - 1e-12 for way in ways) / 1024
    assert 0.01 < exact < 0.9
    assert paired_permutation(one, other) == exact
    assert paired_permutation(one, other, resamples=1000) == pytest.approx(exact, abs=0.05)  # drawn
    with pytest.raises(TrainingError, match="expected the same ones"):
        paired_permutation([1.0], [1.0, 2.0])
