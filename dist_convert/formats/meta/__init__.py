"""Llamas in Meta's own files: a file for each model parallel rank, and params.json."""
