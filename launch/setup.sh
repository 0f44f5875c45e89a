# Sourced by the scripts beside it: enters the repository and its virtual environment, made on the first call.
# Needs Python 3.10 or newer and pip. What may be set:
#
#   PYTHON              the Python that the environment is made of (default: python3)
#   DIST_CONVERT_VENV   where the environment is, or shall be (default: .venv in the repository)
#
# A script that sets `dependencies_only` gets an environment without dist_convert itself, which several clones can share;
# one that sets `extra` (default: test) the packages of that extra of pyproject.toml.
#
# shellcheck shell=bash

set -euo pipefail

venv=${DIST_CONVERT_VENV:-}
[[ -z $venv || $venv == /* ]] || venv=$PWD/$venv
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
venv=${venv:-$PWD/.venv}
base=$(command -v "${PYTHON:-python3}") || base= # here, as the environment's own python3 comes first later

heading() {
    printf '\n== %s\n' "$*"
}

# Runs a command and shows it as one would type it.
show() {
    printf '$ %s\n' "$*"
    "$@"
}

fail() {
    printf '%s: %s\n' "$0" "$*" >&2
    exit 1
}

has_module() {
    "$1" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)"
}

make_environment() {
    local options=(--without-pip) log
    [[ -n $base ]] || fail "there is no ${PYTHON:-python3}. Install Python 3.10 or newer, or name it: PYTHON=... $0"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$base" --version) is too old. Name Python 3.10 or newer: PYTHON=... $0"
    mkdir -p "$venv" || fail "the environment cannot be made there. Name another place: DIST_CONVERT_VENV=... $0"
    # A torch that the machine has already may be the one built for its accelerator.
    ! has_module "$base" torch || options+=(--system-site-packages)
    log=$("$base" -m venv "${options[@]}" "$venv" 2>&1) ||
        fail "$log"$'\n'"no environment in $venv. On Debian and Ubuntu, install the package python3-venv"
}

# Debian and Ubuntu keep ensurepip in the package python3-venv; without it, a pip outside can install one.
provide_pip() {
    local log
    has_module python pip ||
        log=$(python -m ensurepip 2>&1) ||
        log=$log$'\n'$("$base" -m pip --quiet --python "$venv/bin/python" install pip 2>&1) ||
        fail "$log"$'\n'"no pip in $venv. Install pip 22.3 or newer; or, on Debian and Ubuntu, the package python3-venv"
}

enter_environment() {
    # From where the packages were installed, and which.
    local installed wanted quiet=(--quiet)
    wanted=${dependencies_only:-$PWD}$'\n'$(cat pyproject.toml)
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    for installed in "$venv"/installed-for-dist_convert{,"-${extra:-test}"}; do # that for tests serves all
        if [[ -e $installed && $(cat "$installed") == "$wanted" ]]; then
            return
        fi
    done
    [[ ${extra:-test} != test ]] || installed=$venv/installed-for-dist_convert
    [[ ! -t 1 ]] || quiet=() # people see how far the downloads are
    printf 'to be made once, which takes minutes\n'
    [[ -w . ]] || fail "$PWD is read-only, and an editable installation writes there. Clone to another place"
    [[ -x $venv/bin/python ]] || make_environment
    provide_pip
    has_module python torch || show python -m pip install "${quiet[@]}" torch==2.13.0
    PYTHONWARNINGS=ignore show python -m pip install "${quiet[@]}" --editable ".[${extra:-test}]"
    [[ -z ${dependencies_only:-} ]] || show python -m pip uninstall --quiet --yes dist-convert
    printf '%s\n' "$wanted" >"$installed"
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
export OMP_NUM_THREADS=1 # ranks share few cores, and torchrun says so at length if it is not set
export TOKENIZERS_PARALLELISM=false
export HF_HUB_DISABLE_TELEMETRY=1

heading "Environment: $venv"
enter_environment
