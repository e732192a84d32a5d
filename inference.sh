#!/usr/bin/env bash
# Answers both test sets with a role-playing agent.
# Needs: the data set below DATA_ROOT (data/ and images/), the agent's checkpoint at MODEL_PATH; or, instead of that, an
# OpenAI-compatible endpoint: ENDPOINT="URL [URL …]" and MODEL, the model's name there (the key: OPENAI_API_KEY).
# Gives: EVAL_DIR/{in,out}-test_answers/AGENT/*.json; AGENT is mmrole-agent, or named after MODEL. Run it again to resume it.
# One process per GPU, or PROCESSES=n.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}
EVAL_DIR=${EVAL_DIR:-$ROOT/eval}
read -r -a urls <<< "${ENDPOINT:-}"
backend=(${MODEL_PATH:+--model_path "$MODEL_PATH"} ${ENDPOINT:+--endpoint "${urls[@]}"} ${MODEL:+--model "$MODEL"})

"$PYTHON" "$ROOT/inference.py" ${backend[@]+"${backend[@]}"} --data_root "$DATA_ROOT" --eval_dir "$EVAL_DIR" \
  --agent "${AGENT:-}" "$@"
