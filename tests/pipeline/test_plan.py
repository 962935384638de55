"""Plans: fingerprints, reasons, forecasts, and that planning writes nothing."""

import io
import sys

import pytest
from rich.console import Console

from danlu import Recipe, plan, run
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.plan import list_changes


def load(*overrides):
    return Recipe.load("demo.yaml", overrides=overrides)


def reasons(recipe):
    return {name: planned.reason for name, planned in plan(recipe).steps.items()}


def quiet_run(recipe, **kwargs):
    return run(recipe, console=Console(file=io.StringIO()), **kwargs)


def prints(*overrides):
    return {name: planned.fingerprint for name, planned in plan(load(*overrides)).steps.items()}


def test_planning_writes_nothing_and_runs_nothing(folder, stages):
    before = sorted(folder.rglob("*"))
    planned = plan(load())
    assert sorted(folder.rglob("*")) == before and stages == []
    assert {step.reason for step in planned.steps.values()} == {"has not run yet"}
    assert planned.steps["base"].folder.parent.as_posix() == "runs/demo/base"


def test_what_changes_a_fingerprint_changes_it_downstream_only(folder):
    first = prints()
    assert prints("steps.corpus.save_steps=99") == first  # does not change the result
    assert prints("name=other") == first
    changed = prints("steps.base.learning_rate=2e-3")
    assert changed["corpus"] == first["corpus"]
    assert changed["base"] != first["base"] and changed["report"] != first["report"]
    changed = prints("seed=4")
    assert all(changed[name] != first[name] for name in first)
    (folder / "texts" / "a.txt").write_text("other\n")
    changed = prints()
    assert all(changed[name] != first[name] for name in first)


def test_names_and_places_do_not_change_fingerprints(folder):
    first = prints()
    (folder / "texts").rename(folder / "words")
    assert prints("steps.corpus.dataset.0=words") == first
    text = (folder / "demo.yaml").read_text().replace("corpus:\n", "reading:\n").replace("dataset: corpus",
                                                                                          "dataset: reading")
    (folder / "demo.yaml").write_text(text)
    assert list(prints("steps.reading.dataset.0=words").values()) == list(first.values())
    (folder / "words" / "b.txt").rename(folder / "words" / "c.txt")  # names below the folder are content
    assert list(prints("steps.reading.dataset.0=words").values()) != list(first.values())


def test_a_folder_without_a_readable_file(folder):
    (folder / "bin").mkdir()
    (folder / "bin" / "a.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"“bin” holds no file that ends in \.txt"):
        plan(load("steps.corpus.dataset.0=bin"))


def test_docstrings_are_known_by_module_wherever_they_are_installed(folder):
    planned = plan(load("steps.corpus.dataset.0=docstrings:json,numpy")).steps["corpus"]
    names = set(planned.config["inputs"][0]["files"])
    assert not names or all("/" not in name for name in names)
    small = plan(load("steps.corpus.dataset.0=docstrings:json")).steps["corpus"]
    assert {"json", "json.decoder"} <= set(small.config["inputs"][0]["files"])


def test_fingerprints_do_not_depend_on_what_has_run(folder):
    first = prints()
    quiet_run(load())
    assert prints() == first


def test_schema_version(folder, monkeypatch):
    first = prints()
    quiet_run(load())
    monkeypatch.setattr(sys.modules["fake_stage_count"], "SCHEMA", 2)
    assert prints()["base"] != first["base"]
    found = reasons(load())
    assert found["base"] == "the stage count itself has changed (version 1 → 2)"
    assert found["report"] == "its input “base” has changed"
    assert found["corpus"] == "nothing has changed"


def test_reasons_name_what_changed(folder):
    quiet_run(load())
    assert set(reasons(load()).values()) == {"nothing has changed"}
    assert reasons(load("steps.base.learning_rate=5e-4", "steps.corpus.upper=true"))["base"] == (
        "learning_rate 0.001 → 0.0005; its input “corpus” has changed")
    assert reasons(load("seed=4"))["corpus"] == "seed 3 → 4"
    (folder / "texts" / "a.txt").write_text("changed\n")
    (folder / "texts" / "b.txt").unlink()
    (folder / "texts" / "c.txt").write_text("new\n")
    assert reasons(load())["corpus"] == "“texts”: a.txt changed, c.txt is new, b.txt is gone"


def test_reason_of_another_file(folder):
    quiet_run(load())
    (folder / "other.txt").write_text("other\n")
    assert reasons(load("steps.corpus.dataset.0=other.txt"))["corpus"] == "reads “other.txt” instead of “texts”"
    assert reasons(load("steps.corpus.dataset=[texts, other.txt]"))["corpus"].startswith("dataset [''] → ")


def test_reason_of_an_earlier_setting(folder):
    quiet_run(load())
    quiet_run(load("steps.base.max_steps=5"))
    found = plan(load())
    assert found.steps["base"].reason == "made before with these very settings"
    assert found.steps["base"].artifact is not None


def test_reason_of_interrupted_work(folder):
    planned = plan(load())
    for name in ("corpus", "base"):
        planned.steps[name].work.mkdir(parents=True)
    assert reasons(load())["corpus"] == "was interrupted; starts again"
    assert reasons(load())["base"] == "was interrupted; goes on where it was"


def test_reason_of_a_damaged_earlier_artifact(folder):
    made = quiet_run(load())
    (made["base"].folder / "manifest.json").write_text("{}")
    assert reasons(load("steps.base.max_steps=5"))["base"] == (
        f"the earlier artifact ({made['base'].folder.name}) is gone or damaged")


def test_a_damaged_artifact_that_is_meant_is_an_error(folder):
    made = quiet_run(load())
    (made["base"].folder / "step-1").write_text("short")
    with pytest.raises(DataError) as caught:
        plan(load())
    assert caught.value.where == str(made["base"].folder / "step-1")


def test_steps_that_do_not_fit(folder):
    with pytest.raises(ConfigError) as caught:
        plan(load("steps.base.max_steps=13"))
    assert str(caught.value) == "demo.yaml:7: 13 steps do not fit"


def test_packages_docstrings_and_tasks(folder):
    def dataset(text):
        return f"steps.corpus.dataset.0={text}"

    first = prints()
    assert prints(dataset("package:json/decoder.py"))["corpus"] != first["corpus"]
    assert prints(dataset("docstrings:json"))["corpus"] != prints(dataset("docstrings:csv"))["corpus"]
    assert prints(dataset("task:skills"))["corpus"] == prints(dataset("task:skills"))["corpus"]
    with pytest.raises(ConfigError, match="there is no task “skils”\n  Did you mean task:skills"):
        plan(load(dataset("task:skils")))
    with pytest.raises(ConfigError, match=r"--set steps\.corpus\.dataset\.0=package:no_such_package_/x"):
        plan(load(dataset("package:no_such_package_/x")))


def rendered(recipe):
    out = io.StringIO()
    plan(recipe).render(Console(file=out, width=140))
    return out.getvalue()


def test_render(folder):
    text = rendered(load())
    assert "run has not run yet" in text
    assert "≈ 90" in text and "≈ 6.00e+09" in text and "2.5 GB" in text and "≈ 1 min 30 s" in text
    assert "base: a note" in text and "3 of 3 steps to run, about 1 min 30 s." in text
    quiet_run(load())
    text = rendered(load())
    assert "reuse nothing has changed" in text and "≈ 6" not in text and "0 of 3 steps to run" in text


def test_list_changes_of_another_stage():
    old = {"stage": "a", "schema": 1, "seed": 0, "settings": {}, "inputs": []}
    assert list_changes(old, {**old, "stage": "b"}) == ["its stage was a"]
    assert list_changes({**old, "settings": {"x": {"y": [1, 2]}}}, {**old, "settings": {"x": {"y": [1, 3], "z": 1}}}) \
        == ["x.y.1 2 → 3", "x.z nothing → 1"]
