#!/usr/bin/env bash
# Takes figures side by side on a machine with several GPUs: each lane has GPUs and a share of the cores of its own.
# Usage: bash tests/gpu_lanes.sh OUT "GPUS PART[:CHOICE,...] [PART ...]" [LANE ...]      parts: see gpu_figures.sh
#   bash tests/gpu_lanes.sh OUT "1 speed" "1 tests sweep:rates8" "2 shapes"
# OUT receives figures.md and lanes.tar.gz, renewed as rows come: a call that is cut off has told what it knew.
# LIMIT_S, FIGURES_FOLDER, SHAPE: see gpu_figures.sh; the next call with as many lanes finds their folders.
set -u
usage='usage: bash tests/gpu_lanes.sh OUT "GPUS PART [PART ...]" [LANE ...]'
out=$(realpath -m "${1:?$usage}"); shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
work=${FIGURES_FOLDER:-${TMPDIR:-/tmp}/sa2va_sft_figures}/lanes all=0 first=0 number=0 failed=0 lanes=()
for lane in "$@"; do
  [[ $lane =~ ^[1-9][0-9]*\ +[a-z] ]] || { echo "error: lane '$lane'; $usage" >&2; exit 2; }
  all=$((all + ${lane%% *}))
done
((all)) || { echo "$usage" >&2; exit 2; }
mkdir -p "$out" "$work"
cores=$(nproc)

collect() {
  (cd "$work" && cat ./*/out/figures.md > figures.md && mv figures.md "$out")
  (cd "$work" && tar -czf lanes.tar.gz ./*/out ./*/log && mv lanes.tar.gz "$out")
} 2>/dev/null

for lane in "$@"; do
  read -r count parts <<< "$lane"
  number=$((number + 1)) folder=$work/$number
  mkdir -p "$folder"
  gpus=$(seq -s, "$first" $((first + count - 1)))
  begin=$((first * cores / all)) end=$(((first + count) * cores / all - 1))
  own=$begin-$((end > begin ? end : begin))
  # shellcheck disable=SC2086  # the parts are words
  CUDA_VISIBLE_DEVICES=$gpus FIGURES_FOLDER=$folder taskset -c "$own" \
    bash tests/gpu_figures.sh "$folder/out" $parts > "$folder/log" 2>&1 &
  lanes+=($!) first=$((first + count))
done
while [ -n "$(jobs -r)" ]; do collect; sleep 2; done
for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done
collect
cat "$out/figures.md"
exit "$failed"
