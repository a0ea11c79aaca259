"""Random T5 editors and instruction encoders of a few thousand parameters."""

import torch
from transformers import T5Config, T5EncoderModel

from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.text import InstructionEncoder
from sda_fast.scenes.edits import WORDS
from sda_fast.scenes.models import build_tokenizer
from sda_fast.scenes.world import SMALL

FEATURES = 16


def tiny_text_encoder(seed: int = 3) -> InstructionEncoder:
    """Knows the words of instructions of scenes."""
    tokenizer = build_tokenizer(SMALL, WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer), d_model=FEATURES, d_kv=8, d_ff=24, num_layers=1,
                num_heads=2, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    return InstructionEncoder(tokenizer, model)


def tiny_editor(
    mode: str = "delta", tokens_per_node=(3, 2, 1), channels: int = 12, **config
) -> EmbeddingEditor:
    """With an encoder of instructions; the same weights at every call."""
    sizes: dict = {"width": 24, "num_layers": 2, "num_heads": 2, "head_dim": 8, "ff_width": 32}
    sizes |= {"text_features": FEATURES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        editor = EmbeddingEditor(tokens_per_node, channels, mode=mode, **sizes | config)
        for parameter in editor.parameters():  # biases and norms start at zero or one
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    if editor.config.text_features == FEATURES:
        editor.set_text_encoder(tiny_text_encoder())
    return editor.eval()
