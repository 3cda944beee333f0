"""Feature cache: warmup."""
