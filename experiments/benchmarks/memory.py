"""Peak memory of each variant in a fresh process: a process inherits its parent's peak, so torch is imported there."""

import multiprocessing
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from manako.experiments.benchmarks.workload import Workload

MEMORY = ("rollout", "ours", "whole prompts", "batch 1")  # a rollout, and the three variants of an update


def peak_memory(workload: Workload) -> dict[str, float]:
    """Returns peak resident memory in MiB of fresh processes that loaded the policy, and played or updated once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        peaks = {name: pool.submit(_peak_of, workload, name).result() for name in MEMORY}
    return {"loaded": min(loaded for loaded, _ in peaks.values()), **{name: peak for name, (_, peak) in peaks.items()}}


def _peak_of(workload: Workload, name: str) -> tuple[float, float]:
    """Returns the peak in MiB after loading, and after one rollout or update, of a process of its own."""
    from manako.experiments.benchmarks.acting import Bench
    from manako.experiments.benchmarks.updating import Learner, trainer_args, update_work
    from manako.experiments.common.building import quiet_libraries

    quiet_libraries()
    bench = Bench(replace(workload, num_steps=1))
    loaded = peak_mib()
    if name == "rollout":
        bench.collect()
    else:
        with tempfile.TemporaryDirectory() as folder:
            update_work(Learner(bench, trainer_args(bench.workload, folder)), name, {})()
    return loaded, peak_mib()


def peak_mib() -> float:
    """Returns the peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
