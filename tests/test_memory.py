"""What is remembered of an episode, by hand, and as words."""

import numpy as np

from manako.memory import NO_ACTION, Memory, before, in_words, turns_before


def frame(shade):
    return np.full((2, 2, 3), shade, np.uint8)


def shades(frames):
    return frames[..., 0, 0, 0].tolist()


def test_an_episode_begins_black_and_keeps_the_last_frames_in_order():
    memory = Memory(2, frames=2, turns=3)
    for slot in (0, 1):
        memory.start(slot, frame(10))
    assert shades(memory.past_frames()) == [[0, 0], [0, 0]]
    for number, (shown, reward) in enumerate(((10, 0.0), (11, 0.5), (12, -1.0), (13, 0.0))):
        memory.step(1, frame(shown), number, reward)
    assert shades(memory.past_frames()) == [[0, 0], [12, 13]]
    assert memory.turns[1].tolist() == [[1, 0.5], [2, -1.0], [3, 0.0]]
    assert memory.turns[0].tolist() == [[NO_ACTION, 0.0]] * 3
    memory.start(1, frame(20))
    assert shades(memory.past_frames()) == [[0, 0], [0, 0]] and memory.turns[1, :, 0].tolist() == [NO_ACTION] * 3


def test_frames_are_kept_as_they_came_and_not_copied():
    memory = Memory(1, frames=3)
    batch = np.zeros((5, 2, 2, 3), np.uint8)
    memory.start(0, batch[0])
    memory.step(0, batch[1], 0, 0.0)
    assert any(np.shares_memory(past, batch) for past in memory._past[0])


def test_the_same_of_a_whole_episode_that_lies_before_us():
    frames, actions, rewards = [frame(10 + t) for t in range(4)], [3, 1, 2], [0.0, 0.25, 0.0]
    memory = Memory(1, frames=2, turns=2)
    memory.start(0, frames[0])
    for t in range(4):
        assert np.array_equal(before(frames, t, 2), memory.past_frames()[0])
        if t < 3:
            assert np.array_equal(turns_before(actions, rewards, t, 2), memory.turns[0])
            memory.step(0, frames[t], actions[t], rewards[t])
    assert shades(before(frames, 1, 2)) == [0, 10]
    assert turns_before(actions, rewards, 1, 2).tolist() == [[NO_ACTION, 0.0], [3, 0.0]]


def test_another_process_s_memory_is_taken_over():
    one, other = Memory(2, frames=2, turns=1), Memory(4, frames=2, turns=1)
    for slot in (0, 1):
        one.start(slot, frame(1))
        one.step(slot, frame(5 + slot), 2, 0.5)
    for slot in range(4):
        other.start(slot, frame(1))
    other.load(slice(2, 4), one.past_frames(), one.turns)
    assert shades(other.past_frames()) == [[0, 0], [0, 0], [0, 5], [0, 6]]
    assert other.turns[2:, 0].tolist() == [[2, 0.5], [2, 0.5]]


def test_rewards_are_those_that_data_sets_store():
    memory = Memory(1, turns=1)
    memory.start(0, frame(0))
    memory.step(0, frame(0), 0, 0.1)
    assert memory.turns[0, 0, 1] == float(np.float32(0.1))


def test_turns_in_words():
    names = ("up", "row 1, column 2")
    assert in_words(None, names) == in_words(np.array([[NO_ACTION, 0.0]]), names) == "Done: nothing."
    assert in_words(np.array([[0, 0.0], [-1, 0.0]]), names) == "Done: up, no action."  # an answer named none
    turns = np.array([[NO_ACTION, 0.0], [0, 0.0], [1, np.float32(-0.2)], [0, 1.0]])
    assert in_words(turns, names) == "Done: up, row 1, column 2 (reward -0.2), up (reward 1)."
