#!/usr/bin/env bash
# Turns all reviews under EVAL_DIR into the published CSVs, and prints and saves one table and a radar chart of all agents.
# Needs: {in,out}-test_reviews/<agent>/*.json there (eval/RM_review.sh writes them; published ones do as well).
# Gives: EVAL_DIR/{in,out}-test_results/<agent>/*.csv and EVAL_DIR/report/ (table.md, table.csv, statistics.csv,
# records.csv, report.json, radar.png).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

EVAL_DIR=${EVAL_DIR:-$ROOT/eval}

"$PYTHON" "$ROOT/eval/RM_result.py" --eval_dir "$EVAL_DIR" "$@"
