import base64

import pytest
import torch
from texts import TEXT, ranks

from model import Llama, ModelConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests are small: one thread is fastest, and the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config():
    """A factory of small Hugging Face configurations: GQA, odd sizes, whatever a test changes."""
    def build(**changes) -> dict:
        config = {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "hidden_act": "silu",
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        }
        return config | changes
    return build


@pytest.fixture
def tiny_model(tiny_config):
    """A factory of small models with weights that are not symmetric about anything."""
    def build(dtype=torch.float32, seed=0, **changes) -> Llama:
        config = ModelConfig.from_hf(tiny_config(initializer_range=0.2, **changes))
        model = Llama(config).initialise(seed)
        generator = torch.Generator().manual_seed(7)  # one: no two norms are alike
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms, which are 1 at first, and biases, which are 0
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype)
    return build


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A small random Llama with a tokenizer, as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("models") / "small"
    pieces = ranks(3)
    config = {
        "vocab_size": len(pieces) + 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    Llama(ModelConfig.from_hf(config)).initialise(0).save_pretrained(path)
    lines = [base64.b64encode(piece) + b" %d\n" % rank for piece, rank in pieces.items()]
    (path / "tokenizer.model").write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(TEXT)
    return path
