"""`--trainable auto` of the runners that train; light to import."""

from dataclasses import replace
from typing import TypeVar

from manako.experiments.common.command_line import show
from manako.experiments.common.run_folder import policy_folder
from manako.experiments.common.settings import DPOCommand, PPOCommand, SFTCommand
from manako.policies.default_trainable import AUTO, default_trainable
from manako.policies.source import PolicySource

Command = TypeVar("Command", PPOCommand, SFTCommand, DPOCommand)


def with_trainable(command: Command) -> Command:
    """Returns the settings with what learns in place of `auto`, and says it."""
    if command.policy.trainable != AUTO:
        return command
    learns, why = trainable_of(command.policy)
    show("learns", f"{learns}, since {why}; --trainable says otherwise")
    return replace(command, policy=replace(command.policy, trainable=learns))


def trainable_of(source: PolicySource) -> tuple[str, str]:
    """Returns what learns of a preset, a run or a model by default, and why in words."""
    return default_trainable(replace(source, policy=policy_folder(source.policy)))
