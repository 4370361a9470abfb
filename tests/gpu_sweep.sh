#!/usr/bin/env bash
# What early stopping saves, what sharing a GPU gains, trials of two GPUs; SHAPE=tiny: small.
# Usage: bash tests/gpu_sweep.sh OUT [rates|rates8|ranks|asha]      rates8: with 8 trials at a time alone
set -u
out=$(realpath -m "${1:?usage: bash tests/gpu_sweep.sh OUT [rates|rates8|ranks|asha]}"); part=${2:-rates} more=()
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[ "${SHAPE:-}" != tiny ] || more+=(--small)
[ "$part" != rates8 ] || more+=(--at_a_time 8)
folder=${FIGURES_FOLDER:-${TMPDIR:-/tmp}}/sweeps_$part
exec python3 tests/gpu_sweep.py "$out" "${part%8}" --folder "$folder" "${more[@]}"
