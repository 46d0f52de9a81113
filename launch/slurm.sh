#!/usr/bin/env bash
#SBATCH --job-name=evaclip
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%j.txt
#
# Train on a cluster:   sbatch --nodes=16 --gpus-per-node=8 --exclusive --mem=0 launch/slurm.sh CONFIG.yaml [section.key=value ...]
# In an allocation:     launch/slurm.sh CONFIG.yaml ...
# What it would do:     launch/slurm.sh --dry-run CONFIG.yaml ...
#
# --requeue       the scheduler may take the job back, and the job puts itself back when its time is over
# --open-mode     so that its output is not written anew then
# --no-kill       a lost node does not end the job: it goes on with the others, or asks for new ones
# --signal        a warning 300 s before the time limit, in which all ranks save; longer if a checkpoint takes longer
#
# What differs between clusters (account, modules, container, network) stands in launch/site.sh, see site.example.sh;
# options of sbatch on the command line come before those above.
set -euo pipefail

# SLURM runs a copy of this file: the repository is where the command points, else where the job was submitted from.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$here/launch/slurm.sh" ]; then
  # Of an array, SLURM shows all tasks under the number of one.
  command=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/^JobId=$SLURM_JOB_ID .* Command=\([^ ]*\).*/\1/p")
  here=$(cd "$(dirname "${command:-.}")/.." 2>/dev/null && pwd) || here=
  if [ ! -f "$here/launch/slurm.sh" ]; then here=${SLURM_SUBMIT_DIR:-.}; fi
fi
site=${EVACLIP_SITE:-$here/launch/site.sh}
if [ -f "$site" ]; then
  set +eu  # modules and conda do not live up to that
  # shellcheck disable=SC1090
  source "$site"
  set -eu
fi
# A virtual environment beside the code, unless the site has chosen its own.
if [ -z "${EVACLIP_PYTHON:-}" ] && [ -x "$here/.venv/bin/python" ]; then EVACLIP_PYTHON=$here/.venv/bin/python; fi

# The interface over which ranks meet; without it NCCL and gloo choose, sometimes a management network.
if [ -n "${EVACLIP_INTERFACE:-}" ]; then export NCCL_SOCKET_IFNAME=$EVACLIP_INTERFACE GLOO_SOCKET_IFNAME=$EVACLIP_INTERFACE; fi
# NCCL says its version and why it fails, and nothing else.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# After a requeue the job goes on with the code and the configuration that it began with; --new-code takes today's.
code=$here
snapshot=$here/.jobs/${SLURM_JOB_ID:-}
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ] && [ -f "$snapshot/config.yaml" ] && [[ " $* " != *" --new-code "* ]]; then
  code=$snapshot/code
  options=()
  for argument; do if [[ $argument == --* ]]; then options+=("$argument"); fi; done
  set -- "$snapshot/config.yaml" ${options[@]+"${options[@]}"}  # an empty list is an error in old shells
fi
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
exec "${EVACLIP_PYTHON:-python3}" -P -m evaclip launch "$@"
