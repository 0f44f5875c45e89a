"""Megatron's `torch` format: a file for each rank, with the rank's own tensors."""
