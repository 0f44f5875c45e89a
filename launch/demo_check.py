"""Ask a Hugging Face model the demo's question with plain transformers: demo_check.py MODEL_DIR

Exits with 1 if the answer is not the expected one. The name alone would be too little: read with a wrong
RoPE base the model babbles, but Paris occurs in it. Runs with transformers 4.49 and 5. It computes in
float32: the two best first tokens are 0.1 apart, which bf16 cannot tell from a tie.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = "What is the capital of France?"
EXPECTED = "The capital of France is Paris"
ANSWER_TOKENS = 16


def main() -> None:
    """Ask and judge."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tokenizer: Any = AutoTokenizer.from_pretrained(sys.argv[1])
    model: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    model.to(torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{QUESTION}\n{text}")
    if EXPECTED not in text:
        sys.exit(f"{sys.argv[1]}: expected an answer with: {EXPECTED}")


if __name__ == "__main__":
    main()
