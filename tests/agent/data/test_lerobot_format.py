"""A LeRobot dataset read back without LeRobot: every frame, action, task and number of it; and what it refuses."""

import io
import json
import sys

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manako.agent.checkpoint import verify_folder
from manako.agent.collector import RolloutCollector
from manako.agent.data import lerobot_format
from manako.agent.data.demonstrators import RandomPlayer, ScriptedPlayer
from manako.agent.data.lerobot_format import export_lerobot, one_hot, pixel_statistics
from manako.agent.data.trajectories import save_trajectories, to_dataset
from manako.agent.errors import TrainingError
from manako.envs import EpisodeVectorEnv
from manako.experiments import export_lerobot as runner
from manako.experiments.common.command_line import run_main
from tests.helpers.small_runs import corridor_env, tiny_policy

GOTO, CORRIDOR, FPS = "manako/GoTo-v0", "tests/Corridor-v0", 5
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
OWN = ["timestamp", "frame_index", "episode_index", "index", "task_index"]  # what every LeRobot dataset has


def play(env, env_id, player, **settings):
    """Three rollouts of a player, as a dataset of the tiny policy's prompts."""
    policy = tiny_policy(env)
    collector = RolloutCollector(env, player(policy.spec, **settings), 10, seed=5, record=True)
    dataset = to_dataset([collector.collect(i) for i in range(3)], policy, env_id, "a player", {"env_kwargs": None})
    return dataset, json.loads(dataset.info.description)


@pytest.fixture(scope="module")
def goto():
    """Episodes that succeed, fail and are truncated."""
    dataset, about = play(EpisodeVectorEnv(GOTO, 4, seed=5), GOTO, ScriptedPlayer, error_rate=0.6)
    assert any(dataset["truncated"]) and any(dataset["success"]) and not all(dataset["success"])
    return dataset, about


@pytest.fixture(scope="module")
def corridor():
    """Episodes whose instruction changes at every step, in an environment without a frame rate."""
    return play(corridor_env(4), CORRIDOR, RandomPlayer)


@pytest.fixture(scope="module", params=["goto", "corridor"])
def exported(request, tmp_path_factory):
    """A dataset, what holds for all of it, and the folder that it was exported to."""
    dataset, about = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("lerobot") / "data"
    written = export_lerobot(dataset, about, folder, FPS)
    assert written == (max(dataset["episode"]) + 1, len(dataset), len(set(dataset["instruction"])))
    verify_folder(folder)
    return dataset, about, folder


def load(folder, name):
    return json.loads((folder / "meta" / name).read_text(encoding="utf-8"))


def frames_of(dataset):
    return np.stack([np.array(picture) for picture in dataset["image"]])


def test_every_row_is_there(exported):
    dataset, about, folder = exported
    rows, tasks = pq.read_table(folder / DATA).to_pylist(), pandas.read_parquet(folder / "meta/tasks.parquet")
    assert len(rows) == len(dataset) > 40
    for number, (row, ours) in enumerate(zip(rows, dataset, strict=True)):
        picture = Image.open(io.BytesIO(row["observation.image"]["bytes"]))
        assert picture.format == "PNG" and np.array_equal(np.array(picture), np.array(ours["image"]))
        assert row["observation.image"]["path"] == f"frame-{ours['step']:06d}.png"
        assert row["action"] == [float(i == ours["action"]) for i in range(len(about["action_names"]))]
        ended = ours["terminated"] or ours["truncated"]
        assert (row["next.done"], row["next.truncated"]) == (ended, ours["truncated"])
        assert ours["terminated"] == (row["next.done"] and not row["next.truncated"])
        assert row["next.success"] == (ended and ours["success"]) and row["next.reward"] == ours["reward"]
        kept = ("action", "logprob", "value", "expert_action", "seed", "prompt")
        assert [row[f"manako.{name}"] for name in kept] == [ours[name] for name in kept]
        assert [row["manako.action_tokens"]] == ours["action_tokens"]
        assert row["index"] == number and row["frame_index"] == ours["step"] and row["episode_index"] == ours["episode"]
        assert row["timestamp"] == np.float32(ours["step"] / FPS)
        assert tasks.iloc[row["task_index"]].name == ours["instruction"]


def test_tasks_are_numbered_as_they_appear(exported):
    dataset, _, folder = exported
    tasks = pandas.read_parquet(folder / "meta/tasks.parquet")
    assert tasks.index.name == "task" and list(tasks.index) == list(dict.fromkeys(dataset["instruction"]))
    assert list(tasks.columns) == ["task_index"] and list(tasks["task_index"]) == list(range(len(tasks))) != [0]


def test_episodes_say_where_their_frames_are(exported):
    dataset, _, folder = exported
    data, end = pq.read_table(folder / DATA), 0
    episodes, rows = pq.read_table(folder / EPISODES).to_pylist(), list(dataset.remove_columns("image"))
    for number, episode in enumerate(episodes):
        ours = [row for row in rows if row["episode"] == number]
        assert episode["episode_index"] == number and episode["length"] == len(ours)
        assert episode["dataset_from_index"] == end
        end += len(ours)
        assert episode["dataset_to_index"] == end
        assert set(data["episode_index"][end - len(ours) : end].to_pylist()) == {number}
        assert episode["tasks"] == list(dict.fromkeys(row["instruction"] for row in ours))
        places = ("data/chunk_index", "data/file_index", "meta/episodes/chunk_index", "meta/episodes/file_index")
        assert [episode[name] for name in places] == [0, 0, 0, 0]
    assert end == len(dataset) and pq.ParquetFile(folder / DATA).num_row_groups == len(episodes) > 10


def test_statistics_are_those_of_numpy(exported):
    dataset, about, folder = exported
    stats, frames = load(folder, "stats.json"), frames_of(dataset)
    table = pq.read_table(folder / DATA).drop_columns(["observation.image", "manako.prompt"])
    assert list(stats) == ["observation.image", *table.column_names]
    episodes = pq.read_table(folder / EPISODES).to_pylist()
    spans = [(stats, slice(0, len(dataset)))]
    for episode in episodes[:5]:
        nested = {name: {key: episode[f"stats/{name}/{key}"] for key in stats[name]} for name in stats}
        spans.append((nested, slice(episode["dataset_from_index"], episode["dataset_to_index"])))
    for told, span in spans:
        pixels = frames[span].astype(float) / 255
        check(told["observation.image"], pixels.reshape(-1, 3), len(pixels), (3, 1, 1))
        for name in table.column_names:
            values = np.array(table[name].to_pylist(), float)[span]
            values = values.reshape(len(values), -1)
            check(told[name], values, len(values), (values.shape[1],))
    assert np.shape(stats["action"]["mean"]) == (len(about["action_names"]),)


def check(told, values, count, shape):
    expected = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    assert list(told) == [*expected, "count", *QUANTILES] and told["count"] == [count]
    expected |= {name: np.quantile(values, quantile, axis=0) for name, quantile in QUANTILES.items()}
    for name, value in expected.items():
        assert np.shape(told[name]) == shape
        np.testing.assert_allclose(np.ravel(told[name]), value, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_pixel_statistics_from_a_histogram(count):
    frames = np.random.default_rng(count).integers(0, 256, (count, 1, 1, 3), np.uint8)
    histogram = np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])
    statistics = {name: value.tolist() for name, value in pixel_statistics(histogram, count).items()}
    check(statistics, frames.reshape(-1, 3) / 255, count, (3, 1, 1))


def test_info_describes_the_files(exported):
    dataset, about, folder = exported
    info, schema = load(folder, "info.json"), pq.read_schema(folder / DATA)
    features = info.pop("features")
    episodes = max(dataset["episode"]) + 1
    assert info == {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": episodes,
        "total_frames": len(dataset),
        "total_tasks": len(set(dataset["instruction"])),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "robot_type": about["env_id"],
        "splits": {"train": f"0:{episodes}"},
    }
    assert list(features) == schema.names and list(features)[-5:] == OWN
    names = ["height", "width", "channels"]
    assert features["observation.image"] == {"dtype": "image", "shape": about["frame_shape"], "names": names}
    count = len(about["action_names"])
    assert features["action"] == {"dtype": "float32", "shape": [count], "names": about["action_names"]}
    assert schema.field("action").type == pa.list_(pa.float32(), count)
    widths = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
    for name in schema.names[2:]:
        assert features[name]["shape"] == [1] and features[name]["names"] is None
        assert schema.field(name).type == widths[features[name]["dtype"]], name
    kinds = {name: features[name]["dtype"] for name in ("next.reward", "next.done", "timestamp", "manako.prompt")}
    assert list(kinds.values()) == ["float32", "bool", "float32", "string"]
    hugging = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert hugging["observation.image"] == {"_type": "Image"} and hugging["action"]["length"] == count
    assert load(folder, "manako.json") == about


def test_an_answer_without_an_action_is_no_action():
    assert one_hot(np.array([1, -1, 0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_action_tokens_are_filled_up(goto, tmp_path):
    dataset, about = goto
    longer = dataset.map(lambda row: {"action_tokens": [7] * (row["action"] + 1)})
    export_lerobot(longer, about, tmp_path / "data", FPS)
    for row in pq.read_table(tmp_path / "data" / DATA).to_pylist():
        count = row["manako.action"] + 1
        assert row["manako.action_tokens"] == [7] * count + [-1] * (4 - count)
    assert load(tmp_path / "data", "info.json")["features"]["manako.action_tokens"]["shape"] == [4]


def test_large_datasets_have_several_files(goto, tmp_path, monkeypatch):
    dataset, about = goto
    monkeypatch.setattr(lerobot_format, "DATA_FILE_MB", 0.003)
    monkeypatch.setattr(lerobot_format, "CHUNK_SIZE", 2)
    export_lerobot(dataset, about, tmp_path / "data", FPS)
    sizes, places = [], []  # an episode each: bytes of its frames, and the file that it belongs in
    for row in dataset.cast_column("image", datasets.Image(decode=False)):
        sizes += [0] if row["step"] == 0 else []
        sizes[-1] += len(row["image"]["bytes"])
    full, number = 0, 0
    for size in sizes:
        full, number = (full + size, number) if full + size <= 0.003 * 1024**2 else (size, number + 1)
        places.append(f"data/chunk-{number // 2:03d}/file-{number % 2:03d}.parquet")
    written = {path.relative_to(tmp_path / "data").as_posix() for path in tmp_path.rglob("data/chunk-*/*.parquet")}
    assert written == set(places) and 4 < len(written) < len(sizes)
    for episode, place in zip(pq.read_table(tmp_path / "data" / EPISODES).to_pylist(), places, strict=True):
        assert f"data/chunk-{episode['data/chunk_index']:03d}/file-{episode['data/file_index']:03d}.parquet" == place
        rows = pq.read_table(tmp_path / "data" / place).to_pylist()
        index = [row["index"] for row in rows if row["episode_index"] == episode["episode_index"]]
        assert index == list(range(episode["dataset_from_index"], episode["dataset_to_index"]))


def test_joined_datasets_are_numbered_anew(goto, tmp_path):
    dataset, about = goto
    export_lerobot(datasets.concatenate_datasets([dataset, dataset]), about, tmp_path / "data", FPS)
    numbers = pq.read_table(tmp_path / "data" / DATA)["episode_index"].to_pylist()
    once = dataset["episode"][:]
    assert numbers == [*once, *(number + once[-1] + 1 for number in once)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.select(range(len(rows) - 1)), "not whole episodes"),
        (lambda rows: rows.select(range(1, len(rows))), "not whole episodes"),
        (lambda rows: rows.filter(lambda row: row["step"] != 1 or row["terminated"]), "not whole episodes"),
        (lambda rows: rows.map(lambda row: {"terminated": False}), "not whole episodes"),
        (lambda rows: rows.shuffle(seed=0), "not whole episodes"),
        (
            lambda rows: rows.map(one_small_frame, with_indices=True),
            r"row 7 .* shape \(8, 8, 3\), and the first one \(24",
        ),
        (lambda rows: rows.map(lambda row: {"image": row["image"].convert("L")}), r"\(24, 24\).*expected \(height"),
    ],
    ids=["cut behind", "cut before", "gaps", "endless", "shuffled", "frame size", "grey"],
)
def test_rows_that_are_no_episodes(change, message, goto, tmp_path):
    dataset, about = goto
    with pytest.raises(TrainingError, match=message):
        export_lerobot(change(dataset), about, tmp_path / "data", FPS)
    assert not list(tmp_path.iterdir())


def one_small_frame(row, index):
    return {"image": row["image"].resize((8, 8)) if index == 7 else row["image"]}


def test_fps_and_folder_are_checked(goto, tmp_path):
    for fps in (0, -3):
        with pytest.raises(TrainingError, match=f"fps is {fps}: expected a whole number"):
            export_lerobot(*goto, tmp_path / "data", fps)
    (tmp_path / "data").mkdir()
    with pytest.raises(TrainingError, match="exists already"):
        export_lerobot(*goto, tmp_path / "data", FPS)
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


@pytest.fixture
def place(goto, corridor, tmp_path, monkeypatch):
    """A folder with datasets, good and bad; it is the current one."""
    save_trajectories(goto[0], tmp_path / "goto")
    save_trajectories(corridor[0], tmp_path / "corridor")
    save_trajectories(goto[0].shuffle(seed=0), tmp_path / "shuffled")
    save_trajectories(goto[0].remove_columns("seed"), tmp_path / "columns")
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["export_lerobot.py", *words])
    with pytest.raises(SystemExit) as stop:
        run_main(runner.main)
    return stop.value.code


@pytest.mark.parametrize(
    ("dataset", "words", "fps", "origin"),
    [
        ("goto", [], 4, "its render_fps"),
        ("goto", ["--fps", "10"], 10, "--fps"),
        ("corridor", [], 4, "it has no render_fps here"),
    ],
)
def test_the_runner_finds_the_frame_rate(dataset, words, fps, origin, place, monkeypatch, capfd):
    assert run(monkeypatch, "--dataset", dataset, "--output", "lerobot", *words) == 0
    assert f"at {fps} frames per second ({origin}" in capfd.readouterr().out
    assert load(place / "lerobot", "info.json")["fps"] == fps


def test_an_environment_that_is_not_here_has_no_frame_rate():
    assert runner.render_fps({"env_id": "nowhere:Plugin-v0"}) is None
    assert runner.render_fps({"env_id": GOTO, "env_kwargs": '{"size": 4}'}) == 4
    assert runner.render_fps({"env_id": "CartPole-v1", "env_kwargs": None}) == 50


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "new"], "--dataset is missing"),
        (["--dataset", "goto"], "--output is missing"),
        (["--dataset", "nowhere", "--output", "new"], "There is no folder 'nowhere'"),
        (["--dataset", "full", "--output", "new"], "'full' holds no trajectories"),
        (["--dataset", "columns", "--output", "new"], "the column 'seed' is missing"),
        (["--dataset", "shuffled", "--output", "new"], "not whole episodes"),
        (["--dataset", "goto", "--output", "full"], "'full' exists and is not overwritten"),
        (["--dataset", "goto", "--output", "new", "--fps", "0"], "--fps is 0: expected a whole number from 1 on"),
        (["--dataset", "goto", "--output", "new", "--fps=-2"], "--fps is -2: expected a whole number from 1 on"),
        (["--dataset", "goto", "--output", "new", "--fps", "2.5"], "--fps is '2.5': expected a whole number"),
    ],
)
def test_bad_input(words, sentence, place, monkeypatch, capfd):
    before = sorted(place.rglob("*"))
    assert run(monkeypatch, *words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and sentence in lines[0]
    assert sorted(place.rglob("*")) == before


def test_lerobot_reads_it(exported):
    package = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    dataset, _, folder = exported
    read = package.LeRobotDataset("manako/test", root=folder)
    assert len(read) == len(dataset) and read.num_episodes == max(dataset["episode"]) + 1 and read.fps == FPS
    for item, ours in zip((read[i] for i in range(len(read))), dataset, strict=True):
        pixels = (item["observation.image"] * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, np.array(ours["image"])) and item["task"] == ours["instruction"]
        assert item["action"].argmax() == ours["action"] and item["episode_index"] == ours["episode"]
    last = package.LeRobotDataset("manako/test", root=folder, episodes=[3])
    assert len(last) == dataset["episode"][:].count(3)
