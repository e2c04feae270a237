"""Models on disk and on the hub -> ours, and back: read.py loads, export.py writes."""
