"""A policy's groups of parameters inside an optimizer that somebody else made."""

from typing import Any

import torch


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
