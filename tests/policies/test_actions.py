"""The action codec: which tokens stand for the actions, and that their probabilities are exact."""

import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.answers.choice import LABELS
from manako.policies.answers.closed_set import ActionCodec, Branch
from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.language_models.tiny_llama import tiny_tokenizer
from manako.policies.reading import SharedPrefix
from tests.helpers.foreign_models import FRAME, NAMES, TURNS, byte_tokenizer, frames, llava_folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(llava_folder(tmp_path_factory.mktemp("llava")))


def word_tokenizer(*words, **roles):
    """One token a word, anything else is unknown."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def logits_of(codec, batch=5, seed=0):
    """Random logits (batch, children) for each of the codec's branches."""
    generator = torch.Generator().manual_seed(seed)
    return [4 * torch.randn(batch, len(branch.children), generator=generator) for branch in codec.branches]


def test_names_of_one_token(tokenizer):
    codec = ActionCodec(tokenizer, NAMES)
    assert codec.format == "token"
    assert codec.answers == NAMES and codec.legend == "up, down, left, right"
    assert [tokenizer.decode(ids) for ids in codec.token_ids] == list(NAMES)
    assert codec.branches == (Branch((), tuple(ids[0] for ids in codec.token_ids), (0, 1, 2, 3)),)
    assert codec.path_tokens == ()
    (logits,) = logits_of(codec)
    assert torch.allclose(codec.action_logprobs([logits]), logits.log_softmax(-1))


def test_the_lead_belongs_to_the_answer(tokenizer):
    codec = ActionCodec(tokenizer, NAMES, "token", lambda answer: tokenizer.encode(" " + answer))
    assert [tokenizer.decode(ids) for ids in codec.token_ids] == [f" {name}" for name in NAMES]


def test_auto_takes_the_first_format_that_fits(tokenizer):
    assert ActionCodec(tokenizer, ("up", "go up")).format == "choice"
    many = [f"{one} {two}" for one, two in itertools.product(NAMES, ("red", "blue", *LABELS[:12]))]
    assert len(many) == 56 > len(LABELS)
    assert ActionCodec(tokenizer, many).format == "trie"
    words = ("go", "up", "down")
    labels_unknown = word_tokenizer(*words, unk_token="[UNK]", eos_token="down")
    assert ActionCodec(labels_unknown, ("go up", "go go")).format == "trie"


def test_choices_are_labelled(tokenizer):
    codec = ActionCodec(tokenizer, TURNS, "choice")
    assert codec.answers == ("A", "B", "C", "D")
    assert codec.legend == "A: turn left, B: turn right, C: go, D: go on"
    assert [tokenizer.decode(ids) for ids in codec.token_ids] == ["A", "B", "C", "D"]
    assert len(codec.branches) == 1


def test_a_trie_by_hand(tokenizer):
    """Turn left or right, go, go on: three nodes with two children each."""
    codec = ActionCodec(tokenizer, TURNS, "trie")
    (turn, left, *_), (_, right, *_), (go, end), (_, on, _) = codec.token_ids
    assert end == tokenizer.eos_token_id
    assert set(codec.branches) == {
        Branch((), (turn, go), (0, 0, 1, 1)),
        Branch((turn,), (left, right), (0, 1, -1, -1)),
        Branch((go,), (end, on), (-1, -1, 0, 1)),
    }
    assert codec.branches[0].path == ()
    assert sorted(codec.path_tokens) == sorted([(turn,), (go,)])
    given = {(): [math.log(3), 0.0], (turn,): [0.0, math.log(4)], (go,): [math.log(9), 0.0]}
    logits = [torch.tensor([given[branch.path]]) for branch in codec.branches]
    expected = torch.tensor([3 / 4 / 5, 3 / 4 * 4 / 5, 1 / 4 * 9 / 10, 1 / 4 / 10])
    assert torch.allclose(codec.action_logprobs(logits)[0].exp(), expected, atol=1e-6)


def test_a_trie_whose_names_all_share_the_first_token(tokenizer):
    codec = ActionCodec(tokenizer, ("go up", "go down", "go left"), "trie")
    (go, *_), *_ = codec.token_ids
    assert [branch.path for branch in codec.branches] == [(go,)]  # the root has one child and needs no forward
    assert codec.path_tokens == ((go,),)
    (logits,) = logits_of(codec)
    assert torch.allclose(codec.action_logprobs([logits]), logits.log_softmax(-1))


def test_only_the_longest_paths_of_a_trie_are_run(tokenizer):
    codec = ActionCodec(tokenizer, ("turn left up", "turn left down", "turn right"), "trie")
    (turn, left, _), *_ = codec.token_ids
    assert {branch.path for branch in codec.branches} == {(turn,), (turn, left)}
    assert codec.path_tokens == ((turn, left),)


@pytest.mark.parametrize("action_format", ["choice", "trie", "auto"])
@pytest.mark.parametrize("names", [NAMES, TURNS, ("a", "ab", "abc", "abcd", "b"), [f"step {i}" for i in range(23)]])
def test_probabilities_add_up_to_one(names, action_format, tokenizer):
    codec = ActionCodec(tokenizer, names, action_format)
    logprobs = codec.action_logprobs(logits_of(codec))
    assert logprobs.shape == (5, len(names)) and logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(5), atol=1e-6)
    half = codec.action_logprobs([logits.bfloat16() for logits in logits_of(codec)])
    assert half.dtype == torch.float32
    assert torch.allclose(half.exp().sum(-1), torch.ones(5), atol=1e-5)


def brute_force(policy, inputs, row):
    """Each action's log-probability, token by token: the plain model, renormalised over the tokens that may follow."""
    prompt = inputs["input_ids"][row, : inputs["lengths"][row]].tolist()
    pixels = policy.processing.pipeline.pixels(inputs["frames"][row : row + 1])
    answers = [tuple(ids) for ids in policy.codec.token_ids]
    logprobs = []
    for answer in answers:
        total = 0.0
        for depth, token in enumerate(answer):
            may_follow = sorted({other[depth] for other in answers if other[:depth] == answer[:depth]})
            ids = torch.tensor([[*prompt, *answer[:depth]]])
            logits = policy.base_vlm(input_ids=ids, **pixels).logits[0, -1, may_follow].log_softmax(-1)
            total += logits[may_follow.index(token)].item()
        logprobs.append(total)
    return torch.tensor(logprobs)


@pytest.mark.parametrize(
    "names",
    [NAMES, TURNS, ("go up", "go down", "go left"), ("turn left now", "turn left later", "turn right", "go", "go on")],
)
@pytest.mark.parametrize("action_format", ["choice", "trie"])
@pytest.mark.parametrize("model", ["tiny", "llava"])
@torch.no_grad()
def test_log_probabilities_against_brute_force(model, action_format, names, llava):
    source = PolicySource(policy=llava if model == "llava" else "tiny", action_format=action_format)
    policy = load_policy(source, names, FRAME)
    inputs = policy.prepare(frames(3), ("go to the red ball", "go", "open the door and turn around"))
    expected = torch.stack([brute_force(policy, inputs, row) for row in range(3)])
    assert isinstance(policy.reading, SharedPrefix)
    whole = policy.whole_prompt
    for reading in (policy.reading, whole):
        logprobs, _ = policy.distribution(inputs, reading)
        assert torch.allclose(logprobs, expected, atol=1e-4)
        assert torch.allclose(logprobs.exp().sum(-1), torch.ones(3), atol=1e-5)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    assert torch.allclose(entropy, -(expected.exp() * expected).sum(-1), atol=1e-4)
    assert expected.std() > 1e-3  # the names do differ


@pytest.mark.parametrize("action_format", ["token", "choice", "trie"])
def test_no_answer_holds_a_special_token(action_format, tokenizer):
    codec = ActionCodec(tokenizer, NAMES, action_format)
    special = set(special_vocabulary(tokenizer).values())
    assert not special.intersection(token for branch in codec.branches for token in branch.children)


@pytest.mark.parametrize(
    ("names", "action_format", "sentence"),
    [
        ((), "auto", "needs at least two actions, got \\[\\]"),
        (("up",), "auto", "needs at least two actions, got \\['up'\\]"),
        (("up", " "), "auto", "must not be empty"),
        (("up", "down", "up"), "auto", "must differ, got 'up' more than once"),
        (("up", "<image>"), "auto", "'<image>' holds the special token '<image>': expected plain words, rename"),
        (("up", "go <|user|>"), "auto", "holds the special token '<|user|>'".replace("|", "\\|")),
        (("up", "turn left"), "token", "token: 'turn left' takes 2 tokens\\). Give other names"),
        (tuple(f"step {i}" for i in range(53)), "choice", "choice: 53 actions but only 52 labels"),
        (NAMES, "tokens", "action_format is 'tokens': expected one of auto, token, place, choice, trie"),
    ],
)
def test_names_that_cannot_be_held(names, action_format, sentence, tokenizer):
    with pytest.raises(PolicyError, match=sentence) as caught:
        ActionCodec(tokenizer, names, action_format)
    assert "\n" not in str(caught.value)


def test_special_tokens_without_a_role_are_refused():
    from transformers import AddedToken

    tokenizer = byte_tokenizer(eos_token="<eos>")
    tokenizer.add_tokens([AddedToken("<tool>", special=True)], special_tokens=False)
    assert "<tool>" in special_vocabulary(tokenizer)
    with pytest.raises(PolicyError, match="holds the special token '<tool>'"):
        ActionCodec(tokenizer, ("up", "<tool>"))


@pytest.mark.parametrize("roles", [{"unk_token": "[UNK]"}, {}])
def test_unknown_words_are_refused(roles):
    """Whether or not the tokenizer declares its unknown token."""
    tokenizer = word_tokenizer("up", "down", **roles)
    assert ActionCodec(tokenizer, ("up", "down")).format == "token"
    reason = "becomes a special or unknown token" if roles else "does not survive the tokenizer .it comes back as"
    with pytest.raises(PolicyError, match=f"cannot hold these actions .*'left' {reason}.* Give other names"):
        ActionCodec(tokenizer, ("up", "left"))


def test_one_name_begins_another_and_nothing_ends_it():
    tokenizer = word_tokenizer("go", "on", unk_token="[UNK]")
    with pytest.raises(PolicyError, match="one name begins another and the tokenizer has no end token"):
        ActionCodec(tokenizer, ("go", "go on"))


def test_names_that_become_the_same_tokens():
    tokenizer = word_tokenizer("go", "up", unk_token="[UNK]")
    with pytest.raises(PolicyError, match="two names share the same tokens"):
        ActionCodec(tokenizer, ("go up", "go  up"))
