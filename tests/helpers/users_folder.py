"""A researcher's folder with an `envs/` and an `agent/` of its own, which are not ours."""

from pathlib import Path

MINE = """
import gymnasium as gym, numpy as np
from envs.names import NAMES


class Corridor(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    action_names, mission = NAMES, "go to the green end"
    observation_space, action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode, self.place, self.end = render_mode, 2, 4

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.end = 2, int(self.np_random.choice([0, 4]))
        return self.place, {}

    def step(self, action):
        self.place = min(max(self.place + 2 * int(action) - 1, 0), 4)
        return self.place, float(self.place == self.end), self.place in (0, 4), False, {}

    def render(self):
        frame = np.zeros((8, 40, 3), np.uint8)
        frame[:, self.end * 8 : self.end * 8 + 8, 1] = frame[:, self.place * 8 : self.place * 8 + 8, 0] = 255
        return frame


gym.register("Corridor-v0", Corridor, max_episode_steps=20)
"""
FILES = {
    "envs/__init__.py": "",
    "envs/names.py": "NAMES = ('left', 'right')\n",
    "envs/mine.py": MINE,
    "envs/with_agent.py": "import envs.mine\nfrom agent import OWNER\n\nassert OWNER == 'the user'\n",
    "agent/__init__.py": "OWNER = 'the user'\n",
}


def fill(folder: Path) -> Path:
    """Writes the files; `envs.mine` registers Corridor-v0, and `envs.with_agent` needs the folder's `agent` too."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder
