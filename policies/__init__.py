"""Policies decide: vision encoder -> adapter -> language model -> probabilities of actions.

The names below are imported when they are asked for: settings and command lines need `PolicySource` and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manako.policies.errors import PolicyError
from manako.policies.source import PolicySource

if TYPE_CHECKING:
    from manako.policies.interface import Policy as Policy
    from manako.policies.interface import PolicySpec as PolicySpec
    from manako.policies.loading import load_policy as load_policy
    from manako.policies.saving import save_policy as save_policy
    from manako.policies.trainable import parameter_table as parameter_table
    from manako.policies.vlm_policy import VLMPolicy as VLMPolicy

_WHERE = {
    "load_policy": "loading",
    "save_policy": "saving",
    "parameter_table": "trainable",
    "Policy": "interface",
    "PolicySpec": "interface",
    "VLMPolicy": "vlm_policy",
}

__all__ = ["PolicyError", "PolicySource", *_WHERE]


def __getattr__(name: str) -> Any:
    """Returns one of the heavy names, imported when it is asked for."""
    if name in _WHERE:
        return getattr(import_module(f"manako.policies.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'manako.policies' has no attribute {name!r}")
