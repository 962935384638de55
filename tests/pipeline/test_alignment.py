"""Reward models, preferences and policies through the real pipeline: what is saved, what is logged, what is refused."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import tiny_alignment
import torch
from tiny_alignment import CPU, examples_of, go, live_sums, load, made, pair_rows, reference_sums, write_rows
from tiny_chat import make_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import UNITS
from danlu.models.load import load_model
from danlu.models.reading import read_each
from danlu.models.scorer import load_scorer
from danlu.pipeline import reference as reference_columns
from danlu.pipeline.plan import plan
from danlu.pipeline.upkeep import leftovers, read_ledger
from danlu.tokens.train import train_bpe
from danlu.train import step as train_steps
from danlu.train.log import read_log
from danlu.train.trainer import Interrupted

LN2 = math.log(2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_alignment.finished_home_of(tmp_path_factory)


@pytest.fixture(autouse=True)
def in_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in load_model(folder).lm.named_parameters()}


# Reward models ----------------------------------------------------------------------------------------------------


def chat_with_padding_that_ends_turns() -> str:
    """The chat model with a tokenizer whose padding is its end of turn, as many checkpoints have it."""
    folder = Path("padded-by-end")
    if not folder.exists():
        shutil.copytree("start", folder)
        for name, changes in (("tokenizer_config.json", {"pad_token": "<|end|>"}), ("config.json", {"pad_token_id": 1})):
            values = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(values | changes))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    return str(folder)


@pytest.mark.parametrize("model", ["start", "padded-by-end"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_judge_opens_in_transformers_and_scores_alike(model: str, side: str) -> None:
    if model != "start":
        chat_with_padding_that_ends_turns()
    judge = made("judge", model=model)
    lm = AutoModelForSequenceClassification.from_pretrained(judge.folder)
    tokenizer = AutoTokenizer.from_pretrained(judge.folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert lm.config.num_labels == 1 and lm.config.pad_token_id == tokenizer.pad_token_id != end

    examples = list(examples_of("judge", judge))[:7]
    rows = [[*example.stem.tolist(), *branch.tokens.tolist()] for example in examples for branch in example.branches]
    assert len({len(row) for row in rows}) > 2 and all(row[-1] == end for row in rows)
    padded = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        theirs = lm.eval()(**padded).logits[:, 0]
        at_end = [lm.score(lm.model(torch.tensor([row])).last_hidden_state)[0, -1, 0] for row in rows]
    own = torch.tensor([score for row in read_each(load_scorer(judge.folder).root, examples, "scores_N", CPU, 64)
                        for score in row]).float()
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(own, torch.stack(at_end), rtol=0, atol=1e-5)
    assert float(own.std()) > 0.01


def test_a_judge_begins_with_ln_2_and_learns_what_is_better() -> None:
    lines = read_log(made("judge").folder)
    evals = [line for line in lines if "eval_loss" in line]
    assert lines[0]["step"] == 0 and lines[0]["eval_loss"] == pytest.approx(LN2, abs=1e-12)
    assert lines[1]["loss"] == pytest.approx(LN2, abs=1e-12) and lines[1]["rewards/chosen"] == 0
    assert [line["step"] for line in evals] == [0, 4, 8, 12]
    assert evals[-1]["eval_loss"] < 0.6 < evals[0]["eval_loss"] and evals[-1]["eval_accuracy"] > 0.9
    assert {"eval_margin", "eval_rewards/chosen", "eval_rewards/rejected", "eval_accuracy/preference"} <= set(evals[-1])
    assert {"margin", "accuracy", "rewards/chosen", "loss/preference"} <= set(lines[-2])


def test_a_tokenizer_that_cannot_pad_a_judge_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("start", "unpadded")
    config = Path("unpadded/tokenizer_config.json")
    changes = {"pad_token": None, "bos_token": None, "extra_special_tokens": []}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    monkeypatch.setattr(train_steps, "train_step", None)
    with pytest.raises(ConfigError, match="every special token of the tokenizer ends a turn"):
        made("judge", model="unpadded")


# Preferences ------------------------------------------------------------------------------------------------------


def test_preferences_begin_with_ln_2_and_are_evaluated() -> None:
    lines = read_log(made("preferred").folder)
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6) == first["rewards/rejected"] + first["rewards/margins"]
    evals = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evals] == [0, 2, 4] and evals[0]["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_rewards/chosen", "eval_rewards/rejected",
            "eval_logps/chosen", "eval_logps/rejected", "eval_loss/preference"} <= set(evals[-1])
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"]


def test_the_reference_is_the_model_before_training_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = examples_of("preferred", made("preferred"))
    live = live_sums(load_model("start").root, list(store))
    torch.testing.assert_close(torch.tensor(reference_sums(store)), torch.tensor(live), rtol=0, atol=1e-4)

    def asked_again(*_: object) -> None:
        raise AssertionError("the reference's column is there")

    before = sorted(Path("runs/small/preferred").glob("reference-*"))
    monkeypatch.setattr(reference_columns, "reference_column", asked_again)
    faster = made("preferred", learning_rate=3e-4)
    assert faster.folder != made("preferred").folder
    assert sorted(Path("runs/small/preferred").glob("reference-*")) == before
    with pytest.raises(AssertionError, match="is there"):
        made("preferred", cutoff_len=44)


def test_what_the_data_say_of_a_reference_is_used() -> None:
    rows = pair_rows(16)
    for n, row in enumerate(rows[:12]):
        row |= {"ref_chosen_logps": -10.5 - n, "ref_rejected_logps": -20.25 - n}
    write_rows("known.jsonl", rows)
    artifact = made("preferred", dataset="known.jsonl", val_size=None, eval_steps=None, global_batch_size=16, max_steps=1)
    store = examples_of("preferred", artifact)
    told, live = reference_sums(store), live_sums(load_model("start").root, list(store))
    assert told[:12] == [(-10.5 - n, -20.25 - n) for n in range(12)]
    torch.testing.assert_close(torch.tensor(told[12:]), torch.tensor(live[12:]), rtol=0, atol=1e-4)
    margins = [0.1 * ((c - ref_c) - (r - ref_r)) for (c, r), (ref_c, ref_r) in zip(live, told)]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 16
    assert read_log(artifact.folder)[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_another_reference_is_asked_where_one_is_named() -> None:
    artifact = made("preferred", ref_model="other")
    store = examples_of("preferred", artifact)
    live = live_sums(load_model("other").root, list(store))
    torch.testing.assert_close(torch.tensor(reference_sums(store)), torch.tensor(live), rtol=0, atol=1e-4)
    assert abs(read_log(artifact.folder)[1]["loss"] - LN2) > 1e-3


def test_cleaning_keeps_what_the_current_model_was_trained_on() -> None:
    step = Path("cleaned/small/preferred")
    first = go(load(), "preferred", runs="cleaned")["preferred"]
    assert leftovers(step) == []
    second = go(load(preferred__learning_rate=3e-4), "preferred", runs="cleaned")["preferred"]
    assert [item.folder for item in leftovers(step)] == [first.folder]
    go(load(preferred__ref_model="other"), "preferred", runs="cleaned")
    assert {item.folder.name for item in leftovers(step)} == {first.folder.name, second.folder.name,
                                                              first.metrics["reference"]}


# Policies ---------------------------------------------------------------------------------------------------------


def stations_of(folder: Path) -> dict[str, dict]:
    """The stations of an artifact's ledger, each of which balances."""
    ledger = read_ledger(folder)
    assert ledger is not None
    stations = {station["name"]: station for station in ledger.stations["stations"]}
    for station in stations.values():
        for unit in UNITS:
            added, dropped = (sum(count[unit] for count in station[side].values()) for side in ("added", "dropped"))
            assert station["in"][unit] + added == station["out"][unit] + dropped, (station["name"], unit)
    return stations


def test_a_policy_is_trained_with_its_critic_and_its_account_balances() -> None:
    found = go(load())
    folder, judge = found["aligned"].folder, found["judge"].folder
    AutoModelForCausalLM.from_pretrained(folder)
    before, after = weights("start"), weights(folder)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    critic, scorer = load_scorer(folder / "critic").lm, load_scorer(judge).lm
    assert not torch.equal(critic.score.weight, scorer.score.weight)
    assert not torch.equal(critic.model.embed_tokens.weight, scorer.model.embed_tokens.weight)

    stations, metrics = stations_of(folder), found["aligned"].metrics
    rollouts = stations["rollouts"]
    # 14 prompts, 6 at once: the third rollout has two, and four of the next pass
    assert metrics["num_rollouts"] == 3 and rollouts["in"]["rows"] == 18 == metrics["num_answers"]
    assert rollouts["in"]["tokens"] > stations["tokenize"]["out"]["tokens"]
    assert rollouts["added"]["sampled"]["tokens"] == metrics["num_answer_tokens"] > 14
    lines = read_log(folder)
    assert [line["step"] for line in lines if "rollout/reward" in line] == [1, 5, 9]
    assert sum(line["rollout/num_unfinished"] for line in lines if "rollout/reward" in line) == \
        metrics["num_unfinished"]


def test_several_answers_to_a_prompt_are_counted_and_learned() -> None:
    artifact = made("aligned", num_generations=3, max_steps=8)
    first, second = (line for line in read_log(artifact.folder) if "rollout/reward" in line)
    assert (first["rollout/num_prompts"], first["rollout/num_answers"]) == (6, 18) and second["step"] == 5
    assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["rollout/kl"] == pytest.approx(0, abs=1e-4)
    rollouts = stations_of(artifact.folder)["rollouts"]
    assert (rollouts["in"]["rows"], rollouts["added"]["sampled"]["rows"], rollouts["out"]["rows"]) == (12, 24, 36)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("model", ["start", "wide"])
def test_a_policy_reads_the_distribution_that_it_answers_from(temperature: float, model: str) -> None:
    """`wide` has rows for ids that its tokenizer lacks, as many checkpoints do; they are never sampled."""
    if model == "wide" and not Path("wide").exists():
        shutil.copytree("start", "wide")
        lm = AutoModelForCausalLM.from_pretrained("start")
        torch.manual_seed(0)
        lm.resize_token_embeddings(lm.config.vocab_size + 21, mean_resizing=False)
        torch.nn.init.normal_(lm.lm_head.weight[-21:].data, std=0.5)
        lm.save_pretrained("wide")
    first = read_log(made("aligned", model=model, temperature=temperature, max_steps=4).folder)[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["approx_kl"] < 1e-8
    assert first["rollout/kl"] == pytest.approx(0, abs=1e-4)


def test_a_policy_that_is_asked_to_stop_does_so_between_rollouts_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, update = load(), train_steps.update
    go(recipe, "judge", runs="stopped")
    calls = 0

    def interrupted(optimizer: torch.optim.Optimizer) -> None:
        nonlocal calls
        calls += 1
        update(optimizer)
        if calls == 6:  # the second of four steps on the second rollout
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_steps, "update", interrupted)
        with pytest.raises(Interrupted, match="stopped on request after step 8 of 12; a checkpoint was saved"):
            go(recipe, "aligned", runs="stopped")
    [kept] = Path("stopped/small/aligned").glob(".work-*.keep")
    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-8"]
    left, right = (go(recipe, "aligned", runs=runs)["aligned"] for runs in ("stopped", "runs"))
    assert left.folder != right.folder
    for name, entry in right.manifest["files"].items():
        assert name == "timings.jsonl" or left.manifest["files"][name] == entry, name


def test_a_rollout_may_have_fewer_answers_than_mini_batches() -> None:
    write_rows("two.jsonl", [{"prompt": f"river {n}"} for n in range(2)])
    artifact = made("aligned", dataset="two.jsonl", num_mini_batches=3, num_ppo_epochs=1, max_steps=6)
    assert artifact.metrics["num_rollouts"] == 2 and artifact.metrics["steps"] == 6
    assert read_log(artifact.folder)[3]["rollout/num_answers"] == 2


def test_held_out_prompts_are_answered_alike_in_every_evaluation() -> None:
    same = {"eval_dataset": "prompts.jsonl", "eval_steps": 4, "learning_rate": 1e-9, "max_steps": 8}
    artifact = made("aligned", **same)
    evals = [line for line in read_log(artifact.folder) if "eval_loss" in line]
    assert [line["step"] for line in evals] == [0, 4, 8]
    for line in evals:
        assert line["eval_reward"] == -line["eval_loss"] == pytest.approx(evals[0]["eval_reward"], abs=1e-4)
        assert line["eval_kl"] == pytest.approx(0, abs=1e-3) and 1 <= line["eval_length"] <= 6
    several = [go(load(**{f"aligned__{key}": value for key, value in {**same, "num_generations": 2, **more}.items()}),
                  "judge", "aligned", runs=runs)["aligned"]
               for runs, more in (("runs", {}), ("three-at-once", {"generation_batch_size": 3}))]
    left, right = ([line for line in read_log(artifact.folder) if "eval_loss" in line] for artifact in several)
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# What cannot be meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"aligned__reward_model": "judg"}, "“reward_model” is “judg”: neither an earlier step nor a file.*judge"),
    ({"aligned__reward_model": "preferred"}, "“reward_model” is “preferred”, the step .* that leaves a model; needed is a "
                                             "step that leaves a reward_model"),
    ({"preferred__model": "judge"}, "“model” is “judge”, the step .* that leaves a reward_model"),
    ({"aligned__num_mini_batches": 7}, "there are more mini-batches than prompts in a rollout"),
    ({"aligned__cutoff_len": 90, "aligned__max_new_tokens": 7},
     "cutoff_len is 90 and max_new_tokens 7, but the model has positions for 96 tokens only.*Set cutoff_len to 89 or less"),
    ({"preferred__cutoff_len": 97}, "cutoff_len is 97, but the model has positions for 96 tokens only"),
    ({"aligned__global_batch_size": None, "aligned__global_batch_tokens": 100}, "a rollout has a number of prompts"),
    ({"preferred__rpo_form": "scaled"}, "rpo_form is read with rpo_alpha only"),
    ({"preferred__dataset": "task:skills", "preferred__make_rejected": True}, "“make_rejected” says how files are read"),
    ({"preferred__dataset": "task:copy", "preferred__val_size": 0.2}, "val_size would part the phrasings of one problem"),
    ({"aligned__dataset": "task:copy", "aligned__val_size": 0.2}, "val_size would part the phrasings of one problem"),
    ({"aligned__category": "mine"}, "“category” would not be read"),
    ({"preferred__make_rejected": True, "preferred__category": "mine"}, "“category” would not be read"),
    ({"preferred__sample_rejected": True}, "“sample_rejected” needs a task"),
    ({"preferred__finetuning_type": "lora", "preferred__adapter_name_or_path": "judge"},
     "the step “judge” trains no adapters"),
    ({"judge__val_size": None}, "eval_steps is set, but there is nothing to evaluate on"),
    ({"judge__lora_rank": 4}, "lora_rank is read with finetuning_type: lora only"),
])
def test_what_cannot_be_meant_is_said_with_its_place(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(load(**settings))
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert caught.value.exit_code == 2 and re.search(r"recipe\.yaml:\d+", str(caught.value))


def test_pairs_without_a_better_answer_are_refused_with_their_file() -> None:
    write_rows("half.jsonl", [{"prompt": "river", "rejected": "fox"}] * 6)
    with pytest.raises(DataError) as caught:
        made("preferred", dataset="half.jsonl")
    assert "half.jsonl" in str(caught.value) and "only one answer" in str(caught.value)


def test_a_language_model_is_no_judge() -> None:
    with pytest.raises(ConfigError, match=r"start: has no weights for score.weight(.|\n)*stage rm"):
        made("aligned", reward_model="start")


@pytest.mark.parametrize(("step", "key"), [("aligned", "reward_model"), ("aligned", "ref_model"),
                                           ("preferred", "ref_model")])
def test_a_judge_or_reference_of_another_vocabulary_is_refused(step: str, key: str) -> None:
    if not Path("foreign").exists():
        make_folder(Path("foreign"))
        train_bpe(["seven gardens of copper and winter stone"], vocab_size=290, folder=Path("foreign"))
    other = made("judge", model="foreign").folder if key == "reward_model" else "foreign"
    with pytest.raises(ConfigError, match=f"the model of “{key}” reads other tokens than the policy writes"):
        made(step, **{key: str(other)})
