#!/usr/bin/env bash
# The root of the repository, errors, and the Python of new environments. The other scripts read it with `source`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() { # what is wrong, the value, where, what to do
    printf 'error\nproblem: %s\nvalue:   %s\nwhere:   %s\nto do:   %s\n' "$@" >&2
    exit 2
}

supported() { # the interpreter, and the first minor version of Python 3 that will do
    "$1" -c "import sys; sys.exit(not (3, $2) <= sys.version_info < (3, 15))" >/dev/null 2>&1
}

find_python() { # the first minor version of Python 3 that will do, and the script that asks
    local candidate candidates=${PYTHON_FOR_VENV:-python3.12 python3.13 python3.11 python3.10 python3.14 python3}
    for candidate in $candidates; do
        if supported "$candidate" "$1"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python from 3.$1 to 3.14 was found" "tried: $candidates" "your PATH" \
        "install Python 3.12, or name one: PYTHON_FOR_VENV=/path/to/python3.12 bash $2"
}

make_venv() { # the Python to make it with, the folder, the script that asks
    "$1" -m venv --clear "$2" || fail "the virtual environment could not be made" "$1 -m venv" "$2" \
        "on Debian or Ubuntu: sudo apt install python3-venv; then run again: bash $3"
}
