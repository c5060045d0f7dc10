#!/usr/bin/env bash
# A training run without Ray, under torchrun: on this machine, or on several, where each one runs this script.
#     ./launch/torchrun.sh configs/quickstart.yaml [asp-dist train options]
#     NODES=2 NODE_RANK=0 HEAD=10.0.0.1 ./launch/torchrun.sh configs/quickstart.yaml     (on 10.0.0.1)
#     NODES=2 NODE_RANK=1 HEAD=10.0.0.1 ./launch/torchrun.sh configs/quickstart.yaml     (on the other)
#
# All machines need the data and the output folder under the same path. An interrupted run resumes with the same
# command. To change: WORKERS, processes per machine (default: its GPUs, else 2); RESTARTS (3) after a failure; PORT (29400).
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
exec .venv/bin/torchrun "${place[@]}" --nproc-per-node "$workers" --max-restarts "${RESTARTS:-3}" --shutdown-timeout 300 \
    -m asp_dist train "$@"
