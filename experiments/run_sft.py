"""Supervised fine-tuning with TRL's SFTTrainer, in LLaVA's two stages.

    python experiments/run_sft.py --stage align --policy smollm2 --env manako/GoTo-v0
    python experiments/run_sft.py --stage instruct --policy runs/.../final --dataset data/goto

align       encoder and language model stay as they are; the adapter learns to put frames into words: frame -> caption,
            which the environment makes of its state
instruct    the adapter and LoRA (or everything, --trainable full) learn demonstrations of experiments/collect.py; the
            loss is on the answer alone: on its tokens, or (--loss actions, behaviour cloning) on its probability among
            the actions, as the policy acts

The run folder holds final/ for --policy of any other runner, the evaluation beside its controls, and what the language
model has forgotten: perplexity of text and questions answered, before and after.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, run_main, setting  # noqa: E402
from manako.experiments.common.run_folder import (  # noqa: E402
    evaluate_run,
    new_run_dir,
    write_description,
    write_final,
    write_text,
)
from manako.experiments.common.settings import TrainConfig  # noqa: E402

LEARNS = {"align": "adapter", "instruct": "lora"}  # unless --trainable says otherwise
FITTED_FRAMES = 256  # whose features an adapter with statistics is given


@dataclass
class SFTRunConfig(TrainConfig):
    """Settings of run_sft.py."""

    stage: str = setting(
        "instruct", "align (frame -> caption) or instruct (demonstrations)", choices=("align", "instruct")
    )
    trainable: str = setting(
        "auto",
        "what learns: auto (the adapter to align, LoRA too to instruct), full, adapter, lora, or parts joined by +",
    )
    dataset: str | None = setting(None, "folder of trajectories, for instruct")
    loss: str = setting(
        "tokens",
        "of instruct: tokens (the answer's, out of the vocabulary) or actions (out of the actions; quicker)",
        choices=("tokens", "actions"),
    )
    only_success: bool = setting(False, "leave out episodes without success")
    captions: int = setting(1000, "frames to put into words, for align", ge=1)
    epochs: int = setting(1, "passes over the data", ge=1)
    batch_size: int = setting(32, "examples of an optimizer step", ge=1)
    learning_rate: float = setting(2e-4, "initial learning rate of AdamW", gt=0)
    adapter_learning_rate: float | None = setting(None, "initial learning rate of the adapter, if another", gt=0)
    lr_scheduler_type: str = setting("linear", "decay of the learning rate", choices=("linear", "cosine", "constant"))
    warmup_steps: int = setting(0, "optimizer steps in which the learning rate rises from 0", ge=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)
    eval_episodes: int = setting(200, "held-out episodes of each evaluation row, 0 for none", ge=0)


def main() -> int:
    """One stage; returns the exit code."""
    started = time.perf_counter()
    config = parse(SFTRunConfig, description="Supervised fine-tuning with TRL: captions, then demonstrations.")
    if config.trainable == "auto":
        config.trainable = LEARNS[config.stage]
    if config.stage == "instruct" and config.dataset is None:
        raise UsageError("--dataset is missing: give the folder of trajectories that experiments/collect.py wrote.")
    if config.stage == "align" and config.dataset is not None:
        raise UsageError("--dataset is for --stage instruct: align makes its captions from the environment.")
    if config.stage == "align" and config.loss == "actions":
        raise UsageError("--loss actions is for --stage instruct: captions are no actions, leave it out.")
    run_dir = new_run_dir(config)
    import numpy as np
    import torch

    from manako.agent.data.trajectories import load_trajectories
    from manako.agent.tuning.forgetting import remember
    from manako.agent.tuning.supervised import captions, demonstrated_actions, demonstrations, sample_frames
    from manako.experiments.common.building import make_policy, quiet_libraries
    from manako.experiments.common.environments import make_env
    from manako.experiments.common.progress import plain_console, print_parts, print_table

    quiet_libraries()
    torch.manual_seed(config.seed)
    console = plain_console()
    with contextlib.closing(make_env(config, 1, held_out=True)) as env:
        policy = make_policy(config, env.action_names, env.frame_shape)
    policy.value_head.requires_grad_(False)  # nothing here asks for values
    if config.stage == "align":
        frames, texts = frames_and_captions(config)
        data = captions(frames, texts)
    else:
        trajectories, _ = load_trajectories(
            str(config.dataset), config.env, policy.spec.action_names, policy.spec.frame_shape
        )
        frames = sample_frames(trajectories, FITTED_FRAMES)
        if config.loss == "actions":
            data = demonstrated_actions(trajectories, config.only_success)
        else:
            data = demonstrations(trajectories, policy, config.only_success)
    console.print(f"run          {run_dir}\ndata         {len(data):,} examples, {config.stage}")
    if policy.fit_adapter(np.stack(frames[:FITTED_FRAMES])):
        console.print(f"adapter      standardises features by {min(len(frames), FITTED_FRAMES)} frames")
    print_parts(console, policy)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_description(run_dir, config)
    before = remember(policy)
    rows = train(config, policy, data, run_dir)
    seconds = time.perf_counter() - started
    write_final(policy, run_dir)
    after = remember(policy)
    report: dict[str, Any] = {
        "stage": config.stage,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad),
        "examples": len(data) * config.epochs,
        "loss": rows[-1]["loss"] if rows else None,
        "memory": {"before": before.summary(), "after": after.summary()},
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2))
    console.print(
        f"text perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}, questions {before.probes:.0%} -> "
        f"{after.probes:.0%}"
    )
    if config.eval_episodes and config.stage == "instruct":
        summary = evaluate_run(config, policy, run_dir, num_envs=32)
        write_text(run_dir / "evaluation.json", json.dumps(summary, indent=2))
        print_table(console, summary, f"{config.env}, held-out seeds")
    console.print(f"{seconds:.0f} s of training, {time.perf_counter() - started:.0f} s in all; written to {run_dir}")
    return 0


def frames_and_captions(config: SFTRunConfig) -> tuple[list[Any], list[str]]:
    """Frames of random play on training seeds, and what the environment says is on them."""
    import numpy as np

    from manako.experiments.common.environments import make_env

    frames: list[Any] = []
    texts: list[str] = []
    generator = np.random.default_rng(config.seed)
    with contextlib.closing(make_env(config, min(32, config.captions))) as env:
        seen = env.reset()
        while len(frames) < config.captions:
            frames += list(seen.images)
            texts += list(env.captions())
            result = env.step(generator.integers(len(env.action_names), size=env.num_envs))
            seen = env.reset_done(result.terminated | result.truncated)
    return frames[: config.captions], texts[: config.captions]


def train(config: SFTRunConfig, policy: Any, data: Any, run_dir: Path) -> list[dict[str, Any]]:
    """The training; the rows of metrics.jsonl."""
    from trl import SFTConfig

    from manako.agent.tuning.trainers import PolicyCloningTrainer, PolicySFTTrainer
    from manako.experiments.common.building import make_tuning_args

    args = make_tuning_args(SFTConfig, config, run_dir, warmup_steps=config.warmup_steps)
    kind = PolicyCloningTrainer if config.loss == "actions" else PolicySFTTrainer
    trainer = kind(policy, args, data, run_dir, config.adapter_learning_rate)
    trainer.train()
    return trainer.rows


if __name__ == "__main__":
    run_main(main)
