"""Several trainings one after another, each from the last one's policy, and one report that compares them.

    python experiments/run_ladder.py --ladder experiments/configs/ladder_goto_tiny.yaml --output_dir runs/ladder
    python experiments/run_ladder.py --resume runs/ladder

The file holds settings for all steps (`common`) and a list of `steps`, each with a name, a runner (collect, sft, dpo
or ppo) and settings of its own. A name of an earlier step stands for what it wrote (`dataset: demos`, `policy: align`,
`vision_encoder: see`);
without `policy` a step starts from the training before it, and `policy: start` is where the ladder starts. Every policy
is then evaluated on the same held-out seeds: success with its interval, paired tests between all steps, time, how many
parameters were trained, and what the language model has forgotten: report.json. With `--sample true` the policies draw
their actions instead of taking the likeliest: report_sampled.json.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, read_yaml, run_main, setting  # noqa: E402
from manako.experiments.common.run_folder import check_job_folder, write_text  # noqa: E402

RUNNERS = {"collect": "collect.py", "sft": "run_sft.py", "dpo": "run_dpo.py", "ppo": "run_ppo.py"}
LADDER_FILE = "ladder.yaml"
START = "start"  # the policy before any step
OF_PRESETS = ("vision_encoder", "adapter", "language_model", "image_size", "patch_size")  # a folder has them


@dataclass
class LadderConfig:
    """Settings of run_ladder.py."""

    ladder: str | None = setting(None, "YAML file with the steps")
    output_dir: str | None = setting(None, "folder of the ladder, must not exist")
    resume: str | None = setting(None, "folder of a ladder to go on with; finished steps are kept")
    eval_episodes: int = setting(500, "held-out episodes of the comparison", ge=1)
    sample: bool = setting(False, "in the comparison, draw actions from the policies' probabilities")


def main() -> int:
    """One ladder; returns the exit code."""
    given = parse(LadderConfig, description="Runs trainings one after another and compares them.")
    folder, ladder = _place(given)
    steps = check_ladder(ladder, str(given.ladder or folder / LADDER_FILE))
    done: dict[str, dict[str, Any]] = {}
    before = START
    for step in steps:
        if step["runner"] != "collect":
            before = step.setdefault("policy", before)
        done[step["name"]] = run_step(step, ladder.get("common", {}), folder, done)
        if step["runner"] != "collect":
            before = step["name"]
    report(folder, ladder.get("common", {}), done, given)
    return 0


def _place(given: LadderConfig) -> tuple[Path, dict[str, Any]]:
    """The ladder's folder, which is made, and its steps.

    Raises:
        UsageError: neither a new ladder nor one to go on with, or a folder that exists.
    """
    if given.resume:
        if given.ladder or given.output_dir:
            raise UsageError("--resume goes on with a ladder as it is: leave out --ladder and --output_dir.")
        if not (Path(given.resume) / LADDER_FILE).is_file():
            raise UsageError(f"--resume {given.resume!r} is no ladder: expected a folder with {LADDER_FILE}.")
        return Path(given.resume), read_yaml(Path(given.resume) / LADDER_FILE)
    if not given.ladder or not given.output_dir:
        raise UsageError("--ladder and --output_dir are needed: give a YAML file with steps, and a new folder.")
    check_job_folder(given.output_dir, "--output_dir")
    folder = Path(given.output_dir)
    if folder.exists():
        raise UsageError(f"{given.output_dir!r} exists and is not overwritten: give another, or --resume it.")
    ladder = read_yaml(Path(given.ladder))
    check_ladder(ladder, given.ladder)
    folder.mkdir(parents=True)
    shutil.copy(given.ladder, folder / LADDER_FILE)
    return folder, ladder


def check_ladder(ladder: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """The steps, each with name, runner and settings.

    Raises:
        UsageError: something else stands there.
    """
    unknown = sorted(set(ladder) - {"common", "steps"})
    if unknown:
        raise UsageError(f"{source} has the unknown key {unknown[0]!r}: expected common and steps.")
    steps = ladder.get("steps")
    if not isinstance(steps, list) or not steps or not isinstance(ladder.get("common", {}), dict):
        raise UsageError(f"{source} has no steps: expected a list of mappings with a name and a runner.")
    names: list[str] = []
    for number, step in enumerate(steps, 1):
        if not isinstance(step, dict) or not isinstance(step.get("name"), str) or step.get("runner") not in RUNNERS:
            raise UsageError(
                f"Step {number} of {source} is {step!r}: expected a mapping with a name and a runner of "
                f"{', '.join(RUNNERS)}."
            )
        if step["name"] in (START, *names) or not step["name"].isidentifier():
            raise UsageError(f"The name {step['name']!r} in {source} is taken or no word: expected another.")
        names.append(step["name"])
    return steps


def run_step(
    step: dict[str, Any], common: dict[str, Any], folder: Path, done: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Runs one step unless it is finished.

    Returns:
        Its runner, seconds, and where it started from.

    Raises:
        UsageError: its runner refused it or failed.
    """
    finished, place = folder / f"{step['name']}.json", folder / step["name"]
    if finished.is_file():
        return dict(json.loads(finished.read_text()))
    shutil.rmtree(place, ignore_errors=True)  # of a start that was stopped
    settings = {**common, **{key: value for key, value in step.items() if key not in ("name", "runner")}}
    if settings.get("policy") == START:
        settings.pop("policy")
        settings |= {key: value for key, value in common.items() if key == "policy"}
    for key in ("dataset", "policy", "vision_encoder"):
        if settings.get(key) in done:
            named = done[settings[key]]["runner"]
            settings[key] = str(folder / settings[key] / ("" if named == "collect" else "final"))
    if Path(str(settings.get("policy"))).is_dir():
        settings = {key: value for key, value in settings.items() if key not in OF_PRESETS}
    settings["output" if step["runner"] == "collect" else "output_dir"] = str(place)
    words = [
        word
        for key, value in settings.items()
        for word in (f"--{key}", json.dumps(value) if isinstance(value, bool | dict) else str(value))
    ]
    print(f"== {step['name']} ({step['runner']})", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, str(ROOT / "experiments" / RUNNERS[step["runner"]]), *words]).returncode
    if code:
        raise UsageError(
            f"The step {step['name']!r} ended with exit code {code}: repair what it says above, and go on with "
            f"--resume {folder}."
        )
    result = {
        "runner": step["runner"],
        "seconds": time.perf_counter() - start,
        "from": step.get("policy"),
        "command": words,
    }
    write_text(finished, json.dumps(result))
    return result


def report(folder: Path, common: dict[str, Any], done: dict[str, dict[str, Any]], given: LadderConfig) -> None:
    """Evaluates every step's policy on the same held-out seeds; a file and a table."""
    import torch

    from manako.agent.report.evaluation import evaluate
    from manako.agent.tuning.forgetting import remember
    from manako.experiments.common.building import make_policy, quiet_libraries
    from manako.experiments.common.environments import held_out_seeds, make_env
    from manako.experiments.common.settings import PlayConfig

    quiet_libraries()
    known = set(PlayConfig.__dataclass_fields__)
    settings = {key: value for key, value in common.items() if key in known}
    config = PlayConfig(**{**settings, "env_kwargs": _text(settings.get("env_kwargs"))})
    seeds = held_out_seeds(config.seed, given.eval_episodes)
    trained = {name: step for name, step in done.items() if step["runner"] != "collect"}
    rows: list[dict[str, Any]] = []
    success: dict[str, list[bool]] = {}
    for name in (START, *trained):
        torch.manual_seed(config.seed)
        if name != START:
            config.policy = str(folder / name / "final")
            for key in OF_PRESETS:
                setattr(config, key, None)
            config.trainable = json.loads((Path(config.policy) / "policy.json").read_text())["source"]["trainable"]
        with contextlib.closing(make_env(config, min(32, len(seeds)), held_out=True)) as env:
            policy = make_policy(config, env.action_names, env.frame_shape)
            evaluation = evaluate(policy, env, seeds, sample=given.sample)
        success[name] = [episode.success for episode in evaluation.episodes]
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
                **remember(policy).summary(),
            }
        )
    result = {
        "env": config.env,
        "seeds": seeds,
        "sampled_actions": given.sample,
        "demonstrations": {
            name: {**_demonstrations(folder / name), "seconds": step["seconds"]}
            for name, step in done.items()
            if step["runner"] == "collect"
        },
        "steps": rows,
        "comparisons": compare(success),
        "success": success,
    }
    file = folder / ("report_sampled.json" if given.sample else "report.json")
    write_text(file, json.dumps(result, indent=2))
    print_report(result, file)


def compare(success: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Every step against every one before it, in pairs of the same episodes.

    Args:
        success: of each step's episodes, in the order of the steps.
    """
    from manako.agent.report.statistics import mcnemar

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
    from manako.agent.data.trajectories import episode_success, load_trajectories

    dataset, about = load_trajectories(str(folder))
    success = episode_success(dataset)
    return {
        "player": about["player"],
        "episodes": len(success),
        "steps": len(dataset),
        "success": sum(success) / len(success),
    }


def print_report(result: dict[str, Any], file: Path) -> None:
    """What `file` holds, as tables."""
    from rich import box
    from rich.table import Table

    from manako.experiments.common.progress import episodes_in_words, plain_console

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
            f"{row['perplexity']:.1f}",
            f"{row['probes']:.0%}",
        )
    console.print(table)
    if rows[0]["starts"] > 1 or result["sampled_actions"]:  # else the episodes are no sample that could be tested
        for pair in result["comparisons"]:
            console.print(
                f"{pair['step']} against {pair['against']}: {100 * pair['difference']:+.1f} points, p = {pair['p']:.2g}"
            )
        console.print("p: exact McNemar test on the same episodes, two-sided")
    console.print(f"written to {file}")


def _text(value: Any) -> str | None:
    return json.dumps(value) if isinstance(value, dict) else value


if __name__ == "__main__":
    run_main(main)
