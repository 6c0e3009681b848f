"""The report of run_ladder.py: every step's policy on the same held-out seeds, and paired tests between all of them."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from manako.agent.data.trajectories import episode_success, load_trajectories
from manako.agent.report.evaluation import evaluate
from manako.agent.report.statistics import mcnemar
from manako.agent.tuning.forgetting import measure_retention
from manako.envs import held_out_seeds
from manako.experiments.common.building import policy_of_run
from manako.experiments.common.command_line import build, checked_sections
from manako.experiments.common.environments import make_vector_env
from manako.experiments.common.progress import episodes_in_words, plain_console
from manako.experiments.common.run_folder import write_text
from manako.experiments.common.settings import OF_PRESETS, PPOCommand

START = "start"  # the policy before any step


def evaluate_ladder(
    folder: Path, common: dict[str, dict[str, Any]], done: dict[str, dict[str, Any]], episodes: int, sample: bool
) -> None:
    """Evaluates every step's policy on the same held-out seeds; a file and a table.

    Args:
        folder: the ladder's.
        common: sections for all steps.
        done: what is known of each step.
        episodes: held-out episodes.
        sample: sample actions instead of taking the greedy ones.
    """
    start = build(PPOCommand, checked_sections(PPOCommand, common, "common"))
    environment, source, seed = start.environment, start.policy, start.run.seed
    seeds = held_out_seeds(episodes, seed)
    trained = {name: step for name, step in done.items() if step["runner"] != "collect"}
    rows: list[dict[str, Any]] = []
    success: dict[str, list[bool]] = {}
    for name in (START, *trained):
        if name != START:
            final = folder / name / "final"
            learns = json.loads((final / "policy.json").read_text())["source"]["trainable"]
            of_folder: dict[str, Any] = {"policy": str(final), "trainable": learns, **dict.fromkeys(OF_PRESETS)}
            source = dataclasses.replace(start.policy, **of_folder)
        policy, _ = policy_of_run(environment, source, seed, start.run.torch_threads)
        with contextlib.closing(make_vector_env(environment, min(32, len(seeds)), seed, held_out=True)) as env:
            evaluation = evaluate(policy, env, seeds, sample=sample)
        success[name] = [episode.success for episode in evaluation.episodes]
        knows = measure_retention(policy)
        learned = 0
        if name != START:
            of_head = policy.value_head.parameters() if trained[name]["runner"] == "ppo" else ()
            learned = sum(p.numel() for p in (*policy.vlm.parameters(), *of_head) if p.requires_grad)
        rows.append(
            {
                "step": name,
                "from": trained[name]["from"] if name in trained else None,
                **evaluation.summary(),
                "seconds": trained[name]["seconds"] if name in trained else 0.0,
                "trained_parameters": learned,
                **(knows.summary() if knows else {"perplexity": None, "probes": None}),
            }
        )
    result = {
        "env": environment.env,
        "seeds": seeds,
        "sampled_actions": sample,
        "demonstrations": {
            name: {**_demonstrations(folder / name), "seconds": step["seconds"]}
            for name, step in done.items()
            if step["runner"] == "collect"
        },
        "steps": rows,
        "comparisons": compare_steps(success),
        "success": success,
    }
    file = folder / ("report_sampled.json" if sample else "report.json")
    write_text(file, json.dumps(result, indent=2))
    print_report(result, file)


def compare_steps(success: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Compares every step with every one before it, in pairs of the same episodes.

    Args:
        success: of each step's episodes, in the order of the steps.

    Returns:
        A row a pair: the two, the difference in success, and McNemar's p.
    """
    names = list(success)
    return [
        {
            "step": name,
            "against": other,
            "difference": (sum(success[name]) - sum(success[other])) / len(success[name]),
            "p": mcnemar(success[other], success[name]),
        }
        for number, name in enumerate(names)
        for other in names[:number]
    ]


def _demonstrations(folder: Path) -> dict[str, Any]:
    """Who played the trajectories in a folder, and how well."""
    dataset, about = load_trajectories(str(folder))
    success = episode_success(dataset)
    return {
        "player": about["player"],
        "episodes": len(success),
        "steps": len(dataset),
        "success": sum(success) / len(success),
    }


def print_report(result: dict[str, Any], file: Path) -> None:
    """Prints what `file` holds, as tables."""
    console = plain_console()
    console.width = max(console.width, 120)
    for name, data in result["demonstrations"].items():
        console.print(
            f"{name}: {data['episodes']:,} episodes, {data['steps']:,} steps of {data['player']}, success "
            f"{data['success']:.1%}"
        )
    rows = result["steps"]
    episodes = episodes_in_words(rows[0]["episodes"], rows[0]["starts"])
    how = "sampled" if result["sampled_actions"] else "likeliest"
    table = Table(
        title=f"{result['env']}, {episodes}, held-out seeds, {how} actions", title_justify="left", box=box.SIMPLE
    )
    for column in ("step", "from", "success [95 %]", "return", "seconds", "trained", "perplexity", "questions"):
        table.add_column(column, justify="left" if column in ("step", "from") else "right", no_wrap=True)
    for row in rows:
        low, high = row["success_ci95"]
        table.add_row(
            row["step"],
            row["from"] or "",
            f"{row['success']:.1%} [{low:.1%}, {high:.1%}]",
            f"{row['return_mean']:.2f}",
            f"{row['seconds']:.0f}",
            f"{row['trained_parameters']:,}",
            "-" if row["perplexity"] is None else f"{row['perplexity']:.1f}",
            "-" if row["probes"] is None else f"{row['probes']:.0%}",
        )
    console.print(table)
    if rows[0]["starts"] > 1 or result["sampled_actions"]:  # else the episodes are no sample that could be tested
        for pair in result["comparisons"]:
            console.print(
                f"{pair['step']} against {pair['against']}: {100 * pair['difference']:+.1f} points, p = {pair['p']:.2g}"
            )
        console.print("p: exact McNemar test on the same episodes, two-sided")
    console.print(f"written to {file}")
