"""How running text is cut into words before its tokens are learned: one pattern for all kinds of tokenizers.

Words are contractions, letters with one leading mark or blank, digits, marks with line ends, line ends, other blanks. Two
things are choices: how digits stand together, and whether Han characters are words of their own.

    word_pattern("groups", "script")
"""

from typing import Literal

Digits = Literal["single", "groups", "free"]
Chinese = Literal["free", "script", "characters"]

_DIGITS: dict[Digits, str] = {"single": r"\p{N}", "groups": r"\p{N}{1,3}", "free": r"\p{N}+"}
_HAN: dict[Chinese, str] = {"free": "", "script": r"(?:\p{Han}\p{M}*)+|", "characters": r"\p{Han}\p{M}*|"}
_LETTERS = r"[\p{L}\p{M}]+"
_OTHER_LETTERS = r"(?:(?!\p{Han})[\p{L}\p{M}])+"


def word_pattern(digits: Digits = "single", chinese: Chinese = "free") -> str:
    """The pattern of words, for Oniguruma (`tokenizers`) and for `regex`; every character is part of one word.

    digits   `single`: each alone; `groups`: three at most, from the left; `free`: all that stand together
    chinese  `free`: Han characters are letters as others are; `script`: a run of them is a word, without a leading mark or
             letters of another script; `characters`: each is a word
    """
    letters = _LETTERS if chinese == "free" else _OTHER_LETTERS
    return (rf"{_HAN[chinese]}(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}|{_DIGITS[digits]}|"
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


SPLIT = word_pattern()

# Every pattern above; GPT-4's, which Llama-3, Qwen and others took with digits of their own, where marks are no letters.
SPLIT_PATTERNS = frozenset(
    {word_pattern(digits, chinese) for digits in _DIGITS for chinese in _HAN}
    | {r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
       + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+" for digits in _DIGITS.values()})
