"""Exact duplicates and repeated paragraphs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from danlu.text.dedup import bytes_left, fingerprint, keep_paragraphs, paragraphs_of, repeats
from danlu.text.spool import HASH, PARAGRAPH


def test_case_width_and_blanks_make_no_difference() -> None:
    assert fingerprint("Hello  World\n") == fingerprint("ｈｅｌｌｏ\tworld") == fingerprint(" HELLO world")
    assert fingerprint("helloworld") != fingerprint("hello world")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=40))
def test_the_first_one_stays(rows: list[tuple[int, int, bool]]) -> None:
    keys, before = [row[:2] for row in rows], np.array([row[2] for row in rows], np.bool_)
    order = sorted(range(len(rows)), key=lambda place: (not before[place], place))
    first = {keys[place]: place for place in reversed(order)}
    found = repeats(np.array(keys, np.dtype(HASH)), before)
    assert found.tolist() == [-1 if first[key] == place else first[key] for place, key in enumerate(keys)]


def test_paragraphs_of_a_text() -> None:
    text = "\n\nFirst.\n\nShared  words.\n \n\n二\nLast."
    assert paragraphs_of(text) == [("First.", 6, 2), ("Shared  words.", 14, 4), ("二\nLast.", 9, 0)]
    assert keep_paragraphs(text, [True, False, True]) == "First.\n\n二\nLast."
    assert keep_paragraphs(text, [True, True, False]) == "First.\n\nShared  words."
    assert keep_paragraphs(text, [False] * 3) == ""


@given(st.lists(st.lists(st.tuples(st.sampled_from(["a", "二 b", " c\nd"]), st.sampled_from(["\n\n", "\n\t\n\n"]),
                                   st.booleans()), max_size=5), max_size=6))
def test_bytes_that_are_left(documents: list[list[tuple[str, str, bool]]]) -> None:
    texts = ["".join(paragraph + blank for paragraph, blank, _ in parts) + "end" for parts in documents]
    stays = [[*(stay for *_, stay in parts), False] for parts in documents]
    rows = [[(0, 0, size, blank) for _, size, blank in paragraphs_of(text)] for text in texts]
    left = bytes_left(np.array([row for part in rows for row in part], PARAGRAPH),
                      np.array([stay for part in stays for stay in part], np.bool_), np.array([*map(len, rows)], np.int64))
    assert left.tolist() == [len(keep_paragraphs(text, flags).encode()) for text, flags in zip(texts, stays)]
