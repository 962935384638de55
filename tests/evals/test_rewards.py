"""Answers at temperature 1: drawn with seeds of their own, scored and compared as plain forward passes would."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_chat import make_folder
from tiny_judge import make_judge
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from danlu.core.errors import DataError
from danlu.core.records import Message, Prompt
from danlu.evals.generative import Answerer, Question, ask
from danlu.evals.rewards import Drawn, draw, judge_scores, reward_row, token_logprobs
from danlu.evals.statistics import mean_interval, wilson_interval
from danlu.models.load import load_model
from danlu.models.scorer import load_scorer
from danlu.tasks import TASKS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"one": make_folder(place / "one", seed=1), "other": make_folder(place / "other", seed=2),
            "judge": make_judge(place / "judge")}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return ask("task:skills", seed=0, count=12)


def drawn_by(folder: Path, questions: list[Question], seed: int = 0, batch_size: int = 5) -> Drawn:
    loaded = load_model(folder)
    return draw(Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=12, batch_size=batch_size), questions, seed)


def test_each_prompt_has_random_numbers_of_its_own(folders: dict[str, Path], questions: list[Question]) -> None:
    drawn = drawn_by(folders["one"], questions)
    tokens = [said.completion.tokens for said in drawn.said]
    again = drawn_by(folders["one"], questions[:4], batch_size=1)
    assert [said.completion.tokens for said in again.said] == tokens[:4], "neither neighbours nor batches matter"
    assert [said.messages for said in drawn.said] == [question.messages for question in questions]
    different = [said.completion.tokens for said in drawn_by(folders["one"], questions, seed=1).said]
    assert sum(one != other for one, other in zip(tokens, different, strict=True)) > 6
    same_prompt = drawn_by(folders["one"], [questions[0]] * 4)
    assert len({tuple(said.completion.tokens) for said in same_prompt.said}) > 1


def test_scores_are_those_of_the_sequence_classifier(folders: dict[str, Path], questions: list[Question]) -> None:
    said = drawn_by(folders["one"], questions).said
    scores = judge_scores(load_scorer(folders["judge"]).root, said, CPU, 64)
    plain = AutoModelForSequenceClassification.from_pretrained(folders["judge"])
    plain.config.pad_token_id = None  # one sequence at a time: its last token is read, whichever that is
    for answer, score in zip(said, scores, strict=True):
        with torch.no_grad():
            expected = float(plain(torch.tensor([[*answer.prompt, *answer.completion.tokens]])).logits[0, 0])
        assert score == pytest.approx(expected, abs=1e-4)
    assert np.std(scores) > 0.01


def test_kl_is_that_of_full_forward_passes(folders: dict[str, Path], questions: list[Question]) -> None:
    drawn = drawn_by(folders["one"], questions)
    own, other = (load_model(folders[name]).root for name in ("one", "other"))
    drawn.logprobs = token_logprobs(own, drawn.said, CPU, 64)
    assert drawn.kl is None
    drawn.ref_logprobs = token_logprobs(load_model(folders["one"]).root, drawn.said, CPU, 64)
    assert drawn.kl == [0.0] * 12, "a model has not moved from itself"
    drawn.ref_logprobs = token_logprobs(other, drawn.said, CPU, 64)
    plain = [AutoModelForCausalLM.from_pretrained(folders[name]) for name in ("one", "other")]
    for answer, own_logprobs, kl in zip(drawn.said, drawn.logprobs, drawn.kl or [], strict=True):
        ids, start = [*answer.prompt, *answer.completion.tokens], len(answer.prompt)
        with torch.no_grad():
            one, two = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in plain)
        assert own_logprobs == pytest.approx(answer.completion.logprobs, abs=1e-4)
        assert kl == pytest.approx(sum(float(one[at - 1, ids[at]] - two[at - 1, ids[at]])
                                       for at in range(start, len(ids))), abs=1e-4)


def test_a_row_holds_the_means(folders: dict[str, Path], questions: list[Question]) -> None:
    drawn = drawn_by(folders["one"], questions)
    drawn.exact = [1.0] * 3 + [0.0] * 9
    drawn.scores = [0.5 * place for place in range(12)]
    row = reward_row("m", drawn)
    assert (row.model, row.score, row.kl, row.kl_low, row.num_answers) == ("m", 2.75, None, None, 12)
    assert (row.low, row.high) == mean_interval(drawn.scores) and row.low is not None and row.low < 2.75
    assert row.exact == 0.25 and (row.exact_low, row.exact_high) == wilson_interval(3, 12)
    assert row.length == np.mean([len(said.completion.tokens) for said in drawn.said])
    end = load_model(folders["one"]).tokenizer.eos_token_id
    assert row.ended == np.mean([said.completion.tokens[-1] == end for said in drawn.said]) > 0
    drawn.logprobs = [np.full(len(said.completion.tokens), -1.0) for said in drawn.said]
    drawn.ref_logprobs = [np.full(len(said.completion.tokens), -1.5) for said in drawn.said]
    assert reward_row("m", drawn).kl == pytest.approx(0.5 * row.length)
    drawn.ref_logprobs[3][0] = math.nan
    with pytest.raises(DataError, match="the answers of m are not finite"):
        reward_row("m", drawn)


def test_prompts_without_room_are_not_asked(folders: dict[str, Path], questions: list[Question]) -> None:
    long = Question(Prompt((Message("user", "字" * 60),), "a", "task:copy", "x"), TASKS["copy"])
    drawn = drawn_by(folders["one"], [questions[0], long, questions[1]])
    whole = drawn_by(folders["one"], [questions[0], questions[2], questions[1]])
    assert len(drawn.said) == len(drawn.exact) == 2
    assert drawn.said[1].completion.tokens == whole.said[2].completion.tokens, "seeds go by the prompts' places"


def test_the_interval_of_a_mean() -> None:
    assert mean_interval([3.0]) is None and mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = mean_interval([0.0, 1.0] * 50) or (0.0, 0.0)
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
