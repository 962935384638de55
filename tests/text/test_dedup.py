"""Exact duplicates and repeated paragraphs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from danlu.text.dedup import fingerprint, keep_paragraphs, paragraphs_of, repeats, size_left
from danlu.text.spool import HASH


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
    assert paragraphs_of(text) == [("First.", "\n\n"), ("Shared  words.", "\n \n\n"), ("二\nLast.", "")]
    assert keep_paragraphs(text, [True, False, True]) == "First.\n\n二\nLast."
    assert keep_paragraphs(text, [True, True, False]) == "First.\n\nShared  words."
    assert keep_paragraphs(text, [False] * 3) == ""


@given(st.lists(st.lists(st.tuples(st.sampled_from(["a", "二 b", " c\nd"]), st.sampled_from(["\n\n", "\n\t\n\n"]),
                                   st.booleans()), max_size=5), max_size=6))
def test_bytes_and_characters_that_are_left(documents: list[list[tuple[str, str, bool]]]) -> None:
    texts = ["".join(paragraph + blank for paragraph, blank, _ in parts) + "end" for parts in documents]
    stays = [[*(stay for *_, stay in parts), False] for parts in documents]
    rows = [paragraphs_of(text) for text in texts]
    flat = np.array([stay for part in stays for stay in part], np.bool_)
    for size in (len, lambda text: len(text.encode())):
        sizes = np.array([[size(part) for part in row] for rows_of in rows for row in rows_of], np.uint32)
        left = size_left(sizes[:, 0], sizes[:, 1], flat, np.array([*map(len, rows)], np.int64)) if rows else np.zeros(0)
        assert left.tolist() == [size(keep_paragraphs(text, flags)) for text, flags in zip(texts, stays)]
