"""The command line, as a person uses it: output, messages and exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import danlu
from danlu.cli import app
from danlu.core.errors import DataError

sys.path.insert(0, str(Path(__file__).parent / "pipeline"))
import fake_stages

from danlu.pipeline.onestep import write_recipe
from danlu.pipeline.stages import STAGES

RECIPE = """\
name: demo
steps:
  corpus:
    stage: words
    dataset: [texts]
  base:
    stage: count
    dataset: corpus
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    kept = dict(STAGES)
    fake_stages.register(STAGES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one two\na bad line\n")
    (tmp_path / "demo.yaml").write_text(RECIPE)
    yield tmp_path
    monkeypatch.undo()  # a stage that a test has put in leaves before the others come back
    STAGES.clear()
    STAGES.update(kept)


def command(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def artifact(name):
    return Path("runs/demo") / name / Path(f"runs/demo/{name}/current").read_text().strip()


def process(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(danlu.__file__).parents[1])}
    return subprocess.run([sys.executable, "-m", "danlu.cli", *arguments], env=environment, text=True,
                          capture_output=True, timeout=60)


def test_help_is_quick_and_loads_nothing_heavy():
    times = []
    for _ in range(3):
        started = time.monotonic()
        assert process("--help").returncode == 0
        times.append(time.monotonic() - started)
    assert min(times) < 1.5, times  # 0.3 s on an idle machine; others may be working on this one
    heavy = "('torch', 'transformers', 'pydantic', 'numpy')"
    script = f"import sys, danlu.cli; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(danlu.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=60)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["run", "plan", "inspect", "ledger", "verify", "clean", "chat", "check", "score",
                                  "export", "pt", "sft", "rm", "cls", "dpo", "kto", "ppo", "schema"])
def test_every_command_explains_itself_with_an_example(name):
    assert f"Example: danlu {name}" in command(name, "--help").output


def test_version():
    assert command("--version").output == f"danlu {danlu.__version__}\n"


def test_plan_run_and_reuse(folder):
    assert "has not run yet" in command("plan", "demo.yaml").output
    assert not Path("runs").exists()
    output = command("run", "demo.yaml", "--set", "steps.base.max_steps=4").output
    assert output.count("runs: has not run yet") == 2
    assert command("run", "demo.yaml").output.count("reused: nothing has changed") == 1
    assert "reuse nothing has changed" in command("plan", "demo.yaml").output
    command("run", "demo.yaml", "--only", "corpus", "--runs", "elsewhere")
    assert [path.name for path in Path("elsewhere/demo").iterdir() if path.is_dir()] == ["corpus"]


def test_the_report_of_a_corpus_says_where_the_recipe_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("one two\na bad line\n")
    Path("corpus.yaml").write_text("""
name: demo
steps:
  corpus: {stage: corpus, sources: [{path: texts, document: line}], clean: {min_chars: 1}, heldout_share: 0}
""")
    assert "2 documents" in command("corpus", "corpus.yaml", "corpus").output
    again = command("corpus", "corpus.yaml", "corpus", "--report").output
    assert "2 documents" in again and "other settings" not in again
    Path("texts/a.txt").write_text("its files need not be there")
    other = command("corpus", "corpus.yaml", "corpus", "--report", "--set", "steps.corpus.heldout_share=0.3").output
    assert "other settings than the recipe has now (heldout_share 0.0 → 0.3)" in " ".join(other.split())
    assert "2 documents" in other


def test_an_error_is_one_message(folder):
    result = command("run", "demo.yaml", "--set", "steps.base.max_stepz=4", code=2)
    assert result.stderr == "--set steps.base.max_stepz=4: unknown key “max_stepz”. Did you mean max_steps?\n"
    assert result.stdout == ""
    assert "there is no such recipe file" in command("run", "dmo.yaml", code=2).stderr


def test_an_unexpected_error_keeps_its_traceback(folder, monkeypatch):
    def broken(context):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["fake_stage_count"], "run", broken)
    result = CliRunner().invoke(app, ["run", "demo.yaml"])
    assert isinstance(result.exception, RuntimeError)


def test_a_wrong_option_and_no_command():
    assert "No such option" in process("run", "--nonsense").stderr
    assert "Usage" in process().stdout + process().stderr


def test_ledger(folder):
    command("run", "demo.yaml")
    output = command("ledger", "runs/demo").output
    assert "− bad word" in output and "balances" in output and "does not" not in output
    assert "texts:2" in output
    assert "no artifact here keeps a ledger" in command("ledger", artifact("base"), code=2).stderr


def test_verify(folder):
    command("run", "demo.yaml")
    assert "2 of 2 verified." in command("verify", "runs/demo").output
    Path("runs/demo/base/.work-12345678").mkdir()
    assert "runs/demo/base/.work-12345678 is unfinished work" in command("verify", "runs").output
    file = artifact("base") / "step-1"
    file.write_bytes(b"x" * file.stat().st_size)
    output = command("verify", "runs/demo", code=1).output
    assert f"DAMAGED {file}: is damaged" in output and "1 of 2 verified." in output
    assert "holds no artifact" in command("verify", "texts", code=2).stderr
    assert "there is no such folder" in command("verify", "nowhere", code=2).stderr


def test_clean(folder):
    command("run", "demo.yaml")
    assert command("clean", "runs/demo").output == "Nothing to remove.\n"
    old = artifact("base")
    command("run", "demo.yaml", "--set", "steps.base.max_steps=4")
    output = command("clean", "runs/demo").output
    assert str(old) in output and "Nothing was removed; add --yes to remove them." in output and old.exists()
    assert "Removed." in command("clean", "runs/demo", "--yes").output
    assert not old.exists() and artifact("base").exists()


def test_schema(folder):
    assert json.loads(command("schema").output)["$defs"]["count"]["properties"]["stage"] == {"const": "count"}


def as_sft(monkeypatch):
    """A stage `sft` that takes what the fake `count` takes, but files as its dataset."""
    monkeypatch.setitem(STAGES, "sft", "fake_stage_tune")
    module = type(sys)("fake_stage_tune")
    vars(module).update(vars(sys.modules["fake_stage_count"]))

    class Settings(fake_stages.CountSettings):
        dataset: list[str]

    module.Settings = Settings
    module.check = lambda settings, inputs: None
    module.references = lambda settings: [fake_stages.Reference(("dataset", 0), settings.dataset[0], ("files",)),
                                          fake_stages.Reference(("model",), settings.model, ("model", "files"))]
    module.forecast = lambda settings, inputs: fake_stages.Forecast()
    module.run = lambda context: {"num_files": len(context.inputs[context.settings.dataset[0]].files)}
    monkeypatch.setitem(sys.modules, "fake_stage_tune", module)


def test_sft_writes_the_recipe_that_it_runs(folder, monkeypatch):
    as_sft(monkeypatch)
    command("run", "demo.yaml")
    Path("my data.jsonl").write_text("{}\n")
    output = command("sft", "--model", "runs/demo/base", "--dataset", "my data.jsonl",
                     "--set", "learning_rate=1e-4").output
    assert "recipe: runs/my-data/recipe.yaml" in output and "num files 1" in output
    text = Path("runs/my-data/recipe.yaml").read_text()
    headings = [line.strip() for line in text.splitlines() if line.strip().startswith("###")]
    assert headings == ["### model", "### data", "### training"]
    assert '    dataset: ["my data.jsonl"]' in text and "    learning_rate: 0.0001" in text
    assert "    # max_steps: 3" in text
    assert "reused" in command("run", "runs/my-data/recipe.yaml").output
    changed = command("sft", "--model", "runs/demo/base", "--dataset", "my data.jsonl", "--name", "my-data")
    assert "learning_rate 0.0001 → 0.001" in changed.output


def test_sft_messages_name_the_option(folder, monkeypatch):
    as_sft(monkeypatch)
    command("run", "demo.yaml")
    good = ["--model", "runs/demo/base", "--dataset", "texts"]
    result = command("sft", *good, "--set", "learning_rat=1", code=2)
    assert result.stderr == "--set learning_rat=1: unknown key “learning_rat”. Did you mean learning_rate?\n"
    result = command("sft", "--model", "nowhere", "--dataset", "texts", code=2)
    assert result.stderr.startswith("--model nowhere: “model” is “nowhere”: neither an earlier step nor a file")
    result = command("sft", "--model", "runs/demo/base", "--dataset", "nothing", code=2)
    assert result.stderr.startswith("--dataset nothing: “dataset.0” is “nothing”: neither")
    assert "“name” is '../x'" in command("sft", *good, "--name", "../x", code=2).stderr
    assert not Path("runs/texts").exists()


def test_of_several_processes_one_writes_the_recipe(folder, monkeypatch):
    as_sft(monkeypatch)
    command("run", "demo.yaml")
    arguments = ("sft", "runs", "many", {"model": "runs/demo/base"}, ["texts"], [])
    monkeypatch.setenv("RANK", "1")
    path, recipe = write_recipe(*arguments)
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    assert write_recipe(*arguments)[1].steps["sft"].settings == recipe.steps["sft"].settings and path.exists()


def test_sft_leaves_a_persons_recipe_alone(folder, monkeypatch):
    as_sft(monkeypatch)
    command("run", "demo.yaml")
    Path("runs/mine").mkdir()
    Path("runs/mine/recipe.yaml").write_text("# my own\n")
    result = command("sft", "--model", "runs/demo/base", "--dataset", "texts", "--name", "mine", code=2)
    assert "was not written by `danlu sft`, and is left as it is" in result.stderr
    assert Path("runs/mine/recipe.yaml").read_text() == "# my own\n"


EVIL = "[red]a[/] [/nothing] \x1b[2J\u202e"


def test_data_cannot_steer_the_terminal(folder, monkeypatch):
    def refused(context):
        raise DataError(EVIL, where="a\x1b.txt:1", hint=EVIL)

    monkeypatch.setattr(sys.modules["fake_stage_count"], "run", refused)
    said = command("run", "demo.yaml", code=2).stderr
    assert "\x1b" not in said and "\u202e" not in said
    assert "a␛.txt:1: [red]a[/] [/nothing] ␛[2J\ufffd\n  [red]a[/]" in said


@pytest.mark.parametrize("option", [("--top-p", "0"), ("--top-p", "1.01"), ("--top-p", "nan"), ("--temperature", "-1"),
                                    ("--temperature", "nan")])
def test_sampling_that_cannot_be_meant_is_refused_before_loading(folder, option):
    # the folder does not exist: it would be the complaint, were it looked at first
    assert f"Invalid value for '{option[0]}'" in command("chat", "no-model", *option, code=2).stderr


def test_python_names():
    from danlu import Recipe, plan, run

    assert callable(plan) and callable(run) and Recipe.load
