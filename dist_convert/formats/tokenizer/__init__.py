"""The tokenizer of a converted model: found, copied, or built from the file that the model's makers publish."""
