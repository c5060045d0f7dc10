#!/usr/bin/env bash
# Lint, types and tests, in the environment that this script makes by itself. All run, whatever fails before them;
# the exit status is 0 if all passed.
#     ./launch/test.sh [--fast] [pytest options, such as tests/pruning]
# --fast leaves out the tests that start clusters or take long.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
make_env test,export,mnn,dashboard,trackers
export PATH="$PWD/.venv/bin:$PATH"

if [[ ${1:-} == --fast ]]; then
    shift
    set -- -m "not slow" "$@"
fi
status=0
check() {
    echo "==> $*"
    "$@" || status=$?
}

lint() {
    check ruff check
    check ruff format --check
    check mypy
    return "$status"
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
lint >"$log" 2>&1 &
# Two files at a time, one thread each: a third one gains nothing on two cores.
export OMP_NUM_THREADS=1
check pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
wait "$!" || status=$?
cat "$log"
exit "$status"
