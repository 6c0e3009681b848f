"""PPO for vision-language policies on TRL's trainer base: it stands where TRL's own PPO trainer stood until 1.13.

transformers' Trainer brings optimizer, scheduler, accelerate, mixed precision, callbacks and resumable checkpoints. One
PPO iteration is one Trainer epoch: the data loader's `__iter__` plays the environments, computes advantages, and yields
num_ppo_epochs x (samples / minibatch) minibatches, shuffled anew in each PPO epoch. What is overridden: `compute_loss`,
`get_train_dataloader`, `log`, `save_model`, and private methods: `_load_from_checkpoint` (the original loads
weights by name and says nothing where names differ), `_load_optimizer_and_scheduler`, `_load_rng_state` and
`_save_checkpoint` (a sentence for what they raise; a manifest), `_send_telemetry` (off).
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl.trainer.base_trainer import _BaseTrainer

from manako.agent.checkpoint import OF_A_RUN, filled, verify_folder
from manako.agent.collector import RolloutCollector
from manako.agent.episodes import EpisodeCount, means
from manako.agent.errors import NotFiniteError, TrainingError, WorkersError
from manako.agent.faults import FaultLog, few_steps
from manako.agent.group_advantages import METHODS, whole_groups
from manako.agent.interfaces import NOT_FIXED, SEEDED, EvaluationEnv, Rollouts
from manako.agent.losses import ent_coef_at, explained_variance, ppo_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_loop import minibatches, return_scale, samples_of
from manako.agent.rollout import Rollout
from manako.agent.samples import NO_TOKENS, Samples
from manako.agent.tuning.parameter_groups import GroupsOfPolicy
from manako.bounded import json_object, read_text
from manako.errors import ManakoError, first_line, type_and_text
from manako.manifest import write_manifest
from manako.policies.interface import LEGAL, OUTCOMES, Policy

ROLLOUT_STATE, ROLLOUT_TENSORS = "rollout_state.json", "rollout.safetensors"
Batch = dict[str, Any]  # the fields of Samples

IN_HALF = 0.05  # mean |ratio - 1| of the first minibatch in bfloat16: sampled on a cache, evaluated in one forward


class _RolloutDataset(IterableDataset):
    """One pass = one PPO iteration: collects a rollout, then yields its minibatches."""

    def __init__(self, trainer: "PPOTrainer") -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.microbatches_per_iteration

    def __iter__(self) -> Iterator[Batch]:
        return self.trainer.iterate()


class PPOTrainer(GroupsOfPolicy, _BaseTrainer):
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
        faults: of environments, survived; another one may be set, with a file and a limit.
        failure: what ended the run at the start of an iteration, with everything learned so far kept; None if nothing.

    Raises:
        TrainingError: sizes that do not divide, a reference is missing, neither or both of env and rollouts came, or
            episodes of one seed are to be compared in an environment that ignores its seeds.
    """

    _name = "PPO"
    _tag_names = ["manako", "ppo"]
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        policy: Policy,
        args: PPOConfig,
        env: EvaluationEnv | None = None,
        reference: Policy | None = None,
        callbacks: list[TrainerCallback] | None = None,
        rollouts: Rollouts | None = None,
    ) -> None:
        if not policy.can_learn:
            raise TrainingError(
                f"{type(policy).__name__} is a player that cannot learn: expected a policy with weights, such as "
                "load_policy gives; play it with collect.py or evaluate.py instead."
            )
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
        if args.advantage != "gae" and env is not None and not env.follows_seeds():
            raise TrainingError(f"{args.advantage} compares episodes of one seed, and here {NOT_FIXED}: {SEEDED}.")
        if args.token_credit != "step" and (policy.spec.text is None or policy.spec.text.thought_coef is not None):
            raise TrainingError(NO_TOKENS.format(credit=args.token_credit))
        if args.kl_coef and reference is None:
            if not policy.has_reference:
                raise TrainingError(
                    "kl_coef needs a reference policy: train LoRA (its off state is the reference) or pass `reference`."
                )
            reference = policy
        self.microbatches_per_iteration = args.num_ppo_epochs * self.num_samples // args.per_device_train_batch_size
        self.iteration = 0
        self.scale = return_scale(args, source.num_envs)
        self.failure: WorkersError | None = None
        self.brought_back: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None  # by `LastIterations`
        self.faults = FaultLog()
        self._too_many: WorkersError | None = None
        self._ended = EpisodeCount(rounds=args.advantage != "gae")
        self.policy, self.adapter_learning_rate = policy, args.adapter_learning_rate
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
        """Returns a loader whose every pass is one PPO iteration."""
        return DataLoader(_RolloutDataset(self), batch_size=None)

    def iterate(self) -> Iterator[Batch]:
        """Collects a rollout and yields its micro-batches, reshuffled in each PPO epoch."""
        args: PPOConfig = self.args
        self._reset_metrics()
        with self.compute_loss_context_manager():  # the same autocast as in updates
            try:
                if self._too_many is not None:
                    raise self._too_many
                rollout = self.collector.collect(self.iteration)
            except ManakoError as error:
                self.faults.write(self.collector.take_faults(), self.iteration)
                if not isinstance(error, WorkersError):
                    raise
                self.failure = error  # no weight has changed since the last iteration: it can still be saved
                return
            try:
                faults = self.faults.take(rollout, self.iteration)
            except WorkersError as error:  # what was played is whole: it is learned from, and the next is not begun
                self._too_many, faults = error, self.faults.metrics()
            parts = self.num_samples // args.per_device_train_batch_size
            if (too_few := few_steps(rollout, parts)) is not None:
                raise self._too_many or too_few
            lag = self.iteration - rollout.version
            samples = samples_of(rollout, self.policy, args, self.scale, lag)
        self._rollout_metrics(rollout, samples)
        self._rollout |= faults
        if samples.importance is not None:
            self._rollout |= {"policy_lag": float(lag), "importance": samples.importance.mean().item()}
        for minibatch in minibatches(samples, args, self.iteration, parts, self.policy):
            yield {name: value for name, value in minibatch._asdict().items() if value is not None and name != "usable"}

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of `manako.agent.losses.ppo_loss`."""
        samples = Samples(**inputs).to(self.policy.device)  # the Trainer moves tensors, and no rows
        evaluated = model(samples.inputs, samples.actions)
        loss, measured, ratio = ppo_loss(evaluated, samples, self.args, ent_coef_at(self.args, self.iteration))
        self._check_and_keep({name: value.detach() for name, value in measured.items()}, ratio.detach())
        return (loss, evaluated) if return_outputs else loss

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
        self.policy.save(folder)
        state, tensors = self.brought_back or (self.run_state(), self.collector.tensors())
        (folder / ROLLOUT_STATE).write_text(json.dumps(state), encoding="utf-8")
        if tensors:
            save_file(tensors, folder / ROLLOUT_TENSORS)
        write_manifest(folder, trusted=True, deep=False)

    def run_state(self) -> dict[str, Any]:
        """Returns where the run is, as JSON: what a checkpoint holds beside weights, optimizer and chance."""
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "env": self.collector.state_dict(),
            "episodes": self._ended.state_dict(),
        }
        if self.scale is not None:
            state["return_scale"] = self.scale.state_dict()
        return state

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with filled(folder, f"The checkpoint of iteration {self.iteration}"):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        verify_folder(folder, OF_A_RUN)
        self.policy.load_weights(folder)
        try:
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))  # which the Trainer reads next
            self._load_state(folder, json_object(read_text(folder / ROLLOUT_STATE)))
        except TrainingError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise TrainingError(
                f"The state of the run in {folder} cannot be read ({type_and_text(error)}): use an older checkpoint."
            ) from error

    def _load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Takes over what `save_state` wrote."""
        self.iteration = state["iteration"]
        # checkpoints of older versions have neither: their critic knows rewards as they are; their episodes start anew
        if "return_scale" not in state:
            self.scale = None
        elif self.scale is not None:
            self.scale.load_state_dict(state["return_scale"])
        if "episodes" in state:
            self._ended.load_state_dict(state["episodes"])
        tensors = folder / ROLLOUT_TENSORS
        self.collector.load_state_dict(state["env"], load_file(tensors) if tensors.is_file() else {})

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with _numbers_alone("optimizer.pt or scheduler.pt", checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with _numbers_alone("rng_state.pth", checkpoint):
            super()._load_rng_state(checkpoint)

    def _send_telemetry(self) -> None:
        """Sends nothing."""

    # ---- metrics and stops ---------------------------------------------------------------------------------------

    def _reset_metrics(self) -> None:
        self._updates = 0
        self._measured: list[dict[str, torch.Tensor]] = []
        self._rollout: dict[str, float | None] = {}

    def _rollout_metrics(self, rollout: Rollout, samples: Samples) -> None:
        self._rollout = {
            **means(self._ended.take(rollout)),
            **self._outcomes(rollout),
            **(
                {"explained_variance": self._explained(samples)}
                if self.args.advantage == "gae" or samples.usable is None
                else {
                    "usable_samples": samples.usable.float().mean().item(),
                    "whole_groups": whole_groups(
                        rollout.terminated | rollout.truncated, self.args.group_size, rollout.failed
                    ),
                }
            ),
            **({} if self.scale is None else {"return_deviation": self.scale.deviation}),
            "rollout_steps_per_second": self.num_samples / rollout.seconds,
            "rollout_seconds": rollout.seconds,
            **self.collector.metrics(),
        }

    @staticmethod
    def _explained(samples: Samples) -> float:
        counted = samples.mask if samples.values.ndim == 2 else torch.ones_like(samples.values, dtype=torch.bool)
        if samples.usable is not None:
            counted = counted & samples.usable.view(-1, *[1] * (counted.ndim - 1))
        return explained_variance(samples.values[counted], samples.returns[counted]).item()

    def _outcomes(self, rollout: Rollout) -> dict[str, float | None]:
        """Of answers in text the share of each outcome, their length, and how many tokens a second were written."""
        said = rollout.outcomes
        if not said:
            return {}
        writes = self.policy.writes(rollout.actions)
        names = dict.fromkeys([*(OUTCOMES if writes else ()), *sorted(set(said))])
        shares: dict[str, float | None] = {f"outcome/{name}": said.count(name) / len(said) for name in names}
        if not writes:
            return shares
        tokens = [len(answer) for answer in self.policy.answer_tokens(rollout.actions)]
        return {
            **shares,
            "answer_tokens": sum(tokens) / len(tokens),
            "tokens_per_second": sum(tokens) / rollout.seconds,
            "illegal_cost": self.policy.illegal_penalty * (1 - said.count(LEGAL) / len(said)),
        }

    def _check_and_keep(self, measured: dict[str, torch.Tensor], ratio: torch.Tensor) -> None:
        """Stops on NaN and on a first ratio other than 1; keeps the numbers for the log."""
        if not torch.isfinite(measured["loss"]):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in measured.items())
            raise NotFiniteError(
                f"The loss is not finite in iteration {self.iteration} ({values}): expected numbers, which a smaller "
                "learning_rate keeps."
            )
        if not self._measured:
            away = (ratio - 1).abs()
            self.first_ratio_error = away.max().item()
            exact = not self.args.bf16 and self._is_fp32()
            found, tolerance, which = (away.max(), 1e-4, "a ratio") if exact else (away.mean(), IN_HALF, "a mean ratio")
            if found > tolerance:
                raise TrainingError(
                    f"The first minibatch of iteration {self.iteration} has {which} {found.item():.2g} away from 1, "
                    f"expected at most {tolerance:.0e}: the policy that learns is not the one that acted, so look for "
                    "dropout, another dtype, or weights that changed in between."
                )
        self._measured.append(measured)

    def _is_fp32(self) -> bool:
        return next(self.policy.parameters()).dtype == torch.float32

    def _iteration_metrics(self) -> dict[str, Any]:
        padding = self.policy.padding_share()
        means = {name: torch.stack([step[name] for step in self._measured]).mean().item() for name in self._measured[0]}
        return {
            "iteration": self.iteration,
            "env_steps": self.iteration * self.num_samples,
            **self._rollout,
            **({} if padding is None else {"padding": padding}),
            **means,
            "first_ratio_error": self.first_ratio_error,
            "updates": self._updates,  # minibatches that were learned from
        }


@contextlib.contextmanager
def _numbers_alone(files: str, checkpoint: Any) -> Iterator[None]:
    """One sentence where a checkpoint's file holds anything else: torch reads no object out of it, nothing is run."""
    try:
        yield
    except Exception as error:  # whatever torch and the objects say to what they find
        raise TrainingError(
            f"The {files} of {checkpoint} cannot be read as numbers alone ({first_line(error)}); use an older "
            "checkpoint."
        ) from error


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
        """Checks the clipped gradients of one minibatch, and stops the update at the target KL."""
        trainer = self.trainer
        gradients = [p.grad for p in trainer.policy.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise NotFiniteError(
                f"The gradients are not finite in iteration {trainer.iteration}: expected numbers, which a smaller "
                "learning_rate keeps."
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
        """Counts the iteration, unless it failed before it learned anything."""
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
