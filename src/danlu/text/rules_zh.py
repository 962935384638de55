"""Quality rules for Chinese, where words have no blanks between them: the counterparts of Gopher's and FineWeb's.

Shares are of the characters that are not blank. Repetition is measured on n-grams of characters (a Chinese word has about
1.6 of them, so 8 characters stand for 5 words). Lines of navigation and advertisement are taken out first, where a line is
short and says such a thing; then what is left is judged.

    text, reason, lines = chinese(text, ChineseConfig())
"""

import re

import numpy as np
from pydantic import Field

from danlu.core.config import Config
from danlu.text.characters import BLANK, NUM_KINDS, SINGLE, SYMBOL, codes_of, joined, kinds_of, mix64
from danlu.text.rules import duplicates, may_exceed, repeated_ngram_chars, top_ngram_chars

LONG_LINE = 40  # characters; a longer line is a sentence that mentions such a thing, not a button
MIN_LINES = 10  # fewer lines say nothing of repetition or of lists


class ChineseConfig(Config):
    """Thresholds for Chinese; 0 switches a test off. Shares are of the characters that are not blank."""

    min_doc_chars: int = Field(default=50, ge=0, description="fewest characters")
    max_doc_chars: int = Field(default=1_000_000, ge=0, description="most characters")
    min_han_ratio: float = Field(default=0.3, ge=0, le=1, description="least share of Han characters")
    max_symbol_ratio: float = Field(default=0.3, ge=0, le=1, description="largest share of neither letters nor digits")
    max_digit_ratio: float = Field(default=0.3, ge=0, le=1, description="largest share of digits")
    max_link_ratio: float = Field(default=0.2, ge=0, le=1, description="largest share of characters in links")
    line_punct_thr: float = Field(default=0.12, ge=0, le=1, description="least share of lines that end a sentence")
    short_line_thr: float = Field(default=0.67, ge=0, le=1, description="largest share of short lines")
    short_line_length: int = Field(default=10, ge=0, description="characters up to which a line is short")
    max_ellipsis_lines_ratio: float = Field(default=0.3, ge=0, le=1, description="largest share of lines that end in …")
    dup_line_frac: float = Field(default=0.3, ge=0, le=1, description="largest share of lines that stood before")
    dup_line_char_frac: float = Field(default=0.2, ge=0, le=1, description="their largest share of the characters")
    top_n_grams: dict[int, float] = Field(default={4: 0.2, 6: 0.16},
                                          description="by n: largest share of the characters in the most frequent n-gram")
    dup_n_grams: dict[int, float] = Field(default={8: 0.2, 12: 0.15, 16: 0.12},
                                          description="by n: largest share in n-grams of characters that stood before")
    drop_ad_lines: bool = Field(default=True, description="takes out short lines of advertisement and of a page's frame")
    drop_nav_lines: bool = Field(default=True, description="takes out lines that are rows of links (首页 > 新闻 > 正文)")


_AD = re.compile(
    r"扫(?:一扫|码|描)[^。]{0,8}(?:关注|二维码|下载|添加)|长按[^。]{0,6}二维码|关注[^。]{0,10}(?:公众号|微信号)|加(?:我)?(?:微信|QQ|qq)|(?:QQ|qq|微信)群[:：]?\d|"
    r"(?:客服|咨询|订购|服务|招商|投诉)(?:热线|电话)\s*[:：]|点击(?:这里|此处|下方|上方|图片)?(?:链接|查看|下载|进入|购买|阅读原文|领取)|阅读原文|"
    r"版权所有|(?:未经[^。]{0,8})?(?:转载请注明|不得转载|禁止转载)|免责声明|责任编辑\s*[:：]|[京沪粤浙苏闽鲁川津渝皖赣湘鄂豫冀晋陕甘辽吉黑桂琼滇黔蒙宁青新藏][Ii][Cc][Pp]备|"
    r"^(?:上一[篇页]|下一[篇页]|返回(?:首页|顶部|列表)|分享到|收藏本站|设为首页|网站地图|联系我们|关于我们|相关(?:阅读|推荐|文章)|热门(?:推荐|文章|标签)|登录|"
    r"注册|加入收藏|打印本页|关闭窗口|我要评论|查看更多|展开全文|猜你喜欢)(?=$|[\s:：|｜>»›])")
_PIECE = r"[^\s|｜>»›·/。！？，]{1,8}"
_NAV = re.compile(rf"(?:(?:当前位置|[您你]的位置|所在位置)\s*[:：]\s*{_PIECE}|(?:首页|主页|网站首页))"
                  rf"(?:\s*[|｜>»›]\s*{_PIECE})+$|"
                  rf"{_PIECE}(?:\s*[|｜]\s*{_PIECE}){{3,}}$")
_LINK = re.compile(r"(?:https?://|www\.)[^\s\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
_ENDS = tuple("。！？!?.…；;”\"」』）)：:")


def drop_frame_lines(text: str, config: ChineseConfig) -> tuple[str, int]:
    """The text without its lines of advertisement and navigation, and how many those were."""
    if "\n" not in text and not _AD.search(text) and not _NAV.match(text.strip()):  # most texts of one line
        return text, 0
    kept, dropped = [], 0
    for line in text.split("\n"):
        plain = line.strip()
        if plain and len(plain) <= LONG_LINE and (
                (config.drop_ad_lines and _AD.search(plain)) or (config.drop_nav_lines and _NAV.match(plain))):
            dropped += 1
        else:
            kept.append(line)
    return (joined(kept), dropped) if dropped else (text, 0)


def chinese(text: str, config: ChineseConfig) -> tuple[str, str | None, int]:
    """What is left of a text, why all of it is dropped (or None), and how many lines were taken out."""
    text, dropped = drop_frame_lines(text, config)
    return text, _shares(text, config) or _lines(text, config) or _repetition(text, config), dropped


def _shares(text: str, config: ChineseConfig) -> str | None:
    codes = codes_of(text)
    kinds = kinds_of(codes)
    counts = np.bincount(kinds, minlength=NUM_KINDS)
    solid = len(codes) - int(counts[BLANK])
    if solid < max(config.min_doc_chars, 1):
        return "zh_short_doc"
    if config.max_doc_chars and solid > config.max_doc_chars:
        return "zh_long_doc"
    links = sum(len(link) for link in _LINK.findall(text)) if "http" in text or "www." in text else 0
    if config.max_link_ratio and links / solid > config.max_link_ratio:
        return "zh_too_many_links"
    if counts[SINGLE] / solid < config.min_han_ratio:
        return "zh_too_few_han"
    if config.max_symbol_ratio and counts[SYMBOL] / solid > config.max_symbol_ratio:
        return "zh_too_many_symbols"
    digits = np.count_nonzero(((codes >= 0x30) & (codes <= 0x39)) | ((codes >= 0xff10) & (codes <= 0xff19)))
    if config.max_digit_ratio and digits / solid > config.max_digit_ratio:
        return "zh_too_many_digits"
    return None


def _lines(text: str, config: ChineseConfig) -> str | None:
    lines = [plain for line in text.split("\n") if (plain := line.strip())]
    count, size = duplicates(lines)
    if len(lines) >= MIN_LINES:
        if sum(line.endswith(_ENDS) for line in lines) / len(lines) < config.line_punct_thr:
            return "zh_line_punct_ratio"
        if config.short_line_thr and \
                sum(len(line) <= config.short_line_length for line in lines) / len(lines) > config.short_line_thr:
            return "zh_short_line_ratio"
        if config.max_ellipsis_lines_ratio and \
                sum(line.endswith(("…", "...")) for line in lines) / len(lines) > config.max_ellipsis_lines_ratio:
            return "zh_too_many_end_ellipsis"
        if config.dup_line_frac and count / len(lines) > config.dup_line_frac:
            return "zh_dup_line_frac"
    if config.dup_line_char_frac and size / len(text) > config.dup_line_char_frac:
        return "zh_dup_line_char_frac"
    return None



def _repetition(text: str, config: ChineseConfig) -> str | None:
    codes = codes_of(text)
    solid = codes[kinds_of(codes) > SYMBOL]
    hashes, lengths = mix64(solid.astype(np.uint64)), np.ones(len(solid), np.int64)
    for n, share in config.top_n_grams.items():
        # the blanks that the count of words adds are none between characters
        if not share or len(hashes) < n:
            continue
        if (top_ngram_chars(hashes, lengths, n) // (2 * n - 1)) * n > max(share * len(solid), 2 * n):
            return f"zh_top_{n}_gram"
    limits = {n: share * len(solid) for n, share in config.dup_n_grams.items() if share and len(hashes) >= n}
    for n, limit in may_exceed(hashes, lengths, limits):
        if repeated_ngram_chars(hashes, lengths, n) > limit:
            return f"zh_duplicated_{n}_n_grams"
    return None
