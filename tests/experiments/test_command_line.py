"""Settings: what goes before what, how text becomes a value, what holds between settings, and what start-up costs."""

import dataclasses
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_settings import PPOSettings
from manako.agent.workers.settings import WorkerSettings
from manako.envs import EpisodeVectorEnv
from manako.envs.settings import EnvSettings
from manako.experiments import collect, evaluate, run_dpo, run_ppo, run_sft
from manako.experiments.common.building import check_bf16, make_trainer_args
from manako.experiments.common.command_line import (
    ELSEWHERE,
    UsageError,
    as_sections,
    flat,
    known_settings,
    nearest,
    parse,
    read_command_line,
    run_main,
)
from manako.experiments.common.progress import Progress, episodes_in_words, plain_console, print_table
from manako.experiments.common.settings import (
    CheckModelCommand,
    CollectCommand,
    DPOCommand,
    EvaluateCommand,
    ImagineCommand,
    PPOCommand,
    SFTCommand,
    check_together,
    largest_divisor,
    moved,
)
from manako.experiments.export_lerobot import ExportCommand
from manako.experiments.play import PlayCommand
from manako.experiments.run_ladder import LadderCommand
from manako.experiments.submit_ray_job import JobCommand, job_words

ROOT = Path(__file__).parents[2]
COMMANDS = [PPOCommand, CollectCommand, SFTCommand, DPOCommand, EvaluateCommand]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "settings.yaml").write_text(text)
        return str(tmp_path / "settings.yaml")

    return write


def read(*words: str) -> PPOCommand:
    return parse(PPOCommand, "", words)


def refused(kind: type, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(kind, "", words)
    return str(caught.value)


def test_flags_go_before_the_file_and_the_file_before_the_defaults(yaml_file):
    file = yaml_file("environment: {num_envs: 4}\nrun: {seed: 5}\nppo: {bf16: true}\nworkers:\n")
    for words in (["--config", file, "--seed", "6"], ["--seed=6", f"--config={file}"]):
        command = read(*words)
        assert (command.environment.num_envs, command.run.seed, command.ppo.bf16) == (4, 6, True)
        assert command.ppo.num_steps == PPOSettings().num_steps
    line = read_command_line(PPOCommand, "", ["--config", file, "--gamma", "0.5"])
    assert line.given == {"num_envs", "seed", "bf16", "gamma"} and line.file == file


EVERY = [*COMMANDS, ImagineCommand, JobCommand, LadderCommand, ExportCommand, PlayCommand]


@pytest.mark.parametrize("kind", EVERY)
def test_no_text_is_empty_and_no_flag_comes_twice(kind):
    """An unset variable of the shell never starts a default run."""
    known = {name: setting for name, setting in known_settings(kind).items() if not setting.only_in_file}
    for name, setting in known.items():
        with pytest.raises(UsageError) as caught:
            parse(kind, "", [f"--{name}", "x", f"--{name}", "x"])
        assert str(caught.value) == f"--{name} came twice, with 'x' and 'x': expected one."
        if setting.plain is str:
            for empty in ("", "  "):
                assert refused(kind, f"--{name}", empty).startswith(f"--{name} is {empty!r}: expected text that is not")
    names = {name for name, setting in known.items() if setting.is_path}
    assert all(
        name in names
        for name in known
        if re.search("_dir$|^output$|gif$|^resume$|^dataset$|^recording$|^policy$", name)
    )
    for name in names:
        assert "with a name of 255 bytes: expected names of up to 240" in refused(kind, f"--{name}", "x/" + "a" * 255)


@pytest.mark.parametrize(("number", "most", "divisor"), [(12, 5, 4), (7, 6, 1), (16, 16, 16), (2**40, 2**31, 2**31)])
def test_the_largest_divisor(number, most, divisor):
    assert largest_divisor(number, most) == divisor


@pytest.mark.parametrize(("words", "value"), [(["--bf16"], True), (["--bf16", "False"], False), ([], False)])
def test_switches(words, value):
    assert read(*words).ppo.bf16 is value


def test_numbers_of_a_file(yaml_file):
    """YAML 1.1 takes 1e-4 for text; text that looks like a number stays text where text is wanted."""
    file = yaml_file("ppo: {learning_rate: 1e-4, gamma: 1}\nenvironment: {instruction: '7'}\npolicy: {system: '1e3'}\n")
    command = read("--config", file)
    assert command.ppo.learning_rate == 1e-4 and command.ppo.gamma == 1
    assert command.environment.instruction == "7" and command.policy.system == "1e3"


def test_names_and_arguments_of_an_environment_are_the_same_in_a_file_and_as_flags(yaml_file):
    file = yaml_file("environment:\n  action_names: [go, stay]\n  env_kwargs: {size: 4}\n")
    flags = ["--action_names", "go, stay", "--env_kwargs", '{"size": 4}']
    assert read("--config", file) == read(*flags)
    assert read(*flags).environment == EnvSettings(action_names=("go", "stay"), env_kwargs={"size": 4})
    assert "expected a mapping" in refused(PPOCommand, "--config", yaml_file("environment: {env_kwargs: size}"))


def test_none_leaves_a_number_out(yaml_file):
    file = yaml_file("ppo: {target_kl: 0.1}\nenvironment: {success_return: null}\n")
    assert read("--config", file).ppo.target_kl == 0.1
    assert read("--config", file, "--target_kl", "none").ppo.target_kl is None
    assert read("--instruction", "none").environment.instruction == "none"


def test_a_file_may_be_given_as_text():
    assert read("--config", '{"ppo": {"gamma": 0.5}}', "--seed", "3").ppo.gamma == 0.5


# ---- one default, one spelling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMANDS)
def test_python_and_the_command_line_have_the_same_defaults(kind):
    assert parse(kind, "", []) == kind()


def test_ppo_has_its_defaults_once(tmp_path):
    """In the settings, in the trainer's arguments and in a run."""
    settings, args = PPOSettings(), PPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    made = make_trainer_args(PPOCommand(), tmp_path)
    for field in dataclasses.fields(PPOSettings):
        assert getattr(args, field.name) == getattr(settings, field.name) == getattr(made, field.name), field.name
    assert settings.gamma == 0.99 and made.seed == 0 and made.num_iterations == -(-100_000 // (32 * 16))
    changed = dataclasses.replace(settings, **{"gamma": 0.5, "clip_range_vf": 0.3, "adam_epsilon": 1e-7})
    made = make_trainer_args(PPOCommand(ppo=changed), tmp_path)
    assert (made.gamma, made.clip_range_vf, made.adam_epsilon) == (0.5, 0.3, 1e-7)


def test_what_an_environment_is_given_is_what_its_settings_hold():
    """No field is passed on by hand: the names are those of the constructor."""
    options = EnvSettings(env_kwargs={"size": 4}, action_names=("n", "s", "w", "e"), instruction="go").options()
    env = EpisodeVectorEnv("manako/GoTo-v0", 1, **options)
    assert env.action_names == ("n", "s", "w", "e") and env.reset().instructions == ("go",)


def test_a_run_folders_settings_are_a_config_file(yaml_file):
    command = read("--action_names", "n,s", "--env_kwargs", '{"size": 4}', "--lora_rank", "4", "--seed", "9")
    sections = as_sections(command)
    assert list(sections) == ["environment", "policy", "ppo", "workers", "run"]
    assert "seed" not in sections["policy"]  # the run's one seed
    assert read("--config", yaml_file(yaml.safe_dump(sections))) == command


def test_goto_is_what_is_trained_where_nothing_is_named(monkeypatch, yaml_file):
    def line(*words: str):
        monkeypatch.setattr(sys, "argv", ["run_ppo.py", *words])
        return run_ppo.read_line()

    bare = line("--seed", "1")
    assert bare.file.endswith("experiments/configs/goto.yaml") and bare.given == {"seed"}
    assert (bare.settings.ppo.gamma, bare.settings.environment.num_envs, bare.settings.run.seed) == (0.9, 64, 1)
    assert line("--env", "manako/GoTo-v0").settings == PPOCommand()
    assert line("--config", yaml_file("run: {seed: 1}")).settings.ppo == PPOSettings()
    assert line("--resume", "runs/1").file is None


def test_a_job_is_given_all_settings_as_text():
    def words(*given: str) -> list[str]:
        return job_words(read_command_line(JobCommand, "", given), "/shared/1")

    system = '{"policy": {"system": "Play: {actions}"}}'
    given = ["--config", system, "--env", "a:B-v0", "--env_kwargs", '{"size": 4}', "--target_kl", "0.1"]
    sent = read(*words(*given, "--follow", "false"))
    command = read(*given)
    assert sent == dataclasses.replace(command, run=dataclasses.replace(command.run, output_dir="/shared/1"))
    assert words("--resume", "1") == ["--resume", "/shared/1"]
    moved_on = read_command_line(PPOCommand, "", words("--resume", "1", "--rollout_backend", "ray-env"))
    assert moved_on.given == {"resume", "rollout_backend"}


# ---- help ------------------------------------------------------------------------------------------------------------


def help_of(runner, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["runner.py", "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        runner.main()
    return capsys.readouterr().out


def test_help_has_groups_choices_and_what_files_alone_have(monkeypatch, capsys):
    text = help_of(run_ppo, monkeypatch, capsys)
    titles = ["environment:", "policy:", "PPO:", "rollout workers:", "run:", "only in a --config file:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert "--advantage {gae,grpo,rloo,gigpo}" in text and "--dtype {float32,bfloat16}" in text
    assert "(default: 0.99)" in text and "None" not in text and "experiments/configs/goto.yaml" in text
    assert "--num-envs" not in text and text.count("--num_envs N") == 1
    only_in_files = text[places[-1] :]
    for name, setting in known_settings(PPOCommand).items():
        assert (f"\n    {name}:" in only_in_files) == setting.only_in_file == (f"--{name} " not in text), name


@pytest.mark.parametrize(
    ("runner", "foreign"),
    [
        (collect, "lora_rank trainable gamma async_rollouts output_dir eval_episodes"),
        (evaluate, "lora_rank vision_encoder image_size gamma rollout_backend eval_episodes"),
        (run_sft, "num_envs gamma rollout_backend beta rounds save_every"),
        (run_dpo, "stage captions gamma rollout_backend warmup_steps"),
        (run_ppo, "player stage beta epochs dataset"),
    ],
)
def test_a_runner_has_no_flags_that_it_does_not_use(runner, foreign, monkeypatch, capsys):
    text = help_of(runner, monkeypatch, capsys)
    assert [name for name in foreign.split() if f"--{name} " in text] == []


@pytest.mark.parametrize("name", ["lora_alpha", "adam_epsilon", "vf_coef", "keep_checkpoints"])
def test_rarely_turned_settings_stand_in_files_alone(name, yaml_file):
    setting = known_settings(PPOCommand)[name]
    assert f"There is no flag --{name}: {name} stands in the section {setting.section}" in refused(
        PPOCommand, f"--{name}", "1"
    )
    file = yaml_file(f"{setting.section}: {{{name}: 7}}")
    assert flat(as_sections(read("--config", file)))[name] == 7


# ---- what holds between settings -------------------------------------------------------------------------------------


def test_every_default_is_within_its_limits():
    assert read() == PPOCommand()
    check_together(PPOCommand())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--num_envs 8 --num_steps 6 --minibatch_size 32",
            "--minibatch_size is 32, but a rollout has --num_envs 8 x --num_steps 6 = 48 samples: expected a size that "
            "divides them, such as 24.",
        ),
        ("--num_envs 2 --num_steps 2 --minibatch_size 8", "such as 4."),
        (
            "--minibatch_size 64 --gradient_accumulation_steps 3",
            "--gradient_accumulation_steps is 3: expected a number that divides --minibatch_size 64",
        ),
        ("--kl_coef 0.1 --trainable adapter", "--trainable adapter keeps no reference policy"),
        ("--num_workers 2", "--num_workers is for rollout workers, and --rollout_backend is local"),
        ("--async_rollouts", "expected ray-replica"),
        ("--rollout_backend ray-env --num_workers 5", "cannot be divided among --num_workers 5"),
    ],
)
def test_settings_that_do_not_fit_together(words, sentence):
    with pytest.raises(UsageError) as caught:
        check_together(read(*words.split()))
    assert sentence in str(caught.value)


def test_a_resumed_run_may_have_other_workers():
    run = WorkerSettings(rollout_backend="ray-env", num_workers=4, worker_cpus=0.5, rollout_batch_size=2)
    assert moved(run, frozenset({"worker_gpus"}), WorkerSettings(worker_gpus=1.0)).worker_gpus == 1.0
    there = moved(run, frozenset({"rollout_backend"}), WorkerSettings(rollout_backend="ray-replica"))
    assert there == dataclasses.replace(run, rollout_backend="ray-replica", num_workers=None) and there.workers == 2
    assert moved(run, frozenset({"rollout_backend"}), WorkerSettings()).workers == 1


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


@pytest.mark.parametrize("name", ["run_ppo", "evaluate", "collect", "run_sft", "run_dpo", "run_ladder", "check_model"])
def test_the_command_line_is_read_without_the_heavy_libraries(name):
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "ray"]
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


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("run_ppo", ["--output_dir", "runs/1"], "run          runs/1\nsettings     experiments/configs/goto.yaml"),
        ("run_sft", ["--stage", "align", "--output_dir", "runs/1"], "run          runs/1"),
        ("run_dpo", ["--output_dir", "runs/1"], "run          runs/1"),
        ("evaluate", ["--policy", "tiny"], "evaluating   tiny on manako/GoTo-v0"),
        ("collect", ["--output", "data/1"], "recording    expert on manako/GoTo-v0, to data/1"),
    ],
)
def test_the_first_line_stands_before_torch_is_loaded(name, words, line, tmp_path):
    """A torch that cannot be imported stands in for one that takes long."""
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and done.stdout.startswith(line + "\n"), done.stderr
    assert done.stdout.splitlines()[-1].startswith("loading      torch, transformers and the policy")
    assert not (tmp_path / "runs").exists()


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
    table = [line for line in text.splitlines() if not line.startswith("this measure")]
    assert max(map(len, table)) <= 80
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
    check_bf16(True)
    check_bf16(False)
    assert capsys.readouterr().out.count("no bfloat16 instructions") == (0 if native else 1)


@pytest.mark.parametrize(
    ("kind", "word", "meant"),
    [
        (PPOCommand, "--lr", "learning_rate"),
        (SFTCommand, "--lr", "learning_rate"),
        (DPOCommand, "--lr", "learning_rate"),
        (PPOCommand, "--env_id", "env"),
        (CollectCommand, "--env-id", "env"),
        (PPOCommand, "--timesteps", "total_steps"),
        (PPOCommand, "--Total-Timesteps", "total_steps"),
        (PPOCommand, "--n_steps", "num_steps"),
        (PPOCommand, "--batch", "minibatch_size"),
        (SFTCommand, "--batch", "batch_size"),
        (SFTCommand, "--num_train_epochs", "epochs"),
        (PPOCommand, "--epochs", "num_ppo_epochs"),
        (EvaluateCommand, "--model", "policy"),
        (EvaluateCommand, "--n_eval_episodes", "episodes"),
        (PPOCommand, "--n_eval_episodes", "eval_episodes"),
        (CollectCommand, "--output_dir", "output"),
        (PPOCommand, "--output", "output_dir"),
        (PPOCommand, "--gae", "gae_lambda"),  # the only one that begins so
        (PPOCommand, "--num_enws", "num_envs"),
        (EvaluateCommand, "--timesteps", "eval_steps"),
        (PPOCommand, "--zzz", None),
    ],
)
def test_the_flag_that_was_meant(kind, word, meant):
    assert nearest(word, [*known_settings(kind)]) == meant


def test_every_word_of_elsewhere_leads_somewhere():
    every = {name for kind in (*COMMANDS, CheckModelCommand) for name in known_settings(kind)}
    assert all(meant in every for names in ELSEWHERE.values() for meant in names)


@pytest.mark.parametrize(("ended", "said"), [(3.0, True), (2.0, False), (0.0, False)])
def test_only_a_training_that_came_to_its_end_is_called_trained(tmp_path, ended, said, capsys):
    progress = Progress(tmp_path, PPOCommand(), None, iterations=3, samples=1, started=0.0)
    progress.on_train_begin(None, SimpleNamespace(epoch=None), None)
    progress.on_train_end(None, SimpleNamespace(epoch=ended), None)
    assert ("trained in" in capsys.readouterr().out) == said
