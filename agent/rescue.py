"""What a run was when its last iteration ended, kept in memory, so that a run that ends badly loses no more than that.

An update that fails half-way leaves weights that belong to no iteration, and an environment that raises leaves slots in
the middle of a step. So weights, optimizer, schedule, random numbers and the environments' state are copied when an
iteration begins, and are brought back to be written as a checkpoint like any other: what goes on from it goes on as if
the failed iteration had never begun.

Two iterations are kept. Weights can be broken before anybody sees it: an update that was too large is noticed when the
next rollout's probabilities, or its first loss, are not numbers. Then the iteration before is the last good one.

Where the learning weights and their optimizer take more than `MOST_BYTES`, they are not copied: a rollout that fails
can still be undone, since no weight has changed in it; an update cannot, and the last checkpoint on disk stands.
"""

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback

from manako.agent.rng import chance, set_chance

if TYPE_CHECKING:
    from manako.agent.ppo_trainer import PPOTrainer

MOST_BYTES = 1 << 30  # of both copies together


class _Kept(NamedTuple):
    """The end of an iteration."""

    iteration: int
    learned: dict[str, torch.Tensor] | None  # weights; None where they are too large
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any]
    trainer: dict[str, Any]  # of the Trainer's state
    log_rows: int
    chance: tuple[Any, ...]
    run: dict[str, Any]  # what the checkpoint's rollout_state.json holds
    tensors: dict[str, torch.Tensor]


STATE_FIELDS = ("global_step", "epoch", "total_flos", "num_input_tokens_seen")


class LastIterations(TrainerCallback):
    """Copies of the last two iterations' ends.

    Args:
        trainer: the trainer; it is to be added to it before all that may fail.
    """

    def __init__(self, trainer: "PPOTrainer") -> None:
        self.trainer = trainer
        self.kept: list[_Kept] = []  # oldest first

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copies what the last iteration left."""
        trainer = self.trainer
        if trainer.iteration == 0:
            return  # nothing was learned
        learned, optimizer = None, None
        if 2 * self._bytes() <= MOST_BYTES:
            learned = {name: _copied(weight.detach()) for name, weight in self._learning().items()}
            optimizer = _copied(trainer.optimizer.state_dict())
        self.kept = [
            *self.kept[-1:],
            _Kept(
                trainer.iteration,
                learned,
                optimizer,
                copy.deepcopy(trainer.lr_scheduler.state_dict()),
                {name: copy.copy(getattr(state, name)) for name in STATE_FIELDS},
                len(state.log_history),
                chance(),
                trainer.run_state(),
                trainer.collector.tensors(),
            ),
        ]

    def bring_back(self, broken: bool) -> bool:
        """Makes the trainer what it was when the last good iteration ended.

        Args:
            broken: the numbers were not finite. If nothing was learned since the last iteration, it is the broken one.

        Returns:
            Whether there is one; else the trainer is left as it is.
        """
        trainer = self.trainer
        kept = self.kept[-1:]
        learned_since = bool(kept) and trainer.state.global_step != kept[0].trainer["global_step"]
        if broken and not learned_since:
            kept, learned_since = self.kept[-2:-1], True
        if not kept or (learned_since and kept[0].learned is None):
            return False
        last = kept[0]
        if last.learned is not None and last.optimizer is not None:
            with torch.no_grad():
                for name, weight in self._learning().items():
                    weight.copy_(last.learned[name])
            trainer.optimizer.load_state_dict(copy.deepcopy(last.optimizer))
        trainer.lr_scheduler.load_state_dict(copy.deepcopy(last.scheduler))
        for name, value in last.trainer.items():
            setattr(trainer.state, name, value)
        del trainer.state.log_history[last.log_rows :]
        trainer.current_flos = 0
        trainer.control.should_epoch_stop = trainer.control.should_training_stop = False
        trainer.control.should_save = True  # as of every checkpoint
        set_chance(last.chance)
        trainer.iteration = last.iteration
        trainer.brought_back = last.run, last.tensors
        return True

    def _learning(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.trainer.policy.named_parameters() if weight.requires_grad}

    def _bytes(self) -> int:
        return 3 * sum(weight.numel() * weight.element_size() for weight in self._learning().values())  # AdamW has two


def _copied(value: Any) -> Any:
    """A copy in main memory of tensors in dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else copy.deepcopy(value)
