"""Rollout workers: what runs inside one, and the Ray backends."""
