"""Questions from rows of files in the shapes in which such sets are had."""

import json
from pathlib import Path
from typing import Any

import pytest

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.evals.choices import Item, read_items, subject_of, to_item
from danlu.text.fields import BadRow


def item(row: dict[str, Any], answers: Any = None) -> Item:
    return to_item(row, "a.jsonl:1", "a", answers)


ASKED = "Question: Which is warm?\nAnswer:"
LETTERED = "Which is warm?\nA. ice\nB. fire\nAnswer:"


@pytest.mark.parametrize(("row", "contexts", "continuations", "gold"), [
    ({"query": "The man ran, therefore", "choices": ["he slept.", "he was tired."], "gold": 1},
     ("The man ran, therefore",), (" he slept.", " he was tired."), 1),
    ({"query": "Question: Which is warm?", "choices": ["ice", "fire"], "gold": 1}, (ASKED,), (" ice", " fire"), 1),
    ({"query": "Question: Which is warm?\n", "choices": ["ice", "fire"], "gold": 1}, (ASKED,), (" ice", " fire"), 1),
    ({"question": "Which is warm?", "A": "ice", "B": "fire", "answer": "B"}, (LETTERED,), (" A", " B"), 1),
    ({"": "7", "Question": "哪个暖？", "A": "冰", "B": "火", "Answer": "B"},
     ("哪个暖？\nA. 冰\nB. 火\n答案：",), ("A", "B"), 1),
    ({"passage": "Fire burns.", "question": "Which is warm?", "options": ["(A)ice", "(B)fire"], "label": "B",
      "answer": None}, ("Fire burns.\n" + LETTERED,), (" A", " B"), 1),
    ({"question": "Q: (A) ice (B) fire\nA: the answer is", "options": ["A", "B"], "label": ["B"]},
     ("Q: (A) ice (B) fire\nA: the answer is",), (" A", " B"), 1),
    ({"question": {"stem": "Fire is", "choices": [{"text": "cold", "label": "1"}, {"text": "warm", "label": "2"}]},
      "answerKey": "2"}, ("Fire is",), (" cold", " warm"), 1),
    ({"question": "Fire is", "choices": {"text": ["cold", "warm"], "label": ["A", "B"]}, "answerKey": "B"},
     ("Fire is",), (" cold", " warm"), 1),
    ({"ctx": "A man sits", "endings": ["and eats.", "and flies."], "label": "0"}, ("A man sits",),
     (" and eats.", " and flies."), 0),
    ({"question": "Legs of a spider?", "choices": ["6", "8", "10"], "answer": "8"}, ("Legs of a spider?",),
     (" 6", " 8", " 10"), 1),
    ({"question": "How much is 1 + 1?", "choices": ["1", "2", "3"], "label": 1}, ("How much is 1 + 1?",),
     (" 1", " 2", " 3"), 1),
    ({"question": "How much is 1 + 1?", "choices": ["2", "3", "1"], "answer": 0}, ("How much is 1 + 1?",),
     (" 2", " 3", " 1"), 0),  # a whole number beside texts is a place
    ({"question": "A. B. 问：哪个暖？（ 　　） \nA．冰   \nB．火C．水\n", "answer": ["B"]},
     ("A. B. 问：哪个暖？（ 　　）\nA. 冰\nB. 火\nC. 水\n答案：",), ("A", "B", "C"), 1),
    ({"question": "Which is warm, says U.S.A.? (A) ice (B) fire", "answer": "A"},
     ("Which is warm, says U.S.A.?\nA. ice\nB. fire\nAnswer:",), (" A", " B"), 0),
    ({"goal": "Light a fire", "sol1": "with ice", "sol2": "with wood", "label": 1}, ("Light a fire",),
     (" with ice", " with wood"), 1),
    ({"context_options": ["Ann called Bo, so Ann ", "Ann called Bo, so Bo"], "continuation": "was called.", "gold": 1},
     ("Ann called Bo, so Ann", "Ann called Bo, so Bo"), (" was called.",), 1),
    ({"sentence": "The cup did not fit the box as the _ was small.", "option1": "cup", "option2": "box", "answer": "2"},
     ("The cup did not fit the box as the cup", "The cup did not fit the box as the box"), (" was small.",), 1),
])
def test_shapes(row: dict[str, Any], contexts: tuple[str, ...], continuations: tuple[str, ...], gold: int) -> None:
    found = item(row)
    assert (found.contexts, found.continuations, found.gold, found.cloze) == (contexts, continuations, gold, False)


def test_clozes() -> None:
    found = item({"context": "I do not care about ", "continuation": "signs"})
    assert (found.contexts, found.continuations, found.cloze) == (("I do not care about",), (" signs",), True)
    assert item({"context": "春眠不觉", "continuation": "晓"}).continuations == ("晓",), "no blank after a wide character"
    for context, continuation, blank in (("他说：“你好。”", "她笑了", ""), ("他说：“你好……", "She left", ""),
                                         ("一共有 3", "个", ""), ("第（一）", "章", ""), ("“Yes.”", "she said", " "),
                                         ("Wait —", "no", " ")):
        assert item({"context": context, "continuation": continuation}).continuations == (blank + continuation,)
    last = item({"text": "He put it into his pocket\n"})
    assert (last.contexts, last.continuations, last.cloze) == (("He put it into his",), (" pocket",), True)


def test_letters_or_texts_as_the_recipe_says() -> None:
    row = {"question": "Which is warm?", "A": "ice", "B": "fire", "answer": "B"}
    assert item(row, "text").contexts == (ASKED,) and item(row, "text").continuations == (" ice", " fire")
    plain = {"query": "Which is warm?", "choices": ["ice", "fire"], "gold": 1}
    assert item(plain, "letter").contexts == (LETTERED,) and item(plain, "letter").solved == LETTERED + " B"


@pytest.mark.parametrize(("row", "reason"), [
    ({"prompt": "x"}, "unknown shape"),
    ({"query": "x", "choices": ["a"], "gold": 0}, "fewer than two answers"),
    ({"query": "x", "choices": ["a", "b"]}, "no right answer"),
    ({"query": "x", "choices": ["a", "b"], "gold": 2}, "right answer unknown"),
    ({"query": "x", "choices": ["a", "b"], "gold": True}, "wrong type"),
    ({"query": "x", "choices": ["a", ""], "gold": 0}, "empty text"),
    ({"query": "x", "choices": "ab", "gold": 0}, "wrong type"),
    ({"query": "x", "choices": ["a", "b"], "gold": "c d"}, "right answer unknown"),
    ({"query": "x", "choices": ["1", "2", "3"], "answer": "2"}, "right answer ambiguous"),  # “3”, or “2”?
    ({"query": "x", "choices": [3, 2, 4], "answer": 2}, "right answer ambiguous"),
    ({"query": "x", "choices": ["B", "A"], "answer": "A"}, "right answer ambiguous"),
    ({"query": "x", "options": ["a", "b"], "label": ["A", "B"]}, "not one right answer"),
    ({"query": " ", "choices": ["a", "b"], "gold": 0}, "empty text"),
    ({"question": "Which? A. ice D. fire", "answer": "A"}, "unknown shape"),
    ({"question": "Which? A. ice B. fire D. water", "answer": "D"}, "right answer unknown"),
    ({"text": "word"}, "one word only"),
    ({"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}, "no gap"),
])
def test_rows_that_are_no_questions(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        item(row)
    assert caught.value.kind == reason


def test_mmlu_without_column_names_with_lines_inside_cells(tmp_path: Path) -> None:
    (tmp_path / "algebra_test.csv").write_text('"How much is 1 + 1?\nSay it.",0,1,"0,1",2,D\r\nWhat is x?,1,1,1,1,A\n')
    ledger = Ledger()
    items = read_items("algebra_test.csv", tmp_path, ledger)
    ledger.check()
    assert [found.id for found in items] == ["algebra_test.csv:1", "algebra_test.csv:3"]
    assert items[0].contexts[0] == "How much is 1 + 1?\nSay it.\nA. 0\nB. 1\nC. 0,1\nD. 2\nAnswer:"
    assert items[0].gold == 3 and items[1].num_choices == 4 and items[0].subject == "algebra"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_a_quote_that_is_never_closed_costs_its_own_line(tmp_path: Path, encoding: str) -> None:
    text = '什么是水？,甲方负责,乙方,双方,A\n"什么是火？,甲方,乙方,双方,B\n什么,A\n'
    text += "什么是土？,甲方,乙方,双方,C\n" * 9000
    (tmp_path / "law.csv").write_text(text, encoding)
    ledger = Ledger()
    items = read_items("law.csv", tmp_path, ledger)
    ledger.check()
    assert len(items) == 9001 and items[0].contexts[0].startswith("什么是水？\nA. 甲方负责") and items[-1].gold == 2
    assert [(bad.where, bad.reason.split(":")[0]) for bad in ledger.quarantined] == [
        ("law.csv:2", "bad CSV"), ("law.csv:3", "2 cells in a row")]


def test_files_in_folders_and_bad_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "law.csv").write_text(",Question,A,B,Answer\n0,问？,甲,乙,A\n1,问？,甲,乙,Z\n", "utf-8")
    row = {"query": "q", "choices": ["a", "b"], "gold": 0, "more": 1}
    (tmp_path / "dev" / "b.jsonl").write_text(json.dumps(row) + "\n[]\n")
    ledger = Ledger()
    items = read_items("dev", tmp_path, ledger)
    ledger.check()
    assert [(found.subject, found.id) for found in items] == [("b", "dev/b.jsonl:1"), ("law", "dev/law.csv:2")]
    assert {quarantined.where for quarantined in ledger.quarantined} == {"dev/b.jsonl:2", "dev/law.csv:3"}
    [station] = ledger.to_json()["stations"]
    unread = {note: count for note, count in station["notes"].items() if note.startswith("not read")}
    assert unread == {"not read: more": 1, "not read: ": 1} and station["out"]["rows"] == 2


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_that_is_one_object_with_a_list_of_questions(tmp_path: Path, indent: int | None) -> None:
    rows = [{"question": f"哪个暖？A．冰 B．火{number}", "answer": ["B"]} for number in range(9)] + [{"question": "？"}, 7]
    (tmp_path / "law.json").write_text(json.dumps({"keywords": "law", "example": rows}, indent=indent), "utf-8")
    ledger = Ledger()
    items = read_items("law.json", tmp_path, ledger)
    ledger.check()
    assert [(found.subject, found.id) for found in items] == [
        ("law", f"law.json:1 (example[{number}])") for number in range(9)]
    assert [(bad.where, bad.reason.partition(":")[0]) for bad in ledger.quarantined] == [
        ("law.json:1 (example[9])", "unknown shape"), ("law.json:1 (example[10])", "not an object but a number")]
    [station] = ledger.to_json()["stations"]
    assert station["in"] == {"rows": 1, "bytes": (tmp_path / "law.json").stat().st_size, "tokens": 0}
    assert station["out"]["rows"] == 9 and station["added"]["questions in one object"]["rows"] == 10


def test_a_file_that_is_one_question_with_a_list_beside_it(tmp_path: Path) -> None:
    row = {"context": "I do not care about", "continuation": "signs", "notes": [{"by": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    [found] = read_items("a.json", tmp_path, Ledger())
    assert found.cloze and found.continuations == (" signs",)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: holds no question .*unknown shape: keys found: prompt"):
        read_items("a.jsonl", tmp_path, Ledger())


def test_subjects() -> None:
    names = ("mmlu/abstract_algebra_test.csv", "x/law.jsonl.gz", "a-dev.csv", "attest.csv", "test.csv",
             "anatomy/test-00000-of-00001.parquet", "all/law_dev-00001-of-00002.parquet")
    assert [subject_of(name) for name in names] == ["abstract_algebra", "law", "a", "attest", "test", "anatomy", "law"]


def test_the_subject_that_a_row_names(tmp_path: Path) -> None:
    rows = [{"question": "x", "choices": ["a", "b"], "answer": 0, "subject": subject} for subject in ("law", " ", 3)]
    (tmp_path / "all-test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [found.subject for found in read_items("all-test.jsonl", tmp_path, Ledger())] == ["law", "all", "all"]
