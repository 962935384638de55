"""Pairs of a right and a worse answer: what is worse about it, and that it is the same every time."""

import re
from collections import Counter
from itertools import islice

import pytest

from danlu.core.errors import ConfigError
from danlu.core.records import Dialogue, Message, Preference, Prompt
from danlu.tasks import TASKS, made_preferences, task_preferences
from danlu.tasks.pairs import WINDOW, preferences_of
from danlu.tasks.skills import FAMILIES
from danlu.tasks.task import Split, Task
from danlu.tasks.words import ALL_WORDS, DIGITS

HAN = re.compile("[\u4e00-\u9fff]")
NAMES = [family.name for family in FAMILIES]


def asked(preference: Preference) -> str:
    return preference.messages[-1].content


def as_prompt(preference: Preference) -> Prompt:
    return Prompt(preference.messages, preference.chosen, preference.source, preference.id)


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_rejected_answer_scores_nothing_and_the_chosen_one_everything(name: str, split: Split) -> None:
    preferences = task_preferences(name, 3, 300, split)
    assert [asked(preference) for preference in preferences] == [
        prompt.messages[-1].content for prompt in TASKS[name].prompts(split, 3, 300)]
    for preference in preferences:
        assert preference.rejected.strip() and preference.rejected != preference.chosen
        assert TASKS[name].score(as_prompt(preference), preference.chosen) == 1.0
        assert TASKS[name].score(as_prompt(preference), preference.rejected) == 0.0


def test_half_is_out_of_form_in_both_languages() -> None:
    preferences = task_preferences("skills", 0, 4000)
    for chinese in (False, True):
        categories = Counter(preference.category for preference in preferences
                             if bool(HAN.search(asked(preference))) == chinese)
        assert set(categories) == {"wrong", "form"} and categories.total() > 1500
        assert 0.44 < categories["form"] / categories.total() < 0.56


def test_wrong_answers_have_the_form_of_right_ones() -> None:
    for preference in task_preferences("skills", 0, 3000):
        if preference.category != "wrong":
            continue
        if preference.chosen.isdigit():
            assert preference.rejected.isdigit() and str(int(preference.rejected)) == preference.rejected, preference
            continue
        language = "zh" if HAN.search(asked(preference)) else "en"
        known = {*ALL_WORDS[language], *DIGITS[language]}
        words = re.split(", |、", preference.rejected)
        if not set(words) <= known:  # digits in words
            words = preference.rejected.split(" ") if language == "en" else list(preference.rejected)
        assert set(words) <= known, preference


def test_wrong_numbers_are_often_near_and_often_of_the_prompt() -> None:
    wrong = [(int(preference.chosen), int(preference.rejected), asked(preference))
             for preference in task_preferences("add", 0, 1500) if preference.category == "wrong"]
    differences = Counter(abs(right - worse) for right, worse, _ in wrong)
    assert differences[1] > 0.1 * len(wrong) and differences[10] > 0.1 * len(wrong)
    assert sum(str(worse) in re.findall(r"\d+", text) for _, worse, text in wrong) > 0.08 * len(wrong)
    compared = [preference for preference in task_preferences("compare", 0, 1000) if preference.category == "wrong"]
    other = sum(preference.rejected in re.findall(r"\d+", asked(preference)) for preference in compared)
    assert other > 0.1 * len(compared)


def test_wrong_lists_have_another_order_another_word_one_less_or_one_twice() -> None:
    kinds: Counter[str] = Counter()
    for preference in task_preferences("reverse", 0, 2000):
        right, worse = (re.split(", |、", answer) for answer in (preference.chosen, preference.rejected))
        if preference.category != "wrong":
            continue
        if len(worse) != 2:
            kinds["missing" if len(worse) < 2 else "repeated"] += 1
        else:
            kinds["order" if worse == right[::-1] else f"{len(set(right) - set(worse))} other"] += 1
    assert set(kinds) == {"missing", "repeated", "order", "1 other", "2 other"} and min(kinds.values()) > 50


def test_answers_out_of_form() -> None:
    pairs = [(asked(preference), preference.chosen, preference.rejected)
             for preference in task_preferences("skills", 0, 4000) if preference.category == "form"]
    assert any(worse == f"The answer is {right}." and not HAN.search(text) for text, right, worse in pairs)
    assert any(worse == f"The answer is {right}." and HAN.search(text) for text, right, worse in pairs)
    assert any(worse == f"答案是{right}。" and HAN.search(text) for text, right, worse in pairs)
    assert any(worse == f"{right}\n{right}" for _, right, worse in pairs)
    assert any(worse == f"{text}\n{right}" for text, right, worse in pairs)
    assert any(worse != right and worse == right.upper() for _, right, worse in pairs)
    assert {"!!!", "。"} <= {worse.removeprefix(right) for _, right, worse in pairs}
    assert any(worse == right[:len(right) // 2] for _, right, worse in pairs)
    holds_right = sum(right in worse for _, right, worse in pairs) / len(pairs)
    assert 0.4 < holds_right < 0.8  # the others are wrong as well


@pytest.mark.parametrize("name", ["copy", "add", "kind"])
def test_a_pair_depends_on_the_seed_and_its_prompt_alone(name: str) -> None:
    many = task_preferences(name, 1, 400)
    assert task_preferences(name, 1, 50) == many[:50]
    mixed = [preference for preference in task_preferences("skills", 1, 2000) if preference.source == f"task:{name}"]
    known = {asked(preference): preference for preference in many}
    assert len(mixed) > 100 and all(preference == known[asked(preference)] for preference in mixed)


def test_another_seed_gives_the_same_prompt_another_worse_answer() -> None:
    many = task_preferences("add", 1, 400)
    others = {asked(preference): preference.rejected for preference in task_preferences("add", 2, 2000)}
    both = [preference for preference in many if asked(preference) in others]
    assert sum(preference.rejected != others[asked(preference)] for preference in both) > len(both) / 2 > 100


@pytest.mark.parametrize("name", [*NAMES, "skills"])
def test_no_held_out_prompt_is_trained_on(name: str) -> None:
    train, heldout = ({asked(preference) for preference in task_preferences(name, 5, 500, split)}
                      for split in ("train", "heldout"))
    assert train and heldout and not train & heldout


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean reverse"):
        task_preferences("task:revers", 0, 1)


class Yes(Task):
    """One answer to everything; `kind` is the set of completions that its scorer takes."""

    name = "yes"

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def prompts(self, split: Split, seed: int, count: int) -> list[Prompt]:
        return [Prompt((Message("user", f"{split} {number}?"),), "yes", "task:yes", f"{split}/{number}")
                for number in range(count)]

    def score(self, prompt: Prompt, completion: str) -> float:
        return super().score(prompt, completion) if self.strict else 1.0


def test_a_task_without_wrong_answers_gives_answers_out_of_form_or_no_pairs() -> None:
    assert {preference.category for preference in preferences_of(Yes(strict=True), 0, 30)} == {"form"}
    assert preferences_of(Yes(strict=False), 0, 30) == []


def chat(question: str, answer: str, number: int = 0) -> Dialogue:
    return Dialogue((Message("system", "s"), Message("user", "hi"), Message("assistant", "hello"),
                     Message("user", question), Message("assistant", answer)), "file", f"file:{number}", "chat")


ENGLISH = [chat(f"question {number}", f"the answer of number {number} is {number * 7} and no other", number)
           for number in range(60)]
CHINESE = [chat(f"第{number}个问题", f"第{number}个问题的答案是{number * 7}，没有别的", number) for number in range(60)]


def test_pairs_are_made_for_dialogues() -> None:
    dialogues = [dialogue for pair in zip(ENGLISH, CHINESE) for dialogue in pair]
    made = list(made_preferences(dialogues, 0))
    assert len(made) == len(dialogues)
    answers = {dialogue.messages[-1].content for dialogue in dialogues}
    for dialogue, preference in zip(dialogues, made):
        assert preference is not None
        assert preference.messages == dialogue.messages[:-1] and preference.chosen == dialogue.messages[-1].content
        assert (preference.source, preference.id) == (dialogue.source, dialogue.id)
        assert preference.rejected.strip() and preference.rejected != preference.chosen
        if preference.category == "swapped":
            assert preference.rejected in answers
            assert bool(HAN.search(preference.rejected)) == bool(HAN.search(preference.chosen))
        else:
            assert preference.rejected not in answers and preference.category == "form"
    assert Counter(preference.category for preference in made if preference) == {"swapped": 60, "form": 60}


def test_broken_answers_are_shuffled_repeated_or_cut() -> None:
    kinds: Counter[str] = Counter()
    for preference in made_preferences(ENGLISH, 1):
        assert preference is not None
        if preference.category != "form":
            continue
        right, worse = preference.chosen.split(), preference.rejected.split()
        kinds["shuffled" if sorted(right) == sorted(worse) else "longer" if len(worse) > len(right) else "cut"] += 1
        assert set(worse[:-1]) <= set(right)
    assert set(kinds) == {"shuffled", "longer", "cut"}


def test_the_seed_and_the_order_decide() -> None:
    dialogues = ENGLISH + CHINESE
    made = list(made_preferences(dialogues, 0))
    assert made == list(made_preferences(iter(dialogues), 0))
    assert made != list(made_preferences(dialogues, 1))


def test_dialogues_of_which_no_pair_can_be_made_are_told() -> None:
    assert list(made_preferences([], 0)) == []
    assert list(made_preferences([chat("q", "a")], 0)) == [None]
    assert list(made_preferences([chat("q", "a"), chat("p", " a")], 0)) == [None, None]
    # another answer to the same question may be as good
    assert list(made_preferences([chat("q", "a"), chat("q", "b")], 0)) == [None, None]
    swapped = list(made_preferences([chat("q", "a"), chat("p", "b")], 0))
    assert [(item.rejected, item.category) for item in swapped if item] == [("b", "swapped"), ("a", "swapped")]
    alone = list(made_preferences([chat("q", "ab")], 0))
    assert alone[0] is not None and alone[0].category == "form"
    unanswered = Dialogue((Message("user", "q"),), "f", "f:1")
    unasked = Dialogue((Message("assistant", "well"), Message("assistant", "then")), "f", "f:2")
    assert list(made_preferences([unanswered, unasked, chat("q", "ab")], 0))[:2] == [None, None]


def test_the_last_answer_to_a_question_is_the_chosen_one() -> None:
    messages = (Message("user", "q"), Message("assistant", "first"), Message("user", "thanks"))
    made = list(made_preferences([Dialogue(messages, "f", "f:1")], 0))
    assert made[0] is not None and (made[0].messages, made[0].chosen) == (messages[:1], "first")


def test_memory_is_bounded_and_a_single_last_dialogue_still_finds_another_answer() -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield chat(f"q{read}", f"a{read}", read)

    assert all(islice(made_preferences(endless(), 0), 10)) and read == WINDOW
    dialogues = [chat(f"q{number}", chr(0x4e00 + number), number) for number in range(WINDOW + 1)]
    assert all(preference is not None and preference.category == "swapped"
               for preference in made_preferences(dialogues, 0))
