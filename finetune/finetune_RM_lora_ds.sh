#!/usr/bin/env bash
# Fine-tunes Qwen-VL-Chat into the reward model: LoRA adapters on the decoder, 10 epochs.
# Needs: RM-train_23k.json at DATA_PATH, images/ below DATA_ROOT, Qwen-VL-Chat at MODEL_PATH.
# Gives: the adapter in OUTPUT_DIR (scripts/merge_lora.py merges it).
# Settings: see launch.sh; further flags of finetune.py may follow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

DATA_PATH=${DATA_PATH:-$DATA_ROOT/RM_data/train/RM-train_23k.json}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/checkpoints/MMRole-Eval_RM-LoRA}

finetune ds_config_zero2.json --num_train_epochs 10 --model_max_length 4096 --use_lora True "$@"
