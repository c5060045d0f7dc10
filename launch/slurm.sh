#!/usr/bin/env bash
# A training run under SLURM: a Ray head on the first node, a worker on every node, the run on top, all of it removed afterwards.
#     sbatch launch/slurm.sh configs/quickstart.yaml [asp-dist train options]
#
# Submit it from the repository's root, on storage that all nodes mount, after ./launch/env.sh has made .venv there.
# Before the time limit SLURM sends SIGTERM (--signal): the run saves a checkpoint, and the job is queued again to resume.
# To change: the lines below, as any sbatch option; with GPUs, --gpus-per-node.
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
# One address, the first, of those that the head has.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | tr ' ' '\n' | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
workers=$((count * (gpus > 0 ? gpus : 1)))

# The token lies where only the user can read it, and goes with the job; the nodes' Ray logs lie beside it.
logs=$PWD/runs/slurm-$SLURM_JOB_ID
secret=$logs/token
mkdir -p "$logs"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$secret")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secret RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0

steps=()
# shellcheck disable=SC2329  # the trap calls it
finish() {
    local step
    for step in "${steps[@]}"; do kill "$step" 2>/dev/null || true; done
    wait || true
    rm -rf "$secret" "/tmp/asp-dist-$SLURM_JOB_ID"
}
trap finish EXIT

ray_node() {
    srun --nodes=1 --ntasks=1 --overlap --export=ALL --nodelist="$1" \
        ray start "${@:2}" --num-cpus "$cpus" --num-gpus "$gpus" --object-store-memory 134217728 \
        --disable-usage-stats --block >"$logs/$1.log" 2>&1 &
    steps+=("$!")
}

ray_node "$head" --head --temp-dir "/tmp/asp-dist-$SLURM_JOB_ID" --node-ip-address "$address" --port "$port" --dashboard-port 0
for node in $(tail -n +2 <<<"$nodes"); do
    ray_node "$node" --address "$address:$port" # tries until the head answers
done

# Wait until all nodes have joined: the run refuses a cluster that is too small.
python - "$address" "$port" "$count" <<'EOF'
import socket, sys, time
import ray
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
deadline = time.monotonic() + 300
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
        sys.exit(f"error: of {count} nodes, {joined} joined the Ray cluster within 300 s")
    time.sleep(1)
EOF

# The run itself, on the head's node. `wait` returns early at SIGTERM, which the trap passes on.
srun --nodes=1 --ntasks=1 --overlap --export=ALL --nodelist="$head" \
    asp-dist train "$@" --cluster.address "$address:$port" --cluster.num_workers "$workers" &
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
