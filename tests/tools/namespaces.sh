#!/usr/bin/env bash
# Three hosts on one machine: network namespaces with addresses of their own on one bridge. A Ray head runs in the first,
# workers in all three, with token authentication; the main job runs across them; one host is cut off in the middle of the
# training, and the job has to end right on the others.
#     sudo tests/tools/namespaces.sh [CONFIG] [asp-dist train options]
# Needs root and iproute2; exits with 77, which says "skipped", without them. Prints the summary of the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

CONFIG=${1:-configs/quickstart.yaml}
shift || true
HOSTS=3
NET=10.213.77
BRIDGE=aspbr0
CUT_AT_STEP=${CUT_AT_STEP:-30}
FOLDER=${FOLDER:-$(mktemp -d /tmp/asp-hosts-XXXXXX)}

if [[ $(id -u) != 0 ]] || ! command -v ip >/dev/null || ! ip netns add asp-probe 2>/dev/null; then
    echo "skipped: needs root, iproute2 and the right to make network namespaces" >&2
    exit 77
fi
ip netns delete asp-probe

# shellcheck disable=SC2329  # the trap calls it
finish() {
    local host pid
    for ((host = 1; host <= HOSTS; host++)); do
        # Some start others while they are being killed, and a namespace lives as long as a process in it.
        while pid=$(ip netns pids "asp$host" 2>/dev/null | head -n 1) && [[ -n $pid ]]; do
            kill -KILL "$pid" 2>/dev/null || true
            sleep 0.05
        done
        ip link delete "asp$host" 2>/dev/null || true
        ip netns delete "asp$host" 2>/dev/null || true
    done
    ip link delete "$BRIDGE" 2>/dev/null || true
    rm -rf "$FOLDER/ray1" "$FOLDER/ray2" "$FOLDER/ray3" "$FOLDER/token"
}
trap finish EXIT

ip link add "$BRIDGE" type bridge
ip link set "$BRIDGE" up
for ((host = 1; host <= HOSTS; host++)); do
    ip netns add "asp$host"
    ip link add "asp$host" type veth peer name eth0 netns "asp$host"
    ip link set "asp$host" master "$BRIDGE" up
    ip -n "asp$host" address add "$NET.$host/24" dev eth0
    ip -n "asp$host" link set eth0 up
    ip -n "asp$host" link set lo up
done

head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$FOLDER/token"
chmod 600 "$FOLDER/token"
PATH="$PWD/.venv/bin:$PATH"
export PATH RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$FOLDER/token" RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
# A host that is cut off is given up after some seconds, not half a minute.
export RAY_health_check_period_ms=2000 RAY_health_check_failure_threshold=4

on() {
    local host=$1
    shift
    ip netns exec "asp$host" "$@"
}

# Ray gives up on a node after 30 seconds, too soon on a machine that is short of CPU.
start_node() {
    local host=$1 try
    shift
    for try in 1 2 3; do
        on "$host" ray start "$@" "${common[@]}" >"$FOLDER/host$host.$try.log" 2>&1 && return
        for pid in $(ip netns pids "asp$host"); do kill -KILL "$pid" 2>/dev/null || true; done
    done
    cat "$FOLDER/host$host.$try.log" >&2
    return 1
}

common=(--num-cpus 1 --num-gpus 0 --object-store-memory 100000000 --disable-usage-stats)
start_node 1 --head --node-ip-address "$NET.1" --port 6379 --include-dashboard false --temp-dir "$FOLDER/ray1"
for ((host = 2; host <= HOSTS; host++)); do
    start_node "$host" --address "$NET.1:6379" --node-ip-address "$NET.$host"
done

# 66 images divide among three workers, two and one.
on 1 asp-dist train "$CONFIG" --name hosts --output.dir "$FOLDER" --cluster.address "$NET.1:6379" --data.batch_size 66 \
    --cluster.num_workers "$HOSTS" --cluster.min_workers 1 --cluster.cpus_per_worker 1 --cluster.max_failures 3 \
    --cluster.timeout_s 60 --tracking.wandb offline "$@" &
run=$!

rows() { grep -c '"train/loss"' "$FOLDER/hosts/metrics.jsonl" 2>/dev/null || true; }
step() { tail -n 1 "$FOLDER/hosts/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\).*/\1/p'; }
while (($(step || true) + 0 < CUT_AT_STEP)); do
    kill -0 "$run" 2>/dev/null || { echo "error: the run ended before step $CUT_AT_STEP" >&2; exit 1; }
    sleep 0.2
done
echo "cutting host $HOSTS off at step $(step)"
ip link set "asp$HOSTS" down

status=0
wait "$run" || status=$?
echo "exit status $status; $(rows) rows of training; workers at the end: $(sed -n 's/.*"world_size": \([0-9]*\).*/\1/p' "$FOLDER/hosts/summary.json")"
cat "$FOLDER/hosts/summary.json"
exit "$status"
