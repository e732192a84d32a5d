#!/usr/bin/env bash
# Turns all reviews under EVAL_DIR into the published CSVs, and into a report of all agents with tables and figures.
# Needs: {in,out}-test_reviews/<agent>/*.json there (eval/RM_review.sh writes them; published ones do as well).
# Gives: EVAL_DIR/{in,out}-test_results/<agent>/*.csv and EVAL_DIR/report/ (report.html, table.md, table.csv,
# statistics.csv, records.csv, report.json, radar.png). report.html shows pictures that lie in DATA_ROOT/images.
# JUDGE=NAME reads the reviews of another judge, below EVAL_DIR/judges/NAME, and writes everything there.
# With --no_html it takes a few seconds less.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

EVAL_DIR=${EVAL_DIR:-$ROOT/eval}
DATA_ROOT=${DATA_ROOT:-$ROOT}
JUDGE=${JUDGE:-reward-model}

"$PYTHON" "$ROOT/eval/RM_result.py" --eval_dir "$EVAL_DIR" --data_root "$DATA_ROOT" --judge "$JUDGE" "$@"
