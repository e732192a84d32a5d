#!/usr/bin/env bash
# Downloads weights (19.3 GB or more each): bash scripts/download_weights.sh [qwen-vl-chat|mmrole-agent|reward-model]...
# Needs a network. Without a name, all three. Can be stopped at any time; the same command fetches what is missing or broken.
# Gives WEIGHTS_DIR/{Qwen-VL-Chat,MMRole-Agent,MMRole-Eval_RM}, without code files. Flags are handed on (--help).
#   HF_ENDPOINT   a mirror of huggingface.co
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

WEIGHTS_DIR=${WEIGHTS_DIR:-$ROOT/model_weights}

"$PYTHON" "$ROOT/data_utils/download" weights --out_dir "$WEIGHTS_DIR" "$@"
