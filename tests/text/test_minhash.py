"""MinHash: the units, the estimate and the bands. What goes for it is in test_corpus_road.py."""

import numpy as np
import pytest

from danlu.text.characters import BLANK, LETTER, MARK, NUMBER, SINGLE, SYMBOL, kind_of, ngrams, units
from danlu.text.minhash import (
    NearConfig,
    band_keys,
    is_empty,
    shingles,
    signature,
    signature_of,
    similarity,
)

CONFIG = NearConfig()
SIGNATURE = [3667578538, 3229601228, 1500999864]
KEYS = [10561325728841782978]


def text_of(numbers: range) -> str:
    return " ".join(f"word{number}" for number in numbers)


@pytest.mark.parametrize("character, kind", [("a", LETTER), ("1", NUMBER), ("½", NUMBER), (" ", BLANK), ("\u3000", BLANK),
                                             ("，", SYMBOL), ("你", SINGLE), ("の", SINGLE), ("\u0301", MARK), ("é",
                                             LETTER),
                                             ("𠀀", SINGLE), ("한", LETTER), ("😀", SYMBOL)])
def test_kinds(character: str, kind: int) -> None:
    assert kind_of(ord(character)) == kind


@pytest.mark.parametrize("one, other", [
    ("Hello, world!", "hello world"), ("你好，世界", "你\n好 世界"), ("ＡＢＣ １", "abc 1"), ("a-b", "a b"), ("e\u0301t",
    "ét")])
def test_units_do_not_see_case_width_wrapping_and_punctuation(one: str, other: str) -> None:
    assert units(one).tolist() == units(other).tolist()


def test_units_see_letters_order_and_borders() -> None:
    assert len(units("to be or not to be")) == 6 and len(set(units("to be or not to be").tolist())) == 4
    assert len(units("我有2本book")) == 5  # 我 有 2 本 book
    assert units("ab c").tolist() != units("a bc").tolist()
    assert units("ab ba").tolist()[0] != units("ab ba").tolist()[1]
    assert len(units("，。 \n")) == 0
    assert len(ngrams(units("a b a b a"), 2)) == 4 and len(set(ngrams(units("a b a b a"), 2).tolist())) == 2
    assert len(ngrams(units("a b"), 5)) == 1


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two texts' shingles, exactly."""
    first, second = set(one.tolist()), set(other.tolist())
    return len(first & second) / len(first | second)


def test_jaccard_of_a_worked_example() -> None:
    config = NearConfig(shingle=2)
    one, other = shingles("a b c d", config), shingles("b c d e", config)  # ab bc cd | bc cd de
    assert jaccard(one, other) == 2 / 4
    assert len(shingles("", config)) == 0


def test_the_share_of_equal_places_estimates_jaccard_without_bias() -> None:
    errors = []
    for seed in range(40):
        config = NearConfig(seed=seed, bands=32, rows=8)
        one, other = shingles(text_of(range(400)), config), shingles(text_of(range(100, 500)), config)
        errors.append(similarity(signature_of(one, config), signature_of(other, config)) - jaccard(one, other))
    assert jaccard(one, other) == pytest.approx(296 / 496)
    deviation = (0.6 * 0.4 / 256) ** 0.5
    assert abs(np.mean(errors)) < 4 * deviation / 40 ** 0.5
    assert np.std(errors) < 1.5 * deviation


def test_a_signature_does_not_depend_on_order_repetition_or_blocks() -> None:
    hashes = shingles(text_of(range(3000)), CONFIG)
    assert signature_of(hashes, CONFIG).tolist() == signature_of(np.concatenate([hashes[::-1], hashes]), CONFIG).tolist()
    assert is_empty(signature("，。", CONFIG)) and not is_empty(signature("好", CONFIG))
    assert signature("好", CONFIG).tolist() != signature("好", NearConfig(seed=2)).tolist()


def test_a_signature_is_the_same_everywhere() -> None:
    assert signature("The lamp had to be lit.", NearConfig(bands=1, rows=3)).tolist() == SIGNATURE
    assert band_keys(signature("The lamp had to be lit.", NearConfig(bands=1, rows=3)),
                     NearConfig(bands=1, rows=3)).tolist() == KEYS


def test_bands_agree_where_all_of_their_places_do() -> None:
    config = NearConfig(bands=3, rows=2)
    one = np.arange(6, dtype=np.uint32)
    other = one.copy()
    other[3] += 1
    same = band_keys(one, config) == band_keys(other, config)
    assert same.tolist() == [True, False, True]
    assert len(set(band_keys(np.zeros(6,
        np.uint32), config).tolist())) == 3  # the same places in another band are another key
    assert band_keys(np.stack([one, other]), config).shape == (2, 3)
