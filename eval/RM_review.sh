#!/usr/bin/env bash
# Reviews the agents' answers on eight metrics with the reward model.
# Needs: answers in EVAL_DIR/{in,out}-test_answers/, images/ below DATA_ROOT, the reward model at MODEL_PATH.
# Gives: EVAL_DIR/{in,out}-test_reviews/<agent>/*.json. AGENT="a b" chooses agents; without it, all are reviewed.
# One process per GPU, or PROCESSES=n; scripts/launch.sh tells how to use several nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh"

MODEL_PATH=${MODEL_PATH:-$ROOT/model_weights/MMRole-Eval_RM}
DATA_ROOT=${DATA_ROOT:-$ROOT}
EVAL_DIR=${EVAL_DIR:-$ROOT/eval}
read -r -a agents <<< "${AGENT:-}"

launch "$ROOT/eval/RM_review.py" --model_path "$MODEL_PATH" --data_root "$DATA_ROOT" \
  --eval_dir "$EVAL_DIR" ${agents[@]:+--agent "${agents[@]}"} "$@"
