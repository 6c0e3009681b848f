"""A policy behind a chat API from every backend: the same trajectories, one budget, asked once."""

import dataclasses
import functools
from pathlib import Path

import pytest

from manako.agent.backends import make_rollouts
from manako.agent.workers.cluster import cluster
from manako.agent.workers.settings import WorkerSettings
from manako.envs import EpisodeVectorEnv
from manako.envs.settings import EnvSettings
from manako.experiments.common.building import make_plan
from manako.policies.interface import PolicySpec
from manako.policies.remote.errors import RemoteError
from manako.policies.remote.settings import RemoteSettings
from manako.policies.remote_policy import RemotePolicy
from tests.helpers.chat_server import ChatServer, letters
from tests.helpers.rollout_equality import same_bits

pytest.importorskip("openai", reason="the extra `remote` is not installed")
pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parents[3]
ENVIRONMENT = EnvSettings("manako/GoTo-v0", num_envs=4)


@pytest.fixture(scope="module", autouse=True)
def session():
    with cluster(paths=[str(ROOT), str(ROOT / "tests")], num_cpus=4):
        yield


def answer(body):
    """By letters that depend on the frame, or by a text that depends on the draw."""
    size = len(body["messages"][1]["content"][-1]["image_url"]["url"])
    if "logprobs" in body:
        return letters({letter: -1.0 - (size * number) % 7 for number, letter in enumerate("ABCD", 1)})
    return ("up", "down", "left", "right", "well")[(size + body["seed"]) % 5]


def rollouts(backend, server, folder, **settings):
    env = EpisodeVectorEnv(ENVIRONMENT.env, 1)
    options = {"remote_model": "m", "remote_cache": str(folder), **settings}
    spec, remote = PolicySpec(env.action_names, env.frame_shape), RemoteSettings(server.url, **options)
    policy = RemotePolicy(spec, remote, illegal_action="up")
    copy = functools.partial(RemotePolicy, spec, remote, policy.ledger.file, "up")
    workers = WorkerSettings() if backend == "local" else WorkerSettings(rollout_backend=backend, num_workers=2)
    environment = dataclasses.replace(ENVIRONMENT)
    plan = make_plan(environment, workers, policy, copy, num_steps=6, num_iterations=2, seed=3, record=True)
    return make_rollouts(backend, plan), policy


@pytest.mark.parametrize("answers", ["auto", "text"])
def test_all_backends_play_the_same(tmp_path, answers):
    with ChatServer(answer) as server:
        played = {}
        for backend in ("local", "ray-env", "ray-replica"):
            source, policy = rollouts(backend, server, tmp_path / backend, remote_answers=answers)
            played[backend] = [source.collect(0), source.collect(1)]
            source.close()
            account = policy.ledger.read()
            assert account["requests"] + account["cached"] == 48 == 2 * 6 * 4
            assert ("unparsed" in played[backend][0].outcomes) == (answers == "text")
        for backend in ("ray-env", "ray-replica"):
            for one, other in zip(played["local"], played[backend], strict=True):
                same_bits(one, other)


def test_workers_keep_one_budget_and_say_when_it_is_used_up(tmp_path):
    with ChatServer(answer) as server:
        source, policy = rollouts("ray-replica", server, tmp_path, remote_answers="text", remote_requests=9)
        with pytest.raises(RemoteError, match="--remote_requests 9 is used up"):
            source.collect(0)
        source.close()
        assert len(server.bodies) == policy.ledger.read()["requests"] == 9
