"""A mix in a recipe: in the plan, before the run, in the log, in the artifact; and what is said where it cannot be."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import changed

from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.inspect import accounts_beforehand, inspect_step
from danlu.pipeline.plan import plan
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.train.log import read_log

DOCS = Path(__file__).resolve().parents[2] / "docs"
WORDS = ["copper", "river", "seven", "garden", "letter", "cloud", "winter", "stone", "engine", "paper"]
RECIPE = """
name: mixed
seed: 3
steps:
  corpus:
    stage: corpus
    sources: [{path: en, category: en}, {path: zh.txt, document: paragraph, category: zh}]
    clean: {min_chars: 10}
    heldout_share: 0.2
  tokenizer: {stage: tokenizer, dataset: corpus, vocab_size: 300}
  base:
    stage: pt
    model: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
            max_position_embeddings: 64, tie_word_embeddings: true}
    tokenizer: tokenizer
    dataset: [corpus, qa.jsonl]
    cutoff_len: 48
    global_batch_tokens: 600
    max_steps: 12
    eval_steps: 6
    plot_loss: false
    mix:
      buckets: 2
      phases:
        - {name: inject, ratio: 0.5, shares: {zh: 0.75, en: 0.25}}
        - {name: replay, shares: {zh: 0.3, en: 0.3, qa: 0.4}}
"""
SMALL = {"base__dataset": "corpus", "base__mix": {"shares": {"zh": 0.5, "en": 0.5}}}


def said(action, width: int = 140) -> str:
    """What an action prints on a console."""
    console = Console(file=io.StringIO(), width=width)
    action(console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "en").mkdir()
    for number in range(14):
        lines = [" ".join(WORDS[(number * line + k * k) % 10] for k in range(9)) + "." for line in range(8)]
        (folder / "en" / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    texts = ["".join(chr(0x4E00 + (number * 7 + k * k) % 60) for k in range(40)) + "。" for number in range(40)]
    (folder / "zh.txt").write_text("\n\n".join(texts), encoding="utf-8")
    rows = [{"source": f"{WORDS[n % 10]} {n}? ", "target": WORDS[n % 7], "category": "qa"} for n in range(40)]
    (folder / "qa.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, said(lambda console: run(changed(RECIPE), console=console))


@pytest.fixture(autouse=True)
def in_folder(home, monkeypatch) -> None:
    monkeypatch.chdir(home[0])


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the table below a title, by the first."""
    lines = text[text.index(title):].splitlines()[1:]
    end = next(number for number, line in enumerate(lines) if line.startswith("└"))
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[:end] if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_the_run_tells_its_mix_before_and_after(home) -> None:
    before, after = rows_of(home[1], "the mix of 12 steps"), rows_of(home[1], "what 12 steps have learned")
    assert before.keys() - {"all"} == after.keys() == {"en", "qa", "zh"}
    for name in ("en", "qa", "zh"):
        assert [before[name][place] for place in (0, 1, 4)] == after[name][:3] and float(after[name][3]) > 0
    asked, realised = before["zh"][:2]
    assert float(asked.removesuffix(" %")) == pytest.approx(float(realised.removesuffix(" %")), abs=2)
    assert " → " in after["zh"][4] and after["qa"][4] == "", "the held-out loss, where something is held out"
    phases = rows_of(home[1], "asked → realised")
    assert phases["qa"][0] == "0.00 % → 0.00 %" and phases["qa"][1].startswith("40.00 % → ")
    assert home[1].index("the mix of 12 steps") < home[1].index("what 12 steps have learned")


def test_the_log_and_the_artifact_keep_the_account(home) -> None:
    artifact = run(changed(RECIPE), console=Console(quiet=True))["base"]
    account = json.loads((artifact.folder / "mix.json").read_text(encoding="utf-8"))
    steps = [line for line in read_log(artifact.folder) if "loss" in line]
    for row in account["groups"]:
        name = row["name"]
        assert steps[-1][f"share/{name}"] == pytest.approx(row["realised"])
        assert steps[-1][f"epochs/{name}"] == pytest.approx(row["epochs"])
        own = artifact.metrics["categories"][name]
        assert own["epochs"] == row["epochs"] and own["loss"] > 0
        assert name == "qa" or own["eval_loss"] != own["eval_loss_before"]
    assert steps[-1]["num_targets"] <= 600 and sum(line["num_targets"] for line in steps) == account["tokens"]
    assert [phase["name"] for phase in account["phases"]] == ["inject", "replay"]
    assert all("loss/qa" not in line for line in steps[:6]) and all("loss/qa" in line for line in steps[6:])
    assert {"eval_loss/en", "eval_loss/zh"} <= set(read_log(artifact.folder)[0])


def test_inspect_tells_it_by_source_too(home) -> None:
    text = said(lambda console: inspect_step(changed(RECIPE), "base", console, number=1, at=11))
    found = rows_of(text, "what 12 steps take")
    assert found["zh"][:6] == rows_of(home[1], "the mix of 12 steps")["zh"][:6]
    assert sum(name.startswith("en/") for name in found) == 5 and "and 4 more" in " ".join(found)
    folders = sorted(Path("runs/mixed/base").glob("examples-*"))
    said(lambda console: inspect_step(changed(RECIPE, base__mix={"buckets": 3, "temperature": 2}), "base", console))
    assert sorted(Path("runs/mixed/base").glob("examples-*")) == folders, "another mix does not tokenise again"


def test_a_step_without_a_mix_tells_what_its_data_are_made_of(home) -> None:
    text = said(lambda console: inspect_step(changed(RECIPE, base__mix=None), "base", console))
    found = rows_of(text, "what 12 steps take")
    assert found.keys() >= {"en", "qa", "zh"}


def test_the_plan_knows_about_as_much(home) -> None:
    text = said(lambda console: plan(changed(RECIPE, **SMALL)).render(console))
    found = rows_of(text, "base: mix of learned tokens")
    assert found["zh"][0] == found["en"][0] == "50.00 %" and found["zh"][1].startswith("≈ ")
    assert found["zh"][2] != found["en"][2]
    text = said(lambda console: plan(changed(RECIPE, base__max_steps=14)).render(console))  # qa has not been counted
    assert rows_of(text, "base: mix of learned tokens, 2 buckets")["qa"] == ["0.00 %", "40.00 %", "≈ 1,680"]
    several = {"base__max_steps": None, "base__dataset": "corpus"}
    once, twice = (plan(changed(RECIPE, **several, base__mix={"epochs": {"zh": count, "en": count}})).steps["base"].forecast
                   for count in (1, 2))
    assert twice.tokens.value == pytest.approx(2 * once.tokens.value)
    assert twice.steps.value == pytest.approx(2 * once.steps.value)
    passes = {"base__max_steps": None, "base__dataset": "corpus", "base__num_train_epochs": 1}
    both, one = (plan(changed(RECIPE, **passes, base__mix={"shares": shares})).steps["base"].forecast
                 for shares in ({"zh": 0.5, "en": 0.5}, {"zh": 1, "en": 0}))
    assert one.tokens.value < 0.9 * both.tokens.value, "what has no share is not read"


def test_the_plan_says_of_which_precision_its_time_is(home, monkeypatch) -> None:
    said_of = {}
    for units in (True, False):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda units=units: {"amx_bf16": units})
        for precision in ("auto", "fastest", "float32", "bf16"):
            found = plan(changed(RECIPE, base__precision=precision, base__device="cpu")).steps["base"].forecast
            said_of[precision, units] = " ".join(found.notes)
            assert (found.seconds is None) == (precision == "bf16" and not units), "emulation is not forecast"
    assert all("the time is that of float32" in said_of[precision, True] for precision in ("fastest", "bf16"))
    assert "no units for bf16" in said_of["bf16", False]
    assert not any("bf16" in said_of[precision, False] for precision in ("auto", "fastest", "float32"))
    assert not any("bf16" in said_of[precision, True] for precision in ("auto", "float32"))


def test_the_plan_knows_exactly_once_the_examples_are_there(home) -> None:
    found = plan(changed(RECIPE, base__max_steps=14))
    accounts = accounts_beforehand(found, Console(quiet=True))
    text = said(lambda console: found.render(console, accounts))
    inspected = said(lambda console: inspect_step(changed(RECIPE, base__max_steps=14), "base", console))
    told = rows_of(inspected, "what 14 steps")
    planned = rows_of(text, "base: mix of learned tokens, 2 buckets")
    assert planned == {name: cells for name, cells in told.items() if name in planned} and {*planned} == {
        "en", "qa", "zh", "all"}
    assert planned["zh"][0] != planned["zh"][1] and rows_of(text, "asked → realised")["qa"][0] == "0.00 % → 0.00 %"
    assert "base: “qa” is seen" in text and "“en” is seen" not in text
    limited = plan(changed(RECIPE, base__mix={"shares": {"zh": 0.3, "en": 0.3, "qa": 0.4}, "max_epochs": 2}))
    with pytest.raises(DataError, match=r"“qa” would be seen .* times; mix\.max_epochs is 2"):
        limited.render(Console(quiet=True), accounts_beforehand(limited, Console(quiet=True)))
    before = sorted(Path("runs/mixed").rglob("*"))
    for other in ({"base__cutoff_len": 40}, {"base__dataset": "corpus", "base__mix": SMALL["base__mix"]}):
        assert accounts_beforehand(plan(changed(RECIPE, **other)), Console(quiet=True)) == {}, "other examples"
    assert accounts_beforehand(plan(changed(RECIPE)), Console(quiet=True)) == {}, "has run; nothing is planned"
    assert accounts_beforehand(plan(changed(RECIPE, corpus__heldout_share=0.3)), Console(quiet=True)) == {}
    assert sorted(Path("runs/mixed").rglob("*")) == before, "a plan writes nothing"


@pytest.mark.parametrize(("settings", "message"), [
    ({"base__mix": {"shares": {"zh": 0.5, "en": 0.4, "xx": 0.1}}, "base__dataset": "corpus"},
     r"(?s)recipe.*no document is of the category “xx”.*The data hold: en, zh"),
    ({"base__mix": {"shares": {"zh": 1}}, "base__dataset": "corpus"}, "the data hold the category “en”, which the mix"),
    ({"base__mix": {"shares": {"zh": 0.5, "en": 0.4}}}, "these sum to 0.9"),
    ({"base__mix": {"epochs": {"zh": 1, "en": 1, "qa": 1}}}, "mix.epochs say how long to train, and so does max_steps"),
    ({"base__mix": {"buckets": 20}}, "the run has 12 of 12 steps and needs at least 20"),
    ({"base__mix": {"bucket": 2}}, "unknown key “mix.bucket”. Did you mean buckets"),
    ({"base__interleave_probs": [0.5, 0.5]}, "unknown key “interleave_probs”. Did you mean mix"),
])
def test_what_cannot_be_meant_is_said_when_planning(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(changed(RECIPE, **settings))


@pytest.mark.parametrize(("mix", "message"), [
    ({"shares": {"zh": 0.3, "en": 0.3, "qa": 0.4}, "max_epochs": 2}, "“qa” would be seen .* times; mix.max_epochs is 2"),
    ({"shares": {"zh": 0.5, "en": 0.5}}, "the category “qa”, which the mix does not name"),
])
def test_what_only_the_examples_show_is_said_before_the_first_step(mix: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(changed(RECIPE, base__mix=mix), console=Console(quiet=True))
    assert not list(Path("runs/mixed/base").glob(".work-*/trainer_log.jsonl"))


def test_the_pages_hold_the_same_recipe_and_it_can_be_read() -> None:
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in ("mixing.md", "mixing.zh.md")]
    samples = [re.findall(r"```(yaml|json)\n(.*?)```", page, re.S) for page in pages]
    assert samples[0] == samples[1] and len(samples[0]) == 2
    recipe = Recipe.from_text(next(text for kind, text in samples[0] if kind == "yaml"), base=Path.cwd())
    settings = recipe.step("base").settings
    assert [border[:2] for border in settings.mix.borders(settings.max_steps)][::4] == [(0, 4), (15, 23), (45, 49)]
    rows = [json.loads(line) for text in samples[0] if text[0] == "json" for line in text[1].splitlines()]
    assert {*rows[0]} == {"source", "target", "category"} and len(rows) == 2


def test_fine_tuning_mixes_too(home) -> None:
    chat = """
  chat: {stage: sft, model: base, dataset: qa.jsonl, cutoff_len: 48, max_steps: 2, plot_loss: false, global_batch_size: 4,
         mix: {by: source, shares: {"qa*": 1}}}
"""
    recipe = changed(RECIPE + chat)
    text = said(lambda console: run(recipe, only=["chat"], console=console))
    assert rows_of(text, "what 2 steps have taken")["qa*"][0] == "100.00 %"
    asked, realised, _, loss = rows_of(text, "what 2 steps have learned")["qa"][:4]
    assert (asked, realised) == ("–", "100.00 %") and 1 < float(loss) < 9, "losses are of categories, whatever is mixed"
    assert rows_of(said(lambda console: plan(changed(RECIPE + chat, chat__max_steps=3)).render(console)),
                   "chat: mix of learned tokens")["qa*"][0] == "100.00 %"
