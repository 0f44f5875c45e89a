"""Compares two checkpoints tensor by tensor; it reads both by itself and uses nothing of a conversion's own plan."""
