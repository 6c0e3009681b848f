"""TRL's own trainers around a policy: what they have to be given; of their code only cloning's loss is replaced.

SFT, DPO and KTO with the policy's model and processor, the adapter's own learning rate, a metrics file, and a stop at a
loss that is not finite. What the model is given the policy says (`collators.py`), and how the labels are scored is the
model's own forward.
"""

import contextlib
import copy
import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from manako.agent.data.pasts import NO_ROW, frames_of
from manako.agent.errors import NotFiniteError, TrainingError
from manako.agent.png import picture
from manako.agent.report.callbacks import METRICS_FILE
from manako.agent.tuning.collators import DPOCollator, KTOCollator, SFTCollator
from manako.agent.tuning.one_frame_together import OneFrameTogether
from manako.agent.tuning.parameter_groups import GroupsOfPolicy
from manako.agent.tuning.saving import SavesPolicy
from manako.agent.tuning.supervised import CHOSEN
from manako.policies.interface import Policy

SHARES = {
    "mean_token_accuracy": "token accuracy",
    "action_accuracy": "actions right",
    "rewards/accuracies": "preferred",
}

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
FORWARDS = ("forward", "_original_forward")


class StepMetricsCallback(TrainerCallback):
    """Appends every logged step to metrics.jsonl and prints a line now and then.

    Args:
        run_dir: the run folder.
        rows: where the rows are kept as well.
    """

    def __init__(self, run_dir: Path, rows: list[dict[str, Any]]) -> None:
        self.path, self.rows = run_dir / METRICS_FILE, rows

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends one optimizer step."""
        if not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{key: value for key, value in logs.items() if key != "epoch"}}
        if not math.isfinite(row["loss"]):
            raise NotFiniteError(
                f"The loss is not finite at step {state.global_step}: expected a number; start again with a smaller "
                "learning_rate."
            )
        self.rows.append(row)
        self.append(row)
        if state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == state.max_steps:
            shares = "".join(f"  {name} {row[key]:.1%}" for key, name in SHARES.items() if key in row)
            print(f"step {state.global_step:5d}/{state.max_steps}  loss {row['loss']:.4f}{shares}", flush=True)

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class _Tokens(NamedTuple):
    """Special tokens of a model, which the Trainer sets to the tokenizer's."""

    ids: dict[str, Any]
    generation: Any  # its GenerationConfig; None of one that does not generate


class _Trained(NamedTuple):
    """What a model has while it is trained."""

    tokens: _Tokens
    forwards: list[tuple[Any, str, Any]]  # model, name, what stands in the place of its own: TRL's and accelerate's


class _OfPolicy(SavesPolicy, GroupsOfPolicy):
    """What the three trainers share.

    Args:
        policy: its model learns where it requires gradients.
        args: TRL's settings.
        data: rows of `agent.tuning.supervised` or `agent.tuning.preferences`.
        run_dir: for metrics.jsonl.
        adapter_learning_rate: of the adapter, if another.
        others: further arguments of TRL's trainer.

    Attributes:
        rows: of metrics.jsonl, those of optimizer steps.
        metrics: writes them.
    """

    def __init__(
        self,
        policy: Policy,
        args: Any,
        data: Dataset,
        run_dir: Path,
        adapter_learning_rate: float | None = None,
        **others: Any,
    ) -> None:
        self.policy, self.adapter_learning_rate = policy, adapter_learning_rate
        self.rows: list[dict[str, Any]] = []
        trainer: Any = super()
        trainer.__init__(policy.model, args=args, train_dataset=data, processing_class=policy.processor, **others)
        score_labels_only(plain_model(policy))
        if others.get("ref_model") is not None:
            score_labels_only(others["ref_model"])
        trainer.remove_callback(PrinterCallback)
        self.metrics = StepMetricsCallback(run_dir, self.rows)
        trainer.add_callback(self.metrics)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and leaves the model as the policy wants it: in evaluation mode."""
        trainer: Any = super()
        self._tokens = tokens_of(plain_model(self.policy))
        try:
            return trainer.train(*args, **kwargs)
        except BaseException as error:
            self.keep_last(error)
            raise
        finally:
            self._as_it_acts()
            shutil.rmtree(self.args.output_dir, ignore_errors=True)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Makes the policy for a block what it is once it is trained: what it does there is what it will do."""
        modes = {module: module.training for module in self.policy.modules()}
        trained = self._as_it_acts()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            give_tokens(plain_model(self.policy), trained.tokens)
            for model, name, forward in trained.forwards:
                setattr(model, name, forward)

    def _as_it_acts(self) -> "_Trained":
        """Takes back from the model what it has for its training: the mode, the tokens, TRL's head and autocast."""
        plain = plain_model(self.policy)
        self.policy.model.eval()
        tokens, forwards = tokens_of(plain), []
        give_tokens(plain, self._tokens)
        for model in (self.policy.model, plain):
            for name in FORWARDS:
                if name in model.__dict__:
                    forwards.append((model, name, model.__dict__.pop(name)))
        return _Trained(tokens, forwards)

    def _send_telemetry(self) -> None:
        """Sends nothing."""


class PolicySFTTrainer(_OfPolicy, SFTTrainer):
    """`trl.SFTTrainer` of a policy."""

    def __init__(self, policy: Policy, args: Any, data: Dataset, run_dir: Path, *others: Any, **named: Any) -> None:
        self.check_loss(policy)
        named.setdefault("data_collator", SFTCollator(policy))
        super().__init__(policy, args, data, run_dir, *others, **named)

    def check_loss(self, policy: Policy) -> None:
        """Raises TrainingError where the loss is not for this policy."""
        check_learns_text(policy)


class PolicyCloningTrainer(PolicySFTTrainer):
    """`trl.SFTTrainer` with the loss of behaviour cloning: -log pi(a | s), the policy's own probability of the action.

    Against the likelihood of the answer's tokens it leaves out what the policy never does, which is to say anything
    but one of its actions, and the end of the answer. It takes the policy's own forward (the prompts' common beginning
    once, the actions' rows of the LM head alone), and a frame and instruction that stand in a batch several times are
    computed once. The policy's own losses are added, such as the next frame's where the data hold it.

    Args:
        policy: its model learns where it requires gradients.
        args: TRL's settings.
        data: of `agent.tuning.supervised.demonstrated_actions`.
        run_dir: for metrics.jsonl.
        others: as of PolicySFTTrainer.

    Raises:
        TrainingError: there are several processes.
    """

    def __init__(self, policy: Policy, args: Any, data: Dataset, run_dir: Path, *others: Any) -> None:
        args.remove_unused_columns = False
        if args.world_size > 1:  # the policy's forward is not the one that DistributedDataParallel watches
            raise TrainingError(
                f"The loss on actions was started by {args.world_size} processes: expected one, or --loss tokens."
            )
        self.demonstrated = data
        if CHOSEN in data.column_names:
            data = data.select(np.flatnonzero(data[CHOSEN]))
        super().__init__(policy, args, data, run_dir, *others, data_collator=self.collate)

    def _png(self, row: int) -> bytes | None:
        """The stored frame of a row; None where there is none."""
        return None if row == NO_ROW else self.demonstrated[row]["image"]["bytes"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.policy.spec.image_first:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return OneFrameTogether(train_dataset or self.train_dataset, batch, self.args.seed)

    def check_loss(self, policy: Policy) -> None:
        """The loss on actions is for every policy with a closed set of them."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what the policy sees of the U different observations of B rows; `observation` and `action` (B,).

        Of the rows whose next frame is known, also what the policy keeps of it, and their actions.
        """
        places: dict[Any, int] = {}
        seen: list[dict[str, Any]] = []
        observation: list[int] = []
        for row in rows:
            past = tuple(self._png(place) for place in row.get("past_rows", ()))
            mask = tuple(row.get("action_mask") or ())
            kind = row["instruction"], row["image"]["bytes"], past, str(row.get("past_turns")), mask
            place = places.setdefault(kind, len(seen))
            if place == len(seen):
                seen.append(row)
            observation.append(place)
        frames = np.stack([picture(row["image"]["bytes"]) for row in seen])  # (U, H, W, 3)
        told = {}
        if rows[0].get("action_mask") is not None:
            told["action_masks"] = np.array([row["action_mask"] for row in seen])  # (U, A)
        if "past_rows" in rows[0]:
            pasts = [[self._png(place) for place in row["past_rows"]] for row in seen]
            told["past_frames"] = np.stack([frames_of(past, frames.shape[1:]) for past in pasts])
        if "past_turns" in rows[0]:
            told["past_turns"] = np.array([row["past_turns"] for row in seen])  # (U, history, 2)
        inputs = self.policy.prepare(frames, [row["instruction"] for row in seen], told)
        action = torch.tensor([row["action"] for row in rows])  # (B,), or vectors (B, d)
        made: dict[str, Any] = {"inputs": inputs, "observation": torch.tensor(observation), "action": action}
        if "thought" in rows[0]:
            made["thoughts"] = [row["thought"] for row in rows]
        known = [at for at, row in enumerate(rows) if row.get("next_image") is not None]
        if known:
            seen_next = np.stack([picture(rows[at]["next_image"]) for at in known])
            made["followed"] = self.policy.see_next(inputs.select(made["observation"][known]), seen_next)
            made["taken"] = self.policy.actions_from_env(action[known].numpy())
        return made

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean of -log pi(a | s) over the batch."""
        if inputs["action"].ndim > 1 or "thoughts" in inputs:
            return self._loss_of_tokens(inputs, return_outputs)
        # every action of an observation is read by one forward, so it is asked for any one of them
        first = self.policy.actions_from_env(np.zeros(len(inputs["inputs"]), dtype=np.int64)).to(self.policy.device)
        with self.accelerator.autocast():
            output = self.policy.evaluate_actions(inputs["inputs"].to(self.policy.device), first)
        assert output.distribution is not None, "cloning an action is for a closed set of them"
        logprobs = output.distribution[inputs["observation"]]  # (B, A)
        right = logprobs.detach().argmax(-1) == inputs["action"]
        self._metrics["train" if self.model.training else "eval"]["action_accuracy"].append(right.float().mean().item())
        loss = -logprobs.gather(1, inputs["action"][:, None]).mean()
        if "followed" in inputs:
            device = self.policy.device
            with self.accelerator.autocast():
                losses = self.policy.own_losses(inputs["followed"].to(device), inputs["taken"].to(device))
            for name, own in losses.items():
                self._metrics["train" if self.model.training else "eval"][name].append(own.item())
                loss = loss + own
        return (loss, output) if return_outputs else loss

    def _loss_of_tokens(self, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The mean of -log pi(a | s) of vectors and of answers in text: of each token given those before it, summed.

        A vector's tokens are each entry's nearest bin, an answer's those of its thought and action.
        """
        policy = self.policy
        actions = policy.actions_from_env(inputs["action"].numpy(), inputs.get("thoughts")).to(policy.device)
        with self.accelerator.autocast():
            rows = inputs["inputs"].select(inputs["observation"]).to(policy.device)
            output = policy.evaluate_actions(rows, actions)
        loss = -output.logprobs.sum(-1).mean()
        return (loss, output) if return_outputs else loss


class PolicyDPOTrainer(_OfPolicy, DPOTrainer):
    """`trl.DPOTrainer` of a policy; its reference is the policy as it was."""

    def __init__(self, policy: Policy, args: DPOConfig, data: Dataset, run_dir: Path, **others: Any) -> None:
        check_learns_text(policy)
        others |= {"ref_model": frozen_copy(policy), "data_collator": DPOCollator(policy)}
        super().__init__(policy, args, data, run_dir, **others)


class PolicyKTOTrainer(_OfPolicy, KTOTrainer):
    """`trl.KTOTrainer` of a policy; its reference is the policy as it was."""

    def __init__(self, policy: Policy, args: KTOConfig, data: Dataset, run_dir: Path, **others: Any) -> None:
        check_learns_text(policy)
        others |= {"ref_model": frozen_copy(policy), "data_collator": KTOCollator(policy)}
        super().__init__(policy, args, data, run_dir, **others)


def check_learns_text(policy: Policy) -> None:
    """Checks that losses on the tokens of a text are for this policy.

    Raises:
        TrainingError: it says one token at a mask, and so gives no text a likelihood.
    """
    if not policy.learns_text:
        raise TrainingError(
            f"{type(plain_model(policy)).__name__} answers with one token at a mask, so spelled captions, --loss "
            "tokens, DPO and KTO are not for it: expected run_sft.py --stage align, where it has losses of its own, or "
            "--stage instruct --loss actions, or run_ppo.py."
        )


def score_labels_only(model: Any) -> None:
    """Makes `model` answer TRL's `fused_lm_head=True` by its own forward, the LM head on labelled positions alone.

    TRL's way calls the model's backbone and repeats what the model does behind it, which fits some families; without
    Triton it also scores every position against the whole vocabulary. Here whatever the model does with its LM head's
    logits stays the model's own.
    """
    of_trl = model.forward
    own = functools.partial(type(model).forward, model)

    @functools.wraps(type(model).forward)  # `generate` looks at the names of its arguments
    def forward(*args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return of_trl(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        given = _as_model_takes(kwargs)
        if not model.is_gradient_checkpointing:  # which needs the mode of training
            for part in model.children():  # no dropout, as when acting: a reference has none, too
                part.eval()
        following, width = labels[:, 1:], labels.shape[1]  # (B, L - 1)
        label_mask = following != -100

        def keep(head: Any, seen: tuple[torch.Tensor, ...]) -> Any:
            hidden = seen[0][:, -width:][:, :-1]  # some models put visual tokens before the sequence
            return (hidden[label_mask][None], *seen[1:])  # (1, labels, D)

        hook = model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            logits = own(*args, **given).logits[0].float()  # (labels, V)
        finally:
            hook.remove()
        return _scores(logits, following[label_mask], label_mask)

    model.forward = forward


def _as_model_takes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """An encoder-decoder is given the sequence that has labels as its decoder's."""
    if "encoder_input_ids" not in kwargs:
        return kwargs
    return {
        **{name: value for name, value in kwargs.items() if not name.startswith("encoder_")},
        "input_ids": kwargs["encoder_input_ids"],
        "attention_mask": kwargs["encoder_attention_mask"],
        "decoder_input_ids": kwargs["input_ids"],
        "decoder_attention_mask": kwargs["attention_mask"],
    }


def _scores(logits: torch.Tensor, labels: torch.Tensor, label_mask: torch.Tensor) -> FusedCausalLMOutput:
    """What TRL asks of labelled positions (labels, V), each (B, L - 1), 0 without a label; gradients in `log_probs`."""
    logprobs = logits.log_softmax(-1)
    taken = logprobs.gather(1, labels[:, None])[:, 0]
    with torch.no_grad():
        p = logprobs.exp()
        others = {
            "entropy": -(p * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1),
            "log_sum_sq_probs": p.square().sum(-1).log(),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == labels,
        }
    spread = {
        name: values.new_zeros(label_mask.shape).masked_scatter(label_mask, values)
        for name, values in {"log_probs": taken, **others}.items()
    }
    loss = -taken.sum() / label_mask.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, label_mask=label_mask, **spread)


def plain_model(policy: Policy) -> Any:
    """Returns the policy's model without PEFT's wrapper."""
    return policy.model.get_base_model() if hasattr(policy.model, "peft_config") else policy.model


def tokens_of(plain: Any) -> _Tokens:
    """Returns a model's special tokens; see `give_tokens`."""
    generation = copy.deepcopy(plain.generation_config) if plain.can_generate() else None
    return _Tokens({name: getattr(plain.config, name, None) for name in SPECIAL_IDS}, generation)


def give_tokens(plain: Any, tokens: _Tokens) -> None:
    """Gives a model the special tokens that it had."""
    if tokens.generation is not None:
        plain.generation_config = copy.deepcopy(tokens.generation)
    for name, value in tokens.ids.items():
        setattr(plain.config, name, value)


def frozen_copy(policy: Policy) -> Any:
    """Returns the policy's model as it is now, LoRA merged, without gradients: a reference."""
    model = copy.deepcopy(policy.model)
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    return model.requires_grad_(False).eval()
