#!/usr/bin/env bash
# Train on NPROC processes of this machine: launch/local.sh NPROC CONFIG.yaml [section.key=value ...]
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NPROC CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
processes=$1
shift
# A mistake in the configuration is said once and before anything starts.
python -m evaclip config "$@" >/dev/null
# After a signal torchrun kills its processes within 30 s, step and checkpoint done or not, where it cannot be told to wait.
torch=$(python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
patience=()
if grep -q -e '--shutdown-timeout' "$torch/distributed/run.py"; then patience=(--shutdown-timeout 900); fi
# torchrun starts the processes, gives each its rank, and ends all of them when one fails.
exec torchrun --standalone "${patience[@]}" --nproc-per-node "$processes" -m evaclip train "$@"
