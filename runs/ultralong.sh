#!/usr/bin/env bash
# The whole recipe of arXiv 2504.06214: Llama 3.1 8B Instruct from 128K to 1M, 2M or 4M tokens of context; and at an eighth of
# its size, Llama 3.2 1B Instruct to 512K.
#     bash runs/ultralong.sh PRESET --plan                     # memory and time of both stages; needs no model and no GPU
#     bash runs/ultralong.sh PRESET MODEL_DIR TEXT CHAT OUT    # everything
# PRESET        planned: memory of a GPU, a step and all of stage 1
#               on one node of 8 H100-80                                  on 256, 16 x 8 GPUs a sequence as in the paper
#   1m          29 GiB and 65 on the host a GPU, 519 s a step, 69 h       12 GiB, 16 s a step, 2.2 h (the paper: 5 h)
#   2m          42 GiB and 129 on the host a GPU, 66 min a step, 153 h    16 GiB, 123 s a step, 4.8 h (the paper: 6 h)
#   4m          67 GiB and 128 on the host a GPU, 163 min a step, 408 h   26 GiB, 240 s a step, 10 h (the paper: 13 h)
#               on one H100-80                                            with GPUS=8, a node of eight
#   llama32_1b  46 GiB and 65 on the host, 319 s a step, 9 h              14 GiB and 8 on the host a GPU, 40 s a step, 1.1 h
# That grid (at 1M the paper has 4 x 8 GPUs a sequence and eight sequences a step, we have two):
#     GPUS=256 CP=16 MEMORY="--recompute mlp" bash runs/ultralong.sh 1m --plan
#     sbatch runs/ultralong.slurm PRESET MODEL_DIR TEXT CHAT OUT                 # under Slurm; elsewhere set LAUNCH as it does
# MODEL_DIR  Llama-3.1-8B-Instruct (llama32_1b: Llama-3.2-1B-Instruct) in Hugging Face layout. Paths are absolute, or relative
#     to this repository.
# TEXT       a directory of SlimPajama's files as they are (.jsonl.zst, or unpacked), 10 GB or more, for llama32_1b 2: of its tokens
#     stage 1 reads 1.007B (1m), 1.174B (2m), 1.258B (4m) or 0.1B (llama32_1b)
# CHAT       100K short samples, deduplicated and kept apart from the benchmarks, as written by
#     python -m tools.chat_blend --source general=DIR math=FILE code=FILE --tokenizer MODEL_DIR --count 100500 --holdout 500 \
#       --benchmark mmlu.jsonl mmlu_pro.jsonl math.jsonl gsm8k.jsonl humaneval.jsonl --out CHAT
# OUT        takes everything. After a stop the same command goes on: what is there is kept, training from its last checkpoint.
# "Our choice" below: the paper gives no number. Times are predictions of tools/plan.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 1; }
usage() { fail "usage: bash $0 1m|2m|4m|llama32_1b MODEL_DIR TEXT CHAT OUT, or --plan in place of the last four"; }

# What a preset says. WINDOW is FACTOR x 8,192, the window Llama 3 was pretrained with. STEPS are NVIDIA's for 1M, 2M and 4M. A
# step reads BATCH x WINDOW tokens: 2M at 1M and 8M at 2M and 4M, which gives the paper's 1B or so (our inference); with the 1B
# 1M. LENGTHS is for the evaluation; WAIT, seconds without a word from a rank that are no fault: more than a step.
PRESET=${1:-} CONFIG=runs/llama31_8b.json  # what --plan reads instead of a model
case "$PRESET" in
  1m) WINDOW=1048576 FACTOR=128 BATCH=2 STEPS=480 WAIT=${WAIT:-7200}
    LENGTHS="131072 262144 524288 1048576" ;;
  2m) WINDOW=2097152 FACTOR=256 BATCH=4 STEPS=140 WAIT=${WAIT:-14400}
    LENGTHS="131072 262144 524288 1048576 2097152" ;;
  4m) WINDOW=4194304 FACTOR=512 BATCH=2 STEPS=150 WAIT=${WAIT:-28800}
    LENGTHS="131072 262144 524288 1048576 2097152"  # 4M: below, where it fits
    MEMORY=${MEMORY:---recompute block --offload} ;;  # mlp would keep 258 GiB on the host a GPU: attention runs twice, for 128
  llama32_1b) WINDOW=524288 FACTOR=64 BATCH=2 STEPS=96 WAIT=${WAIT:-7200}  # a night's work, our choice: the paper has no 1B
    LENGTHS="65536 131072 262144 524288"
    CONFIG=runs/llama32_1b.json
    GPUS=${GPUS:-1} TP=${TP:-1} CP=${CP:-$GPUS}  # weights and gradients, 7 GiB, fit everywhere: the sequence is what to spread
    [ "$GPUS" != 1 ] || LAUNCH=${LAUNCH:-python} ;;
  *) usage ;;
esac
# What holds where a preset has said nothing else
GPU=${GPU:-H100-80} GPUS=${GPUS:-8}   # what is planned for: H100-80, H200, A100-80 or measured; and how many
TP=${TP:-8} CP=${CP:-1}               # tp shares weights and gradients too, but needs the links in a node; then cp
MEMORY=${MEMORY:---recompute mlp --offload}  # attention runs once; what it leaves waits in host memory
SAMPLES=${SAMPLES:-5}                 # of RULER, a task and length (RULER itself: 500)
LAUNCH=${LAUNCH:-torchrun --standalone --nproc-per-node $GPUS}
# Keys and values of 4M tokens take 512 GiB / (tp x cp) a GPU: beside the model too much for an H100 with tp x cp = 8
if [ "$PRESET" = 4m ] && { [ $((TP * CP)) -gt 8 ] || [ "$GPU" = H200 ]; }; then LENGTHS+=" 4194304"; fi

shift
MODEL=${1:-} TEXT=${2:-} CHAT=${3:-} OUT=${4:-}
if [ "$*" != --plan ]; then
  [ $# = 4 ] && [ "$1" != --plan ] || usage
  [ -f "$MODEL/config.json" ] || fail "$MODEL: no config.json there; give a Hugging Face model directory"
  [ -d "$TEXT" ] || fail "$TEXT: no such directory; give one of JSON lines"
  [ -f "$CHAT/train.jsonl" ] && [ -f "$CHAT/valid.jsonl" ] || fail "$CHAT: no train.jsonl and valid.jsonl there"
  [ ! -f "$OUT" ] || fail "$OUT: is a file; give a directory"
fi
[ $((GPUS % (TP * CP))) = 0 ] || fail "GPUS $GPUS: must be a multiple of TP x CP, $TP x $CP; set TP or CP"
bash runs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

echo "== 1. plan: does it fit on $GPUS x $GPU?"
STAGE1=(--rope-kind yarn --rope-factor "$FACTOR" --original-length 8192 --beta-slow 1 --beta-fast 4
  --tp "$TP" --cp "$CP" $MEMORY --sequence-length "$WINDOW" --batch-size "$BATCH" --micro-batch-size 1 --timeout "$WAIT")
STAGE2=(--tp "$TP" --sequence-length 8192 --batch-size 128 --micro-batch-size 1 --timeout "$WAIT")
SOURCE=(--model "$MODEL")
[ "$*" != --plan ] || SOURCE=(--config "$CONFIG")
python -m tools.plan "$GPU" --processes "$GPUS" "${SOURCE[@]}" "${STAGE1[@]}"
echo "-- and stage 2:"
python -m tools.plan "$GPU" --processes "$GPUS" "${SOURCE[@]}" --stage 2 "${STAGE2[@]}"
[ "$*" != --plan ] || exit 0
mkdir -p "$OUT"
# a stop waits for the step at work and its checkpoint; torch 2.11's torchrun, which lacks the option, for 30 s
[[ $(torchrun --help) != *--shutdown-timeout* ]] || LAUNCH=${LAUNCH/torchrun/torchrun --shutdown-timeout $WAIT}

echo "== 2. data: every document of the text once"
# One in a hundred is held out, for validation and haystacks: of 10 GB about 25M tokens.
[ -e "$OUT/corpus/meta.json" ] || python -m tools.prepare --source text="$TEXT" --source-field meta.redpajama_set_name \
  --tokenizer "$MODEL" --holdout 0.01 --out "$OUT/corpus"

echo "== 3. stage 1: one step to $WINDOW tokens, YaRN with s = $FACTOR, alpha 1, beta 4 in place of Llama's own scaling"
# Documents are joined by the text <s> and see each other (no --cross-document-mask). In each source those under 4K tokens are
# drawn half as often, those above 8K twice. These weights, warm-up, decay, clipping: our choice.
$LAUNCH train.py --model "$MODEL" "${STAGE1[@]}" \
  --data "$OUT/corpus" --separator "<s>" --short-length 4096 --short-weight 0.5 --long-length 8192 --long-weight 2 \
  --steps "$STEPS" --learning-rate 3e-5 --betas 0.9 0.95 \
  --warmup-steps 10 --final-learning-rate 0.1 --weight-decay 0.1 --clip 1 --validation-sequences "$BATCH" \
  --checkpoint-every 5 --resume --out "$OUT/stage1"
[ -e "$OUT/stage1/final" ] || fail "stage 1 was stopped before its end; the same command goes on"

echo "== 4. stage 2: 100K chat samples under 8K tokens (780 x 128), loss on the assistant's words only"
# Not packed: a step is exactly 128 samples, and of a row nothing is computed beyond its sample's end.
$LAUNCH sft.py --model "$OUT/stage1/final" --data "$CHAT/train.jsonl" --validation-data "$CHAT/valid.jsonl" "${STAGE2[@]}" \
  --steps 780 --learning-rate 5e-6 --betas 0.9 0.95 --warmup-steps 10 --final-learning-rate 0.1 --weight-decay 0.1 --clip 1 \
  --validate-every 100 --validation-sequences 128 --checkpoint-every 100 --resume --out "$OUT/stage2"
[ -e "$OUT/stage2/final" ] || fail "stage 2 was stopped before its end; the same command goes on"

echo "== 5. evaluation: needles over lengths and depths, then RULER's tasks"
TUNED=("$OUT/stage2/final" --tp "$TP" --cp "$CP" --prompt chat --timeout "$WAIT")
[ -e "$OUT/needles.json" ] || $LAUNCH eval_niah.py "${TUNED[@]}" --haystack "$OUT/corpus" --task mixed --lengths $LENGTHS \
  --depths 10 --samples 2 --window 131072 --out "$OUT/needles.json"
[ -e "$OUT/needles.png" ] || python -m tools.plot compare "$OUT/needles.json" --figure "$OUT/needles.png" > /dev/null
[ -e "$OUT/ruler.jsonl" ] || python -m tools.ruler --tokenizer "$OUT/stage2/final" --tasks all --prompt chat \
  --lengths $LENGTHS --samples "$SAMPLES" --haystack "$OUT/corpus" --out "$OUT/ruler.jsonl"
$LAUNCH -m tools.answer "${TUNED[@]}" --jsonl "$OUT/ruler.jsonl" --out "$OUT/ruler-answers.jsonl"

echo "== 6. $OUT/stage2/final is a Hugging Face directory: serve it with transformers, or chat with it here"
echo "PATH=.venv/bin:\$PATH $LAUNCH -m tools.chat $OUT/stage2/final --tp $TP --cp $CP --prompt 'Why is the sky blue?'"
