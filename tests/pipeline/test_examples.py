"""What a step reads: names in `dataset_dir`, how many rows may be refused, a held-out share that is not kept."""

import json
import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import pytest

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Document, Message
from danlu.pipeline.context import FILES, Input
from danlu.pipeline.examples import DataConfig, split_by_hash
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.stages import kto, ppo, pt, sft
from danlu.text.lines import MAX_REFUSED


@pytest.mark.parametrize("written, folder, read", [
    ("identity", "data", ["data/identity"]), ("identity,zh#3 , en[a:b]", "data/", ["data/identity", "data/zh#3",
                                                                                "data/en[a:b]"]),
    (["a.jsonl", "b/c.jsonl", "task:copy"], "/d", ["/d/a.jsonl", "b/c.jsonl", "task:copy"]),
    (["a,b.jsonl", "c"], "d", ["d/a,b.jsonl", "d/c"]),
    (["docstrings:json,email", "a,b"], None, ["docstrings:json,email", "a,b"]),
    ("task:calc,b.jsonl", None, ["task:calc", "b.jsonl"]), ("task:calc,b.jsonl", "d", ["task:calc", "d/b.jsonl"]),
    ("a, docstrings:json,email", "d", ["d/a", "docstrings:json,email"]),
    ("data/{a,b}.jsonl,c[x,y:z]", None, ["data/{a,b}.jsonl", "c[x,y:z]"]), ("a],b", None, ["a]", "b"]),
    ("a,b", None, ["a", "b"]), ("docstrings:json,email", None, ["docstrings:json,email"]), ("a", None, ["a"])])
def test_names_in_a_folder_and_lists_with_commas(written: str | list[str], folder: str | None, read: list[str]) -> None:
    settings = DataConfig(dataset=written, eval_dataset=written, dataset_dir=folder)
    assert settings.datasets() == settings.eval_datasets() == read
    assert "dataset_dir" not in settings.result_settings()  # a path, which changes no result


def recipe(base: Path, **keys: object) -> Recipe:
    model = {"model_type": "llama"}
    return Recipe.from_dict({"name": "r", "steps": {"base": {"stage": "pt", "model": model, "tokenizer": "tok", **keys}}},
                            base=base)


def test_a_folder_of_datasets_as_llama_factory_has_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "tok").mkdir()
    (tmp_path / "mine" / "dataset_info.json").write_text(json.dumps({"one": {"file_name": "1.jsonl"}, "two": {
        "file_name": "2.jsonl", "columns": {"prompt": "content"}}}))
    (tmp_path / "mine" / "1.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "mine" / "2.jsonl").write_text('{"content": "b"}\n')
    monkeypatch.chdir(tmp_path / "tok")  # the folder is looked for beside the recipe, too
    step = recipe(tmp_path, dataset="one,two", dataset_dir="mine").steps["base"]
    assert [reference.text for reference in step.references][:2] == ["mine/one", "mine/two"]
    context = SimpleNamespace(inputs={text: Input(text, FILES, "f") for text in step.settings.datasets()},
                              settings=step.settings, base=tmp_path)
    texts = [document.text for text in step.settings.datasets()
             for document in pt._documents(context, text, "train", Ledger())]
    assert texts == ["a", "b"]
    with pytest.raises(ConfigError, match=r"“dataset.0” is “mine/oen”[^$]*there is no “oen”; did you mean one\?"):
        recipe(tmp_path, dataset=["oen"], dataset_dir="mine")


def test_how_much_may_be_refused_is_one_setting(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "response": f"a{n}", "label": True} if n % 3 else {"prompt": f"q{n}"} for n in range(1, 31)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(stage: object, *rest: object, **keys: object) -> list:
        settings = stage.Settings(model="m", dataset="a.jsonl", **keys)  # type: ignore[attr-defined]  # one of several stages
        context = SimpleNamespace(inputs={"a.jsonl": Input("a.jsonl", FILES, "f")}, settings=settings, base=tmp_path)
        name = {sft: "_dialogues", kto: "_feedback", ppo: "_prompts"}[stage]
        found = getattr(stage, name)(context, "a.jsonl", Ledger(), "train", *rest)
        return list(found[0] if rest else found)

    for stage, rest in ((sft, ()), (kto, (0.0,))):
        with pytest.raises(DataError, match="10 of 30 rows were refused, more than the 20% allowed"):
            read(stage, *rest)
        assert len(read(stage, *rest, max_refused=0.4)) == 20
        with pytest.raises(DataError, match=r"a.jsonl:3: no answer|a.jsonl:3: no label"):
            read(stage, *rest, max_refused=0)
    assert len(read(ppo, reward_model="j", max_refused=0)) == 30  # prompts need no answers
    assert sft.Settings(model="m", dataset="d").max_refused == MAX_REFUSED


CALLED = Message("assistant", "ok", "hm", ({"name": "f", "arguments": {"x": 1}, "id": "c"},), 0.5)


def test_a_split_that_was_once_made_stays() -> None:
    """What is hashed is a form of its own, which no further field of Message changes; this is that of the first version."""
    one, two = (Message("user", "说 'x' \"y\"\n"), CALLED), (Message("user", "a"),)
    first = ("(Message(role='user', content='说 \\'x\\' \"y\"\\n', thinking='', tool_calls=(), weight=None), "
             "Message(role='assistant', content='ok', thinking='hm', tool_calls=({'name': 'f', 'arguments': {'x': 1}, "
             "'id': 'c'},), weight=0.5))")
    second = "(Message(role='user', content='a', thinking='', tool_calls=(), weight=None),)"
    marked = (replace(one[0], tool_call_id="c"), replace(CALLED, spans=((0, 1, 0.0),)))
    for messages, stated in ((one, first), (two, second), (marked, first)):
        place = int.from_bytes(blake2b(stated.encode(), digest_size=4).digest(), "big") / (1 << 32)
        for share in (place, math.nextafter(place, 1)):
            _, held_out = split_by_hash(lambda book: [Dialogue(messages, "s", "s:1")], share, Ledger())  # noqa: B023  # called before the next share
            assert len(list(held_out)) == (share > place)


def test_what_is_held_out_is_read_again_not_kept() -> None:
    reads: list[Ledger] = []

    def records(book: Ledger) -> Iterator[Document]:
        reads.append(book)
        for number in range(4000):
            book.station("read").take(rows=1)
            book.station("read").give(rows=1)
            yield Document(f"{number} " + "火" * 1000, "s", f"s:{number}")

    ledger = Ledger()
    tracemalloc.start()
    try:
        train, held_out = split_by_hash(records, 0.5, ledger)
        one, other = [{document.id for document in part} for part in (train, held_out)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not one & other and len(one | other) == 4000 and 1800 < len(other) < 2200
    assert peak < 2 << 20, "2,000 documents of 3,000 bytes were kept"
    assert ledger.station("held out").dropped["held out for eval_loss"].rows == len(other)
    assert ledger.station("read").came.rows == 4000 and reads[0] is ledger and reads[1] is not ledger
    ledger.check()


@pytest.mark.parametrize(("dataset", "folder", "said"), [
    ("./texts.jsonl", "mine", "dataset_dir is set, and every dataset is named with a folder of its own"),
    ("docstrings:json", "mine", "dataset_dir is set, and every"),
    ("texts", "dta", "“dataset_dir” is “dta”, which is no folder"),
    ("texts,./texts.jsonl", "~nobody-here/x", "which is no folder")])
def test_a_folder_of_datasets_that_nothing_is_read_from(tmp_path: Path, dataset: str, folder: str, said: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "tok").mkdir()
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=said):
        recipe(tmp_path, dataset=dataset, dataset_dir=folder)
