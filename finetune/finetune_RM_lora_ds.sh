#!/usr/bin/env bash
# Fine-tunes Qwen-VL-Chat into the reward model: LoRA adapters on the decoder, 10 epochs.
# Needs: RM-train_23k.json at DATA_PATH, images/ below DATA_ROOT, Qwen-VL-Chat at MODEL_PATH.
# Gives: the adapter in OUTPUT_DIR (scripts/merge_lora.py merges it).
# Settings: see launch.sh; further flags of finetune.py may follow.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

DATA_PATH=${DATA_PATH:-$DATA_ROOT/RM_data/train/RM-train_23k.json}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/checkpoints/MMRole-Eval_RM-LoRA}

finetune reward_model ds_config_zero2.json --use_lora True "$@"
