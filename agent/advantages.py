"""Advantages of a rollout: generalised advantage estimation over env steps, and their normalisation.

Pure functions on (T, N) tensors: T steps of N environments. There is no "last value" argument: every step brings the
value of the observation that it returned, so a truncated episode is bootstrapped from its own last frame, and the end
of the rollout is no special case.
"""

import torch
from torch import Tensor

from manako.agent.errors import NotFiniteError, TrainingError


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns advantages and value targets by generalised advantage estimation.

    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.

    Args:
        rewards: (T, N) r_t, what the step paid.
        values: (T, N) V(s_t), of the observation that the action was taken on.
        next_values: (T, N) V(s_{t+1}), of the observation that the step returned: an episode's last frame where it
            ended, not the first frame of the next episode.
        terminated: (T, N) bool; the episode ended in the environment's own terms, and nothing follows.
        truncated: (T, N) bool; the episode was cut off, and `next_values` stands for what would have followed.
        gamma: discount per step, in [0, 1].
        gae_lambda: 0 for one-step advantages (low variance), 1 for the discounted return less the value (no bias).
        importance: (T, N) rho_t = min(1, pi(a_t|s_t) / pi_behaviour(a_t|s_t)) where an older policy acted: later steps
            count as far as pi would have taken them, as in V-trace (https://arxiv.org/abs/1802.01561); None is 1.

    Returns:
        (T, N) float32 advantages A, and (T, N) float32 targets of the value function, values + rho A: without
        `importance` the returns.

    Raises:
        TrainingError: the shapes differ, the flags are not bool, or a number is not finite.
    """
    rho = torch.ones_like(values, dtype=torch.float32) if importance is None else importance.float()  # (T, N)
    _check(
        rewards=rewards,
        values=values,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        importance=rho,
    )
    rewards, values, next_values = rewards.float(), values.float(), next_values.float()
    # delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
    deltas = rewards + gamma * next_values * (~terminated) - values  # (T, N)
    continues = ~(terminated | truncated)  # (T, N): the next row belongs to the same episode
    advantages = torch.zeros_like(deltas)  # (T, N)
    following = torch.zeros_like(deltas[0])  # (N,) rho_{t+1} A_{t+1}
    for t in reversed(range(len(deltas))):
        # A_t = delta_t + gamma lambda rho_{t+1} A_{t+1}, the chain broken where an episode ended
        advantages[t] = deltas[t] + gamma * gae_lambda * continues[t] * following
        following = rho[t] * advantages[t]
    return advantages, rho * advantages + values


def token_gae(
    rewards: Tensor,
    token_values: Tensor,
    mask: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Returns advantages and value targets of tokens: an episode is one row of tokens, and a step's last one is paid.

    The token-level estimator of VAGEN (https://arxiv.org/abs/2510.16907), with the discount where time passes: inside
    an answer gamma is 1, so a long answer is not worth less than a short one.

    Args:
        rewards: (T, N) of env steps.
        token_values: (T, N, S) V before each token.
        mask: (T, N, S) bool, True = sampled by the policy; each answer has a token at least, its first one.
        next_values: see `gae`.
        terminated: see `gae`.
        truncated: see `gae`.
        gamma: discount per env step.
        gae_lambda: of every token.

    Returns:
        (T, N, S) float32 advantages and targets, 0 where nothing was sampled.

    Raises:
        TrainingError: see `gae`.
    """
    return _token_gae(rewards, token_values, mask, next_values, terminated, truncated, gamma, gae_lambda)


def bilevel_gae(
    rewards: Tensor,
    values: Tensor,
    token_values: Tensor,
    mask: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
    token_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns advantages and value targets of tokens: first of the steps, then inside each answer, backward.

    The bi-level estimator of VAGEN (https://arxiv.org/abs/2510.16907): the step's return A_t + V_t is what its last
    token is paid, gamma is 1 inside an answer, and nothing goes from one answer to another.

    Args:
        rewards: see `gae`.
        values: see `gae`.
        token_values: see `token_gae`.
        mask: see `token_gae`.
        next_values: see `gae`.
        terminated: see `gae`.
        truncated: see `gae`.
        gamma: discount per env step.
        gae_lambda: of env steps.
        token_lambda: of the tokens inside an answer; 1 in the paper.

    Returns:
        (T, N, S) float32 advantages and targets, 0 where nothing was sampled.

    Raises:
        TrainingError: see `gae`.
    """
    _, returns = gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda)  # (T, N)
    alone = torch.ones_like(terminated)  # every answer ends
    return _token_gae(returns, token_values, mask, torch.zeros_like(returns), alone, ~alone, 1.0, token_lambda)


def _token_gae(
    rewards: Tensor,
    token_values: Tensor,
    mask: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    _check(rewards=rewards, next_values=next_values, terminated=terminated, truncated=truncated)
    if token_values.shape != mask.shape or mask.shape[:2] != rewards.shape:
        raise TrainingError(
            f"token_values has shape {tuple(token_values.shape)}, mask {tuple(mask.shape)} and rewards "
            f"{tuple(rewards.shape)}: expected (T, N, S) twice and (T, N)."
        )
    values = token_values.float().masked_fill(~mask, 0.0)
    _check(token_values=values.flatten(1))
    continues = (~(terminated | truncated)).float()
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(rewards[0], dtype=torch.float32)  # (N,) A of the next answer's first token
    for t in reversed(range(len(rewards))):
        # last token: delta = r_t + gamma V_{t+1} - V, then gamma lambda A_{t+1}; the others: delta = V_next - V
        value = rewards[t].float() + gamma * next_values[t].float() * (~terminated[t])  # (N,) what follows a token
        chain = gamma * gae_lambda * continues[t] * following
        for at in reversed(range(mask.shape[2])):
            here = mask[t, :, at]
            advantage = value - values[t, :, at] + chain
            advantages[t, :, at] = torch.where(here, advantage, 0.0)
            value = torch.where(here, values[t, :, at], value)
            chain = torch.where(here, gae_lambda * advantage, chain)
        following = advantages[t, :, 0]
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def normalize(advantages: Tensor) -> Tensor:
    """Returns the advantages with mean 0 and standard deviation 1 over the whole rollout.

    Over the rollout and never over a minibatch: else gradient accumulation, which splits minibatches, would change the
    result. Equal advantages (nothing to learn from) become zeros.

    Args:
        advantages: (T, N), at least one element.

    Returns:
        (T, N) float32.

    Raises:
        TrainingError: an advantage is not finite.
    """
    _check(advantages=advantages)
    advantages = advantages.float()
    if advantages.min() == advantages.max():  # not "std == 0": the mean of equal numbers is rounded
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)


def _check(**tensors: Tensor) -> None:
    """One shape for all, flags in bool, finite numbers."""
    first_name, first = next(iter(tensors.items()))
    if first.ndim != 2 or first.numel() == 0:
        raise TrainingError(
            f"{first_name} has shape {tuple(first.shape)}: expected (T, N), at least one step of one environment."
        )
    for name, tensor in tensors.items():
        if tensor.shape != first.shape:
            raise TrainingError(
                f"{name} has shape {tuple(tensor.shape)} and {first_name} {tuple(first.shape)}: "
                "expected one (T, N) for all, so stack them over the same steps."
            )
        if name in ("terminated", "truncated"):
            if tensor.dtype != torch.bool:
                raise TrainingError(f"{name} is {tensor.dtype}: expected torch.bool, so convert it with .bool().")
        elif not torch.isfinite(tensor).all():
            raise NotFiniteError(
                f"{name} holds {int((~torch.isfinite(tensor)).sum())} values that are not finite (NaN or infinity): "
                "expected numbers; look at the rewards and at the value head before this rollout."
            )
