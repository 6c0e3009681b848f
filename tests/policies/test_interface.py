"""The door's own parts: rows, draws, drawing from a closed set, and what a policy refuses that says no more."""

import pickle

import numpy as np
import pytest
import torch

from manako.policies import PolicyError
from manako.policies.interface import (
    Acted,
    Draws,
    Policy,
    PolicySpec,
    Rows,
    act_categorical,
    entropy,
    sample_categorical,
)

# ---- rows ------------------------------------------------------------------------------------------------------------


def prompts(*lengths, offset=0, filler=9):
    """Rows with a ragged column of tokens 1, 2, 3 ..., one of masks (B, L, 2), and one that is not ragged."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), filler)
    pairs = torch.full((len(lengths), longest, 2), -1.0)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(1, length + 1)
        pairs[row, :length] = torch.arange(2.0 * length).view(length, 2)
    columns = {"ids": ids, "pairs": pairs, "frames": offset + torch.arange(4 * len(lengths)).view(len(lengths), 2, 2)}
    return Rows(columns, fillers={"ids": filler, "pairs": -1})


def test_rows_are_selected_by_place_and_by_mask():
    rows = prompts(2, 4, 3)
    assert len(rows) == 3
    for chosen in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        part = rows.select(chosen)
        assert len(part) == 2 and part.fillers == rows.fillers
        assert all(torch.equal(part[name], column[chosen]) for name, column in rows.columns.items())
    assert rows.select(torch.tensor([2, 0]))["ids"].tolist() == [[1, 2, 3, 9], [1, 2, 9, 9]]
    assert len(rows.select(torch.zeros(0, dtype=torch.int64))) == 0


def test_rows_move_to_another_device():
    moved = prompts(2, 3).to("meta")
    assert {column.device.type for column in moved.columns.values()} == {"meta"} and moved.fillers["ids"] == 9
    here = prompts(2, 3)
    assert all(torch.equal(here.to(torch.device("cpu"))[name], column) for name, column in here.columns.items())


def test_joining_pads_what_is_ragged_with_its_own_filler():
    joined = Rows.join([prompts(2), prompts(4, 3, offset=100), prompts(1)])
    assert joined["ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9], [1, 9, 9, 9]]
    assert joined["pairs"].shape == (4, 4, 2)
    assert joined["pairs"][0].tolist() == [[0, 1], [2, 3], [-1, -1], [-1, -1]]
    assert joined["pairs"][1].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert joined["frames"][:, 0, 0].tolist() == [0, 100, 104, 0] and joined.fillers == {"ids": 9, "pairs": -1}
    assert joined["ids"].dtype == torch.int64 and joined["pairs"].dtype == torch.float32


def test_joining_the_parts_of_a_split_gives_the_whole():
    rows = prompts(2, 4, 3, 1)
    parts = [rows.select(part) for part in torch.arange(4).split(3)]
    assert all(torch.equal(Rows.join(parts)[name], column) for name, column in rows.columns.items())


def test_digests_are_equal_where_all_of_a_sample_is_padding_aside():
    """The same samples in batches that are padded to 2, 5 and 3."""
    alone, wide, other = prompts(2), prompts(2, 5), prompts(3, 2)
    assert alone.digests().dtype == torch.int64 and alone.digests().shape == (1,)
    assert alone.digests()[0] == wide.digests()[0]
    assert torch.equal(prompts(3, 2).digests(), other.digests())
    again = Rows.join([other, alone, wide])
    assert torch.equal(again.digests(), torch.cat([part.digests() for part in (other, alone, wide)]))


@pytest.mark.parametrize("column", ["ids", "pairs", "frames"])
def test_digests_differ_where_any_column_does(column):
    rows, changed = prompts(2, 4), prompts(2, 4)
    changed[column].view(2, -1)[1, 0] += 5
    digests, others = rows.digests().tolist(), changed.digests().tolist()
    assert digests[0] == others[0] and len({*digests, *others}) == 3


def test_digests_see_a_filler_that_stands_inside_a_sample():
    rows = Rows({"ids": torch.tensor([[1, 9, 2], [1, 2, 9], [1, 9, 9]])}, {"ids": 9})
    assert len(set(rows.digests().tolist())) == 3
    assert len(set(Rows(rows.columns).digests().tolist())) == 3  # nothing is ragged: 9 is a number like any other


def test_digests_see_where_a_column_ends_and_the_next_begins():
    """A shape or a name taken out of the digest would make these equal."""
    one = Rows({"a": torch.tensor([[1, 2]]), "b": torch.tensor([[3]])})
    other = Rows({"a": torch.tensor([[1]]), "b": torch.tensor([[2, 3]])})
    swapped = Rows({"b": torch.tensor([[1, 2]]), "a": torch.tensor([[3]])})
    flat = Rows({"a": torch.tensor([[[1], [2]]]), "b": torch.tensor([[3]])})
    assert len({int(rows.digests()) for rows in (one, other, swapped, flat)}) == 4
    assert int(Rows(dict(reversed(one.columns.items()))).digests()) == int(one.digests())  # their order says nothing


def test_rows_are_pickled_whole_and_come_back_writable():
    rows = prompts(2, 4)
    back = pickle.loads(pickle.dumps(rows, protocol=5))
    assert back.columns.keys() == rows.columns.keys() and back.fillers == rows.fillers
    for name, column in rows.columns.items():
        assert torch.equal(back[name], column) and back[name].dtype == column.dtype
        back[name][0] = 0  # shared memory is read-only, and what is learned from must not be
    assert not torch.equal(back["ids"], rows["ids"])


def test_pickled_out_of_band_rows_do_not_stay_in_the_buffers_they_came_in():
    """Ray hands out views of shared memory, which others read as well."""
    rows, buffers = prompts(2, 4), []
    data = pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)
    assert buffers  # the tensors are not in `data`
    memory = [bytearray(buffer) for buffer in buffers]
    before = [bytes(part) for part in memory]
    back = pickle.loads(data, buffers=memory)
    for name, column in rows.columns.items():
        assert torch.equal(back[name], column)
        back[name][:] = 0
    assert [bytes(part) for part in memory] == before


# ---- draws -----------------------------------------------------------------------------------------------------------


def slot_generators(slots):
    return [np.random.default_rng([7, slot]) for slot in slots]


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [1, 0], [2]]])
def test_any_split_of_the_slots_draws_the_same_numbers(split):
    expected = np.stack([rng.random(5) for rng in slot_generators(range(4))])  # (4 slots, 5 numbers)
    for slots in split:
        draws = Draws(slot_generators(slots))
        assert len(draws) == len(slots)
        assert np.array_equal(np.stack([draws.next() for _ in range(5)], axis=1), expected[slots])


def test_selected_draws_go_on_with_the_same_numbers():
    """A policy may draw a second token for some slots alone: the others' next number is still their second."""
    draws = Draws(slot_generators(range(4)))
    expected = np.stack([rng.random(3) for rng in slot_generators(range(4))], axis=1)  # (3 numbers, 4 slots)
    assert np.array_equal(draws.next(), expected[0])
    some = draws.select([2, 0])
    assert len(some) == 2 and np.array_equal(some.next(), expected[1][[2, 0]])
    last = draws.next()
    assert np.array_equal(last, [expected[2][0], expected[1][1], expected[2][2], expected[1][3]])


def test_slots_that_share_a_generator_are_served_in_order():
    draws, rng = Draws([np.random.default_rng(3)] * 4), np.random.default_rng(3)
    assert draws.next().tolist() == rng.random(4).tolist() and draws.next().tolist() == rng.random(4).tolist()
    assert draws.next().dtype == np.float64


# ---- a closed set ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uniform", "action"),
    [(0.0, 0), (0.2499, 0), (0.2501, 1), (0.7499, 1), (0.7501, 2), (1 - 2**-53, 2)],
)
def test_sampling_inverts_the_distribution_function(uniform, action):
    logprobs = torch.tensor([[0.25, 0.5, 0.25]]).log()  # the distribution function: 0.25, 0.75, 1
    assert sample_categorical(logprobs, np.array([uniform])).tolist() == [action]


def test_sampling_never_takes_an_impossible_action():
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log().expand(3, -1)
    assert sample_categorical(logprobs, np.array([0.0, 0.5, 1 - 2**-53])).tolist() == [1, 3, 3]


def test_sampled_rows_are_independent():
    logprobs = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    assert sample_categorical(logprobs, np.array([0.5, 0.5])).tolist() == [0, 1]


def test_sampled_frequencies():
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    drawn = sample_categorical(probabilities.log().expand(40_000, -1), np.random.default_rng(0).random(40_000))
    shares = torch.bincount(drawn, minlength=4) / 40_000
    # four standard deviations of a share are at most 4 sqrt(0.25 / 40000) = 0.01
    assert torch.allclose(shares, probabilities, atol=0.01)


def test_entropy_by_hand():
    # log 2 = 0.6931472; 0 of a certain action; 0.75 log(4/3) + 0.25 log 4 = 0.5623351
    logp = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]]).log()
    torch.testing.assert_close(entropy(logp), torch.tensor([0.6931472, 0.0, 0.5623351]), atol=1e-6, rtol=0)


def test_an_action_of_a_closed_set():
    logprobs = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    values = torch.tensor([0.5, -0.5])
    draws = Draws([np.random.default_rng([7, slot]) for slot in range(2)])
    numbers = [rng.random() for rng in slot_generators(range(2))]
    drawn = act_categorical(logprobs, values, draws, greedy=False)
    expected = sample_categorical(logprobs, np.array(numbers))
    assert drawn.actions["index"].tolist() == drawn.to_env.tolist() == expected.tolist()
    greedy = act_categorical(logprobs, values, Draws([]), greedy=True)  # asks for no number
    assert greedy.to_env.tolist() == [1, 2] and greedy.to_env.dtype == np.int64
    assert torch.equal(greedy.logprobs, torch.tensor([[0.5], [0.7]]).log())
    assert greedy.mask.tolist() == [[True], [True]] and torch.equal(greedy.values, values)


# ---- a policy that says no more than it must -------------------------------------------------------------------------


class Bare(Policy):
    """What every policy must have, and nothing else."""

    def __init__(self):
        super().__init__()
        self.spec = PolicySpec(("left", "right"), (8, 8, 3))
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.fixed = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def prepare(self, images, instructions, told=None):
        return Rows({"images": torch.from_numpy(images)})

    def act(self, inputs, draws, greedy=False):
        zeros = torch.zeros(len(inputs))
        ones = torch.ones(len(inputs), 1, dtype=torch.bool)
        return Acted(Rows({"index": zeros.long()}), zeros.long().numpy(), zeros[:, None], ones, zeros)


@pytest.fixture
def bare():
    return Bare()


SEEN = Rows({"images": torch.zeros(3, 8, 8, 3)})
REFUSALS = {
    "evaluate_actions": (lambda policy: policy.evaluate_actions(SEEN, SEEN), "cannot learn: expected a policy with"),
    "forward": (lambda policy: policy(SEEN, SEEN), "cannot learn: expected a policy with"),
    "as_reference": (lambda policy: policy.as_reference(), "does not keep what it was: expected trainable: lora"),
    "actions_from_env": (lambda policy: policy.actions_from_env(np.zeros(3)), "no actions to evaluate: expected"),
    "prompt": (lambda policy: policy.prompt("go"), "no prompt: expected a policy with a language model"),
    "prompt_tokens": (lambda policy: policy.prompt_tokens("go"), "no prompt: expected a policy with a language model"),
    "messages": (lambda policy: policy.messages("go"), "no prompt: expected a policy with a language model"),
    "answers": (lambda policy: policy.answers(SEEN), "no answers: expected a policy with a language model"),
    "answer_tokens": (lambda policy: policy.answer_tokens(SEEN), "no answers: expected a policy with a language model"),
    "save": (lambda policy: policy.save(None), "nothing to save: expected a policy that can learn"),
    "load_weights": (lambda policy: policy.load_weights(None), "no weights: expected a policy that can learn"),
}


@pytest.mark.parametrize(("ask", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_policy_does_not_say_it_refuses_in_one_sentence(ask, message, bare):
    with pytest.raises(PolicyError, match=message) as caught:
        ask(bare)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and text.count(". ") == 0
    assert text.startswith(("Bare ", "This policy "))


def test_the_other_defaults(bare):
    assert torch.equal(bare.predict_values(SEEN), torch.zeros(3))  # no critic
    assert not bare.can_learn and not bare.has_reference and bare.needs == () and bare.describe() == []
    assert bare.model is bare.processor is None and bare.device == torch.device("cpu")
    assert bare.fit_adapter(np.zeros((2, 8, 8, 3), np.uint8)) == []
    assert bare.spec.action_space.n == 2
    with bare.frozen_weights():
        assert not (2 * bare.weight).requires_grad
    (group,) = bare.parameter_groups(0.1, 0.2)  # without an adapter there is no other rate
    assert group["lr"] == 0.1 and len(group["params"]) == 1 and group["params"][0] is bare.weight


def test_a_policy_without_the_two_verbs_cannot_be_made():
    with pytest.raises(TypeError, match=r"abstract methods? '?act'?, '?prepare"):
        Policy()
