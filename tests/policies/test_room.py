"""What a model takes: known of its configuration alone, counted by hand here, and refused before a weight is read."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from manako.policies import PolicySource, load_policy, room
from manako.policies.architectures import name_parts
from manako.policies.errors import PolicyError
from manako.policies.library_models import load_config, load_library_model, load_processor
from manako.policies.trainable import set_trainable
from tests.helpers.foreign_models import FRAME, NAMES, frames, llava_folder

GIB = 2**30
LARGE = {  # of LLaVA's text part, as in Llama 70B
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llava_folder(tmp_path_factory.mktemp("room") / "llava")


@pytest.fixture
def free(monkeypatch):
    """Says how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(room, "free_memory", lambda device="cpu": count)

    return set_free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["full", "adapter", "lora", "encoder+lora"])
def test_a_configuration_says_what_its_model_needs(folder, trainable, dtype):
    """The same bytes as those of the loaded model, counted by hand."""
    config = load_config(str(folder))
    empty = room.without_weights(config, dtype)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    marked = set_trainable(name_parts(empty, load_processor(str(folder), config)), trainable, 4).vlm
    loaded = set_trainable(load_library_model(str(folder), dtype), trainable, 4).vlm
    size = {torch.float32: 4, torch.bfloat16: 2}
    weights = sum(parameter.numel() * size[parameter.dtype] for parameter in loaded.parameters())
    learning = sum(p.numel() * size[p.dtype] for p in loaded.parameters() if p.requires_grad)
    assert room.needed(loaded) == (weights, learning, 2 * learning) and 0 < learning <= weights
    assert room.needed(marked) == room.needed(loaded) and room.needed(loaded).training == 3 * learning


def test_tied_weights_count_once(folder):
    config = load_config(str(folder))
    apart = room.needed(room.without_weights(config, torch.float32)).weights
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    tied = room.needed(room.without_weights(config, torch.float32)).weights
    assert apart - tied == 4 * config.text_config.vocab_size * config.text_config.hidden_size


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(folder, tmp_path, free):
    """70 billion parameters, of which there is a config.json and no file of weights."""
    for path in folder.iterdir():
        if not path.name.startswith("model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {**LARGE, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    count = sum(
        p.numel() for p in room.without_weights(AutoConfig.from_pretrained(tmp_path), torch.float32).parameters()
    )
    assert 70e9 < count < 72e9
    free(24 * GIB)
    start = time.perf_counter()
    with pytest.raises(PolicyError) as refused:
        load_policy(PolicySource(str(tmp_path)), NAMES, FRAME)
    assert time.perf_counter() - start < 3
    needed = f"{4 * count / GIB:.1f} GiB in float32, and 24.0 GiB of memory are free on this machine"
    assert f"The weights of {str(tmp_path)!r} do not fit: they need {needed}" in str(refused.value)
    assert "expected a smaller model, or a machine with more memory" in str(refused.value)
    free(200 * GIB)
    with pytest.raises(PolicyError, match=rf"expected --dtype bfloat16 \({2 * count / GIB:.1f} GiB\), a smaller model"):
        load_policy(PolicySource(str(tmp_path)), NAMES, FRAME)
    with pytest.raises(PolicyError, match="holds no model.safetensors"):  # it would fit
        load_policy(PolicySource(str(tmp_path), dtype="bfloat16"), NAMES, FRAME)


def test_the_last_byte(folder, free):
    weights = room.needed(load_library_model(str(folder), torch.float32).vlm).weights
    free(weights)
    load_library_model(str(folder), torch.float32)
    free(weights - 1)
    with pytest.raises(PolicyError, match="do not fit"):
        load_library_model(str(folder), torch.float32)
    load_library_model(str(folder), torch.bfloat16)


def test_what_a_configuration_does_not_say_is_not_refused(folder, free):
    free(1)
    config = load_config(str(folder))
    with pytest.raises(PolicyError):
        room.check_room("it", config, torch.float32)
    config.quantization_config = {"bits": 4}
    room.check_room("it", config, torch.float32)


def test_a_model_that_does_not_fit_on_the_gpu(folder, free):
    model = load_library_model(str(folder), torch.float32).vlm
    free(room.needed(model).weights - 1)
    room.check_place(model, "it", "cpu")  # where it is
    half = room.in_words(room.needed(model).weights / 2)
    with pytest.raises(PolicyError, match=rf"of memory are free on cuda; expected --dtype bfloat16 \({half}\)"):
        room.check_place(model, "it", "cuda")


@pytest.mark.parametrize("trainable, advice", [("full", "--trainable lora or adapter, --dtype"), ("lora", "--dtype")])
def test_a_training_that_cannot_fit(folder, trainable, advice, free):
    policy = load_policy(PolicySource(str(folder), trainable=trainable), NAMES, FRAME)
    learning = sum(4 * parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    free(3 * learning)
    room.check_training_room(policy, trainable, "cpu")
    free(3 * learning - 1)
    with pytest.raises(PolicyError) as refused:
        room.check_training_room(policy, trainable, "cpu")
    assert f"need {room.in_words(3 * learning)} beside the weights" in str(refused.value)
    assert f"expected {advice}" in str(refused.value)


@torch.no_grad()
def test_cache_and_rows_by_hand(folder):
    policy = load_policy(PolicySource(str(folder)), NAMES, FRAME)
    text = policy.config.text_config
    head = text.hidden_size // text.num_attention_heads
    a_token = text.num_hidden_layers * 2 * text.num_key_value_heads * head * 4
    assert room.cache_bytes(policy.reading.run_prefix()) == a_token * len(policy.reading.prefix_ids)
    rows = policy.prepare(frames(2), ["go", "go up"])
    longest = len(policy.prompt_tokens("go up"))
    assert room.row_bytes(rows) == 8 * longest + 8 + 32 * 32 * 3  # ids, their number, the frame as uint8


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_within_the_containers_limit(version, tmp_path, monkeypatch):
    """4 GiB at the job, of which 3 are used and 1 of these can be given back; no limit at the step inside it."""
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * GIB))
    assert room.free_memory() == 16 * GIB
    limit, use, given_back = room.CGROUP_FILES[2 - version]
    job = tmp_path / ("" if version == 2 else "memory") / "job"
    (job / "step").mkdir(parents=True)
    (tmp_path / "own").write_text({1: "5:cpu:/other\n4:memory:/job/step\n", 2: "0::/job/step\n"}[version])
    (job / "step" / limit).write_text("max\n" if version == 2 else str(2**63 - 4096))
    (job / limit).write_text(f"{4 * GIB}\n")
    for folder in (job, job / "step"):
        (folder / use).write_text(f"{3 * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{given_back} {GIB}\n")
    assert room.free_memory() == 2 * GIB


def test_this_machine():
    assert 2**20 < room.free_memory() < 2**50


@pytest.mark.parametrize(
    "count, words",
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 * GIB, "3.0 GiB"), (2**50, "1.0 PiB")],
)
def test_bytes_in_words(count, words):
    assert room.in_words(count) == words
