"""GAE against examples worked by hand, and the normalisation over the whole rollout."""

import pytest
import torch

from manako.agent.advantages import gae, normalize
from manako.agent.errors import TrainingError


def column(*numbers: float) -> torch.Tensor:
    """(T, 1) float32."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def flags(*ones: int) -> torch.Tensor:
    """(T, 1) bool."""
    return torch.tensor(ones, dtype=torch.bool)[:, None]


# V of the observation before each step and after it; the two differ only where an episode ends in between
VALUES, REWARDS = column(0.5, 1.0, 2.0), column(1.0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("next_values", "terminated", "truncated", "gae_lambda", "expected"),
    [
        # gamma 0.9. deltas: 1 + 0.9·1 - 0.5 = 1.4;  0 + 0.9·2 - 1 = 0.8;  2 + 0.9·3 - 2 = 2.7
        ((1.0, 2.0, 3.0), (0, 0, 0), (0, 0, 0), 0.0, (1.4, 0.8, 2.7)),
        # lambda 0.5, gamma·lambda 0.45: A2 = 2.7; A1 = 0.8 + 0.45·2.7 = 2.015; A0 = 1.4 + 0.45·2.015 = 2.30675
        ((1.0, 2.0, 3.0), (0, 0, 0), (0, 0, 0), 0.5, (2.30675, 2.015, 2.7)),
        # lambda 1: the discounted return less the value. R2 = 2 + 2.7 = 4.7; R1 = 4.23; R0 = 1 + 3.807 = 4.807
        ((1.0, 2.0, 3.0), (0, 0, 0), (0, 0, 0), 1.0, (4.307, 3.23, 2.7)),
        # terminated in the middle: next value 7 counts for nothing. delta1 = 0 - 1 = -1; A0 = 1.4 + 0.45·(-1) = 0.95
        ((1.0, 7.0, 3.0), (0, 1, 0), (0, 0, 0), 0.5, (0.95, -1.0, 2.7)),
        # truncated in the middle: next value 7 is V(last frame). delta1 = 6.3 - 1 = 5.3; A0 = 1.4 + 0.45·5.3 = 3.785
        ((1.0, 7.0, 3.0), (0, 0, 0), (0, 1, 0), 0.5, (3.785, 5.3, 2.7)),
        # both at once: terminated decides, nothing follows
        ((1.0, 7.0, 3.0), (0, 1, 0), (0, 1, 0), 0.5, (0.95, -1.0, 2.7)),
        # terminated at the end of the rollout: delta2 = 2 - 2 = 0; A1 = 0.8; A0 = 1.4 + 0.45·0.8 = 1.76
        ((1.0, 2.0, 3.0), (0, 0, 1), (0, 0, 0), 0.5, (1.76, 0.8, 0.0)),
    ],
    ids=["lambda-0", "lambda-half", "lambda-1", "terminated", "truncated", "both", "terminated-last"],
)
def test_gae_by_hand(next_values, terminated, truncated, gae_lambda, expected):
    advantages, returns = gae(
        REWARDS, VALUES, column(*next_values), flags(*terminated), flags(*truncated), 0.9, gae_lambda
    )
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages, column(*expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, column(*expected) + VALUES, atol=1e-6, rtol=0)


def test_importance_weights_by_hand():
    """Gamma 0.9, lambda 0.5, deltas 1.4, 0.8, 2.7 as above; rho 1/2, 1/4, 1."""
    importance = column(0.5, 0.25, 1.0)
    advantages, targets = gae(
        REWARDS, VALUES, column(1.0, 2.0, 3.0), flags(0, 0, 0), flags(0, 0, 0), 0.9, 0.5, importance
    )
    # A2 = 2.7; A1 = 0.8 + 0.45·1·2.7 = 2.015; A0 = 1.4 + 0.45·0.25·2.015 = 1.6266875
    torch.testing.assert_close(advantages, column(1.6266875, 2.015, 2.7), atol=1e-6, rtol=0)
    # values + rho A: 0.5 + 0.81334375; 1 + 0.50375; 2 + 2.7
    torch.testing.assert_close(targets, column(1.31334375, 1.50375, 4.7), atol=1e-6, rtol=0)


def test_with_lambda_1_the_targets_are_those_of_v_trace():
    """Held against the definition, eq. 1 of arXiv:1802.01561, with both limits at 1: a sum over products."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 6, 1, generator=generator)
    next_values = torch.cat([values[1:], torch.randn(1, 1, generator=generator)])
    rho = torch.rand(6, 1, generator=generator)
    none = torch.zeros(6, 1, dtype=torch.bool)
    _, targets = gae(rewards, values, next_values, none, none, 0.9, 1.0, rho)
    for s in range(6):
        expected = values[s].clone()
        for t in range(s, 6):
            delta = rho[t] * (rewards[t] + 0.9 * next_values[t] - values[t])
            expected += 0.9 ** (t - s) * rho[s:t].prod(0) * delta
        torch.testing.assert_close(targets[s], expected, atol=1e-5, rtol=0)


def test_environments_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 5, 4, generator=generator)  # three of (T, N)
    terminated = torch.rand(5, 4, generator=generator) < 0.3
    truncated = torch.rand(5, 4, generator=generator) < 0.3
    together, _ = gae(rewards, values, next_values, terminated, truncated, 0.99, 0.95)
    for n in range(4):
        one = slice(n, n + 1)
        alone, _ = gae(
            rewards[:, one], values[:, one], next_values[:, one], terminated[:, one], truncated[:, one], 0.99, 0.95
        )
        torch.testing.assert_close(together[:, one], alone, atol=0, rtol=0)


def test_gae_refuses_what_it_cannot_use():
    ok = {
        "rewards": REWARDS,
        "values": VALUES,
        "next_values": VALUES,
        "terminated": flags(0, 0, 0),
        "truncated": flags(0, 0, 0),
        "gamma": 0.9,
        "gae_lambda": 0.95,
    }
    with pytest.raises(TrainingError, match=r"next_values has shape \(2, 1\) and rewards \(3, 1\).*same steps"):
        gae(**{**ok, "next_values": VALUES[:2]})
    with pytest.raises(TrainingError, match=r"terminated is torch.float32: expected torch.bool"):
        gae(**{**ok, "terminated": column(0, 0, 0)})
    with pytest.raises(TrainingError, match=r"rewards holds 1 values that are not finite"):
        gae(**{**ok, "rewards": column(0, float("nan"), 0)})
    with pytest.raises(TrainingError, match=r"rewards has shape \(3,\): expected \(T, N\)"):
        gae(**{**ok, "rewards": REWARDS[:, 0]})


def test_normalize_over_the_whole_rollout():
    # mean 3, deviations -2 0 0 2, standard deviation sqrt(8 / 4) = 1.41421356
    normalized = normalize(torch.tensor([[1.0, 3.0], [3.0, 5.0]]))
    expected = torch.tensor([[-1.41421356, 0.0], [0.0, 1.41421356]])
    torch.testing.assert_close(normalized, expected, atol=1e-6, rtol=0)


def test_normalize_equal_advantages_are_zero():
    # a thousand equal numbers whose float32 mean is rounded: without care the rounding would come out as ±1
    assert torch.equal(normalize(torch.full((100, 10), 100.3)), torch.zeros(100, 10))
    with pytest.raises(TrainingError, match="advantages holds 1 values that are not finite"):
        normalize(column(1.0, float("inf")))
