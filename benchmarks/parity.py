"""Ours against transformers and tokenizers: tokens, logits, greedy text, save and load.

    python -m benchmarks.parity MODEL_DIR     # of a real checkpoint with a tokenizer.json
    python -m benchmarks.parity               # of random models, one of each family

Logits are compared in float32 on 512 tokens of the standard library, or random ones. transformers
forms its rotary angles in float32; to show that this is what remains of the difference, both models
are run in float64, with our angles and with its own. Exits 1 if a check fails.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import data
import model as model_module
from benchmarks.common import library_tokens
from model import ARCHITECTURES, Llama
from tools.records import Documents, source_path

SCRIPTS = ("Hello world, don't stop: 123 4  5 | Привет, мир | 你好，世界 | こんにちは世界 | "
           "안녕하세요 세계 | مرحبا بالعالم ١٢٣ | שלום עולם | नमस्ते दुनिया ४५ | สวัสดีชาวโลก | "
           "Γειά σου Κόσμε | გამარჯობა მსოფლიო | 👩‍👩‍👧‍👦🎉🇫🇷 ½ ² Ⅳ \t\n\n  x  7\n 8 "
           "<s> </s>\r\n\r\n  end ")


def float64_logits(path: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits in float64 arithmetic: ours, ours with transformers' rotary angles, transformers'."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    ours = Llama.from_pretrained(path, dtype=torch.float64)
    rotary = theirs.model.rotary_emb

    def their_tables(positions, inv_freq, attention_factor):
        # float32, as are its inverse frequencies
        angles = torch.outer(positions.float(), rotary.inv_freq.float())
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def norm_without_float32(norm, x):
        return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight,
                                            norm.variance_epsilon)

    with mock.patch.object(type(theirs.model.norm), "forward", norm_without_float32):
        expected = theirs(tokens).logits
    found = ours(tokens)
    with mock.patch.object(model_module, "rotary_tables", their_tables):
        return found, ours(tokens), expected


def tokenization(path: Path) -> tuple[bool, str]:
    """Equal ids on 100 standard-library files and on eleven scripts with emoji."""
    from tokenizers import Tokenizer

    ours = data.load_tokenizer(path)
    theirs = Tokenizer.from_file(str(path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    texts = [document["text"] for _, document in Documents(source_path("stdlib"))]
    texts = texts[::max(1, len(texts) // 100)][:100] + [SCRIPTS]
    theirs.encode_special_tokens = True  # where a text spells them they stay text, as with ours
    equal = 0
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        equal += ours.encode_ordinary(text) == expected
    return equal == len(texts), f"{equal} of {len(texts)} texts equal"


def random_model(family: str, path: Path) -> torch.Tensor:
    """Write a random model of a family, by transformers, and return tokens for it (1, 512)."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        initializer_range=0.05, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # which are 1 and 0 at first
            torch.nn.init.normal_(parameter, float(name.endswith("norm.weight")), 0.3)
    model.save_pretrained(path)
    return torch.randint(1000, (1, 512))


def model_checks(path: Path, tokens: torch.Tensor, limit: float) -> list[tuple[str, bool, str]]:
    """(what, whether it is so, by how much) of a model directory. Logits may differ by `limit` in
    float32."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    ours = Llama.from_pretrained(path, dtype=torch.float32)
    theirs = load(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours(tokens)
        found64, rounded64, expected64 = float64_logits(path, tokens)
        prompt = tokens[:, :64]
        greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64,
                                 do_sample=False, eos_token_id=None, pad_token_id=0)
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(Path(folder) / "saved")
            again = load(Path(folder) / "saved", dtype=torch.float32).eval()(tokens).logits
    size = expected.abs().max().item()
    checks = []
    pairs = [
        ("float32 logits, our float64 angles", found, expected, limit),
        ("float64 logits, our float64 angles", found64, expected64, limit),
        ("float64 logits, our angles formed as transformers'", rounded64, expected64, 1e-9),
        ("saved by us, loaded by transformers", again, expected, 0.0),
    ]
    for name, a, b, limit in pairs:
        difference = (a - b).abs().max().item()
        detail = f"max difference {difference:.1e} (logits reach {size:.0f}; limit {limit:.0e})"
        checks.append((name, difference <= limit, detail))
    same = torch.equal(ours.generate(prompt, 64), greedy)
    checks.append(("greedy text, 64 tokens", same, "token by token"))
    return checks


def run(path: Path | None) -> None:
    """Make every check, of a model directory or of random models, and print a line for each."""
    checks = []
    if path:
        checks.append(("tokens equal the tokenizers library's", *tokenization(path)))
        checks += model_checks(path, library_tokens(path, 512), 1e-3)
    else:
        for family in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                tokens = random_model(family, Path(folder))
                for name, *result in model_checks(Path(folder), tokens, 1e-4):
                    checks.append((f"random {family}, {name}", *result))
    for name, good, detail in checks:
        print(f"{'ok  ' if good else 'FAIL'}  {name}: {detail}")
    sys.exit(not all(good for _, good, _ in checks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    try:
        run(parser.parse_args().model)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
