"""A remote policy against a real server: `transformers serve` with a tiny LLaVA that has learned to name colours.

What it plays there is held against what the same weights do as a policy of this process.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from manako.agent.report.evaluation import evaluate
from manako.envs import held_out_seeds
from manako.experiments import collect, run_sft
from manako.experiments.common.command_line import run_main
from manako.policies import PolicySource, load_policy
from manako.policies.interface import Draws, PolicySpec
from manako.policies.remote.settings import RemoteSettings
from manako.policies.remote_policy import RemotePolicy
from tests.helpers.families import FAMILIES
from tests.helpers.families.common import edit_json
from tests.helpers.small_runs import color_env

missing = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} of the extra `dev` not installed"),
    pytest.mark.timeout(400),
]
SYSTEM = "Follow the instruction. Actions: {actions}."
ASKED = f"{SYSTEM} Answer with the name of one of them and nothing else."  # as a remote policy asks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA whose template ends an answer, after 94 steps of SFT on ColorMatch (a minute)."""
    place = tmp_path_factory.mktemp("served")
    model = FAMILIES["llava"](place / "llava")
    template = json.loads((model / "chat_template.json").read_text())["chat_template"]
    ends = template.replace(
        "{% generation %}{{ content['text'] + ' ' }}", "{% generation %}{{ content['text'] + '</s>' }}"
    )
    assert ends != template
    edit_json(model, "chat_template.json", chat_template=ends)
    policy = {"policy": str(model), "trainable": "full", "action_format": "trie", "system": ASKED}
    data, out = str(place / "data"), str(place / "sft")
    sft = {"dataset": data, "epochs": 3, "batch_size": 64, "learning_rate": 1e-3}
    environment = {"env": "manako/ColorMatch-v0"}
    config = {"environment": environment, "policy": policy, "sft": sft, "run": {"eval_episodes": 0, "output_dir": out}}
    words = ["--env", "manako/ColorMatch-v0", "--episodes", "2000", "--num_envs", "64", "--output", data]
    with pytest.MonkeyPatch.context() as patch:
        for runner, arguments in ((collect, words), (run_sft, ["--config", json.dumps(config)])):
            patch.setattr(sys, "argv", ["runner.py", *arguments])
            with pytest.raises(SystemExit) as stop:
                run_main(runner.main)
            assert stop.value.code == 0
    return place / "sft/final"


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path_factory.mktemp("log") / "serve.log").open("w")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, *words, "--device", "cpu"], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(600):
            assert server.poll() is None, Path(log.name).read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize("side", [24, 336])
def test_it_plays_as_the_same_weights_do_here(folder, url, tmp_path, side, caplog):
    env = color_env(8)
    local = load_policy(PolicySource(policy=str(folder)), env.action_names, env.frame_shape)
    settings = RemoteSettings(
        url, str(folder), remote_image_side=side, remote_max_tokens=16, remote_cache=str(tmp_path / "cache")
    )
    remote = RemotePolicy(PolicySpec(env.action_names, env.frame_shape, system=SYSTEM), settings)
    seen = env.reset(seeds=held_out_seeds(8))
    said = remote.act(remote.prepare(seen.images, seen.instructions), Draws([]), greedy=True)
    assert np.array_equal(said.to_env, local.act(local.prepare(*seen), Draws([]), greedy=True).to_env)
    assert said.outcomes == ["legal"] * 8 and caplog.text.count("its answers are read as text") == 1
    here, there = (evaluate(policy, color_env(8), held_out_seeds(60)) for policy in (local, remote))
    assert there.episodes == here.episodes and there.summary()["success"] == 1
    assert there.outcomes == {"legal": 60} and not here.outcomes
    account = remote.ledger.read()
    assert account["booked"] == 0 and account["prompt_tokens"] > account["completion_tokens"] > 0
