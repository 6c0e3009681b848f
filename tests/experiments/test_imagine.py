"""imagine.py: shares by hand, what it writes, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from manako.agent.errors import TrainingError
from manako.agent.report.imagination import Imagined, agreement, imagination_gif
from manako.experiments import imagine, run_ppo
from manako.experiments.common import imagining
from manako.experiments.common.command_line import run_main

WORDS = ["--env", "manako/GoTo-v0", "--policy", "vision_tokens", "--episodes", "6", "--num_envs", "4"]


def run(words, monkeypatch, capfd, main=imagine.main):
    monkeypatch.setattr("sys.argv", ["imagine.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    out, err = capfd.readouterr()
    return stopped.value.code, out, err


def test_shares_by_hand():
    before = np.array([[1, 2, 3], [1, 2, 3], [4, 4, 4], [5, 5, 5]])
    real = np.array([[1, 2, 3], [2, 1, 3], [4, 4, 0], [5, 0, 0]])
    said = np.array([[1, 2, 3], [2, 1, 3], [4, 4, 4], [0, 0, 0]])
    found = agreement(said, real, before)
    assert found[:2] == (4, 2) and found[2:] == (5, 4)  # rows 0 and 1 whole; 2 + 1 + 2 cells changed, all but one said
    assert agreement(before, real, before)[1:] == (1, 5, 0)
    low, high = found.interval
    assert abs(low - 0.1500) < 1e-4 and abs(high - 0.8500) < 1e-4  # Wilson, 2 of 4
    assert agreement(before, before, before).summary()["changed_cells_right"] is None
    for wrong in ((said[:0], real[:0], before[:0]), (said[:, :2], real, before)):
        with pytest.raises(TrainingError, match="expected equal ones of at least one frame"):
            agreement(*wrong)


def test_a_wrong_frame_is_framed_in_red(tmp_path):
    frame = np.full((8, 8, 3), 90, np.uint8)
    episode = Imagined([frame] * 3, [frame] * 3, [True, True, False], ["up", "down"], "go")
    imagination_gif([episode], tmp_path / "some.gif")
    with Image.open(tmp_path / "some.gif") as gif:
        colors = []
        for number in range(gif.n_frames):
            gif.seek(number)
            colors.append(gif.convert("RGB").getpixel((gif.size[0] - 13, gif.size[1] - 20)))
    assert len(colors) == 3 and colors[2][0] > 150 > colors[2][1] and colors[1][1] > 100 > colors[1][0]
    with pytest.raises(TrainingError, match="expected at least one"):
        imagination_gif([], tmp_path / "none.gif")


@pytest.mark.parametrize("player", ["random", "expert", "policy"])
def test_it_writes_what_it_says(player, tmp_path, monkeypatch, capfd):
    files = ["--output", str(tmp_path / "out.json"), "--gif", str(tmp_path / "out.gif"), "--gif_episodes", "2"]
    code, out, err = run([*WORDS, "--player", player, *files], monkeypatch, capfd)
    assert code == 0 and not err and "copy of the frame before" in out
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["episodes"] == 6 == said["starts"] and set(said["rows"]) == {
        "next frame",
        "from the first frame",
        "copy of the frame before",
    }
    assert len({row["frames"] for row in said["rows"].values()}) == 1 and said["rows"]["next frame"]["frames"] >= 6
    assert said["rows"]["copy of the frame before"]["changed_cells_right"] in (0.0, None)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames >= 4
    again = run([*WORDS, *files], monkeypatch, capfd)
    assert again[0] == 2 and "exists and is not overwritten" in again[2]


def test_episodes_are_imagined_from_the_frames_that_were_said(monkeypatch, capfd):
    """Three frames a prompt: what the policy is shown are its own last codes, black before the first frame."""
    shown, real = [], imagining.Rows

    def watched(columns, fillers):
        shown.append(columns[imagining.COLUMN])  # (B, k, P, 1)
        return real(columns, fillers)

    monkeypatch.setattr(imagining, "Rows", watched)
    code, out, err = run([*WORDS, "--frames", "3", "--history", "1"], monkeypatch, capfd)
    assert code == 0 and not err and "from the first frame" in out
    first, second = shown[:2]
    assert first.shape[:2] == (6, 3) and torch.equal(first[:, 0], first[:, 1])
    assert len(first[:, 0].unique(dim=0)) == 1  # black
    going = [row for row in range(6) if any(torch.equal(first[row, 2], past) for past in second[:, 1])]
    assert len(second) <= 6 and len(going) >= len(second) > 0
    assert all(any(torch.equal(past, frame) for frame in first[:, 2]) for past in second[:, 1])


def test_it_refuses_in_a_sentence(tmp_path, monkeypatch, capfd):
    for words, expected in (
        ([], "--policy is missing"),
        (["--policy", "tiny", "--env", "manako/GoTo-v0"], "predicts no frames: expected a policy of vision tokens"),
        ([*WORDS, "--player", "nobody"], "player"),
        ([*WORDS, "--gif", str(tmp_path / "none" / "x.gif")], "does not exist"),
        (["--policy", str(tmp_path)], "config.json"),
    ):
        code, _, err = run(words, monkeypatch, capfd)
        assert code == 2 and expected in err and "Traceback" not in err, (words, err)


def test_no_acting_teaches_the_tokenizer(tmp_path, monkeypatch, capfd):
    words = ["--policy", "vision_tokens", "--trainable", "encoder", "--output_dir", str(tmp_path / "run")]
    code, _, err = run(words, monkeypatch, capfd, run_ppo.main)
    assert code == 2 and "expected run_sft.py --stage represent" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
