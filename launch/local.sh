#!/usr/bin/env bash
# Train on NPROC processes of this machine: launch/local.sh NPROC CONFIG.yaml [section.key=value ...]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh NPROC CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
processes=$1
shift
# torchrun starts the processes, gives each its rank, and ends all of them when one fails.
exec torchrun --standalone --nproc-per-node "$processes" -m evaclip train "$@"
