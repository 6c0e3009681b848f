"""From a rollout to what minibatches are drawn from: advantages, and everything flat."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manako.agent.advantages import bilevel_gae, gae, normalize, token_gae
from manako.agent.errors import TrainingError
from manako.agent.group_advantages import group_advantages
from manako.agent.rollout import Rollout
from manako.policies.interface import Policy, Rows

NO_TOKENS = (
    "token_credit is {credit}, but the policy says an action by one number: expected token_credit step, or "
    "--action_format text without --thought_coef."
)


class Samples(NamedTuple):
    """B samples of a rollout with their advantages."""

    inputs: Rows
    actions: Rows
    logprobs: Tensor  # (B, S) of the policy that the update starts from
    mask: Tensor  # (B, S) bool, True = sampled by the policy, so learned from
    values: Tensor  # (B,), or (B, S) where tokens have their own
    advantages: Tensor  # the same, normalised over the whole rollout
    returns: Tensor  # the same
    reference: Tensor | None = None  # (B, A) or (B, S), see `Rollout`
    importance: Tensor | None = None  # (B,) min(1, pi / pi_behaviour), where an older policy acted
    usable: Tensor | None = None  # (B,) bool, False = nothing is learned from it; None is all True

    def select(self, rows: Tensor) -> "Samples":
        """Returns the samples at these rows."""
        fields = self._asdict().items()
        parts: dict[str, Any] = {
            name: value if value is None else value.select(rows) if isinstance(value, Rows) else value[rows]
            for name, value in fields
        }
        return Samples(**parts)

    def to(self, device: torch.device) -> "Samples":
        """Returns the same on another device."""
        parts: dict[str, Any] = {
            name: value if value is None else value.to(device) for name, value in self._asdict().items()
        }
        return Samples(**parts)


def recompute_logprobs(rollout: Rollout, policy: Policy, max_batch: int = 256) -> tuple[Rollout, Tensor]:
    """Returns a rollout that older weights played, with log-probabilities and values of the current policy.

    Its log-probabilities are those that the update starts from (the proximal policy of Hilton et al. 2021,
    https://arxiv.org/abs/2110.00641), its values those of the current value head.

    Returns:
        The rollout with these, and (T, N) min(1, pi / pi_behaviour), the truncated importance weights of V-trace
        (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561) with both limits at 1.
    """
    device, shape = policy.device, rollout.values.shape
    with policy.frozen_weights():
        said = []
        for rows in torch.arange(len(rollout.inputs)).split(max_batch):
            part = policy.evaluate_actions(
                rollout.inputs.select(rows).to(device), rollout.actions.select(rows).to(device)
            )
            said.append((part.logprobs.cpu(), part.values.cpu()))
        beyond = torch.cat(
            [
                policy.predict_values(rollout.bootstrap.select(r))
                for r in torch.arange(len(rollout.bootstrap)).split(max_batch)
            ]
        )  # (N + F,)
    proximal = torch.cat([logprobs for logprobs, _ in said]).view(rollout.logprobs.shape)  # (T, N, S)
    values = torch.cat([part for _, part in said]).view(shape)  # (T, N)
    next_values = torch.cat([values[1:], beyond[None, : shape[1]]])
    steps, slots = rollout.bootstrap_at.unbind(1)
    next_values[steps, slots] = beyond[shape[1] :]
    log_ratio = (proximal - rollout.logprobs).masked_fill(~rollout.mask, 0.0)
    ratio = log_ratio.sum(-1).exp()  # (T, N) of whole answers
    return rollout._replace(logprobs=proximal, values=values, next_values=next_values), ratio.clamp_max(1.0)


def with_advantages(rollout: Rollout, gamma: float, gae_lambda: float, importance: Tensor | None = None) -> Samples:
    """Returns the rollout's samples with advantages by GAE over env steps, normalised over the whole rollout.

    Steps that failed are none of them: what an environment would have paid is not known. The steps before in the same
    episode are right and are kept, with the trace cut at the last thing seen, as at a truncation: dropped, they would
    be missing where environments break most.

    Args:
        rollout: as the policy that is updated sees it.
        gamma: discount per step.
        gae_lambda: lambda of GAE.
        importance: (T, N) weights of `recompute_logprobs`, where an older policy acted.
    """
    advantages, returns = gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.cut,
        gamma=gamma,
        gae_lambda=gae_lambda,
        importance=importance,
    )
    return _flat(rollout, _normalized(advantages, usable_of(rollout)), returns, importance, usable_of(rollout))


def usable_of(rollout: Rollout) -> Tensor | None:
    """Returns (T, N) bool, which steps were taken; None where all were."""
    return None if rollout.failed is None else ~rollout.failed


def _normalized(advantages: Tensor, kept: Tensor | None) -> Tensor:
    """Advantages normalised over those that are kept, and 0 for the others."""
    if kept is None or not kept.any():
        return normalize(advantages)
    return torch.zeros_like(advantages).masked_scatter(kept, normalize(advantages[kept][None])[0])


def with_token_advantages(rollout: Rollout, credit: str, gamma: float, gae_lambda: float) -> Samples:
    """Returns the rollout's samples with an advantage for each token, normalised over all that was sampled.

    Args:
        rollout: of a policy with a critic on tokens.
        credit: `token` or `bilevel`.
        gamma: discount per step.
        gae_lambda: lambda of GAE.

    Raises:
        TrainingError: the policy has no critic on tokens, or says a step by one number.
    """
    of_tokens, mask = rollout.token_values, rollout.mask
    if of_tokens is None or of_tokens.shape != mask.shape:
        raise TrainingError(NO_TOKENS.format(credit=credit))
    ends = rollout.next_values, rollout.terminated, rollout.cut
    if credit == "token":
        advantages, returns = token_gae(rollout.rewards, of_tokens, mask, *ends, gamma, gae_lambda)
    else:
        advantages, returns = bilevel_gae(rollout.rewards, rollout.values, of_tokens, mask, *ends, gamma, gae_lambda)
    usable = usable_of(rollout)
    kept = mask if usable is None else mask & usable[..., None]
    sampled = normalize(advantages[kept][None])[0]
    samples = _flat(rollout, rollout.values, rollout.values, None, usable)
    return samples._replace(
        values=of_tokens.flatten(0, 1),
        advantages=torch.zeros_like(advantages).masked_scatter(kept, sampled).flatten(0, 1),
        returns=returns.flatten(0, 1),
    )


def with_group_advantages(
    rollout: Rollout,
    method: str,
    group_size: int,
    gamma: float,
    step_weight: float,
    importance: Tensor | None = None,
) -> Samples:
    """Returns the rollout's samples with advantages by comparison within a group; see `group_advantages`."""
    shape = rollout.rewards.shape
    advantages, usable = group_advantages(
        method,
        rollout.rewards,
        rollout.terminated | rollout.truncated,
        torch.arange(shape[1]) // group_size,
        rollout.inputs.digests().view(shape) if method == "gigpo" else None,
        gamma,
        step_weight,
        rollout.failed,
    )
    return _flat(rollout, advantages, torch.zeros(shape), importance, usable)


def _flat(
    rollout: Rollout, advantages: Tensor, returns: Tensor, importance: Tensor | None, usable: Tensor | None = None
) -> Samples:
    """The rollout's samples with these (T, N) numbers."""
    return Samples(
        inputs=rollout.inputs,
        actions=rollout.actions,
        logprobs=rollout.logprobs.flatten(0, 1),
        mask=rollout.mask.flatten(0, 1),
        values=rollout.values.flatten(),
        advantages=advantages.flatten(),
        returns=returns.flatten(),
        reference=rollout.reference,
        importance=None if importance is None else importance.flatten(),
        usable=None if usable is None else usable.flatten(),
    )
