#!/usr/bin/env bash
# The whole path on a real model: SmolLM2-135M-Instruct is converted to Megatron at TP3 x PP2 under torchrun, converted
# back to Hugging Face, compared with the original bit for bit, and asked a question.
#
#   launch/demo.sh [FLAG...]    flags are handed on to dist_convert, such as --device hpu
#
# From a fresh clone it sets up everything by itself (see setup.sh). Inputs and results are in .cache/demo.

# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

work=.cache/demo
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1

heading "Input: a real model, out of a Python package"
TQDM_DISABLE=1 show python launch/demo_inputs.py "$work"

heading "Hugging Face to Megatron at TP3 x PP2, with two ranks"
show torchrun --standalone --nproc-per-node 2 -m dist_convert hf-to-megatron \
    --load-dir "$work/smollm2-hf" --save-dir "$work/smollm2-megatron" --device cpu --overwrite \
    --target-tensor-parallel-size 3 --target-pipeline-parallel-size 2 "$@"

heading "What is in the checkpoint"
show python -m dist_convert inspect "$work/smollm2-megatron"

heading "Back, with two ranks; each reads what it writes"
show torchrun --standalone --nproc-per-node 2 -m dist_convert megatron-to-hf \
    --load-path "$work/smollm2-megatron" --save-path "$work/converted" --device cpu --overwrite "$@"

heading "Back, with three ranks; each reads its own shards, and they gather"
show torchrun --standalone --nproc-per-node 3 -m dist_convert megatron-to-hf --placement gather \
    --load-path "$work/smollm2-megatron" --save-path "$work/converted-gather" --device cpu --overwrite "$@"

heading "Compare with the original weights"
show python launch/demo_compare.py "$work/smollm2-hf" "$work/converted"
show cmp "$work/converted/model.safetensors" "$work/converted-gather/model.safetensors"
printf 'the two conversions: equal byte for byte\n'

heading "Ask the converted model, with plain transformers"
TQDM_DISABLE=1 show python launch/demo_check.py "$work/converted"
