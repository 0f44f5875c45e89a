"""A stand-in: see the README above."""
