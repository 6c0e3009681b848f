"""Where nobody says what a success is: returns are the measure, everywhere that an outcome is said or stored."""

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from manako.agent.data.trajectories import episode_returns, episode_success, to_dataset
from manako.agent.errors import TrainingError
from manako.agent.report.evaluation import CONDITIONS, Evaluation, evaluate_all, record_episodes
from manako.agent.report.figures import RecordedEpisode, episode_gif, learning_curve, success_chart
from manako.agent.rollout import Episode, success_rate
from manako.agent.tuning.supervised import demonstrated_actions
from manako.envs import EpisodeVectorEnv
from manako.experiments.common.ladder_report import compare_steps
from manako.experiments.common.outcomes import outcome_in_words, warnings_of
from manako.experiments.common.progress import RowsDone, plain_console
from tests.helpers.small_envs import NAMES, Corridor
from tests.helpers.small_runs import tiny_policy


class Silent(Corridor):
    """Says nothing of success; with `sometimes` it speaks of it where there is one, and not else."""

    def __init__(self, sometimes: bool = False, **options) -> None:
        super().__init__(**options)
        self.sometimes = sometimes

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        said = {"is_success": True} if self.sometimes and info["success"] else {}
        return observation, reward, terminated, truncated, said


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(gym.registry, "Silent-v0", gym.envs.registration.EnvSpec("Silent-v0", entry_point=Silent))


def silent(num_envs: int, **kwargs) -> EpisodeVectorEnv:
    return EpisodeVectorEnv("Silent-v0", num_envs, **kwargs)


@pytest.mark.parametrize("sometimes", [False, True])
def test_an_evaluation_has_no_success_that_nobody_defined(sometimes):
    env = silent(4, env_kwargs={"sometimes": sometimes})
    rows = evaluate_all(tiny_policy(env), env, list(range(12)))
    summary = {name: row.summary() for name, row in rows.items()}
    won = sum(episode.episode_return > 0 for episode in rows["random"].episodes)  # 1 - 0.1 a step, or below 0
    assert 0 < won < 12 and summary["random"]["judged"] == (won if sometimes else 0)
    assert all(row["success"] is None and row["success_ci95"] is None for row in summary.values())
    assert summary["random"]["return_ci95"][0] < summary["random"]["return_mean"] < summary["random"]["return_ci95"][1]
    said = warnings_of(summary)[0]
    assert "the measure is the return" in said and "--success_return" in said
    assert ("the environment says it of" in said) == sometimes


def test_the_user_may_define_it():
    env = silent(4, success_return=0.5)
    rows = evaluate_all(tiny_policy(env), env, list(range(12)))
    for row in rows.values():
        won = sum(episode.episode_return >= 0.5 for episode in row.episodes)
        assert row.summary()["success"] == won / 12 and row.summary()["judged"] == 12


def test_a_data_set_says_none_and_only_success_is_refused():
    from manako.agent.collector import RolloutCollector

    env = silent(4)
    policy = tiny_policy(env)
    rollout = RolloutCollector(env, policy, 8, 0, record=True).collect(0)
    assert {episode.success for episode in rollout.episodes} == {None}
    dataset = to_dataset([rollout], policy, "Silent-v0", "random", {})
    assert set(episode_success(dataset)) == {None} and len(episode_returns(dataset)) > 4
    assert outcome_in_words(episode_success(dataset), episode_returns(dataset)).startswith("mean return ")
    with pytest.raises(TrainingError, match="collect it with --success_return"):
        demonstrated_actions(dataset, only_success=True)
    assert len(demonstrated_actions(dataset)) == len(dataset)


def test_a_rate_of_some_is_no_rate():
    assert success_rate([True, False, True, True]) == 0.75
    assert success_rate([True, None, True]) is success_rate([]) is success_rate([None]) is None


@pytest.mark.parametrize(
    ("wins", "nothing"),  # of 100 episodes: policy, random
    [((100, 95), True), ((100, 85), False), ((52, 48), True), ((90, 30), False)],
)
def test_where_success_tells_nothing(wins, nothing):
    rows = {
        name: Evaluation([Episode(0.0, 1, n < won) for n in range(100)], 100, True).summary()
        for name, won in zip(("policy", "random"), wins, strict=True)
    }
    assert any("tells nothing here" in said for said in warnings_of(rows)) == nothing


def test_steps_of_a_ladder_are_compared_by_their_returns():
    (pair,) = compare_steps({"start": [0.0, 0.0, 0.0], "clone": [1.0, 2.0, 3.0]}, "return")
    assert pair["difference"] == 2 and pair["p"] == 0.25  # all signs one way or the other: 2 of 8


def colours(picture: Image.Image) -> set:
    return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def test_a_gif_shows_the_return_and_no_outcome(tmp_path):
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    last = {}
    for success in (True, False, None):
        episode = RecordedEpisode(frames, ["go"], np.full((1, 2), 0.5), [0], [3.0], success)
        episode_gif([episode], NAMES, tmp_path / "play.gif", fps=4)
        with Image.open(tmp_path / "play.gif") as picture:
            picture.seek(picture.n_frames - 1)
            last[success] = np.asarray(picture.convert("RGB")).tobytes()
    assert len(set(last.values())) == 3
    env = silent(2)
    assert [tape.success for tape in record_episodes(tiny_policy(env), env, [1, 2])] == [None, None]


def test_curves_of_returns(tmp_path):
    rows = [{"env_steps": n, "success_rate": None, "episode_return": -20.0 + n} for n in range(5)]
    learning_curve(rows, tmp_path / "curve.png", "Silent", {"random policy": (-19.0, (-20.0, -18.0))})
    success_chart([("clone", -5.0, (-7.0, -3.0))], tmp_path / "chart.png", "Silent", (-9.0, (-9.5, -8.5)), returns=True)
    with Image.open(tmp_path / "curve.png") as curve, Image.open(tmp_path / "chart.png") as chart:
        assert curve.width < 600  # one panel
        assert (31, 111, 84) in colours(chart)  # the interval lies inside the axis


def test_an_evaluation_says_what_it_does(capsys):
    done = RowsDone(plain_console(), 2, 1000)
    for row in CONDITIONS:
        done(row, Evaluation([Episode(1.0, 30, None), Episode(3.0, 70, None)], 2, True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluating   2 held-out episodes for each of 4 rows, 1,000 steps at most or a little more"
    assert lines[2].startswith("random: mean return 2.00 [1.00, 3.00]; 200 steps so far, 0:00 min, about 0:00 min left")
    assert len(lines) == 5 and "left" not in lines[-1]
