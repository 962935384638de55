"""The stage `eval` from its inputs to the report that people open."""

import io
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_chat import TEXTS, make_folder

from danlu.core.artifact import Artifact, fresh_folder, open_artifact, publish
from danlu.core.config import read_config
from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Document
from danlu.evals.perplexity import bits_per_byte
from danlu.pipeline import texts as texts_module
from danlu.pipeline.benchmarks import Quiz
from danlu.pipeline.context import Context, Input, SingleProcess
from danlu.pipeline.stages import eval as stage
from danlu.pipeline.texts import Reading
from danlu.text.corpus import CorpusWriter, Row, shard_path


def settings(**values: Any) -> stage.Settings:
    return read_config(stage.Settings, {"models": ["base", "chat"], **values}, lambda path: "recipe.yaml:1")


def make_artifact(place: Path, kind: str, parents: dict[str, str], **chosen: int) -> Artifact:
    mark = (place.name.encode().hex() + "0" * 64)[:64]
    publish(place / ".work", place / mark[:8], kind=kind, fingerprint=mark, parents=parents,
            config={"settings": chosen}, metrics={"n": 1}, code="test")
    return open_artifact(place / mark[:8])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    run = tmp_path_factory.mktemp("runs") / "quick"
    work = fresh_folder(run / "corpus" / ".work")
    for split, count in (("train", 30), ("heldout", 6)):
        with CorpusWriter(shard_path(work, split, 0)) as writer:
            for number in range(count):
                writer.write(Row(Document(f"{TEXTS[number % 2]} {split} {number}", "s", f"{split}:{number}",
                                          "en" if number % 2 else "zh")))
    artifacts = {"corpus": make_artifact(run / "corpus", "corpus", {})}
    for number, name in enumerate(("base", "chat")):
        work = make_folder(fresh_folder(run / name / ".work"), seed=number)
        (work / "trainer_log.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.0}\n')
        artifacts[name] = make_artifact(run / name, "model", {"corpus": artifacts["corpus"].fingerprint},
                                        cutoff_len=(200, 24)[number])
    return {name: Input(name, "step", artifact.fingerprint, artifact.kind, artifact.folder, artifact)
            for name, artifact in artifacts.items()}


class Held:
    """A document that can be watched."""

    def __init__(self, document: Document) -> None:
        self.id, self.text, self.source, self.category = document.id, document.text, document.source, document.category


def context(inputs: dict[str, Input], chosen: stage.Settings, output: io.StringIO | None = None) -> Context:
    run = inputs["corpus"].require_folder().parent.parent
    return Context("report", chosen, 0, inputs, fresh_folder(run / "report" / ".work-abcdabcd"), "abcdabcd" * 8, run,
                   SingleProcess(), Console(file=output or io.StringIO(), width=140))


def test_a_report_from_end_to_end(inputs: dict[str, Input]) -> None:
    output = io.StringIO()
    chosen = settings(corpus="corpus", tasks=["task:copy", "task:skills"], num_prompts=6, max_new_tokens=4, samples=3,
                      prompts=["你是谁？"], beginnings=["The fox"], max_bytes=1000)
    metrics = stage.run(context(inputs, chosen, output))
    work = inputs["corpus"].require_folder().parent.parent / "report" / ".work-abcdabcd"
    report = json.loads((work / "report.json").read_text("utf-8"))
    systems = {"base", "chat", "n-gram", "xz -9", "gzip -9"}
    assert {(row["category"], row["system"]) for row in report["bits"]} == {
        (category, system) for category in ("en", "zh") for system in systems}
    for row in report["bits"]:
        assert row["num_documents"] == 3 and 0 < row["value"] < 30
        assert metrics[f"bits_per_byte/{row['category']}/{row['system']}"] == row["value"]
    sizes = {row["category"]: {other["num_bytes"] for other in report["bits"] if other["category"] == row["category"]}
             for row in report["bits"]}
    assert all(len(size) == 1 for size in sizes.values()), "every system is measured on the same bytes"
    assert {row["model"] for row in report["skills"]} == {"base", "chat"}
    assert sum(row["num_prompts"] for row in report["skills"] if row["model"] == "chat"
               and row["task"] != "all tasks") <= 12
    assert len(report["samples"]) == 3 and [answer["model"] for answer in report["samples"][0]["answers"]] == ["base",
                                                                                                              "chat"]
    assert report["free"][0]["prompt"] == "你是谁？" and report["free"][0]["answers"][1]["right"] is None
    [continued] = report["continued"]
    assert continued["prompt"] == "The fox" and [answer["model"] for answer in continued["answers"]] == ["base", "chat"]
    assert "Continuations" in (work / "report.html").read_text("utf-8")
    assert [step["step"] for step in report["lineage"]] == ["corpus", "base", "chat"]
    assert [curve["values"] for curve in report["curves"]] == [[5.5, 5.0]] * 2
    assert report["title"] == "quick · report" and [model["context"] for model in report["models"]] == [24, 24]
    assert "bits per byte of held-out text" in output.getvalue() and "n-gram" in output.getvalue()


def test_the_window_is_the_recipe_s_or_the_model_s(inputs: dict[str, Input]) -> None:
    for cutoff_len, expected in ((40, 40), (500, 96)):
        running = context(inputs, settings(models=["base"], corpus="corpus", cutoff_len=cutoff_len, ngram_max_bytes=0))
        stage.run(running)
        assert json.loads((running.work / "report.json").read_text())["models"][0]["context"] == expected


def test_the_same_run_gives_the_same_bytes(inputs: dict[str, Input]) -> None:
    chosen = settings(corpus="corpus", tasks=["task:copy"], num_prompts=4, max_new_tokens=4)
    made = []
    for _ in range(2):
        made_in = context(inputs, chosen)
        stage.run(made_in)
        made.append({path.name: path.read_bytes() for path in made_in.work.iterdir()})
    assert made[0] == made[1]


def test_the_newest_report_lies_where_people_look(inputs: dict[str, Input]) -> None:
    running = context(inputs, settings(corpus="corpus"))
    stage.run(running)
    place = running.work.parent
    (place / "exact_match.png").write_bytes(b"of an older report")
    publish(running.work, place / "abcdabcd", kind="report", fingerprint="abcdabcd" * 8, parents={}, config={},
            metrics={}, code="test")
    artifact = open_artifact(place / "abcdabcd", deep=True)
    stage.published(artifact, running.console)
    assert (place / "report.html").read_bytes() == (artifact.folder / "report.html").read_bytes()
    assert (place / "bits_per_byte.png").exists() and not (place / "exact_match.png").exists()


def test_only_what_is_asked_for(inputs: dict[str, Input]) -> None:
    metrics = stage.run(context(inputs, settings(models=["chat"], prompts=["hi"], max_new_tokens=3)))
    assert metrics == {}
    quick = settings(models=["chat"], corpus="corpus", ngram_max_bytes=0)
    assert set(stage.run(context(inputs, quick))) == {f"bits_per_byte/{category}/{system}" for category in ("en", "zh")
                                                      for system in ("chat", "xz -9", "gzip -9")}
    little = context(inputs, settings(models=["chat"], corpus="corpus", ngram_max_bytes=300))
    stage.run(little)
    [note] = json.loads((little.work / "report.json").read_text())["notes"]
    assert note.startswith("the n-gram model learned from ") and "bytes of training text" in note


def test_prompts_that_do_not_fit_and_missing_templates_are_told(inputs: dict[str, Input], tmp_path: Path) -> None:
    cramped = context(inputs, settings(models=["chat"], tasks=["task:copy"], num_prompts=3, max_new_tokens=90,
                                       prompts=["字" * 40, "好" * 40]))
    stage.run(cramped)
    report = json.loads((cramped.work / "report.json").read_text())
    assert report["notes"] == [
        f"chat: {what} left no room for an answer of 90 tokens (or were refused by the chat template) and {so}"
        for what, so in (("3 prompts of tasks", "count as wrong"), ("2 free prompts", "were not asked"))]
    assert report["skills"][0]["value"] == 0 and report["skills"][0]["num_prompts"] == 3
    assert [sample["answers"][0]["text"] for sample in report["free"]] == ["", ""]
    folder = make_folder(tmp_path / "mute")
    (folder / "chat_template.jinja").unlink()
    mute = Input(str(folder), "files", "ff" * 32, folder=folder)
    silent = context(inputs | {str(folder): mute}, settings(models=[str(folder)], tasks=["task:copy"], num_prompts=3,
                                                            corpus="corpus"))
    metrics = stage.run(silent)
    report = json.loads((silent.work / "report.json").read_text())
    assert any("was asked nothing" in note for note in report["notes"]) and report["skills"] == []
    assert "bits_per_byte/zh/mute" in metrics, "the model is called by the last part of its path"


def test_compressors_are_measured_on_the_bytes_that_are_shown(inputs: dict[str, Input]) -> None:
    from danlu.evals.baselines import gzip_bits

    texts = {"zh": [Document("春" * 5, "s", "1"), Document("夏" * 5, "s", "2")]}
    notes: list[str] = []
    rows = {row.system: row for row in texts_module.baselines(
        context(inputs, settings(corpus="corpus", ngram_max_bytes=0)), texts, notes)}
    assert rows["gzip -9"].num_bytes == 30
    assert rows["gzip -9"].value * 30 == pytest.approx(gzip_bits("\n".join(["春" * 5, "夏" * 5]).encode()))


@pytest.mark.parametrize("max_bytes", [40, 300, 1000, 10 ** 6])
def test_the_n_gram_s_text_is_chosen_without_holding_the_corpus(inputs: dict[str, Input], max_bytes: int,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from danlu.evals.perplexity import choose_documents
    from danlu.text import corpus as corpus_module

    folder = inputs["corpus"].require_folder()
    expected, _ = choose_documents(lambda: (replace(document, category="one") for document in
                                            corpus_module.read_corpus(folder, "train")), max_bytes)
    most = watched(corpus_module, "read_corpus", monkeypatch)
    chosen = texts_module.training_text(context(inputs, settings(corpus="corpus", ngram_max_bytes=max_bytes)), [])
    assert chosen == [document.text.encode() for document in expected["one"]]
    assert most() <= 2, "documents are let go of as the corpus is read"


def watched(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Has a function that reads documents give ones that are watched; tells how many there were at once."""
    original, most = getattr(module, name), 0
    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def counted(*arguments: Any) -> Iterator[Held]:
        nonlocal most
        for document in original(*arguments):
            held = Held(document)
            alive.add(held)
            most = max(most, len(alive))
            yield held

    monkeypatch.setattr(module, name, counted)
    return lambda: most


def test_files_outside_are_chosen_from_without_being_held(inputs: dict[str, Input], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"Line {number:03} of many." for number in range(400)]
    (tmp_path / "own.txt").write_text("\n".join(lines))
    most = watched(texts_module, "read_documents", monkeypatch)
    notes: list[str] = []
    chosen = settings(texts=[{"path": "own.txt", "document": "line", "category": category} for category in ("a", "b")],
                      max_bytes=1000)
    read = Reading(replace(context(inputs, chosen), base=tmp_path), {}, notes).texts
    assert list(read) == ["a", "b"] and [len(documents) for documents in read.values()] == [58, 58]
    assert all(document.text in lines for documents in read.values() for document in documents)
    assert notes == ["399 bytes of own.txt are not scored: line end after the text"] * 2 + [
        f"986 of the 6,800 bytes of {category} are scored (max_bytes)" for category in ("a", "b")]
    assert most() <= 2, "documents are let go of as the files are read"


def test_files_outside_and_questions(inputs: dict[str, Input], tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(("\r\n".join(TEXTS * 3) + "\n\n").encode())
    (tmp_path / "long.txt").write_text("The quick brown fox. " * 70)
    (tmp_path / "law_dev.csv").write_text("Question,A,B,Answer\nIs it?,yes,no,A\nWas it?,yes,no,B\n")
    (tmp_path / "law_test.csv").write_text("Question,A,B,Answer\nIs it?,yes,no,A\nWill it?,yes,no,B\nWhy?,it,so,C\n")
    rows = [{"query": f"The fox jumps over {number}", "choices": [" a dog", "a cat"], "gold": number % 2}
            for number in range(9)]
    (tmp_path / "fox.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"path": "own.txt", "category": "own"}, {"path": "long.txt", "category": "own"}]
    chosen = settings(texts=texts, max_bytes=1000,
                      benchmarks={"law": {"path": "law_test.csv", "shots": "law_dev.csv"}, "fox": {"path": "fox.jsonl"}},
                      num_shots=1, num_items=3, reference="base", cutoff_len=32, stride=20)
    output = io.StringIO()
    running = replace(context(inputs, chosen, output), base=tmp_path)
    metrics = stage.run(running)
    report = json.loads((running.work / "report.json").read_text("utf-8"))
    size = len((tmp_path / "own.txt").read_bytes())
    [row] = [row for row in report["losses"] if row["kind"] == "category" and row["model"] == "chat"]
    assert row["num_bytes"] == size, "every byte of the file, line ends too"
    assert any(note == f"{size:,} of the {size + 1470:,} bytes of own are scored (max_bytes), none of long.txt"
               for note in report["notes"])
    assert [(model["context"], model["stride"]) for model in report["models"]] == [(32, 20)] * 2
    assert {row["system"] for row in report["bits"]} == {"base", "chat", "xz -9", "gzip -9"}, "no n-gram without a corpus"
    asked = {(row["benchmark"], row["num_shots"], row["model"]): row for row in report["choices"]}
    assert list(asked) == [(name, shots, model) for name, shots in (("law", 0), ("law", 1), ("fox", 0))
                           for model in ("base", "chat")]
    assert [asked["law", shots, "base"]["num_items"] for shots in (0, 1)] == [1, 1], "an example is never asked"
    assert asked["fox", 0, "chat"]["num_items"] == 3 and asked["fox", 0, "base"]["gain"] is None
    assert asked["fox", 0, "chat"]["gain"] == asked["fox", 0, "chat"]["acc"] - asked["fox", 0, "base"]["acc"]
    assert metrics["acc/fox/0-shot/chat"] == asked["fox", 0, "chat"]["acc"] and "rise/own/chat" in metrics
    assert [row["model"] for row in report["rises"]] == ["chat"] * len(report["rises"])
    assert "law: 1 questions are not asked, because they are examples" in report["notes"]
    assert any("1 rows of law_test.csv are no questions" in note for note in report["notes"])
    assert "questions by likelihood" in output.getvalue() and "change of bits per byte since base" in output.getvalue()


def test_few_examples_and_those_of_other_subjects_are_told(inputs: dict[str, Input], tmp_path: Path) -> None:
    def write(name: str, *subjects: str) -> None:
        (tmp_path / name).write_text("\n".join(json.dumps({
            "query": f"{name} {number}", "choices": ["a", "b"], "gold": 0, "subject": subject})
            for number, subject in enumerate(subjects)))

    write("dev.jsonl", "law", "law", "art")
    write("test.jsonl", "law", "law", "art", "sport", "sport", "sport")
    chosen = settings(benchmarks={"quiz": {"path": "test.jsonl", "shots": "dev.jsonl"}}, num_shots=2)
    notes: list[str] = []
    Quiz(replace(context(inputs, chosen), base=tmp_path), {}, notes)
    assert notes == [
        "quiz: 1 of 6 questions have fewer than 2 examples before them, 1 at least: there are no more for their subjects",
        "quiz: for the subjects of 3 of 6 questions there are no examples, and those of other subjects stand before them"]


def test_a_beginning_for_which_a_model_has_no_room_costs_only_itself(inputs: dict[str, Input]) -> None:
    running = context(inputs, settings(beginnings=["The fox"], max_new_tokens=96))
    stage.run(running)
    report = json.loads((running.work / "report.json").read_text("utf-8"))
    assert [answer["text"] for answer in report["continued"][0]["answers"]] == ["", ""]
    assert any("base was given no beginnings: " in note and "96 positions" in note for note in report["notes"])


def test_lines_of_files_outside_lose_their_ends_and_that_is_told(inputs: dict[str, Input], tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(b"One line.\n\nAnother one.\r\n")
    notes: list[str] = []
    reading = Reading(replace(context(inputs, settings(texts=[{"path": "own.txt", "document": "line"}])), base=tmp_path),
                      {}, notes)
    assert [document.text for document in reading.texts["text"]] == ["One line.", "Another one."]
    assert notes == ["4 bytes of own.txt are not scored: line end after the text, blank line"]
    (tmp_path / "wide.txt").write_text("One line.", encoding="utf-16")
    Reading(replace(context(inputs, settings(texts=[{"path": "wide.txt"}])), base=tmp_path), {}, notes)
    assert len(notes) == 1, "every character is scored, though they are fewer bytes now"
    with pytest.raises(ConfigError, match="stride 600 leaves a window of 24 tokens no context"):
        Reading(replace(context(inputs, settings(texts=[{"path": "own.txt"}], stride=600, models=["chat"])), base=tmp_path),
                {}, [])


def test_the_n_gram_model_s_blocks_are_those_of_the_models() -> None:
    text = "汉字ab\n" * 500
    bits = np.arange(len(text.encode()), dtype=np.float64)
    score = texts_module._by_bytes(Document(text, "s", "d"), bits)
    assert [(block.num_bytes, block.num_chars) for block in score.blocks] == [(1800, 1000), (1800, 1000), (900, 500)]
    assert [block.bits for block in score.blocks] == [bits[:1800].sum(), bits[1800:3600].sum(), bits[3600:].sum()]
    assert score.bits == bits.sum() and bits_per_byte([score]).low is not None


def test_settings_of_the_gate_and_of_questions() -> None:
    for wrong, said in (({"corpus": "c", "max_rise": {"en": 0.1}}, "max_rise compares with the reference"),
                        ({"corpus": "c", "reference": "base", "max_rise": {"en": -0.1}}, "a share from 0"),
                        ({"corpus": "c", "cutoff_len": 16, "stride": 16}, "no context"),
                        ({"texts": [{"path": "x", "group": "file"}]}, "group says what is held out together"),
                        ({"benchmarks": {"a": {"path": "a"}}, "num_shots": 3}, "no benchmark says where they come from")):
        with pytest.raises(ConfigError, match=said):
            stage.check(settings(**wrong), {})
    for wrong, said in (({"prompts": ["x"], "max_rise": {"en": 0.1}}, "max_rise is read with corpus or texts only"),
                        ({"corpus": "c", "on_rise": "stop"}, "on_rise is read with max_rise only"),
                        ({"corpus": "c", "num_items": 5}, "num_items is read with benchmarks only")):
        with pytest.raises(ConfigError, match=said):
            settings(**wrong)
    chosen = settings(texts=[{"path": "x.txt"}], num_items=7,
                      benchmarks={"a": {"path": "a", "shots": "b"}, "c": {"path": "c"}})
    assert [(found.key, found.text) for found in stage.references(chosen)][2:] == [
        (("texts", 0, "path"), "x.txt"), (("benchmarks", "a", "path"), "a"), (("benchmarks", "a", "shots"), "b"),
        (("benchmarks", "c", "path"), "c")]
    assert "up to 42 questions by likelihood" in stage.forecast(chosen, {}).notes


def test_a_gate_for_text_that_is_not_there(inputs: dict[str, Input]) -> None:
    with pytest.raises(DataError, match="max_rise names “fr”, and the text that is scored has en, zh"):
        stage.run(context(inputs, settings(corpus="corpus", reference="base", max_rise={"fr": 0.1})))


def test_a_corpus_without_held_out_text_is_refused(inputs: dict[str, Input], tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        with CorpusWriter(shard_path(tmp_path, split, 0)):
            pass
    empty = Input("corpus", "step", "", "corpus", tmp_path)
    with pytest.raises(DataError, match="no held-out documents"):
        stage.run(replace(context(inputs, settings(corpus="corpus")), inputs=inputs | {"corpus": empty}))


@pytest.mark.parametrize(("key", "value"), [("max_bytes", 5000), ("cutoff_len", 64), ("stride", 8), ("ngram_max_bytes", 0)])
def test_settings_that_only_texts_read(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml:1: {key} is read with corpus( or texts)? only"):
        settings(tasks=["task:copy"], **{key: value})
    assert getattr(settings(corpus="corpus", **{key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), [("num_prompts", 5), ("samples", 0)])
def test_settings_that_only_tasks_read(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml:1: {key} is read with tasks( or judge_prompts)? only"):
        settings(corpus="corpus", prompts=["hi"], **{key: value})
    assert getattr(settings(tasks=["task:copy"], **{key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), [("max_new_tokens", 5), ("batch_size", 2)])
def test_settings_that_only_prompts_read(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml:1: {key} is read with tasks.* or .* only"):
        settings(corpus="corpus", **{key: value})
    assert getattr(settings(prompts=["hi"], **{key: value}), key) == value


def test_settings() -> None:
    chosen = settings(corpus="corpus", tasks=["task:copy"])
    assert [(found.key, found.text) for found in stage.references(chosen)] == [
        (("models", 0), "base"), (("models", 1), "chat"), (("corpus",), "corpus"), (("tasks", 0), "task:copy")]
    assert len(stage.forecast(chosen, {}).notes) == 2
    with pytest.raises(ConfigError, match="named twice"):
        settings(models=["a", "a"])
    with pytest.raises(ConfigError, match="models"):
        settings(models=[])
    with pytest.raises(ConfigError, match="nothing to measure"):
        stage.check(settings(), {})
    stage.check(chosen, {})
