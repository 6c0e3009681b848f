"""A row of its own: BLIP-2 as transformers has it, named by architectures/blip2.py and by nothing else."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from manako.policies import PolicySource, load_policy, parameter_table, save_policy
from manako.policies.architectures import name_parts
from manako.policies.prompts import PromptBuilder
from manako.policies.reading import WholePrompt
from manako.policies.reading.reading import what_the_head_sees
from manako.policies.saving import digest, learned, load_weights
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, TURNS, blip2_folder, frames

ENCODER, DECODER, LORA = ("vision_model.",), ("language_model.",), "lora_"
ADAPTER = ("query_tokens", "qformer.", "language_projection.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(blip2_folder(tmp_path_factory.mktemp("blip2")))


@pytest.fixture(scope="module")
def library(folder):
    """The model and its processor as a user of transformers loads them."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def load(folder, trainable="full", names=NAMES, **options):
    return load_policy(PolicySource(policy=folder, trainable=trainable, **options), names, FRAME)


def train_a_little(policy, steps=2):
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.value_head.out.weight)  # at 0 the values send no gradient on
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        logprobs, values = policy.distribution(inputs)
        optimizer.zero_grad()
        (values.sub(1).square().mean() - logprobs[:, 0].mean()).backward()
        optimizer.step()
    return policy


@torch.no_grad()
def answers(policy):
    logprobs, values = policy.distribution(policy.prepare(frames(3), INSTRUCTIONS))
    return torch.cat([logprobs, values[:, None]], dim=1)  # (B, A + 1)


@torch.no_grad()
def test_the_librarys_answer_depends_on_the_image_and_on_the_text(library):
    model, processor = library
    images = frames(2)
    inputs = processor(text=["go", "go", "up"], images=[images[0], images[1], images[0]], return_tensors="pt")
    here, there, other = model(**inputs).logits[:, -1]  # (V,) each
    assert (there - here).norm() / here.norm() > 0.1 and (other - here).norm() / here.norm() > 0.1


def test_the_names_are_names_in_the_model(library):
    model, processor = library
    parts = name_parts(model, processor)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert {parts.encoder, parts.decoder} <= modules.keys()
    assert [name in modules for name in parts.adapter] == [False, True, True]
    assert parts.adapter[0] in parameters  # the query tokens are a bare parameter
    assert parts.reading is WholePrompt
    assert parts.placeholder is None  # the processor writes them
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == parts.placeholder_id
    text = PromptBuilder(parts, "Act.", FRAME).render("go")
    assert text == "Act.\ngo\nAnswer:"
    ids = processor(text=text, images=frames(1)[0], return_tensors="pt")["input_ids"]
    assert (ids == parts.placeholder_id).sum() == processor.num_query_tokens == 4


@torch.no_grad()
def test_the_last_hidden_state_is_the_one_that_logits_are_made_of(library):
    model, processor = library
    with what_the_head_sees(model) as seen:
        outputs = model(**processor(text="go", images=frames(1)[0], return_tensors="pt"), output_hidden_states=True)
    torch.testing.assert_close(model.get_output_embeddings()(seen[0]), outputs.logits)
    assert torch.equal(seen[0], outputs.language_model_outputs.hidden_states[-1])  # (B, L, D)


@torch.no_grad()
def test_a_policy_answers_as_the_library_does(folder, library):
    """Single-token actions: the action rows at the prompt's last token; prompts of unequal length in one batch."""
    model, processor = library
    policy = load(folder, action_format="token")
    assert {len(tokens) for tokens in policy.codec.token_ids} == {1}
    rows = torch.tensor(policy.codec.token_ids)[:, 0]  # (A,)
    images = frames(3)
    logprobs = policy.distribution(policy.prepare(images, INSTRUCTIONS))[0]  # (B, A)
    for row, instruction in enumerate(INSTRUCTIONS):
        text = policy.prompts.render(instruction)
        logits = model(**processor(text=text, images=images[row], return_tensors="pt")).logits[0, -1, rows]  # (A,)
        assert torch.allclose(logprobs[row], logits.log_softmax(-1), atol=1e-5)
    assert (
        logprobs.exp() - policy.distribution(policy.prepare(images[::-1], INSTRUCTIONS))[0].exp()
    ).abs().max() > 0.01


@torch.no_grad()
def test_actions_of_several_tokens(folder, library):
    """Through the trie: the product of the library's conditional probabilities, renormalised at each node."""
    model, processor = library
    policy = load(folder, names=TURNS, action_format="trie")
    inputs = policy.prepare(frames(1), ["go"])
    expected = {}
    for branch in policy.codec.branches:
        ids = torch.cat([inputs["input_ids"][0], torch.tensor(branch.path, dtype=torch.long)])[None]
        pixels = processor.image_processor(list(frames(1)), return_tensors="pt")
        logits = model(input_ids=ids, **pixels).logits[0, -1, list(branch.children)]
        expected |= {(*branch.path, child): p for child, p in zip(branch.children, logits.log_softmax(-1), strict=True)}
    for action, tokens in enumerate(policy.codec.token_ids):
        steps = [expected[path] for end in range(len(tokens)) if (path := tuple(tokens[: end + 1])) in expected]
        assert torch.allclose(policy.distribution(inputs)[0][0, action], sum(steps), atol=1e-5)


def test_trainable_marks_the_named_parts(folder):
    def learning(trainable):
        named = load(folder, trainable, lora_rank=2).base_vlm.named_parameters()
        return {name for name, parameter in named if parameter.requires_grad}

    everything = learning("full")
    assert {name for name in everything if name.startswith(ADAPTER)} == learning("adapter")
    assert "query_tokens" in learning("adapter")
    assert {name for name in everything if name.startswith(ENCODER)} == learning("encoder")
    assert {name for name in everything if name.startswith(DECODER)} == learning("language_model")
    lora = learning("lora")
    in_decoder = {name for name in lora if LORA in name}
    assert len(in_decoder) == 2 * 2 * 6 and all(name.startswith(DECODER) for name in in_decoder)  # q, k, v, out, fc1, 2
    beside = {name.replace(".modules_to_save.default", "") for name in lora - in_decoder}
    assert beside == learning("adapter") - {"query_tokens"}  # PEFT's files hold whole modules only


def test_the_parameter_table(folder):
    policy = load(folder, "adapter")
    table = {part: (total, learns) for part, total, learns in parameter_table(policy.parts, policy.value_head)}
    assert list(table) == ["encoder", "adapter", "language model", "value head"]
    assert sum(total for total, _ in table.values()) == sum(p.numel() for p in policy.parameters())
    assert [part for part, (_, learns) in table.items() if learns] == ["adapter", "value head"]


@pytest.mark.parametrize("trainable", ["full", "adapter", "lora", "encoder+lora+adapter"])
def test_a_saved_policy_is_the_same_policy(trainable, folder, tmp_path):
    policy = train_a_little(load(folder, trainable, lora_rank=2))
    assert (answers(policy) - answers(load(folder))).abs().max() > 1e-3
    save_policy(policy, tmp_path)
    again = load(str(tmp_path), trainable)
    assert torch.equal(answers(again), answers(policy)) and digest(learned(again)) == digest(learned(policy))
    other = load(folder, trainable, lora_rank=2)
    load_weights(other, tmp_path)
    assert torch.equal(answers(other), answers(policy))
