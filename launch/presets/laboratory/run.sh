#!/usr/bin/env bash
# Run the whole laboratory: OUT=DIR launch/presets/laboratory/run.sh
# Finished steps are skipped, and an interrupted one goes on.
set -euo pipefail
: "${OUT:=runs/laboratory}"
export OUT
here=$(dirname "$0")
PYTHON=${PYTHON:-python}
alignpro=("$PYTHON" -m alignpro)

[ -f "$OUT/second.jsonl" ] || "$PYTHON" "$here/prepare.py" --out "$OUT"
if [ ! -d "$OUT/second_target/model" ]; then
  resume=()
  [ ! -f "$OUT/second_target/config.yaml" ] || resume=(--resume)
  "${alignpro[@]}" sft "$here/second_target.yaml" "${resume[@]}"
fi
"${alignpro[@]}" experiment "$here/experiment.yaml"
run() { # TASK METHOD SEED
  echo "$OUT/experiment/cells/$1/first/$2/small/seed_$3/run"
}
for seed in 0 1 2; do
  right=$(run right align_pro "$seed") capitals=$(run capitals other_reward "$seed")
  fair=$OUT/mixtures/max_min_$seed pareto=$OUT/mixtures/pareto_$seed
  [ -f "$fair/config.yaml" ] ||
    "${alignpro[@]}" mix "$right" "$capitals" --max-min --seed "$seed" --out "$fair"
  [ -f "$pareto/pareto.json" ] ||
    "${alignpro[@]}" pareto "$right" "$capitals" --trained "0.5=$(run half_each other_reward "$seed")" \
      --mixed "$fair" --weights 0,0.5,1 --data "$OUT/heldout.jsonl" --prompts 112 --seed "$seed" --out "$pareto"
done
