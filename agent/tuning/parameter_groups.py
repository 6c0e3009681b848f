"""A policy's groups of parameters inside an optimizer that somebody else made."""

from typing import Any

import torch

from manako.policies.interface import Policy


class GroupsOfPolicy:
    """What a trainer inherits before transformers' Trainer: a policy's groups in the optimizer that the latter makes.

    Attributes:
        policy: whose parameters learn.
        adapter_learning_rate: of the adapter, if another.
    """

    policy: Policy
    adapter_learning_rate: float | None
    optimizer: Any
    args: Any
    lr_scheduler: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Returns the Trainer's optimizer with the policy's groups of parameters."""
        trainer: Any = super()
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = trainer.create_optimizer(model)
        if is_new:
            regroup(optimizer, self.policy.parameter_groups(self.args.learning_rate, self.adapter_learning_rate))
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads both, and keeps the learning rates and the schedule that this run was given.

        Of a run that goes on as it was they are the checkpoint's, to the bit.
        """
        rates = list(self.lr_scheduler.base_lrs)
        trainer: Any = super()
        trainer._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.lr_scheduler.base_lrs = rates
        steps = self.lr_scheduler.last_epoch
        now = [rate * share(steps) for rate, share in zip(rates, self.lr_scheduler.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, rates, now, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        self.lr_scheduler._last_lr = list(now)


def regroup(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Gives the parameters of each group its learning rate, before the first step.

    The optimizer's own groups (with and without weight decay) are split where they hold parameters of several rates.

    Args:
        optimizer: made for the same parameters.
        groups: of `Policy.parameter_groups`.
    """
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    for group in list(optimizer.param_groups):
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates.get(parameter, group["lr"]), []).append(parameter)
        group["params"] = by_rate.pop(group["lr"], [])
        for rate, parameters in by_rate.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": rate})
