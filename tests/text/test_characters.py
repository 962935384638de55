"""Units of a text: found block by block, they are those of the whole."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from danlu.text import characters
from danlu.text.characters import units_and_singles

TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé\u0301 \n你好ΣﬁＡ１")), max_size=60)


@given(text=TEXTS, block=st.integers(1, 9))
def test_blocks_change_nothing(text: str, block: int) -> None:
    whole, single = units_and_singles(text)
    before, characters.BLOCK = characters.BLOCK, block
    try:
        found, also = units_and_singles(text)
    finally:
        characters.BLOCK = before
    assert np.array_equal(found, whole) and np.array_equal(also, single) and len(whole) == len(single)
