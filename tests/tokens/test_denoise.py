"""Corruptions: the papers' own examples, what must hold for every draw, and their frequencies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.examples import ORIGINAL, Branch, Example
from danlu.tokens.denoise import (
    SENTENCE,
    WORD,
    FillInMiddle,
    Infilling,
    Masked,
    SpanCorruption,
    division,
    num_spans,
    starts_of,
)

MASK, CLS, SEP = 900, 901, 902
SENTINELS = np.arange(800, 860)
ORDINARY = np.arange(100, 300)


def framed(tokens: list[int], **columns: list[int]) -> Example:
    around = {name: [-1, *values, -1] for name, values in columns.items()}
    return Example([], (Branch([CLS, *tokens, SEP], [0, *[1] * len(tokens), 0], around),), "s", "c", "1")


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def masked(example: Example, noise: Masked, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    [branch] = noise(example, draw(seed)).branches
    return branch.tokens, branch.weights, branch.columns[ORIGINAL].astype(int)


@given(st.integers(1, 80), st.integers(0, 10_000), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_masking_changes_chosen_tokens_only(count: int, seed: int, probability: float) -> None:
    example = framed(list(range(100, 100 + count)))
    tokens, weights, original = masked(example, Masked(MASK, ORDINARY, probability), seed)
    before = example.branches[0].tokens
    assert (original == before).all() and (tokens[weights == 0] == before[weights == 0]).all()
    assert weights[0] == weights[-1] == 0 and weights.sum() == min(count, max(1, round(probability * count)))
    changed = tokens[weights == 1]
    assert np.isin(changed, [MASK, *ORDINARY]).all()


def test_of_the_chosen_tokens_80_10_10_become_mask_another_and_stay() -> None:
    example, noise = framed(list(range(100, 300)) * 10), Masked(MASK, np.array([5]), 0.5)
    tokens, weights, original = masked(example, noise, 1)
    chosen = weights == 1
    shares = [(tokens[chosen] == MASK).mean(), (tokens[chosen] == 5).mean(), (tokens == original)[chosen].mean()]
    assert chosen.sum() == 1000 and np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.04


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_whole_words_are_masked_whole_and_hold_to_the_share(sizes: list[int], seed: int) -> None:
    words = [number for number, size in enumerate(sizes) for _ in range(size)]
    example = framed([100 + place for place in range(len(words))], **{WORD: words})
    _, weights, _ = masked(example, Masked(MASK, ORDINARY, 0.3, whole_words=True), seed)
    chosen = weights[1:-1] == 1
    wanted = max(1, round(0.3 * len(words)))
    assert 0 < chosen.sum() <= wanted
    if min(sizes) > wanted:  # no word fits: a part of one is chosen
        assert chosen.sum() == wanted and len(set(np.array(words)[chosen])) == 1
        return
    for number in set(words):
        assert len(set(chosen[np.array(words) == number])) == 1
    whole = [size for number, size in enumerate(sizes) if not chosen[words.index(number)]]
    assert not whole or min(whole) > wanted - chosen.sum(), "as many as fit"


def test_a_long_word_is_passed_over_as_long_as_others_fit() -> None:
    words = [0] * 12 + [1, 2, 3, 4, 5, 6, 7, 8]
    example = framed([100 + place for place in range(20)], **{WORD: words})
    for seed in range(20):
        chosen = masked(example, Masked(MASK, ORDINARY, 0.15, whole_words=True), seed)[1][1:-1]
        assert chosen.sum() == 3 and not chosen[:12].any()


def test_every_token_is_masked_equally_often() -> None:
    example, noise = framed(list(range(100, 120))), Masked(MASK, ORDINARY, 0.25)
    counts = sum(masked(example, noise, seed)[1][1:-1] for seed in range(2000))
    assert np.abs(counts / 2000 - 0.25).max() < 0.05


def test_the_figure_of_the_t5_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """“Thank you for inviting me to your party last week.” → “Thank you <X> me to your party <Y> week.”"""
    thank, you, for_, inviting, me, to, your, party, last, week = range(10)
    example = Example([], (Branch([thank, you, for_, inviting, me, to, your, party, last, week, SEP], [*[1] * 10, 0]),))
    monkeypatch.setattr(SpanCorruption, "_spans", lambda self, count, draw: (np.array([2, 8]), np.array([2, 1])))
    found = SpanCorruption(SENTINELS)(example, draw(0))
    x, y, z = SENTINELS[:3]
    assert found.stem.tolist() == [thank, you, x, me, to, your, party, y, week, SEP]
    assert found.branches[0].tokens.tolist() == [x, for_, inviting, y, last, z, SEP]
    assert found.branches[0].weights.all()


@given(st.integers(1, 200), st.integers(0, 10_000), st.sampled_from([0.05, 0.15, 0.5, 1.0]),
       st.sampled_from([1.0, 3.0, 8.0]))
@settings(max_examples=100, deadline=None)
def test_a_corrupted_text_and_its_target_give_back_the_text(count: int, seed: int, density: float, mean: float) -> None:
    content = list(range(100, 100 + count))
    sentinels = np.arange(1000, 1000 + num_spans(count, density, mean) + 1)
    found = SpanCorruption(sentinels, density, mean)(framed(content), draw(seed))
    said = found.branches[0].tokens.tolist()
    assert said.pop() == SEP and found.stem[0] == CLS and found.stem[-1] == SEP
    spans: dict[int, list[int]] = {}
    for token in said:
        if token >= 1000:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    assert [*spans] == sentinels[:len(spans)].tolist() and spans.pop([*spans][-1]) == []  # the last one ends the target
    text = [token for part in found.stem[1:-1].tolist() for token in (spans[part] if part >= 1000 else [part])]
    assert text == content
    assert sum(map(len, spans.values())) == min(count, max(1, round(density * count)))


def test_spans_fall_everywhere() -> None:
    """The first and the last token are taken out, too, if less often: fewer spans can hold them."""
    counts = np.zeros(20)
    for seed in range(3000):
        starts, lengths = SpanCorruption(SENTINELS, 0.3, 3.0)._spans(20, draw(seed))
        for start, length in zip(starts, lengths, strict=True):
            counts[start:start + length] += 1
    assert counts.sum() == 3000 * 6 and counts.min() > 0.1 * 3000 and counts[3:17].min() > 0.27 * 3000


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_divisions_are_positive_and_add_up(total: int, parts: int, seed: int) -> None:
    parts = min(parts, total)
    found = division(total, parts, draw(seed))
    assert len(found) == parts and found.sum() == total and found.min() >= 1
    starts = starts_of(found, total + 2 * parts, 2, draw(seed))
    assert starts[0] >= 0 and starts[-1] + found[-1] <= total + 2 * parts
    assert (np.diff(starts) >= found[:-1] + 2).all()


@given(st.integers(1, 80), st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_infilling_keeps_the_order_of_what_it_keeps_and_never_grows(count: int, seed: int, ratio: float) -> None:
    content = list(range(100, 100 + count))
    found = Infilling(MASK, ratio, 3.0, permute_sentences=0.0)(framed(content), draw(seed))
    inside = found.stem[1:-1]
    kept = inside[inside != MASK]
    assert found.branches[0].tokens.tolist() == [CLS, *content, SEP] and found.branches[0].weights.all()
    assert len(kept) == count - round(ratio * count) and (np.diff(kept) > 0).all() and len(inside) <= count
    assert (MASK in inside) == (round(ratio * count) > 0)


def test_the_mean_span_of_infilling_is_that_of_poisson() -> None:
    masks = sum(int((Infilling(MASK, 0.3, 3.0, 0.0)(framed([7] * 1000), draw(seed)).stem == MASK).sum())
                for seed in range(30))
    assert 300 * 30 / masks == pytest.approx(3.0, rel=0.05)  # spans of no tokens included


def test_sentences_change_places_whole() -> None:
    content, sentences = [10, 11, 12, 20, 30, 31], [0, 0, 0, 1, 2, 2]
    orders = set()
    for seed in range(60):
        found = Infilling(MASK, 0.0, permute_sentences=1.0)(framed(content, **{SENTENCE: sentences}), draw(seed))
        orders.add(tuple(found.stem[1:-1].tolist()))
    one, two, three = (10, 11, 12), (20,), (30, 31)
    assert orders == {one + two + three, one + three + two, two + one + three, two + three + one, three + one + two,
                      three + two + one}


def test_deletion_leaves_no_trace() -> None:
    found = Infilling(MASK, 0.0, permute_sentences=0.0, delete_ratio=0.25)(framed(list(range(100, 120))), draw(1))
    assert len(found.stem) == 2 + 15 and MASK not in found.stem and (np.diff(found.stem[1:-1]) > 0).all()


PRE, SUF, MID, EOS = 800, 801, 802, 2


@pytest.mark.parametrize("ends", [True, False])
def test_fill_in_the_middle_in_both_orders(ends: bool) -> None:
    content = list(range(100, 112))
    weights = [0, *[1] * (len(content) + ends)]
    example = Example([], (Branch([1, *content, *[EOS] * ends], weights),))
    seen = set()
    for seed in range(200):
        [branch] = FillInMiddle(PRE, SUF, MID, EOS, rate=1.0, spm_rate=0.5)(example, draw(seed)).branches
        ids = branch.tokens.tolist()
        assert branch.weights.tolist() == [0, *[1] * (len(ids) - 1)] and len(ids) == len(content) + ends + 4
        ids = ids[1:-1] if ends else ids[1:]
        spm = ids[1] == SUF
        if spm and ids[:2] == [PRE, SUF]:
            at = ids.index(MID)
            suffix, rest = ids[2:at], ids[at + 1:]
            assert rest + suffix == content
        else:
            one, two = ids.index(SUF), ids.index(MID)
            assert ids[0] == PRE and ids[1:one] + ids[two + 1:] + ids[one + 1:two] == content
            seen.add((one - 1, two))
    assert len(seen) > 30


def test_only_a_share_of_pieces_is_moved_and_prompts_never() -> None:
    example = Example([], (Branch([1, *range(100, 140), EOS], [0, *[1] * 41]),))
    noise = FillInMiddle(PRE, SUF, MID, EOS, rate=0.3, spm_rate=0.0)
    moved = sum(PRE in noise(example, draw(seed)).branches[0].tokens for seed in range(1000))
    assert 240 < moved < 360
    answer = Example([], (Branch([1, 5, 6, 7, EOS], [0, 0, 1, 1, 1]),))
    assert FillInMiddle(PRE, SUF, MID, EOS, rate=1.0)(answer, draw(0)) is answer
