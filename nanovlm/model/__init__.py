"""Batch -> logits: vision.py, projector.py, decoder.py (attention.py, kv_cache.py), put together in vlm.py."""
