"""The two variants of feature_cache.py: features stored, and pixels through the encoder every time."""

import dataclasses
import os
import tempfile
from typing import Any

from manako.experiments.benchmarks.acting import Bench
from manako.experiments.benchmarks.settings import FeatureCacheSettings
from manako.experiments.benchmarks.timing import Spread, Work, in_turns, ratio, spread
from manako.experiments.benchmarks.updating import Learner, trainer_args, update_work
from manako.experiments.benchmarks.workload import Workload
from manako.experiments.common.command_line import UsageError, show

STORED, AGAIN = "stored", "computed again"


def measure(given: FeatureCacheSettings) -> dict[str, Any]:
    """Measures, prints and returns rates and their ratios.

    Raises:
        UsageError: the policy stores no features.
    """
    load = os.getloadavg()
    bench, again = Bench(_workload(given)), Bench(_workload(given))  # the same weights and environments
    features = bench.policy.processing.features
    if features is None:
        raise UsageError(
            f"trainable is {given.trainable}: this policy stores no features; expected a frozen encoder of a composed "
            "policy, whose features are small."
        )
    show("features", f"{features.shape[0]} x {features.shape[1]}, {features.nbytes:,} bytes a step")
    again.policy.processing.features = None
    rates: dict[str, dict[str, list[float]]] = {}
    norms: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_args(bench.workload, folder)
        updates: dict[str, Work] = {
            name: update_work(Learner(which, args), "ours", norms) for name, which in ((STORED, bench), (AGAIN, again))
        }
        rates["updates"] = in_turns(updates, given.repeats, given.seconds)
    rates["rollouts"] = in_turns({STORED: bench.collect, AGAIN: again.collect}, given.repeats, given.seconds)
    results: dict[str, Any] = {
        "settings": dataclasses.asdict(given),
        "load_average": [load, os.getloadavg()],
        "bytes_a_step": features.nbytes,
    }
    for what, of_variants in rates.items():
        times = ratio(of_variants, STORED, AGAIN)
        medians = {name: spread(values) for name, values in of_variants.items()}
        results[what] = {"times": times._asdict(), **{name: found._asdict() for name, found in medians.items()}}
        show(what, f"{_said(medians[STORED])} samples/s stored, {_said(medians[AGAIN])} computed again")
        show("", f"{times.median:.2f} times ({times.low:.2f} to {times.high:.2f})")
    return results


def _workload(given: FeatureCacheSettings) -> Workload:
    return Workload(
        policy=given.policy,
        trainable=given.trainable,
        env=given.env,
        num_envs=given.num_envs,
        num_steps=given.num_steps,
        minibatch_size=given.minibatch_size,
        overhead_steps=1,
        overhead_epochs=1,
        answer="{action}",
        gemm_sizes=(),
        repeats=given.repeats,
        seconds=given.seconds,
        threads=given.threads,
        vision_encoder=given.vision_encoder,
        image_size=given.image_size,
    )


def _said(rate: Spread) -> str:
    return f"{rate.median:,.0f} ({rate.low:,.0f} to {rate.high:,.0f})"
