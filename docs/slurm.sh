#!/usr/bin/env bash
#SBATCH --job-name=rlsp
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=outputs/%x-%j.log
#
#   sbatch docs/slurm.sh RECIPE [key=value ...]
#
# One torchrun a node. Weights are sharded inside a node and replicated between nodes (train.fsdp_shard_size = 8: HSDP), so that
# layers are gathered over NVLink and only gradients cross the network. Slurm's SIGTERM
# reaches torchrun, which gives the run 30 s to end its step and save; a longer step is lost. The same command continues from the
# last checkpoint: set output.save_every accordingly. Before the first submission: mkdir -p outputs.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m rlsp_fast run "$1" train.fsdp_shard_size=8 "output.dir=outputs/$SLURM_JOB_NAME-$(basename "$1" .toml)" "${@:2}"
