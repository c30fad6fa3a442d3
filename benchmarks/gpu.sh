#!/usr/bin/env bash
# All that only a GPU can show, in four parts of at most 4, 8, 8 and 8 minutes on one H100; nothing is downloaded.
#     bash benchmarks/gpu.sh [--model DIR] [kernels|step|long|recipe]     # without a part: all, in this order
#     bash benchmarks/gpu.sh --tiny [PART]                                # the same code in small, on a CPU: two minutes
# kernels  each attention kernel against float64, its rates, copies; this project's tests that need a GPU
# step     a step of SmolLM2 against the CPU's; one rank of Llama 3.1 8B at 1M tokens, tp 8, beside the plan
# long     Llama 3.2 1B at 32K, 128K and 512K tokens, and the longest that trains
# recipe   SmolLM2-135M-Instruct (--model, absolute or relative to this repository) from 8K to 32K tokens: needles before and
#          after; without --model the programs only, with a model of random weights
# Tables and JSON stand in out/gpu as soon as they are there: PART.md is for docs/results.md. What is cut off keeps its rows.
# It takes .venv's Python, or python3 where there is none. Exit code 1 if something failed or was cut off.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 1; }
TINY="" MODEL="" PARTS=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,/^set /{/^#/s/^# //p}' benchmarks/gpu.sh; exit 0 ;;
    --tiny) TINY=yes ;;
    --model) MODEL=${2:-}; [ -f "$MODEL/config.json" ] || fail "--model $MODEL: no config.json there"; shift ;;
    kernels|step|long|recipe) PARTS+=("$1") ;;
    *) fail "$1: usage: bash benchmarks/gpu.sh [--tiny] [--model DIR] [kernels|step|long|recipe]" ;;
  esac
  shift
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=(kernels step long recipe)
PYTHON=python3
[ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
export PYTHONUNBUFFERED=1
$PYTHON -c 'import torch, pytest, tiktoken, safetensors, tqdm' 2> /dev/null || fail "$PYTHON lacks packages: bash runs/setup.sh makes a .venv"
if [ -n "$TINY" ]; then
  OUT=out/gpu-tiny KERNELS=flash DEVICE=cpu
  echo "--tiny: shows that it runs; its numbers mean nothing"
else
  OUT=out/gpu KERNELS="flash cudnn" DEVICE=cuda
  $PYTHON -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "no GPU here; try --tiny"
  ! $PYTHON -c 'import flash_attn_interface' 2> /dev/null || KERNELS+=" fa3"
fi
mkdir -p "$OUT"

STATUS=0
run() {  # a command, within what its part has left; what it prints goes to the part's page too
  local code=0
  timeout -k 60 $((END > SECONDS ? END - SECONDS : 1)) "$@" | tee -a "$PAGE" || code=$?
  [ $code = 0 ] || { STATUS=1; echo "note: exit code $code (124, 137: cut off): $*" >&2; }
}
benchmark() { run $PYTHON -m "benchmarks.$1" "${@:2}" --device $DEVICE; }

kernels() {
  for kernel in $KERNELS; do
    benchmark kernels --attention "$kernel" ${TINY:+--tiny} --out "$OUT/kernels-$kernel"
  done
  run $PYTHON -m pytest -rs tests/test_parallel.py tests/test_memory.py -k "cuda or gpu"
}

step() {
  local same=(--config runs/smollm2_135m.json --length 4096)
  local rank=(--config runs/llama31_8b.json --length 1048576 --tp 8 --layers 2 4 --recompute mlp --offload)
  [ -z "$TINY" ] || { same=(--config runs/tiny.json --length 512); rank=(--config runs/tiny.json --length 256 --tp 2 --layers 1 2); }
  for kernel in $KERNELS; do benchmark same_step "${same[@]}" --attention "$kernel" --out "$OUT/same_step-$kernel.json"; done
  for kernel in $KERNELS; do benchmark one_rank "${rank[@]}" --repeats 1 --attention "$kernel" --out "$OUT/one_rank-$kernel.json"; done
}

long() {  # attention of 1M tokens in 16 layers alone takes ten minutes: the longest is looked for with one layer
  local lengths=(--config runs/llama32_1b.json --lengths 32768 131072 524288 --tile 8192 --largest --search-layers 1)
  [ -z "$TINY" ] || lengths=(--config runs/tiny.json --lengths 256 512 --largest 2048 --search-layers 1 --memory-gib 1)
  benchmark max_context "${lengths[@]}" --recompute mlp --offload --offload-optimizer --out "$OUT/max_context.json"
}

recipe() {  # train.py and eval_niah.py as a user calls them: needles before, with YaRN alone, and after training
  local old=8192 new=32768 lengths="4096 8192 16384 32768" source=stdlib holdout=0.1 base=$MODEL steps=80 here=$OUT/recipe
  local size=(--batch-size 4 --micro-batch-size 1 --recompute mlp --validation-sequences 4)
  rm -rf "$here"; mkdir -p "$here"
  if [ -n "$TINY" ] || [ -z "$base" ]; then
    old=128 new=256 lengths="128 256" source=tools holdout=0.5 steps=2 size=(--validation-sequences 0)
    run $PYTHON -m tools.train_tokenizer --source $source --vocab-size 1024 --out "$here/tokenizer"
  fi
  run $PYTHON -m tools.prepare --source code=$source --tokenizer "${base:-$here/tokenizer}" --holdout $holdout --out "$here/corpus"
  if [ -z "$base" ]; then
    base=$here/base/final
    run $PYTHON train.py --config runs/tiny.json --tokenizer "$here/tokenizer" --data "$here/corpus" --sequence-length $old \
      --steps 1 "${size[@]}" --device $DEVICE --out "$here/base"
  fi
  local yarn=(--rope-kind yarn --rope-factor $((new / old)) --original-length $old)
  needles() {  # NAME MODEL [OPTIONS]
    run $PYTHON eval_niah.py "${@:2}" --haystack "$here/corpus" --task mixed --lengths $lengths --depths 5 --samples 5 \
      --dtype bfloat16 --device $DEVICE --window $old --out "$here/$1.json"
  }
  needles before "$base"
  needles untrained "$base" "${yarn[@]}"
  # at the end of its time SIGTERM makes train.py write a checkpoint: two minutes are left for the needles
  END=$((END - 120)) run $PYTHON train.py --model "$base" "${yarn[@]}" --data "$here/corpus" --sequence-length $new --steps $steps \
    --learning-rate 1e-4 --warmup-steps 5 "${size[@]}" --device $DEVICE --out "$here/stage1"
  needles after "$(ls -d "$here"/stage1/checkpoint-* | tail -1)"
  run $PYTHON -c "from benchmarks.common import in_words, machine; print(in_words(machine('$DEVICE')))"
  run $PYTHON -m tools.plot compare "$here"/{before,untrained,after}.json --labels before "YaRN, untrained" "after stage 1"
}

for part in "${PARTS[@]}"; do
  PAGE=$OUT/$part.md
  : > "$PAGE"
  minutes=8
  [ "$part" != kernels ] || minutes=4
  END=$((SECONDS + 60 * minutes))
  echo "== $part: at most $minutes minutes; tables in $PAGE"
  $part
done
exit $STATUS
