"""The settings of every runner: sections that lie beside their consumers, and those of the runs themselves.

A runner's settings are a `...Command`; its fields are the groups of --help and the sections of a --config file. Light
to import, as all settings are.
"""

import dataclasses
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from manako.agent.ppo_settings import PPOSettings, Schedule
from manako.agent.workers.settings import WorkerSettings
from manako.envs.settings import EnvSettings
from manako.experiments.common.command_line import UsageError, section
from manako.policies import PolicySource
from manako.policies.architectures.presets import PRESETS
from manako.policies.default_trainable import AUTO
from manako.policies.remote.settings import RemoteSettings
from manako.settings import setting

GOTO = Path(__file__).resolve().parents[1] / "configs" / "goto.yaml"  # what run_ppo.py trains where nothing is named
# settings of a policy's source that a runner has no use for
SEED = ("seed",)  # the run's
PREDICTION = ("next_frame_coef",)
OF_LEARNING = ("trainable", "lora_rank", "lora_alpha", *PREDICTION)
OF_ACTING_REMOTELY = ("remote_temperature",)
OF_PRESETS = ("vision_encoder", "adapter", "language_model", "image_size", "patch_size")  # a folder has them


# ---- the runs --------------------------------------------------------------------------------------------------------


EVAL_STEPS = 200_000
EVAL_STEPS_HELP = "env steps of an evaluation's rows together: fewer whole episodes are played where they are long"
EVAL_EVERY_HELP = (
    "{samples} between two evaluations while it trains, on validation episodes, whose seeds are neither training's nor "
    "the final evaluation's; best/ keeps the policy with the highest success there (the highest mean return where not "
    "all episodes are judged; of equal ones the higher mean return, then the earlier), and the final evaluation has "
    "its row; 0 for none"
)
VALIDATION_EPISODES_HELP = "validation episodes of each of them"


@dataclass(frozen=True)
class RunSettings:
    """What a run that trains leaves behind, and what it is computed by."""

    output_dir: str | None = setting(
        None, "run folder, must not exist; by default runs/ENV-POLICY-seedN-TIME", is_path=True
    )
    seed: int = setting(0, "of everything random", ge=0, lt=2**31)
    eval_episodes: int = setting(500, "held-out episodes of each evaluation row", ge=1)
    eval_steps: int = setting(EVAL_STEPS, EVAL_STEPS_HELP, ge=1)
    gif_episodes: int = setting(4, "episodes in before.gif and after.gif, 0 for none", ge=0)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for a small model, else torch's choice", ge=1, le=1024
    )
    save_minutes: float = setting(2.0, "minutes between checkpoints, where there is none before", gt=0)
    keep_checkpoints: int = setting(2, "checkpoints kept, the newest", only_in_file=True, ge=1)
    resume: str | None = setting(None, "run folder to go on with, by its own settings", is_path=True)


@dataclass(frozen=True)
class PPORunSettings(RunSettings):
    """A run of run_ppo.py."""

    total_steps: int = setting(100_000, "env steps to collect, rounded up to whole rollouts", ge=1)
    save_every: int = setting(20, "iterations between checkpoints", ge=1)
    eval_every: int = setting(0, EVAL_EVERY_HELP.format(samples="env steps"), ge=0)
    validation_episodes: int = setting(100, VALIDATION_EPISODES_HELP, ge=1)


@dataclass(frozen=True)
class SFTRunSettings(RunSettings):
    """A run of run_sft.py."""

    eval_episodes: int = setting(200, "held-out episodes of each evaluation row, 0 for none", ge=0)
    eval_every: int = setting(0, EVAL_EVERY_HELP.format(samples="with --stage instruct: examples"), ge=0)
    validation_episodes: int = setting(100, VALIDATION_EPISODES_HELP, ge=1)


@dataclass(frozen=True)
class CollectSettings:
    """What collect.py records."""

    player: Literal["expert", "policy", "random", "recorded", "remote"] = setting(
        "expert",
        "who plays: the env's scripted expert, a policy that samples its actions, chance, a recording, or a model "
        "behind a chat API, sampled",
    )
    recording: str | None = setting(
        None, "file or dataset folder that --player recorded plays again, all of it", is_path=True
    )
    error_rate: float = setting(0.0, "how often the expert does something else", ge=0, le=1)
    episodes: int | None = setting(None, "episodes to record, each to its end; 500 by default", ge=1)
    output: str | None = setting(None, "folder of the dataset, must not exist", is_path=True)
    num_steps: int = setting(16, "env steps of each environment in a rollout", ge=1)
    group_size: int = setting(1, "episodes of the same seed", ge=1)
    seed: int = setting(0, "of everything random", ge=0, lt=2**31)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for a small model, else torch's choice", ge=1, le=1024
    )
    bf16: bool = setting(False, "bfloat16 autocast while the policy acts in Ray workers")


@dataclass(frozen=True)
class EvaluateSettings:
    """What evaluate.py measures and writes."""

    episodes: int = setting(500, "held-out episodes of each row", ge=1)
    eval_steps: int = setting(EVAL_STEPS, EVAL_STEPS_HELP, ge=1)
    seed: int = setting(0, "of the held-out episodes; by default the run's", ge=0, lt=2**31)
    sample: bool = setting(False, "sample actions instead of taking the greedy ones")
    top_p: float = setting(
        1.0, "with --sample: draw answers in text from the likeliest tokens of this share", gt=0, le=1
    )
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)
    gif: str | None = setting(None, "GIF file for the first episodes, must not exist", is_path=True)
    gif_episodes: int = setting(4, "how many of them", ge=1)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for a small model, else torch's choice", ge=1, le=1024
    )


@dataclass(frozen=True)
class ImagineSettings:
    """What imagine.py plays, says and writes."""

    episodes: int = setting(200, "held-out episodes whose frames are said", ge=1)
    player: Literal["random", "expert", "policy"] = setting(
        "random", "who acts: chance, the env's scripted expert, or the policy's greedy actions"
    )
    seed: int = setting(0, "of the held-out episodes and of chance; by default the run's", ge=0, lt=2**31)
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)
    gif: str | None = setting(
        None, "GIF file for the first episodes, imagined beside real, must not exist", is_path=True
    )
    gif_episodes: int = setting(4, "how many of them", ge=1)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for a small model, else torch's choice", ge=1, le=1024
    )


@dataclass(frozen=True)
class ModelCheckSettings:
    """Which models check_model.py asks, and what it writes."""

    models: tuple[str, ...] = setting(
        (), f"model folders, checkpoints, Hub ids, presets ({', '.join(PRESETS)})", is_path=True
    )
    table: str | None = setting(
        None, "Markdown file for a table with a row a model; between its markers, if it exists", is_path=True
    )
    num_steps: int = setting(PPOSettings.num_steps, "env steps of the rollout whose room is counted", ge=1)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for a small model, else torch's choice", ge=1, le=1024
    )


# ---- fine-tuning by TRL's trainers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuningSettings:
    """What SFT, DPO and KTO share."""

    dataset: str | None = setting(None, "folder of trajectories, of collect.py", is_path=True)
    epochs: int = setting(1, "passes over the data", ge=1)
    batch_size: int = setting(32, "examples or pairs of an optimizer step", ge=1)
    learning_rate: float | None = setting(
        None,
        "initial learning rate of AdamW; by default 2e-4, and for demonstrations 1e-3 where the language model began "
        "random",
        gt=0,
    )
    adapter_learning_rate: float | None = setting(None, "initial learning rate of the adapter, if another", gt=0)
    lr_scheduler_type: Schedule = setting("linear", "decay of the learning rate")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", only_in_file=True, gt=0)
    bf16: bool = setting(False, "bfloat16 autocast in updates")


@dataclass(frozen=True)
class SFTSettings(TuningSettings):
    """Supervised fine-tuning."""

    stage: Literal["represent", "align", "instruct"] = setting(
        "instruct",
        "represent (what the architecture learns of frames before a language model reads them), align (frame -> "
        "caption; auto leaves a pretrained language model as it is) or instruct (demonstrations)",
    )
    loss: Literal["tokens", "actions"] = setting(
        "tokens", "of instruct: the answer's tokens out of the vocabulary, or its action out of the actions (quicker)"
    )
    target: Literal["taken", "expert"] = setting(
        "taken", "of instruct: the action that was taken, or what the env's expert would have done there"
    )
    only_success: bool = setting(False, "leave out episodes without success")
    captions: int = setting(1000, "frames to put into words, for represent and align", ge=1)
    warmup_steps: int = setting(0, "optimizer steps in which the learning rate rises from 0", ge=0)


@dataclass(frozen=True)
class DPOSettings(TuningSettings):
    """Preference optimisation, by DPO or by KTO on the same answers one by one."""

    batch_size: int = setting(32, "pairs of an optimizer step", ge=2)
    learning_rate: float = setting(5e-5, "initial learning rate of AdamW", gt=0)
    method: Literal["dpo", "kto"] = setting("dpo", "kto takes the same answers one by one")
    pairs: Literal["expert", "state", "return", "branch", "remote"] = setting(
        "expert", "how pairs are made; remote: a model behind a chat API says which of two actions is better"
    )
    rounds: int = setting(1, "rounds of collecting, pairing, training and evaluating", ge=1)
    episodes: int = setting(256, "episodes of the policy's own in a round", ge=1)
    group_size: int = setting(4, "of them from the same seed, for pairs by return", ge=1)
    branch_steps: int = setting(
        1, "steps of an episode at which other actions are tried, for branch, or judged, for remote", ge=1
    )
    num_steps: int = setting(32, "env steps of a rollout", ge=1)
    beta: float = setting(0.1, "how much leaving the reference costs", gt=0)


# ---- the runners -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PPOCommand:
    """Settings of run_ppo.py; also the content of a run's config.yaml."""

    environment: EnvSettings = section(EnvSettings, "environment")
    policy: PolicySource = section(PolicySource, "policy", without=SEED, trainable="auto")
    ppo: PPOSettings = section(PPOSettings, "PPO")
    workers: WorkerSettings = section(WorkerSettings, "rollout workers")
    run: PPORunSettings = section(PPORunSettings, "run")


@dataclass(frozen=True)
class CollectCommand:
    """Settings of collect.py."""

    environment: EnvSettings = section(EnvSettings, "environment")
    policy: PolicySource = section(PolicySource, "policy", without=(*SEED, *OF_LEARNING))
    workers: WorkerSettings = section(WorkerSettings, "rollout workers", without=("async_rollouts",))
    run: CollectSettings = section(CollectSettings, "recording")
    remote: RemoteSettings = section(RemoteSettings, "model behind a chat API, for --player remote")


@dataclass(frozen=True)
class SFTCommand:
    """Settings of run_sft.py."""

    environment: EnvSettings = section(EnvSettings, "environment", without=("num_envs",))
    policy: PolicySource = section(PolicySource, "policy", without=SEED, trainable="auto")
    sft: SFTSettings = section(SFTSettings, "supervised fine-tuning")
    run: SFTRunSettings = section(SFTRunSettings, "run")


@dataclass(frozen=True)
class DPOCommand:
    """Settings of run_dpo.py."""

    environment: EnvSettings = section(EnvSettings, "environment")
    policy: PolicySource = section(PolicySource, "policy", without=(*SEED, *PREDICTION), trainable="auto")
    dpo: DPOSettings = section(DPOSettings, "preference optimisation")
    run: RunSettings = section(RunSettings, "run", eval_episodes=200)
    remote: RemoteSettings = section(
        RemoteSettings, "model behind a chat API, for --pairs remote", without=OF_ACTING_REMOTELY
    )


@dataclass(frozen=True)
class EvaluateCommand:
    """Settings of evaluate.py; a run brings its own where the policy lies in one."""

    environment: EnvSettings = section(EnvSettings, "environment")
    policy: PolicySource = section(PolicySource, "policy", without=(*SEED, *OF_LEARNING, *OF_PRESETS))
    run: EvaluateSettings = section(EvaluateSettings, "evaluation")
    remote: RemoteSettings = section(RemoteSettings, "model behind a chat API, for --policy remote")


@dataclass(frozen=True)
class ImagineCommand:
    """Settings of imagine.py; a run brings its own where the policy lies in one."""

    environment: EnvSettings = section(EnvSettings, "environment")
    policy: PolicySource = section(PolicySource, "policy", without=(*SEED, *OF_LEARNING, *OF_PRESETS))
    run: ImagineSettings = section(ImagineSettings, "imagination")


@dataclass(frozen=True)
class CheckModelCommand:
    """Settings of check_model.py."""

    environment: EnvSettings = section(EnvSettings, "environment")
    policy: PolicySource = section(PolicySource, "policy", without=("policy", *SEED, *PREDICTION))
    check: ModelCheckSettings = section(ModelCheckSettings, "check")


TrainCommand = PPOCommand | SFTCommand | DPOCommand  # what leaves a run folder behind


# Settings that change where a run is computed, and not what: a resumed run may have others.
OF_THE_MACHINE = {field.name for field in fields(WorkerSettings)} - {"rollout_batch_size", "async_rollouts"}


def check_together(command: PPOCommand) -> None:
    """Checks what holds between settings; each alone is checked by `command_line.check`.

    Raises:
        UsageError: sizes that do not divide, or a reference that does not exist.
    """
    ppo, workers, num_envs = command.ppo, command.workers, command.environment.num_envs
    samples, size = num_envs * ppo.num_steps, ppo.minibatch_size
    if samples % size:
        fits = largest_divisor(samples, size)
        raise UsageError(
            f"--minibatch_size is {size}, but a rollout has --num_envs {num_envs} x --num_steps {ppo.num_steps} = "
            f"{samples} samples: expected a size that divides them, such as {fits}."
        )
    if size % ppo.gradient_accumulation_steps:
        raise UsageError(
            f"--gradient_accumulation_steps is {ppo.gradient_accumulation_steps}: expected a number that divides "
            f"--minibatch_size {size}, so that the parts are equal."
        )
    if ppo.advantage != "gae" and num_envs % ppo.group_size:
        raise UsageError(
            f"--group_size is {ppo.group_size}, and --num_envs {num_envs}: expected a divisor, such as "
            f"{largest_divisor(num_envs, ppo.group_size)}."
        )
    check_workers(workers, num_envs)
    if workers.async_rollouts and workers.rollout_backend != "ray-replica":
        raise UsageError(
            "--async_rollouts needs workers that act by themselves, and --rollout_backend is "
            f"{workers.rollout_backend}: expected ray-replica."
        )
    if ppo.ent_coef_end is not None and not ppo.ent_coef:
        raise UsageError(
            f"--ent_coef_end is {ppo.ent_coef_end}, and --ent_coef 0: expected an --ent_coef above 0 to come from."
        )
    if ppo.kl_coef and command.policy.trainable != AUTO and "lora" not in command.policy.trainable.split("+"):
        raise UsageError(
            f"--kl_coef is {ppo.kl_coef}, and --trainable {command.policy.trainable} keeps no reference policy to stay "
            "close to: expected --trainable lora (its off state is the reference), or --kl_coef 0."
        )


def largest_divisor(number: int, most: int) -> int:
    """Returns the largest whole number up to `most` that divides this one."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return max(divisor for divisor in (*small, *(number // divisor for divisor in small)) if divisor <= most)


def check_workers(settings: WorkerSettings, num_envs: int) -> None:
    """Checks what holds between the settings of rollout workers.

    Raises:
        UsageError: sizes that do not divide, or settings of workers where there are none.
    """
    if settings.rollout_backend == "local":
        given = [name for name in ("num_workers", "ray_address", "step_timeout") if getattr(settings, name) is not None]
        if given:
            raise UsageError(
                f"--{given[0]} is for rollout workers, and --rollout_backend is local: expected ray-env or ray-replica."
            )
    workers = settings.workers
    if num_envs % workers:
        fits = largest_divisor(num_envs, workers)
        raise UsageError(
            f"--num_envs {num_envs} cannot be divided among --num_workers {workers}: expected a number of workers that "
            f"divides it, such as {fits}."
        )
    slots = num_envs // (workers if settings.rollout_backend == "ray-replica" else 1)
    if settings.rollout_batch_size and slots % settings.rollout_batch_size:
        raise UsageError(
            f"--rollout_batch_size is {settings.rollout_batch_size}: expected a divisor of the {slots} environments "
            "that are played side by side."
        )


def moved(settings: WorkerSettings, given: frozenset[str], by: WorkerSettings) -> WorkerSettings:
    """Returns a run's workers on another machine: what was given there replaces what the run had.

    Args:
        settings: the run's.
        given: names of settings that came with --resume.
        by: their values.
    """
    names = {field.name for field in fields(WorkerSettings)} & given
    changes = {name: getattr(by, name) for name in names}
    if changes.get("rollout_backend") == "local" or ("rollout_backend" in changes and "num_workers" not in changes):
        changes = {"num_workers": None, **changes}
    return dataclasses.replace(settings, **changes)
