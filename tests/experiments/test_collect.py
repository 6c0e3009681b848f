"""Which episodes collect.py and run_dpo.py record: those of seeds fixed beforehand, all of them played to their end.

`Halves` ends after 2 steps in success or after 40 in failure, as the seed says: what ends first is all success.
"""

import json
import sys
from collections import Counter

import pytest

from manako.agent.data.trajectories import episode_success, load_trajectories
from manako.envs import HELD_OUT, EpisodeVectorEnv, episode_seed, training_seeds
from manako.envs.settings import EnvSettings
from manako.experiments import collect
from manako.experiments.common.collecting import own_trajectories, spread
from manako.experiments.common.command_line import run_main
from manako.experiments.common.settings import DPOCommand, DPOSettings, RunSettings
from tests.helpers.small_envs import Halves, tiny_policy

HALVES = "tests.helpers.small_envs:tests/Halves-v0"


def record(folder, **given):
    """Runs collect.py here; returns the dataset, what it says of itself, and what was printed of it."""
    words = {"env": HALVES, "player": "random", "output": folder / "data", **given}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run", *(str(word) for key in words for word in (f"--{key}", words[key]))])
        with pytest.raises(SystemExit) as ended:
            run_main(collect.main)
    assert not ended.value.code
    return load_trajectories(str(folder / "data"))


def episodes_of(data):
    """Returns (seed, steps, success) of each episode, in order."""
    lengths = Counter(data["episode"])
    seeds = [seed for seed, step in zip(data["seed"], data["step"], strict=True) if step == 0]
    return [
        (seed, lengths[number], won)
        for number, (seed, won) in enumerate(zip(seeds, episode_success(data), strict=True))
    ]


def expected_of(seeds):
    """What the seeds say, in the environment's own words."""
    return [(seed, 2, True) if Halves.is_short(seed) else (seed, 40, False) for seed in seeds]


@pytest.mark.parametrize(("episodes", "num_envs"), [(40, 1), (40, 7), (40, 64), (150, 64), (3, 2)])
def test_long_failures_are_recorded_as_well_as_short_successes(episodes, num_envs, tmp_path, capsys):
    data, about = record(tmp_path, episodes=episodes, num_envs=num_envs)
    found = episodes_of(data)
    assert found == expected_of(training_seeds(episodes, 0)) and about["episodes"] == len(found) == episodes
    short = sum(won for _, _, won in found)
    assert len(data) == 2 * short + 40 * (episodes - short)
    assert 0 < short < episodes and f"success {short / episodes:.1%}" in capsys.readouterr().out
    assert about["fixed_by_seed"] is True and "note" not in about


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray-env", "ray-replica"])
def test_workers_record_the_same_episodes(backend, tmp_path):
    words = {"rollout_backend": backend, "num_workers": 2, "worker_cpus": 0.5, "rollout_batch_size": 2}
    data, _ = record(tmp_path, episodes=9, num_envs=16, **words)
    assert episodes_of(data) == expected_of(training_seeds(9, 0))


def test_groups_have_the_same_seeds_whatever_the_number_of_environments(tmp_path):
    data, _ = record(tmp_path, episodes=10, num_envs=3, group_size=4)
    seeds = [seed for seed, _, _ in episodes_of(data)]
    assert seeds[0] == seeds[3] != seeds[4] == seeds[7] != seeds[8] == seeds[9]


def test_the_seeds_are_those_of_training_and_each_part_has_its_own():
    first, second = training_seeds(50, 3), training_seeds(50, 3, part=1)
    assert len(set(first + second)) == 100 and all(seed % 2 == 0 for seed in first + second)
    assert first[:2] == [episode_seed(3, 0, 0, 0), episode_seed(3, 0, 1, 0)] != [episode_seed(3, HELD_OUT, 0, 0)] * 2
    lists, quota = spread(first[:5], 7)
    assert [seeds[0] for seeds in lists[:5]] == first[:5] and quota == [1] * 5 + [0] * 2
    assert spread(first[:5], 2) == ([first[:3], first[3:5]], [3, 2])


def test_the_policys_own_play_for_preferences_is_whole_too():
    environment = EnvSettings(env=HALVES, num_envs=16)
    dpo = DPOSettings(episodes=12, group_size=2, num_steps=8)
    policy = tiny_policy(EpisodeVectorEnv(HALVES, 1))
    rounds = [
        own_trajectories(DPOCommand(environment=environment, dpo=dpo, run=RunSettings(seed=1)), policy, number)
        for number in range(2)
    ]
    for number, data in enumerate(rounds):
        assert episodes_of(data) == expected_of(training_seeds(12, 1, group_size=2, part=number))
    assert not set(rounds[0]["seed"]) & set(rounds[1]["seed"])
    assert {won for _, _, won in episodes_of(rounds[0])} == {True, False}


def test_ignored_seeds_are_said_and_kept_with_the_data(tmp_path, capsys):
    data, about = record(tmp_path, episodes=20, num_envs=4, env_kwargs='{"forgetful": true}')
    assert about["fixed_by_seed"] is False and about["note"] == "episodes are not fixed by seed"
    assert "seeds        episodes are not fixed by seed: two resets of " in capsys.readouterr().out
    assert len(episodes_of(data)) == 20
    recording = tmp_path / "play.jsonl"
    recording.write_text(json.dumps({"seed": 2, "actions": ["left", "left"]}))
    words = ["run", "--env", HALVES, "--env_kwargs", '{"forgetful": true}', "--player", "recorded"]
    words += ["--recording", str(recording), "--output", str(tmp_path / "again")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", words)
        run_main(collect.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "so what was recorded cannot be played again" in error and error.count("\n") == 1
    assert not (tmp_path / "again").exists()
