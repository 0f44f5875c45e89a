#!/usr/bin/env bash
# A conversion in Intel's Gaudi container, one rank for each card:
#
#   launch/gaudi-docker.sh megatron-to-hf --load-path /ckpts/llama --save-path /out/llama-hf [FLAG...]
#
#   HABANA_VISIBLE_DEVICES   cards to use, such as 0,1,2,3 (default: all)
#   RANKS                    how many ranks, at most one for each card (default: the cards that the container sees)
#   MOUNTS                   directories that the container sees under the same names (default: "/ckpts /out")
#   IMAGE                    Intel's image; its driver version must be the machine's
#   DOCKER                   the command (default: docker)

set -euo pipefail

repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
image=${IMAGE:-vault.habana.ai/gaudi-docker/1.22.0/ubuntu22.04/habanalabs/pytorch-installer-2.7.1:latest}

options=(
    --rm --runtime=habana --net=host --ipc=host --cap-add=sys_nice
    --ulimit memlock=-1 # buffers are pinned
    --env "HABANA_VISIBLE_DEVICES=${HABANA_VISIBLE_DEVICES:-all}"
    --env OMPI_MCA_btl_vader_single_copy_mechanism=none
    --volume "$repository:/dist_convert:ro"
)
for name in RANKS PT_HPU_LAZY_MODE HF_TOKEN; do
    [[ -z ${!name:-} ]] || options+=(--env "$name")
done
read -r -a mounts <<<"${MOUNTS:-/ckpts /out}"
for directory in "${mounts[@]}"; do
    options+=(--volume "$directory:$directory")
done

# The packages that the image lacks are installed from a copy, as the repository is read-only; torch stays Intel's.
# shellcheck disable=SC2016 # "$@" is that of the container's shell
exec "${DOCKER:-docker}" run "${options[@]}" "$image" bash -c '
    set -euo pipefail
    cp -r /dist_convert /tmp/dist_convert
    pip install --quiet --root-user-action ignore /tmp/dist_convert
    exec /dist_convert/launch/local.sh "$@" --device hpu' launch "$@"
