"""The model of many workers against terms chosen so that its results can be told by hand."""

from manako.experiments.benchmarks.throughput import Terms, throughput, throughput_table

TERMS = Terms(env_step=0.01, forward=0.02, update=0.03, call=0.001, sample_bytes=1e6, weight_bytes=2e9, bandwidth=1e9)


def close(actual, expected):
    assert abs(actual - expected) < 1e-9 * max(1, abs(expected))


def test_one_process():
    found = throughput(TERMS, "local", 1, 10, 5)
    close(found["rollout"], 50 * 0.03)
    close(found["update"], 50 * 0.03)
    close(found["steps_per_second"], 50 / 3.0)


def test_environments_in_workers_share_the_learners_forward():
    found = throughput(TERMS, "ray-env", 4, 10, 5)  # 200 samples
    close(found["rollout"], 5 * 10 * 0.01 + 200 * 0.02)
    close(found["gather"], 200 * 1e6 / 1e9 + 5 * 4 * 0.001)
    close(found["steps_per_second"], 200 / (4.5 + 0.22 + 6.0))


def test_replicas_play_by_themselves_and_get_the_weights_in_a_tree():
    found = throughput(TERMS, "ray-replica", 4, 10, 5)
    close(found["rollout"], 50 * 0.03)
    close(found["broadcast"], 2 * 3 + 4 * 0.001)  # 2 s a hop; 4 workers and the learner: 3 hops
    close(found["gather"], 0.2)


def test_prices_follow_the_machines_and_a_faster_learner_helps():
    rows = dict(throughput_table(TERMS, 10, 5, core_price=0.1, learner_price=1.0))
    rate, price = rows[8][1]
    close(price, 1e6 / rate / 3600 * (8 * 0.1 + 1.0))
    assert rows[8][2][0] > rows[8][1][0] and max(rows) == 1000
