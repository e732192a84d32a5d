#!/usr/bin/env bash
# Compares this implementation with the released code on your machine and weights, and prints a table of cases. The exit
# status is 0 if all agrees, 1 if something differs, 2 if it cannot run.
#
#   bash scripts/parity.sh CHECKPOINT [--i_trust_the_code_in_this_folder] [--device D] [--dtype T]
#
# Needs a checkpoint folder with the released .py files in it. They run only with that flag, in a separate
# environment, .venv-reference, which is made at the first such run (Python 3.10 or 3.11; about 1.2 GB, more with CUDA). Without
# the flag only this implementation runs. `--help` lists all flags. docs/parity.md says more.
#   PYTHON_FOR_REFERENCE  the Python that makes .venv-reference (default: the first of python3.11, python3.10, python3 that fits)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" "$ROOT/scripts/parity.py" "$@"
