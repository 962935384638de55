"""Exact match: the template's prompts, greedy answers, the tasks' own verdicts."""

import pytest
from tiny_chat import POSITIONS, tiny_loaded

from danlu.core.errors import ConfigError
from danlu.core.records import Message
from danlu.evals.generative import ALL_TASKS, Answerer, Question, ask, shown, skill_rows, spread
from danlu.evals.statistics import wilson_interval
from danlu.models.generate import generate
from danlu.tasks import TASKS


def test_answers_are_greedy_completions_of_the_template() -> None:
    loaded = tiny_loaded()
    answerer = Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=6, batch_size=3)
    questions = ask("task:skills", seed=0, count=7)
    heard: list[int] = []
    answers = answerer.answer([question.messages for question in questions], heard.append)
    assert heard == [3, 6, 7]
    for question, answer in zip(questions, answers, strict=True):
        text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": question.messages[0].content}],
                                                    add_generation_prompt=True, tokenize=False)
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)
        [alone] = generate(loaded.lm, [ids], max_new_tokens=6, stop_ids=[loaded.tokenizer.eos_token_id], pad_id=0)
        assert answer == loaded.tokenizer.decode(alone.answer, skip_special_tokens=True)


def test_prompts_without_room_count_as_wrong() -> None:
    loaded = tiny_loaded()
    answerer = Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=6)
    answers = answerer.answer([(Message("user", "字" * POSITIONS),), (Message("user", "hi"),)])
    assert answers[0] == "" and answerer.unasked == {0}


def test_a_tokenizer_without_a_template_is_refused() -> None:
    loaded = tiny_loaded()
    template, loaded.tokenizer.chat_template = loaded.tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigError, match="has no chat template"):
            Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=6)
    finally:
        loaded.tokenizer.chat_template = template


def test_rows_by_task_and_over_all() -> None:
    questions = ask("copy", 0, 5) + ask("digits", 0, 3)
    completions = [question.prompt.answer if place % 2 else "wrong" for place, question in enumerate(questions)]
    rows = skill_rows("m", [question.scored(text) for question, text in zip(questions, completions, strict=True)])
    assert [(row.task, row.value, row.num_prompts) for row in rows] == [
        ("copy", 2 / 5, 5), ("digits", 2 / 3, 3), (ALL_TASKS, 4 / 8, 8)]
    assert (rows[0].low, rows[0].high) == wilson_interval(2, 5)
    assert len(skill_rows("m", [question.scored("") for question in questions[:5]])) == 1, "one task needs no total"


def test_a_mixture_is_told_apart_and_spread() -> None:
    questions = ask("task:skills", seed=0, count=40)
    names = {question.name for question in questions}
    assert names <= set(TASKS) and len(names) > 5 and "skills" not in names
    places = spread(questions, 6)
    assert len({questions[place].name for place in places}) == 6
    assert [questions[place].name for place in places] == sorted(questions[place].name for place in places)
    assert len(spread(questions, 100)) == len(questions) and spread([], 5) == []


def test_prompts_as_they_are_shown() -> None:
    assert shown([Message("user", "hi")]) == "hi"
    assert shown([Message("system", "be"), Message("user", "hi")]) == "system: be\nuser: hi"
    question = Question(ask("copy", 0, 1)[0].prompt, TASKS["copy"])
    assert question.scored(f" {question.prompt.answer}\n").score == 1.0
