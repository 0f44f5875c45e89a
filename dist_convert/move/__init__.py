"""Carries a conversion out: the whole of it in `convert.py`, the pipeline from file to file, and what is reported."""
