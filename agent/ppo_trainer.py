"""PPO for vision-language policies on TRL's trainer base: it stands where TRL's own PPO trainer stood until 1.13.

transformers' Trainer brings optimizer, scheduler, accelerate, mixed precision, callbacks and resumable checkpoints. One
PPO iteration is one Trainer epoch: the data loader's `__iter__` plays the environments, computes advantages, and yields
num_ppo_epochs x (samples / minibatch) minibatches, shuffled anew in each PPO epoch. What is overridden: `compute_loss`,
`get_train_dataloader`, `log`, `save_model`, and two private methods: `_load_from_checkpoint` (the original loads
weights by name and says nothing where names differ) and `_send_telemetry` (off).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.base_trainer import _BaseTrainer

from manako.agent.errors import TrainingError, WorkersError
from manako.agent.group_advantages import METHODS
from manako.agent.losses import (
    approx_kl,
    categorical_kl,
    clip_fraction,
    entropy,
    explained_variance,
    policy_loss,
    value_loss,
)
from manako.agent.ppo_config import PPOConfig
from manako.agent.rollout import (
    SHUFFLES,
    Rollout,
    RolloutCollector,
    Rollouts,
    Samples,
    VectorEnv,
    refreshed,
    stream,
    with_advantages,
    with_group_advantages,
)
from manako.policies import PolicyInputs, VLMPolicy
from manako.policies.saving import load_weights, save_policy
from manako.policies.trainable import adapter_parameters, give_own_rate

ROLLOUT_STATE, ROLLOUT_TENSORS = "rollout_state.json", "rollout.safetensors"
Batch = dict[str, torch.Tensor]


class _RolloutDataset(IterableDataset):
    """One pass = one PPO iteration: collects a rollout, then yields its minibatches."""

    def __init__(self, trainer: "PPOTrainer") -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.microbatches_per_iteration

    def __iter__(self) -> Iterator[Batch]:
        return self.trainer.iterate()


class PPOTrainer(_BaseTrainer):
    """Proximal policy optimisation (arXiv:1707.06347) of a VLM policy in environments.

    Args:
        policy: the policy; what of it learns is what requires gradients.
        args: the settings.
        env: N environments, played in this process; None where `rollouts` is given.
        reference: for `kl_coef` > 0 the frozen reference: another policy, or None for the same with its LoRA off.
        callbacks: transformers' TrainerCallbacks.
        rollouts: where rollouts come from instead, such as workers.

    Attributes:
        iteration: rollouts collected and learned from.
        failure: what ended the run at the start of an iteration, with everything learned so far kept; None if nothing.

    Raises:
        TrainingError: sizes that do not divide, a reference is missing, or neither or both of env and rollouts came.
    """

    _name = "PPO"
    _tag_names = ["manako", "ppo"]
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        policy: VLMPolicy,
        args: PPOConfig,
        env: VectorEnv | None = None,
        reference: VLMPolicy | None = None,
        callbacks: list[TrainerCallback] | None = None,
        rollouts: Rollouts | None = None,
    ) -> None:
        source = env if rollouts is None else rollouts
        if source is None or (env is not None and rollouts is not None):
            raise TrainingError("PPOTrainer plays `env` itself or takes `rollouts`: expected exactly one of them.")
        self.num_samples = source.num_envs * args.num_steps
        if self.num_samples % args.minibatch_size:
            raise TrainingError(
                f"A rollout has {source.num_envs} envs x {args.num_steps} steps = {self.num_samples} samples, which is "
                f"no multiple of minibatch_size {args.minibatch_size}: change one of the three."
            )
        if args.advantage not in ("gae", *METHODS):
            raise TrainingError(f"advantage is {args.advantage!r}: expected one of gae, {', '.join(METHODS)}.")
        if args.advantage != "gae" and (source.num_envs % args.group_size or args.group_size < 2):
            raise TrainingError(
                f"group_size is {args.group_size} for {source.num_envs} environments: expected 2 or more, a divisor."
            )
        if args.kl_coef and reference is None:
            if not policy.has_lora:
                raise TrainingError(
                    "kl_coef needs a reference policy: train LoRA (its off state is the reference) or pass `reference`."
                )
            reference = policy
        self.microbatches_per_iteration = args.num_ppo_epochs * self.num_samples // args.per_device_train_batch_size
        self.iteration = 0
        self.failure: WorkersError | None = None
        self.policy = policy
        super().__init__(model=policy, args=args, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.add_callback(_PPOStops(self))
        if env is not None:
            rounds = args.advantage != "gae"
            rollouts = RolloutCollector(env, policy, args.num_steps, args.seed, reference, rounds=rounds)
        assert rollouts is not None
        self.collector: Rollouts = rollouts
        self._reset_metrics()

    # ---- one iteration -------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A loader whose every pass is one PPO iteration."""
        return DataLoader(_RolloutDataset(self), batch_size=None)

    def iterate(self) -> Iterator[Batch]:
        """Collects a rollout and yields its micro-batches, reshuffled in each PPO epoch."""
        args: PPOConfig = self.args
        self._reset_metrics()
        with self.compute_loss_context_manager():  # the same autocast as in updates
            try:
                rollout = self.collector.collect(self.iteration)
            except WorkersError as error:  # no weight has changed since the last iteration: it can still be saved
                self.failure = error
                return
            lag = self.iteration - rollout.version
            importance = None
            if lag:
                rollout, importance = refreshed(rollout, self.policy)
        if args.advantage == "gae":
            samples = with_advantages(rollout, args.gamma, args.gae_lambda, importance)
        else:
            samples = with_group_advantages(
                rollout, args.advantage, args.group_size, args.gamma, args.step_weight, importance
            )
        self._rollout_metrics(rollout, samples)
        if importance is not None:
            self._rollout |= {"policy_lag": float(lag), "importance": importance.mean().item()}
        kept = torch.arange(self.num_samples)
        if samples.usable is not None:
            kept = kept[samples.usable]
        parts = self.num_samples // args.per_device_train_batch_size
        if len(kept) < parts:
            raise TrainingError(
                f"Only {len(kept)} of {self.num_samples} samples belong to whole episodes that can be compared, too "
                f"few for {parts} minibatches: expected a num_steps in which episodes end."
            )
        for epoch in range(args.num_ppo_epochs):
            order = stream(args.seed, SHUFFLES, self.iteration, epoch).permutation(len(kept))
            for rows in kept[torch.from_numpy(order)].tensor_split(parts):
                yield _batch(samples, rows)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a group of its own for the adapter where it has its own learning rate."""
        rate, is_new = self.args.adapter_learning_rate, self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if rate is not None and is_new:
            give_own_rate(optimizer, adapter_parameters(self.policy.model_parts), rate)
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Clipped surrogate + vf_coef x value loss - ent_coef x entropy + kl_coef x KL(policy || reference).

        The group methods have no value loss.
        """
        args: PPOConfig = self.args
        output = model(PolicyInputs(inputs["input_ids"], inputs["lengths"], inputs["frames"]))
        logprobs = output.logprobs.gather(1, inputs["actions"][:, None])[:, 0]  # (B,)
        actor, ratio = policy_loss(
            logprobs, inputs["logprobs"], inputs["advantages"], args.clip_range, inputs.get("importance")
        )
        bonus = entropy(output.logprobs).mean()
        loss = actor - args.ent_coef * bonus
        measured = {
            "policy_loss": actor,
            "entropy": bonus,
            "approx_kl": approx_kl(logprobs, inputs["logprobs"]),
            "clip_fraction": clip_fraction(ratio, args.clip_range),
        }
        if args.advantage == "gae":
            measured["value_loss"] = value_loss(output.values, inputs["values"], inputs["returns"], args.clip_range_vf)
            loss = loss + args.vf_coef * measured["value_loss"]
        if "reference" in inputs:
            measured["reference_kl"] = categorical_kl(output.logprobs, inputs["reference"]).mean()
            loss = loss + args.kl_coef * measured["reference_kl"]
        measured["loss"] = loss
        self._check_and_keep({name: value.detach() for name, value in measured.items()}, ratio.detach())
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds an iteration's PPO metrics to what the Trainer logs at the end of an epoch."""
        if "grad_norm" in logs and self._measured:
            logs = {**self._iteration_metrics(), "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
        super().log(logs, start_time)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy (weights, processor, value head, policy.json) and where the environments are."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_policy(self.policy, folder)
        state = {"iteration": self.iteration, "env": self.collector.state_dict()}
        (folder / ROLLOUT_STATE).write_text(json.dumps(state))
        if tensors := self.collector.tensors():
            save_file(tensors, folder / ROLLOUT_TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_weights(self.policy, folder)
        state = json.loads((folder / ROLLOUT_STATE).read_text())
        self.iteration = state["iteration"]
        tensors = folder / ROLLOUT_TENSORS
        self.collector.load_state_dict(state["env"], load_file(tensors) if tensors.is_file() else {})

    def _send_telemetry(self) -> None:
        """Nothing is sent from here."""

    # ---- metrics and stops ---------------------------------------------------------------------------------------

    def _reset_metrics(self) -> None:
        self._updates = 0
        self._measured: list[dict[str, torch.Tensor]] = []
        self._rollout: dict[str, float | None] = {}

    def _rollout_metrics(self, rollout: Rollout, samples: Samples) -> None:
        finished = rollout.episodes
        self._rollout = {
            "episodes": len(finished),
            "success_rate": sum(e.success for e in finished) / len(finished) if finished else None,
            "episode_return": sum(e.episode_return for e in finished) / len(finished) if finished else None,
            "episode_length": sum(e.length for e in finished) / len(finished) if finished else None,
            **(
                {"explained_variance": explained_variance(samples.values, samples.returns).item()}
                if samples.usable is None
                else {"usable_samples": samples.usable.float().mean().item()}
            ),
            "rollout_steps_per_second": self.num_samples / rollout.seconds,
            "rollout_seconds": rollout.seconds,
            **self.collector.metrics(),
        }

    def _check_and_keep(self, measured: dict[str, torch.Tensor], ratio: torch.Tensor) -> None:
        """Stops on NaN and on a first ratio other than 1; keeps the numbers for the log."""
        if not torch.isfinite(measured["loss"]):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in measured.items())
            raise TrainingError(
                f"The loss is not finite in iteration {self.iteration} ({values}): expected numbers; start again from "
                "the last checkpoint with a smaller learning_rate."
            )
        if not self._measured:
            self.first_ratio_error = (ratio - 1).abs().max().item()
            tolerance = 1e-4 if ratio.dtype == torch.float32 and not self.args.bf16 and self._is_fp32() else 0.35
            if self.first_ratio_error > tolerance:
                raise TrainingError(
                    f"The first minibatch of iteration {self.iteration} has a ratio {self.first_ratio_error:.2g} away "
                    f"from 1, expected at most {tolerance:.0e}: the policy that learns is not the one that acted, so "
                    "look for dropout, another dtype, or weights that changed in between."
                )
        self._measured.append(measured)

    def _is_fp32(self) -> bool:
        return next(self.policy.base_vlm.parameters()).dtype == torch.float32

    def _iteration_metrics(self) -> dict[str, Any]:
        means = {name: torch.stack([step[name] for step in self._measured]).mean().item() for name in self._measured[0]}
        return {
            "iteration": self.iteration,
            "env_steps": self.iteration * self.num_samples,
            **self._rollout,
            **means,
            "first_ratio_error": self.first_ratio_error,
            "updates": self._updates,  # minibatches that were learned from
        }


def _batch(samples: Samples, rows: torch.Tensor) -> Batch:
    inputs = samples.inputs.select(rows)
    batch = {
        "input_ids": inputs.input_ids,
        "lengths": inputs.lengths,
        "frames": inputs.frames,
        "actions": samples.actions[rows],
        "logprobs": samples.logprobs[rows],
        "values": samples.values[rows],
        "advantages": samples.advantages[rows],
        "returns": samples.returns[rows],
    }
    if samples.reference is not None:
        batch["reference"] = samples.reference[rows]
    if samples.importance is not None:
        batch["importance"] = samples.importance[rows]
    return batch


class _PPOStops(TrainerCallback):
    """Ends an update at the target KL, refuses gradients that are not finite, and keeps the Trainer's step count whole.

    A minibatch past the target is not learned from: its gradients are dropped before the optimizer steps. The steps
    that a stopped update leaves out are counted as done, so that the learning rate and a resumed run know the
    iteration.
    """

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self._stopped = False

    def on_pre_optimizer_step(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Called with the clipped gradients of one minibatch."""
        trainer = self.trainer
        gradients = [p.grad for p in trainer.policy.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise TrainingError(
                f"The gradients are not finite in iteration {trainer.iteration}: expected numbers; start again from "
                "the last checkpoint with a smaller learning_rate."
            )
        if args.target_kl is not None:
            last = trainer._measured[-args.gradient_accumulation_steps :]
            if torch.stack([step["approx_kl"] for step in last]).mean().item() > 1.5 * args.target_kl:
                self._stopped = True
                trainer.policy.zero_grad(set_to_none=True)  # AdamW leaves a parameter without a gradient as it is
                return
        trainer._updates += 1

    def on_step_end(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the iteration after a stop."""
        if self._stopped:
            control.should_epoch_stop = True

    def on_epoch_end(self, args: PPOConfig, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """One iteration is done, unless it failed before it learned anything."""
        if self.trainer.failure is not None:
            control.should_training_stop = True
            return
        self._stopped = False
        self.trainer.iteration += 1
        per_iteration = math.ceil(self.trainer.microbatches_per_iteration / args.gradient_accumulation_steps)
        while state.global_step < self.trainer.iteration * per_iteration:
            lr_scheduler.step()
            state.global_step += 1
        state.epoch = float(self.trainer.iteration)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
