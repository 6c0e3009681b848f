"""The model card of a policy folder: README.md with the Hub's YAML head, made of what the run wrote down.

Written with the folder, so that an unfinished run's says that nothing was measured, and again when the evaluation is
done. It is for people: the folder's manifest leaves it out, so that neither this nor an owner's edit makes the folder
another one. Every text that came from elsewhere (names of environments and actions, settings) stands as code, which
neither Markdown nor HTML reads.
"""

import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from manako.agent.report.callbacks import is_validation, read_metrics
from manako.agent.report.statistics import TESTS
from manako.agent.report.validation import BEST_FILE, RULE
from manako.envs.settings import EnvSettings
from manako.experiments.common.command_line import as_sections, read_json
from manako.experiments.common.ending import only_warned
from manako.experiments.common.markdown import bullets, code, fenced, table
from manako.experiments.common.outcomes import measure_of
from manako.experiments.common.progress import PLACES, difference_in_words, episodes_in_words
from manako.experiments.common.resuming import CHANGES
from manako.experiments.common.run_folder import PACKAGES
from manako.experiments.common.settings import DPOCommand, PPOCommand, SFTCommand, TrainCommand
from manako.manifest import CARD, is_sealed
from manako.plain import printable
from manako.policies import VLMPolicy, parameter_table
from manako.policies.architectures.presets import PRESETS

MOST_NAMES = 30  # actions that are named
DEFAULT_EPISODES = 100  # of the example, where the run evaluates none
LEVEL = 0.05  # of a test, beneath which a difference is called one
LABELS = {"policy": "last policy", "best": "best policy", "replaced_instruction": "other instruction"}


def write_card(
    command: TrainCommand,
    policy: VLMPolicy,
    run_dir: Path,
    folder: Path,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes the card of final/ or best/, whole or not there; one that cannot be made is warned of, and ends no run.

    A README.md that the folder's manifest holds stays.

    Args:
        command: the run's settings.
        policy: whose parts are counted, and whose actions are named.
        run_dir: the run folder, with what else is written down of it.
        folder: that of the policy, perhaps under another name as yet; it holds `BEST_FILE` where it is the best.
        evaluation: the content of evaluation.json; None where there is none, or none yet.
    """
    if is_sealed(folder, CARD):
        return
    with only_warned(f"the model card {folder / CARD}"):
        text = card(command, policy, run_dir, folder, evaluation)
        temporary = folder / f".{CARD}.tmp"  # hidden: what dies here leaves a folder that is whole
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / CARD)


def card(
    command: TrainCommand,
    policy: VLMPolicy,
    run_dir: Path,
    folder: Path,
    evaluation: Mapping[str, Mapping[str, Any]] | None,
) -> str:
    """Returns the card; see `write_card`."""
    chosen = read_json(folder / BEST_FILE) if (folder / BEST_FILE).is_file() else None
    row = "policy" if chosen is None else "best"
    if evaluation is not None and row not in evaluation:
        evaluation = None
    file = run_dir / "run.json"
    run = read_json(file) if file.is_file() else {}
    parts = {
        "Intended use": _use(command, policy),
        "How to load it": _loading(command, policy, evaluation[row]["episodes"] if evaluation is not None else None),
        "Data": _data(command, policy, run),
        "Training": _training(command, run_dir, run, chosen),
        "Evaluation": _evaluation(evaluation, row, run_dir),
        "Limits": bullets(_limits(command, policy, evaluation, row, run_dir)),
        "Parameters": table(
            ["part", "parameters", "learned here"],
            [
                [part, f"{total:,}", f"{learns:,}"]
                for part, total, learns in parameter_table(policy.parts, policy.value_head)
            ],
        ),
        "Versions": _versions(run),
        "Settings": fenced(yaml.safe_dump(as_sections(command), sort_keys=False, allow_unicode=False), "yaml"),
    }
    acts = " It reads a frame and an instruction, and answers with an action." if _acts(command) else ""
    which = "The last policy of a training." if chosen is None else f"The best policy of a training: {RULE}."
    head = _head(command, policy, evaluation, row)
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items())
    return (
        f"---\n{head}\n---\n\n# {_method(command)} policy for {code(command.environment.env)}\n\n{which}{acts} "
        "Written by manako from what the run measured; a licence is the owner's to state, as `license:` in the head of "
        f"this file.\n\n{body}\n"
    )


# ---- the head --------------------------------------------------------------------------------------------------------


def _head(command: TrainCommand, policy: VLMPolicy, evaluation: Mapping[str, Any] | None, row: str) -> str:
    """The YAML between the two lines of dashes."""
    env = printable(command.environment.env)
    tags = [
        "manako",
        "vision-language-model",
        *(["reinforcement-learning"] if _acts(command) else []),
        _method(command),
    ]
    results = []
    if evaluation is not None:
        found = evaluation[row]
        about: dict[str, Any] = {"task_type": "reinforcement-learning", "dataset_type": env, "dataset_name": env}
        if found["success"] is not None:
            low, high = found["success_ci95"]
            named = f"success on held-out episodes, 95 % interval {low:.3f} to {high:.3f}"
            results.append(
                EvalResult(metric_type="success_rate", metric_name=named, metric_value=found["success"], **about)
            )
        low, high = found["return_ci95"]
        named = f"mean return of held-out episodes, 95 % interval {low:.3f} to {high:.3f}"
        results.append(
            EvalResult(metric_type="mean_reward", metric_name=named, metric_value=found["return_mean"], **about)
        )
    source = command.policy.policy
    of_the_hub = source not in PRESETS and not Path(source).expanduser().exists()
    data = ModelCardData(
        library_name="peft" if policy.has_lora else "transformers",
        pipeline_tag="reinforcement-learning" if _acts(command) else "image-text-to-text",
        tags=[*tags, env],
        base_model=source if of_the_hub else None,
        model_name=f"{_method(command)} policy for {env}" if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _method(command: TrainCommand) -> str:
    if isinstance(command, PPOCommand):
        return "PPO" if command.ppo.advantage == "gae" else command.ppo.advantage.upper()
    return command.dpo.method.upper() if isinstance(command, DPOCommand) else "SFT"


def _acts(command: TrainCommand) -> bool:
    """Whether it was taught to act, and not to see alone."""
    return not isinstance(command, SFTCommand) or command.sft.stage == "instruct"


# ---- what it is for --------------------------------------------------------------------------------------------------


def _use(command: TrainCommand, policy: VLMPolicy) -> str:
    env, shape = code(command.environment.env), "x".join(map(str, policy.spec.frame_shape))
    names = policy.spec.action_names
    said = ", ".join(map(code, names[:MOST_NAMES]))
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    actions = "entries of an action vector" if policy.spec.vectors is not None else "actions"
    if not _acts(command):
        assert isinstance(command, SFTCommand)
        return (
            f"A start for a policy in {env}, from frames of {shape}: it was taught to see (stage {command.sft.stage}) "
            "and not to act. Go on from it with `run_sft.py --stage instruct` or `run_ppo.py`."
        )
    return (
        f"Acting in {env} with the settings below, from frames of {shape}, by {len(names):,} {actions}: {said}{more}. "
        "It is told them by this system text:\n\n"
        + fenced(policy.spec.system)
        + "\n\nFor research and teaching. It was trained and measured "
        "in this environment alone; what it does with other frames, instructions or actions is not known."
    )


def environment_settings(environment: EnvSettings) -> dict[str, Any]:
    """Returns what of an environment's settings is not a default, without how many are played side by side."""
    default = EnvSettings(env=environment.env)
    options = environment.options().items()
    return {name: value for name, value in options if value != getattr(default, name)}


def _loading(command: TrainCommand, policy: VLMPolicy, episodes: int | None) -> str:
    """Python and a command that play the held-out episodes of the evaluation, or those that one would have."""
    environment, settings = command.environment, environment_settings(command.environment)
    of_source = {"trainable": command.policy.trainable} if policy.has_lora else {}
    if command.policy.dtype != "float32":
        of_source["dtype"] = command.policy.dtype
    source = ", ".join(['"this/folder"', *(f"{name}={value!r}" for name, value in of_source.items())])
    options = "".join(f", {name}={_literal(value)}" for name, value in settings.items())
    count, seed = episodes or command.run.eval_episodes or DEFAULT_EPISODES, command.run.seed
    python = (
        "from manako import PolicySource, evaluate, held_out_seeds, load_policy, make_env\n\n"
        f"env = make_env({_literal(environment.env)}, num_envs={min(8, count)}, held_out=True{options})\n"
        f"policy = load_policy(PolicySource({source}), env.action_names, env.frame_shape, env.action_space)\n"
        f"print(evaluate(policy, env, held_out_seeds({count}, seed={seed})).summary())"
    )
    words = ["python", "experiments/evaluate.py", "--policy", "this/folder", "--env", environment.env]
    words += ["--episodes", str(count), "--seed", str(seed)]
    if command.policy.dtype != "float32":
        words += ["--dtype", command.policy.dtype]
    if settings:
        words += ["--config", json.dumps({"environment": settings})]
    text = f"With manako, `this/folder` being where this file lies:\n\n{fenced(python, 'python')}\n\n"
    text += f"Beside a random policy and two controls:\n\n{fenced(shlex.join(words), 'bash')}"
    module = environment.env.rpartition(":")[0]
    return text + (
        f"\n\nThe environment is registered by the module {code(module)}, which is not part of this." if module else ""
    )


def _literal(value: Any) -> str:
    """A value as Python source, in ASCII."""
    return ascii(list(value) if isinstance(value, tuple) else value)


# ---- what it was made of ---------------------------------------------------------------------------------------------


def _data(command: TrainCommand, policy: VLMPolicy, run: Mapping[str, Any]) -> str:
    settings = environment_settings(command.environment)
    lines = [
        f"environment {code(command.environment.env)}, "
        + (code(json.dumps(settings)) if settings else "all else at its defaults")
    ]
    dataset = run.get("dataset")
    if dataset is not None:
        lines.append(f"dataset {code(dataset['folder'])}, {_digest(dataset['manifest_sha256'])}")
        about = dataset["about"]
        lines += [f"its {name}: {code(str(about[name]))}" for name in ("episodes", "player", "seed") if name in about]
    if isinstance(command, PPOCommand):
        lines.append(f"what it played itself, in {command.environment.num_envs:,} environments side by side")
    elif isinstance(command, DPOCommand):
        lines.append(f"pairs by {code(command.dpo.pairs)}, rounds: {command.dpo.rounds}")
    elif command.sft.stage != "instruct":
        lines.append(f"{command.sft.captions:,} frames of random play")
    return bullets(lines)


def _digest(sha256: str | None) -> str:
    return "which has no manifest, and so no digest" if sha256 is None else f"SHA-256 sum of its manifest `{sha256}`"


def _training(command: TrainCommand, run_dir: Path, run: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> str:
    place = chosen if chosen is not None else last_place(run_dir)
    said = [f"{name.replace('_', ' ')} {place[name]:,}" for name in PLACES if name in place]
    if isinstance(command, DPOCommand):
        said = [f"rounds {command.dpo.rounds}"]
    text = bullets(
        [
            f"trained until {', '.join(said) if said else 'its last step'}",
            f"seed {command.run.seed}; held-out episodes have odd seeds (`held_out_seeds`)"
            + (", those of training even ones" if isinstance(command, PPOCommand) else ""),
            *(_validation(chosen) if chosen is not None else []),
            *_changed(run_dir),
        ]
    )
    began = f"Begun {code(str(run.get('started')))} on {code(str(run.get('machine')))} by:"
    return f"{text}\n\n{began}\n\n{fenced(str(run.get('command')))}"


def _validation(chosen: Mapping[str, Any]) -> list[str]:
    found = chosen["validation"]
    return [f"chosen on {found['episodes']} validation episodes, of seeds of their own: {_measured(found)}"]


def _changed(run_dir: Path) -> list[str]:
    """What `--resume` changed of the settings."""
    file = run_dir / CHANGES
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [
        f"from {row['iteration'] + 1:,} on {code(name)} {code(str(before))} -> {code(str(now))}, by `--resume`"
        for row in rows
        for name, (before, now) in row["changes"].items()
    ]


def last_place(run_dir: Path) -> dict[str, int]:
    """Returns where the training of a run stands, by its last row of metrics.jsonl."""
    for numbers in (("iteration", "env_steps"), ("step",)):
        rows = [row for row in read_metrics(run_dir, numbers) if not is_validation(row)]
        if rows:
            return {name: rows[-1][name] for name in numbers}
    return {}


def _versions(run: Mapping[str, Any]) -> str:
    begun, now = run.get("versions", {}), {name: importlib.metadata.version(name) for name in PACKAGES}
    rows = [[name, str(begun.get(name, "")), now[name]] for name in PACKAGES]
    if all(row[1] == row[2] for row in rows):
        return ", ".join(f"{name} {version}" for name, version in [("Python", run.get("python")), *now.items()])
    return table(["package", "when it began", "when this was written"], rows)


# ---- what was measured -----------------------------------------------------------------------------------------------


def _measured(found: Mapping[str, Any]) -> str:
    """Success and mean return with their intervals, in words."""
    low, high = found["return_ci95"]
    said = f"mean return {found['return_mean']:.2f} ({low:.2f} to {high:.2f})"
    if found["success"] is not None:
        low, high = found["success_ci95"]
        said = f"success {found['success']:.1%} ({low:.1%} to {high:.1%}), {said}"
    return said


def _evaluation(evaluation: Mapping[str, Mapping[str, Any]] | None, row: str, run_dir: Path) -> str:
    if evaluation is None:
        return "**Not evaluated** on held-out episodes when this was written."
    first = evaluation[row]
    judged = measure_of(evaluation) == "success"
    rows = []
    for name, found in evaluation.items():
        label = LABELS.get(name, name.replace("_", " ")) + (" (this one)" if name == row else "")
        if (
            row == "best"
            and not evaluation["best"]["same_weights_as_policy"]
            and name in ("blank_image", "replaced_instruction")
        ):
            label += " (of the last policy)"
        low, high = found["return_ci95"]
        cells = [
            f"{found['return_mean']:.2f} ({low:.2f} to {high:.2f})",
            f"{found['length_mean']:.1f}",
            f"{found['episodes']:,}",
        ]
        if judged:
            low, high = found["success_ci95"]
            cells = [f"{found['success']:.1%} ({low:.1%} to {high:.1%})", *cells]
        rows.append([label, *cells])
    headings = ["", *(["success (95 %)"] if judged else []), "mean return (95 %)", "mean steps", "episodes"]
    episodes = episodes_in_words(first["episodes"], first["starts"])
    text = f"Likeliest actions, {episodes} of held-out seeds, the same for each row.\n\n{table(headings, rows)}\n\n"
    text += (
        "`blank image` shows the policy a black frame, `other instruction` another instruction than its own. Success "
        "has Wilson intervals, the mean return bootstrap ones."
    )
    if "best" in evaluation:
        best = evaluation["best"]
        which = "the last one" if best["same_weights_as_policy"] else "another one than the last"
        text += f"\n\nThe best policy is {which}; it was chosen by {RULE}."
        found = best["against_policy"]
        if not best["same_weights_as_policy"] and found["p"] is not None:
            difference = f"{found['measure']} {difference_in_words(found)}"
            text += f" On these episodes: {difference} beside the last one, p {found['p']:.2g} by {found['test']}."
    return text


def _limits(
    command: TrainCommand,
    policy: VLMPolicy,
    evaluation: Mapping[str, Mapping[str, Any]] | None,
    row: str,
    run_dir: Path,
) -> list[str]:
    """What follows from the figures, each in a sentence."""
    if evaluation is None:
        return ["It was not evaluated: whether it acts better than chance is not known."]
    found, said = evaluation[row], []
    if found["starts"] == 1:
        said.append(
            "All episodes began with the same frame and instruction: they are one episode over and over, and the "
            "intervals say nothing of others."
        )
    elif found["starts"] < found["episodes"]:
        said.append(f"The {found['episodes']:,} episodes began in {found['starts']:,} different ways only.")
    if not found["fixed_by_seed"]:
        said.append(
            "Episodes are not fixed by seed: no two rows played the same ones, and none is held out from training."
        )
    else:
        said.append("Held-out seeds are no unseen situations: training may have met the same frames and instructions.")
    if found["success"] is None:
        said.append(
            "The environment does not say of every episode whether it was a success: the mean return is the measure."
        )
    if found.get("failed"):
        said.append(
            f"In {found['failed']:,} episodes the environment broke; they count as no success and are in no return."
        )
    if found.get("episodes_asked"):
        said.append(f"{found['episodes']:,} of {found['episodes_asked']:,} episodes were played, since they are long.")
    said += [sentence for name, sentence in CONTROLS.items() if not _told_apart(evaluation, row, name, run_dir)]
    if row == "best" and not found["same_weights_as_policy"]:
        said.append("Both controls were played by the last policy: whether this one looks and reads is not measured.")
    for outcome, share in _illegal(found):
        said.append(f"{share:.1%} of its answers were {code(outcome)}.")
    if row == "best":
        said.append(
            "It is the best of several on its validation episodes, where its figures are therefore too good; those of "
            "the table are of others."
        )
    return said


CONTROLS = {
    "random": "It is not shown to be better than random actions.",
    "blank_image": "The frame is not shown to matter: with a blank image it does as well, within chance.",
    "replaced_instruction": (
        "The instruction is not shown to matter: with another one, or none, it does as well, within chance."
    ),
}


def _told_apart(evaluation: Mapping[str, Mapping[str, Any]], row: str, control: str, run_dir: Path) -> bool:
    """Whether the policy does better than a control on the same episodes, by a test; True where nothing can be said.

    Of the best policy the two controls of what it sees were not played, unless it is the last one.
    """
    of_another = row == "best" and not evaluation["best"]["same_weights_as_policy"] and control != "random"
    if control not in evaluation or of_another:
        return True
    measure = measure_of(evaluation)
    one, other = (evaluation[name] for name in (row, control))
    means = [each["success" if measure == "success" else "return_mean"] for each in (one, other)]
    if means[0] <= means[1]:
        return False
    if not (one["fixed_by_seed"] and other["fixed_by_seed"]):
        return bool(one[f"{measure}_ci95"][0] > other[f"{measure}_ci95"][1])
    episodes, rows = read_json(run_dir / "episodes.json"), (row, control)
    kind, failed = ("success", {}) if measure == "success" else ("returns", episodes.get("failed", {}))
    lost = {at for name in rows for at in failed.get(name, [])}  # whose returns nobody knows
    values = [[each for at, each in enumerate(episodes[kind][name]) if at not in lost] for name in rows]
    _, test = TESTS[measure]
    return test(values[0], values[1]) < LEVEL


def _illegal(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Outcomes of answers in text that named no allowed action, and their shares."""
    outcomes = found.get("outcomes", {})
    return [(name, count / sum(outcomes.values())) for name, count in outcomes.items() if name != "legal"]
