"""Translates what is not a tensor: args, configs, tokenizers, capacity bins."""
