#!/bin/sh
# Train on every GPU of this machine. A rank that fails is started again, up to three times, and the run goes on.
torchrun --standalone --nproc-per-node gpu --max-restarts 3 \
  train.py smolvlm_256m_stage1 --run-dir runs/smolvlm_256m_stage1 --optim.micro-batches 8 --parallel.compile "$@"
