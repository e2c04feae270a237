"""A model and records -> the same model in few bits: by rounding, or by methods that look at what its layers read."""
