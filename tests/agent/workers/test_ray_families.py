"""A replica of every family in a Ray worker plays to the last bit what the learner's own process plays."""

import functools
from pathlib import Path

import pytest
import ray
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.workers.cluster import cluster
from manako.agent.workers.replica_worker import ReplicaSettings, unpack
from manako.agent.workers.segments import Segment
from manako.agent.workers.weights import as_arrays, trainable_tensors
from tests.helpers.families import FAMILIES
from tests.helpers.families.more import MORE
from tests.helpers.ray_segments import Host, env_maker, make_folder_policy
from tests.helpers.rollout_equality import same_bits

ROOT = Path(__file__).parents[3]
LISTED = [family for family in FAMILIES if family not in MORE and family != "blip"]
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def host():
    with cluster(paths=[str(ROOT), str(ROOT / "tests")], num_cpus=2):
        yield ray.remote(Host).remote()


@pytest.mark.parametrize("family", LISTED)
def test_a_replica_of_every_family_plays_what_the_learner_plays(family, host, tmp_path):
    make_env = env_maker("tests/Corridor-v0")
    env = make_env(0, 2)
    make = functools.partial(make_folder_policy, str(FAMILIES[family](tmp_path)), env.frame_shape, env.action_names)
    policy = make()
    with torch.no_grad():  # weights that the folder does not hold
        for parameter in (parameter for parameter in policy.parameters() if parameter.requires_grad):
            parameter.add_(0.01)
    settings = ReplicaSettings(make_segment=make_env, make_policy=make, num_steps=2, seed=3)
    theirs = unpack(ray.get(host.play.remote(settings, Segment(0, 2), as_arrays(trainable_tensors(policy)))))
    ours = RolloutCollector(env, policy, 2, 3).collect(0)
    same_bits(ours._replace(version=1), theirs)
    assert ours.logprobs.abs().max() > 0 and ours.values.abs().max() > 0
