#!/usr/bin/env bash
# Makes or reuses the environment of this checkout: bash launch/setup_env.sh [test]
#
# Gives .venv/ with the versions of launch/constraints.txt and this package, editable; with `test` also what the tests
# need. Takes $PYTHON, else the first Python 3.11 or 3.12 on the PATH, and pip's own settings (index, proxy, cache).
# Speaks on stderr alone. Where there can be no environment: one line that starts with "error:", and exit code 2.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
venv=$root/.venv
log=$venv/setup.log
constraints=$root/launch/constraints.txt
extra=${1:-}

# "incomplete", or the three lines of an environment that is whole: Python and place, hash of the versions, extra.
state=$venv/setup_state

main() {
  if is_ready; then return; fi
  take_lock
  if is_ready; then return; fi # another call made it while this one waited
  trap 'hide_progress; echo "error: interrupted; the next call starts again" >&2; exit 130' INT TERM
  if fits_python; then say "updating .venv"; else make_venv; fi
  install
  say "environment ready after $SECONDS s"
}

is_ready() {
  fits_python && [ "$(recorded 2)" = "$(hash_of_versions)" ] && [[ -z $extra || $(recorded 3) == "$extra" ]]
}

# Whether .venv is whole and works with its Python, in its place, and is what $PYTHON asks for.
fits_python() {
  local version
  version=$(version_of "$venv/bin/python") && [ "$(recorded 1)" = "$(place "$version")" ] &&
    [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$version" ]]
}

place() { echo "Python $1 in $venv"; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

hash_of_versions() { cat "$root/pyproject.toml" "$constraints" | sha256sum; }

recorded() { sed -n "$1p" "$state" 2>/dev/null || true; }

# Lets one call at a time go on; the lock ends with this process and the pip it started.
take_lock() {
  command -v flock >/dev/null || fail "flock is missing; install util-linux"
  { exec 9<>"$constraints"; } 2>/dev/null || fail "no permission to write in $root; clone it to where you may write"
  flock --nonblock 9 && return
  say "another set-up of this checkout is running; waiting for it"
  flock 9
}

make_venv() {
  local python
  python=$(find_python)
  mkdir -p "$venv" 2>/dev/null || fail "cannot make $venv: no permission to write, or the disk is full"
  if [ ! -e "$state" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv was not made by this script; move it away and start again"
  fi
  find "$venv/" -mindepth 1 -delete # not the folder itself: it may be a link to another disk
  echo incomplete 2>/dev/null >"$state" || fail "cannot write $state: no permission, or the disk is full"
  say "making .venv with Python $(version_of "$python"): takes minutes, once (log: $log)"
  "$python" -m venv "$(cd "$venv" && pwd -P)" >"$log" 2>&1 || explain "$python -m venv failed" # venv takes no link
}

# Prints the first Python that will do; with $PYTHON set, that one or none.
find_python() {
  local candidates=(python3 python3.12 python3.11 python) candidate reason rejected=
  PATH=:$PATH:
  PATH=${PATH//":$venv/bin:"/:} # active or not, .venv cannot be made from itself
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    reason=$(unfit "$candidate")
    if [ -z "$reason" ]; then
      command -v "$candidate"
      return
    fi
    rejected+=", $candidate $reason"
  done
  [ -n "$rejected" ] || rejected=", ${PYTHON:-python3} not found"
  fail "Python 3.11 or 3.12 with venv is needed (${rejected#, }); install one, or name it: PYTHON=/path/to/python3.12"
}

# Prints why a Python cannot be used, or nothing.
unfit() {
  local version
  version=$(version_of "$1") || version=none
  case $version in
    3.11 | 3.12) "$1" -c 'import venv, ensurepip' 2>/dev/null || echo "has no venv: apt install python$version-venv" ;;
    none) echo "does not start" ;;
    *) echo "is $version" ;;
  esac
}

install() {
  local version extras=${extra:-$(recorded 3)} # the test extra, once there, is kept up to date
  echo incomplete >"$state"
  : >"$log"
  show_progress
  pip_install setuptools # first, and no isolation below: sdists, too, are built with the pinned version
  pip_install --no-build-isolation --editable "$root${extras:+[$extras]}"
  hide_progress
  version=$(version_of "$venv/bin/python")
  printf '%s\n' "$(place "$version")" "$(hash_of_versions)" "$extras" >"$state.new"
  mv "$state.new" "$state"
}

# pip stays in the foreground, so that Ctrl-C reaches it. --no-user: some clusters set PIP_USER.
pip_install() {
  "$venv/bin/python" -m pip install --no-user --no-input --progress-bar off --disable-pip-version-check \
    --constraint "$constraints" "$@" >>"$log" 2>&1 || explain "pip failed"
}

# On a terminal: one line that shows what pip is doing.
show_progress() {
  [ -t 2 ] || return 0
  while sleep 1; do printf '\r\033[K%5d s  %.70s' "$SECONDS" "$(tail -n 1 "$log")" >&2; done 9>&- &
  progress=$!
  trap hide_progress EXIT
}

hide_progress() {
  [ -n "${progress:-}" ] || return 0
  kill "$progress" 2>/dev/null || true
  progress=
  printf '\r\033[K' >&2
}

# Ends with the cause that the log shows, or with the log's end.
explain() {
  hide_progress
  if grep -qE 'No space left|Disk quota exceeded' "$log"; then
    fail "the disk is full: $venv, pip's cache or ${TMPDIR:-/tmp}; the environment takes 2 to 10 GB (log: $log)"
  elif grep -qE 'connection broken by|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError' "$log"; then
    fail "pip cannot reach its index; check the network and 'pip config list' (log: $log)"
  fi
  tail -n 15 "$log" >&2
  fail "$1; its last lines are above (log: $log)"
}

say() { echo "setup: $1" >&2; }

fail() {
  echo "error: $1" >&2
  exit 2
}

main
