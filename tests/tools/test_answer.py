"""tools.answer: batches and stops change no answer, a folder of RULER's makes one table."""
import dataclasses
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from texts import TEXT, sentencepiece_tokenizer

import data
from eval_niah import begin_of_text
from model import Llama
from tools import answer, chat
from tools.answer import prompt_tokens
from tools.questions import printable, read_questions

ON_CPU = ("--device", "cpu")


@pytest.fixture
def questions(tmp_path):
    """Twelve questions of three lengths; four begin alike."""
    path = tmp_path / "set.jsonl"
    rng = random.Random(2)
    starts = [TEXT[:300]] * 4
    for place in range(100, 900, 100):
        starts.append(TEXT[place:place + rng.choice([200, 300])])
    lines = []
    for i, start in enumerate(starts):
        question = {"input": f"{start} {i % 3}", "outputs": ["e", "th"], "task": f"task {i % 2}",
                    "length": 100 * (1 + i % 2), "max_new_tokens": 6 + i % 2,
                    "answer_prefix": " So:"}
        lines.append(json.dumps(question))
    path.write_text("\n".join(lines))
    return path


def answers_of(path):
    return {line["index"]: line for line in map(json.loads, path.read_text().splitlines()[1:])}


@pytest.mark.parametrize("chat", ["plain", "chat"])
def test_answers_are_what_each_prompt_alone_gives_whatever_the_batch(
        model_directory, questions, tmp_path, chat, capsys):
    """Rows mixed up in a batch, keys and values of another prompt, an answer cut by another row's
    stop."""
    for name, batch_tokens in (("one", 1), ("many", 10**6)):
        answer.main([str(model_directory), *ON_CPU, "--jsonl", str(questions), "--prompt", chat,
                     "--batch-tokens", str(batch_tokens), "--max-length", "1000",
                     "--out", str(tmp_path / name)])
    answers = answers_of(tmp_path / "one")
    assert answers == answers_of(tmp_path / "many")
    assert len(answers) == 12
    output = capsys.readouterr().out
    assert output.count("task 0") == 2
    assert "shared" in output

    model = Llama.from_pretrained(model_directory)
    tokenizer = data.load_tokenizer(model_directory)
    stops = tuple(data.stop_tokens(tokenizer, None))
    for index, question in enumerate(read_questions([questions])):
        prompt = prompt_tokens(tokenizer, question.text, " So:", chat == "chat")
        whole = model.generate(torch.tensor([prompt]), 6 + index % 2, stop_tokens=stops)
        ids = whole[0, len(prompt):].tolist()
        text = tokenizer.decode([token for token in ids if token not in stops])
        assert answers[index]["prediction"] == printable(text)
        assert answers[index]["prompt_tokens"] == len(prompt)
        parts = [part in printable(text).lower() for part in ("e", "th")]
        assert answers[index]["score"] == sum(parts) / 2


def test_a_stopped_run_of_questions_goes_on_and_never_mixes_settings(
        model_directory, questions, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    command = [str(model), *ON_CPU, "--jsonl", str(questions), "--out", str(out),
               "--max-length", "1000"]
    answer.main(command)

    def read_output():
        """The table, and all lines."""
        lines = capsys.readouterr().out.splitlines()
        [start] = [i for i, line in enumerate(lines) if line.startswith("task  ")]
        return lines[start:start + 4], lines

    whole = answers_of(out)
    table, _ = read_output()
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote the fifth answer
    answer.main(command)
    again, output = read_output()
    assert answers_of(out) == whole
    assert again == table
    assert f"{out} has 4 of 12 answers: the others follow" in output

    weights = next(model.glob("*.safetensors"))
    stamp = weights.stat().st_mtime_ns
    size = weights.stat().st_size
    weights.write_bytes(b"\0" * size)
    os.utime(weights, ns=(0, stamp))
    answer.main(command)  # nothing is left to do: the model is not even loaded
    assert read_output()[0] == table
    assert answers_of(out) == whole

    os.utime(weights, ns=(0, stamp + 1))
    with pytest.raises(SystemExit, match="was made with weights"):
        answer.main(command)
    os.utime(weights, ns=(0, stamp))
    others = [
        (["--max-new-tokens", "3"], "was made with max_new_tokens None, not 3"),
        (["--rope-kind", "linear", "--rope-factor", "2"], "was made with model"),
        (["--out", str(questions)], "holds no answers"),
    ]
    for more, message in others:
        with pytest.raises(SystemExit, match=message):
            answer.main([*command, *more])
    assert answers_of(out) == whole


def test_prompts_of_stated_length_are_read_as_they_were_made(model_directory, tmp_path, capsys):
    """RULER prompts counted in one template and read in another have another length than their
    label."""
    path = tmp_path / "made.jsonl"
    record = {"input": "x y", "outputs": ["z"], "max_new_tokens": 2, "template": "chat",
              "system": "Be brief."}
    path.write_text(json.dumps(record))
    tokenizer = data.load_tokenizer(model_directory)
    out = tmp_path / "a"
    answer.main([str(model_directory), *ON_CPU, "--jsonl", str(path), "--out", str(out)])
    prompt = prompt_tokens(tokenizer, "x y", chat=True, system="Be brief.")
    assert answers_of(out)[0]["read"] == len(prompt)
    for more in (["--prompt", "plain"], ["--prompt", "chat"],
                 ["--prompt", "chat", "--system", "Be long."], ["--system", "Be long."]):
        with pytest.raises(SystemExit, match="made for --prompt chat and --system 'Be brief.'"):
            answer.main([str(model_directory), *ON_CPU, "--jsonl", str(path), *more])


@pytest.mark.parametrize("prefix", [" So: it", "So: it"])
def test_an_answers_beginning_goes_on_after_its_prompt(tmp_path, prefix):
    """Llama 2's kind puts a space before each text: there is none that the record does not have."""
    sentencepiece_tokenizer("prepend", tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    text = "the cat"
    ids = prompt_tokens(tokenizer, text, prefix, chat=True)
    assert tokenizer.decode(ids).endswith(f"<|im_start|>assistant\n{prefix}")
    plain = prompt_tokens(tokenizer, text, prefix)
    assert plain == begin_of_text(tokenizer) + tokenizer.encode_ordinary(text + prefix)


def test_answers_end_where_the_model_says(model_directory, tmp_path, capsys):
    """At generation_config.json's eos_token_id, for files of prompts and raw ones too: here the
    sixth token that the model says."""
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    tokenizer = data.load_tokenizer(model)
    text = "Anna quickly went"

    def speak(prompt):
        """What it says in twelve tokens, and before it first says the sixth, which then stops
        it."""
        whole = Llama.from_pretrained(model).generate(torch.tensor([prompt]), 12)
        tokens = whole[0, len(prompt):].tolist()
        stated = {"eos_token_id": [3, tokens[5]]}
        (model / "generation_config.json").write_text(json.dumps(stated))
        return tokenizer.decode(tokens), tokenizer.decode(tokens[:tokens.index(tokens[5])])

    whole, until = speak(tokenizer.encode_ordinary(text))
    assert len(until) < len(whole)
    chat.main([str(model), *ON_CPU, "--prompt", text, "--max-new-tokens", "12", "--raw"])
    assert capsys.readouterr().out.endswith(f"\n{until}\n")

    whole, until = speak(prompt_tokens(tokenizer, text))
    assert len(until) < len(whole)
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": text, "answers": ["x"]}))
    answer.main([str(model), *ON_CPU, "--jsonl", str(tmp_path / "one.jsonl"), "--prompt", "plain",
                 "--out", str(tmp_path / "out")])
    assert answers_of(tmp_path / "out")[0]["prediction"] == printable(until)


def test_prompts_beyond_the_window_lose_their_middle(model_directory, questions, tmp_path, capsys):
    answer.main([str(model_directory), *ON_CPU, "--jsonl", str(questions), "--prompt", "plain",
                 "--max-length", "100", "--out", str(tmp_path / "a")])
    answers = answers_of(tmp_path / "a")
    assert {line["read"] for line in answers.values()} == {93, 94}
    assert min(line["prompt_tokens"] for line in answers.values()) > 150
    assert "note: 12 of 12 prompts do not fit into 100 tokens" in capsys.readouterr().out
    tokenizer = data.load_tokenizer(model_directory)
    model = Llama.from_pretrained(model_directory)
    question = read_questions([questions])[0]
    tokens = prompt_tokens(tokenizer, question.text, question.answer_prefix)
    ends = torch.tensor([tokens[:47] + tokens[-47:]])
    ids = model.generate(ends, 6)[0, 94:].tolist()
    assert answers[0]["prediction"] == printable(tokenizer.decode(ids))


def score_lines(*rows):
    """Lines of a file of answers from (task, length, score)."""
    answers = {}
    for index, (task, length, score) in enumerate(rows):
        answers[index] = {"task": task, "length": length, "score": score}
    return answers


def test_the_table_has_the_mean_of_tasks_and_rulers_effective_length():
    """At 8K the mean of the tasks is 90.0, though that of the prompts is 85.0."""
    table = answer.score_table(score_lines(
        ("vt", "16384", 1.0), ("vt", "16384", 0.75), ("vt", "4096", 1.0), ("vt", "8192", 1.0),
        ("qa_1", "4096", 0.75), ("qa_1", "8192", 0.6), ("qa_1", "8192", 1.0),
        ("qa_1", "16384", 0.8)))
    assert table == """\
task      4K      8K     16K  prompts
vt     100.0   100.0    87.5        4
qa_1    75.0    80.0    80.0        4
mean    87.5    90.0    83.8        8
effective length, by 2 of RULER's 13 tasks and its threshold of 85.6: 8K"""


@pytest.mark.parametrize("scores, effective", [
    ((0.9, 0.9, 0.9), "16K"),
    ((0.9, 0.8, 0.9), "4K"),  # all shorter ones count
    ((0.8, 0.9, 0.9), "none"),
    ((0.857, 0.856, 0.9), "4K"),  # to reach the threshold is not to exceed it
])
def test_the_effective_length_is_the_longest_that_no_failure_precedes(scores, effective):
    lengths = ("4096", "8192", "16384")
    rows = [("vt", length, score) for length, score in zip(lengths, scores, strict=True)]
    assert answer.score_table(score_lines(*rows)).endswith(f"threshold of 85.6: {effective}")


@pytest.mark.parametrize("rows", [
    [("vt", "4096", 1.0), ("book", "4096", 1.0)],
    [("vt", "4096", 1.0), ("vt", "short", 1.0)],
    [("book", "4096", 1.0)],
])
def test_only_rulers_tasks_alone_have_an_effective_length(rows):
    assert "effective" in answer.score_table(score_lines(("vt", "4096", 1.0)))
    assert "effective" not in answer.score_table(score_lines(*rows))


def test_a_length_that_not_all_tasks_have_is_neither_mean_nor_effective():
    """All tasks at 4K and one alone at 128K: no effective length of 128K."""
    rows = [("niah_single_1", "4096", 1.0), ("vt", "4096", 1.0), ("niah_single_1", "131072", 1.0)]
    table = answer.score_table(score_lines(*rows))
    assert table.endswith("by 2 of RULER's 13 tasks and its threshold of 85.6: 4K")
    mean = next(line for line in table.splitlines() if line.startswith("mean"))
    assert mean.split() == ["mean", "100.0", "-", "3"]


def test_other_sets_have_no_effective_length_and_longbench_v2_is_ordered():
    table = answer.score_table(score_lines(
        ("v2", "long", 0.0), ("v2", "short", 1.0), ("v2", "medium", 0.5), ("v2", "4096", 1.0)))
    assert table == """\
task      4K   short  medium    long  prompts
v2     100.0   100.0    50.0     0.0        4"""


@pytest.fixture
def ruler_folders(tmp_path):
    """Four prompts as NVIDIA's RULER leaves them: LENGTH/data/TASK/validation.jsonl."""
    place = tmp_path / "RULER"
    for length in (64, 128):
        for task in ("vt", "qa_1"):
            file = place / str(length) / "data" / task / "validation.jsonl"
            file.parent.mkdir(parents=True)
            record = {"index": 0, "input": TEXT[:length - 10], "outputs": ["e", "th"],
                      "length": length - 7, "length_w_model_temp": length - 7,
                      "answer_prefix": " So:"}
            file.write_text(json.dumps(record) + "\n")
    return place


def test_rulers_own_folders_make_one_table(model_directory, ruler_folders, capsys):
    command = [str(model_directory), *ON_CPU, "--max-length", "1000", "--out",
               str(ruler_folders / "answers.jsonl"), "--jsonl"]
    answer.main([*command, str(ruler_folders)])
    output = capsys.readouterr().out
    assert "task      64     128  prompts\n" in output
    for line in ("vt", "qa_1", "mean"):
        assert f"\n{line} " in output
    assert "effective length, by 2 of RULER's 13 tasks" in output
    answers = answers_of(ruler_folders / "answers.jsonl")
    assert {(line["task"], line["length"], line["metric"]) for line in answers.values()} == {
        ("vt", "64", "all"), ("vt", "128", "all"), ("qa_1", "64", "any"), ("qa_1", "128", "any")}

    files = sorted(map(str, ruler_folders.rglob("validation.jsonl")))
    # all is done, and the file of answers, inside the folder, is no file of prompts
    for same in (files, [str(ruler_folders)]):
        answer.main([*command, *same])
        assert "the others shared" not in capsys.readouterr().out
    for others in (files[::-1], files[:3], [*files[:3], files[0]], [files[0]]):
        with pytest.raises(SystemExit, match="was made with jsonl"):
            answer.main([*command, *others])
    assert answers_of(ruler_folders / "answers.jsonl") == answers


@pytest.mark.parametrize("more, message", [
    (["--ignore", "answer_prefix"], "was made with ignore None, not .'answer_prefix'."),
    (["--question", "Why?"], "was made with question None, not 'Why.'"),
])
def test_other_prompts_of_one_file_are_no_more_of_the_same(
        model_directory, questions, tmp_path, more, message):
    command = [str(model_directory), *ON_CPU, "--jsonl", str(questions), "--max-length", "1000",
               "--out", str(tmp_path / "a")]
    answer.main(command)
    with pytest.raises(SystemExit, match=message):
        answer.main([*command, *more])


@pytest.fixture
def first_run(model_directory, questions, tmp_path):
    """(a command that has run, its file of answers, and what each of its lines holds)."""
    out = tmp_path / "a"
    command = [str(model_directory), *ON_CPU, "--jsonl", str(questions), "--max-length", "1000",
               "--out", str(out)]
    answer.main(command)
    return command, out, list(map(json.loads, out.read_text().splitlines()))


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_answers_of_a_version_that_did_not_say_what_it_asked_are_refused(first_run):
    command, out, (first, *lines) = first_run
    del first["settings"]["questions"]
    write_lines(out, [first, *lines[:7]])
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=f"--out {out}: has answers to prompts or by rules that "
                                         "are not those of now, .*; choose another file$"):
        answer.main(command)
    assert out.read_bytes() == before


@pytest.mark.parametrize("changes", [
    {"text": "x"}, {"answer_prefix": " Say:"}, {"answers": ["e"]}, {"metric": "any"},
    {"max_new_tokens": 5}])
def test_a_file_that_is_read_otherwise_is_not_gone_on_with(first_run, monkeypatch, changes):
    """As another version may read it: of one question, one thing differs."""
    def read_otherwise(*arguments):
        first, *others = read_questions(*arguments)
        return [dataclasses.replace(first, **changes), *others]

    command, out, lines = first_run
    write_lines(out, lines[:5])
    before = out.read_bytes()
    monkeypatch.setattr(answer, "read_questions", read_otherwise)
    with pytest.raises(SystemExit, match=f"--out {out}: has answers to prompts or by rules"):
        answer.main(command)
    assert out.read_bytes() == before


def test_questions_in_another_order_are_others(questions):
    one, two, *others = read_questions([questions])
    assert answer.questions_stamp([one, two]) != answer.questions_stamp([two, one])
    assert answer.questions_stamp([one]) != answer.questions_stamp([one, one])


def test_answers_to_a_file_of_another_name_stand_in_its_row(model_directory, tmp_path, capsys):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    record = {"input": "x y", "outputs": ["z"], "max_new_tokens": 2}
    write_lines(one, [record, record])
    command = [str(model_directory), *ON_CPU, "--out", str(tmp_path / "a"), "--jsonl"]
    answer.main([*command, str(one)])
    lines = (tmp_path / "a").read_text().splitlines(keepends=True)
    (tmp_path / "a").write_text("".join(lines[:2]))
    one.rename(two)
    capsys.readouterr()
    answer.main([*command, str(two)])
    assert {line["task"] for line in answers_of(tmp_path / "a").values()} == {"two"}
    assert "\none " not in capsys.readouterr().out


@pytest.mark.parametrize("changes", [
    {"index": 12}, {"index": -1}, {"index": "0"}, {"index": [0]}, {"index": 0.0}, {"index": True},
    {"index": None}, {"score": None}, {"score": "1"}, {"read": None}, {"prompt_tokens": [7]}])
def test_lines_that_are_no_answers_are_refused_in_one_line(first_run, changes):
    command, out, (first, line, *_) = first_run
    write_lines(out, [first, line | changes])
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=f"--out {out}: exists and holds no answers of --jsonl; "
                                         "choose another file$"):
        answer.main(command)
    assert out.read_bytes() == before


def test_lines_without_a_key_are_refused_in_one_line(first_run):
    command, out, (first, line, *_) = first_run
    others = [[], "x", None, 5, {}]
    for key in line:
        others.append({name: value for name, value in line.items() if name != key})
    assert len(others) == 14
    for other in others:
        write_lines(out, [first, other])
        with pytest.raises(SystemExit, match="holds no answers of --jsonl; choose another file$"):
            answer.main(command)
    out.write_text(json.dumps(first) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(SystemExit, match="holds no answers of --jsonl; choose another file$"):
        answer.main(command)


@pytest.mark.parametrize("begin", [
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "[INST] ", "<s>[INST] ",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"])
def test_a_chat_template_never_goes_around_another(model_directory, tmp_path, capsys, begin):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input": f"{begin}Who?", "outputs": ["Ann"], "max_new_tokens": 2}))
    for more in ([], ["--prompt", "chat"], ["--system", "Be brief."]):
        with pytest.raises(SystemExit, match="in a chat template already .*: --prompt plain"):
            answer.main([str(model_directory), *ON_CPU, "--jsonl", str(path), *more])
    answer.main([str(model_directory), *ON_CPU, "--jsonl", str(path), "--prompt", "plain"])
    assert "note: prompts are in a chat template" in capsys.readouterr().out


def test_a_document_about_chat_templates_is_no_chat(model_directory, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    text = "Llama 2 writes [INST], ChatML <|im_start|>. Who?"
    path.write_text(json.dumps({"input": text, "outputs": ["Ann"], "max_new_tokens": 2}))
    answer.main([str(model_directory), *ON_CPU, "--jsonl", str(path), "--prompt", "chat"])
    assert "chat template" not in capsys.readouterr().out


def test_paths_without_prompts_are_named(model_directory, tmp_path):
    for path, message in ((tmp_path, "has no .jsonl or .parquet file"),
                          (tmp_path / "a.jsonl", "must be a file or directory that exists")):
        with pytest.raises(SystemExit, match=f"--jsonl {path}.* {message}"):
            answer.main([str(model_directory), *ON_CPU, "--jsonl", str(path)])


def test_a_folder_gives_its_prompts_and_neither_json_nor_the_file_of_answers(
        questions, tmp_path, monkeypatch, capsys):
    """However folder and file are spelled."""
    for name in ("answers.jsonl", "info.json", "other.txt"):
        (tmp_path / name).write_text(questions.read_text())
    link = tmp_path.parent / "link"
    link.symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    folders = (Path("."), tmp_path, link)
    for folder, other in itertools.product(folders, folders):
        files = answer.prompt_files([folder], other / "answers.jsonl")
        assert [file.name for file in files] == ["set.jsonl"]
        output = capsys.readouterr().out
        first = folder / "info.json"
        assert output == f"passed over, suffix not known: 1 .json, 1 .txt (the first: {first})\n"
    [file] = answer.prompt_files([tmp_path / "info.json"], None)  # as it is named
    assert file.name == "info.json"
    link.unlink()


def test_a_file_that_is_named_twice_is_read_once(questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for others in ([questions], [Path(questions.name)], [tmp_path], [Path("."), questions]):
        files = answer.prompt_files([questions, *others], None)
        assert [file.name for file in files] == ["set.jsonl"]
    second = tmp_path / "second.jsonl"
    shutil.copy(questions, second)
    assert answer.prompt_files([second, questions, second], None) == [second, questions]
