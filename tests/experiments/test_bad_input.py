"""Bad input of every kind: one sentence on stderr, exit code 2, no traceback, nothing written or overwritten."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from manako.agent.checkpoint import write_folder
from manako.experiments import evaluate, run_ppo
from manako.experiments.common.command_line import run_main
from tests.helpers.foreign_models import text_folder

ROOT = Path(__file__).parents[2]
PLUGIN = """
import gymnasium as gym, numpy as np

class Base(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names = ("left", "right")
    mission = "go right"
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    def __init__(self, render_mode=None):
        self.render_mode = render_mode
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}
    def step(self, action):
        return 0, 0.0, True, False, {}
    def render(self):
        return np.full((16, 16, 3), 7, np.uint8)

class NoRender(Base):
    metadata = {"render_modes": ["human"]}
class NoneRender(Base):
    def render(self):
        return None
class NaNReward(Base):
    def step(self, action):
        return 0, float("nan"), True, False, {}
class Later(Base):
    steps = 0
    def step(self, action):
        Later.steps += 1
        return 0, float("nan") if Later.steps > 6 else 0.0, True, False, {}
class Raises(Base):
    def __init__(self, render_mode=None):
        raise RuntimeError("no licence")
class Breaks(Base):
    def step(self, action):
        raise RuntimeError("out of memory")
class Box(Base):
    action_space = gym.spaces.Box(-float("inf"), 1.0, (2,))
for kind in (Base, NoRender, NoneRender, NaNReward, Later, Raises, Breaks, Box):
    gym.register(f"{kind.__name__}-v0", kind)
"""
TINY_RUN = [
    "--total_steps",
    "8",
    "--num_envs",
    "2",
    "--num_steps",
    "4",
    "--minibatch_size",
    "8",
    "--eval_episodes",
    "2",
]
FLAGS = {
    "an unset variable as run": (["--resume", ""], "--resume is '': expected text that is not empty; is a variable"),
    "an unset variable as folder": (["--output_dir", ""], "--output_dir is ''"),
    "an unset variable as configuration": (["--config", " "], "--config is ' ': expected a YAML file"),
    "two configurations": (
        ["--config", "a.yaml", "--config=b.yaml"],
        "--config came twice, with 'a.yaml' and 'b.yaml'",
    ),
    "a switch twice": (["--bf16", "--bf16", "false"], "--bf16 came twice, with 'true' and 'false'"),
    "a value twice": (["--seed", "1", "--seed", "1"], "--seed came twice"),
    "environments": (["--num_envs", "100000000"], "--num_envs is 100000000: expected a whole number from 1 on up to"),
    "a rollout": (["--num_envs", "1000000"], "A rollout does not fit: 1,000,000 environments x 16 steps of "),
    "steps of 30 digits": (["--total_steps", "9" * 30], "and no more than 9,007,199,254,740,992"),
    "steps of 5,000 digits": (["--total_steps", "9" * 5_000], "--total_steps is '9999"),
    "LoRA": (["--lora_rank", "1000000000", "--trainable", "lora"], "LoRA of rank 1,000,000,000 does not fit: its "),
    "image size": (["--image_size", "100000", "--patch_size", "8"], "makes 156,250,000 patches of a frame: seeing one"),
    "pixels": (
        ["--image_size", "96000", "--patch_size", "96000"],
        "of memory are free on this machine; expected a small",
    ),
    "bins": (["--bins", "1000000000"], "--bins is 1000000000: expected a whole number from 2 on up to 65536"),
    "threads": (["--torch_threads", "1000000000"], "--torch_threads is 1000000000"),
    "a long name": (["--output_dir", "a" * 255], "with a name of 255 bytes: expected names of up to 240 bytes"),
    "a long name in bytes": (["--output_dir", "é" * 150], "with a name of 300 bytes"),
    "a long path": (["--output_dir", "a/" * 2_000], "and 3,000 with their folders"),
    "a long policy": (["--policy", "p" * 255], "with a name of 255 bytes"),
    "a long environment": (["--env", "e" * 255], "eee"),
    "deep JSON": (["--env_kwargs", '{"a":' * 5_000 + "1" + "}" * 5_000], "it is nested more than 100 deep"),
    "a JSON number": (["--env_kwargs", '{"size": ' + "9" * 5_000 + "}"], "a number has 5,000 digits"),
    "a JSON key twice": (["--env_kwargs", '{"size": 4, "size": 5}'], "'size' stands there twice, with two values"),
    "unknown flag": (["--totl_steps", "5"], "did you mean --total_steps"),
    "another spelling": (["--total-steps", "5"], "did you mean --total_steps"),
    "another framework's word": (["--lr", "1e-4"], "did you mean --learning_rate"),
    "another framework's word with its value": (["--n_envs=4"], "did you mean --num_envs"),
    "another framework's batch": (["--batch", "4"], "did you mean --minibatch_size"),
    "a word for a setting of files": (["--vf", "1"], "vf_coef stands in the section ppo of a --config file"),
    "a setting of files": (["--lora_alpha", "5"], "lora_alpha stands in the section policy of a --config file"),
    "abbreviated flag": (["--total", "5"], "no flag --total"),
    "steps no whole number": (["--total_steps", "2.5"], "2.5"),
    "steps negative": (["--total_steps=-3"], "total_steps is -3: expected a whole number from 1 on"),
    "a word of no flag": (["FrozenLake-v1"], "'FrozenLake-v1' belongs to no flag"),
    "a short flag": (["-e", "FrozenLake-v1"], "'-e' belongs to no flag"),
    "flag without a value": (["--env"], "--env: expected one argument"),
    "switch": (["--bf16", "maybe"], "--bf16 is 'maybe': expected true or false"),
    "steps text": (["--total_steps", "many"], "many"),
    "rate nan": (["--learning_rate", "nan"], "learning_rate is nan: expected a number"),
    "rate infinite": (["--learning_rate", "inf"], "learning_rate is inf: expected a number"),
    "rate negative": (["--learning_rate=-1"], "learning_rate is -1.0: expected a number above 0"),
    "rate zero": (["--learning_rate", "0"], "learning_rate is 0.0: expected a number above 0"),
    "an end of no entropy bonus": (["--ent_coef", "0", "--ent_coef_end", "0.1"], "expected an --ent_coef above 0"),
    "gamma above 1": (["--gamma", "1.5"], "gamma is 1.5"),
    "seed too large": (["--seed", "2147483648"], "seed is 2147483648"),
    "no episodes": (["--eval_episodes", "0"], "eval_episodes is 0"),
    "dtype": (["--dtype", "float64"], "one of float32, bfloat16"),
    "trainable": (["--trainable", "head"], "one of full, adapter, lora"),
    "config without a file": (["--config"], "--config: expected one argument"),
    "config missing": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "env misspelt": (["--env", "FrozenLak-v1"], "FrozenLake"),
    "env module missing": (["--env", "no_such_module:Mine-v0"], "no_such_module"),
    "env kwargs no JSON": (["--env_kwargs", "{size: 4}"], "is no JSON"),
    "env kwargs a list": (["--env_kwargs", "[4]"], "JSON object"),
    "env kwargs unknown": (["--env_kwargs", '{"sise": 4}'], "sise"),
    "env size": (["--env_kwargs", '{"size": 1}'], "size"),
    "no rgb_array": (["--env", "bad_plugin:NoRender-v0"], "rgb_array"),
    "render returns None": (["--env", "bad_plugin:NoneRender-v0"], "None"),
    "constructor raises": (["--env", "bad_plugin:Raises-v0"], "no licence"),
    "box actions without bounds": (["--env", "bad_plugin:Box-v0"], "expected finite bounds"),
    "plugin with a syntax error": (["--env", "broken_plugin:Mine-v0"], "broken_plugin"),
    "action names: count": (["--action_names", "up,down"], "4"),
    "action names: repeated": (["--action_names", "up,up,left,right"], "up"),
    "action names: special token": (["--action_names", "up,<image>,left,right"], "special token"),
    "action names: empty": (["--action_names", "up,,left,right"], "empty"),
    "token format, long names": (
        ["--action_names", "walk up,walk down,walk left,walk right", "--action_format", "token"],
        "tokens",
    ),
    "instruction with tokens": (["--instruction", "go <image> <|user|> home"], "special tokens"),
    "policy misspelt": (["--policy", "tinny"], "tinny"),
    "policy folder missing": (["--policy", "./nowhere/model"], "nowhere"),
    "policy folder of text alone": (["--policy", "text_only"], "'text_only'"),
    "policy folder empty": (["--policy", "empty"], "config.json"),
    "adapter unknown": (["--adapter", "glue"], "linear, mlp"),
    "encoder unknown": (["--vision_encoder", "no_encoder"], "no_encoder"),
    "part of a folder": (["--policy", "empty", "--adapter", "linear"], "config.json"),
    "no frames": (["--frames", "0"], "frames is 0: expected a whole number from 1 on up to 16"),
    "history below none": (["--history=-1"], "history is -1: expected a whole number from 0 on up to 64"),
    "frames of a model of one image": (["--policy", "uniter", "--frames", "4"], "reads one image a prompt"),
    "patches": (["--image_size", "20", "--patch_size", "8"], "multiple of patch_size"),
    "minibatch": (["--minibatch_size", "100"], "1024 samples"),
    "accumulation": (["--gradient_accumulation_steps", "3"], "gradient_accumulation_steps"),
    "kl without LoRA": (["--kl_coef", "0.1"], "reference"),
    "run folder exists": (["--output_dir", "full"], "never overwritten"),
    "run folder under a file": (["--output_dir", "full/note.txt/run"], "cannot be made"),
    "resume of nothing": (["--resume", "nowhere"], "is no run"),
    "resume with damaged checkpoints": (["--resume", "damaged"], "model.safetensors is cut short, 10 bytes where 18"),
    "resume with a strange configuration": (["--resume", "strange"], "unknown key 'sed' in run, did you mean 'seed'?"),
    "resume from before there were sections": (
        ["--resume", "flat"],
        "'seed' at its top, which belongs in the section run",
    ),
    "resume with settings": (["--resume", "unfinished", "--seed", "3"], "--seed"),
    "resume of a finished run": (["--resume", "finished"], "finished"),
}
FILES = {
    "a key twice": ("run: {seed: 1}\nppo: {}\nrun: {seed: 2}", "'run' in line 3 stands there twice"),
    "deep": ("a: " + "[" * 5_000 + "]" * 5_000, "it is nested more than 100 deep"),
    "a number of 5,000 digits": ("run: {seed: " + "9" * 5_000 + "}", "a value is not what its form or tag says"),
    "a number of 4,000 digits": (
        "run: {seed: " + "9" * 4_000 + "}",
        "seed in settings.yaml is a whole number of some 4,000",
    ),
    "anchors": (
        "a: &a [x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
        "its anchors stand for more than 100,000 values",
    ),
    "an anchor of itself": ("a: &a [*a]", "line 1 refers to itself"),
    "large": ("# " + "x" * 300_000 + "\n", "it is longer than 262,144"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "is no YAML that can be read (line 1"),
    "a date that is none": ("run: {seed: 2001-99-99}", "a value is not what its form or tag says"),
    "an empty name": ("run: {output_dir: ''}", "output_dir in settings.yaml is '': expected text that is not empty."),
    "a null character": ('run: {output_dir: "a\\0b"}', "expected text without null characters"),
    "a long list": (
        "run: {seed: [" + "1, " * 9_000 + "]}",
        "seed in settings.yaml is [1, 1, 1, 1, 1, 1, ...]: expected",
    ),
    "no YAML": ("environment: [1", "line"),
    "a list": ("- num_envs", "no mapping"),
    "half a step": ("run: {total_steps: 2.5}", "is 2.5"),
    "true for a number": ("environment: {num_envs: true}", "is True"),
    "a negative number": ("environment: {num_envs: -3}", "is -3"),
    "text for a number": ("environment: {num_envs: many}", "is 'many'"),
    "nothing": ("", "no mapping"),
    "rate of infinity": (
        "ppo: {learning_rate: .inf}",
        "learning_rate in settings.yaml is inf: expected a number above 0",
    ),
    "a whole number with an exponent": ("run: {total_steps: 1e5}", "total_steps in settings.yaml is '1e5'"),
    "another framework's key": ("ppo: {lr: 0.1}", "unknown key 'lr' in ppo, did you mean 'learning_rate'?"),
    "another section's key": ("ppo: {n_envs: 4}", "did you mean 'num_envs' in the section environment?"),
    "unknown key": ("environment: {num_env: 4}", "unknown key 'num_env' in environment, did you mean 'num_envs'"),
    "a key of another section": ("run: {gamma: 0.5}", "unknown key 'gamma' in run: it belongs in the section ppo"),
    "a key of the run": ("policy: {seed: 4}", "it belongs in the section run"),
    "unknown section": ("enviroment: {num_envs: 4}", "unknown section 'enviroment', did you mean 'environment'?"),
    "no section": ("ppo: 7", "The section ppo in settings.yaml is 7: expected settings"),
    "a mapping for text": ("environment: {env: {a: 1}}", "expected text"),
    "a choice": (
        "ppo: {advantage: gea}",
        "advantage in settings.yaml is 'gea': expected one of gae, grpo, rloo, gigpo",
    ),
    "from before there were sections": (
        "num_envs: 4",
        "settings.yaml has the setting 'num_envs' at its top, which belongs in the section environment: files and runs "
        "without sections are no longer read.",
    ),
    "a policy from then": ("policy: tiny", "'policy' as a setting at its top, and not as a section"),
}


def listing(folder: Path) -> dict[str, bytes]:
    """Every folder and file, with its content."""
    ours = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in ours}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with plugins, and runs in various states; it is the current one."""
    (tmp_path / "bad_plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("def (:\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("keep me")
    (tmp_path / "empty").mkdir()
    for name in ("unfinished", "finished", "damaged", "strange", "flat"):
        (tmp_path / name).mkdir()
        content = {"strange": "run: {sed: 1}\n", "flat": "seed: 1\n"}.get(name, "run: {seed: 1}\n")
        (tmp_path / name / "config.yaml").write_text(content)
    (tmp_path / "finished" / "evaluation.json").write_text("{}")
    for iteration in (2, 4):
        folder = tmp_path / "damaged" / "checkpoints" / f"checkpoint-{iteration}"
        write_folder(folder, lambda path: path.joinpath("model.safetensors").write_text("all of the weights"))
        (folder / "model.safetensors").write_text("all of the")
    text_folder(tmp_path / "text_only", "llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def refusal(main, words, monkeypatch, capfd, code=2) -> str:
    """Runs main with these words; returns its one sentence."""
    monkeypatch.setattr(sys, "argv", ["runner.py", *words])
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == code
    written = capfd.readouterr()
    lines = [line for line in written.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), written.err
    assert "Traceback" not in written.err + written.out
    return lines[0]


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(case, place, monkeypatch, capfd):
    words, expected = FLAGS[case]
    before = listing(place)
    assert expected in refusal(run_ppo.main, words, monkeypatch, capfd)
    assert listing(place) == before


@pytest.mark.parametrize("case", FILES)
def test_bad_yaml(case, place, monkeypatch, capfd):
    text, expected = FILES[case]
    (place / "settings.yaml").write_text(text)
    before = listing(place)
    assert expected in refusal(run_ppo.main, ["--config", "settings.yaml"], monkeypatch, capfd)
    assert listing(place) == before


def test_binary_yaml(place, monkeypatch, capfd):
    (place / "settings.yaml").write_bytes(bytes(range(128, 256)))
    assert "text file" in refusal(run_ppo.main, ["--config", "settings.yaml"], monkeypatch, capfd)


@pytest.mark.parametrize(("env", "expected"), [("NaNReward", "reward"), ("Breaks", "out of memory")])
def test_env_faults_are_found_before_the_run(env, expected, place, monkeypatch, capfd):
    words = ["--env", f"bad_plugin:{env}-v0", "--output_dir", "run", *TINY_RUN]
    sentence = refusal(run_ppo.main, words, monkeypatch, capfd)
    assert expected in sentence and env in sentence
    assert not (place / "run").exists()


def test_an_env_fault_in_a_run_keeps_its_folder(place, monkeypatch, capfd):
    words = ["--env", "bad_plugin:Later-v0", "--output_dir", "run", "--gif_episodes", "0", *TINY_RUN]
    sentence = refusal(run_ppo.main, words, monkeypatch, capfd, code=1)
    assert "Later" in sentence and "reward" in sentence and "seed" in sentence and "action" in sentence
    assert (place / "run" / "config.yaml").is_file()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved policy of the plugin's shape, full and LoRA."""
    from manako.policies import PolicySource, load_policy, save_policy

    folder = tmp_path_factory.mktemp("saved")
    for trainable in ("full", "lora"):
        (folder / trainable).mkdir()
        source = PolicySource(trainable=trainable)
        save_policy(load_policy(source, ("left", "right"), (16, 16, 3)), folder / trainable)
    return folder


@pytest.mark.parametrize(
    ("trainable", "name", "change"),
    [
        ("full", "model.safetensors", "truncate"),
        ("full", "model.safetensors", "flip"),
        ("full", "value_head.safetensors", "remove"),
        ("full", "policy.json", "truncate"),
        ("full", "tokenizer.json", "truncate"),
        ("lora", "adapter_model.safetensors", "truncate"),
        ("lora", "policy.json", "other base"),
    ],
)
def test_damaged_policy_folders(trainable, name, change, saved, place, monkeypatch, capfd):
    import shutil

    shutil.copytree(saved / trainable, place / "policy")
    file = place / "policy" / name
    content = file.read_bytes()
    if change == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif change == "flip":
        file.write_bytes(content[:-5] + bytes([content[-5] ^ 255]) + content[-4:])
    elif change == "remove":
        file.unlink()
    else:
        description = json.loads(content)
        description["source"]["seed"] = 5
        file.write_text(json.dumps(description))
    before = listing(place)
    refusal(run_ppo.main, ["--env", "bad_plugin:Base-v0", "--policy", "policy", *TINY_RUN], monkeypatch, capfd)
    assert listing(place) == before


def test_evaluate_refuses(place, monkeypatch, capfd):
    assert "--policy is missing" in refusal(evaluate.main, [], monkeypatch, capfd)
    words = ["--policy", "tiny", "--output", "full/note.txt"]
    assert "not overwritten" in refusal(evaluate.main, words, monkeypatch, capfd)
    assert "config.json" in refusal(evaluate.main, ["--policy", "empty"], monkeypatch, capfd)
    assert "did you mean --episodes" in refusal(evaluate.main, ["--episode", "3"], monkeypatch, capfd)
    (place / "flat" / "run.json").write_text("{}")
    (place / "flat" / "final").mkdir()
    assert "files and runs without sections" in refusal(evaluate.main, ["--policy", "flat"], monkeypatch, capfd)
    assert (place / "full" / "note.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    "words", [["run_ppo.py", "--polcy", "tiny"], ["run_ppo.py", "--policy", "tinny"], ["evaluate.py"]]
)
def test_as_a_program(words, place):
    command = [sys.executable, str(ROOT / "experiments" / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
