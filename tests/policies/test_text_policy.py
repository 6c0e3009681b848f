"""Answers in text: what was sampled is what is evaluated, and both are what plain transformers computes."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from manako.policies import PolicyError, PolicySource, load_policy, text_policy
from manako.policies.answers.illegal import CUT, LEGAL, NOT_ALLOWED, SKIP, UNPARSED
from manako.policies.interface import ACTION_MASK, Draws, Rows
from manako.policies.reading import SharedPrefix, WholePrompt
from manako.policies.text_policy import FILLER, TOKENS, Sampling, groups_by_length, nucleus
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, frames, idefics3_folder, llava_folder, text_folder

MODELS = ("tiny", "gpt2", "resampler", "flamingo", "kosmos2", "llava", "idefics3")
COUNT = 5


def text_source(policy="tiny", **settings):
    return PolicySource(policy, action_format="text", **{"answer_tokens": 12, **settings})


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Made when they are first asked for."""
    folder = tmp_path_factory.mktemp("models")
    sources = {
        "tiny": text_source,
        "gpt2": lambda: text_source(language_model=str(text_folder(folder / "gpt2", "gpt2"))),
        "resampler": lambda: text_source(adapter="instruct_resampler"),
        "flamingo": lambda: text_source("flamingo"),
        "kosmos2": lambda: text_source("kosmos2"),
        "llava": lambda: text_source(str(llava_folder(folder / "llava"))),
        "idefics3": lambda: text_source(str(idefics3_folder(folder / "idefics3"))),
    }

    class Policies(dict):
        def __missing__(self, name):
            self[name] = load_policy(sources[name](), NAMES, FRAME)
            torch.manual_seed(0)
            torch.nn.init.normal_(self[name].value_head.out.weight)
            return self[name]

    return Policies()


def draws(first=0, count=COUNT, seed=7):
    return Draws([np.random.default_rng((seed, slot)) for slot in range(first, first + count)])


def shown(policy, count=COUNT):
    texts = [INSTRUCTIONS[row % len(INSTRUCTIONS)] for row in range(count)]
    return policy.prepare(frames(count), texts), texts


class Says(LogitsProcessor):
    """Makes the library's `generate` say given tokens."""

    def __init__(self, tokens):
        self.tokens, self.said = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[self.said]] = 0.0
        self.said += 1
        return forced


def of_the_library(policy, image, text, tokens):
    """Logits (S, V) of the library's own `generate` for one prompt and image, made to say these tokens."""
    given = policy.processing.call([policy.prompt(text)], image[None])
    out = policy.base_vlm.generate(
        **given,
        do_sample=False,
        num_beams=1,
        eos_token_id=-1,
        min_new_tokens=len(tokens),
        max_new_tokens=len(tokens),
        logits_processor=LogitsProcessorList([Says(tokens)]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack([step[0] for step in out.logits])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_sampled_evaluated_and_of_the_library(name, policies):
    """Sampled with keys and values, evaluated in one forward, and each prompt alone by the library's own generate."""
    policy = policies[name]
    inputs, texts = shown(policy)
    acted = policy.act(inputs, draws())
    evaluated = policy.evaluate_actions(inputs, acted.actions)
    mask = acted.mask
    assert (evaluated.logprobs - acted.logprobs)[mask].abs().max() < 1e-4
    assert (evaluated.values - acted.values).abs().max() < 1e-4
    assert (evaluated.token_values - acted.token_values)[mask].abs().max() < 1e-4
    assert evaluated.distribution is None and not evaluated.logprobs[~mask].any()
    banned = policy._banned
    for row, tokens in enumerate(policy.answer_tokens(acted.actions)):
        logits = of_the_library(policy, frames(COUNT)[row], texts[row], tokens).masked_fill(banned, -torch.inf)
        logp = logits.log_softmax(-1)
        right = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        spread = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
        off = (evaluated.logprobs[row, : len(tokens)] - right).abs().max() / right.abs().max()
        assert off < 1e-5, (name, row)
        assert torch.allclose(evaluated.entropy[row, : len(tokens)], spread, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "flamingo"])
def test_whole_prompts_say_the_same(name, policies):
    policy = policies[name]
    assert isinstance(policy.reading, SharedPrefix)
    inputs, _ = shown(policy)
    acted = policy.act(inputs, draws())
    fast, policy.reading = policy.reading, policy.whole_prompt
    try:
        assert isinstance(policy.reading, WholePrompt)
        again = policy.act(inputs, draws())
        whole = policy.evaluate_actions(inputs, acted.actions)
    finally:
        policy.reading = fast
    assert torch.equal(again.actions[TOKENS], acted.actions[TOKENS])
    assert (again.logprobs - acted.logprobs).abs().max() < 1e-4
    assert (whole.logprobs - acted.logprobs)[acted.mask].abs().max() < 1e-4


@torch.no_grad()
def test_slots_apart_write_what_they_write_together(policies):
    """Whatever the others write, and however long: a slot draws its own numbers."""
    policy = policies["tiny"]
    policy.base_vlm.get_output_embeddings().weight.data[policy.end_id] *= 3  # some answers end early
    inputs, _ = shown(policy, 12)
    whole = policy.act(inputs, draws(count=12))
    lengths = whole.mask.sum(-1)
    assert len(set(lengths.tolist())) > 2
    for first in (0, 4, 8):
        part = policy.act(inputs.select(torch.arange(first, first + 4)), draws(first, 4))
        width = part.actions[TOKENS].shape[1]
        assert torch.equal(part.actions[TOKENS], whole.actions[TOKENS][first : first + 4, :width])
        assert (whole.actions[TOKENS][first : first + 4, width:] == FILLER).all()
        assert (part.logprobs - whole.logprobs[first : first + 4, :width]).abs().max() < 1e-4


def test_gradients_are_those_of_the_sum_of_logprobs(policies):
    """Against autograd through the plain model over one sequence of prompt and answer."""
    policy = policies["tiny"]
    inputs, texts = shown(policy, 1)
    acted = policy.act(inputs, draws(count=1))
    tokens = policy.answer_tokens(acted.actions)[0]
    policy.zero_grad()
    policy.evaluate_actions(inputs, acted.actions).logprobs.sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.vlm.named_parameters() if p.grad is not None}
    policy.zero_grad()
    given = policy.processing.call([policy.prompt(texts[0])], frames(1))
    ids = torch.cat([given["input_ids"], torch.tensor([tokens])], dim=1)
    out = policy.base_vlm(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given["pixel_values"], use_cache=False
    )
    start = given["input_ids"].shape[1] - 1
    logp = out.logits[0, start : start + len(tokens)].masked_fill(policy._banned, -torch.inf).log_softmax(-1)
    logp.gather(1, torch.tensor(tokens)[:, None]).sum().backward()
    for name, parameter in policy.vlm.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours[name], parameter.grad, atol=1e-4, rtol=1e-3), name


@torch.no_grad()
def test_nothing_special_is_sampled(policies):
    policy = policies["tiny"]
    head = policy.base_vlm.get_output_embeddings().weight
    kept = head.clone()
    tokenizer = policy.processor.tokenizer
    special = [policy.parts.placeholder_id, *tokenizer.all_special_ids]
    try:
        inputs, _ = shown(policy)
        hidden = policy.reading.go_on(inputs).now.hidden.mean(0)
        head[special] = 50 * hidden / hidden.norm()  # the likeliest by far
        acted = policy.act(inputs, draws(), greedy=True)
        said = set(acted.actions[TOKENS].flatten().tolist()) - {FILLER, policy.end_id}
        assert not said & set(special) and policy.parts.placeholder_id not in said
        assert torch.isfinite(acted.logprobs).all()
    finally:
        head.copy_(kept)


# ---- what was said ---------------------------------------------------------------------------------------------------


def said(policy, text, ends=True):
    tokens = [*policy.prompts.go_on(text), *([policy.end_id] if ends else [])]
    return policy.read(tokens)


def test_outcomes(policies):
    policy = policies["tiny"]
    up = policy.template.write(NAMES[0], "it is above")
    assert said(policy, up)[:3] == (LEGAL, 0, "it is above")
    assert said(policy, up, ends=False)[:2] == (CUT, SKIP)
    assert said(policy, up.replace(NAMES[0], "fly"))[:2] == (UNPARSED, SKIP)
    assert said(policy, NAMES[0])[:2] == (UNPARSED, SKIP)
    tokens = [*policy.prompts.go_on(up), policy.end_id]
    assert policy.read(tokens, [False, *[True] * (len(NAMES) - 1)])[:2] == (NOT_ALLOWED, SKIP)


def test_an_answer_for_an_action_comes_back(policies):
    policy = policies["tiny"]
    policy.text.__dict__["longest"] = 64
    try:
        rows = policy.actions_from_env(np.arange(len(NAMES)), ["why not"] * len(NAMES))
        assert [answer[:3] for answer in policy.reads(rows)] == [(LEGAL, at, "why not") for at in range(len(NAMES))]
        assert policy.answers(rows)[0] == f'{{"thoughts": "why not", "action": "{NAMES[0]}"}}'
        assert policy.thoughts(rows) == ["why not"] * len(NAMES)
        with pytest.raises(PolicyError, match="expected its own tokens"):
            policy.actions_from_env(np.array([SKIP]))
    finally:
        policy.text.__dict__["longest"] = 12
    with pytest.raises(PolicyError, match=r"An answer takes \d+ tokens, and at most 12 are written"):
        policy.actions_from_env(np.array([0]))


@torch.no_grad()
@pytest.mark.parametrize("template", ["plain", "[{action}]"])
def test_constrained_answers_are_legal_and_add_up_to_one(template):
    """Every way of spelling the allowed names, token by token: their probabilities are 1 in sum."""
    policy = load_policy(text_source(answer_template=template, constrain_actions=True), ("up", "down", "left"), FRAME)
    inputs = policy.prepare(frames(6), ["go"] * 6)
    inputs = inputs.with_column(ACTION_MASK, torch.tensor([[True, True, False]] * 6))
    if template == "plain":
        acted = policy.act(inputs, draws(count=6))
        assert set(acted.outcomes) == {LEGAL} and set(acted.to_env.tolist()) <= {0, 1}
        assert (policy.evaluate_actions(inputs, acted.actions).logprobs - acted.logprobs).abs().max() < 1e-4
        one = inputs.select(torch.tensor([0]))
        total, open_ways = 0.0, [[]]
        while open_ways:
            way = open_ways.pop()
            following = policy._allowed(way, [True, True, False])
            for token in following:
                if token == policy.end_id:
                    rows = Rows({TOKENS: torch.tensor([[*way, token]])}, {TOKENS: FILLER})
                    assert policy.reads(rows)[0].outcome == LEGAL
                    total += float(policy.evaluate_actions(one, rows).logprobs.sum().exp())
                else:
                    open_ways.append([*way, token])
        assert total == pytest.approx(1, abs=1e-4)
    else:
        rows = policy._allowed(policy.prompts.go_on("[") and list(policy.prompts.go_on("[")), None)
        said_next = {policy.processor.tokenizer.decode([token]).strip()[:1] for token in rows}
        assert said_next == {"u", "d", "l"}
        assert policy._allowed([], None) is None  # there is no cue yet


def test_one_ratio_with_a_weighted_thought_by_hand(policies):
    policy = load_policy(text_source(thought_coef=0.5, answer_tokens=40), NAMES, FRAME)
    plain = load_policy(text_source(answer_tokens=40), NAMES, FRAME)
    inputs, _ = shown(policy, 1)
    rows = policy.actions_from_env(np.array([1]), ["hm"])
    tokens = policy.answer_tokens(rows)[0]
    each = plain.evaluate_actions(inputs, rows).logprobs[0]
    cue = len(policy.prompts.go_on('{"thoughts": "hm", "action": "'))
    # whatever the tokenizer makes of the cue's end: what begins behind it is of the action
    decode = policy.processor.tokenizer.decode
    first = next(
        at for at in range(len(tokens)) if len(decode(tokens[: at + 1])) > len('{"thoughts": "hm", "action": "')
    )
    assert abs(first - cue) <= 1
    by_hand = 0.5 * each[:first].sum() + each[first:].sum()
    evaluated = policy.evaluate_actions(inputs, rows)
    assert evaluated.logprobs.shape == (1, 1)
    assert float(evaluated.logprobs) == pytest.approx(float(by_hand), abs=1e-4)
    acted = policy.act(inputs, draws(count=1))
    assert acted.logprobs.shape == acted.mask.shape == (1, 1)
    again = policy.evaluate_actions(inputs, acted.actions)
    assert float(again.logprobs - acted.logprobs) == pytest.approx(0, abs=1e-4)


def test_temperature_and_nucleus():
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # 0.5 + 0.3 reaches 0.7: the two are kept, 5/8 and 3/8
    assert torch.allclose(nucleus(logp, 0.7).exp(), torch.tensor([[0.625, 0.375, 0, 0]]))
    assert torch.allclose(nucleus(logp, 0.4).exp(), torch.tensor([[1.0, 0, 0, 0]]))
    policy = load_policy(text_source(temperature=2.0), NAMES, FRAME)
    inputs, _ = shown(policy, 2)
    acted = policy.act(inputs, draws(count=2))
    assert (policy.evaluate_actions(inputs, acted.actions).logprobs - acted.logprobs).abs().max() < 1e-4
    logits = policy.reading.go_on(inputs).now.logits.masked_fill(policy._banned, -torch.inf)
    expected = (logits / 2).log_softmax(-1).gather(1, acted.actions[TOKENS][:, :1])[:, 0]
    assert torch.allclose(acted.logprobs[:, 0], expected, atol=1e-4)
    policy.sampling = Sampling(temperature=1e-5, top_p=0.5)
    greedy = policy.act(inputs, draws(count=2), greedy=True)
    assert torch.equal(policy.act(inputs, draws(count=2)).actions[TOKENS], greedy.actions[TOKENS])


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_saved_policy_writes_as_before(tmp_path):
    source = text_source(answer_template="tags", illegal_action="left", illegal_penalty=0.3, trainable="lora")
    policy = load_policy(source, ("left", "right"), FRAME)
    (tmp_path / "one").mkdir()
    policy.save(tmp_path / "one")
    again = load_policy(PolicySource(str(tmp_path / "one"), trainable="lora"), ("left", "right"), FRAME)
    assert again.text == policy.text and again.template.text == policy.template.text
    other = load_policy(PolicySource(str(tmp_path / "one"), answer_tokens=5), ("left", "right"), FRAME)
    assert other.text.longest == 5 and other.text.template == "tags"
    inputs = policy.prepare(frames(2), ["go", "stop"])
    assert torch.equal(policy.act(inputs, draws(count=2)).logprobs, again.act(inputs, draws(count=2)).logprobs)
    closed = load_policy(PolicySource(str(tmp_path / "one"), action_format="token"), ("left", "right"), FRAME)
    assert closed.spec.text is None and closed.act(inputs, draws(count=2)).outcomes is None


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (text_source(answer_template="nothing"), "The answer template 'nothing' came"),
        (text_source(illegal_action="fly"), "--illegal_action is 'fly': expected one of"),
        (text_source(answer_template="plain", thought_coef=0.5), "has no thought"),
        (text_source(answer_template="<|end|>{action}"), "holds the special token"),
        (text_source("vilbert"), "answers with one token at a mask, so it writes no text"),
        (text_source("uniter"), "answers with one token at a mask, so it writes no text"),
        (text_source(answer_tokens=9000), "reads at most"),
    ],
)
def test_bad_settings(source, says):
    with pytest.raises(PolicyError, match=says):
        policy = load_policy(source, NAMES, FRAME)
        policy.act(policy.prepare(frames(1), ["go"]), draws(count=1))


def test_groups_of_like_length_by_hand():
    """Sorted 20 20 10 10 10 3: behind two of 20 a third would pad (20+20+10)/60; behind three of 10, 33/40."""
    lengths = torch.tensor([10, 20, 3, 10, 20, 10])
    groups = groups_by_length(lengths, 0.1, least=1)
    assert [group.tolist() for group in groups] == [[1, 4], [0, 3, 5], [2]]
    assert [group.tolist() for group in groups_by_length(lengths, 0.5)] == [[0, 1, 2, 3, 4, 5]]
    assert len(groups_by_length(lengths, 0.1, least=4)) == 1  # none would have rows enough


def test_answers_in_groups_are_evaluated_as_in_one(policies, monkeypatch):
    policy = policies["tiny"]
    inputs, _ = shown(policy, 32)
    tokens = policy.act(inputs, draws(count=32)).actions[TOKENS].clone()
    for row in range(0, 32, 2):
        tokens[row, 2:] = FILLER
    actions = Rows({TOKENS: tokens}, {TOKENS: FILLER})
    policy.padding_share()
    monkeypatch.setattr(text_policy, "groups_by_length", lambda lengths: [torch.arange(len(lengths))])
    whole, padded = policy.evaluate_actions(inputs, actions), policy.padding_share()
    monkeypatch.setattr(text_policy, "groups_by_length", lambda lengths: groups_by_length(lengths, 0.01))
    parts, less = policy.evaluate_actions(inputs, actions), policy.padding_share()
    assert 0 <= less < padded < 0.5 and policy.padding_share() is None
    for name in ("logprobs", "entropy", "values", "token_values"):
        assert (getattr(parts, name) - getattr(whole, name)).abs().max() < 1e-4
