#!/usr/bin/env bash
# A Ray cluster on this machine: a head and N worker nodes, with token authentication, until it is stopped.
#     ./launch/local_cluster.sh start [N]     N worker nodes (default 1), each with an equal share of the CPUs
#     ./launch/local_cluster.sh stop
# Then, in another terminal, with the two lines that `start` prints:
#     .venv/bin/asp-dist submit configs/quickstart.yaml --address http://127.0.0.1:8265
#
# To change: HEAD_PORT (6379), DASHBOARD_PORT (8265), CPUS_PER_NODE, GPUS_PER_NODE (0), STATE (where the token lies); RAY_AUTH_TOKEN, if the token is to be a given one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh

HEAD_PORT=${HEAD_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
GPUS_PER_NODE=${GPUS_PER_NODE:-0}
STATE=${STATE:-${XDG_RUNTIME_DIR:-/tmp}/asp-dist-cluster-$(id -u)}

start() {
    local workers=${1:-1} cpus
    cpus=${CPUS_PER_NODE:-$((($(nproc) + workers - 1) / workers))}
    [[ ! -e $STATE/token ]] || { echo "error: a cluster stands already ($STATE); stop it first" >&2; return 2; }
    mkdir -p "$STATE" && chmod 700 "$STATE"
    (umask 077 && printf '%s' "${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}" >"$STATE/token")
    unset RAY_AUTH_TOKEN
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token
    export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 ASP_DIST_CLUSTER=$STATE
    # A job that is stopped has this long to finish its step and save a checkpoint.
    export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60}
    # Port 0: any free one. All nodes are on this machine, where Ray's fixed default would leave all but one without an agent.
    local common=(--object-store-memory 134217728 --disable-usage-stats --dashboard-agent-listen-port 0)
    # The head holds no workers; jobs' drivers and the dashboard run there.
    ray start --head --port "$HEAD_PORT" --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" \
        --temp-dir "$STATE/ray" --num-cpus 0 --num-gpus 0 "${common[@]}" >"$STATE/head.log" 2>&1 ||
        { cat "$STATE/head.log" >&2; stop; return 1; }
    local worker
    for ((worker = 1; worker <= workers; worker++)); do
        ray start --address "127.0.0.1:$HEAD_PORT" --num-cpus "$cpus" --num-gpus "$GPUS_PER_NODE" \
            "${common[@]}" >"$STATE/worker-$worker.log" 2>&1 || { cat "$STATE/worker-$worker.log" >&2; stop; return 1; }
    done
    echo "A head and $workers worker node(s) of $cpus CPUs each are up. Use them with:"
    echo "    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token"
    echo "    .venv/bin/asp-dist submit configs/quickstart.yaml --address http://127.0.0.1:$DASHBOARD_PORT"
}

# The processes of this cluster alone: those that name its folder or address, or that `start` gave its mark.
cluster_pids() {
    pgrep -u "$(id -u)" -f -- "$STATE/ray/|127.0.0.1:$HEAD_PORT" || true
    local folder
    for folder in /proc/[0-9]*; do
        if grep -qzxF "ASP_DIST_CLUSTER=$STATE" "$folder/environ" 2>/dev/null; then echo "${folder#/proc/}"; fi
    done
}

stop() {
    local pid
    for signal in TERM KILL; do
        for pid in $(cluster_pids); do
            if [[ $pid != "$$" ]]; then kill -s "$signal" "$pid" 2>/dev/null || true; fi
        done
        for ((i = 0; i < 50; i++)); do
            [[ -n $(cluster_pids) ]] || break
            sleep 0.2
        done
    done
    rm -rf "$STATE"
}

command -v ray >/dev/null || [[ -x .venv/bin/ray ]] || make_env
export PATH="$PWD/.venv/bin:$PATH"
case ${1:-} in
    start) start "${2:-1}" ;;
    stop) stop ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
