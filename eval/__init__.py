"""Held-out evaluation: tasks.py asks, metrics.py scores, run.py runs a model on them."""
