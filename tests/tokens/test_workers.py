"""Much text is encoded by several processes: the same examples and the same ledger, whoever encodes."""

import os

import numpy as np
import pytest

from danlu.core.ledger import Ledger
from danlu.core.processes import AHEAD
from danlu.core.records import Document
from danlu.tokens import codec as codec_module
from danlu.tokens.codec import Codec, spread
from danlu.tokens.encode import Encoder
from danlu.tokens.framed import FramedEncoder
from tokens.samples import make_tokenizer
from tokens.test_framed import bert_tokenizer


def documents():
    """Empty ones, short and long ones, some with a context."""
    texts = ["The unaffable cat sat. ", "使用语言模型来。", "the cat! ", "1,234 cats\n\nof 56\tsorts… "]
    for number in range(60):
        text = "".join(texts[number % 3:] * (number % 5))
        yield Document(text, "s", f"d{number}", context="A cat. " if number % 7 == 1 or 20 < number < 40 else "")


def encoded(make):
    """What one process encodes, and what two do."""
    for workers in (1, 2):
        ledger = Ledger()
        found = list(make(workers).documents(documents(), ledger))
        ledger.check()
        yield [(example.id, branch.tokens.tolist(), branch.weights.tolist(), {
            name: column.tolist() for name, column in branch.columns.items()})
            for example in found for branch in example.branches], ledger.to_json()


@pytest.fixture
def at_once(monkeypatch):
    """Other processes from the second batch on."""
    monkeypatch.setattr("danlu.tokens.encode.BATCH_ROWS", 7)
    monkeypatch.setattr(codec_module, "LARGE", 0)


@pytest.fixture
def tokenizer(tmp_path_factory):
    return make_tokenizer(str(tmp_path_factory.mktemp("tokenizer")), None)


def test_documents_are_the_same_whoever_encodes_them(at_once, tokenizer):
    one, two = encoded(lambda workers: Encoder(tokenizer, 16, workers=workers))
    assert len(one[0]) > 60 and one == two


@pytest.mark.parametrize("words", [None, "own", "jieba"])
def test_so_are_framed_pieces_and_their_words(at_once, words):
    if words == "jieba":
        pytest.importorskip("jieba")
    one, two = encoded(lambda workers: FramedEncoder(bert_tokenizer(), 16, words=words, sentences=True, workers=workers))
    assert len(one[0]) > 60 and one == two


def process(texts):
    return os.getpid()


def texts_of(batch):
    return ["a" * batch]


def encoded_by(batches, workers):
    found = list(spread(process, batches, texts_of, workers))
    assert [batch for batch, _ in found] == list(batches), "each beside its own"
    return [made for _, made in found]


def test_the_first_batch_and_little_text_stay_here(monkeypatch):
    batches = [1000] * 7 + [999]
    assert set(encoded_by(batches, 2)) == {os.getpid()}
    monkeypatch.setattr(codec_module, "LARGE", 3000)
    first, *others = encoded_by(batches, 2)
    assert first == os.getpid() and first not in others and len(others) == 7
    assert set(encoded_by(batches, 1)) == set(encoded_by(batches[:4], 2)) == {os.getpid()}


@pytest.mark.parametrize(("length", "most"), [(0, 10 + 2 * AHEAD), (1000, 10 + 4)])
def test_what_waits_is_bounded_whatever_it_is(monkeypatch, length, most):
    """Of empty texts, too: the whole data would be in memory otherwise."""
    monkeypatch.setattr(codec_module, "FEW_BATCHES", 10)
    monkeypatch.setattr(codec_module, "HELD", 2000)
    asked = 0

    def batches():
        nonlocal asked
        for _ in range(100):
            asked += 1
            yield length

    for number, _ in enumerate(spread(process, batches(), texts_of, 2)):
        assert asked <= number + most + 2  # this one, and the one that is looked at next


def test_a_codec_that_must_not_cut_does_not_elsewhere(monkeypatch, tokenizer):
    """Which process encodes what is chance: where the first text showed that cutting changes ids, none cuts."""
    codec = Codec(tokenizer)
    assert codec._cuts is not None
    make, arguments = codec.__reduce__()
    assert make(*arguments)._cuts is not None and codec._tried
    monkeypatch.setattr(type(codec._cuts), "_cuts", lambda self, codes: np.ones(len(codes) + 1, bool))  # everywhere
    codec = Codec(tokenizer)
    make, arguments = codec.__reduce__()  # nothing was encoded yet
    assert make(*arguments)._cuts is None
