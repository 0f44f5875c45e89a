"""Megatron-Core's `torch_dist`: Megatron's layout at tensor parallel size 1, cut into boxes."""
