"""PPO's losses against numbers worked by hand, and the direction of their gradients."""

import math

import pytest
import torch

from manako.agent.errors import TrainingError
from manako.agent.losses import (
    approx_kl,
    categorical_kl,
    clip_fraction,
    ent_coef_at,
    explained_variance,
    policy_loss,
    ppo_loss,
    reference_kl,
    value_loss,
)
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_settings import PPOSettings
from manako.agent.samples import Samples
from manako.policies.interface import Evaluated, Rows, entropy


def close(actual: torch.Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


def one_choice(logprobs: torch.Tensor) -> torch.Tensor:
    """(B,) as the (B, 1) of answers of one token."""
    return logprobs[:, None]


def sampled(tokens: torch.Tensor) -> torch.Tensor:
    """A mask that says that the policy drew all of them."""
    return torch.ones_like(tokens, dtype=torch.bool)


# ---- answers of one choice, S = 1 ------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    old = one_choice(torch.tensor([-1.0, -1.0, -1.0, -1.0]))
    new = old + one_choice(torch.tensor([1.5, 1.5, 0.5, 0.5]).log())
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    # min(1.5·2, 1.2·2) = 2.4; min(-3, -2.4) = -3; min(1, 1.6) = 1; min(-1, -1.6) = -1.6; mean -1.2 / 4
    loss, ratio = policy_loss(new, old, sampled(old), advantages, clip_range=0.2)
    close(loss, 0.3)
    close(ratio, [[1.5], [1.5], [0.5], [0.5]])
    close(clip_fraction(ratio, 0.2), 1.0)
    close(clip_fraction(torch.tensor([1.0, 1.19, 1.21, 0.79]), 0.2), 0.5)


def test_the_decoupled_objective_weighs_each_sample():
    old = one_choice(torch.tensor([-1.0, -1.0]))
    new = old + one_choice(torch.tensor([1.5, 0.5]).log())
    # 0.5·min(1.5·2, 1.2·2) = 1.2; 0.1·min(0.5·-2, 0.8·-2) = -0.16; the ratio is that to the old policy
    loss, ratio = policy_loss(new, old, sampled(old), torch.tensor([2.0, -2.0]), 0.2, torch.tensor([0.5, 0.1]))
    close(loss, -(1.2 - 0.16) / 2)
    close(ratio, [[1.5], [0.5]])


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
    old = one_choice(torch.tensor([-1.0]))
    new = (old + math.log(ratio)).requires_grad_()
    policy_loss(new, old, sampled(old), torch.tensor([advantage]), clip_range=0.2)[0].backward()
    close(new.grad, [[gradient]])


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
    old = one_choice(torch.tensor([-1.0, -2.0]))
    new = old + one_choice(torch.tensor([2.0, 0.5]).log())
    # (2 - 1 - log 2 + 0.5 - 1 - log 0.5) / 2 = 0.25
    close(approx_kl(new, old, sampled(old)), 0.25)
    close(approx_kl(old, old, sampled(old)), 0.0)


def test_approx_kl_is_the_kl_on_average():
    logp, logq = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    drawn = torch.multinomial(logp.exp()[0], 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    new, old = one_choice(logq[0, drawn]), one_choice(logp[0, drawn])
    estimate = approx_kl(new, old, sampled(old))  # actions drawn from p, the old policy
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


# ---- answers of two tokens, S = 2 ------------------------------------------------------------------------------------

# Sample 0 says two tokens that the policy drew; of sample 1's two it drew the first alone, and what stands at the
# second (a forced token, with any number) counts for nothing.
DRAWN = torch.tensor([[True, True], [True, False]])
OLD = torch.tensor([[-1.0, -2.0], [-1.0, -3.0]])
RATIO = torch.tensor([[1.5, 0.9], [0.5, 7.0]])
ADVANTAGES = torch.tensor([2.0, -1.0])


def two_tokens(**others) -> tuple[Evaluated, Samples]:
    """The two samples, and what the policy now says of them; values 1 and 0 for returns 3 and 0."""
    evaluated = Evaluated(
        logprobs=OLD + RATIO.log(),
        entropy=torch.tensor([[0.6, 0.2], [0.5, 9.0]]),
        values=torch.tensor([1.0, 0.0]),
        losses=others.pop("losses", {}),
    )
    samples = Samples(
        inputs=Rows({"number": torch.arange(2)}),
        actions=Rows({"tokens": torch.zeros(2, 2, dtype=torch.int64)}),
        logprobs=OLD,
        mask=DRAWN,
        values=torch.zeros(2),
        advantages=ADVANTAGES,
        returns=torch.tensor([3.0, 0.0]),
        **others,
    )
    return evaluated, samples


def test_two_tokens_by_hand():
    """Each token has its ratio and its clip at 0.2, a step the mean of its drawn tokens, the batch that of its steps.

    surrogate   0: min(1.5·2, 1.2·2) = 2.4, min(0.9·2, 0.9·2) = 1.8, mean 2.1      1: min(-0.5, -0.8) = -0.8
    policy loss -(2.1 - 0.8) / 2 = -0.65
    entropy     0: (0.6 + 0.2) / 2 = 0.4      1: 0.5      mean 0.45
    k3          0: 0.5 - log 1.5, -0.1 - log 0.9, summed 0.4 - log 1.35      1: -0.5 - log 0.5
                mean (-0.1 - log 0.675) / 2 = 0.1465213
    clipped     1.5 and 0.5 of 1.5, 0.9, 0.5
    value loss  ((1 - 3)² + 0) / 2 / 2 = 1
    """
    evaluated, samples = two_tokens()
    settings = PPOSettings(clip_range=0.2, clip_range_vf=None, vf_coef=0.25, ent_coef=0.1)
    loss, parts, ratio = ppo_loss(evaluated, samples, settings)
    close(ratio, [1.5, 0.9, 0.5])
    close(parts["policy_loss"], -0.65)
    close(parts["entropy"], 0.45)
    close(parts["approx_kl"], 0.1465213)
    close(parts["clip_fraction"], 2 / 3)
    close(parts["value_loss"], 1.0)
    close(loss, -0.65 - 0.1 * 0.45 + 0.25 * 1.0)
    assert parts.keys() == {"policy_loss", "entropy", "approx_kl", "clip_fraction", "value_loss", "loss"}
    close(parts["loss"], -0.445)


def test_the_entropy_bonus_falls_by_the_same_factor_from_each_rollout_to_the_next():
    """2, 0.2, 0.02 over three rollouts; the loss takes the weight that it is told: -0.65 - 2 · 0.45 + 0.25."""
    falling = PPOConfig("unused", ent_coef=2.0, ent_coef_end=0.02, num_iterations=3, report_to="none")
    close(torch.tensor([ent_coef_at(falling, number) for number in range(4)]), [2.0, 0.2, 0.02, 0.02])
    steady = PPOConfig("unused", ent_coef=2.0, num_iterations=3, report_to="none")
    assert [ent_coef_at(steady, number) for number in range(3)] == [2.0] * 3
    alone = PPOConfig("unused", ent_coef=2.0, ent_coef_end=0.02, num_iterations=1, report_to="none")
    assert ent_coef_at(alone, 0) == 2.0
    settings = PPOSettings(clip_range=0.2, clip_range_vf=None, vf_coef=0.25, ent_coef=0.1)
    close(ppo_loss(*two_tokens(), settings, ent_coef=2.0)[0], -0.65 - 2.0 * 0.45 + 0.25 * 1.0)
    with pytest.raises(TrainingError, match="ent_coef_end is 0.1 and ent_coef 0: expected an ent_coef above 0"):
        PPOConfig("unused", ent_coef=0.0, ent_coef_end=0.1, report_to="none")


def test_two_tokens_are_weighed_by_the_importance_of_their_step():
    """0.5·2.1 and 0.25·-0.8: -(1.05 - 0.2) / 2 = -0.425; the group methods have no value loss."""
    evaluated, samples = two_tokens(importance=torch.tensor([0.5, 0.25]))
    loss, parts, ratio = ppo_loss(evaluated, samples, PPOSettings(advantage="grpo", ent_coef=0.0))
    close(parts["policy_loss"], -0.425)
    close(loss, -0.425)
    close(ratio, [1.5, 0.9, 0.5])
    assert "value_loss" not in parts


def test_nothing_is_learned_from_tokens_that_were_not_drawn():
    """A log-probability's gradient is -ratio·A / drawn tokens / B: 0 (clipped), -0.9·2/2/2, 0 (clipped), none."""
    logprobs = (OLD + RATIO.log()).requires_grad_()
    policy_loss(logprobs, OLD, DRAWN, ADVANTAGES, clip_range=0.2)[0].backward()
    close(logprobs.grad, [[0.0, -0.45], [0.0, 0.0]])


def test_a_token_that_could_not_have_been_drawn_changes_nothing():
    """A policy that never says a special token gives the one that ends an answer minus infinity."""
    evaluated, samples = two_tokens(reference=OLD)
    expected, parts, _ = ppo_loss(evaluated, samples, PPOSettings(kl_coef=0.1))
    never = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    logprobs = (evaluated.logprobs + never).requires_grad_()
    evaluated = evaluated._replace(logprobs=logprobs, entropy=torch.where(DRAWN, evaluated.entropy, torch.nan))
    samples = samples._replace(logprobs=OLD + never, reference=OLD + never)
    loss, again, _ = ppo_loss(evaluated, samples, PPOSettings(kl_coef=0.1))
    close(loss, expected.item())
    assert all(torch.equal(again[name], part) for name, part in parts.items())
    loss.backward()
    assert torch.isfinite(logprobs.grad).all() and logprobs.grad[1, 1] == 0


def test_an_answer_of_which_nothing_was_drawn_is_no_nan():
    loss, _ = policy_loss(OLD, OLD, torch.zeros(2, 2, dtype=torch.bool), ADVANTAGES, clip_range=0.2)
    close(loss, 0.0)


def test_the_reference_s_kl_over_tokens_is_k3_of_the_drawn_ones():
    """Reference over policy is 2, 0.5, 0.25: k3 1 - log 2, -0.5 - log 0.5, -0.75 - log 0.25, by answer summed.

    (0.5 + (-0.75 + log 4)) / 2 = 0.5681472
    """
    evaluated, _ = two_tokens()
    reference = evaluated.logprobs + torch.tensor([[2.0, 0.5], [0.25, 9.0]]).log()
    close(reference_kl(evaluated, reference, DRAWN), 0.5681472)
    evaluated, samples = two_tokens(reference=reference)
    plain = ppo_loss(*two_tokens(), PPOSettings(kl_coef=10.0))[0]
    loss, parts, _ = ppo_loss(evaluated, samples, PPOSettings(kl_coef=10.0))
    close(parts["reference_kl"], 0.5681472)
    close(loss - plain, 5.681472)


def test_the_reference_s_kl_of_a_closed_set_is_exact():
    """0.5 log(0.5/0.25) + 0.5 log(0.5/0.75) = 0.1438410 and 0, mean 0.0719205, whatever was drawn."""
    evaluated = Evaluated(
        logprobs=torch.tensor([[0.5], [0.5]]).log(),
        entropy=torch.full((2, 1), math.log(2)),
        values=torch.zeros(2),
        distribution=torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(),
    )
    reference = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    close(reference_kl(evaluated, reference, torch.ones(2, 1, dtype=torch.bool)), 0.0719205)


def test_a_policy_s_own_losses_are_added_and_logged():
    own = torch.tensor(0.7, requires_grad=True)
    plain = ppo_loss(*two_tokens(), PPOSettings())[0]
    loss, parts, _ = ppo_loss(*two_tokens(losses={"next_frame": 2 * own, "depth": torch.tensor(0.1)}), PPOSettings())
    close(parts["next_frame"], 1.4)
    close(parts["depth"], 0.1)
    close(loss - plain, 1.5)
    loss.backward()
    close(own.grad, 2.0)
