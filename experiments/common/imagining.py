"""The imagination of imagine.py: episodes are played, each step is said from its frame, and whole episodes from one.

Legend: F steps of all episodes, K codes of a frame.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from manako.agent.data.demonstrators import RandomPlayer, ScriptedPlayer
from manako.agent.interfaces import NOT_FIXED, ask, remember_for
from manako.agent.report.imagination import Agreement, Imagined, agreement, imagination_gif
from manako.agent.rng import RANDOM_ACTIONS, make_rng
from manako.envs import EpisodeVectorEnv, held_out_seeds
from manako.experiments.common.building import policy_of_run
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.environments import knows_expert, make_vector_env
from manako.experiments.common.progress import episodes_in_words, plain_console
from manako.experiments.common.run_folder import write_text
from manako.experiments.common.settings import ImagineCommand
from manako.memory import before, turns_before
from manako.policies import VLMPolicy
from manako.policies.architectures.vision_tokens.next_frame import NextFrame
from manako.policies.features import COLUMN
from manako.policies.interface import Draws, Policy, Rows

BATCH = 128  # frames that are said side by side
MOST_STEPS = 200  # of an episode


class Played(NamedTuple):
    """One episode of T steps, at most `MOST_STEPS` of them."""

    frames: list[np.ndarray]  # T + 1 of (H, W, 3) uint8
    instructions: list[str]  # T
    actions: list[int]  # T
    rewards: list[float]  # T

    def told(self, t: int, policy: Policy) -> dict[str, np.ndarray]:
        """What the policy is told of the past before step t, without a batch dimension."""
        return {
            "past_frames": before(self.frames, t, policy.spec.frames - 1),
            "past_turns": turns_before(self.actions, self.rewards, t, policy.spec.history),
        }


def run_imagination(command: ImagineCommand, name: str) -> int:
    """Plays, imagines, prints and writes.

    Args:
        command: the settings, with those of the policy's run.
        name: of the policy, as it was given.

    Returns:
        The exit code.

    Raises:
        UsageError: a policy that predicts no frames.
    """
    environment, run = command.environment, command.run
    # nothing learns here; a frozen tokenizer, whose codes stand in the rows
    source = dataclasses.replace(command.policy, trainable="full", next_frame_coef=0.0)
    policy, _ = policy_of_run(environment, source, run.seed, run.torch_threads)
    dream = policy.next_frame
    if dream is None:
        raise UsageError(
            f"{type(policy.base_vlm).__name__} of --policy {name} predicts no frames: expected a policy of vision "
            "tokens, which run_sft.py or run_ppo.py trained with --next_frame_coef."
        )
    players: dict[str, Policy] = {
        "random": RandomPlayer(policy.spec),
        "expert": ScriptedPlayer(policy.spec),
        "policy": policy,
    }
    count = min(environment.num_envs, run.episodes)
    with contextlib.closing(make_vector_env(environment, count, run.seed, held_out=True)) as env:
        knows_expert(env, needed=run.player == "expert")
        fixed_by_seed = env.follows_seeds()
        episodes = play(players[run.player], env, held_out_seeds(run.episodes, run.seed), run.seed)
    codes = [codes_of(dream, episode.frames) for episode in episodes]  # (T + 1, K) each
    before = np.concatenate([each[:-1] for each in codes])  # (F, K)
    real = np.concatenate([each[1:] for each in codes])
    with policy.frozen_weights():
        said = say_each(policy, episodes)
        imagined = imagine_episodes(policy, episodes)  # (T + 1, K) each
    dreamed = np.concatenate([each[1:] for each in imagined])
    rows = {
        "next frame": agreement(said, real, before),
        "from the first frame": agreement(dreamed, real, before),
        "copy of the frame before": agreement(before, real, before),
    }
    whole = sum(bool((one == other).all()) for one, other in zip(codes, imagined, strict=True))
    frames = {frame.tobytes() for episode in episodes for frame in episode.frames}
    moments = {
        (frame.tobytes(), action)
        for episode in episodes
        for frame, action in zip(episode.frames[:-1], episode.actions, strict=True)
    }
    summary = {
        "episodes": len(episodes),
        "starts": len({episode.frames[0].tobytes() for episode in episodes}),
        "fixed_by_seed": fixed_by_seed,
        **({} if fixed_by_seed else {"note": NOT_FIXED}),
        "different_frames": len(frames),
        "different_in_codes": len({each.tobytes() for every in codes for each in every}),
        "different_frames_and_actions": len(moments),
        "pixel_error": pixel_error(policy, dream, episodes),
        "whole_episodes": whole / len(episodes),
        "rows": {key: row.summary() for key, row in rows.items()},
    }
    _print(rows, summary, f"{name} on {environment.env}, {run.player} acts")
    if run.output:
        write_text(Path(run.output), json.dumps(summary, indent=2))
    if run.gif:
        shown = slice(0, run.gif_episodes)
        drawn = [
            Imagined(
                episode.frames,
                list(dream.pictures(torch.from_numpy(each))),
                (each == real_codes).all(1).tolist(),
                [policy.spec.action_names[action] for action in episode.actions],
                episode.instructions[0],
            )
            for episode, each, real_codes in zip(episodes[shown], imagined[shown], codes[shown], strict=True)
        ]
        imagination_gif(drawn, run.gif)
    return 0


def play(player: Policy, env: EpisodeVectorEnv, seeds: Sequence[int], seed: int) -> list[Played]:
    """Plays one episode for each seed, as many side by side as there are environments.

    Args:
        player: who acts, samples drawn with `seed`; the policy's actions are the greedy ones.
        env: N environments.
        seeds: of the episodes.
        seed: of the random numbers.
    """
    draws = Draws([make_rng(seed, RANDOM_ACTIONS)] * env.num_envs)
    remember_for(env, player)
    played: list[Played] = []
    with player.frozen_weights():
        for first in range(0, len(seeds), env.num_envs):
            part = list(seeds[first : first + env.num_envs])
            seen = env.reset(seeds=part + part[-1:] * (env.num_envs - len(part)))
            episodes = [Played([seen.images[slot].copy()], [], [], []) for slot in range(len(part))]
            going = set(range(len(part)))
            for _ in range(MOST_STEPS):
                inputs = player.prepare(seen.images, seen.instructions, ask(env, player.needs))
                actions = player.act(inputs, draws, greedy=True).to_env
                instructions = seen.instructions
                result = env.step(actions)
                seen = result.observations
                ended = result.terminated | result.truncated
                for slot in sorted(going):
                    episodes[slot].frames.append(seen.images[slot].copy())
                    episodes[slot].instructions.append(instructions[slot])
                    episodes[slot].actions.append(int(actions[slot]))
                    episodes[slot].rewards.append(float(np.float32(result.rewards[slot])))
                going -= set(np.flatnonzero(ended).tolist())
                if not going:
                    break
                if ended.any():
                    seen = env.reset_done(ended)
            played += episodes
    return played


def codes_of(dream: NextFrame, frames: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the codes (F, K) of frames (H, W, 3)."""
    return dream.codes(np.stack(frames)).numpy()


def say_each(policy: VLMPolicy, episodes: Sequence[Played]) -> np.ndarray:
    """Returns the codes (F, K) that the policy says of what follows each real frame and action."""
    assert policy.next_frame is not None
    frames = [frame for episode in episodes for frame in episode.frames[:-1]]
    past = [episode.told(t, policy) for episode in episodes for t in range(len(episode.actions))]
    texts = [text for episode in episodes for text in episode.instructions]
    actions = [action for episode in episodes for action in episode.actions]
    said = []
    for at in range(0, len(frames), BATCH):
        part = slice(at, at + BATCH)
        told = {name: np.stack([each[name] for each in past[part]]) for name in past[0]}
        inputs = policy.prepare(np.stack(frames[part]), texts[part], told).to(policy.device)
        said.append(policy.next_frame.imagine(inputs, actions[part]).cpu().numpy())
    return np.concatenate(said)


def imagine_episodes(policy: VLMPolicy, episodes: Sequence[Played]) -> list[np.ndarray]:
    """Returns codes (T + 1, K) of each episode: of its first frame, then by its own codes and the real actions."""
    assert policy.next_frame is not None
    first = np.stack([episode.frames[0] for episode in episodes])
    black = policy.next_frame.codes(np.zeros_like(first[:1]))[0]  # what the frames before the first are
    kept = policy.spec.frames
    codes = [[*[black] * (kept - 1), each] for each in policy.next_frame.codes(first)]
    for t in range(max(len(episode.actions) for episode in episodes)):
        going = [number for number, episode in enumerate(episodes) if t < len(episode.actions)]
        for at in range(0, len(going), BATCH):
            part = going[at : at + BATCH]
            images = first[part]  # whose codes are not read
            told = {"past_turns": np.stack([episodes[number].told(t, policy)["past_turns"] for number in part])}
            inputs = policy.prepare(images, [episodes[number].instructions[t] for number in part], told)
            now = torch.stack([torch.stack(codes[number][-kept:]) for number in part])[..., None]  # (B, k, K, 1)
            now = (now if kept > 1 else now[:, 0]).to(inputs[COLUMN])
            inputs = Rows({**inputs.columns, COLUMN: now}, inputs.fillers).to(policy.device)
            said = policy.next_frame.imagine(inputs, [episodes[number].actions[t] for number in part]).cpu()
            for number, each in zip(part, said, strict=True):
                codes[number].append(each)
    codes = [each[kept - 1 :] for each in codes]
    return [torch.stack(each).numpy() for each in codes]


def pixel_error(policy: VLMPolicy, dream: NextFrame, episodes: Sequence[Played]) -> float:
    """Returns how far drawings of codes are from the real frames: the mean difference of a pixel, of 255."""
    frames = np.stack([frame for episode in episodes for frame in episode.frames])  # (F, H, W, 3)
    seen = policy.processing.pipeline.resize(frames).numpy()  # (F, h, w, 3)
    parts = range(0, len(frames), BATCH)
    drawn = np.concatenate([dream.pictures(dream.codes(frames[at : at + BATCH])) for at in parts])
    return float(np.abs(drawn.astype(np.float32) - seen).mean())


def _print(rows: dict[str, Agreement], summary: dict[str, Any], title: str) -> None:
    console = plain_console()
    of = episodes_in_words(summary["episodes"], summary["starts"])
    table = Table(
        title=f"{title}: {of}, {rows['next frame'].frames:,} frames said", title_justify="left", box=box.SIMPLE
    )
    for column in ("", "whole frames [95 %]", "changed cells"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        low, high = row.interval
        changed = f"{row.changed_right / row.changed:.1%}" if row.changed else "none changed"
        table.add_row(name, f"{row.right / row.frames:.1%} [{low:.1%}, {high:.1%}]", changed)
    console.print(table)
    console.print(f"whole episodes from their first frame: {summary['whole_episodes']:.1%}")
    console.print(
        f"{summary['different_frames']:,} different frames ({summary['different_in_codes']:,} in codes), "
        f"{summary['different_frames_and_actions']:,} different pairs of frame and action; a frame drawn of its codes "
        f"is {summary['pixel_error']:.2f} of 255 off"
    )
