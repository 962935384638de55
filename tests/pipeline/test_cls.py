"""Classifiers through the real pipeline: trained, measured, opened, resumed, checked, and asked about files."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import changed
from tiny_alignment import WORDS, write_rows
from tiny_chat import make_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from danlu.cli import app
from danlu.core.artifact import Artifact
from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Labelled
from danlu.data.store import ExampleStore
from danlu.pipeline.check import check_recipe, check_step
from danlu.pipeline.inspect import inspect_step
from danlu.pipeline.lint import Lint
from danlu.pipeline.plan import plan
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.pipeline.score import score_file
from danlu.tokens.labelled import Form, LabelledEncoder

QUIET = Console(quiet=True)
DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPE = """
name: small
seed: 3
steps:
  mood:
    stage: cls
    model: start
    dataset: texts.tsv
    val_size: 0.3
    cutoff_len: 48
    micro_batch_tokens: 128
    learning_rate: 1e-2
    max_steps: 24
    eval_steps: 12
    plot_loss: false
"""


def table_rows(count: int = 60) -> list[str]:
    """Texts of which the last word tells the class; the first is the more frequent."""
    return [f"{WORDS[n % 8]} {n} {'春' if n % 3 else '!'}\t{int(n % 3 == 0)}" for n in range(count)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    make_folder(folder / "start")
    (folder / "texts.tsv").write_text("\n".join(table_rows()), encoding="utf-8")
    pairs = [{"sentence1": WORDS[n % 8], "sentence2": WORDS[n % 8] if n % 2 else WORDS[(n + 3) % 8],
              "label": ("other", "same")[n % 2]} for n in range(40)]
    write_rows(str(folder / "pairs.jsonl"), pairs)
    return folder


@pytest.fixture(autouse=True)
def in_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def load(**settings: Any) -> Recipe:
    return changed(RECIPE, **{f"mood__{key}": value for key, value in settings.items()})


def made(runs: str = "runs", **settings: Any) -> Artifact:
    return run(load(**settings), runs, console=QUIET)["mood"]


def test_a_classifier_is_trained_measured_and_opened() -> None:
    artifact = made()
    metrics = artifact.metrics
    assert artifact.kind == "classifier"
    assert metrics["eval_loss_before"] == pytest.approx(np.log(2)) and metrics["eval_loss"] < 0.3
    classified = json.loads((artifact.folder / "classified.json").read_text(encoding="utf-8"))
    assert metrics["classified_accuracy"] == metrics["eval_accuracy"] == classified["accuracy"] > 0.9
    assert classified["accuracy"] > classified["majority"] == metrics["classified_majority"]
    assert metrics["classified_accuracy_low"] < classified["accuracy"] <= metrics["classified_accuracy_high"]
    assert sum(map(sum, classified["confusion"])) == classified["count"] == 60 - metrics["num_examples"]
    log = [json.loads(line) for line in (artifact.folder / "trainer_log.jsonl").read_text().splitlines()]
    evals = [line for line in log if "eval_macro_f1" in line]
    assert evals[-1]["eval_macro_f1"] == pytest.approx(classified["macro_f1"])
    assert not any(name.startswith("eval_f1/") for line in log for name in line)
    assert all("accuracy" in line for line in log if "loss" in line)

    lm = AutoModelForSequenceClassification.from_pretrained(artifact.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
    texts, labels = zip(*(row.split("\t") for row in table_rows()))
    with torch.no_grad():
        found = lm(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.argmax(-1)
    assert np.mean([lm.config.id2label[int(number)] == label for number, label in zip(found, labels)]) > 0.9


def test_pairs_with_names_for_their_classes_and_rows_held_out_apart() -> None:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows("dev.jsonl", [*rows[:6], {**rows[0], "label": "third"}])
    artifact = made(dataset="pairs.jsonl", val_size=None, eval_dataset="dev.jsonl", labels=["same", "other"], max_steps=4,
                    eval_steps=None, label_smoothing=0.1)
    lm = AutoModelForSequenceClassification.from_pretrained(artifact.folder)
    assert lm.config.id2label == {0: "same", 1: "other"}
    store = ExampleStore(Path("runs/small/mood") / artifact.metrics["examples"] / "train")
    eos = AutoTokenizer.from_pretrained("start").eos_token_id
    assert [int(example.branches[0].columns["class"].sum()) for example in store] == [1, 0] * 20
    assert all(example.branches[0].tokens.tolist().count(eos) == 2 for example in store)
    ledger = json.loads((artifact.folder / "ledger.json").read_text(encoding="utf-8"))
    [station] = [station for station in ledger["stations"] if station["name"] == "eval: label"]
    assert station["dropped"]["a label that is none of the classes"]["rows"] == 1
    assert json.loads((artifact.folder / "classified.json").read_text())["count"] == 6
    found = made(dataset="pairs.jsonl", max_steps=2, eval_steps=None).folder
    assert AutoModelForSequenceClassification.from_pretrained(found).config.id2label == {0: "other", 1: "same"}


def test_the_result_depends_on_neither_micro_batches_nor_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "eval_steps": 3}
    whole = made("runs-one", **settings).metrics
    small = made("runs-two", micro_batch_tokens=16, **settings).metrics
    monkeypatch.setattr("danlu.models.load.why_not_packed", lambda root: "a test")
    padded = made("runs-three", **settings).metrics
    for other in (small, padded):
        assert other["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
        assert other["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [{"finetuning_type": "lora", "lora_rank": 4},
                                      {"finetuning_type": "freeze", "freeze_trainable_layers": 1}], ids=["lora", "freeze"])
def test_other_ways_to_train_learn_it_too(settings: dict[str, Any]) -> None:
    artifact = made(**settings)
    assert artifact.metrics["classified_accuracy"] > 0.9
    assert (artifact.folder / "adapter").is_dir() == (settings["finetuning_type"] == "lora")
    if settings["finetuning_type"] == "lora":  # and the adapters go on, with their head
        more = made("runs-adapters", finetuning_type="lora", adapter_name_or_path=str(artifact.folder), max_steps=1,
                    eval_steps=None, learning_rate=1e-9)
        write_rows("xy.jsonl", [{"text": f"fox {n}", "label": "xy"[n % 2]} for n in range(20)])
        with pytest.raises(ConfigError, match="is a classifier of 0, 1; the classes here are x, y"):
            made("runs-adapters", finetuning_type="lora", adapter_name_or_path=str(artifact.folder), max_steps=1,
                 eval_steps=None, dataset="xy.jsonl")
        assert more.metrics["eval_loss_before"] == pytest.approx(artifact.metrics["eval_loss"], abs=1e-4)


def test_a_classifier_goes_on_from_a_classifier() -> None:
    first = made()
    recipe = load(model=str(first.folder), max_steps=2, learning_rate=1e-9)
    more = run(recipe, "runs-more", console=QUIET)["mood"]
    assert more.metrics["eval_loss_before"] == pytest.approx(first.metrics["eval_loss"], abs=1e-4)
    with pytest.raises(ConfigError, match="is a classifier of 0, 1; the classes here are 1, 0"):
        run(load(model=str(first.folder), labels=[1, 0]), "runs-more", console=QUIET)
    for stage, keys in (("sft", {}), ("rm", {})):
        with pytest.raises(ConfigError, match="a classifier artifact; needed is"):
            Recipe.from_dict({"steps": {"x": {"stage": stage, "model": str(first.folder), "dataset": "texts.tsv", **keys}}})


@pytest.mark.parametrize(("settings", "said"), [
    ({"labels": ["a", "a"]}, "labels names a class twice"), ({"labels": [0, "0"]}, "labels names a class twice"),
    ({"labels": [True, False]}, "write true and false in quotes"), ({"labels": ["a"]}, "at least 2"),
    ({"label_smoothing": 1}, "label_smoothing"), ({"dataset": "task:skills"}, "is “task:skills”, a task; needed is"),
    ({"cutoff_len": 97}, "positions for 96 tokens only"), ({"val_size": None}, "there is nothing to evaluate on")])
def test_settings_that_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(load(**settings), "runs")


@pytest.mark.parametrize(("rows", "said"), [
    (["a\t1", "b\t1"], "a classifier needs two classes, and the only label is “1”"),
    ([f"a\t{n}" for n in range(1001)], "more than 1,000 different labels"),
    (["label\ttext", "0.5\ta", "1.5\tb"], "no row whose label is a class")])
def test_labels_that_are_no_classes(rows: list[str], said: str) -> None:
    Path("odd.tsv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=said):
        made(dataset="odd.tsv")


def test_a_file_is_classified_whether_it_has_labels_or_not() -> None:
    artifact = made()
    found = score_file("runs/small/mood", "texts.tsv", QUIET, Path("all.jsonl"))
    lines = [json.loads(line) for line in Path("all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found.num_rows == len(lines) == 60 == found.confusion.count
    assert found.confusion.accuracy == np.mean([line["label"] == line["given"] for line in lines]) > 0.9
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    write_rows("new.jsonl", [{"text": "fox 春"}, {"text": "", "label": "1"}, {"other": 1}, {"text": "dog !", "label": "7"},
                             {"text": "dog !", "text2": "fox 春", "label": None}])
    console = Console(width=160, record=True, file=io.StringIO())
    found = score_file(str(artifact.folder), "new.jsonl", console, Path("new-classes.jsonl"))
    lines = [json.loads(line) for line in Path("new-classes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["new.jsonl:1", "new.jsonl:4", "new.jsonl:5"]
    assert ["given" in line for line in lines] == [False, True, False] and lines[2]["text2"] == "fox 春"
    assert found.num_foreign == 1 and not found.confusion.count
    said = console.export_text()
    assert "1 rows have a label that is no class of the model" in said
    assert "not classified: 2 × no text to classify, the first at new.jsonl:2" in said
    lm = AutoModelForSequenceClassification.from_pretrained(artifact.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
    for line in lines:
        with torch.no_grad():
            texts = [line[name] for name in ("text", "text2") if name in line]
            logits = lm(**tokenizer(*texts, return_tensors="pt")).logits
        assert list(line["probabilities"].values()) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)
    write_rows("none.jsonl", [{"other": 1}])
    with pytest.raises(DataError, match="no row could be classified"):
        score_file(str(artifact.folder), "none.jsonl", QUIET)


def test_check_and_inspect_know_classes() -> None:
    rows = [*table_rows(12), "dog 1 春\t1", "dog 2\t5.5", "a\t", *table_rows(1)]
    Path("dirty.tsv").write_text("\n".join(rows), encoding="utf-8")
    recipe = load(dataset="dirty.tsv", val_size=None, eval_steps=None, labels=[0, 1], max_steps=1)
    found = check_step(recipe, "mood", QUIET).found
    assert {check: (entry.rows, entry.where) for check, entry in found.items()} == {
        "another class": (1, "dirty.tsv:13"), "no class": (1, "dirty.tsv:14"), "not read": (1, "dirty.tsv:15"),
        "duplicate row": (1, "dirty.tsv:16")}
    Path("two.tsv").write_text("fox 春\t1\ndog !\t0\nfox 春\t0\n", encoding="utf-8")
    Path("held.tsv").write_text("dog !\t0\n", encoding="utf-8")
    recipe = load(dataset="two.tsv", val_size=None, eval_dataset="held.tsv", max_steps=1, eval_steps=None)
    checked = check_step(recipe, "mood", QUIET)
    assert checked.found["another class"].where == "two.tsv:3" and checked.found["another class"].detail == "as two.tsv:1"
    assert checked.found["held-out row is trained on"].rows == 1 and checked.has_errors
    assert not check_recipe(recipe, [], QUIET)
    console = Console(width=160, record=True, file=io.StringIO())
    recipe = load(dataset="pairs.jsonl", labels=["same", "other"], max_steps=1, eval_steps=None)
    inspect_step(recipe, "mood", console, number=8)
    said = console.export_text()
    assert "class, read at the last token: same" in said and "class, read at the last token: other" in said


def test_short_texts_are_told_apart() -> None:
    """Of at most two tokens in all, where nothing stands around them."""
    tokenizer = AutoTokenizer.from_pretrained("start")
    encoder = LabelledEncoder(tokenizer, Form(((), ()), ((), (), ())), ("0", "1"), 8)
    lint = Lint(tokenizer, False, 8)
    for number, (text, label) in enumerate([("f", "0"), ("g", "1"), ("h", "0"), ("h", "1")]):
        record = Labelled(text, label, "s", f"s:{number}")
        lint.look("train", record, list(encoder.examples([record], Ledger())))
    lint.finish(lambda split, index: f"s:{index}")
    assert {check: (found.rows, found.where, found.detail) for check, found in lint.found.items()} == {
        "another class": (1, "s:3", "as s:2")}


def test_rows_that_are_left_out_are_counted_once() -> None:
    """Those whose label is none of the classes are quarantined, too, but they were read."""
    rows = [*table_rows(12), "dog 1\t5", "dog 2\t6", "a\t"]
    Path("some.tsv").write_text("\n".join(rows), encoding="utf-8")
    console = Console(width=160, record=True, file=io.StringIO())
    run(load(dataset="some.tsv", val_size=None, eval_steps=None, labels=[0, 1], max_steps=1), "left", console=console)
    assert "rows left out: 2 × a label that is none of the classes, 1 × not to be read; 12 examples are left" in \
        console.export_text()


def test_the_command() -> None:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [
        "cls", "--model", "start", "--dataset", "texts.tsv", "--set", "cutoff_len=48", "--set", "max_steps=2",
        "--set", "val_size=0.2", "--set", "plot_loss=false"])
    assert done.exit_code == 0, done.output
    assert "always the most frequent class" in done.output
    text = Path("runs/texts/recipe.yaml").read_text(encoding="utf-8")
    assert "stage: cls" in text and text.index("# labels:") < text.index("### training")
    scored = CliRunner().invoke(app, ["score", "runs/texts/cls", "texts.tsv"])
    assert scored.exit_code == 0 and "60 labelled rows" in scored.output


@pytest.mark.parametrize("page", ["classification.md", "classification.zh.md"])
def test_the_recipe_of_the_page_can_be_planned(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    [recipe] = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    Path("reviews.csv").write_text("review,label\na fine film,1\n", encoding="utf-8")
    own = recipe.replace("path/to/model ", "start ").replace("cutoff_len: 256", "cutoff_len: 96")
    assert own != recipe and plan(Recipe.from_text(own), "runs").steps["mood"]
    samples = [re.findall(r"^```(?:yaml|sh|json|python)\n(.*?)^```$", (DOCS / name).read_text(encoding="utf-8"),
                          re.MULTILINE | re.DOTALL) for name in ("classification.md", "classification.zh.md")]
    ours, theirs = ([re.sub(r" *#.*", "", sample) for sample in found] for found in samples)
    assert ours == theirs and len(ours) == 4


def test_numbers_and_their_texts_are_one_list_of_classes() -> None:
    settings = [load(labels=labels).step("mood").settings for labels in ([0, 1], ["0", "1"], [0, "1"])]
    assert [each.labels for each in settings] == [["0", "1"]] * 3
    assert settings[0].result_settings() == settings[1].result_settings() == settings[2].result_settings()
