"""Bits per byte: every byte once, windows that agree with a full pass, a uniform model's known value."""

import math
from copy import deepcopy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import POSITIONS, TEXTS, filled, tiny_loaded

from danlu.core.errors import DataError
from danlu.core.records import Document
from danlu.evals.perplexity import (
    DocumentScore,
    bits_per_byte,
    choose_documents,
    first_token_in_words,
    loss_rows,
    score_documents,
    start_token,
    units_of,
    windows,
)
from danlu.evals.statistics import ratio_interval
from danlu.tokens.codec import num_ids


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
    with filled(weight, 0.0):
        document = Document("花落知多少 <|end|> 12", "s", "1")
        scores = score_documents(loaded.root, loaded.tokenizer, [document], context=16)
    # what looks like a special token is scored as the text that it is
    assert scores[0].num_tokens > len("<|end|>") and scores[0].exact
    assert scores[0].bits == pytest.approx(scores[0].num_tokens * math.log2(len(weight)), rel=1e-6)


def test_numbers_that_are_not_finite_are_no_result() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.model.norm.weight
    with filled(weight, math.nan), pytest.raises(DataError, match="d7: the model gives this text no probability"):
        score_documents(loaded.root, loaded.tokenizer, [Document("花落", "s", "d7")], context=16)


def test_totals() -> None:
    result = bits_per_byte([DocumentScore("a", 10, 3, 20.0), DocumentScore("b", 30, 9, 120.0, exact=False)])
    assert (result.value, result.num_bytes, result.num_tokens, result.num_documents) == (3.5, 40, 12, 2)
    assert result.num_inexact == 1 and result.low == 2.0 and result.high == 4.0
    single = bits_per_byte([DocumentScore("a", 10, 3, 20.0)])
    assert single.value == 2.0 and single.low is None and single.high is None
    with pytest.raises(DataError, match="no held-out text"):
        bits_per_byte([])


def choose(documents: list[Document], max_bytes: int) -> tuple[list[Document], list[str]]:
    chosen, notes = choose_documents(lambda: iter(documents), max_bytes)
    assert set(chosen) == {"text"}
    return chosen["text"], notes


def test_whole_documents_are_chosen_by_their_ids_alone() -> None:
    documents = [Document("字" * 100, "s", f"d{number}") for number in range(50)]
    chosen, notes = choose(documents, 3000)
    assert len(chosen) == 10 and notes == []
    assert choose(documents[::-1], 3000)[0] == chosen
    assert chosen != documents[:10], "spread over all of them"
    assert choose(documents, 10 ** 6)[0] != documents and len(choose(documents, 10 ** 6)[0]) == 50
    others = [replace(document, category="other", text="文" * 100) for document in documents]
    both, _ = choose_documents(lambda: chain.from_iterable(zip(others, documents)), 3000)
    assert both == {"other": [replace(document, category="other", text="文" * 100) for document in chosen], "text": chosen}


def test_a_document_is_cut_only_where_nothing_else_fills_the_bytes() -> None:
    long, short = Document("字" * 1000, "s", "long"), Document("短", "s", "short")
    chosen, notes = choose([long, short], 1000)
    assert sum(len(document.text.encode()) for document in chosen) in range(998, 1001)
    assert notes == ["long was cut to its first 996 bytes"]
    fitting = Document("文" * 300, "s", "fitting")
    chosen, notes = choose([long, fitting], 1000)
    assert chosen == [fitting] and notes == []
    assert choose([Document("", "s", "empty")], 1000) == ([], [])


def test_long_documents_are_what_transformers_says_window_by_window() -> None:
    loaded = tiny_loaded()
    document = Document(TEXTS[1] * 2, "s", "long")
    [score] = score_documents(loaded.root, loaded.tokenizer, [document], context=20, stride=7)
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(document.text, add_special_tokens=False)]
    assert len(ids) > 60
    total, scored = 0.0, 1
    loaded.lm.set_attn_implementation("sdpa")
    try:
        while scored < len(ids):
            end = min(len(ids), 20 if scored == 1 else scored + 7)
            start = max(0, end - 20)
            with torch.no_grad():
                logprobs = torch.log_softmax(loaded.lm(torch.tensor([ids[start:end]])).logits[0].double(), -1)
            for place in range(scored, end):
                assert place - start >= min(place, 13), "at least context − stride tokens before it"
                total -= float(logprobs[place - start - 1, ids[place]])
            scored = end
    finally:
        loaded.lm.set_attn_implementation("danlu")
    assert score.bits == pytest.approx(total / math.log(2), rel=1e-5)


def test_a_first_token_that_nothing_predicts_costs_a_guess_and_is_counted() -> None:
    loaded = tiny_loaded()
    bare = deepcopy(loaded.tokenizer)
    bare.bos_token, bare.eos_token = None, None
    assert start_token(bare) is None and "8.2 bits" in first_token_in_words(bare)
    text = "The quick brown fox"
    scores = score_documents(loaded.root, bare, [Document(text, "s", "1"), Document("", "s", "2")], context=POSITIONS)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        loaded.lm.set_attn_implementation("sdpa")
        logprobs = torch.log_softmax(loaded.lm(torch.tensor([ids])).logits[0].double(), -1)
        loaded.lm.set_attn_implementation("danlu")
    rest = -float(logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum()) / math.log(2)
    assert scores[0].bits == pytest.approx(math.log2(num_ids(bare)) + rest, rel=1e-5)
    assert [score.num_without_context for score in scores] == [1, 0] and scores[0].num_tokens == len(ids)
    [row] = [row for row in loss_rows("m", scores) if row.kind == "all"]
    assert row.num_without_context == 1
    bare.eos_token = "<|end|>"
    assert start_token(bare) == bare.eos_token_id and "predicted from <|end|>" in first_token_in_words(bare)
    assert first_token_in_words(loaded.tokenizer) == ""


def test_losses_in_all_units_by_hand() -> None:
    scores = [DocumentScore("a", 6, 3, 6.0, num_chars=2, source="x", category="zh", language="zh"),
              DocumentScore("b", 4, 5, 10.0, num_chars=4, source="y", category="en", language="en"),
              DocumentScore("c", 10, 2, 4.0, num_chars=10, source="y", category="en", language="en")]
    rows = {(row.kind, row.group): row for row in loss_rows("m", scores)}
    assert list(rows) == [("category", "en"), ("category", "zh"), ("all", "all text")], "no group is told twice"
    zh = rows["category", "zh"]
    assert (zh.bits_per_token, zh.perplexity, zh.bits_per_byte, zh.bits_per_char) == (2.0, pytest.approx(4.0), 1.0, 3.0)
    assert zh.loss == pytest.approx(2 * math.log(2)) and zh.low is None
    everything = rows["all", "all text"]
    assert (everything.bits_per_byte, everything.bits_per_char, everything.num_tokens) == (1.0, 20 / 16, 10)
    assert everything.unit == "documents" and everything.low is not None and everything.low <= 1.0 <= everything.high
    by_source = [replace(score, category="t", language="en") for score in scores]
    assert [(row.kind, row.group) for row in loss_rows("m", by_source)] == [
        ("category", "t"), ("source", "x"), ("source", "y"), ("language", "en"), ("all", "all text")]


def test_a_token_counts_in_the_block_in_which_it_begins() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.get_output_embeddings().weight
    text = "ab" * 600 + "The quick brown fox jumps over the lazy dog. " * 50
    with filled(weight, 0.0):
        [score] = score_documents(loaded.root, loaded.tokenizer, [Document(text, "s", "1")], context=POSITIONS)
    offsets = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [start for start, _ in offsets]
    counts = [sum(block * 1000 <= start < (block + 1) * 1000 for start in starts) for block in range(-(-len(text) // 1000))]
    expected = [math.log2(len(weight)) * count for count in counts]
    assert [block.bits for block in score.blocks] == pytest.approx(expected, rel=1e-6)
    assert [block.num_tokens for block in score.blocks] == counts
    assert len(set(counts)) > 2, "the blocks differ, so that a wrong border shows"


def test_blocks_are_the_same_text_for_every_model_and_give_few_documents_an_interval() -> None:
    loaded = tiny_loaded()
    text = "".join(TEXTS) * 18
    assert 2000 < len(text) <= 4000
    [score] = score_documents(loaded.root, loaded.tokenizer, [Document(text, "s", "1")], context=POSITIONS)
    pieces = [text[start:start + 1000] for start in range(0, len(text), 1000)]
    assert [(block.num_bytes, block.num_chars) for block in score.blocks] == [
        (len(piece.encode()), len(piece)) for piece in pieces]
    assert sum(block.bits for block in score.blocks) == pytest.approx(score.bits)
    assert all(block.bits > 0 for block in score.blocks)
    units = units_of([score])
    assert len(units.bits) == len(pieces) and units.name == "blocks of 1,000 characters"
    result = bits_per_byte([score])
    assert result.low is not None and result.high is not None and result.low < result.value < result.high
    assert units_of([score] * 5).name == "documents"
    row = loss_rows("m", [score])[-1]
    assert row.loss_low < row.loss < row.loss_high and row.char_low < row.bits_per_char < row.char_high
    assert row.char_low == pytest.approx(ratio_interval(units.bits, units.num_chars, strata=units.strata)[0])
    high = ratio_interval(units.bits, units.num_tokens, strata=units.strata)[1]
    assert row.loss_high == pytest.approx(high * math.log(2))
