"""Make data sets: commands that read records, ask a model about them, and write records."""
