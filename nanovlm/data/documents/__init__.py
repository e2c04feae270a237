"""Drawn documents with questions whose answers are known exactly: see draw.py; `python -m nanovlm.data.documents`."""
