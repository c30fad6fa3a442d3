#!/usr/bin/env bash
# The whole recipe on a laptop CPU: a base model with a window of 128 tokens, stage 1 to 2,048 with YaRN, stage 2 on short
# chat samples, and a needle evaluation after each. Real text is this Python's own standard library; nothing is downloaded.
#     bash runs/tiny.sh [SEED [OUT]]      # SEED 0, OUT out/tiny-SEED; under ten minutes on two free cores after installing
#     NPROC=2 bash runs/tiny.sh           # the same with every sequence spread over a ring of 2 processes (or 4, 8)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SEED=${1:-0}
OUT=${2:-out/tiny-$SEED}
NPROC=${NPROC:-1}
[[ "$SEED" =~ ^[0-9]+$ ]] || { echo "error: SEED $SEED: must be a whole number, 0 or more" >&2; exit 1; }
case "$NPROC" in 1|2|4|8|16) ;; *) echo "error: NPROC=$NPROC: use 1, 2, 4, 8 or 16" >&2; exit 1 ;; esac
if [ -e "$OUT" ]; then echo "error: $OUT already exists; remove it or give another directory" >&2; exit 1; fi
bash runs/setup.sh
PATH="$PWD/.venv/bin:$PATH"

# glibc gives large blocks back to the kernel at every free, and each step asks for them again: a third of the time
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456

echo "== data: a tokenizer, the standard library (a tenth held out), documents with facts to retrieve"
mkdir -p "$OUT"
python -m tools.train_tokenizer --source stdlib --vocab-size 1024 --out "$OUT/tokenizer"
python -m tools.prepare --source code=stdlib --tokenizer "$OUT/tokenizer" --out "$OUT/corpus"
documents() { python -m tools.tiny_documents "$@" --corpus "$OUT/corpus" --tokenizer "$OUT/tokenizer" --seed "$SEED"; }
documents retrieval --length 64 --most-facts 2 --chat-share 0.3 --count 8000 --out "$OUT/facts-64"
documents retrieval --length 128 --most-facts 4 --chat-share 0.3 --count 8000 --out "$OUT/facts-128"
# Rates, decay and batches below are for a model of 0.7M parameters and runs of minutes; train.py's defaults are the paper's.
# stage 1: documents that fill its sequences with their <s>, some of every length, and some like the base model's
STAGE1="--chat-share 0.4 --text-loss 0.05"
documents retrieval --length 2045 --most-facts 24 $STAGE1 --count 400 --out "$OUT/facts-long"
documents retrieval --shortest 64 --length 2045 --most-facts 24 $STAGE1 --count 1500 --out "$OUT/facts-mixed"
documents retrieval --length 125 --most-facts 4 $STAGE1 --count 2600 --out "$OUT/facts-short"
documents chat --length 128 --count 2000 --out "$OUT/chat.jsonl"

LAUNCH=python CP=""
if [ "$NPROC" != 1 ]; then
  export OMP_NUM_THREADS=1
  LAUNCH="torchrun --standalone --nproc-per-node $NPROC" CP="--cp $NPROC"
fi

train() {  # a training program and its options, --out last
  $LAUNCH "$@"
  [ -e "${*: -1}/final" ] || { echo "error: stopped before the end of ${*: -1}; remove $OUT and start again" >&2; exit 1; }
}

started=$SECONDS
NEEDLES="$CP --haystack $OUT/corpus --task mixed --lengths 128 256 512 1024 2048 --depths 5 --samples 10"
NEEDLES+=" --seed $((7000 + SEED))"
COMMON="$CP --seed $SEED --dtype float32 --weight-decay 0.05 --warmup-steps 10"  # float32: fast on any CPU

echo "== base model: 64 tokens first, then its window of 128"
train train.py --config runs/tiny.json --tokenizer "$OUT/tokenizer" --data "$OUT/facts-64" --separator none \
  --sequence-length 64 --batch-size 16 --steps 500 --learning-rate 1.5e-3 --final-learning-rate 0.8 \
  --validation-sequences 0 $COMMON --out "$OUT/base-64"
train train.py --model "$OUT/base-64/final" --data "$OUT/facts-128" --separator none \
  --sequence-length 128 --batch-size 16 --steps 500 --learning-rate 1.2e-3 --final-learning-rate 0.05 \
  --validation-sequences 0 $COMMON --out "$OUT/base"
$LAUNCH eval_niah.py "$OUT/base/final" $NEEDLES --window 128 --out "$OUT/base.json"
$LAUNCH eval_niah.py "$OUT/base/final" $NEEDLES --rope-kind yarn --rope-factor 16 --original-length 128 \
  --out "$OUT/untrained.json"

echo "== stage 1: one step from 128 to 2,048 tokens, YaRN with s = 16, documents up-sampled by length, <s> between them"
train train.py --model "$OUT/base/final" --rope-kind yarn --rope-factor 16 --original-length 128 \
  --data "$OUT/corpus=0.04" "$OUT/facts-long=0.46" "$OUT/facts-mixed=0.28" "$OUT/facts-short=0.22" --sequence-length 2048 \
  --short-length 1024 --short-weight 0.5 --long-length 2048 --long-weight 2 --steps 700 --learning-rate 8e-4 \
  --final-learning-rate 0.05 --validation-sequences 8 $COMMON --out "$OUT/stage1"
$LAUNCH eval_niah.py "$OUT/stage1/final" $NEEDLES --window 128 --out "$OUT/stage1.json"

echo "== stage 2: short chat samples (at most 128 tokens), loss on the assistant's words only"
train sft.py --model "$OUT/stage1/final" --data "$OUT/chat.jsonl" --sequence-length 128 --batch-size 32 --micro-batch-size 32 \
  --steps 40 --learning-rate 1e-4 --validation-sequences 0 $COMMON --out "$OUT/stage2"
$LAUNCH eval_niah.py "$OUT/stage2/final" $NEEDLES --window 128 --out "$OUT/stage2.json"
$LAUNCH eval_niah.py "$OUT/stage2/final" $NEEDLES --window 128 --prompt chat --out "$OUT/stage2-chat.json"

echo "== exact match in %, by prompt length; the base model's window is 128"
python -m tools.plot compare "$OUT"/{base,untrained,stage1,stage2,stage2-chat}.json \
  --labels "base" "base with YaRN, untrained" "after stage 1" "after stage 2" "after stage 2, chat prompt"
python -m tools.plot compare "$OUT"/{base,stage1,stage2}.json --labels "before" "after stage 1" "after stage 2" \
  --figure "$OUT/figure.png" > /dev/null
echo "training and evaluation took $((SECONDS - started)) s; figure: $OUT/figure.png"
echo "chat (it has learned to find, not to talk): .venv/bin/python -m tools.chat $OUT/stage2/final --prompt 'What does def load(path) do?' --max-new-tokens 40"
