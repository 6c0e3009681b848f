"""What benchmark.py measures: our way and the two ways it stands beside, FLOPs, and timing in turns.

The ways of one rollout step:
    ours               RolloutCollector: all envs in one forward, shared prefix, action rows, pixels by table
    whole batch        all envs in one forward of the whole model: the library's processor, whole prompts, all V logits
    generate per env   one env after the other: the processor, `generate`, and a second forward over prompt and answer
                       for the answer's log-probability and the value, as in https://github.com/RL4VLM/RL4VLM
The ways of one update step: shared prefix; whole prompts; whole prompts one sample at a time, gradients accumulated.

Rates are taken in turns, A B C A B C, and compared within a round: what else the machine does then meets all of them.
FLOPs are counted where torch multiplies matrices, 2 for each multiply-add, so what is counted is what is run. This
module imports torch; benchmark.py imports it late.
"""

import copy
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import profile

from manako.agent.losses import entropy, policy_loss, value_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.rollout import SHUFFLES, Rollout, RolloutCollector, Samples, choose, stream, with_advantages
from manako.envs import EpisodeVectorEnv, Observations
from manako.policies import PolicyInputs, PolicySource, VLMPolicy, load_policy

Work = Callable[[], float]  # does something once and returns how many units it did


@dataclass(frozen=True)
class Workload:
    """What is run, and how much of it.

    Args:
        policy: a preset.
        trainable: what of it learns.
        env: Gymnasium id.
        num_envs: environments side by side, N.
        num_steps: env steps of a rollout, T.
        minibatch_size: samples of an optimizer step, B.
        overhead_steps: T of the rollouts that the trainer and the bare loop learn from.
        overhead_epochs: their PPO epochs.
        answer: what the model writes in `generate per env`, around `{action}`.
        gemm_sizes: sides of the square matrices among which the machine's best rate is sought.
        repeats: rounds.
        seconds: least duration of one measurement.
        threads: CPU threads of torch; None for its own choice.
        seed: of everything random.
    """

    policy: str
    trainable: str
    env: str
    num_envs: int
    num_steps: int
    minibatch_size: int
    overhead_steps: int
    overhead_epochs: int
    answer: str
    gemm_sizes: tuple[int, ...]
    repeats: int
    seconds: float
    threads: int | None
    seed: int = 0


class Spread(NamedTuple):
    """Median and range over the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(rates: dict[str, list[float]], of: str, to: str) -> Spread:
    """The ratio of two rates within each round."""
    return spread([a / b for a, b in zip(rates[of], rates[to], strict=True)])


def rate(work: Work, seconds: float) -> float:
    """Units a second. A first run that is shorter than `seconds` only warms up; a longer one is the measurement."""
    start = time.perf_counter()
    units = work()
    took = time.perf_counter() - start
    if took >= seconds:
        return units / took
    units, start = 0.0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        units += work()
    return units / took


def in_turns(works: dict[str, Work], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Rates of each work, one a round; a round runs them one after the other."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            rates[name].append(rate(work, seconds))
    return rates


# ---- what is measured -----------------------------------------------------------------------------------------------


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
        source = PolicySource(workload.policy, trainable=workload.trainable, seed=workload.seed)
        self.policy = load_policy(source, self.env.action_names, self.env.frame_shape)
        self.collector = RolloutCollector(self.env, self.policy, workload.num_steps, workload.seed)
        self.iteration = 0

    def collect(self) -> float:
        """One rollout, our way; returns its env steps."""
        self.collector.collect(self.iteration)
        self.iteration += 1
        return self.workload.num_envs * self.workload.num_steps

    def inputs(self, batch: int) -> PolicyInputs:
        """The first observations of `batch` environments as the policy sees them."""
        env = EpisodeVectorEnv(self.workload.env, batch, seed=self.workload.seed)
        seen = env.reset()
        env.close()
        return self.policy.prepare(seen.images, seen.instructions)

    def samples(self) -> Samples:
        """B samples whose actions, advantages and returns are drawn at random."""
        batch, rng = self.workload.minibatch_size, np.random.default_rng(self.workload.seed)
        inputs = self.inputs(batch)
        with torch.no_grad():
            output = self.policy(inputs.select(torch.arange(2)))
        actions = torch.from_numpy(rng.integers(0, output.logprobs.shape[1], batch))  # (B,)
        normal = torch.from_numpy(rng.standard_normal((2, batch)).astype(np.float32))  # (2, B)
        return Samples(
            inputs=inputs,
            actions=actions,
            logprobs=torch.full((batch,), -float(np.log(output.logprobs.shape[1]))),
            values=torch.zeros(batch),
            advantages=normal[0],
            returns=normal[1],
            reference=None,
        )

    def rollout_forward(self) -> Work:
        """The policy's forwards of one rollout without the envs; returns samples."""
        inputs = self.inputs(self.workload.num_envs)

        def work() -> float:
            with self.policy.frozen_weights():
                for _ in range(self.workload.num_steps):
                    self.policy(inputs)
            return self.workload.num_envs * self.workload.num_steps

        return work


def _library_inputs(policy: VLMPolicy, seen: Observations) -> dict[str, torch.Tensor]:
    """Prompts and frames by the library's processor: `input_ids` and `attention_mask` (B, L), `pixel_values`."""
    texts = [policy.prompts.render(policy.prompts.clean(text)) for text in seen.instructions]
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
        """Log-probabilities (B, A) and values (B,)."""
        inputs = _library_inputs(self.policy, seen)
        output = self.policy.base_vlm(**inputs, output_hidden_states=True, use_cache=False)  # logits (B, L, V)
        rows, last = torch.arange(len(seen.images)), inputs["attention_mask"].sum(1) - 1  # (B,)
        logits = output.logits[rows, last][:, list(self.policy.codec.branches[0].children)]  # (B, A)
        return (
            self.policy.codec.action_logprobs([logits]),
            self.policy.value_head(output.hidden_states[-1][rows, last]),
        )

    def __call__(self) -> float:
        """One step of every env; returns N."""
        logprobs, _ = self.forward(self.seen)
        self.seen = _play(self.env, choose(logprobs, self.rng.random(self.env.num_envs)).numpy())
        return self.env.num_envs


class GeneratePerEnv:
    """One env at batch size 1: `generate` the answer, then a second forward for its log-probability and the value.

    The answer's length is forced to that of the longest legal answer, since an untrained model would write on. What is
    not a legal answer becomes a random action.
    """

    def __init__(self, bench: Bench) -> None:
        work = bench.workload
        self.policy = bench.policy
        self.env = EpisodeVectorEnv(work.env, 1, seed=work.seed)  # the others would only wait for their turn
        self.rng = np.random.default_rng(work.seed)
        self.seen = self.env.reset()
        tokenizer = self.policy.processor.tokenizer
        answers = [work.answer.replace("{action}", name) for name in self.env.action_names]
        self.length = max(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers)
        before, _, after = work.answer.partition("{action}")
        self.pattern = re.compile(re.escape(before) + r"([^\"]+)" + re.escape(after))

    @torch.no_grad()
    def __call__(self) -> float:
        """One step; returns 1."""
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


def ppo_loss(policy_output: Any, samples: Samples, args: PPOConfig) -> torch.Tensor:
    """The loss of `PPOTrainer.compute_loss` without its metrics."""
    logprobs = policy_output.logprobs.gather(1, samples.actions[:, None])[:, 0]  # (B,)
    actor, _ = policy_loss(logprobs, samples.logprobs, samples.advantages, args.clip_range)
    critic = value_loss(policy_output.values, samples.values, samples.returns, args.clip_range_vf)
    return actor + args.vf_coef * critic - args.ent_coef * entropy(policy_output.logprobs).mean()


def select(samples: Samples, rows: torch.Tensor) -> Samples:
    """The samples at these rows; no reference."""
    return Samples(
        inputs=samples.inputs.select(rows),
        actions=samples.actions[rows],
        logprobs=samples.logprobs[rows],
        values=samples.values[rows],
        advantages=samples.advantages[rows],
        returns=samples.returns[rows],
        reference=None,
    )


class Learner:
    """Optimizer steps on one minibatch, at learning rate 0: the same arithmetic, and all ways see the same weights."""

    def __init__(self, bench: Bench, args: PPOConfig) -> None:
        self.policy, self.args, self.samples = bench.policy, args, bench.samples()
        self.parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, eps=args.adam_epsilon, weight_decay=0.0, fused=True)
        self.gradient_norm = 0.0

    def step(self, forward: Callable[[PolicyInputs], Any], part: int) -> float:
        """Forward, backward and AdamW over the minibatch in parts of `part` samples; returns B."""
        batch = len(self.samples.actions)
        for rows in torch.arange(batch).split(part):
            samples = select(self.samples, rows)
            (ppo_loss(forward(samples.inputs), samples, self.args) * (len(rows) / batch)).backward()
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return batch


UPDATES = ("ours", "whole prompts", "batch 1")


def update_work(learner: Learner, name: str, norms: dict[str, float]) -> Work:
    """One of the three ways of an update; notes the gradient's norm."""
    batch = len(learner.samples.actions)
    forward = learner.policy if name == "ours" else learner.policy.whole_forward
    part = 1 if name == "batch 1" else batch

    def work() -> float:
        samples = learner.step(forward, part)
        norms[name] = learner.gradient_norm
        return samples

    return work


# ---- trainer overhead -----------------------------------------------------------------------------------------------


class BareLoop:
    """PPO's update as a plain PyTorch loop on its own copy of the policy: the measure of the trainer's overhead."""

    def __init__(self, policy: VLMPolicy, args: PPOConfig, num_samples: int) -> None:
        self.policy, self.args, self.num_samples = copy.deepcopy(policy), args, num_samples
        self.parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0, fused=True
        )
        steps = args.num_iterations * args.num_ppo_epochs * num_samples // args.minibatch_size
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / steps))

    def update(self, rollout: Rollout, iteration: int) -> None:
        """The minibatches that the trainer draws from this rollout, in its order."""
        samples = with_advantages(rollout, self.args.gamma, self.args.gae_lambda)
        for epoch in range(self.args.num_ppo_epochs):
            order = stream(self.args.seed, SHUFFLES, iteration, epoch).permutation(self.num_samples)
            for rows in torch.from_numpy(order).split(self.args.minibatch_size):
                minibatch = select(samples, rows)
                ppo_loss(self.policy(minibatch.inputs), minibatch, self.args).backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


class Clocks(NamedTuple):
    """Two clocks, in seconds."""

    wall: float
    cpu: float  # of all threads of this process: hardly touched by what else the machine does


def clocks() -> Clocks:
    """What they show now."""
    return Clocks(time.perf_counter(), time.process_time())


def since(start: Clocks) -> Clocks:
    """What has passed."""
    now = clocks()
    return Clocks(now.wall - start.wall, now.cpu - start.cpu)


class _InTurns(RolloutCollector):
    """A collector that clocks what the trainer does between two rollouts, and has the bare loop do the same next."""

    def __init__(self, env: EpisodeVectorEnv, policy: VLMPolicy, args: PPOConfig, bare: BareLoop) -> None:
        super().__init__(env, policy, args.num_steps, args.seed)
        self.bare = bare
        self.trainer_clocks: list[Clocks] = []
        self.bare_clocks: list[Clocks] = []
        self.weight_difference = 0.0
        self._last: Rollout | None = None
        self._left = clocks()

    def collect(self, iteration: int) -> Rollout:
        if self._last is not None:
            self.trainer_clocks.append(since(self._left))
            start = clocks()
            self.bare.update(self._last, iteration - 1)
            self.bare_clocks.append(since(start))
            self.weight_difference = max(
                float((mine - theirs).detach().abs().max())
                for mine, theirs in zip(self.policy.parameters(), self.bare.policy.parameters(), strict=True)
            )
        self._last = super().collect(iteration)
        self._left = clocks()
        return self._last


class Overhead(NamedTuple):
    """The trainer's update beside the bare loop's on the same minibatches."""

    percent: Spread
    cpu_percent: Spread  # the same in CPU time
    trainer_seconds: Spread
    bare_seconds: Spread
    weight_difference: float  # largest difference of a weight after the same updates: 0 says that both did the same


def trainer_overhead(bench: Bench, args: PPOConfig) -> Overhead:
    """Trains for `repeats` + 2 iterations; the first is a warm-up, and the last one's end is not seen.

    Args:
        bench: the policy, which learns.
        args: made by `trainer_args`.
    """
    policy = copy.deepcopy(bench.policy)
    env = EpisodeVectorEnv(bench.workload.env, bench.workload.num_envs, seed=args.seed)
    collector = _InTurns(env, policy, args, BareLoop(policy, args, env.num_envs * args.num_steps))
    PPOTrainer(policy, args, rollouts=collector).train()
    env.close()
    mine, bare = collector.trainer_clocks[1:], collector.bare_clocks[1:]
    return Overhead(
        percent=spread([100 * (a.wall / b.wall - 1) for a, b in zip(mine, bare, strict=True)]),
        cpu_percent=spread([100 * (a.cpu / b.cpu - 1) for a, b in zip(mine, bare, strict=True)]),
        trainer_seconds=spread([a.wall for a in mine]),
        bare_seconds=spread([b.wall for b in bare]),
        weight_difference=collector.weight_difference,
    )


def trainer_args(workload: Workload, folder: str) -> PPOConfig:
    """Settings of the trainer for the overhead's measurement."""
    return PPOConfig(
        output_dir=folder,
        num_iterations=workload.repeats + 2,
        num_steps=workload.overhead_steps,
        num_ppo_epochs=workload.overhead_epochs,
        minibatch_size=workload.minibatch_size,
        learning_rate=1e-4,
        seed=workload.seed,
        report_to="none",
        use_cpu=True,
    )


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


class FlopCounter(TorchFunctionMode):
    """Counts the FLOPs of linear layers, convolutions and attention while it is entered; 2 for a multiply-add.

    Linear, x (M, K) times w (K, N): 2 M K N forward, as much again backward for x if it needs a gradient, and for w if
    it does. Attention: 4 x pairs x head width forward (Q K^T and A V), twice that backward; only pairs of a query and a
    key that the mask allows are counted. Recomputation, norms, activations and softmax are not counted. Backward is
    counted when a gradient arrives, so what a loss does not depend on is not.

    Attributes:
        forward: FLOPs by kind: "linear", "attention", "convolution".
        backward: FLOPs of the backward pass, by kind.
        shapes: how often each (M, K, N) of a linear layer was run forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.linear:
            self._linear(result, *args[:2])
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self._attention(result, query, key, value, kwargs.get("attn_mask"), kwargs.get("is_causal", False))
        elif func is F.conv2d:
            self._count("convolution", result, 2 * result.numel() * args[1][0].numel(), *args[:2])
        return result

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def _linear(self, result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        (n, k), m = weight.shape, x.numel() // x.shape[-1]
        self.shapes[m, k, n] += 1
        self._count("linear", result, 2 * m * k * n, x, weight)

    def _count(self, kind: str, result: torch.Tensor, flops: int, *factors: torch.Tensor) -> None:
        """Forward now; backward once for each factor that needs a gradient, when the result's arrives."""
        self.forward[kind] += flops
        if result.requires_grad:
            backward = Counter({kind: flops * sum(factor.requires_grad for factor in factors)})
            result.register_hook(lambda gradient: self.backward.update(backward))

    def _attention(
        self,
        result: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
    ) -> None:
        batch, heads, queries, width = query.shape
        allowed = torch.ones(queries, key.shape[2], dtype=torch.bool)
        if mask is not None:
            allowed = mask if mask.dtype == torch.bool else mask == 0
        elif is_causal:
            allowed = allowed.tril()
        pairs = int(allowed.expand(batch, heads, queries, key.shape[2]).sum())
        # its backward is one kernel that gives all three gradients: twice the forward
        self._count("attention", result, 2 * pairs * (width + value.shape[-1]), result, result)


def count_flops(work: Work) -> tuple[FlopCounter, float]:
    """Runs the work once; returns what was counted and the work's units."""
    with FlopCounter() as counter:
        units = work()
    return counter, units


def best_gemm_size(sizes: Sequence[int], seconds: float) -> tuple[int, dict[int, float]]:
    """The side of the square float32 matrices that multiply fastest, and the FLOP/s of each side."""
    rates = {size: max(rate(gemm(size), seconds) for _ in range(2)) for size in sizes}
    return max(rates, key=lambda size: rates[size]), rates


def gemm(size: int) -> Work:
    """One product of two square matrices; returns its FLOPs."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def work() -> float:
        torch.mm(a, b)
        return 2 * size**3

    return work


def gemms(shapes: Counter[tuple[int, int, int]]) -> Work:
    """Products of the given shapes and nothing else; returns their FLOPs."""
    operands = {(m, k, n): (torch.randn(m, k), torch.randn(n, k)) for m, k, n in shapes}

    def work() -> float:
        for shape, count in shapes.items():
            x, weight = operands[shape]
            for _ in range(count):
                torch.mm(x, weight.t())
        return sum(2 * m * k * n * count for (m, k, n), count in shapes.items())

    return work


def in_flops(work: Work, flops_per_unit: float) -> Work:
    """The same work, in FLOPs."""
    return lambda: work() * flops_per_unit


# ---- where the time goes --------------------------------------------------------------------------------------------

MATMULS = "mm addmm bmm baddbmm convolution mkldnn_convolution convolution_backward mkldnn_convolution_backward"
COPIES = "copy_ cat clone _to_copy fill_ zero_ stack index index_put_ _index_put_impl_ gather index_select embedding "
COPIES += "embedding_dense_backward masked_scatter masked_scatter_"
VIEWS = "t transpose view reshape expand slice select unsqueeze squeeze permute detach as_strided _unsafe_view empty "
VIEWS += "empty_like empty_strided linear matmul conv2d flatten split narrow alias resize_ unbind result_type to"
MATMUL, COPY, BOOKKEEPING = ({f"aten::{name}" for name in names.split()} for names in (MATMULS, COPIES, VIEWS))
KINDS = ("matmul", "attention", "elementwise and norms", "copies", "optimizer", "python and bookkeeping")


def kind_of(operation: str) -> str:
    """Where an operation of the profiler belongs, one of `KINDS`."""
    if operation in MATMUL:
        return "matmul"
    if "scaled_dot_product" in operation or "flash_attention" in operation:
        return "attention"
    if "_adam" in operation or "_foreach" in operation or operation.startswith("Optimizer."):
        return "optimizer"
    if operation in COPY:
        return "copies"
    if operation.startswith("aten::") and operation not in BOOKKEEPING:
        return "elementwise and norms"
    return "python and bookkeeping"


def breakdown(work: Work) -> dict[str, float]:
    """Shares of one run's time by kind of operation; they add up to 1.

    What no operation accounts for is Python and torch's bookkeeping (views, autograd's graph); the profiler's own cost
    is in there too, so that share is an upper bound.
    """
    work()
    with profile() as profiler:
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["python and bookkeeping"] = max(0.0, took - sum(seconds[kind] for kind in KINDS[:-1]))
    return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}


# ---- preprocessing --------------------------------------------------------------------------------------------------


def preprocessing(bench: Bench) -> tuple[dict[str, Work], bool]:
    """N frames to pixels by the library's processor and by ours, and whether both give the same numbers."""
    pipeline, count = bench.policy.pipeline, bench.workload.num_envs
    env = EpisodeVectorEnv(bench.workload.env, count, seed=bench.workload.seed)
    frames = env.reset().images  # (N, H, W, 3)
    env.close()

    def library() -> torch.Tensor:
        return pipeline.image_processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]

    def ours() -> torch.Tensor:
        return pipeline.pixels(pipeline.geometry(frames))["pixel_values"]

    works: dict[str, Work] = {
        "library": lambda: len(library()),
        "ours": lambda: len(ours()),
    }
    return works, torch.equal(library(), ours())
