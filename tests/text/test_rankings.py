"""Ranked answers: rows to Rankings, Rankings to pairs."""

import json
from pathlib import Path

import pytest

from danlu.core.ledger import Ledger
from danlu.core.records import Message
from danlu.text.fields import BadRow, Row
from danlu.text.rankings import read_rankings, to_ranking

Q = {"prompt": "q"}


def order(row: dict) -> tuple[str, ...]:
    found = to_ranking(row, "a:1", "a")
    assert found.messages == (Message("user", "q"),)
    return found.answers


@pytest.mark.parametrize("row", [
    {"responses": ["x", "y", "z"]}, {"response": ["x", "y", "z"]}, {"output": ["x", "y", "z"]}, {"answers": ["x", "y",
    "z"]},
    {"responses": json.dumps(["x", "y", "z"])},
    {"responses": ["z", "x", "y"], "scores": [0, 2.5, 1]},
    {"responses": ["z", "x", "y"], "ranks": [3, 1, 2]},
    {"responses": ["z", "x", "y"], "ratings": ["1", "5", "3"]},
    {"answers": [{"answer": "y", "rank": 2}, {"answer": "x", "rank": 1}, {"answer": "z", "rank": 7}]},
    {"completions": [{"response": "y", "overall_score": 2}, {"response": "x", "overall_score": 8.5},
                     {"response": "z", "overall_score": 1}]},
    {"responses": [{"content": "x"}, {"content": "y"}, {"content": "z"}]},
])
def test_three_answers_from_the_best_to_the_worst(row: dict) -> None:
    assert order({**Q, **row}) == ("x", "y", "z")


def test_a_preference_is_a_ranking_of_two() -> None:
    assert order({**Q, "chosen": "x", "rejected": "y"}) == ("x", "y")
    row = {"instruction": "q", "output_1": "y", "output_2": "x", "preference": 2}
    assert order(row) == ("x", "y")


def test_answers_as_good_as_another_are_left_out_and_named() -> None:
    row = Row({**Q, "responses": ["a", "b", "c", "d"], "scores": [1, 2, 1, 3]})
    assert order(row) == ("d", "b", "a")
    assert row.unread() == ["responses[]: answers as good as another"]
    assert order({**Q, "responses": ["a", "a ", "c"]}) == ("a", "c")


@pytest.mark.parametrize("row, reason", [
    ({"responses": ["a"]}, "only one answer"), ({"response": "a"}, "only one answer"), ({}, "only one answer"),
    ({"responses": ["a", "a"]}, "only one answer"), ({"responses": ["a", "b"], "scores": [1, 1]}, "only one answer"),
    ({"responses": ["a", ""]}, "empty answer"), ({"responses": ["a", None]}, "empty answer"),
    ({"responses": ["a", 3]}, "wrong type"), ({"responses": ["a", "b"], "scores": [1]},
    "another number of scores than answers"),
    ({"responses": ["a", "b"], "scores": [1, "x"]}, "wrong type"),
    ({"responses": ["a", "b"], "scores": [1, None]}, "score that is no number"),
    ({"responses": ["a", "b"], "scores": [1, float("nan")]}, "score that is no number"),
    ({"responses": [{"text": "a", "score": 1}, {"text": "b"}]}, "another number of scores than answers"),
])
def test_rows_that_are_no_rankings(row: dict, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_ranking({**Q, **row}, "", "")
    assert caught.value.kind == reason
    with pytest.raises(BadRow, match="unknown shape"):
        to_ranking({"responses": ["a", "b"]}, "", "")


def test_rankings_of_a_file_balance(tmp_path: Path) -> None:
    rows = [{**Q, "responses": ["好", "b", "c"]}, {**Q, "responses": ["a"]}, {**Q, "chosen": "x", "rejected": "y", "id": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ledger = Ledger()
    found = [(ranking.answers, ranking.id) for ranking in read_rankings("a.jsonl", tmp_path, ledger)]
    assert found == [(("好", "b", "c"), "a.jsonl:1"), (("x", "y"), "a.jsonl:3")]
    ledger.check()
    assert ledger.station("read:a.jsonl").notes["not read: id"] == 1
    assert ledger.quarantined[0].where == "a.jsonl:2"
