#!/usr/bin/env bash
# Runs all of MMRole on a small made-up world, on a CPU: trains an agent and a judge, lets the agent answer and the judge
# review, and prints the results.
#
#   bash scripts/quickstart.sh
#
# Sets everything up first. Needs no download of data or weights: it draws characters, pictures and a tiny base
# checkpoint from a seed. The same command resumes it, and keeps what is finished.
#   DEMO_DIR   the output folder (default: demo in the repository); remove it to start again
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DEMO_DIR=${DEMO_DIR:-$ROOT/demo}
WORLD=$DEMO_DIR/world
AGENT=mmrole-agent
BASE_MODEL=$DEMO_DIR/model_weights/Qwen-VL-Chat
AGENT_MODEL=$DEMO_DIR/model_weights/MMRole-Agent
JUDGE_MODEL=$DEMO_DIR/model_weights/MMRole-Eval_RM
FAILED_REVIEWS=1  # RM_review's status if all is done but some reviews could not be read
# The demo's own settings, found by trial for the tiny base, and not the recipe of finetune_*.sh: batches of 4 that are
# one loss group each, a learning rate 300 times as large with a cosine, transformers' weight decay, no checkpoints.
TRAINING=(--bf16 False --gradient_checkpointing False --learning_rate 3e-3 --lr_scheduler_type cosine
    --warmup_steps 0.05 --loss_group step --fill_to 4 --decay_all False --seed 0 --logging_steps 5
    --save_strategy no --resume_save_steps 0)
export CUDA_VISIBLE_DEVICES=  # such small matrices gain nothing from a GPU, and little from a second thread
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

took=()
step() {
    now=$SECONDS
    name=$*
    printf '\n== %s\n' "$*"
}
# Records how long the current step took, for the summary.
done_step() { took+=("$(printf '%5d s  %s' $((SECONDS - now)) "$name")"); }

# Runs a command that makes FOLDER.part; FOLDER appears only when it is complete.
make_once() {
    local folder=$1
    shift
    if [[ -d $folder ]]; then
        echo "kept: $folder"
        return
    fi
    rm -rf "$folder.part"
    mkdir -p "$(dirname "$folder")"
    "$@" | sed 's/\.part\b//'
    mv "$folder.part" "$folder"
}

# train_once FOLDER SCRIPT FLAG…: from the base; the trainer writes training.json last, after the model.
train_once() {
    local folder=$1 script=$2
    shift 2
    if grep -qs '"state": "finished"' "$folder/training.json"; then
        echo "kept: $folder"
        return
    fi
    MODEL_PATH=$BASE_MODEL OUTPUT_DIR=$folder GLOBAL_BATCH=4 MICRO_BATCH=4 PROCESSES=1 NNODES=1 \
        bash "$ROOT/finetune/$script" "${TRAINING[@]}" "$@"
}

finished() { find "$EVAL_DIR" -path "*-test_$1/$AGENT/*_test.json" | wc -l; }

started=$SECONDS
export DATA_ROOT=$WORLD EVAL_DIR=$DEMO_DIR/eval AGENT
step "1/7 a made-up world: characters, profiles, pictures, dialogues, training and test samples, reviews"
make_once "$WORLD" "$PYTHON" "$ROOT/data_utils/demo" "$WORLD.part" --seed 0 \
    --review_prompts eval.review_prompt:review_prompts
done_step

step "2/7 a tiny base checkpoint in the released layout, untrained"
make_once "$BASE_MODEL" "$PYTHON" "$ROOT/scripts/make_tiny_checkpoint.py" "$BASE_MODEL.part" --corpus "$WORLD" --seed 1
done_step

step "3/7 the agent learns to speak as the characters (finetune/finetune_ds.sh)"
train_once "$AGENT_MODEL" finetune_ds.sh --num_train_epochs 4
done_step

step "4/7 the judge learns to review (finetune/finetune_RM_ds.sh)"
train_once "$JUDGE_MODEL" finetune_RM_ds.sh --num_train_epochs 3
done_step

step "5/7 the agent answers the test files (inference.sh)"
MODEL_PATH=$AGENT_MODEL bash "$ROOT/inference.sh" --max_new_tokens 96
done_step

step "6/7 the judge reviews the answers on eight metrics (eval/RM_review.sh)"
status=0
MODEL_PATH=$JUDGE_MODEL bash "$ROOT/eval/RM_review.sh" --max_new_tokens 64 || status=$?
if [[ $status -ne 0 ]] && ! [[ $status -eq $FAILED_REVIEWS && $(finished reviews) -eq $(finished answers) ]]; then
    exit "$status"
fi
done_step

step "7/7 the results: scores, table, chart (eval/RM_result.sh)"
bash "$ROOT/eval/RM_result.sh"
done_step

cat <<END

== Done in $((SECONDS - started)) s. It is all in $DEMO_DIR:
  world/          the data: data, RM_data, dialogues, images, profiles, laid out as the published data set is
  model_weights/  the base, the agent and the judge, laid out as the released ones are; how the training went:
                  model_weights/MMRole-Agent/loss.png, model_weights/MMRole-Eval_RM/loss.png
  eval/           answers, reviews, results; the table is eval/report/table.md, the page for a browser eval/report/report.html

How long each step took:
$(printf '%s\n' "${took[@]}")
END
if [[ $status -eq $FAILED_REVIEWS ]]; then
    cat <<END

Some reviews could not be read: RM_review names them above. They are counted as failures and get no score.
END
fi
again=''
[[ $DEMO_DIR == "$ROOT/demo" ]] || again="DEMO_DIR=$(printf %q "$DEMO_DIR") "
cat <<END

Agent and judge have a million weights and saw some hundred samples: the numbers show that the road works, no more.
Next, talk with the agent's characters (a page in your browser; it answers in the demo's few sentences):
  ${again}bash scripts/chat.sh
Next, with the real weights and data in place (README.md, "On real data"):
  DATA_ROOT=../MMRole_dataset bash inference.sh
  DATA_ROOT=../MMRole_dataset bash eval/RM_review.sh
  bash eval/RM_result.sh
END
