"""A frozen encoder's features, stored in the rows: the same numbers, by fewer forwards of the encoder."""

import copy
import pickle

import numpy as np
import pytest
import torch
from trl import DPOConfig, KTOConfig, SFTConfig

from manako.agent.collector import RolloutCollector
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_loop import train_ppo
from manako.agent.rollout import merge
from manako.agent.tuning.supervised import assistant_message
from manako.agent.tuning.trainers import PolicyDPOTrainer, PolicyKTOTrainer, PolicySFTTrainer
from manako.envs import EpisodeVectorEnv
from manako.policies import PolicyError, PolicySource, features, load_policy
from manako.policies.architectures.composed import modeling
from manako.policies.features import COLUMN
from manako.policies.interface import Draws, Rows
from tests.helpers.foreign_models import FRAME, INSTRUCTIONS, NAMES, TURNS, frames
from tests.test_families import datasets, settings


def policy_of(trainable="adapter", **source):
    return load_policy(PolicySource(trainable=trainable, **source), NAMES, FRAME)


def without(rows):
    """The rows as a policy whose encoder learns stores them."""
    return Rows({name: column for name, column in rows.columns.items() if name != COLUMN}, rows.fillers)


@pytest.fixture
def seen(monkeypatch):
    """How many frames went through the encoder, a number a forward."""
    counts = []
    right = modeling.ManakoModel.get_vision_features

    def counted(self, pixel_values):
        counts.append(len(pixel_values))
        return right(self, pixel_values)

    monkeypatch.setattr(modeling.ManakoModel, "get_vision_features", counted)
    return counts


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ({}, NAMES),
        ({"vision_encoder": "convnext", "adapter": "mlp_zscore"}, NAMES),
        ({"trainable": "lora"}, TURNS),  # answers of several tokens
    ],
)
def test_features_stand_for_pixels(source, names, seen):
    policy = load_policy(PolicySource(**{"trainable": "adapter", **source}), names, FRAME)
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    assert inputs[COLUMN].shape == (3, 16, 64) and inputs[COLUMN].dtype == torch.float32
    for reading in (policy.reading, policy.whole_prompt):
        seen.clear()
        stored = policy.distribution(inputs, reading)
        assert seen == []
        again = policy.distribution(without(inputs), reading)
        assert sum(seen) == len(seen) * 3 > 0
        for one, other in zip(stored, again, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_pixels():
    policy = policy_of()
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def gradients(rows):
        logprobs, values = policy.distribution(rows)
        return torch.autograd.grad(logprobs[:, 0].sum() + values.sum(), learning, allow_unused=True)

    for one, other in zip(gradients(inputs), gradients(without(inputs)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_bfloat16_features_are_stored_without_loss():
    policy = policy_of(dtype="bfloat16")
    inputs = pickle.loads(pickle.dumps(policy.prepare(frames(2), INSTRUCTIONS[:2])))  # NumPy has no bfloat16
    given = policy.processing.model_inputs(inputs)[COLUMN]
    assert given.dtype == torch.bfloat16 and torch.equal(given.float(), inputs[COLUMN])


def test_a_frames_features_depend_on_it_alone():
    """To the last bit: whoever stands beside it, and however slots are split over workers; so do digests."""
    policy = policy_of()
    shown = 255 - frames(20)
    together = policy.prepare(shown, ["go"] * 20)
    for rows in ([0], [3, 1], [4, 4, 2], list(range(9))):
        other = policy_of().prepare(shown[rows], ["go"] * len(rows))
        assert torch.equal(other[COLUMN], together[COLUMN][rows])
        assert torch.equal(other.digests(), together.digests()[rows])
    same = policy.prepare(shown[[0, 0, 1]], ["go"] * 3).digests()
    assert same[0] == same[1] != same[2]


def test_any_split_of_the_slots_stores_the_same():
    """What workers with a copy of the policy play is what one collector plays, bit for bit."""

    def play(slots, first):
        env = EpisodeVectorEnv("manako/GoTo-v0", slots, seed=0, first_slot=first)
        policy = load_policy(PolicySource(trainable="adapter"), env.action_names, env.frame_shape)
        return RolloutCollector(env, policy, 3, 0, batch_size=4).collect(0)

    whole, parts = play(12, 0), merge([play(4, 0), play(8, 4)])
    assert all(torch.equal(column, parts.inputs[name]) for name, column in whole.inputs.columns.items())
    assert torch.equal(whole.logprobs, parts.logprobs) and torch.equal(whole.next_values, parts.next_values)


# ---- once ------------------------------------------------------------------------------------------------------------


def test_a_frame_goes_through_the_encoder_once(seen):
    policy = policy_of()
    seen.clear()
    shown = 255 - frames(3)  # other frames than those that it was checked with
    policy.prepare(shown[[0, 1, 1, 2]], ["go"] * 4)
    policy.prepare(shown[[2, 0]], ["go"] * 2)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(("small", "forwards"), [(10**6, [8, 8, 1, 1]), (0, [1] * 18)])
def test_small_encoders_see_groups_where_that_changes_no_bit(small, forwards, seen, monkeypatch):
    monkeypatch.setattr(features, "SMALL", small)
    policy, alone = policy_of(), policy_of()
    monkeypatch.setattr(alone.processing.features, "_group", lambda shape: 1)
    policy.processing.features._group(torch.Size(FRAME))
    shown = 255 - frames(18)
    expected = alone.prepare(shown, ["go"] * 18)[COLUMN]
    seen.clear()
    assert torch.equal(policy.prepare(shown, ["go"] * 18)[COLUMN], expected)
    assert seen in (forwards, [1] * 18)  # products may be cut up otherwise on another machine


def test_an_encoder_whose_groups_differ_sees_each_frame_alone(seen, monkeypatch):
    policy = policy_of()
    right = policy.processing.features.see
    monkeypatch.setattr(policy.processing.features, "see", lambda vlm, pixels: right(vlm, pixels) * (1 + len(pixels)))
    policy.prepare(255 - frames(9), ["go"] * 9)
    assert policy.processing.features._groups == {torch.get_num_threads(): 1} and seen[-9:] == [1] * 9


def test_what_is_kept_is_bounded(seen, monkeypatch):
    policy = policy_of()
    monkeypatch.setattr(features, "KEPT_BYTES", 2 * policy.processing.features.nbytes)
    policy.prepare(frames(4), ["go"] * 4)
    assert len(policy.processing.features._kept) == 2
    seen.clear()
    policy.prepare(frames(4)[[3, 0]], ["go"] * 2)  # the latest is kept, the first is gone
    assert seen == [1]


def test_ppo_runs_the_encoder_when_it_acts_and_never_in_an_update(seen, tmp_path):
    """And the first ratio is 1: acting and learning read the same numbers."""
    env = EpisodeVectorEnv("manako/GoTo-v0", 4, seed=0)
    policy = load_policy(PolicySource(trainable="adapter"), env.action_names, env.frame_shape)
    args = PPOConfig(
        str(tmp_path), num_iterations=1, num_steps=4, num_ppo_epochs=3, minibatch_size=8, report_to="none", use_cpu=True
    )
    collector = RolloutCollector(env, policy, 4, 0)
    rollout = collector.collect(0)
    assert (
        rollout.inputs[COLUMN].shape == (16, *policy.processing.features.shape) and COLUMN in rollout.bootstrap.columns
    )
    logprobs = policy.evaluate_actions(rollout.inputs, rollout.actions).logprobs
    assert torch.allclose(logprobs.view(4, 4, 1), rollout.logprobs, atol=1e-5)

    class Played:
        num_envs, num_steps = 4, 4

        def collect(self, iteration):
            return rollout

    seen.clear()
    before = policy.base_vlm.model.adapter.up.weight.clone()
    next(train_ppo(policy, Played(), args))
    assert seen == [] and not torch.equal(before, policy.base_vlm.model.adapter.up.weight)


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "encoder+adapter", "encoder+lora"])
def test_an_encoder_that_learns_sees_pixels(trainable):
    policy = policy_of(trainable)
    inputs = policy.prepare(frames(2), INSTRUCTIONS[:2])
    assert COLUMN not in inputs.columns and "features" not in dict(policy.describe())
    encoder = policy.base_vlm.get_submodule(policy.parts.encoder)
    policy.distribution(inputs)[0][:, 0].sum().backward()
    assert any(parameter.grad is not None for parameter in encoder.parameters())


def test_an_encoder_that_is_thawed_sees_pixels_again():
    policy = policy_of()
    inputs = policy.prepare(frames(2), INSTRUCTIONS[:2])
    encoder = policy.base_vlm.get_submodule(policy.parts.encoder).requires_grad_(True)
    assert COLUMN not in policy.prepare(frames(2), INSTRUCTIONS[:2]).columns
    policy.distribution(inputs)[0][:, 0].sum().backward()  # rows of before hold features that are now old
    assert any(parameter.grad is not None for parameter in encoder.parameters())


def test_rows_of_another_policy_are_read_by_their_frames():
    """A reference whose encoder learned does not take another encoder's features."""
    inputs = policy_of().prepare(frames(2), INSTRUCTIONS[:2])
    other = policy_of("full", seed=3)
    assert torch.equal(other.distribution(inputs)[0], other.distribution(without(inputs))[0])


def test_large_features_are_not_stored(monkeypatch):
    monkeypatch.setattr("manako.policies.vlm_policy.MOST_BYTES", 16 * 64 * 4 - 1)
    policy = policy_of()
    assert COLUMN not in policy.prepare(frames(1), ["go"]).columns and "features" not in dict(policy.describe())


def test_the_header_says_what_a_step_costs():
    line = dict(policy_of().describe())["features"]
    assert line == "of the frozen encoder, computed once a frame and stored: 16 x 64, 4,096 bytes a step"


def test_weights_that_are_loaded_are_used(tmp_path):
    policy = policy_of()
    before = policy.prepare(frames(1), ["go"])
    other = policy_of(seed=3).prepare(frames(1), ["go"])
    policy.base_vlm.load_state_dict(policy_of(seed=3).base_vlm.state_dict())
    assert torch.equal(policy.prepare(frames(1), ["go"])[COLUMN], other[COLUMN])
    assert not torch.equal(before[COLUMN], other[COLUMN])


def test_a_resumed_policy_stores_the_same(tmp_path):
    policy = policy_of()
    policy.save(tmp_path)
    loaded = load_policy(PolicySource(policy=str(tmp_path), trainable="adapter"), NAMES, FRAME)
    inputs, again = (one.prepare(frames(3), INSTRUCTIONS) for one in (policy, loaded))
    assert torch.equal(inputs[COLUMN], again[COLUMN])
    assert torch.equal(policy.distribution(inputs)[0], loaded.distribution(again)[0])


def test_a_copy_has_features_of_its_own():
    policy = policy_of()
    inputs = policy.prepare(frames(2), INSTRUCTIONS[:2])
    other = copy.deepcopy(policy)
    assert not other.processing.features._kept and policy.processing.features._kept
    with torch.no_grad():
        other.processing.features.encoder.layernorm.weight.mul_(2)
    changed = other.prepare(frames(2), INSTRUCTIONS[:2])
    assert not torch.equal(changed[COLUMN], inputs[COLUMN])
    assert torch.equal(policy.prepare(frames(2), INSTRUCTIONS[:2])[COLUMN], inputs[COLUMN])


# ---- beside it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["adapter", "full"])
def test_training_on_tokens_is_given_features_of_a_frozen_encoder(trainable):
    policy = policy_of(trainable)
    answers = [assistant_message(text) for text in ("up", "left", "up")]
    inputs = policy.training_inputs(frames(3), [policy.messages(text) for text in INSTRUCTIONS[:3]], answers)
    assert (COLUMN in inputs, "pixel_values" in inputs) == ((True, False) if trainable == "adapter" else (False, True))


@pytest.mark.parametrize("method", range(3), ids=["sft", "dpo", "kto"])
def test_training_on_tokens_runs_the_encoder_once_a_frame(method, seen, tmp_path, monkeypatch):
    """Not once an epoch, nor again for the reference; and what is learned is what pixels teach."""
    trainer_of, config = ((PolicySFTTrainer, SFTConfig), (PolicyDPOTrainer, DPOConfig), (PolicyKTOTrainer, KTOConfig))[
        method
    ]

    def train():
        policy, args = policy_of(), settings(config, tmp_path)
        args.max_steps, args.learning_rate = 4, 1e-3
        trainer = trainer_of(policy, args, datasets(policy, 255 - frames(2))[method], tmp_path)
        seen.clear()
        trainer.train()
        return sum(seen), [row["loss"] for row in trainer.rows]

    stored, losses = train()
    monkeypatch.setattr("manako.policies.vlm_policy.MOST_BYTES", 0)
    again, of_pixels = train()
    assert stored == 2 and again >= 8 and len(losses) == 4
    np.testing.assert_allclose(losses, of_pixels, rtol=1e-4)
    assert losses[-1] < losses[0]


def test_a_q_formers_own_losses_run_the_encoder_once_a_frame(seen, monkeypatch):
    """And are those of pixels; so is what is measured."""

    def learn():
        torch.manual_seed(0)
        pretraining = policy_of(adapter="qformer").pretraining("represent")
        pictures, told = 255 - frames(3), ["a red ball", "a blue box", "nothing"]
        seen.clear()
        losses = [torch.stack(list(pretraining.losses(pictures, told).values())) for _ in range(2)]
        return sum(seen), *losses, pretraining.measure(pictures, told)

    stored, *losses, measured = learn()
    monkeypatch.setattr("manako.policies.vlm_policy.MOST_BYTES", 0)
    again, *of_pixels, same = learn()
    assert (stored, again) == (3, 6) and measured == pytest.approx(same)
    torch.testing.assert_close(losses, of_pixels, atol=1e-5, rtol=1e-4)


def test_generate_takes_features_in_its_first_step():
    policy = policy_of()
    given = policy.processing.model_inputs(policy.prepare(frames(1), ["go"]))
    pixels = policy.processing.model_inputs(without(policy.prepare(frames(1), ["go"])))
    one, other = (policy.base_vlm.generate(**inputs, max_new_tokens=4, do_sample=False) for inputs in (given, pixels))
    assert COLUMN in given and torch.equal(one, other)


def test_features_that_a_model_does_not_read_are_refused(monkeypatch):
    right = modeling.ManakoModel.forward

    def deaf(self, *arguments, image_features=None, **others):
        halved = None if image_features is None else image_features / 2
        return right(self, *arguments, image_features=halved, **others)

    monkeypatch.setattr(modeling.ManakoModel, "forward", deaf)
    with pytest.raises(PolicyError, match="makes something else of its encoder's stored features"):
        policy_of()


def test_acting_takes_what_prepare_stored(seen):
    policy = policy_of()
    inputs = policy.prepare(frames(3), INSTRUCTIONS)
    seen.clear()
    acted = policy.act(inputs, Draws([np.random.default_rng(0)] * 3))
    policy.predict_values(inputs)
    assert seen == [] and len(acted.to_env) == 3
