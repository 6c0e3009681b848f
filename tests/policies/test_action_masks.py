"""Policies obey action masks: exact probabilities over what is allowed, and gradients that stay finite."""

import math

import numpy as np
import pytest
import torch

from manako.agent.losses import categorical_kl, ppo_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.samples import Samples
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.interface import ACTION_MASK, Draws, Evaluated, allow, entropy, sample_categorical

SHAPE = (16, 20, 3)
NAMES = ("left", "right", "stay", "jump")
TRIE = ("turn left", "turn right now", "turn right", "go on")


def policy_of(names=NAMES, **source):
    policy = load_policy(PolicySource(**source), names, SHAPE)
    with torch.no_grad():
        policy.base_vlm.get_output_embeddings().weight.mul_(20)  # so that probabilities differ
    return policy


def frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def rows(policy, masks):
    masks = np.array(masks, bool)
    return policy.prepare(frames(len(masks)), ["walk right"] * len(masks), {"action_masks": masks})


def test_a_masked_softmax_by_hand():
    logits = torch.tensor([[math.log(4.0), math.log(1.0), math.log(3.0), math.log(2.0)]], requires_grad=True)
    allowed = torch.tensor([[False, True, True, False]])
    masked = allow(logits.log_softmax(-1), allowed)
    assert torch.allclose(masked.exp(), torch.tensor([[0, 0.25, 0.75, 0]]), atol=1e-6)
    by_hand = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy(masked).item() == pytest.approx(by_hand, abs=1e-6)
    masked[0, 1].backward()
    # d log p_1 / d z = 1[i = 1] - p_i over what is allowed; nothing for the others
    assert torch.allclose(logits.grad, torch.tensor([[0, 0.75, -0.75, 0]]), atol=1e-6)


def test_one_allowed_action_is_certain_and_teaches_nothing():
    logits = torch.randn(3, 4, requires_grad=True)
    one = torch.eye(4, dtype=torch.bool)[[2, 0, 3]]
    masked = allow(logits.log_softmax(-1), one)
    taken = masked[one]
    assert taken.tolist() == [0, 0, 0] and entropy(masked).tolist() == [0, 0, 0]
    (taken.sum() + entropy(masked).sum() + categorical_kl(masked, masked.detach()).sum()).backward()
    assert logits.grad.abs().max() < 1e-12


def test_nothing_but_the_allowed_is_drawn():
    logprobs = allow(torch.zeros(1, 5), torch.tensor([[False, True, False, True, False]]))
    uniforms = np.array([0.0, 0.2, 0.499, 0.5, 0.999, np.nextafter(1, 0)])
    assert sample_categorical(logprobs.expand(6, -1), uniforms).tolist() == [1, 1, 1, 3, 3, 3]
    high = logprobs.expand(1, -1).double() + 1e-7  # rounded sums may pass 1: the last one stays an allowed one
    assert sample_categorical(high, np.array([1.0])).tolist() == [3]


@pytest.mark.parametrize("names", [NAMES, TRIE], ids=["token", "trie"])
def test_the_joint_is_renormalised_over_what_is_allowed(names):
    policy = policy_of(names)
    free = policy.prepare(frames(3), ["walk right"] * 3)
    assert ACTION_MASK not in free.columns
    whole, values = policy.distribution(free)
    best = whole.argmax(-1)
    masks = torch.ones(3, 4, dtype=torch.bool).scatter(1, best[:, None], False)  # not the most likely one
    masked, same_values = policy.distribution(rows(policy, masks.numpy()))
    p = whole.exp() * masks
    assert torch.allclose(masked.exp(), p / p.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(values, same_values)
    second = whole.masked_fill(~masks, -torch.inf).argmax(-1)
    acted = policy.act(rows(policy, masks.numpy()), Draws([]), greedy=True)
    assert acted.to_env.tolist() == second.tolist() != best.tolist()
    again = policy.evaluate_actions(rows(policy, masks.numpy()), acted.actions)
    assert torch.allclose(again.logprobs, acted.logprobs, atol=1e-6)


def test_masks_that_allow_all_change_nothing():
    policy = policy_of()
    free, _ = policy.distribution(policy.prepare(frames(2), ["walk right"] * 2))
    masked, _ = policy.distribution(rows(policy, np.ones((2, 4))))
    assert torch.allclose(free, masked, atol=1e-6)


def test_the_whole_loss_has_finite_gradients():
    policy = policy_of()
    inputs = rows(policy, [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]])
    with torch.no_grad():
        reference = policy_of(seed=1).distribution(inputs)[0]
        acted = policy.act(inputs, Draws([np.random.default_rng(0)] * 3))
    said = policy.evaluate_actions(inputs, acted.actions)
    samples = Samples(
        inputs,
        acted.actions,
        acted.logprobs - 0.1,
        acted.mask,
        acted.values,
        torch.tensor([1.0, -1.0, 0.5]),
        torch.ones(3),
        reference=reference,
    )
    loss, parts, _ = ppo_loss(said, samples, PPOConfig("unused", ent_coef=0.1, kl_coef=0.1, report_to="none"))
    loss.backward()
    assert all(value.isfinite() for value in parts.values()) and parts["reference_kl"] > 0
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads) and any(grad.abs().max() > 0 for grad in grads)


def test_a_certain_step_moves_nothing():
    policy = policy_of()
    inputs = rows(policy, [[0, 1, 0, 0], [0, 0, 1, 0]])
    said: Evaluated = policy.evaluate_actions(inputs, policy.actions_from_env(np.array([1, 2])))
    assert said.logprobs.tolist() == [[0], [0]] and said.entropy.tolist() == [[0], [0]]
    (said.logprobs.sum() + said.entropy.sum()).backward()
    assert max(float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None) < 1e-9


def test_masks_of_another_shape_are_refused():
    policy = policy_of()
    for wrong in (np.ones((2, 3)), np.ones((1, 4)), np.array([[1, 0, 0, 0], [0, 0, 0, 0]])):
        with pytest.raises(PolicyError, match="Action masks of shape"):
            policy.prepare(frames(2), ["walk right"] * 2, {"action_masks": wrong})
