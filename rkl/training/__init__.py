"""The trainer: one flat loop, and the run folder that it writes."""
