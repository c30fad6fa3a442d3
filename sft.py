"""Stage 2: supervised fine-tuning on short chat samples. The loop is stage 1's; data and defaults differ.

    python sft.py --model out/stage1/final --data chat.jsonl --sequence-length 8192 --steps 780 --out out/stage2

Each line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
Loss is on the assistant's words and its end-of-turn token only. Samples stay short (< 8K tokens): the long window
was learned in stage 1, and short samples keep it (arXiv 2504.06214, section 3.2).
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from data import Blend, Tokenizer, read_records, shuffled
from parallel import Grid, one_line_errors, print_once
from train import Parser, argument_parser, existing, load_start, positive, run_stage, weighted_path

# ------------------------------------------------------------------------------------- conversations

CHAT_TOKENS = (  # that begin and end a message
    ("<|start_header_id|>", "<|eot_id|>"),  # Llama 3
    ("<|im_start|>", "<|im_end|>"))  # ChatML


def end_of_turn(tokenizer: tiktoken.Encoding) -> int:
    """Id of the token that ends a message: <|eot_id|> (Llama 3) or <|im_end|> (ChatML). ValueError."""
    for start, end in CHAT_TOKENS:
        if {start, end} <= tokenizer.special_tokens_set:
            return tokenizer.encode_single_token(end)
    raise ValueError(f"tokenizer {tokenizer.name!r} has no chat tokens: Llama 3's <|start_header_id|> and "
                     "<|eot_id|>, or ChatML's <|im_start|> and <|im_end|>")


def check_messages(messages: object, place: str) -> None:
    """Raise ValueError, which starts with `place`, unless these are messages with an assistant's words to train on."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{place}: messages must be a list of objects with role and content")
    for i, message in enumerate(messages):
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{place}: message {i} has role {message.get('role')!r}; use system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{place}: message {i} must have a content that is a string")
    if not any(message["content"] for message in messages if message["role"] == "assistant"):
        raise ValueError(f"{place}: messages have no assistant content, so nothing to train on")


def encode_chat(messages: list[dict], tokenizer: tiktoken.Encoding,
                add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation and which carry loss: the assistant's words and its end-of-turn
    token, no others.

    By the tokenizer's special tokens it is Llama 3's template or ChatML. No system message is added
    (Hugging Face's templates of Llama 3.1, SmolLM2 and Qwen2 add one). Contents are plain text: a
    special token spelled there stays text. `add_generation_prompt` opens the assistant's answer.
    The messages are as check_messages wants them. Raises ValueError: see end_of_turn.
    """
    end_of_turn(tokenizer)  # raises if there is no template
    is_llama3 = "<|start_header_id|>" in tokenizer.special_tokens_set
    template = llama3_pieces if is_llama3 else chatml_pieces
    tokens, mask = [], []
    for ids, loss in template(messages, tokenizer, add_generation_prompt):
        tokens += ids
        mask += [loss] * len(ids)
    return tokens, mask


def encode_question(text: str, tokenizer: tiktoken.Encoding, system: str | None = None) -> list[int]:
    """Tokens of a user's message, after a system message if there is one, up to where the assistant's answer begins."""
    instructions = [] if system is None else [{"role": "system", "content": system}]
    messages = [*instructions, {"role": "user", "content": text}]
    return encode_chat(messages, tokenizer, add_generation_prompt=True)[0]


def llama3_pieces(messages: list[dict], tokenizer: tiktoken.Encoding,
                  add_generation_prompt: bool) -> Iterator[tuple[list[int], bool]]:
    """Llama 3's template (llama-models, chat_format.py); contents are stripped, as Hugging Face's
    templates do.

        <|begin_of_text|>
        <|start_header_id|>ROLE<|end_header_id|>

        CONTENT<|eot_id|>            (as often as there are messages, without line breaks between)
    """
    text, special = tokenizer.encode_ordinary, tokenizer.encode_single_token

    def header(role: str) -> list[int]:
        return [special("<|start_header_id|>"), *text(role), special("<|end_header_id|>"), *text("\n\n")]

    yield [special("<|begin_of_text|>")], False
    for message in messages:
        yield header(message["role"]), False
        content = text(message["content"].strip())
        yield [*content, special("<|eot_id|>")], message["role"] == "assistant"
    if add_generation_prompt:
        yield header("assistant"), False


def chatml_pieces(messages: list[dict], tokenizer: tiktoken.Encoding,
                  add_generation_prompt: bool) -> Iterator[tuple[list[int], bool]]:
    """ChatML, as SmolLM2 and Qwen2 have it; contents are kept as they are.

        <|im_start|>ROLE
        CONTENT<|im_end|>
        (and so on)
    """
    text, special = tokenizer.encode_ordinary, tokenizer.encode_single_token
    line_break = text("\n")  # one token
    for message in messages:
        yield [special("<|im_start|>"), *text(message["role"])], False
        # one text: where a content begins with white space, one token may hold that and the line
        # break before it
        content = text("\n" + message["content"])
        if content[:1] == line_break:  # else that token is the content's
            yield line_break, False
            content = content[1:]
        yield [*content, special("<|im_end|>")], message["role"] == "assistant"
        yield line_break, False
    if add_generation_prompt:
        yield [special("<|im_start|>"), *text("assistant"), *line_break], False


def read_conversations(path: Path) -> Iterator[list[dict]]:
    """The messages on each line of a .jsonl or .jsonl.gz file. Raises ValueError that names the line."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: needs a .jsonl or .jsonl.gz file with messages on every line; tools.chat_blend makes one")
    for place, record in read_records(path):
        if not isinstance(record, dict) or "messages" not in record:
            raise ValueError(f"{place}: has no messages; needs an object with messages on every line")
        check_messages(record["messages"], place)
        yield record["messages"]


class ChatDataset:
    """Chat samples in rows, right-padded without loss, shuffled each epoch by (seed, epoch).

    A row has one sample, or with `pack` as many as fit in their order, each under an id of its own
    for the cross-document mask. Samples longer than `sequence_length` are dropped, never cut:
    `dropped` counts them, `rows` has the others.
    """

    def __init__(self, path: Path, tokenizer: tiktoken.Encoding, sequence_length: int, seed: int, pack: bool = False) -> None:
        """path: see read_conversations. Raises ValueError."""
        self.rows = []  # (tokens, loss mask) of each sample that fits
        self.dropped = 0
        for messages in read_conversations(path):
            tokens, mask = encode_chat(messages, tokenizer)
            if len(tokens) <= sequence_length:
                self.rows.append((np.array(tokens, dtype=np.uint32), np.array(mask, dtype=bool)))
            else:
                self.dropped += 1
        if not self.rows:
            raise ValueError(f"{path}: holds no sample of {sequence_length} tokens or fewer, {self.dropped} longer ones")
        self.lengths = np.array([len(tokens) for tokens, _ in self.rows])
        self.sequence_length = sequence_length
        self.seed = seed
        self.padding = end_of_turn(tokenizer)
        self.document_mask = pack
        self.epochs = 0  # how many are planned so far,
        self.order = np.zeros(0, dtype=np.int64)  # (n,): the samples of these, one after the other,
        self.starts = []  # and at which of them each row begins

    def plan_epoch(self) -> None:
        """Put the samples of the next epoch into rows."""
        order = shuffled(len(self.rows), self.seed, self.epochs)
        room = 0  # of the row that is being filled
        for place, sample in enumerate(order, len(self.order)):
            length = self.lengths[sample]
            if length > room or not self.document_mask:
                self.starts.append(place)
                room = self.sequence_length
            room -= length
        self.order = np.append(self.order, order)
        self.epochs += 1

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64, loss mask bool, document ids int64 (a number for each sample of the
        stream), each (S + 1,)."""
        while index + 1 >= len(self.starts):  # a row ends where the next begins
            self.plan_epoch()
        first, end = self.starts[index:index + 2]
        size = self.sequence_length + 1
        tokens = np.full(size, self.padding, dtype=np.int64)
        mask = np.zeros(size, dtype=bool)
        ids = np.full(size, end - 1, dtype=np.int64)  # padding belongs to the last sample
        filled = 0
        for number in range(first, end):
            own_tokens, own_mask = self.rows[self.order[number]]
            part = slice(filled, filled + len(own_tokens))
            tokens[part] = own_tokens
            mask[part] = own_mask
            ids[part] = number
            filled = part.stop
        return tokens, mask, ids


# --------------------------------------------------------------------------------------- command line


def stage2_parser() -> Parser:
    """Stage 2's options, with the paper's batch of 128 and learning rate of 5e-6 as defaults."""
    parser = argument_parser("Supervised fine-tuning on short chat samples (stage 2).")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", action="extend", type=weighted_path, required=True, metavar="FILE[=WEIGHT]",
        help="JSON lines with messages; each sample comes from one file, by weight")
    add("--sequence-length", type=positive, default=8192, help="longer samples are dropped and counted")
    add("--pack", dest="document_mask", action="store_true",
        help="as many samples a row as fit, which do not see each other; --batch-size counts rows")
    add("--validation-data", type=existing, help="held-out chat samples; without them there is no validation")
    parser.set_defaults(batch_size=128, micro_batch_size=1, learning_rate=5e-6)
    return parser


def stage2_datasets(sources: list[tuple[Path, float]], held_out: Path | None, tokenizer: Tokenizer, sequence_length: int,
                    seed: int, pack: bool):
    """(training, validation) datasets of chat samples: a blend of (file, weight) sources, and `held_out`, None without it."""
    def samples(path: Path) -> ChatDataset:
        dataset = ChatDataset(path, tokenizer, sequence_length, seed, pack)
        print_once(f"{path}: {len(dataset.rows)} samples, {dataset.dropped} dropped as longer than {sequence_length} tokens")
        return dataset

    parts = [samples(path) for path, _ in sources]
    training = Blend(parts, [weight for _, weight in sources], seed)
    return training, samples(held_out) if held_out else None


def main(argv: list[str] | None = None) -> None:
    """Stage 2."""
    with one_line_errors():
        a = stage2_parser().parse_args(argv)
        if a.validate_every and not a.validation_data:
            raise ValueError("--validate-every needs --validation-data, held-out chat samples")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = load_start(a, grid, None)
        held_out = a.validation_data if a.validation_sequences else None
        training, validation = stage2_datasets(a.data, held_out, tokenizer, a.sequence_length, a.seed, a.document_mask)
        run_stage(a, grid, config, tokenizer, training, validation)
        grid.close()


if __name__ == "__main__":
    main()
