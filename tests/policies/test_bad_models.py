"""Folders and names that are no policy: each ends in one sentence that says what came and what to do.

Faults are set into tiny folders of several families. No code of a folder runs, nobody is asked anything, and nothing is
asked of the Hub for a name that is a path.
"""

import builtins
import json
import shutil
import sys

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from manako.experiments import run_ppo
from manako.experiments.common.command_line import run_main
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.pretrained import missing_package
from tests.helpers.families.common import edit_json
from tests.helpers.families.queries_and_cross_attention import QUERIES_AND_CROSS_ATTENTION
from tests.helpers.families.token_stream import TOKEN_STREAM
from tests.helpers.foreign_models import NAMES, text_folder, vision_folder

FAMILIES = {**TOKEN_STREAM, **QUERIES_AND_CROSS_ATTENTION}
FRAME = (24, 24, 3)
PARTS = ("preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja")
TOKENS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CODE = "raise SystemExit('custom code ran')\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of families, each made once."""
    folders = {}

    def make(family):
        if family not in folders:
            folders[family] = FAMILIES[family](tmp_path_factory.mktemp(family) / "model")
        return folders[family]

    return make


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    """Nothing is asked on stdin; transformers swallows what `input` raises."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "n")
    yield
    assert not asked


def sentence(name, frame=FRAME, **settings) -> str:
    """The one sentence that loading ends in."""
    with pytest.raises(PolicyError) as caught:
        load_policy(PolicySource(policy=str(name), **settings), NAMES, frame)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and said.endswith("."), said
    return said


def remove(file):
    return lambda folder: (folder / file).unlink()


def write(file, content):
    return lambda folder: (folder / file).write_text(content)


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-40])


def sparse(file):
    """4 GiB of nothing, which take no room on the disk."""

    def change(folder):
        with (folder / file).open("wb") as opened:
            opened.write(b"{")
            opened.truncate(2**32)

    return change


def dangling(file):
    def change(folder):
        (folder / file).unlink()
        (folder / file).symlink_to("../../blobs/none")

    return change


def config(**entries):
    return lambda folder: edit_json(folder, "config.json", **entries)


def text_config(**entries):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        edit_json(folder, "config.json", text_config={**content["text_config"], **entries})

    return change


def weights(change_of):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change_of(tensors), folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without_first(tensors):
    tensors.pop(min(tensors))
    return tensors


def first_as(value):
    return lambda tensors: {**tensors, min(tensors): value(tensors[min(tensors)])}


def further_layer(tensors):
    layer = next(name for name in tensors if ".layers.1." in name)
    return {**tensors, layer.replace(".layers.1.", ".layers.7."): tensors[layer].clone()}


def lost_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")


def image(**entries):
    """Settings of the image processor, wherever they stand."""

    def change(folder):
        file = folder / "preprocessor_config.json"
        if file.is_file():
            return edit_json(folder, file.name, **entries)
        whole = json.loads((folder / "processor_config.json").read_text())
        return edit_json(folder, "processor_config.json", image_processor={**whole["image_processor"], **entries})

    return change


def custom(file, *classes, **entries):
    def change(folder):
        known = {**({} if not (folder / file).is_file() else json.loads((folder / file).read_text())), **entries}
        (folder / file).write_text(json.dumps({**known, "auto_map": dict.fromkeys(classes, "evil.Evil")}))
        (folder / "evil.py").write_text(CODE)

    return change


def template(text):
    def change(folder):
        (folder / "chat_template.json").unlink(missing_ok=True)
        (folder / "chat_template.jinja").write_text(text)

    return change


IMAGES = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else IMAGES }}"
IMAGES += "{% endfor %}{% endfor %}"
EVIL = "brings custom code, which is not run here"
WHOLE = "expected a whole model folder; copy or download it again"
TEMPLATE = "expected all of them; correct chat_template.jinja"
FAULTS = {  # what is done to a folder, families, what the sentence says
    "no config": (remove("config.json"), "llava kosmos2", "holds no config.json"),
    "no weights": (remove("model.safetensors"), "llava florence2", "holds no model.safetensors"),
    "no tokenizer": (remove("tokenizer.json"), "qwen2_5_vl blip2_t5", "holds no tokenizer.json"),
    "no tokenizer settings": (remove("tokenizer_config.json"), "idefics2 pixtral", "holds no tokenizer_config.json"),
    "no image processor": (remove("preprocessor_config.json"), "llava smolvlm", "holds no preprocessor_config.json"),
    "cut weights": (cut("model.safetensors"), "llava blip2_t5", "model.safetensors in "),
    "cut tokenizer": (cut("tokenizer.json"), "gemma3 internvl", "tokenizer.json in "),
    "empty template": (write("chat_template.jinja", ""), "qwen2_5_vl", f"is empty: {WHOLE}"),
    "settings a list": (write("generation_config.json", "[1]"), "llava florence2", f"is no JSON object: {WHOLE}"),
    "settings cut": (write("generation_config.json", "{"), "florence2", "generation_config.json in "),
    "link to nothing": (dangling("tokenizer.json"), "llava", f"is a link to nothing: {WHOLE}"),
    "Git LFS": (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "llava", "`git lfs pull`"),
    "a weight less": (weights(without_first), "llava qwen2_5_vl florence2", "lacks 1 of the model's weights"),
    "another shape": (weights(first_as(lambda t: torch.zeros(3, 5))), "llava", "in another shape, such as"),
    "further layers": (weights(further_layer), "llava smolvlm", "holds layers that its config.json does not name"),
    "weights of int8": (weights(first_as(lambda t: t.to(torch.int8))), "llava", "holds I8: quantized weights cannot"),
    "quantized": (
        config(quantization_config={"quant_method": "gptq"}),
        "gemma3",
        "quantized weights cannot be trained",
    ),
    "weights not finite": (weights(first_as(lambda t: t * torch.nan)), "llava", "makes numbers that are not finite"),
    "weights of 0": (
        weights(lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}),
        "llava kosmos2",
        "makes the same of every image",
    ),
    "a lost shard": (lost_shard, "llava", "names weights in model-00002-of-00002.safetensors, which is not there"),
    "another image token": (config(image_token_index=7), "llava blip2_t5", "holds no token 7, which"),
    "image token a text": (config(image_token_id="7"), "qwen2_5_vl", "expected int, got str"),
    "unknown kind": (config(model_type="no_such"), "llava", "does not recognize this architecture"),
    "a billion layers": (
        text_config(num_hidden_layers=10**9),
        "llava qwen2_5_vl",
        "and no more than 4,096 modules are",
    ),
    "a vocabulary of billions": (text_config(vocab_size=10**10), "llava", "do not fit: they need 2.3 TiB"),
    "a width of millions": (text_config(intermediate_size=10**9), "llava", "do not fit: they need "),
    "a number of 50 digits": (text_config(hidden_size=10**50), "llava", "a number has 51 digits"),
    "a number of 5,000 digits": (
        write("config.json", '{"a": ' + "9" * 5_000 + "}"),
        "llava",
        "a number has 5,000 digits",
    ),
    "deep settings": (write("generation_config.json", "[" * 5_000 + "]" * 5_000), "llava", "nested more than 100 deep"),
    "deep tokenizer": (write("tokenizer.json", '{"a":' * 5_000 + "1" + "}" * 5_000), "llava", "nested more than 100"),
    "a list of settings": (write("preprocessor_config.json", "[{}]"), "llava", f"is no JSON object: {WHOLE}"),
    "a list of a tokenizer": (write("tokenizer_config.json", "[{}]"), "llava", f"is no JSON object: {WHOLE}"),
    "a key with two values": (write("config.json", '{"a": 1, "a": 2}'), "llava", "'a' stands there twice, with two"),
    "gigabytes of JSON": (
        sparse("tokenizer.json"),
        "llava",
        "is 4,294,967,296 bytes long, and no more than 134,217,728",
    ),
    "gigabytes of template": (sparse("chat_template.jinja"), "llava", "is 4,294,967,296 bytes long"),
    "frames of a million pixels a side": (
        image(size={"height": 10**6, "width": 10**6}),
        "llava gemma3",
        "a side are read",
    ),
    "no layers": (text_config(num_hidden_layers=-2), "llava", "copy or download the folder again"),
    "heads of 0": (text_config(num_attention_heads=0), "llava qwen2_5_vl", "by zero"),
    "a larger vocabulary": (text_config(vocab_size=90_000), "llava", "tokens, but the model knows 90000"),
    "code of a model": (
        custom("config.json", "AutoConfig", "AutoModelForImageTextToText", model_type="evil"),
        "llava florence2",
        EVIL,
    ),
    "code of a processor": (
        custom("processor_config.json", "AutoProcessor", processor_class="EvilProcessor"),
        "llava qwen2_5_vl",
        EVIL,
    ),
    "template broken": (template("{% for x in"), "llava qwen2_5_vl kosmos2", TEMPLATE),
    "template divides": (template("{{ 1 / 0 }}"), "gemma3 blip2_t5", f"it says 'division by zero'): {TEMPLATE}"),
    "template without end": (template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), "llava", "recursion depth"),
    "template without an image": (template(IMAGES.replace("IMAGES", "''")), "llava", "it gives 0 places for an image"),
    "template of two": (template(IMAGES.replace("IMAGES", "'<image><image>'")), "llava", "2 places for an image"),
    "template without text": (template("<image>"), "llava", "it gives no system text and no instruction"),
    "size 0": (image(size={"height": 0, "width": 0}), "gemma3 internvl", "size height 0 width 0"),
    "size a text": (image(size="large"), "llava smolvlm", "cannot be read (Could not convert size"),
    "no patches": (image(size={"height": 1, "width": 1}, crop_size={"height": 1, "width": 1}), "llava", "no image tok"),
    "size of another": (image(size={"height": 64, "width": 64}), "gemma3", "frames of 24 x 24 pixels (size height 64"),
    "patches of 0": (image(patch_size=0), "qwen2_5_vl", "frames of 24 x 24 pixels"),
    "divided by 0": (image(image_std=[0, 0, 0]), "llava", "an image processor that divides by no 0"),
    "black pixels": (image(rescale_factor=0), "llava blip2_t5", "makes the same of every image"),
}


@pytest.mark.parametrize(
    ("fault", "family"), [(fault, family) for fault, (_, names, _) in FAULTS.items() for family in names.split()]
)
def test_faults(fault, family, made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made(family), folder)
    change, _, expected = FAULTS[fault]
    change(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.exists()}
    assert expected in sentence(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.exists()} == before


@pytest.mark.parametrize(
    ("family", "files", "other", "expected"),
    [
        (
            "llava",
            PARTS + TOKENS,
            "qwen2_5_vl",
            "is a Qwen2_5_VLProcessor, but config.json names a llava, whose is Llava",
        ),
        ("gemma3", PARTS, "llava", "is a LlavaProcessor, but config.json names a gemma3, whose is Gemma3Processor"),
        ("blip2_t5", PARTS, "git", "is a GitProcessor, but config.json names a blip-2, whose is Blip2Processor"),
        ("git", PARTS, "llava", "is a LlavaProcessor, but config.json names a git"),
        ("kosmos2", PARTS, "florence2", "The processor of"),
        ("smolvlm", TOKENS, "llava", "has 429 tokens, but the model knows 338: expected the files of one model"),
        ("qwen2_5_vl", TOKENS, "gemma3", "expected"),
        ("blip2_t5", TOKENS, "git", "expected config.json and processor of one model"),
        ("paligemma", ("model.safetensors",), "llava", "expected config.json and weights of one model"),
        ("llava", ("config.json",), "florence2", "expected"),
        ("pixtral", ("config.json",), "gemma3", "expected"),
    ],
)
def test_parts_of_another_model(family, files, other, expected, made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made(family), folder)
    for file in files:
        (folder / file).unlink(missing_ok=True)
        if (made(other) / file).is_file():
            shutil.copy(made(other) / file, folder / file)
    assert expected in sentence(folder)


def test_code_beside_a_model_that_is_known_does_not_run(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made("llava"), folder)
    for file, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        custom(file, kind)(folder)
    assert load_policy(PolicySource(policy=str(folder)), NAMES, FRAME).checked.hold


@pytest.mark.parametrize("part", ["vision_encoder", "language_model"])
def test_code_of_a_part_does_not_run(part, tmp_path):
    folder = (vision_folder if part == "vision_encoder" else text_folder)(
        tmp_path / "part", "siglip" if part == "vision_encoder" else "llama"
    )
    custom("config.json", "AutoConfig", "AutoModel", "AutoModelForCausalLM", model_type="evil")(folder)
    assert EVIL in sentence("tiny", **{part: str(folder)})
    (folder / "config.json").write_text("{")
    assert "config.json in" in sentence("tiny", **{part: str(folder)})


@pytest.mark.parametrize(
    ("part", "entries", "expected"),
    [
        ("language_model", {"vocab_size": 10**9}, "do not fit: they need "),
        ("language_model", {"intermediate_size": 10**9}, "do not fit: they need "),
        ("language_model", {"num_hidden_layers": 10**9}, "and no more than 4,096 modules are read"),
        ("vision_encoder", {"intermediate_size": 10**9}, "do not fit: they need "),
        ("vision_encoder", {"image_size": 10**6}, "and no more than 16,384 pixels a side are read"),
    ],
)
def test_sizes_of_a_part(part, entries, expected, tmp_path):
    kind, make = ("siglip", vision_folder) if part == "vision_encoder" else ("llama", text_folder)
    folder = make(tmp_path / "part", kind)
    edit_json(folder, "config.json", **entries)
    assert expected in sentence("tiny", **{part: str(folder)})


def test_a_model_that_does_not_go_on_from_a_prompt(made):
    assert "does not go on from a prompt" in sentence(made("blip"))


@pytest.mark.parametrize(
    ("family", "frame", "expected"),
    [
        ("llava", (1, 1, 3), "Frames of 1 x 1 pixels came: expected at least 4 each way"),
        ("gemma3", (500, 3, 3), "Frames of 500 x 3 pixels came"),
        ("mistral3", (8, 8, 3), "of frames of 8 x 8 pixels (size longest_edge 96, patch_size 8"),
        ("pixtral", (2000, 4, 3), "PixtralProcessor does not take frames of 2000 x 4 pixels (size longest_edge 96"),
        ("qwen2_5_vl", (4, 1000, 3), "does not take frames of 4 x 1000 pixels"),
    ],
)
def test_frames(family, frame, expected, made):
    said = sentence(made(family), frame)
    assert expected in said and "give larger frames" in said


PATHS = ("", " ", "./x", "x/y", "x", "~/x", "~nobody/x", "/x", "..\\x", "runs/a/b", "file.txt", "file.txt/x", "link/x")
PATHS += ("a/", "my model", "a" * 300, "no.json", "a--b/c", "-x", "a\0b", "loop", "https://huggingface.co/a/b", "a/é")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that cannot be reached, and what it was asked."""
    asked = []

    def request(self, request, **options):
        asked.append(str(request.url))
        raise ConnectionError("no network here")

    client = type(huggingface_hub.get_session())
    monkeypatch.setattr(client, "send", request)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("flag", ["policy", "vision_encoder", "language_model"])
def test_a_path_is_not_asked_of_the_hub(flag, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in PATHS:
        if name or flag == "policy":  # a part that is empty is the preset's own
            said = sentence(**{"name": "tiny", flag: name}) if flag != "policy" else sentence(name)
            assert "expected" in said and ("folder" in said or "is a file" in said), name
    assert not hub


def test_a_hub_that_cannot_be_reached_is_asked_once(hub):
    said = sentence("nobody/no-such-model")
    assert "No vision-language model at 'nobody/no-such-model': expected a preset" in said and "no network here" in said
    assert len(hub) == 1


def test_the_users_own_folder(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(made("llava"), tmp_path / "model")
    policy = load_policy(PolicySource(policy="~/model"), NAMES, FRAME)
    assert policy.origin["source"]["policy"] == str((tmp_path / "model").resolve())


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("X requires the Torchvision library but it was not found in your environment", "torchvision"),
        ("/a requires `torchvision` to be installed. Please install `torchvision`", "torchvision"),
        ("MarianTokenizer requires the SentencePiece library but it was not found", "sentencepiece"),
        ("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.", "tiktoken"),
        ("requires the following packages that were not found in your environment: timm. Run", "timm"),
        ("Package `num2words` is required. Run: pip install -U num2words>=0.5", "num2words"),
        ("You can update Transformers by pip install git+https://github.com/huggingface/transformers.git", None),
        ("pip install transformers", None),
        ("torchvision is nice", None),
    ],
)
def test_missing_packages_are_named(words, package, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    there = {"torchvision", "sentencepiece", "tiktoken", "timm", "num2words"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in there else found(name))
    error = OSError("cannot load")
    error.__cause__ = ImportError(words)
    assert missing_package(error) == package


@pytest.mark.skipif("torchvision" in sys.modules, reason="torchvision is here")
def test_the_command_for_torchvision_keeps_torch(tmp_path):
    from tests.helpers.families.more import MORE

    version = torch.__version__.split("+")[0]
    assert f"install torchvision (pip install torchvision torch=={version})." in sentence(
        MORE["llama4"](tmp_path / "llama4")
    )


@pytest.mark.parametrize("fault", ["cut weights", "template divides", "code of a model", "another image token"])
def test_runners_end_in_a_sentence(fault, made, tmp_path, monkeypatch, capfd):
    folder, (change, names, expected) = tmp_path / "model", FAULTS[fault]
    shutil.copytree(made(names.split()[0]), folder)
    change(folder)
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["run_ppo.py", "--policy", str(folder), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        run_main(run_ppo.main)
    written = capfd.readouterr()
    lines = [line for line in written.err.splitlines() if line.strip()]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]
    assert "Traceback" not in written.err + written.out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "nearby"),
    [
        ("runs/typo", "no 'runs' in "),
        ("data/goto", "no 'data' in "),
        ("mine/final", "no 'mine' in "),
        ("mine/checkpoint-20", "no 'mine' in "),
        ("GoTo-v0-tiny-seed0-20261126-103000", "no 'GoTo-v0-tiny-seed0-20261126-103000' in "),
        ("made/gotoo", "did you mean 'made/goto'?"),
        ("made/zzz", "made has goto, lake"),
        ("maed/goto/final", "did you mean 'made'?"),
    ],
)
def test_the_hub_is_not_asked_for_what_looks_like_a_run(name, nearby, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *words, **more: asked.append(words) or False)
    monkeypatch.chdir(tmp_path)
    for folder in ("goto", "lake"):
        (tmp_path / "made" / folder).mkdir(parents=True)
    said = sentence(name)
    assert f"There is no folder {name!r}" in said and nearby in said and not asked
