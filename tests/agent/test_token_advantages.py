"""Advantages of tokens against examples worked by hand: three steps, answers of 2, 1 and 3 tokens."""

import pytest
import torch

from manako.agent.advantages import bilevel_gae, gae, token_gae
from manako.agent.errors import TrainingError
from manako.agent.losses import value_loss

NONE = torch.zeros(3, 1, dtype=torch.bool)


def column(*numbers):
    """(T, 1) float32."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def answers(*rows, filler=0.0):
    """(T, 1, S) float32 and which of them are tokens."""
    longest = max(map(len, rows))
    values = torch.tensor([[list(row) + [filler] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[[True] * len(row) + [False] * (longest - len(row))] for row in rows])
    return values, mask


REWARDS, NEXT = column(1.0, 0.0, 2.0), column(1.0, 2.0, 3.0)
VALUES, MASK = answers((0.5, 0.7), (1.0,), (2.0, 2.5, 1.5), filler=99.0)  # V before each token
ENDS = {"next_values": NEXT, "terminated": NONE, "truncated": NONE}


def test_token_level_by_hand():
    """Gamma 0.9 between steps and 1 inside; lambda 0.5 from token to token.

    step 2: last token  delta = 2 + 0.9*3 - 1.5 = 3.2                        A = 3.2
            second      delta = 1.5 - 2.5 = -1                               A = -1 + 0.5*3.2 = 0.6
            first       delta = 2.5 - 2.0 = 0.5                              A = 0.5 + 0.5*0.6 = 0.8
    step 1: only        delta = 0 + 0.9*2 - 1 = 0.8                          A = 0.8 + 0.45*0.8 = 1.16
    step 0: last        delta = 1 + 0.9*1 - 0.7 = 1.2                        A = 1.2 + 0.45*1.16 = 1.722
            first       delta = 0.7 - 0.5 = 0.2                              A = 0.2 + 0.5*1.722 = 1.061
    """
    expected, _ = answers((1.061, 1.722), (1.16,), (0.8, 0.6, 3.2))
    advantages, returns = token_gae(REWARDS, VALUES, MASK, **ENDS, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, (expected + VALUES) * MASK, atol=1e-6, rtol=0)


def test_an_end_breaks_the_chain_of_tokens():
    """Terminated at step 1: delta = 0 - 1 = -1 = A there; step 0's last: 1.2 + 0.45*(-1) = 0.75, first 0.2 + 0.375."""
    ended = torch.tensor([[False], [True], [False]])
    advantages, _ = token_gae(REWARDS, VALUES, MASK, NEXT, ended, NONE, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(advantages[:2, 0, 0], torch.tensor([0.575, -1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages[0, 0, 1], torch.tensor(0.75), atol=1e-6, rtol=0)
    cut, _ = token_gae(REWARDS, VALUES, MASK, NEXT, NONE, ended, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(cut[1, 0, 0], torch.tensor(0.8), atol=1e-6, rtol=0)  # its last frame's value counts


def test_bilevel_by_hand():
    """Steps first: gamma 0.9, lambda 0.5 give A = 2.30675, 2.015, 2.7 and returns 2.80675, 3.015, 4.7.

    Inside an answer, token lambda 0.5, from the return at the last token:
    step 2: 4.7 - 1.5 = 3.2;  (1.5 - 2.5) + 0.5*3.2 = 0.6;  (2.5 - 2) + 0.5*0.6 = 0.8
    step 1: 3.015 - 1 = 2.015
    step 0: 2.80675 - 0.7 = 2.10675;  (0.7 - 0.5) + 0.5*2.10675 = 1.253375
    """
    expected, _ = answers((1.253375, 2.10675), (2.015,), (0.8, 0.6, 3.2))
    steps = column(0.5, 1.0, 2.0)
    advantages, returns = bilevel_gae(REWARDS, steps, VALUES, MASK, **ENDS, gamma=0.9, gae_lambda=0.5, token_lambda=0.5)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, (expected + VALUES) * MASK, atol=1e-6, rtol=0)


def test_with_the_papers_lambda_every_token_is_paid_the_steps_return():
    steps = column(0.5, 1.0, 2.0)
    advantages, returns = bilevel_gae(REWARDS, steps, VALUES, MASK, **ENDS, gamma=0.9, gae_lambda=0.5)
    of_steps = (2.80675, 3.015, 4.7)
    for t, paid in enumerate(of_steps):
        assert returns[t, 0][MASK[t, 0]].tolist() == pytest.approx([paid] * int(MASK[t].sum()), abs=1e-5)
    assert not advantages[~MASK].any()


def test_answers_of_one_token_are_steps():
    steps = column(0.5, 1.0, 2.0)
    one = steps[..., None], torch.ones(3, 1, 1, dtype=torch.bool)
    expected, _ = gae(REWARDS, steps, NEXT, NONE, NONE, 0.9, 0.5)
    of_tokens, _ = token_gae(REWARDS, *one, **ENDS, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(of_tokens[..., 0], expected)
    bilevel, _ = bilevel_gae(REWARDS, steps, *one, **ENDS, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(bilevel[..., 0], expected)


def test_shapes_are_checked():
    with pytest.raises(TrainingError, match="expected \\(T, N, S\\) twice"):
        token_gae(REWARDS, VALUES[..., 0], MASK, **ENDS, gamma=0.9, gae_lambda=0.5)


def test_the_value_loss_of_tokens_counts_each_answer_alike():
    """Errors 1, 3 of one answer and 2 of another: half of ((1 + 9)/2 + 4)/2."""
    values, mask = answers((1.0, 3.0), (2.0,))
    loss = value_loss(values[:, 0], torch.zeros(2, 2), torch.zeros(2, 2), None, mask[:, 0])
    assert float(loss) == pytest.approx(0.5 * (5 + 4) / 2)
