"""Held-out evaluation: tasks.py asks, metrics.py scores, run.py puts a model through them."""
