"""PPO's losses against numbers worked by hand, and the direction of their gradients."""

import math

import pytest
import torch

from manako.agent.losses import (
    approx_kl,
    categorical_kl,
    clip_fraction,
    entropy,
    explained_variance,
    policy_loss,
    value_loss,
)


def close(actual: torch.Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_policy_loss_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    new = old + torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    # min(1.5·2, 1.2·2) = 2.4; min(-3, -2.4) = -3; min(1, 1.6) = 1; min(-1, -1.6) = -1.6; mean -1.2 / 4
    loss, ratio = policy_loss(new, old, advantages, clip_range=0.2)
    close(loss, 0.3)
    close(ratio, [1.5, 1.5, 0.5, 0.5])
    close(clip_fraction(ratio, 0.2), 1.0)
    close(clip_fraction(torch.tensor([1.0, 1.19, 1.21, 0.79]), 0.2), 0.5)


def test_the_decoupled_objective_weighs_each_sample():
    old, new = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0]) + torch.tensor([1.5, 0.5]).log()
    # 0.5·min(1.5·2, 1.2·2) = 1.2; 0.1·min(0.5·-2, 0.8·-2) = -0.16; the ratio is that to the old policy
    loss, ratio = policy_loss(new, old, torch.tensor([2.0, -2.0]), 0.2, torch.tensor([0.5, 0.1]))
    close(loss, -(1.2 - 0.16) / 2)
    close(ratio, [1.5, 0.5])


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0),  # the first update: d loss / d logprob = -ratio·A
        (1.0, -2.0, 2.0),
        (1.5, 2.0, 0.0),  # already more likely by more than the clip: nothing more to gain
        (0.5, -2.0, 0.0),
        (0.5, 2.0, -1.0),  # the wrong way round: pulled back, however far
        (1.5, -2.0, 3.0),
    ],
)
def test_policy_loss_gradient(ratio, advantage, gradient):
    old = torch.tensor([-1.0])
    new = (old + math.log(ratio)).requires_grad_()
    policy_loss(new, old, torch.tensor([advantage]), clip_range=0.2)[0].backward()
    close(new.grad, [gradient])


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0.0, 2.9, 1.0]), torch.tensor([2.0, 2.0, 2.0])
    # plain: (1 + 1 + 4) / 3 / 2
    close(value_loss(values, old, returns, None), 1.0)
    # clipped values 0.5, 3.0, 0.5: squares 2.25, 1, 2.25; larger of the two 2.25, 1, 4: 7.25 / 3 / 2
    close(value_loss(values, old, returns, 0.5), 7.25 / 6)


@pytest.mark.parametrize(
    ("value", "gradient"),
    [
        (0.2, -1.8),  # inside the clip: d/dV 0.5 (V - R)² = V - R
        (1.0, 0.0),  # moved from 0 to 1, past the clip, towards the return: no pull
        (-1.0, -3.0),  # past the clip, away from the return: pulled back
    ],
)
def test_value_loss_gradient(value, gradient):
    values = torch.tensor([value], requires_grad=True)
    value_loss(values, torch.tensor([0.0]), torch.tensor([2.0]), clip_range_vf=0.5).backward()
    close(values.grad, [gradient])


def test_approx_kl_by_hand():
    old = torch.tensor([-1.0, -2.0])
    new = old + torch.tensor([2.0, 0.5]).log()
    # (2 - 1 - log 2 + 0.5 - 1 - log 0.5) / 2 = 0.25
    close(approx_kl(new, old), 0.25)
    close(approx_kl(old, old), 0.0)


def test_approx_kl_is_the_kl_on_average():
    logp, logq = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    sampled = torch.multinomial(logp.exp()[0], 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = approx_kl(logq[0, sampled], logp[0, sampled])  # actions drawn from p, the old policy
    torch.testing.assert_close(estimate, categorical_kl(logp, logq)[0], atol=1e-3, rtol=0)


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0])
    close(explained_variance(returns + 10, returns), 1.0)  # a constant error leaves nothing unexplained
    close(explained_variance(torch.zeros(3), returns), 0.0)
    # errors 0, 0, -1.5 of variance 0.5; variance of the returns 2/3
    close(explained_variance(torch.tensor([1.0, 2.0, 4.5]), returns), 0.25)
    assert explained_variance(returns, torch.full((3,), 0.1)).isnan()
    assert explained_variance(torch.zeros(1000), torch.full((1000,), 100.3)).isnan()  # its float32 variance is not 0


def test_categorical_kl_and_entropy_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    # 0.5 log 2 + 0.5 log(2/3); log 2
    close(categorical_kl(p.log(), q.log()), [0.5 * math.log(4 / 3), math.log(2)])
    close(entropy(p.log()), [math.log(2), 0.0])
    close(entropy(torch.full((1, 4), 0.25).log()), [math.log(4)])
    assert categorical_kl(q.log(), p.log())[1] == torch.inf  # q takes an action that p never does


def test_an_impossible_action_gives_no_nan_gradient():
    logits = torch.tensor([[1.0, 0.5, -torch.inf]], requires_grad=True)
    logp = logits.log_softmax(-1)
    (entropy(logp) + categorical_kl(logp, torch.tensor([[0.5, 0.5, 0.0]]).log())).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_entropy_gradient_flattens():
    logits = torch.tensor([[1.0, 0.0]], requires_grad=True)
    entropy(logits.log_softmax(-1)).sum().backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]
