"""The stage `tokenizer`: from a corpus or files to a folder that transformers opens, sampled and accounted for."""

import hashlib
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from danlu.core.config import read_config
from danlu.core.errors import ConfigError
from danlu.core.records import Document
from danlu.pipeline.context import FILES, Context, Forecast, Input, SingleProcess
from danlu.pipeline.stages import tokenizer as stage
from danlu.text.corpus import CorpusWriter, Row, shard_path
from danlu.tokens.train import train_tokenizer
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
        with CorpusWriter(shard_path(folder, split, 0)) as writer:
            for i in numbers:
                writer.write(Row(Document(f"{i} {TEXT}", "a.txt", str(i), "en")))
                if i == 7:
                    writer.write(Row(Document("def add(a, b): return a", "c.txt", "7", "code")))
                if i % 4 == 0:
                    writer.write(Row(Document("今天天气如何?今天是晴天。" * 5, "b.txt", str(i), "zh")))
    return {"corpus": Input("corpus", "step", "0" * 64, produces="corpus", folder=folder)}


def book(folder, text):
    (folder / "book.txt").write_text(text, encoding="utf-8")
    return {"book.txt": Input("book.txt", "files", "f", files=(folder / "book.txt",))}


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
    assert 6000 < metrics["bytes"] == sample["out"]["bytes"] <= 12000


@pytest.mark.parametrize("between", ["\n\n", "\n\u3000\u3000", " "])
def test_of_a_book_a_part_is_drawn(tmp_path, between):
    """A book in one document, whatever stands between its paragraphs; of a book that is too large not nothing."""
    inputs = book(tmp_path, between.join(f"第{n}回 话说 the {n} heroes met." for n in range(3000)))
    metrics, _ = run(tmp_path, inputs, dataset="book.txt", vocab_size=300, max_bytes_per_category=20_000)
    assert 15_000 < metrics["bytes"] <= 20_000


def test_no_more_is_measured_than_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("danlu.pipeline.stages.tokenizer.MAX_MEASURED", 1000)
    metrics, _ = run(tmp_path, book(tmp_path, "话说 the heroes met. " * 500), dataset="book.txt", vocab_size=300)
    found = metrics["figures"]["vocabulary"]["categories"]["all"]
    assert 990 < found["bytes"] <= 1000


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
                                    {"special_tokens": ["a", "a"]}, {"dataset": []}, {"lowercase": True},
                                    {"character_coverage": 0.9}, {"kind": "unigram", "strip_accents": True},
                                    {"kind": "unigram", "digits": "groups"}, {"kind": "bpe"}, {"character_coverage": 0},
                                    {"kind": "wordpiece", "special_tokens": ["[CLS]"]},
                                    {"special_tokens": ["<extra_id_0>"], "num_sentinels": 1}])
def test_settings_that_cannot_be_meant(values):
    with pytest.raises(ConfigError, match=r"recipe\.yaml:3"):
        settings(**{"dataset": "corpus"} | values)


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram", "sentencepiece_bpe"])
def test_the_smallest_vocabulary_is_known_before_anything_is_read(kind, tmp_path):
    least = settings(dataset="corpus", kind=kind, num_sentinels=300, vocab_size=4096).options().least_size
    options = settings(dataset="corpus", kind=kind, num_sentinels=300, vocab_size=least).options()
    train_tokenizer([TEXT * 20], options, tmp_path)
    with pytest.raises(ConfigError, match=f"use {least} or more") as caught:
        settings(dataset="corpus", kind=kind, num_sentinels=300, vocab_size=least - 1)
    assert "recipe.yaml:3" in str(caught.value)
    with pytest.raises(ConfigError):
        train_tokenizer([TEXT * 20], replace(options, vocab_size=least - 1), tmp_path)


def test_what_is_left_out_is_chosen_by_kind():
    chosen = [settings(dataset="corpus", kind=kind).options() for kind in ("byte_bpe", "wordpiece", "unigram")]
    assert [(x.digits, x.chinese) for x in chosen] == [("single", "free"), ("free", "characters"), ("single", "free")]
    told = settings(dataset="corpus", kind="wordpiece", digits="groups", chinese="script", num_sentinels=2,
                    special_tokens=["<fim>"]).options()
    assert (told.digits, told.chinese) == ("groups", "script")
    assert told.all_special[-3:] == ["<fim>", "<extra_id_0>", "<extra_id_1>"]


def test_beside_another_tokenizer(tmp_path, corpus):
    (tmp_path / "one").mkdir()
    _, other = run(tmp_path / "one", corpus, dataset="corpus", vocab_size=300)
    inputs = corpus | {str(other): Input(str(other), FILES, "1" * 64, folder=other)}
    metrics, work = run(tmp_path, inputs, dataset="corpus", kind="wordpiece", vocab_size=300, compare=[str(other)])
    assert list(metrics["figures"]) == ["vocabulary", str(other)]
    assert json.loads((work / "figures.json").read_text()) == metrics["figures"]
    own, theirs = (figures["languages"] for figures in metrics["figures"].values())
    assert sorted(own) == sorted(theirs) == ["en", "zh"]
    assert own["en"]["bytes"] == theirs["en"]["bytes"] > 0
    assert own["zh"]["texts_changed"] == 1 and theirs["zh"]["texts_changed"] == 0
    assert metrics["bytes_per_token"]["zh"] == metrics["figures"]["vocabulary"]["categories"]["zh"]["bytes_per_token"]
    assert 0 <= metrics["unknown_share"] == metrics["figures"]["vocabulary"]["categories"]["all"]["unknown_share"] < 0.01
    [*_, last] = stage.references(settings(dataset="corpus", compare=["a/b"]))
    assert (last.key, last.text, last.is_data) == (("compare", 0), "a/b", False)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "sentencepiece_bpe"])
def test_the_other_kinds(tmp_path, corpus, kind):
    if kind != "wordpiece":
        pytest.importorskip("sentencepiece")
    metrics, work = run(tmp_path, corpus, dataset="corpus", kind=kind, vocab_size=450, num_sentinels=3)
    tokenizer = AutoTokenizer.from_pretrained(work)
    assert tokenizer.convert_tokens_to_ids("<extra_id_2>") == len(stage.own_tokens(kind)) + 2
    assert len(tokenizer) == metrics["vocab_size"] <= 450
    assert metrics["figures"]["vocabulary"]["categories"]["all"]["texts_changed"] == (6 if kind == "wordpiece" else 0)
