"""What rollout workers are given. Neither Ray nor torch is imported here."""

from dataclasses import dataclass

PLACEMENT, GONE = 60.0, 25.0  # seconds


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
    placement_timeout: float = PLACEMENT

    @property
    def replacement_timeout(self) -> float:
        """Seconds for which no worker at all may be there; as long as a place may take, where that was prolonged."""
        return self.placement_timeout if self.placement_timeout > PLACEMENT else min(GONE, self.placement_timeout)

    @property
    def threads(self) -> int:
        """CPU threads of torch in a worker."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        return f"{self.num_workers} x ({self.cpus:g} CPU, {self.gpus:g} GPU)"
