"""The rules for Chinese."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.text.rules_zh import ChineseConfig, chinese, drop_frame_lines

STORY = ("每天傍晚，老人都要爬上灯塔，擦亮玻璃，点起那盏灯。海面上多半只有海鸥，偶尔也会有一条渔船经过。"
         "女儿劝他搬到镇上去住，他总说再想一想，可是两个人心里都明白，他不会离开。灯总得有人点，除了他，岛上再没有别的人了。")


@pytest.mark.parametrize("text, keys, reason", [
    (STORY, {}, None),
    ("太短了。", {}, "zh_short_doc"), (STORY, {"min_doc_chars": 200}, "zh_short_doc"),
    (STORY, {"max_doc_chars": 60}, "zh_long_doc"),
    (STORY + " The lamp was lit every evening." * 9, {}, "zh_too_few_han"),
    (STORY + "★☆※◆" * 20, {}, "zh_too_many_symbols"),
    (STORY[:60] + "12345678901234567890123456789012345", {}, "zh_too_many_digits"),
    (STORY + "https://example.com/a/b/c/d/e/f/g/h" * 2, {}, "zh_too_many_links"),
    ("\n".join(f"第{n}号产品的名称与规格说明" for n in "一二三四五六七八九十甲乙"), {}, "zh_line_punct_ratio"),
    ("\n".join(f"{n}号船已经到了。" for n in "一二三四五六七八九十甲乙"), {}, "zh_short_line_ratio"),
    ("\n".join(f"{n}号的船还没有开到码头这边来……" for n in "一二三四五六七八九十甲乙"), {}, "zh_too_many_end_ellipsis"),
    ("\n".join([*STORY.split("，"), *(["海面上什么也没有，只有风。"] * 9)]), {}, "zh_dup_line_frac"),
    ("\n".join([STORY, "海面上什么也没有，只有风。" * 3, "海面上什么也没有，只有风。" * 3]), {}, "zh_dup_line_char_frac"),
    (STORY + "夏威夷果仁" * 20, {}, "zh_top_4_gram"),
    (STORY + STORY[:50], {}, "zh_duplicated_8_n_grams"),
    (STORY + STORY[:50], {"dup_n_grams": {}}, None),
    (STORY + STORY[:50], {"dup_n_grams": {8: 0, 12: 0, 16: 0}}, None),
])
def test_reasons(text: str, keys: dict, reason: str | None) -> None:
    assert chinese(text, ChineseConfig.model_validate(keys))[1] == reason


@pytest.mark.parametrize("line, dropped", [
    ("扫一扫关注我们的公众号", True), ("责任编辑：张三", True), ("京ICP备12345678号", True), ("上一篇：灯塔", True),
    ("返回首页", True),
    ("首页 > 新闻 > 正文", True), ("当前位置：首页 > 新闻", True), ("新闻 | 体育 | 财经 | 娱乐", True),
    ("转载请注明出处", True),
    ("登录机器，执行命令。", False), ("字符串 > 列 > 表 > 数据库 > 服务器", False), ("关于我们这一代人的故事", False),
    ("他说，未经允许不得转载这句话写在每一页的最下面，"
     "可是谁也没有真的去读过它，于是大家照样转来转去。", False), ("", False)])
def test_lines_of_a_pages_frame(line: str, dropped: bool) -> None:
    text = f"{STORY}\n{line}\n{STORY}"
    left, count = drop_frame_lines(text, ChineseConfig())
    assert count == dropped
    assert left == (f"{STORY}\n{STORY}" if dropped else text)


def test_each_kind_of_line_is_an_option() -> None:
    text = f"{STORY}\n首页 > 新闻 > 正文\n责任编辑：张三"
    assert drop_frame_lines(text, ChineseConfig(drop_ad_lines=False)) == (f"{STORY}\n责任编辑：张三", 1)
    assert drop_frame_lines(text, ChineseConfig(drop_nav_lines=False)) == (f"{STORY}\n首页 > 新闻 > 正文", 1)
    assert drop_frame_lines("扫一扫关注我们的公众号", ChineseConfig()) == ("", 1)
    assert drop_frame_lines("首页 > 新闻 > 正文", ChineseConfig()) == ("", 1)
    assert drop_frame_lines("首页 > 新闻 > 正文", ChineseConfig(drop_nav_lines=False)) == ("首页 > 新闻 > 正文", 0)


@given(text=st.text(st.sampled_from("灯塔海。，\n 1a>|"), max_size=120))
def test_any_text_is_judged_and_lines_are_taken_once(text: str) -> None:
    left, _, _ = chinese(text, ChineseConfig(min_doc_chars=0))
    assert drop_frame_lines(left, ChineseConfig()) == (left, 0)
