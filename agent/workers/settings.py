"""Who plays rollouts: this process or Ray workers, and what each worker is given. Light to import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from manako.agent.backends import BACKENDS
from manako.settings import setting

if TYPE_CHECKING:
    Backend = str
else:  # a line in the table is a choice of --rollout_backend
    Backend = Literal[tuple(BACKENDS)]


@dataclass(frozen=True)
class WorkerSettings:
    """The backend of rollouts and its workers."""

    rollout_backend: Backend = setting(
        "local", "this process, ray-env (environments in workers, the learner acts) or ray-replica (workers act too)"
    )
    num_workers: int | None = setting(
        None, "rollout workers of a Ray backend, a divisor of num_envs; 2 by default", ge=1
    )
    worker_cpus: float = setting(1.0, "CPU cores of a worker", gt=0)
    worker_gpus: float = setting(0.0, "GPUs of a worker, such as 0.5", ge=0)
    max_fault_rate: float = setting(
        0.05, "faults of environments in a step that are survived; more, of the newest 1000 steps, end it", ge=0, le=1
    )
    step_timeout: float | None = setting(
        None, "seconds after which a worker breaks off an env's step and makes it anew; by default worker_timeout", gt=0
    )
    worker_timeout: float = setting(300.0, "seconds after which a worker that does not answer is replaced", gt=0)
    placement_timeout: float = setting(60.0, "seconds that a worker may wait for its place and start", gt=0)
    ray_address: str | None = setting(
        None, "host:port of a Ray cluster, or auto for this machine's; by default RAY_ADDRESS, else one is started"
    )
    rollout_batch_size: int | None = setting(
        None, "slots of one forward while acting; with the same one all backends compute the same bits", ge=1
    )
    async_rollouts: bool = setting(False, "ray-replica collects the next rollout during the update, one version behind")

    @property
    def workers(self) -> int:
        """How many workers there are: none beside this process counts as one."""
        return 1 if self.rollout_backend == "local" else self.num_workers or 2
