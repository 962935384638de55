"""What all readers of rows have in common: whatever stands in a file, every row is a record or refused with its place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.ledger import Ledger
from danlu.text.feedback import read_feedback
from danlu.text.formats import read_dialogues
from danlu.text.labelled import read_labelled
from danlu.text.preferences import read_preferences, read_prompts
from danlu.text.rankings import read_rankings

READERS = {"dialogues": read_dialogues, "preferences": read_preferences, "prompts": read_prompts, "rankings": read_rankings,
           "feedback": read_feedback, "labelled": read_labelled}
CALL = '{"name": "f", "arguments": {}}'
TEXT = st.sampled_from(["", " ", "a", "b", "1", "true", CALL, "[]", "[1]", '[{"role": "user", "content": "a"}]',
                        "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: c"])
SIMPLE = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), TEXT)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "function_call"]),
    "content": TEXT},
                             optional={"weight": SIMPLE, "mask": SIMPLE, "tool_calls": SIMPLE, "thinking": SIMPLE,
                                 "x": SIMPLE})
VALUE = st.recursive(st.one_of(SIMPLE, TURN), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["name", "score", "text", "rank", "type"]), inner,
        max_size=2)),
    max_leaves=6)
KEYS = ["prompt", "query", "instruction", "input", "question", "context", "problem", "source", "target", "messages",
        "conversations", "chosen", "rejected", "response", "responses", "answers", "output", "completion", "answer",
        "history",
        "system", "tools", "label", "kto_tag", "text", "sentence1", "sentence2", "score", "scores", "ranks", "margin",
        "output_1",
        "output_2", "preference", "reward_model", "category", "thinking", "golden"]
ROW = st.one_of(st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6),
                st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}, optional={"label": SIMPLE, "tools": VALUE}),
                st.fixed_dictionaries({"prompt": TEXT}, optional={"responses": VALUE, "scores": VALUE, "response": VALUE,
                                                                  "label": SIMPLE, "completion": VALUE}))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROW, max_size=6))
def test_any_row_is_a_record_or_is_refused_and_the_ledger_balances(tmp_path_factory, name: str, rows: list[dict]) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ledger = Ledger()
    found = list(READERS[name]("rows.jsonl", folder, ledger))
    ledger.check()
    assert len(found) + len(ledger.quarantined) == len(rows)
    assert sorted([item.id for item in found] + [item.where for item in ledger.quarantined]) == [
        f"rows.jsonl:{number}" for number in range(1, len(rows) + 1)]
    assert ledger.station("read:rows.jsonl").went.bytes == sum(item.num_bytes for item in found)
    json.dumps(ledger.to_json())
    if name == "rankings":
        assert all(len({answer.strip() for answer in item.answers}) == len(item.answers) >= 2 for item in found)
