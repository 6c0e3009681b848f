"""Rollout workers on Ray: what runs inside one, a supervisor that keeps them alive, and the two backends that use it.

    ray-env       workers hold environments only; the learner's policy acts for all of them (RayVectorEnv)
    ray-replica   workers hold environments and a copy of the policy, and play whole rollouts (ReplicaRollouts)

Both give the trajectories of the local backend for the same seed and weights, with any number of workers, and through
any fault: a worker that was killed, hangs or raises is replaced, and its segment of the slots is played again from its
last known state, by the new worker or by another one that is free. This is the one folder that imports ray, and only
inside functions.
"""
