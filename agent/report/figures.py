"""Pictures of a run: the learning curve (PNG) and what the policy saw and did in whole episodes (GIF).

Both are drawn from numbers that the run stored anyway: the rows of `metrics.jsonl`, and the frames, probabilities and
rewards of an episode. Nothing is rendered or evaluated again. matplotlib and Pillow are imported when a picture is
drawn, and without a window. A picture replaces the former one in one piece, so that it can be watched while a run
goes on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from manako.agent.errors import TrainingError
from manako.agent.report.statistics import Interval
from manako.places import grid_of
from manako.spaces import SKIPPED, TextCodes, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

Row = Mapping[str, Any]  # a row of metrics.jsonl


class RecordedEpisode(NamedTuple):
    """One episode as it was played, to its end or to where it was cut."""

    # (T + 1, H, W, 3) uint8, the last one is what the last step returned; of a thinned episode fewer, see `every`
    frames: np.ndarray | Sequence[np.ndarray]
    instructions: Sequence[str]  # T, or T + 1 with the one that came with the last frame
    probabilities: np.ndarray  # (T, A); of action vectors (T, d), where each entry stands between its least and largest
    actions: Sequence[Any] | np.ndarray  # T, in 0 .. A - 1; of action vectors (T, d) numbers
    rewards: Sequence[float] | np.ndarray  # T
    success: bool | None  # None: nobody says what a success is
    every: int = 1  # frames are those of the steps 0, every, 2 every ... below T, and the last one
    ended: bool = True  # False: it was going on when it was cut, and how it would have ended is not known
    answers: Sequence[str] = ()  # T texts of a policy that writes, which are shown in place of probabilities


# ------------------------------------------------------------------------------------------------- learning curve

COLORS = {
    "success_rate": "#1f6f54",
    "episode_return": "#2b5f9e",
    "entropy": "#8a5a9e",
    "explained_variance": "#4a90a4",
    "approx_kl": "#c8553d",
}
_VALIDATION = {"success": "validation/success", "return": "validation/return_mean"}  # panel -> what is marked in it
_VALIDATION_COLOR = "#c2185b"
_BASELINE_COLORS = ("#6b6b6b", "#b58a2b", "#a03f6f")
_SMOOTH_FROM = 40  # points; a longer series gets a running mean


def learning_curve(
    rows: Sequence[Row],
    path: Path | str,
    title: str,
    baselines: Mapping[str, tuple[float, Interval]] | None = None,
) -> None:
    """Draws success, return and the health of the updates over env steps.

    Args:
        rows: with `env_steps` and any of `success_rate` (in [0, 1]), `episode_return`, `entropy` (nats), `approx_kl`
            (nats), `explained_variance`, and of evaluations while it trained `validation/success` and
            `validation/return_mean`, greedy on episodes of their own: marks beside the training's line. A number that
            is missing, None or NaN leaves no point. A panel without a single point is left out, except the first.
        path: the PNG to write; its parents are made.
        title: above the panels.
        baselines: name -> (success rate, (low, high)) of other policies, such as the random one: a line and a band.
            Where no row has a success rate, they are mean returns, and so is the panel that they are drawn in.

    Raises:
        TrainingError: no row has `env_steps`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    if not any(_number(row.get("env_steps")) is not None for row in rows):
        raise TrainingError(
            f"No row of {len(rows)} has env_steps: expected at least one row of metrics.jsonl with that number, "
            "so draw the curve after the first iteration."
        )
    drawn = [key for key in COLORS if _series(rows, key)[0]]
    has_return = "episode_return" in drawn
    health = [key for key in ("entropy", "explained_variance", "approx_kl") if key in drawn]
    panels = [*(["return"] if has_return else []), *(["updates"] if health else [])]
    if "success_rate" in drawn or not has_return:
        panels = ["success", *panels]

    figure = Figure(figsize=(4.6 * len(panels), 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for name, ax in axes.items():
        ax.set_title(name.capitalize(), fontsize=10)
        ax.set_xlabel("environment steps")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)

    if "success" in axes:
        axes["success"].set_ylabel("successful episodes (%)")
        axes["success"].set_ylim(-0.03, 1.03)
        axes["success"].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        draw_series(axes["success"], rows, "success_rate", "policy")
    if has_return:
        axes["return"].set_ylabel("mean episode return (reward units)")
        draw_series(axes["return"], rows, "episode_return", "policy")
    for panel, key in _VALIDATION.items():
        x, y = _series(rows, key)
        if x and panel in axes:
            axes[panel].plot(x, y, "D--", color=_VALIDATION_COLOR, markersize=4, linewidth=0.8, label="validation")
    ax = axes[panels[0]]  # the measure
    for index, (name, (rate, (low, high))) in enumerate((baselines or {}).items()):
        color = _BASELINE_COLORS[index % len(_BASELINE_COLORS)]
        ax.axhspan(low, high, color=color, alpha=0.15, linewidth=0)
        ax.axhline(rate, color=color, linestyle="--", linewidth=1.2, label=name)
    _legend(ax)

    if health:
        ax = axes["updates"]
        units = {"entropy": "entropy (nats)", "explained_variance": "explained variance (share)"}
        left = [key for key in health if key != "approx_kl"]
        for key in left:
            draw_series(ax, rows, key, key.replace("_", " "))
        ax.set_ylabel("\n".join(units[key] for key in left))
        ax.yaxis.set_visible(bool(left))
        ax.set_ylim(bottom=max(ax.get_ylim()[0], -1.1))  # an untrained value function explains anything down to -100
        if "approx_kl" in health:  # some hundred times smaller than the others: an axis of its own, on the right
            right = ax.twinx()
            right.spines["top"].set_visible(False)
            right.set_ylabel("KL of an update (nats)", color=COLORS["approx_kl"])
            right.tick_params(axis="y", colors=COLORS["approx_kl"])
            draw_series(right, rows, "approx_kl", "KL (right)")
            right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
            ax.plot([], [], color=COLORS["approx_kl"], linewidth=1.8, label="KL (right)")  # for the legend
        _legend(ax)

    for ax in axes.values():
        ax.set_xlim(left=0)
    smoothed = max(_window(len(_series(rows, key)[0])) for key in COLORS)
    if smoothed:
        figure.supxlabel(f"bold: mean of the last {smoothed} iterations", fontsize=8, color="#6b6b6b")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    _replace(path, picture.getvalue())


def success_chart(
    rows: Sequence[tuple[str, float, Interval]],
    path: Path | str,
    title: str,
    baseline: tuple[float, Interval] | None,
    returns: bool = False,
) -> None:
    """Draws success with its interval, a line a row, in the order of the rows.

    Args:
        rows: name, success in [0, 1], (low, high).
        path: the PNG to write; its parents are made.
        title: above it.
        baseline: of the random policy: a line and a band.
        returns: these are mean returns, and no successes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.set_title(title, fontsize=10)
    places = list(range(len(rows)))[::-1]
    for place, (_, success, (low, high)) in zip(places, rows, strict=True):
        ax.plot([low, high], [place, place], color=COLORS["success_rate"], linewidth=2)
        ax.plot([success], [place], "o", color=COLORS["success_rate"], markersize=5)
    if baseline is not None:
        rate, (low, high) = baseline
        ax.axvspan(low, high, color=_BASELINE_COLORS[0], alpha=0.15, linewidth=0)
        ax.axvline(rate, color=_BASELINE_COLORS[0], linestyle="--", linewidth=1.2, label="random policy")
        ax.legend(loc="lower left", fontsize=8)
    ax.set_yticks(places, [name for name, _, _ in rows], fontsize=8)
    if returns:
        ax.set_xlabel("mean episode return (reward units), 95 % interval")
    else:
        ax.set_xlim(-0.03, 1.03)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        ax.set_xlabel("successful episodes (%), 95 % interval")
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    _replace(path, picture.getvalue())


def _number(value: Any) -> float | None:
    """A finite float, or None for what is missing, None, NaN or infinite."""
    return float(value) if value is not None and np.isfinite(float(value)) else None


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Env steps and values of the rows that have both."""
    points = [(_number(row.get("env_steps")), _number(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _window(points: int) -> int:
    """How many points a running mean takes in; 0 for a series that is short enough to read as it is."""
    return max(5, points // 20) if points >= _SMOOTH_FROM else 0


def draw_series(ax: Axes, rows: Sequence[Row], key: str, label: str) -> None:
    """Draws one series: its points joined; a long one faintly, under its running mean."""
    x, y = _series(rows, key)
    window = _window(len(x))
    if window:
        sums = np.cumsum(np.concatenate([[0.0], y]))
        ends = np.arange(1, len(y) + 1)
        starts = np.maximum(0, ends - window)
        ax.plot(x, y, color=COLORS[key], linewidth=0.8, alpha=0.3)
        ax.plot(x, (sums[ends] - sums[starts]) / (ends - starts), color=COLORS[key], linewidth=1.8, label=label)
    elif x:
        ax.plot(x, y, color=COLORS[key], linewidth=1.6, marker="o", markersize=3, label=label)


def _legend(ax: Axes) -> None:
    """Under the panel, where it hides no point."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=8, frameon=False)


# ---------------------------------------------------------------------------------------------------- episode GIF

_FRAME = 320  # px, what the longer side of a frame is scaled to, or near it
PANEL = 320  # px, width of the text and bars
_MARGIN = 14
_LINE = 20  # px, of the instruction
_ANSWER_LINES = 6  # of an answer in text
_MOST_LINES = 4
_BAR = 20  # px, a row of the bars
_MOST_BARS = 12
_BANNER = 44  # px, the label at an episode's end
_SMALL, _NORMAL, _LARGE = 12, 14, 26  # px, sizes of the font that ships with Pillow
_MARK = 4  # px, the outline of the place that is acted on
MOST_FPS = 10.0  # faster is not read, and longer episodes are thinned anyway
_HOLD = 3  # the last frame stays this many times as long
_PAPER, _INK, _FAINT, _TRACK = "#ffffff", "#1b1f24", "#6a737d", "#edf0f3"
_BAR_COLOR, _TAKEN_COLOR = "#9db4cc", "#e07a1f"
_SUCCESS_COLOR, _FAILURE_COLOR = "#1f7a4d", "#b3362b"


def episode_gif(
    episodes: Sequence[RecordedEpisode], action_names: Sequence[str], path: Path | str, fps: float = 2
) -> None:
    """Draws whole episodes: the frame, the instruction, the action probabilities, the action and its reward.

    One picture a step, with the frame that the action was taken on and the reward that followed; then the episode's
    last frame, held for longer and labelled success or failure, or that the episode was cut. Of a thinned episode every
    k-th step is shown, which the picture says. With more than twelve actions the twelve most probable
    ones are shown, the one taken always among them. Of an action vector, each entry is shown with its number, and a bar
    from its least to its largest value. Where the actions are the cells of a grid over the frame, the cell
    that is acted on is marked.

    Args:
        episodes: at least one, all with the same set of actions.
        action_names: A names.
        path: the GIF to write; its parents are made.
        fps: steps shown per second.

    Raises:
        TrainingError: nothing to draw, or the parts of an episode do not fit together.
    """
    from PIL import Image

    if not episodes:
        raise TrainingError(f"No episodes for {path}: expected at least one, so play one before drawing.")
    for index, episode in enumerate(episodes):
        _check(index, episode, len(action_names))
    # every picture of the file has one size, with the same places for the frame and the bars
    sizes = [scaled_size(np.shape(frame)) for episode in episodes for frame in episode.frames]
    frame_box = max(width for width, _ in sizes), max(height for _, height in sizes)
    texts = {text: wrapped(text, PANEL) for episode in episodes for text in episode.instructions}
    lines = max(len(text) for text in texts.values())
    pictures, durations = [], []
    for index, episode in enumerate(episodes):
        name = f"episode {index + 1} of {len(episodes)}" if len(episodes) > 1 else "episode"
        steps = len(episode.actions)
        thinned = f", one of {episode.every} shown" if episode.every > 1 else ""
        for t in [*range(0, steps, episode.every), steps]:
            of = f" of {steps:,}" if episode.ended else ""
            head = f"{name}  ·  step {min(t + 1, steps):,}{of}{thinned}"
            instruction = texts[episode.instructions[min(t, len(episode.instructions) - 1)]]
            instruction = instruction + [""] * (lines - len(instruction))
            pictures.append(_picture(episode, t, head, instruction, action_names, frame_box))
            durations.append(round(1000 / fps) * (_HOLD if t == steps else 1))
    # without dithering: flat colours stay flat, and the file small
    first, *others = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    stored = BytesIO()
    first.save(stored, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, disposal=1)
    _replace(path, stored.getvalue())


def shown_fps(render_fps: Any) -> float:
    """Returns steps a second for an environment's `render_fps`: its own up to `MOST_FPS`, 2 where it says none."""
    if isinstance(render_fps, int | float) and math.isfinite(render_fps) and render_fps > 0:
        return min(float(render_fps), MOST_FPS)
    return 2.0


def _check(index: int, episode: RecordedEpisode, num_actions: int) -> None:
    steps, frames, texts, rewards = map(len, (episode.actions, episode.frames, episode.instructions, episode.rewards))
    shown = len(range(0, steps, max(1, episode.every)))
    if steps == 0 or frames != shown + 1 or texts not in (steps, steps + 1) or rewards != steps:
        raise TrainingError(
            f"Episode {index} has {steps} actions, {frames} frames, {texts} instructions and {rewards} rewards: "
            f"expected T >= 1, {'T' if episode.every == 1 else shown} + 1, T and T; pass the frame that the last step "
            "returned too."
        )
    shape = np.shape(episode.probabilities)
    if shape != (steps, num_actions) or not np.isfinite(episode.probabilities).all():
        raise TrainingError(
            f"Episode {index} has action probabilities of shape {shape}: expected {(steps, num_actions)} finite "
            "numbers, one row a step and one column an action name."
        )
    if np.ndim(episode.actions) > 1:
        return  # vectors
    least = -1 if episode.answers else 0  # an answer may name no action
    if not all(least <= action < num_actions for action in episode.actions):
        raise TrainingError(
            f"Episode {index} has actions outside 0 to {num_actions - 1}: expected indices of the action names."
        )


def scaled_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns (width, height) of a shown frame: a whole multiple where it is small, so that its pixels stay square."""
    height, width = shape[:2]
    longer = max(height, width)
    scale = max(1, round(_FRAME / longer)) if longer <= _FRAME else _FRAME / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def _picture(
    episode: RecordedEpisode,
    t: int,
    head: str,
    instruction: Sequence[str],
    action_names: Sequence[str],
    frame_box: tuple[int, int],
) -> Image.Image:
    """Step `t` of an episode, or its end where `t` is the number of steps."""
    from PIL import Image, ImageDraw, ImageFont

    small, normal, large = (ImageFont.load_default(size) for size in (_SMALL, _NORMAL, _LARGE))
    bars_top = _MARGIN + 22 + _LINE * len(instruction) + 14
    rows = min(len(action_names), _MOST_BARS) if not episode.answers else _ANSWER_LINES + 1
    bars_height = max(_BANNER, _BAR * rows)
    width = _MARGIN + frame_box[0] + _MARGIN + PANEL + _MARGIN
    height = max(_MARGIN + frame_box[1] + _MARGIN, bars_top + bars_height + 44)
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)

    seen = episode.frames[-1 if t == len(episode.actions) else t // episode.every]  # (H, W, 3)
    frame = Image.fromarray(np.ascontiguousarray(seen))
    shown_width, shown_height = scaled_size(np.shape(seen))
    enlarged = shown_width >= frame.width
    frame = frame.resize(
        (shown_width, shown_height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    )
    x, y = _MARGIN + (frame_box[0] - shown_width) // 2, (height - shown_height) // 2
    picture.paste(frame, (x, y))
    grid = grid_of(action_names)
    if grid is not None and grid.is_whole and t < len(episode.actions):
        left, top, right, bottom = grid.box(int(episode.actions[t]))
        corners = (
            (x + round(left * shown_width), y + round(top * shown_height)),
            (x + round(right * shown_width) - 1, y + round(bottom * shown_height) - 1),
        )
        draw.rectangle(corners, outline=_TAKEN_COLOR, width=_MARK)

    left, right = _MARGIN + frame_box[0] + _MARGIN, width - _MARGIN
    draw.text((left, _MARGIN), head, fill=_FAINT, font=small)
    for line, text in enumerate(instruction):
        draw.text((left, _MARGIN + 22 + _LINE * line), text, fill=_INK, font=normal)

    paid = float(np.sum(episode.rewards[: t + 1]))
    if t == len(episode.actions):
        label, color = ("success", _SUCCESS_COLOR) if episode.success else ("failure", _FAILURE_COLOR)
        if episode.success is None:
            label, color = f"return {paid:.1f}", _TAKEN_COLOR
        if not episode.ended:
            label, color = f"cut after {len(episode.actions):,} steps", _FAINT
        draw.rectangle((left, bars_top, right, bars_top + _BANNER), fill=color)
        draw.text(((left + right) // 2, bars_top + _BANNER // 2), label, fill=_PAPER, font=large, anchor="mm")
        draw.rectangle((x - 4, y - 4, x + shown_width + 3, y + shown_height + 3), outline=color, width=4)
        foot = f"return {paid:+.2f}"
    elif episode.answers:
        lines = wrapped(episode.answers[t], right - left, _ANSWER_LINES)
        for line, text in enumerate(lines):
            draw.text((left, bars_top + _BAR * line), text, fill=_FAINT, font=normal)
        action: Any = episode.actions[t]
        if np.ndim(action):  # a text
            named = TextCodes.decode(action) if action[0] != SKIPPED else "no action"
        else:
            named = action_names[action] if action >= 0 else "no action"
        draw.text((left, bars_top + _BAR * len(lines)), named, fill=_TAKEN_COLOR, font=normal)
        foot = f"reward {float(episode.rewards[t]):+.2f}      return {paid:+.2f}"
    else:
        probabilities = np.asarray(episode.probabilities[t], dtype=np.float64)
        texts = None
        if np.ndim(episode.actions) > 1:
            texts, taken = [short_number(value) for value in episode.actions[t]], -1
        else:
            taken = int(episode.actions[t])
        _draw_bars(draw, (left, bars_top, right), probabilities, taken, action_names, small, texts)
        foot = f"reward {float(episode.rewards[t]):+.2f}      return {paid:+.2f}"
    draw.text((left, height - _MARGIN), foot, fill=_INK, font=normal, anchor="ls")
    return picture


def shown_actions(probabilities: np.ndarray, taken: int) -> list[int]:
    """Returns all actions in their order, or the twelve most probable, `taken` among them, by probability."""
    actions = list(range(len(probabilities)))
    if len(actions) <= _MOST_BARS:
        return actions
    kept = sorted(actions, key=lambda a: (a != taken, -probabilities[a]))[:_MOST_BARS]
    return sorted(kept, key=lambda a: -probabilities[a])


def _draw_bars(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    probabilities: np.ndarray,
    taken: int,
    action_names: Sequence[str],
    font: Font,
    texts: Sequence[str] | None = None,
) -> None:
    """A row an action: name, bar, percent; of a vector a row an entry, with these texts. `place`: left, top, right."""
    left, top, right = place
    shown = shown_actions(probabilities, taken) if texts is None else list(range(min(len(texts), _MOST_BARS)))
    names = [_shortened(action_names[a], font, 110) for a in shown]
    # the names' column is as wide for every step, whichever of them are shown
    column = max(int(font.getlength(_shortened(name, font, 110))) for name in action_names)
    bar_left, bar_right = left + column + 10, right - 46
    for row, (a, name) in enumerate(zip(shown, names, strict=True)):
        middle = top + _BAR * row + _BAR // 2
        color, ink = (_TAKEN_COLOR, _INK) if a == taken or texts is not None else (_BAR_COLOR, _FAINT)
        filled = bar_left + round((bar_right - bar_left) * float(np.clip(probabilities[a], 0, 1)))
        draw.text((left + column, middle), name, fill=ink, font=font, anchor="rm")
        draw.rectangle((bar_left, middle - 6, bar_right, middle + 6), fill=_TRACK)
        if filled > bar_left:
            draw.rectangle((bar_left, middle - 6, filled, middle + 6), fill=color)
        text = f"{100 * probabilities[a]:.1f}%" if texts is None else texts[a]
        draw.text((right, middle), text, fill=ink, font=font, anchor="rm")


def wrapped(text: str, width: int, most: int | None = None) -> list[str]:
    """Returns at most `most` lines (`_MOST_LINES`) that fit; the last one ends in "…" where text was left out."""
    from PIL import ImageFont

    font = ImageFont.load_default(_NORMAL)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        elif len(lines) == (most or _MOST_LINES):
            lines[-1] = _shortened(f"{lines[-1]} {word}", font, width)
            break
        else:
            lines.append(_shortened(word, font, width))
    return lines


def _shortened(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _replace(path: Path | str, content: bytes) -> None:
    """Writes beside `path` and renames: whoever looks sees the former picture or this one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
