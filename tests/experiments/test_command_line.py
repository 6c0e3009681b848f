"""Settings: what goes before what, how text becomes a value, what holds between settings, and what start-up costs."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from manako.experiments.common.building import check_bf16
from manako.experiments.common.command_line import UsageError, parse, run_main
from manako.experiments.common.progress import episodes_in_words, plain_console, print_table
from manako.experiments.common.settings import RunConfig, check_together

ROOT = Path(__file__).parents[2]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "settings.yaml").write_text(text)
        return str(tmp_path / "settings.yaml")

    return write


def test_flags_go_before_the_file_and_the_file_before_the_defaults(yaml_file):
    file = yaml_file("num_envs: 4\nseed: 5\nbf16: true\n")
    for words in (["--config", file, "--seed", "6"], ["--seed=6", f"--config={file}"]):
        config = parse(RunConfig, words)
        assert (config.num_envs, config.seed, config.bf16) == (4, 6, True)
        assert config.num_steps == RunConfig().num_steps


def test_a_flag_may_be_written_with_hyphens():
    assert parse(RunConfig, ["--num-envs", "3"]).num_envs == 3


@pytest.mark.parametrize(("words", "value"), [(["--bf16"], True), (["--bf16", "False"], False), ([], False)])
def test_switches(words, value):
    assert parse(RunConfig, words).bf16 is value


def test_numbers_of_a_file(yaml_file):
    """YAML 1.1 takes 1e-4 for text; text that looks like a number stays text where text is wanted."""
    config = parse(
        RunConfig, ["--config", yaml_file("learning_rate: 1e-4\ngamma: 1\ninstruction: '7'\nsystem: '1e3'\n")]
    )
    assert config.learning_rate == 1e-4 and config.gamma == 1
    assert config.instruction == "7" and config.system == "1e3"


def test_none_leaves_a_number_out(yaml_file):
    file = yaml_file("target_kl: 0.1\nsuccess_return: null\n")
    assert parse(RunConfig, ["--config", file]).target_kl == 0.1
    assert parse(RunConfig, ["--config", file, "--target_kl", "none"]).target_kl is None
    assert parse(RunConfig, ["--instruction", "none"]).instruction == "none"


def test_every_default_is_within_its_limits():
    assert parse(RunConfig, []) == RunConfig()
    check_together(RunConfig())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_envs": 8, "num_steps": 6, "minibatch_size": 32},
            "--minibatch_size is 32, but a rollout has --num_envs 8 x --num_steps 6 = 48 samples: expected a size that "
            "divides them, such as 24.",
        ),
        ({"num_envs": 2, "num_steps": 2, "minibatch_size": 8}, "such as 4."),
        (
            {"minibatch_size": 64, "gradient_accumulation_steps": 3},
            "--gradient_accumulation_steps is 3: expected a number that divides --minibatch_size 64",
        ),
        ({"kl_coef": 0.1, "trainable": "adapter"}, "--trainable adapter keeps no reference policy"),
    ],
)
def test_settings_that_do_not_fit_together(settings, sentence):
    with pytest.raises(UsageError) as caught:
        check_together(RunConfig(**settings))
    assert sentence in str(caught.value)


def test_exit_codes():
    def ctrl_c():
        raise KeyboardInterrupt

    def bug():
        raise ValueError("not the user's fault")

    for main, code in ((lambda: None, 0), (lambda: 130, 130), (ctrl_c, 130)):
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        assert stop.value.code == code
    with pytest.raises(ValueError, match="not the user's fault"):  # a bug of ours shows where it is
        run_main(bug)


@pytest.mark.parametrize("name", ["run_ppo", "evaluate"])
def test_the_command_line_is_read_without_the_heavy_libraries(name):
    heavy = ["torch", "transformers", "peft", "gymnasium", "ray"]
    code = f"""
import sys
from manako.experiments import {name}
from manako.experiments.common.command_line import UsageError
sys.argv = ["{name}.py", "--sed", "3"]
try:
    {name}.main()
except UsageError:
    print([module for module in {heavy} if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_results_print_as_they_are():
    """Brackets are intervals and names here, no markup; a row fits 80 columns."""
    row = {
        "success": 0.5,
        "success_ci95": [0.25, 0.75],
        "return_mean": -0.5,
        "return_ci95": [-1.25, 0.25],
        "length_mean": 12.34,
        "episodes": 20,
        "starts": 20,
    }
    console = plain_console()
    console.file = StringIO()
    print_table(console, {"policy": row, "replaced_instruction": row}, "env [red]:smile:")
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "env [red]:smile:, 20 episodes a row" in text
    assert episodes_in_words(20, 7) == "20 episodes from 7 starts"
    assert episodes_in_words(20, 1) == "20 episodes from the same start"
    assert "50.0% [25.0%, 75.0%]" in text and "-0.50 [-1.25, 0.25]" in text and "replaced instruction" in text


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_in_software_is_pointed_out(native, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    check_bf16(RunConfig(bf16=True))
    check_bf16(RunConfig(bf16=False))
    assert capsys.readouterr().out.count("no bfloat16 instructions") == (0 if native else 1)
