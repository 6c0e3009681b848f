"""check_model.py as a user has it: its sentences hold what plain transformers and a count by hand say; its exit codes.

The table and the excerpt in docs/models.md are what the command writes now.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from manako import make_env
from manako.experiments import check_model, run_dpo, run_ppo, run_sft
from manako.experiments.common import model_check
from manako.experiments.common.command_line import UsageError, run_main
from manako.experiments.common.markdown_table import END
from manako.experiments.common.model_table import TABLE, Row
from manako.policies import PolicySource, load_policy, room
from manako.policies.saving import digest
from manako.policies.self_check import Differences
from tests.helpers.families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs/models.md"
NUM_ENVS, NUM_STEPS = 3, 5
HEADINGS = [
    "model",
    "family",
    "parts",
    "acts",
    "reads",
    "answers",
    "image",
    "prompt",
    "state",
    "generate",
    "learns",
    "needs",
    "memory",
    "speed",
]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A folder of each family."""
    folder = tmp_path_factory.mktemp("models") / "families"
    for name, make in FAMILIES.items():
        make(folder / name)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns its exit code, and what it wrote to both streams."""

    def run_command(*words):
        sizes = ["--num_envs", str(NUM_ENVS), "--num_steps", str(NUM_STEPS)]
        monkeypatch.setattr(sys, "argv", ["check_model.py", *map(str, words), *sizes])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(check_model.main)
        return stop.value.code, *capsys.readouterr()

    return run_command


@pytest.fixture
def quickly(monkeypatch):
    """Each work is timed by one run."""
    monkeypatch.setattr(model_check, "TIMES", 0)


def said(out: str) -> dict[str, str]:
    """Heading -> what stands behind it, further lines joined by a line's end."""
    found: dict[str, str] = {}
    for line in out.splitlines():
        heading = line[:13].strip()
        if heading:
            last, found[heading] = heading, line[13:]
        else:
            found[last] += f"\n{line[13:]}"
    return found


def bytes_of(words: str) -> float:
    """The number in `1.5 KiB`, in bytes."""
    count, unit = words.split()
    return float(count) * 1024 ** room.UNITS.index(unit)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_its_numbers_are_those_of_plain_transformers(families, run):
    folder = families / "llava"
    code, out, err = run(folder)
    told = said(out)
    assert (code, err) == (0, "") and list(told) == HEADINGS

    env = make_env("manako/GoTo-v0", NUM_ENVS, held_out=True)
    seen = env.reset()
    policy = load_policy(PolicySource(str(folder)), env.action_names, env.frame_shape)
    processor, config = AutoProcessor.from_pretrained(folder), LlavaConfig.from_pretrained(folder)
    picture = Image.fromarray(seen.images[0])
    lengths = []
    for instruction in ("", *seen.instructions):
        text = processor.apply_chat_template(policy.messages(instruction), add_generation_prompt=True, tokenize=False)
        ids = processor(text=text, images=picture, return_tensors="pt")["input_ids"][0]
        lengths.append(len(ids))
    assert told["image"].startswith(f"{int((ids == config.image_token_index).sum())} tokens a frame; pixels by table")
    first = f"{lengths[1]} with {seen.instructions[0]!r}"
    assert told["prompt"] == f"{lengths[0]} tokens with no instruction, {first}"
    assert told["reads"] == f"{len(policy.reading.prefix_ids)} tokens shared by all prompts"
    assert all(f"{name} {name!r}" in told["answers"] for name in env.action_names)
    height, width, _ = env.frame_shape
    assert told["acts"].startswith("yes, as transformers") and told["acts"].endswith(f"{height} x {width}")

    parameters = sum(weight.numel() for weight in load_file(folder / "model.safetensors").values())
    parameters += sum(parameter.numel() for parameter in policy.value_head.parameters())
    assert told["parts"].endswith(f"; {parameters:,} parameters in all")
    text, head = config.text_config, config.text_config.hidden_size // config.text_config.num_attention_heads
    a_token = text.num_hidden_layers * 2 * text.num_key_value_heads * head * 4
    a_step = 8 * max(lengths) + 8 + 32 * 32 * 3  # ids, their number, the frame as the encoder gets it
    expected = [4 * parameters, 4 * parameters, 8 * parameters, a_token * max(lengths), a_token]
    expected.append(a_step * NUM_ENVS * NUM_STEPS)
    *found, free = re.findall(r"[\d.]+ (?:bytes|[KMGT]iB)", told["memory"])
    assert [bytes_of(words) for words in found] == pytest.approx(expected, rel=5e-3)
    assert bytes_of(free) > 2**20 and f"rollout of {NUM_ENVS} x {NUM_STEPS} steps" in told["memory"]
    assert re.match(rf"[\d,]+ steps/s acting in {NUM_ENVS} environments, [\d,]+ samples/s of an update", told["speed"])
    assert told["speed"].endswith("1 thread")


def test_what_is_asked_of_a_run_is_what_is_counted(families, run, quickly):
    """LoRA on the encoder's side too, in bfloat16, with answers as a trie."""
    _, out, _ = run(families / "llava", "--trainable", "encoder+lora", "--dtype", "bfloat16", "--action_format", "trie")
    told = said(out)
    assert told["learns"].splitlines()[1:] == [
        "adapter: adapter gets a gradient",
        "lora: adapter and LoRA get a gradient",
        "encoder+lora: encoder and LoRA get a gradient",
    ]
    assert told["answers"].startswith("as trie: ") and "with trainable encoder+lora" in told["memory"]
    source = PolicySource(str(families / "llava"), trainable="encoder+lora", dtype="bfloat16")
    policy = load_policy(source, ("up", "down"), (24, 24, 3))
    policy.value_head.requires_grad_(False)
    weights, gradients, moments = (room.in_words(count) for count in room.needed(policy))
    assert told["memory"].startswith(f"weights {weights}; gradients {gradients} and AdamW's moments {moments} with")


def test_a_check_changes_nothing(families):
    """The same model is asked for one `--trainable` after another, LoRA among them, and then acts as before."""
    source = PolicySource(str(families / "qwen3_vl"))
    env = make_env("manako/GoTo-v0", 2)
    seen = env.reset()
    policy = load_policy(source, env.action_names, env.frame_shape)
    inputs, before = policy.prepare(seen.images, seen.instructions), digest(policy.vlm.state_dict())
    for trainable in ("lora", "encoder+lora", "full"):
        assert model_check.learning(policy, source, trainable, inputs, timed=True).holds
        assert digest(policy.vlm.state_dict()) == before
    assert not any(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("family", "tokens"), [("git", 17), ("kosmos2", 64), ("mllama", 20), ("blip2", 4)]
)  # in front of the prompt, in it under another name, in cross-attention, and queries
def test_image_tokens_of_other_kinds(family, tokens, families):
    env = make_env("manako/GoTo-v0", 1)
    shown = model_check.Shown(env.action_names, env.frame_shape, env.reset(), None)
    policy = load_policy(PolicySource(str(families / family)), env.action_names, env.frame_shape)
    assert model_check.image_tokens(policy, shown) == tokens


# ---- exit codes ------------------------------------------------------------------------------------------------------


def test_one_bad_model_does_not_end_the_check(families, tmp_path, run, quickly):
    code, out, err = run(tmp_path / "nowhere", families / "git", "--table", tmp_path / "table.md")
    assert code == 2 and err.startswith("error: There is no folder") and len(err.splitlines()) == 1
    assert "family       git, GitForCausalLM; its parts are named by policies/architectures/git.py" in out
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0] == TABLE.begin and rows[-1] == END
    assert rows[3] == "| nowhere | no | no | no | no | no | - |"
    assert rows[4] == "| git | yes | yes | yes | yes | no | nothing |"


def test_a_model_that_is_computed_otherwise(families, run, monkeypatch):
    monkeypatch.setattr(Differences, "hold", False)
    code, out, err = run(families / "llava")
    told = said(out)
    assert (code, err) == (1, "") and list(told) == ["model", "family", "acts"]
    assert told["acts"].startswith("no: LlavaForConditionalGeneration is not computed here as transformers computes it")


def test_a_gradient_that_does_not_arrive(families, run, quickly, monkeypatch):
    """Zeros are none."""
    forward = LlavaMultiModalProjector.forward

    def stopped(self, features):
        visual = forward(self, features)
        return visual.detach() + 0 * visual

    monkeypatch.setattr(LlavaMultiModalProjector, "forward", stopped)
    code, out, _ = run(families / "llava")
    assert code == 1 and said(out)["learns"].splitlines() == [
        "full: language model gets a gradient; no gradient reaches encoder and adapter",
        "adapter: no gradient reaches adapter",
        "lora: LoRA gets a gradient; no gradient reaches adapter",
    ]


def test_a_backward_that_fails(families, run, quickly, monkeypatch):
    forward = LlavaMultiModalProjector.forward
    monkeypatch.setattr(LlavaMultiModalProjector, "forward", lambda self, features: forward(self, features).detach())
    code, out, _ = run(families / "llava")
    full, adapter, _ = said(out)["learns"].splitlines()
    assert code == 1 and full == "full: language model gets a gradient; no gradient reaches encoder and adapter"
    assert adapter.startswith("adapter: no: RuntimeError in a batch of 4: element 0 of tensors does not require grad")


def test_generate_that_does_not_work(families, run, quickly, monkeypatch):
    policy = load_policy(PolicySource(str(families / "llava")), ("up", "down"), (24, 24, 3))

    def generate(*args, **options):
        raise RuntimeError("no cache.\nIt is gone")

    monkeypatch.setattr(type(policy.base_vlm), "generate", generate)
    code, out, _ = run(families / "llava")
    assert code == 1 and said(out)["generate"] == "no: RuntimeError: no cache"


def test_a_part_that_is_not_there_is_a_fault_where_it_was_asked_for(families, run, quickly):
    """Chameleon's image goes into the vocabulary: there is no adapter."""
    code, out, _ = run(families / "chameleon")
    assert code == 0 and "\nadapter: no: ChameleonForConditionalGeneration has no module" in said(out)["learns"]
    assert run(families / "chameleon", "--trainable", "adapter")[0] == 1


def test_a_training_that_does_not_fit(families, run, quickly, monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device="cpu": 300 * 1024)
    code, out, _ = run(families / "llava")
    learns = said(out)["learns"].splitlines()
    assert code == 1 and learns[0].startswith("full: no: Training does not fit: with trainable: full, gradients and")
    assert learns[1] == "adapter: adapter gets a gradient"
    assert "steps/s acting" in said(out)["speed"] and "samples/s" not in said(out)["speed"]


@pytest.mark.parametrize("runner, words", [(run_ppo, []), (run_dpo, []), (run_sft, ["--stage", "align"])])
def test_a_training_that_does_not_fit_is_refused(runner, words, tmp_path, monkeypatch, capsys):
    """By the runners themselves, before anything is written."""
    monkeypatch.setattr(room, "free_memory", lambda device="cpu": 64 * 1024)
    words = ["--output_dir", str(tmp_path / "run"), *words]
    monkeypatch.setattr(sys, "argv", ["runner.py", "--policy", "tiny", "--trainable", "adapter", *words])
    with pytest.raises(SystemExit) as stop:
        run_main(runner.main)
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith("error: Training does not fit: with trainable: adapter, gradients and")


def test_a_package_that_is_not_there(families, run, monkeypatch):
    def nothing(*args, **options):
        raise ImportError("LlavaProcessor requires the SentencePiece library but it was not found in your environment.")

    monkeypatch.setattr("manako.policies.library_models.AutoProcessor.from_pretrained", nothing)
    monkeypatch.setattr("manako.policies.library_models.load_without_video", nothing)
    shown = model_check.Shown(("up", "down"), (24, 24, 3), None, None)
    row, code = model_check.check_model(str(families / "llava"), check_model.read_line(["x"]), shown)
    assert code == 2 and row == Row("llava", acts="no", needs="sentencepiece")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: MODELS"),
        (["tiny", "--trainable", "everything"], "trainable is 'everything': expected one of"),
        (["tiny", "--env", "manako/Nowhere-v0"], "Nowhere"),
        (["tiny", "--table", "nowhere/table.md"], "The folder of --table 'nowhere/table.md' does not exist"),
        (["tiny", "--seed", "1"], "There is no flag --seed"),
    ],
)
def test_a_command_line_that_cannot_be_used(words, expected, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words)
    assert code == 2 and expected in err and len(err.splitlines()) == 1


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_table_replaces_what_stands_between_its_markers(tmp_path):
    path = tmp_path / "table.md"
    rows = [Row("one", "yes"), Row("two", "no")]
    TABLE.check(str(path))
    TABLE.write(path, rows[:1])
    assert path.read_text() == TABLE.text(rows[:1])
    path.write_text(f"# Before\n\n{path.read_text()}\nAfter\n")
    TABLE.check(str(path))
    TABLE.write(path, rows)
    assert path.read_text() == f"# Before\n\n{TABLE.text(rows)}\nAfter\n"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists and holds no lines"):
        TABLE.check(str(path))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="the table says what holds without torchvision")
def test_the_table_in_the_docs(families, run, quickly, monkeypatch, tmp_path):
    """What the command writes now, of each family; and the excerpt, less the lines that hold times and free memory."""
    monkeypatch.chdir(families.parent)
    monkeypatch.setattr(model_check, "acting_rate", lambda *args: 1.0)
    monkeypatch.setattr(model_check, "update_rate", lambda *args: 1.0)
    text = DOCS.read_text()
    (tmp_path / "models.md").write_text(text)
    _, out, _ = run(*sorted(f"families/{name}" for name in FAMILIES), "--table", tmp_path / "models.md")
    assert (tmp_path / "models.md").read_text() == text, "write it again, by the commands that stand in it"
    excerpt = next(block for block in re.findall(r"^```\n(.*?)^```$", text, re.S | re.M) if block.startswith("model "))
    assert list(said(excerpt)) == HEADINGS
    lines = [line for line in excerpt.splitlines() if line.split()[0] not in ("acts", "memory", "speed")]
    assert "\n".join(lines[:3]) in out and [line for line in lines if line not in out.splitlines()] == []
