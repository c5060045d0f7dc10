#!/usr/bin/env bash
# A training run without Ray, under torchrun: on this machine, or on several, where each one runs this script.
#     ./launch/torchrun.sh configs/quickstart.yaml [asp-dist train options]
#     NODES=2 NODE_RANK=0 HEAD=10.0.0.1 ./launch/torchrun.sh configs/quickstart.yaml     (on 10.0.0.1)
#     NODES=2 NODE_RANK=1 HEAD=10.0.0.1 ./launch/torchrun.sh configs/quickstart.yaml     (on the other)
#
# All machines need the data and the output folder under the same path. An interrupted run resumes with the same
# command. Exit codes as those of `asp-dist train`: 0 done, 2 a mistake, 75 stopped after saving a checkpoint, 1 failed.
# To change: WORKERS, processes per machine (default: its GPUs, else 2); RESTARTS (3) after a failure; PORT (29400).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
(($# > 0)) || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ -x .venv/bin/torchrun ]] || make_env

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
workers=${WORKERS:-$((gpus > 0 ? gpus : 2))}
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    OMP_NUM_THREADS=$(($(nproc) / workers > 0 ? $(nproc) / workers : 1))
    export OMP_NUM_THREADS
fi
place=(--standalone)
if ((${NODES:-1} > 1)); then
    place=(--nnodes "$NODES" --node-rank "${NODE_RANK:?0 on the first machine, 1 on the next, ...}"
        --rdzv-backend c10d --rdzv-id asp-dist --rdzv-endpoint "${HEAD:?the address of the first machine}:${PORT:-29400}")
fi
# A mistake in the options ends here, not in every process.
.venv/bin/asp-dist train "$@" --print_config >/dev/null

# The processes write a message once for all of them, and how they ended where starting anew would not help: torchrun knows 1.
ASP_DIST_RANKS=$(mktemp -d)
export ASP_DIST_RANKS
trap 'rm -rf "$ASP_DIST_RANKS"' EXIT
# Its own group: at Ctrl-C the processes would be told twice, by the terminal and by torchrun, and end without a checkpoint.
setsid .venv/bin/torchrun "${place[@]}" --nproc-per-node "$workers" --max-restarts "${RESTARTS:-3}" --shutdown-timeout 300 \
    -m asp_dist train "$@" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null || true' TERM INT HUP
status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do wait "$run" || status=$?; done
[[ ! -s $ASP_DIST_RANKS/code ]] || status=$(<"$ASP_DIST_RANKS/code")
exit "$status"
