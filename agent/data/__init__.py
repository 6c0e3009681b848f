"""Trajectories as data: what was played, who may play, other formats."""
