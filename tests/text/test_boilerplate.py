"""Lines that many documents share: what counts as one line, and the counting in sorted runs and ranges."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.text import boilerplate
from danlu.text.boilerplate import Boilerplate, BoilerplateConfig, LineWriter, Part, count, line_key, owners_of


def found_in(folder: Path, texts: list[str], config: BoilerplateConfig, splits: int = 1,
             counts: list[bool] | None = None) -> np.ndarray:
    """What `count` finds, of texts in so many splits."""
    parts, begin = [], 0
    for number in range(splits):
        own = texts[begin:len(texts) * (number + 1) // splits]
        path = folder / f"{number}.lines"
        with open(path, "wb") as keys, open(owners_of(path), "wb") as owners:
            writer = LineWriter(keys, owners, config)
            for text in own:
                writer.add(text)
            runs = writer.finish()
        parts.append(Part(path, runs, begin))
        begin += len(own)
    return count(parts, np.ones(len(texts), np.bool_) if counts is None else np.array(counts, np.bool_), config)


@pytest.mark.parametrize("one, other, same", [
    ("All rights reserved", "  ALL rights\u3000reserved ", True), ("Page 3 of 10", "page 41 of 7", True),
    ("Ｐａｇｅ １", "page 2", True), ("版权所有 2019", "版权所有 ２０２４", True), ("Page 3", "Page three", False),
    ("All rights reserved", "All rights reserved.", False)])
def test_what_is_one_line(one: str, other: str, same: bool) -> None:
    assert (line_key(one, 1) == line_key(other, 1)) == same


def test_short_lines_are_left_alone() -> None:
    assert line_key("  Page 3  ", 7) is None and line_key("  Page 3  ", 6) is not None


def test_a_worked_example(tmp_path: Path) -> None:
    config = BoilerplateConfig(min_documents=3, min_chars=4)
    texts = ["All rights reserved\nOne\nPage 3", "ALL  rights reserved\nTwo\n\n\npage 41\npage 42\n\n\nend",
             "Three\nall rights reserved\nPage 5\n你好", "Page 6\n你好", "你好"]
    lines = found_in(tmp_path, texts, config, splits=2)
    assert dict(zip(lines["documents"].tolist(), lines["first"].tolist())) == {3: 0, 4: 0}, "the pages are in four"
    frame = Boilerplate.of(lines, config)
    assert [frame.drop(text) for text in texts] == [
        ("One", ["All rights reserved", "Page 3"]), ("Two\n\nend", ["ALL  rights reserved", "page 41", "page 42"]),
        ("Three\n你好", ["all rights reserved", "Page 5"]), ("你好", ["Page 6"]), ("你好", [])]


def test_of_equal_documents_the_first_one_counts(tmp_path: Path) -> None:
    texts = ["alpha beta\nown"] + ["copied line\nwhole text"] * 5 + ["alpha beta", "alpha beta\nand more"]
    config = BoilerplateConfig(min_documents=3)
    lines = found_in(tmp_path, texts, config, counts=[True, True] + [False] * 4 + [True, True])
    assert Boilerplate.of(lines, config).documents == {line_key("alpha beta", 6): 3}
    assert len(found_in(tmp_path, texts, config)) == 3


LINES = st.sampled_from(["alpha line", "beta line", "gamma line", "Page 1", "page 22", "四五六七八九十", "short", ""])


@settings(max_examples=60)
@given(texts=st.lists(st.lists(LINES, max_size=5).map("\n".join), max_size=12), splits=st.integers(1, 4),
       run=st.integers(1, 6), at_once=st.integers(1, 6), data=st.data())
def test_runs_ranges_and_splits_make_no_difference(tmp_path_factory: pytest.TempPathFactory, texts: list[str], splits: int,
                                                   run: int, at_once: int, data: st.DataObject) -> None:
    config = BoilerplateConfig(min_documents=2)
    counts = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    expected: Counter[int] = Counter()
    first: dict[int, int] = {}
    for number, (text, is_first) in enumerate(zip(texts, counts)):
        if is_first:
            keys = {key for line in text.split("\n") if (key := line_key(line, 6)) is not None}
            expected.update(keys)
            for key in keys:
                first.setdefault(key, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boilerplate, "RUN", run)
        patch.setattr(boilerplate, "COUNTED_AT_ONCE", at_once)
        lines = found_in(tmp_path_factory.getbasetemp(), texts, config, splits, counts)
    assert lines["key"].tolist() == sorted(lines["key"].tolist())
    assert {int(line["key"]): (int(line["documents"]), int(line["first"])) for line in lines} == {
        key: (number, first[key]) for key, number in expected.items() if number >= 2}
