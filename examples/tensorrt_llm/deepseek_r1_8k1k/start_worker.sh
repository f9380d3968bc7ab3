#!/bin/bash
# start_worker.sh ROLE INDEX GPUS PORT: one task of one server.
set -euo pipefail
role=$1 index=$2 port=$4
export CUDA_VISIBLE_DEVICES=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=(numactl -m 0,1 trtllm-serve "$MODEL" --host "$(hostname)" --port "$port" --config "$here/$role.yaml")

if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  exec trtllm-llmapi-launch "${command[@]}"
fi

if [ "$role" = context ]; then  # a rank; DWDP_RENDEZVOUS is the job's
  export DWDP_RANK=$index DWDP_WORLD_SIZE=16
  command+=(--parallel dwdp --dwdp_size 4)
fi

# A server of one GPU starts its worker by MPI: as a process of no launcher.
for name in $(compgen -e); do
  case $name in SLURM_* | PMI_* | PMIX_* | OMPI_* | MPI_*) unset "$name" ;; esac
done
exec "${command[@]}"
