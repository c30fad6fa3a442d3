"""Stage 2: supervised fine-tuning on short chat samples. The loop is stage 1's.

    python sft.py --model out/stage1/final --data chat.jsonl --steps 780 --out out/stage2

A line of it is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}; an
assistant's message with "weight": 0 carries no loss. Other records: tools.chat_blend reads them.
Loss is on the assistant's words and its end-of-turn token only. Samples stay short (< 8K tokens):
the long window was learned in stage 1, and short samples keep it (arXiv 2504.06214, section 3.2).
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import Blend, Tokenizer, read_records, shuffled
from parallel import Grid, one_line_errors, print_once
from train import (
    Parser,
    argument_parser,
    existing,
    load_start,
    positive,
    run_directory,
    run_stage,
    weighted_path,
)

# ------------------------------------------------------------------------------------ conversations

CHAT_TOKENS = {  # special tokens of a template; the last ends a message
    # first: Llama 3's tokenizer has its own tokens still where ChatML was added (SmolLM3, Hermes 3)
    "chatml": ("<|im_start|>", "<|im_end|>"),
    # all: DeepSeek-R1-Distill-Llama, say, has other tokens that begin a text, and another template
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The template, a name in CHAT_TOKENS, for which a tokenizer has all tokens; None without."""
    special = tokenizer.special_tokens_set  # made anew each time
    for name, tokens in CHAT_TOKENS.items():
        if special.issuperset(tokens):
            return name
    return None


def end_of_turn(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a message: <|eot_id|> (Llama 3) or <|im_end|> (ChatML)."""
    template = chat_template(tokenizer)
    if template is None:
        needed = "; or ".join(", ".join(tokens) for tokens in CHAT_TOKENS.values())
        raise ValueError(f"tokenizer {tokenizer.name!r} has no chat template known here, which "
                         f"needs the special tokens {needed}")
    return tokenizer.encode_single_token(CHAT_TOKENS[template][-1])


def carries_loss(message: dict) -> bool:
    """Whether this is an answer to learn: the assistant's, not empty (which would teach to end a
    turn at once), and not of weight 0, by which OpenAI's format marks an answer to pass over."""
    is_answer = message["role"] == "assistant" and message["content"].strip() != ""
    return is_answer and message.get("weight") != 0


def unread(record: dict) -> str | None:
    """Names a key of a record that means something and is not read here; None without one."""
    for key in ("tools", "functions", "images", "videos", "audios", "system", "system_prompt",
                "input", "context", "passage", "history"):
        if record.get(key):
            return f"has {key!r}, which is not read here"
    return None


def fault_in(record: dict) -> str | None:
    """Why a record is no conversation to train on, or None: its messages are a list of {role,
    content} with strings, an assistant's perhaps with a weight of 0 or 1, and an answer to learn
    is among them."""
    other = unread(record)
    if other:
        return other
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "messages must be a list of objects with role and content"
    for message in messages:
        role = message.get("role")
        weight = message.get("weight")
        for key, value in message.items():
            if key not in ("role", "content", "weight") and value not in (None, "", [], {}):
                return f"a message has {key!r}, which is not understood"
        if role not in ("system", "user", "assistant"):
            return f"a message has role {role!r}, not system, user or assistant"
        if not isinstance(message.get("content"), str):
            return "a message must have a content that is a string"
        if weight not in (None, 0, 1) or (weight and role != "assistant"):
            return f"a message of role {role} has weight {weight!r}; an assistant's may be 0 or 1"
    if not any(map(carries_loss, messages)):
        return "messages have no assistant content to learn, so nothing to train on"
    return None


def encode_chat(messages: list[dict], tokenizer: Tokenizer,
                add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    r"""Tokens of a conversation, and which carry loss: the assistant's words and its end of turn.

    The user says "Hi", the assistant "Hello."; spaces divide tokens, and ^ is loss:

        Llama 3   <|begin_of_text|>
                  <|start_header_id|> user <|end_header_id|> \n\n Hi <|eot_id|>
                  <|start_header_id|> assistant <|end_header_id|> \n\n Hello . <|eot_id|>
                                                                       ^^^^^ ^ ^^^^^^^^^^
        ChatML    <|im_start|> user \n Hi <|im_end|> \n
                  <|im_start|> assistant \n Hello . <|im_end|> \n
                                            ^^^^^ ^ ^^^^^^^^^^

    So the model learns to answer and to stop, not to speak for the user. `add_generation_prompt`
    opens an answer: the last line of each, up to its first ^. Which template it is, the tokenizer's
    special tokens say. No system message is added (Hugging Face's templates of Llama 3.1, SmolLM2
    and Qwen2 add one). Contents are plain text: a special token spelled there stays text.
    """
    end_of_turn(tokenizer)  # raises if there is no template
    template = llama3_pieces if chat_template(tokenizer) == "llama3" else chatml_pieces
    tokens = []
    mask = []
    for ids, loss in template(messages, tokenizer, add_generation_prompt):
        tokens += ids
        mask += [loss] * len(ids)
    return tokens, mask


def encode_question(text: str, tokenizer: Tokenizer,
                    system: str | None = None) -> list[int]:
    """Tokens of a user's message, after a system message if given, up to the assistant's answer."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    tokens, _ = encode_chat(messages, tokenizer, add_generation_prompt=True)
    return tokens


def llama3_pieces(messages: list[dict], tokenizer: Tokenizer,
                  add_generation_prompt: bool) -> Iterator[tuple[list[int], bool]]:
    """(tokens, loss) of each piece of Llama 3's template (llama-models, chat_format.py)."""
    text = tokenizer.encode_continued
    special = tokenizer.encode_single_token

    def header(role: str) -> list[int]:
        start = special("<|start_header_id|>")
        end = special("<|end_header_id|>")
        return [start, *text(role), end, *text("\n\n")]

    yield [special("<|begin_of_text|>")], False  # nothing comes before it to predict it from
    for message in messages:
        yield header(message["role"]), False  # whose turn it is, is not the model's to say
        content = text(message["content"].strip())  # as Hugging Face's templates do
        yield [*content, special("<|eot_id|>")], carries_loss(message)
    if add_generation_prompt:
        yield header("assistant"), False


def chatml_pieces(messages: list[dict], tokenizer: Tokenizer,
                  add_generation_prompt: bool) -> Iterator[tuple[list[int], bool]]:
    """(tokens, loss) of each piece of ChatML, as SmolLM2 and Qwen2 have it."""
    text = tokenizer.encode_continued
    special = tokenizer.encode_single_token
    line_break = text("\n")  # one token
    for message in messages:
        yield [special("<|im_start|>"), *text(message["role"])], False
        # The line break and the content are one text: white space at the content's beginning may
        # share a token with the line break. That token then counts as the content's.
        content = text("\n" + message["content"])
        if content[:1] == line_break:  # not shared: the line break is the template's
            yield line_break, False
            content = content[1:]
        yield [*content, special("<|im_end|>")], carries_loss(message)
        yield line_break, False  # after the end of turn: nobody generates it
    if add_generation_prompt:
        yield [special("<|im_start|>"), *text("assistant"), *line_break], False


def read_conversations(path: Path) -> Iterator[list[dict]]:
    """The messages on each line of a .jsonl or .jsonl.gz file."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: needs a .jsonl or .jsonl.gz file with messages on every line; "
                         "tools.chat_blend makes one")
    for place, record in read_records(path):
        fault = "needs an object with messages on every line"
        if isinstance(record, dict) and record.get("messages") is not None:
            fault = fault_in(record)
        if fault:
            raise ValueError(f"{place}: {fault}; tools.chat_blend makes such a file of ShareGPT, "
                             "Alpaca and other records, without those that cannot be used")
        yield record["messages"]


class ChatDataset:
    """Chat samples in rows, right-padded without loss, shuffled each epoch by (seed, epoch).

    With `pack` a row has as many samples as fit in their order, each under an id of its own, by
    which attention keeps them apart. Samples a, b, c, d of 3, 4, 2 and 5 tokens, S = 8:

        row 0   tokens   a a a b b b b . .     b leaves room for 1, so c begins a new row;
                ids      0 0 0 1 1 1 1 1 1     padding (.) belongs to the last sample
        row 1   tokens   c c d d d d d . .
                ids      2 2 3 3 3 3 3 3 3

    Without `pack` each sample has a row. Samples longer than `sequence_length` are dropped, never
    cut: `dropped` counts them, `samples` has the others.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, sequence_length: int, seed: int,
                 pack: bool = False) -> None:
        self.samples = []  # (tokens, loss mask) of each that fits
        self.dropped = 0
        for messages in read_conversations(path):
            tokens, mask = encode_chat(messages, tokenizer)
            if len(tokens) <= sequence_length:
                sample = np.array(tokens, dtype=np.uint32), np.array(mask, dtype=bool)
                self.samples.append(sample)
            else:
                self.dropped += 1
        if not self.samples:
            raise ValueError(f"{path}: holds no sample of {sequence_length} tokens or fewer, "
                             f"{self.dropped} longer ones")
        self.lengths = np.array([len(tokens) for tokens, _ in self.samples])
        self.sequence_length = sequence_length
        self.seed = seed
        self.padding = end_of_turn(tokenizer)  # any token will do: it carries no loss
        self.document_mask = pack
        # what is planned: epochs, their samples one after the other (n,), where in these rows begin
        self.epochs = 0
        self.order = np.zeros(0, dtype=np.int64)
        self.starts = []

    def plan_epoch(self) -> None:
        """Put the samples of the next epoch into rows."""
        order = shuffled(len(self.samples), self.seed, self.epochs)
        room = 0  # in the row that is being filled; 0: the first sample begins a row
        for place, sample in enumerate(order, len(self.order)):
            length = self.lengths[sample]
            if length > room or not self.document_mask:  # begin a row
                self.starts.append(place)
                room = self.sequence_length
            room -= length
        self.order = np.append(self.order, order)
        self.epochs += 1

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As PackedDataset's; a document id is a sample's place in `order`."""
        # 1. Which samples are in the row: it ends where the next begins.
        while index + 1 >= len(self.starts):
            self.plan_epoch()
        first, end = self.starts[index:index + 2]
        # 2. A row of padding, which belongs to the last sample.
        size = self.sequence_length + 1
        tokens = np.full(size, self.padding, dtype=np.int64)
        mask = np.zeros(size, dtype=bool)
        ids = np.full(size, end - 1, dtype=np.int64)
        # 3. The samples, from the left.
        filled = 0
        for place in range(first, end):
            own_tokens, own_mask = self.samples[self.order[place]]
            part = slice(filled, filled + len(own_tokens))
            tokens[part] = own_tokens
            mask[part] = own_mask
            ids[part] = place
            filled = part.stop
        return tokens, mask, ids


# ------------------------------------------------------------------------------------- command line


def stage2_parser() -> Parser:
    """Stage 2's options, with the paper's batch of 128 and learning rate of 5e-6 as defaults."""
    parser = argument_parser("Supervised fine-tuning on short chat samples (stage 2).")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", action="extend", type=weighted_path, required=True,
        metavar="FILE[=WEIGHT]", help="JSON lines with messages; files are mixed by weight")
    add("--sequence-length", type=positive, default=8192,
        help="longer samples are dropped and counted")
    add("--pack", dest="document_mask", action="store_true",
        help="as many samples a row as fit, which do not see each other; --batch-size counts rows")
    add("--validation-data", type=existing,
        help="held-out chat samples; without them there is no validation")
    parser.set_defaults(batch_size=128, micro_batch_size=1, learning_rate=5e-6)
    return parser


def stage2_datasets(sources: list[tuple[Path, float]], held_out: Path | None, tokenizer: Tokenizer,
                    sequence_length: int, seed: int, pack: bool):
    """(training, validation): a blend of (file, weight) sources; `held_out`, None without it."""
    def read(path: Path) -> ChatDataset:
        dataset = ChatDataset(path, tokenizer, sequence_length, seed, pack)
        print_once(f"{path}: {len(dataset.samples)} samples, {dataset.dropped} dropped as longer "
                   f"than {sequence_length} tokens")
        return dataset
    parts = [read(path) for path, _ in sources]
    training = Blend(parts, [weight for _, weight in sources], seed)
    validation = read(held_out) if held_out else None
    return training, validation


def main(argv: list[str] | None = None) -> None:
    """Stage 2."""
    with one_line_errors():
        a = stage2_parser().parse_args(argv)
        if a.validate_every and not a.validation_data:
            raise ValueError("--validate-every needs --validation-data, held-out chat samples")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        with run_directory(a.out, a.resume, grid) as checkpoint:
            # the window stays as it is; samples have any length: no chunk
            config, tokenizer, files = load_start(a, grid, {}, None, checkpoint)
            held_out = a.validation_data if a.validation_sequences else None
            training, validation = stage2_datasets(a.data, held_out, tokenizer, a.sequence_length,
                                                   a.seed, a.document_mask)
            run_stage(a, grid, config, tokenizer, files, checkpoint, training, validation)
            grid.close()


if __name__ == "__main__":
    main()
