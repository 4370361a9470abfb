#!/usr/bin/env bash
# What CI has no device for: the demo and the researcher's job in bf16 on one GPU, then the GPU tests.
# Usage: bash tests/gpu.sh OUT [DATA [FLAGS]]
# OUT receives logs and pictures; DATA is a folder of images and masks for the job, FLAGS are its flags (--group_pattern).
# Uses the python3 of the machine as it is: torch with CUDA, transformers, peft, deepspeed and pytest must be there.
set -u
out=$(realpath -m "${1:?usage: bash tests/gpu.sh OUT [DATA [FLAGS]]}"); job=(--data_root "${2:-embedded}" "${@:3}")
mkdir -p "$out"; cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpu.txt"

run() { # name, then the flags of launch/train.py
  local name=$1; shift
  echo "== $name: python launch/train.py $*"
  local started=$SECONDS
  python3 launch/train.py --output_dir "$out/$name" "$@" > "$out/$name.txt" 2>&1 || echo "FAILED: see $name.txt"
  echo "$((SECONDS - started)) s in all"
  grep -E '^(Val 0|Best|  base|  tuned)|error' "$out/$name.txt"
  grep -E '^Epoch' "$out/$name.txt" | tail -n 1
  cp "$out/$name"/lora_sft_*/comparison.png "$out/$name.png" 2>/dev/null
}
run demo_bf16 --config launch/configs/demo.yaml --precision bf16
run demo_lora_alone_bf16 --config launch/configs/demo.yaml --precision bf16 --train_modules none
run vessel --config launch/configs/vessel.yaml "${job[@]}"
run vessel_checkpointing_off --config launch/configs/vessel.yaml "${job[@]}" --gradient_checkpointing false

python3 -m pytest -q -m gpu tests 2>&1 | tee "$out/pytest.txt" | tail -n 15
python3 -m pytest -q tests/test_engine.py tests/test_checkpoint.py 2>&1 | tee "$out/engine.txt" | tail -n 15
