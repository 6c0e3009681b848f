"""Trajectories as a LeRobot dataset, format v3.0 (https://huggingface.co/docs/lerobot/lerobot-dataset-v3).

`LeRobotDataset(name, root=folder)` reads the folder; it is written here with what `datasets` brings along, without
LeRobot and without a video encoder: the frames are PNGs inside the parquet files, as in the trajectories.

    data/chunk-000/file-000.parquet             one row a frame, one row group an episode
    meta/info.json                              features, counts, frames per second
    meta/stats.json                             of each feature over all frames: moments, extremes, quantiles
    meta/tasks.parquet                          instruction -> task_index
    meta/episodes/chunk-000/file-000.parquet    one row an episode: where its frames are, its tasks, its statistics
    meta/manako.json                            what holds for all rows: env_id, player, env_kwargs, seed, ...

    LeRobot's feature                           ours
    observation.image                           image
    action          float32 (A,)                action, one-hot; `names` are the A action names. A vector (d,) is as it
                                                is, and has no manako.action
    next.reward                                 reward
    next.done                                   terminated or truncated
    next.truncated                              truncated
    next.success                                success, true in the last frame of a successful episode alone;
                                                left out where nobody says it
    task                                        instruction
    manako.<name>                               action (the index), action_tokens (-1 fills short ones up), logprob,
                                                value, expert_action, seed, prompt; allowed (A,), where the env gives an
                                                action mask

An action is one-hot because LeRobot names the entries of an action vector and its policies regress them: an index would
put an order among the actions, and LeRobot hands a feature of one entry to a policy as (B, T) where (B, T, A) is
expected, on which ACT stops with an error. Where an answer in text named no action, all are 0. The largest entry of a
policy's output is its action. Our own columns are named `manako.` since LeRobot takes every feature that starts with
`action` for an output of the policy, and every one that starts with `observation` for an input.

There is no observation.state: our policies see a frame and an instruction. Many of LeRobot's (ACT, diffusion, SmolVLA)
demand one, so training those takes a state of your own.

Left out, because it follows from the rest: action_name (`names`), terminated (done and not truncated), episode_return
(the sum of next.reward), step (frame_index); and the columns env_id and policy, which are in meta/manako.json. Episodes
are numbered anew, in order.

Statistics are exact, over all frames; LeRobot's own writer samples the frames and averages the episodes' quantiles.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from manako.agent.checkpoint import write_folder
from manako.agent.errors import TrainingError

CODEBASE_VERSION = "v3.0"
CHUNK_SIZE = 1000  # files in a chunk folder
DATA_FILE_MB = 100  # an episode that would make a file larger begins the next one
VIDEO_FILE_MB = 200  # in info.json; there are no videos
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
IMAGE, PROMPT = "observation.image", "manako.prompt"

Statistics = dict[str, np.ndarray]  # min, max, mean, std, count (1,), and the quantiles


class Exported(NamedTuple):
    """How much was written."""

    episodes: int
    frames: int
    tasks: int


def export_lerobot(dataset: Dataset, about: dict[str, Any], folder: Path | str, fps: int) -> Exported:
    """Writes trajectories as a LeRobot dataset; the folder is whole or not there.

    Args:
        dataset: of `agent.data.trajectories`.
        about: what `load_trajectories` gave with it.
        folder: must not exist.
        fps: frames per second; an env step lasts 1 / fps seconds.

    Raises:
        TrainingError: fps is below 1, the rows are no whole episodes, the frames differ in shape, or the folder exists.
    """
    if fps < 1:
        raise TrainingError(f"fps is {fps}: expected a whole number of frames per second from 1 on.")
    episodes = _episodes(dataset)
    tasks = list(dict.fromkeys(dataset["instruction"]))
    write_folder(folder, lambda place: _write(dataset, about, place, fps, episodes, tasks))
    return Exported(len(episodes), len(dataset), len(tasks))


def one_hot(actions: np.ndarray, count: int) -> np.ndarray:
    """Returns (B, count) float32 of indices (B,); zeros for -1, which is an answer that named no action."""
    return (actions[:, None] == np.arange(count)).astype(np.float32)


def vector_statistics(values: np.ndarray) -> Statistics:
    """Returns the statistics (K,) of a feature.

    Args:
        values: (N, K), numbers or booleans.
    """
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def pixel_statistics(histogram: np.ndarray, num_frames: int) -> Statistics:
    """Returns the statistics (3, 1, 1) of the pixels, which go from 0 to 1; `count` is of frames.

    Args:
        histogram: (3, 256), how often each channel has each value.
        num_frames: the frames that were counted.
    """
    levels, total = np.arange(256) / 255, histogram[0].sum()
    mean = histogram @ levels / total
    variance = (histogram * (levels - mean[:, None]) ** 2).sum(1) / total
    seen = histogram > 0
    ranks = np.array(list(QUANTILES.values())) * (total - 1)
    cumulative = histogram.cumsum(1)
    lower, upper = (
        levels[np.stack([np.searchsorted(row, rank, side="right") for row in cumulative])]
        for rank in (np.floor(ranks), np.ceil(ranks))
    )  # (3, Q) each: the values in sorted order on both sides of a rank
    quantiles = lower + (upper - lower) * (ranks % 1)
    values = {
        "min": levels[seen.argmax(1)],
        "max": levels[255 - seen[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(variance),
    }
    values |= {"count": np.array([num_frames])} | dict(zip(QUANTILES, quantiles.T, strict=True))
    return {name: value if name == "count" else value.reshape(3, 1, 1) for name, value in values.items()}


def _write(
    dataset: Dataset, about: dict[str, Any], place: Path, fps: int, episodes: list[range], tasks: list[str]
) -> None:
    if about.get("action_space", {}).get("kind") == "Text":
        raise TrainingError(
            f"The actions of {about['env_id']} are texts, and LeRobot's are numbers: expected other actions."
        )
    columns = _columns(dataset, about, fps, episodes, tasks)
    encoded = dataset.cast_column("image", Image(decode=False))
    shape = _pixels(encoded[0]["image"]).shape
    features = _features(shape, columns, about["action_names"])
    schema = _arrow_features(features).arrow_schema
    index, histogram = [], np.zeros((3, 256), np.int64)
    with contextlib.closing(_DataFiles(place, schema)) as files:
        for number, rows in enumerate(episodes):
            batch = encoded[rows.start : rows.stop]
            part = {name: column[rows.start : rows.stop] for name, column in columns.items()}
            counts = _histogram(batch["image"], rows, shape)
            histogram += counts
            chunk, file = files.add(_table(batch, part, schema), sum(len(_png(cell)) for cell in batch["image"]))
            index.append(
                {
                    "episode_index": number,
                    "tasks": list(dict.fromkeys(batch["instruction"])),
                    "length": len(rows),
                    "data/chunk_index": chunk,
                    "data/file_index": file,
                    "dataset_from_index": rows.start,
                    "dataset_to_index": rows.stop,
                    **{
                        f"stats/{name}/{key}": value
                        for name, feature in _statistics(counts, part).items()
                        for key, value in feature.items()
                    },
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": 0,
                }
            )
    (place / EPISODES_PATH).parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(index), place / EPISODES_PATH)
    names = pandas.Index(tasks, name="task", dtype=object)
    pandas.DataFrame({"task_index": range(len(tasks))}, index=names).to_parquet(place / "meta/tasks.parquet")
    info = {
        "codebase_version": CODEBASE_VERSION,
        "fps": fps,
        "features": features,
        "total_episodes": len(episodes),
        "total_frames": len(dataset),
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "data_path": DATA_PATH,
        "video_path": None,
        "robot_type": about["env_id"],
        "splits": {"train": f"0:{len(episodes)}"},
    }
    for name, content in (("info", info), ("stats", _statistics(histogram, columns)), ("manako", about)):
        text = json.dumps(content, indent=4, ensure_ascii=False)
        (place / f"meta/{name}.json").write_text(text + "\n", encoding="utf-8")


class _DataFiles:
    """The files of `DATA_PATH`, filled one after another, an episode at a time."""

    def __init__(self, place: Path, schema: Any) -> None:
        self.place, self.schema = place, schema
        self.writer: Any = None
        self.number, self.size = -1, 0  # of the current file: from 0, and in bytes

    def add(self, episode: Any, size: int) -> tuple[int, int]:
        """Writes an episode's table of about `size` bytes; returns its chunk and its file in it."""
        if self.writer is None or self.size + size > DATA_FILE_MB * 1024**2:
            self._next()
        self.writer.write_table(episode)
        self.size += size
        return divmod(self.number, CHUNK_SIZE)

    def _next(self) -> None:
        self.close()
        self.number, self.size = self.number + 1, 0
        chunk, file = divmod(self.number, CHUNK_SIZE)
        path = self.place / DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = pq.ParquetWriter(path, self.schema, compression="snappy", use_dictionary=True)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _episodes(dataset: Dataset) -> list[range]:
    """The rows of each episode, which must be whole: steps from 0 on, ended in the last row and only there."""
    steps, ended = np.array(dataset["step"][:]), _ended(dataset)
    starts = np.flatnonzero(steps == 0).tolist()
    episodes = [range(*ends) for ends in zip(starts, [*starts[1:], len(steps)], strict=True)]
    expected = np.concatenate([np.arange(len(rows)) for rows in episodes]) if episodes else steps[:0]
    last = np.isin(np.arange(len(steps)), [rows.stop - 1 for rows in episodes])
    if not len(steps) or not np.array_equal(steps, expected) or not np.array_equal(ended, last):
        raise TrainingError(
            "The dataset's rows are not whole episodes one after another: expected a dataset of "
            "experiments/collect.py, neither shuffled nor cut within an episode."
        )
    return episodes


def _ended(dataset: Dataset) -> np.ndarray:
    return np.array(dataset["terminated"][:]) | np.array(dataset["truncated"][:])


def _columns(
    dataset: Dataset, about: dict[str, Any], fps: int, episodes: list[range], tasks: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every number of every frame, (N, K) by LeRobot's name, in the order in which they are written."""

    def column(name: str, kind: type) -> np.ndarray:
        return np.array(dataset[name][:], kind)[:, None]

    vectors, ended = "action_space" in about, _ended(dataset)[:, None]
    actions = np.array(dataset["action"][:], np.float32) if vectors else column("action", np.int64)
    advice = dataset["expert_action"][:]
    experts = None if None in advice else np.array(advice, actions.dtype).reshape(len(dataset), -1)
    tokens = dataset["action_tokens"][:]
    width = max(map(len, tokens))
    frame_index = np.concatenate([np.arange(len(rows)) for rows in episodes])[:, None]
    number = {task: index for index, task in enumerate(tasks)}
    return {
        "action": actions if vectors else one_hot(actions[:, 0], len(about["action_names"])),
        "next.reward": column("reward", np.float32),
        "next.done": ended,
        "next.truncated": column("truncated", np.bool_),
        **({} if None in dataset["success"][:] else {"next.success": column("success", np.bool_) & ended}),
        **({} if vectors else {"manako.action": actions}),
        "manako.action_tokens": np.array([[*row, *[-1] * (width - len(row))] for row in tokens], np.int64),
        "manako.logprob": column("logprob", np.float32),
        "manako.value": column("value", np.float32),
        **({} if experts is None else {"manako.expert_action": experts}),
        "manako.seed": column("seed", np.int64),
        **({"manako.allowed": np.array(dataset["action_mask"][:])} if "action_mask" in dataset.column_names else {}),
        "timestamp": (frame_index / fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.repeat(np.arange(len(episodes)), [len(rows) for rows in episodes])[:, None],
        "index": np.arange(len(dataset))[:, None],
        "task_index": np.array([number[task] for task in dataset["instruction"]])[:, None],
    }


def _features(
    frame_shape: tuple[int, ...], columns: dict[str, np.ndarray], action_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The `features` of info.json."""
    features: dict[str, dict[str, Any]] = {
        IMAGE: {"dtype": "image", "shape": list(frame_shape), "names": ["height", "width", "channels"]}
    }
    for name, column in columns.items():
        if name == "timestamp":  # LeRobot's own five come last
            features[PROMPT] = {"dtype": "string", "shape": [1], "names": None}
        features[name] = {"dtype": str(column.dtype), "shape": [column.shape[1]], "names": None}
    features["action"]["names"] = list(action_names)
    return features


def _arrow_features(features: dict[str, dict[str, Any]]) -> Features:
    """As LeRobot types its parquet columns: a lone number is a value, several are a list of fixed length."""
    kinds: dict[str, Any] = {}
    for name, feature in features.items():
        if feature["dtype"] == "image":
            kinds[name] = Image()
        elif feature["shape"] == [1]:
            kinds[name] = Value(feature["dtype"])
        else:
            kinds[name] = List(Value(feature["dtype"]), length=feature["shape"][0])
    return Features(kinds)


def _table(batch: dict[str, Any], part: dict[str, np.ndarray], schema: Any) -> Any:
    """The arrow table of an episode: its undecoded rows of the trajectories and its numbers, (n, K) each."""
    arrays = {}
    for name, values in part.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        width = values.shape[1]
        arrays[name] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    images = [{"bytes": _png(cell), "path": f"frame-{step:06d}.png"} for step, cell in enumerate(batch["image"])]
    arrays[IMAGE] = pa.array(images, schema.field(IMAGE).type)
    arrays[PROMPT] = pa.array(batch["prompt"], pa.string())
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _statistics(histogram: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, dict[str, list]]:
    """Of the frames with this histogram (3, 256) and these numbers, (N, K) each; as lists, for JSON."""
    statistics = {IMAGE: pixel_statistics(histogram, len(columns["index"]))}
    statistics |= {name: vector_statistics(column) for name, column in columns.items()}
    return {name: {key: value.tolist() for key, value in feature.items()} for name, feature in statistics.items()}


def _histogram(cells: Sequence[dict[str, Any]], rows: range, shape: tuple[int, ...]) -> np.ndarray:
    """How often each value is in each channel of the frames: (3, 256)."""
    counts = np.zeros((3, 256), np.int64)
    for row, frame in zip(rows, map(_pixels, cells), strict=True):
        if frame.shape != shape or shape[2:] != (3,):
            raise TrainingError(
                f"The frame in row {row} of the dataset has the shape {frame.shape}, and the first one {shape}: "
                "expected (height, width, 3), the same in all."
            )
        counts += [np.bincount(frame[..., channel].ravel(), minlength=256) for channel in range(3)]
    return counts


def _pixels(cell: dict[str, Any]) -> np.ndarray:
    """The frame (H, W, 3) uint8 in an undecoded cell of an image column."""
    return np.asarray(Picture.open(io.BytesIO(_png(cell))))


def _png(cell: dict[str, Any]) -> bytes:
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
