"""Bits per byte: every byte once, windows that agree with a full pass, a uniform model's known value."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import POSITIONS, TEXTS, tiny_loaded

from danlu.core.errors import DataError
from danlu.core.records import Document
from danlu.evals.perplexity import (
    DocumentScore,
    bits_per_byte,
    choose_documents,
    score_documents,
    windows,
)


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_windows_score_every_token_once_with_enough_context(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    tokens = np.arange(length)
    scored: list[int] = []
    for example in windows(tokens, context, stride):
        [branch] = example.branches
        assert len(example.stem) == 0 and len(branch.tokens) <= context
        assert np.array_equal(np.diff(branch.tokens), np.ones(len(branch.tokens) - 1))
        places = np.flatnonzero(branch.weights)
        assert places[0] >= min(branch.tokens[places[0]], context - stride), "as much context as promised"
        scored += branch.tokens[places].tolist()
    assert scored == list(range(1, length))


def test_short_documents_are_one_full_pass() -> None:
    loaded = tiny_loaded()
    documents = [Document(text, "s", str(number)) for number, text in enumerate(TEXTS)]
    scores = score_documents(loaded.root, loaded.tokenizer, documents, context=POSITIONS)
    for document, score in zip(documents, scores, strict=True):
        ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(document.text, add_special_tokens=False)]
        assert len(ids) <= POSITIONS
        with torch.no_grad():
            loaded.lm.set_attn_implementation("sdpa")
            logprobs = torch.log_softmax(loaded.lm(torch.tensor([ids])).logits[0].double(), -1)
            loaded.lm.set_attn_implementation("danlu")
        expected = -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum() / math.log(2)
        assert score.bits == pytest.approx(float(expected), rel=1e-5)
        assert score.num_bytes == len(document.text.encode()) and score.num_tokens == len(ids) - 1 and score.exact


def test_long_documents_micro_batches_and_padding_change_nothing() -> None:
    loaded = tiny_loaded()
    documents = [Document(text * 4, "s", str(number)) for number, text in enumerate(TEXTS)]
    whole = score_documents(loaded.root, loaded.tokenizer, documents, context=40, stride=13)
    heard: list[float] = []
    small = score_documents(loaded.root, loaded.tokenizer, documents, context=40, stride=13, micro_batch_tokens=64,
                            progress=heard.append)
    assert [score.bits for score in small] == pytest.approx([score.bits for score in whole], rel=1e-5)
    assert heard == sorted(heard) and heard[-1] == 1.0 and len(heard) > 1
    assert loaded.root.packs
    loaded.root.packs = False
    loaded.lm.set_attn_implementation("sdpa")
    try:
        padded = score_documents(loaded.root, loaded.tokenizer, documents, context=40, stride=13)
    finally:
        loaded.root.packs = True
        loaded.lm.set_attn_implementation("danlu")
    assert [score.bits for score in padded] == pytest.approx([score.bits for score in whole], rel=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_its_vocabulary_per_token() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.get_output_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    try:
        document = Document("花落知多少 <|end|> 12", "s", "1")
        scores = score_documents(loaded.root, loaded.tokenizer, [document], context=16)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    # what looks like a special token is scored as the text that it is
    assert scores[0].num_tokens > len("<|end|>") and scores[0].exact
    assert scores[0].bits == pytest.approx(scores[0].num_tokens * math.log2(len(weight)), rel=1e-6)


def test_numbers_that_are_not_finite_are_no_result() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    try:
        with pytest.raises(DataError, match="d7: the model gives this text no probability"):
            score_documents(loaded.root, loaded.tokenizer, [Document("花落", "s", "d7")], context=16)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_totals() -> None:
    result = bits_per_byte([DocumentScore("a", 10, 3, 20.0), DocumentScore("b", 30, 9, 120.0, exact=False)])
    assert (result.value, result.num_bytes, result.num_tokens, result.num_documents) == (3.5, 40, 12, 2)
    assert result.num_inexact == 1 and result.low == 2.0 and result.high == 4.0
    single = bits_per_byte([DocumentScore("a", 10, 3, 20.0)])
    assert single.value == 2.0 and single.low is None and single.high is None
    with pytest.raises(DataError, match="no held-out text"):
        bits_per_byte([])


def test_whole_documents_are_chosen_by_their_ids_alone() -> None:
    documents = [Document("字" * 100, "s", f"d{number}") for number in range(50)]
    chosen, notes = choose_documents(documents, 3000)
    assert len(chosen) == 10 and notes == []
    assert choose_documents(documents[::-1], 3000)[0] == chosen
    assert chosen != documents[:10], "spread over all of them"
    assert choose_documents(documents, 10 ** 6)[0] != documents and len(choose_documents(documents, 10 ** 6)[0]) == 50


def test_a_document_is_cut_only_where_nothing_else_fills_the_bytes() -> None:
    long, short = Document("字" * 1000, "s", "long"), Document("短", "s", "short")
    chosen, notes = choose_documents([long, short], 1000)
    assert sum(len(document.text.encode()) for document in chosen) in range(998, 1001)
    assert notes == ["long was cut to its first 996 bytes"]
    fitting = Document("文" * 300, "s", "fitting")
    chosen, notes = choose_documents([long, fitting], 1000)
    assert chosen == [fitting] and notes == []
    assert choose_documents([Document("", "s", "empty")], 1000) == ([], [])
