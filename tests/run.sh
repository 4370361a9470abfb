#!/usr/bin/env bash
# Sets up .venv on the first call, then lints and tests: bash tests/run.sh [pytest's arguments]
# A test file runs whole in one of up to four processes; -n 0 keeps everything in one.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
bash "$root/launch/setup_env.sh" test
export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
cd "$root"
python -m ruff check .
python -m ruff format --check .
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
