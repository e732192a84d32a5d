#!/usr/bin/env bash
# Chat with a character: starts a page and an OpenAI-compatible API on this machine, or a chat in the terminal.
#
#   bash scripts/chat.sh                                              then open http://127.0.0.1:8000/
#   bash scripts/chat.sh --terminal --character "Hermione Granger"
#
#   MODEL_PATH   checkpoint or LoRA folder (default: model_weights/MMRole-Agent, else the demo's agent)
#   DATA_ROOT    the data root with the characters (default: the repository if it has profiles/, else the demo's world)
#   ENDPOINT, MODEL   an OpenAI-compatible endpoint (…/v1) and its model's name, instead of a checkpoint
#   SAVE_TO      the data root into which the page saves chats (default: my_data in the repository)
#   HOST, PORT   where to listen (127.0.0.1, 8000); for other machines it needs MMROLE_KEY, the clients' key
# Further flags: bash scripts/chat.sh --help
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DEMO_DIR=${DEMO_DIR:-$ROOT/demo}
if [[ -z ${MODEL_PATH:-}${ENDPOINT:-} && " $*" != *" --model_path"* && " $*" != *" --endpoint"* ]]; then
  MODEL_PATH=$ROOT/model_weights/MMRole-Agent
  if [[ ! -d $MODEL_PATH && -d $DEMO_DIR/model_weights/MMRole-Agent ]]; then
    MODEL_PATH=$DEMO_DIR/model_weights/MMRole-Agent
  fi
fi
if [[ -z ${DATA_ROOT:-} ]]; then
  if [[ ! -d $ROOT/profiles && -d $DEMO_DIR/world ]]; then DATA_ROOT=$DEMO_DIR/world; else DATA_ROOT=$ROOT; fi
fi
WHO=(${MODEL_PATH:+--model_path "$MODEL_PATH"} ${ENDPOINT:+--endpoint "$ENDPOINT"} ${MODEL:+--model "$MODEL"})

# The page's packages are installed when they are first needed.
if [[ " $* " != *" --terminal "* && " $* " != *" --help "* ]] && ! "$PYTHON" -c 'import gradio, fastapi, uvicorn' 2>/dev/null; then
  echo "[chat] installing the page's packages (gradio, fastapi, uvicorn)" >&2
  (cd "$ROOT" && "$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[web]") >&2
fi
exec "$PYTHON" "$ROOT/web" ${WHO[@]+"${WHO[@]}"} --data_root "$DATA_ROOT" --save_to "${SAVE_TO:-$ROOT/my_data}" \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
