"""Several trainings one after another, each from the last one's policy, and one report that compares them.

    python experiments/run_ladder.py --ladder experiments/configs/ladder_goto_tiny.yaml --output_dir runs/ladder
    python experiments/run_ladder.py --resume runs/ladder

The file holds settings for all steps (`common`, by sections; a step takes what its runner has) and a list of `steps`,
each with a name, a runner (collect, sft, dpo or ppo) and sections of its own. A name of an earlier step stands for what
it wrote (`dataset: demos`, `policy: align`, `vision_encoder: see`); without `policy` a step starts from the training
before it, and `policy: start` is where the ladder starts. Every policy is then evaluated on the same held-out seeds:
success with its interval, paired tests between all steps, time, how many parameters were trained, and what the language
model has forgotten: report.json. With `--sample true` the policies sample their actions instead of taking the greedy
ones: report_sampled.json. A step that was trained on black frames (`image_source: blank`) is evaluated on them. The
file may name more `evaluations` of every policy, each by the settings of the environment in which it differs, such as
`strict: {env_kwargs: {strict: true}}`.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.agent.locks import refuse_held  # noqa: E402
from manako.experiments.common import stopping  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    UsageError,
    checked_sections,
    known_settings,
    parse,
    read_json,
    read_yaml,
    run_main,
    section,
    show,
)
from manako.experiments.common.ladder_table import TABLE  # noqa: E402
from manako.experiments.common.named_modules import check_named  # noqa: E402
from manako.experiments.common.run_folder import check_job_folder, going_on, making, write_text  # noqa: E402
from manako.experiments.common.settings import (  # noqa: E402
    OF_PRESETS,
    CollectCommand,
    DPOCommand,
    PPOCommand,
    SFTCommand,
)
from manako.policies.architectures.presets import ENCODER_NAMES, PRESETS  # noqa: E402
from manako.settings import setting  # noqa: E402

RUNNERS = {"collect": "collect.py", "sft": "run_sft.py", "dpo": "run_dpo.py", "ppo": "run_ppo.py"}
COMMANDS: dict[str, type] = {"collect": CollectCommand, "sft": SFTCommand, "dpo": DPOCommand, "ppo": PPOCommand}
LADDER_FILE = "ladder.yaml"
START = "start"  # the policy before any step
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class LadderSettings:
    """What is run and compared."""

    ladder: str | None = setting(None, "YAML file with the steps", is_path=True)
    output_dir: str | None = setting(None, "folder of the ladder, must not exist", is_path=True)
    resume: str | None = setting(None, "folder of a ladder to go on with; finished steps are kept", is_path=True)
    table: str | None = setting(
        None, "Markdown file for the table, between its markers if it has some; a chart is put beside it"
    )
    eval_episodes: int = setting(500, "held-out episodes of the comparison", ge=1)
    sample: bool = setting(False, "in the comparison, sample actions from the policies' probabilities")


@dataclass(frozen=True)
class LadderCommand:
    """Settings of run_ladder.py."""

    run: LadderSettings = section(LadderSettings, "ladder")


def main() -> int:
    """Runs one ladder; returns the exit code."""
    given = read_line()
    TABLE.check(given.table)
    with contextlib.ExitStack() as stack:
        folder, ladder = _place(given, stack)
        return run(given, folder, ladder)


def run(given: LadderSettings, folder: Path, ladder: dict[str, Any]) -> int:
    """Runs a ladder in a folder that is held; returns the exit code."""
    steps = check_ladder(ladder, str(given.ladder or folder / LADDER_FILE))
    for step in steps:
        played = settings_of(step["runner"], own_sections(step), ladder.get("common", {})).get("environment", {})
        env = str(played.get("env", ""))
        look = f"run `python experiments/check_env.py {env}` once"
        check_named(env, f"The ladder {str(given.ladder or folder / LADDER_FILE)!r}", look)
    show("ladder", f"{folder}, {len(steps)} steps")
    done: dict[str, dict[str, Any]] = {}
    before = START
    for step in steps:
        trains = step["runner"] != "collect"
        if trains:
            before = step.setdefault("policy", {}).setdefault("policy", before)
        done[step["name"]] = run_step(step, ladder.get("common", {}), folder, done)
        if trains:
            before = step["name"]
    from manako.experiments.common.ladder_report import evaluate_ladder  # torch and all

    common = settings_of("ppo", {}, ladder.get("common", {}))
    environment = ladder.get("common", {}).get("environment", {})
    more = {name: changed(environment, other) for name, other in (ladder.get("evaluations") or {}).items()}
    evaluate_ladder(folder, common, done, given.eval_episodes, given.sample, given.table, more)
    return 0


def read_line(arguments: Sequence[str] | None = None) -> LadderSettings:
    """Returns the settings of these words, by default of this program's command line."""
    return parse(LadderCommand, "Runs trainings one after another and compares them.", arguments).run


def _place(given: LadderSettings, stack: contextlib.ExitStack) -> tuple[Path, dict[str, Any]]:
    """Returns the ladder's folder, which is made and held as long as the stack is open, and its steps.

    Raises:
        UsageError: neither a new ladder nor one to go on with, or a folder that exists.
    """
    if given.resume:
        if given.ladder or given.output_dir:
            raise UsageError("--resume goes on with a ladder as it is: leave out --ladder and --output_dir.")
        if not (Path(given.resume) / LADDER_FILE).is_file():
            raise UsageError(f"--resume {given.resume!r} is no ladder: expected a folder with {LADDER_FILE}.")
        stack.enter_context(going_on(Path(given.resume)))
        return Path(given.resume), read_yaml(Path(given.resume) / LADDER_FILE)
    if not given.ladder or not given.output_dir:
        raise UsageError("--ladder and --output_dir are needed: give a YAML file with steps, and a new folder.")
    check_job_folder(given.output_dir, "--output_dir")
    folder = Path(given.output_dir)
    if folder.is_dir():
        refuse_held(folder)
    if folder.exists():
        raise UsageError(f"{given.output_dir!r} exists and is not overwritten: give another, or --resume it.")
    ladder = read_yaml(Path(given.ladder))
    check_ladder(ladder, given.ladder)
    stack.enter_context(making(folder))
    shutil.copy(given.ladder, folder / LADDER_FILE)
    return folder, ladder


def check_ladder(ladder: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """Returns the steps, each with name, runner and sections of settings that fit its runner.

    Raises:
        UsageError: something else stands there.
    """
    unknown = sorted(map(str, set(ladder) - {"common", "steps", "evaluations"}))
    if unknown:
        raise UsageError(f"{source} has the unknown key {unknown[0]!r}: expected common, steps and evaluations.")
    steps, common = ladder.get("steps"), ladder.get("common", {})
    if not isinstance(steps, list) or not steps or not isinstance(common, dict):
        raise UsageError(f"{source} has no steps: expected a list of mappings with a name and a runner.")
    _check_common(common, source)
    _check_evaluations(ladder.get("evaluations"), common, source)
    names: list[str] = []
    for number, step in enumerate(steps, 1):
        if not isinstance(step, dict) or not isinstance(step.get("name"), str) or step.get("runner") not in RUNNERS:
            raise UsageError(
                f"Step {number} of {source} is {step!r}: expected a mapping with a name and a runner of "
                f"{', '.join(RUNNERS)}."
            )
        if step["name"] in (START, *names) or not step["name"].isidentifier():
            raise UsageError(f"The name {step['name']!r} in {source} is taken or no word: expected another.")
        if step["name"] in (*PRESETS, *ENCODER_NAMES):
            raise UsageError(
                f"The name {step['name']!r} in {source} is that of a preset or of an encoder, so that a later step's "
                f"setting {step['name']!r} could mean either: expected another, such as "
                f"{step['name']}_{step['runner']}."
            )
        names.append(step["name"])
        checked_sections(COMMANDS[step["runner"]], own_sections(step), f"Step {step['name']} of {source}")
    return steps


def _check_common(common: dict[str, Any], source: str) -> None:
    """Settings for all steps have to be those of some runner.

    Raises:
        UsageError: one is of none.
    """
    tables = [known_settings(kind) for kind in COMMANDS.values()]
    sections = sorted({setting.section for table in tables for setting in table.values()})
    for part, values in common.items():
        if part not in sections:
            raise UsageError(f"common in {source} has the unknown section {part!r}: expected {', '.join(sections)}.")
        if not isinstance(values, dict):
            raise UsageError(f"The section {part} of common in {source} is {values!r}: expected settings below it.")
        for key in values:
            if not any(key in table and table[key].section == part for table in tables):
                raise UsageError(f"common in {source} has the unknown key {key!r} in {part}: no runner has it.")


def _check_evaluations(evaluations: Any, common: dict[str, Any], source: str) -> None:
    """Further evaluations are words with settings of the environment in which they differ from `common`.

    Raises:
        UsageError: something else stands there.
    """
    if evaluations is None:
        return
    if not isinstance(evaluations, dict) or not all(isinstance(name, str) for name in evaluations):
        raise UsageError(
            f"The evaluations in {source} are {evaluations!r}: expected a name for each and, below it, settings of the "
            "environment."
        )
    for name, changes in evaluations.items():
        if not isinstance(changes, dict) or not changes:
            raise UsageError(
                f"The evaluation {name!r} in {source} is {changes!r}: expected settings of the environment, such as "
                "env_kwargs: {strict: true}."
            )
        environment = changed(common.get("environment", {}), changes)
        checked_sections(PPOCommand, {"environment": environment}, f"The evaluation {name} of {source}")


def changed(environment: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an environment with others put in, those of its constructor one by one."""
    merged = {**environment, **by}
    of_all, own = environment.get("env_kwargs"), by.get("env_kwargs")
    if isinstance(of_all, dict) and isinstance(own, dict):
        merged["env_kwargs"] = {**of_all, **own}
    return merged


def own_sections(step: Mapping[str, Any]) -> Sections:
    """Returns a step's settings, without its name and runner."""
    return {part: values for part, values in step.items() if part not in ("name", "runner")}


def settings_of(runner: str, own: Sections, common: Sections) -> Sections:
    """Returns a step's settings: its own before those of all steps, of which it takes what its runner has."""
    known = known_settings(COMMANDS[runner])
    merged: Sections = {}
    for part, values in common.items():
        merged[part] = {key: value for key, value in values.items() if key in known and known[key].section == part}
    for part, values in own.items():
        merged[part] = {**merged.get(part, {}), **(values or {})}
    return {part: values for part, values in merged.items() if values}


def run_step(step: dict[str, Any], common: Sections, folder: Path, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs one step unless it is finished.

    Args:
        step: its name, runner and sections.
        common: sections for all steps.
        folder: the ladder's.
        done: the steps before it.

    Returns:
        Its runner, seconds, and where it started from.

    Raises:
        UsageError: its runner refused it or failed.
    """
    name, runner = step["name"], step["runner"]
    finished, place, file = folder / f"{name}.json", folder / name, folder / f"{name}.settings.yaml"
    if finished.is_file():
        return read_json(finished)
    refuse_held(place)  # by a runner that outlived the ladder that started it
    goes_on = runner != "collect" and (place / "config.yaml").is_file()  # a start that was stopped
    if not goes_on:
        shutil.rmtree(place, ignore_errors=True)
    settings = settings_of(runner, own_sections(step), common)
    policy = settings.setdefault("policy", {})
    if policy.get("policy") == START:
        policy.pop("policy")
        policy |= {key: value for key, value in common.get("policy", {}).items() if key == "policy"}
    for values in settings.values():
        for key in ("dataset", "policy", "vision_encoder"):
            if values.get(key) in done:
                of_collect = done[values[key]]["runner"] == "collect"
                values[key] = str(folder / values[key] / ("" if of_collect else "final"))
    if Path(str(policy.get("policy"))).is_dir():
        of_step = step.get("policy", {})  # a part that it names itself is put into the run that it starts from
        settings["policy"] = {key: value for key, value in policy.items() if key not in OF_PRESETS or key in of_step}
    settings.setdefault("run", {})["output" if runner == "collect" else "output_dir"] = str(place)
    write_text(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    print(f"== {name} ({runner})", flush=True)
    start = time.perf_counter()
    told = ["--resume", str(place)] if goes_on else ["--config", str(file)]
    ended = (place / ("evaluation.json" if runner == "ppo" else "report.json")).exists()
    code = 0 if goes_on and ended else call([str(ROOT / "experiments" / RUNNERS[runner]), *told])
    if code == stopping.STOPPED:
        print(f"Stopped in the step {name!r}. Go on with:\n  python {sys.argv[0]} --resume {shlex.quote(str(folder))}")
        raise KeyboardInterrupt
    if code:
        raise UsageError(
            f"The step {name!r} ended with exit code {code}: repair what it says above, and go on with "
            f"--resume {folder}."
        )
    result = {
        "runner": runner,
        "seconds": time.perf_counter() - start,
        "from": step.get("policy", {}).get("policy"),
        "settings": settings,
    }
    write_text(finished, json.dumps(result))
    return result


def call(words: Sequence[str]) -> int:
    """Runs a runner and returns its exit code; each signal that comes meanwhile is passed on, and answered there.

    It has a process group of its own, so that none reaches it twice: a terminal sends Ctrl-C to a whole group.
    """
    process = subprocess.Popen([sys.executable, *words], process_group=0)
    before = {number: signal.signal(number, lambda each, _: process.send_signal(each)) for number in stopping.SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_main(main)
