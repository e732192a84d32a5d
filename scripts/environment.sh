#!/usr/bin/env bash
# What all scripts share; they read it with `source`. It sets
#   ROOT    the repository, absolute
#   PYTHON  the interpreter of the active environment, else of $ROOT/.venv, which is set up first if need be
# and lets this repository's packages be found from any directory. See scripts/setup.sh for its settings.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/basics.sh"
PYTHON=$(bash "$ROOT/scripts/setup.sh" --interpreter)
# First, so that an active environment with another copy of the project runs this one.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# A notebook hands down a backend that only it has; charts are files here.
export MPLBACKEND=agg
