#!/usr/bin/env bash
# What the scripts share, to be sourced. It sets
#   ROOT    the repository, absolute
#   PYTHON  the interpreter of the active environment, else of $ROOT/.venv, which is set up first if needed
# and makes this repository's packages importable from any directory. See scripts/setup.sh for its settings.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/basics.sh"
PYTHON=$(bash "$ROOT/scripts/setup.sh" --interpreter)
# First, so that this copy of the project wins over one installed in the environment.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# A notebook passes on a backend that only it has; charts are files here.
export MPLBACKEND=agg
