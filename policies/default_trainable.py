"""What learns where nobody says it, as `trainable: auto`: it follows from where the language model comes from.

    random        everything: an adapter around a language model that knows nothing can teach it nothing
    pretrained    the adapter and LoRA, which leave its own weights as they are

Light to import. A run's folder knows it from its policy.json; one of an older version is followed to where it started.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from manako.bounded import json_object, read_text
from manako.policies.architectures.presets import PRESETS
from manako.policies.source import PolicySource

RANDOM_LANGUAGE_MODELS = (None, "tiny-llama")  # None: an architecture's own
POLICY_FILE, IS_RANDOM = "policy.json", "random_language_model"
AUTO = "auto"


def default_trainable(source: PolicySource) -> tuple[str, str]:
    """Returns what learns, and why in words.

    Args:
        source: its `policy` is a preset, a model folder, the folder of a policy, or a Hub id.
    """
    if began_random(source):
        return "full", "its language model began with random weights"
    return "lora", "its language model is pretrained"


def with_default(source: PolicySource) -> PolicySource:
    """Returns the source with what learns in place of `auto`."""
    return source if source.trainable != AUTO else replace(source, trainable=default_trainable(source)[0])


def began_random(source: PolicySource, followed: tuple[str, ...] = ()) -> bool:
    """Says whether the language model of a source began with random weights; what cannot be known is pretrained.

    Args:
        source: see `default_trainable`.
        followed: folders that led to it.
    """
    if source.language_model is not None:
        return source.language_model in RANDOM_LANGUAGE_MODELS
    if source.policy in PRESETS:
        return PRESETS[source.policy].language_model in RANDOM_LANGUAGE_MODELS
    try:
        description: dict[str, Any] = json_object(read_text(Path(source.policy).expanduser() / POLICY_FILE))
        if IS_RANDOM in description:
            return bool(description[IS_RANDOM])
        before = PolicySource(**description["source"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # no folder of a policy, or a damaged one, which loading will say
    followed = (*followed, source.policy)
    return before.policy not in followed and began_random(before, followed)
