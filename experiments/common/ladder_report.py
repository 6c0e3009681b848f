"""The report of run_ladder.py: every step's policy on the same held-out seeds, and paired tests between all of them.

A step's controls (blank image, another instruction) are those of its own evaluation.json, on the first of these seeds.
Further evaluations, such as a stricter success, play every policy on the same seeds under other settings.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from manako.agent.data.trajectories import episode_returns, episode_success, load_trajectories
from manako.agent.interfaces import NOT_FIXED
from manako.agent.report.evaluation import Condition, Evaluation, evaluate, expert_agreement
from manako.agent.report.figures import success_chart
from manako.agent.report.statistics import TESTS
from manako.agent.rollout import success_rate
from manako.agent.tuning.forgetting import measure_retention
from manako.envs import held_out_seeds
from manako.envs.settings import EnvSettings
from manako.experiments.common.building import policy_of_run
from manako.experiments.common.command_line import build, checked_sections, read_json
from manako.experiments.common.environments import knows_expert, make_vector_env
from manako.experiments.common.ladder_table import TABLE
from manako.experiments.common.outcomes import measure_of, outcome_in_words, warnings_of
from manako.experiments.common.progress import episodes_in_words, plain_console
from manako.experiments.common.run_folder import write_text
from manako.experiments.common.settings import OF_PRESETS, PPOCommand
from manako.policies import VLMPolicy
from manako.policies.interface import Draws
from manako.policies.saving import read_description

START = "start"  # the policy before any step
CONTROLS = ("blank_image", "replaced_instruction")
EXPERT_EPISODES = 64  # held out, in whose states the policy is asked what the expert does
MOST_STEPS = 10  # of which all pairs are printed; of more, each with the one that it came from
TIMED = 32  # environments that are acted in at a time


def evaluate_ladder(
    folder: Path,
    common: dict[str, dict[str, Any]],
    done: dict[str, dict[str, Any]],
    episodes: int,
    sample: bool,
    table: str | None = None,
    more: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Evaluates every step's policy on the same held-out seeds; a file, a table and a chart.

    Args:
        folder: the ladder's.
        common: sections for all steps.
        done: what is known of each step.
        episodes: held-out episodes.
        sample: sample actions instead of taking the greedy ones.
        table: a Markdown file for the table, beside which the chart is put as well; None: for none.
        more: further evaluations of every policy and of the random one, each by its section of the environment.
    """
    start = build(PPOCommand, checked_sections(PPOCommand, common, "common"))
    source, seed = start.policy, start.run.seed
    others = {name: _environment(section) for name, section in (more or {}).items()}
    seeds = held_out_seeds(episodes, seed)
    trained = {name: step for name, step in done.items() if step["runner"] != "collect"}
    rows: list[dict[str, Any]] = []
    success: dict[str, list[bool | None]] = {}
    returns: dict[str, list[float]] = {}
    for name in (START, *trained):
        if name != START:
            final = folder / name / "final"
            learns = read_description(final)[0].trainable
            of_folder: dict[str, Any] = {"policy": str(final), "trainable": learns, **dict.fromkeys(OF_PRESETS)}
            source = dataclasses.replace(start.policy, **of_folder)
        settings_of_step = {} if name == START else trained[name]["settings"]
        environment = as_trained(start.environment, settings_of_step, start.environment)
        policy, _ = policy_of_run(environment, source, seed, start.run.torch_threads)
        evaluation = _play(environment, policy, seeds, seed, sample)
        further = {
            other: _play(
                as_trained(settings, settings_of_step, start.environment), policy, seeds, seed, sample
            ).summary()
            for other, settings in others.items()
        }
        if name == START:
            random = {
                **_play(environment, policy, seeds, seed, condition="random").summary(),
                "evaluations": {
                    other: _play(settings, policy, seeds, seed, condition="random").summary()
                    for other, settings in others.items()
                },
            }
        success[name] = [episode.success for episode in evaluation.episodes]
        returns[name] = [episode.episode_return for episode in evaluation.episodes]
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
                "parameters": sum(p.numel() for p in policy.parameters()),
                "trained_parameters": learned,
                "controls": _controls(folder / name),
                "evaluations": further,
                "expert_agreement": agreement_with_expert(environment, policy, seeds[:EXPERT_EPISODES], seed),
                "milliseconds_a_frame": milliseconds_a_frame(environment, policy, seed),
                **measure_retention(policy).summary(),
            }
        )
    measure = measure_of({"random": random, **{row["step"]: row for row in rows}})
    result = {
        "env": start.environment.env,
        "evaluations": more or {},
        "measure": measure,
        "seeds": seeds,
        "sampled_actions": sample,
        "demonstrations": {
            name: {**_demonstrations(folder / name), "seconds": step["seconds"]}
            for name, step in done.items()
            if step["runner"] == "collect"
        },
        "random": random,
        "steps": rows,
        "comparisons": compare_steps(
            success if measure == "success" else returns, measure, all(row["fixed_by_seed"] for row in rows)
        ),
        "success": success,
        "returns": returns,
    }
    file = folder / ("report_sampled.json" if sample else "report.json")
    write_text(file, json.dumps(result, indent=2))
    print_report(result, file)
    charts = [file.with_suffix(".png"), *([Path(table).with_suffix(".png")] if table else [])]
    for chart in charts:
        success_chart(
            [(row["step"], *_measured(row, measure)) for row in rows],
            chart,
            f"{start.environment.env}, {episodes_in_words(rows[0]['episodes'], rows[0]['starts'])}",
            _measured(random, measure),
            returns=measure == "return",
        )
    if table:
        TABLE.write(Path(table), table_rows(result))


def as_trained(environment: EnvSettings, step: Mapping[str, Any], common: EnvSettings) -> EnvSettings:
    """Returns an environment that shows what a step was trained on, where that is its own, such as black frames.

    Args:
        environment: of an evaluation.
        step: its settings, those of all steps among them.
        common: the environment of all steps.
    """
    own = step.get("environment", {}).get("image_source", common.image_source)
    return environment if own == common.image_source else dataclasses.replace(environment, image_source=own)


def _environment(section: dict[str, Any]) -> EnvSettings:
    given = checked_sections(PPOCommand, {"environment": section}, "the environment of an evaluation")
    return build(PPOCommand, given).environment


def _play(
    environment: EnvSettings,
    policy: VLMPolicy,
    seeds: Sequence[int],
    seed: int,
    sample: bool = False,
    condition: Condition = "policy",
) -> Evaluation:
    """Plays these held-out episodes under these settings."""
    with contextlib.closing(make_vector_env(environment, min(32, len(seeds)), seed, held_out=True)) as env:
        return evaluate(policy, env, seeds, condition, sample=sample)


def agreement_with_expert(
    environment: EnvSettings, policy: VLMPolicy, seeds: Sequence[int], seed: int
) -> dict[str, Any] | None:
    """Returns in how many of an expert's states the policy's likeliest action is the expert's; None without expert."""
    with contextlib.closing(make_vector_env(environment, len(seeds), seed, held_out=True)) as env:
        if not knows_expert(env):
            return None
        found = expert_agreement(policy, env, seeds)
    return {"share": found.share, "agreed": found.agreed, "states": found.states, "episodes": len(seeds)}


def milliseconds_a_frame(environment: EnvSettings, policy: VLMPolicy, seed: int) -> float:
    """Returns what `prepare` and `act` take for a frame of `TIMED` environments: the least of a few, of one process."""
    with contextlib.closing(make_vector_env(environment, TIMED, seed, held_out=True)) as env:
        seen = env.reset()
    times = []
    with policy.frozen_weights():
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            policy.act(policy.prepare(seen.images, seen.instructions), Draws([]), greedy=True)
            times.append(time.perf_counter() - start)
    return 1000 * min(times[1:]) / TIMED


def _further_table(result: dict[str, Any]) -> Table:
    """The table of further evaluations: a row a step, a column each."""
    table = Table(title="the same under other settings", title_justify="left", box=box.SIMPLE)
    table.add_column("step", no_wrap=True)
    for name in result["evaluations"]:
        table.add_column(f"{name} [95 %]", justify="right", no_wrap=True)
    for row in ({**result["random"], "step": "random policy"}, *result["steps"]):
        found = row["evaluations"]
        measure = {name: "return" if found[name]["success"] is None else "success" for name in found}
        table.add_row(row["step"], *(_with_interval(found[name], measure[name]) for name in result["evaluations"]))
    return table


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """Returns a Markdown row a step, the random policy first."""
    measure = result["measure"]
    rows = [["random policy", "", "", "", "", _in_words(result["random"], measure), "", "", "", ""]]
    for row in result["steps"]:
        agreement, controls = row["expert_agreement"], row["controls"]
        rows.append(
            [
                f"`{row['step']}`",
                "" if row["from"] is None else f"`{row['from']}`",
                f"{row['parameters']:,}",
                f"{row['trained_parameters']:,}" if row["trained_parameters"] else "",
                "" if agreement is None else f"{agreement['share']:.1%}",
                _in_words(row, measure),
                *(f"{controls[name]:.1%}" if name in controls else "" for name in CONTROLS),
                f"{row['seconds'] / 60:.1f}" if row["seconds"] else "",
                f"{row['milliseconds_a_frame']:.2f}",
            ]
        )
    return rows


def _measured(row: dict[str, Any], measure: str) -> tuple[float, tuple[float, float]]:
    """A row's success or mean return, with its interval."""
    low, high = row[f"{measure}_ci95"]
    return row["success" if measure == "success" else "return_mean"], (low, high)


def _with_interval(row: dict[str, Any], measure: str) -> str:
    value, (low, high) = _measured(row, measure)
    if measure == "return":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _in_words(row: dict[str, Any], measure: str) -> str:
    """The cell of a column whose heading speaks of success."""
    return ("return " if measure == "return" else "") + _with_interval(row, measure)


def _controls(step: Path) -> dict[str, float]:
    """Success of a step's controls, where it was evaluated."""
    file = step / "evaluation.json"
    found = read_json(file) if file.is_file() else {}
    return {name: found[name]["success"] for name in CONTROLS if name in found and found[name]["success"] is not None}


def compare_steps(
    outcomes: Mapping[str, Sequence[Any]], measure: str = "success", paired: bool = True
) -> list[dict[str, Any]]:
    """Compares every step with every one before it, in pairs of the same episodes.

    Args:
        outcomes: of each step's episodes, in the order of the steps: success, or the return.
        measure: which of them, `success` or `return`.
        paired: whether these are the same episodes for all steps.

    Returns:
        A row a pair: the two, the difference in the mean, and p, by `mcnemar` or, of returns, `paired_permutation`;
        None where the episodes are no pairs.
    """
    names = list(outcomes)
    _, test = TESTS[measure]
    return [
        {
            "step": name,
            "against": other,
            "difference": (sum(outcomes[name]) - sum(outcomes[other])) / len(outcomes[name]),
            "p": test(outcomes[other], outcomes[name]) if paired else None,
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
        "success": success_rate(success),
        "outcome": outcome_in_words(success, episode_returns(dataset)),
    }


def print_report(result: dict[str, Any], file: Path) -> None:
    """Prints what `file` holds, as tables."""
    console = plain_console()
    console.width = max(console.width, 120)
    for name, data in result["demonstrations"].items():
        console.print(
            f"{name}: {data['episodes']:,} episodes, {data['steps']:,} steps of {data['player']}, {data['outcome']}"
        )
    rows, measure = result["steps"], result["measure"]
    episodes = episodes_in_words(rows[0]["episodes"], rows[0]["starts"])
    how = "sampled" if result["sampled_actions"] else "likeliest"
    table = Table(
        title=f"{result['env']}, {episodes}, held-out seeds, {how} actions", title_justify="left", box=box.SIMPLE
    )
    columns = ("step", "from", f"{measure} [95 %]", "blank", "other text", "as expert", "seconds", "params", "trained")
    for column in (*columns, "ms/frame", "perplexity", "questions"):
        table.add_column(column, justify="left" if column in ("step", "from") else "right", no_wrap=True)
    table.add_row("random policy", "", _with_interval(result["random"], measure))
    for row in rows:
        agreement, controls = row["expert_agreement"], row["controls"]
        table.add_row(
            row["step"],
            row["from"] or "",
            _with_interval(row, measure),
            *(f"{controls[name]:.0%}" if name in controls else "" for name in CONTROLS),
            "" if agreement is None else f"{agreement['share']:.0%}",
            f"{row['seconds']:.0f}",
            f"{row['parameters']:,}",
            f"{row['trained_parameters']:,}",
            f"{row['milliseconds_a_frame']:.2f}",
            "-" if row["perplexity"] is None else f"{row['perplexity']:.1f}",
            "-" if row["probes"] is None else f"{row['probes']:.0%}",
        )
    console.print(table)
    if result.get("evaluations"):
        console.print(_further_table(result))
    if rows[0]["starts"] > 1 or result["sampled_actions"]:  # else the episodes are no sample that could be tested
        pairs = result["comparisons"]
        if len(rows) > MOST_STEPS:
            came_from = {row["step"]: row["from"] for row in rows}
            pairs = [pair for pair in pairs if pair["against"] == came_from[pair["step"]]]
        for pair in pairs:
            by = f"{100 * pair['difference']:+.1f} points" if measure == "success" else f"{pair['difference']:+.2f}"
            p = "" if pair["p"] is None else f", p = {pair['p']:.2g}"
            console.print(f"{pair['step']} against {pair['against']}: {by}{p}")
        if any(pair["p"] is None for pair in pairs):
            console.print(f"no p: {NOT_FIXED}, so no two steps played the same ones")
        else:
            test = "exact McNemar test" if measure == "success" else "sign-flip permutation test of the returns"
            console.print(f"p: {test} on the same episodes, two-sided")
    for warning in warnings_of({"random": result["random"], **{row["step"]: row for row in rows}}):
        console.print(warning)
    console.print(f"written to {file}")
