"""Advantages without a critic: an episode is judged by others that started from the same seed.

    rloo    its return less the mean of the others' (Ahmadian et al. 2024, arXiv:2402.14740)
    grpo    its return less the group's mean, over the group's deviation (Shao et al. 2024,
            arXiv:2402.03300)
    gigpo   grpo's, and for each step the same among the group's steps of the same observation (Feng et al. 2025,
            arXiv:2505.10978)

Pure functions. An episode that the rollout cut off has no return. So the e-th episodes of a group take part where all
slots of the group have played theirs to the end, and none of them does where one was cut off: else short episodes
would be compared among themselves. Samples that take no part are marked, and nothing is learned from them;
`whole_groups` says how many groups are left where episodes outlast the rollout.
"""

import torch
from torch import Tensor

from manako.agent.errors import TrainingError

METHODS = ("grpo", "rloo", "gigpo")
EPSILON = 1e-6


def group_mean_and_count(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for each element the mean and the sum of squared deviations of its group, and the group's size.

    Args:
        values: (M,).
        groups: (M,) int64, any numbers.

    Returns:
        Three (M,) float64.
    """
    _, place = torch.unique(groups, return_inverse=True)  # (M,)
    number = int(place.max()) + 1 if len(place) else 0
    count = torch.zeros(number, dtype=torch.float64).index_add(0, place, torch.ones(len(place), dtype=torch.float64))
    total = torch.zeros(number, dtype=torch.float64).index_add(0, place, values.double())
    mean = total / count
    squares = torch.zeros(number, dtype=torch.float64).index_add(0, place, (values.double() - mean[place]).square())
    return mean[place], squares[place], count[place]


def grpo(returns: Tensor, groups: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Returns (R - group mean) / (group standard deviation + epsilon); 0 where all returns are equal.

    Args:
        returns: (M,) of M episodes.
        groups: (M,) int64, the group of each.
        sizes: (M,) of what was summed to each return, without signs; None: the returns' own. Epsilon is a millionth of
            their mean in the group: it does not hang on the unit, and rounding is no difference.

    Returns:
        (M,) float32.
    """
    mean, squares, count = group_mean_and_count(returns, groups)
    # the unbiased deviation, as in TRL's GRPO trainer; a group of one has none
    deviation = (squares / (count - 1).clamp_min(1)).sqrt()
    size = group_mean_and_count(returns.abs() if sizes is None else sizes, groups)[0]
    # at least the smallest number: where all is 0 so is the advantage
    return ((returns.double() - mean) / (deviation + EPSILON * size + torch.finfo(torch.float64).tiny)).float()


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """Returns R - mean of the others in the group = (R - group mean) n / (n - 1); 0 for a group of one.

    Args:
        returns: (M,) of M episodes.
        groups: (M,) int64, the group of each.

    Returns:
        (M,) float32.
    """
    mean, _, count = group_mean_and_count(returns, groups)
    return ((returns.double() - mean) * count / (count - 1).clamp_min(1)).float()


def returns_to_go(rewards: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """Returns R_t = r_t + gamma R_{t+1} inside each episode.

    Args:
        rewards: (T, N).
        ended: (T, N) bool, the episode ended with this step.
        gamma: discount per step.

    Returns:
        (T, N) float32.
    """
    result = torch.zeros_like(rewards, dtype=torch.float32)
    following = torch.zeros_like(result[0])
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * following * ~ended[t]
        result[t] = following
    return result


def group_advantages(
    method: str,
    rewards: Tensor,
    ended: Tensor,
    groups: Tensor,
    states: Tensor | None = None,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    failed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns advantages of a rollout in which every slot started its episodes at the first row.

    The e-th episode of a slot is compared with the e-th ones of its group's other slots, which have the same seed.

    Args:
        method: grpo, rloo or gigpo.
        rewards: (T, N).
        ended: (T, N) bool, terminated or truncated.
        groups: (N,) int64, the group of each slot.
        states: (T, N) int64, equal where the observation is; for gigpo.
        gamma: discount of gigpo's returns to go.
        step_weight: omega of gigpo, the weight of the step's advantage beside the episode's.
        failed: (T, N) bool, the environment broke in this step: its episode is over, and was none; None: nowhere.

    Returns:
        (T, N) float32 advantages, and (T, N) bool: True = of an episode that ended, as did all of its group.

    Raises:
        TrainingError: an unknown method, or gigpo without states.
    """
    if method not in METHODS:
        raise TrainingError(f"advantage is {method!r}: expected one of gae, {', '.join(METHODS)}.")
    if method == "gigpo" and states is None:
        raise TrainingError("gigpo compares steps that saw the same: expected the states' digests.")
    steps, slots = rewards.shape
    ended = ended if failed is None else ended | failed
    ends = ended.long()
    episode = ends.cumsum(0) - ends  # (T, N) number of the slot's episode
    complete = episode < ends.sum(0)  # (T, N)
    key = (torch.arange(slots) * steps + episode).flatten()  # (T * N,) one number an episode
    _, place = torch.unique(key, return_inverse=True)
    number = int(place.max()) + 1
    returns = torch.zeros(number, dtype=torch.float64).index_add(0, place, rewards.flatten().double())
    first = torch.full((number,), len(key), dtype=torch.long)
    first = first.scatter_reduce(0, place, torch.arange(len(key)), "amin")  # the first sample of each episode
    whole = complete.flatten()[first]  # (episodes,)
    if failed is not None:
        whole[place[failed.flatten()]] = False
    group = (groups.expand(steps, slots) * steps + episode).flatten()[first]  # (episodes,)
    judged = torch.zeros(number)
    if method == "rloo":
        judged[whole] = rloo(returns[whole], group[whole])
    else:
        sizes = torch.zeros(number, dtype=torch.float64).index_add(0, place, rewards.flatten().double().abs())
        judged[whole] = grpo(returns[whole], group[whole], sizes[whole])
    members = torch.unique(groups, return_counts=True)[1][torch.unique(groups, return_inverse=True)[1]]  # (N,)
    members = members.expand(steps, slots).flatten()[first]  # (episodes,)
    _, _, ended_members = group_mean_and_count(returns[whole], group[whole])
    usable = torch.zeros(number, dtype=torch.bool)
    usable[whole] = (ended_members == members[whole]) & (ended_members > 1)
    mask = usable[place]  # (T * N,)
    advantages = judged[place]
    if method == "gigpo":
        assert states is not None
        togo = returns_to_go(rewards, ended, gamma).flatten()[mask]
        # anchor states: the same observation in the same group and episode number
        _, seen = torch.unique(torch.stack([group[place], states.flatten()], dim=1)[mask], dim=0, return_inverse=True)
        summed = returns_to_go(rewards.abs(), ended, gamma).flatten()[mask]
        advantages[mask] += step_weight * grpo(togo, seen, summed)
    return (advantages * mask).view(steps, slots), mask.view(steps, slots)


def whole_groups(ended: Tensor, group_size: int, failed: Tensor | None = None) -> float:
    """Returns the share of groups whose slots all played their first episode of the rollout to its end.

    Args:
        ended: (T, N) bool, terminated or truncated.
        group_size: neighbouring slots of a group.
        failed: see `group_advantages`.
    """
    if failed is not None:  # what ends after the first episode failed is another one
        ended = ended & (failed.cumsum(0) == 0)
    return ended.any(0).view(-1, group_size).all(1).double().mean().item()
