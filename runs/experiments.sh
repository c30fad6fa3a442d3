#!/usr/bin/env bash
# What the paper claims and its readers ask, as experiments with a model of 0.7M parameters; then docs/experiments.md,
# its tables and figures. Killed anywhere, the same command goes on: no run is made twice.
#     bash runs/experiments.sh [OUT]                              # OUT out/experiments; an hour and a half on two free cores
#     SEEDS="0 1 2 3 4 5 6 7" bash runs/experiments.sh            # more seeds see smaller effects
#     SIZE=toy SEEDS="0 1" bash runs/experiments.sh out/toy       # shows in ten minutes that all runs, and measures nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-out/experiments} SEEDS=${SEEDS:-0 1 2 3 4} SIZE=${SIZE:-full}
bash runs/setup.sh
PATH="$PWD/.venv/bin:$PATH"

for name in rope factor separator mask steps short hops base depth; do
  python -m tools.experiment "$name" --seeds $SEEDS --size "$SIZE" --out "$OUT"
done
PAGE=docs FIGURES=assets
[ "$SIZE" = full ] || { PAGE=$OUT FIGURES=$OUT; }  # what measures nothing is no page of ours
python -m tools.report "$OUT" --text docs/experiments_text.md --out "$PAGE/experiments.md" --figures "$FIGURES"
echo "wrote $PAGE/experiments.md"
