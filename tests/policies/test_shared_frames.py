"""Frames that samples share: stored once, and otherwise like any column."""

import pickle

import numpy as np
import pytest
import torch

from manako.policies.interface import Rows
from manako.policies.shared_frames import SharedFrames


def rows_of(*stacks, offset=0):
    """Rows whose frames have these shades: (B, k)."""
    shades = sorted({shade for stack in stacks for shade in stack})
    frames = [torch.full((2, 2, 3), shade, dtype=torch.uint8) for shade in shades]
    index = torch.tensor([[shades.index(shade) for shade in stack] for stack in stacks])
    keys = [bytes([shade]) for shade in shades]
    numbers = torch.arange(len(stacks)) + offset
    return Rows({"number": numbers}, shared=SharedFrames(keys, {"frames": frames}, index))


def shades(rows):
    return rows["frames"][..., 0, 0, 0].tolist()


def test_they_are_read_like_a_column():
    rows = rows_of((0, 5), (5, 6))
    assert rows["frames"].shape == (2, 2, 2, 2, 3) and shades(rows) == [[0, 5], [5, 6]]
    assert "frames" in rows and "number" in rows and "other" not in rows and len(rows) == 2
    assert rows.with_column("other", torch.zeros(2)).shared is rows.shared


def test_select_join_and_pickle_keep_every_sample():
    one, other = rows_of((0, 5), (5, 6)), rows_of((6, 7), (0, 9), (9, 5), offset=10)
    assert shades(one.select(torch.tensor([1, 1, 0]))) == [[5, 6], [5, 6], [0, 5]]
    assert shades(other.select(torch.tensor([True, False, True]))) == [[6, 7], [9, 5]]
    joined = Rows.join([one, other.select(torch.tensor([2, 0]))])
    assert shades(joined) == [[0, 5], [5, 6], [9, 5], [6, 7]] and joined["number"].tolist() == [0, 1, 12, 10]
    again = pickle.loads(pickle.dumps(joined))
    assert shades(again) == shades(joined) and again.shared.keys == joined.shared.keys
    assert shades(Rows.join([again, one])) == shades(joined) + shades(one)


def test_a_frame_is_held_once_and_never_copied():
    one, other = rows_of((0, 5), (5, 6)), rows_of((5, 6), (6, 7))
    joined = Rows.join([one, other])
    assert len(joined.shared.keys) == 4  # 0, 5, 6, 7
    assert joined.shared.pool["frames"][1].data_ptr() == one.shared.pool["frames"][1].data_ptr()
    picked = joined.select(torch.tensor([0]))
    assert picked.shared.pool is not None and len(picked.shared.used().keys) == 2
    assert len(pickle.dumps(picked)) < len(pickle.dumps(joined))
    assert picked.nbytes == 8 + 2 * 8 + 2 * 12  # number, index, two frames


def test_what_moves_to_a_device_is_what_is_used():
    moved = rows_of((0, 5), (5, 6), (7, 8)).select(torch.tensor([1])).to("meta")
    assert moved["number"].device.type == "meta" and len(moved.shared.keys) == 2
    assert {part.device.type for part in moved.shared.pool["frames"]} == {"meta"}
    rows = rows_of((0, 5))
    assert rows.to("cpu").shared is rows.shared


def test_digests_see_content_and_order_and_not_places():
    one, other = rows_of((0, 5), (5, 0), (0, 6)), rows_of((5, 0), (9, 9), (0, 5))
    for rows in (one, other):
        rows.columns["number"].zero_()
    first, second = one.digests(), other.digests()
    assert first[0] == second[2] and first[1] == second[0]
    assert len({*first.tolist(), *second.tolist()}) == 4


def test_more_is_kept_of_each_frame():
    rows = rows_of((0, 5), (5, 6))
    features = [torch.full((3,), float(number)) for number in range(3)]
    shared = rows.shared.with_parts("image_features", features)
    joined = SharedFrames.join([shared, shared.select(torch.tensor([1]))])
    assert joined["image_features"][..., 0].tolist() == [[0.0, 1.0], [1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize("count", [1, 3])
def test_arrays_are_the_receiver_s_own(count):
    shared = rows_of(*[(number, number + 1) for number in range(count)]).shared
    keys, pool, index = shared.arrays()
    for array in (*pool.values(), index):
        array.flags.writeable = False
    again = SharedFrames.of_arrays(keys, pool, index)
    again.pool["frames"][0].fill_(255)
    assert np.array_equal(pool["frames"][0], shared.pool["frames"][0].numpy())
