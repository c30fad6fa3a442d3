"""Files as public data sets really look, each through its tool: docs/recipes.md has the counts."""
import json
import re
from pathlib import Path

import pytest
from public_files import write_public_files
from texts import TRAINING_TEXT

from tools import chat_blend, prepare
from tools.train_tokenizer import train_bpe

RECIPES = Path(__file__).resolve().parent.parent.parent / "docs/recipes.md"
CHATS = ("sharegpt.json", "ultrachat.jsonl", "openai.jsonl", "alpaca.json", "metamath.jsonl",
         "codefeedback.jsonl")
TEXTS = ("slimpajama", "fineweb", "c4", "mixed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files and a tokenizer."""
    folder = tmp_path_factory.mktemp("public")
    write_public_files(folder)
    train_bpe([TRAINING_TEXT], 300, folder / "tokenizer")
    return folder


def documented():
    """{file: (used, left out)} of the table in docs/recipes.md."""
    rows = re.findall(r"^\| `(\S+)` \|[^|]*\| ([^|]+) \| ([^|]+) \|$", RECIPES.read_text(), re.M)
    return {name: (used, left_out) for name, used, left_out in rows}


def test_the_table_has_all_ten():
    assert list(documented()) == [*CHATS, *TEXTS]


@pytest.mark.parametrize("name", CHATS)
def test_chat_records_come_out_as_documented(place, tmp_path, name):
    chat_blend.main(["--source", f"x={place / name}", "--tokenizer", str(place / "tokenizer"),
                     "--near-duplicate", "0", "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out/report.json").read_text())
    [counts] = report["files"].values()
    left_out = [f"{count} {reason}" for reason, count in counts["dropped"].items()]
    found = (f"{counts['kept']} of {counts['read']} records", ", ".join(left_out) or "nothing")
    assert documented()[name] == found


@pytest.mark.parametrize("name", TEXTS)
def test_texts_come_out_as_documented(place, tmp_path, capsys, name):
    prepare.main(["--source", f"x={place / name}", "--tokenizer", str(place / "tokenizer"),
                  "--out", str(tmp_path / "out"), "--processes", "1"])
    used, *others = capsys.readouterr().out.partition("\ntrain:")[0].splitlines()
    left_out = []
    for line in others:
        pattern = r"  passed over, ([^:(]+?)(?: \(.*\))?: (.+) \(the first: .*\)"
        reason, kinds = re.fullmatch(pattern, line).groups()
        left_out.append(f"{reason}: {kinds}")
    assert documented()[name] == (used.removeprefix("x: "), "; ".join(left_out))
