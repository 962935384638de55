"""Preferences: what a judge and what a model prefers, against plain loops over single sequences."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_chat import make_folder, tiny_loaded
from tiny_judge import make_judge, some_pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message, Preference
from danlu.evals.figures import ALL_PAIRS
from danlu.evals.preferences import encode_pairs, judge_values, model_values, preference_rows, verdicts
from danlu.evals.statistics import wilson_interval
from danlu.models.load import load_model
from danlu.models.scorer import load_scorer

CPU = torch.device("cpu")


def rendered(tokenizer: object, record: Preference, answer: str) -> tuple[list[int], int]:
    """The ids of a prompt and its answer by the template alone, and how many of them are the prompt's."""
    messages = [{"role": "user", "content": record.messages[0].content}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids + tokenizer.encode(answer + "<|end|>", add_special_tokens=False), len(ids)


@pytest.mark.parametrize("packs", [True, False])
def test_a_model_prefers_what_it_finds_more_probable(tmp_path: Path, packs: bool) -> None:
    folder, records = make_folder(tmp_path / "m", seed=3), some_pairs(8)
    loaded, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    if not packs:
        from danlu.models.attention import leave_packed

        leave_packed(loaded.lm)
        loaded.root.packs = False
    pairs = encode_pairs(loaded.tokenizer, records, limit=96)
    found = model_values(loaded.root, pairs, CPU, 64)
    expected = {}
    for place, record in enumerate(records):
        sums = []
        for answer in (record.chosen, record.rejected):
            ids, start = rendered(loaded.tokenizer, record, answer)
            with torch.no_grad():
                logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))))
        assert found[place] == pytest.approx(tuple(sums), abs=1e-4)
        expected[place] = float(sums[0] > sums[1])
    assert verdicts(pairs, found) == expected and 0 < sum(expected.values()) < 8


def test_a_judge_prefers_what_it_scores_higher(tmp_path: Path) -> None:
    folder, records = make_judge(tmp_path / "judge"), some_pairs(8)
    judge, plain = load_scorer(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    pairs = encode_pairs(judge.tokenizer, records, limit=96)
    found = judge_values(judge.root, pairs, CPU, 64)
    for place, record in enumerate(records):
        with torch.no_grad():
            scores = [float(plain(torch.tensor([rendered(judge.tokenizer, record, answer)[0]])).logits[0, 0])
                      for answer in (record.chosen, record.rejected)]
        assert found[place] == pytest.approx(tuple(scores), abs=1e-4)
        assert verdicts(pairs, found)[place] == float(scores[0] > scores[1])


def test_ties_count_half() -> None:
    records = [*some_pairs(2), replace(some_pairs(1)[0], rejected=some_pairs(1)[0].chosen, category="equal")]
    pairs = encode_pairs(tiny_loaded().tokenizer, records, limit=96)
    assert verdicts(pairs, {0: (1.5, 1.5), 1: (-2.0, -1.0)}) == {0: 0.5, 1: 0.0}
    assert verdicts(pairs, {2: (-1.0, -1.0 - 1e-7)}) == {2: 0.5}, "equal answers tie, whatever rounding makes of them"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_decide_nothing(value: float) -> None:
    pairs = encode_pairs(tiny_loaded().tokenizer, some_pairs(1), limit=96)
    with pytest.raises(DataError, match="pair 0 are not finite"):
        verdicts(pairs, {0: (1.0, value)})


def test_rows_by_category_and_over_all() -> None:
    records = some_pairs(5)
    values = {0: (3.0, 1.0), 1: (1.0, 1.0), 2: (-5.0, -1.0), 3: (0.0, -1.0), 4: (2.0, -4.0)}
    rows = preference_rows("m", "model", records, {0: 1.0, 1: 0.5, 2: 0.0, 3: 1.0, 4: 1.0}, values)
    shares = {"form": (1.5, 2), "wrong": (2.0, 3), ALL_PAIRS: (3.5, 5)}
    assert [(row.category, row.value, row.low, row.high, row.num_pairs) for row in rows] == [
        (name, total / count, *(wilson_interval(total, count) or ()), count) for name, (total, count) in shares.items()]
    margins = {name: [values[place][0] - values[place][1] for place, record in enumerate(records)
                      if name in (record.category, ALL_PAIRS)] for name in shares}
    assert [row.margin for row in rows] == pytest.approx([float(np.mean(margins[row.category])) for row in rows])
    assert rows[-1].margin_low is not None and rows[-1].margin_low < rows[-1].margin < (rows[-1].margin_high or 0)
    [only] = preference_rows("m", "model", records, {0: 1.0, 2: 0.0}, values)
    assert only.category == ALL_PAIRS and only.value == 0.5, "one category is all pairs"


def test_what_cannot_be_read_is_left_out() -> None:
    tokenizer = tiny_loaded().tokenizer
    records = some_pairs(3)
    records[1] = replace(records[1], chosen="字" * 90)
    records.append(Preference((Message("tool", "?"),), "a", "b", "s", "s:1"))
    assert sorted(encode_pairs(tokenizer, records, limit=96)) == [0, 2]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigError, match="has no chat template"):
            encode_pairs(tokenizer, records, limit=96)
    finally:
        tokenizer.chat_template = template
