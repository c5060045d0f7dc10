#!/usr/bin/env bash
# From a fresh clone to a pruned network: makes .venv, writes the embedded data set, and trains a ResNet-18 down to
# 90 % sparsity on two Ray Train workers. Takes some minutes on two CPU cores; a GPU is used where there is one.
#     ./launch/quickstart.sh [asp-dist train options, such as --budget.sparsity 0.95]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
make_env
.venv/bin/asp-dist prepare digits
exec .venv/bin/asp-dist train configs/quickstart.yaml "$@"
