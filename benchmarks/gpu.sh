#!/usr/bin/env bash
# All that only a GPU can show, in four parts of at most 4, 8, 8 and 8 minutes on one H100; nothing is downloaded.
#     bash benchmarks/gpu.sh [--model DIR] [kernels|step|long|recipe]     # without a part: all, in this order
#     bash benchmarks/gpu.sh --tiny [PART]                                # the same code in small, on a CPU: two minutes
# kernels  each attention kernel against float64, its rates, copies; this project's tests that need a GPU
# step     a step of SmolLM2 against the CPU's; one rank of Llama 3.1 8B at 1M tokens, tp 8, beside the plan
# long     Llama 3.2 1B at 32K, 128K and 512K tokens, and the longest that trains
# recipe   SmolLM2-135M-Instruct (--model) from 8K to 32K tokens: needles before and after
# Tables and JSON stand in out/gpu as soon as they are there: PART.md is for docs/results.md. What is cut off keeps its rows.
# It takes .venv's Python, or python3 where there is none. Exit code 1 if something failed or was cut off.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 1; }
TINY="" MODEL="" PARTS=()
while [ $# -gt 0 ]; do
  case "$1" in
    --tiny) TINY=yes ;;
    --model) MODEL=${2:-}; [ -f "$MODEL/config.json" ] || fail "--model $MODEL: no config.json there"; shift ;;
    kernels|step|long|recipe) PARTS+=("$1") ;;
    *) fail "$1: usage: bash benchmarks/gpu.sh [--tiny] [--model DIR] [kernels|step|long|recipe]" ;;
  esac
  shift
done
[ "${PARTS[*]}" != recipe ] || [ -n "$MODEL$TINY" ] || fail "recipe: needs --model DIR, SmolLM2-135M-Instruct in Hugging Face layout"
[ ${#PARTS[@]} -gt 0 ] || PARTS=(kernels step long recipe)
PYTHON=python3
[ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
export PYTHONUNBUFFERED=1
if [ -n "$TINY" ]; then
  OUT=out/gpu-tiny KERNELS=flash DEVICE="--device cpu" CONFIG=runs/tiny.json
else
  OUT=out/gpu KERNELS="flash cudnn" DEVICE="" CONFIG=runs/smollm2_135m.json
  $PYTHON -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "no GPU here; try --tiny"
fi

STATUS=0
run() {  # a command, within what the part has left; its output goes to the part's page, too
  local code=0
  timeout $((END > SECONDS ? END - SECONDS : 1)) "$@" > >(tee -a "$PAGE") || code=$?
  [ $code = 0 ] || { STATUS=1; echo "note: ended with $code (124: cut off): $*" | tee -a "$PAGE"; }
}

kernels() {
  run $PYTHON -m benchmarks.kernels ${TINY:+--tiny} $DEVICE --out $OUT/kernels
  run $PYTHON -m pytest -q -p no:cacheprovider tests/test_parallel.py tests/test_memory.py -k "cuda or gpu"
}

step() {
  run $PYTHON -m benchmarks.same_step --config $CONFIG --length ${TINY:+12}8 $DEVICE --attention $KERNELS --out $OUT/same_step.json
}
