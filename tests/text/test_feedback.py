"""Single answers and whether they were welcome."""

import json
from pathlib import Path

import pytest

from danlu.core.ledger import Ledger
from danlu.core.records import Feedback, Message
from danlu.text.feedback import read_feedback, to_feedback
from danlu.text.fields import BadRow

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ASKED = (Message("user", "q"),)


@pytest.mark.parametrize("row", [
    {"messages": [U, A], "label": True}, {"prompt": "q", "completion": "a", "label": True},
    {"prompt": [U], "completion": [A], "label": True}, {"completion": [U, A], "label": True},
    {"instruction": "q", "input": "", "output": "a", "kto_tag": True}, {"prompt": "q", "response": "a",
    "desirable": "true"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": "True"}])
def test_every_shape(row: dict) -> None:
    assert to_feedback(row, "f:1", "f", "c") == Feedback(ASKED, "a", True, "f", "f:1", "c")


@pytest.mark.parametrize("label, desirable", [(True, True), (False, False), (1, True), (0, False), (1.0, True), (-1, False),
                                              ("1", True), ("False", False), (" true ", True), ("undesirable", False),
                                              ("1.0", True), ("0.0", False), ("-1.0", False)])
def test_labels(label: object, desirable: bool) -> None:
    assert to_feedback({"prompt": "q", "completion": "a", "label": label}, "", "").desirable is desirable


@pytest.mark.parametrize("row, reason", [
    ({"messages": [U, A]}, "no label"), ({"messages": [U, A], "label": None}, "label that is neither true nor false"),
    ({"messages": [U, A], "label": 2}, "label that is neither true nor false"),
    ({"messages": [U, A], "label": "good"}, "label that is neither true nor false"),
    ({"messages": [U, A], "label": float("nan")}, "label that is neither true nor false"),
    ({"messages": [U, A, U], "label": True}, "the dialogue does not end with an answer"),
    ({"messages": [A], "label": True}, "no prompt"), ({"messages": [U], "label": True}, "no assistant turn"),
    ({"prompt": "q", "label": True}, "no answer"), ({"label": True}, "unknown shape")])
def test_rows_that_are_no_feedback(row: dict, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_feedback(row, "", "")
    assert caught.value.kind == reason


def test_a_file_of_feedback_balances(tmp_path: Path) -> None:
    rows = [{"messages": [U, A], "label": False}, {"messages": [U, A], "label": "?"}, {"prompt": "q", "completion": "好",
        "label": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ledger = Ledger()
    assert [(item.answer, item.desirable, item.num_bytes) for item in read_feedback("a.jsonl", tmp_path, ledger)] == [
        ("a", False, 2), ("好", True, 4)]
    ledger.check()
    assert [item.where for item in ledger.quarantined] == ["a.jsonl:2"]
