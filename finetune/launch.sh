#!/usr/bin/env bash
# What the four finetune_*.sh share: one process per GPU, one or several nodes. They source it. The paper's settings are
# the recipes in finetune/arguments.py.
#   GLOBAL_BATCH (256), MICRO_BATCH (2)   samples of an optimizer step, and of a forward pass; accumulation follows.
#                                         The second changes no result, only speed and memory.
#   PROCESSES, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   see scripts/launch.sh
#   RESUME=auto                           resume from the newest complete checkpoint in OUTPUT_DIR, if there is one
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}
MODEL_PATH=${MODEL_PATH:-$ROOT/model_weights/Qwen-VL-Chat}

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
