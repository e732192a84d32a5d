#!/usr/bin/env bash
# Sets up what all scripts need: .venv (or the active environment) with the packages of requirements.txt.
#
#   bash scripts/setup.sh [--test]     --test adds what the tests need (pytest, ruff)
#
# Needs Python 3.10 to 3.14 and, when something is to be installed, a network. Quick when nothing changed. If it was
# stopped half-way, run it again; if that does not help, remove .venv first.
#   TORCH_VERSION    the torch to install (default: the installed one if it fits, else 2.13.0)
#   PYTHON_FOR_VENV  the Python that makes .venv (default: the first of python3.12, 3.13, 3.11, 3.10, 3.14, python3 that fits)
# `--interpreter` (for environment.sh) sets up .venv if needed, and prints the environment's Python.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/basics.sh"

say() { printf '[setup] %s\n' "$*" >&2; }

# Lists on stderr the packages that the active environment lacks; versions outside of the tested range are only warned of.
check_packages() {
    "$PYTHON" -I - "$ROOT/pyproject.toml" <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.specifiers import SpecifierSet
except ImportError:
    from pip._vendor.packaging.specifiers import SpecifierSet

text = open(sys.argv[1], encoding="utf-8").read()
wanted = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
missing, untested = [], []
for name, allowed in re.findall(r'^ *"([\w-]+)([<>=][^"]+)"', wanted, re.MULTILINE):
    try:
        found = version(name)
    except PackageNotFoundError:
        missing.append(name + allowed)
        continue
    if not SpecifierSet(allowed).contains(found, prereleases=True):
        untested.append(f"{name}{allowed} ({found} is installed)")
if untested:
    print("[setup] not tested with these versions: " + ", ".join(untested), file=sys.stderr)
if missing:
    print("[setup] missing: " + ", ".join(missing), file=sys.stderr)
sys.exit(bool(missing))
PY
}

has_torch() { compgen -G "$PREFIX/lib*/python3*/site-packages/torch-${1:-}*.dist-info" >/dev/null; }

install() {
    local python torch="torch==${TORCH_VERSION:-2.13.0}" # a CPU build if pip finds one
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        if [[ $PREFIX == "$OWN" ]]; then
            python=$(find_python 10 scripts/setup.sh)
            say "making $PREFIX with $("$python" --version)"
            make_venv "$python" "$PREFIX" scripts/setup.sh
        else
            "$PYTHON" -m ensurepip >&2
        fi
    fi
    if [[ -z ${TORCH_VERSION:-} ]] && has_torch; then torch=""; fi
    say "installing the packages of requirements.txt into $PREFIX"
    # requirements.txt names this project as `.`, which pip reads from the working directory.
    (cd "$ROOT" && "$PYTHON" -m pip install --disable-pip-version-check \
        ${torch:+"$torch"} -r requirements.txt ${EXTRA:+-e ".[$EXTRA]"}) >&2 ||
        fail "pip could not install everything (its own lines above say why)" "requirements.txt${torch:+ and $torch}" "$PREFIX" \
            "without a network, connect or name a mirror or a folder of wheels (PIP_INDEX_URL, PIP_FIND_LINKS); then run again: bash scripts/setup.sh"
    fingerprint >"$STAMP"
}

# Identifies a finished set-up: if it is unchanged, nothing has to be done.
fingerprint() {
    printf 'root %s\nextra %s\n%s\n%s\n' "$ROOT" "$EXTRA" "$(<"$ROOT/requirements.txt")" "$(<"$ROOT/pyproject.toml")"
}

up_to_date() {
    [[ -x $PYTHON && -f $STAMP && "$(<"$STAMP")" == "$(fingerprint)" ]] &&
        { [[ -z ${TORCH_VERSION:-} ]] || has_torch "$TORCH_VERSION"; }
}

EXTRA="" MODE=install
for argument in "$@"; do
    case $argument in
        --test) EXTRA=test ;;
        --interpreter) MODE=interpreter ;;
        -h | --help) sed -n '2,/^\[/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) fail "unknown option" "$argument" "scripts/setup.sh" "bash scripts/setup.sh [--test]" ;;
    esac
done

# Conda's `base` does not count: on many machines it is active in every shell by default.
OWN=$ROOT/.venv
ACTIVE=${VIRTUAL_ENV:-}
if [[ -z $ACTIVE && ${CONDA_DEFAULT_ENV:-} != base ]]; then ACTIVE=${CONDA_PREFIX:-}; fi
if [[ $ACTIVE -ef $OWN ]]; then ACTIVE=""; fi
PREFIX=${ACTIVE:-$OWN}
PYTHON=$PREFIX/bin/python
STAMP=$PREFIX/mmrole-setup.txt
# Once installed, the tests' packages stay.
if [[ -f $STAMP ]] && grep -qx 'extra test' "$STAMP"; then EXTRA=test; fi

if [[ -n $ACTIVE ]] && ! supported "$PYTHON" 10; then
    fail "the active environment has no Python from 3.10 to 3.14" "$("$PYTHON" --version 2>&1 || true)" "$PREFIX" \
        "leave it (deactivate, conda deactivate) and run the same command again: .venv is used then"
fi
if up_to_date; then
    if [[ $MODE == install ]]; then say "nothing to do: $PREFIX is up to date"; fi
elif [[ -n $ACTIVE && $MODE == interpreter ]]; then # the user's environment is not changed
    check_packages || fail "the active environment lacks packages (the line above names them)" "$PREFIX" \
        "VIRTUAL_ENV or CONDA_PREFIX" "bash scripts/setup.sh (installs into it), or leave it and run the same command again"
else
    exec 9>"$ROOT/.venv-setup.lock"
    if command -v flock >/dev/null; then flock 9; fi # one set-up at a time
    if ! up_to_date; then
        started=$SECONDS
        install
        say "done in $((SECONDS - started)) s"
    fi
fi
if [[ $MODE == interpreter ]]; then echo "$PYTHON"; fi
