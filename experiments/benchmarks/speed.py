"""Measures speed and memory side by side in one run: rollouts, updates, trainer, preprocessing, share of the GEMM rate.

    python experiments/benchmark.py --policy tiny
    python experiments/benchmark.py --policy smollm2 --output smollm2.json

Everything is measured in turns (ours, theirs, ours, theirs, ...) and compared within a turn; tables and the JSON file
give the median and the range over the turns. What stands beside our way, and how FLOPs are counted, is in measuring.py.
Peak memory is that of a fresh process for each way, started before torch is imported here: a process inherits its
parent's peak. Numbers are of the machine and of the moment: the JSON file holds the load average before and after.
"""

import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would print when it starts and stops
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, run_main, setting  # noqa: E402
from manako.experiments.common.settings import RunConfig  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

    from manako.experiments.benchmarks.measuring import Bench, PPOConfig, Spread, Work

RUN = RunConfig()  # tiny is measured as run_ppo.py trains it
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "trainable": RUN.trainable,
        "num_steps": RUN.num_steps,
        "minibatch_size": RUN.minibatch_size,
        "overhead_steps": RUN.num_steps,
        "overhead_epochs": RUN.num_ppo_epochs,
        "answer": "{action}",
        "repeats": 5,
    },
    "smollm2": {
        "trainable": "lora",
        "num_steps": 8,
        "minibatch_size": 32,
        "overhead_steps": 1,
        "overhead_epochs": 2,
        "answer": '{"action": "{action}"}',
        "repeats": 3,
    },
}
QUICK = {"num_steps": 2, "minibatch_size": 16, "overhead_steps": 4, "overhead_epochs": 1}
TABLE_WIDTH = 110
MEMORY = ("rollout", "ours", "whole prompts", "batch 1")  # a rollout, and the three ways of an update


@dataclass
class BenchmarkConfig:
    """Settings of benchmark.py."""

    policy: str = setting("tiny", "preset", choices=tuple(PRESETS))
    env: str = setting("manako/GoTo-v0", "Gymnasium id with one-token action names")
    num_envs: int = setting(32, "environments side by side", ge=1)
    repeats: int | None = setting(None, "turns; by default 5 for tiny, 3 for smollm2", ge=1)
    seconds: float = setting(1.0, "least duration of one measurement", gt=0)
    threads: int | None = setting(None, "CPU threads of torch; by default torch's own choice", ge=1)
    output: str | None = setting(None, "JSON file for the results, must not exist")
    quick: bool = setting(False, "small sizes and one short turn, to see that everything runs")


def main() -> int:
    """One benchmark; returns the exit code."""
    started = time.perf_counter()
    config = parse(BenchmarkConfig, description="Measures speed and memory side by side in one run.")
    if config.output and Path(config.output).exists():
        raise UsageError(f"{config.output!r} exists and is not overwritten: give another file.")
    if config.output and not Path(config.output).resolve().parent.is_dir():
        raise UsageError(f"The folder of {config.output!r} does not exist: make it or give another file.")
    values = workload_values(config)
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    load_before = os.getloadavg()
    memory = peak_memory(values)

    from manako.experiments.benchmarks.measuring import Bench, Workload, trainer_args
    from manako.experiments.common.building import quiet_libraries

    quiet_libraries()
    bench = Bench(Workload(**values))
    results: dict[str, Any] = {"settings": values, "machine": {}, "memory_mib": memory}
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_args(bench.workload, folder)
        results["rollout"] = rollouts(bench)
        print_rates(console, f"rollout, env steps/s ({config.num_envs} envs)", results["rollout"])
        results["update"] = updates(bench, args)
        print_rates(console, f"update, samples/s (minibatches of {values['minibatch_size']})", results["update"])
        results["trainer"] = overhead(bench, args)
        results["preprocessing"] = frames(bench)
        print_rates(console, "preprocessing, frames/s", results["preprocessing"])
        results["share"] = share(bench, args)
        results["breakdown"] = where_time_goes(bench, args)
    results["memory_mib"]["this run"] = _peak_mib()
    results["machine"] = machine(load_before)
    results["seconds"] = time.perf_counter() - started
    print_rest(console, results)
    if config.output:
        Path(config.output).write_text(json.dumps(results, indent=2))
    return 0


def workload_values(config: BenchmarkConfig) -> dict[str, Any]:
    """The fields of `measuring.Workload`, as a mapping that needs no torch."""
    values = {
        "policy": config.policy,
        "env": config.env,
        "num_envs": config.num_envs,
        "seconds": config.seconds,
        "threads": config.threads,
        "gemm_sizes": (512, 1024, 2048, 4096),
        **PRESETS[config.policy],
    }
    if config.quick:
        values |= {**QUICK, "num_envs": min(config.num_envs, 4), "repeats": 1, "seconds": 0.01, "gemm_sizes": (256,)}
    if config.repeats:
        values["repeats"] = config.repeats
    if values["num_envs"] * values["overhead_steps"] % values["minibatch_size"]:
        raise UsageError(
            f"num_envs is {values['num_envs']}: expected one for which num_envs x {values['overhead_steps']} is a "
            f"multiple of {values['minibatch_size']}, since the trainer's overhead is measured on whole minibatches."
        )
    return values


# ---- the parts ------------------------------------------------------------------------------------------------------


def rollouts(bench: "Bench") -> dict[str, Any]:
    """Env steps a second: ours, the whole model over the batch, `generate` for each env."""
    from manako.experiments.benchmarks.measuring import GeneratePerEnv, WholeBatch, in_turns

    whole, generate = WholeBatch(bench), GeneratePerEnv(bench)
    seen = bench.env.reset()
    logprobs, values = whole.forward(seen)
    with bench.policy.frozen_weights():
        ours = bench.policy(bench.policy.prepare(seen.images, seen.instructions))
    difference = max(float((ours.logprobs - logprobs).abs().max()), float((ours.values - values).abs().max()))
    works: dict[str, Work] = {"ours": bench.collect, "whole batch": whole, "generate per env": generate}
    rates = in_turns(works, bench.workload.repeats, bench.workload.seconds)
    return _compared(rates) | {
        "logprob_difference": difference,  # between ours and whole batch, on the same observations
        "answer_tokens": generate.length,
    }


def updates(bench: "Bench", args: "PPOConfig") -> dict[str, Any]:
    """Samples a second: ours, without the shared prefix, and one sample at a time."""
    from manako.experiments.benchmarks.measuring import UPDATES, Learner, in_turns, update_work

    learner = Learner(bench, args)
    norms: dict[str, float] = {}
    works = {name: update_work(learner, name, norms) for name in UPDATES}
    rates = in_turns(works, bench.workload.repeats, bench.workload.seconds)
    return _compared(rates) | {"gradient_norm": norms}


def overhead(bench: "Bench", args: "PPOConfig") -> dict[str, Any]:
    """The trainer's update beside a bare loop over the same minibatches."""
    from manako.experiments.benchmarks.measuring import trainer_overhead

    measured = trainer_overhead(bench, args)
    return {
        "percent": _dict(measured.percent),
        "cpu_percent": _dict(measured.cpu_percent),
        "trainer_seconds": _dict(measured.trainer_seconds),
        "bare_seconds": _dict(measured.bare_seconds),
        "weight_difference": measured.weight_difference,
    }


def frames(bench: "Bench") -> dict[str, Any]:
    """Frames a second from uint8 to pixels."""
    from manako.experiments.benchmarks.measuring import in_turns, preprocessing

    works, equal = preprocessing(bench)
    rates = in_turns(works, bench.workload.repeats, min(0.3, bench.workload.seconds))
    return _compared(rates) | {"equal_pixels": equal}


def share(bench: "Bench", args: "PPOConfig") -> dict[str, Any]:
    """FLOP/s of forward, rollout and update, and their share of what this machine's matrix products reach."""
    from manako.experiments.benchmarks.measuring import (
        Learner,
        best_gemm_size,
        count_flops,
        gemm,
        gemms,
        in_flops,
        in_turns,
        ratio,
        spread,
        update_work,
    )

    size, by_size = best_gemm_size(bench.workload.gemm_sizes, min(0.5, bench.workload.seconds))
    works = {
        "policy forward": bench.rollout_forward(),
        "whole rollout": bench.collect,
        "update": update_work(Learner(bench, args), "ours", {}),
    }
    counted = {name: count_flops(work) for name, work in works.items()}
    shapes = counted["policy forward"][0].shapes
    in_turn = {
        "square matrices": gemm(size),
        "the model's shapes": gemms(shapes),
        **{name: in_flops(work, counted[name][0].total / counted[name][1]) for name, work in works.items()},
    }
    rates = in_turns(in_turn, bench.workload.repeats, bench.workload.seconds)
    return {
        "gflops_per_second": {name: _dict(spread([value / 1e9 for value in row])) for name, row in rates.items()},
        "share": {name: _dict(ratio(rates, name, "square matrices")) for name in in_turn},
        "share_of_the_models_shapes": {name: _dict(ratio(rates, name, "the model's shapes")) for name in works},
        "mflops_per_sample": {
            name: {
                "forward": {kind: count / units / 1e6 for kind, count in counter.forward.items()},
                "backward": {kind: count / units / 1e6 for kind, count in counter.backward.items()},
            }
            for name, (counter, units) in counted.items()
        },
        "square_gflops_per_second": {str(side): value / 1e9 for side, value in by_size.items()},
        "shapes": [[*shape, count] for shape, count in sorted(shapes.items())],  # M, K, N, times in `policy forward`
    }


def where_time_goes(bench: "Bench", args: "PPOConfig") -> dict[str, dict[str, float]]:
    """Shares of the time of a rollout's forwards and of an update, by kind of operation."""
    from manako.experiments.benchmarks.measuring import Learner, breakdown, update_work

    return {
        "policy forward": breakdown(bench.rollout_forward()),
        "update": breakdown(update_work(Learner(bench, args), "ours", {})),
    }


def peak_memory(values: dict[str, Any]) -> dict[str, Any]:
    """Peak resident memory in MiB of a fresh process after loading the policy, and after a rollout or an update."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        peaks = {name: pool.submit(_peak_of, values, name).result() for name in MEMORY}
    return {"loaded": min(loaded for loaded, _ in peaks.values()), **{name: peak for name, (_, peak) in peaks.items()}}


def _peak_of(values: dict[str, Any], name: str) -> tuple[float, float]:
    """In a process of its own: the peak after loading, and after one rollout or update."""
    from manako.experiments.benchmarks.measuring import Bench, Learner, Workload, trainer_args, update_work
    from manako.experiments.common.building import quiet_libraries

    quiet_libraries()
    bench = Bench(Workload(**{**values, "num_steps": 1}))
    loaded = _peak_mib()
    if name == "rollout":
        bench.collect()
    else:
        with tempfile.TemporaryDirectory() as folder:
            update_work(Learner(bench, trainer_args(bench.workload, folder)), name, {})()
    return loaded, _peak_mib()


def machine(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
    }


def _compared(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Rates and the ratio of ours to each other one."""
    from manako.experiments.benchmarks.measuring import ratio, spread

    return {
        "per_second": {name: _dict(spread(values)) for name, values in rates.items()},
        "ours_is_times": {name: _dict(ratio(rates, "ours", name)) for name in rates if name != "ours"},
    }


def _dict(values: "Spread") -> dict[str, float]:
    return values._asdict()


def _peak_mib() -> float:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# ---- tables ---------------------------------------------------------------------------------------------------------


def _table(console: "Console", title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _range(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['low']:{form}} to {values['high']:{form}})"


def print_rates(console: "Console", title: str, result: dict[str, Any]) -> None:
    """One row a way: its rate, and how many times faster ours is."""
    rows = [
        (name, _range(values, ",.1f"), _range(result["ours_is_times"][name], ".1f") if name != "ours" else "")
        for name, values in result["per_second"].items()
    ]
    _table(console, title, ("", "a second (range)", "ours is x times"), rows)


def print_rest(console: "Console", results: dict[str, Any]) -> None:
    """Agreement, trainer overhead, memory, shares and breakdown."""
    norms = ", ".join(f"{name} {norm:.5g}" for name, norm in results["update"]["gradient_norm"].items())
    console.print(
        "same numbers: log-probabilities and values of ours and whole batch differ by "
        f"{results['rollout']['logprob_difference']:.1e}; gradient norms {norms}; pixels "
        f"{'equal' if results['preprocessing']['equal_pixels'] else 'differ'}"
    )
    trainer = results["trainer"]
    console.print(
        f"trainer overhead over a bare loop: {_range(trainer['percent'], '.1f')} % of "
        f"{trainer['bare_seconds']['median']:.2f} s, {_range(trainer['cpu_percent'], '.1f')} % of its CPU time; "
        f"weights afterwards differ by {trainer['weight_difference']:.1e}"
    )
    _table(
        console,
        "peak memory",
        ("", "MiB"),
        [(name, f"{value:,.0f}") for name, value in results["memory_mib"].items()],
    )
    part = results["share"]
    _table(
        console,
        "share of the machine's float32 GEMM rate",
        ("", "GFLOP/s (range)", "share (range)", "MFLOP a sample, forward + backward"),
        [
            (
                name,
                _range(values, ".1f"),
                _range(part["share"][name], ".0%"),
                " + ".join(f"{sum(kinds.values()):,.1f}" for kinds in part["mflops_per_sample"].get(name, {}).values()),
            )
            for name, values in part["gflops_per_second"].items()
        ],
    )
    parts = results["breakdown"]
    _table(
        console,
        "where the time goes (profiled)",
        ("", *parts),
        [(kind, *(f"{shares[kind]:.0%}" for shares in parts.values())) for kind in parts["update"]],
    )
    load = results["machine"]
    console.print(
        f"{results['seconds']:.0f} s; {load['torch_threads']} threads on {load['cpu_cores']} cores, load average "
        f"{load['load_average_before'][0]:.1f} before and {load['load_average_after'][0]:.1f} after"
    )


if __name__ == "__main__":
    run_main(main)
