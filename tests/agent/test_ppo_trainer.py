"""The PPO trainer: held against a bare PyTorch loop, its stops, its metrics, and that it learns from pixels."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from manako.agent.collector import RolloutCollector
from manako.agent.errors import TrainingError
from manako.agent.losses import policy_loss, value_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.callbacks import MetricsCallback, read_metrics
from manako.agent.report.evaluation import evaluate
from manako.agent.rng import SHUFFLES, make_rng
from manako.agent.samples import with_advantages
from manako.envs import HELD_OUT, EpisodeVectorEnv, episode_seed
from manako.policies import PolicySource, load_policy
from manako.policies.interface import entropy
from tests.helpers.small_runs import (
    color_env,
    corridor_env,
    difference,
    make_trainer,
    ppo_config,
    tiny_policy,
    weights,
)


def rows_of(trainer: PPOTrainer) -> list[dict]:
    """What was logged, one row an iteration."""
    return [row for row in trainer.state.log_history if "iteration" in row]


class AtStep(TrainerCallback):
    """Calls a function at the end of an optimizer step, with its number."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


# One iteration, held against a bare loop


@pytest.mark.parametrize("clip_range_vf", [None, 0.2])
def test_an_iteration_equals_a_bare_pytorch_loop(tmp_path, clip_range_vf):
    settings = {"num_iterations": 2, "num_ppo_epochs": 3, "gamma": 0.9, "gae_lambda": 0.8, "ent_coef": 0.05}
    args = ppo_config(tmp_path, **settings, clip_range_vf=clip_range_vf, seed=3, scale_returns=False, vf_coef=0.5)
    env = corridor_env(8, seed=3)
    trainer = PPOTrainer(tiny_policy(env), args, env)
    at_the_end_of_an_iteration = []
    trainer.add_callback(AtStep(lambda step: step == 6 and at_the_end_of_an_iteration.append(weights(trainer.policy))))
    trainer.train()

    policy = tiny_policy(env)
    samples = with_advantages(
        RolloutCollector(corridor_env(8, seed=3), policy, num_steps=4, seed=3).collect(0), gamma=0.9, gae_lambda=0.8
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0)
    for update, (epoch, part) in enumerate(itertools.product(range(3), range(2))):
        rows = torch.from_numpy(make_rng(3, SHUFFLES, 0, epoch).permutation(32))[16 * part : 16 * part + 16]
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - update / 12)  # linear over both iterations
        distribution, values = policy.distribution(samples.inputs.select(rows))
        logprobs = distribution[torch.arange(16), samples.actions["index"][rows]][:, None]
        drawn = torch.ones(16, 1, dtype=torch.bool)
        loss = policy_loss(logprobs, samples.logprobs[rows], drawn, samples.advantages[rows], 0.2)[0]
        loss = loss + 0.5 * value_loss(values, samples.values[rows], samples.returns[rows], clip_range_vf)
        loss = loss - 0.05 * entropy(distribution).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    assert difference(weights(tiny_policy(env)), weights(policy)) > 1e-3  # it moved
    assert difference(at_the_end_of_an_iteration[0], weights(policy)) < 1e-6


@pytest.mark.parametrize("parts", [4, 16])
def test_gradient_accumulation_changes_nothing(tmp_path, parts):
    runs = []
    for number in (1, parts):
        trainer = make_trainer(tmp_path, minibatch_size=32, gradient_accumulation_steps=number)
        trainer.train()
        runs.append((weights(trainer.policy), rows_of(trainer)))
    (whole, rows), (in_parts, rows_in_parts) = runs
    assert difference(whole, in_parts) < 2e-6
    for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "loss", "updates", "learning_rate", "grad_norm"):
        assert rows_in_parts[1][key] == pytest.approx(rows[1][key], abs=1e-5, rel=1e-5), key


def test_every_sample_is_in_every_ppo_epoch_once_and_the_order_changes(tmp_path):
    trainer = make_trainer(tmp_path, minibatch_size=8, num_ppo_epochs=3)
    orders = []
    collect = trainer.collector.collect
    numbered = torch.arange(32.0).view(4, 8)  # values tell the samples apart
    trainer.collector.collect = lambda iteration: collect(iteration)._replace(values=numbered)
    for iteration in range(2):
        trainer.iteration = iteration
        batches = list(trainer.iterate())
        assert len(batches) == 12 and all(len(batch["actions"]) == 8 for batch in batches)
        numbers = torch.cat([batch["values"] for batch in batches]).view(3, 32)
        assert all(len(set(epoch.tolist())) == 32 for epoch in numbers)
        assert torch.equal(numbers.sort().values, numbers[:1].sort().values.expand(3, -1))
        orders.extend(make_rng(0, SHUFFLES, iteration, epoch).permutation(32).tolist() for epoch in range(3))
        assert not torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[1], numbers[2])
    assert len({tuple(order) for order in orders}) == 6


def test_the_fields_of_a_batch_belong_together(tmp_path):
    trainer = make_trainer(tmp_path, env=corridor_env(8), minibatch_size=8)
    for batch in trainer.iterate():
        with torch.no_grad():
            distribution, values = trainer.policy.distribution(batch["inputs"])
        logprobs = distribution.gather(1, batch["actions"]["index"][:, None])
        assert torch.allclose(logprobs, batch["logprobs"], atol=1e-5)
        assert torch.allclose(values, batch["values"], atol=1e-5)


# Stops


def test_the_first_ratio_is_one(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=3)
    trainer.train()
    assert len(rows_of(trainer)) == 3
    assert all(row["first_ratio_error"] < 1e-4 for row in rows_of(trainer))


def test_a_policy_that_changed_after_acting_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    collect = trainer.collector.collect

    def disturbed(iteration):
        rollout = collect(iteration)
        if iteration == 1:
            with torch.no_grad():
                trainer.policy.base_vlm.get_output_embeddings().weight.mul_(1.05)
        return rollout

    trainer.collector.collect = disturbed
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert str(caught.value).startswith("The first minibatch of iteration 1 has a ratio ")
    assert "away from 1, expected at most 1e-04" in str(caught.value) and "\n" not in str(caught.value)
    assert len(rows_of(trainer)) == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_in_half_precision_the_mean_ratio_counts(bf16, tmp_path):
    """One token that rounding moves by 0.4 is no other policy there; all that are 0.1 away are."""
    trainer = make_trainer(tmp_path, bf16=bf16, use_cpu=True)
    loss = {"loss": torch.tensor(0.0)}
    one = torch.ones(200)
    one[7] = 1.4
    if not bf16:
        with pytest.raises(TrainingError, match="has a ratio 0.4 away from 1, expected at most 1e-04"):
            trainer._check_and_keep(loss, one)
        return
    trainer._check_and_keep(loss, one)
    assert trainer.first_ratio_error == pytest.approx(0.4)
    trainer._reset_metrics()
    with pytest.raises(TrainingError, match="has a mean ratio 0.1 away from 1, expected at most 5e-02"):
        trainer._check_and_keep(loss, torch.full((200,), 0.9))


def test_an_update_stops_at_the_target_kl_and_the_run_goes_on(tmp_path):
    """With a huge learning rate the second minibatch is past the target: it is measured and not applied."""
    trainer = make_trainer(tmp_path, learning_rate=0.2, target_kl=0.01, num_iterations=3, num_ppo_epochs=4)
    after = {0: weights(trainer.policy)}
    trainer.add_callback(AtStep(lambda step: after.update({step: weights(trainer.policy)})))
    ends = []

    class AtEnd(TrainerCallback):
        def on_epoch_end(self, args, state, control, lr_scheduler=None, **kwargs):
            ends.append((trainer.iteration, state.global_step, lr_scheduler.get_last_lr()[0], weights(trainer.policy)))

    trainer.add_callback(AtEnd())
    trainer.train()
    rows = rows_of(trainer)
    assert rows[0]["updates"] == 1  # of 8
    assert difference(after[0], after[1]) > 1e-3
    assert difference(after[1], after[2]) == 0  # the one past the target
    assert 3 not in after
    assert difference(after[1], ends[0][3]) == 0
    # the steps left out count as done: the next iteration has its own learning rate
    assert [(iteration, step) for iteration, step, *_ in ends] == [(1, 8), (2, 16), (3, 24)]
    assert [lr for _, _, lr, _ in ends] == pytest.approx([0.2 * 2 / 3, 0.2 / 3, 0.0])
    assert difference(ends[0][3], after[9]) > 1e-3
    assert [row["iteration"] for row in rows] == [1, 2, 3] and [row["env_steps"] for row in rows] == [32, 64, 96]


def test_the_target_kl_is_judged_over_whole_minibatches(tmp_path):
    runs = []
    for parts in (1, 4):
        trainer = make_trainer(
            tmp_path, learning_rate=0.01, target_kl=0.02, num_ppo_epochs=4, gradient_accumulation_steps=parts
        )
        trainer.train()
        runs.append(rows_of(trainer))
    assert [row["updates"] for row in runs[0]] == [row["updates"] for row in runs[1]]
    assert any(row["updates"] < 8 for row in runs[0])


def test_without_a_target_every_minibatch_is_learned_from(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.01)
    trainer.train()
    assert [row["updates"] for row in rows_of(trainer)] == [4, 4]


@pytest.mark.parametrize(
    ("schedule", "last"),
    [("linear", 1e-3 / 8), ("constant", 1e-3), ("cosine", 1e-3 * (1 + math.cos(math.pi * 7 / 8)) / 2)],
)
def test_learning_rate_decays(tmp_path, schedule, last):
    trainer = make_trainer(tmp_path, lr_scheduler_type=schedule)
    learning_rates = []
    collect = trainer.collector.collect
    trainer.collector.collect = lambda iteration: (
        learning_rates.append(trainer.lr_scheduler.get_last_lr()[0]) or collect(iteration)
    )
    trainer.train()
    assert learning_rates[0] == 1e-3  # no warm-up
    assert rows_of(trainer)[-1]["learning_rate"] == pytest.approx(last)  # of the eighth of 8 updates
    if schedule == "linear":
        assert learning_rates[1] == pytest.approx(5e-4)
        assert trainer.lr_scheduler.get_last_lr()[0] == 0


# Numbers that are not finite


def test_a_poisoned_weight_stops_the_run_and_nothing_is_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(MetricsCallback(tmp_path))
    with torch.no_grad():
        trainer.policy.base_vlm.get_output_embeddings().weight[:] = math.nan
    with pytest.raises(TrainingError, match=r"The policy's probabilities are not finite in iteration 0, step 0"):
        trainer.train()
    assert rows_of(trainer) == [] and read_metrics(tmp_path) == []


def test_a_poisoned_value_head_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.policy.value_head.out.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"values holds 32 values that are not finite"):
        trainer.train()
    assert rows_of(trainer) == []


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    start = weights(trainer.policy)
    iterate = trainer.iterate
    trainer.iterate = lambda: ({**batch, "returns": batch["returns"] + math.inf} for batch in iterate())
    with pytest.raises(TrainingError, match=r"The loss is not finite in iteration 0 \(policy_loss .*value_loss inf"):
        trainer.train()
    assert difference(start, weights(trainer.policy)) == 0
    assert rows_of(trainer) == []


def test_gradients_that_are_not_finite_stop_the_run_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    start = weights(trainer.policy)
    trainer.policy.value_head.out.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        TrainingError, match=r"The gradients are not finite in iteration 0: expected numbers, which a smaller"
    ):
        trainer.train()
    assert difference(start, weights(trainer.policy)) == 0


def test_metrics_that_are_not_defined_are_null(tmp_path):
    """Where all returns are equal there is no variance to explain; where no episode ended there is no success rate."""
    env = EpisodeVectorEnv("CartPole-v1", 2)  # pays 1 a step, and no episode ends in 4 steps
    policy = tiny_policy(env)
    with torch.no_grad():
        policy.value_head.out.weight.zero_()
    args = ppo_config(tmp_path, minibatch_size=8, gamma=0.0, num_iterations=1)
    trainer = PPOTrainer(policy, args, env, callbacks=[MetricsCallback(tmp_path)])
    trainer.train()
    text = (tmp_path / "metrics.jsonl").read_text()
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert row["explained_variance"] is None
    assert row["success_rate"] is row["episode_return"] is row["episode_length"] is None and row["episodes"] == 0
    assert math.isnan(rows_of(trainer)[0]["explained_variance"])
    assert all(
        isinstance(row[key], float) for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm")
    )


# LoRA and the reference


def test_lora_training_changes_lora_adapter_and_value_head_alone(tmp_path):
    env = color_env()
    policy = tiny_policy(env, trainable="lora", lora_rank=4)
    start = weights(policy)
    PPOTrainer(policy, ppo_config(tmp_path), env).train()
    changed = {name for name, weight in weights(policy).items() if not torch.equal(weight, start[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name or name.startswith("value_head") for name in changed)
    for part in ("lora_A", "lora_B", "adapter.modules_to_save", "value_head"):
        assert any(part in name for name in changed), part


def test_adapter_training_changes_adapter_and_value_head_alone(tmp_path):
    env = color_env()
    policy = tiny_policy(env, trainable="adapter")
    start = weights(policy)
    PPOTrainer(policy, ppo_config(tmp_path), env).train()
    changed = {name for name, weight in weights(policy).items() if not torch.equal(weight, start[name])}
    assert {name.startswith("value_head") or ".adapter." in name for name in changed} == {True}


def test_kl_coef_holds_a_lora_policy_at_its_start(tmp_path):
    kl = []
    for kl_coef in (0.0, 20.0):
        env = color_env()
        policy = tiny_policy(env, trainable="lora", lora_rank=4)
        args = ppo_config(tmp_path, kl_coef=kl_coef, learning_rate=3e-3, num_iterations=3, lr_scheduler_type="constant")
        trainer = PPOTrainer(policy, args, env)
        trainer.train()
        inputs = policy.prepare(*color_env(16, seed=9).reset())
        with torch.no_grad():
            learned, _ = policy.distribution(inputs)
        with policy.as_reference():
            start, _ = policy.distribution(inputs)
        kl.append(float((learned.exp() * (learned - start)).sum(-1).mean()))
        assert ("reference_kl" in rows_of(trainer)[0]) == (kl_coef > 0)
    assert kl[1] < 0.3 * kl[0]
    assert rows_of(trainer)[0]["reference_kl"] >= 0


def test_kl_coef_without_lora_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="kl_coef needs a reference policy: train LoRA .* or pass `reference`"):
        make_trainer(tmp_path, kl_coef=0.1)


def test_kl_coef_with_another_policy_as_the_reference(tmp_path):
    env = color_env()
    trainer = PPOTrainer(tiny_policy(env), ppo_config(tmp_path, kl_coef=0.1), env, reference=tiny_policy(env, seed=1))
    trainer.train()
    assert rows_of(trainer)[0]["reference_kl"] > 0


# Sizes, telemetry


def test_sizes_that_do_not_divide_are_errors(tmp_path):
    with pytest.raises(
        TrainingError, match=r"8 envs x 4 steps = 32 samples, which is no multiple of minibatch_size 24"
    ):
        make_trainer(tmp_path, minibatch_size=24)
    with pytest.raises(TrainingError, match=r"minibatch_size 16 is no multiple of gradient_accumulation_steps 3"):
        ppo_config(tmp_path, gradient_accumulation_steps=3)


def test_an_iteration_is_as_long_as_it_says(tmp_path):
    trainer = make_trainer(tmp_path, minibatch_size=16, gradient_accumulation_steps=2, num_ppo_epochs=3)
    assert len(trainer.get_train_dataloader()) == len(list(trainer.iterate())) == 12


def test_nothing_is_sent(tmp_path, monkeypatch):
    import huggingface_hub.utils
    import trl.trainer.base_trainer

    def refuse(*args, **kwargs):
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    monkeypatch.setattr(huggingface_hub.utils, "send_telemetry", refuse)
    make_trainer(tmp_path, num_iterations=1).train()


# Learning


def test_it_learns_to_name_colors_from_pixels(tmp_path):
    """From random weights in 3,072 steps; blind guessing is right one time in four."""
    env = color_env(32, env_kwargs={"size": 2})
    policy = load_policy(PolicySource(), env.action_names, env.frame_shape)
    args = PPOConfig(
        output_dir=str(tmp_path),
        report_to="none",
        num_iterations=12,
        num_steps=8,
        num_ppo_epochs=3,
        minibatch_size=64,
        learning_rate=7e-4,
        gamma=0.0,
    )
    seeds = [episode_seed(0, HELD_OUT, 0, episode) for episode in range(200)]
    held_out = color_env(32, split=HELD_OUT, env_kwargs={"size": 2})
    before = evaluate(policy, held_out, seeds).summary()["success"]
    trainer = PPOTrainer(policy, args, env)
    trainer.train()
    after = evaluate(policy, held_out, seeds).summary()["success"]
    blank = evaluate(policy, held_out, seeds, "blank_image").summary()["success"]
    assert before < 0.5 and blank < 0.5 and after >= 0.9
    success = [row["success_rate"] for row in rows_of(trainer)]
    assert np.mean(success[:2]) < 0.6 < np.mean(success[-3:])


def test_the_adapter_has_its_own_learning_rate(tmp_path):
    env = color_env()
    policy = tiny_policy(env)
    before = weights(policy)
    args = ppo_config(tmp_path, adapter_learning_rate=1e-30, num_iterations=1)
    trainer = PPOTrainer(policy, args, env)
    trainer.train()
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in weights(policy).items()}
    assert all(change < 1e-20 for name, change in moved.items() if ".adapter." in name)
    assert sum(change > 1e-5 for name, change in moved.items() if ".adapter." not in name) > 20
    assert len([name for name in moved if ".adapter." in name]) == 4
    learning = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert learning == len(moved)  # nobody is in two groups or in none


def test_bfloat16_autocast_on_a_cpu(tmp_path):
    env = color_env()
    trainer = PPOTrainer(tiny_policy(env), ppo_config(tmp_path, bf16=True, use_cpu=True), env)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "iteration" in row]
    assert 0 <= rows[0]["first_ratio_error"] < 0.35 and all(math.isfinite(row["loss"]) for row in rows)


def test_where_rollouts_come_from_is_said_once(tmp_path):
    env = color_env()
    policy = tiny_policy(env)
    with pytest.raises(TrainingError, match="expected exactly one of them"):
        PPOTrainer(policy, ppo_config(tmp_path))
    rollouts = RolloutCollector(env, policy, num_steps=4, seed=0)
    with pytest.raises(TrainingError, match="expected exactly one of them"):
        PPOTrainer(policy, ppo_config(tmp_path), env, rollouts=rollouts)
