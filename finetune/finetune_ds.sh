#!/usr/bin/env bash
# Fine-tunes Qwen-VL-Chat into the role-playing agent: all weights but the vision tower's, 3 epochs.
# Needs: train_85k.json at DATA_PATH, images/ below DATA_ROOT, Qwen-VL-Chat at MODEL_PATH.
# Gives: the agent in OUTPUT_DIR.
# Settings: see launch.sh; further flags of finetune.py may follow.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

DATA_PATH=${DATA_PATH:-$DATA_ROOT/data/train/train_85k.json}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/checkpoints/MMRole-Agent}

finetune agent ds_config_zero3.json "$@"
