#!/usr/bin/env bash
# Downloads MMRole-Data, and of MS-COCO's train2017 the images it refers to (about 10,800, 1.8 GB), into DATA_ROOT.
# Needs a network. Can be stopped at any time; the same command fetches what is still missing or broken.
# Gives DATA_ROOT/{data,dialogues,images,profiles,RM_data}. Flags are handed on: --no_coco, --only_coco, --help.
#   HF_ENDPOINT, COCO_URL   mirrors of huggingface.co and of http://images.cocodataset.org/train2017
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATA_ROOT=${DATA_ROOT:-$ROOT}

"$PYTHON" "$ROOT/data_utils/download" data "$DATA_ROOT" "$@"
