#!/usr/bin/env bash
# The whole path on a real model: SmolLM2-135M-Instruct is converted to Megatron at TP3 x PP2 under torchrun, converted
# back to Hugging Face, compared with the original bit for bit, and asked a question.
#
#   launch/demo.sh [FLAG...]    flags are handed on to the conversion under torchrun, such as --device hpu
#
# From a fresh clone it sets up everything by itself (see setup.sh): minutes once, then less than one.

# shellcheck disable=SC2034 # setup.sh reads it
extra=demo
# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

work=.cache/demo
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1

heading "Input: a real model, out of a Python package"
TQDM_DISABLE=1 show python launch/demo_inputs.py "$work"

heading "Hugging Face to Megatron at TP3 x PP2, with two ranks"
show dist-convert convert "$work/smollm2-hf" "$work/smollm2-megatron" --to torch --tp 3 --pp 2 --ranks 2 --overwrite

heading "What is in the checkpoint"
show dist-convert inspect "$work/smollm2-megatron"

heading "Back under torchrun, with three ranks; each reads its own shards, and they gather"
show env RANKS=3 launch/local.sh convert "$work/smollm2-megatron" "$work/converted" \
    --to huggingface --placement gather --device cpu --overwrite "$@"

heading "Compare the result with the original, bit for bit"
show dist-convert verify "$work/smollm2-hf" "$work/converted"

heading "Ask the converted model, with plain transformers"
TQDM_DISABLE=1 show python launch/demo_check.py "$work/converted"

printf '\nresults are in %s; try next:\n' "$work"
printf '  . %q/bin/activate\n' "$venv"
printf '  dist-convert convert %s /tmp/smollm2-hf --to huggingface --ranks 2\n' "$work/smollm2-megatron"
printf '  dist-convert help convert\n'
