"""BLIP-2's first stage: its losses by hand, its scores beside the library's, who sees whom, and what learns."""

import math

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2VisionConfig

from manako.policies import PolicyError
from manako.policies.adapters.qformer import places
from manako.policies.architectures.qformer_pretraining import (
    CLS,
    COMPARED_WIDTH,
    QFormerPretraining,
    Texts,
    contrast_loss,
    equal_captions,
    pairs,
    retrieval,
    sees,
)
from tests.helpers.small_runs import goto_policy, weights

ADAPTERS = ("qformer", "instruct_qformer")
CAPTIONS = ["red ball at left.", "blue box at right, red ball at left.", "red ball at left.", "grün, 眼"]


@pytest.fixture(scope="module", params=ADAPTERS)
def made(request):
    torch.manual_seed(0)
    policy = goto_policy(adapter=request.param, trainable="adapter")
    return policy, policy.pretraining("represent")


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_contrast_by_hand_equal_captions_are_all_right():
    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [1.0, 0.5, 0.0]])
    equal = equal_captions(["a", "b", "a"], ["a", "b", "a"])
    assert equal.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    e = math.exp
    rows = [(1 + 2) / 2 - math.log(e(1) + 1 + e(2)), 3 - math.log(2 + e(3)), 0.5 - math.log(e(1) + e(0.5) + 1)]
    columns = [1 - math.log(2 * e(1) + 1), 3 - math.log(1 + e(3) + e(0.5)), (2 + 0) / 2 - math.log(e(2) + 2)]
    assert contrast_loss(logits, equal).item() == pytest.approx(-(sum(rows) + sum(columns)) / 6, abs=1e-6)


def test_wrong_pairs_are_those_that_look_right_and_never_equal_captions():
    captions = ["a", "b", "a", "c"]
    logits = torch.tensor([[9.0, 0, 9, 50], [0, 0, 50, 0], [0, 50, 0, 0], [0, 50, 0, 9]])  # frames by captions
    frame, caption, is_right = pairs(logits, equal_captions(captions, captions))
    assert is_right.tolist() == [1] * 4 + [0] * 8
    assert frame[:8].tolist() == [0, 1, 2, 3] * 2 and caption[:8].tolist() == [0, 1, 2, 3, 3, 2, 1, 1]
    assert caption[8:].tolist() == [0, 1, 2, 3]
    assert frame[9:].tolist()[1:] == [1, 0] and frame[9] in (2, 3)  # of the caption b two frames look alike
    assert not any(captions[i] == captions[j] for i, j in zip(frame[4:].tolist(), caption[4:].tolist(), strict=True))
    rare = torch.tensor([[5.0, -100.0, 5.0], [0, 0, 0], [5, -100, 5]])
    frame, caption, _ = pairs(rare, equal_captions("aba", "aba"))
    assert caption[3:6].tolist()[0] == 1 and caption[5] == 1  # however unlikely


def test_a_batch_of_equal_captions_has_no_wrong_pair():
    frame, caption, is_right = pairs(torch.randn(3, 3), equal_captions("aaa", "aaa"))
    assert frame.tolist() == caption.tolist() == [0, 1, 2] and is_right.tolist() == [1, 1, 1]


def test_retrieval_counts_ties_as_drawn():
    similarity = torch.tensor([[0.9, 0.1, 0.9], [0.5, 0.5, 0.5], [0.0, 1.0, 0.0]])
    equal = equal_captions(["a", "b", "a"], ["a", "b", "a"])
    assert retrieval(similarity, equal) == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_who_sees_whom():
    mask = torch.tensor([[True, True, False]])
    assert sees(mask, 2, True, False)[0, 0].eq(0).int().tolist() == [[1, 1, 1, 1, 0]] * 5
    causal = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert sees(mask, 2, False, True)[0, 0].eq(0).int().tolist() == causal


# ---- the library's scores --------------------------------------------------------------------------------------------


def in_the_library(pretraining):
    """The library's retrieval model with the weights of a pretraining, and an encoder of its own."""
    qformer = pretraining.joint.config
    vision = Blip2VisionConfig(
        hidden_size=qformer.encoder_hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        initializer_range=0.5,
    )
    table = pretraining.base.get_input_embeddings().weight
    table = pretraining.words.weight if hasattr(pretraining, "words") else pretraining.adapter.text_proj(table)
    options = {**qformer.to_dict(), "vocab_size": len(table) + 1}
    config = Blip2Config(
        vision_config=vision,
        qformer_config=options,
        num_query_tokens=pretraining.adapter.queries.shape[1],
        image_text_hidden_size=COMPARED_WIDTH,
        image_token_index=None,
    )
    library = Blip2ForImageTextRetrieval(config).eval()
    library.qformer.load_state_dict(pretraining.joint.state_dict())
    library.query_tokens.copy_(pretraining.adapter.queries)
    library.embeddings.word_embeddings.weight.copy_(torch.cat([table, pretraining.starts[CLS : CLS + 1]]))
    positions = library.embeddings.position_embeddings.weight
    positions.copy_(places(torch.ones(1, len(positions), dtype=torch.bool), positions)[0])
    library.vision_projection.load_state_dict(pretraining.to_compare[0].state_dict())
    library.text_projection.load_state_dict(pretraining.to_compare[1].state_dict())
    library.itm_head.load_state_dict(pretraining.matching.state_dict())
    return library, len(table)


@torch.no_grad()
def test_contrast_and_matching_score_as_the_library_does(made):
    pretraining = made[1]
    library, cls = in_the_library(pretraining)
    pixels = torch.randn(4, 3, 16, 16)
    features = library.vision_model(pixels).last_hidden_state
    texts = pretraining._texts(CAPTIONS)
    ids = torch.cat([torch.full((4, 1), cls), texts.ids[:, 1:]], 1)
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": texts.mask.long()}
    logits, seen = pretraining._say(texts, features)
    ours = torch.einsum("nkc,mc->nkm", pretraining._frames_of(seen), pretraining._captions_of(texts)).max(1).values
    theirs = library(**given, use_image_text_matching_head=False).logits_per_image
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs.std() > 0.01
    judged = library(**given, use_image_text_matching_head=True).logits_per_image
    assert torch.allclose(pretraining._judge(texts, features), judged, atol=1e-5) and judged.std() > 0.01
    assert logits.shape == (4, texts.ids.shape[1] - 1, len(pretraining.say.weight))


@torch.no_grad()
def test_the_losses_are_made_of_these_scores(made):
    """In a batch of two there is one wrong answer each: nothing is left to chance."""
    pretraining = made[1]
    images, captions = frames(2), CAPTIONS[:2]
    library, cls = in_the_library(pretraining)
    features = made[0].base_vlm.model.get_vision_features(**pretraining.pixels(images))
    library.vision_model.forward = lambda pixel_values, **_: (pixel_values,)  # it is given features
    texts = pretraining._texts(captions)
    ids = torch.cat([torch.full((2, 1), cls), texts.ids[:, 1:]], 1)

    def score(frame, caption, **options):
        given = {"input_ids": ids[caption], "attention_mask": texts.mask[caption].long(), "return_dict": True}
        return library(features[frame], **given, **options).logits_per_image

    table = score([0, 1], [0, 1], use_image_text_matching_head=False) / 0.07
    truth = torch.arange(2)
    expected = (torch.nn.functional.cross_entropy(table, truth) + torch.nn.functional.cross_entropy(table.T, truth)) / 2
    judged = score([0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1], use_image_text_matching_head=True).log_softmax(-1)
    matching = -(judged[:2, 1].sum() + judged[2:, 0].sum()) / 6
    losses = pretraining.losses(images, captions)
    assert losses["contrast"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert losses["matching"].item() == pytest.approx(matching.item(), abs=1e-4)
    words = []
    for row in range(2):  # each caption alone, without padding
        count = int(texts.mask[row].sum())
        alone = Texts(texts.ids[row : row + 1, :count], texts.mask[row : row + 1, :count])
        logits, _ = pretraining._say(alone, features[row : row + 1])
        words += logits[0].log_softmax(-1)[torch.arange(count - 1), texts.ids[row, 1:count]].tolist()
    assert losses["words"].item() == pytest.approx(-np.mean(words), abs=1e-4)


@torch.no_grad()
def test_words_hang_on_the_frame_and_the_words_before_and_queries_on_no_word(made):
    pretraining = made[1]
    features = pretraining._see(frames(1))
    texts = pretraining._texts(["red ball at left, blue box at right."])
    other = texts.ids.clone()
    other[0, 5] += 1
    logits, queries = pretraining._say(texts, features)
    changed, same = pretraining._say(texts._replace(ids=other), features)
    assert torch.equal(queries, same)
    assert torch.allclose(changed[:, :5], logits[:, :5], atol=1e-6)
    assert (changed[:, 5:] - logits[:, 5:]).abs().amax(-1).min() > 1e-3
    unseen, _ = pretraining._say(texts, pretraining._see(frames(1, seed=1)))
    assert (unseen - logits).abs().amax(-1).min() > 1e-3
    acted = pretraining.adapter.qformer(pretraining.adapter.queries, encoder_hidden_states=features).last_hidden_state
    assert torch.allclose(acted, queries, atol=1e-6)  # what the adapter's own queries see, reading nothing


# ---- what learns -----------------------------------------------------------------------------------------------------


def test_the_adapter_learns_and_what_is_new_is_not_a_part_of_the_policy(made):
    policy, pretraining = made
    names, before = set(weights(policy)), weights(policy)
    optimizer = torch.optim.SGD([p for p in pretraining.parameters() if p.requires_grad], 0.1)
    losses = pretraining.losses(frames(4), CAPTIONS)
    assert set(losses) == {"contrast", "matching", "words"}
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    after = weights(policy)
    moved = {name for name in names if not torch.equal(before[name], after[name])}
    assert set(after) == names
    assert all(name.startswith("vlm.model.adapter.") for name in moved)
    assert not any(".adapter.proj." in name for name in moved)  # which align teaches
    assert "vlm.model.adapter.queries" in moved and any("crossattention" in name for name in moved)
    own = any("intermediate.dense" in name for name in names)
    assert own == hasattr(pretraining.adapter, "text_proj") == (not hasattr(pretraining, "words"))


def test_what_is_measured_is_the_same_at_each_call(made):
    pretraining = made[1]
    first, second = (pretraining.measure(frames(4), CAPTIONS) for _ in range(2))
    assert first == second and all(0 <= value <= 1 for value in first.values())


def test_frames_and_captions_find_each_other():
    torch.manual_seed(0)
    policy = goto_policy(adapter="qformer", trainable="adapter")
    pretraining = policy.pretraining("represent")
    assert isinstance(pretraining, QFormerPretraining) and policy.pretraining("align") is None
    images = np.zeros((12, 24, 24, 3), np.uint8)
    images[::3, ..., 0] = images[1::3, ..., 1] = images[2::3, ..., 2] = 255
    captions = ["red", "green", "blue"] * 4
    before = pretraining.measure(images, captions)
    optimizer = torch.optim.Adam([p for p in pretraining.parameters() if p.requires_grad], 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(pretraining.losses(images, captions).values())).sum().backward()
        optimizer.step()
    found = pretraining.measure(images, captions)
    assert found["caption of a frame"] == found["frame of a caption"] == 1.0 > before["caption of a frame"]
    assert found["matching"] == 1.0 and found["words"] == 1.0
    assert found["words, other frame"] == pytest.approx(0.5)  # the end is said all the same


def test_captions_that_teach_nothing_are_refused(made):
    with pytest.raises(PolicyError, match="The caption '<image>' holds no word: expected a sentence"):
        made[1].losses(frames(2), ["red", "<image>"])
    with pytest.raises(PolicyError, match="All 2 captions say 'red': expected an environment"):
        made[1].measure(frames(2), ["red", "red"])


def test_other_adapters_have_no_such_stage():
    assert goto_policy(adapter="mlp").pretraining("represent") is None
