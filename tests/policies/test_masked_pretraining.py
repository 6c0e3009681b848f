"""Masked words and image-text matching of UNITER and ViLBERT: the rule, the losses by hand, what a batch must hold."""

import math

import numpy as np
import pytest
import torch

from manako.policies import PolicyError
from manako.policies.architectures import masked_pretraining
from manako.policies.architectures.masked_pretraining import exchange, mask_words, masked_word_loss
from manako.policies.architectures.pretraining import next_different
from tests.helpers.small_runs import goto_policy

ROWS = ("uniter", "vilbert")
CAPTIONS = ["red ball at left.", "blue box at right, red ball at left.", "red ball at left.", "grün, 眼"]


@pytest.fixture(scope="module")
def made():
    policies = {row: goto_policy(policy=row, trainable="full") for row in ROWS}
    return {row: (policy, policy.pretraining("align")) for row, policy in policies.items()}


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_words_are_hidden_by_berts_rule():
    ids = torch.arange(100, 140).expand(4000, -1)
    is_word = torch.ones_like(ids, dtype=torch.bool)
    is_word[:, :2] = is_word[:, -2:] = False
    words = torch.tensor([7, 8, 9])
    hidden, is_masked = mask_words(ids, is_word, 3, words, torch.Generator().manual_seed(0))
    assert not is_masked[~is_word].any() and torch.equal(hidden[~is_masked], ids[~is_masked])
    assert is_masked[is_word].float().mean().item() == pytest.approx(0.15, abs=5e-3)
    by = hidden[is_masked]
    assert (by == 3).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.isin(by, words).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (by == ids[is_masked]).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_short_caption_hides_one_word_and_a_generator_hides_the_same_ones():
    ids, is_word = torch.tensor([[1, 50, 2]]).expand(50, -1), torch.tensor([[False, True, False]]).expand(50, -1)
    first, second = (mask_words(ids, is_word, 3, torch.tensor([7]), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first[1], is_word) and torch.equal(first[0], second[0])


def test_the_loss_of_hidden_words_by_hand():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 3.0], [9.0, 9.0, 9.0]]])
    ids, is_masked = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[True, True], [True, False]])
    first, second = 2 - math.log(math.exp(2) + 2), 1 - math.log(math.e + 2)
    third = -math.log(math.exp(3) + 2)
    expected = -(first + second + third) / 3
    assert masked_word_loss(logits, ids, is_masked).item() == pytest.approx(expected, abs=1e-6)


def test_half_of_the_captions_are_passed_around():
    torch.manual_seed(0)
    for count, moved in ((1, 0), (2, 2), (3, 2), (8, 4), (9, 4)):
        order = exchange(count)
        assert sorted(order.tolist()) == list(range(count)) and int((order != torch.arange(count)).sum()) == moved


def test_the_next_caption_that_says_something_else():
    assert next_different(["a", "a", "b", "a"]).tolist() == [2, 2, 3, 2]
    with pytest.raises(PolicyError, match="All 3 captions say 'a': expected an environment whose caption"):
        next_different(["a"] * 3)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_a_caption_is_read_as_an_instruction_is(row, made):
    policy, pretraining = made[row]
    texts = pretraining._texts(["red ball <|mask|> at left."])
    read = "<|user|>red ball <\\|mask|> at left.<|assistant|><|mask|>"
    assert policy.processor.tokenizer.decode(texts.ids[0]) == read
    assert policy.prompt("red ball <|mask|> at left.").endswith(read)
    hidden = policy.processor.tokenizer.convert_ids_to_tokens(texts.ids[0, ~texts.is_word[0]].tolist())
    assert hidden == ["<|user|>", "<|assistant|>", "<|mask|>"]


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_the_losses_are_those_of_the_models_own_forward(row, made, monkeypatch):
    policy, pretraining = made[row]
    monkeypatch.setattr(masked_pretraining, "BY_MASK", 1.0)
    monkeypatch.setattr(masked_pretraining, "MASKED", 1.0)  # every word is hidden, and by the mask
    monkeypatch.setattr(masked_pretraining, "exchange", lambda count: torch.tensor([2, 0, 1, 3]))
    images, words, judged = frames(4), [], []
    for place, image in enumerate(images):
        pixels = policy.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        ids = pretraining._texts([CAPTIONS[place]]).ids
        hidden = torch.cat([ids[:, :1], torch.full_like(ids[:, 1:-2], ids[0, -1]), ids[:, -2:]], 1)
        logprobs = policy.base_vlm(hidden, pixels).logits.log_softmax(-1)[0, 1:-2]
        words += logprobs[torch.arange(len(logprobs)), ids[0, 1:-2]].tolist()
        ids = pretraining._texts([CAPTIONS[(2, 0, 1, 3)[place]]]).ids
        state = policy.base_vlm.model(ids, pixels).last_hidden_state[:, 0]
        is_right = (1, 0, 0, 1)[place]  # the first two have the same caption: 0 by 2 is right, 1 by 0 and 2 by 1 wrong
        judged.append(pretraining.matching(state).log_softmax(-1)[0, is_right].item())
    losses = pretraining.losses(images, CAPTIONS)
    assert losses["masked_words"].item() == pytest.approx(-np.mean(words), abs=1e-5)
    assert losses["matching"].item() == pytest.approx(-np.mean(judged), abs=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_what_is_measured_is_the_same_at_each_call_and_leaves_chance_alone(row, made):
    _, pretraining = made[row]
    state = torch.get_rng_state()
    first, second = (pretraining.measure(frames(4), CAPTIONS) for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert set(first) == {"masked words", "masked words, other frame", "matching"}
    assert all(0 <= value <= 1 for value in first.values())


def test_the_frame_is_learned_from():
    """Two colours, said right for their own frame and wrong for the other one's."""
    torch.manual_seed(0)
    policy = goto_policy(policy="uniter", trainable="full")
    pretraining = policy.pretraining("align")
    images = np.zeros((16, 24, 24, 3), np.uint8)
    images[::2, ..., 0] = images[1::2, ..., 2] = 255
    captions = ["red", "blue"] * 8
    optimizer = torch.optim.Adam(pretraining.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(pretraining.losses(images, captions).values())).sum().backward()
        optimizer.step()
    found = pretraining.measure(images, captions)
    assert found["masked words"] == 1.0 and found["matching"] == 1.0
    assert found["masked words, other frame"] < 0.2  # what is seen as it is, among ten


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "The caption '' holds no word: expected a sentence"),
        ("<|mask|> <|user|>", "holds no word: expected a sentence about the frame"),
        ("眼" * 400, r"takes \d+ tokens, but UniterForMaskedLM reads at most 512: expected a shorter sentence"),
    ],
)
def test_captions_that_cannot_be_read_are_refused(caption, message, made):
    with pytest.raises(PolicyError, match=message) as caught:
        made["uniter"][1].losses(frames(2), ["red", caption])
    assert "\n" not in str(caught.value)
