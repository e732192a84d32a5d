#!/usr/bin/env bash
# Lists everything that is wrong with the data below DATA_ROOT.
# Needs: the data set, or parts of it. Changes nothing. Under half a minute without --decode.
# Gives: exit status 0 (warnings at most), 1 (errors) or 3 (only MS-COCO images are missing).
# Flags are handed on: --json FILE, --decode, --tokenizer CHECKPOINT --max_length N, --extra_root ROOT, --help.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}

"$PYTHON" "$ROOT/data_utils/check" "$DATA_ROOT" "$@"
