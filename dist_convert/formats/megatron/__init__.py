"""Megatron's checkpoints: grids, names, training arguments, capacity bins."""
