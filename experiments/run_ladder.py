"""Several trainings one after another, each from the last one's policy, and one report that compares them.

    python experiments/run_ladder.py --ladder experiments/configs/ladder_goto_tiny.yaml --output_dir runs/ladder
    python experiments/run_ladder.py --resume runs/ladder

or ppo) and settings of its own. A name of an earlier step stands for what it wrote (`dataset: demos`, `policy: sft`);
or ppo) and settings of its own. A name of an earlier step stands for what it wrote (`dataset: demos`, `policy: align`);
without `policy` a step starts from the training before it. Every policy is then evaluated on the same held-out seeds:
success with its interval, a paired test against the step before, time, what was trained, what was forgotten.
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
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.command_line import UsageError, parse, read_yaml, run_main, setting  # noqa: E402
from experiments.run_folder import check_job_folder, write_text  # noqa: E402

RUNNERS = {"collect": "collect.py", "sft": "run_sft.py", "dpo": "run_dpo.py", "ppo": "run_ppo.py"}
LADDER_FILE = "ladder.yaml"
OF_PRESETS = ("vision_encoder", "adapter", "language_model", "image_size", "patch_size")  # a folder has them


@dataclass
class LadderConfig:
    """Settings of run_ladder.py."""

    ladder: str | None = setting(None, "YAML file with the steps")
    output_dir: str | None = setting(None, "folder of the ladder, must not exist")
    resume: str | None = setting(None, "folder of a ladder to go on with; finished steps are kept")
    eval_episodes: int = setting(500, "held-out episodes of the comparison", ge=1)


def main() -> int:
    """One ladder; returns the exit code."""
    given = parse(LadderConfig, description="Runs trainings one after another and compares them.")
    folder, ladder = _place(given)
    steps = check_ladder(ladder, str(given.ladder or folder / LADDER_FILE))
    done: dict[str, dict[str, Any]] = {}
    policy: str | None = None
    for step in steps:
        place = folder / step["name"]
        seconds = run_step(step, ladder.get("common", {}), folder, place, policy, done)
        done[step["name"]] = {"runner": step["runner"], "seconds": seconds}
        if step["runner"] != "collect":
            policy = str(place / "final")
    report(folder, ladder.get("common", {}), steps, done, given.eval_episodes)
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
        if step["name"] in names or not step["name"].isidentifier():
            raise UsageError(f"The name {step['name']!r} in {source} is taken or no word: expected another.")
        names.append(step["name"])
    return steps


def run_step(
    step: dict[str, Any],
    common: dict[str, Any],
    folder: Path,
    place: Path,
    policy: str | None,
    done: dict[str, dict[str, Any]],
) -> float:
    """Runs one step unless it is finished; its seconds.

    Raises:
        UsageError: its runner refused it or failed.
    """
    finished = folder / f"{step['name']}.json"
    if finished.is_file():
        return float(json.loads(finished.read_text())["seconds"])
    shutil.rmtree(place, ignore_errors=True)  # of a start that was stopped
    kind = "collect" if step["runner"] == "collect" else "train"
    settings = {**common, **{key: value for key, value in step.items() if key not in ("name", "runner")}}
    for key in ("dataset", "policy"):
        if settings.get(key) in done:
            named = done[settings[key]]["runner"]
            settings[key] = str(folder / settings[key] / ("" if named == "collect" else "final"))
    if kind == "train" and policy is not None and "policy" not in step:
        settings["policy"] = policy
    if Path(str(settings.get("policy"))).is_dir():
        settings = {key: value for key, value in settings.items() if key not in OF_PRESETS}
    settings["output" if kind == "collect" else "output_dir"] = str(place)
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
    seconds = time.perf_counter() - start
    write_text(finished, json.dumps({"seconds": seconds, "command": words}))
    return seconds


def report(
    folder: Path, common: dict[str, Any], steps: list[dict[str, Any]], done: dict[str, dict[str, Any]], episodes: int
) -> None:
    """Evaluates every step's policy on the same held-out seeds; report.json and a table."""
    import torch
    from rich import box
    from rich.table import Table

    from agent.evaluation import evaluate
    from agent.forgetting import remember
    from agent.statistics import mcnemar
    from experiments.environments import held_out_seeds, make_env
    from experiments.progress import plain_console
    from experiments.settings import PlayConfig
    from experiments.setup import make_policy, quiet_libraries

    quiet_libraries()
    known = set(PlayConfig.__dataclass_fields__)
    settings = {key: value for key, value in common.items() if key in known}
    config = PlayConfig(**{**settings, "env_kwargs": _text(settings.get("env_kwargs"))})
    seeds = held_out_seeds(config.seed, episodes)
    places = {step["name"]: str(folder / step["name"] / "final") for step in steps if step["runner"] != "collect"}
    rows: list[dict[str, Any]] = []
    before: list[bool] | None = None
    for name, place in {"start": config.policy, **places}.items():
        torch.manual_seed(config.seed)
        config.policy = place
        if name != "start":
            for key in OF_PRESETS:
                setattr(config, key, None)
            config.trainable = json.loads((Path(place) / "policy.json").read_text())["source"]["trainable"]
        with contextlib.closing(make_env(config, min(32, episodes), held_out=True)) as env:
            policy = make_policy(config, env.action_names, env.frame_shape)
            evaluation = evaluate(policy, env, seeds)
        success = [episode.success for episode in evaluation.episodes]
        rows.append(
            {
                "step": name,
                **evaluation.summary(),
                "p_against_before": None if before is None else mcnemar(before, success),
                "seconds": done[name]["seconds"] if name in done else 0.0,
                "trained_parameters": sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad)
                if name in done
                else 0,
                **remember(policy).summary(),
            }
        )
        before = success
    write_text(folder / "report.json", json.dumps({"seeds": seeds, "steps": rows}, indent=2))
    table = Table(title=f"{config.env}, {episodes} held-out episodes", title_justify="left", box=box.SIMPLE)
    for column in ("step", "success [95 %]", "p against before", "seconds", "trained", "perplexity", "questions"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    for row in rows:
        low, high = row["success_ci95"]
        p = row["p_against_before"]
        table.add_row(
            row["step"],
            f"{row['success']:.1%} [{low:.1%}, {high:.1%}]",
            "" if p is None else f"{p:.2g}",
            f"{row['seconds']:.0f}",
            f"{row['trained_parameters']:,}",
            f"{row['perplexity']:.1f}",
            f"{row['probes']:.0%}",
        )
    console = plain_console()
    console.width = max(console.width, 120)
    console.print(table)
    console.print(f"written to {folder / 'report.json'}")


def _text(value: Any) -> str | None:
    return json.dumps(value) if isinstance(value, dict) else value


if __name__ == "__main__":
    run_main(main)
