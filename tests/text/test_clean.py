"""Normal form and quality rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.clean import CleanConfig, clean, clean_documents, language, normalize, repeated_share


@pytest.mark.parametrize("before, after", [
    ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
    ("\ufeffa\u200bb\x00c\x1b[0m\u00ad\u200e", "abc[0m"),
    ("e\u0301", "é"),
    ("e\u200b\u0301", "é"),
    ("a \t\u3000\nb\u00a0", "a\nb"),
    ("\n\n a\n\n \n\n\nb\n\n", " a\n\nb"),
    ("１２Ａ", "１２Ａ"),
    ("👨\u200d👩", "👨\u200d👩"),
    ("滚滚长江\n\t东逝水", "滚滚长江\n\t东逝水"),
])
def test_normal_form(before: str, after: str) -> None:
    assert normalize(before) == after


def test_nfkc_makes_full_width_plain() -> None:
    assert normalize("１２Ａ，", "NFKC") == "12A,"


MARKS = " \t\r\n\u200b\u0301e\u3000\ufeff\u2028\x85\xa0"
ODD = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(MARKS)))


@given(text=ODD, form=st.sampled_from(["NFC", "NFKC"]))
def test_twice_is_once(text: str, form) -> None:
    once = normalize(text, form)
    assert normalize(once, form) == once
    assert "\r" not in once and "\x00" not in once and "\n\n\n" not in once


@pytest.mark.parametrize("text, keys, reason", [
    ("", {}, "empty"), (" \n\u200b\n", {}, "empty"), ("短", {"min_chars": 2}, "too_short"),
    ("12 34 56 78", {}, "too_few_letters"), ("好好，。，。，。", {"min_letters": 0.2}, "too_many_symbols"),
    ("a line\n" * 20, {}, "repeated_lines"), ("a line\n" * 9, {}, None), ("你好", {}, None),
    ("12 ab", {"min_letters": 0.5}, None), ("12 ab", {"min_letters": 0.51}, "too_few_letters")])
def test_reasons(text: str, keys: dict, reason: str | None) -> None:
    result = clean(text, CleanConfig(**keys))
    assert result.reason == reason
    assert (result.text is None) == (reason is not None)


def test_repeated_share_counts_characters() -> None:
    different = "".join(f"line {n}\n" for n in range(10))
    assert repeated_share(different) == 0
    assert repeated_share(different + "line 0\n") == pytest.approx(6 / 66)


@pytest.mark.parametrize("text, expected", [
    ("滚滚长江东逝水", "zh"), ("The river flows", "en"), ("他说 Hello，然后走了", "zh"), ("123 !?", "other"),
    ("café naïve", "en"), ("Привет, мир", "other"), ("𠀀𠀁", "zh")])
def test_language(text: str, expected: str) -> None:
    assert language(text) == expected


def test_documents_are_counted(ledger: Ledger) -> None:
    texts = ["a\r\nb", "", "好\n", "e\u0301", "\u0958"]  # the last one grows when it is composed
    documents = [Document(text, "s", str(n), "c") for n, text in enumerate(texts)]
    kept = list(clean_documents(iter(documents), CleanConfig(), ledger))
    assert [(document.text, document.id) for document in kept] == [
        ("a\nb", "0"), ("好", "2"), ("é", "3"), ("\u0915\u093c", "4")]
    ledger.check()
    station = ledger.station("clean")
    assert station.came.rows == 5 and station.went.rows == 4
    assert station.dropped["normalised"].bytes == 3 and station.added["normalised"].bytes == 3
    only = list(clean_documents(iter(documents), CleanConfig(), ledger, only="zh"))
    assert [document.text for document in only] == ["好"]
    assert station.dropped["other_language"].rows == 3
    ledger.check()
