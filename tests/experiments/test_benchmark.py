"""The benchmark: FLOPs against counts by hand, the ways it compares against each other, and the whole command."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from manako.envs import held_out_seeds
from manako.experiments.benchmarks.acting import Bench, GeneratePerEnv, WholeBatch, preprocessing
from manako.experiments.benchmarks.flops import FlopCounter, breakdown, count_flops, gemms, kind_of
from manako.experiments.benchmarks.settings import SpeedSettings
from manako.experiments.benchmarks.steps_to_success import Curve, train_ours
from manako.experiments.benchmarks.timing import in_turns, rate, ratio, spread
from manako.experiments.benchmarks.updating import UPDATES, Learner, trainer_args, trainer_overhead, update_work
from manako.experiments.benchmarks.workload import make_workload
from manako.experiments.common.command_line import UsageError, parse
from manako.experiments.common.settings import PPOCommand

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    return Bench(make_workload(SpeedSettings(quick=True, threads=1)))


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_learns, weight_learns, backward", [(False, False, 0), (True, False, 144), (False, True, 144), (True, True, 288)]
)
def test_a_linear_layer_by_hand(x_learns, weight_learns, backward):
    x, weight = torch.zeros(2, 3, 4, requires_grad=x_learns), torch.zeros(3, 4, requires_grad=weight_learns)
    with FlopCounter() as counter:
        result = F.linear(x, weight)  # 6 rows of 4 times 4 x 3: 2 x 6 x 4 x 3
    assert counter.backward.total() == 0
    if result.requires_grad:
        result.sum().backward()
    assert counter.forward == {"linear": 144}
    assert counter.backward["linear"] == backward
    assert counter.shapes == {(6, 4, 3): 1}
    with FlopCounter() as counter, torch.no_grad():
        F.linear(x, weight)
    assert counter.total == 144


def test_attention_counts_the_pairs_that_the_mask_allows():
    query, key = torch.zeros(2, 3, 4, 8, requires_grad=True), torch.zeros(2, 3, 4, 8)

    def flops(**options):
        with FlopCounter() as counter:
            F.scaled_dot_product_attention(query, key, key, **options).sum().backward()
        assert counter.backward["attention"] == 2 * counter.forward["attention"]
        return counter.forward["attention"]

    assert flops() == 2 * 3 * 4 * 4 * (2 * 8 + 2 * 8)
    assert flops(is_causal=True) == 2 * 3 * 10 * 32  # 4 + 3 + 2 + 1 pairs
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1, 0, :, 2:] = False  # the second sample has 8 pairs of 16
    assert flops(attn_mask=mask) == 3 * (16 + 8) * 32
    assert flops(attn_mask=torch.zeros(2, 1, 4, 4).masked_fill(~mask, -torch.inf)) == 3 * (16 + 8) * 32


def test_a_convolution_by_hand():
    with FlopCounter() as counter, torch.no_grad():
        F.conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4), stride=4)  # 2 x 5 x 2 x 2 outputs of 3 x 4 x 4
    assert counter.forward == {"convolution": 2 * 40 * 48}


def test_the_tiny_policys_forward_by_hand(bench):
    """Prefix once, the rest for each sample: from the configuration, layer by layer."""
    policy, inputs = bench.policy, bench.inputs(4)
    vision, text = policy.config.vision_config, policy.config.text_config
    patches, width = (vision.image_size // vision.patch_size) ** 2, text.hidden_size  # width 64 of both
    prefix, batch = len(policy.reading.prefix_ids), 4
    assert inputs["lengths"].unique().tolist() == [inputs["input_ids"].shape[1]]
    rest = inputs["input_ids"].shape[1] - prefix

    def layer(tokens, intermediate, matrices):  # q, k, v, o, and two or three matrices of the MLP
        return 2 * tokens * (4 * width * width + matrices * width * intermediate)

    encoder = vision.num_hidden_layers * layer(batch * (patches + 1), vision.intermediate_size, 2)
    pooler = 2 * batch * width * width
    adapter = 2 * batch * patches * 2 * width * width
    decoder = text.num_hidden_layers * layer(prefix + batch * rest, text.intermediate_size, 3)
    heads = 2 * batch * width * (len(policy.codec) + 1)  # action rows and value
    image_pairs = vision.num_hidden_layers * batch * (patches + 1) ** 2
    prefix_pairs = prefix * (prefix + 1) // 2
    text_pairs = text.num_hidden_layers * (prefix_pairs + batch * (rest * prefix + rest * (rest + 1) // 2))
    counter, _ = count_flops(lambda: len(policy.distribution(inputs)[1]))
    assert counter.forward["linear"] == encoder + pooler + adapter + decoder + heads
    assert counter.forward["attention"] == 4 * width * (image_pairs + text_pairs)
    assert counter.forward["convolution"] == 2 * batch * patches * width * 3 * vision.patch_size**2
    assert sum(2 * m * k * n * times for (m, k, n), times in counter.shapes.items()) == counter.forward["linear"]


def test_linear_layers_as_torch_counts_them(bench):
    """PyTorch's counter sees what its dispatcher runs, backward included: the rotary tables are the one thing more."""
    policy, inputs = bench.policy, bench.inputs(4)

    def work():
        logprobs, values = policy.distribution(inputs)
        (logprobs.sum() + values.sum()).backward()
        policy.zero_grad()
        return 1

    with FlopCounterMode(display=False) as theirs:
        counter, _ = count_flops(work)
    counts = theirs.get_flop_counts()["Global"]
    matrices = sum(counts[op] for op in counts if op.__name__ in ("mm", "addmm", "bmm", "baddbmm"))
    ours = counter.forward["linear"] + counter.backward["linear"]
    assert 0 <= matrices - ours < 0.001 * ours


# ---- timing in turns ------------------------------------------------------------------------------------------------


def test_works_take_turns():
    order = []
    works = {name: lambda name=name: order.append(name) or 1 for name in "ab"}
    rates = in_turns(works, repeats=3, seconds=1e-9)
    assert "".join(order) == "ab" * 3
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_a_round():
    assert ratio({"ours": [10.0, 40.0, 90.0], "theirs": [5.0, 10.0, 30.0]}, "ours", "theirs") == (3.0, 2.0, 4.0)
    assert spread([3.0, 1.0, 8.0]) == (3.0, 1.0, 8.0)


def test_a_short_first_run_is_a_warm_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("manako.experiments.benchmarks.timing.time.perf_counter", lambda: now[0])
    durations = iter([5.0, 4.0, 4.0, 4.0])  # slow at first

    def work():
        now[0] += next(durations)
        return 8.0

    assert rate(work, seconds=10.0) == 2.0
    durations = iter([20.0])
    assert rate(work, seconds=10.0) == 0.4


# ---- the ways that are compared -------------------------------------------------------------------------------------


def test_all_ways_of_a_rollout_step_give_the_same_numbers(bench):
    whole, generate = WholeBatch(bench), GeneratePerEnv(bench)
    policy = bench.policy
    torch.nn.init.normal_(policy.value_head.out.weight)
    logprobs, values = whole.forward(whole.seen)
    ours, our_values = policy.distribution(policy.prepare(whole.seen.images, whole.seen.instructions))
    assert torch.allclose(logprobs, ours, atol=1e-4) and torch.allclose(values, our_values, atol=1e-4)
    seen = generate.seen
    expected = policy.distribution(policy.prepare(seen.images, seen.instructions))[1].item()
    assert generate.length == 1 and generate() == 1 and whole() == 4
    assert generate.value == pytest.approx(expected, abs=1e-4) and -30 < generate.logprob < 0
    assert not np.array_equal(seen.images, generate.seen.images) or seen.instructions != generate.seen.instructions


def test_generate_reads_its_answer_back(bench, monkeypatch):
    """A legal JSON answer becomes that action."""
    wanted = bench.env.action_names[2]
    speaking = dataclasses.replace(bench.workload, answer='{"action": "{action}"}')
    monkeypatch.setattr(bench, "workload", speaking)
    generate = GeneratePerEnv(bench)
    assert generate.length == max(
        len(bench.policy.processor.tokenizer.encode(f'{{"action": "{name}"}}')) for name in bench.env.action_names
    )
    answer = torch.tensor([bench.policy.processor.tokenizer.encode(f'{{"action": "{wanted}"}}')])
    monkeypatch.setattr(
        bench.policy.base_vlm, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, answer], dim=1)
    )
    played = []
    step = generate.env.step
    monkeypatch.setattr(generate.env, "step", lambda actions: played.extend(actions) or step(actions))
    generate()
    assert played == [2]


def test_all_ways_of_an_update_give_the_same_gradient(bench, tmp_path):
    learner = Learner(bench, trainer_args(bench.workload, str(tmp_path)))
    before = [parameter.clone() for parameter in learner.parameters]
    norms: dict[str, float] = {}
    for name in UPDATES:
        assert update_work(learner, name, norms)() == bench.workload.minibatch_size
    assert norms["ours"] > 0.1
    assert norms["whole prompts"] == pytest.approx(norms["ours"], rel=1e-3)
    assert norms["batch 1"] == pytest.approx(norms["ours"], rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))  # learning rate 0


def test_the_bare_loop_does_what_the_trainer_does(bench, tmp_path):
    result = trainer_overhead(bench, trainer_args(bench.workload, str(tmp_path)))
    assert result.weight_difference < 1e-6
    assert result.percent.low <= result.percent.median <= result.percent.high
    assert result.bare_seconds.low > 0 and result.trainer_seconds.low > 0


def test_both_ways_of_preprocessing_give_the_same_pixels(bench):
    works, equal = preprocessing(bench)
    assert equal and works["library"]() == works["ours"]() == bench.workload.num_envs


def test_gemms_of_given_shapes_count_their_flops():
    assert gemms({(6, 4, 3): 2, (1, 2, 1): 1})() == 2 * 144 + 4


# ---- where the time goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation, kind",
    [
        ("aten::addmm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::silu", "elementwise and norms"),
        ("aten::native_layer_norm", "elementwise and norms"),
        ("aten::cat", "copies"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::transpose", "python and bookkeeping"),
        ("autograd::engine::evaluate_function: MmBackward0", "python and bookkeeping"),
    ],
)
def test_kinds_of_operations(operation, kind):
    assert kind_of(operation) == kind


def test_a_breakdown_finds_the_products():
    a = torch.randn(600, 600)

    def work():
        for _ in range(5):
            torch.mm(a, a)
        return 1

    shares = breakdown(work)
    assert sum(shares.values()) == pytest.approx(1) and shares["matmul"] > 0.5


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"num_envs is 3: expected one for which num_envs x 16 is a multiple of 128"):
        make_workload(SpeedSettings(num_envs=3))


@pytest.mark.parametrize("script", ["speed", "ray_workers", "compare_sb3", "feature_cache", "writing"])
def test_help_needs_no_torch(script):
    heavy = ("torch", "stable_baselines3")
    code = f"import sys, manako.experiments.benchmarks.{script}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_quick_benchmark(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, "experiments/benchmarks/speed.py", "--quick", "--threads", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for title in ("rollout, env steps/s", "update, samples/s", "trainer overhead", "peak memory", "GEMM rate"):
        assert title in done.stdout
    results = json.loads(output.read_text())
    assert set(results) == set(
        "settings machine memory_mib rollout update trainer preprocessing share breakdown seconds".split()  # noqa: SIM905
    )
    assert set(results["rollout"]["ours_is_times"]) == {"whole batch", "generate per env"}
    assert set(results["update"]["ours_is_times"]) == {"whole prompts", "batch 1"}
    assert results["rollout"]["logprob_difference"] < 1e-4 and results["preprocessing"]["equal_pixels"]
    assert results["trainer"]["weight_difference"] < 1e-6
    memory = results["memory_mib"]
    assert set(memory) == {"loaded", "rollout", "ours", "whole prompts", "batch 1", "this run"}
    assert all(memory["loaded"] <= memory[name] for name in memory)
    assert all(0 < share["median"] < 2 for share in results["share"]["share"].values())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists and is not overwritten" in again.stderr


def test_a_curve_notes_the_first_evaluation_that_is_enough():
    curve = Curve(target=0.95)
    assert [curve(1000, 1.0, 0.5), curve(2000, 2.0, 0.95), curve(3000, 3.0, 1.0)] == [False, True, True]
    result = curve.result(seed=7)
    assert result["reached"] == {"steps": 2000, "seconds": 2.0, "success": 0.95} and result["seed"] == 7
    assert len(result["evaluations"]) == 3


def small_run(total_steps: int) -> PPOCommand:
    words = "--num_envs 4 --num_steps 4 --minibatch_size 16 --num_ppo_epochs 1 --eval_episodes 5"
    return parse(PPOCommand, "", [*words.split(), "--total_steps", str(total_steps)])


def test_evaluations_leave_our_training_as_it_is():
    command = small_run(total_steps=48)
    often, once = Curve(target=2.0), Curve(target=2.0)
    seeds = held_out_seeds(5)
    watched = train_ours(command, seeds, 1, often)
    unwatched = train_ours(command, seeds, 1000, once)
    assert [row["steps"] for row in often.evaluations] == [16, 32, 48]
    assert [row["steps"] for row in once.evaluations] == [48]
    assert often.evaluations[-1]["success"] == once.evaluations[-1]["success"]
    pairs = zip(watched.parameters(), unwatched.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_our_training_ends_when_it_is_enough():
    command = small_run(total_steps=480)
    curve = Curve(target=0.0)
    train_ours(command, held_out_seeds(5), 2, curve)
    assert [row["steps"] for row in curve.evaluations] == [32]


def test_a_missing_stable_baselines_is_one_sentence():
    code = (
        "import sys; sys.modules['stable_baselines3'] = None; sys.argv = ['compare_sb3.py']\n"
        "from manako.experiments.benchmarks.compare_sb3 import main, run_main; run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: The comparison needs stable-baselines3")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_baselines_env_names_the_colour_and_plays_our_episodes():
    pytest.importorskip("stable_baselines3")
    from manako.envs import TRAINING, EpisodeVectorEnv, episode_seed
    from manako.envs.tiles import COLORS
    from manako.experiments.benchmarks.sb3_ppo import NamedColor

    env, ours = NamedColor("manako/GoTo-v0", seed=3, slot=2), EpisodeVectorEnv("manako/GoTo-v0", 4, seed=3)
    seen, _ = env.reset()
    assert env.observation_space.contains(seen)
    observations = ours.reset()
    assert np.array_equal(seen["image"], observations.images[2])
    assert ours.episode_seeds[2] == episode_seed(3, TRAINING, 2, 0)
    named = [color for color, flag in zip(COLORS, seen["color"], strict=True) if flag]
    assert len(named) == 1 and named[0] in observations.instructions[2]
    second = env.reset()[0]["image"]
    assert np.array_equal(second, ours.reset_done(np.ones(4, bool)).images[2])


def test_the_baselines_success_rate_is_that_of_its_episodes():
    pytest.importorskip("stable_baselines3")
    from manako.experiments.benchmarks.sb3_ppo import NamedColor, success_rate

    class AlwaysUp:
        def predict(self, observations, deterministic):
            return np.zeros(len(observations["color"]), int), None

    seeds = list(range(1, 41))
    expected = 0
    env = NamedColor("manako/GoTo-v0", seed=0, slot=0)
    for seed in seeds:
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, info = env.step(0)
            ended = terminated or truncated
        expected += info["success"]
    envs = [NamedColor("manako/GoTo-v0", seed=0, slot=0) for _ in seeds]
    assert 0 < expected < 40 and success_rate(AlwaysUp(), envs, seeds) == expected / 40


@pytest.mark.slow
def test_the_comparison_runs_both(tmp_path):
    pytest.importorskip("stable_baselines3")
    output = tmp_path / "comparison.json"
    flags = "--seeds 1 --total_steps 3072 --total_steps_sb3 3072 --episodes 16 --eval_every 2 --torch_threads 1"
    command = [sys.executable, "experiments/benchmarks/compare_sb3.py", *flags.split(), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "VLM policy, tiny" in done.stdout and "Stable-Baselines3 CNN" in done.stdout
    runs = json.loads(output.read_text())["runs"]
    for (result,) in runs.values():
        assert [row["steps"] for row in result["evaluations"]] == [2048, 3072]
        assert all(0 <= row["success"] <= 1 and math.isfinite(row["seconds"]) for row in result["evaluations"])
