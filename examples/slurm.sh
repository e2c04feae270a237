#!/bin/bash
# Train on several machines: sbatch examples/slurm.sh. Only the lines down to the first empty one need editing.
#SBATCH --job-name=nanovlm
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
# Three minutes before the time is over all processes get SIGTERM, at which the run saves and ends.
#SBATCH --signal=TERM@180
run_dir=runs/smolvlm_256m_stage3
recipe="smolvlm_256m_stage3 --parallel.strategy fsdp --parallel.shard-ranks 8 --parallel.compile --optim.micro-batches 16"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
began=$(mktemp)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150  # seconds that ranks have to save after a signal (torch 2.13; 30 before)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store for every restart: pytorch issue 135712
# shellcheck disable=SC2086  # the recipe is several words
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  train.py $recipe --run-dir "$run_dir"

# Not finished, but further than when it began: queue again, and the run goes on from its checkpoint.
if [ ! -e "$run_dir/eval.json" ] && [ -n "$(find "$run_dir/checkpoints" -name 'step_*' -newer "$began")" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
