"""What is printed ends no run and commands no terminal, and text is UTF-8 whatever the locale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manako.experiments.common.progress import plain_console
from manako.plain import printable

ROOT = Path(__file__).parents[2]
CHECK = [sys.executable, str(ROOT / "experiments" / "check_env.py")]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
EVIL = '''
import gymnasium as gym, numpy as np

class Evil(gym.Env):
    """Names and texts of it are for a terminal."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)
    action_names = ("le\\x1b]0;title\\x07ft", "ri\\x9b31mght")
    instruction = "go \\x1b[2J\\x1b[31mnow 目"
    render_mode = "rgb_array"

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.frame = self.np_random.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        return self.frame, {}

    def step(self, action):
        self.steps += 1
        return self.frame, float(action), self.steps == 4, False, {}

    def render(self):
        return self.frame

gym.register("Evil-v0", Evil)
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path / "evil_env.py").write_text(EVIL, encoding="utf-8")
    return tmp_path


def shell(line: str, place: Path, **environment: str) -> subprocess.CompletedProcess:
    command = f"set -o pipefail; {line}"
    return subprocess.run(
        ["bash", "-c", command], cwd=place, capture_output=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("rest", "stderr"),
    [
        ("| head -1", b""),
        (">&-", b""),
        (">&- 2>&-", b""),
        ("> /dev/full", b"warning: what is printed is lost from here on (No space left on device)\n"),
    ],
)
def test_nobody_listens(rest, stderr, place):
    done = shell(f"{sys.executable} {CHECK[1]} manako/ColorMatch-v0 {rest}", place)
    assert done.returncode == 0 and done.stderr == stderr, done
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith("__")) == ["evil_env.py"]


def test_no_escape_reaches_a_terminal(place):
    done = shell(f"{sys.executable} {CHECK[1]} evil_env:Evil-v0", place)
    written = done.stdout + done.stderr
    assert done.returncode == 0 and b"go \\\\x1b[2J" in written, written
    assert not {0x1B, 0x07, 0x9B} & {ord(char) for char in written.decode()}


def test_letters_that_the_locale_lacks(place):
    done = shell(f"{sys.executable} {CHECK[1]} evil_env:Evil-v0 --instruction 'gehe über 目'", place, **C_LOCALE)
    assert done.returncode == 0 and b"gehe \\xfcber \\u76ee" in done.stdout, done
    assert done.stdout.isascii() and done.stderr == b""


def test_names_that_are_no_text(place):
    done = subprocess.run([*CHECK, b"bad\xff:\x1b-v0"], cwd=place, capture_output=True, timeout=60)
    assert done.returncode == 2 and b"is no UTF-8: give a name or text in UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr


def test_a_console_prints_no_controls_of_others(capsys):
    from rich.table import Table

    table = Table(title="a \x1b[31mtitle")
    table.add_column("\x1b]0;head\x07")
    table.add_row("cell \x9b2J")
    console = plain_console()
    console.print(table)
    console.print("text \x1b[2J [left]")
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & {*printed} and "[left]" in printed and r"cell \x9b2J" in printed


def test_what_is_shown():
    assert printable("as it is: \\x1b \\ 目\n\ttab") == "as it is: \\x1b \\ 目\n\ttab"
    assert printable("\x1b[2J\x00\x9b\udcff") == r"\x1b[2J\x00\x9b\udcff"


def test_every_text_file_is_utf8():
    """Each call that opens a text names the encoding, so that no locale decides."""
    without = []
    for file in ROOT.glob("[!.]*/**/*.py"):
        if file.relative_to(ROOT).parts[0] not in ("agent", "envs", "policies", "experiments", "manako"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            named = "encoding" in [word.arg for word in node.keywords] or any(
                word in ("utf-8", "utf8") for word in words
            )
            binary = any(isinstance(word, str) and "b" in word and len(word) <= 3 for word in words)
            of_path = isinstance(node.func, ast.Attribute)
            if of_path and name in ("read_text", "write_text") and not named:
                without.append(f"{file.relative_to(ROOT)}:{node.lineno}")
            if name == "open" and not named and not binary and not _is_of_another_kind(node.func):
                without.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not without


def _is_of_another_kind(function: ast.expr) -> bool:
    """`os.open`, `Image.open` and their like open no text."""
    return isinstance(function, ast.Attribute) and getattr(function.value, "id", None) in ("os", "Image", "Picture")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("rest", ["| head -1", ">&-", "> /dev/full"])
def test_a_run_that_nobody_hears_is_finished(rest, place):
    flags = "--total_steps 32 --num_envs 4 --num_steps 4 --minibatch_size 8 --eval_episodes 4 --gif_episodes 0"
    runner = ROOT / "experiments" / "run_ppo.py"
    line = f"{sys.executable} {runner} {flags} --torch_threads 1 --instruction 'gehe 目' --output_dir 'läuft 目' {rest}"
    done = shell(line, place, **C_LOCALE)
    assert done.returncode == 0, done
    assert json.loads((place / "läuft 目" / "evaluation.json").read_text())
    assert "gehe 目" in (place / "läuft 目" / "config.yaml").read_text(encoding="utf-8")
