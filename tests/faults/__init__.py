"""Disks that fail: every fault is a real one, and every one ends in one clear error and can be gone on from."""
