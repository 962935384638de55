"""The n-gram model of characters."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.text import ngram
from danlu.text.ngram import NUM_CHARACTERS, PRUNED, CharNgram

TEXT = st.text(st.sampled_from("ab \n中文é"), max_size=30)


def plain_bits(texts: list[str], order: int, text: str) -> list[float]:
    """The equation, character by character, from counts in dictionaries."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for known in texts:
        padded = " " * (order - 1) + known
        for place in range(order - 1, len(padded)):
            for length in range(order):
                counts[padded[place - length:place]][padded[place]] += 1
    counts = {context: left for context, behind in counts.items() if (left := Counter(
        {character: count for character, count in behind.items() if count > 1 or len(context) + 1 < PRUNED}))}

    def p(context: str, character: str) -> float:
        shorter = p(context[1:], character) if context else 1 / NUM_CHARACTERS
        behind = counts.get(context, Counter())
        return (behind[character] + len(behind) * shorter) / (behind.total() + len(behind)) if behind else shorter

    padded = " " * (order - 1) + text
    return [-np.log2(p(padded[place - order + 1:place], padded[place])) for place in range(order - 1, len(padded))]


@given(texts=st.lists(TEXT, min_size=1, max_size=5), text=st.text(st.sampled_from("ab \n中文éz😀"), max_size=20),
       order=st.integers(2, 4), at_once=st.integers(1, 40))
def test_it_is_the_equation(texts: list[str], text: str, order: int, at_once: int) -> None:
    if not any(texts):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "SORTED_AT_ONCE", at_once)
        patch.setattr(ngram, "SCORED_AT_ONCE", at_once)
        model = CharNgram.train(texts, order)
        expected = plain_bits(texts, order, text)
        assert model.bits(text) == pytest.approx(expected, abs=1e-4)
        assert model.perplexity(text) == pytest.approx(2 ** np.mean(expected) if expected else 1, rel=1e-4)


def test_probabilities_of_a_worked_example() -> None:
    """After “aab”: p(a) = (2 + 2/V) / 5 with one character; after a blank or an a, mixed with what follows those."""
    model = CharNgram.train(["aab"], order=2)
    one_a, one_b = (2 + 2 / NUM_CHARACTERS) / 5, (1 + 2 / NUM_CHARACTERS) / 5
    after_blank_a = (1 + 1 * one_a) / 2
    after_a = {"a": (1 + 2 * one_a) / 4, "b": (1 + 2 * one_b) / 4}
    assert 2 ** -model.bits("aab") == pytest.approx([after_blank_a, after_a["a"], after_a["b"]])
    assert 2 ** -model.bits("ba")[1] == pytest.approx(one_a)  # nothing followed b


def test_probabilities_of_all_characters_sum_to_one() -> None:
    model = CharNgram.train(["the lamp had to be lit", "the lamp"], order=3)
    for context in ("", "t", "th", "zz"):
        seen = sorted(set("the lamp had to be lit"))
        total = sum(2 ** -model.bits(context + character)[-1] for character in seen)
        unseen = 2 ** -model.bits(context + "ж")[-1]
        assert total + unseen * (NUM_CHARACTERS - len(seen)) == pytest.approx(1)


def test_noise_is_less_likely_than_prose() -> None:
    model = CharNgram.train(["The lamp had to be lit, and nobody else was there to do it. " * 3,
                             "灯总得有人点，岛上再没有别的人了。" * 2])
    assert model.perplexity("nobody had to be there") < 30 < model.perplexity("xq#zv 9f@k")
    assert model.perplexity("岛上有人") < 100 < model.perplexity("锟斤拷烫烫")
    assert model.perplexity("") == 1
    with pytest.raises(ValueError, match="needs a text"):
        CharNgram.train([""])


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = CharNgram.train(["The lamp had to be lit. The lamp."])
    files = model.save(tmp_path / "a")
    assert sorted(files) == sorted((tmp_path / "a").iterdir())
    again = CharNgram.load(tmp_path / "a")
    assert np.array_equal(model.bits("the lamb"), again.bits("the lamb"))
    for file in again.save(tmp_path / "b"):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
