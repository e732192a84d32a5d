#!/usr/bin/env bash
# Sets up what all scripts need: a virtual environment in .venv (or the active environment), torch, then requirements.txt.
#
#   bash scripts/setup.sh [--test]     --test adds what the tests need (pytest, ruff)
#
# Needs Python 3.10 to 3.12 and, when something is to be installed, a network. Quick when nothing changed; after being
# stopped half-way, the next run goes on. `--interpreter` (for environment.sh) prints the environment's Python.
#   TORCH_VERSION    the torch to install, e.g. 2.13.0 (default: the one that is there if it fits, else 2.13.0)
#   PYTHON_FOR_VENV  the Python that makes .venv (default: the first of python3.12, 3.11, 3.10, python3 that fits)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DEFAULT_TORCH=2.13.0
SUPPORTED='import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))'

say() { printf '[setup] %s\n' "$*" >&2; }

fail() { # what is wrong, the value, where, what to do
    printf 'error\nproblem: %s\nvalue:   %s\nwhere:   %s\nto do:   %s\n' "$@" >&2
    exit 2
}

# The active environment's folder, or nothing. Conda's `base` does not count: it is active in every shell of many
# machines without anybody having chosen it.
active_environment() {
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        echo "$VIRTUAL_ENV"
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        echo "$CONDA_PREFIX"
    fi
}

# Names on stderr what is missing from the environment; out of the tested range is worth a warning only.
# With "strict" as its argument, out of range and training's packages count as missing.
check_packages() {
    "$PYTHON" -I - "$ROOT/requirements.txt" "${TORCH_VERSION:-}" "${1:-}" <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.specifiers import SpecifierSet
except ImportError:
    from pip._vendor.packaging.specifiers import SpecifierSet

path, torch_wanted, strict = sys.argv[1], sys.argv[2], sys.argv[3] == "strict"
missing, untested = [], []
for line in open(path, encoding="utf-8"):
    wanted = re.match(r"([a-z_-]+)([<>=][^#\s]+)", line)
    if not wanted or ("# on demand" in line and not strict):
        continue
    name, allowed = wanted.groups()
    try:
        found = version(name)
    except PackageNotFoundError:
        missing.append(name + allowed)
        continue
    if name == "torch" and torch_wanted and torch_wanted not in (found, found.split("+")[0]):
        missing.append(f"torch {torch_wanted} (TORCH_VERSION; {found} is there)")
    elif not SpecifierSet(allowed).contains(found, prereleases=True):
        untested.append(f"{name}{allowed} ({found} is there)")
missing += untested if strict else []
if untested and not strict:
    print("[setup] not tested with these versions: " + ", ".join(untested), file=sys.stderr)
if missing:
    print("[setup] missing: " + ", ".join(missing), file=sys.stderr)
sys.exit(bool(missing))
PY
}

find_python() {
    local candidate
    for candidate in ${PYTHON_FOR_VENV:-python3.12 python3.11 python3.10 python3}; do
        if "$candidate" -c "$SUPPORTED" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python from 3.10 to 3.12 was found" "tried: ${PYTHON_FOR_VENV:-python3.12 python3.11 python3.10 python3}" \
        "your PATH" "install Python 3.12 (or 3.11, 3.10), or name one: PYTHON_FOR_VENV=/path/to/python3.12 bash scripts/setup.sh"
}

# What the finished set-up is compared with: the same text means that nothing has to be done.
fingerprint() {
    local version
    version=$("$PYTHON" -I -c 'import sys; print(sys.version.split()[0])') || return 1
    printf 'root %s\npython %s\nextra %s\n%s\n%s\n' "$ROOT" "$version" "$EXTRA" \
        "$(<"$ROOT/requirements.txt")" "$(<"$ROOT/pyproject.toml")"
}

up_to_date() {
    [[ -x $PYTHON && -f $STAMP && "$(<"$STAMP")" == "$(fingerprint)" ]] && check_packages 2>/dev/null
}

# Makes .venv, or mends one whose making was cut short. A package without RECORD (pip writes it last) was being
# installed when pip was killed, and pip would take it for whole.
make_venv() {
    local python
    if ! "$PYTHON" -I -c "$SUPPORTED; import pip" >/dev/null 2>&1 || ! "$PYTHON" -I -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        say "making $PREFIX with $("$python" --version)"
        "$python" -m venv --clear "$PREFIX" || fail "the virtual environment could not be made" "$python -m venv" "$PREFIX" \
            "on Debian or Ubuntu: sudo apt install python3-venv; then run again: bash scripts/setup.sh"
    fi
    find "$PREFIX"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' ! -exec test -f '{}/RECORD' ';' \
        -exec rm -r '{}' +
}

pip_install() {
    # requirements.txt names this project as `.`, which pip reads from the working directory.
    (cd "$ROOT" && "$PYTHON" -m pip install --disable-pip-version-check "$@") >&2 ||
        fail "pip could not install everything (its own lines above say why)" "pip install $*" "$PREFIX" \
            "without a network, connect or name a mirror or a folder of wheels (PIP_INDEX_URL, PIP_FIND_LINKS); then run again: bash scripts/setup.sh (it goes on where it stopped)"
}

torch_fits() {
    [[ -z ${TORCH_VERSION:-} ]] && "$PYTHON" -I -c 'import sys
from importlib.metadata import version
from pip._vendor.packaging.specifiers import SpecifierSet
sys.exit(not SpecifierSet(sys.argv[1]).contains(version("torch"), prereleases=True))' "${1#torch}" 2>/dev/null
}

install() {
    local torch
    torch=$(grep '^torch[<>=~]' "$ROOT/requirements.txt")
    [[ $PREFIX == "$OWN" ]] && make_venv
    "$PYTHON" -I -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >&2
    if ! torch_fits "$torch"; then
        say "torch first: ${TORCH_VERSION:-$DEFAULT_TORCH}"
        pip_install "$torch" "torch==${TORCH_VERSION:-$DEFAULT_TORCH}"
    fi
    say "the rest of requirements.txt"
    pip_install -r requirements.txt ${EXTRA:+-e ".[$EXTRA]"}
    check_packages strict || fail "packages are still missing after the installation" "see the line above" "$PREFIX" \
        "remove $OWN and run again: bash scripts/setup.sh"
    fingerprint >"$STAMP.$$" && mv "$STAMP.$$" "$STAMP"
}

EXTRA="" MODE=install
for argument in "$@"; do
    case $argument in
        --test) EXTRA=test ;;
        --interpreter) MODE=interpreter ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) fail "unknown option" "$argument" "scripts/setup.sh" "bash scripts/setup.sh [--test]" ;;
    esac
done

OWN=$ROOT/.venv
ACTIVE=$(active_environment)
if [[ $ACTIVE -ef $OWN ]]; then ACTIVE=""; fi
PREFIX=${ACTIVE:-$OWN}
PYTHON=$PREFIX/bin/python
STAMP=$PREFIX/mmrole-setup.txt
# Once there, the tests' packages stay: a plain set-up after one with --test is nothing new.
[[ -f $STAMP ]] && grep -qx 'extra test' "$STAMP" && EXTRA=test

if [[ -n $ACTIVE ]]; then
    "$PYTHON" -c "$SUPPORTED" 2>/dev/null || fail "the active environment has no Python from 3.10 to 3.12" \
        "$("$PYTHON" --version 2>&1 || true)" "$PREFIX" "leave it (deactivate, conda deactivate) and run the same command again: a .venv of its own is used then"
    if [[ $MODE == interpreter ]]; then
        check_packages || fail "the active environment lacks packages (the line above names them)" "$PREFIX" \
            "VIRTUAL_ENV or CONDA_PREFIX" "bash scripts/setup.sh (installs into it), or leave it and run the same command again"
    fi
fi
if [[ -z $ACTIVE || $MODE == install ]] && ! up_to_date; then
    exec 9>"$ROOT/.venv-setup.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another set-up is running; waiting for it"
        flock 9
    fi
    if ! up_to_date; then
        started=$SECONDS
        install
        say "done in $((SECONDS - started)) s: $PREFIX"
    fi
elif [[ $MODE == install ]]; then
    say "nothing to do: $PREFIX is up to date"
fi
if [[ $MODE == interpreter ]]; then echo "$PYTHON"; fi
