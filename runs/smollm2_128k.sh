#!/usr/bin/env bash
# SmolLM2-135M-Instruct from 8K to 128K tokens of context on one GPU: both stages of arXiv 2504.06214, small,
# with every evaluation before, between and after them.
#     bash runs/smollm2_128k.sh --plan                                        # memory and time of both stages, on this machine
#     GPU=H100-80 bash runs/smollm2_128k.sh --plan                            # or there: 13 GiB, 21 s a step, 14 min of stage 1
#     bash runs/smollm2_128k.sh MODEL_DIR CHAT OUT [WINDOW [STEPS [SAMPLES]]] # by default 131072 40 5
#     BATCH=1 ROWS=1 bash runs/smollm2_128k.sh MODEL_DIR CHAT OUT 16384 2 1   # the same script, small enough for a CPU
# MODEL_DIR  SmolLM2-135M-Instruct in Hugging Face layout. Paths are absolute, or relative to this repository.
# CHAT       .jsonl of {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, 10K or more
# OUT        takes everything. After a stop the same command goes on: what is there is kept, training from its last checkpoint.
# WINDOW, a multiple of 8192, STEPS of stage 1, SAMPLES a cell of each evaluation. The text is this Python's standard library
# and the packages in .venv: nothing is downloaded, and another machine's corpus is another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
GPU=${GPU:-measured} GPUS=${GPUS:-1}  # what is planned for: this machine, or H100-80, H200, A100-80; and how many
MEMORY=${MEMORY:---recompute mlp}     # MEMORY="--recompute none": 77 GiB at 128K
BATCH=${BATCH:-4}                     # sequences a step: 0.5M tokens at 128K, 21M in 40 steps
ROWS=${ROWS:-8}                       # stage 2's, of 8,192 tokens: about the paper's 128 samples, packed
LR1=${LR1:-1e-4} LR2=${LR2:-2e-5}     # small models take more than the paper's 3e-5 and 5e-6 for 8B: our choice, not tuned
DTYPE=${DTYPE:-bfloat16}              # of evaluations; training: bfloat16 on a GPU, float32 on a CPU
SYSTEM="You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what the model's template adds
LAUNCH=python
[ "$GPUS" = 1 ] || LAUNCH="torchrun --standalone --nproc-per-node $GPUS"
fail() { echo "error: $*" >&2; exit 1; }

MODEL=${1:-} CHAT=${2:-} OUT=${3:-} WINDOW=${4:-131072} STEPS=${5:-40} SAMPLES=${6:-5}
if [ "$*" != --plan ]; then
  [ $# -ge 3 ] && [ $# -le 6 ] && [ "$1" != --plan ] || fail "usage: bash $0 MODEL_DIR CHAT OUT [WINDOW [STEPS [SAMPLES]]], or bash $0 --plan"
  [ -f "$MODEL/config.json" ] || fail "$MODEL: no config.json there; give a Hugging Face model directory"
  [ ! -f "$CHAT/train.jsonl" ] || CHAT=$CHAT/train.jsonl
  [ -f "$CHAT" ] || fail "$CHAT: no such file; give a .jsonl of messages, or a directory of tools.chat_blend"
  [ ! -f "$OUT" ] || fail "$OUT: is a file; give a directory"
fi
for n in "$WINDOW" "$STEPS" "$SAMPLES"; do
  [[ "$n" =~ ^[1-9][0-9]*$ ]] || fail "$n: WINDOW, STEPS and SAMPLES are whole numbers above 0"
done
[ $((WINDOW % 8192)) = 0 ] && [ "$WINDOW" -gt 8192 ] || fail "WINDOW $WINDOW: must be 8192 times 2 or more"
FACTOR=$((WINDOW / 8192)) LENGTHS="" DEPTHS=10 SHORT=$((WINDOW < 32768 ? WINDOW : 32768))
for ((n = 4096; n < WINDOW; n *= 2)); do LENGTHS+="$n "; done
LENGTHS+=$WINDOW                      # 4096 8192 ... WINDOW
[ "$SAMPLES" != 1 ] || DEPTHS=3
bash runs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456  # as in tiny.sh, for CPUs

echo "== 1. plan: does it fit on $GPUS x $GPU?"
YARN=(--rope-kind yarn --rope-factor "$FACTOR" --original-length 8192 --beta-slow 1 --beta-fast 4)  # alpha 1, beta 4
STAGE1=("${YARN[@]}" --cp "$GPUS" $MEMORY --sequence-length "$WINDOW" --batch-size "$BATCH" --micro-batch-size 1 --timeout 7200)
STAGE2=(--sequence-length 8192 --batch-size "$ROWS" --micro-batch-size 1 --timeout 7200)
SOURCE=(--model "$MODEL")
[ "$*" != --plan ] || SOURCE=(--config runs/smollm2_135m.json)
python -m tools.plan "$GPU" --processes "$GPUS" "${SOURCE[@]}" "${STAGE1[@]}"
echo "-- and stage 2:"
python -m tools.plan "$GPU" --processes "$GPUS" "${SOURCE[@]}" --stage 2 --pack "${STAGE2[@]}"
[ "$*" != --plan ] || exit 0
mkdir -p "$OUT"
# a stop waits for the step at work and its checkpoint; torch 2.11's torchrun, which lacks the option, for 30 s
[[ $(torchrun --help) != *--shutdown-timeout* ]] || LAUNCH=${LAUNCH/torchrun/torchrun --shutdown-timeout 600}
SETTINGS="WINDOW $WINDOW STEPS $STEPS SAMPLES $SAMPLES BATCH $BATCH ROWS $ROWS LR1 $LR1 LR2 $LR2 DTYPE $DTYPE"
[ "$(cat "$OUT/settings" 2>/dev/null || echo "$SETTINGS")" = "$SETTINGS" ] || fail "$OUT: has results of $(cat "$OUT/settings")"
echo "$SETTINGS" > "$OUT/settings"    # results of other settings never stand beside each other

echo "== 2. data: every file once, a tenth of them held out"
PACKAGES=$(echo .venv/lib/python3*/site-packages)
[ -e "$OUT/corpus/meta.json" ] || python -m tools.prepare --source code=stdlib packages="$PACKAGES" --tokenizer "$MODEL" \
  --holdout 0.1 --out "$OUT/corpus"
[ -e "$OUT/chat/train.jsonl" ] || python -m tools.chat_blend --source chat="$CHAT" --tokenizer "$MODEL" --system "$SYSTEM" \
  --max-tokens 8192 --out "$OUT/chat"  # clean, no copies, the system message the model is used with
[ -e "$OUT/ruler.jsonl" ] || python -m tools.ruler --tokenizer "$MODEL" --lengths $LENGTHS --samples "$SAMPLES" \
  --tasks niah_{single,multikey}_{1,2,3} niah_multivalue niah_multiquery \
  --prompt chat --system "$SYSTEM" --haystack "$OUT/corpus" --out "$OUT/ruler.jsonl"

evaluate() {  # NAME MODEL_DIR [OPTIONS]: needles (a heat map), RULER's needle tasks (a table), perplexity (a curve)
  local name=$1 model=("$2" --cp "$GPUS" --dtype "$DTYPE" "${@:3}")
  echo "== evaluation of $name"
  [ -e "$OUT/needles-$name.json" ] || $LAUNCH eval_niah.py "${model[@]}" --window 8192 --haystack "$OUT/corpus" --task mixed \
    --lengths $LENGTHS --depths $DEPTHS --samples "$SAMPLES" --out "$OUT/needles-$name.json"
  [ -e "$OUT/needles-$name.png" ] ||
    python -m tools.plot compare "$OUT/needles-$name.json" --figure "$OUT/needles-$name.png" > /dev/null
  $LAUNCH -m tools.answer "${model[@]}" --jsonl "$OUT/ruler.jsonl" --prompt chat --system "$SYSTEM" --max-length "$WINDOW" \
    --out "$OUT/ruler-$name.jsonl"
  [ -e "$OUT/perplexity-$name.json" ] || $LAUNCH -m tools.perplexity "${model[@]}" --window 8192 --haystack "$OUT/corpus" \
    --lengths "$SHORT" --samples 5 --out "$OUT/perplexity-$name.json" ||
    echo "note: no curve of perplexity; the line above says why" >&2
}
evaluate base "$MODEL"
evaluate untrained "$MODEL" "${YARN[@]}"

echo "== 3. stage 1: $STEPS steps of $BATCH x $WINDOW tokens, YaRN with s = $FACTOR, <s> between documents, no mask"
# Files under 4K tokens are drawn half as often, those above 8K twice: our choice.
$LAUNCH train.py --model "$MODEL" --data "$OUT/corpus" --separator "<s>" --short-length 4096 --short-weight 0.5 \
  --long-length 8192 --long-weight 2 "${STAGE1[@]}" --steps "$STEPS" \
  --learning-rate "$LR1" --betas 0.9 0.95 --warmup-steps 5 --final-learning-rate 0.1 --weight-decay 0.1 --clip 1 \
  --validation-sequences 4 --checkpoint-every 10 --resume --out "$OUT/stage1"
[ -e "$OUT/stage1/final" ] || fail "stage 1 was stopped before its end; the same command goes on"
evaluate stage1 "$OUT/stage1/final"

echo "== 4. stage 2: short chat samples, several a row that do not see each other, loss on the assistant's words only"
$LAUNCH sft.py --model "$OUT/stage1/final" --data "$OUT/chat/train.jsonl" "${STAGE2[@]}" --pack \
  --steps $((STEPS < 50 ? STEPS : 50)) --learning-rate "$LR2" --betas 0.9 0.95 --warmup-steps 5 --final-learning-rate 0.1 \
  --weight-decay 0.1 --clip 1 --checkpoint-every 10 --resume --out "$OUT/stage2"
[ -e "$OUT/stage2/final" ] || fail "stage 2 was stopped before its end; the same command goes on"
evaluate stage2 "$OUT/stage2/final"

echo "== 5. side by side: exact match in % by length, then perplexity by position; RULER's tables stand above"
LABELS=("before" "YaRN, untrained" "after stage 1" "after stage 2")
python -m tools.plot compare "$OUT"/needles-{base,untrained,stage1,stage2}.json \
  --labels "${LABELS[@]}" --figure "$OUT/needles.png"
[ "$(ls "$OUT"/perplexity-*.json 2>/dev/null | wc -l)" != 4 ] ||
  python -m tools.plot compare "$OUT"/perplexity-{base,untrained,stage1,stage2}.json \
    --labels "${LABELS[@]}" --figure "$OUT/perplexity.png"

echo "== 6. $OUT/stage2/final is a Hugging Face directory: serve it with transformers, or chat with it here"
echo "PATH=.venv/bin:\$PATH python -m tools.chat $OUT/stage2/final --system '$SYSTEM' --prompt 'Why is the sky blue?'"
