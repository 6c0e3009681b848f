"""Records a person's play: a window with the frame, the instruction and the keys of the actions.

    python experiments/play.py --env manako/GoTo-v0 --output play.jsonl
    python experiments/collect.py --env manako/GoTo-v0 --player recorded --recording play.jsonl --output data/human

One key press is one action, and nothing happens in between. Arrow keys stand for actions called up, down, left and
right, digits (then letters) for all in their order. After an episode, Enter plays the next one and Backspace the same
one again, for preferences between the two; Escape ends. Every finished episode is added to the file at once, an
unfinished one is not. The seeds are those of training episodes, and those already in the file are not played again.

gymnasium.utils.play does not serve: it shows no instruction, names no keys, starts every episode from the same seed and
steps on for as long as a key is held.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]
SCREEN_GIVEN = "SDL_VIDEODRIVER" in os.environ  # envs/ sets it where there is no screen

import numpy as np  # noqa: E402

from manako.agent.data.recordings import Recording, append_recording, read_recordings  # noqa: E402
from manako.envs import TRAINING, EpisodeVectorEnv, Observations, episode_seed  # noqa: E402
from manako.envs.settings import EnvSettings  # noqa: E402
from manako.experiments.common.command_line import UsageError, parse, run_main, section, show  # noqa: E402
from manako.experiments.common.environments import ignored_seeds_of, make_vector_env  # noqa: E402
from manako.settings import setting  # noqa: E402
from manako.spaces import actions_in_words, is_vector  # noqa: E402

KEYS = "123456789abcdefghijklmnopqrstuvwxyz"
ARROWS = ("up", "down", "left", "right")
SIDE, MARGIN = 480, 16  # pixels: a frame is enlarged to about this side
MOST_LINES = 12  # of a text
BACKGROUND, TEXT, QUIET = (24, 24, 28), (240, 240, 240), (160, 160, 170)


@dataclasses.dataclass(frozen=True)
class SittingSettings:
    """What is recorded."""

    output: str | None = setting(
        None, "file of the recording; episodes are added to an existing one of the same env", is_path=True
    )
    seed: int = setting(0, "of the episodes", ge=0, lt=2**31)


@dataclasses.dataclass(frozen=True)
class PlayCommand:
    """Settings of play.py."""

    environment: EnvSettings = section(EnvSettings, "environment", without=("num_envs",))
    run: SittingSettings = section(SittingSettings, "recording")


class Window:
    """The picture, the texts around it, and the keys.

    Args:
        env: one environment.
    """

    def __init__(self, env: EpisodeVectorEnv) -> None:
        self.pygame = pygame = _pygame()
        names = env.action_names
        if is_vector(env.action_space):
            raise UsageError(
                f"{env.env_id} has actions that are vectors, {actions_in_words(env.action_space, names)}: expected "
                "an env of Discrete actions, one a key."
            )
        if len(names) > len(KEYS):
            raise UsageError(f"{env.env_id} has {len(names)} actions: expected {len(KEYS)} at most, one a key.")
        self.keys = {ord(key): action for action, key in enumerate(KEYS[: len(names)])}
        self.keys |= {getattr(pygame, f"K_{name.upper()}"): names.index(name) for name in ARROWS if name in names}
        self.next_keys = (pygame.K_RETURN, pygame.K_KP_ENTER, pygame.K_SPACE)
        self.again_key: int = pygame.K_BACKSPACE
        parts = [f"{key} {name}".replace(" ", "\u00a0") for key, name in zip(KEYS, names, strict=False)]
        parts += ["or the arrow keys"] if set(ARROWS) & set(names) else []
        self._help = " \u00a0 ".join(parts)
        height, width, _ = env.frame_shape
        self._scale = max(1, SIDE // max(height, width))
        self._width = max(width * self._scale, SIDE)  # of picture and texts
        self._font = pygame.font.Font(None, 28)
        self.surface = pygame.display.set_mode((self._width + 2 * MARGIN, SIDE))  # show() makes it taller
        pygame.display.set_caption(env.env_id)

    def show(self, observations: Observations, what: str) -> None:
        """Draws the first slot's instruction and frame, the keys, and what happens."""
        pygame, image = self.pygame, observations.images[0]  # (H, W, 3) uint8
        picture = pygame.surfarray.make_surface(image.swapaxes(0, 1))
        picture = pygame.transform.scale(picture, (image.shape[1] * self._scale, image.shape[0] * self._scale))
        above = self._wrapped(observations.instructions[0])
        keys, below = self._wrapped(self._help), self._wrapped(what)
        row = self._font.get_linesize()
        size = (self.surface.get_width(), picture.get_height() + row * len(above + keys + below) + 4 * MARGIN)
        if self.surface.get_height() < size[1]:
            self.surface = pygame.display.set_mode(size)
        self.surface.fill(BACKGROUND)
        top = self._write(above, MARGIN, TEXT) + MARGIN
        self.surface.blit(picture, (MARGIN + (self._width - picture.get_width()) // 2, top))
        top = self._write(keys, top + picture.get_height() + MARGIN, QUIET)
        self._write(below, top, TEXT)
        pygame.display.flip()

    def wait(self) -> int | None:
        """Returns the next key that is pressed; None for Escape, or a closed window."""
        pygame = self.pygame
        while True:
            event = pygame.event.wait(200)  # not for ever: Ctrl-C is seen in between
            if event.type == pygame.QUIT:
                return None
            if event.type == pygame.KEYDOWN:
                return None if event.key == pygame.K_ESCAPE else int(event.key)
            if event.type == pygame.WINDOWEXPOSED:
                pygame.display.flip()

    def close(self) -> None:
        """Closes the window."""
        self.pygame.display.quit()

    def _wrapped(self, text: str) -> list[str]:
        lines: list[str] = []
        for paragraph in text.split("\n"):
            lines.append("")
            for word in paragraph.split(" "):
                longer = f"{lines[-1]} {word}".strip(" ")
                if self._font.size(longer)[0] <= self._width:
                    lines[-1] = longer
                else:
                    lines.append(word)
        return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "…"]

    def _write(self, lines: list[str], top: int, color: tuple[int, int, int]) -> int:
        """Lines of text from this height on; returns the height below them."""
        for line in lines:
            self.surface.blit(self._font.render(line, True, color), (MARGIN, top))
            top += self._font.get_linesize()
        return top


def play(env: EpisodeVectorEnv, window: Window, seeds: Iterator[int], record: Callable[[Recording], None]) -> int:
    """Plays episodes until Escape.

    Args:
        env: one environment.
        window: shows it, and gives the keys.
        seeds: of the episodes.
        record: is given every finished one.

    Returns:
        How many were finished.
    """
    seed, count = next(seeds), 0
    while True:
        observations, ended = env.reset([seed]), False
        actions: list[int] = []
        refused = ""
        while not ended:
            window.show(observations, f"{refused}{_score(env)}\nEscape: end")
            key = window.wait()
            if key is None:
                return count
            if key not in window.keys:
                continue
            action, masks = window.keys[key], env.action_masks
            refused = "" if masks is None or masks[0, action] else f"{env.action_names[action]} is not allowed now\n"
            if refused:
                continue
            actions.append(action)
            result = env.step(np.array(actions[-1:]))
            observations, ended = result.observations, bool(result.terminated[0] | result.truncated[0])
        record(Recording(seed, tuple(actions), "the window"))
        count += 1
        how = {1: "success", 0: "no success"}.get(int(result.success[0]), "ended")
        keys = "Enter: next, Backspace: again, Escape: end"
        window.show(observations, f"{how}, {_score(env)}, recorded\n{keys}")
        while (key := window.wait()) not in (*window.next_keys, window.again_key):
            if key is None:
                return count
        seed = seed if key == window.again_key else next(seeds)


def _score(env: EpisodeVectorEnv) -> str:
    return f"return {env.episode_returns[0]:.4g} after {env.episode_lengths[0]} steps"


def main() -> int:
    """Runs one sitting; returns the exit code."""
    command = read_line()
    played, output = command.environment, str(command.run.output)
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"--output {output!r} is a folder: expected a file, such as play.jsonl.")
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(above, os.W_OK):
        raise UsageError(f"{str(above)!r} cannot be written to: give another --output.")
    show("recording", f"{played.env}, to {output}")
    with contextlib.closing(make_vector_env(played, 1, command.run.seed)) as env:
        show("episodes", env.limit_from)
        unseeded = ignored_seeds_of(env)
        if unseeded is not None:
            print(f"warning: {unseeded}, so collect.py cannot play this recording again", file=sys.stderr)
        known = (played.env, env.action_names, played.made_with)
        before = read_recordings(output, *known) if path.exists() and path.stat().st_size else []
        played_seeds = {recording.seed for recording in before}
        seeds = (episode_seed(command.run.seed, TRAINING, 0, number) for number in itertools.count())
        with contextlib.closing(Window(env)) as window:
            count = play(
                env,
                window,
                (seed for seed in seeds if seed not in played_seeds),
                lambda recording: append_recording(output, recording, *known),
            )
    print(f"{count:,} episodes added to {output}, which has {len(before) + count:,}")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> PlayCommand:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no output.
    """
    command = parse(PlayCommand, "Records a person's play in a window.", arguments)
    if not command.run.output:
        raise UsageError("--output is missing: give the file of the recording, such as play.jsonl.")
    return command


def _pygame() -> Any:
    """The package, with its screen and fonts ready.

    Raises:
        UsageError: it is not installed, or there is no screen.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import pygame
    except ImportError as error:
        raise UsageError('A window needs pygame-ce, which is not installed: pip install "manako[toy]".') from error
    try:
        pygame.display.init()
    except pygame.error as error:
        raise UsageError(f"There is no screen for a window ({error}): start it on a desktop.") from error
    if pygame.display.get_driver() == "dummy" and not SCREEN_GIVEN:
        raise UsageError("There is no screen for a window (DISPLAY is not set): start it on a desktop.")
    pygame.font.init()
    return pygame


if __name__ == "__main__":
    run_main(main)
