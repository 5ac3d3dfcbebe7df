#!/usr/bin/env bash
# One command on every host of a Cloud TPU VM: a single host, a pod slice, or several slices of one queued resource.
#
#   TPU=my-tpu ZONE=us-west4-a CONFIG=configs/pretrain/base.py:v5e-256 WORKDIR=gs://bucket/base launch/tpu_vm.sh
#
# WORKDIR: a folder that all hosts share, or gs:// (pip install 'wavlm-jax[gcs]' on the hosts).
# DRY_RUN=1 prints the commands. SLICES=2: my-tpu-0 and my-tpu-1, joined by MEGASCALE variables.
set -euo pipefail

: "${TPU:?name of the TPU}" "${ZONE:?its zone}" "${CONFIG:?config file, with its preset}" "${WORKDIR:?shared folder or gs:// address of the run}"
REPOSITORY=${REPOSITORY:-wavlm_jax}
SLICES=${SLICES:-1}
PORT=${PORT:-8081}

run() {
  # One write a line: slices print at the same time.
  if [[ -n ${DRY_RUN:-} ]]; then printf '%s\n' "$(printf '%q ' "$@")"; else "$@"; fi
}

remote() { # NAME COMMAND: on every host of a slice
  run gcloud compute tpus tpu-vm ssh "$1" --zone "$ZONE" --worker=all --command "$2"
}

train=$(printf 'cd %q && .venv/bin/python train.py --config %q --workdir %q --platform tpu' "$REPOSITORY" "$CONFIG" "$WORKDIR")
if ((SLICES == 1)); then
  remote "$TPU" "$train"
  exit
fi
first=FIRST_HOST
if [[ -z ${DRY_RUN:-} ]]; then
  first=$(gcloud compute tpus tpu-vm describe "$TPU-0" --zone "$ZONE" --format 'value(networkEndpoints[0].ipAddress)')
fi
pids=()
for ((slice = 0; slice < SLICES; slice++)); do
  remote "$TPU-$slice" "MEGASCALE_COORDINATOR_ADDRESS=$first:$PORT MEGASCALE_NUM_SLICES=$SLICES MEGASCALE_SLICE_ID=$slice bash -c $(printf '%q' "$train")" &
  pids+=("$!")
done
for pid in "${pids[@]}"; do wait "$pid"; done
