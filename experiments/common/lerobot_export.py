"""The heavy part of export_lerobot.py: reading trajectories without the libraries' own lines, and the writer."""

from typing import Any

from datasets import Dataset

from manako.agent.data.lerobot_format import export_lerobot as export_lerobot
from manako.agent.data.trajectories import load_trajectories
from manako.experiments.common.building import quiet_libraries


def load(folder: str) -> tuple[Dataset, dict[str, Any]]:
    """Returns the trajectories in a folder of collect.py, and what holds for all of them."""
    quiet_libraries()
    return load_trajectories(folder)
