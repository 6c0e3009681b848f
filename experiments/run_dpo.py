"""Preference optimisation with TRL's DPO or KTO trainer, on pairs made of trajectories; round after round if wanted.

    python experiments/run_dpo.py --policy runs/.../final --dataset data/goto --pairs expert
    python experiments/run_dpo.py --policy runs/.../final --rounds 3 --pairs return --method kto

A round: trajectories (the dataset in the first one if given, else the policy's own, sampled), pairs, training against
the policy as it was, evaluation. See agent/preferences.py for the ways to make pairs.
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

from manako.experiments.common.command_line import parse, run_main, setting  # noqa: E402
from manako.experiments.common.run_folder import (  # noqa: E402
    evaluate_run,
    new_run_dir,
    write_description,
    write_final,
    write_text,
)
from manako.experiments.common.settings import TrainConfig  # noqa: E402


@dataclass
class DPORunConfig(TrainConfig):
    """Settings of run_dpo.py."""

    trainable: str = setting("lora", "what learns: full, adapter, lora, or parts joined by +")
    method: str = setting("dpo", "dpo, or kto on the same answers one by one", choices=("dpo", "kto"))
    pairs: str = setting(
        "expert", "how pairs are made: expert, state, return or branch", choices=("expert", "state", "return", "branch")
    )
    dataset: str | None = setting(None, "folder of trajectories for the first round")
    rounds: int = setting(1, "rounds of collecting, pairing, training and evaluating", ge=1)
    episodes: int = setting(256, "episodes of the policy's own in a round", ge=1)
    group_size: int = setting(4, "of them from the same seed, for pairs by return", ge=1)
    branch_steps: int = setting(1, "steps of an episode at which other actions are tried, for branch", ge=1)
    num_envs: int = setting(32, "environments side by side", ge=1)
    num_steps: int = setting(32, "env steps of a rollout", ge=1)
    epochs: int = setting(1, "passes over the pairs", ge=1)
    batch_size: int = setting(32, "pairs of an optimizer step", ge=2)
    beta: float = setting(0.1, "of DPO and KTO: how much leaving the reference costs", gt=0)
    learning_rate: float = setting(5e-5, "initial learning rate of AdamW", gt=0)
    adapter_learning_rate: float | None = setting(None, "initial learning rate of the adapter, if another", gt=0)
    lr_scheduler_type: str = setting("linear", "decay of the learning rate", choices=("linear", "cosine", "constant"))
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)
    eval_episodes: int = setting(200, "held-out episodes of each evaluation row", ge=1)


def main() -> int:
    """All rounds; returns the exit code."""
    started = time.perf_counter()
    config = parse(DPORunConfig, description="Preference optimisation with TRL on pairs made of trajectories.")
    run_dir = new_run_dir(config)
    import torch

    from manako.agent.data.trajectories import load_trajectories
    from manako.agent.tuning.forgetting import remember
    from manako.agent.tuning.preferences import pair_dataset, unpaired
    from manako.experiments.common.building import make_policy, quiet_libraries
    from manako.experiments.common.environments import make_env
    from manako.experiments.common.progress import plain_console, print_parts, print_table

    quiet_libraries()
    torch.manual_seed(config.seed)
    console = plain_console()
    with contextlib.closing(make_env(config, 1, held_out=True)) as env:
        policy = make_policy(config, env.action_names, env.frame_shape)
    policy.value_head.requires_grad_(False)  # nothing here asks for values
    before = remember(policy)
    reports = []
    for number in range(config.rounds):
        if number == 0 and config.dataset is not None:
            trajectories, _ = load_trajectories(
                config.dataset, config.env, policy.spec.action_names, policy.spec.frame_shape
            )
        else:
            trajectories = own_trajectories(config, policy, number)
        pairs = pair_dataset(trajectories, make_pairs(config, policy, trajectories, number), policy)
        console.print(f"round {number + 1}: {len(trajectories):,} steps, {len(pairs):,} pairs by {config.pairs}")
        if number == 0:  # what can be refused has been
            run_dir.mkdir(parents=True, exist_ok=True)
            write_description(run_dir, config)
            print_parts(console, policy)
        start = time.perf_counter()
        rows = train(config, policy, pairs if config.method == "dpo" else unpaired(pairs), run_dir)
        seconds = time.perf_counter() - start
        reports.append({"round": number + 1, "pairs": len(pairs), "seconds": seconds, "loss": rows[-1]["loss"]})
        reports[-1]["evaluation"] = evaluate_run(config, policy, run_dir, config.num_envs)
        print_table(console, reports[-1]["evaluation"], f"{config.env}, held-out seeds")
    write_final(policy, run_dir)
    write_text(run_dir / "evaluation.json", json.dumps(reports[-1]["evaluation"], indent=2))
    after = remember(policy)
    report = {
        "stage": config.method,
        "rounds": reports,
        "seconds": sum(row["seconds"] for row in reports),
        "trained_parameters": sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad),
        "memory": {"before": before.summary(), "after": after.summary()},
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2))
    console.print(
        f"text perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}, questions {before.probes:.0%} -> "
        f"{after.probes:.0%}\n{time.perf_counter() - started:.0f} s in all; written to {run_dir}"
    )
    return 0


def own_trajectories(config: DPORunConfig, policy: Any, number: int) -> Any:
    """The policy's own episodes, sampled, other ones in every round."""
    from manako.agent.data.trajectories import to_dataset
    from manako.agent.rollout import RolloutCollector
    from manako.experiments.common.building import play
    from manako.experiments.common.environments import knows_expert, make_env

    with contextlib.closing(make_env(config, config.num_envs, group_size=config.group_size)) as env:
        has_expert = knows_expert(env)
        collector = RolloutCollector(
            env, policy, config.num_steps, config.seed, rounds=True, record=True, ask_expert=has_expert
        )
        rollouts = play(collector, config.episodes, config.env, first=1000 * number)
    return to_dataset(rollouts, policy, config.env, f"policy {config.policy}, round {number + 1}", {})


def make_pairs(config: DPORunConfig, policy: Any, trajectories: Any, number: int) -> list[Any]:
    """Pairs by the way that the settings name."""
    from manako.agent.tuning.preferences import branch_pairs, expert_pairs, return_pairs, state_pairs
    from manako.experiments.common.environments import make_env

    of_trajectories = {"expert": expert_pairs, "state": state_pairs, "return": return_pairs}
    if config.pairs in of_trajectories:
        return of_trajectories[config.pairs](trajectories)

    def act(observations: Any) -> Any:
        with policy.frozen_weights():
            inputs = policy.prepare(observations.images, observations.instructions)
            return policy(inputs.to(policy.device)).logprobs.argmax(-1).cpu().numpy()

    with contextlib.closing(make_env(config, len(policy.spec.action_names))) as env:
        return branch_pairs(trajectories, env, act, config.branch_steps, config.seed + number)


def train(config: DPORunConfig, policy: Any, data: Any, run_dir: Path) -> list[dict[str, Any]]:
    """One round's training; its rows of metrics.jsonl."""
    from trl import DPOConfig, KTOConfig

    from manako.agent.tuning.trainers import PolicyDPOTrainer, PolicyKTOTrainer
    from manako.experiments.common.building import make_tuning_args

    kinds: dict[str, Any] = {"dpo": (DPOConfig, PolicyDPOTrainer), "kto": (KTOConfig, PolicyKTOTrainer)}
    kind, make_trainer = kinds[config.method]
    args = make_tuning_args(kind, config, run_dir, beta=config.beta)
    trainer = make_trainer(policy, args, data, run_dir, adapter_learning_rate=config.adapter_learning_rate)
    trainer.train()
    return trainer.rows


if __name__ == "__main__":
    run_main(main)
