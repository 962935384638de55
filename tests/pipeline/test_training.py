"""Real stages on little data: what is made again, what is saved, what is shown, and what people are told."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from small_runs import changed, run_on_two_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.core.examples import Branch, Example
from danlu.models.load import load_model
from danlu.pipeline.inspect import inspect_step
from danlu.pipeline.lock import hold
from danlu.pipeline.plan import plan
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.pipeline.training import Compute
from danlu.pipeline.upkeep import read_ledger
from danlu.train.log import read_log
from danlu.train.parallel import has_bf16_units

WORDS = ["copper", "river", "seven", "garden", "letter", "cloud", "winter", "stone", "engine", "paper"]
RECIPE = """
name: small
seed: 3
steps:
  corpus:
    stage: corpus
    sources: [{path: texts, category: en}]
    clean: {min_chars: 10}
    heldout_share: 0.3
  tokenizer: {stage: tokenizer, dataset: corpus, vocab_size: 300}
  base:
    stage: pt
    model: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
            max_position_embeddings: 64, tie_word_embeddings: true}
    tokenizer: tokenizer
    dataset: corpus
    cutoff_len: 32
    max_steps: 3
    eval_steps: 3
    plot_loss: false
  chat:
    stage: sft
    model: base
    dataset: talk.jsonl
    cutoff_len: 48
    max_steps: 2
    plot_loss: false
"""


def load(**settings: object) -> Recipe:
    """The recipe with `step__key=value` set; a value of None takes the key away."""
    return changed(RECIPE, **settings)


def go(recipe: Recipe, only: list[str] | None = None) -> dict:
    return run(recipe, only=only, console=Console(quiet=True))


def prepared(step: str) -> list[str]:
    return sorted(path.name for path in Path("runs/small", step).glob("examples-*"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "texts").mkdir()
    for number in range(12):
        lines = [" ".join(WORDS[(number * line + k * k) % 10] for k in range(9)) + "." for line in range(8)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"prompt": f"{WORDS[n % 10]} {n}", "response": " ".join(WORDS[n % 7:n % 7 + 3])} for n in range(24)]
    (folder / "talk.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        go(load())
    return folder


@pytest.fixture(autouse=True)
def in_folder(home, monkeypatch) -> None:
    monkeypatch.chdir(home)


def test_the_saved_model_is_the_trained_one_with_its_template_and_end() -> None:
    folder = go(load())["chat"].folder
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "copper"}], return_dict=False)])
    own = load_model(folder).root
    with torch.no_grad():
        expected = lm(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found = own.eval()(own.batch([Example([], [Branch(ids[0].numpy())])])).logprobs_S
    assert torch.allclose(found, expected, atol=1e-5)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(go(load())["tokenizer"].folder).chat_template
    assert lm.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


def test_examples_are_made_again_only_where_they_change() -> None:
    before = prepared("chat")
    go(load(base__learning_rate=3e-4))  # another model with the same tokenizer
    go(load(chat__learning_rate=3e-4))
    assert prepared("chat") == before and len(prepared("base")) == 1
    go(load(chat__cutoff_len=40))
    assert len(prepared("chat")) == 2
    renamed = Recipe.from_text(RECIPE.replace("  corpus:", "  texts_of_mine:").replace("dataset: corpus",
                                                                                    "dataset: texts_of_mine"))
    go(renamed)
    assert len(prepared("base")) == 1


def test_the_account_of_what_is_held_out_is_kept() -> None:
    rows = [{"prompt": f"question {n}", "response": "a word"} for n in range(5)]
    Path("held.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    folder = go(load(chat__eval_dataset="held.jsonl", chat__eval_steps=1))["chat"].folder
    ledger = read_ledger(folder)
    assert ledger is not None
    stations = {station["name"]: station for station in ledger.stations["stations"]}
    assert stations["read:talk.jsonl"]["in"]["rows"] == 24
    assert stations["eval: read:held.jsonl"]["in"]["rows"] == 6 and stations["eval: learn"]["out"]["rows"] == 5
    assert [count for count, _ in ledger.quarantine.values()] == [1]


def test_inspect_waits_for_no_run_whose_examples_are_there(capsys) -> None:
    with hold(Path("runs/small")):
        inspect_step(load(), "chat", Console(width=150), number=1, model="chat")
        assert "optimizer step 0" in capsys.readouterr().out
        with pytest.raises(ConfigError, match="another danlu run is working"):
            inspect_step(load(chat__cutoff_len=44), "chat", Console(quiet=True))
    inspect_step(load(chat__cutoff_len=44), "chat", Console(width=150), number=1)
    assert "examples" in capsys.readouterr().out


@pytest.mark.parametrize(("settings", "message"), [
    ({"chat__lora_rank": 4}, r"lora_rank is read with finetuning_type: lora only"),
    ({"chat__num_train_epochs": 2}, "num_train_epochs and max_steps cannot both be set"),
    ({"base__val_size": 0.1}, "val_size would hold out a share beside the held-out documents of the corpus “corpus”"),
    ({"base__document": "line"}, "“document” says how text outside a corpus is read"),
    ({"base__cutoff_len": 128}, "cutoff_len is 128, but the model has positions for 64 tokens only"),
    ({"chat__cutoff_len": 65}, "cutoff_len is 65, but the model has positions for 64 tokens only"),
    ({"chat__model": "bse"}, "“model” is “bse”"),
    ({"chat__dataset": "talks.jsonl"}, "talks.jsonl"),
    ({"chat__overlong": "split", "chat__truncation_mode": "keep_end"}, "overlong: split does not read truncation_mode"),
    ({"chat__max_steps": "many"}, "“max_steps” is 'many'"),
    ({"chat__max_step": 3}, "unknown key “max_step”. Did you mean max_steps"),
])
def test_what_cannot_be_meant_is_said_with_its_place(settings, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(load(**settings))
    assert caught.value.exit_code == 2
    assert re.search(r"recipe\.yaml:\d+", str(caught.value))


def test_a_tokenizer_that_does_not_fit_the_model_is_said_with_its_place() -> None:
    larger = load(tokenizer__vocab_size=310)
    go(larger, only=["corpus", "tokenizer"])
    text = yaml.safe_dump({"name": "other", "steps": {"pt": {
        "stage": "pt", "model": "runs/small/chat", "tokenizer": "runs/small/tokenizer", "dataset": "runs/small/corpus",
        "cutoff_len": 32}}}, sort_keys=False)
    with pytest.raises(ConfigError, match=r"recipe\.yaml:6: the tokenizer's ids go up to 309; the model has \d+ rows"):
        plan(Recipe.from_text(text, base=Path.cwd()))
    go(load())  # `current` is the small one again


@pytest.mark.parametrize("settings", [{}, {"chat__max_steps": None}, {"chat__max_steps": None, "chat__val_size": 0.5}])
def test_an_empty_dataset_is_said_with_its_file(settings) -> None:
    Path("empty.jsonl").write_text("")
    with pytest.raises((ConfigError, DataError), match=r"nothing to train on|empty") as caught:
        go(load(chat__dataset="empty.jsonl", **settings))
    assert caught.value.exit_code == 2 and "empty.jsonl" in str(caught.value)


def test_two_processes_give_the_losses_of_one() -> None:
    """The whole road under torchrun (gloo, FSDP2), data preparation by one rank included."""
    run_on_two_ranks(RECIPE, "two")
    alone, found = go(load()), plan(load(), "two").steps
    for step in ("base", "chat"):
        artifact = found[step].artifact
        assert artifact is not None and artifact.metrics["processes"] == 2
        one, two = read_log(alone[step].folder), read_log(artifact.folder)
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for left, right in zip(one, two):
            for name in {"loss", "eval_loss", "grad_norm"} & set(left):
                assert right[name] == pytest.approx(left[name], rel=1e-5)
        assert {p.name for p in artifact.folder.iterdir()} == {p.name for p in alone[step].folder.iterdir()}


@pytest.mark.parametrize(("asked", "with_units", "without"), [
    ("auto", "float32", "float32"), ("fastest", "bf16", "float32"), ("float32", "float32", "float32"),
    ("bf16", "bf16", "bf16")])
def test_the_fastest_precision_is_what_the_processor_has_units_for(monkeypatch, asked, with_units, without) -> None:
    settings = load(base__precision=asked, base__device="cpu").steps["base"].settings
    for units, expected in ((True, with_units), (False, without)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda units=units: {"avx512_bf16": units})
        assert Compute.of(settings).precision == expected
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not including_emulation)
    assert has_bf16_units("cuda")


def test_a_family_that_opens_other_tokenizers_is_refused_before_it_trains() -> None:
    shape = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    with pytest.raises(ConfigError, match="beside a qwen2 model as that family's own kind"):
        go(load(base__model={**shape, "num_key_value_heads": 2}), only=["base"])
    with pytest.raises(ConfigError, match="2 attention heads cannot share 32 key and value heads"):
        plan(load(base__model=shape))


def test_emulated_bf16_is_trained_in_and_said(monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {})
    console = Console(record=True, width=200)
    made = run(load(base__precision="bf16", base__device="cpu"), only=["base"], console=console)
    assert "no units for bf16" in console.export_text() and made["base"].metrics["precision"] == "bf16"
