#!/usr/bin/env bash
# Reviews the agents' answers on eight metrics with the reward model.
# Needs: answers in EVAL_DIR/{in,out}-test_answers/, images/ below DATA_ROOT, the reward model at MODEL_PATH; or, instead
# of that, an OpenAI-compatible endpoint: JUDGE_ENDPOINT="URL [URL …]" and JUDGE_MODEL, the judge's name there.
# Gives: EVAL_DIR/{in,out}-test_reviews/<agent>/*.json. Without AGENT, all are reviewed.
# JUDGE names the judge. Without it, it is the reward model, native or served; the reviews of any other go to
# EVAL_DIR/judges/JUDGE/, where JUDGE=… bash eval/RM_result.sh reads them.
# AGENT="a b" chooses the agent of that name, blank and all, if it has answers, or else the agents a and b.
# One process per GPU, or PROCESSES=n.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}
EVAL_DIR=${EVAL_DIR:-$ROOT/eval}
read -r -a agents <<< "${AGENT:-}"
for split in in out; do
  if [[ -n ${AGENT:-} && -d $EVAL_DIR/$split-test_answers/$AGENT ]]; then
    agents=("$AGENT")
  fi
done
read -r -a urls <<< "${JUDGE_ENDPOINT:-}"
backend=(${MODEL_PATH:+--model_path "$MODEL_PATH"} ${JUDGE_ENDPOINT:+--endpoint "${urls[@]}"}
  ${JUDGE_MODEL:+--model "$JUDGE_MODEL"})

"$PYTHON" "$ROOT/eval/RM_review.py" ${backend[@]+"${backend[@]}"} --judge "${JUDGE:-reward-model}" --data_root "$DATA_ROOT" \
  --eval_dir "$EVAL_DIR" ${agents[@]:+--agent "${agents[@]}"} "$@"
