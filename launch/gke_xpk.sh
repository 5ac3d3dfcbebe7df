#!/usr/bin/env bash
# A workload on a GKE cluster that xpk made; GKE tells JAX the hosts. A preempted job comes back by itself and goes on.
#
#   CLUSTER=speech TPU_TYPE=v5litepod-256 IMAGE=REGION-docker.pkg.dev/PROJECT/wavlm \
#     NAME=base CONFIG=configs/pretrain/base.py:v5e-256 WORKDIR=gs://bucket/base launch/gke_xpk.sh
#
# For a gs:// workdir the image needs pip install 'wavlm-jax[gcs]'.
set -euo pipefail

: "${CLUSTER:?}" "${TPU_TYPE:?as xpk names it}" "${IMAGE:?with this repository in its working folder}" "${NAME:?of the workload}"
: "${CONFIG:?config file, with its preset}" "${WORKDIR:?shared folder or gs:// address of the run}"

command=(xpk workload create --cluster "$CLUSTER" --workload "$NAME" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}"
  --docker-image "$IMAGE" --max-restarts "${RESTARTS:-100}"
  --command "$(printf 'python train.py --config %q --workdir %q --platform tpu' "$CONFIG" "$WORKDIR")")
if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "${command[@]}"; printf '\n'; else "${command[@]}"; fi
