"""Small skills in English and Chinese that a model of a few million parameters can learn on a laptop.

Copying and reversing lists, reversing digits, comparing and adding numbers, digits in words, counting on,
counting, picking from a list, and telling kinds of things apart. Prompts and answers are short.
"""

import random
from collections.abc import Iterator

from danlu.tasks.task import Ask, Family, Problem
from danlu.tasks.words import ALL_WORDS, WORDS, Language, listed, spelled

LANGUAGES: tuple[Language, ...] = ("en", "zh")

PHRASES: dict[str, dict[Language, tuple[str, ...]]] = {
    "copy": {
        "en": ("Repeat: {}", "Copy this list: {}"),
        "zh": ("重复：{}", "请照抄：{}"),
    },
    "reverse": {
        "en": ("Reverse the list: {}", "Say it backwards: {}"),
        "zh": ("倒过来说：{}", "把顺序反过来：{}"),
    },
    "digits": {
        "en": ("Reverse the digits of {}.", "Write {} backwards."),
        "zh": ("把{}倒过来写。", "{}的数字反过来是什么？"),
    },
    "larger": {
        "en": ("Which is larger, {} or {}?", "Which number is bigger: {} or {}?"),
        "zh": ("{}和{}哪个大？", "{}与{}，较大的数是哪个？"),
    },
    "smaller": {
        "en": ("Which is smaller, {} or {}?", "Which number is less: {} or {}?"),
        "zh": ("{}和{}哪个小？", "{}与{}，较小的数是哪个？"),
    },
    "add": {
        "en": ("What is {} + {}?", "Add {} and {}."),
        "zh": ("{}加{}等于几？", "计算：{}+{}"),
    },
    "to_words": {
        "en": ("Write {} in words.", "Read the digits of {}."),
        "zh": ("用汉字写出{}。", "把{}逐个读出来。"),
    },
    "to_digits": {
        "en": ("Write {} in digits.", "Which number is {}?"),
        "zh": ("用数字写出{}。", "{}用数字怎么写？"),
    },
    "next": {
        "en": ("Which number comes after {}?", "Count on from {}."),
        "zh": ("{}后面是几？", "{}的下一个数是几？"),
    },
    "count": {
        "en": ("How many words: {}?", "Count the words: {}"),
        "zh": ("有几个词：{}？", "数一数有几个：{}"),
    },
    "first": {
        "en": ("What is the first word: {}?", "Pick the first: {}"),
        "zh": ("第一个词是什么：{}？", "选出第一个：{}"),
    },
    "last": {
        "en": ("What is the last word: {}?", "Pick the last: {}"),
        "zh": ("最后一个词是什么：{}？", "选出最后一个：{}"),
    },
    "kind": {
        "en": ("Which one is {}: {}?", "Find {}: {}"),
        "zh": ("哪个是{}：{}？", "找出{}：{}"),
    },
}


def _asks(name: str, language: Language, answer: str, *parts: object) -> list[Ask]:
    """Every phrasing of that name in one language, with the same parts and answer."""
    return [Ask(language, phrase.format(*parts), answer) for phrase in PHRASES[name][language]]


def _lists(generator: random.Random, fewest: int, most: int) -> Iterator[tuple[Language, list[str]]]:
    """Random lists of different words, endlessly, the languages by turns."""
    while True:
        for language in LANGUAGES:
            yield language, generator.sample(ALL_WORDS[language], generator.randint(fewest, most))


def _shuffled(generator: random.Random, problems: list[Problem]) -> Iterator[Problem]:
    generator.shuffle(problems)
    yield from problems


def copy(generator: random.Random) -> Iterator[Problem]:
    """One or two words, as they are."""
    for language, words in _lists(generator, 1, 2):
        text = listed(words, language)
        yield Problem(text, tuple(_asks("copy", language, text, text)))


def reverse(generator: random.Random) -> Iterator[Problem]:
    """Two words in reverse order; a pair and its reverse are one problem."""
    for language, words in _lists(generator, 2, 2):
        text, back = listed(words, language), listed(words[::-1], language)
        yield Problem(min(text, back), tuple(_asks("reverse", language, back, text)))


def digits(generator: random.Random) -> Iterator[Problem]:
    """Two or three digits in reverse order, asked both ways; the first and the last are not 0."""
    while True:
        text = str(generator.randrange(10, 10 ** generator.randint(2, 3)))
        if text[-1] != "0":
            back = text[::-1]
            yield Problem(min(text, back), tuple(
                ask for language in LANGUAGES for one, other in dict.fromkeys(((text, back), (back, text)))
                for ask in _asks("digits", language, one, other)))


def compare(generator: random.Random) -> Iterator[Problem]:
    """The larger or the smaller of two numbers below 100; the order in the question is random."""
    problems = []
    for small in range(100):
        for large in range(small + 1, 100):
            pair = (small, large) if generator.random() < 0.5 else (large, small)
            problems.append(Problem(f"{small} {large}", tuple(
                ask for language in LANGUAGES for name, answer in (("larger", large), ("smaller", small))
                for ask in _asks(name, language, str(answer), *pair))))
    return _shuffled(generator, problems)


def add(generator: random.Random) -> Iterator[Problem]:
    """A number of two digits and one of one digit, without a carry; a + b and b + a are one problem."""
    problems = []
    for a in range(10, 100):
        for b in range(1, 10 - a % 10):
            problems.append(Problem(f"{a} {b}", tuple(
                ask for language in LANGUAGES for pair in ((a, b), (b, a))
                for ask in _asks("add", language, str(a + b), *pair))))
    return _shuffled(generator, problems)


def numerals(generator: random.Random) -> Iterator[Problem]:
    """Digits to words and back, one by one: 472 is “four seven two” and 四七二.

    A number is held out in both directions and both languages.
    """
    problems = []
    for number in range(10, 1000):
        words: dict[Language, str] = {language: spelled(number, language) for language in LANGUAGES}
        problems.append(Problem(str(number), tuple(
            ask for language in LANGUAGES
            for ask in (*_asks("to_words", language, words[language], number),
                        *_asks("to_digits", language, str(number), words[language])))))
    return _shuffled(generator, problems)


def successor(generator: random.Random) -> Iterator[Problem]:
    """The number after one below 1000."""
    return _shuffled(generator, [Problem(str(number), tuple(
        ask for language in LANGUAGES for ask in _asks("next", language, str(number + 1), number)))
        for number in range(10, 999)])


def count(generator: random.Random) -> Iterator[Problem]:
    """How many words a list of one to six has."""
    for language, words in _lists(generator, 1, 6):
        text = listed(words, language)
        yield Problem(text, tuple(_asks("count", language, str(len(words)), text)))


def pick(generator: random.Random) -> Iterator[Problem]:
    """The first or the last of two or three words."""
    for language, words in _lists(generator, 2, 3):
        text = listed(words, language)
        yield Problem(text, (*_asks("first", language, words[0], text), *_asks("last", language, words[-1], text)))


def kind(generator: random.Random) -> Iterator[Problem]:
    """The one word of three that is an animal, a colour, a food or a part of the body."""
    while True:
        for language in LANGUAGES:
            groups = WORDS[language]
            asked, *others = generator.sample(sorted(groups), 3)
            answer = generator.choice(groups[asked])
            words = [answer, *(generator.choice(groups[other]) for other in others)]
            generator.shuffle(words)
            text = listed(words, language)
            yield Problem(f"{asked}: {' '.join(sorted(words))}", tuple(_asks("kind", language, answer, asked, text)))


FAMILIES = (
    Family("copy", copy), Family("reverse", reverse), Family("digits", digits), Family("compare", compare),
    Family("add", add), Family("numerals", numerals), Family("next", successor), Family("count", count),
    Family("pick", pick), Family("kind", kind),
)
