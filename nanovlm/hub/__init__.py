"""Models on disk and on the hub -> ours, and back: read.py loads whatever has a name, export.py writes."""
