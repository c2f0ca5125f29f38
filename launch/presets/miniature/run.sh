#!/usr/bin/env bash
# Run the whole miniature pipeline: DATA=DIR OUT=DIR launch/presets/miniature/run.sh
# Each step is one command. Finished steps are skipped, and an interrupted one resumes.
set -euo pipefail
: "${DATA:?the directory with the data files}"
: "${OUT:=runs/miniature}"
export DATA OUT
here=$(dirname "$0")
PYTHON=${PYTHON:-python}

[ -d "$OUT/records" ] || "$PYTHON" "$here/prepare.py" --data "$DATA" --out "$OUT"
train() { # COMMAND NAME CONFIG...
  local command=$1 name=$2 resume=()
  shift 2
  [ ! -d "$OUT/$name/model" ] || return 0
  [ ! -f "$OUT/$name/config.yaml" ] || resume=(--resume)
  "$PYTHON" -m alignpro "$command" "$@" "${resume[@]}"
}
train sft sft_target "$here/sft_target.yaml"
train sft sft_prompter "$here/sft_prompter.yaml"
train reward reward "$here/reward.yaml"
train train align_pro "$here/prompts.yaml" "$here/train.yaml"
train rlhf oracle "$here/prompts.yaml" "$here/rlhf.yaml"
[ -f "$OUT/evaluation/summary.json" ] || "$PYTHON" -m alignpro eval "$here/prompts.yaml" "$here/eval.yaml"
