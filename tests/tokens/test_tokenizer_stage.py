"""The stage `tokenizer`: from a corpus or files to a folder that transformers opens, sampled and accounted for."""

import hashlib
import io
import json

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from danlu.core.config import read_config
from danlu.core.errors import ConfigError
from danlu.core.records import Document
from danlu.pipeline.context import FILES, Context, Forecast, Input, SingleProcess
from danlu.pipeline.stages import tokenizer as stage
from danlu.text.corpus import CorpusWriter
from tokens.samples import TEXT


def settings(**values):
    return read_config(stage.Settings, values, lambda path: "recipe.yaml:3")


def run(folder, inputs, **values):
    work = folder / "work"
    work.mkdir()
    console = Console(file=io.StringIO())
    context = Context("vocabulary", settings(**values), 0, inputs, work, "f" * 64, folder, SingleProcess(), console)
    return stage.run(context), work


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, numbers in (("train", range(40)), ("heldout", range(40, 44))):
        with CorpusWriter(folder / f"{split}.parquet") as writer:
            for i in numbers:
                writer.write(Document(f"{i} {TEXT}", "a.txt", str(i), "en"))
                if i == 7:
                    writer.write(Document("def add(a, b): return a", "c.txt", "7", "code"))
                if i % 4 == 0:
                    writer.write(Document("今天天气如何?今天是晴天。" * 5, "b.txt", str(i), "zh"))
    return {"corpus": Input("corpus", "step", "0" * 64, produces="corpus", folder=folder)}


def test_from_a_corpus(tmp_path, corpus):
    metrics, work = run(tmp_path, corpus, dataset="corpus", vocab_size=400)
    tokenizer = AutoTokenizer.from_pretrained(work)
    assert len(tokenizer) == metrics["vocab_size"] == 400
    assert sorted(metrics["bytes_per_token"]) == ["all", "code", "en", "zh"]
    assert min(metrics["bytes_per_token"].values()) > 1
    assert metrics["measured_on"] == {"code": "training text", "en": "held-out documents", "zh": "held-out documents"}
    ledger = json.loads((work / "ledger.json").read_text())
    [read, sample] = ledger["stations"]
    assert read["name"] == "read:corpus"
    assert read["out"] == sample["in"] == sample["out"]
    assert metrics["bytes"] == sample["out"]["bytes"]


def test_a_large_category_is_sampled_down(tmp_path, corpus):
    metrics, work = run(tmp_path, corpus, dataset=["corpus"], vocab_size=300, max_bytes_per_category=6000)
    [_, sample] = json.loads((work / "ledger.json").read_text())["stations"]
    left_out = sample["dropped"]["beyond max_bytes_per_category"]
    assert left_out["bytes"] > 6000
    assert left_out["rows"] > 10
    assert metrics["bytes"] == sample["out"]["bytes"] <= 12000


def test_same_bytes_twice(tmp_path, corpus):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _, work = run(tmp_path / name, corpus, dataset="corpus", vocab_size=350, max_bytes_per_category=9000)
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(work.iterdir())})
    assert found[0] == found[1]


def test_from_files_without_anything_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    metrics, _ = run(tmp_path, {str(path): Input(str(path), FILES, "0" * 64, files=[path])}, dataset=str(path),
                     vocab_size=300, special_tokens=["<|tool|>"])
    assert metrics["measured_on"] == {"text": "training text"}
    assert metrics["vocab_size"] == 300


def test_references_and_forecast():
    one = settings(dataset="corpus")
    [reference] = stage.references(one)
    assert (reference.key, reference.text) == (("dataset",), "corpus")
    assert [x.key for x in stage.references(settings(dataset=["a", "b"]))] == [("dataset", 0), ("dataset", 1)]
    parent = Input("corpus", "step", "", produces="corpus", forecast=Forecast(facts={"bytes": 4_000_000}))
    found = stage.forecast(one, {"corpus": parent})
    assert found.facts["vocab_size"] == one.vocab_size
    assert found.seconds is not None and not found.seconds.exact and found.seconds.value > 0


@pytest.mark.parametrize("values", [{"vocab_size": 100}, {"special_tokens": ["<|end|>"]},
                                    {"special_tokens": ["a", "a"]}, {"dataset": []}])
def test_settings_that_cannot_be_meant(values):
    with pytest.raises(ConfigError, match=r"recipe\.yaml:3"):
        settings(**{"dataset": "corpus"} | values)
