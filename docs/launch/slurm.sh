#!/usr/bin/env bash
# Several nodes under Slurm:
#   sbatch docs/launch/slurm.sh fit --data reviews.csv --teacher teacher --output runs/reviews --resume auto
# One torchrun a node, which meet at the first of them. Slurm asks them to stop two minutes before the time is up; the
# same line goes on then. It queues the job again by itself where a node is lost or the job preempted.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun does not inherit the CPUs of sbatch (since Slurm 22.05).
exec srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" \
    -m distill "$@"
