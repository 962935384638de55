"""Names of datasets: registries in LLaMA-Factory's form, counts, parts of folders, and what is said where none is meant."""

import json
from pathlib import Path

import pytest

from danlu.core.errors import ConfigError
from danlu.core.ledger import Ledger
from danlu.core.records import Message
from danlu.pipeline.inputs import Contents, outside_input
from danlu.pipeline.recipe import Recipe
from danlu.text.feedback import read_feedback
from danlu.text.formats import read_dialogues
from danlu.text.lines import BEHIND
from danlu.text.preferences import read_preferences, read_prompts
from danlu.text.read import SourceConfig, read_documents
from danlu.text.registry import find, is_dataset, resolve

INFO = {
    "plain": {"file_name": "plain.json"},
    "renamed": {"file_name": "renamed.jsonl", "columns": {"prompt": "q", "query": "more", "response": "a", "system": "s",
                                                          "history": "h"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "turns": {"file_name": "turns.json", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "functions_"},
              "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A",
                       "observation_tag": "O", "function_tag": "F", "system_tag": "S"}},
    "talked": {"file_name": "talked.json", "formatting": "sharegpt", "ranking": True,
               "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
               "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A"}},
    "liked": {"file_name": "liked.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "ok"}},
    "corpus": {"file_name": "corpus.jsonl", "columns": {"prompt": "content"}},
    "few": {"file_name": "plain.json", "num_samples": 2},
    "folder": {"file_name": "parts"},
    "one_part": {"file_name": "parts", "subset": "zh", "split": "test"},
    "script": {"script_url": "loader"}, "elsewhere": {"ms_hub_url": "a/b"}, "cloud": {"cloud_file_name": "s3://x"},
    "nothing": {"columns": {"prompt": "q"}}, "pictures": {"file_name": "plain.json", "columns": {"images": "i"}},
    "wrong_key": {"file_nam": "x"}, "wrong_format": {"file_name": "plain.json", "formatting": "chatml"},
    "wrong_column": {"file_name": "plain.json", "columns": {"promt": "q"}}, "wrong_tag": {"file_name": "x",
    "tags": {"who": "x"}},
    "wrong_number": {"file_name": "plain.json", "num_samples": 0}, "no_object": 3, "missing": {"file_name": "gone.json"},
}
PLAIN = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(5)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "parts" / "zh").mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
    (folder / "plain.json").write_text(json.dumps(PLAIN))
    rows = {
        "renamed.jsonl": {"q": "Q", "more": "M", "a": "A", "s": "S", "h": [["x", "y"]], "instruction": "other", "id": 3},
        "pairs.json": {"q": "Q", "good": "G", "bad": "B", "margin": 2},
        "turns.json": {"talk": [{"who": "S", "says": "s"}, {"who": "U", "says": "q"},
                                {"who": "F", "says": '{"name": "f", "arguments": {}}'}, {"who": "O", "says": "r"},
                                {"who": "A", "says": "a", "weight": 0}], "functions_": '[{"name": "f"}]'},
        "talked.json": {"talk": [{"who": "U", "says": "q"}], "good": {"who": "A", "says": "G"}, "bad": {"who": "A",
        "says": "B"}},
        "liked.json": {"q": "Q", "a": "A", "ok": False},
        "corpus.jsonl": {"content": "words", "text": "not this"},
        "parts/zh/train.jsonl": {"prompt": "zh", "response": "train"}, "parts/zh/test.jsonl": {"prompt": "zh",
        "response": "test"},
    }
    for name, row in rows.items():
        (folder / name).write_text(json.dumps(row))
    return tmp_path


def said(name: str, base: Path, reader=read_dialogues) -> tuple[list, Ledger]:
    ledger = Ledger()
    found = list(reader(name, base, ledger))
    ledger.check()
    return found, ledger


def test_an_entry_with_columns(base: Path) -> None:
    found, ledger = said("renamed", base)
    assert [(message.role, message.content) for message in found[0].messages] == [
        ("system", "S"), ("user", "x"), ("assistant", "y"), ("user", "Q\nM"), ("assistant", "A")]
    assert (found[0].source, found[0].id) == ("renamed.jsonl", "renamed.jsonl:1")
    assert ledger.station("read:renamed").notes == {"read: a, h, more, q, s": 1, "not read: id": 1,
                                                    "not read: instruction": 1}


def test_an_entry_without_columns_is_read_as_its_rows_are(base: Path) -> None:
    assert [dialogue.messages[-1].content for dialogue in said("plain", base)[0]] == ["a0", "a1", "a2", "a3", "a4"]
    assert len(said("data/plain", base)[0]) == 5 == len(said(str(base / "data" / "plain"), base)[0])


def test_entries_of_preferences_feedback_and_corpora(base: Path) -> None:
    pair, ledger = said("pairs", base, read_preferences)
    assert (pair[0].messages, pair[0].chosen, pair[0].rejected) == ((Message("user", "Q"),), "G", "B")
    assert ledger.station("read:pairs").notes == {"read: bad, good, q": 1, "not read: margin": 1}
    prompts, ledger = said("pairs", base, read_prompts)
    assert prompts[0].messages == pair[0].messages
    assert ledger.station("read:pairs").notes == {
        "read: q": 1, **{f"not read: {name}": 1 for name in ("bad", "good", "margin")}}
    talked, _ = said("talked", base, read_preferences)
    assert (talked[0].messages, talked[0].chosen, talked[0].rejected) == ((Message("user", "q"),), "G", "B")
    assert [(item.answer, item.desirable) for item in said("liked", base, read_feedback)[0]] == [("A", False)]
    ledger = Ledger()
    assert [item.text for item in read_documents(SourceConfig(path="corpus"), base, ledger)] == ["words"]
    assert ledger.station("read:corpus").notes == {"read: content": 1, "not read: text": 1}


def test_tags_name_keys_and_roles(base: Path) -> None:
    dialogue = said("turns", base)[0][0]
    assert dialogue.messages == (
        Message("system", "s"), Message("user", "q"), Message("assistant", "", tool_calls=({"name": "f",
            "arguments": {}},)),
        Message("tool", "r"), Message("assistant", "a", weight=0.0))
    assert dialogue.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize("name, count", [("few", 2), ("few#4", 4), ("plain#3", 3), ("data/plain.json#1", 1), ("plain#9",
    5)])
def test_counts(base: Path, name: str, count: int) -> None:
    found, ledger = said(name, base)
    assert [dialogue.messages[0].content for dialogue in found] == [f"q{n}" for n in range(count)]
    assert list(ledger.station(f"read:{name}").notes.values()) == [count, count]
    assert ("fewer records than the 9" in str(ledger.station(f"read:{name}").notes)) == (name == "plain#9")
    ledger = Ledger()
    assert len(list(read_documents(SourceConfig(path="corpus#1"), base, ledger))) == 1
    assert len(said("data/plain.json#2", base, read_prompts)[0]) == 2


def test_a_count_ends_the_reading(base: Path) -> None:
    (base / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PLAIN) + "{broken\n" * 1000)
    found, ledger = said("long.jsonl#5", base)
    assert len(found) == 5 and ledger.station("read:long.jsonl#5").came.rows == 5


CHAT_YAML = "conversations:\n- - hi\n  - hello\n- - who?\n  - me\n  - odd\n- none\n"
STRAY = 'instruction,output\nq0,a0\nq1,"a1\nq2,a2\nq3,a3\nq4,a4\n'


@pytest.mark.parametrize("file, text, count, behind", [
    ("a.yaml", CHAT_YAML, 1, 4), ("a.yaml", CHAT_YAML, 2, 1), ("a.csv", STRAY, 2, 2), ("a.csv", STRAY, 1, 0),
    ("a.csv", STRAY, 4, 0)])
def test_a_count_leaves_no_row_without_a_reason(base: Path, file: str, text: str, count: int, behind: int) -> None:
    (base / file).write_text(text)
    found, ledger = said(f"{file}#{count}", base)
    ledger.check()
    station = ledger.station(f"read:{file}#{count}")
    assert len(found) == count
    assert (station.dropped[BEHIND].rows if behind else BEHIND not in station.dropped) == (behind or True)


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_a_count_of_documents_balances(base: Path, document: str) -> None:
    (base / "a.txt").write_text("one\n\ntwo\nthree\n")
    ledger = Ledger()
    found = list(read_documents(SourceConfig(path="a.txt#1", document=document), base, ledger))
    assert len(found) == 1 and found[0].text.startswith("one")
    ledger.check()


@pytest.mark.parametrize("row, source", [
    ({"一": "one", "二": ["two", "two"], "三": "three", "四": "four"}, {}),
    ({"data": [{"t": "one"}, {"t": "two\ntwo"}, {"t": "three"}, {"t": "four"}]}, {"field": "data[].t"})])
def test_a_count_of_texts_inside_a_row_balances(base: Path, row: dict, source: dict) -> None:
    (base / "a.json").write_text(json.dumps(row))
    ledger = Ledger()
    found = list(read_documents(SourceConfig(path="a.json#2", **source), base, ledger))
    station = ledger.station("read:a.json#2")
    assert [document.text for document in found] == ["one", "two\ntwo"]
    assert station.went.rows == 2 and station.went.bytes == 10 and station.dropped[BEHIND].rows == 2
    assert station.dropped[BEHIND].bytes == 9
    ledger.check()


def test_a_count_of_a_package(package: Path) -> None:
    (package / "data" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
    assert len(said("package:tinypackage/data/a.jsonl#2", Path())[0]) == 2
    with pytest.raises(ConfigError, match=r"nothing is found at “package:tinypackage/gone.jsonl”"):
        find("package:tinypackage/gone.jsonl#2", Path())


def test_files_come_before_names(base: Path) -> None:
    (base / "plain").write_text("x")
    (base / "a#1.jsonl").write_text(json.dumps(PLAIN[0]))
    with pytest.raises(ConfigError, match="not a file of dialogues"):
        said("plain", base)
    assert len(said("a#1.jsonl", base)[0]) == 1


def test_parts_of_a_registered_folder(base: Path) -> None:
    assert [dialogue.messages[-1].content for dialogue in said("folder", base)[0]] == ["test", "train"]
    assert [dialogue.messages[-1].content for dialogue in said("one_part", base)[0]] == ["test"]
    assert [dialogue.messages[-1].content for dialogue in said("one_part[zh:train]", base)[0]] == ["train"]
    assert [dialogue.messages[-1].content for dialogue in said("data/parts[zh]", base)[0]] == ["train"]


def test_what_is_hashed_for_a_name(base: Path) -> None:
    folder = base / "data"
    assert resolve("plain#2", base) == sorted([folder / "plain.json", folder / "dataset_info.json"])
    assert resolve("data/plain.json", base) == [folder / "plain.json"]
    assert resolve("data/parts[zh]", base) == [folder / "parts" / "zh" / "train.jsonl"]


@pytest.mark.parametrize("name, reason", [
    ("script", "is made by a script, and code that comes with data is never run"), ("elsewhere",
    "lies on a hub that danlu"),
    ("cloud", "cloud storage"), ("nothing", "has no file_name"), ("pictures", "has images, which danlu does not read"),
    ("wrong_key", "unknown key “file_nam”\n  Did you mean file_name?"), ("wrong_format", "unknown formatting “chatml”"),
    ("wrong_column", "“columns” names “promt”"), ("wrong_tag", "“tags” names “who”"), ("no_object", "is no object"),
    ("wrong_number", "“num_samples” is no number above 0"), ("missing", "nothing is found at"),
    ("plain#0", "asks for no records"), ("plian", "did you mean plain"), ("data/plain.json[zh]", "is no folder"),
    ("data/parts[en]", "has no subset “en”\n  Folders with data files: zh."),
    ("data/parts[zh:tset]", "has no split “tset” in the subset “zh”\n  Did you mean test?"), ("data/gone.jsonl#3",
    "nothing is found"),
    ("data/gone", "nothing is found")])
def test_names_that_cannot_be_meant(base: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name, base)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text, reason", [("{", "is no JSON"), ("[]", "is no registry"), ("\xff", "is not UTF-8 text")])
def test_a_registry_that_cannot_be_read(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "dataset_info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=reason):
        find("plain", tmp_path)


def test_a_path_in_a_registry_may_lie_elsewhere(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(PLAIN))
    (base / "dataset_info.json").write_text(json.dumps({"abs": {"file_name": str(other)}}))
    assert len(said("abs", base)[0]) == 5


def test_what_a_recipe_may_name(base: Path) -> None:
    for name, expected in (("plain", True), ("plain#3", True), ("data/plain", True), ("data/plain.json#2", True),
                           ("folder[zh]", True), ("data/parts[zh:test]#1", True), ("owner/gone", True),
                           ("owner/gone[zh]#5", True), ("script", True), ("plian", False), ("data/gone.jsonl", False),
                           ("gone[zh]", False)):
        assert is_dataset(name, base) is expected, name


def test_a_recipe_reads_names_and_its_fingerprint_knows_the_entry(base: Path) -> None:
    def named(text: str) -> tuple[str, set[str]]:
        recipe = Recipe.from_dict({"name": "x", "steps": {"c": {"stage": "corpus", "sources": [{"path": text}]}}},
            base=base)
        step = recipe.step("c")
        found, hashes = outside_input(recipe, step, step.references[0], Contents())
        return found.fingerprint, set(hashes)

    before, files = named("corpus")
    assert files == {"corpus.jsonl", "dataset_info.json"} and named("corpus") == (before, files)
    info = {**INFO, "corpus": {"file_name": "corpus.jsonl", "columns": {"prompt": "text"}}}
    (base / "data" / "dataset_info.json").write_text(json.dumps(info))
    assert named("corpus")[0] != before
    with pytest.raises(ConfigError, match="neither an earlier step nor a file"):
        named("corpsu")
    with pytest.raises(ConfigError, match="code that comes with data is never run"):
        named("script")
