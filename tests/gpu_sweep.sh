#!/usr/bin/env bash
# What early stopping saves, what sharing a GPU gains, trials of two GPUs; SHAPE=tiny: small.
# Usage: bash tests/gpu_sweep.sh OUT [rates|ranks|asha]
set -u
out=$(realpath -m "${1:?usage: bash tests/gpu_sweep.sh OUT [rates|ranks|asha]}"); part=${2:-rates} small=()
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[ "${SHAPE:-}" != tiny ] || small=(--small)
exec python3 tests/gpu_sweep.py "$out" "$part" --folder "${FIGURES_FOLDER:-${TMPDIR:-/tmp}}/sweeps_$part" "${small[@]}"
