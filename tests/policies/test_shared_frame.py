"""The frame before the instruction: samples of one frame share its forward, and say what whole prompts say."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from manako import envs
from manako.agent import rng
from manako.agent.ppo_loop import minibatches
from manako.agent.rng import shuffled
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.interface import Draws, Rows
from manako.policies.reading import SharedFrame, SharedPrefix
from manako.policies.reading.shared_frame import Trie, laid_out
from manako.policies.text_policy import FILLER, TOKENS
from tests.helpers.foreign_models import FRAME, NAMES, llava_folder, text_folder

TEXTS = ("go", "go to", "go to the", "go to the red ball", "stop", "go", "go to the red box, then wait")
TOLD = ("make 24: 1", "make 24: 1 + 2", "make 24: 1 + 2 *")


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *FRAME), dtype=np.uint8)


def shared_rows(policy, frames=3):
    """Every text with every frame, shuffled."""
    order = np.random.default_rng(1).permutation(frames * len(TEXTS))
    images = np.repeat(pictures(frames), len(TEXTS), 0)[order]
    return policy.prepare(images, [(TEXTS * frames)[at] for at in order])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny": dict(),
        "gpt2": dict(language_model=str(text_folder(folder / "gpt2", "gpt2"))),
        "llava": dict(policy=str(llava_folder(folder / "llava"))),
        "names": dict(action_format="choice"),
    }


@pytest.mark.parametrize("name", ["tiny", "gpt2", "llava", "names"])
def test_it_says_what_whole_prompts_say_with_the_same_gradients(name, sources):
    policy = load_policy(PolicySource(image_first=True, **sources[name]), NAMES, FRAME)
    torch.nn.init.normal_(policy.value_head.out.weight)
    assert isinstance(policy.reading, SharedFrame), policy.why_whole
    assert policy.checked.hold  # whole prompts against the library
    inputs = shared_rows(policy)
    weights = torch.randn(len(inputs), len(NAMES), generator=torch.Generator().manual_seed(0))
    said = {}
    for reading in (policy.reading, policy.whole_prompt):
        policy.zero_grad()
        logprobs, values = policy.distribution(inputs, reading)
        ((logprobs * weights).sum() + values.sum()).backward()
        grads = [each.grad.clone() for each in policy.parameters() if each.grad is not None]
        said[reading.name] = logprobs.detach(), values.detach(), grads
    (one, one_values, one_grads), (other, other_values, other_grads) = said.values()
    assert (one - other).abs().max() < 1e-5 and (one_values - other_values).abs().max() < 1e-5
    assert len(one_grads) == len(other_grads)
    for a, b in zip(one_grads, other_grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_a_frame_is_seen_once_and_known_while_no_weight_changes(monkeypatch):
    policy = load_policy(PolicySource(image_first=True), NAMES, FRAME)
    seen = []
    see = policy.base_vlm.model.get_vision_features

    def counted(pixel_values):
        seen.append(len(pixel_values))
        return see(pixel_values)

    monkeypatch.setattr(policy.base_vlm.model, "get_vision_features", counted)
    inputs = shared_rows(policy)
    with torch.no_grad():
        first = policy.distribution(inputs)[0]
        assert seen == [3]
        policy.distribution(inputs)
        assert seen == [3, 3]  # weights may have changed
        with policy.frozen_weights():
            policy.distribution(inputs)
            again = policy.distribution(inputs)[0]
            assert seen == [3, 3, 3]
            policy.distribution(policy.prepare(pictures(4), ["go"] * 4))  # three are known, one is new
            assert seen == [3, 3, 3, 1]
        assert (again - first).abs().max() < 1e-5
        policy.value_head.out.weight.add_(1)
        for parameter in policy.base_vlm.parameters():
            parameter.mul_(1.5)
        with policy.frozen_weights():
            changed = policy.distribution(inputs)[0]
        assert (changed - policy.distribution(inputs, policy.whole_prompt)[0]).abs().max() < 1e-4
        assert (changed - first).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("template", ["plain", "json"])
def test_answers_in_text(template):
    source = PolicySource(image_first=True, action_format="text", answer_template=template, answer_tokens=12)
    policy = load_policy(source, NAMES, FRAME)
    assert isinstance(policy.reading, SharedFrame)
    inputs = shared_rows(policy)
    draws = Draws([np.random.default_rng(slot) for slot in range(len(inputs))])
    acted = policy.act(inputs, draws)
    evaluated = policy.evaluate_actions(inputs, acted.actions)
    assert (evaluated.logprobs - acted.logprobs).abs().max() < 1e-4
    policy.reading = policy.whole_prompt
    whole = policy.evaluate_actions(inputs, acted.actions)
    assert (evaluated.logprobs - whole.logprobs).abs().max() < 1e-4
    assert (evaluated.token_values - whole.token_values).abs().max() < 1e-4


@torch.no_grad()
def test_vectors_and_several_frames_and_what_was_done():
    env = envs.EpisodeVectorEnv("manako/Slide-v0", 6)
    seen = env.reset()
    source = PolicySource(image_first=True)
    policy = load_policy(source, env.action_names, env.frame_shape, env.action_space)
    assert isinstance(policy.reading, SharedFrame)
    inputs = policy.prepare(np.repeat(seen.images[:2], 3, 0), list(TEXTS[:6]))
    acted = policy.act(inputs, Draws([np.random.default_rng(slot) for slot in range(6)]))
    evaluated = policy.evaluate_actions(inputs, acted.actions)
    policy.reading = policy.whole_prompt
    whole = policy.evaluate_actions(inputs, acted.actions)
    assert (evaluated.logprobs - whole.logprobs).abs().max() < 1e-5
    assert (evaluated.logprobs - acted.logprobs).abs().max() < 1e-5

    policy = load_policy(PolicySource(image_first=True, frames=2, history=2), NAMES, FRAME)
    assert isinstance(policy.reading, SharedFrame)
    past = np.repeat(pictures(2, 5), 2, 0)[:, None]
    turns = np.array([[[-1, 0], [0, 0.5]], [[1, 0], [0, 0.5]]] * 2, float)
    inputs = policy.prepare(np.repeat(pictures(2), 2, 0), ["go"] * 4, {"past_frames": past, "past_turns": turns})
    one, other = policy.distribution(inputs)[0], policy.distribution(inputs, policy.whole_prompt)[0]
    assert (one - other).abs().max() < 1e-5 and (other[0] - other[1]).abs().max() > 1e-4


def test_the_trie_by_hand():
    tries = [Trie(), Trie()]
    assert tries[0].add([5, 6, 7]) == [0, 1, 2] and tries[0].add([5, 6, 9, 7]) == [0, 1, 3, 4]
    assert tries[0].add([5, 6]) == [0, 1] and tries[1].add([9]) == [0]
    tokens, depths, sees = laid_out(tries, 0)
    assert tokens.tolist() == [[5, 6, 7, 9, 7], [9, 0, 0, 0, 0]]
    assert depths.tolist() == [[0, 1, 2, 2, 3], [0, 0, 0, 0, 0]]
    assert sees[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_a_reading_that_differs_is_not_used(monkeypatch):
    right = SharedFrame._run_rest

    def wrong(self, inputs, answers, answer_lengths):
        hidden, cache, last = right(self, inputs, answers, answer_lengths)
        return hidden if len(inputs) < 4 else hidden.roll(1, 0), cache, last  # only where frames are shared

    monkeypatch.setattr(SharedFrame, "_run_rest", wrong)
    policy = load_policy(PolicySource(image_first=True), NAMES, FRAME)
    assert type(policy.reading) is SharedPrefix


def test_the_order_of_the_prompt_is_kept(tmp_path):
    policy = load_policy(PolicySource(image_first=True), NAMES, FRAME)
    text_first = load_policy(PolicySource(), NAMES, FRAME)
    assert "<image>go<" in policy.prompt("go") and "go<image>" in text_first.prompt("go")
    policy.save(tmp_path)
    again = load_policy(PolicySource(str(tmp_path)), NAMES, FRAME)
    assert again.spec.image_first and again.prompt("go") == policy.prompt("go")
    other = tmp_path / "other"
    text_first.save(other)
    assert load_policy(PolicySource(str(other), image_first=True), NAMES, FRAME).spec.image_first
    with pytest.raises(PolicyError, match="expected"):
        load_policy(PolicySource("uniter", image_first=True, action_format="text"), NAMES, FRAME)


def test_samples_of_one_frame_are_shuffled_together():
    groups = torch.tensor([7, 7, -3, 7, 5, -3])
    orders = [shuffled(6, groups, 48, np.random.default_rng(seed)).tolist() for seed in range(40)]
    assert len({tuple(groups[order].tolist()) for order in orders}) == 6  # three groups
    for order in orders:
        runs = groups[order].tolist()
        assert sorted(order) == list(range(6)) and sum(a != b for a, b in pairwise(runs)) == 2
    assert sorted(shuffled(6, None, 48, np.random.default_rng(0))) == list(range(6))
    assert shuffled(0, groups[:0], 48, np.random.default_rng(0)).tolist() == []


def test_a_frame_that_comes_again_and_again_does_not_fill_a_batch():
    """Of 12 frames with 100 samples each, 64 samples a batch hold 16 parts of 4, which differ from pass to pass."""
    groups = torch.arange(12).repeat(100)
    first, second = (shuffled(1200, groups, 64, np.random.default_rng(seed)) for seed in (0, 1))
    neighbours = []
    for order in (first, second):
        assert sorted(order) == list(range(1200))
        parts = groups[order].view(-1, 4)
        assert (parts == parts[:, :1]).all()
        for batch in groups[order].split(64):
            assert batch.bincount(minlength=12).max() <= 32  # by chance a frame has some parts in a batch, never all
        neighbours.append({frozenset(part) for part in order.reshape(-1, 4).tolist()})
    assert len(neighbours[0] & neighbours[1]) < 5


def test_work_is_shared_in_minibatches(monkeypatch):
    monkeypatch.setattr(rng, "LEAST_GROUPS", 1)
    policy = load_policy(PolicySource(image_first=True), NAMES, FRAME)
    inputs = shared_rows(policy)
    work = policy.shared_work(inputs)
    assert len(work.unique()) == 3 and load_policy(PolicySource(), NAMES, FRAME).shared_work(inputs) is None
    shown = inputs["frames"].flatten(1)
    assert all(torch.equal(shown[a], shown[b]) for a in range(21) for b in range(21) if work[a] == work[b])

    class Settings:
        seed, num_ppo_epochs = 0, 2

    class Part:
        usable = None

        def __init__(self, inputs):
            self.inputs, self.values = inputs, torch.zeros(len(inputs))

        def select(self, rows):
            return Part(self.inputs.select(rows))

    parts = list(minibatches(Part(inputs), Settings, 0, 3, policy))
    assert [len(part.inputs) for part in parts] == [7] * 6
    assert all(len(policy.shared_work(part.inputs).unique()) == 1 for part in parts)
    assert isinstance(parts[0].inputs, Rows) and FILLER not in parts[0].inputs["input_ids"] and TOKENS not in inputs
