"""Retrieval evaluation: prompts of exact length, scoring that no longer number passes, results."""
import itertools
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from texts import TEXT, make_tokenizer

import data
import eval_niah
from eval_niah import build_prompt, cell_prompt, evaluate, exact_number_match
from model import Llama
from parallel import Grid
from rope_yarn import RopeScaling
from tools.prepare import write_corpus


@pytest.fixture(scope="module", params=[1, 3], ids=["one digit a token", "up to three"])
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return np.array(tokenizer.encode_ordinary(TEXT))


def build(tokenizer, haystack, length=400, depth=0.5, seed=0, **options):
    return build_prompt(tokenizer, haystack, length, depth, random.Random(seed), **options)


class Remembered:
    """The tokens themselves in place of keys and values."""

    def __init__(self, batch, capacity):
        self.tokens = torch.empty(batch, 0, dtype=torch.int64)
        self.capacity = capacity

    @property
    def length(self):
        return self.tokens.shape[1]

    def truncate(self, length):
        self.tokens = self.tokens[:, :length]

    def fullest(self):
        return self.length


class Oracle:
    """Reads the fact and the question, and continues the lead with `change(number)`. Its hidden
    states are (B, S, 1): the token it would say next."""

    grid = Grid()
    head_weight = torch.zeros(1)

    def __init__(self, tokenizer, change=lambda number: number):
        self.tokenizer = tokenizer
        self.change = change
        self.head_rows = []

    def new_cache(self, batch, capacity):
        return Remembered(batch, capacity)

    def hidden_states(self, tokens):
        assert tokens.dtype == torch.int64
        hidden = torch.zeros(*tokens.shape, 1)
        for row, ids in enumerate(tokens.tolist()):
            text = self.tokenizer.decode(ids)
            key = re.search(r"What is (?:the pass key|the magic number of ([\w-]+))\?", text)[1]
            thing = f"magic number of {key}" if key else "pass key"
            number = re.search(rf"\nThe {thing} is (\d+)\.", text)[1]
            said = self.tokenizer.encode_ordinary(self.change(number) + ".")
            start = len(ids) - len(self.tokenizer.encode_ordinary(number)) - 1
            said = said[:len(ids) - start]
            hidden[row, start:start + len(said), 0] = torch.tensor(said, dtype=torch.float32)
        return hidden

    def hidden_at(self, tokens, places, cache):
        seen = cache.length
        cache.tokens = torch.cat([cache.tokens, tokens], 1)
        return self.hidden_states(cache.tokens)[:, seen:].gather(1, places[..., None])  # (B, n, 1)

    def logits(self, hidden):
        self.head_rows.append(hidden.shape[:-1].numel())
        return F.one_hot(hidden[..., 0].long(), self.tokenizer.n_vocab).float()


def accuracy(model, tokenizer, haystack, **options):
    results = evaluate(model, tokenizer, haystack, [256, 400], [0.0, 0.5, 1.0], 4, **options)
    return [mean["accuracy"] for mean in results["means"]]


# ---------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", ["passkey", "needle", "mixed"])
def test_oracle_scores_100_percent(tokenizer, haystack, task, chat):
    """A scorer that looks at the wrong rows (off by one), or a question for another key."""
    assert accuracy(Oracle(tokenizer), tokenizer, haystack, task=task, chat=chat) == [100.0, 100.0]


@pytest.mark.parametrize("digits", [4, 5, 6])
@pytest.mark.parametrize("change", [
    pytest.param(lambda n: n + "7", id="longer"),
    pytest.param(lambda n: "1" + n, id="longer in front"),
    pytest.param(lambda n: n[:-1], id="shorter"),
    pytest.param(lambda n: n[:-1] + str((int(n[-1]) + 1) % 10), id="last digit"),
])
def test_another_number_scores_0_percent(tokenizer, haystack, change, digits):
    """A scorer that accepts a longer number: 482137 for 48213, also where three digits share a
    token."""
    assert accuracy(Oracle(tokenizer, change), tokenizer, haystack, digits=digits) == [0.0, 0.0]


def test_random_answers_score_0_percent(tokenizer, haystack):
    class Random(Oracle):
        def logits(self, hidden):
            generator = torch.Generator().manual_seed(1)
            return torch.randn(*hidden.shape[:-1], tokenizer.n_vocab + 9, generator=generator)

    assert accuracy(Random(tokenizer), tokenizer, haystack) == [0.0, 0.0]


def test_another_split_of_the_same_digits_is_wrong():
    """Teacher forcing goes on with 482 whatever the model said: 48|213 does not prove that it says
    48213."""
    tokenizer = make_tokenizer(3)
    prompt = build(tokenizer, np.array(tokenizer.encode_ordinary(TEXT)))
    usual = tokenizer.encode_ordinary(prompt.answer)
    first = tokenizer.encode_ordinary(prompt.answer[:2])
    second = tokenizer.encode_ordinary(prompt.answer[2:])
    dot = tokenizer.encode_ordinary(".")
    assert eval_niah.score(tokenizer, prompt, usual + dot) == (True, prompt.answer + ".")
    assert eval_niah.score(tokenizer, prompt, first + second + dot) == (False, prompt.answer + ".")


def test_ids_beyond_the_tokenizer_are_wrong_answers_not_a_crash(tokenizer, haystack):
    """Models whose vocabulary is padded beyond the tokenizer may predict an id without bytes."""
    prompt = build(tokenizer, haystack)
    count = len(prompt.tokens) - prompt.answer_start
    match, given = eval_niah.score(tokenizer, prompt, [tokenizer.n_vocab + 5] * (count + 1))
    assert not match and given == "\ufffd" * (count + 1)


@pytest.mark.parametrize("text, match", [
    ("48213", True),
    ("48213.", True),
    ("The key is 48213, I think", True),
    ("48213 and 7", True),
    ("n=48213;", True),
    ("482135", False),
    ("148213", False),
    ("048213", False),
    ("48,213", False),
    ("48213.5", False),
    ("48213,000", False),
    ("1 48213", False),
    ("4 8 2 1 3", False),
    ("", False),
    ("none", False),
    ("48213\u0665", False),
])
def test_exact_number_match(text, match):
    """`number in text` accepts 482135; a search for any number accepts a list of guesses."""
    assert exact_number_match(text, "48213") is match


def test_head_sees_answer_rows_only(tokenizer, haystack):
    """Logits of a whole prompt are S x V: 500 GB at a million tokens."""
    oracle = Oracle(tokenizer)
    evaluate(oracle, tokenizer, haystack, [256], [0.5], 3, digits=6, batch_tokens=512)
    answer_rows = len(tokenizer.encode_ordinary("123456")) + 1
    assert oracle.head_rows == [2 * answer_rows, answer_rows]


# ---------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_length_is_exactly_the_label(tokenizer, haystack, task, chat):
    """A haystack cut by characters, or a template added after the cut: 128K on the label, 127K in
    truth."""
    for length in (320, 321, 640, 1024):
        for depth in (0.0, 0.111111, 0.5, 1.0):
            prompt = build(tokenizer, haystack, length, depth, task=task, chat=chat)
            assert len(prompt.tokens) == length
            assert all(type(token) is int for token in prompt.tokens)
            answer = tokenizer.encode_ordinary(prompt.answer)
            assert prompt.tokens[prompt.answer_start:] == answer
            # in the fact and as the answer
            assert tokenizer.decode(prompt.tokens).count(prompt.answer) == 2


def test_number_has_the_same_tokens_in_fact_and_answer(tokenizer, haystack):
    """Text tokenised as a whole may be split otherwise than its parts: the answer would not copy
    the fact."""
    prompt = build(tokenizer, haystack, task="needle")
    opening = tokenizer.encode_ordinary(f"\nThe magic number of {prompt.key} is ")
    fact = opening + prompt.tokens[prompt.answer_start:]
    assert prompt.tokens[prompt.needle_start:prompt.needle_start + len(fact)] == fact
    whole = tokenizer.decode(prompt.tokens)
    as_one = tokenizer.encode_ordinary(whole[whole.rindex("What is"):])
    # and it is how the model has always read such text
    assert prompt.tokens[-len(as_one):] == as_one


def test_chat_prompt_is_the_template_around_one_user_message(tokenizer, haystack):
    """Special tokens spelled as text, or the lead in the user's turn instead of the assistant's."""
    prompt = build(tokenizer, haystack, chat=True)
    text = tokenizer.decode(prompt.tokens)
    start, content = text.split("<|start_header_id|>user<|end_header_id|>\n\n")
    user, rest = content.split("<|eot_id|>")
    assert start == "<|begin_of_text|>"
    assert user.endswith("\nWhat is the pass key?")
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert rest == f"{header}The pass key is {prompt.answer}"
    assert prompt.tokens[0] == tokenizer.encode_single_token("<|begin_of_text|>")
    assert prompt.tokens.count(tokenizer.encode_single_token("<|eot_id|>")) == 1


def test_plain_prompt_begins_as_the_model_was_trained(tokenizer, haystack):
    """Llama 3 without its begin-of-text token attends to nothing it knows."""
    first = build(tokenizer, haystack).tokens[0]
    assert first == tokenizer.encode_single_token("<|begin_of_text|>")


@pytest.mark.parametrize("chat", [False, True])
def test_fact_is_at_its_depth(tokenizer, haystack, chat):
    """A depth measured in another unit, or from the wrong end."""
    for seed, depth in enumerate((0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)):
        prompt = build(tokenizer, haystack, 1000, depth, seed=seed, chat=chat)
        text = tokenizer.decode(prompt.tokens)
        head = len(eval_niah.chat_frame(tokenizer)[0]) if chat else 1
        fact = len(tokenizer.encode_ordinary(re.search(r"\nThe pass key is .*\n", text)[0]))
        question = text[text.index("\nWhat is"):]
        if chat:  # the end of the user's turn, too
            tail = len(tokenizer.encode(question, allowed_special="all"))
        else:
            tail = len(tokenizer.encode_ordinary(question))
        room = 1000 - head - fact - tail
        assert abs((prompt.needle_start - head) / room - depth) <= 0.021


def test_fact_goes_to_the_nearest_line(tokenizer):
    """The first line found within reach instead of the nearest: every depth is shifted the same
    way."""
    tokens = np.array(tokenizer.encode_ordinary("xyz\n" * 300))  # four tokens a line
    for target in range(400, 420):
        place = eval_niah.insertion_point(tokenizer, tokens.tolist(), target)
        assert place % 4 in (0, 3)  # before or after a line's end
        assert abs(place - target) <= 1


def test_fact_cuts_no_line_word_or_character(tokenizer):
    """A fact in the middle of a word damages the text around it, and stands out by that."""
    def around(prompt):
        """The bytes before the fact, and those after it."""
        before = tokenizer.decode_bytes(prompt.tokens[:prompt.needle_start])
        rest = tokenizer.decode_bytes(prompt.tokens[prompt.needle_start:])
        return before, rest.split(b"Remember it.\n")[1]

    for text, border in (("ab, cd\n  {ef}\n" * 300, "\n"), (TEXT.replace("\n", " "), " ")):
        tokens = np.array(tokenizer.encode_ordinary(text))
        for seed in range(40):
            prompt = build(tokenizer, tokens, 700, 0.1 + 0.02 * seed, seed=seed)
            before, after = around(prompt)
            assert before.endswith(border.encode()) or after.startswith(border.encode())
    # three tokens a character, no space
    characters = np.array(tokenizer.encode_ordinary("日本語の文章" * 200))
    for seed in range(20):
        _, after = around(build(tokenizer, characters, 700, 0.5, seed=seed))
        assert not 0x80 <= after[0] < 0xC0


def test_rest_of_the_prompt_is_the_haystack_as_it_was(tokenizer, haystack):
    """A fact that overwrites text, or swallows a piece of it."""
    prompt = build(tokenizer, haystack, 800, 0.3, task="needle")
    text = tokenizer.decode(prompt.tokens).removeprefix("<|begin_of_text|>")
    body, question = text.split("\nWhat is the magic")
    fact = f"\nThe magic number of {prompt.key} is {prompt.answer}.\n"
    assert body.count(fact) == 1
    left = body.replace(fact, "")
    assert len(left) > 300
    assert left.strip("\ufffd") in TEXT  # a window may begin or end inside a character


def test_numbers_of_the_haystack_are_not_drawn(tokenizer):
    """A number that also stands in the text has two right places, or a wrong one."""
    tokens = np.array(tokenizer.encode_ordinary("1 2 3 4 x5y 6 8 9 " * 60))
    for seed in range(10):
        assert build(tokenizer, tokens, seed=seed, digits=1).answer == "7"
    tokens = np.array(tokenizer.encode_ordinary("1 2 3 4 5 6 7 8 9 " * 60))
    with pytest.raises(ValueError, match="holds nearly all numbers of 1 digits"):
        build(tokenizer, tokens, digits=1)


def test_keys_of_the_haystack_are_not_drawn(tokenizer):
    """A key that the text speaks of anyway, in any case; and what happens when it speaks of all of
    them."""
    def keys_drawn(text):
        tokens = np.array(tokenizer.encode_ordinary(text))
        return {build(tokenizer, tokens, 1200, seed=seed, task="needle").key for seed in range(5)}

    words = " ".join(key.upper() for key in eval_niah.KEYS if key != "orchid")
    assert keys_drawn(f"{words}\n" * 6) == {"orchid"}
    pairs = keys_drawn(f"{words} orchid\n" * 6)
    assert len(pairs) > 1
    assert all(re.fullmatch(r"\w+-\w+", key) for key in pairs)


def test_prompt_depends_on_nothing_but_its_cell(tokenizer, haystack):
    """One random stream for a whole run: leaving out a length or a depth changes all prompts after
    it."""
    cell = {"seed": 5, "task": "mixed", "chat": False, "digits": 5}
    alone = cell_prompt(tokenizer, haystack, 300, 0.5, 1, **cell)

    def prompts_of_the_cell(lengths, depths, samples):
        results = evaluate(Oracle(tokenizer), tokenizer, haystack, lengths, depths, samples, seed=5,
                           task="mixed")
        [found] = [found["prompts"] for found in results["cells"]
                   if (found["length"], found["depth"]) == (300, 0.5)]
        return found

    few = prompts_of_the_cell([300], [0.5], 2)
    many = prompts_of_the_cell([400, 300], [0.0, 0.5], 3)
    assert few == many[:2]
    assert few[1]["expected"] == alone.answer

    answers = set()
    for seed, length, depth, sample in itertools.product((5, 6), (300, 400), (0.0, 0.5), (0, 1)):
        other = cell_prompt(tokenizer, haystack, length, depth, sample, **cell | {"seed": seed})
        answers.add(other.answer)
    assert len(answers) == 16


def test_prompt_does_not_depend_on_how_much_haystack_a_longer_length_needed(tokenizer):
    """Text is read as far as the longest length needs it; shorter ones must draw from the same part
    of it."""
    cell = {"seed": 5, "task": "passkey", "chat": False, "digits": 5}
    reach = eval_niah.OFFSETS + 300
    long = np.resize(np.array(tokenizer.encode_ordinary(TEXT)), reach + 50_000)
    of_all = cell_prompt(tokenizer, long, 300, 0.5, 0, **cell)
    of_what_it_needs = cell_prompt(tokenizer, long[:reach], 300, 0.5, 0, **cell)
    assert of_all == of_what_it_needs


@pytest.mark.parametrize("options, message", [({"length": 20}, "length 20 is too small")])
def test_impossible_prompts_are_refused(tokenizer, haystack, options, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, haystack, **options)


# --------------------------------------------------------------------------------- model, results


def test_batching_changes_no_result(model_directory):
    """Rows mixed up between the prompts of a batch, or a last batch that is dropped."""
    model = Llama.from_pretrained(model_directory)
    tokenizer = data.load_tokenizer(model_directory)
    haystack = np.array(tokenizer.encode_ordinary(TEXT))

    def results(batch_tokens):
        return evaluate(model, tokenizer, haystack, [200, 300], [0.0, 0.5], 3,
                        batch_tokens=batch_tokens)

    one = results(1)
    some = results(800)
    all_at_once = results(10**6)
    assert one["cells"] == some["cells"] == all_at_once["cells"]
    assert one["means"] == some["means"]
    assert one["read"] == all_at_once["read"] == 2 * 3 * (200 + 300)
    given = {prompt["given"] for cell in one["cells"] for prompt in cell["prompts"]}
    assert len(given) > 3  # or the model says the same to everything


def arguments(model_directory, text_file, *more):
    return [str(model_directory), "--device", "cpu", "--haystack", str(text_file),
            "--lengths", "200", "400",
            "--depths", "3", "--samples", "2", *map(str, more)]


def test_command_line_writes_what_it_shows(model_directory, text_file, tmp_path, capsys):
    more = ("--out", tmp_path / "results.json", "--task", "mixed")
    eval_niah.main(arguments(model_directory, text_file, *more))
    shown = capsys.readouterr().out
    assert "\033" not in shown
    assert "note: lengths above 256" in shown
    assert shown.count(" | ") == 6
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["seed"] == 1234
    assert results["settings"]["dtype"] == "float32"
    assert results["settings"]["model"] == str(model_directory)
    assert results["lengths"] == [200, 400]
    assert results["depths"] == [0.0, 0.5, 1.0]
    assert results["window"] == 256
    prompts = [prompt for cell in results["cells"] for prompt in cell["prompts"]]
    assert len(results["cells"]) == 6
    assert len(prompts) == 12
    assert {prompt["task"] for prompt in results["cells"][0]["prompts"]} == {"passkey", "needle"}
    for prompt in prompts:
        assert re.fullmatch(r"\d{5}", prompt["expected"])
        assert prompt["given"]
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_another_base_is_asked_for_without_training(model_directory, text_file, tmp_path):
    """As if it stood in config.json."""
    def results(directory, *more):
        out = tmp_path / "results.json"
        eval_niah.main([str(directory), "--haystack", str(text_file), "--lengths", "200",
                        "--depths", "3", "--samples", "4", "--out", str(out), *map(str, more)])
        return json.loads(out.read_text())["cells"]

    changed = tmp_path / "changed"
    shutil.copytree(model_directory, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_theta": 50.0}))
    asked = results(model_directory, "--rope-theta", 50)
    assert asked == results(changed)
    assert asked != results(model_directory)
    with pytest.raises(SystemExit, match="--rope-theta 1 must be a finite number above 1"):
        results(model_directory, "--rope-theta", 1)


def test_rope_override_extends_the_window(model_directory, text_file, tmp_path, capsys):
    """YaRN can be evaluated untrained: the model answers as one saved with the scaling, and the map
    keeps the old window."""
    extended = tmp_path / "extended"
    model = Llama.from_pretrained(model_directory, rope_scaling=RopeScaling("yarn", 4.0))
    model.save_pretrained(extended)
    shutil.copy(model_directory / "tokenizer.model", extended)

    def results(path, *more):
        eval_niah.main(arguments(path, text_file, *more, "--out", tmp_path / "results.json"))
        return json.loads((tmp_path / "results.json").read_text())

    asked = results(model_directory, "--rope-kind", "yarn", "--rope-factor", 4)
    saved = results(extended)
    plain = results(model_directory)
    assert asked["cells"] == saved["cells"] != plain["cells"]
    assert asked["window"] == saved["window"] == plain["window"] == 256
    # of the model that is not extended
    assert capsys.readouterr().out.count("note: lengths above 256") == 1


@pytest.mark.parametrize("change, message", [
    (["--haystack", "/no/such/place"], "/no/such/place"),
    (["--lengths", "30"], "length 30 is too small"),
    (["--lengths", "9000000"], "needs as many"),
    (["--samples", "0"], "--samples 0"),
    (["--depths", "0"], "--depths 0"),
    (["--out", "/no/such/place/x.json"], "--out /no/such/place/x.json"),
    (["--device", "tpu"], "--device tpu"),
    (["--rope-kind", "yarn", "--rope-factor", "0.5"], "factor"),
    (["--rope-factor", "2"], "add --rope-kind"),
    (["--digits", "0"], "--digits 0"),
    (["--batch-tokens", "0"], "--batch-tokens 0"),
    (["--rope-kind", "yarn", "--rope-factor", "2", "--beta-fast", "0.5"], "beta_fast"),
])
def test_mistakes_are_one_line_before_loading(
        model_directory, text_file, tmp_path, change, message):
    weights = shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(model_directory, tmp_path / "weightless", ignore=weights)
    with pytest.raises(SystemExit) as error:
        eval_niah.main(arguments(tmp_path / "weightless", text_file, *change))
    line = str(error.value)
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line


def test_missing_parts_are_named(model_directory, text_file, tmp_path):
    """No model, a tokenizer of another model."""
    with pytest.raises(SystemExit, match="nothing: no config.json there; give a Hugging Face"):
        eval_niah.main(arguments(tmp_path / "nothing", text_file))
    config = json.loads((model_directory / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes((model_directory / "tokenizer.model").read_bytes())
    message = "tokenizer.model: 1620 tokens, but the model.s vocab_size is 300"
    with pytest.raises(SystemExit, match=message):
        eval_niah.main(arguments(tmp_path, text_file))


def test_haystack_that_states_such_facts_itself_is_refused(model_directory, tmp_path):
    """Retrieval documents of a training mixture as haystack: several right answers, or none."""
    (tmp_path / "mixed.txt").write_text(TEXT + "The magic number of copper is 12345.\n")
    with pytest.raises(SystemExit, match="like the facts to be hidden"):
        eval_niah.main(arguments(model_directory, tmp_path / "mixed.txt"))


def test_corpus_gives_its_held_out_split_once(tmp_path):
    """Evaluation on training text; or an endless stream that repeats a short split to any
    length."""
    tokenizer = make_tokenizer(3)
    train = ("s", tokenizer.encode_ordinary("seen " * 50), None)
    valid = ("s", tokenizer.encode_ordinary(TEXT[:900]), None)
    write_corpus({"train": [train], "valid": [valid]}, tmp_path / "corpus", tokenizer)
    whole = eval_niah.load_haystack(tmp_path / "corpus", tokenizer, 10**6)
    assert tokenizer.decode(whole.tolist()) == TEXT[:900]
    beginning = eval_niah.load_haystack(tmp_path / "corpus", tokenizer, 100)
    assert beginning.tolist() == whole[:100].tolist()


def test_one_file_of_text_is_a_haystack_and_nothing_else(tmp_path):
    tokenizer = make_tokenizer(3)
    (tmp_path / "a.md").write_text(TEXT)
    tokens = eval_niah.load_haystack(tmp_path / "a.md", tokenizer, 40)
    assert tokens.tolist() == tokenizer.encode_ordinary(TEXT)[:40]
    assert tokens.dtype == np.int64
    (tmp_path / "mark.txt").write_text(TEXT, encoding="utf-8-sig")
    assert eval_niah.load_haystack(tmp_path / "mark.txt", tokenizer, 40).tolist() == tokens.tolist()
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "c.jsonl").write_text('{"text": "prose"}\n' * 9)
    (tmp_path / "d.json").write_text('[\n {\n  "text": "prose"}]')
    for path in (tmp_path, *(tmp_path / name for name in ("b.bin", "c.jsonl", "d.json"))):
        message = f"^--haystack {path}: neither .*; prepare a corpus from it .*tools.prepare"
        with pytest.raises(ValueError, match=message):
            eval_niah.load_haystack(path, tokenizer, 40)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Results half-written when the disk fills up."""
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        data.write_complete(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_terminal_map_and_standard_error(tokenizer, haystack):
    class Half(Oracle):
        """Right in the first half of the fact's places."""

        def hidden_states(self, tokens):
            hidden = super().hidden_states(tokens)
            late = [self.tokenizer.decode(ids).index("Remember") > 350 for ids in tokens.tolist()]
            return torch.where(torch.tensor(late)[:, None, None], 0.0, hidden)

    results = evaluate(Half(tokenizer), tokenizer, haystack, [600, 300], [0.0, 1.0], 5)
    results["window"] = 300
    assert eval_niah.accuracy_grid(results) == [[100.0, 100.0], [100.0, 0.0]]
    # 50 % by every sample
    mean = {"length": 600, "prompts": 10, "accuracy": 50.0, "standard_error": 0.0}
    assert results["means"][1] == mean

    right = np.array([[1, 1, 0, 1], [0, 1, 0, 1]])  # samples of 50, 100, 0 and 100 %
    assert eval_niah.standard_error(right) == pytest.approx(np.std([0.5, 1, 0, 1], ddof=1) / 2)
    assert eval_niah.standard_error(right[:, :1]) == pytest.approx(0.125 ** 0.5)

    plain = eval_niah.terminal_map(results, colour=False)
    assert [" ".join(line.split()) for line in plain.splitlines()] == [
        "depth 300 | 600",
        "0 % 100 | 100",
        "100 % 100 | 0",
        "mean 100.0 | 50.0",
        "± 0.0 | 0.0",
    ]
    colour = eval_niah.terminal_map(results, colour=True)
    assert re.sub(r"\033\[[\d;]*m", "", colour) == plain != colour


# ------------------------------------------------------------------------------ shared beginnings


def test_cells_share_the_haystack_before_their_fact(model_directory):
    """Ten depths cost little more than half of cell by cell, over lengths too, and every answer
    stays what it was."""
    model = Llama.from_pretrained(model_directory)
    tokenizer = data.load_tokenizer(model_directory)
    haystack = np.resize(np.array(tokenizer.encode_ordinary(TEXT)), 30_000)
    depths = [i / 9 for i in range(10)]
    results = evaluate(model, tokenizer, haystack, [512, 1024, 2048], depths, 1, batch_tokens=1)
    assert results["read"] == 10 * 3584
    assert 0.5 < results["computed"] / results["read"] <= 0.6
    for cell in results["cells"]:
        prompt = cell_prompt(tokenizer, haystack, cell["length"], cell["depth"], 0, seed=1234,
                             task="passkey", chat=False, digits=5)
        with torch.no_grad():
            logits = model(torch.tensor([prompt.tokens]))[0]  # (S, V)
        said = logits[prompt.answer_start - 1:].argmax(1).tolist()
        assert eval_niah.score(tokenizer, prompt, said)[1] == cell["prompts"][0]["given"]
