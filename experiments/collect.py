"""Records trajectories: a scripted expert's, a policy's, a random player's or a person's, as a Hugging Face dataset.

    python experiments/collect.py --env manako/GoTo-v0 --episodes 500 --output data/goto
    python experiments/collect.py --env manako/GoTo-v0 --error_rate 0.3 --episodes 500 --output data/wrong
    python experiments/collect.py --player policy --policy runs/.../final --episodes 500 --output data/own

    python experiments/collect.py --player recorded --recording play.jsonl --output data/human

None of the seeds is a held-out episode's. With --group_size G, every G episodes have the same seed, for preferences
between them. A recording (by experiments/play.py, by hand, or a folder that this runner wrote; agent/recordings.py says
how it is written) names its own seeds (odd ones are pointed out, since held-out episodes have such), and each of its
episodes becomes one of the dataset, in the same order.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, run_main, setting  # noqa: E402
from manako.experiments.common.settings import RolloutConfig, check_workers  # noqa: E402

if TYPE_CHECKING:
    from manako.agent.data.recordings import Recording


@dataclass
class CollectConfig(RolloutConfig):
    """Settings of collect.py."""

    player: str = setting(
        "expert",
        "expert, policy (samples its actions), random, or recorded",
        choices=("expert", "policy", "random", "recorded"),
    )
    recording: str | None = setting(None, "file or dataset folder that --player recorded plays again, all of it")
    error_rate: float = setting(0.0, "how often the expert does something else", ge=0, le=1)
    episodes: int | None = setting(None, "whole episodes to record, at least; 500 by default", ge=1)
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
    _check_recording(given)
    check_workers(given)
    if given.num_envs % given.group_size:
        raise UsageError(f"--group_size is {given.group_size}, and --num_envs {given.num_envs}: expected a divisor.")
    if given.rollout_backend == "local":
        return _collect(given)
    from manako.agent.workers.cluster import cluster

    with cluster(given.ray_address, paths=[os.getcwd()]):
        return _collect(given)


def _check_recording(given: CollectConfig) -> None:
    """What holds between the settings of recorded play, and of the others."""
    if given.player != "recorded":
        if given.recording is not None:
            raise UsageError(f"--recording is for --player recorded, and --player is {given.player}: leave one out.")
        given.episodes = given.episodes or 500
        return
    if given.recording is None:
        raise UsageError("--recording is missing: give the file that --player recorded plays again.")
    for name, is_given in (("episodes", given.episodes is not None), ("group_size", given.group_size > 1)):
        if is_given:
            raise UsageError(f"--{name} is for other players, a recording is played as it is: leave it out.")
    if given.rollout_backend != "local":
        raise UsageError(
            f"--player recorded plays in this process, and --rollout_backend is {given.rollout_backend}: expected "
            "local."
        )


def _collect(given: CollectConfig) -> int:
    from manako.experiments.common.environments import knows_expert, make_env

    started = time.perf_counter()
    with contextlib.closing(make_env(given, 1, held_out=True)) as env:
        recordings = _recordings(given, env.action_names)  # a fault in them shows before torch is loaded
        import torch

        from manako.agent.data.trajectories import episode_success, save_trajectories, to_dataset
        from manako.experiments.common.building import make_policy, quiet_libraries

        quiet_libraries()
        torch.manual_seed(given.seed)
        policy = make_policy(given, env.action_names, env.frame_shape)
        has_expert = knows_expert(env, needed=given.player == "expert")
    if recordings:
        rollouts, quota = _replay(given, policy, recordings, has_expert)
    else:
        rollouts, quota = _play(given, policy, has_expert), None
    named = {
        "expert": f"expert, wrong {given.error_rate:.0%}" if given.error_rate else "expert",
        "policy": f"policy {given.policy}",
        "random": "random",
        "recorded": f"recorded {given.recording}",
    }
    about = {"env_kwargs": given.env_kwargs, "seed": given.seed, "error_rate": given.error_rate}
    about |= {"policy": given.policy, "instruction": given.instruction}
    dataset = to_dataset(rollouts, policy, given.env, named[given.player], about, quota)
    save_trajectories(dataset, Path(str(given.output)))
    success = episode_success(dataset)
    print(
        f"{len(success):,} episodes, {len(dataset):,} steps of {named[given.player]} on {given.env}: success "
        f"{sum(success) / len(success):.1%}; written to {given.output} in {time.perf_counter() - started:.0f} s"
    )
    return 0


def _recordings(given: CollectConfig, action_names: tuple[str, ...]) -> "list[Recording]":
    """The episodes to play again, none for the other players; odd seeds are pointed out."""
    from manako.agent.data.recordings import read_recordings
    from manako.experiments.common.environments import json_object

    if given.recording is None:
        return []
    recordings = read_recordings(given.recording, given.env, action_names, json_object(given.env_kwargs))
    odd = sum(recording.seed % 2 for recording in recordings)
    if odd:
        print(
            f"warning: {odd:,} of {len(recordings):,} recorded seeds are odd, as those of held-out episodes are: do "
            "not train on what a policy is evaluated on.",
            file=sys.stderr,
        )
    return recordings


def _play(given: CollectConfig, policy: Any, has_expert: bool) -> list[Any]:
    """Rollouts until enough episodes have ended."""
    from manako.agent.data.trajectories import RandomPlayer, ScriptedDemonstrator
    from manako.experiments.common.building import make_rollouts, play

    players = {"expert": ScriptedDemonstrator(given.error_rate), "random": RandomPlayer(), "policy": None}
    recorded = {"demonstrator": players[given.player], "record": True, "ask_expert": has_expert}
    with contextlib.closing(make_rollouts(given, policy, 1_000_000, given.group_size > 1, recorded=recorded)) as source:
        return play(source, given.episodes or 0, given.env)


def _replay(
    given: CollectConfig, policy: Any, recordings: "list[Recording]", has_expert: bool
) -> tuple[list[Any], list[int]]:
    """Rollouts in which every recording is played to its end, and how many of them each slot has played."""
    from manako.agent.data.recordings import in_slots
    from manako.agent.data.trajectories import RecordedDemonstrator
    from manako.agent.rollout import RolloutCollector
    from manako.experiments.common.environments import make_env

    player = RecordedDemonstrator(in_slots(recordings, given.num_envs))
    env = make_env(given, len(player.queues), seed_lists=player.seed_lists)
    collector = RolloutCollector(
        env, policy, given.num_steps, given.seed, demonstrator=player, record=True, ask_expert=has_expert
    )
    with contextlib.closing(collector):
        rollouts = [collector.collect(number) for number in range(math.ceil(player.num_steps / given.num_steps))]
    return rollouts, player.quota


if __name__ == "__main__":
    run_main(main)
