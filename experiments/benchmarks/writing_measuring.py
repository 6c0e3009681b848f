"""The two ways of writing.py to have N environments answered in text."""

import dataclasses
import os
from typing import Any

import torch
from PIL import Image

from manako.agent.rng import make_rng
from manako.envs import EpisodeVectorEnv, Observations
from manako.experiments.benchmarks.settings import WritingSettings
from manako.experiments.benchmarks.timing import in_turns, ratio, spread
from manako.experiments.common.building import quiet_libraries
from manako.experiments.common.command_line import UsageError, show
from manako.policies import PolicySource, load_policy
from manako.policies.interface import Draws
from manako.policies.text_policy import TextPolicy

OURS, PER_ENV = "ours", "generate per env"


def measure(given: WritingSettings) -> dict[str, Any]:
    """Measures, prints and returns env steps a second of both ways, and their ratio."""
    quiet_libraries()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    torch.manual_seed(0)
    env = EpisodeVectorEnv(given.env, given.num_envs)
    source = PolicySource(given.policy, action_format="text", answer_tokens=given.answer_tokens)
    policy = load_policy(source, env.action_names, env.frame_shape)
    if not isinstance(policy, TextPolicy):
        raise UsageError(f"{given.policy} writes no text on {given.env}: expected an env of actions with names.")
    seen = env.reset()
    env.close()
    # an end token that is drawn now and then would make the two ways write answers of other lengths
    policy._banned[policy.end_id] = True
    draws = Draws([make_rng(0)] * given.num_envs)

    def ours() -> float:
        with policy.frozen_weights():
            acted = policy.act(policy.prepare(seen.images, seen.instructions), draws)
        assert int(acted.mask.sum()) == given.num_envs * given.answer_tokens, "answers of the same length"
        return given.num_envs

    load = os.getloadavg()
    rates = in_turns({OURS: ours, PER_ENV: _PerEnv(policy, seen, given.answer_tokens)}, given.repeats, given.seconds)
    times, medians = ratio(rates, OURS, PER_ENV), {name: spread(values) for name, values in rates.items()}
    show("steps/s", ", ".join(f"{found.median:,.1f} {name}" for name, found in medians.items()))
    show("tokens/s", ", ".join(f"{found.median * given.answer_tokens:,.0f} {name}" for name, found in medians.items()))
    show("times", f"{times.median:.1f} ({times.low:.1f} to {times.high:.1f})")
    return {
        "settings": dataclasses.asdict(given),
        "load_average": [load, os.getloadavg()],
        "steps_per_second": {name: found._asdict() for name, found in medians.items()},
        "times": times._asdict(),
    }


class _PerEnv:
    """The library's processor and `generate`, one environment after the other."""

    def __init__(self, policy: TextPolicy, seen: Observations, tokens: int) -> None:
        self.policy, self.seen, self.tokens = policy, seen, tokens

    @torch.no_grad()
    def __call__(self) -> float:
        """Answers all environments once; returns how many they are."""
        policy = self.policy
        for image, instruction in zip(self.seen.images, self.seen.instructions, strict=True):
            given = policy.processor(
                text=[policy.prompt(instruction)], images=[[Image.fromarray(image)]], return_tensors="pt"
            )
            policy.base_vlm.generate(
                **given,
                do_sample=True,
                min_new_tokens=self.tokens,
                max_new_tokens=self.tokens,
                output_scores=True,
                return_dict_in_generate=True,
                pad_token_id=policy.end_id,
            )
        return len(self.seen.images)
