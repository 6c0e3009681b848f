"""Asking a model behind an OpenAI-compatible chat API: settings, requests, what they may cost, answers that are kept.

`manako.policies.remote_policy` acts with it, `judge` says which of two actions is better.
"""
