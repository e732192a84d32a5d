#!/usr/bin/env bash
# What the four finetune_*.sh share: one process per GPU, one or several nodes. They source it. The paper's settings are
# the recipes in finetune/arguments.py.
#   GLOBAL_BATCH (256), MICRO_BATCH (2)   samples of an optimizer step, and of a forward pass; accumulation follows.
#                                         The second changes no result, only speed and memory.
#   PROCESSES                             processes on this machine (default: one per GPU, or one on the CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes: run the same script on each, NODE_RANK from 0. All must
#                                         see the same data and results, on a shared file system.
#   RESUME=auto                           resume from the newest complete checkpoint in OUTPUT_DIR, if there is one
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}
MODEL_PATH=${MODEL_PATH:-$ROOT/model_weights/Qwen-VL-Chat}

# count NAME: the setting must be a whole number from 1
count() {
  [[ ${!1} =~ ^[1-9][0-9]{0,3}$ ]] || fail "this must be a whole number from 1 to 9999" "${!1}" "$1" \
    "set $1 to such a number, or leave it out"
}
NNODES=${NNODES:-1}
count NNODES
count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^ *[0-9GM]' || true # numbers, GPU-… or MIG-…
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  fi
}
GPUS=$(count_gpus)
PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
count PROCESSES

# spread PROGRAM FLAG…: run in one process, or in PROCESSES on each node under torchrun. It replaces the script, so that
# signals to the script reach it.
spread() {
  if [[ $NNODES -eq 1 && $PROCESSES -eq 1 ]]; then
    # No launcher between the user and an error. Without the variables of a platform's launcher, or it would wait for others.
    exec env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u LOCAL_WORLD_SIZE -u GROUP_RANK -u MASTER_ADDR -u MASTER_PORT "$PYTHON" "$@"
  fi
  local nodes=(--standalone --local_addr 127.0.0.1) # the host's name often does not resolve
  if [[ $NNODES -gt 1 ]]; then
    nodes=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?the number of this node, from 0}"
      --master_addr "${MASTER_ADDR:?the address of node 0}" --master_port "${MASTER_PORT:-29500}")
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > PROCESSES ? $(nproc) / PROCESSES : 1))}
  # Seconds for saving after a signal.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
  exec "$PYTHON" -m torch.distributed.run "${nodes[@]}" --nproc_per_node "$PROCESSES" "$@"
}

# finetune RECIPE ZERO_CONFIG FLAG…
finetune() {
  local recipe=$1 config=$2
  shift 2
  spread "$ROOT/finetune/finetune.py" --recipe "$recipe" --model_name_or_path "$MODEL_PATH" --data_root "$DATA_ROOT" \
    --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --resume_from_checkpoint "${RESUME:-False}" \
    --deepspeed "$ROOT/finetune/$config" --bf16 True --gradient_checkpointing True --logging_steps 1 \
    --per_device_train_batch_size "${MICRO_BATCH:-2}" ${GLOBAL_BATCH:+--global_batch_size "$GLOBAL_BATCH"} \
    --report_to none "$@"
}
