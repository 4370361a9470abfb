#!/usr/bin/env bash
# What early stopping saves and what sharing a GPU gains: bash tests/gpu_sweep.sh OUT [rates|asha]; SHAPE=tiny: small.
set -u
out=$(realpath -m "${1:?usage: bash tests/gpu_sweep.sh OUT [rates|asha]}"); part=${2:-rates} small=()
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[ "${SHAPE:-}" != tiny ] || small=(--small)
exec python3 tests/gpu_sweep.py "$out" "$part" --folder "${FIGURES_FOLDER:-${TMPDIR:-/tmp}}/sweeps_$part" "${small[@]}"
