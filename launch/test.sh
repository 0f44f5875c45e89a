#!/usr/bin/env bash
# Formatting, lint, types and tests.
#
#   launch/test.sh [ARGUMENT...]    arguments are handed on to pytest, such as -k name
#
# From a fresh clone it sets up everything by itself, and keeps that outside of it, under the hash of what it is made
# from: environments, real tokenizer files, checkpoints by Megatron-Core. It ends with what it had to make and how long
# it took. What may be set, besides what setup.sh says:
#
#   DIST_CONVERT_TEST_CACHE   where that is (default: ~/.cache/dist_convert-tests); what nobody uses for a week goes

set -euo pipefail
repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export DIST_CONVERT_TEST_CACHE=${DIST_CONVERT_TEST_CACHE:-$HOME/.cache/dist_convert-tests}
mkdir -p "$DIST_CONVERT_TEST_CACHE"
DIST_CONVERT_TEST_CACHE=$(cd -- "$DIST_CONVERT_TEST_CACHE" && pwd)

# A place in the cache: its name, and the hash of what its content is made from.
place() {
    local name=$1
    shift
    printf '%s/%s-%s' "$DIST_CONVERT_TEST_CACHE" "$name" "$(printf '%s\n' "$@" | sha256sum | cut -c 1-16)"
}

# Clones share an environment that holds the packages alone; whoever has one of his own keeps it.
if [[ -z ${DIST_CONVERT_VENV:-} && ! -e $repository/.venv ]]; then
    DIST_CONVERT_VENV=$(place environment "$(command -v "${PYTHON:-python3}")" "$("${PYTHON:-python3}" --version)" \
        "$(cat "$repository/pyproject.toml" "$repository/launch/setup.sh")")
    dependencies_only=yes
fi

# What there is of all that tests need, a name a line.
there() {
    local place
    for place in "$DIST_CONVERT_TEST_CACHE"/*-*/ "$repository"/.venv/; do
        [[ ! -e $place || $place == *environment-* && ! -e $place/installed-for-dist_convert ]] || basename "$place"
    done
}
before=$(there)

say_what_was_made() {
    local code=$? made
    made=$(comm -13 <(sort <<<"$before") <(there | sort) | paste --serial --delimiters ' ')
    if [[ -n $made ]]; then made="cold run, which made $made"; else made="warm run, all was there"; fi
    printf '\n== %s: %d min %d s\n' "$made" $((SECONDS / 60)) $((SECONDS % 60))
    exit "$code"
}
trap say_what_was_made EXIT

# One run makes what is missing, others wait.
exec 9>"$DIST_CONVERT_TEST_CACHE/environments.lock"
flock 9

# shellcheck source=launch/setup.sh
. "$repository/launch/setup.sh"
export PYTHONPATH=$PWD MYPY_CACHE_DIR=$DIST_CONVERT_TEST_CACHE/mypy RUFF_CACHE_DIR=$DIST_CONVERT_TEST_CACHE/ruff

# Fills a directory of the cache by a command, unless it is there.
cached() {
    local directory=$1
    shift
    if [[ ! -e $directory ]]; then
        heading "$(basename "$directory")"
        rm -rf "$directory.partial"
        "$@" "$directory.partial"
        mv "$directory.partial" "$directory"
    fi
    touch "$directory"
}

# A second environment, for what must also work with transformers 4: its own packages, then those of the first.
make_transformers_4() {
    local packages
    python -m venv --without-pip "$1"
    packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
        >"$packages/first-environment.pth"
    show "$1/bin/python" -m pip install --quiet "$transformers_4"
}

# Real tokenizer files, which some Python packages carry; none of the packages' code is used, so nothing they need.
unpack_tokenizers() {
    show python -m pip install --quiet --no-deps --target "$1" "${with_tokenizers[@]}"
}

transformers_4=transformers==4.49.0
with_tokenizers=(llama-models==0.3.0 mistral-common==1.8.5)
second=$(place transformers-4 "$transformers_4" "$venv" "$(cat "$venv/installed-for-dist_convert")")
DIST_CONVERT_REAL_TOKENIZERS=$(place real-tokenizers "${with_tokenizers[@]}")
touch "$venv"
cached "$second" make_transformers_4
cached "$DIST_CONVERT_REAL_TOKENIZERS" unpack_tokenizers
find "$DIST_CONVERT_TEST_CACHE" -mindepth 1 -maxdepth 1 -type d -mtime +7 -exec rm -rf {} +
export DIST_CONVERT_REAL_TOKENIZERS DIST_CONVERT_TRANSFORMERS_4_PYTHON=$second/bin/python
exec 9>&-

heading "Formatting, lint, types"
show ruff format --check
show ruff check
show python -m mypy dist_convert launch
show shellcheck --external-sources launch/*.sh launch/*.sbatch .ci/run
show hadolint Dockerfile Dockerfile.gaudi

heading "Tests"
export HF_HUB_OFFLINE=1
show python -m pytest --numprocesses 2 --dist loadfile "$@"
