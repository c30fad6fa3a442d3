#!/usr/bin/env bash
# Make .venv and install the pinned packages; a second run finds them there and returns at once.
#     bash runs/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $(python3 --version 2>&1) is too old or missing; install Python 3.11 or newer" >&2; exit 1; }

wanted=$(cat requirements.txt requirements-dev.txt)
[ "$(cat .venv/installed.txt 2>/dev/null || true)" = "$wanted" ] && exit 0

echo "setting up .venv (once; a minute or two)"
.venv/bin/python -m pip --version > /dev/null 2>&1 || python3 -m venv .venv || {
  echo "error: python3 -m venv failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
echo "$wanted" > .venv/installed.txt
