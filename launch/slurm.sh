#!/usr/bin/env bash
#SBATCH --job-name=wavlm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
# One process a node, which has all its GPUs; JAX finds the others through Slurm.
#
#   CONFIG=configs/pretrain/base.py:h100-64 WORKDIR=/shared/base sbatch launch/slurm.sh
#
# Five minutes before its time is over the job is told, saves, exits with 75, and puts itself back into the queue.
set -euo pipefail

: "${CONFIG:?config file, with its preset}" "${WORKDIR:?shared folder or gs:// address of the run}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

command=(srun --kill-on-bad-exit=1 .venv/bin/python train.py --config "$CONFIG" --workdir "$WORKDIR" --platform cuda)
if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "${command[@]}"; printf '\n'; exit; fi

"${command[@]}" &
steps=$!
trap 'kill -TERM "$steps"' TERM
code=0
wait "$steps" || code=$?
if ((code > 128)); then # the trap interrupted the first wait
  code=0
  wait "$steps" || code=$?
fi
case $code in
  75 | 77) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
