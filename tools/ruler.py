"""Prompts of RULER's synthetic tasks (arXiv 2404.06654), each of exactly the length asked for, as JSON lines.

    python -m tools.ruler --tokenizer MODEL_DIR --lengths 4096 8192 --tasks all --haystack stdlib --out out/ruler.jsonl

Eleven of RULER's thirteen tasks, with its names and parameters (scripts/synthetic.yaml); the other two need data sets of
questions. What the model reads for a record (eval_niah.prompt_tokens) and `max_new_tokens` are `length` tokens together, to the
token. `outputs` are what an answer must hold: the score is the share of them that it does (string_match_all).

Where this is not RULER: all sentences are worded anew. The essay is any text, its line breaks kept, its needles put
between lines or sentences. No key, value or variable is met twice by chance. Words are those below: cwe has single ones
while they last, then compounds as keys are (one kind in a list, none that its example has). Needle haystacks ask for one
of their lines, not for one more. vt's example has 12 lines of noise at any tokenizer. RULER stays below a length; here
more essay, noise or dots after the haystack fill the rest. Essays, lines of needles and examples are drawn by seed and
sample only: prompts of several lengths begin alike, and come in order (task, sample, length) for a cache of prefixes.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import string
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

from data import Tokenizer, held_out_split, is_corpus, load_tokenizer, sync
from eval_niah import check_output, prompt_tokens
from parallel import check_least
from tools.prepare import source_path
from tools.train_tokenizer import read_texts

# No word is part of another, or an answer would be found inside a wrong one.
ADJECTIVES = """alert ample ancient blunt bold brave brief bright brisk broad calm careful cheap civil clean clever coarse
compact crisp curious curly deep dense distant dizzy dull dusty eager early elegant empty equal exact faint famous fancy fierce
flat fluent foggy fragile frank fresh frugal gentle gloomy grand harsh hollow honest huge humble humid jolly keen large lazy
lively lucky mellow modest muddy narrow neat noble patient plain polar polite proud pure quick quiet rapid rare rough round
rural rusty sharp shiny silent simple sleepy slim smooth solid sour steady strict sturdy subtle sweet swift tame tender thick
tiny urban useful vivid warm wise witty young""".split()
NOUNS = """acorn atlas attic badger balcony barrel blossom boulder bracelet branch bucket buffalo cabbage camel candy cannon
captain carriage cheese chimney clock cloud comet compass cottage cradle cricket curtain daisy dolphin drawer elbow fabric
farmer fiddle fountain fox gallery garlic goose guitar hotel hunter jewel kite kitten leopard library lizard lobster mango
market mason miller monkey mountain mushroom notebook novel oyster painter palace parrot pebble pencil pepper piano pigeon
pillow pirate planet pocket potato pumpkin puzzle rabbit raven ribbon rocket saddle sailor salmon singer spider spoon squirrel
tailor teapot temple thunder ticket tiger tomato trumpet tunnel turtle valley village violin wagon walnut whistle window wizard
zebra""".split()
NOISE = "The river is cold. The road is long. The moon is bright. On we walk. Home before the night."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent (RULER, niah.py)
FILLER = 2000  # characters that may fill the rest: more than the longest line has
MORE_NOISE = f"\n{NOISE}" * (FILLER // len(NOISE))
HAYSTACK_BYTES = 2**25  # read at most, whatever the lengths: a record depends on no other
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}  # RULER, constants.py, tokens_to_generate


Niah = namedtuple("Niah", "haystack key value keys values queries", defaults=(1, 1, 1))  # values: of each key
NIAH = {  # RULER, synthetic.yaml
    "niah_single_1": Niah("noise", "word", "number"), "niah_single_2": Niah("essay", "word", "number"),
    "niah_single_3": Niah("essay", "word", "uuid"), "niah_multikey_1": Niah("essay", "word", "number", keys=4),
    "niah_multikey_2": Niah("needles", "word", "number"), "niah_multikey_3": Niah("needles", "uuid", "uuid"),
    "niah_multivalue": Niah("essay", "word", "number", values=4),
    "niah_multiquery": Niah("essay", "word", "number", keys=4, queries=4)}
TASKS = (*NIAH, "vt", "cwe", "fwe")


class Draft(NamedTuple):
    """A prompt whose haystack ends where `before` does; as much of `filler` follows as makes the prompt exact."""

    before: str
    filler: str
    after: str
    answer_prefix: str
    outputs: list[str]
    occurrences: dict[str, int]  # how often these texts are in the prompt if it has one right answer
    depths: list[float] | None = None  # of each output, from 0 to 1


class TooSmall(ValueError):
    """Its argument is how many tokens more would do."""


def draws(kind: str, rng: random.Random, size: int = 0) -> Iterator[str]:
    """Different words, numbers, uuids, or strings of `size` letters, without end. Words are all of adjective-noun, as RULER's
    keys, in random order, then (haystacks of many thousand needles) adjective-adjective-noun."""
    draw = {"word": lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
            "number": lambda: str(rng.randrange(10**6, 10**7)),
            "uuid": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            "letters": lambda: "".join(rng.choices(string.ascii_lowercase, k=size))}[kind]
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS] if kind == "word" else []
    yield from rng.sample(pairs, len(pairs))
    seen = set()
    while True:
        found = draw()
        if found not in seen:
            seen.add(found)
            yield found


# A task yields plans (draft(size), least, most) to try in turn. Size is how many characters, lines or words the haystack has.
# rng is for this record only, `shared` gives the same at all lengths.


def niah(config: Niah, essay: str, rng: random.Random, shared: random.Random) -> Iterator[tuple]:
    """Needles in an essay, in noise or among needles; some keys' values are asked for (RULER, niah.py)."""
    own = shared if config.haystack == "needles" else rng
    keys, values, facts, placing = draws(config.key, own), draws(config.value, own), [], rng.random()
    shares = rng.sample(DEPTHS, config.keys * config.values)

    def draft(size: int) -> Draft:
        for key in itertools.islice(keys, max(0, (size if own is shared else config.keys) - len(facts) // config.values)):
            facts.extend((key, value) for value in itertools.islice(values, config.values))
        place = random.Random(placing)
        lines = [f"A special magic {config.value} of {key} is: {value}." for key, value in facts]
        if own is shared:
            before, filler, after = "\n".join(lines[:size]), MORE_NOISE, ""
            asked, depths = [facts[place.randrange(size)][0]], [i / size for i in range(len(facts))]
        else:
            before, filler, after, depths = (hide_in_essay(lines, size, essay, shares) if config.haystack == "essay" else
                                             hide_in_noise(lines, size, place))
            asked = place.sample(sorted({key for key, _ in facts}), config.queries)
        answers = [i for key in asked for i, fact in enumerate(facts) if fact[0] == key]
        outputs = [facts[i][1] for i in answers]
        some, things, be, every, them = (("A", config.value, "is", "", "it") if len(answers) == 1 else
                                         ("Some", config.value + "s", "are", " all", "them"))
        names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        return Draft(
            f"{some} special magic {things} {be} hidden in the text below. Keep {them} in mind: I shall ask for {them} later.\n"
            + before, filler,
            f"{after}\nAccording to the text above, what {be}{every} the special magic {things} of {names}?",
            f" The special magic {things} of {names} {be}", outputs, dict.fromkeys(outputs, 1)
            | {f" of {key} is: ": config.values for key in asked}, [round(depths[i], 4) for i in answers])

    yield (draft, 200, len(essay) - FILLER) if config.haystack == "essay" else (draft, 5, math.inf)


def hide_in_essay(lines: list[str], size: int, essay: str, shares: list[int]) -> tuple[str, str, str, list[float]]:
    """(essay to its end, how it goes on, lines after its end, depths), for lines at depths `shares` in per cent."""
    places, pieces, previous = [border(essay, size * share // 100, size) for share in shares], [], 0
    for place, line in sorted(zip(places, lines)):
        if place < size:
            last = essay[place - 1:place] or "\n"  # ends the line or sentence before, and so this one
            pieces += [essay[previous:place], line, last] if last.isspace() else [essay[previous:place], f"\n{line}\n"]
            previous = place
    after = "".join(f"\n{line}" for place, line in zip(places, lines) if place == size)
    return "".join(pieces) + essay[previous:size], essay[size:size + FILLER], after, [place / size for place in places]


def border(text: str, place: int, end: int) -> int:
    """Where a line or sentence begins at or after `place`; if none does for long, a word."""
    for pattern in (r"\n|(?<=[.!?]) ", r"\s") if 0 < place < end else ():
        if found := re.compile(pattern).search(text, place - 1, min(end, place + 400)):
            return found.end()
    return place


def hide_in_noise(lines: list[str], size: int, rng: random.Random) -> tuple[str, str, str, list[float]]:
    """(`size` lines of noise with others among them in order, more noise, nothing, depths)."""
    places, text = sorted(rng.sample(range(size), len(lines))), [NOISE] * size
    for place, line in zip(reversed(places), reversed(lines)):
        text.insert(place, line)
    return "\n".join(text), MORE_NOISE, "", [place / size for place in places]


def vt(rng: random.Random, shared: random.Random) -> Iterator[tuple]:
    """Variable tracking: one chain of four hops in noise, after a worked example (RULER, variable_tracking.py)."""
    def chain(rng: random.Random, length: int, value: int) -> tuple[list[str], list[str], str, str]:
        names = [name.upper() for name in itertools.islice(draws("letters", rng, length), 5)]
        lines = [f"VAR {name} = {origin}" for name, origin in zip(names, [value, *(f"VAR {name}" for name in names)])]
        return (names, lines, f"\nQuestion: Which variables have the value {value} in the text above? Find all of them.",
                f" Answer: By the chain of assignments in the text above, 5 variables have the value {value}, namely:")

    instruction = "Variables are assigned in the text below, some from other variables. Follow the chain of assignments.\n\n"
    known, value, placing = shared.randrange(10_000, 100_000, 2), rng.randrange(10_001, 100_000, 2), rng.random()  # differ
    names, lines, question, answer_prefix = chain(shared, 3, known)
    example = f"{instruction}{hide_in_noise(lines, 12, shared)[0]}{question}{answer_prefix} {' '.join(names)}\n\n{instruction}"
    names, lines, question, answer_prefix = chain(rng, 5, value)

    def draft(size: int) -> Draft:
        before, filler, _, depths = hide_in_noise(lines, size, random.Random(placing))
        return Draft(example + before, filler, question, answer_prefix, names,
                     dict.fromkeys(names[:4], 2) | {names[4]: 1, str(value): 2}, [round(depth, 4) for depth in depths])

    yield draft, 5, math.inf


def cwe(rng: random.Random, shared: random.Random, length: int) -> Iterator[tuple]:
    """Common words extraction: ten words 30 times, others 3 times, after a worked example (RULER,
    common_words_extraction.py, by which it is 6 and 1 below 4,096 tokens). A plan for each kind of word, the scarce first."""
    often, seldom, shown = (30, 3, (40, 10, 3)) if length >= 4096 else (6, 1, (20, 3, 1))

    def listing(words: list[str], often: int, seldom: int, rng: random.Random) -> tuple[str, str, str]:
        entries = words[:10] * often + words[10:] * seldom
        rng.shuffle(entries)
        return ("The words of the numbered list below do not occur equally often. Keep those in mind that occur most often.\n"
                + " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1)),
                "\nQuestion: Which 10 words occur most often in the list above?",
                " Answer: The 10 words that occur most often in the list above are:")

    singles, placing = sorted(ADJECTIVES + NOUNS), rng.random()
    words = shared.sample(singles, shown[0])
    example = "".join([*listing(words, *shown[1:], shared), *(f" {i}. {word}" for i, word in enumerate(words[:10], 1)), "\n"])
    others = [word for word in singles if word not in words]
    for source, most in ((iter(rng.sample(others, len(others))), len(others)), (draws("word", rng), math.inf)):
        drawn = []

        def draft(size: int, source: Iterator[str] = source, drawn: list[str] = drawn) -> Draft:
            drawn.extend(itertools.islice(source, max(0, size - len(drawn))))
            before, question, answer_prefix = listing(drawn[:size], often, seldom, random.Random(placing))
            return Draft(example + before, MORE_NOISE, question, answer_prefix, drawn[:10], {})

        yield draft, 11, most


def fwe(rng: random.Random, length: int) -> Iterator[tuple]:
    """Frequent words extraction: code word k occurs in proportion to 1/k^2, and the first is dots, which are not asked for
    (RULER, freq_words_extraction.py, alpha 2.0)."""
    count = max(10, (length - MAX_NEW_TOKENS["fwe"]) // 50)
    words, placing = ["...", *itertools.islice(draws("letters", rng, 6), count - 1)], rng.random()
    shares = np.arange(1, count + 1)**-2.0 / (math.pi**2 / 6)  # zeta(2)

    def draft(size: int) -> Draft:
        text = [word for word, times in zip(words, (size * shares).astype(int).tolist()) for _ in range(times)]
        random.Random(placing).shuffle(text)
        return Draft("The text below is in code words. Count how often each occurs, and find the three most frequent ones. "
                     + " ".join(text), " ..." * (FILLER // 4), "\nQuestion: Which three words occur most often in the coded "
                     "text above? Leave out the dots '...' and explain nothing.",
                     " Answer: In the coded text above, the three words that occur most often are:", words[1:4], {})

    yield draft, 80, math.inf  # from 80 words on, the fourth code word occurs more often than the fifth


# ----------------------------------------------------------------------------------------------------------- exact length


def largest(count: Callable[[Draft], int], draft: Callable[[int], Draft], least: int, most: float,
            budget: int) -> tuple[Draft, int] | None:
    """The draft of the most haystack within `budget` tokens, or of a little less, and its tokens; None if `most` is too
    little. Each step takes the tokens of a unit from the two sizes before."""
    low, high, best, size = least, most + 1, draft(least), 5 * least
    used = last = count(best)
    if used > budget:
        raise TooSmall(used - budget)
    previous = low
    for step in itertools.count():
        size = max(low + 1, min(size, high - 1)) if step < 20 or high == math.inf else (low + high) // 2
        found = draft(size)
        tokens = count(found)
        rate = max((tokens - last) / (size - previous), 0.05)
        previous, last = size, tokens
        if tokens <= budget:
            low, best, used = size, found, tokens
        else:
            high = size
        if budget - used <= max(24, rate) or high == low + 1:
            return None if low == most and budget - used > max(24, rate) else (best, used)
        size += math.floor((budget - 8 - tokens) / rate)


def fill(tokenizer: Encoding, count: Callable[[Draft], int], draft: Draft, used: int, budget: int) -> Draft | None:
    """The draft with filler that makes `budget` tokens of `used`. Only text nearby is encoded to find it, then all to check.
    If its own filler skips that number (one letter may be several tokens), noise or dots may not."""
    start, end = draft.before[-400:], draft.after[:400]
    first = len(tokenizer.encode_ordinary(start + end))
    for filler in (draft.filler, " " + NOISE * 4, " ." * 200):
        for size in range(len(filler) + 1):
            tokens = used - first + len(tokenizer.encode_ordinary(start + filler[:size] + end))
            if tokens == budget and count(filled := draft._replace(before=draft.before + filler[:size])) == budget:
                return filled
            if tokens > budget + 16:
                break
    return None


def essay_window(haystack: str, length: int, seed: int, sample: int) -> str:
    """A sample's essay, the same at its start for all lengths; a short haystack is repeated, as RULER's is."""
    start = haystack.find("\n", random.Random(f"{seed} haystack {sample}").randrange(len(haystack))) + 1
    end = start + 16 * length + FILLER  # tokens of text are seldom longer than 16 characters
    return (haystack * math.ceil(end / len(haystack)))[start:end]


def make_record(tokenizer: Encoding, haystack: str, task: str, length: int, sample: int, seed: int = 42, chat: bool = False,
                system: str | None = None) -> dict:
    """A line of the output without its index: a pure function of its arguments. Raises TooSmall, or ValueError if no draw
    gives exactly `length` tokens."""
    budget, essay = length - MAX_NEW_TOKENS[task.partition("_")[0]], ""
    if task in NIAH and NIAH[task].haystack == "essay":
        essay = essay_window(haystack, length, seed, sample)

    def count(draft: Draft) -> int:
        return len(prompt_tokens(tokenizer, draft.before + draft.after, draft.answer_prefix, chat, system))

    for attempt in range(5):
        rng, shared = random.Random(f"{seed} {task} {length} {sample} {attempt}"), random.Random(f"{seed} {task} {sample}")
        for plan in (niah(NIAH[task], essay, rng, shared) if task in NIAH else vt(rng, shared) if task == "vt" else
                     cwe(rng, shared, length) if task == "cwe" else fwe(rng, length)):
            found = largest(count, *plan, budget)
            draft = found and fill(tokenizer, count, *found, budget)
            if draft and all((draft.before + draft.after).count(text) == n for text, n in draft.occurrences.items()):
                notes = {"depths": draft.depths} if draft.depths else {}
                return {"task": task, "length": length, "sample": sample, "template": "chat" if chat else "plain",
                        "system": system, "input": draft.before + draft.after,
                        "answer_prefix": draft.answer_prefix, "outputs": draft.outputs, "metric": "all",
                        "max_new_tokens": length - budget, **notes}
    raise ValueError(f"{task}, length {length}, sample {sample}: no draw of five has exactly as many tokens and one answer")


# ----------------------------------------------------------------------------------------------------------- command line


def least_length(make: Callable[[str, int, int], dict], task: str, length: int, samples: int) -> int:
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
    """The texts of a corpus's held-out split, a file, a directory or the standard library, as far as they are used."""
    path = source_path(source, "--haystack")
    if is_corpus(path):
        documents = held_out_split(path, tokenizer)
        haystack = "\n\n".join(tokenizer.decode(tokens.tolist()) for tokens in documents)[:HAYSTACK_BYTES]
    else:
        haystack = "\n\n".join(read_texts([path], HAYSTACK_BYTES))
    if not haystack.strip():
        raise ValueError(f"--haystack {source}: holds no text")
    return haystack


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of a prompt and of the answer's room")
    parser.add_argument("--tasks", nargs="+", default=["all"], help=f"all, or some of {' '.join(TASKS)}")
    parser.add_argument("--samples", type=int, default=25, help="records of a task and length (default: 25; RULER: 500)")
    parser.add_argument("--haystack", default="stdlib", help="text that was not trained on: a corpus directory (its held-out "
                        "split), a file, a directory, or stdlib (the default)")
    parser.add_argument("--prompt", choices=("plain", "chat"), default="plain", help="how the model will read it")
    parser.add_argument("--system", help="system message of chat prompts")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, replaced if there")
    return parser.parse_args(argv)


def write_records(tokenizer: Tokenizer, tasks: list[str], lengths: list[int], samples: int, haystack: str, seed: int,
                  chat: bool, system: str | None, out: Path) -> int:
    """Make all records, write each as it is made; the file appears complete. Returns how many. Raises ValueError, OSError."""
    record = functools.partial(make_record, tokenizer, haystack, seed=seed, chat=chat, system=system)

    def make(task: str, length: int, sample: int) -> dict:
        try:
            return record(task, length, sample)
        except TooSmall:
            raise ValueError(f"{task}: length {length} is too small; the least that works for {samples} samples is "
                             f"{least_length(record, task, length, samples)}") from None

    for task, length in itertools.product(tasks, (n for n in lengths if n < 2**14)):  # errors before hours of work
        make(task, length, 0)
    order, aside = list(itertools.product(tasks, range(samples), lengths)), out.with_name(out.name + ".partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for index, (task, sample, length) in enumerate(tqdm(order, unit=" prompts", disable=None)):
                file.write(json.dumps({"index": index, **make(task, length, sample)}) + "\n")
        sync(aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return len(order)


def main(argv: list[str] | None = None) -> None:
    a = parse_arguments(argv)
    try:
        tasks = [*TASKS] if "all" in a.tasks else list(dict.fromkeys(a.tasks))
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ValueError(f"--tasks {unknown[0]}: unknown; give all, or some of {', '.join(TASKS)}")
        check_least(1, samples=a.samples)
        if a.system is not None and a.prompt == "plain":
            raise ValueError("--system: a plain prompt has no system message; add --prompt chat")
        check_output("--out", a.out)
        tokenizer = load_tokenizer(a.tokenizer)
        essays = any(task in NIAH and NIAH[task].haystack == "essay" for task in tasks)
        haystack = load_haystack(a.haystack, tokenizer) if essays else ""
        count = write_records(tokenizer, tasks, sorted(set(a.lengths)), a.samples, haystack, a.seed, a.prompt == "chat",
                              a.system, a.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {a.out}: {count:,} {a.prompt} prompts")


if __name__ == "__main__":
    main()
