#!/usr/bin/env bash
# Sets up .venv on the first call, then lints and tests: bash tests/run.sh [pytest's arguments]

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
bash "$root/launch/setup_env.sh" test
export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
cd "$root"
ruff check .
ruff format --check .
exec python -m pytest "$@"
