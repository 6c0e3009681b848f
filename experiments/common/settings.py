"""The settings of a training run: one field, one flag. Defaults train `tiny` on GoTo in minutes on two CPU cores."""

from dataclasses import dataclass

from manako.experiments.common.command_line import UsageError, setting


@dataclass
class EnvConfig:
    """What is played."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id, or module:EnvId-v0 for your own")
    instruction: str | None = setting(None, "replaces the env's own instruction")
    action_names: str | None = setting(None, "replaces the env's own action names: a,b,c")
    env_kwargs: str | None = setting(None, "arguments of the env's constructor, a JSON object")
    image_source: str = setting("auto", "auto, observation or render", choices=("auto", "observation", "render"))
    success_return: float | None = setting(None, "lowest return of a successful episode")
    seed: int = setting(0, "of everything random", ge=0, lt=2**31)


@dataclass
class PlayConfig(EnvConfig):
    """What is played and by whom; every runner in which a policy acts has these settings."""

    # policy
    policy: str = setting("tiny", "preset (tiny, smollm2), model folder, run checkpoint or Hub id")
    vision_encoder: str | None = setting(None, "replaces a preset's encoder: vit, clip_vit, convnext, folder or Hub id")
    adapter: str | None = setting(None, "replaces a preset's adapter: linear, mlp, mlp_zscore")
    language_model: str | None = setting(
        None, "replaces a preset's language model: tiny-llama, smollm2, folder, Hub id"
    )
    image_size: int | None = setting(None, "side in pixels that a small random encoder sees", ge=8)
    patch_size: int | None = setting(None, "side in pixels of its patches", ge=2)
    trainable: str = setting(
        "full",
        "what learns: full, adapter, lora (with the adapter), or parts among encoder, adapter, language_model, lora, "
        "value_head joined by +",
    )
    lora_rank: int = setting(16, "rank of LoRA", ge=1)
    lora_alpha: int = setting(32, "LoRA is scaled by lora_alpha / lora_rank", ge=1)
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16"))
    action_format: str = setting("auto", "how actions are named", choices=("auto", "token", "choice", "trie"))
    system: str | None = setting(None, "system text of the prompt; {actions} stands for the list of actions")
    # machine
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for a small model, else torch's choice", ge=1
    )
    bf16: bool = setting(False, "bfloat16 autocast in rollouts and updates")


@dataclass
class TrainConfig(PlayConfig):
    """What a run leaves behind; for every runner that trains."""

    output_dir: str | None = setting(None, "run folder, must not exist; by default runs/ENV-POLICY-seedN-TIME")
    eval_episodes: int = setting(500, "held-out episodes of each evaluation row", ge=1)
    gif_episodes: int = setting(4, "episodes in before.gif and after.gif, 0 for none", ge=0)


@dataclass
class RolloutConfig(PlayConfig):
    """Who plays rollouts, and how many."""

    # rollout workers
    rollout_backend: str = setting(
        "local",
        "local, ray-env (environments in workers, the learner acts) or ray-replica (workers act with policy copies)",
        choices=("local", "ray-env", "ray-replica"),
    )
    num_workers: int | None = setting(
        None, "rollout workers of a Ray backend, a divisor of num_envs; 2 by default", ge=1
    )
    worker_cpus: float = setting(1.0, "CPU cores of a worker", gt=0)
    worker_gpus: float = setting(0.0, "GPUs of a worker, such as 0.5", ge=0)
    worker_timeout: float = setting(300.0, "seconds after which a worker that does not answer is replaced", gt=0)
    placement_timeout: float = setting(60.0, "seconds that a worker may wait for its place and start", gt=0)
    ray_address: str | None = setting(
        None, "host:port of a Ray cluster, or auto for this machine's; by default RAY_ADDRESS, else one is started"
    )
    rollout_batch_size: int | None = setting(
        None, "slots of one forward while acting; with the same one all backends compute the same bits", ge=1
    )
    num_envs: int = setting(64, "environments side by side", ge=1)
    num_steps: int = setting(16, "env steps of each environment in a rollout", ge=1)
    group_size: int = setting(8, "episodes of the same seed, for grpo, rloo and gigpo", ge=2)


@dataclass
class RunConfig(TrainConfig, RolloutConfig):
    """Settings of run_ppo.py; also the content of a run's config.yaml."""

    # PPO
    total_steps: int = setting(160_000, "env steps to collect, rounded up to whole rollouts", ge=1)
    num_ppo_epochs: int = setting(3, "passes over a rollout", ge=1)
    minibatch_size: int = setting(128, "samples of an optimizer step", ge=1)
    gradient_accumulation_steps: int = setting(1, "parts in which a minibatch is run", ge=1)
    learning_rate: float = setting(7e-4, "initial learning rate of AdamW", gt=0)
    adapter_learning_rate: float | None = setting(None, "initial learning rate of the adapter, if another", gt=0)
    lr_scheduler_type: str = setting("linear", "decay of the learning rate", choices=("linear", "cosine", "constant"))
    advantage: str = setting(
        "gae",
        "gae (value head) or grpo, rloo, gigpo (episodes of the same seed are compared)",
        choices=("gae", "grpo", "rloo", "gigpo"),
    )
    step_weight: float = setting(1.0, "weight of gigpo's step advantages beside the episode's", ge=0)
    gamma: float = setting(0.9, "discount of an env step", ge=0, le=1)
    gae_lambda: float = setting(0.95, "lambda of GAE", ge=0, le=1)
    clip_range: float = setting(0.2, "epsilon of the clipped surrogate", gt=0)
    clip_range_vf: float | None = setting(None, "epsilon of the clipped value loss", gt=0)
    vf_coef: float = setting(0.5, "weight of the value loss", ge=0)
    ent_coef: float = setting(0.01, "weight of the entropy bonus", ge=0)
    kl_coef: float = setting(0.0, "weight of KL(policy || start); needs trainable: lora", ge=0)
    target_kl: float | None = setting(None, "an update stops beyond 1.5 times this KL", gt=0)
    max_grad_norm: float = setting(0.5, "gradients are clipped to this norm", gt=0)
    async_rollouts: bool = setting(False, "ray-replica collects the next rollout during the update, one version behind")
    # run
    resume: str | None = setting(None, "run folder to go on with, by its own settings")
    save_every: int = setting(20, "iterations between checkpoints", ge=1)
    keep_checkpoints: int = setting(2, "checkpoints kept, the newest", ge=1)


def check_together(config: RunConfig) -> None:
    """What holds between settings; each alone is checked by `command_line.check`.

    Raises:
        UsageError: sizes that do not divide, or a reference that does not exist.
    """
    samples, size = config.num_envs * config.num_steps, config.minibatch_size
    if samples % size:
        fits = max(divisor for divisor in range(1, min(size, samples) + 1) if samples % divisor == 0)
        raise UsageError(
            f"--minibatch_size is {size}, but a rollout has --num_envs {config.num_envs} x --num_steps "
            f"{config.num_steps} = {samples} samples: expected a size that divides them, such as {fits}."
        )
    if size % config.gradient_accumulation_steps:
        raise UsageError(
            f"--gradient_accumulation_steps is {config.gradient_accumulation_steps}: expected a number that divides "
            f"--minibatch_size {size}, so that the parts are equal."
        )
    if config.advantage != "gae" and config.num_envs % config.group_size:
        raise UsageError(
            f"--group_size is {config.group_size}, and --num_envs {config.num_envs}: expected a divisor, such as "
            f"{max(size for size in range(1, config.group_size + 1) if config.num_envs % size == 0)}."
        )
    check_workers(config)
    if config.async_rollouts and config.rollout_backend != "ray-replica":
        raise UsageError(
            "--async_rollouts needs workers that act by themselves, and --rollout_backend is "
            f"{config.rollout_backend}: expected ray-replica."
        )
    if config.kl_coef and "lora" not in config.trainable.split("+"):
        raise UsageError(
            f"--kl_coef is {config.kl_coef}, and --trainable {config.trainable} keeps no reference policy to stay "
            "close to: expected --trainable lora (its off state is the reference), or --kl_coef 0."
        )


def check_workers(config: RolloutConfig) -> None:
    """What holds between the settings of rollout workers; fills in the number of workers.

    Raises:
        UsageError: sizes that do not divide, or settings of workers where there are none.
    """
    if config.rollout_backend == "local":
        given = [name for name in ("num_workers", "ray_address") if getattr(config, name) is not None]
        if given:
            raise UsageError(
                f"--{given[0]} is for rollout workers, and --rollout_backend is local: expected ray-env or ray-replica."
            )
    workers = 1 if config.rollout_backend == "local" else config.num_workers or 2
    if config.num_envs % workers:
        fits = max(divisor for divisor in range(1, workers + 1) if config.num_envs % divisor == 0)
        raise UsageError(
            f"--num_envs {config.num_envs} cannot be divided among --num_workers {workers}: expected a number of "
            f"workers that divides it, such as {fits}."
        )
    if config.rollout_backend != "local":
        config.num_workers = workers
    slots = config.num_envs // (workers if config.rollout_backend == "ray-replica" else 1)
    if config.rollout_batch_size and slots % config.rollout_batch_size:
        raise UsageError(
            f"--rollout_batch_size is {config.rollout_batch_size}: expected a divisor of the {slots} environments that "
            "are played side by side."
        )
