"""What a run leaves behind at its end: the final policy, its evaluation beside its controls, episodes as a GIF."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from manako.agent.checkpoint import BEST, write_folder
from manako.agent.report import evaluation, figures
from manako.agent.report.statistics import TESTS
from manako.agent.report.unfinished import Unfinished, policy_digest
from manako.agent.report.validation import find_best
from manako.envs import EpisodeVectorEnv, held_out_seeds
from manako.envs.settings import EnvSettings
from manako.experiments.common import stopping
from manako.experiments.common.ending import only_warned
from manako.experiments.common.environments import make_vector_env
from manako.experiments.common.model_card import write_card
from manako.experiments.common.outcomes import measure_of
from manako.experiments.common.progress import RowsDone, plain_console
from manako.experiments.common.run_folder import write_text
from manako.experiments.common.settings import TrainCommand
from manako.policies import VLMPolicy, save_policy
from manako.policies.interface import Policy
from manako.policies.saving import read_description

UNFINISHED, UNFINISHED_BEST = "evaluation_under_way.json", "evaluation_of_best_under_way.json"


def write_final(command: TrainCommand, policy: VLMPolicy, run_dir: Path) -> None:
    """Writes final/, whole or not there, with a card of a policy that is not evaluated; one that is there stays."""

    def fill(folder: Path) -> None:
        save_policy(policy, folder)
        write_card(command, policy, run_dir, folder)

    if not (run_dir / "final").exists():
        write_folder(run_dir / "final", fill)


def evaluate_run(command: TrainCommand, policy: VLMPolicy, run_dir: Path, num_envs: int) -> dict[str, Any]:
    """Evaluates the policy and its controls on held-out seeds; writes episodes.json and after.gif.

    A run's best policy has its row behind the final one's, on the same episodes, and how it was chosen with it.

    Args:
        command: the run's settings.
        policy: the policy.
        run_dir: the run folder.
        num_envs: episodes side by side, at most.

    Returns:
        The content of evaluation.json, which the caller writes last.
    """
    run, environment = command.run, command.environment
    seeds = held_out_seeds(max(run.eval_episodes, run.gif_episodes), run.seed)
    count = min(num_envs, run.eval_episodes)
    best = find_best(run_dir)
    kept = unfinished(run_dir / UNFINISHED, environment, policy, count, seeds[: run.eval_episodes], run.eval_steps)
    env = make_vector_env(environment, count, run.seed, held_out=True, on_fault="give up")
    with contextlib.closing(env), stopping.at_the_next_step():
        done = RowsDone(plain_console(), run.eval_episodes, run.eval_steps)
        rows: dict[Any, evaluation.Evaluation] = {
            **evaluation.evaluate_all(
                policy, env, seeds[: run.eval_episodes], done=done, most_steps=run.eval_steps, kept=kept
            )
        }
        if best is not None:
            rows = _with_best(rows, environment, policy, run_dir, env, seeds[: len(rows["policy"].episodes)])
    success = {name: [episode.success for episode in result.episodes] for name, result in rows.items()}
    returns = {name: [episode.episode_return for episode in result.episodes] for name, result in rows.items()}
    fixed_by_seed = all(result.fixed_by_seed for result in rows.values())
    said = {
        "seeds": seeds[: len(next(iter(rows.values())).episodes)],
        "fixed_by_seed": fixed_by_seed,
        "success": success,
        "returns": returns,
    }
    if any(result.failed for result in rows.values()):
        said["failed"] = {name: result.failed for name, result in rows.items()}
    write_text(run_dir / "episodes.json", json.dumps(said))
    with only_warned("after.gif"):
        write_gif(environment, policy, run.seed, run.gif_episodes, run_dir / "after.gif")
    summary = {name: result.summary() for name, result in rows.items()}
    if best is not None:
        same = same_policy(run_dir / "final", run_dir / BEST)
        compared = against(summary, rows["best"], rows["policy"])
        summary["best"] |= {**best, "same_weights_as_policy": same, "against_policy": compared}
    return summary


def _with_best(
    rows: Mapping[Any, evaluation.Evaluation],
    environment: EnvSettings,
    policy: VLMPolicy,
    run_dir: Path,
    env: EpisodeVectorEnv,
    seeds: Sequence[int],
) -> dict[Any, evaluation.Evaluation]:
    """Returns the rows with that of the policy in best/ behind the final policy's, of the same episodes."""
    played = rows["policy"]
    if not same_policy(run_dir / "final", run_dir / BEST):
        policy.load_weights(run_dir / BEST)
        kept = unfinished(run_dir / UNFINISHED_BEST, environment, policy, env.num_envs, seeds, None)
        played = evaluation.evaluate_all(policy, env, seeds, kept=kept, conditions=("policy",))["policy"]
        policy.load_weights(run_dir / "final")
    return {"policy": rows["policy"], "best": replace(played, asked=rows["policy"].asked), **rows}


def same_policy(one: Path, other: Path) -> bool:
    """Says whether two policy folders of one run hold the same weights."""
    described = [read_description(folder)[1] for folder in (one, other)]
    return all(described[0][name] == described[1][name] for name in ("learned_sha256", "base_sha256"))


def against(
    summary: Mapping[str, Mapping[str, Any]], one: evaluation.Evaluation, other: evaluation.Evaluation
) -> dict[str, Any]:
    """Compares two policies on the same episodes, by success where all of the evaluation's were judged.

    Args:
        summary: of all rows, which says the measure.
        one: of the one.
        other: of the other.

    Returns:
        `measure`, the `difference` of the one from the other, and `p` by `test`; None where the episodes are no pairs.
    """
    measure = measure_of(summary)
    name, test = TESTS[measure]
    of_success = measure == "success"
    lost = set() if of_success else {*one.failed, *other.failed}  # whose returns nobody knows
    values: list[list[Any]] = [
        [
            bool(each.success) if of_success else each.episode_return
            for at, each in enumerate(row.episodes)
            if at not in lost
        ]
        for row in (one, other)
    ]
    means = [sum(row) / len(row) for row in values]
    paired = one.fixed_by_seed and other.fixed_by_seed
    return {
        "measure": measure,
        "difference": means[0] - means[1],
        "p": test(values[0], values[1]) if paired else None,
        "test": name,
    }


def unfinished(
    file: Path,
    environment: EnvSettings,
    policy: Policy,
    num_envs: int,
    seeds: Sequence[int],
    most_steps: int | None,
    sampled: Any = None,
    stop: Callable[[], bool] = stopping.asked,
) -> Unfinished:
    """Returns where an evaluation is kept while it goes on; says so where it goes on from there.

    Args:
        file: its file.
        environment: what is played.
        policy: who plays.
        num_envs: episodes side by side.
        seeds: of the episodes.
        most_steps: as of `evaluate_all`.
        sampled: how actions are sampled, as JSON.
        stop: says whether it is to stop.
    """
    of_env = {**vars(environment), "num_envs": num_envs}
    identity = {"env": of_env, "policy": policy_digest(policy), "seeds": list(seeds), "most_steps": most_steps}
    kept = Unfinished(file, {**identity, "sampled": sampled}, stop)
    if kept.found:
        print(f"going on     with the evaluation in {file.name}: {len(kept.rows)} rows are done", flush=True)
    return kept


def write_evaluation(
    command: TrainCommand, policy: VLMPolicy, run_dir: Path, summary: dict[str, dict[str, Any]]
) -> None:
    """Completes the cards and writes evaluation.json, which ends a run; what was kept of one under way is done with."""
    for name in ("final", BEST):
        if (run_dir / name).is_dir():
            write_card(command, policy, run_dir, run_dir / name, summary)
    write_text(run_dir / "evaluation.json", json.dumps(summary, indent=2))
    for name in (UNFINISHED, UNFINISHED_BEST):
        (run_dir / name).unlink(missing_ok=True)


def write_gif(environment: EnvSettings, policy: Policy, seed: int, episodes: int, path: Path) -> None:
    """Plays the first held-out episodes greedily into a GIF; no file for none."""
    if episodes:
        with contextlib.closing(make_vector_env(environment, episodes, seed, held_out=True)) as env:
            played = evaluation.record_episodes(policy, env, held_out_seeds(episodes, seed))
            figures.episode_gif(played, env.action_names, path, figures.shown_fps(env.render_fps))
