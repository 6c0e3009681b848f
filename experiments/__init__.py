"""Runners: train, evaluate, check an environment, and the configurations they read."""
