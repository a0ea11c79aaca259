"""Random causal language models in folders: a Qwen2, a Llama and their sisters, of two layers."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from sda_fast.editors.llm import LLMEditor
from sda_fast.scenes.edits import WORDS

CLASSES = {"qwen2": "Qwen2", "llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral"}
TREE, CHANNELS, LIMIT = (2, 1), 8, 10
OPTIONS = {"lora_rank": 4, "max_length": LIMIT}


def write_base(
    folder: Path, kind: str = "qwen2", seed: int = 0, positions: int = 6, **saving
) -> Path:
    """Write config, weights and a tokenizer of one word a token; return the folder."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        vocab_size=len(WORDS) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LIMIT + 2 * positions,
        tie_word_embeddings=kind == "llama",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
        with torch.no_grad():
            for weight in model.parameters():  # as first drawn, they hardly see one another
                if weight.ndim == 2:
                    weight.mul_(5)
    model.save_pretrained(folder, **saving)
    words = dict.fromkeys(WORDS)  # some are there twice
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.enable_truncation(3)  # as some are shipped; nothing may be cut off
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_llm_editor(base: Path, shaken: bool = False, **options) -> LLMEditor:
    """An editor for positions of ``CHANNELS`` in ``TREE``; shaken: as if it had learned."""
    known = {"tokens_per_node": TREE, "channels": CHANNELS, **OPTIONS}
    editor = LLMEditor.from_base(base, **known | options).eval()
    if shaken:
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in editor.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return editor
