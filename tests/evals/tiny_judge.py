"""A tiny random reward model in a folder, with the tokenizer of the tiny chat models."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

import torch
from tiny_chat import POSITIONS, make_folder
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from danlu.core.records import Message, Preference


def make_judge(folder: Path, seed: int = 7, positions: int = POSITIONS) -> Path:
    """Saves a random sequence classifier with one label beside the tokenizer of `make_folder`."""
    made = make_folder(Path(mkdtemp()))
    folder.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copyfile(path, folder / path.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
                         initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def some_pairs(count: int = 6) -> list[Preference]:
    """Pairs of two categories, by turns, with answers of different lengths."""
    words = ["yes", "no", "the fox", "花落", "a lazy dog jumps", "8", "春眠不觉晓", "over"]
    return [Preference((Message("user", f"say {words[number % 8]} {number}"),), words[number % 8],
                       words[(3 * number + 1) % 8] + "!", "s", f"{number}", ("wrong", "form")[number % 2])
            for number in range(count)]
