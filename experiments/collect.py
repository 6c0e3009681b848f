"""Records trajectories: a scripted expert's, a policy's, or a random player's, as a Hugging Face dataset.

    python experiments/collect.py --env manako/GoTo-v0 --episodes 500 --output data/goto
    python experiments/collect.py --env manako/GoTo-v0 --error_rate 0.3 --episodes 500 --output data/wrong
    python experiments/collect.py --player policy --policy runs/.../final --episodes 500 --output data/own

None of the seeds is a held-out episode's. With --group_size G, every G episodes have the same seed, for preferences
between them.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.command_line import UsageError, parse, run_main, setting  # noqa: E402
from experiments.settings import RolloutConfig, check_workers  # noqa: E402


@dataclass
class CollectConfig(RolloutConfig):
    """Settings of collect.py."""

    player: str = setting(
        "expert", "expert, policy (samples its actions) or random", choices=("expert", "policy", "random")
    )
    error_rate: float = setting(0.0, "how often the expert does something else", ge=0, le=1)
    episodes: int = setting(500, "whole episodes to record, at least", ge=1)
    output: str | None = setting(None, "folder of the dataset, must not exist")
    num_envs: int = setting(16, "environments side by side", ge=1)
    group_size: int = setting(1, "episodes of the same seed, a divisor of num_envs", ge=1)


def main() -> int:
    """One recording; returns the exit code."""
    given = parse(CollectConfig, description="Records trajectories as a Hugging Face dataset.")
    if not given.output:
        raise UsageError("--output is missing: give the folder of the new dataset.")
    if Path(given.output).exists():
        raise UsageError(f"{given.output!r} exists and is not overwritten: give another --output.")
    if given.error_rate and given.player != "expert":
        raise UsageError(f"--error_rate is the expert's, and --player is {given.player}: leave it out.")
    check_workers(given)
    if given.num_envs % given.group_size:
        raise UsageError(f"--group_size is {given.group_size}, and --num_envs {given.num_envs}: expected a divisor.")
    if given.rollout_backend == "local":
        return _collect(given)
    from agent.ray_workers import cluster

    with cluster(given.ray_address, paths=[str(ROOT), os.getcwd()]):
        return _collect(given)


def _collect(given: CollectConfig) -> int:
    import torch

    from agent.trajectories import RandomPlayer, ScriptedDemonstrator, save_trajectories, to_dataset
    from experiments.environments import knows_expert, make_env
    from experiments.setup import make_policy, make_rollouts, quiet_libraries

    quiet_libraries()
    started = time.perf_counter()
    torch.manual_seed(given.seed)
    with contextlib.closing(make_env(given, 1, held_out=True)) as env:
        policy = make_policy(given, env.action_names, env.frame_shape)
        has_expert = knows_expert(env, needed=given.player == "expert")
    players = {"expert": ScriptedDemonstrator(given.error_rate), "random": RandomPlayer(), "policy": None}
    recorded = {"demonstrator": players[given.player], "record": True, "ask_expert": has_expert}
    named = {
        "expert": f"expert, wrong {given.error_rate:.0%}" if given.error_rate else "expert",
        "policy": f"policy {given.policy}",
        "random": "random",
    }
    rollouts: list[Any] = []
    ended = 0
    with contextlib.closing(make_rollouts(given, policy, 1_000_000, given.group_size > 1, recorded=recorded)) as source:
        while ended < given.episodes:
            rollouts.append(source.collect(len(rollouts)))
            ended += len(rollouts[-1].episodes)
            if len(rollouts) * given.num_steps > 100_000 and not ended:
                raise UsageError(f"No episode of {given.env} ended in {len(rollouts) * given.num_steps:,} steps.")
    about = {"env_kwargs": given.env_kwargs, "seed": given.seed, "error_rate": given.error_rate}
    about |= {"policy": given.policy, "instruction": given.instruction}
    dataset = to_dataset(rollouts, policy, given.env, named[given.player], about)
    save_trajectories(dataset, Path(str(given.output)))
    first = [success for success, step in zip(dataset["success"], dataset["step"], strict=True) if step == 0]
    success = sum(first) / len(first)
    print(
        f"{len(first):,} episodes, {len(dataset):,} steps of {named[given.player]} on {given.env}: success "
        f"{success:.1%}; written to {given.output} in {time.perf_counter() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
