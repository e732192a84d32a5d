#!/usr/bin/env bash
# What the four finetune_*.sh share: the paper's settings, one process a GPU, one or several nodes. They source it.
#   GLOBAL_BATCH (256), MICRO_BATCH (2)   samples of an optimizer step, and of a forward pass; accumulation follows
#   PROCESSES, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   see scripts/launch.sh
#   RESUME=auto                           go on with the last whole checkpoint in OUTPUT_DIR, if there is one
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}
MODEL_PATH=${MODEL_PATH:-$ROOT/model_weights/Qwen-VL-Chat}

# finetune ZERO_CONFIG FLAG…
finetune() {
  local config=$1
  shift
  spread "$ROOT/finetune/finetune.py" --model_name_or_path "$MODEL_PATH" --data_root "$DATA_ROOT" \
    --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --resume_from_checkpoint "${RESUME:-False}" \
    --deepspeed "$ROOT/finetune/$config" --bf16 True --fix_vit True --gradient_checkpointing True \
    --global_batch_size "${GLOBAL_BATCH:-256}" --per_device_train_batch_size "${MICRO_BATCH:-2}" \
    --learning_rate 1e-5 --weight_decay 0.05 --adam_beta2 0.95 --warmup_steps 0.01 --lr_scheduler_type cosine \
    --logging_steps 1 --save_strategy steps --save_steps 100 --save_total_limit 2 --report_to none "$@"
}
