"""A tiny random chat model in a folder, as a finished step would leave it, for tests of measuring and of talking."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from danlu.models.load import Loaded, load_model
from danlu.tokens.train import train_bpe

TEXTS = ["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", "The quick brown fox jumps over the lazy dog. " * 3,
         "红楼梦 三国演义 水浒传 西游记"]
POSITIONS = 96


def make_folder(folder: Path, seed: int = 0, positions: int = POSITIONS, width: int = 32) -> Path:
    """Saves a random Llama of that width and a byte-level tokenizer trained on a few lines."""
    train_bpe(TEXTS, vocab_size=300, folder=folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 3 // 2,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=positions, initializer_range=0.2, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@cache
def tiny_loaded() -> Loaded:
    """One such model, opened; shared by all tests, which leave it as it is."""
    return load_model(make_folder(Path(mkdtemp())))


@contextmanager
def filled(weight: torch.Tensor, value: float) -> Iterator[None]:
    """A weight of a shared model that is one number everywhere, until the end of the block."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)
