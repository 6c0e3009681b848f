"""Recorded play: files that are read whole or refused, episodes that play again the same, and a window to play in."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RecordedPlayer, ScriptedPlayer
from manako.agent.data.recordings import Recording, append_recording, read_recordings, split_over_slots
from manako.agent.data.trajectories import save_trajectories, to_dataset
from manako.agent.errors import TrainingError
from manako.envs import EnvError, EpisodeVectorEnv
from manako.experiments import play
from manako.experiments.common.command_line import UsageError
from tests.helpers.small_runs import goto_policy

ROOT, GOTO = Path(__file__).parents[3], "manako/GoTo-v0"
NAMES = ("up", "down", "left", "right")
SAME = ["instruction", "action", "action_name", "reward", "terminated", "truncated", "success", "episode_return"]
SAME += ["expert_action", "seed", "step", "episode"]


@pytest.fixture(scope="module")
def policy():
    return goto_policy()


@pytest.fixture(scope="module")
def trajectories(policy):
    """Episodes of an expert that errs, two of each seed."""
    env, player = EpisodeVectorEnv(GOTO, 4, group_size=2), ScriptedPlayer(policy.spec, 0.4)
    collector = RolloutCollector(env, player, 12, seed=3, record=True, ask_expert=True)
    return to_dataset([collector.collect(0)], policy, GOTO, "expert", {"env_kwargs": None})


@pytest.fixture(scope="module")
def episodes(trajectories):
    """The same as seeds and actions."""
    found = {}
    for number, seed, action in zip(*(trajectories[name] for name in ("episode", "seed", "action")), strict=True):
        found.setdefault(number, (seed, []))[1].append(action)
    return [Recording(seed, tuple(actions), "") for seed, actions in found.values()]


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="play.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(path)

    return write


def replay(recordings, policy, num_envs=3, num_steps=5, make_env=lambda n, seeds: EpisodeVectorEnv(GOTO, n, **seeds)):
    player = RecordedPlayer(policy.spec, split_over_slots(recordings, num_envs))
    env = make_env(len(player.queues), {"seed_lists": player.seed_lists})
    collector = RolloutCollector(env, player, num_steps, 0, record=True, ask_expert=env.env_id == GOTO)
    rollouts = [collector.collect(number) for number in range(-(-player.num_steps // num_steps))]
    return to_dataset(rollouts, policy, env.env_id, "recorded", {}, player.quota)


def assert_same(again, trajectories):
    for name in SAME:
        assert again[name] == trajectories[name], name
    for new, old in zip(again["image"], trajectories["image"], strict=True):
        assert np.array_equal(np.array(new), np.array(old))


# ---- played again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3, 100])
def test_a_file_plays_again_to_the_same_dataset(num_envs, trajectories, episodes, policy, tmp_path):
    path = str(tmp_path / "new" / "play.jsonl")
    for episode in episodes:
        append_recording(path, episode, GOTO, NAMES, None)
    recordings = read_recordings(path, GOTO, NAMES)
    assert [(r.seed, r.actions) for r in recordings] == [(r.seed, r.actions) for r in episodes]
    assert len({r.seed for r in recordings}) < len(recordings) > 10
    again = replay(recordings, policy, num_envs)
    assert_same(again, trajectories)
    assert set(again["logprob"]) == {0.0} and json.loads(again.info.description)["episodes"] == len(episodes)


def test_a_folder_of_trajectories_is_a_recording(trajectories, policy, tmp_path):
    save_trajectories(trajectories, tmp_path / "data")
    assert_same(replay(read_recordings(str(tmp_path / "data"), GOTO, NAMES, {}), policy), trajectories)
    with pytest.raises(TrainingError, match=r"was played with env_kwargs null: expected \{\"size\": 4\}"):
        read_recordings(str(tmp_path / "data"), GOTO, NAMES, {"size": 4})
    with pytest.raises(TrainingError, match="is of manako/GoTo-v0: expected one of FrozenLake-v1"):
        read_recordings(str(tmp_path / "data"), "FrozenLake-v1", NAMES)


def test_recordings_share_slots_in_their_order():
    some = [Recording(seed, (0,), "") for seed in range(7)]
    assert [[r.seed for r in queue] for queue in split_over_slots(some, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [[r.seed for r in queue] for queue in split_over_slots(some, 5)] == [[0, 1], [2, 3], [4, 5], [6]]
    assert len(split_over_slots(some, 64)) == 7


def test_slots_walk_through_their_lists_of_seeds():
    env = EpisodeVectorEnv(GOTO, 2, seed_lists=[[5, 5, 8], [6]])
    seen = env.reset()
    assert env.episode_seeds == [5, 6]
    for expected in (5, 8, 5):
        state, before = env.state_dict(), seen
        seen = env.reset_done(np.array([True, False]))
        assert env.episode_seeds == [expected, 6]
    env.load_state_dict(state)
    assert env.episode_seeds == [8, 6] and np.array_equal(env.reset_done(np.array([True, False])).images, seen.images)
    assert np.array_equal(EpisodeVectorEnv(GOTO, 1).reset(seeds=[8]).images[0], before.images[0])
    for lists in ([[5]], [[5], []]):
        with pytest.raises(EnvError, match="expected 2 lists of one seed or more"):
            EpisodeVectorEnv(GOTO, 2, seed_lists=lists)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_a_file_may_hold(write):
    first, other = {"env_id": GOTO, "env_kwargs": {}}, {"env_id": GOTO}
    path = write(first, {"seed": 12, "actions": ["up", 3]}, "", other, '\r{"actions": [2], "seed": 0}\r')
    assert [(r.seed, r.actions) for r in read_recordings(path, GOTO, NAMES)] == [(12, (0, 3)), (0, (2,))]
    Path(path).write_bytes(b"\xef\xbb\xbf" + b'{"seed": 7, "actions": ["left"]}')  # an editor's mark, no line end
    append_recording(path, Recording(9, (1,), ""), GOTO, NAMES, None)
    assert [(r.seed, r.actions) for r in read_recordings(path, "X-v0", NAMES)] == [(7, (2,)), (9, (1,))]


GOOD = '{"seed": 12, "actions": ["up"]}'
BAD_FILES = {
    "empty": ([], "holds no episode"),
    "no episode": ([{"env_id": GOTO}], "holds no episode"),
    "no JSON": ([GOOD, '{"seed": 12, "actions": ["up"'], r"No JSON in line 2 of .*play.jsonl' \(.*column 30\)"),
    "no object": (["[1, 2]"], "A JSON list in line 1"),
    "too deep": (["[" * 100_000], "No JSON in line 1"),
    "env": ([{"env_id": "FrozenLake-v1"}, GOOD], "is of FrozenLake-v1: expected one of manako/GoTo-v0"),
    "a later env": ([GOOD, {"env_id": "FrozenLake-v1"}], "is of FrozenLake-v1: expected one of manako/GoTo-v0"),
    "kwargs": ([{"env_kwargs": {"size": 4}}, GOOD], r"env_kwargs \{\"size\": 4\}: expected \{\}"),
    "key": ([{"seed": 12, "action": ["up"]}], r"no key 'action' \(line 1 of .*\): expected seed and actions"),
    "first key": ([{"env_id": GOTO, "kwargs": {}}], "no key 'kwargs' .*: expected env_id and env_kwargs"),
    "no seed": ([{"actions": ["up"]}], "seed in line 1 of .* is None: expected a whole number below 2147483648"),
    "seed text": ([GOOD, {"seed": "12", "actions": ["up"]}], "seed in line 2 of .* is '12'"),
    "seed broken": ([{"seed": 1.5, "actions": ["up"]}], "seed in line 1 of .* is 1.5"),
    "seed true": ([{"seed": True, "actions": ["up"]}], "seed in line 1 of .* is True"),
    "seed negative": ([{"seed": -1, "actions": ["up"]}], "seed in line 1 of .* is -1"),
    "seed large": ([{"seed": 2**31, "actions": ["up"]}], "is 2147483648"),
    "no actions": ([{"seed": 12, "actions": []}], r"actions in line 1 of .* are \[\]: expected a list"),
    "actions text": ([{"seed": 12, "actions": "up"}], "actions in line 1 of .* are 'up': expected a list"),
    "action": (
        [{"seed": 12, "actions": ["up", "lefft"]}],
        r"step 1 in line 1 of .*\(seed 12\) is 'lefft'.*mean 'left'",
    ),
    "case": ([{"seed": 12, "actions": ["UP"]}], "did you mean 'up'"),
    "other action": ([{"seed": 12, "actions": ["jump!"]}], "up, down, left, right: expected a number from 0 to 3"),
    "index": ([{"seed": 12, "actions": [0, 4]}], "step 1 in line 1 of .* is 4, and the env has up, down, left, right"),
    "action true": ([{"seed": 12, "actions": [True]}], "step 0 in line 1 of .* is True"),
}


@pytest.mark.parametrize(("lines", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_faulty_file_is_refused_in_a_sentence(lines, message, write):
    with pytest.raises(TrainingError, match=message) as caught:
        read_recordings(write(*lines), GOTO, NAMES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "play.jsonl").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "nowhere.jsonl", "cannot be read .No such file"),
        (tmp_path / "play.jsonl", "cannot be read .it is no text file"),
        (tmp_path, "holds no trajectories"),
    ):
        with pytest.raises(TrainingError, match=message):
            read_recordings(str(path), GOTO, NAMES)
    with pytest.raises(TrainingError, match="cannot be written"):
        append_recording(str(tmp_path / "play.jsonl" / "play.jsonl"), Recording(0, (0,), ""), GOTO, NAMES, None)


# ---- the runner ------------------------------------------------------------------------------------------------------


def collect(folder, *words):
    command = [sys.executable, str(ROOT / "experiments/collect.py"), "--output", "data", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_runner_records_every_recorded_episode(trajectories, episodes, write, tmp_path):
    path = write({"env_id": GOTO}, *({"seed": r.seed, "actions": r.actions} for r in episodes))
    done = collect(tmp_path, "--player", "recorded", "--recording", path, "--num_envs", "3", "--num_steps", "7")
    assert done.returncode == 0, done.stderr
    assert f"{len(episodes)} episodes, {len(trajectories)} steps of recorded" in done.stdout and not done.stderr
    rows = read_recordings(str(tmp_path / "data"), GOTO, NAMES)
    assert [(r.seed, r.actions) for r in rows] == [(r.seed, r.actions) for r in episodes]


RECORDED = ("--player", "recorded")
BAD_COMMANDS = {
    "no recording": (RECORDED, "--recording is missing"),
    "another player": (("--recording", "play.jsonl"), "--recording is for --player recorded, and --player is expert"),
    "a number": ((*RECORDED, "--recording", "play.jsonl", "--episodes", "5"), "--episodes is for other players"),
    "groups": ((*RECORDED, "--recording", "play.jsonl", "--group_size", "2"), "--group_size is for other players"),
    "errors": ((*RECORDED, "--recording", "play.jsonl", "--error_rate", "0.5"), "--error_rate is the expert's"),
    "workers": (
        (*RECORDED, "--recording", "play.jsonl", "--rollout_backend", "ray-env"),
        "and --rollout_backend is ray-env: expected local",
    ),
}


@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_settings_of_other_players(words, message, monkeypatch, tmp_path):
    from manako.experiments import collect

    monkeypatch.setattr(sys, "argv", ["collect.py", "--output", str(tmp_path / "data"), *words])
    with pytest.raises(UsageError, match=message):
        collect.main()


FAULTS = {
    "read": ([{"seed": 12, "actions": ["up", "lefft"]}], "did you mean 'left'?"),
    "env": ([{"env_id": "FrozenLake-v1"}, {"seed": 12, "actions": [0]}], "is of FrozenLake-v1"),
}


@pytest.mark.parametrize(("lines", "message"), FAULTS.values(), ids=FAULTS)
def test_the_runner_refuses_and_writes_nothing(lines, message, write, tmp_path):
    done = collect(tmp_path, *RECORDED, "--recording", write(*lines))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "data").exists()


def test_what_does_not_play_again_is_not_written(write, monkeypatch, tmp_path):
    from manako.experiments import collect

    path = write({"seed": 12, "actions": ["up"]})
    words = ["--output", str(tmp_path / "data"), *RECORDED, "--recording", path]
    monkeypatch.setattr(sys, "argv", ["collect.py", *words])
    with pytest.raises(TrainingError, match=r"line 1 of .* \(seed 12\) ends before step 1, and the episode goes on"):
        collect.main()
    assert not (tmp_path / "data").exists()


def test_odd_seeds_are_pointed_out(write, capsys):
    from manako.experiments.collect import read_again
    from manako.experiments.common.settings import CollectCommand, CollectSettings

    path = write({"seed": 12, "actions": ["up"]}, {"seed": 13, "actions": ["up"]})
    assert len(read_again(CollectCommand(run=CollectSettings(recording=path)), NAMES)) == 2
    assert "1 of 2 recorded seeds are odd" in capsys.readouterr().err


# ---- the window ------------------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch):
    """SDL's own screen without a monitor; `screen(keys)` is a person who presses these."""
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(play, "SCREEN_GIVEN", True)

    def press(*keys):
        pygame.display.init()
        for key in keys:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))

    press.pygame = pygame
    yield press
    pygame.display.quit()


def run_play(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["play.py", *words])
    return play.main()


def expert_play(count):
    """Seeds, actions and rewards of the first training episodes."""
    env, found = EpisodeVectorEnv(GOTO, 1), []
    env.reset()
    for _ in range(count):
        actions, ended = [], np.zeros(1, bool)
        while not ended[0]:
            actions.append(int(env.expert_actions()[0]))
            result = env.step(np.array(actions[-1:]))
            ended = result.terminated | result.truncated
        found.append((env.episode_seeds[0], tuple(actions)))
        env.reset_done(ended)
    return found


def test_a_sitting_at_the_window_is_recorded_and_plays_again(screen, monkeypatch, tmp_path, policy, capsys):
    pygame, path = screen.pygame, str(tmp_path / "play.jsonl")
    arrows = [pygame.K_UP, pygame.K_DOWN, pygame.K_LEFT, pygame.K_RIGHT]
    first, second, third = expert_play(3)
    screen(*(arrows[action] for action in first[1]), pygame.K_BACKSPACE)  # by arrows, then the same seed again
    screen(pygame.K_q, *(ord("1") + action for action in first[1]), pygame.K_q, pygame.K_RETURN)  # by digits
    screen(*(arrows[action] for action in second[1]), pygame.K_SPACE, pygame.K_UP, pygame.K_ESCAPE)  # one unfinished
    assert run_play(monkeypatch, "--output", path) == 0
    assert "3 episodes added" in capsys.readouterr().out
    screen(*(arrows[action] for action in third[1]), pygame.K_ESCAPE)  # another day
    assert run_play(monkeypatch, "--output", path) == 0
    assert "1 episodes added to" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert lines[0] == {"env_id": GOTO, "env_kwargs": {}} and lines[1]["actions"][0] in NAMES and len(lines) == 5
    recordings = read_recordings(path, GOTO, NAMES, {})
    assert [(r.seed, r.actions) for r in recordings] == [first, first, second, third]
    assert all(replay(recordings, policy)["success"]) and all(r.seed % 2 == 0 for r in recordings)


def test_the_window_shows_frame_instruction_keys_and_score(screen):
    pygame, env = screen.pygame, EpisodeVectorEnv(GOTO, 1)
    window, shown = play.Window(env), []
    show = window.show
    window.show = lambda *what: (show(*what), shown.append((*what, pygame.surfarray.array3d(window.surface))))
    screen(*[pygame.K_1, pygame.K_2] * 5, pygame.K_ESCAPE)
    records = []
    assert play.play(env, window, iter([4, 6]), records.append) == len(records) == 1
    texts = [what for _, what, _ in shown]
    assert texts[0].startswith("return 0 after 0 steps") and "success, return" in texts[-1] and "recorded" in texts[-1]
    for observations, _, picture in shown:  # (width, height, 3)
        frame = observations.images[0].swapaxes(0, 1).repeat(20, 0).repeat(20, 1)  # 24 pixels -> 480
        top = int(np.flatnonzero((picture[16] == frame[0, 0]).all(-1))[0])
        assert np.array_equal(picture[16:496, top : top + 480], frame)
        assert (picture[:, :top] == play.TEXT).all(-1).any() and (picture[:, top + 480 :] == play.QUIET).all(-1).any()
    window.close()


def test_other_files_are_left_alone(screen, monkeypatch, write, tmp_path):
    before = {"env_id": "FrozenLake-v1"}, {"seed": 12, "actions": [0]}
    path = write(*before)
    for words, message in (
        ((path,), "is of FrozenLake-v1: expected one of manako/GoTo-v0"),
        ((write("something else", name="notes.txt"),), "No JSON in line 1"),
        ((str(tmp_path),), "is a folder"),
        ((path, "--env", "manako/GoTo-v0", "--env_kwargs", '{"size": 1}'), "size is 1"),
    ):
        screen(screen.pygame.K_ESCAPE)
        with pytest.raises(ValueError, match=message):
            run_play(monkeypatch, "--output", *words)
    assert [json.loads(line) for line in Path(path).read_text().splitlines()] == list(before)
    with pytest.raises(UsageError, match="--output is missing"):
        run_play(monkeypatch)


def test_without_pygame_or_a_screen(screen, monkeypatch, tmp_path):
    words = ("--output", str(tmp_path / "play.jsonl"))
    monkeypatch.setattr(play, "SCREEN_GIVEN", False)
    screen(screen.pygame.K_ESCAPE)
    with pytest.raises(UsageError, match="no screen for a window"):
        run_play(monkeypatch, *words)
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UsageError, match=r'pip install "manako\[toy\]"'):
        run_play(monkeypatch, *words)
    assert not list(tmp_path.iterdir())
