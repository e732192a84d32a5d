#!/usr/bin/env bash
# Checks the project: sets everything up, then format, lint and tests.
#
#   bash scripts/test.sh                    without the tests marked slow
#   bash scripts/test.sh --all              everything, qwen_vl's tests once more with the oldest supported packages, and
#                                           the tests of vLLM in its own environment
#   bash scripts/test.sh tests/eval -k csv  other arguments go to pytest (paths from the repository)
#
# With CI=true it does what --all does.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail

bash "$(dirname "${BASH_SOURCE[0]}")/setup.sh" --test
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"

ALL=${CI:-false}
ARGUMENTS=()
for argument in "$@"; do
    if [[ $argument == --all ]]; then ALL=true; else ARGUMENTS+=("$argument"); fi
done

LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
RESULTS=()

# Two files of tests at once on two cores, four on more; each process computes with one thread.
PARALLEL=(-n "$(($(nproc) < 4 ? $(nproc) : 4))" --dist loadfile --no-loadscope-reorder)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run_pytest() { # its name, the interpreter, then pytest's arguments
    local name=$1 python=$2
    echo "== $name"
    "$python" -m pytest --durations=10 --durations-min=1 "${@:3}" | tee "$LOG"
    RESULTS+=("$name" "$(tail -n 1 "$LOG")")
}

# An environment on top of this one that has the lower end of every range in pyproject.toml. Not of torch's: each of
# its builds is gigabytes; not of deepspeed's, which has to be compiled. It also has gradio, which needs Pillow below 13.
make_oldest() {
    local oldest=$ROOT/.venv-oldest pins
    mapfile -t pins < <(sed -nE '/^test = /q; /"(torch|deepspeed)>/d; s/^ +"([a-z0-9_-]+)>=([0-9.]+),.*/\1==\2/p' pyproject.toml)
    if [[ "$("$oldest/bin/python" --version 2>/dev/null)" != "$("$PYTHON" --version)" ]]; then
        "$PYTHON" -m venv --clear --without-pip "$oldest"
    fi
    local below above
    below=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    above=$("$oldest/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$below')" >"$above/below.pth"
    "$oldest/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}"
    OLDEST=$oldest/bin/python
}

# vLLM pins other versions of the packages, so its tests run in an environment of their own.
run_vllm() {
    local python
    if python=$(bash scripts/vllm_environment.sh --test); then
        run_pytest "vLLM" "$python" tests/vllm
    else
        RESULTS+=("vLLM" "skipped: its environment cannot be made here, see the lines of scripts/vllm_environment.sh")
    fi
}

started=$SECONDS
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
if [[ $ALL == true ]]; then
    run_pytest "all tests" "$PYTHON" "${PARALLEL[@]}" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
    make_oldest
    run_pytest "qwen_vl and web, oldest supported packages" "$OLDEST" "${PARALLEL[@]}" tests/qwen_vl tests/web
    run_vllm
else
    run_pytest "quick tests (all of them: --all)" "$PYTHON" "${PARALLEL[@]}" -m "not slow" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
fi
echo "== passed in $((SECONDS - started)) s"
printf '%s\n' "${RESULTS[@]}"
