"""Prompts -> answers: engine.py, with request.py, blocks.py, features.py and sampling.py; answers.py for a batch."""
