"""What learns: full, adapter and LoRA, on the project's models and on foreign ones."""

import pytest
import torch
from torch import nn

from manako.policies import PolicyError, PolicySource, load_policy, parameter_table, save_policy
from manako.policies.architectures import name_parts
from manako.policies.architectures.composed.build import build_vlm
from manako.policies.reading import SharedPrefix
from manako.policies.trainable import part_of, parts_of, set_trainable
from tests.helpers.foreign_models import (
    FRAME,
    INSTRUCTIONS,
    NAMES,
    TURNS,
    frames,
    idefics3_folder,
    llava_folder,
    text_folder,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny": {},
        "gpt2": {"language_model": str(text_folder(folder / "gpt2", "gpt2"))},
        "llava": {"policy": str(llava_folder(folder / "llava"))},
        "idefics3": {"policy": str(idefics3_folder(folder / "idefics3"))},
    }


ADAPTER_OF = {"tiny": "adapter", "gpt2": "adapter", "llava": "multi_modal_projector", "idefics3": "connector"}
MODELS = tuple(ADAPTER_OF)


def load(sources, model, trainable, names=NAMES, **options):
    return load_policy(PolicySource(**sources[model], trainable=trainable, **options), names, FRAME)


def learning(policy):
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def train_a_little(policy, steps=3):
    """A few optimizer steps that raise the first action's probability and the values."""
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    policy.train()
    for _ in range(steps):
        logprobs, values = policy.distribution(inputs)
        optimizer.zero_grad()
        (values.sub(1).square().mean() - logprobs[:, 0].mean()).backward()
        optimizer.step()
    return inputs


@pytest.mark.parametrize("model", MODELS)
def test_full_trains_everything(model, sources):
    policy = load(sources, model, "full")
    assert learning(policy) == {name for name, _ in policy.named_parameters()}
    assert not policy.has_lora


@pytest.mark.parametrize("model", MODELS)
def test_adapter_trains_the_adapter_alone(model, sources):
    policy = load(sources, model, "adapter")
    assert policy.parts.adapter == (f"model.{ADAPTER_OF[model]}",)
    expected = {name for name, _ in policy.named_parameters() if f".{ADAPTER_OF[model]}." in name}
    assert expected and learning(policy) == expected | {f"value_head.{part}" for part in policy.value_head.state_dict()}
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    train_a_little(policy)
    changed = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and changed <= learning(policy)


@pytest.mark.parametrize("model", MODELS)
def test_lora_trains_the_decoder_by_lora_and_the_adapter(model, sources):
    policy = load(sources, model, "lora", lora_rank=4)
    decoder = policy.base_vlm.get_decoder()
    lora = {name for name in learning(policy) if "lora_" in name}
    in_decoder = {id(parameter) for name, parameter in decoder.named_parameters() if "lora_" in name}
    assert {id(dict(policy.named_parameters())[name]) for name in lora} == in_decoder
    assert not any("vision" in name or "lm_head" in name for name in lora)
    linears = sum(hasattr(module, "lora_A") for module in decoder.modules())
    assert linears == (2 * 4 if model == "gpt2" else 2 * 7) and len(lora) == 2 * linears
    rest = learning(policy) - lora - {f"value_head.{part}" for part in policy.value_head.state_dict()}
    assert rest and all(f".{ADAPTER_OF[model]}.modules_to_save." in name for name in rest)


@pytest.mark.parametrize("model", MODELS)
def test_lora_starts_as_the_base_and_is_the_base_when_off(model, sources):
    base = load(sources, model, "full", TURNS)
    policy = load(sources, model, "lora", TURNS)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    expected = base.distribution(inputs)[0]
    assert torch.equal(policy.distribution(inputs)[0], expected)
    train_a_little(policy)
    with torch.no_grad():
        trained = policy.distribution(inputs)[0]
        assert not torch.allclose(trained, expected, atol=1e-3)
        with policy.as_reference():
            assert torch.equal(policy.distribution(inputs)[0], expected)
        with policy.frozen_weights():  # the kept prefix is the one of the weights in use
            assert torch.equal(policy.distribution(inputs)[0], trained)
            with policy.as_reference():
                assert torch.equal(policy.distribution(inputs)[0], expected)
            assert torch.equal(policy.distribution(inputs)[0], trained)
    assert policy.training and learning(policy) == learning(load(sources, model, "lora", TURNS))


@pytest.mark.parametrize("model", MODELS)
def test_lora_takes_the_short_way_too(model, sources):
    policy = load(sources, model, "lora", TURNS, action_format="trie")
    inputs = train_a_little(policy)
    assert isinstance(policy.reading, SharedPrefix)
    gradients = []
    whole = policy.whole_prompt
    for reading in (policy.reading, whole):
        policy.zero_grad()
        logprobs, values = policy.distribution(inputs, reading)
        (logprobs[:, 1].sum() + values.sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0
        assert (gradients[0][name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora"])
@pytest.mark.parametrize("model", MODELS)
def test_the_parameter_table_adds_up(model, trainable, sources):
    policy = load(sources, model, trainable, lora_rank=2)
    table = {part: (total, learns) for part, total, learns in parameter_table(policy.parts, policy.value_head)}
    lora = {"LoRA"} if trainable == "lora" else set()
    assert set(table) == {"encoder", "adapter", "language model", "value head"} | lora
    kept_copies = sum(p.numel() for name, p in policy.named_parameters() if "original_module" in name)
    assert sum(total for total, _ in table.values()) == sum(p.numel() for p in policy.parameters()) - kept_copies
    assert sum(learns for _, learns in table.values()) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    base = policy.base_vlm
    assert table["value head"][0] == table["value head"][1] == sum(p.numel() for p in policy.value_head.parameters())
    towers = [module for name, module in base.named_modules() if name.endswith(("vision_tower", "vision_model"))]
    assert table["encoder"][0] == sum(p.numel() for p in towers[0].parameters())
    learns = {part for part, (_, count) in table.items() if count}
    expected = {"full": {"encoder", "language model"}, "adapter": set(), "lora": {"LoRA"}}[trainable]
    assert learns == expected | {"adapter", "value head"}


LISTS = ("encoder+adapter", "language_model", "value_head", "encoder+lora", "encoder+adapter+lora+value_head", "lora")


@pytest.mark.parametrize("trainable", LISTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_named_parts_learn_and_all_others_stay_bit_for_bit(model, trainable, sources, tmp_path):
    policy = load(sources, model, trainable, lora_rank=2)
    named = {part: learns for part, _, learns in parameter_table(policy.parts, policy.value_head)}
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with torch.no_grad():
        policy.value_head.out.weight.fill_(0.1)  # at 0 the values send no gradient on
        before["value_head.out.weight"].fill_(0.1)
    train_a_little(policy)
    changed = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = {
        "value_head" if name.startswith("value_head") else part_of(name.removeprefix("vlm."), policy.parts)
        for name in changed
    }
    assert parts == parts_of(trainable) == {part.lower().replace(" ", "_") for part, learns in named.items() if learns}
    may = {name for name, parameter in policy.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    assert changed <= may and not any("original_module" in name for name in changed)
    save_policy(policy, tmp_path)
    again = load_policy(PolicySource(policy=str(tmp_path), trainable=trainable, lora_rank=2), NAMES, FRAME)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in policy.state_dict().items())


def test_lora_on_a_policy_whose_lora_was_merged(sources, tmp_path):
    first = load(sources, "tiny", "lora", lora_rank=2)
    inputs = train_a_little(first)
    (tmp_path / "first").mkdir()
    save_policy(first, tmp_path / "first")
    wider = PolicySource(policy=str(tmp_path / "first"), trainable="encoder+lora+adapter", lora_rank=4)
    second = load_policy(wider, NAMES, FRAME)
    assert torch.allclose(second.distribution(inputs)[0], first.distribution(inputs)[0], atol=1e-5)
    train_a_little(second)
    (tmp_path / "second").mkdir()
    save_policy(second, tmp_path / "second")
    again = load_policy(PolicySource(**{**vars(wider), "policy": str(tmp_path / "second")}), NAMES, FRAME)
    assert torch.equal(again.distribution(inputs)[0], second.distribution(inputs)[0])


class NoAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_what_cannot_be_trained_is_named():
    model = name_parts(*build_vlm("vit", "mlp", "tiny-llama", FRAME))
    with pytest.raises(PolicyError, match="trainable is 'lorra': expected one of full, adapter, lora"):
        set_trainable(model, "lorra")
    with pytest.raises(PolicyError, match="LoRA learns in place of the language model's own weights"):
        set_trainable(model, "language_model+lora")
    with pytest.raises(PolicyError, match="parts joined by '\\+' among encoder, adapter"):
        set_trainable(model, "encoder+head")
    with pytest.raises(PolicyError, match="lora_rank is 0, lora_alpha 32: expected 1 or more"):
        set_trainable(model, "lora", lora_rank=0)
    unknown = model._replace(vlm=NoAdapter(), encoder=None, adapter=(), decoder=None)
    with pytest.raises(PolicyError, match="NoAdapter has no module named adapter, .* use trainable: full"):
        set_trainable(unknown, "adapter")
    assert set_trainable(unknown, "full").vlm.layer.weight.requires_grad
    with pytest.raises(PolicyError, match="has no module named vision or visual: its encoder is unknown"):
        set_trainable(model._replace(encoder=None), "encoder+adapter")
    with pytest.raises(PolicyError, match="names no decoder: LoRA needs one, use trainable: full or adapter"):
        set_trainable(model._replace(decoder=None), "lora")
