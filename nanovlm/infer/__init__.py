"""Batch of prompts -> answers: sampling.py."""
