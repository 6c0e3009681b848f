"""Rollout workers on a real Ray: the same trajectories from every backend, and through every fault."""

import contextlib
import functools
import logging
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from manako.agent.backends import make_rollouts
from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import ScriptedPlayer
from manako.agent.data.trajectories import to_dataset
from manako.agent.errors import TrainingError, WorkersError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.callbacks import CheckpointCallback
from manako.agent.workers.cluster import check_address, cluster
from manako.agent.workers.env_worker import EnvWorker, SegmentNotHere
from manako.agent.workers.options import WorkerOptions
from manako.agent.workers.ray_env import CentralRollouts, RayVectorEnv
from manako.agent.workers.ray_replica import ReplicaRollouts
from manako.agent.workers.replica_worker import ReplicaSettings, ReplicaWorker, unpack
from manako.agent.workers.segments import Segment, segments_of
from manako.agent.workers.settings import WorkerSettings
from manako.agent.workers.supervisor import Supervisor
from manako.agent.workers.weights import as_arrays, load_trainable, trainable_tensors
from manako.envs.settings import EnvSettings
from manako.experiments.common.building import make_plan, policy_of_run
from manako.experiments.common.environments import make_segment
from manako.policies import PolicySource
from manako.spaces import TextCodes
from tests.helpers import ray_segments
from tests.helpers.families import FAMILIES
from tests.helpers.families.more import MORE
from tests.helpers.ray_segments import (
    NUM_STEPS,
    Host,
    env_maker,
    gates_maker,
    local,
    make_folder_policy,
    make_policy,
    make_policy_for,
    replica_settings,
    texts_maker,
    vectors_maker,
)
from tests.helpers.rollout_equality import breaks_of_drift, close_enough, same_bits
from tests.helpers.small_runs import difference, ppo_config, weights

ROOT = Path(__file__).parents[3]
NUM_ENVS = 4
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module", autouse=True)
def session():
    """A Ray of this test file, which ends with it; two workers' worth of places, however many cores there are."""
    with cluster(paths=[str(ROOT), str(ROOT / "tests")], num_cpus=4):
        yield


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def options(num_workers=2, **given):
    return WorkerOptions(
        **{"num_workers": num_workers, "cpus": 0.5, "timeout": 60.0, "placement_timeout": 60.0, **given}
    )


@contextlib.contextmanager
def replica(
    policy, num_workers=2, batch_size=2, maker=None, num_iterations=100, asynchronous=False, given=None, **source
):
    rollouts = ReplicaRollouts(
        replica_settings(maker, batch_size, **source),
        policy,
        NUM_ENVS,
        num_iterations,
        options(num_workers, **(given or {})),
        asynchronous,
    )
    with contextlib.closing(rollouts):
        yield rollouts


@contextlib.contextmanager
def central(policy, num_workers=2, batch_size=2, maker=None, **given):
    env = RayVectorEnv(maker or env_maker(), NUM_ENVS, policy.spec.action_names, options(num_workers, **given))
    with contextlib.closing(
        CentralRollouts(env, policy, NUM_STEPS, seed=3, batch_size=batch_size, record=True)
    ) as rollouts:
        yield rollouts


PAST = {"frames": 3, "history": 2}
WRITING = {"action_format": "text", "answer_template": "plain", "answer_tokens": 4, "history": 1}
BACKENDS = {"ray-env": central, "ray-replica": replica}
backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
# where the supervisor does the same for both, and starting copies of the policy takes the time
LONG = [pytest.mark.slow, pytest.mark.fault]
mostly_env = pytest.mark.parametrize(
    "backend", [central, pytest.param(replica, marks=LONG)], ids=["ray-env", "ray-replica"]
)


def supervisor_of(rollouts):
    return rollouts.supervisor if isinstance(rollouts, ReplicaRollouts) else rollouts.env.supervisor


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
@backends
def test_every_field_of_every_rollout_is_the_local_one(backend, num_workers, policy):
    plain = local(NUM_ENVS, policy, batch_size=2)
    with backend(policy, num_workers) as rollouts:
        for iteration in range(3):
            same_bits(rollouts.collect(iteration), plain.collect(iteration))
        theirs, mine = rollouts.state_dict(), plain.state_dict()
        assert {**theirs, "instructions": 0} == {**mine, "instructions": 0}
        assert set(theirs["instructions"]) == set(mine["instructions"])


@backends
@pytest.mark.parametrize("source", [pytest.param(PAST, marks=pytest.mark.fault), WRITING], ids=["past", "writing"])
def test_what_a_policy_is_told_and_writes_is_the_local_one(backend, source):
    """Frames and turns before the present, turns without an action, also where a lost segment was played again."""
    policy = make_policy(**source)
    plain = local(NUM_ENVS, policy, batch_size=2)
    with backend(policy, 2, **(source if backend is replica else {})) as rollouts:
        for iteration in range(3):
            if iteration == 2:
                kill(supervisor_of(rollouts).pids()[1])
            same_bits(rollouts.collect(iteration), plain.collect(iteration))


@pytest.mark.parametrize(
    "maker",
    [gates_maker(), vectors_maker(), pytest.param(texts_maker(), marks=pytest.mark.fault)],
    ids=["masks", "vectors", "texts"],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_obeys_action_masks_and_plays_vectors(name, maker):
    """Gates breaks at what is not allowed; a state that is taken up is compared with its masks."""
    policy = make_policy_for(maker)
    plain = local(NUM_ENVS, policy, batch_size=2, maker=maker)
    if name == "ray-replica":
        made = replace(replica_settings(maker, 2), make_policy=functools.partial(make_policy_for, maker))
        rollouts = ReplicaRollouts(made, policy, NUM_ENVS, 100, options())
    else:
        env = RayVectorEnv(maker, NUM_ENVS, policy.spec.action_names, options())
        rollouts = CentralRollouts(env, policy, NUM_STEPS, seed=3, batch_size=2, record=True)
    with contextlib.closing(rollouts):
        ends = []
        for iteration in range(4):
            mine, theirs = plain.collect(iteration), rollouts.collect(iteration)
            masks = mine.inputs.columns.get("action_mask")
            assert masks is None if policy.spec.vectors else masks.shape == (NUM_ENVS * NUM_STEPS, 4)
            same_bits(theirs, mine)
            ends.append((bool(mine.terminated.any()), len(mine.bootstrap_at) > 0))
        if not isinstance(policy.spec.vectors, TextCodes):  # most of whose answers name no action at first
            assert any(cut for _, cut in ends) and any(won for won, _ in ends) == (policy.spec.vectors is None)
        rollouts.load_state_dict(plain.state_dict(), {})
        same_bits(rollouts.collect(4), plain.collect(4))


@pytest.mark.slow
@backends
def test_without_a_common_batch_size_only_rounding_differs(backend, policy):
    plain = local(NUM_ENVS, policy)
    with backend(policy, 2, batch_size=None) as rollouts:
        for iteration in range(2):
            close_enough(rollouts.collect(iteration), plain.collect(iteration))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_records_the_same_trajectories(name):
    """Frames, the expert's word and all; the player is an expert that is wrong at times."""
    environment, source = EnvSettings(num_envs=4), PolicySource()
    policy, _ = policy_of_run(environment, source, seed=0, torch_threads=1)
    make_player = functools.partial(ScriptedPlayer, policy.spec, 0.3)
    data = []
    for backend in (name, "local"):
        workers = WorkerSettings(backend, num_workers=2, worker_cpus=0.5, rollout_batch_size=2)
        given = {"num_steps": 12, "num_iterations": 10, "seed": 0, "record": True, "ask_expert": True}
        plan = make_plan(environment, workers, make_player(), make_player, **given)
        with contextlib.closing(make_rollouts(backend, plan)) as rollouts:
            data.append(to_dataset([rollouts.collect(0), rollouts.collect(1)], policy, environment.env, "expert", {}))
    theirs, mine = data
    assert len(mine) > 60 and min(mine["expert_action"]) >= 0
    for column in mine.column_names:
        if column != "image":
            assert theirs[column] == mine[column], column
    assert all(a.tobytes() == b.tobytes() for a, b in zip(theirs["image"], mine["image"], strict=True))


@backends
@pytest.mark.parametrize("past", [{}, PAST], ids=["present", "past"])
def test_a_state_goes_from_any_backend_to_any_other(backend, past, policy):
    policy = make_policy(**past) if past else policy
    plain = local(NUM_ENVS, policy, batch_size=1)
    first = plain.collect(0)
    with backend(policy, 2, batch_size=1, **(past if backend is replica else {})) as rollouts:
        rollouts.load_state_dict(plain.state_dict(), {})
        second = rollouts.collect(1)
        state = rollouts.state_dict()
    same_bits(second, plain.collect(1))
    again = local(NUM_ENVS, policy, batch_size=1)
    again.load_state_dict(state)
    same_bits(again.collect(2), plain.collect(2))
    assert not np.array_equal(first.record.to_env, second.record.to_env)


@pytest.mark.parametrize(
    ("trainable", "dtype"),
    [("lora", "bfloat16"), *(pytest.param(kind, "float32", marks=pytest.mark.slow) for kind in ("full", "adapter"))],
)
def test_exactly_the_trainable_bytes_are_broadcast_and_they_arrive(trainable, dtype):
    policy = make_policy(trainable, dtype)
    plain = local(NUM_ENVS, policy, batch_size=2)
    with replica(policy, 1, trainable=trainable, dtype=dtype) as rollouts:
        rollouts.collect(0), plain.collect(0)
        with torch.no_grad():
            for parameter in trainable_tensors(policy).values():
                parameter += 0.02 * torch.ones_like(parameter)
        same_bits(rollouts.collect(1), plain.collect(1))
        learning = [p for p in policy.parameters() if p.requires_grad]
        assert rollouts.metrics()["broadcast_bytes"] == sum(p.numel() * p.element_size() for p in learning)
    assert trainable == "full" or len(learning) < len(list(policy.parameters()))


def test_weights_that_are_not_the_policys_are_refused(policy):
    arrays = as_arrays(trainable_tensors(policy))
    arrays["strange"] = arrays.pop("value_head.out.bias")
    with pytest.raises(TrainingError, match="2 differ, such as 'strange'"):
        load_trainable(policy, arrays)


def test_a_fragment_of_another_version_is_never_used(policy, monkeypatch):
    monkeypatch.setattr("manako.agent.workers.ray_replica.ReplicaWorker", ray_segments.Outdated)
    with replica(policy, 1) as rollouts, pytest.raises(TrainingError, match=r"versions \{-1\} came, expected 0"):
        rollouts.collect(0)


def test_frozen_weights_that_differ_are_an_error():
    policy = make_policy("adapter")
    with torch.no_grad():
        next(p for p in policy.parameters() if not p.requires_grad).add_(1)
    with pytest.raises(TrainingError, match="other frozen weights"), replica(policy, 1, trainable="adapter"):
        pass


def test_workers_with_environments_only_have_no_torch(session):
    import ray

    maker = functools.partial(make_segment, EnvSettings(), 0, 1)  # as in a run
    worker = ray.remote(ray_segments.Curious).options(num_cpus=0.5).remote(maker)
    assert ray.get(worker.imported.remote("gymnasium")) and not ray.get(worker.imported.remote("torch"))
    ray.kill(worker)


# ---- faults ----------------------------------------------------------------------------------------------------------


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@backends
def test_a_killed_worker_is_replaced_and_nothing_changes(backend, policy, caplog):
    plain = local(NUM_ENVS, policy, batch_size=2)
    with caplog.at_level(logging.WARNING), backend(policy) as rollouts:
        for iteration in range(5):  # the second death may be seen one rollout later
            supervisor = supervisor_of(rollouts)
            if iteration == 1:  # between two rollouts
                kill(supervisor.pids()[0])
            if iteration == 2:  # in the middle of one
                threading.Timer(0.02, kill, supervisor.pids()[1:]).start()
            start = time.monotonic()
            same_bits(rollouts.collect(iteration), plain.collect(iteration))
            assert time.monotonic() - start < 20
        assert supervisor.restarts == 2
    assert "worker 0 is lost" in caplog.text


@mostly_env
@pytest.mark.parametrize("kind", ["raise", pytest.param("exit", marks=LONG), pytest.param("hang", marks=LONG)])
def test_an_environment_that_breaks_once_costs_its_fragment_and_nothing_else(backend, kind, policy, tmp_path):
    maker = env_maker("tests/Faulty-v0", folder=str(tmp_path))
    plain = local(NUM_ENVS, policy, batch_size=2, maker=maker)
    expected = [plain.collect(iteration) for iteration in range(3)]
    given = {"timeout": 12.0 if kind == "hang" else 60.0}  # the first call of a worker imports torch
    with backend(policy, 2, maker=maker, **({"given": given} if backend is replica else given)) as rollouts:
        for iteration in range(3):
            if iteration == 1:
                (tmp_path / kind).touch()
            start = time.monotonic()
            same_bits(rollouts.collect(iteration), expected[iteration])
            assert time.monotonic() - start < 20
        assert supervisor_of(rollouts).restarts == (kind != "raise")
    assert not (tmp_path / kind).exists()


@mostly_env
def test_an_environment_that_always_breaks_ends_the_run_with_its_place(backend, policy, tmp_path):
    maker = env_maker("tests/Faulty-v0", folder=str(tmp_path))
    with backend(policy, 2, maker=maker) as rollouts:
        rollouts.collect(0)
        (tmp_path / "raise").write_text("always")
        start = time.monotonic()
        with pytest.raises(WorkersError) as caught:
            rollouts.collect(1)
        assert time.monotonic() - start < 30
    message = str(caught.value)
    assert "\n" not in message and "failed 3 times in a row" in message and "the simulator broke" in message
    for part in ("tests/Faulty-v0", "episode seed ", "step ", "action '"):
        assert part in message


@mostly_env
def test_a_constructor_that_fails_is_told_before_the_run(backend, policy, tmp_path):
    (tmp_path / "make").write_text("always")
    maker = env_maker("tests/Faulty-v0", folder=str(tmp_path))
    with pytest.raises(WorkersError, match="the simulator did not start"), backend(policy, 2, maker=maker) as rollouts:
        rollouts.collect(0)


@contextlib.contextmanager
def drifting(backend, folder, seeded=False, **given):
    """Rollouts of chance in Drift, whose file `exit` kills a worker in the middle of an episode; 2 workers, 4 slots."""
    maker, player = env_maker("tests/Drift-v0", folder=str(folder), seeded=seeded), ray_segments.random_player()
    if backend == "ray-env":
        env = RayVectorEnv(maker, NUM_ENVS, player.spec.action_names, options(2, **given))
        rollouts = CentralRollouts(env, player, DRIFT_STEPS, seed=3, record=True)
    else:
        settings = ReplicaSettings(maker, ray_segments.random_player, DRIFT_STEPS, seed=3, record=True)
        rollouts = ReplicaRollouts(settings, player, NUM_ENVS, 100, options(2, **given))
    with contextlib.closing(rollouts):
        yield rollouts


DRIFT_STEPS = 7


@pytest.mark.parametrize("backend", ["ray-env", pytest.param("ray-replica", marks=pytest.mark.slow)])
def test_what_the_learner_saw_of_an_environment_that_does_not_replay_hangs_together(backend, tmp_path, caplog):
    """Workers die three times: nobody sees a column jump, and slots that were lost start new episodes, counted.

    The first time there is no saved state but the start, which replays: what followed it does not.
    """
    with caplog.at_level(logging.WARNING), drifting(backend, tmp_path) as rollouts:
        played = []
        for iteration in range(8):
            if iteration in (0, 2, 5):
                (tmp_path / "exit").touch()
            played.append(rollouts.collect(iteration))
        assert supervisor_of(rollouts).restarts == 3 and not (tmp_path / "exit").exists()
        given_up = rollouts.metrics()["episodes_given_up"]
    anew = breaks_of_drift(played)
    assert len(anew) == given_up > 0 and {slot for _, slot in anew} <= set(range(NUM_ENVS))
    assert "running episodes did not play again" in caplog.text


@pytest.mark.parametrize("backend", ["ray-env", pytest.param("ray-replica", marks=pytest.mark.slow)])
def test_what_replays_goes_on_though_a_worker_dies(backend, tmp_path):
    """The same with chance from the seed: no episode is given up, and the frames are those of an unbroken run."""
    with drifting(backend, tmp_path, seeded=True) as rollouts:
        played = []
        for iteration in range(4):
            if iteration == 2:
                (tmp_path / "exit").touch()
            played.append(rollouts.collect(iteration))
        assert rollouts.metrics()["episodes_given_up"] == 0 and supervisor_of(rollouts).restarts == 1
    maker = env_maker("tests/Drift-v0", folder=str(tmp_path), seeded=True)
    plain = RolloutCollector(maker(0, NUM_ENVS), ray_segments.random_player(), DRIFT_STEPS, seed=3, record=True)
    for iteration, rollout in enumerate(played):
        assert np.array_equal(rollout.record.images, plain.collect(iteration).record.images)
    assert breaks_of_drift(played) == []


@mostly_env
def test_a_saved_state_that_does_not_replay_is_started_anew_by_workers(backend, tmp_path):
    name = {central: "ray-env", replica: "ray-replica"}[backend]
    with drifting(name, tmp_path) as rollouts:  # so many steps that no chance is the same twice
        before = [rollouts.collect(number) for number in range(2)][-1]
        state = rollouts.state_dict()
    with drifting(name, tmp_path) as again:
        again.load_state_dict(state, {})
        after = again.collect(2)
        assert again.metrics()["episodes_given_up"] == NUM_ENVS
    assert (after.record.steps[0] == 0).all() and (before.record.seeds[-1] == after.record.seeds[0]).all()


def test_workers_that_are_lost_again_and_again_end_a_run_that_does_not_replay(tmp_path):
    with drifting("ray-env", tmp_path) as rollouts:
        rollouts.collect(0)
        step, steps = rollouts.env.step, []

        def lose(actions):
            steps.append(len(steps))
            if len(steps) % 2 == 0:  # at the second step of each attempt
                kill(rollouts.env.supervisor.pids()[0])
            return step(actions)

        rollouts.env.step = lose
        with pytest.raises(WorkersError, match="lost in 3 attempts at one rollout, and their environments do not rep"):
            rollouts.collect(1)


def nowhere():
    """Workers that no node has a place for."""
    import ray

    return ray.remote(ReplicaWorker).options(num_cpus=1000, max_restarts=0, max_task_retries=0)


def test_a_free_worker_takes_over_while_another_finds_no_place(policy):
    """Replacements that never start: the one that is left plays everything."""
    plain = local(NUM_ENVS, policy, batch_size=2)
    with replica(policy) as rollouts:
        same_bits(rollouts.collect(0), plain.collect(0))
        supervisor = rollouts.supervisor
        kill(supervisor.pids()[1])
        supervisor.actor_class = nowhere()
        for iteration in range(1, 4):
            same_bits(rollouts.collect(iteration), plain.collect(iteration))
        assert supervisor.restarts == 1


@pytest.mark.parametrize(
    "placement", [6.0, pytest.param(WorkerOptions.placement_timeout, marks=[pytest.mark.slow, pytest.mark.fault])]
)
def test_all_workers_dead_ends_the_run(placement, policy):
    """In 30 s also by default, where a worker may take 60 s to find its place at the start."""
    with replica(policy, given={"placement_timeout": placement}) as rollouts:
        rollouts.collect(0)
        supervisor = rollouts.supervisor
        pids = supervisor.pids()
        supervisor.actor_class = nowhere()
        for pid in pids:
            kill(pid)
        start = time.monotonic()
        with pytest.raises(
            WorkersError, match=r"All 2 rollout workers are dead.*asked for 2 x .*the cluster has 4 CPU"
        ):
            rollouts.collect(1)
        assert time.monotonic() - start < 30


def test_a_worker_that_cannot_start_is_not_tried_for_ever():
    with pytest.raises(WorkersError, match=r"failed to start 3 times in a row \(.*no such device"):
        Supervisor(ray_segments.Unready, (), options(1), 1)


def test_our_own_cluster_has_no_dashboard_and_sends_no_statistics(session):
    from ray._common.usage.usage_lib import usage_stats_enabled
    from ray._private.worker import get_dashboard_url

    assert not get_dashboard_url() and not usage_stats_enabled()


def test_workers_import_the_users_modules_before_ours(session):
    path = os.environ["PYTHONPATH"].split(os.pathsep)
    assert path[-3:] == [str(ROOT), str(ROOT / "tests"), str(ROOT)]  # what was given, then where `manako` lies


def test_a_worker_without_the_segment_says_so():
    worker = EnvWorker(env_maker())
    with pytest.raises(SegmentNotHere):
        worker.step(Segment(0, 2), 3, [0, 0], None, False)


# ---- asynchronous collection -----------------------------------------------------------------------------------------


def nudge(policy, amount):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += amount


def test_asynchronous_rollouts_are_one_version_behind_whatever_the_speed():
    """Each rollout is what the weights of one update earlier play, with a fast learner and with a slow one."""
    policy, older = make_policy(), make_policy()
    plain = local(NUM_ENVS, older, batch_size=2)
    with replica(policy, num_iterations=4, asynchronous=True) as rollouts:
        for iteration in range(4):
            mine = rollouts.collect(iteration)
            assert mine.version == max(0, iteration - 1)
            if iteration >= 2:
                nudge(older, 0.01)
            same_bits(mine, plain.collect(iteration)._replace(version=mine.version))
            time.sleep(0.3 * (iteration % 2))
            nudge(policy, 0.01)
        assert rollouts.launched is None  # none beyond the run's last


@pytest.mark.slow
def test_an_asynchronous_run_is_resumed_with_the_weights_that_were_acting():
    policy = make_policy()
    with replica(policy, num_iterations=4, asynchronous=True) as rollouts:
        for iteration in range(2):
            rollouts.collect(iteration)
            nudge(policy, 0.01)
        state, tensors = rollouts.state_dict(), rollouts.tensors()
        expected = rollouts.collect(2)
    assert tensors and not torch.equal(tensors["value_head.out.weight"], policy.value_head.out.weight)
    with replica(policy, num_iterations=4, asynchronous=True) as again:
        again.load_state_dict(state, tensors)
        same_bits(again.collect(2), expected)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_more_than_the_cluster_has():
    with pytest.raises(
        WorkersError, match=r"Only 0 of 2 .* asked for 2 x \(0.5 CPU, 64 GPU\), and the cluster has 4 CPU"
    ):
        Supervisor(EnvWorker, (env_maker(),), options(2, gpus=64.0, placement_timeout=3.0), 2)


def test_slots_that_cannot_be_divided():
    assert segments_of(6, 3) == [Segment(0, 2), Segment(2, 2), Segment(4, 2)]
    with pytest.raises(TrainingError, match="7 environments cannot be divided among 2 workers"):
        segments_of(7, 2)


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "Nobody answers at --ray_address '127.0.0.1:1'"), ("head", "expected host:port, or auto")],
)
def test_an_address_that_is_none(address, message):
    start = time.monotonic()
    with pytest.raises(WorkersError, match=message):
        check_address(address)
    assert time.monotonic() - start < 10


def test_a_plugin_that_is_missing_on_a_worker(policy):
    def missing(first_slot, num_slots):
        import nowhere_to_be_found  # noqa: F401

    with (
        pytest.raises(WorkersError, match="No module named 'nowhere_to_be_found'"),
        central(policy, maker=missing) as it,
    ):
        it.collect(0)


def test_makers_travel():
    assert functools.partial(env_maker)().func is ray_segments.make_env


# ---- whole trainings -------------------------------------------------------------------------------------------------


def train(rollouts, policy, folder, num_iterations=4, **given):
    """A training of a few updates; the trainer."""
    args = ppo_config(folder, num_iterations=num_iterations, num_steps=NUM_STEPS, minibatch_size=10, **given)
    trainer = PPOTrainer(policy, args, rollouts=rollouts)
    trainer.train()
    return trainer


@backends
def test_a_training_in_workers_learns_the_same_weights(backend, tmp_path):
    mine, theirs = make_policy(), make_policy()
    train(local(NUM_ENVS, mine, batch_size=2), mine, tmp_path / "a")
    with backend(theirs) as rollouts:
        train(rollouts, theirs, tmp_path / "b")
    assert difference(weights(mine), weights(theirs)) == 0
    assert difference(weights(mine), weights(make_policy())) > 1e-4


def test_a_training_whose_environment_is_lost_ends_saved_and_goes_on_bit_for_bit(tmp_path):
    """The failure comes in the third rollout; a local backend goes on from its checkpoint."""
    folder = tmp_path / "faults"
    folder.mkdir()
    maker = env_maker("tests/Faulty-v0", folder=str(folder))
    whole, broken, again = make_policy(), make_policy(), make_policy()
    train(local(NUM_ENVS, whole, batch_size=2, maker=maker), whole, tmp_path / "a")
    with central(broken, maker=maker) as rollouts:
        collect = rollouts.collect

        def until_the_third(iteration):
            if iteration == 2:
                (folder / "raise").write_text("always")
            return collect(iteration)

        rollouts.collect = until_the_third
        args = ppo_config(tmp_path / "b/.staging", num_iterations=4, num_steps=NUM_STEPS, minibatch_size=10)
        trainer = PPOTrainer(broken, args, rollouts=rollouts)
        trainer.add_callback(CheckpointCallback(trainer, tmp_path / "b", every=100))
        trainer.train()
    assert isinstance(trainer.failure, WorkersError) and trainer.iteration == 2
    (folder / "raise").unlink()
    args = ppo_config(tmp_path / "c", num_iterations=4, num_steps=NUM_STEPS, minibatch_size=10)
    trainer = PPOTrainer(again, args, rollouts=local(NUM_ENVS, again, batch_size=2, maker=maker))
    trainer.train(resume_from_checkpoint=str(tmp_path / "b/checkpoints/checkpoint-2"))
    assert trainer.failure is None and difference(weights(whole), weights(again)) == 0


@pytest.mark.slow
def test_an_asynchronous_training_resumes_bit_for_bit_and_logs_its_lag(tmp_path):
    whole, first, second = make_policy(), make_policy(), make_policy()
    with replica(whole, num_iterations=4, asynchronous=True) as rollouts:
        trainer = train(rollouts, whole, tmp_path / "a")
    rows = [row for row in trainer.state.log_history if "iteration" in row]
    assert [row.get("policy_lag", 0) for row in rows] == [0, 1, 1, 1]
    assert all(0 < row["importance"] <= 1 for row in rows[1:]) and all(row["first_ratio_error"] < 1e-4 for row in rows)

    with replica(first, num_iterations=4, asynchronous=True) as rollouts:
        args = ppo_config(tmp_path / "b/.staging", num_iterations=4, num_steps=NUM_STEPS, minibatch_size=10)
        trainer = PPOTrainer(first, args, rollouts=rollouts)
        saver = CheckpointCallback(trainer, tmp_path / "b", every=2, keep=5)
        trainer.add_callback(saver)
        trainer.train()
    with replica(second, num_iterations=4, asynchronous=True) as rollouts:
        args = ppo_config(tmp_path / "c", num_iterations=4, num_steps=NUM_STEPS, minibatch_size=10)
        trainer = PPOTrainer(second, args, rollouts=rollouts)
        trainer.train(resume_from_checkpoint=str(tmp_path / "b/checkpoints/checkpoint-2"))
    assert difference(weights(whole), weights(first)) == difference(weights(whole), weights(second)) == 0


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(900)
@backends
def test_ten_kills_at_random_moments_change_nothing(backend, tmp_path, caplog):
    """10 of 10 trainings finish, with the weights of the unharmed one, and with each worker replaced in 10 s."""
    unharmed = make_policy()
    start = time.monotonic()
    with backend(unharmed) as rollouts:
        begun = time.monotonic()
        train(rollouts, unharmed, tmp_path / "whole", num_iterations=12)
    duration = time.monotonic() - begun
    moments = np.random.default_rng(0).uniform(0, 0.6, 10)  # while there are rollouts to come
    replaced = []
    for number, moment in enumerate(moments):
        policy = make_policy()
        caplog.clear()
        with caplog.at_level(logging.WARNING), backend(policy) as rollouts:
            supervisor = supervisor_of(rollouts)
            pid = supervisor.pids()[number % 2]
            timer = threading.Timer(moment * duration, kill, [pid])
            timer.start()
            trainer = train(rollouts, policy, tmp_path / str(number), num_iterations=12)
            timer.join()
            rows = [row for row in trainer.state.log_history if "iteration" in row]
            assert difference(weights(unharmed), weights(policy)) == 0
            assert supervisor.restarts == 1 and rows[-1]["restarts"] <= 1
            until = time.monotonic() + 10  # the new worker may still be starting
            while supervisor.settle_starts() and time.monotonic() < until:
                time.sleep(0.05)
        found = re.findall(r"replaced after ([\d.]+) s", caplog.text)
        assert len(found) == 1
        replaced += map(float, found)
    print(f"replaced after {min(replaced):.1f} to {max(replaced):.1f} s; {time.monotonic() - start:.0f} s in all")
    assert max(replaced) <= 10


@pytest.fixture(scope="module")
def host(session):
    return ray.remote(Host).remote()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MORE and family != "blip"])
def test_a_replica_of_every_family_plays_what_the_learner_plays(family, host, tmp_path):
    """To the last bit; `blip` does not act."""
    env = env_maker()(0, 2)
    folder = str(FAMILIES[family](tmp_path))
    make = functools.partial(make_folder_policy, folder, env.frame_shape, env.action_names)
    learner = make()
    with torch.no_grad():  # weights that the folder does not hold
        for parameter in trainable_tensors(learner).values():
            parameter.add_(0.01)
    settings = ReplicaSettings(make_segment=env_maker(), make_policy=make, num_steps=2, seed=3)
    theirs = unpack(ray.get(host.play.remote(settings, Segment(0, 2), as_arrays(trainable_tensors(learner)))))
    ours = RolloutCollector(env, learner, 2, 3).collect(0)
    same_bits(ours._replace(version=1), theirs)
    assert ours.logprobs.abs().max() > 0 and ours.values.abs().max() > 0
