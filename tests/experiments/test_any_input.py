"""Any input at all: flags, configurations, model folders and environments drawn at random, by Hypothesis.

Whatever comes, a command ends: with exit code 0, or with one sentence and 2 (bad input) or 1 (a fault); never with a
traceback, with files where it refused, or with processes. What is drawn may mean a long run, which Ctrl-C ends. The
commands run in this process, so that hundreds of them
take minutes. MANAKO_CASES draws more of each kind, MANAKO_SEED others than the usual ones:

    MANAKO_CASES=2000 MANAKO_SEED=7 python -m pytest -m fault tests/experiments/test_any_input.py
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import hypothesis
import numpy as np
import psutil
import pytest
import yaml
from hypothesis import strategies as st

import manako.agent.report.figures  # noqa: F401  # Ctrl-C in the import of a library would spoil all cases after it
from manako.experiments import check_model, collect, evaluate, imagine, run_dpo, run_ladder, run_ppo, run_sft
from manako.experiments.common.command_line import as_sections, known_settings, run_main
from manako.experiments.common.settings import (
    CheckModelCommand,
    CollectCommand,
    DPOCommand,
    EvaluateCommand,
    ImagineCommand,
    PPOCommand,
    SFTCommand,
)
from manako.policies import PolicySource, load_policy, save_policy
from tests.helpers.families.token_stream import TOKEN_STREAM
from tests.helpers.foreign_models import text_folder, vision_folder

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ctrl-C may come in any callback
]
CASES, SEED = int(os.environ.get("MANAKO_CASES", 110)), int(os.environ.get("MANAKO_SEED", 0))
LONGEST = 20  # seconds until Ctrl-C
SLOWEST = 90  # seconds of a case, on a machine that does other things, too
ENV = "tests/Any-v0"
SMALL = {
    "env": ENV, "total_steps": 4, "num_envs": 2, "num_steps": 2, "minibatch_size": 4, "eval_episodes": 2,
    "gif_episodes": 0, "episodes": 2, "num_ppo_epochs": 1, "captions": 4, "batch_size": 2, "group_size": 2,
    "branch_steps": 1, "remote_requests": 0, "torch_threads": 1,
}  # fmt: skip
RUNNERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "run_ppo": (run_ppo.main, PPOCommand, {"output_dir": "new"}),
    "collect": (collect.main, CollectCommand, {"output": "new", "player": "random"}),
    "evaluate": (evaluate.main, EvaluateCommand, {"policy": "tiny"}),
    "imagine": (imagine.main, ImagineCommand, {"policy": "tiny"}),
    "run_dpo": (run_dpo.main, DPOCommand, {"output_dir": "new", "pairs": "return"}),
    "run_sft": (run_sft.main, SFTCommand, {"output_dir": "new", "dataset": "nowhere"}),
    "check_model": (check_model.main, CheckModelCommand, {}),
    "run_ladder": (run_ladder.main, run_ladder.LadderCommand, {}),
}
DEEP = "[" * 5_000 + "]" * 5_000
# ---- values of every kind --------------------------------------------------------------------------------------------
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 10**9, 10**12, 10**30, 10**400, 0.5, -0.5, 1e-300, 1e300]),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "none", "true", "nan", "1e5", "../..", "/dev/null", "a" * 255, "é" * 200, "-", "--", "{}"]
    ),
    st.sampled_from(
        ["\x1b[31mred", "go <image> <|user|>", "a,b", "a,,b", "{action}", "{", "tiny", ENV, "remote", "\0"]
    ),
    st.text(max_size=20),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
HARD_WORDS = st.sampled_from(["9" * 5_000, "9" * 400, DEEP, '{"a":' * 5_000, "x/" * 3_000, '{"a": 1, "a": 2}', "1_0"])
WORDS = st.one_of(NUMBERS.map(repr), TEXTS, HARD_WORDS).filter(lambda text: "\0" not in text)  # no program is given one


class AnyEnv(gym.Env):
    """Two steps an episode; `fault` says where it does something else, and what."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names = ("left", "right")
    mission = "go right"
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    fault: tuple[str, int, Any] | None = None
    calls = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.time = render_mode, 0
        self._now("init", None)

    def _now(self, place: str, value: Any) -> Any:
        if AnyEnv.fault is None or AnyEnv.fault[0] != place.split()[0]:
            return value
        AnyEnv.calls += 1
        what = AnyEnv.fault[2]
        if AnyEnv.calls <= AnyEnv.fault[1]:
            return value
        if isinstance(what, BaseException):
            raise what
        return what

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._now("reset", (0, self._now("info", {})))

    def step(self, action: int) -> Any:
        self.time += 1
        ends = self._now("terminated", self.time == 2), self._now("truncated", False)
        return self._now(
            "step", (self._now("seen", 0), self._now("reward", float(action)), *ends, self._now("info", {}))
        )

    def render(self) -> Any:
        return self._now("render", np.full((16, 16, 3), 90 * self.time + self.np_random.integers(9), np.uint8))

    def close(self) -> None:
        self._now("close", None)


if ENV not in gym.registry:
    gym.register(ENV, AnyEnv)


# ---- one case --------------------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, int]:
    """Every file of a folder, with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size if path.is_file() else 0 for path in folder.rglob("*")}


def check_case(main: Any, words: list[str], monkeypatch: Any, capfd: Any, folder: Path, may_leave: bool = False) -> int:
    """Runs a command and checks how it ended.

    Args:
        main: of the command.
        words: its flags.
        monkeypatch: pytest's.
        capfd: pytest's.
        folder: the current one.
        may_leave: a run that had begun keeps what it has, whatever ends it.

    Returns:
        The exit code.
    """
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before, children = listing(folder), {child.pid for child in psutil.Process().children(recursive=True)}
    monkeypatch.setattr(sys, "argv", ["runner.py", *words])
    capfd.readouterr()
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, LONGEST, 2)
    try:
        with pytest.raises(SystemExit) as stop, contextlib.chdir(folder):
            run_main(main)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took, written = time.perf_counter() - started, capfd.readouterr()
    code = stop.value.code
    said = [line for line in written.err.splitlines() if line.startswith("error: ")]
    at_work = written.out.partition("loading ")[2].count("\n") > 1
    assert code in (0, 1, 2) or (code == 130 and at_work), (code, written.err)
    may_leave = may_leave or code == 130
    assert len(said) == (code in (1, 2)) or main is check_model.main, written.err  # whose sentences are in its table
    assert "Traceback" not in written.err + written.out
    assert all(len(line) < 1_500 for line in said), said
    assert took < SLOWEST, took
    after = listing(folder)
    if code and not may_leave:
        assert after == before, said
    assert not any(".staging" in name or ".tmp" in name for name in after), after
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children
    for name in after.keys() - before.keys():
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
    return code


def cases(share: float) -> Any:
    """Settings of Hypothesis: a share of CASES, the same ones each time for one MANAKO_SEED."""

    def decorate(test: Any) -> Any:
        settings = hypothesis.settings(
            max_examples=math.ceil(CASES * share),
            deadline=None,
            database=None,
            print_blob=False,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return hypothesis.seed(SEED)(settings(test))

    return decorate


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Any:
    """The current folder of all commands, with a policy of this project and models of others."""
    folder = tmp_path_factory.mktemp("place")
    models = tmp_path_factory.mktemp("models")
    (models / "own").mkdir()
    save_policy(load_policy(PolicySource(), AnyEnv.action_names, (16, 16, 3)), models / "own")
    (models / "lora").mkdir()
    save_policy(load_policy(PolicySource(trainable="lora"), AnyEnv.action_names, (16, 16, 3)), models / "lora")
    TOKEN_STREAM["llava"](models / "llava")
    text_folder(models / "text", "llama")
    vision_folder(models / "vision", "siglip")
    folder.joinpath("models").symlink_to(models)
    return folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch: Any) -> Any:
    """No fault is left of another case."""
    monkeypatch.setattr(AnyEnv, "fault", None)


# ---- flags -----------------------------------------------------------------------------------------------------------


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    """A runner and its flags: a small run, and some flags of any value."""
    runner = draw(st.sampled_from([*RUNNERS]))
    _, kind, own = RUNNERS[runner]
    known = known_settings(kind)
    elsewhere = ("models", "rollout_backend", "ray_address")  # clusters have tests of their own
    flags = [name for name, setting in known.items() if not setting.only_in_file and name not in elsewhere]
    given = {name: str(value) for name, value in {**SMALL, **own}.items() if name in flags}
    for name in draw(st.lists(st.sampled_from(flags), min_size=1, max_size=3, unique=True)):
        usual = st.sampled_from([*known[name].choices, str(known[name].default)])
        given[name] = draw(st.one_of(WORDS, usual, usual))
    words = [word for name, text in given.items() for word in ([f"--{name}={text}"])]
    words += draw(st.sampled_from([[], [], [], [words[-1]], ["--config", ""], ["--config", DEEP], ["--help=1"]]))
    if runner == "check_model":
        words.insert(0, draw(st.one_of(st.just("tiny"), WORDS)))
    return runner, words


@cases(1.2)
@hypothesis.given(command_lines())
def test_any_flags(place, monkeypatch, capfd, line):
    runner, words = line
    check_case(RUNNERS[runner][0], words, monkeypatch, capfd, place)


# ---- configurations --------------------------------------------------------------------------------------------------


@st.composite
def configurations(draw: Any) -> str:
    """A YAML text: the settings of a small run with some of any value, or its text with any changes."""
    sections = as_sections(PPOCommand())
    for values in sections.values():
        values.update({name: value for name, value in SMALL.items() if name in values})
    sections["run"]["output_dir"] = "new"
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from([*sections]))
        if isinstance(sections[part], dict) and sections[part]:
            sections[part][draw(st.sampled_from([*sections[part]]))] = draw(VALUES)
        if draw(st.integers(0, 9)) == 0:
            sections[part] = draw(VALUES)
    text = yaml.safe_dump(sections, allow_unicode=True)
    change = draw(st.integers(0, 5))
    at = draw(st.integers(0, len(text)))
    if change == 1:
        text = text[:at]
    elif change == 2:
        text = text[:at] + draw(st.text(max_size=8)) + text[at:]
    elif change == 3:
        text += draw(
            st.sampled_from(
                [
                    DEEP,
                    "run: {seed: 3}\n",
                    "x: " + "9" * 5_000,
                    "x: !!python/object:os.system {}",
                    "a: 2001-99-99",
                    "\t",
                ]
            )
        )
    elif change == 4:
        names = "abcdefghijklm"
        bomb = [f"{name}: &{name} [*{before}, *{before}]" for before, name in itertools.pairwise(names)]
        text = "\n".join(["a: &a [x, x]", *bomb, text])
    return text


@cases(0.7)
@hypothesis.given(configurations(), st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16"]))
def test_any_configuration(place, monkeypatch, capfd, text, encoding):
    (place / "settings.yaml").write_bytes(text.encode(encoding, "surrogatepass"))
    check_case(run_ppo.main, ["--config", "settings.yaml"], monkeypatch, capfd, place)


# ---- model folders ---------------------------------------------------------------------------------------------------


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values of a JSON object; of long lists and objects to the first ones."""
    parts = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    return [path, *(each for key, part in parts[:40] for each in places_of(part, (*path, key)))]


@st.composite
def damages(draw: Any) -> tuple[str, str, int, int, Any, str]:
    """A model, one of its files, a place in it, and what is put there."""
    return (
        draw(st.sampled_from(["own", "lora", "llava", "text", "vision"])),
        draw(st.sampled_from(["json", "json", "json", "text", "any"])),
        draw(st.integers(0, 1_000)),
        draw(st.integers(0, 10_000)),
        draw(VALUES),
        draw(st.sampled_from(["cut", "deep", "digits", "twice", "list", "empty", "huge", "gone", "folder", "link"])),
    )


def damage(folder: Path, kind: str, number: int, at: int, value: Any, how: str) -> None:
    """Puts a value into a JSON file of a folder, or spoils the text of any file."""
    files = sorted(path for path in folder.iterdir() if kind != "json" or path.suffix == ".json")
    file = files[number % len(files)]
    if kind == "json":
        content = json.loads(file.read_text())
        found = places_of(content)
        *above, last = found[at % len(found)] or (None,)
        target = content
        for key in above:
            target = target[key]
        if last is None:
            content = value
        else:
            target[last] = value
        file.write_text(json.dumps(content))
        return
    content = file.read_bytes()
    at = at % (len(content) + 1)
    if how in ("gone", "folder", "link"):
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "link":
            file.symlink_to("nowhere")
        return
    spoiled = {
        "cut": content[:at],
        "deep": DEEP.encode(),
        "digits": b'{"hidden_size": ' + b"9" * 5_000 + b"}",
        "twice": content.replace(b"{", b'{"model_type": "a", "model_type": "b", ', 1),
        "list": b"[1, 2]",
        "empty": b"",
        "huge": content[:at] + b" " * 2**20 + content[at:],
    }[how]
    file.write_bytes(spoiled)


@cases(1.2)
@hypothesis.given(damages())
def test_any_model_folder(place, monkeypatch, capfd, drawn):
    model, *rest = drawn
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree((place / "models" / model).resolve(), folder)
    damage(folder, *rest)
    part = {"text": ["--policy=tiny", "--language_model=model"], "vision": ["--policy=tiny", "--vision_encoder=model"]}
    words = [f"--{name}={SMALL[name]}" for name in ("env", "total_steps", "num_envs", "num_steps", "minibatch_size")]
    words += ["--eval_episodes=2", "--gif_episodes=0", "--output_dir=new", *part.get(model, ["--policy=model"])]
    check_case(run_ppo.main, words, monkeypatch, capfd, place, may_leave=True)


# ---- environments ----------------------------------------------------------------------------------------------------

RAISED = st.sampled_from(
    [
        *(RuntimeError("no licence"), ValueError(""), SystemExit(3), KeyError("x"), MemoryError(), AssertionError()),
        *(StopIteration(), OSError(28, "No space left on device"), RecursionError("deep"), Exception("y" * 5_000)),
        TypeError("\x1b[31mred\nand more"),
    ]
)
FRAMES = st.sampled_from(
    [
        *(np.zeros(shape, np.uint8) for shape in ((0, 0, 3), (16, 16), (16, 16, 4), (8, 8, 3))),
        *(np.zeros((16, 16, 3), dtype) for dtype in (np.float32, object)),
        np.full((16, 16, 3), np.nan),
        b"frame",
    ]
)


@cases(0.9)
@hypothesis.given(
    st.sampled_from(["init", "reset", "step", "render", "close", "seen", "reward", "terminated", "truncated", "info"]),
    st.integers(0, 12),
    st.one_of(RAISED, FRAMES, VALUES),
)
def test_any_environment(place, monkeypatch, capfd, where, after, what):
    AnyEnv.calls, AnyEnv.fault = 0, (where, after, what)
    words = [f"--{name}={SMALL[name]}" for name in ("env", "total_steps", "num_envs", "num_steps", "minibatch_size")]
    words += ["--eval_episodes=2", "--gif_episodes=0", "--output_dir=new"]
    check_case(run_ppo.main, words, monkeypatch, capfd, place, may_leave=True)
