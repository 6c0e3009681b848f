"""What rollout workers are given. Neither Ray nor torch is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerOptions:
    """What workers are given.

    Args:
        num_workers: how many.
        cpus: CPU cores of each.
        gpus: GPUs of each, may be a fraction.
        timeout: seconds after which a call that has not returned counts as hung.
        placement_timeout: seconds that a worker may wait for its place in the cluster.
    """

    num_workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    timeout: float = 300.0
    placement_timeout: float = 60.0

    @property
    def threads(self) -> int:
        """CPU threads of torch in a worker."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        return f"{self.num_workers} x ({self.cpus:g} CPU, {self.gpus:g} GPU)"
