"""Verifying, cleaning and reading ledgers."""

import io
import re
import sys

import pytest
from rich.console import Console

from danlu import Recipe, run
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.lock import hold
from danlu.pipeline.upkeep import current_artifacts, leftovers, read_ledger, remove, unfinished, verify


@pytest.fixture
def made(folder):
    return go()


def go(*overrides):
    return run(Recipe.load("demo.yaml", overrides=overrides), console=Console(file=io.StringIO()))


def problems(folder):
    return {found.folder.name: found.problem for found in verify(folder)}


def test_verify_finds_everything_well(folder, made):
    found = list(verify(folder / "runs" / "demo"))
    assert [(item.kind, item.problem) for item in found] == [("model", ""), ("corpus", ""), ("report", "")]
    assert len(list(verify(made["base"].folder))) == 1


@pytest.mark.parametrize("damage", ["bytes", "size", "missing", "foreign", "manifest", "no manifest"])
def test_verify_finds_each_kind_of_damage(folder, made, damage):
    place = made["base"].folder
    file = place / "step-1"
    if damage == "bytes":
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    elif damage == "size":
        file.write_bytes(b"")
    elif damage == "missing":
        file.unlink()
    elif damage == "foreign":
        file = place / "more"
        file.write_text("x")
    else:
        file = place / "manifest.json"
        file.write_text(file.read_text().replace("0.25", "0.15")) if damage == "manifest" else file.unlink()
    found = problems(folder / "runs")
    told = found.pop(place.name)
    assert f"{place}: has no manifest.json" in told if damage == "no manifest" else f"{file}: " in told
    assert set(found.values()) == {""}


def test_verify_a_current_that_names_nothing(folder, made):
    (folder / "runs/demo/base/current").write_text("00000000\n")
    assert "names 00000000, which is not there" in problems(folder / "runs")["00000000"]


def test_unfinished_work_is_no_damage(folder, made):
    work = folder / "runs/demo/base/.work-12345678"
    work.mkdir()
    (work / "half").write_text("x")
    assert set(problems(folder / "runs").values()) == {""}
    assert unfinished(folder / "runs") == [work]


def test_leftovers(folder, made):
    assert leftovers(folder / "runs/demo") == []
    newer = go("steps.base.max_steps=5")
    work = folder / "runs/demo/base/.work-12345678"
    work.mkdir()
    (work / "half").write_text("12345")
    (folder / "runs/demo/report/notes").mkdir()  # not ours
    found = leftovers(folder / "runs/demo")
    assert {item.folder.name for item in found} == {work.name, made["base"].folder.name, made["report"].folder.name}
    assert {item.folder.name: item.num_bytes for item in found}[work.name] == 5
    assert leftovers(folder / "runs/demo/report")[0].folder.name == made["report"].folder.name
    for item in found:
        remove(item)
    assert leftovers(folder / "runs/demo") == []
    assert set(problems(folder / "runs").values()) == {""}
    assert go("steps.base.max_steps=5")["report"].folder == newer["report"].folder


def test_the_examples_of_the_current_artifact_are_meant(folder, monkeypatch):
    module = sys.modules["fake_stage_count"]
    real = module.run

    def run_with_examples(context):
        name = f"examples-0000000{context.settings.max_steps}"
        (context.work.parent / name).mkdir()
        (context.work.parent / name / "manifest.json").write_text(
            '{"format": 1, "kind": "examples", "fingerprint": "", "files": {}}')
        return {**real(context), "examples": name}

    monkeypatch.setattr(module, "run", run_with_examples)
    go()
    assert leftovers(folder / "runs/demo") == []
    go("steps.base.max_steps=5")
    assert "examples-00000003" in {item.folder.name for item in leftovers(folder / "runs/demo")}
    assert "examples-00000005" not in {item.folder.name for item in leftovers(folder / "runs/demo")}


def test_folders_of_other_people_are_no_leftovers(folder, made):
    (folder / "mine" / "project" / "deadbeef").mkdir(parents=True)
    (folder / "mine" / "project" / "deadbeef" / "thesis.txt").write_text("years of work")
    assert leftovers(folder / "mine") == []


def test_a_removal_that_was_stopped_is_finished_later(folder, made):
    half = folder / "runs/demo/base/.removing-12345678"
    half.mkdir()
    assert set(problems(folder / "runs").values()) == {""}
    [item] = leftovers(folder / "runs/demo")
    remove(item)
    assert not half.exists()


def test_current_artifacts_parents_first(folder, made):
    assert [path.parent.name for path in current_artifacts(folder / "runs/demo")] == ["corpus", "base", "report"]
    assert current_artifacts(folder / "runs/demo/base")[0].name == made["base"].folder.name
    assert current_artifacts(made["base"].folder) == [made["base"].folder]
    with pytest.raises(ConfigError, match="holds no artifact"):
        current_artifacts(folder / "texts")
    with pytest.raises(ConfigError, match="there is no such folder\n  Runs here: runs/demo"):
        current_artifacts(folder / "runs/dmo")


def test_ledger(folder, made):
    kept = read_ledger(made["corpus"].folder)
    assert kept.stations["stations"][0]["dropped"]["bad word"]["rows"] == 1
    assert kept.quarantine == {"bad word": (1, ["texts:3"])}
    assert read_ledger(made["base"].folder) is None
    (made["corpus"].folder / "ledger.json").write_text("{")
    with pytest.raises(DataError, match=re.escape("ledger.json: is damaged")):
        read_ledger(made["corpus"].folder)


def test_the_lock_is_for_one(folder):
    refused = pytest.raises(ConfigError, match=r"another danlu run is working on .*x \(process \d+\)")
    with hold(folder / "x"), refused, hold(folder / "x"):
        pass
    with hold(folder / "x"):
        pass
