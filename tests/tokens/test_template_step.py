"""A chosen template through a whole step: trained with, saved with the model, and used by whoever opens it."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_chat import make_folder
from transformers import AutoTokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.data.store import ExampleStore
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.pipeline.upkeep import read_ledger
from danlu.tokens.chat import Chat

ROWS = [("fox?", "brown"), ("dog?", "lazy"), ("春眠?", "不觉晓"), ("over?", "the lazy dog")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_folder(home / "model", positions=256)
    with open(home / "talk.jsonl", "w", encoding="utf-8") as file:
        for question, answer in ROWS:
            messages = [{"role": "User", "content": question}, {"role": "ASSISTANT", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    with open(home / "sums.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "note", "answer"])
        writer.writerows([*((f"{i}+{i}=", "x", str(2 * i)) for i in range(1, 6)), ("9+9=", "x", "")])
    return home


def go(home, monkeypatch, name, **settings):
    """Runs one fine-tuning; returns the model's folder and its examples."""
    monkeypatch.chdir(home)
    step = {"stage": "sft", "model": "model", "cutoff_len": 128, "max_steps": 1, "plot_loss": False, "device": "cpu",
            **settings}
    recipe = Recipe.from_text(json.dumps({"name": name, "seed": 1, "steps": {"chat": step}}), base=home)
    run(recipe, console=Console(quiet=True))
    folder = Path("runs", name, "chat")
    examples = ExampleStore(next(folder.glob("examples-*")) / "train")
    return folder / (folder / "current").read_text().strip(), [examples[i] for i in range(len(examples))]


def test_a_built_in_template_is_saved_and_used(home, monkeypatch):
    folder, examples = go(home, monkeypatch, "built", dataset="talk.jsonl", template="vicuna", default_system="Be 炉.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "fox?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|>Be 炉. USER: fox? ASSISTANT:"
    ids = Chat(tokenizer).prompt_ids([Message("user", "fox?")])
    [branch] = next(x for x in examples if x.id.endswith(":1")).branches
    assert branch.tokens[:len(ids)].tolist() == ids  # what was trained is what a chat asks
    assert tokenizer.decode(branch.tokens[branch.weights > 0]) == " brown<|end|>"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained("model").chat_template != tokenizer.chat_template  # the model's own is untouched


def test_a_format_string_reads_the_columns_that_it_names(home, monkeypatch):
    folder, examples = go(home, monkeypatch, "form", dataset="sums.csv", template="问题:{question}\n答案:{answer}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(x.branches[0].tokens) for x in examples]
    assert sorted(texts)[0] == "<|bos|>问题:1+1=\n答案:2<|end|>"
    assert len(texts) == 5
    ledger = read_ledger(folder)
    assert "empty answer" in str(ledger.stations)
    assert Chat(tokenizer).prompt([Message("user", "7+7=")]).text == "<|bos|>问题:7+7=\n答案:"


def test_an_unknown_column_or_template_stops_before_anything_is_trained(home, monkeypatch):
    with pytest.raises((ConfigError, DataError), match=r"(?s)no column “questoin”.*Did you mean {question}"):
        go(home, monkeypatch, "wrong", dataset="sums.csv", template="{questoin} {answer}")
    with pytest.raises(ConfigError, match=r"(?s)no template “vicunia”.*Did you mean vicuna"):
        go(home, monkeypatch, "wrong", dataset="talk.jsonl", template="vicunia")
    with pytest.raises(ConfigError, match="such token"):
        go(home, monkeypatch, "wrong", dataset="talk.jsonl", template="chatml")
