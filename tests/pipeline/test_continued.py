"""The recipes of continued pre-training: read as they are, and run from end to end with a tiny model and a few lines."""

import json
from pathlib import Path

import pytest
from pipeline.test_expand import make_model
from rich.console import Console
from tokens.growing import ENGLISH

from danlu import Recipe, run
from danlu.core.errors import ConfigError
from danlu.pipeline.texts import Forgotten

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["scale=cpu", "steps.grown.model=old", "steps.grown.num_pieces=10", "steps.corpus.clean={min_chars: 10}",
         "steps.corpus.heldout_share=0.3", "steps.rows.cutoff_len=32", "steps.rows.global_batch_tokens=128",
         "steps.rows.max_steps=2", "steps.inject.max_steps=10", "steps.replay.max_steps=2", "steps.inject.sample_steps=5",
         "steps.inject.sample_new_tokens=3", "steps.replay.sample_steps=2", "steps.replay.sample_new_tokens=3",
         "steps.check-rows.max_bytes=1000", "steps.report.max_new_tokens=3",
         "steps.check-rows.benchmarks={own: {path: questions.jsonl}}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    make_model(folder / "old")
    for name in ("zh", "en", "qa", "medical", "medical-qa"):
        (folder / "data" / name).mkdir(parents=True)
    chinese = [f"第{n}天，他说你好，人工智能{'很' * (n % 3 + 1)}好。人工智能是什么？" for n in range(40)]
    medical = [f"第{n}种发热见于感染，医生检查体温{'和血压' * (n % 3 + 1)}，再作诊断。" for n in range(40)]
    for name, texts in (("zh", chinese), ("en", [f"{n} {ENGLISH[n % 3]}" for n in range(40)])):
        (folder / "data" / name / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "data" / "medical" / "a.txt").write_text("\n".join(medical), encoding="utf-8")
    rows = [{"source": f"问题{n}：什么是人工智能？\n", "target": f"答案{n}。", "category": "qa"} for n in range(20)]
    for name in ("qa", "medical-qa"):
        (folder / "data" / name / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "questions.jsonl").write_text('{"query": "你好", "choices": ["很好", "不好"], "gold": 0}\n' * 3)
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.mark.parametrize(("name", "scale", "length"), [
    ("smollm2-zh", "cpu", 128), ("smollm2-zh", "cpu-hours", 128), ("smollm2-zh", "~", 1024),
    ("domain-medical-zh", "cpu", 128), ("domain-medical-zh", "~", 512)])
def test_each_setting_that_is_shared_is_set_once(name, scale, length):
    steps = Recipe.load(RECIPES / f"{name}.yaml", [f"scale={scale}", "steps.grown.model=old"]).steps
    trained = [steps[step].settings for step in ("rows", "inject", "replay")]
    measured = [steps[step].settings for step in ("check-rows", "check-inject", "report")]
    assert len({(each.cutoff_len, each.global_batch_tokens, each.precision) for each in trained}) == 1
    assert len({(each.cutoff_len, each.max_bytes, str(each.max_rise)) for each in measured}) == 1
    assert all(each.models[0] == each.reference == "old" for each in measured)
    assert trained[0].cutoff_len == length
    assert [each.on_rise for each in measured] == ["warn", "stop", "warn"]
    assert all("untouched" not in each.models for each in measured) and trained[0].train_rows_from == "grown"


def test_without_the_folders_it_says_which():
    with pytest.raises(ConfigError, match=r"smollm2-zh.yaml:\d+: “.*” is “data/zh/”: neither an earlier step nor a file"), \
            pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECIPES)
        Recipe.load("smollm2-zh.yaml")


@pytest.mark.parametrize("name", ["smollm2-zh", "domain-medical-zh"])
def test_from_a_checkpoint_to_the_report(name):
    recipe = Recipe.load(RECIPES / f"{name}.yaml", [*SMALL, "steps.check-inject.on_rise=warn"])
    done = run(recipe, console=Console(quiet=True))
    report = json.loads((done["report"].folder / "report.json").read_text())
    assert {row["system"] for row in report["bits"] if row["kind"] == "model"} == {"old", "rows", "inject", "replay"}
    before, after = (done["grown"].metrics["categories"]["zh"][f"per_1000_{when}"] for when in ("before", "after"))
    assert after < before and done["grown"].metrics["categories"]["en"]["texts_unchanged"]
    assert {row["benchmark"] for row in report["choices"]} == {"own"} and report["rises"]
    samples = [json.loads(line) for line in (done["replay"].folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2} and len(samples) == 6
    assert read_from(done["replay"].manifest) == (done["inject"].folder.parent / "current").read_text().strip()
    assert [(sample["prompt"], [answer["model"] for answer in sample["answers"]]) for sample in report["continued"]] == [
        (sample["prompt"], ["old", "rows", "inject", "replay"]) for sample in samples[:3]]
    mixed = json.loads((done["replay"].folder / "mix.json").read_text())["groups"]
    assert {row["name"] for row in mixed} >= {"qa", "zh", "en"}


def read_from(manifest):
    """The model that a step trained on."""
    [found] = [item["fingerprint"] for item in manifest["config"]["inputs"] if item["key"] == ["model"]]
    return found[:8]


def test_the_gate_stops_the_run():
    settings = [*SMALL, "steps.check-rows.max_rise={en: 0.0}", "steps.inject.learning_rate=3.0"]
    with pytest.raises(Forgotten, match=r"max_rise allows 0\.0 %"):
        run(Recipe.load(RECIPES / "smollm2-zh.yaml", settings), console=Console(quiet=True))
    folder = Path("runs/smollm2-zh")
    assert (folder / "check-inject" / "report.html").is_file()
    trained = (folder / "inject" / "current").read_text()
    models = [found for path in folder.glob("replay/*/manifest.json")
              if (found := json.loads(path.read_text()))["kind"] == "model"]
    assert trained.strip() not in map(read_from, models), "nothing was trained on what the gate held back"
