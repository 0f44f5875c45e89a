"""Reads checkpoints: directories, headers without running code, and bytes at offsets."""
