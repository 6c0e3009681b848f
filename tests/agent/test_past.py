"""The last frames and turns of an episode, from the environment to learning: held against gymnasium's own env.

What a rollout holds is compared with stacks made by hand from what the plain environment shows, step by step.
"""

import json
import tracemalloc

import gymnasium as gym
import numpy as np
import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.data.pasts import past_rows, past_turns
from manako.agent.data.trajectories import to_dataset
from manako.agent.errors import TrainingError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.evaluation import evaluate, expert_agreement, record_episodes
from manako.agent.samples import with_group_advantages
from manako.agent.tuning.preferences import pair_dataset, state_pairs
from manako.agent.tuning.supervised import captions, demonstrated_actions, demonstrations
from manako.agent.tuning.trainers import PolicyCloningTrainer, SFTCollator
from manako.agent.workers.env_worker import EnvWorker
from manako.agent.workers.segments import History, Segment
from manako.envs import EpisodeVectorEnv, held_out_seeds
from manako.memory import NO_ACTION
from manako.policies import PolicySource, load_policy
from manako.policies.interface import Rows
from tests.helpers.rollout_equality import same_bits
from tests.helpers.small_runs import color_env, corridor_env, difference, ppo_config, tiny_policy, weights

FRAMES, HISTORY, STEPS = 3, 2, 12
CORRIDOR = {"length": 7, "limit": 4}


def collector(num_envs=3, steps=STEPS, source=None, **given):
    env = corridor_env(num_envs, CORRIDOR, seed=3)
    policy = tiny_policy(env, **{"frames": FRAMES, "history": HISTORY, **(source or {})})
    return RolloutCollector(env, policy, steps, seed=3, record=True, **given)


@pytest.fixture(scope="module")
def played():
    made = collector()
    return made.policy, made.collect(0), made.collect(1)


def episodes_by_hand(rollouts):
    """What gymnasium's own env shows and pays when the recorded actions are played from the recorded seeds.

    Returns:
        For each (number of the rollout, t, slot) the frames of the episode so far, its actions and rewards before the
        step, its instruction; and for truncated ends the same of the last frame.
    """
    env = gym.make("tests/Corridor-v0", render_mode="rgb_array", **CORRIDOR)
    steps, ends = {}, {}
    for slot in range(rollouts[0].rewards.shape[1]):
        for number, rollout in enumerate(rollouts):
            for t in range(len(rollout.rewards)):
                if rollout.record.steps[t, slot] == 0:
                    env.reset(seed=int(rollout.record.seeds[t, slot]))
                    frames, actions, rewards = [env.render()], [], []
                text = env.unwrapped.instruction
                steps[number, t, slot] = list(frames), list(actions), list(rewards), text
                action = int(rollout.record.to_env[t, slot])
                _, reward, terminated, truncated, _ = env.step(action)
                frames, actions, rewards = [*frames, env.render()], [*actions, action], [*rewards, reward]
                if truncated and not terminated:
                    ends[number, t, slot] = frames, actions, rewards, env.unwrapped.instruction
    return steps, ends


def stacked(frames):
    black = np.zeros_like(frames[0])
    return np.stack([*[black] * (FRAMES - len(frames)), *frames[-FRAMES:]])


def said(policy, actions, rewards, text):
    names = policy.spec.action_names
    done = [names[a] + (f" (reward {r:.3g})" if r else "") for a, r in zip(actions, rewards, strict=True)][-HISTORY:]
    return policy.processing.tokenize(
        policy.prompts.render("X").replace("X\nDone: nothing.", f"{text}\nDone: {', '.join(done) or 'nothing'}.")
    )["input_ids"].tolist()


def check_row(policy, rows, row, frames, actions, rewards, text):
    expected = policy.processing.pipeline.resize(stacked(frames))
    assert torch.equal(rows["frames"][row], expected)
    ids = rows["input_ids"][row, : rows["lengths"][row]].tolist()
    assert ids == said(policy, actions, rewards, text)


# ---- what is seen ----------------------------------------------------------------------------------------------------


def test_every_step_sees_its_own_episode_and_black_before_it(played):
    policy, *rollouts = played
    steps, _ = episodes_by_hand(rollouts)
    first_steps = 0
    for (number, t, slot), seen in steps.items():
        check_row(policy, rollouts[number].inputs, 3 * t + slot, *seen)
        first_steps += len(seen[0]) == 1
    assert first_steps > 6  # episodes that followed others in the same slot
    blacks = [(~rollout.inputs["frames"].flatten(2).bool().any(2)).sum(1) for rollout in rollouts]
    assert {count for part in blacks for count in part.tolist()} == {0, 1, 2}


def test_truncated_episodes_are_valued_with_their_last_frame_and_what_led_to_it(played):
    policy, *rollouts = played
    _, ends = episodes_by_hand(rollouts)
    found = 0
    for number, rollout in enumerate(rollouts):
        for row, (t, slot) in enumerate(rollout.bootstrap_at.tolist()):
            check_row(policy, rollout.bootstrap, 3 + row, *ends[number, t, slot])
            value = policy.predict_values(rollout.bootstrap.select(torch.tensor([3 + row])))
            assert torch.allclose(value, rollout.next_values[t, slot], atol=1e-5)
            found += 1
    assert found == len(ends) > 4


def test_the_first_ratio_is_one_and_a_wrong_past_changes_it(played):
    policy, rollout, _ = played
    again = policy.evaluate_actions(rollout.inputs, rollout.actions)
    assert torch.allclose(again.logprobs.view(rollout.logprobs.shape), rollout.logprobs, atol=1e-5)
    shared = rollout.inputs.shared
    turned = Rows(
        rollout.inputs.columns, rollout.inputs.fillers, type(shared)(shared.keys, shared.pool, shared.index.flip(1))
    )
    assert (policy.evaluate_actions(turned, rollout.actions).logprobs - again.logprobs).abs().max() > 1e-3


def test_a_resumed_rollout_sees_the_same_past():
    plain = collector(steps=5)
    plain.collect(0)
    state = json.loads(json.dumps(plain.state_dict()))
    assert any(slot["actions"] for slot in state["slots"])  # in the middle of episodes
    other = collector(steps=5)
    other.load_state_dict(state)
    same_bits(other.collect(1), plain.collect(1))


def test_an_episode_that_does_not_replay_starts_with_an_empty_past():
    env = EpisodeVectorEnv("tests/Drift-v0", 8, seed=1)
    env.remember(frames=2, turns=1)
    env.reset()
    for _ in range(3):
        env.step(np.zeros(8, np.int64))
    assert env.memory.past_frames().any((2, 3, 4)).all() and (env.memory.turns[..., 0] == 0).all()
    env.load_state_dict(env.state_dict())
    anew = env.episode_lengths == 0
    assert 0 < anew.sum() == env.given_up
    assert (env.memory.past_frames().any((2, 3, 4)).all(1) == ~anew).all()
    assert ((env.memory.turns[:, 0, 0] == NO_ACTION) == anew).all()


def test_more_to_remember_ends_the_running_episodes():
    env = color_env(2)
    env.reset()
    env.remember(frames=1)
    with pytest.raises(Exception, match="call reset first"):
        env.step(np.zeros(2, np.int64))
    env.reset()
    env.remember(frames=1)  # nothing more
    env.step(np.zeros(2, np.int64))


def test_a_worker_s_environments_tell_the_learner_their_past():
    """What the learner of ray-env keeps after it took a state over; the whole backends are held in test_ray_workers."""
    make = track_segment
    plain = make(0, 2)
    plain.remember(2, 3)
    plain.reset()
    for action in (0, 1):
        plain.step(np.array([action, 1 - action]))
    observed = EnvWorker(make).observe(Segment(0, 2), History(plain.state_dict(), ()), (2, 3))
    assert np.array_equal(observed.past_frames, plain.memory.past_frames()) and observed.past_frames.any()
    assert np.array_equal(observed.past_turns, plain.memory.turns)
    assert EnvWorker(make).observe(Segment(0, 2), History(None, ())).past_frames is None


def track_segment(first_slot, num_slots):
    return EpisodeVectorEnv("manako/Track-v0", num_slots, seed=3, first_slot=first_slot)


# ---- what it takes ---------------------------------------------------------------------------------------------------


def noise_policy(frames):
    env = EpisodeVectorEnv("tests/Drift-v0", 1)
    return load_policy(PolicySource(frames=frames, image_size=64, patch_size=32), env.action_names, (64, 64, 3))


def prepared(policy, steps, envs):
    """Rows of steps whose frames all differ, joined, and the bytes that Python and NumPy took for them."""
    rng = np.random.default_rng(0)
    shown = np.zeros((envs, 0, 64, 64, 3), np.uint8)
    parts = []
    tracemalloc.start()
    for _ in range(steps):
        now = rng.integers(0, 256, (envs, 64, 64, 3), dtype=np.uint8)
        told = {}
        if policy.spec.frames > 1:
            black = np.zeros((envs, policy.spec.frames - 1, 64, 64, 3), np.uint8)
            told["past_frames"] = np.concatenate([black, shown], 1)[:, -(policy.spec.frames - 1) :]
            shown = np.concatenate([shown, now[:, None]], 1)[:, -(policy.spec.frames - 1) :]
        parts.append(policy.prepare(now, ["go"] * envs, told))
    rows = Rows.join(parts)
    del parts, now, told, shown
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return rows, taken


def test_four_frames_take_the_room_of_one():
    """128 x 32 steps of frames of 64 x 64, all different."""
    one, _ = prepared(noise_policy(1), 128, 32)
    four, taken = prepared(noise_policy(4), 128, 32)
    assert four["frames"].shape == (4096, 4, 64, 64, 3) and one["frames"].shape == (4096, 64, 64, 3)
    assert len(four.shared.keys) == 4096 + 1  # and black
    frames = one["frames"].nbytes
    assert frames == 4096 * 64 * 64 * 3
    assert four.nbytes < 1.05 * one.nbytes
    assert taken < 1.2 * frames  # nothing else holds copies either
    assert torch.equal(four["frames"][:, -1], one["frames"])


def test_a_minibatch_s_bytes_are_its_own_frames(played):
    _, rollout, _ = played
    some = rollout.inputs.select(torch.tensor([0, 1]))
    assert some.nbytes < rollout.inputs.nbytes / 4


# ---- learning and evaluation -----------------------------------------------------------------------------------------


def test_states_that_differ_in_their_past_are_told_apart():
    """GiGPO compares steps in the same state: of Track's ball, its place and where it came from."""
    env = EpisodeVectorEnv("manako/Track-v0", 8, group_size=4)
    rollout = RolloutCollector(env, tiny_policy(env, frames=2), 12, seed=0).collect(0)
    frames, digests = rollout.inputs["frames"].numpy(), rollout.inputs.digests().tolist()
    rows = [row.tobytes() for row in frames]
    assert len({*zip(rows, digests, strict=True)}) == len(set(rows)) == len(set(digests)) < len(rows)
    assert len({row.tobytes() for row in frames[:, -1]}) < len(set(rows))
    with_group_advantages(rollout, "gigpo", 4, 0.9, 1.0)


def test_ppo_learns_from_several_frames_and_turns(tmp_path):
    env = corridor_env(4, CORRIDOR, seed=3)
    trainer = PPOTrainer(tiny_policy(env, frames=2, history=1), ppo_config(tmp_path), env)
    start = weights(trainer.model)
    trainer.train()
    assert difference(start, weights(trainer.model)) > 0


@pytest.mark.parametrize("condition", ["policy", "blank_image", "replaced_instruction"])
def test_a_blank_image_blanks_all_frames_and_the_controls_leave_what_was_done(condition):
    env = EpisodeVectorEnv("manako/Track-v0", 2)
    policy = tiny_policy(env, frames=3, history=1)
    seen, prepare = [], policy.prepare

    def watched(images, instructions, told=None):
        seen.append((images.any(), told["past_frames"].any((2, 3, 4)).tolist(), told["past_turns"][0, 0, 0]))
        return prepare(images, instructions, told)

    policy.prepare = watched
    evaluate(policy, env, held_out_seeds(2), condition)
    shows = condition != "blank_image"
    assert len(seen) == 6 and all(image == shows for image, *_ in seen)
    assert [past[0] for _, past, _ in seen[:3]] == [[False, False], [False, shows], [shows, shows]]
    assert seen[0][2] == NO_ACTION and all(action >= 0 for *_, action in seen[1:])


def test_evaluation_agreement_and_gifs_tell_the_past():
    env = EpisodeVectorEnv("manako/Track-v0", 2)
    policy = tiny_policy(env, frames=3, history=2)
    told, prepare = [], policy.prepare

    def watched(images, instructions, given=None):
        told.append(given["past_turns"][..., 0].max(1).min())
        return prepare(images, instructions, given)

    policy.prepare = watched
    for play in (
        lambda: evaluate(policy, env, held_out_seeds(2)),
        lambda: expert_agreement(policy, env, held_out_seeds(2)),
        lambda: record_episodes(policy, env, held_out_seeds(2)),
    ):
        told.clear()
        play()
        assert len(told) == 6 and told[0] == NO_ACTION and min(told[1:]) >= 0


# ---- data sets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(played):
    policy, *rollouts = played
    return to_dataset(rollouts, policy, "tests/Corridor-v0", "policy", {})


def rows_of_rollouts(rollouts, data):
    """For each row of the data set its flat place in the rollouts."""
    places = {}
    for number, rollout in enumerate(rollouts):
        for t, slot in np.ndindex(*rollout.rewards.shape):
            key = int(rollout.record.seeds[t, slot]), int(rollout.record.steps[t, slot])
            places.setdefault(key, (number, t * 3 + slot))
    return [places[key] for key in zip(data["seed"], data["step"], strict=True)]


def test_a_data_set_holds_each_frame_once_and_prompts_with_what_was_done(played, data):
    policy, *rollouts = played
    assert data.column_names.count("image") == 1 and len(data) > 20
    for row, (number, flat) in zip(data, rows_of_rollouts(rollouts, data), strict=True):
        inputs = rollouts[number].inputs
        ids = inputs["input_ids"][flat, : inputs["lengths"][flat]].tolist()
        assert policy.processing.tokenize(row["prompt"])["input_ids"].tolist() == ids


def test_cloning_sees_what_acting_saw(played, data, tmp_path):
    policy, *rollouts = played
    rows = demonstrated_actions(data, frames=FRAMES, history=HISTORY)
    trainer = object.__new__(PolicyCloningTrainer)
    trainer.policy, trainer.demonstrated = policy, rows
    places = rows_of_rollouts(rollouts, data)
    batch = trainer.collate([rows[place] for place in range(len(rows))])
    seen = batch["inputs"].select(batch["observation"])
    for row, (number, flat) in enumerate(places):
        inputs = rollouts[number].inputs
        assert torch.equal(seen["frames"][row], inputs["frames"][flat])
        length = int(inputs["lengths"][flat])
        assert seen["lengths"][row] == length
        assert torch.equal(seen["input_ids"][row, :length], inputs["input_ids"][flat, :length])
    assert len(batch["inputs"]) <= len(rows)


def test_tokens_are_learned_behind_the_same_frames_and_prompts(played, data):
    policy, *rollouts = played
    rows, collate = demonstrations(data, policy), SFTCollator(policy)
    for row, (number, flat) in list(enumerate(rows_of_rollouts(rollouts, data)))[:12]:
        batch = collate([rows[row]])
        inputs = rollouts[number].inputs.select(torch.tensor([flat]))
        given = policy.processing.model_inputs(inputs)
        assert torch.equal(batch["pixel_values"], given["pixel_values"]) and len(batch["pixel_values"]) == FRAMES
        length = int(inputs["lengths"][0])
        assert torch.equal(batch["input_ids"][:, :length], given["input_ids"][:, :length])
    pairs = pair_dataset(data, [(5, 0, 1), (2, 1, 0)], policy)
    assert pairs[0]["prompt"] == rows[5]["prompt"]
    assert [image.tobytes() for image in pairs[0]["images"]] == [image.tobytes() for image in rows[5]["images"]]


def test_equal_frames_with_another_past_are_other_states(data):
    alone, with_past = state_pairs(data), state_pairs(data, FRAMES, HISTORY)
    assert len(with_past) <= len(alone)


def test_rows_out_of_order_are_refused(data):
    second = data["step"].index(1)
    other = next(row for row in range(second, len(data)) if data["step"][row] == 0)  # another episode begins
    for rows in ([second], [second, second - 1], [other, second]):
        wrong = data.select(rows)
        with pytest.raises(TrainingError, match="is step 1 of .* the row above it is not the step before"):
            past_rows(wrong, 1)
        with pytest.raises(TrainingError, match="as experiments/collect.py writes them"):
            past_turns(wrong, 1)
    assert past_rows(data.select([3, 1]), 0) == [[], []]


def test_captions_stand_behind_the_frame_and_black_before_it(played):
    policy, rollout, _ = played
    frame = rollout.record.images[0]
    row = captions([frame], ["a column"], FRAMES)[0]
    assert [bool(np.asarray(image).any()) for image in row["images"]] == [False] * (FRAMES - 1) + [True]
    batch = SFTCollator(policy)([row])
    assert len(batch["pixel_values"]) == FRAMES
