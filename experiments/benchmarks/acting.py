"""The variants of one rollout step: ours and the two that it stands beside.

ours               RolloutCollector: all envs in one forward, shared prefix, action rows, pixels by table
whole batch        all envs in one forward of the whole model: the library's processor, whole prompts, all V logits
generate per env   one env after the other: the processor, `generate`, and a second forward over prompt and answer
                   for the answer's log-probability and the value, as in https://github.com/RL4VLM/RL4VLM
"""

import re

import numpy as np
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.rng import make_rng
from manako.agent.samples import Samples
from manako.envs import EpisodeVectorEnv, Observations
from manako.experiments.benchmarks.timing import Work
from manako.experiments.benchmarks.workload import Workload
from manako.experiments.common.command_line import UsageError
from manako.policies import PolicySource, VLMPolicy, load_policy
from manako.policies.interface import Draws, Rows, sample_categorical
from manako.spaces import is_vector


class Bench:
    """A policy and its environments, and one update's samples.

    Args:
        workload: what to load and how much of it to run.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        torch.set_num_threads(workload.threads or torch.get_num_threads())
        torch.manual_seed(workload.seed)
        self.env = EpisodeVectorEnv(workload.env, workload.num_envs, seed=workload.seed)
        if is_vector(self.env.action_space):
            raise UsageError(
                f"{workload.env} has actions that are vectors, and what is timed reads a list of actions: expected an "
                "env of Discrete actions."
            )
        source = PolicySource(
            workload.policy,
            trainable=workload.trainable,
            vision_encoder=workload.vision_encoder,
            image_size=workload.image_size,
            seed=workload.seed,
        )
        self.policy = load_policy(source, self.env.action_names, self.env.frame_shape)
        self.collector = RolloutCollector(self.env, self.policy, workload.num_steps, workload.seed)
        self.iteration = 0

    def collect(self) -> float:
        """Plays one rollout of ours; returns its env steps."""
        self.collector.collect(self.iteration)
        self.iteration += 1
        return self.workload.num_envs * self.workload.num_steps

    def inputs(self, batch: int) -> Rows:
        """Returns the first observations of `batch` environments as the policy sees them."""
        env = EpisodeVectorEnv(self.workload.env, batch, seed=self.workload.seed)
        seen = env.reset()
        env.close()
        return self.policy.prepare(seen.images, seen.instructions)

    def samples(self) -> Samples:
        """Returns B samples whose actions, advantages and returns are drawn at random."""
        batch, rng = self.workload.minibatch_size, np.random.default_rng(self.workload.seed)
        inputs = self.inputs(batch)
        actions = rng.integers(0, len(self.env.action_names), batch)  # (B,)
        normal = torch.from_numpy(rng.standard_normal((2, batch)).astype(np.float32))  # (2, B)
        return Samples(
            inputs=inputs,
            actions=self.policy.actions_from_env(actions),
            logprobs=torch.full((batch, 1), -float(np.log(len(self.env.action_names)))),
            mask=torch.ones(batch, 1, dtype=torch.bool),
            values=torch.zeros(batch),
            advantages=normal[0],
            returns=normal[1],
        )

    def rollout_forward(self) -> Work:
        """Returns work: the policy's forwards of one rollout without the envs, in samples."""
        inputs = self.inputs(self.workload.num_envs)
        draws = Draws([make_rng(self.workload.seed)] * self.workload.num_envs)

        def work() -> float:
            with self.policy.frozen_weights():
                for _ in range(self.workload.num_steps):
                    self.policy.act(inputs, draws)
            return self.workload.num_envs * self.workload.num_steps

        return work


def _library_inputs(policy: VLMPolicy, seen: Observations) -> dict[str, torch.Tensor]:
    """Prompts and frames by the library's processor: `input_ids` and `attention_mask` (B, L), `pixel_values`."""
    texts = [policy.prompt(text) for text in seen.instructions]
    images = [[image] for image in seen.images]
    return dict(policy.processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right"))


class WholeBatch:
    """All envs in one forward of the whole model, without anything of ours that makes it fast."""

    def __init__(self, bench: Bench) -> None:
        work = bench.workload
        self.policy = bench.policy
        self.env = EpisodeVectorEnv(work.env, work.num_envs, seed=work.seed)
        self.rng = np.random.default_rng(work.seed)
        self.seen = self.env.reset()
        if len(self.policy.codec.branches) != 1:
            raise ValueError("whole batch reads one-token actions: expected another env or tokenizer.")

    @torch.no_grad()
    def forward(self, seen: Observations) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probabilities (B, A) and values (B,)."""
        inputs = _library_inputs(self.policy, seen)
        output = self.policy.base_vlm(**inputs, output_hidden_states=True, use_cache=False)  # logits (B, L, V)
        rows, last = torch.arange(len(seen.images)), inputs["attention_mask"].sum(1) - 1  # (B,)
        logits = output.logits[rows, last][:, list(self.policy.codec.branches[0].children)]  # (B, A)
        return (
            self.policy.codec.action_logprobs([logits]),
            self.policy.value_head(output.hidden_states[-1][rows, last]),
        )

    def __call__(self) -> float:
        """Takes one step of every env; returns N."""
        logprobs, _ = self.forward(self.seen)
        self.seen = _play(self.env, sample_categorical(logprobs, self.rng.random(self.env.num_envs)).numpy())
        return self.env.num_envs


class GeneratePerEnv:
    """One env at batch size 1: `generate` the answer, then a second forward for its log-probability and the value.

    The answer's length is forced to that of the longest legal answer, since an untrained model would write on. What is
    not a legal answer becomes a random action.
    """

    def __init__(self, bench: Bench) -> None:
        work = bench.workload
        self.policy = bench.policy
        # the others would only wait for their turn; what `generate` says knows no masks
        self.env = EpisodeVectorEnv(work.env, 1, seed=work.seed, action_masks=False)
        self.rng = np.random.default_rng(work.seed)
        self.seen = self.env.reset()
        tokenizer = self.policy.processor.tokenizer
        answers = [work.answer.replace("{action}", name) for name in self.env.action_names]
        self.length = max(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers)
        before, _, after = work.answer.partition("{action}")
        self.pattern = re.compile(re.escape(before) + r"([^\"]+)" + re.escape(after))

    @torch.no_grad()
    def __call__(self) -> float:
        """Takes one step; returns 1."""
        policy = self.policy
        inputs = _library_inputs(policy, self.seen)
        prompt = inputs["input_ids"].shape[1]
        ids = policy.base_vlm.generate(
            **inputs, do_sample=True, min_new_tokens=self.length, max_new_tokens=self.length
        )  # (1, L + answer)
        output = policy.base_vlm(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            output_hidden_states=True,
            use_cache=False,
        )
        logprobs = output.logits[0, prompt - 1 : -1].float().log_softmax(-1)  # (answer, V)
        self.logprob = logprobs.gather(1, ids[0, prompt:, None]).sum().item()
        self.value = policy.value_head(output.hidden_states[-1][:, prompt - 1]).item()
        found = self.pattern.search(policy.processor.tokenizer.decode(ids[0, prompt:]))
        name = found[1].strip() if found else None
        names = self.env.action_names
        action = names.index(name) if name in names else int(self.rng.integers(len(names)))
        self.seen = _play(self.env, np.array([action]))
        return 1


def _play(env: EpisodeVectorEnv, actions: np.ndarray) -> Observations:
    """One env step, and the next episode where one ended."""
    result = env.step(actions)
    ended = result.terminated | result.truncated
    return env.reset_done(ended) if ended.any() else result.observations


def preprocessing(bench: Bench) -> tuple[dict[str, Work], bool]:
    """Returns work, N frames to pixels by the library's processor and by ours, and whether their numbers are equal."""
    pipeline, count = bench.policy.processing.pipeline, bench.workload.num_envs
    env = EpisodeVectorEnv(bench.workload.env, count, seed=bench.workload.seed)
    frames = env.reset().images  # (N, H, W, 3)
    env.close()

    def library() -> torch.Tensor:
        return pipeline.image_processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]

    def ours() -> torch.Tensor:
        return pipeline.pixels(pipeline.resize(frames))["pixel_values"]

    works: dict[str, Work] = {
        "library": lambda: len(library()),
        "ours": lambda: len(ours()),
    }
    return works, torch.equal(library(), ours())
