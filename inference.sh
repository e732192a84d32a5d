#!/usr/bin/env bash
# Answers both test sets with a role-playing agent.
# Needs: the data set below DATA_ROOT (data/ and images/), the agent's checkpoint at MODEL_PATH.
# Gives: EVAL_DIR/{in,out}-test_answers/AGENT/*.json. Run it again to go on after an interruption.
# One process per GPU, or PROCESSES=n.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"

MODEL_PATH=${MODEL_PATH:-$ROOT/model_weights/MMRole-Agent}
DATA_ROOT=${DATA_ROOT:-$ROOT}
EVAL_DIR=${EVAL_DIR:-$ROOT/eval}
AGENT=${AGENT:-mmrole-agent}

"$PYTHON" "$ROOT/inference.py" --model_path "$MODEL_PATH" --data_root "$DATA_ROOT" \
  --eval_dir "$EVAL_DIR" --agent "$AGENT" "$@"
