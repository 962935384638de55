"""Text that cannot steer a terminal."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from danlu.core.terminal import visible


def test_controls_become_signs() -> None:
    assert visible("a\tb\nc\x00\x1b[2J\r\x7f\x9b\u202e\u2066\u061c\udcff春") == \
        "a\tb\nc␀␛[2J␍␡\ufffd\ufffd\ufffd\ufffd\ufffd春"


@given(st.text(st.characters()))
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert len(shown) == len(text) and visible(shown) == shown
    for letter in shown:
        assert letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(letter) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
