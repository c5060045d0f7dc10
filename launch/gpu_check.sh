#!/usr/bin/env bash
# On a machine with a GPU: all tests marked gpu, what the engine costs at the recipes' batch sizes, and a rehearsal fed by DALI's
# GPU pipelines. Prints one table, to paste into README, and exits with 1 if something failed.
#     ./launch/gpu_check.sh [FOLDER for the logs]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
make_env test
export PATH="$PWD/.venv/bin:$PATH"

logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    env_error "this machine has no GPU that torch can use: there is nothing to check here" || exit 2
fi

status=0
# Run "$@" with its output in a log of the name $1, and say how it went.
check() {
    local name=$1 code=0
    shift
    "$@" >"$logs/$name.log" 2>&1 || code=$?
    echo "==> $name: exit status $code ($logs/$name.log)" >&2
    ((code == 0)) || status=1
}

check gpu-tests pytest -m gpu
workers=$(python -c 'import torch; print(torch.cuda.device_count())')
# The recipes' networks, images per GPU, control and operator.
for line in "resnet50 128 track power" "resnet50 256 loss hard" "deit_small_patch16_224 128 track power" \
    "convnext_tiny 128 track power" "mobilenetv3_large_100 256 track power"; do
    read -r model batch control operator <<<"$line"
    bench=(bench overhead --device cuda --precision bfloat16 --channels-last --steps 30 --model "$model"
        --batch-size "$batch" --control "$control" --operator "$operator" --json)
    check "bench-$model-$batch-$control" asp-dist "${bench[@]}"
    if ((workers > 1)); then
        check "bench-$model-$batch-$control-ddp" torchrun --nproc-per-node "$workers" -m asp_dist "${bench[@]}"
    fi
done
check rehearsal asp-dist rehearse configs/imagenet_resnet50.yaml --data.root /nowhere --output.dir "$logs" --training.device cuda
check digits asp-dist prepare digits --target "$logs/digits"
check two-workers asp-dist train configs/quickstart.yaml --name two-workers --output.dir "$logs" --data.root "$logs/digits" \
    --cluster.num_workers "$((workers > 1 ? 2 : 1))" --tracking.wandb offline

python - "$logs" <<'TABLE'
import json, pathlib, sys

print("| network, images per GPU | device | workers | dense, ms | engine | engine's own, ms | launches | waits |")
print("|---|---|---|---|---|---|---|---|")
for log in sorted(pathlib.Path(sys.argv[1]).glob("bench-*.log")):
    text = log.read_text()
    try:
        one = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        print(f"| {log.stem} | failed | | | | | | |")
        continue
    steps = one["per_step"]
    own = {name: steps["engine"][name] - steps["dense"][name] for name in ("launches", "waits")}
    print(
        f"| {one['model']}, {one['batch_size']}, {one['control']}/{one['operator']} | {one['device']} | {one['workers']} "
        f"| {one['seconds']['dense'] * 1e3:.1f} | {one['ratios']['engine']:.3f} × | {one['own'] * 1e3:.2f} "
        f"| {own['launches']:.0f} more | {own['waits']:.1f} more |"
    )
TABLE
exit "$status"
