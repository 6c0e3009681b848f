"""Writes trajectories of collect.py as a LeRobot dataset, which LeRobot's loaders, tools and policies read.

    python experiments/export_lerobot.py --dataset data/goto --output data/goto-lerobot
    python experiments/export_lerobot.py --dataset data/goto --output data/goto-lerobot --fps 10

LeRobot is not needed for it. agent/data/lerobot_format.py says what is in the folder; there,
`LeRobotDataset("goto", root="data/goto-lerobot")` opens it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.envs import EnvError  # noqa: E402
from manako.envs.making import make_raw_env  # noqa: E402
from manako.experiments.common.command_line import UsageError, parse, run_main, section, show  # noqa: E402
from manako.experiments.common.named_modules import is_named  # noqa: E402
from manako.experiments.common.run_folder import writing  # noqa: E402
from manako.settings import setting  # noqa: E402

DEFAULT_FPS = 4  # where nothing says how fast an environment runs: that of this project's own


@dataclass(frozen=True)
class ExportSettings:
    """What is written again."""

    dataset: str | None = setting(None, "trajectories, a folder of collect.py", is_path=True)
    output: str | None = setting(None, "folder of the LeRobot dataset, must not exist", is_path=True)
    fps: int | None = setting(
        None, f"frames per second; by default the env's render_fps, and {DEFAULT_FPS} where it has none", ge=1
    )


@dataclass(frozen=True)
class ExportCommand:
    """Settings of export_lerobot.py."""

    export: ExportSettings = section(ExportSettings, "export")


def main() -> int:
    """Runs one export; returns the exit code."""
    given = read_line()
    with writing("--output", given.output):
        return export(given)


def export(given: ExportSettings) -> int:
    """Writes the dataset of these settings, whose output is held; returns the exit code."""
    dataset_folder, output = str(given.dataset), Path(str(given.output))
    show("export", f"{dataset_folder} to {output}")
    from manako.experiments.common import lerobot_export  # torch and all

    dataset, about = lerobot_export.load(dataset_folder)
    rendered = None if given.fps else render_fps(about)
    origin = "--fps" if given.fps else "its render_fps" if rendered else f"it has no render_fps here: {DEFAULT_FPS}"
    fps = given.fps or rendered or DEFAULT_FPS
    written = lerobot_export.export_lerobot(dataset, about, output, fps)
    print(
        f"{written.episodes:,} episodes, {written.frames:,} frames and {written.tasks:,} tasks of {about['env_id']} at "
        f"{fps} frames per second ({origin}), written to {output}"
    )
    return 0


def read_line(arguments: Sequence[str] | None = None) -> ExportSettings:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no dataset, or no output that is new.
    """
    given = parse(ExportCommand, "Writes trajectories as a LeRobot dataset.", arguments).export
    if not given.dataset:
        raise UsageError("--dataset is missing: give a folder of experiments/collect.py.")
    if not given.output:
        raise UsageError("--output is missing: give the folder of the new dataset.")
    if Path(given.output).exists():
        raise UsageError(f"{given.output!r} exists and is not overwritten: give another --output.")
    return given


def render_fps(about: dict[str, Any]) -> int | None:
    """Returns the frames per second in the metadata of the trajectories' environment.

    None where it has none, has no whole number, cannot be made on this machine, or is of a module that the user has not
    named.
    """
    if not is_named(about["env_id"]):
        return None
    try:
        with contextlib.closing(make_raw_env(about["env_id"], json.loads(about.get("env_kwargs") or "{}"))) as env:
            fps = env.metadata.get("render_fps")
    except EnvError:
        return None
    return int(fps) if isinstance(fps, int | float) and fps >= 1 and fps == int(fps) else None


if __name__ == "__main__":
    run_main(main)
