"""The skills: right answers, disjoint splits, no repeats."""

import re
from collections import Counter

import pytest

from danlu.core.errors import ConfigError
from danlu.tasks import TASKS, task, task_dialogues
from danlu.tasks.skills import FAMILIES, PHRASES
from danlu.tasks.words import WORDS, spelled

NUMBER = re.compile(r"-?\d+")


def parts(text: str) -> list[str]:
    """The words of the list in a prompt: what follows its last colon, without the question mark."""
    return re.split(r", |、", re.split(r": |：", text)[-1].rstrip("?？"))


def right(name: str, text: str) -> str:
    """The answer worked out anew from the prompt alone."""
    numbers = [int(number) for number in NUMBER.findall(text)]
    words = parts(text)
    if name == "copy":
        return re.split(r": |：", text)[1]
    if name == "reverse":
        return ("、" if "：" in text else ", ").join(reversed(words))
    if name == "digits":
        return re.findall(r"\d+", text)[0][::-1]
    if name == "compare":
        smaller = any(word in text for word in ("smaller", "less", "小"))
        return str(min(numbers) if smaller else max(numbers))
    if name == "add":
        return str(sum(numbers))
    if name == "next":
        return str(numbers[0] + 1)
    if name == "count":
        return str(len(words))
    if name == "pick":
        return words[0] if "first" in text or "第一个" in text else words[-1]
    if name == "kind":
        groups = {kind: words for language in WORDS.values() for kind, words in language.items()}
        asked = max((kind for kind in groups if kind in text.partition(":")[0].partition("：")[0]), key=len)
        return next(word for word in words if word in groups[asked])
    zh, en = "零一二三四五六七八九", ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    if numbers:
        digits = [int(digit) for digit in str(numbers[0])]
        chinese = "汉字" in text or "读" in text
        return "".join(zh[digit] for digit in digits) if chinese else " ".join(en[digit] for digit in digits)
    bare = re.fullmatch(r"Write (.*) in digits\.|Which number is (.*)\?|用数字写出(.*)。|(.*)用数字怎么写？", text)
    assert bare is not None
    words = next(group for group in bare.groups() if group)
    return "".join(str(en.index(word)) for word in words.split()) if words.isascii() else \
        "".join(str(zh.index(digit)) for digit in words)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_answer_is_right(name: str) -> None:
    for split in ("train", "heldout"):
        prompts = TASKS[name].prompts(split, 3, 400)
        assert len(prompts) > 150
        for prompt in prompts:
            assert prompt.answer == right(name, prompt.messages[0].content), prompt
            assert TASKS[name].score(prompt, f" {prompt.answer}\n") == 1.0
            assert TASKS[name].score(prompt, prompt.answer + "0") == 0.0


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_share_nothing_and_prompts_never_repeat(name: str) -> None:
    count = 600
    prompts = {split: [prompt.messages[0].content for prompt in TASKS[name].prompts(split, 5, count)]
               for split in ("train", "heldout")}
    for split in prompts.values():
        assert len(split) == len(set(split))
    assert not set(prompts["train"]) & set(prompts["heldout"])


@pytest.mark.parametrize("name", ["copy", "add", "numerals", "skills"])
def test_a_problem_stays_on_its_side_for_every_seed(name: str) -> None:
    def asked(split: str, seeds: range) -> set[str]:
        return {prompt.messages[0].content for seed in seeds for prompt in TASKS[name].prompts(split, seed, 800)}

    train, heldout = asked("train", range(3)), asked("heldout", range(3, 6))
    assert not train & heldout


def test_no_phrasing_or_order_of_a_held_out_problem_is_trained_on() -> None:
    def sums(split: str) -> set[tuple[int, ...]]:
        return {tuple(sorted(map(int, NUMBER.findall(prompt.messages[0].content))))
                for prompt in TASKS["add"].prompts(split, 0, 10_000)}

    train, heldout = sums("train"), sums("heldout")
    assert not train & heldout
    assert len(train | heldout) == sum(1 for a in range(10, 100) for b in range(1, 10) if a % 10 + b < 10)
    assert 0.05 < len(heldout) / len(train | heldout) < 0.2


def test_small_pools_end_without_repeats() -> None:
    prompts = TASKS["next"].prompts("heldout", 0, 100_000)
    assert 100 < len(prompts) < 1000
    assert len({prompt.messages[0].content for prompt in prompts}) == len(prompts)


def test_the_same_seed_gives_the_same_and_a_smaller_count_its_beginning() -> None:
    for name in ("copy", "compare", "add"):
        assert TASKS[name].prompts("train", 1, 50) == TASKS[name].prompts("train", 1, 2000)[:50]
        assert TASKS[name].prompts("train", 1, 50) != TASKS[name].prompts("train", 2, 50)
    assert TASKS["skills"].prompts("train", 1, 500) == TASKS["skills"].prompts("train", 1, 500)


def test_the_mixture_is_even_and_fills_up() -> None:
    prompts = TASKS["skills"].prompts("heldout", 0, 1000)
    assert Counter(prompt.source for prompt in prompts) == {f"task:{family.name}": 100 for family in FAMILIES}
    many = TASKS["skills"].prompts("heldout", 0, 6000)
    assert len(many) == 6000
    shares = Counter(prompt.source for prompt in many)
    assert min(shares.values()) < 500 and shares["task:copy"] > 600
    languages = Counter(prompt.id.split("/")[1] for prompt in prompts)
    assert abs(languages["en"] - languages["zh"]) < 150
    assert len({prompt.id for prompt in many}) > 5990


def test_dialogues_to_train_on() -> None:
    dialogues = task_dialogues("skills", 0, 500)
    assert len(dialogues) == 500
    for dialogue in dialogues:
        assert [message.role for message in dialogue.messages] == ["user", "assistant"]
        assert len(dialogue.messages[0].content) < 80 and dialogue.messages[1].content
    assert task_dialogues("task:copy", 0, 5)[0].source == "task:copy"


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean reverse"):
        task("task:revers")


def test_every_phrase_is_used() -> None:
    asked = " ".join(prompt.messages[0].content for family in FAMILIES for prompt in family.prompts("train", 0, 1500))
    for phrases in PHRASES.values():
        for phrase in (phrase for language in phrases.values() for phrase in language):
            assert max(phrase.split("{}"), key=len) in asked


@pytest.mark.parametrize("number, zh, en", [(10, "一零", "one zero"), (472, "四七二", "four seven two")])
def test_digits_in_words(number: int, zh: str, en: str) -> None:
    assert (spelled(number, "zh"), spelled(number, "en")) == (zh, en)
