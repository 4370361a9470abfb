#!/usr/bin/env bash
# Takes the figures that only a GPU can give: one row of a table each, written as soon as it is known.
# Usage: bash tests/gpu_figures.sh OUT [PART[:CHOICE[,CHOICE...]] ...]      without a part: all of them, in turn
#   speed     steps of the 4b shape at batch 1, 8, 32, the plain loop, filling, start
#   start     start to first step of a process that is not the machine's first: with nothing compiled yet, then again
#   profile   the kernels of a step at batch 1 and 32, and the share of the time that none runs
#   seed_job  976 training and 244 validation images, 15 epochs, batch 8, features included
#   memory    most GPU memory of a run with batch 1, all layers recomputed, features on the disk
#   shapes    1b, 8b and 4b_999x960 (images of 10 tiles), without targets
#   scaling   two ranks against one; needs two GPUs
#   loss      ComboLoss forward and backward
#   sizes     load, train, save, export: 8b internlm2-8b qwen2_5vl-3b qwen2_5vl-7b qwen3vl-4b 4b (cold)
#   tests     pytest -m gpu, then the tests of engine, checkpoints and training, which take the GPU where there is one
#   batches   what batch 1, 4 and 16 reach in Dice at equal epochs and at equal time, on the demo: tests/gpu_batch_sizes.py
#   sweep     trials per hour (rates, rates8), trials of two ranks (ranks), what early stopping saves (asha): needs ray
# OUT receives figures.md, figures.json and logs.tar.gz, eight files at most. Rows of an earlier call stay.
# A command has a time limit of its own; a failure does not keep the others from running.
#   LIMIT_S=580          seconds for the whole call: what no longer fits is named as not run
#   FIGURES_FOLDER=DIR   weights, images, features: a fast disk with 60 GB; the next call finds them there
#   SHAPE=tiny           the embedded model and few images: shows on a CPU that everything runs
# Uses the python3 of the machine as it is: torch, transformers, peft, deepspeed and pytest must be there.
set -u
usage='usage: bash tests/gpu_figures.sh OUT [PART[:CHOICE[,CHOICE...]] ...]'
out=$(realpath -m "${1:?$usage}"); shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
all=(speed start profile seed_job memory shapes scaling loss sizes tests batches sweep)
for part in "$@"; do
  case " ${all[*]} " in *" ${part%%:*} "*) ;; *) echo "error: no part ${part%%:*}; there are: ${all[*]}" >&2; exit 2 ;; esac
  case $part in
    shapes:* | sizes:* | sweep:*) ;;
    *:*) echo "error: $part: only shapes, sizes and sweep have choices" >&2; exit 2 ;;
  esac
done
export SHAPE=${SHAPE:-4b} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export FIGURES_FOLDER=${FIGURES_FOLDER:-${TMPDIR:-/tmp}/sa2va_sft_figures}
export SA2VA_SFT_CACHE=$FIGURES_FOLDER/cache
work=$FIGURES_FOLDER logs=$FIGURES_FOLDER/logs failed=0
mkdir -p "$out" "$work"
rm -rf "$logs"; mkdir "$logs"
[ ! -f "$out/logs.tar.gz" ] || tar -xzf "$out/logs.tar.gz" -C "$logs"
if [ "$SHAPE" = tiny ]; then
  steps=(--steps 2 --warm_up 1 --images 4) few=("${steps[@]}") ends=1,4 batches=1,4 shapes=(tiny tiny_128x96)
  seed_images=5 seed_epochs=2 losses=(--batches 2x64 --calls 4 --without_compile) sizes=(small)
else
  steps=(--images 1220) few=(--steps 10) ends=1,32 batches=8,32 shapes=(1b 8b 4b_999x960)
  seed_images=1220 seed_epochs=15 losses=() sizes=(8b internlm2-8b qwen2_5vl-3b qwen2_5vl-7b qwen3vl-4b 4b)
fi

measure() { # NAME SECONDS FILE, then the command; FILE "" for none
  local name=$1 seconds=$2 read=$3 left; shift 3
  if [ -n "${LIMIT_S:-}" ]; then
    left=$((LIMIT_S - SECONDS - 20)) # ending a command and packing take their time
    if ((left < 30)); then skip "$name" "no time left in this call"; return; fi
    if ((left < seconds)); then seconds=$left; fi
  fi
  python3 tests/gpu_figures.py "$out" "$name" "$seconds" ${read:+--read "$read"} -- "$@" || failed=1
}
skip() { python3 tests/gpu_figures.py "$out" "$1" --skip "$2"; }
benchmark() { # NAME SECONDS SHAPE, then flags
  local name=$1 seconds=$2 shape=$3 json; shift 3
  json=$logs/${name//:/_}.json
  measure "$name" "$seconds" "$json" \
    python3 launch/benchmark.py --shape "$shape" --folder "$work" --json "$json" "$@"
}
train() { # NAME SECONDS DATA, then flags
  local name=$1 seconds=$2 data=$3 runs=$work/${1//:/_}_runs; shift 3
  weights
  rm -rf "$runs" "$SA2VA_SFT_CACHE" # features are computed, not found
  measure "$name" "$seconds" "$runs/lora_sft_*/training_log.json" \
    python3 launch/train.py --model_path "$model" --data_root "$data" --output_dir "$runs" --tensorboard false "$@"
  cat "$runs"/lora_sft_*/training.log > "$logs/${name//:/_}_training.log" 2>/dev/null
  rm -rf "$runs" "$SA2VA_SFT_CACHE"
}
weights() { # random ones, written once
  if [ "$SHAPE" = tiny ]; then model=embedded; return; fi
  model=$work/model_$SHAPE
  [ -f "$model/complete" ] || measure weights 240 "" python3 -c \
    'import sys, pathlib; from sft.benchmark import inputs; inputs.write_model(sys.argv[1], pathlib.Path(sys.argv[2]))' \
    "$SHAPE" "$work"
}
images() { # NAME COUNT
  [ -f "$work/$1/dataset.json" ] || measure "$1" 300 "" \
    python3 -m sft.synthetic "$work/$1" --preset sparse --count "$2" --workers 0
}
gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'; }

speed() { benchmark speed 480 "$SHAPE" "${steps[@]}"; }
start() {
  local compiled=$work/compiled flags=(--batch_sizes 8 --images 64 --steps 10 --no_plain)
  [ "$SHAPE" != tiny ] || flags=("${few[@]}" --batch_sizes 1 --no_plain)
  rm -rf "$compiled"
  export TORCHINDUCTOR_CACHE_DIR=$compiled/inductor TRITON_CACHE_DIR=$compiled/triton
  benchmark start:nothing_compiled 240 "$SHAPE" "${flags[@]}"
  benchmark start:compiled 180 "$SHAPE" "${flags[@]}"
  unset TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
  rm -rf "$compiled"
}
profile() { benchmark profile 300 "$SHAPE" "${few[@]}" --batch_sizes "$ends" --profile 3 --no_plain; }
seed_job() {
  images seed_images "$seed_images"
  train seed_job 540 "$work/seed_images" --batch_size 8 --num_epochs "$seed_epochs"
}
memory() {
  local flags=(--gradient_checkpointing true --feature_cache disk)
  images few_images 5
  train memory 240 "$work/few_images" --batch_size 1 --val_batch_size 1 --num_epochs 2 "${flags[@]}"
  benchmark memory:steps 180 "$SHAPE" "${few[@]}" --batch_sizes 1 --no_plain "${flags[@]}"
}
shapes() {
  local choice shape size
  for choice in ${1:-${shapes[*]}}; do
    shape=${choice%%_*} size=512x512
    [ "$shape" = "$choice" ] || size=${choice#*_}
    benchmark "shapes:$choice" 300 "$shape" "${few[@]}" --image_size "$size" --no_plain
    [ "$shape" = "$SHAPE" ] || rm -rf "$work/model_$shape" # the disk holds only so many
  done
}
scaling() {
  if [ "$(gpus)" = 1 ]; then skip scaling "one GPU here, two are needed"; return; fi
  benchmark scaling 420 "$SHAPE" "${few[@]}" --batch_sizes "$batches" --ranks 2 --no_plain
}
loss() { measure loss 300 "$logs/loss/losses.json" python3 tests/gpu_losses.py "$logs/loss" --host "${losses[@]}"; }
sizes() {
  local choice shape cold
  for choice in ${1:-${sizes[*]}}; do
    shape=$choice cold=()
    [ "$choice" != 4b ] || cold=(--cold)
    if [ "$choice" = small ]; then
      shape=$work/small.json
      PYTHONPATH=tests:$PYTHONPATH python3 -c 'import json, small_sa2va as small
print(json.dumps({"config": small.config(), "special_ids": small.tokenizer().get_added_vocab()}))' > "$shape"
    fi
    measure "sizes:$choice" 300 "$logs/sizes_$choice/sizes.json" \
      python3 tests/gpu_sizes.py "$logs/sizes_$choice" "$shape" --folder "$work" "${cold[@]}"
  done
}
tests() {
  local command=(python3 -m pytest -q -p no:cacheprovider --junitxml) file without_ray=()
  if ! python3 -c 'import ray' 2>/dev/null; then
    for file in $(grep -lE '^ *(from|import) (ray|tune)' tests/test_*.py); do without_ray+=("--ignore=$file"); done
  fi
  measure tests 480 "$logs/tests.xml" "${command[@]}" "$logs/tests.xml" -m gpu "${without_ray[@]}" tests
  if [ "$SHAPE" = tiny ]; then return; fi
  measure tests:training 300 "$logs/tests_training.xml" "${command[@]}" "$logs/tests_training.xml" -m "not gpu" \
    tests/test_engine.py tests/test_checkpoint.py tests/test_same_training.py
}
batches() {
  local flags=()
  [ "$SHAPE" != tiny ] || flags=(--sizes 4 --factors 1 --num_epochs 1)
  measure batches 540 "$logs/batches/batch_sizes.json" python3 tests/gpu_batch_sizes.py "$logs/batches" "${flags[@]}"
}
sweep() {
  local choice
  for choice in ${1:-rates ranks asha}; do
    measure "sweep:$choice" 560 "$logs/sweep_$choice/sweep.json" \
      bash tests/gpu_sweep.sh "$logs/sweep_$choice" "$choice"
  done
}

for part in "${@:-${all[@]}}"; do
  name=${part%%:*} choices=
  [ "$name" = "$part" ] || choices=${part#*:}
  "$name" "${choices//,/ }"
done
rm -rf "$SA2VA_SFT_CACHE"
mapfile -t others < <(find "$out" -type f ! -name figures.md ! -name figures.json ! -name logs.tar.gz)
if ((${#others[@]} > 5)); then tar -czf "$out/others.tar.gz" --remove-files -C / "${others[@]#/}"; fi
echo; cat "$out/figures.md"
exit "$failed"
