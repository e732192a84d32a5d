#!/usr/bin/env bash
# Compares two judges: bash eval/agreement.sh JUDGE_A JUDGE_B
# Needs: two of: the name of a judge whose reviews lie below EVAL_DIR (reward-model is the released one), a folder laid
# out like EVAL_DIR, a CSV of people's scores (id, agent, metric, score_agent, score_reference; one line per person).
# Gives: EVAL_DIR/report/agreement-JUDGE_A-JUDGE_B.{md,csv,json,png}.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

EVAL_DIR=${EVAL_DIR:-$ROOT/eval}

"$PYTHON" "$ROOT/eval/agreement.py" --eval_dir "$EVAL_DIR" "$@"
