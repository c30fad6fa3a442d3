#!/usr/bin/env bash
# Set up everything and run the tests.
#     bash runs/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash runs/setup.sh
.venv/bin/python -m pytest "$@"
