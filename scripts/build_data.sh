#!/usr/bin/env bash
# Builds data/train/train_85k.json below DATA_ROOT from its dialogues and profiles.
# Needs: DATA_ROOT/{dialogues,profiles}, and data/test to know which dialogues are held out.
# With --reviews FOLDER: RM_data/{train,test} from the reviews that eval/RM_review.sh wrote there.
# Flags are handed on: --out FILE, --sane_partner, --extra_root ROOT, --test, --reviews FOLDER, --help.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}

"$PYTHON" "$ROOT/data_utils/build" "$DATA_ROOT" "$@"
