"""Policies on disk: what is loaded is what was saved, or one sentence says why not."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from manako.manifest import write_manifest
from manako.policies import PolicyError, PolicySource, load_policy, save_policy
from manako.policies.saving import POLICY_FILE, VALUE_HEAD_FILE, digest, learned, load_weights
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, TURNS, frames, llava_folder, text_folder

TRAINABLE = ("full", "adapter", "lora")
WEIGHTS = {"full": "model.safetensors", "adapter": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(llava_folder(tmp_path_factory.mktemp("llava")))


@pytest.fixture(params=["tiny", "llava"])
def base(request, llava):
    return request.param if request.param == "tiny" else llava


def trained(source, names=NAMES, steps=2):
    """A policy whose every learning weight has moved."""
    policy = load_policy(source, names, FRAME)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.value_head.out.weight)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        logprobs, values = policy.distribution(inputs)
        optimizer.zero_grad()
        (values.sub(1).square().mean() - logprobs[:, 0].mean()).backward()
        optimizer.step()
    return policy


def saved(policy, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_policy(policy, folder)
    return folder


@torch.no_grad()
def answers(policy):
    logprobs, values = policy.distribution(policy.prepare(frames(3), INSTRUCTIONS))
    return torch.cat([logprobs, values[:, None]], dim=1)


def one_sentence(caught):
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and message.endswith((".", ")"))
    return message


# ---- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_a_saved_policy_is_the_same_policy(base, trainable, tmp_path):
    policy = trained(PolicySource(policy=base, trainable=trainable))
    folder = saved(policy, tmp_path / "policy")
    loaded = load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)
    assert torch.equal(answers(loaded), answers(policy))
    assert not torch.allclose(answers(load_policy(PolicySource(policy=base), NAMES, FRAME)), answers(policy), atol=1e-3)
    assert digest(learned(loaded)) == digest(learned(policy))
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = load_policy(PolicySource(policy=str(saved(loaded, tmp_path / "again")), trainable=trainable), NAMES, FRAME)
    assert torch.equal(answers(again), answers(policy))


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_weights_return_into_the_same_policy(base, trainable, tmp_path):
    source = PolicySource(policy=base, trainable=trainable)
    policy = trained(source)
    folder, expected = saved(policy, tmp_path), answers(policy)
    other = trained(source, steps=4)
    assert not torch.allclose(answers(other), expected, atol=1e-3)
    load_weights(other, folder)
    assert torch.equal(answers(other), expected)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_tied_weights_return(kind, tmp_path):
    source = PolicySource(language_model=str(text_folder(tmp_path / "text", kind)))
    policy = trained(source)
    folder = saved(policy, tmp_path / "policy")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    other = load_policy(source, NAMES, FRAME)
    load_weights(other, folder)
    for either in (loaded, other):
        assert torch.equal(answers(either), answers(policy))
        assert either.vlm.lm_head.weight is either.vlm.get_input_embeddings().weight


@pytest.mark.parametrize("trainable", ["full", "adapter"])
def test_lora_merges_into_the_whole_model(base, trainable, tmp_path):
    policy = trained(PolicySource(policy=base, trainable="lora", lora_rank=4))
    folder = saved(policy, tmp_path / "lora")
    merged = load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)
    assert not merged.has_lora
    assert torch.allclose(answers(merged), answers(policy), atol=1e-4, rtol=1e-5)
    assert merged.origin["source"]["trainable"] == trainable
    whole = load_policy(PolicySource(policy=str(saved(merged, tmp_path / "merged"))), NAMES, FRAME)
    assert torch.equal(answers(whole), answers(merged))


def test_lora_on_a_saved_policy(tmp_path):
    """Full training, then LoRA on its result, moved to another folder: the base is named by its full path."""
    first = saved(trained(PolicySource()), tmp_path / "first")
    policy = trained(PolicySource(policy=str(first), trainable="lora", lora_rank=2, lora_alpha=6))
    with policy.as_reference():
        reference = answers(policy)
    assert torch.equal(reference[:, :4], answers(load_policy(PolicySource(policy=str(first)), NAMES, FRAME))[:, :4])
    second = saved(policy, tmp_path / "second")
    moved = shutil.move(second, tmp_path / "elsewhere")
    loaded = load_policy(PolicySource(policy=str(moved), trainable="lora"), NAMES, FRAME)
    assert torch.equal(answers(loaded), answers(policy))
    assert loaded.vlm.peft_config["default"].r == 2 and loaded.origin == policy.origin
    shutil.rmtree(first)
    with pytest.raises(PolicyError, match="The base of the LoRA weights in .* cannot be loaded: .*first") as caught:
        load_policy(PolicySource(policy=str(moved), trainable="lora"), NAMES, FRAME)
    one_sentence(caught)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_half_precision(trainable, tmp_path):
    policy = trained(PolicySource(dtype="bfloat16", trainable=trainable))
    folder = saved(policy, tmp_path)
    source = PolicySource(policy=str(folder), dtype="bfloat16", trainable=trainable)
    assert torch.equal(answers(load_policy(source, NAMES, FRAME)), answers(policy))
    single = load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}
    assert torch.allclose(answers(single), answers(policy), atol=0.5)
    if trainable == "lora":
        with pytest.raises(PolicyError, match="belong to a bfloat16 model: expected dtype: bfloat16, or trainable"):
            load_policy(PolicySource(policy=str(folder), trainable="lora"), NAMES, FRAME)


def test_a_folder_brings_its_prompt(tmp_path):
    system = "Moves: {actions}!"
    policy = trained(PolicySource(system=system, action_format="trie"))
    folder = saved(policy, tmp_path)
    loaded = load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    assert loaded.spec == policy.spec and torch.equal(answers(loaded), answers(policy))
    asked = PolicySource(policy=str(folder), system="Other: {actions}", action_format="choice")
    other = load_policy(asked, NAMES, FRAME)
    assert other.spec.system == "Other: {actions}" and other.codec.format == "choice"
    # with the actions of another environment the format is chosen anew
    turns = load_policy(PolicySource(policy=str(folder)), TURNS, FRAME)
    assert turns.spec.system == system and turns.codec.format == "choice"


def test_a_folder_serves_other_frames(tmp_path):
    folder = saved(trained(PolicySource()), tmp_path)
    policy = load_policy(PolicySource(policy=str(folder)), NAMES, (48, 64, 3))
    policy.distribution(policy.prepare(frames(2, (48, 64, 3)), ["go", "go"]))


def test_a_preset_is_no_folder(tmp_path, monkeypatch):
    """A folder that happens to have a preset's name is not looked at."""
    saved(trained(PolicySource(seed=3)), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    policy = load_policy(PolicySource(), NAMES, FRAME)
    assert policy.origin["source"]["policy"] == "tiny"
    assert torch.equal(answers(policy)[:, 4], torch.zeros(3))
    relative = load_policy(PolicySource(policy="./tiny"), NAMES, FRAME)
    assert relative.origin["source"]["policy"] == str((tmp_path / "tiny").resolve())


def test_policy_json_is_written_in_plain_words(tmp_path):
    folder = saved(trained(PolicySource(trainable="lora")), tmp_path)
    description = json.loads((folder / POLICY_FILE).read_text())
    assert description["action_names"] == list(NAMES) and description["frame_shape"] == list(FRAME)
    assert (description["format"], description["action_format"]) == (1, "token")
    assert description["source"]["policy"] == "tiny" and len(description["base_sha256"]) == 64
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_library_loads_the_folder(trainable, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from manako.policies.architectures.composed.build import build_vlm

    policy = trained(PolicySource(trainable=trainable))
    folder = saved(policy, tmp_path)
    if trainable == "lora":
        model = PeftModel.from_pretrained(build_vlm("vit", "mlp", "tiny-llama", FRAME)[0], str(folder))
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder)
    policy_model = {name: tensor for name, tensor in policy.vlm.state_dict().items()}
    assert all(torch.equal(tensor, policy_model[name]) for name, tensor in model.state_dict().items())
    assert type(AutoProcessor.from_pretrained(folder)) is type(policy.processor)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_loading_and_saving_are_silent(base, trainable, tmp_path, capfd, caplog, recwarn):
    from transformers.utils import logging as library

    library.enable_progress_bar()  # a runner in this process may have turned them off
    library.set_verbosity_warning()
    source = PolicySource(policy=base, trainable=trainable)
    folder = saved(load_policy(source, NAMES, FRAME), tmp_path)
    load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list
    assert library.is_progress_bar_enabled() and library.get_verbosity() == logging.WARNING


# ---- what cannot be loaded ---------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def drop(path, name=""):
    tensors = load_file(path)
    del tensors[next(key for key in sorted(tensors) if name in key)]
    save_file(tensors, path, metadata={"format": "pt"})


def widen(path):
    twice = {key: torch.cat([value, value]) for key, value in load_file(path).items()}
    save_file(twice, path, metadata={"format": "pt"})


def change(**changes):
    def write(path):
        description = json.loads(path.read_text())
        path.write_text(json.dumps({**description, **changes}))

    return write


DAMAGES = [
    ("WEIGHTS", cut, "(cannot be read|No vision-language model at)"),
    ("WEIGHTS", flip, "are not the ones that policy.json names|are not the saved ones"),
    ("WEIGHTS", drop, "lacks 1 of the model's weights|are not the ones|do not fit|adapter.down.bias is missing"),
    ("WEIGHTS", widen, "in another shape|cannot be read|do not fit"),
    ("WEIGHTS", lambda path: path.unlink(), "which has to be there|cannot be read|do not fit"),
    (VALUE_HEAD_FILE, lambda path: path.unlink(), "value_head.safetensors(, which has to be there| cannot be read)"),
    (VALUE_HEAD_FILE, cut, "value_head.safetensors cannot be read"),
    (VALUE_HEAD_FILE, flip, "are not the ones that policy.json names|are not the saved ones"),
    (VALUE_HEAD_FILE, drop, "are not the ones that policy.json names|do not fit this policy"),
    (POLICY_FILE, lambda path: path.write_text("{"), "policy.json is damaged .*: use another checkpoint"),
    (POLICY_FILE, lambda path: path.write_text("[]"), "policy.json is damaged"),
    (POLICY_FILE, change(format=2), "policy.json is damaged \\(format 2, this version reads 1\\)"),
    (POLICY_FILE, change(source={"polcy": "tiny"}), "policy.json is damaged"),
    (POLICY_FILE, change(source=None), "policy.json is damaged"),
    (POLICY_FILE, change(learned_sha256=None), "policy.json is damaged"),
    (POLICY_FILE, change(learned_sha256="0" * 64), "are not the ones that policy.json names|are not the saved ones"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return {trainable: saved(trained(PolicySource(trainable=trainable)), folder / trainable) for trainable in TRAINABLE}


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize(("file", "damage", "sentence"), DAMAGES)
def test_damage_is_named(file, damage, sentence, trainable, originals, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(originals[trainable], folder)
    damage(folder / (WEIGHTS[trainable] if file == "WEIGHTS" else file))
    write_manifest(folder)  # what follows is what else is looked at; tests/test_manifest.py damages without it
    with pytest.raises(PolicyError, match=sentence) as caught:
        load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)
    assert str(folder) in one_sentence(caught)
    policy = load_policy(PolicySource(trainable=trainable), NAMES, FRAME)
    with pytest.raises(PolicyError, match=sentence) as caught:
        load_weights(policy, folder)
    assert str(folder) in one_sentence(caught)


def test_weights_of_other_settings_are_refused(originals):
    for source, folder in (
        (PolicySource(trainable="adapter"), originals["full"]),  # another set of weights learns
        (PolicySource(adapter="linear"), originals["full"]),
        (PolicySource(patch_size=16), originals["full"]),
        (PolicySource(trainable="lora", lora_rank=4), originals["lora"]),
        (PolicySource(trainable="lora"), originals["full"]),
        (PolicySource(trainable="full"), originals["lora"]),
    ):
        with pytest.raises(PolicyError, match="use the settings of its run|cannot be read") as caught:
            load_weights(load_policy(source, NAMES, FRAME), folder)
        one_sentence(caught)


def test_lora_on_another_base_is_refused(originals, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(originals["lora"], folder)
    description = json.loads((folder / POLICY_FILE).read_text())
    description["source"]["seed"] = 1
    (folder / POLICY_FILE).write_text(json.dumps(description))
    write_manifest(folder)
    for trainable in TRAINABLE:
        with pytest.raises(PolicyError, match="belong to another base model than 'tiny' gives here") as caught:
            load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)
        one_sentence(caught)


def test_a_damaged_lora_configuration(originals, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(originals["lora"], folder)
    for content in ("{", "{}", '{"peft_type": "LORA", "r": 3}'):
        (folder / "adapter_config.json").write_text(content)
        write_manifest(folder)
        with pytest.raises(PolicyError, match=r"cannot be read|are not the ones|is damaged") as caught:
            load_policy(PolicySource(policy=str(folder), trainable="lora"), NAMES, FRAME)
        one_sentence(caught)


def test_places_without_a_policy(tmp_path):
    (tmp_path / "empty").mkdir()
    text = text_folder(tmp_path / "text", "llama")
    damaged = text_folder(tmp_path / "damaged", "llama")
    (damaged / "config.json").write_text("{")
    unknown = tmp_path / "unknown"
    shutil.copytree(text, unknown)
    (unknown / "config.json").write_text('{"model_type": "no_such_model"}')
    for name, sentence in (
        ("tinny", "No vision-language model at 'tinny': expected a preset (tiny, smollm2"),
        ("nobody/no-such-model", "No vision-language model at 'nobody/no-such-model'"),
        ("./nowhere", "There is no folder './nowhere' ("),
        ("/no/such/folder", "There is no folder '/no/such/folder' ("),
        (str(tmp_path / "empty"), "holds no config.json: expected a model folder or a run's checkpoint"),
        (str(text), "is a llama, which transformers does not know as a vision-language model"),
        (str(damaged), "cannot be read (Expecting property name"),
        (str(unknown), "No vision-language model at"),
        (str(text / "config.json"), "is a file: expected a preset (tiny, smollm2"),
    ):
        with pytest.raises(PolicyError) as caught:
            load_policy(PolicySource(policy=name), NAMES, FRAME)
        assert sentence in one_sentence(caught), name


def test_a_folder_that_lacks_weights_is_refused(llava, tmp_path):
    """The library would draw them at random and go on."""
    folder = tmp_path / "llava"
    shutil.copytree(llava, folder)
    drop(folder / "model.safetensors", "multi_modal_projector")
    with pytest.raises(PolicyError, match="lacks 1 of the model's weights, such as .*multi_modal_projector") as caught:
        load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    one_sentence(caught)


def test_settings_that_do_not_fit(llava):
    for source, sentence in (
        (PolicySource(dtype="float16"), "dtype is 'float16': expected one of float32, bfloat16"),
        (PolicySource(trainable="all"), "trainable is 'all': expected one of full, adapter, lora"),
        (
            PolicySource(action_format="word"),
            "action_format is 'word': expected one of auto, token, place, choice, trie",
        ),
        (PolicySource(policy=llava, vision_encoder="vit"), "vision_encoder came for "),
        (PolicySource(policy=llava, patch_size=8), "only a preset (tiny, smollm2"),
    ):
        with pytest.raises(PolicyError) as caught:
            load_policy(source, NAMES, FRAME)
        assert sentence in one_sentence(caught)


@pytest.mark.parametrize("whole", ["ours", "llava"])
def test_the_encoder_of_a_whole_vlm_serves_another_policy(whole, llava, tmp_path):
    folder = llava
    if whole == "ours":
        folder = str(tmp_path)
        save_policy(trained(PolicySource()), tmp_path)
    theirs = load_policy(PolicySource(policy=folder), NAMES, FRAME).base_vlm.model.vision_tower.state_dict()
    mine = load_policy(PolicySource(vision_encoder=folder, seed=5), NAMES, FRAME)
    tower = mine.base_vlm.model.vision_tower.state_dict()
    assert len(tower) > 10 and all(torch.equal(tower[name], theirs[name]) for name in tower)
    assert mine.distribution(mine.prepare(frames(2), INSTRUCTIONS[:2]))[0].isfinite().all()


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_what_an_adapter_was_fitted_to_is_saved(trainable, tmp_path):
    source = PolicySource(adapter="mlp_zscore", trainable=trainable)
    policy, plain = (load_policy(source, NAMES, FRAME) for _ in range(2))
    assert policy.fit_adapter(frames(5)) and not policy.fit_adapter(frames(2))  # once
    with torch.no_grad():
        pixels = policy.processing.pipeline.pixels(policy.processing.pipeline.resize(frames(5)))
        features = policy.base_vlm.model.get_vision_features(**pixels)
    fitted = [buffer for name, buffer in policy.named_buffers() if name.endswith("feature_mean") and buffer.any()]
    assert len(fitted) == 1  # with LoRA, the copy that learns
    torch.testing.assert_close(fitted[0], features.mean((0, 1)))
    assert (answers(policy) - answers(plain)).abs().max() > 1e-3
    if trainable == "lora":
        with policy.as_reference():
            assert torch.equal(answers(policy), answers(plain))
    folder = saved(policy, tmp_path / "policy")
    loaded = load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)
    assert torch.equal(answers(loaded), answers(policy)) and not loaded.fit_adapter(frames(2))
    load_weights(plain, folder)
    assert torch.equal(answers(plain), answers(policy))
    file = folder / WEIGHTS[trainable]
    weights = load_file(file)
    key = next(name for name in weights if name.endswith("feature_std"))
    save_file({**weights, key: 2 * weights[key]}, file, metadata={"format": "pt"})
    write_manifest(folder)
    with pytest.raises(PolicyError, match="not the ones that policy.json names"):
        load_policy(PolicySource(policy=str(folder), trainable=trainable), NAMES, FRAME)


def test_a_frozen_adapter_stays_unfitted():
    policy = load_policy(PolicySource(adapter="mlp_zscore", trainable="encoder"), NAMES, FRAME)
    before = answers(policy)
    assert not policy.fit_adapter(frames(5)) and torch.equal(answers(policy), before)


def test_the_folder_of_a_part_is_found_from_elsewhere(tmp_path, monkeypatch):
    saved(trained(PolicySource()), tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    policy = load_policy(PolicySource(vision_encoder="encoder", trainable="lora"), NAMES, FRAME)
    folder = saved(policy, tmp_path / "lora")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(
        answers(load_policy(PolicySource(policy=str(folder), trainable="lora"), NAMES, FRAME)), answers(policy)
    )
