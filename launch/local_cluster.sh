#!/usr/bin/env bash
# A Ray cluster on this machine: a head and N worker nodes, with token authentication, until it is stopped.
#     ./launch/local_cluster.sh start [N]     N worker nodes (default 1), each with an equal share of the CPUs
#     ./launch/local_cluster.sh stop
# Then, in another terminal, with the two lines that `start` prints:
#     .venv/bin/asp-dist submit configs/quickstart.yaml --address http://127.0.0.1:8265
#
# To change: HEAD_PORT (6379), DASHBOARD_PORT (8265), CPUS_PER_NODE, GPUS_PER_NODE (0), STATE (the cluster's folder, with its
# token); RAY_AUTH_TOKEN, if the token is to be a given one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh

HEAD_PORT=${HEAD_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
GPUS_PER_NODE=${GPUS_PER_NODE:-0}
STATE=${STATE:-/tmp/asp-dist-cluster-$(id -u)}
# Ray's sockets lie 68 characters below, and a socket's path has 107 at most.
MAX_STATE=39

error() {
    echo "error: $*" >&2
    return 2
}

# Refuse what would fail later, or take a port from another program.
check_start() {
    local name
    ((${#STATE} <= MAX_STATE)) || { error "STATE=$STATE is ${#STATE} characters long: give a path of at most $MAX_STATE"; return; }
    [[ ! -e $STATE/token ]] || { error "a cluster is already running ($STATE): stop it first"; return; }
    [[ ! -e $STATE || -O $STATE ]] || { error "$STATE belongs to another user: set STATE to another path"; return; }
    for name in HEAD_PORT DASHBOARD_PORT; do
        if (exec 3<>"/dev/tcp/127.0.0.1/${!name}") 2>/dev/null; then
            error "port ${!name} is in use by another program: set $name to a free port"
            return
        fi
    done
}

start() {
    local workers=${1:-1} cpus
    cpus=${CPUS_PER_NODE:-$((($(nproc) + workers - 1) / workers))}
    check_start
    mkdir -p "$STATE" && chmod 700 "$STATE"
    (umask 077 && printf '%s' "${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}" >"$STATE/token")
    unset RAY_AUTH_TOKEN
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token
    export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 ASP_DIST_CLUSTER=$STATE
    # A job that is stopped has this long to finish its step and save a checkpoint.
    export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-240}
    # Port 0: any free one. All nodes are on this machine, where Ray's fixed default would leave all but one without an agent.
    local common=(--object-store-memory 134217728 --disable-usage-stats --dashboard-agent-listen-port 0)
    # The head runs no workers; jobs' drivers and the dashboard run there.
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

# The processes of this cluster, a line each: number and start time, which together identify a process. They are those that
# carry its mark in their environment, and what these have started: a worker that changes its title overwrites its environment.
cluster_processes() {
    local folder marked=''
    for folder in /proc/[0-9]*; do
        if grep -qzxF "ASP_DIST_CLUSTER=$STATE" "$folder/environ" 2>/dev/null; then marked+=" ${folder#/proc/}"; fi
    done
    # shellcheck disable=SC2016
    cat /proc/[0-9]*/stat 2>/dev/null | awk -v marked="$marked" -v self="$$" '
        { pid = $1; sub(/^.*\) /, ""); if ($1 != "Z") { parent[pid] = $2; start[pid] = $20 } }
        END {
            split(marked, list, " "); for (i in list) own[list[i]] = 1
            for (pid in parent) {
                found = 0
                for (p = pid; p in parent; p = parent[p]) { if (p == self) { found = 0; break } if (p in own) found = 1 }
                if (found) print pid, start[pid]
            }
        }'
}

# Those of the given lines whose process is still there.
still_there() {
    local pid begun
    while read -r pid begun; do
        if [[ $(awk '{ sub(/^.*\) /, ""); if ($1 != "Z") print $20 }' "/proc/$pid/stat" 2>/dev/null) == "$begun" ]]; then
            echo "$pid $begun"
        fi
    done
}

stop() {
    local signal pid i all=''
    for signal in TERM KILL; do
        all=$(printf '%s\n%s\n' "$all" "$(cluster_processes)" | sort -u | still_there)
        while read -r pid _; do
            [[ -z $pid ]] || kill -s "$signal" "$pid" 2>/dev/null || true
        done <<<"$all"
        for ((i = 0; i < 50; i++)); do
            all=$(still_there <<<"$all")
            [[ -n $all$(cluster_processes) ]] || break
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
