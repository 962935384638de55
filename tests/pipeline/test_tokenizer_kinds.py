"""A tokenizer of each kind, and a model from nothing that is trained with it."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoTokenizer

from danlu.core.errors import DanluError
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.pipeline.stages import tokenizer as stage

RECIPE = """
name: kinds
seed: 3
steps:
  vocabulary: {{stage: tokenizer, dataset: texts, kind: {kind}, vocab_size: 400}}
  base:
    stage: pt
    model: {{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
            max_position_embeddings: 64, tie_word_embeddings: true}}
    tokenizer: vocabulary
    dataset: texts
    val_size: 0.2
    cutoff_len: 32
    max_steps: 2
    eval_steps: 2
    plot_loss: false
"""


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "sentencepiece_bpe"])
def test_a_model_is_trained_with_it(tmp_path, monkeypatch, kind):
    if kind != "wordpiece":
        pytest.importorskip("sentencepiece")
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(12):
        text = f"copper {number} and iron. 今天天气很好，{number}\n" * 6
        Path("texts", f"{number}.txt").write_text(text, encoding="utf-8")
    made = run(Recipe.from_text(RECIPE.format(kind=kind), base=tmp_path), console=Console(quiet=True))
    tokenizer = AutoTokenizer.from_pretrained(made["base"].folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(made["vocabulary"].folder).get_vocab()
    assert tokenizer.eos_token == ("[SEP]" if kind == "wordpiece" else "<|end|>")
    assert math.isfinite(made["base"].metrics["eval_loss"])


@pytest.mark.parametrize("name", ["hello", "中文", " <x> ", "<x", "x>", "...", "<|>", "<a\nb>", "<0x41>", "3"])
def test_a_special_token_has_marks_around_it(name):
    """What ordinary text is full of would become it wherever the tokenizer is opened by others."""
    with pytest.raises(ValidationError, match=r"could be spelled by ordinary text\. Put marks around a name"):
        stage.Settings(dataset="texts", special_tokens=["<|tool|>", name])


def test_special_tokens_as_others_write_them():
    names = ["<|fim_prefix|>", "[unused1]", "<mask>", "</s>", "__eou__", "{工具}"]
    assert stage.Settings(dataset="texts", special_tokens=names).options().special_tokens == tuple(names)


def test_a_tokenizer_to_compare_with_is_opened_before_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts", "a.txt").write_text("copper and iron\n" * 20)
    Path("nothing").mkdir()
    Path("nothing", "config.json").write_text("{}")
    monkeypatch.setattr(stage, "train_tokenizer", lambda *arguments: pytest.fail("it was trained"))
    recipe = """
name: compared
steps:
  vocabulary: {stage: tokenizer, dataset: texts, vocab_size: 300, compare: [nothing]}
"""
    with pytest.raises(DanluError, match="nothing"):
        run(Recipe.from_text(recipe, base=tmp_path), console=Console(quiet=True))
