"""Evaluates a policy on held-out seeds, beside a random policy and two controls.

    python experiments/evaluate.py --policy runs/.../final
    python experiments/evaluate.py --policy tiny --env FrozenLake-v1 --env_kwargs '{"is_slippery": false}'

A run's folder, or a checkpoint in it, brings its environment and settings along. Prints the table of run_ppo.py and,
with --output, writes it as JSON; --gif draws episodes. An existing file is never overwritten.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, check, parse, read_yaml, run_main, setting  # noqa: E402
from manako.experiments.common.run_folder import is_run, policy_folder  # noqa: E402
from manako.experiments.common.settings import RunConfig  # noqa: E402

OF_THE_POLICY = ("trainable", "action_format", "system", "dtype")  # likewise, and no flags here
TAKEN = ("env", "instruction", "action_names", "env_kwargs", "image_source", "success_return")  # from the run


@dataclass
class EvaluateConfig:
    """Settings of evaluate.py."""

    policy: str = setting("", "run folder, checkpoint, model folder, Hub id or preset")
    env: str | None = setting(None, "Gymnasium id; by default the run's")
    instruction: str | None = setting(None, "replaces the env's own instruction")
    action_names: str | None = setting(None, "replaces the env's own action names: a,b,c")
    env_kwargs: str | None = setting(None, "arguments of the env's constructor, a JSON object")
    image_source: str | None = setting(None, "auto, observation or render", choices=("auto", "observation", "render"))
    success_return: float | None = setting(None, "lowest return of a successful episode")
    episodes: int = setting(500, "held-out episodes of each row", ge=1)
    num_envs: int = setting(64, "environments side by side", ge=1)
    seed: int | None = setting(None, "of the held-out episodes; by default the run's, else 0", ge=0, lt=2**31)
    sample: bool = setting(False, "draw actions instead of taking the most probable one")
    output: str | None = setting(None, "JSON file for the results, must not exist")
    gif: str | None = setting(None, "GIF file for the first episodes, must not exist")
    gif_episodes: int = setting(4, "how many of them", ge=1)


def main() -> int:
    """One evaluation; returns the exit code."""
    given = parse(EvaluateConfig, description="Evaluates a policy on held-out seeds, with controls.")
    if not given.policy:
        raise UsageError("--policy is missing: give a run folder, a checkpoint, a model folder, a Hub id or a preset.")
    for name, file in (("output", given.output), ("gif", given.gif)):
        if file and Path(file).exists():
            raise UsageError(f"--{name} {file!r} exists and is not overwritten: give another file.")
        if file and not Path(file).resolve().parent.is_dir():
            raise UsageError(f"The folder of --{name} {file!r} does not exist: make it or give another file.")
    config = _run_config(given)
    import torch

    from manako.agent.report.evaluation import evaluate_all, record_episodes
    from manako.agent.report.figures import episode_gif
    from manako.experiments.common.building import make_policy, quiet_libraries
    from manako.experiments.common.environments import held_out_seeds, make_env
    from manako.experiments.common.progress import plain_console, print_table

    quiet_libraries()
    torch.manual_seed(config.seed)
    env = make_env(config, min(given.num_envs, given.episodes), held_out=True)
    policy = make_policy(config, env.action_names, env.frame_shape)
    seeds = held_out_seeds(config.seed, max(given.episodes, given.gif_episodes))
    console = plain_console()
    evaluations = evaluate_all(
        policy,
        env,
        seeds[: given.episodes],
        given.sample,
        done=lambda name, result: console.print(f"{name.replace('_', ' ')}: {result.summary()['success']:.1%}"),
    )
    env.close()
    summary = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    print_table(console, summary, f"{given.policy} on {config.env}, held-out seeds of seed {config.seed}")
    if given.output:
        Path(given.output).write_text(json.dumps(summary, indent=2))
    if given.gif:
        shown = make_env(config, given.gif_episodes, held_out=True)
        episode_gif(record_episodes(policy, shown, seeds[: given.gif_episodes]), shown.action_names, given.gif)
        shown.close()
    return 0


def _run_config(given: EvaluateConfig) -> RunConfig:
    """The run's settings where the policy lies in a run, with what the flags replace."""
    folder = Path(given.policy)
    policy = policy_folder(given.policy)
    run = next((place for place in (folder, folder.parent, folder.parent.parent) if is_run(place)), None)
    values = read_yaml(run / "config.yaml") if folder.is_dir() and run else {}
    kept = {key: value for key, value in values.items() if key in (*TAKEN, *OF_THE_POLICY, "seed")}
    check(RunConfig, kept, source=f"{run}/config.yaml")
    replaced = {key: getattr(given, key) for key in (*TAKEN, "seed") if getattr(given, key) is not None}
    if "env" in replaced and replaced["env"] != kept.get("env"):
        kept = {key: value for key, value in kept.items() if key not in TAKEN}
    return RunConfig(
        **{**kept, **replaced, "policy": policy, "eval_episodes": given.episodes, "gif_episodes": given.gif_episodes}
    )


if __name__ == "__main__":
    run_main(main)
