#!/usr/bin/env bash
# Makes the project's environment, .venv, with the pinned set of packages. Other scripts source this file and call
#     make_env [EXTRAS]      e.g. make_env test,export
# Run by itself it does the same:  ./launch/env.sh [EXTRAS]
# A second call is quick: a stamp in .venv tells what was installed from which pyproject.toml and constraints.txt.
# PYTHON=/path/to/python picks the interpreter (3.11 or newer).

env_error() {
    printf 'error: %s\n' "$*" >&2
    return 1
}

# The first interpreter of 3.11 or newer that can make a virtual environment; nothing if there is none.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

# What a finished environment was made from: the pins, the package's metadata and the place, which a venv cannot change.
env_fingerprint() {
    { cat pyproject.toml launch/constraints.txt && pwd -P; } | sha256sum | cut -d' ' -f1
}

# True if .venv was finished from the same files, with at least the extras $2.
env_is_current() {
    local stamp=.venv/.asp-dist fingerprint=$1 extra have
    [[ -x .venv/bin/asp-dist && -f $stamp ]] || return 1
    [[ $(sed -n 1p "$stamp") == "$fingerprint" ]] || return 1
    have=",$(sed -n 2p "$stamp"),"
    for extra in ${2//,/ }; do
        [[ $have == *",$extra,"* ]] || return 1
    done
}

pip_install() {
    .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check --constraint launch/constraints.txt "$@" ||
        env_error "pip could not install the packages; see above"
}

# Compile with $1 processes (0: as many as cores) what is imported here. Some packages carry templates that are not Python: no
# reason to stop.
compile_packages() {
    .venv/bin/python -m compileall -q -j "$1" -x '/(tests|rllib|pip)/' .venv/lib >/dev/null 2>&1 || true
}

make_env() {
    local extras=${1:-} fingerprint python
    fingerprint=$(env_fingerprint)
    if env_is_current "$fingerprint" "$extras"; then
        return 0
    fi
    [[ $(uname -s) == Linux ]] || { env_error "asp_dist needs Linux (NVIDIA DALI has no build for $(uname -s))"; return; }
    python=$(find_python)
    if [[ -z $python ]]; then
        env_error "no Python 3.11 or newer with the venv module was found: install it (Debian, Ubuntu:" \
            "apt-get install python3 python3-venv), or name one with PYTHON=/path/to/python3"
        return
    fi
    if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        echo "Making .venv with $("$python" --version) ($python)"
        "$python" -m venv --clear .venv || return
    fi
    echo "Installing asp_dist${extras:+ with [$extras]} and its pinned packages into .venv (several GB the first time)"
    rm -f .venv/.asp-dist
    # The largest package first: it is compiled while pip, which uses one core, unpacks the others.
    pip_install torch torchvision || return
    compile_packages 1 &
    pip_install --editable ".${extras:+[$extras]}" || { wait; return 1; }
    wait
    compile_packages 0
    printf '%s\n%s\n' "$fingerprint" "$extras" >.venv/.asp-dist
    echo "Done: .venv/bin/asp-dist, or asp-dist after  source .venv/bin/activate"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    make_env "$@"
fi
