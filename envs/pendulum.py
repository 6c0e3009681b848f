"""Swing a pole up and hold it: Gymnasium's Pendulum, drawn small and with its speed, which one frame does not show.

Physics, rewards and limit are those of `Pendulum-v1`: a torque (1,) from -2 to 2, at most 0 a step, 200 steps; a return
is about -1,200 by chance and -150 at its best. The frame holds the pole, 0 upwards, and below it a bar from the middle
to the side that it turns to, as long as it is fast. Drawn without pygame. Its expert pumps energy into the pole until
it can fall upright, and holds it there.
"""

import math
from typing import Any

import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv

SIDE, BAR = 48, 8  # pixels: of the pole's square, and the height of the bar
LENGTH, WIDTH = 20, 2.5  # of the pole
POLE, LEFT, RIGHT = (230, 60, 60), (70, 130, 255), (70, 220, 120)
FALLS_UPRIGHT = 0.35  # rad; nearer to the top it is held
STIFFNESS, DAMPING, PUMP = 12.0, 3.0, 1.0


class Pendulum(PendulumEnv):
    """Torque on a pole that is to stand upright."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    action_names = ("torque",)
    instruction = "swing the pole up and hold it upright"

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        across, down = np.meshgrid(np.arange(SIDE) - SIDE / 2 + 0.5, np.arange(SIDE) - SIDE / 2 + 0.5)
        self._across, self._up = across, -down

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts anywhere, at any slow speed."""
        return super().reset(seed=seed, options=options)

    def render(self) -> np.ndarray:
        """Draws the pole and its speed, (56, 48, 3) uint8."""
        angle, speed = self.state  # 0 is upright, a positive one leans to the left
        along = self._up * math.cos(angle) - self._across * math.sin(angle)  # (SIDE, SIDE)
        beside = self._up * math.sin(angle) + self._across * math.cos(angle)
        away = np.hypot(beside, along - np.clip(along, 0, LENGTH))  # from the pole
        shade = np.clip(WIDTH - away, 0, 1)[..., None]
        frame = np.zeros((SIDE + BAR, SIDE, 3), np.uint8)
        frame[:SIDE] = (shade * np.array(POLE)).astype(np.uint8)
        share = np.clip(SIDE / 2 * abs(speed) / self.max_speed - np.arange(SIDE // 2), 0, 1)  # from the middle outwards
        bar = (share[:, None] * np.array(LEFT if speed > 0 else RIGHT)).astype(np.uint8)
        if speed > 0:
            frame[SIDE + 2 :, : SIDE // 2] = bar[::-1]
        else:
            frame[SIDE + 2 :, SIDE // 2 :] = bar
        return frame

    def expert_action(self) -> np.ndarray:
        """Returns the torque of a scripted expert."""
        angle, speed = self.state
        angle = (angle + math.pi) % (2 * math.pi) - math.pi
        if abs(angle) < FALLS_UPRIGHT + 0.1 * abs(speed) and angle * speed <= 0.5:
            torque = -STIFFNESS * angle - DAMPING * speed
        else:
            energy = speed**2 / 6 + 5 * math.cos(angle) - 5  # 0 where it just comes to stand upright
            torque = -PUMP * energy * (1 if speed >= 0 else -1)
        return np.clip(np.array([torque], np.float32), -self.max_torque, self.max_torque)
