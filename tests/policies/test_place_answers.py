"""Places as answers: their boxes are those that the library's own Kosmos-2 processor reads and writes."""

import itertools
import math

import pytest
import torch
from transformers.models.kosmos2.processing_kosmos2 import (
    coordinate_to_patch_index,
    extract_entities_with_patch_indices,
)

from manako.places import Grid, cell_name, grid_of
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.answers import KINDS
from manako.policies.answers.closed_set import ActionCodec
from manako.policies.answers.place import Place, bin_token, box_bins
from manako.policies.architectures.kosmos2 import build_vlm
from manako.policies.language_models.tiny_llama import tiny_tokenizer
from tests.helpers.families import FAMILIES
from tests.helpers.foreign_models import FRAME, frames

GRIDS = [(3, 3), (5, 5), (4, 6), (2, 1), (1, 7), (32, 32)]


def names_of(rows, columns):
    return tuple(cell_name(row, column) for row in range(rows) for column in range(columns))


@pytest.fixture(scope="module")
def processor():
    return build_vlm(None, None, None, FRAME)[1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A foreign Kosmos-2 with 4 x 4 bins."""
    return str(FAMILIES["kosmos2"](tmp_path_factory.mktemp("kosmos2")))


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_the_library_reads_the_cell_out_of_the_answer(rows, columns, processor):
    codec = ActionCodec(processor.tokenizer, names_of(rows, columns))
    assert codec.format == "place" and codec.legend == f"a place, {rows} rows x {columns} columns"
    grid = grid_of(codec.names)
    for action, (row, column) in enumerate(itertools.product(range(rows), range(columns))):
        answer = codec.answers[action]
        text, entities = processor.post_process_generation(f"<image> . </image><grounding>{answer}")
        assert text == "" and len(entities) == 1
        ((left, top, right, bottom),) = entities[0][2]
        cell = column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
        assert all(abs(one - other) <= 1 / 32 for one, other in zip((left, top, right, bottom), cell, strict=True))
        assert math.floor((top + bottom) / 2 * rows) == row and math.floor((left + right) / 2 * columns) == column
        assert grid.box(action) == cell
        # and it writes the same tokens for this box
        ((_, _, [bins]),) = extract_entities_with_patch_indices(answer)
        assert bins == coordinate_to_patch_index(cell, 32) == box_bins(grid, action, 32)


def test_an_answer_is_four_tokens_of_which_one_is_chosen(processor):
    codec = ActionCodec(processor.tokenizer, names_of(5, 5))
    begin, end = processor.tokenizer.convert_tokens_to_ids(["<object>", "</object>"])
    assert all(len(ids) == 4 and ids[0] == begin and ids[-1] == end for ids in codec.token_ids)
    (branch,) = codec.branches
    assert branch.path == (begin,) and len(branch.children) == 25
    assert codec.path_tokens == ((begin,),)


@torch.no_grad()
def test_probabilities_are_those_of_the_cells_alone(toy):
    """Against plain transformers: every answer's own tokens, renormalised over the cells."""
    policy = load_policy(PolicySource(policy=toy), names_of(3, 3), (64, 64, 3))
    assert policy.codec.format == "place" and policy.checked.hold
    images = frames(2, (64, 64, 3), seed=1)
    said = policy.distribution(policy.prepare(images, ["up", "go to the red ball"]))[0]
    for image, instruction, logprobs in zip(images, ("up", "go to the red ball"), said, strict=True):
        scores = []
        for answer in policy.codec.answers:
            text = policy.prompt(instruction) + answer
            given = policy.processor(text=text, images=[image], return_tensors="pt")
            logits = policy.vlm(**given).logits[0, -4:-3]  # at <object>, of the first bin
            scores.append(logits.log_softmax(-1)[0, given["input_ids"][0, -3]])
        assert torch.allclose(logprobs, torch.stack(scores).log_softmax(-1), rtol=0, atol=1e-5)
    assert (said[0] - said[1]).abs().max() > 1e-3


def test_names_are_read_as_they_are_written():
    assert names_of(1, 2) == ("row 1, column 1", "row 1, column 2")
    assert grid_of(("Row 2, column 1", " row 1 column 1")) == Grid(2, 1, ((1, 0), (0, 0)))
    assert grid_of(names_of(4, 6)).is_whole and not grid_of(names_of(4, 6)[1:]).is_whole
    for names in ((), ("row 1",), ("row 1, column 0",), ("row 1, column 1", "up"), ("row 1, column 1\nup",)):
        assert grid_of(names) is None


def test_any_order_and_case_of_the_names(processor):
    names = [name.title() for name in names_of(2, 3)]
    mixed = [names[index] for index in (4, 0, 5, 2, 1, 3)]
    answers = dict(zip(names, ActionCodec(processor.tokenizer, names).answers, strict=True))
    assert ActionCodec(processor.tokenizer, mixed).answers == tuple(answers[name] for name in mixed)


def test_without_grounding_tokens_or_cells_the_names_are_said_as_before(processor):
    assert ActionCodec(tiny_tokenizer(), names_of(2, 2)).format == "choice"
    assert ActionCodec(processor.tokenizer, ("up", "down")).format == "token"
    assert ActionCodec(processor.tokenizer, ("turn left", "turn right")).format == "choice"
    assert ActionCodec(processor.tokenizer, names_of(2, 2)[:3]).format == "choice"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("up", "row 1, column 1"), "place: the names are not all of the form 'row 1, column 2'"),
        (("row 0, column 1", "row 1, column 1"), "place: the names are not all of the form"),
        (("row 1, column 1, please", "row 1, column 2"), "place: the names are not all of the form"),
        (names_of(2, 2)[:3], "place: the names are not each cell of a grid of 2 x 2 once"),
        (("row 1, column 1", "Row 1, column 1", "row 1, column 2"), "not each cell of a grid of 1 x 2 once"),
        (("row 1, column 1", "row 1, column 999999999"), "not each cell of a grid of 1 x 999999999 once"),
        (names_of(1, 33), "place: 32 x 32 bins cannot tell 1 x 33 cells apart"),
    ],
)
def test_names_that_are_no_grid_are_refused(names, sentence, processor):
    with pytest.raises(PolicyError, match=f"cannot hold these actions .*{sentence}.* Give other names") as caught:
        ActionCodec(processor.tokenizer, names, "place")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_grounding_tokens_is_refused():
    with pytest.raises(PolicyError, match="place: the tokenizer has no grounding tokens <object>, <patch_index_0000>"):
        ActionCodec(tiny_tokenizer(), names_of(3, 3), "place")


def test_as_many_bins_as_the_tokenizer_has(toy):
    with pytest.raises(PolicyError, match="place: 4 x 4 bins cannot tell 5 x 1 cells apart"):
        load_policy(PolicySource(policy=toy, action_format="place"), names_of(5, 1), FRAME)
    assert load_policy(PolicySource(policy=toy), names_of(5, 1), FRAME).codec.format != "place"
    kind = KINDS["place"].of_tokenizer(load_policy(PolicySource(policy=toy), names_of(4, 4), FRAME).processor.tokenizer)
    assert kind == Place(4) and KINDS["place"] == Place()
    every = [f"<object>{bin_token(number)}{bin_token(number)}</object>" for number in range(16)]
    assert kind.answers(names_of(4, 4)) == tuple(every)
