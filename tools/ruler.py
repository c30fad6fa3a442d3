"""Prompts of RULER's synthetic tasks (arXiv 2404.06654), each of exactly the length asked for.

    python -m tools.ruler --tokenizer MODEL_DIR --lengths 4096 8192 --out out/ruler.jsonl

Eleven of RULER's thirteen tasks, with its names and parameters (scripts/synthetic.yaml); the other
two need data sets of questions. What the model reads for a record (eval_niah.prompt_tokens) and
`max_new_tokens` are `length` tokens together, to the token. `outputs` are what an answer must hold:
the score is the share of them that it does (string_match_all).

Where this is not RULER: all sentences are worded anew. The essay is any text, its line breaks kept,
its needles put between lines or sentences. No key, value or variable is met twice by chance. Words
are those below: cwe has single ones while they last, then compounds as keys are (one kind in a
list, none that its example has). Needle haystacks ask for one of their lines, not for one more.
vt's example has 12 lines of noise at any tokenizer. RULER stays below a length; here more essay,
noise or dots after the haystack fill the rest. Essays, lines of needles and examples are drawn by
seed and sample only: prompts of several lengths begin alike, and come in order (task, sample,
length) for a cache of prefixes.
"""
from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import Tokenizer, is_corpus, load_tokenizer, sync
from parallel import one_line_errors
from tools.answer import prompt_tokens
from tools.prepare import held_out_split
from tools.questions import MAX_NEW_TOKENS
from tools.records import Documents, source_path
from tools.train_tokenizer import read_texts
from train import Parser, positive, writable

# No word is part of another, or an answer would be found inside a wrong one.
ADJECTIVES = """alert ample ancient blunt bold brave brief bright brisk broad calm careful cheap
civil clean clever coarse compact crisp curious curly deep dense distant dizzy dull dusty eager
early elegant empty equal exact faint famous fancy fierce flat fluent foggy fragile frank fresh
frugal gentle gloomy grand harsh hollow honest huge humble humid jolly keen large lazy lively lucky
mellow modest muddy narrow neat noble patient plain polar polite proud pure quick quiet rapid rare
rough round rural rusty sharp shiny silent simple sleepy slim smooth solid sour steady strict sturdy
subtle sweet swift tame tender thick tiny urban useful vivid warm wise witty young""".split()
NOUNS = """acorn atlas attic badger balcony barrel blossom boulder bracelet branch bucket buffalo
cabbage camel candy cannon captain carriage cheese chimney clock cloud comet compass cottage cradle
cricket curtain daisy dolphin drawer elbow fabric farmer fiddle fountain fox gallery garlic goose
guitar hotel hunter jewel kite kitten leopard library lizard lobster mango market mason miller
monkey mountain mushroom notebook novel oyster painter palace parrot pebble pencil pepper piano
pigeon pillow pirate planet pocket potato pumpkin puzzle rabbit raven ribbon rocket saddle sailor
salmon singer spider spoon squirrel tailor teapot temple thunder ticket tiger tomato trumpet tunnel
turtle valley village violin wagon walnut whistle window wizard zebra""".split()
NOISE = ("The river is cold. The road is long. The moon is bright. On we walk. "
         "Home before the night.")
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent (RULER, niah.py)
FILLER = 2000  # characters that may fill the rest: more than the longest line has
MORE_NOISE = f"\n{NOISE}" * (FILLER // len(NOISE))
HAYSTACK_BYTES = 2**25  # read at most, whatever the lengths: a record depends on no other


class Niah(NamedTuple):
    """A needle task: where facts are hidden, what their keys and values are, and how many."""

    haystack: str
    key: str
    value: str
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1


NIAH = {  # RULER, synthetic.yaml
    "niah_single_1": Niah("noise", "word", "number"),
    "niah_single_2": Niah("essay", "word", "number"),
    "niah_single_3": Niah("essay", "word", "uuid"),
    "niah_multikey_1": Niah("essay", "word", "number", keys=4),
    "niah_multikey_2": Niah("needles", "word", "number"),
    "niah_multikey_3": Niah("needles", "uuid", "uuid"),
    "niah_multivalue": Niah("essay", "word", "number", values=4),
    "niah_multiquery": Niah("essay", "word", "number", keys=4, queries=4),
}
TASKS = (*NIAH, "vt", "cwe", "fwe")


class Draft(NamedTuple):
    """A prompt whose haystack ends where `before` does; of `filler` follows what makes it exact."""

    before: str
    filler: str
    after: str
    answer_prefix: str
    outputs: list[str]
    occurrences: dict[str, int]  # how often these texts are in a prompt with one right answer
    depths: list[float] | None = None  # of each output, from 0 to 1

    @property
    def text(self) -> str:
        return self.before + self.after


class Plan(NamedTuple):
    """A record at any length: `draft(size)` has so many characters, lines or words of haystack."""

    draft: Callable[[int], Draft]
    least: int
    most: float = math.inf


class TooSmall(ValueError):
    """Its argument is how many tokens more would do."""


def draws(kind: str, rng: random.Random, size: int = 0) -> Iterator[str]:
    """Different words, numbers, uuids, or strings of `size` letters, without end.

    Words are all of adjective-noun, as RULER's keys, in random order, then (haystacks of many
    thousand needles) adjective-adjective-noun.
    """
    if kind == "word":
        pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
        yield from rng.sample(pairs, len(pairs))
    seen = set()
    while True:
        if kind == "word":
            text = f"{rng.choice(ADJECTIVES)}-{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        elif kind == "number":
            text = str(rng.randrange(10**6, 10**7))
        elif kind == "uuid":
            text = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        else:
            text = "".join(rng.choices(string.ascii_lowercase, k=size))
        if text not in seen:
            seen.add(text)
            yield text


# ------------------------------------------------------------------------------------------ tasks
#
# A task gives plans to try in turn. `rng` is for this record only, `shared` draws the same at all
# lengths. A draft of a size is always the same: what is random in it begins at `placing`.


def niah_in_text(config: Niah, essay: str, rng: random.Random) -> Plan:
    """Needles in an essay or in noise; some keys' values are asked for (RULER, niah.py)."""
    keys = draws(config.key, rng)
    values = draws(config.value, rng)
    placing = rng.random()
    shares = rng.sample(DEPTHS, config.keys * config.values)
    facts = []
    for key in itertools.islice(keys, config.keys):
        for value in itertools.islice(values, config.values):
            facts.append((key, value))
    names = sorted({key for key, _ in facts})
    lines = [needle(config, *fact) for fact in facts]

    def draft(size: int) -> Draft:
        place = random.Random(placing)
        if config.haystack == "essay":
            before, filler, after, depths = hide_in_essay(lines, size, essay, shares)
        else:
            before, depths = hide_in_noise(lines, size, place)
            filler = MORE_NOISE
            after = ""
        asked = place.sample(names, config.queries)
        outputs = []
        places = []
        for name in asked:
            for (key, value), depth in zip(facts, depths, strict=True):
                if key == name:
                    outputs.append(value)
                    places.append(depth)
        return ask(config, before, filler, after, asked, outputs, places)

    if config.haystack == "essay":
        return Plan(draft, 200, len(essay) - FILLER)
    return Plan(draft, 5)


def niah_among_needles(config: Niah, rng: random.Random, shared: random.Random) -> Plan:
    """A haystack of needles, of which one is asked for (RULER, niah.py)."""
    keys = draws(config.key, shared)
    values = draws(config.value, shared)
    placing = rng.random()
    facts = []

    def draft(size: int) -> Draft:
        while len(facts) < size:
            facts.append((next(keys), next(values)))
        place = random.Random(placing).randrange(size)
        before = "\n".join(needle(config, *fact) for fact in facts[:size])
        key, value = facts[place]
        return ask(config, before, MORE_NOISE, "", [key], [value], [place / size])

    return Plan(draft, 5)


def needle(config: Niah, key: str, value: str) -> str:
    return f"A special magic {config.value} of {key} is: {value}."


def ask(config: Niah, before: str, filler: str, after: str, asked: list[str], outputs: list[str],
        depths: list[float]) -> Draft:
    """A needle task's draft around its haystack: the instruction, and what is asked."""
    names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    if len(outputs) == 1:
        thing = f"special magic {config.value}"
        lead = f"A {thing} is hidden in the text below. Keep it in mind: I shall ask for it later."
        question = f"what is the {thing} of {names}?"
        answer_prefix = f" The {thing} of {names} is"
    else:
        things = f"special magic {config.value}s"
        lead = (f"Some {things} are hidden in the text below. Keep them in mind: I shall ask for "
                "them later.")
        question = f"what are all the {things} of {names}?"
        answer_prefix = f" The {things} of {names} are"
    occurrences = dict.fromkeys(outputs, 1)
    for key in asked:
        occurrences[f" of {key} is: "] = config.values
    before = f"{lead}\n{before}"
    after = f"{after}\nAccording to the text above, {question}"
    depths = [round(depth, 4) for depth in depths]
    return Draft(before, filler, after, answer_prefix, outputs, occurrences, depths)


def hide_in_essay(lines: list[str], size: int, essay: str,
                  shares: list[int]) -> tuple[str, str, str, list[float]]:
    """(essay to its end, how it goes on, lines after its end, depths), for depths in per cent."""
    places = [border(essay, size * share // 100, size) for share in shares]
    before = ""
    previous = 0
    for place, line in sorted(zip(places, lines, strict=True)):
        if place < size:
            before += essay[previous:place]
            last = essay[place - 1:place] or "\n"  # ends the line or sentence before: so this one
            before += line + last if last.isspace() else f"\n{line}\n"
            previous = place
    before += essay[previous:size]
    after = ""
    for place, line in zip(places, lines, strict=True):
        if place == size:
            after += f"\n{line}"
    depths = [place / size for place in places]
    return before, essay[size:size + FILLER], after, depths


def border(text: str, place: int, end: int) -> int:
    """Where a line or sentence begins at or after `place`; if none does for long, a word."""
    if not 0 < place < end:
        return place
    for pattern in (r"\n|(?<=[.!?]) ", r"\s"):
        found = re.compile(pattern).search(text, place - 1, min(end, place + 400))
        if found:
            return found.end()
    return place


def hide_in_noise(lines: list[str], size: int, rng: random.Random) -> tuple[str, list[float]]:
    """(`size` lines of noise with others among them in order, depths of these)."""
    places = sorted(rng.sample(range(size), len(lines)))
    text = [NOISE] * size
    # the last first, so that no insertion moves the places of others
    for place, line in zip(reversed(places), reversed(lines), strict=True):
        text.insert(place, line)
    depths = [place / size for place in places]
    return "\n".join(text), depths


def vt(rng: random.Random, shared: random.Random) -> Plan:
    """Variable tracking: one chain of four hops in noise, after a worked example.

    RULER, variable_tracking.py.
    """
    instruction = ("Variables are assigned in the text below, some from other variables. "
                   "Follow the chain of assignments.\n\n")
    known = shared.randrange(10_000, 100_000, 2)
    value = rng.randrange(10_001, 100_000, 2)  # odd: never the example's
    placing = rng.random()

    names, lines = chain(known, 3, shared)
    noise, _ = hide_in_noise(lines, 12, shared)
    example = f"{instruction}{noise}{trace(known)}{found(known)} {' '.join(names)}\n\n"
    names, lines = chain(value, 5, rng)
    occurrences = dict.fromkeys(names, 2) | {names[-1]: 1, str(value): 2}

    def draft(size: int) -> Draft:
        noise, depths = hide_in_noise(lines, size, random.Random(placing))
        return Draft(example + instruction + noise, MORE_NOISE, trace(value), found(value), names,
                     occurrences, [round(depth, 4) for depth in depths])

    return Plan(draft, 5)


def chain(value: int, letters: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Five names of so many letters, and the lines that give the value to each."""
    names = []
    lines = []
    origin = value
    for name in itertools.islice(draws("letters", rng, letters), 5):
        names.append(name.upper())
        lines.append(f"VAR {names[-1]} = {origin}")
        origin = f"VAR {names[-1]}"
    return names, lines


def trace(value: int) -> str:
    return (f"\nQuestion: Which variables have the value {value} in the text above? "
            "Find all of them.")


def found(value: int) -> str:
    return (f" Answer: By the chain of assignments in the text above, 5 variables have the value "
            f"{value}, namely:")


def cwe(rng: random.Random, shared: random.Random, length: int) -> list[Plan]:
    """Common words extraction: ten words 30 times, others 3 times, after a worked example.

    RULER, common_words_extraction.py, by which it is 6 and 1 below 4,096 tokens. A plan for each
    kind of word, the scarce first.
    """
    if length >= 4096:
        often, seldom = 30, 3
        shown, shown_often, shown_seldom = 40, 10, 3
    else:
        often, seldom = 6, 1
        shown, shown_often, shown_seldom = 20, 3, 1
    question = "\nQuestion: Which 10 words occur most often in the list above?"
    answer_prefix = " Answer: The 10 words that occur most often in the list above are:"

    singles = sorted(ADJECTIVES + NOUNS)
    placing = rng.random()
    words = shared.sample(singles, shown)
    example = listing(words, shown_often, shown_seldom, shared) + question + answer_prefix
    example += f" {numbered(words[:10])}\n"

    def plan(source: Iterator[str], most: float) -> Plan:
        drawn = []

        def draft(size: int) -> Draft:
            drawn.extend(itertools.islice(source, max(0, size - len(drawn))))
            before = listing(drawn[:size], often, seldom, random.Random(placing))
            return Draft(example + before, MORE_NOISE, question, answer_prefix, drawn[:10], {})

        return Plan(draft, 11, most)

    others = [word for word in singles if word not in words]
    return [plan(iter(rng.sample(others, len(others))), len(others)),
            plan(draws("word", rng), math.inf)]


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def listing(words: list[str], often: int, seldom: int, rng: random.Random) -> str:
    """A shuffled list, in which the first ten words occur `often`, the others `seldom`."""
    entries = words[:10] * often + words[10:] * seldom
    rng.shuffle(entries)
    return ("The words of the numbered list below do not occur equally often. Keep those in mind "
            f"that occur most often.\n{numbered(entries)}")


def fwe(rng: random.Random, length: int) -> Plan:
    """Frequent words extraction: code word k occurs in proportion to 1/k^2, and the first is dots,
    which are not asked for (RULER, freq_words_extraction.py, alpha 2.0)."""
    count = max(10, (length - MAX_NEW_TOKENS["fwe"]) // 50)
    words = ["...", *itertools.islice(draws("letters", rng, 6), count - 1)]
    placing = rng.random()
    shares = np.arange(1, count + 1)**-2.0 / (math.pi**2 / 6)  # zeta(2)

    question = ("\nQuestion: Which three words occur most often in the coded text above? "
                "Leave out the dots '...' and explain nothing.")
    answer_prefix = " Answer: In the coded text above, the three words that occur most often are:"

    def draft(size: int) -> Draft:
        entries = []
        occurrences = (size * shares).astype(int).tolist()
        for word, times in zip(words, occurrences, strict=True):
            entries += [word] * times
        random.Random(placing).shuffle(entries)
        before = ("The text below is in code words. Count how often each occurs, and find the "
                  f"three most frequent ones. {' '.join(entries)}")
        return Draft(before, " ..." * (FILLER // 4), question, answer_prefix, words[1:4], {})

    return Plan(draft, 80)  # from 80 on, the fourth code word occurs more often than the fifth


# ----------------------------------------------------------------------------------- exact length


def largest(count: Callable[[Draft], int], plan: Plan, budget: int) -> tuple[Draft, int] | None:
    """The draft of the most haystack within `budget` tokens, or of a little less, and its tokens;
    None if the plan has too little. Each step takes the tokens of a unit from the two sizes before.
    """
    best = plan.draft(plan.least)
    used = count(best)
    if used > budget:
        raise TooSmall(used - budget)
    low, high = plan.least, plan.most + 1  # the first fits, the other does not
    previous, last = low, used  # a size and its tokens
    size = 5 * low
    for step in itertools.count():
        if step < 20 or high == math.inf:
            size = max(low + 1, min(size, high - 1))
        else:
            size = (low + high) // 2
        draft = plan.draft(size)
        tokens = count(draft)
        rate = max((tokens - last) / (size - previous), 0.05)
        previous, last = size, tokens
        if tokens <= budget:
            low, best, used = size, draft, tokens
        else:
            high = size
        if budget - used <= max(24, rate):
            return best, used
        if high == low + 1:
            return None if low == plan.most else (best, used)
        size += math.floor((budget - 8 - tokens) / rate)


def fill(tokenizer: Tokenizer, count: Callable[[Draft], int], draft: Draft, used: int,
         budget: int) -> Draft | None:
    """The draft with filler that makes `budget` tokens of `used`.

    Only text nearby is encoded to find it, then all to check. If its own filler skips that number
    (one letter may be several tokens), noise or dots may not.
    """
    start, end = draft.before[-400:], draft.after[:400]
    first = len(tokenizer.encode_ordinary(start + end))
    for filler in (draft.filler, " " + NOISE * 4, " ." * 200):
        for size in range(len(filler) + 1):
            nearby = len(tokenizer.encode_ordinary(start + filler[:size] + end))
            tokens = used - first + nearby
            if tokens == budget:
                filled = draft._replace(before=draft.before + filler[:size])
                if count(filled) == budget:
                    return filled
            if tokens > budget + 16:
                break
    return None


def essay_window(haystack: str, length: int, seed: int, sample: int) -> str:
    """A sample's essay, which begins alike at all lengths; a short one is repeated, as RULER's."""
    place = random.Random(f"{seed} haystack {sample}").randrange(len(haystack))
    start = haystack.find("\n", place) + 1
    end = start + 16 * length + FILLER  # tokens of text are seldom longer than 16 characters
    return (haystack * math.ceil(end / len(haystack)))[start:end]


def plans(task: str, length: int, essay: str, rng: random.Random,
          shared: random.Random) -> list[Plan]:
    if task == "vt":
        return [vt(rng, shared)]
    if task == "cwe":
        return cwe(rng, shared, length)
    if task == "fwe":
        return [fwe(rng, length)]
    if NIAH[task].haystack == "needles":
        return [niah_among_needles(NIAH[task], rng, shared)]
    return [niah_in_text(NIAH[task], essay, rng)]


def one_right_answer(draft: Draft) -> bool:
    return all(draft.text.count(part) == times for part, times in draft.occurrences.items())


def has_essay(task: str) -> bool:
    return task in NIAH and NIAH[task].haystack == "essay"


def make_record(tokenizer: Tokenizer, haystack: str, task: str, length: int, sample: int,
                seed: int = 42, chat: bool = False, system: str | None = None) -> dict:
    """A line of the output without its index: a pure function of its arguments.

    Raises TooSmall, or ValueError if no draw gives exactly `length` tokens.
    """
    budget = length - MAX_NEW_TOKENS[task.partition("_")[0]]
    essay = essay_window(haystack, length, seed, sample) if has_essay(task) else ""

    def count(draft: Draft) -> int:
        return len(prompt_tokens(tokenizer, draft.text, draft.answer_prefix, chat, system))

    def exact(plan: Plan) -> Draft | None:
        best = largest(count, plan, budget)
        return best and fill(tokenizer, count, *best, budget)

    for attempt in range(5):
        rng = random.Random(f"{seed} {task} {length} {sample} {attempt}")
        shared = random.Random(f"{seed} {task} {sample}")
        for plan in plans(task, length, essay, rng, shared):
            draft = exact(plan)
            if draft and one_right_answer(draft):
                record = {
                    "task": task,
                    "length": length,
                    "sample": sample,
                    "template": "chat" if chat else "plain",
                    "system": system,
                    "input": draft.text,
                    "answer_prefix": draft.answer_prefix,
                    "outputs": draft.outputs,
                    "metric": "all",
                    "max_new_tokens": length - budget,
                }
                if draft.depths:
                    record["depths"] = draft.depths
                return record
    raise ValueError(f"{task}, length {length}, sample {sample}: no draw of five has exactly as "
                     "many tokens and one answer")


# ----------------------------------------------------------------------------------- command line


def least_length(make: Callable, task: str, length: int, samples: int) -> int:
    """The least length from `length` on at which all samples of a task can be made."""
    for _ in range(1000):
        try:
            for sample in range(samples):
                make(task, length, sample)
            return length
        except TooSmall as lacking:
            length += lacking.args[0]
        except ValueError:
            length += 1
    raise ValueError(f"{task}: no length up to {length} works")


def load_haystack(source: str, tokenizer: Tokenizer) -> str:
    """The texts of a corpus's held-out split, a file, a directory or the standard library."""
    path = source_path(source, "--haystack")
    if is_corpus(path):
        texts = (tokenizer.decode(tokens.tolist()) for tokens in held_out_split(path, tokenizer))
        haystack = "\n\n".join(texts)[:HAYSTACK_BYTES]
    else:
        documents = Documents(path)
        haystack = "\n\n".join(read_texts([documents], HAYSTACK_BYTES))
        print(documents.report("haystack"))
    if not haystack.strip():
        raise ValueError(f"--haystack {source}: holds no text")
    return haystack


def parser() -> Parser:
    parser = Parser("Prompts of RULER's synthetic tasks, each of exactly the length asked for.")
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    add("--lengths", type=int, nargs="+", required=True, help="tokens of prompt and answer's room")
    add("--tasks", nargs="+", choices=("all", *TASKS), default=["all"], metavar="TASK",
        help=f"all, or some of {' '.join(TASKS)}")
    add("--samples", type=positive, default=25, help="records of a task and length (RULER: 500)")
    add("--haystack", default="stdlib", help="text that was not trained on: a corpus directory "
        "(its held-out split), a file, a directory, or stdlib")
    add("--prompt", choices=("plain", "chat"), default="plain", help="how the model will read it")
    add("--system", help="system message of chat prompts")
    add("--seed", type=int, default=42, help="another seed makes other prompts")
    add("--out", type=writable, required=True, help="JSON lines, replaced if there")
    return parser


def write_records(make: Callable[[str, int, int], dict], tasks: list[str], lengths: list[int],
                  samples: int, out: Path) -> int:
    """Write the record that `make` gives for each (task, length, sample) as soon as it is made.

    The file appears complete. Returns how many.
    """
    def checked(task: str, length: int, sample: int) -> dict:
        try:
            return make(task, length, sample)
        except TooSmall:
            least = least_length(make, task, length, samples)
            raise ValueError(f"{task}: length {length} is too small; the least that works for "
                             f"{samples} samples is {least}") from None

    for task in tasks:  # errors before hours of work
        for length in lengths:
            if length < 2**14:
                checked(task, length, 0)
    order = list(itertools.product(tasks, range(samples), lengths))
    aside = out.with_name(out.name + ".partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for index, place in enumerate(tqdm(order, unit=" prompts", disable=None)):
                task, sample, length = place
                record = {"index": index, **checked(task, length, sample)}
                file.write(json.dumps(record) + "\n")
        sync(aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return len(order)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        if a.system is not None and a.prompt == "plain":
            raise ValueError("--system: a plain prompt has no system message; add --prompt chat")
        tasks = list(TASKS) if "all" in a.tasks else list(dict.fromkeys(a.tasks))
        tokenizer = load_tokenizer(a.tokenizer)
        haystack = load_haystack(a.haystack, tokenizer) if any(map(has_essay, tasks)) else ""
        make = functools.partial(make_record, tokenizer, haystack, seed=a.seed,
                                 chat=a.prompt == "chat", system=a.system)
        count = write_records(make, tasks, sorted(set(a.lengths)), a.samples, a.out)
        print(f"wrote {a.out}: {count:,} {a.prompt} prompts")


if __name__ == "__main__":
    main()
