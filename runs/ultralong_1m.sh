#!/usr/bin/env bash
# Llama 3.1 8B Instruct from 128K to 1M tokens of context: the whole recipe of arXiv 2504.06214.
#     bash runs/ultralong_1m.sh --plan                        # memory and time of both stages; needs no model and no GPU
#     bash runs/ultralong_1m.sh MODEL_DIR TEXT CHAT OUT       # one node of 8 H100-80, planned:
#           31 GiB and 65 on the host a GPU, 56 min a step, 111 h
#     GPUS=256 CP=4 MEMORY="--recompute mlp" bash runs/ultralong_1m.sh --plan  # the paper's grid, planned:
#           26 GiB, 104 s a step, 3.5 h (the paper: 5 h)
#     sbatch runs/ultralong.slurm MODEL_DIR TEXT CHAT OUT    # that grid under Slurm; elsewhere set LAUNCH as it does
# MODEL_DIR  Llama-3.1-8B-Instruct in Hugging Face layout. Paths are absolute, or relative to this repository.
# TEXT       a directory of SlimPajama's .jsonl or .jsonl.gz (its .zst unpacked), 10 GB or more: 1.007B tokens are drawn from it
# CHAT       100K short samples, deduplicated and kept apart from the benchmarks, as written by
#     python runs/chat_blend.py --source general=DIR math=FILE code=FILE --tokenizer MODEL_DIR --count 100500 --holdout 500 \
#       --benchmark mmlu.jsonl mmlu_pro.jsonl math.jsonl gsm8k.jsonl humaneval.jsonl --out CHAT
# OUT        takes everything. After a stop the same command goes on: what is there is kept, training from its last checkpoint.
# "Our choice" below: the paper gives no number. Times are train.py's predictions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WINDOW=1048576 FACTOR=128             # 8,192, the window Llama 3 was pretrained with, x 128
BATCH=8 STEPS=120                     # 8M tokens a step, 1.007B in all
LENGTHS="131072 262144 524288 1048576"  # of the evaluation
WAIT=${WAIT:-7200}                    # seconds without a word from a rank that are no fault: more than a step
GPU=${GPU:-H100-80} GPUS=${GPUS:-8}   # what is planned for: H100-80, H200, A100-80 or measured; and how many
TP=${TP:-8} CP=${CP:-1}               # tp shares weights and gradients too, but needs the links in a node; then cp
MEMORY=${MEMORY:---recompute mlp --offload}  # attention runs once; what it leaves waits in 65 GiB of host memory a GPU
SAMPLES=${SAMPLES:-5}                 # of RULER, a task and length (RULER itself: 500)
LAUNCH=${LAUNCH:-torchrun --standalone --nproc-per-node $GPUS --shutdown-timeout $WAIT}
fail() { echo "error: $*" >&2; exit 1; }

MODEL=${1:-} TEXT=${2:-} CHAT=${3:-} OUT=${4:-}
if [ "$*" != --plan ]; then
  [ $# = 4 ] || fail "usage: bash $0 MODEL_DIR TEXT CHAT OUT, or bash $0 --plan"
  [ -f "$MODEL/config.json" ] || fail "$MODEL: no config.json there; give a Hugging Face model directory"
  [ -d "$TEXT" ] || fail "$TEXT: no such directory; give one of JSON lines"
  [ -f "$CHAT/train.jsonl" ] && [ -f "$CHAT/valid.jsonl" ] || fail "$CHAT: no train.jsonl and valid.jsonl there"
  [ ! -f "$OUT" ] || fail "$OUT: is a file; give a directory"
fi
bash runs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

echo "== 1. plan: does it fit on $GPUS x $GPU?"
STAGE1=(--tp "$TP" --cp "$CP" $MEMORY --sequence-length "$WINDOW" --batch-size "$BATCH" --micro-batch-size 1)
STAGE2=(--tp "$TP" --sequence-length 8192 --batch-size 128 --micro-batch-size 1)
SOURCE=(--model "$MODEL")
[ "$*" != --plan ] || SOURCE=(--config runs/llama31_8b.json)
python train.py --dry-run "$GPU" --processes "$GPUS" "${SOURCE[@]}" "${STAGE1[@]}"
echo "-- and stage 2:"
python sft.py --dry-run "$GPU" --processes "$GPUS" "${SOURCE[@]}" "${STAGE2[@]}"
[ "$*" != --plan ] || exit 0
mkdir -p "$OUT"

echo "== 2. data: as many tokens as stage 1 reads; in each source fewer documents under 4K tokens, more above 8K"
# The weights are our choice. The <s> between documents come on top, about 0.2 %: the last step ends that much before the text,
# so this is one epoch. Held-out documents, 16M tokens, are for validation and haystacks.
[ -e "$OUT/corpus/meta.json" ] || python data.py prepare --source text="$TEXT" --source-field meta.redpajama_set_name \
  --tokenizer "$MODEL" --tokens $((STEPS * BATCH * WINDOW)) --short-length 4096 --short-weight 0.5 \
  --long-length 8192 --long-weight 2 --holdout 0.1 --holdout-tokens 16777216 --out "$OUT/corpus"

echo "== 3. stage 1: one step to $WINDOW tokens, YaRN with s = $FACTOR, alpha 1, beta 4 in place of Llama's own scaling"
# Documents are joined by the text <s> and see each other (no --cross-document-mask). Warm-up, decay, clipping: our choice.
$LAUNCH train.py --model "$MODEL" --rope-kind yarn --rope-factor "$FACTOR" --original-length 8192 --beta-slow 1 --beta-fast 4 \
  --data "$OUT/corpus" --separator "<s>" "${STAGE1[@]}" --steps "$STEPS" --learning-rate 3e-5 --betas 0.9 0.95 \
  --warmup-steps 10 --final-learning-rate 0.1 --weight-decay 0.1 --clip 1 --validation-sequences "$BATCH" \
  --checkpoint-every 5 --timeout "$WAIT" --resume --out "$OUT/stage1"
[ -e "$OUT/stage1/final" ] || fail "stage 1 was stopped before its end; the same command goes on"

echo "== 4. stage 2: 100K chat samples under 8K tokens (780 x 128), loss on the assistant's words only"
# Not packed: a step is exactly 128 samples, and of a row nothing is computed beyond its sample's end.
$LAUNCH sft.py --model "$OUT/stage1/final" --data "$CHAT/train.jsonl" --validation-data "$CHAT/valid.jsonl" "${STAGE2[@]}" \
  --steps 780 --learning-rate 5e-6 --betas 0.9 0.95 --warmup-steps 10 --final-learning-rate 0.1 --weight-decay 0.1 --clip 1 \
  --validate-every 100 --validation-sequences 128 --checkpoint-every 100 --timeout "$WAIT" --resume --out "$OUT/stage2"
[ -e "$OUT/stage2/final" ] || fail "stage 2 was stopped before its end; the same command goes on"

echo "== 5. evaluation: needles over lengths and depths, then RULER's tasks"
EVALUATE=(eval_niah.py "$OUT/stage2/final" --tp "$TP" --cp "$CP" --prompt chat --timeout "$WAIT")
[ -e "$OUT/needles.json" ] || $LAUNCH "${EVALUATE[@]}" --haystack "$OUT/corpus" --task mixed --lengths $LENGTHS --depths 10 \
  --samples 2 --window 131072 --out "$OUT/needles.json" --figure "$OUT/needles.png"
[ -e "$OUT/ruler.jsonl" ] || python runs/ruler.py --tokenizer "$OUT/stage2/final" --tasks all --prompt chat --lengths $LENGTHS \
  --samples "$SAMPLES" --haystack "$OUT/corpus" --out "$OUT/ruler.jsonl"
$LAUNCH "${EVALUATE[@]}" --jsonl "$OUT/ruler.jsonl" --out "$OUT/ruler-answers.jsonl"

echo "== 6. $OUT/stage2/final is a Hugging Face directory: serve it with transformers, or chat with it here"
echo "PATH=.venv/bin:\$PATH $LAUNCH model.py $OUT/stage2/final --tp $TP --cp $CP --prompt 'Why is the sky blue?'"
