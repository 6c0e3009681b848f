"""Measurements, each a script with a command."""
