#!/usr/bin/env bash
# A training run under SLURM: a Ray head on the first node, a worker on every node, the run on top, all of it removed afterwards.
#     sbatch launch/slurm.sh configs/quickstart.yaml [asp-dist train options]
#
# Submit it from the repository's root, on storage that all nodes mount, after ./launch/env.sh has made .venv there.
# Before the time limit SLURM sends SIGTERM (--signal): the run saves a checkpoint, and the job is queued again to resume. A
# preempted job is told in the same way where the site has PreemptParameters=send_user_signal and a GraceTime.
# To change: the lines below, as any sbatch option; with GPUs, --gpus-per-node, and 8 or more CPUs for each of them;
# --cluster.num_workers, for fewer workers than one per GPU (without GPUs: per node); JOIN_S (600), for the nodes' start;
# IN_CONTAINER, what srun needs to run in one, as --container-image=... --container-mounts=$PWD:$PWD with pyxis.
#SBATCH --job-name=asp-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=asp-dist-%j.log
set -euo pipefail
(($# > 0)) || { echo "usage: sbatch launch/slurm.sh CONFIG.yaml [asp-dist train options]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
[[ -x .venv/bin/asp-dist ]] || { echo "error: no .venv in $PWD: run ./launch/env.sh there first" >&2; exit 2; }
export PATH="$PWD/.venv/bin:$PATH"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<<"$nodes")
count=$(wc -l <<<"$nodes")
cpus=${SLURM_CPUS_PER_TASK:-1}
# A step's own options: since SLURM 22.05 srun does not take --cpus-per-task from the job.
read -ra step <<<"--nodes=1 --ntasks=1 --overlap --export=ALL --cpus-per-task=$cpus ${IN_CONTAINER:-}"

# The head's address: of the interface that the other nodes reach, or any but the loopback's, which some hosts' names stand for.
# shellcheck disable=SC2016
find_address='ip -4 route get "$1" 2>/dev/null | sed -n "s/.* src \([0-9.]*\).*/\1/p" | grep -v "^127[.]" ||
    hostname --all-ip-addresses | tr " " "\n" | grep -E "^[0-9]+([.][0-9]+){3}$" | grep -v "^127[.]" | head -n 1'
second=$(tail -n +2 <<<"$nodes" | head -n 1)
address=$(srun "${step[@]}" --nodelist="$head" bash -c "$find_address" - "$(getent ahostsv4 "${second:-$head}" | awk 'NR == 1 {print $1}')")
[[ -n $address ]] || { echo "error: node $head has no IPv4 address but the loopback's" >&2; exit 2; }
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-0}
workers=$((count * (gpus > 0 ? gpus : 1)))
((cpus * count >= workers)) || { echo "error: $cpus CPUs for $gpus GPUs: give --cpus-per-task, 8 or more per GPU" >&2; exit 2; }

# The token lies where only the user can read it, and goes with the job; the nodes' Ray logs lie beside it.
logs=$PWD/runs/slurm-$SLURM_JOB_ID
secret=$logs/token
mkdir -p "$logs"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$secret")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secret RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0

# A node's Ray keeps its logs and sockets in /tmp; they go when the step ends, however it does.
temporary=/tmp/asp-dist-$SLURM_JOB_ID
pids=()
# shellcheck disable=SC2329  # the trap calls it
finish() {
    local pid
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait || true
    srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --overlap rm -rf "$temporary" || true
    rm -rf "$secret"
}
trap finish EXIT

ray_node() {
    srun "${step[@]}" --nodelist="$1" \
        ray start "${@:2}" --num-cpus "$cpus" --num-gpus "$gpus" --object-store-memory 134217728 \
        --dashboard-agent-listen-port 0 --disable-usage-stats --block >"$logs/$1.log" 2>&1 &
    pids+=("$!")
}

ray_node "$head" --head --temp-dir "$temporary" --node-ip-address "$address" --port "$port" --dashboard-port 0
for node in $(tail -n +2 <<<"$nodes"); do
    ray_node "$node" --address "$address:$port" # tries until the head answers
done

# Wait until all nodes have joined: the run refuses a cluster that is too small.
python - "$address" "$port" "$count" "${JOIN_S:-600}" <<'EOF'
import socket, sys, time
import ray
address, port, count, wait_s = sys.argv[1], *map(int, sys.argv[2:])
deadline = time.monotonic() + wait_s
while not ray.is_initialized():
    try:
        socket.create_connection((address, port), timeout=5).close()
        ray.init(f"{address}:{port}", log_to_driver=False, logging_level="ERROR")
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"error: the Ray head at {address}:{port} does not answer: {error}")
        time.sleep(1)
while (joined := sum(node["Alive"] for node in ray.nodes())) < count:
    if time.monotonic() > deadline:
        sys.exit(f"error: of {count} nodes, {joined} joined the Ray cluster within {wait_s} s")
    time.sleep(1)
EOF

# The run itself, on the head's node. `wait` returns early at SIGTERM, which the trap passes on.
srun "${step[@]}" --nodelist="$head" \
    asp-dist train "$1" --cluster.num_workers "$workers" --cluster.cpus_per_worker "$((cpus * count / workers))" "${@:2}" \
    --cluster.address "$address:$port" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null || true' TERM
status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do wait "$run" || status=$?; done
if ((status == 75)); then
    echo "Stopped after saving a checkpoint; the job is queued again and resumes there."
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
