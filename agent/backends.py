"""Where rollouts come from. A backend is a module with `make_rollouts(plan)` and a line in `BACKENDS`.

`--rollout_backend NAME` then selects it. All give the same trajectories for the same seed and weights. Light: a
backend's module is imported when it is selected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manako.agent.interfaces import Rollouts, VectorEnv
    from manako.agent.workers.options import WorkerOptions
    from manako.policies.interface import Policy

BACKENDS = {
    "local": "manako.agent.collector",  # in this process
    "ray-env": "manako.agent.workers.ray_env",  # environments in workers, the learner acts
    "ray-replica": "manako.agent.workers.ray_replica",  # workers act with copies of the policy
}


@dataclass(frozen=True)
class RolloutPlan:
    """What is played, by whom and how often: all that a backend is given.

    Args:
        make_segment: (first slot, number of slots) -> environments that were not started; it travels to workers.
        policy: who acts in this process.
        make_policy: makes a copy of it; it travels to workers.
        num_envs: N.
        num_steps: T.
        num_iterations: rollouts of the run.
        seed: the run's.
        options: of the workers, for backends that have some.
        reference: keep what the policy says that it was when training started.
        batch_size: slots of one forward while acting; None is all.
        rounds: every rollout starts new episodes in all slots.
        record: keep what a data set needs.
        ask_expert: and what the env's expert would do.
        bf16: bfloat16 autocast in workers, as in the learner's updates.
        asynchronous: collect the next rollout during the update, one version behind.
    """

    make_segment: "Callable[[int, int], VectorEnv]"
    policy: "Policy"
    make_policy: "Callable[[], Policy]"
    num_envs: int
    num_steps: int
    num_iterations: int
    seed: int
    options: "WorkerOptions | None" = None
    reference: bool = False
    batch_size: int | None = None
    rounds: bool = False
    record: bool = False
    ask_expert: bool = False
    bf16: bool = False
    asynchronous: bool = False


def make_rollouts(backend: str, plan: RolloutPlan) -> "Rollouts":
    """Returns the rollouts of a plan; Ray must be connected for backends with workers.

    Args:
        backend: a key of `BACKENDS`.
        plan: what is played.

    Raises:
        WorkersError: workers find no place, or cannot make environments or policy.
    """
    rollouts: Rollouts = import_module(BACKENDS[backend]).make_rollouts(plan)
    return rollouts
