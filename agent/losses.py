"""PPO's losses and the numbers that tell how an update went: tensors in, tensors out.

Everything is the mean over the batch it is given. Log-probabilities are float32 of whole actions; nothing is averaged
over tokens here, and advantages come normalised (see advantages.py).
"""

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7), to be minimised.

    Args:
        logprobs: (B,) log pi(a|s) of the policy being trained.
        old_logprobs: (B,) log pi_old(a|s) of the policy that the update starts from, which usually drew the action.
        advantages: (B,).
        clip_range: epsilon; beyond 1 ± epsilon a ratio earns nothing more.
        importance: (B,) pi_old / pi_behaviour where an older policy drew the action, truncated: the decoupled
            objective of Hilton et al. 2021 (https://arxiv.org/abs/2110.00641); None is 1.

    Returns:
        The loss, (), and the ratio pi / pi_old, (B,).
    """
    ratio = (logprobs - old_logprobs).exp()  # (B,)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # L^CLIP = E[min(r A, clip(r, 1 - eps, 1 + eps) A)]
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # (B,)
    return -(surrogate if importance is None else importance * surrogate).mean(), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range_vf: float | None) -> Tensor:
    """Half the squared error, with OpenAI Baselines' clipping of how far the value may move from its old one.

    Source: https://github.com/openai/baselines/blob/master/baselines/ppo2/model.py

    Args:
        values: (B,) of the value head being trained.
        old_values: (B,) stored when the action was sampled.
        returns: (B,) targets.
        clip_range_vf: in units of the return; None for the plain squared error.

    Returns:
        The loss, ().
    """
    squared = (values - returns).square()  # (B,)
    if clip_range_vf is None:
        return 0.5 * squared.mean()
    clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
    # L^VF = 0.5 E[max((V - R)^2, (clip(V, V_old ± eps) - R)^2)]
    return 0.5 * torch.max(squared, (clipped - returns).square()).mean()


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """KL(pi_old || pi) estimated from the sampled actions: k3 of http://joschu.net/blog/kl-approx.html, never negative.

    Args:
        logprobs: (B,) of the policy being trained.
        old_logprobs: (B,) stored when the action was sampled.

    Returns:
        The estimate in nats, (), without a gradient.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    # k3 = (r - 1) - log r
    return (log_ratio.expm1() - log_ratio).mean()


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Share of the batch, in [0, 1], whose ratio (B,) lies outside 1 ± `clip_range`; no gradient."""
    return ((ratio.detach() - 1).abs() > clip_range).float().mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): 1 is a perfect value function, 0 no better than a constant, below 0 worse than one.

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
    """Exact KL(p || q) of two closed sets of actions.

    Args:
        logp: (B, A) normalised log-probabilities; -inf is an action that p never takes.
        logq: (B, A) likewise.

    Returns:
        (B,) in nats; infinite where p takes an action that q never does.
    """
    # p log p -> 0 as p -> 0; masked before the product, so that the gradient is 0 too and not NaN
    log_ratio = (logp - logq).masked_fill(logp == -torch.inf, 0.0)  # (B, A)
    return (logp.exp() * log_ratio).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """-sum p log p in nats of a closed set of actions: (B, A) normalised log-probabilities -> (B,)."""
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
