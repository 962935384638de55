"""Pre-training with every objective from random weights: learned, saved, reopened, resumed and shown."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from small_runs import changed
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from danlu.core.errors import ConfigError
from danlu.core.examples import ORIGINAL
from danlu.data.noisy import NoisyStore
from danlu.data.store import ExampleStore
from danlu.pipeline.denoising import noise_of
from danlu.pipeline.inspect import inspect_step
from danlu.pipeline.plan import plan
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.tokens.labelled import Form
from danlu.train.log import read_log

SPECIAL = ["<mask>", *(f"<extra_id_{number}>" for number in range(5)), "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
MODELS = {
    "masked": {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 2, "max_position_embeddings": 48, "hidden_dropout_prob": 0.0,
               "attention_probs_dropout_prob": 0.0},
    "span_corruption": {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16,
                        "dropout_rate": 0.0},
    "infilling": {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
                  "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                  "max_position_embeddings": 48, "dropout": 0.0},
    "causal": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
               "num_attention_heads": 2, "max_position_embeddings": 48}}
WORDS = ["copper", "river", "seven", "garden", "letter", "cloud", "winter", "stone", "engine", "paper"]
STEPS = {"masked": 250, "span_corruption": 200, "infilling": 120, "causal": 20}


def text_of(objective: str) -> str:
    step = {"stage": "pt", "model": MODELS[objective], "tokenizer": "tokenizer", "dataset": "text.txt", "document": "line",
            "val_size": 0.1, "cutoff_len": 40, "learning_rate": 5e-3, "global_batch_size": 16, "eval_steps": 1000,
            "max_steps": STEPS[objective], "plot_loss": False, "logging_steps": 50}
    step |= {"objective": objective} if objective != "causal" else {"fim_rate": 0.7}
    return yaml.safe_dump({"name": "small", "seed": 3, "steps": {
        "tokenizer": {"stage": "tokenizer", "dataset": "text.txt", "vocab_size": 300, "special_tokens": SPECIAL},
        "base": step}}, sort_keys=False)


def recipe(objective: str, **settings: object) -> Recipe:
    return changed(text_of(objective), **settings)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with texts in which a word tells the next one, and the current directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(300):
        start = int(rng.integers(10))
        lines.append(" ".join(WORDS[(start + place) % 10] for place in range(int(rng.integers(8, 14)))))
    Path("text.txt").write_text("\n".join(lines))
    return tmp_path


def go(made: Recipe):
    return run(made, console=Console(quiet=True))


def unigram_loss(store: ExampleStore, held_out: NoisyStore) -> float:
    """The entropy in nats of the held-out targets under the frequencies of these very targets: no unigram is better."""
    targets = np.concatenate([branch.columns.get(ORIGINAL, branch.tokens)[branch.weights != 0].astype(np.int64)
                              for example in held_out for branch in example.branches])
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("objective", MODELS)
def test_from_random_weights_better_than_any_unigram(objective: str) -> None:
    made = recipe(objective)
    artifact = go(made)["base"]
    tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
    settings = made.step("base").settings
    examples = next(Path("runs/small/base").glob("examples-*"))
    held_out = NoisyStore(ExampleStore(examples / "eval"), noise_of(settings, tokenizer))
    metrics = artifact.metrics
    if objective != "causal":
        assert metrics["eval_loss"] < unigram_loss(ExampleStore(examples / "train"), held_out) - 0.1
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    ledger = json.loads((examples / "ledger.json").read_text())
    assert {"tokenize"} <= {station["name"] for station in ledger["stations"]}
    framed = tokenizer("copper river")["input_ids"]
    plain = tokenizer("copper river", add_special_tokens=False)["input_ids"]
    assert framed == (plain if objective == "causal" else [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]), \
        "texts are framed for the model as it has read them"
    if objective != "causal":
        form, eos = Form.of(tokenizer), (tokenizer.eos_token_id,)
        assert form.is_own and form.two == ((tokenizer.bos_token_id,), eos, eos)
    if objective == "masked":
        lm = AutoModelForMaskedLM.from_pretrained(artifact.folder)
        assert tokenizer.mask_token == "<mask>" and 1 < metrics["pseudo_perplexity"] < math.exp(metrics["eval_loss_before"])
        inputs = tokenizer("copper river<mask> garden letter", return_tensors="pt")
        assert lm(input_ids=inputs["input_ids"]).logits.shape[-1] == len(tokenizer)
    elif objective in ("span_corruption", "infilling"):
        lm = AutoModelForSeq2SeqLM.from_pretrained(artifact.folder)
        ids = held_out[0].stem[None].astype(np.int64)
        said = lm.generate(torch.from_numpy(ids), max_new_tokens=8)
        assert said[0, 0] == lm.config.decoder_start_token_id and said.shape[1] > 2


@pytest.mark.parametrize("objective", ["masked", "span_corruption", "infilling"])
def test_adapters_are_saved_beside_the_merged_model(objective: str) -> None:
    step = {"stage": "pt", "objective": objective, "model": "base", "dataset": "text.txt", "document": "line",
            "cutoff_len": 40, "finetuning_type": "lora", "learning_rate": 1e-2, "max_steps": 4, "global_batch_size": 8,
            "plot_loss": False}
    values = yaml.safe_load(text_of(objective))
    values["steps"]["base"]["max_steps"] = 2
    values["steps"] |= {"tuned": step, "further": step | {"adapter_name_or_path": "tuned"}}
    made = go(Recipe.from_text(yaml.safe_dump(values, sort_keys=False), base=Path.cwd()))
    auto = AutoModelForMaskedLM if objective == "masked" else AutoModelForSeq2SeqLM
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({} if objective == "masked" else {"decoder_input_ids": ids.flip(0)})

    def logits(name: str, adapter: str | None = None) -> torch.Tensor:
        lm = auto.from_pretrained(made[name].folder)
        lm = lm if adapter is None else PeftModel.from_pretrained(lm, made[adapter].folder / "adapter")
        with torch.no_grad():
            return lm.eval()(**inputs).logits

    for name in ("tuned", "further"):
        assert torch.allclose(logits("base", name), logits(name), atol=1e-4)
    assert (logits("base") - logits("tuned")).abs().max() > 1e-2 < (logits("tuned") - logits("further")).abs().max()


def test_what_is_resumed_is_what_was_not_interrupted() -> None:
    straight = go(recipe("masked", base__max_steps=6, base__logging_steps=1, base__save_steps=2))["base"]
    log, weights = read_log(straight.folder), (straight.folder / "model.safetensors").read_bytes()
    losses = [line["loss"] for line in log if "loss" in line]
    other = go(recipe("masked", base__max_steps=6, base__logging_steps=1, base__micro_batch_tokens=100))["base"]
    assert other.folder == straight.folder  # micro-batches change nothing that counts
    Path("runs").rename("before")
    again = go(recipe("masked", base__max_steps=6, base__logging_steps=1, base__micro_batch_tokens=100))["base"]
    found = [line["loss"] for line in read_log(again.folder) if "loss" in line]
    assert found == pytest.approx(losses, rel=1e-4) and len(set(losses)) == 6
    Path("runs").rename("between")
    same = go(recipe("masked", base__max_steps=6, base__logging_steps=1, base__save_steps=2))["base"]
    assert (same.folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("objective", ["masked", "span_corruption"])
def test_inspect_shows_what_the_trainer_gets(objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(objective, base__max_steps=2)
    go(made)
    inspect_step(made, "base", Console(width=200), number=2)
    shown = capsys.readouterr().out
    assert ("<mask>" in shown) if objective == "masked" else ("<extra_id_0>" in shown and "stem: " in shown)
    with pytest.raises(ConfigError, match="prices of tokens are those of causal models"):
        inspect_step(made, "base", Console(quiet=True), model="base")


def test_the_plan_says_the_shape_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(recipe("span_corruption")).steps["base"].forecast
    assert any(note.startswith("t5: layers 1 + 1, width 32, heads 2, feed-forward 64, vocabulary 300, tied, parameters")
               for note in found.notes)
    other = plan(recipe("infilling")).steps["base"].forecast
    assert 0 < found.flops.value < other.flops.value  # a decoder that says everything again costs more
    sized = recipe("causal", base__model={"model_type": "llama", "parameters": "200K"})
    assert any("parameters" in note and "llama" in note for note in plan(sized).steps["base"].forecast.notes)


@pytest.mark.parametrize(("objective", "settings", "message"), [
    ("span_corruption", {"tokenizer__special_tokens": ["<extra_id_0>"]}, "has no token \"<extra_id_1>\", \"<extra_id_2>\""),
    ("masked", {"base__sample_steps": 5, "base__sample_prompts": ["a"]}, "does not teach a model to go on"),
    ("masked", {"tokenizer__special_tokens": []}, "has no token \"\\[MASK\\]\", which objective: masked writes"),
    ("causal", {"tokenizer__special_tokens": []}, "fim_prefix"),
    ("masked", {"base__fim_rate": 0.5}, "fim_rate is read with objective: causal only"),
    ("masked", {"base__model": MODELS["causal"]}, "“llama” is no masked language model"),
    ("masked", {"base__cutoff_len": 49}, "positions for 48 tokens only"),
    ("infilling", {"base__neftune_noise_alpha": 5}, "trains all weights, or adapters"),
    ("causal", {"base__cutoff_len": 4}, "leaves no room beside the three tokens of fim_rate"),
    ("infilling", {"base__objective": "span_corruption", "base__noise_density": 0.9, "base__mean_span_length": 1,
                   "tokenizer__special_tokens": [], "tokenizer__num_sentinels": 40, "tokenizer__vocab_size": 310},
     "a target may have 74 tokens, and the model has positions for 48 only"),
    ("infilling", {"base__poisson_lambda": 0.001}, "greater than or equal to 0.1"),
])
def test_what_cannot_be_meant_is_said_with_its_place(objective: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(recipe(objective, **settings))


def test_a_planned_tokenizer_brings_the_tokens_of_its_kind() -> None:
    plan(recipe("masked", tokenizer__special_tokens=[], tokenizer__kind="wordpiece"))
    plan(recipe("span_corruption", tokenizer__special_tokens=[], tokenizer__num_sentinels=5))
    with pytest.raises(ConfigError) as caught:
        plan(recipe("span_corruption", tokenizer__special_tokens=[], tokenizer__num_sentinels=1))
    assert "num_sentinels: 3" in (caught.value.hint or "")
