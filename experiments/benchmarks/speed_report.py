"""What speed.py measures in its own process, in turns, and its tables."""

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from manako.agent.ppo_config import PPOConfig
from manako.experiments.benchmarks.acting import Bench, GeneratePerEnv, WholeBatch, preprocessing
from manako.experiments.benchmarks.flops import best_gemm_size, breakdown, count_flops, gemm, gemms, in_flops
from manako.experiments.benchmarks.memory import peak_mib
from manako.experiments.benchmarks.timing import Spread, Work, in_turns, ratio, spread
from manako.experiments.benchmarks.updating import UPDATES, Learner, trainer_args, trainer_overhead, update_work
from manako.experiments.benchmarks.workload import Workload
from manako.experiments.common.building import quiet_libraries

TABLE_WIDTH = 110


def measure(workload: Workload, memory: dict[str, float], load: tuple[float, float, float]) -> dict[str, Any]:
    """Measures and prints everything.

    Args:
        workload: what is run.
        memory: of fresh processes, as `peak_memory` measured it.
        load: the machine's load average before.

    Returns:
        All results, as the JSON file holds them.
    """
    started = time.perf_counter()
    quiet_libraries()
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    bench = Bench(workload)
    results: dict[str, Any] = {"settings": asdict(workload), "machine": {}, "memory_mib": dict(memory)}
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_args(workload, folder)
        results["rollout"] = measure_rollouts(bench)
        print_rates(console, f"rollout, env steps/s ({workload.num_envs} envs)", results["rollout"])
        results["update"] = measure_updates(bench, args)
        print_rates(console, f"update, samples/s (minibatches of {workload.minibatch_size})", results["update"])
        results["trainer"] = measure_overhead(bench, args)
        results["preprocessing"] = measure_preprocessing(bench)
        print_rates(console, "preprocessing, frames/s", results["preprocessing"])
        results["share"] = measure_flops(bench, args)
        results["breakdown"] = measure_breakdown(bench, args)
    results["memory_mib"]["this run"] = peak_mib()
    results["machine"] = describe_machine(load)
    results["seconds"] = time.perf_counter() - started
    print_rest(console, results)
    return results


def measure_rollouts(bench: Bench) -> dict[str, Any]:
    """Measures env steps a second: ours, the whole model over the batch, `generate` for each env."""
    whole, generate = WholeBatch(bench), GeneratePerEnv(bench)
    seen = bench.env.reset()
    logprobs, values = whole.forward(seen)
    with bench.policy.frozen_weights():
        ours, our_values = bench.policy.distribution(bench.policy.prepare(seen.images, seen.instructions))
    difference = max(float((ours - logprobs).abs().max()), float((our_values - values).abs().max()))
    works: dict[str, Work] = {"ours": bench.collect, "whole batch": whole, "generate per env": generate}
    rates = in_turns(works, bench.workload.repeats, bench.workload.seconds)
    return _compared(rates) | {
        "logprob_difference": difference,  # between ours and whole batch, on the same observations
        "answer_tokens": generate.length,
    }


def measure_updates(bench: Bench, args: PPOConfig) -> dict[str, Any]:
    """Measures samples a second: ours, without the shared prefix, and one sample at a time."""
    learner = Learner(bench, args)
    norms: dict[str, float] = {}
    works = {name: update_work(learner, name, norms) for name in UPDATES}
    rates = in_turns(works, bench.workload.repeats, bench.workload.seconds)
    return _compared(rates) | {"gradient_norm": norms}


def measure_overhead(bench: Bench, args: PPOConfig) -> dict[str, Any]:
    """Measures the trainer's update beside a bare loop over the same minibatches."""
    measured = trainer_overhead(bench, args)
    return {
        "percent": _dict(measured.percent),
        "cpu_percent": _dict(measured.cpu_percent),
        "trainer_seconds": _dict(measured.trainer_seconds),
        "bare_seconds": _dict(measured.bare_seconds),
        "weight_difference": measured.weight_difference,
    }


def measure_preprocessing(bench: Bench) -> dict[str, Any]:
    """Measures frames a second from uint8 to pixels."""
    works, equal = preprocessing(bench)
    rates = in_turns(works, bench.workload.repeats, min(0.3, bench.workload.seconds))
    return _compared(rates) | {"equal_pixels": equal}


def measure_flops(bench: Bench, args: PPOConfig) -> dict[str, Any]:
    """Measures FLOP/s of forward, rollout and update, and their share of what this machine's matrix products reach."""
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


def measure_breakdown(bench: Bench, args: PPOConfig) -> dict[str, dict[str, float]]:
    """Measures shares of the time of a rollout's forwards and of an update, by kind of operation."""
    return {
        "policy forward": breakdown(bench.rollout_forward()),
        "update": breakdown(update_work(Learner(bench, args), "ours", {})),
    }


def describe_machine(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """Returns what the numbers were measured on, and how busy it was."""
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
    return {
        "per_second": {name: _dict(spread(values)) for name, values in rates.items()},
        "ours_is_times": {name: _dict(ratio(rates, "ours", name)) for name in rates if name != "ours"},
    }


def _dict(values: Spread) -> dict[str, float]:
    return values._asdict()


# ---- tables ---------------------------------------------------------------------------------------------------------


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _range(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['low']:{form}} to {values['high']:{form}})"


def print_rates(console: Console, title: str, result: dict[str, Any]) -> None:
    """Prints one row a variant: its rate, and how many times faster ours is."""
    rows = [
        (name, _range(values, ",.1f"), _range(result["ours_is_times"][name], ".1f") if name != "ours" else "")
        for name, values in result["per_second"].items()
    ]
    _table(console, title, ("", "a second (range)", "ours is x times"), rows)


def print_rest(console: Console, results: dict[str, Any]) -> None:
    """Prints agreement, trainer overhead, memory, shares and breakdown."""
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
