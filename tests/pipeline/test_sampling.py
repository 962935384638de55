"""Samples during training: what is written and when, that they change nothing, and that a resumed run has the same."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import changed
from transformers import AutoTokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.evals.generative import Answerer
from danlu.models.generate import generate
from danlu.models.load import load_model
from danlu.pipeline.run import run
from danlu.train import trainer as trainer_module

TEXT = "copper river seven garden letter cloud winter stone. " * 40
RECIPE = """
name: sampled
seed: 3
steps:
  corpus: {stage: corpus, sources: [{path: texts, category: en}], clean: {max_repeated_lines: 1}, heldout_share: 0}
  tokenizer: {stage: tokenizer, dataset: corpus, vocab_size: 280}
  base:
    stage: pt
    model: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
            max_position_embeddings: 64, tie_word_embeddings: true}
    tokenizer: tokenizer
    dataset: corpus
    cutoff_len: 32
    max_steps: 5
    save_steps: 2
    learning_rate: 1.0e-2
    plot_loss: false
"""
SAMPLED = {"base__sample_steps": 2, "base__sample_prompts": ["copper river", "winter"], "base__sample_new_tokens": 6}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} {TEXT}")
    return tmp_path


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]


def test_a_prompt_without_room_names_the_keys_of_the_step(home: Path) -> None:
    with pytest.raises(DataError, match=r"sample_prompts\.1: .*the 64 positions.*\n.*lower sample_new_tokens"):
        run(changed(RECIPE, **SAMPLED | {"base__sample_prompts": ["a", "winter " * 60]}), console=Console(quiet=True))


def test_samples_are_written_shown_and_change_nothing(home: Path) -> None:
    output = io.StringIO()
    sampled = run(changed(RECIPE, **SAMPLED), console=Console(file=output, width=200))["base"].folder
    assert [(line["step"], line["prompt"]) for line in lines(sampled)] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("copper river", "winter")]
    assert "step 4: winter ▸" in output.getvalue()
    plain = run(changed(RECIPE), runs="others", console=Console(quiet=True))["base"].folder
    for name in ("model.safetensors", "trainer_log.jsonl"):
        assert (plain / name).read_bytes() == (sampled / name).read_bytes()
    assert not (plain / "samples.jsonl").exists() and plain.name == sampled.name, "the fingerprint knows nothing of samples"


def test_a_sample_is_what_the_model_of_that_step_goes_on_with(home: Path) -> None:
    folder = run(changed(RECIPE, **SAMPLED | {"base__max_steps": 4}), console=Console(quiet=True))["base"].folder
    loaded, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("winter", add_special_tokens=False)]
    [made] = generate(loaded.lm, [ids], max_new_tokens=6, stop_ids=[tokenizer.eos_token_id], pad_id=0,
                      num_ids=len(tokenizer))
    assert lines(folder)[-1] == {"step": 4, "prompt": "winter", "sample": tokenizer.decode(made.answer)}


def test_a_resumed_run_has_the_same_samples(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(changed(RECIPE, **SAMPLED), console=Console(quiet=True))["base"].folder

    def stops(self: trainer_module.Trainer) -> None:
        saved(self)
        if self.state.step == 2:
            raise KeyboardInterrupt

    saved = trainer_module.Trainer.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.Trainer, "save", stops)
        run(changed(RECIPE, **SAMPLED), runs="others", console=Console(quiet=True))
    [kept] = Path("others/sampled/base").glob(".work-*.keep")
    with open(kept / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "prompt": "winter", "sample": "of an attempt that is taken back"}\n')
    again = run(changed(RECIPE, **SAMPLED), runs="others", console=Console(quiet=True))["base"].folder
    assert (again / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_in_fine_tuning_the_prompts_are_requests(home: Path) -> None:
    rows = [{"prompt": f"seven {n}", "response": "garden letter"} for n in range(8)]
    Path("talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = """
  chat: {stage: sft, model: base, dataset: talk.jsonl, cutoff_len: 48, max_steps: 2, plot_loss: false, sample_steps: 2,
         sample_prompts: [seven 1], sample_new_tokens: 5}
"""
    folder = run(changed(RECIPE + chat), console=Console(quiet=True))["chat"].folder
    loaded = load_model(folder)
    [answer] = Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=5).answer([(Message("user", "seven 1"),)])
    assert [line["step"] for line in lines(folder)] == [0, 2] and lines(folder)[1]["sample"] == answer
    long = changed(RECIPE + chat.replace("sample_new_tokens: 5", "sample_new_tokens: 64"))
    with pytest.raises(DataError, match="leaves no room for 64 tokens"):
        run(long, runs="others", console=Console(quiet=True))


@pytest.mark.parametrize(("settings", "said"), [
    ({"base__sample_steps": 2}, "sample_steps needs sample_prompts"),
    ({"base__sample_prompts": ["x"]}, "sample_prompts is read with sample_steps only")])
def test_settings(home: Path, settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changed(RECIPE, **settings)
