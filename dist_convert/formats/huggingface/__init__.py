"""Hugging Face directories: names, configs, and what else lies beside the weights."""
