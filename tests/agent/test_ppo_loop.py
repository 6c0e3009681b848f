"""The loop that is read and the trainer that is used are one algorithm: equal to the last bit, weights and metrics."""

import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.errors import TrainingError
from manako.agent.ppo_loop import minibatches, train_ppo
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.samples import with_advantages
from manako.envs import EpisodeVectorEnv
from tests.helpers.small_runs import color_env, corridor_env, indices, ppo_config, tiny_policy

SAME = ["iteration", "env_steps", "episodes", "success_rate", "episode_return", "episode_length", "first_ratio_error"]
SAME += ["loss", "policy_loss", "entropy", "approx_kl", "clip_fraction"]
SMALL = {"num_iterations": 2, "num_steps": 8, "num_ppo_epochs": 3, "minibatch_size": 32, "seed": 3}
CASES = {
    "gae": {},
    "clipped values": {"clip_range_vf": 0.1, "ent_coef": 0.05, "gamma": 0.9, "gae_lambda": 0.8},
    "less entropy each time": {"ent_coef": 1.0, "ent_coef_end": 0.01, "learning_rate": 1e-3},
    "a stop at the target KL": {"target_kl": 0.002, "learning_rate": 3e-3},
    "the adapter's own rate": {"adapter_learning_rate": 5e-3},
    "gigpo": {"advantage": "gigpo", "group_size": 4, "num_steps": 12, "minibatch_size": 64},
}


def goto_env(settings) -> EpisodeVectorEnv:
    """Short episodes on a small board, so that groups finish some."""
    group = settings.group_size if settings.advantage != "gae" else 1
    return EpisodeVectorEnv("manako/GoTo-v0", 16, seed=3, group_size=group)


def run_loop(settings):
    env = goto_env(settings)
    policy = tiny_policy(env)
    rounds = settings.advantage != "gae"
    rollouts = RolloutCollector(env, policy, settings.num_steps, settings.seed, rounds=rounds)
    return policy, list(train_ppo(policy, rollouts, settings))


@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
def test_the_trainer_equals_the_loop_bit_for_bit(changed, tmp_path):
    settings = ppo_config(tmp_path, **{**SMALL, **changed})
    env = goto_env(settings)
    trainer = PPOTrainer(tiny_policy(env), settings, env)
    start = {name: weight.detach().clone() for name, weight in trainer.policy.named_parameters()}
    trainer.train()
    policy, rows = run_loop(settings)

    trained = dict(trainer.policy.named_parameters())
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, trained[name]), name
    moved = [name for name, weight in policy.named_parameters() if not torch.equal(weight, start[name])]
    assert len(moved) > 30
    logged = [row for row in trainer.state.log_history if "iteration" in row]
    assert len(logged) == len(rows) == 2
    same = [*SAME, *(["value_loss"] if settings.advantage == "gae" else [])]
    for mine, theirs in zip(rows, logged, strict=True):
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
        assert set(mine) == {*same, "ratio_error"}
    if settings.target_kl is not None:
        assert any(row["updates"] < 12 for row in logged)  # it did stop
        assert all(row["updates"] > 0 for row in logged)
    else:
        assert all(
            row["updates"] == settings.num_ppo_epochs * settings.num_steps * 16 // settings.minibatch_size
            for row in logged
        )
    assert all(row["first_ratio_error"] < 1e-5 for row in rows)


def test_a_seed_repeats_and_another_does_not(tmp_path):
    settings = ppo_config(tmp_path, **SMALL)
    (policy, rows), (again, same) = run_loop(settings), run_loop(settings)
    assert rows == same
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), again.parameters(), strict=True))
    other, _ = run_loop(ppo_config(tmp_path, **{**SMALL, "seed": 4}))
    assert not all(torch.equal(one, other) for one, other in zip(policy.parameters(), other.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_the_loop_before_the_weights_change(tmp_path):
    env = color_env()
    policy = tiny_policy(env)
    rollouts = RolloutCollector(env, policy, 4, seed=0)
    collect = rollouts.collect
    rollouts.collect = lambda iteration: (
        lambda rollout: rollout._replace(logprobs=rollout.logprobs - torch.inf if iteration else rollout.logprobs)
    )(collect(iteration))
    training = train_ppo(policy, rollouts, ppo_config(tmp_path))
    assert next(training)["iteration"] == 1
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    with pytest.raises(TrainingError, match=r"The loss is (nan|inf) in iteration 1: expected a number"):
        next(training)
    assert all(torch.equal(one, other) for one, other in zip(before, policy.parameters(), strict=True))


def test_minibatches_are_the_usable_samples_shuffled_anew_in_each_epoch(tmp_path):
    env = corridor_env(4)
    rollout = RolloutCollector(env, tiny_policy(env), 4, seed=0).collect(0)
    samples = with_advantages(rollout, 0.9, 0.9)._replace(values=torch.arange(16.0))  # values tell them apart
    usable = torch.arange(16) % 4 != 1
    settings = ppo_config(tmp_path, num_ppo_epochs=3)
    parts = list(minibatches(samples._replace(usable=usable), settings, iteration=0, parts=5))
    assert len(parts) == 15 and {len(part.values) for part in parts} == {2, 3}  # 12 of 16 in five
    epochs = [torch.cat([part.values for part in parts[5 * epoch : 5 * epoch + 5]]).long() for epoch in range(3)]
    for order in epochs:
        assert order.sort().values.tolist() == usable.nonzero()[:, 0].tolist()
    assert len({tuple(order.tolist()) for order in epochs}) == 3
    flat = indices(rollout).flatten()
    for part in parts:  # the fields of a part belong together
        rows = part.values.long()
        assert torch.equal(part.actions["index"], flat[rows]) and torch.equal(part.returns, samples.returns[rows])
        assert torch.equal(part.inputs["frames"], rollout.inputs["frames"][rows])
    with pytest.raises(TrainingError, match="Only 12 of 16 samples belong to whole episodes .* for 13 minibatches"):
        next(minibatches(samples._replace(usable=usable), settings, iteration=0, parts=13))
