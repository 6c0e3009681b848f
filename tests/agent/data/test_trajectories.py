"""Recorded trajectories: whole episodes that replay to the same frames, and a folder that anybody opens."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, ScriptedPlayer
from manako.agent.data.trajectories import FEATURES, load_trajectories, save_trajectories, to_dataset, without_inputs
from manako.agent.errors import TrainingError
from manako.envs import EpisodeVectorEnv
from manako.manifest import write_manifest
from tests.helpers.rollout_equality import same_bits
from tests.helpers.small_runs import corridor_env, goto_policy, tiny_policy

GOTO, ROOT = "manako/GoTo-v0", Path(__file__).parents[3]


def record(env, player, iterations=3, num_steps=7, **how):
    collector = RolloutCollector(env, player, num_steps, seed=5, record=True, **how)
    return [collector.collect(iteration) for iteration in range(iterations)]


@pytest.fixture(scope="module")
def policy():
    return goto_policy()


@pytest.fixture(scope="module")
def rollouts(policy):
    return record(EpisodeVectorEnv(GOTO, 4, seed=5), ScriptedPlayer(policy.spec, 0.3), ask_expert=True)


@pytest.fixture(scope="module")
def dataset(rollouts, policy):
    return to_dataset(rollouts, policy, GOTO, "expert, wrong 30%", {"env_kwargs": None})


def test_episodes_are_whole_in_order_and_complete(dataset, rollouts):
    ended = sum(len(rollout.episodes) for rollout in rollouts)
    assert dataset.features == FEATURES and max(dataset["episode"]) + 1 == ended > 20
    for number in range(ended):
        rows = dataset.filter(lambda episode, number=number: episode == number, input_columns="episode")
        assert rows["step"] == list(range(len(rows))) and len(set(rows["seed"])) == 1
        assert (np.array(rows["terminated"]) | np.array(rows["truncated"])).tolist() == [False] * (len(rows) - 1) + [
            True
        ]
        assert abs(sum(rows["reward"]) - rows[0]["episode_return"]) < 1e-5 and len(set(rows["success"])) == 1


def test_an_episode_replays_from_its_seed_to_the_same_frames(dataset):
    env = EpisodeVectorEnv(GOTO, 1)
    for row in dataset:
        if row["step"] == 0:
            seen = env.reset(seeds=[row["seed"]])
        assert np.array_equal(np.array(row["image"]), seen.images[0])
        assert row["instruction"] == seen.instructions[0] and env.expert_actions()[0] == row["expert_action"]
        result = env.step(np.array([row["action"]]))
        assert abs(result.rewards[0] - row["reward"]) < 1e-6 and bool(result.terminated[0]) == row["terminated"]
        seen = result.observations


def test_rows_hold_what_the_policy_saw_and_said(dataset, policy):
    for row in dataset.select(range(20)):
        assert row["prompt"] == policy.prompts.render(row["instruction"]) == policy.prompt(row["instruction"])
        assert row["action_name"] == policy.spec.action_names[row["action"]]
        assert tuple(row["action_tokens"]) == policy.codec.token_ids[row["action"]]
        right = row["action"] == row["expert_action"]
        assert abs(row["logprob"] - np.log(0.7 if right else 0.1)) < 1e-5


def test_episodes_go_on_over_rollouts_and_are_left_out_where_they_began_before():
    env = corridor_env(2, {"length": 30, "limit": 5})
    policy = tiny_policy(env)
    rollouts = record(env, RandomPlayer(policy.spec), iterations=4, num_steps=4)
    rows = to_dataset(rollouts, policy, "tests/Corridor-v0", "random", {})
    assert set(rows["expert_action"]) == {-1}
    for kept, data in ((rollouts, rows), (rollouts[1:], to_dataset(rollouts[1:], policy, "c", "random", {}))):
        expected = []
        for slot in range(2):
            steps = [int(rollout.record.steps[t, slot]) for rollout in kept for t in range(4)]
            ended = [bool((r.terminated | r.truncated)[t, slot]) for r in kept for t in range(4)]
            first = steps.index(0)  # what was under way before is left out, and so is what goes on after
            last = len(ended) - ended[::-1].index(True)
            expected += steps[first:last]
        assert list(data["step"]) == expected and len(expected) > 8
    assert any(rollouts[1].record.steps[0] > 0)
    long = corridor_env(2, {"length": 200, "limit": 100})
    policy = tiny_policy(long)
    short = record(long, RandomPlayer(policy.spec), iterations=1, num_steps=2)
    with pytest.raises(TrainingError, match="No episode ended"):
        to_dataset(short, policy, "tests/Corridor-v0", "random", {})


def test_rollouts_without_a_record_are_refused(policy):
    plain = RolloutCollector(EpisodeVectorEnv(GOTO, 2), RandomPlayer(policy.spec), 2, seed=0).collect(0)
    with pytest.raises(TrainingError, match="keep no record: expected a collector made with record=True"):
        to_dataset([plain], policy, GOTO, "random", {})


def test_the_folder_opens_without_us(dataset, tmp_path):
    save_trajectories(dataset, tmp_path / "data")
    code = (
        "import sys, datasets; rows = datasets.load_from_disk(sys.argv[1]); print(len(rows), rows[0]['image'].size);"
        "assert not any(name in sys.modules for name in ('agent', 'envs', 'policies'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{len(dataset)} (24, 24)"
    again, about = load_trajectories(str(tmp_path / "data"), GOTO, dataset_names(dataset))
    assert again["action"] == dataset["action"] and about["player"] == "expert, wrong 30%"
    with pytest.raises(TrainingError, match="exists"):
        save_trajectories(dataset, tmp_path / "data")


def dataset_names(dataset):
    return json.loads(dataset.info.description)["action_names"]


def described(rows, about):
    changed = rows.select(range(len(rows)))
    changed.info.description = json.dumps(about)
    return changed


def spoil(dataset, folder, change):
    changed = change(dataset)
    changed.info.description = changed.info.description or dataset.info.description
    changed.save_to_disk(folder)
    write_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.select([]), "is empty|holds no trajectories"),
        (lambda rows: rows.remove_columns("seed"), "the column 'seed' is missing"),
        (lambda rows: rows.map(lambda row: {"image": None}), "has no images in"),
        (
            lambda rows: rows.map(
                lambda row, number: {"image": None if number == 9 else row["image"]}, with_indices=True
            ),
            "has no images in 1 of",
        ),
        (lambda rows: Dataset.from_dict({"text": ["hello"]}), "the column 'image' is missing"),
        (lambda rows: described(rows, {"of": "somebody else"}), "it does not say of which environment it is"),
    ],
    ids=["empty", "column", "images", "an image", "other", "description"],
)
def test_datasets_that_cannot_be_used(change, message, dataset, tmp_path):
    spoil(dataset, tmp_path / "data", change)
    with pytest.raises(TrainingError, match=message) as caught:
        load_trajectories(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_datasets_of_something_else(dataset, tmp_path):
    save_trajectories(dataset, tmp_path / "data")
    with pytest.raises(TrainingError, match=r"is of manako/GoTo-v0: expected one of FrozenLake-v1"):
        load_trajectories(str(tmp_path / "data"), "FrozenLake-v1")
    with pytest.raises(TrainingError, match="has the actions up, down, left, right: expected left, right"):
        load_trajectories(str(tmp_path / "data"), None, ["left", "right"])
    with pytest.raises(TrainingError, match="has frames of 24 x 24 x 3, but the environment shows 40 x 40 x 3"):
        load_trajectories(str(tmp_path / "data"), GOTO, dataset_names(dataset), (40, 40, 3))
    with pytest.raises(TrainingError, match="There is no folder"):
        load_trajectories(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="holds no trajectories"):
        load_trajectories(str(tmp_path / "empty"))


def test_recording_changes_no_rollout(policy):
    plain = RolloutCollector(EpisodeVectorEnv(GOTO, 4, seed=5), policy, 6, seed=5).collect(0)
    (kept,) = record(EpisodeVectorEnv(GOTO, 4, seed=5), policy, iterations=1, num_steps=6, ask_expert=True)
    same_bits(plain, kept._replace(record=None))
    assert kept.record.images.shape == (24, 24, 24, 3) and kept.record.expert_actions.shape == (6, 4)


def test_a_packed_rollout_makes_the_same_dataset_and_holds_no_pixels_twice(rollouts, policy, dataset):
    small = [without_inputs(rollout) for rollout in rollouts]
    again = to_dataset(small, policy, GOTO, "expert, wrong 30%", {"env_kwargs": None})
    assert again.to_dict() == dataset.to_dict()
    assert all(len(rollout.inputs.columns[""]) == 0 for rollout in small)

    env = EpisodeVectorEnv("manako/EZPoints-v0", 3, seed=5, env_kwargs={"size": 60})  # a frame for a whole deal
    (raw,) = record(env, ScriptedPlayer(tiny_policy(env).spec, 0.0), iterations=1, num_steps=8, ask_expert=True)
    files = without_inputs(raw).record.images
    shown = raw.record.images
    for at, file in enumerate(files):
        picture = np.array(Image.open(io.BytesIO(file)))
        assert np.array_equal(picture, shown[at])
        if at >= 3:
            assert (file is files[at - 3]) == np.array_equal(shown[at], shown[at - 3])
    assert len({id(file) for file in files}) < len(files) / 2


def test_load_from_disk_gives_one_dataset(dataset, tmp_path):
    save_trajectories(dataset, tmp_path / "data")
    assert isinstance(load_from_disk(str(tmp_path / "data")), Dataset)
