"""Distributed checkpoints of PyTorch (DCP): their container, which `torch_dist` has too, and plain ones of FSDP2."""
