"""Model cards as a reader, the Hub and Markdown meet them: README.md in final/ and best/ of real runs."""

import contextlib
import copy
import hashlib
import io
import json
import re
import shlex
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from manako.envs import make_env
from manako.experiments import evaluate, run_sft
from manako.experiments.common import results
from manako.experiments.common.command_line import build, checked_sections
from manako.experiments.common.markdown import code, fenced
from manako.experiments.common.model_card import card, write_card
from manako.experiments.common.run_folder import read_run_settings
from manako.experiments.common.settings import PPOCommand
from manako.manifest import CARD, fault
from manako.policies import PolicySource, load_policy
from tests.experiments.test_best import ENV, EVERY, SHORT, read
from tests.experiments.test_life import command_of, dataset, tuning_words  # noqa: F401 - a fixture
from tests.experiments.test_run_ppo import run, words

NAMES = ("`a` | <script>alert(1)</script>", "# right\u202e ---")
INSTRUCTION = "# Go\n```\n---\nlicense: mit\n<img src=x> | {a: *b} ````"
HEADINGS = [
    "Intended use",
    "How to load it",
    "Data",
    "Training",
    "Evaluation",
    "Limits",
    "Parameters",
    "Versions",
    "Settings",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose action names and instruction are written to break a card."""
    folder = tmp_path_factory.mktemp("card") / "run"
    settings = {"env": ENV, "seed": 3, "instruction": INSTRUCTION, **SHORT, **EVERY, "total_steps": 128}
    with pytest.MonkeyPatch.context() as patch:
        assert run([*words(folder, **settings), "--action_names", ",".join(NAMES)], patch) == 0
    return folder


@pytest.fixture(scope="module")
def made(whole):
    """What cards of that run are made of: its settings and its policy."""
    env = make_env(ENV, 1, instruction=INSTRUCTION, action_names=NAMES)
    policy = load_policy(PolicySource(str(whole / "final")), env.action_names, env.frame_shape)
    return build(PPOCommand, checked_sections(PPOCommand, read_run_settings(whole / "config.yaml"), "a run")), policy


def parts(text: str) -> dict[str, str]:
    """Heading -> what stands beneath it."""
    pieces = re.split(r"^## (.*)$", text, flags=re.M)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def head(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0])


@pytest.mark.parametrize("name", ["final", "best"])
def test_the_head_is_yaml_that_the_hub_reads_with_the_figures_of_evaluation_json(name, whole):
    text, found = (whole / name / CARD).read_text(), read(whole / "evaluation.json")
    row = found["policy" if name == "final" else "best"]
    said = head(text)
    assert (said["library_name"], said["pipeline_tag"]) == ("transformers", "reinforcement-learning")
    assert {"manako", "vision-language-model", "PPO", ENV} <= set(said["tags"]) and "license" not in said
    results = ModelCard(text).data.eval_results
    assert {each.metric_type: each.metric_value for each in results} == {
        "success_rate": row["success"],
        "mean_reward": row["return_mean"],
    }
    assert {each.dataset_name for each in results} == {ENV}
    low, high = row["success_ci95"]
    assert f"{low:.3f} to {high:.3f}" in results[0].metric_name


@pytest.mark.parametrize("name", ["final", "best"])
def test_the_table_is_evaluation_json_with_the_controls_beside_the_policy(name, whole):
    text, found = (whole / name / CARD).read_text(), read(whole / "evaluation.json")
    lines = re.findall(r"^\| (.*) \|$", parts(text)["Evaluation"], re.M)[2:]
    assert len(lines) == len(found) == 5
    for line, row in zip(lines, found.values(), strict=True):
        (low, high), (least, most) = row["success_ci95"], row["return_ci95"]
        assert line.split(" | ")[1:] == [
            f"{row['success']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['return_mean']:.2f} ({least:.2f} to {most:.2f})",
            f"{row['length_mean']:.1f}",
            "6",
        ]
    this = [line.split(" | ")[0] for line in lines if "this one" in line]
    assert this == ["last policy (this one)" if name == "final" else "best policy (this one)"]
    assert [line.split(" | ")[0].split(" (")[0] for line in lines][2:] == ["random", "blank image", "other instruction"]


@pytest.mark.parametrize("name", ["final", "best"])
def test_names_and_instructions_break_neither_markdown_nor_html(name, whole):
    text = (whole / name / CARD).read_text()
    assert "\u202e" not in text
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    within = [child for token in tokens for child in token.children or []]
    assert not [token for token in (*tokens, *within) if token.type in ("html_block", "html_inline", "image", "link")]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == HEADINGS
    spans = [token.content for token in within if token.type == "code_inline"]
    assert NAMES[0] in spans and "# right\\u202e ---" in spans
    settings = yaml.safe_load(next(token.content for token in tokens if token.type == "fence" and token.info == "yaml"))
    assert settings["environment"]["instruction"] == INSTRUCTION
    assert tuple(settings["environment"]["action_names"]) == NAMES


@pytest.mark.parametrize("text", ["", "`", "``a`", " a ", "a\nb", "\\", "<b>", "*a* [b](c)", "a" * 200, "\x1b[31m"])
def test_a_text_as_code_is_one_span_of_code(text):
    tokens = MarkdownIt("commonmark").parseInline(f"- {code(text)} end")[0].children
    assert [token.type for token in tokens] == ["text", "code_inline", "text"]
    assert (tokens[0].content, tokens[2].content) == ("- ", " end")
    assert len(tokens[1].content) <= 90 and "\x1b" not in tokens[1].content
    blocks = MarkdownIt("commonmark").parse(f"a\n\n{fenced(text)}\n\nend")
    assert [token.type for token in blocks if token.type == "fence"] == ["fence"] and blocks[-2].content == "end"


@pytest.mark.parametrize("name", ["final", "best"])
def test_its_python_and_its_command_give_its_figures(name, whole, tmp_path, monkeypatch):
    row = read(whole / "evaluation.json")["policy" if name == "final" else "best"]
    shutil.copytree(whole / name, tmp_path / "elsewhere")
    tokens = MarkdownIt("commonmark").parse(parts((whole / name / CARD).read_text())["How to load it"])
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    python, command = (blocks[kind].replace("this/folder", str(tmp_path / "elsewhere")) for kind in ("python", "bash"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(python, {})
    assert f"'success': {row['success']}, 'success_ci95': {row['success_ci95']}" in said.getvalue()
    words_of_it = shlex.split(command)
    assert words_of_it[:2] == ["python", "experiments/evaluate.py"]
    output = tmp_path / "found.json"
    assert run([*words_of_it[2:], "--output", str(output)], monkeypatch, evaluate.main) == 0
    assert read(output)["policy"].items() <= row.items()


@pytest.mark.parametrize("name", ["final", "best"])
def test_a_completed_or_edited_card_leaves_the_folder_whole(name, whole, tmp_path):
    shutil.copytree(whole / name, tmp_path / name)
    assert fault(tmp_path / name, ("model.safetensors",)) is None and not list(whole.rglob(".*.tmp"))
    assert CARD not in read(tmp_path / name / "manifest.json")["files"]
    with (tmp_path / name / CARD).open("a") as file:
        file.write("license: mine\n")
    assert fault(tmp_path / name) is None
    load_policy(PolicySource(str(tmp_path / name)), NAMES, (16, 36, 3))


def test_a_card_that_the_manifest_holds_stays(whole, made, tmp_path):
    """As in folders of PEFT's from before there were cards."""
    shutil.copytree(whole / "final", tmp_path / "final")
    manifest = read(tmp_path / "final/manifest.json")
    (tmp_path / "final" / CARD).write_bytes(b"PEFT's")
    manifest["files"][CARD] = {"sha256": hashlib.sha256(b"PEFT's").hexdigest(), "bytes": 6}
    (tmp_path / "final/manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    write_card(*made, whole, tmp_path / "final", read(whole / "evaluation.json"))
    assert (tmp_path / "final" / CARD).read_bytes() == b"PEFT's" and fault(tmp_path / "final") is None


def test_an_interrupted_evaluation_is_said_and_the_next_start_completes_the_card(whole, tmp_path, monkeypatch, capfd):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("final", "evaluation.json", "episodes.json"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(results.evaluation, "evaluate_all", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(["--resume", str(tmp_path / "run")], patch) == 130
    text = (tmp_path / "run/final" / CARD).read_text()
    assert "**Not evaluated** on held-out episodes" in text and "better than chance is not known" in text
    assert "model-index" not in head(text) and "| random |" not in text and list(parts(text)) == HEADINGS
    assert run(command_of(capfd.readouterr().out), monkeypatch) == 0
    for name in ("final", "best"):
        assert fault(tmp_path / "run" / name) is None
        assert (tmp_path / "run" / name / CARD).read_text() == (whole / name / CARD).read_text()


@pytest.mark.parametrize("file", ["episodes.json", "run.json", "changes.jsonl"])
def test_a_damaged_file_of_the_run_is_a_warning_and_the_older_card_stays(file, whole, made, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / file).write_text('{"a')
    before, found = (whole / "final" / CARD).read_text(), read(whole / "evaluation.json")
    found["policy"]["success"] = 1  # so that it may be better than a control, which episodes.json says
    write_card(*made, tmp_path / "run", tmp_path / "run/final", found)
    assert re.search(r"^warning: the model card .*final/README.md failed and is left out: ", capfd.readouterr().err)
    assert (tmp_path / "run/final" / CARD).read_text() == before and not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_damaged_run_json_ends_no_run(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/evaluation.json").unlink()
    (tmp_path / "run/run.json").write_text("{}")  # of another version, say
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    assert read(tmp_path / "run/evaluation.json") == read(whole / "evaluation.json")


# ---- what is said, by figures made by hand ---------------------------------------------------------------------------

JUDGED = {
    "success": 1.0,
    "success_ci95": [0.61, 1.0],
    "judged": 6,
    "return_mean": 0.5,
    "return_ci95": [0.4, 0.6],
    "length_mean": 3.0,
    "episodes": 6,
    "starts": 6,
    "fixed_by_seed": True,
}
FAILING = {**JUDGED, "success": 0.0, "success_ci95": [0.0, 0.39], "return_mean": -0.5, "return_ci95": [-0.6, -0.4]}
ROWS = {"policy": JUDGED, "random": FAILING, "blank_image": FAILING, "replaced_instruction": FAILING}
BY_CHANCE = "The frame is not shown to matter"


def limits(whole, made, tmp_path, rows, name="final", **episodes) -> str:
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    played = {row: [found["success"] == 1] * 6 for row, found in rows.items()}
    returns = {row: [found["return_mean"]] * 6 for row, found in rows.items()}
    written = {"success": played, "returns": returns, "fixed_by_seed": True, **episodes}
    (tmp_path / "run/episodes.json").write_text(json.dumps(written))
    return parts(card(*made, tmp_path / "run", tmp_path / "run" / name, rows))["Limits"]


def test_a_control_as_good_as_the_policy_is_said(whole, made, tmp_path):
    """Six of six against none is p = 2 / 2^6 = 0.031; five of six against none 2 / 2^5 = 0.063."""
    assert "shown" not in limits(whole, made, tmp_path, ROWS)
    said = limits(whole, made, tmp_path, {**ROWS, "blank_image": JUDGED})
    assert BY_CHANCE in said and "random actions" not in said and "The instruction" not in said
    five = {"success": {**{row: [False] * 6 for row in ROWS}, "policy": [True] * 5 + [False]}}
    said = limits(whole, made, tmp_path, ROWS, **five)
    assert BY_CHANCE in said and "better than random actions" in said and "The instruction is not shown" in said


def test_without_success_the_returns_are_compared(whole, made, tmp_path):
    rows = {name: {**row, "success": None, "success_ci95": None} for name, row in ROWS.items()}
    said = limits(whole, made, tmp_path, rows)
    assert "the mean return is the measure" in said and "shown" not in said
    assert BY_CHANCE in limits(whole, made, tmp_path, {**rows, "blank_image": rows["policy"]})
    text = card(*made, tmp_path / "run", tmp_path / "run/final", rows)
    assert "success (95 %)" not in text and "None" not in parts(text)["Evaluation"]
    assert [each.metric_type for each in ModelCard(text).data.eval_results] == ["mean_reward"]


def test_starts_seeds_and_illegal_answers_are_said(whole, made, tmp_path):
    def with_all(**facts):
        return limits(whole, made, tmp_path, {name: {**row, **facts} for name, row in copy.deepcopy(ROWS).items()})

    assert "they are one episode over and over" in with_all(starts=1)
    assert "began in 3 different ways only" in with_all(starts=3)
    said = with_all(fixed_by_seed=False)
    assert "none is held out from training" in said and "Held-out seeds are" not in said and "shown" not in said
    assert "75.0% of its answers were `no action`" in with_all(outcomes={"legal": 1, "no action": 3})
    assert "In 2 episodes the environment broke" in with_all(failed=2)


def test_of_a_best_policy_the_controls_were_not_played(whole, made, tmp_path):
    compared = {"measure": "success", "difference": 0.0, "p": 1.0, "test": "a test"}
    best = {**JUDGED, "same_weights_as_policy": False, "against_policy": compared}
    said = limits(whole, made, tmp_path, {**ROWS, "best": best, "blank_image": JUDGED}, name="best")
    assert "Both controls were played by the last policy" in said and BY_CHANCE not in said
    same = {**best, "same_weights_as_policy": True}
    said = limits(whole, made, tmp_path, {**ROWS, "best": same, "blank_image": JUDGED}, name="best")
    assert BY_CHANCE in said and "Both controls" not in said


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def test_a_fine_tuning_names_its_dataset_by_digest(dataset, tmp_path, monkeypatch):  # noqa: F811
    arguments = tuning_words(tmp_path / "run", dataset, loss="actions", trainable="lora")
    assert run(arguments, monkeypatch, run_sft.main) == 0
    text = (tmp_path / "run/final" / CARD).read_text()
    digest = hashlib.sha256((dataset / "manifest.json").read_bytes()).hexdigest()
    assert f"dataset `goto`, SHA-256 sum of its manifest `{digest}`" in text and "- its episodes: `6`" in text
    assert head(text)["library_name"] == "peft" and "SFT" in head(text)["tags"]  # and none of PEFT's own card
    found = read(tmp_path / "run/evaluation.json")["policy"]
    assert ModelCard(text).data.eval_results[0].metric_value == found["success"]
    assert "trainable='lora'" in text and fault(tmp_path / "run/final") is None


def test_a_stage_that_sees_alone_is_no_policy_and_one_without_evaluation_says_so(tmp_path, monkeypatch):
    arguments = ["--stage", "align", "--captions", "8", "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert run(arguments, monkeypatch, run_sft.main) == 0
    text = (tmp_path / "run/final" / CARD).read_text()
    assert head(text)["pipeline_tag"] == "image-text-to-text" and "reinforcement-learning" not in head(text)["tags"]
    assert "and not to act" in text and "**Not evaluated**" in text and "answers with an action" not in text


def test_a_hub_id_is_the_base_model_and_a_folder_is_not(made, whole):
    command, policy = made
    for source, expected in (("someone/a-model", "someone/a-model"), (str(whole / "final"), None), ("tiny", None)):
        changed = copy.deepcopy(command)
        object.__setattr__(changed.policy, "policy", source)
        assert head(card(changed, policy, whole, whole / "final", None)).get("base_model") == expected
