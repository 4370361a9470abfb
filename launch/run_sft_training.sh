#!/usr/bin/env bash
# Sets up .venv on the first call, then trains: bash launch/run_sft_training.sh [--model_path M --data_root D ...]
# Every argument goes to launch/train.py; without any it trains the embedded base on the embedded data.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
bash "$root/launch/setup_env.sh"
export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
exec python "$root/launch/train.py" "$@"
