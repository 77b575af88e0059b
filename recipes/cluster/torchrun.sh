#!/usr/bin/env bash
# Train on all GPUs of one machine, or of several, through torchrun. Call it again to go on with a run that was stopped.
#
#   recipes/cluster/torchrun.sh transfer RECIPE RUN [KEY=VALUE …]
#   NODES=2 HEAD=node0:29500 recipes/cluster/torchrun.sh transfer RECIPE RUN      the same line on every machine
#
# RUN has to be a directory that all machines see.
#
#   PROCESSES   processes on this machine: gpu (one a GPU), or a number        default: gpu
#   NODES       machines                                                       default: 1
#   HEAD        HOST:PORT of one of them, where all of them meet; with NODES > 1
#   ID          a name for the meeting, if several runs use one HEAD           default: vpgtrans
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
verb=$1 recipe=$2 run=$3
shift 3

nodes=${NODES:-1}
if [ "$nodes" -gt 1 ]; then
    meeting=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?HEAD=HOST:PORT of one machine is needed}"
        --rdzv-id "${ID:-vpgtrans}")
else
    meeting=(--standalone)
fi
resume=()
if [ -e "$run/recipe.yaml" ]; then
    resume=(--resume)
fi

# torchrun gives processes one thread each unless told otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
exec python -m torch.distributed.run "${meeting[@]}" --nproc-per-node "${PROCESSES:-gpu}" \
    -m vpgtrans "$verb" "$recipe" -o "$run" ${resume[@]+"${resume[@]}"} trainer.devices=auto "$@"
