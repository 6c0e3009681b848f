"""The pictures hold what they were given: read back from the files, pixel by pixel where it matters."""

import math

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageSequence

from manako.agent.errors import TrainingError
from manako.agent.report import figures
from manako.agent.report.figures import RecordedEpisode, episode_gif, learning_curve, success_chart

NAMES = ("up", "down", "left", "right")


def rows(n: int = 10) -> list[dict]:
    return [
        {
            "env_steps": 512 * (i + 1),
            "success_rate": i / n,
            "episode_return": 2 * i / n - 1,
            "entropy": 1.4 - i / n,
            "approx_kl": 0.01,
            "explained_variance": math.nan if i == 0 else 0.5,
        }
        for i in range(n)
    ]


def colored(path, color: str, tolerance: int = 12) -> int:
    """How many pixels of a picture have this colour."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)  # (H, W, 3)
    return int((abs(pixels - ImageColor.getrgb(color)).max(-1) <= tolerance).sum())


def pictures(path) -> tuple[list[np.ndarray], list[int]]:
    """The pictures of a GIF, (H, W, 3) each, and how many milliseconds each one stays."""
    with Image.open(path) as gif:
        frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    return [frame for frame, _ in frames], [duration for _, duration in frames]


def count(picture: np.ndarray, color: str, tolerance: int = 12) -> int:
    return int((abs(picture.astype(int) - ImageColor.getrgb(color)).max(-1) <= tolerance).sum())


def episode(
    num_actions: int = 4, steps: int = 3, success: bool = True, size: tuple[int, int] = (8, 8)
) -> RecordedEpisode:
    """Frame t is one colour, all actions are equally likely but the taken one, t, has probability 0.6."""
    frames = np.zeros((steps + 1, *size, 3), np.uint8)
    frames[:] = (50 * np.arange(steps + 1))[:, None, None, None]
    probabilities = np.full((steps, num_actions), 0.4 / (num_actions - 1))
    actions = [t % num_actions for t in range(steps)]
    probabilities[range(steps), actions] = 0.6
    return RecordedEpisode(frames, ["go to the blue ball"] * steps, probabilities, actions, [0.2] * steps, success)


# ------------------------------------------------------------------------------------------------- learning curve


def test_every_series_is_drawn(tmp_path):
    path = tmp_path / "new" / "curve.png"
    learning_curve(rows(), path, "GoTo", baselines={"random policy": (0.25, (0.2, 0.3))})
    assert colored(path, figures._BASELINE_COLORS[0]) > 100
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]  # nothing left beside it
    # against a curve of one point a series, which has the same panels, labels and legend
    learning_curve([rows()[5], {"env_steps": 5120}], tmp_path / "one_point.png", "GoTo")
    for key, color in figures.COLORS.items():
        assert colored(path, color) > colored(tmp_path / "one_point.png", color) + 200, key


def test_evaluations_while_it_trained_are_marks(tmp_path):
    """Of success and of returns, each in its panel; where there are none, there is no such colour."""
    marked = [{"env_steps": row["env_steps"], "validation/success": 0.5} for row in rows()[::3]]
    learning_curve(rows(), tmp_path / "none.png", "GoTo")
    learning_curve([*rows(), *marked], tmp_path / "one.png", "GoTo")
    both = [{**row, "validation/return_mean": 0.1} for row in marked]
    learning_curve([*rows(), *both], tmp_path / "both.png", "GoTo")
    found = [colored(tmp_path / f"{name}.png", figures._VALIDATION_COLOR) for name in ("none", "one", "both")]
    assert found[0] == 0 < 100 < found[1] and found[2] > 1.5 * found[1]


def test_panels_without_a_number_are_left_out(tmp_path):
    learning_curve(rows(), tmp_path / "three.png", "GoTo")
    learning_curve(
        [{"env_steps": 512, "success_rate": 0.5, "episode_return": None, "entropy": math.nan}, {"loss": 1.0}],
        tmp_path / "one.png",
        "GoTo",
    )
    three, one = Image.open(tmp_path / "three.png"), Image.open(tmp_path / "one.png")
    assert three.width == 3 * one.width
    assert colored(tmp_path / "one.png", figures.COLORS["success_rate"]) > 10


@pytest.mark.parametrize("n", [1, 39, 40, 200])
def test_short_and_long_runs(tmp_path, n):
    learning_curve(rows(n), tmp_path / "curve.png", "GoTo")
    assert colored(tmp_path / "curve.png", figures.COLORS["success_rate"]) > 10


def test_the_running_mean_looks_back():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    figures.draw_series(ax, [{"env_steps": i, "entropy": float(i)} for i in range(60)], "entropy", "entropy")
    _, bold = ax.get_lines()
    assert list(bold.get_ydata()[[0, 1, 4, 59]]) == [0.0, 0.5, 2.0, 57.0]  # of 1, 2, 5 and 5 points


def test_a_curve_without_steps_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="No row of 1 has env_steps: expected"):
        learning_curve([{"success_rate": 0.5}], tmp_path / "curve.png", "GoTo")


# ---------------------------------------------------------------------------------------------------- episode GIF


def test_one_picture_a_step_and_a_labelled_end(tmp_path):
    episode_gif([episode(success=True), episode(steps=2, success=False)], NAMES, tmp_path / "play.gif", fps=4)
    shown, durations = pictures(tmp_path / "play.gif")
    assert durations == [250, 250, 250, 750, 250, 250, 750]
    ends = [count(picture, figures._SUCCESS_COLOR) - count(picture, figures._FAILURE_COLOR) for picture in shown]
    assert [int(np.sign(end)) if abs(end) > 2000 else 0 for end in ends] == [0, 0, 0, 1, 0, 0, -1]
    # the frame of each step, and the last one at the end: flat colours come back as they were
    middle = (shown[0].shape[0] // 2, figures._MARGIN + figures._FRAME // 2)
    assert [int(picture[middle][0]) for picture in shown] == pytest.approx([0, 50, 100, 150, 0, 50, 100], abs=4)


def test_a_thinned_episode_and_one_that_was_cut(tmp_path):
    """Of 7 steps every third is shown, with the return until there; how a cut one would have ended nobody knows."""
    long = episode(steps=7, success=False)
    thinned = long._replace(frames=[*long.frames[:7:3], long.frames[7]], every=3)
    cut = long._replace(ended=False)
    episode_gif([thinned, cut], NAMES, tmp_path / "play.gif")
    shown, durations = pictures(tmp_path / "play.gif")
    assert len(shown) == 4 + 8 and durations == [500] * 3 + [1500] + [500] * 7 + [1500]
    ends = [count(shown[place], figures._FAILURE_COLOR) > 2000 for place in (3, 11)]
    assert ends == [True, False] and count(shown[11], figures._FAINT) > 2000
    middle = (shown[0].shape[0] // 2, figures._MARGIN + figures._FRAME // 2)
    assert [int(picture[middle][0]) for picture in shown[:4]] == pytest.approx(
        [int(frame[0, 0, 0]) for frame in thinned.frames], abs=4
    )
    with pytest.raises(TrainingError, match=r"7 actions, 8 frames.*expected T >= 1, 3 \+ 1, T and T"):
        episode_gif([long._replace(every=3)], NAMES, tmp_path / "wrong.gif")


@pytest.mark.parametrize(("said", "fps"), [(4, 4), (30, 10), (0, 2), (None, 2), ("fast", 2), (float("nan"), 2)])
def test_frames_a_second_are_the_environments_up_to_ten(said, fps):
    assert figures.shown_fps(said) == fps


def test_the_taken_action_s_bar_is_as_long_as_its_probability(tmp_path):
    half, whole = episode(steps=1), episode(steps=1)
    half.probabilities[:] = [0.5, 0.5, 0.0, 0.0]
    whole.probabilities[:] = [1.0, 0.0, 0.0, 0.0]
    episode_gif([half, whole], NAMES, tmp_path / "play.gif")
    (first, _, second, _), _ = pictures(tmp_path / "play.gif")
    ratio = count(first, figures._TAKEN_COLOR) / count(second, figures._TAKEN_COLOR)
    assert ratio == pytest.approx(0.5, abs=0.01)
    assert count(first, figures._BAR_COLOR) == pytest.approx(count(first, figures._TAKEN_COLOR), rel=0.02)


@pytest.mark.parametrize("size", [(24, 24), (210, 160), (400, 600), (1, 1)])
def test_frames_of_any_size(tmp_path, size):
    episode_gif([episode(size=size)], NAMES, tmp_path / "play.gif")
    shown, _ = pictures(tmp_path / "play.gif")
    assert len(shown) == 4
    width, height = figures.scaled_size(size)
    assert max(width, height) <= 1.5 * figures._FRAME
    assert width / height == pytest.approx(size[1] / size[0], rel=0.02)


def test_the_cell_that_is_acted_on_is_marked(tmp_path):
    names = [f"row {row}, column {column}" for row in (1, 2) for column in (1, 2, 3)]
    played = episode(num_actions=6, steps=4, size=(16, 24))._replace(actions=[0, 2, 4, 5])
    episode_gif([played], names, tmp_path / "episode.gif")
    episode_gif([played], [name.replace("row", "line") for name in names], tmp_path / "words.gif")
    (marked, _), (words, _) = (pictures(tmp_path / f"{name}.gif") for name in ("episode", "words"))
    width, height = figures.scaled_size((16, 24))
    top = (marked[0].shape[0] - height) // 2
    outline = figures._MARK
    for picture, other, (row, column) in zip(marked, words, [(0, 0), (0, 2), (1, 1), (1, 2)], strict=False):
        frame = (slice(top, top + height), slice(figures._MARGIN, figures._MARGIN + width))
        cell = abs(picture[frame].astype(int) - ImageColor.getrgb(figures._TAKEN_COLOR)).max(-1) <= 12
        down, across = np.nonzero(cell)
        assert (down.min(), down.max() + 1) == (round(row * height / 2), round((row + 1) * height / 2))
        assert (across.min(), across.max() + 1) == (round(column * width / 3), round((column + 1) * width / 3))
        inside = cell[down.min() + outline : down.max() - outline, across.min() + outline : across.max() - outline]
        assert inside.size and not inside.any()
        assert count(other[frame], figures._TAKEN_COLOR) == 0
    assert count(marked[-1][frame], figures._TAKEN_COLOR) == 0  # nothing is acted on at the end


def test_many_actions_and_long_words(tmp_path):
    wordy = episode(num_actions=18)._replace(instructions=["word " * 100, "x" * 300, ""])
    episode_gif([wordy], [f"a very long name of action {a}" for a in range(18)], tmp_path / "play.gif")
    assert len(pictures(tmp_path / "play.gif")[0]) == 4


def test_the_taken_action_is_always_shown():
    probabilities = np.arange(18) / np.arange(18).sum()
    assert figures.shown_actions(probabilities, taken=0) == [*range(17, 6, -1), 0]
    assert figures.shown_actions(probabilities, taken=17) == list(range(17, 5, -1))
    assert figures.shown_actions(probabilities[:12], taken=0) == list(range(12))


def test_long_instructions_end_in_dots():
    lines = figures.wrapped("word " * 100, figures.PANEL)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert figures.wrapped("go to the blue ball", figures.PANEL) == ["go to the blue ball"]
    assert figures.wrapped("", figures.PANEL) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": np.zeros((3, 8, 8, 3), np.uint8)}, "3 actions, 3 frames, .* pass the frame that the last step"),
        ({"rewards": [0.0]}, "3 instructions and 1 rewards: expected"),
        ({"probabilities": np.zeros((3, 5))}, r"of shape \(3, 5\): expected \(3, 4\)"),
        ({"probabilities": np.full((3, 4), np.nan)}, "finite numbers"),
        ({"actions": [0, 1, 4]}, "actions outside 0 to 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, change, sentence):
    with pytest.raises(TrainingError, match=f"Episode 0 has .*{sentence}"):
        episode_gif([episode()._replace(**change)], NAMES, tmp_path / "play.gif")
    with pytest.raises(TrainingError, match=r"No episodes for .*play.gif"):
        episode_gif([], NAMES, tmp_path / "play.gif")
    assert not list(tmp_path.iterdir())


def test_a_chart_has_a_wider_line_for_a_wider_interval(tmp_path):
    def drawn(low, high, baseline=None):
        path = tmp_path / "new" / f"{low}.png"
        success_chart([("a row", 0.5, (low, high))], path, "GoTo", baseline)
        return colored(path, figures.COLORS["success_rate"]), colored(path, "#6b6b6b")

    narrow, wide = drawn(0.49, 0.51)[0], drawn(0.1, 0.9)[0]
    assert 0 < narrow < wide / 2
    assert drawn(0.2, 0.8)[1] < drawn(0.3, 0.7, (0.35, (0.3, 0.4)))[1]
