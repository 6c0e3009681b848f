"""PPO's losses and the numbers that tell how an update went: tensors in, tensors out.

B steps of S tokens each, S = 1 where an action is one choice. Everything is the mean over the batch it is given;
log-probabilities are float32, and advantages come normalised (see advantages.py).
"""

from typing import Protocol

import torch
from torch import Tensor

from manako.agent.samples import Samples
from manako.policies.interface import Evaluated


class LossSettings(Protocol):
    """The settings that the loss reads; `manako.agent.ppo_config.PPOConfig` has them."""

    advantage: str
    clip_range: float
    clip_range_vf: float | None
    vf_coef: float
    ent_coef: float
    kl_coef: float


class EntropySchedule(Protocol):
    """The settings that say how the entropy bonus goes down."""

    ent_coef: float
    ent_coef_end: float | None
    num_iterations: int


def ent_coef_at(settings: EntropySchedule, iteration: int) -> float:
    """Returns the weight of the entropy bonus in an iteration, counted from 0.

    It goes from `ent_coef` in the first to `ent_coef_end` in the last by the same factor each time, and stays where
    there is no such end.
    """
    if settings.ent_coef_end is None or settings.num_iterations < 2:
        return settings.ent_coef
    done = min(1.0, iteration / (settings.num_iterations - 1))
    return settings.ent_coef * (settings.ent_coef_end / settings.ent_coef) ** done


def ppo_loss(
    evaluated: Evaluated, samples: Samples, settings: LossSettings, ent_coef: float | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns clipped surrogate - ent_coef x entropy + vf_coef x value loss + kl_coef x KL(policy || reference).

    The policy's own losses are added; the group methods have no value loss.

    Args:
        evaluated: what the policy being trained says of the samples.
        samples: B samples.
        settings: coefficients.
        ent_coef: weight of the entropy bonus, where it is another than the settings'.

    Returns:
        The loss, (); its parts and diagnostics by name, (); the ratio of the sampled tokens, flat.
    """
    new, old, entropies, mask = evaluated.logprobs, samples.logprobs, evaluated.entropy, samples.mask
    if evaluated.is_joint:  # one action: its log-probability and entropy are the sums over its entries, (B, 1)
        new, old, entropies = (of_sampled(each, mask).sum(-1, keepdim=True) for each in (new, old, entropies))
        mask = mask.any(-1, keepdim=True)
    actor, ratio = policy_loss(new, old, mask, samples.advantages, settings.clip_range, samples.importance)
    bonus = step_means(entropies, mask).mean()
    loss = actor - (settings.ent_coef if ent_coef is None else ent_coef) * bonus
    sampled = ratio[mask]
    parts = {
        "policy_loss": actor,
        "entropy": bonus,
        "approx_kl": approx_kl(new, old, mask),
        "clip_fraction": clip_fraction(sampled, settings.clip_range),
    }
    if settings.advantage == "gae":
        of_tokens = samples.values.ndim == 2
        values = evaluated.token_values if of_tokens else evaluated.values
        assert values is not None, "the rollout has values of tokens"
        parts["value_loss"] = value_loss(
            values, samples.values, samples.returns, settings.clip_range_vf, samples.mask if of_tokens else None
        )
        loss = loss + settings.vf_coef * parts["value_loss"]
    if samples.reference is not None:
        parts["reference_kl"] = reference_kl(evaluated, samples.reference, samples.mask)
        loss = loss + settings.kl_coef * parts["reference_kl"]
    for name, own in evaluated.losses.items():
        parts[name] = own
        loss = loss + own
    return loss, {**parts, "loss": loss}, sampled


def reference_kl(evaluated: Evaluated, reference: Tensor, mask: Tensor) -> Tensor:
    """Returns KL(policy || reference), (): exact where the set of actions is closed, else k3 over the sampled tokens.

    Args:
        evaluated: of the policy.
        reference: (B, A) the reference's distribution, or (B, S) its log-probabilities of the same tokens.
        mask: (B, S) bool.
    """
    if evaluated.distribution is not None:
        return categorical_kl(evaluated.distribution, reference).mean()
    log_ratio = of_sampled(reference - evaluated.logprobs, mask)  # k3 = (r - 1) - log r, r = reference / policy
    return (log_ratio.expm1() - log_ratio).sum(-1).mean()


def of_sampled(per_token: Tensor, mask: Tensor) -> Tensor:
    """Returns (B, S) with 0 where the policy did not sample, also for what is infinite or NaN there."""
    return per_token.masked_fill(~mask, 0.0)


def step_means(per_token: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the sampled tokens of each answer, (B, S) and a mask (B, S) -> (B,)."""
    return of_sampled(per_token, mask).sum(-1) / mask.sum(-1).clamp_min(1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    clip_range: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the clipped surrogate (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7), to be minimised.

    Each token has its own ratio and clip, and all of a step its one advantage (VL-DAC, https://arxiv.org/abs/2508.04280).
    The mean is over an answer's tokens and then over steps, so that a long answer counts as much as a short one and
    equal micro-batches add up to their minibatch.

    Args:
        logprobs: (B, S) log pi(token|s) of the policy being trained.
        old_logprobs: (B, S) log pi_old(token|s) of the policy that the update starts from, which usually drew them.
        mask: (B, S) bool, True = sampled by the policy.
        advantages: (B,) of whole steps, or (B, S) of tokens.
        clip_range: epsilon; beyond 1 ± epsilon a ratio earns nothing more.
        importance: (B,) pi_old / pi_behaviour where an older policy drew the action, truncated: the decoupled
            objective of Hilton et al. 2021 (https://arxiv.org/abs/2110.00641); None is 1.

    Returns:
        The loss, (), and the ratio pi / pi_old, (B, S), 1 where nothing was sampled.
    """
    ratio = of_sampled(logprobs - old_logprobs, mask).exp()  # (B, S)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # L^CLIP = E[min(r A, clip(r, 1 - eps, 1 + eps) A)]
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    surrogate = step_means(torch.min(ratio * advantages, clipped * advantages), mask)  # (B,)
    return -(surrogate if importance is None else importance * surrogate).mean(), ratio


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range_vf: float | None, mask: Tensor | None = None
) -> Tensor:
    """Returns half the squared error, clipped as in OpenAI Baselines by how far the value may move from its old one.

    Source: https://github.com/openai/baselines/blob/master/baselines/ppo2/model.py

    Args:
        values: (B,) of the value head being trained, or (B, S) of tokens.
        old_values: likewise, stored when the action was sampled.
        returns: likewise, targets.
        clip_range_vf: in units of the return; None for the plain squared error.
        mask: (B, S) bool, which tokens count; the mean is over an answer's tokens and then over steps.

    Returns:
        The loss, ().
    """

    def mean(errors: Tensor) -> Tensor:
        return errors.mean() if mask is None else step_means(errors, mask).mean()

    squared = (values - returns).square()  # (B,) or (B, S)
    if clip_range_vf is None:
        return 0.5 * mean(squared)
    clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
    # L^VF = 0.5 E[max((V - R)^2, (clip(V, V_old ± eps) - R)^2)]
    return 0.5 * mean(torch.max(squared, (clipped - returns).square()))


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns KL(pi_old || pi) of whole answers, from the sampled tokens: k3 of http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: (B, S) of the policy being trained.
        old_logprobs: (B, S) stored when the tokens were sampled.
        mask: (B, S) bool, True = sampled.

    Returns:
        The estimate in nats, (), never negative, without a gradient; by the chain rule the sum over an answer's tokens.
    """
    log_ratio = of_sampled((logprobs - old_logprobs).detach(), mask)
    # k3 = (r - 1) - log r
    return (log_ratio.expm1() - log_ratio).sum(-1).mean()


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Returns the share, in [0, 1], of the ratios (M,) that lie outside 1 ± `clip_range`; no gradient."""
    return ((ratio.detach() - 1).abs() > clip_range).float().mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Returns 1 - Var(R - V) / Var(R): 1 for a perfect value function, 0 for one no better than a constant.

    Args:
        values: any shape, of the value function.
        returns: the same shape, its targets.

    Returns:
        (), without a gradient; NaN where all returns are equal, since there is no variance to explain.
    """
    values, returns = values.detach().float(), returns.detach().float()
    if returns.min() == returns.max():  # not "variance == 0": the mean of equal numbers is rounded
        return torch.full_like(returns.sum(), torch.nan)
    return 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)


def categorical_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Returns the exact KL(p || q) of two closed sets of actions.

    Args:
        logp: (B, A) normalised log-probabilities; -inf is an action that p never takes.
        logq: (B, A) likewise.

    Returns:
        (B,) in nats; infinite where p takes an action that q never does.
    """
    # p log p -> 0 as p -> 0; masked before the product, so that the gradient is 0 too and not NaN
    log_ratio = (logp - logq).masked_fill(logp == -torch.inf, 0.0)  # (B, A)
    return (logp.exp() * log_ratio).sum(-1)
