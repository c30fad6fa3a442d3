"""Ten small sources as public data sets really look: fields, layouts, odd records.

    python tests/public_files.py OUT_DIR      # needs zstandard and pyarrow

Made of random words; nothing is copied from a data set.
"""
import argparse
import gzip
import json
import random
from pathlib import Path

WORDS = """the of and model context long window train data text river road night tree answer
question value list word old new small""".split()


def prose(rng, words):
    return " ".join(rng.choices(WORDS, k=words)) + "."


def pairs(rng, count, first, second, **more):
    """Records with two texts, the first of them numbered."""
    return [{first: f"{i} {prose(rng, 12)}", second: prose(rng, 20)} | more for i in range(count)]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(who, value, **more):
    return {"from": who, "value": value, **more}


def sharegpt(rng):
    """vicuna's clean files: mostly human and gpt, but not only."""
    records = []
    for i in range(30):
        turns = [said("human", f"{i} {prose(rng, 12)}"), said("gpt", prose(rng, 30))]
        records.append({"id": f"id{i}_0", "conversations": turns})

    def text():
        return prose(rng, 9)

    odd = {
        "system": [said("system", "Be good."), said("human", text()), said("gpt", text())],
        "functions": [said("human", text()), said("function_call", "{}"),
                      said("observation", "5"), said("gpt", text())],
        "null": [said("human", text()), said("gpt", None)],
        "none": None,
        "bing": [said("user", text()), said("bing", text())],
        "capital": [said("Human", text()), said("GPT", text())],
        "second system": [said("human", text()), said("gpt", text()), said("system", "In French."),
                          said("human", text()), said("gpt", text())],
        "empty": [],
    }
    return records + [{"id": name, "conversations": turns} for name, turns in odd.items()]


def ultrachat(rng):
    records = []
    for i in range(30):
        turns = [turn("user", f"{i} {prose(rng, 12)}"), turn("assistant", prose(rng, 40)),
                 turn("user", prose(rng, 6)), turn("assistant", prose(rng, 20))]
        records.append({"prompt": turns[0]["content"], "prompt_id": f"h{i}", "messages": turns})
    return records


def openai(rng):
    """Fine-tuning files: parts, tools, weights."""
    records = []
    for i in range(10):
        turns = [turn("system", "S"), turn("user", f"{i} {prose(rng, 9)}"),
                 turn("assistant", prose(rng, 14))]
        records.append({"messages": turns})

    def user():
        return turn("user", prose(rng, 9))

    parts = [{"type": "text", "text": prose(rng, 9)}, {"type": "text", "text": "second"}]
    call = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    odd = [
        {"messages": [turn("user", parts), turn("assistant", parts[:1])]},
        {"messages": [turn("developer", "rule"), user(), turn("assistant", prose(rng, 12))]},
        {"messages": [user(), turn("assistant", None, tool_calls=call),
                      turn("tool", "42", tool_call_id="c1"), turn("assistant", "42")], "tools": []},
        {"messages": [user(), turn("assistant", "wrong", weight=0), user(),
                      turn("assistant", "right", weight=1)]},
        {"messages": [user(), turn("assistant", ""), user(), turn("assistant", "yes")]},
    ]
    return records + odd


def alpaca(rng):
    """As LLaMA-Factory extends it, with system and history."""
    records = pairs(rng, 20, "instruction", "output", input="")
    for record in records[::2]:
        record["input"] = prose(rng, 5)
    odd = [{"input": None}, {"input": "<noinput>"}, {"input": "", "output": 42},
           {"input": "", "text": "Below is an instruction"}, {"system": "You are terse."},
           {"history": [["before", "after"]]}, {"tools": [{"name": "search"}]}]
    for i, more in enumerate(odd):
        record = {"instruction": f"odd {i} {prose(rng, 8)}", "output": prose(rng, 9)}
        records.append(record | more)
    return records


def documents(rng):
    """Of web text: one has no text."""
    names = ["RedPajamaC4", "RedPajamaArXiv", "RedPajamaBook", "RedPajamaGithub"]
    records = []
    for i in range(40):
        text = f"{i} {prose(rng, 200)}" if i != 7 else None
        records.append({"text": text, "meta": {"redpajama_set_name": names[i % 4]}})
    return records


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_public_files(folder):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    def put(name, content):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    rng = random.Random(1)
    put("sharegpt.json", json.dumps(sharegpt(rng), indent=1).encode())
    put("ultrachat.jsonl", lines(ultrachat(rng)))
    put("openai.jsonl", lines(openai(rng)))
    put("alpaca.json", json.dumps(alpaca(rng)).encode())
    metamath = pairs(rng, 20, "query", "response", type="GSM_Rephrased", original_question="o")
    put("metamath.jsonl", lines(metamath))
    feedback = pairs(rng, 20, "query", "answer", resource="evolinstruct", lang="python")
    put("codefeedback.jsonl", lines(feedback))
    web = documents(rng)
    put("slimpajama/train/chunk1/example_train_0.jsonl.zst", zstandard.compress(lines(web)))
    rows = [{"text": record["text"], "id": f"u{i}", "dump": "CC-MAIN-2024-10"}
            for i, record in enumerate(web)]
    path = put("fineweb/data/CC-MAIN-2024-10/000_00000.parquet", b"")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    rows = [{"text": record["text"], "timestamp": "2019", "url": "u"} for record in web]
    put("c4/en/c4-train.00000-of-01024.json.gz", gzip.compress(lines(rows)))

    put("mixed/notes.TXT", prose(rng, 50).encode())
    put("mixed/book.md", b"\xef\xbb\xbf# Title\n" + prose(rng, 50).encode())
    put("mixed/sample.ndjson", lines([{"raw_content": prose(rng, 50)}, {"url": "no text"}]))
    put("mixed/latin.txt", "Übung".encode("latin-1"))
    put("mixed/utf16.txt", "text".encode("utf-16"))
    put("mixed/paper.pdf", b"%PDF-1.4 \xff")
    put("mixed/README", b"without a suffix")
    put("mixed/notebook.ipynb", b"{}")
    put("mixed/package.json", b'{"name": "x"}')
    put("mixed/.git/config", b"hidden")
    put("mixed/.hidden.txt", b"hidden")
    put("elsewhere/linked.txt", prose(rng, 50).encode())
    Path(folder, "mixed/linked").symlink_to("../elsewhere")
    Path(folder, "mixed/linked.txt").symlink_to("../elsewhere/linked.txt")
    Path(folder, "mixed/broken.txt").symlink_to("nowhere.txt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_public_files(parser.parse_args().folder)
