"""Carries a plan out: buffers, collectives, and the pipeline from file to file."""
