#!/bin/sh
# Train on every GPU of this machine: sh examples/one_node.sh [FOLDER [--option value ...]]
# A rank that fails is started again, up to three times, and the run goes on.
run_dir=${1:-runs/smolvlm_256m_stage1}
[ $# -eq 0 ] || shift

newest() {
  find "$run_dir/checkpoints" -name 'step_*' ! -name step_00000000 2>/dev/null | sort | tail -n 1
}
before=$(newest)
torchrun --standalone --nproc-per-node gpu --max-restarts 3 \
  train.py smolvlm_256m_stage1 --run-dir "$run_dir" --optim.micro-batches 8 --parallel.compile "$@" &
child=$!
trap 'kill -TERM $child' TERM USR1 INT  # the ranks save, and end
while kill -0 $child 2>/dev/null; do
  wait $child
  status=$?
done

# torchrun ends with 1 whatever its ranks end with. Here, as in train.py, 75 says: not finished, but further than when it
# began, so start it again.
if [ "$status" -ne 0 ] && [ ! -e "$run_dir/eval.json" ] && [ "$(newest)" != "$before" ]; then
  status=75
fi
exit "$status"
