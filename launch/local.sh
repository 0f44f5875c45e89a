#!/usr/bin/env bash
# A conversion on this machine, one rank for each of its accelerators, or some for its cores:
#
#   launch/local.sh megatron-to-hf --load-path /ckpts/llama --save-path /out/llama-hf [FLAG...]
#
#   RANKS    how many ranks (default: accelerators; else half the cores, 8 at most)
#   PYTHON   the Python that dist_convert is installed for (default: python3)

set -euo pipefail

cards() {
    local gaudi nvidia
    gaudi=$(compgen -G '/dev/accel/accel[0-9]*' | wc -l) || true
    nvidia=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    printf '%s\n' "$((gaudi > 0 ? gaudi : nvidia))"
}

ranks=${RANKS:-$(cards)}
if ((ranks == 0)); then
    cores=$(nproc)
    ranks=$((cores < 2 ? 1 : cores > 16 ? 8 : cores / 2))
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the ranks share the cores by themselves
export PYTHONSAFEPATH=1 # from Python 3.11 on nothing is imported from the current directory, which may be a model's
# As --standalone, which waits without end where localhost or this machine's name has no address.
exec "${PYTHON:-python3}" -m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
    --rdzv-id "$$" --nproc-per-node "$ranks" -m dist_convert "$@"
