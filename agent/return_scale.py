"""Rewards in a unit of their own, so that learning does not depend on the unit in which an environment pays.

    G_t = r_t + gamma G_{t-1}, from 0 in each episode     what an episode has paid so far, discounted
    r_t <- clip(r_t / deviation(all G so far), -10, 10)

The usual method: the "reward scaling" of Engstrom et al. 2020 (https://arxiv.org/abs/2005.12729, section 3), which is
`VecNormalize(norm_obs=False)` of Stable-Baselines3 with its limit of 10, and gymnasium's `NormalizeReward`. Theirs know
the steps before a reward, this one the whole rollout that the reward stands in. No mean is taken off, which would
change the task. Without their epsilon a reward in another unit gives the very same number, as long as units differ by
powers of two; else the same to rounding. The value head learns returns of this unit; what is reported (returns,
metrics, data sets' rewards) stays in the environment's.
"""

from typing import Any

import torch
from torch import Tensor

from manako.agent.errors import TrainingError
from manako.agent.rollout import Rollout

LIMIT = 10.0  # of a scaled reward
EQUAL = 1e-6  # a deviation below this share of the root mean square is rounding


class ReturnScale:
    """The running deviation of the discounted return of N environments.

    Args:
        gamma: discount per step.
        num_envs: N.
        restarts: every rollout starts with new episodes, as the group methods' do, which compare episodes and so take
            rewards without a limit.

    Attributes:
        count, mean, squares: of all G so far: how many, their mean, their sum of squared deviations from it.
    """

    def __init__(self, gamma: float, num_envs: int, restarts: bool = False) -> None:
        self.gamma, self.restarts = gamma, restarts
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.paid = torch.zeros(num_envs, dtype=torch.float64)  # (N,) G of the episodes that go on

    @property
    def deviation(self) -> float:
        """What rewards are divided by; the root mean square where all G are equal, and 1 where all are 0."""
        if not self.count:
            return 1.0
        variance = self.squares / self.count
        size = (variance + self.mean**2) ** 0.5
        return variance**0.5 if variance**0.5 > EQUAL * size else size or 1.0

    def update(self, rewards: Tensor, ended: Tensor, failed: Tensor | None = None) -> None:
        """Adds T steps.

        Args:
            rewards: (T, N).
            ended: (T, N) bool, the episode ended with this step.
            failed: (T, N) bool, this was no step; None: all were.

        Raises:
            TrainingError: a reward is not finite.
        """
        if not torch.isfinite(rewards).all():
            raise TrainingError(
                f"{int((~torch.isfinite(rewards)).sum())} rewards are not finite (NaN or infinity): expected numbers; "
                "look at the environment's rewards."
            )
        if self.restarts:
            self.paid = torch.zeros_like(self.paid)
        paid = []
        for reward, end in zip(rewards.double(), ended, strict=True):
            self.paid = reward + self.gamma * self.paid  # (N,)
            paid.append(self.paid)
            self.paid = self.paid.masked_fill(end, 0.0)
        new = torch.stack(paid)  # (T, N)
        if failed is not None:
            new = new[~failed]
        if not new.numel():
            return
        # two sets' means and squares as one's (Chan et al. 1979)
        count, mean = new.numel(), float(new.mean())
        squares, apart, total = float((new - mean).square().sum()), mean - self.mean, self.count + new.numel()
        self.squares += squares + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    def __call__(self, rollout: Rollout) -> Rollout:
        """Returns the rollout with its rewards in the running unit, to which they are added first."""
        self.update(rollout.rewards, rollout.terminated | rollout.cut, rollout.failed)
        scaled = rollout.rewards.double() / self.deviation
        if not self.restarts:
            scaled = scaled.clamp(-LIMIT, LIMIT)
        return rollout._replace(rewards=scaled.to(rollout.rewards.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Returns all that goes on in a resumed run, as JSON takes it."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares, "paid": self.paid.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
        self.paid = torch.tensor(state["paid"], dtype=torch.float64)
