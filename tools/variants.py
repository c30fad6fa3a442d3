"""What tools.experiment tries: commands, runs and tables, all of it data.

A run is a few commands, those of runs/tiny.sh or runs/smollm2_128k.sh with other options. Their
{...} are filled in where a run is made: {run} is its own directory, {text} what is prepared once,
{data} and {bases} what is there of a seed, {model} a real checkpoint, and the numbers are those of
a size below. An experiment is one or two tables: a row is a variant, and each cell says which run
it is of, and which of that run's values it shows.
"""
from __future__ import annotations

from typing import NamedTuple

# How much of everything; "toy" shows that all runs, and measures nothing.
SIZES = {
    "full": {"documents": 8000, "long": 200, "mixed": 600, "short": 1200, "base_steps": 500,
             "steps": 60, "half": 30, "third": 20, "two_thirds": 40, "double": 120, "all": 300,
             "few": 10, "many": 40, "samples": 24, "texts": 40},
    "toy": {"documents": 64, "long": 8, "mixed": 8, "short": 8, "base_steps": 2,
            "steps": 3, "half": 2, "third": 1, "two_thirds": 2, "double": 4, "all": 2,
            "few": 1, "many": 2, "samples": 1, "texts": 1},
}
# the same of a real checkpoint, SmolLM2-135M-Instruct: its window, three longer ones
MODEL_SIZES = {
    "full": {"old": 8192, "twice": 16384, "four_times": 32768, "new": 65536, "steps": 20,
             "samples": 6, "questions": 8},
    "toy": {"old": 256, "twice": 512, "four_times": 1024, "new": 2048, "steps": 1,
            "samples": 1, "questions": 1},
}

# --------------------------------------------------------------------------- commands, tiny model

Run = tuple[str, ...]  # commands; what one with an --out NAME.json writes is what is measured
LENGTHS = (128, 512, 2048)
DEPTHS = ("0", "12.5", "25", "37.5", "50", "62.5", "75", "87.5", "100")
STRETCHES = (0, 128, 256, 384, 512, 1024, 1920)  # of positions: where 128 of them begin
BASES = ("llama", "qwen2", "qwen3")  # Qwen2: biases of q, k and v; Qwen3: norms of q and k

TEXT = (
    "tools.train_tokenizer --source stdlib --vocab-size 1024 --out {run}/tokenizer",
    "tools.prepare --source code=stdlib --tokenizer {run}/tokenizer --out {run}/corpus",
)
MADE = "--corpus {text}/corpus --tokenizer {text}/tokenizer --seed {seed}"
FACTS = f"tools.tiny_documents retrieval {MADE}"
FOR_BASE = f"{FACTS} --chat-share 0.3 --count {{documents}}"
FOR_STAGE1 = f"{FACTS} --text-loss 0.05"
APART = f"{FOR_STAGE1} --chat-share 0 --no-begin-of-text"
DOCUMENTS = (
    f"{FOR_BASE} --length 64 --most-facts 2 --out {{run}}/facts-64",
    f"{FOR_BASE} --length 128 --most-facts 4 --out {{run}}/facts-128",
    f"{FOR_STAGE1} --length 125 --most-facts 4 --chat-share 0.4 --count {{short}} "
    "--out {run}/facts-short",
    f"{FOR_STAGE1} --length 509 --most-facts 8 --chat-share 0.4 --count {{long}} "
    "--out {run}/facts-middle",
    f"{FOR_STAGE1} --length 2045 --most-facts 24 --chat-share 0.4 --count {{long}} "
    "--out {run}/facts-long",
    f"{FOR_STAGE1} --shortest 64 --length 2045 --most-facts 24 --chat-share 0.4 --count {{mixed}} "
    "--out {run}/facts-mixed",
    f"{FOR_STAGE1} --shortest 64 --length 509 --most-facts 8 --chat-share 0.4 --count {{mixed}} "
    "--out {run}/facts-middle-mixed",
    # without begin-of-text, and of lengths that fill no sequence: a separator alone parts them
    f"{APART} --shortest 512 --length 2045 --most-facts 24 --count {{long}} "
    "--out {run}/apart-long",
    f"{APART} --shortest 64 --length 2045 --most-facts 24 --count {{mixed}} "
    "--out {run}/apart-mixed",
    f"{APART} --shortest 64 --length 125 --most-facts 4 --count {{short}} "
    "--out {run}/apart-short",
    f"{APART} --shortest 256 --length 600 --most-facts 6 --relatives 4 --count {{long}} "
    "--out {run}/relatives",
    f"tools.tiny_documents chat {MADE} --length 128 --count {{documents}} --out {{run}}/chat.jsonl",
)
COMMON = "--seed {seed} --dtype float32 --weight-decay 0.05 --validation-sequences 0"


def words(text: str) -> str:
    """With one blank where an option that was left out has left two."""
    return " ".join(text.split())


def base_model(family: str) -> Run:
    """From random weights to a window of 128 tokens, as in runs/tiny.sh."""
    return (
        f"train.py --config {{text}}/{family}.json --tokenizer {{text}}/tokenizer "
        "--data {data}/facts-64 --separator none --sequence-length 64 --batch-size 16 "
        "--steps {base_steps} --learning-rate 1.5e-3 --final-learning-rate 0.8 "
        f"--warmup-steps 10 {COMMON} --out {{run}}/64",
        "train.py --model {run}/64/final --data {data}/facts-128 --separator none "
        "--sequence-length 128 --batch-size 16 --steps {base_steps} --learning-rate 1.2e-3 "
        f"--final-learning-rate 0.05 --warmup-steps 10 {COMMON} --out {{run}}/base",
    )


def base(family: str = "llama") -> str:
    return f"{{bases}}/{family}/base/final"


def yarn(factor: int) -> str:
    return f"--rope-kind yarn --rope-factor {factor} --original-length 128"


YARN = yarn(16)
BLEND = ("{text}/corpus=0.04 {data}/facts-long=0.46 {data}/facts-mixed=0.28 "
         "{data}/facts-short=0.22 --short-length 1024 --short-weight 0.5 --long-length 2048 "
         "--long-weight 2")
MIDDLE = BLEND.replace("facts-long", "facts-middle").replace("facts-mixed", "facts-middle-mixed")
APART_BLEND = BLEND.replace("facts-", "apart-")
RELATIVES = ("{text}/corpus=0.04 {data}/relatives=0.46 {data}/apart-mixed=0.28 "
             "{data}/apart-short=0.22")


def stage1(rule: str = YARN, more: str = "", steps: str = "{steps}", blend: str = BLEND,
           length: int = 2048, window: int = 2048, model: str = base(), warmup: int = 10,
           out: str = "stage1") -> str:
    """Continued pretraining from `model`, 2,048 tokens a step. `window`: the old one x factor,
    where that is above 2,048; train.py refuses less."""
    return words(
        f"train.py --model {model} {rule} --new-window {window} --data {blend} "
        f"--sequence-length {length} --batch-size {2048 // length} --steps {steps} "
        f"--learning-rate 8e-4 --final-learning-rate 0.05 --warmup-steps {warmup} {more} {COMMON} "
        f"--out {{run}}/{out}")


PROMPTS = "--haystack {text}/corpus --samples {samples} --seed 9{seed:03}"


def needles(model: str = "{run}/stage1/final", rule: str = "", more: str = "",
            out: str = "needles") -> str:
    return words(f"eval_niah.py {model} {rule} {PROMPTS} --task mixed --lengths 128 512 2048 "
                 f"--depths 5 {more} --out {{run}}/{out}.json")


def pairs(kind: str) -> str:
    return (f"tools.needle_pairs {{run}}/stage1/final --pair {kind} {PROMPTS} --lengths 2048 "
            f"--depths 5 --out {{run}}/{kind}.json")


def by_place(model: str, rule: str = "") -> tuple[str, str]:
    """Needles at nine depths of 2,048 tokens, and the loss by position."""
    return (
        words(f"eval_niah.py {model} {rule} {PROMPTS} --task mixed --lengths 2048 --depths 9 "
              "--out {run}/depth.json"),
        words(f"tools.perplexity {model} {rule} --haystack {{text}}/corpus --lengths 2048 "
              "--samples {texts} --buckets 16 --out {run}/loss.json"),
    )


# ------------------------------------------------------------------------------------- experiments


class Cell(NamedTuple):
    """Which run, and which of its values (see `measured`)."""

    run: Run
    value: str


class Table(NamedTuple):
    """Variants in rows, each with the same columns; one row is what others are compared with."""

    rows: dict[str, dict[str, Cell]]
    reference: str
    unit: str = "exact match, %"


def by_length(title: str, run: Run, name: str = "needles",
              lengths: tuple[int, ...] = LENGTHS) -> dict[str, Cell]:
    """Columns: needles of each length."""
    return {f"{title}, {length:,}": Cell(run, f"{name} {length}") for length in lengths}


def with_rule(rule: str, window: int = 2048) -> dict[str, Cell]:
    """A rule without training, and after stage 1."""
    untrained = (needles(base(), rule),)
    trained = (stage1(rule, window=window), needles())
    return by_length("untrained", untrained) | by_length("60 steps", trained)


def with_separator(separator: str) -> dict[str, Cell]:
    """One training, measured at each third of its steps; its documents begin with no token of
    their own."""
    options = f"--separator {separator} --checkpoint-every {{third}} --keep-checkpoints 3"
    checkpoints = {"20": "{third:08}", "40": "{two_thirds:08}", "60": "{steps:08}"}
    run = [stage1(more=options, blend=APART_BLEND)]
    for steps, number in checkpoints.items():
        run.append(needles(f"{{run}}/stage1/checkpoint-{number}", out=steps))
    cells = {}
    for steps in checkpoints:
        cells |= by_length(f"{steps} steps", tuple(run), steps)
    return cells


def with_mask(options: str) -> dict[str, Cell]:
    """Stage 1 on documents that stand beside others of the same facts, or on the same ones
    shuffled: what each asks for it says itself."""
    cells = {}
    for data, order in (("unrelated", ""), ("related", "--stored-order")):
        train = stage1(more=f"{options} {order}", blend=RELATIVES)
        run = (train, needles(), pairs("border"))
        cells |= by_length(data, run, lengths=(128, 2048))
        for place in ("same document", "another document"):
            cells[f"{data}, {place}"] = Cell(run, f"border {place} 2048")
    return cells


def in_two_steps(half: str) -> Run:
    """To 512 tokens with s = 4, and from there to 2,048 with s = 16; as many tokens each, and other
    sequences: the second step has a seed of its own."""
    first = stage1(yarn(4), steps=half, blend=MIDDLE, length=512, window=512, warmup=5, out="first")
    second = stage1(steps=half, model="{run}/first/final", warmup=5)
    return (first, second.replace("{seed}", "1{seed:03}"), needles())


def stage2(steps: str, out: str) -> str:
    return ("sft.py --model {run}/stage1/final --data {data}/chat.jsonl --sequence-length 128 "
            f"--batch-size 32 --micro-batch-size 32 --steps {steps} --learning-rate 1e-4 "
            f"--warmup-steps 0 {COMMON} --out {{run}}/{out}")


def both_stages() -> Run:
    """One stage 1, and stage 2 on two numbers of samples; all asked in both ways."""
    run = [stage1(steps="{all}"), stage2("{few}", "few"), stage2("{many}", "many"), pairs("hops")]
    for name in ("stage1", "few", "many"):
        model = f"{{run}}/{name}/final"
        run.append(needles(model, out=f"{name}-plain"))
        run.append(needles(model, more="--prompt chat", out=f"{name}-chat"))
    return tuple(run)


def facts_and_hops() -> Table:
    """What needles of 100 % say: a fact alone, one of several, and two facts in a row."""
    values = {"a fact alone": "hops alone 2048",
              "one fact of four": "hops one fact 2048",
              "two facts": "hops two facts 2048"}
    run = both_stages()
    return Table({row: {"2,048 tokens": Cell(run, value)} for row, value in values.items()},
                 "one fact of four")


def before_and_after_stage2() -> Table:
    """A base, and what both stages make of it."""
    rows = {"after stage 1": "stage1", "stage 2, 320 samples": "few",
            "stage 2, 1,280 samples": "many"}
    run = both_stages()
    cells = {row: {} for row in ("base", "base with YaRN, untrained", *rows)}
    for form, more in (("plain", ""), ("chat", "--prompt chat")):
        for row, rule in (("base", ""), ("base with YaRN, untrained", YARN)):
            cells[row] |= by_length(form, (needles(base(), rule, more),))
        for row, name in rows.items():
            cells[row] |= by_length(form, run, f"{name}-{form}")
    return Table(cells, "after stage 1")


def of_bases(rule: str | None) -> dict[str, Cell]:
    """A rule on three bases without training; without one, YaRN after stage 1."""
    cells = {}
    for family in BASES:
        model = base(family)
        run = (stage1(model=model), needles()) if rule is None else (needles(model, rule),)
        cells |= by_length(family, run)
    return cells


def places_of(rule: str, trained: bool) -> Run:
    if trained:
        return (stage1(rule), *by_place("{run}/stage1/final"))
    return by_place(base(), rule)


def by_depth_and_position() -> tuple[Table, Table]:
    """Where in a prompt, and where in a text, a factor that is too small fails."""
    runs = {}
    for name, rule in (("nothing", ""), ("s = 4", yarn(4)), ("s = 16", YARN)):
        runs[f"{name}, untrained"] = places_of(rule, trained=False)
        runs[f"{name}, 60 steps"] = places_of(rule, trained=True)
    depths = {}
    losses = {}
    for row, run in runs.items():
        depths[row] = {f"{depth} %": Cell(run, f"depth 2048 at {depth} %") for depth in DEPTHS}
        losses[row] = {f"{start:,} to {start + 128:,}": Cell(run, f"loss {start}-{start + 128}")
                       for start in STRETCHES}
    return (Table(depths, "s = 16, 60 steps", "exact match, %, by depth of the fact"),
            Table(losses, "s = 16, 60 steps", "loss, nats a token, by position"))


EXPERIMENTS = {
    "rope": [Table({
        "YaRN": with_rule(YARN),
        "YaRN, no temperature": with_rule(f"{YARN} --no-attention-temperature"),
        "NTK-aware": with_rule("--rope-kind ntk --rope-factor 16"),
        "linear": with_rule("--rope-kind linear --rope-factor 16"),
        "theta 500,000": with_rule("--rope-theta 500000"),
        "nothing": with_rule(""),
    }, "YaRN")],
    "factor": [Table({
        "s = 16, beta_fast 4": with_rule(YARN),
        "s = 8": with_rule(yarn(8)),
        "s = 32": with_rule(yarn(32), window=4096),
        "s = 64": with_rule(yarn(64), window=8192),
        "beta_fast 6": with_rule(f"{YARN} --beta-fast 6"),
        "beta_fast 32": with_rule(f"{YARN} --beta-fast 32"),
        "no temperature": with_rule(f"{YARN} --no-attention-temperature"),
    }, "s = 16, beta_fast 4")],
    "separator": [Table({
        "<s>": with_separator("<s>"),
        "none": with_separator("none"),
        "end and begin of text": with_separator("bos_eos"),
    }, "<s>")],
    "mask": [Table({
        "no mask, <s>": with_mask(""),
        "no mask, no separator": with_mask("--separator none"),
        "mask, <s>": with_mask("--cross-document-mask"),
        "mask, no separator": with_mask("--cross-document-mask --separator none"),
    }, "no mask, <s>")],
    "steps": [Table({
        "one step to 2,048": by_length("60 steps", (stage1(), needles()))
        | by_length("120 steps", (stage1(steps="{double}"), needles())),
        "two steps, by way of 512": by_length("60 steps", in_two_steps("{half}"))
        | by_length("120 steps", in_two_steps("{steps}")),
    }, "one step to 2,048")],
    "short": [before_and_after_stage2()],
    "hops": [facts_and_hops()],
    "base": [Table({
        "no scaling": of_bases(""),
        "YaRN, s = 8": of_bases(yarn(8)),
        "YaRN, s = 16": of_bases(YARN),
        "YaRN, s = 32": of_bases(yarn(32)),
        "YaRN, s = 16, 60 steps": of_bases(None),
    }, "YaRN, s = 16")],
    "depth": [*by_depth_and_position()],
}


# ------------------------------------------------------------------------------ a real checkpoint

MODEL_TEXT = (
    "tools.prepare --source code=stdlib packages={packages} --tokenizer {model} "
    "--out {run}/corpus",
)
REAL_YARN = "--rope-kind yarn --rope-factor 8 --original-length {old}"
ASKED = {  # column -> value
    "needles, 1x": "needles {old}", "needles, 2x": "needles {twice}",
    "needles, 4x": "needles {four_times}", "needles, 8x": "needles {new}",
    "RULER needles, 8x": "ruler niah_single_2 {new}",
    "RULER keys, 8x": "ruler niah_multikey_1 {new}",
    "RULER tracking, 8x": "ruler vt {new}",
}


def model_stage1(rule: str = REAL_YARN, more: str = "") -> str:
    """Continued pretraining at eight times the window, one sequence a step."""
    return words(
        f"train.py --model {{model}} {rule} --new-window {{new}} --data {{text}}/corpus "
        "--sequence-length {new} --steps {steps} "
        f"--learning-rate 1e-4 --warmup-steps 5 --recompute mlp --validation-sequences 0 {more} "
        "--seed {seed} --timeout 7200 --out {run}/stage1")


RULER = (
    "tools.ruler --tokenizer {model} --tasks niah_single_2 niah_multikey_1 vt --prompt chat "
    "--lengths {new} --samples {questions} --seed 9{seed:03} --haystack {text}/corpus "
    "--out {run}/prompts.jsonl")


def ask_model(model: str = "{run}/stage1/final", rule: str = "") -> Run:
    return (
        words(f"eval_niah.py {model} {rule} --haystack {{text}}/corpus --task mixed "
              "--lengths {old} {twice} {four_times} {new} --depths 5 --samples {samples} "
              "--seed 9{seed:03} --timeout 7200 --out {run}/needles.json"),
        words(f"tools.answer {model} {rule} --jsonl {{run}}/prompts.jsonl --prompt chat "
              "--max-length {new} --timeout 7200 --out {run}/ruler.jsonl"),
    )


def model_row(train: str) -> dict[str, Cell]:
    run = (RULER, train, *ask_model())
    return {column: Cell(run, value) for column, value in ASKED.items()}


def model_rule(rule: str) -> dict[str, Cell]:
    untrained = (RULER, *ask_model("{model}", rule))
    cells = {f"untrained, {column}": Cell(untrained, value) for column, value in ASKED.items()}
    return cells | model_row(model_stage1(rule))


MODEL_EXPERIMENTS = {
    "rope": [Table({
        "YaRN": model_rule(REAL_YARN),
        "YaRN, no temperature": model_rule(f"{REAL_YARN} --no-attention-temperature"),
        "NTK-aware": model_rule("--rope-kind ntk --rope-factor 8"),
        "linear": model_rule("--rope-kind linear --rope-factor 8"),
        "theta 5,000,000": model_rule("--rope-theta 5000000"),
        "nothing": model_rule(""),
    }, "YaRN")],
    "separator": [Table({
        "<s>": model_row(model_stage1()),
        "none": model_row(model_stage1(more="--separator none")),
        "end and begin of text": model_row(model_stage1(more="--separator bos_eos")),
    }, "<s>")],
    "mask": [Table({
        "no mask": model_row(model_stage1()),
        "mask": model_row(model_stage1(more="--cross-document-mask")),
        "no mask, neighbours": model_row(model_stage1(more="--stored-order")),
        "mask, neighbours": model_row(model_stage1(more="--cross-document-mask --stored-order")),
    }, "no mask")],
}


def runs_of(tables: list[Table]) -> list[Run]:
    """All runs of an experiment, each once."""
    runs = {}
    for table in tables:
        for row in table.rows.values():
            for cell in row.values():
                runs[cell.run] = None
    return list(runs)
