"""The words that tasks are made of, and numbers in words."""

from typing import Literal

Language = Literal["en", "zh"]

WORDS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "an animal": ("cat", "dog", "horse", "cow", "bird", "fish", "sheep", "lion", "mouse", "bear", "duck", "wolf"),
        "a colour": ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink", "purple"),
        "a food": ("bread", "rice", "apple", "milk", "egg", "meat", "soup", "cake", "salt", "butter", "tea"),
        "a part of the body": ("hand", "foot", "head", "eye", "ear", "nose", "mouth", "arm", "leg", "hair"),
    },
    "zh": {
        "动物": ("马", "牛", "羊", "狗", "猫", "鱼", "鸟", "虎", "龙", "鸡", "兔子", "老虎"),
        "颜色": ("红色", "白色", "黑色", "黄色", "青色", "绿色", "蓝色", "紫色", "灰色"),
        "食物": ("米饭", "面条", "苹果", "牛奶", "鸡蛋", "酒", "茶", "肉", "盐", "面包", "豆腐"),
        "身体的一部分": ("手", "脚", "头", "眼睛", "耳朵", "鼻子", "嘴", "腿", "头发", "心"),
    },
}
ALL_WORDS: dict[Language, tuple[str, ...]] = {
    language: tuple(word for words in groups.values() for word in words) for language, groups in WORDS.items()}
JOINT: dict[Language, str] = {"en": ", ", "zh": "、"}

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DIGITS = "零一二三四五六七八九"


def listed(words: tuple[str, ...] | list[str], language: Language) -> str:
    """Words as a list: `cat, red` or `猫、红色`."""
    return JOINT[language].join(words)


def english(number: int) -> str:
    """0 to 999 in English words: 23 is twenty-three, 205 two hundred and five."""
    assert 0 <= number < 1000
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    rest = f" and {english(number % 100)}" if number % 100 else ""
    return f"{_ONES[number // 100]} hundred{rest}"


def chinese(number: int) -> str:
    """0 to 999 in Chinese: 12 is 十二, 23 二十三, 105 一百零五, 110 一百一十."""
    assert 0 <= number < 1000
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    if number < 10:
        return _DIGITS[number]
    if number < 20:
        return "十" + (_DIGITS[ones] if ones else "")
    text = f"{_DIGITS[hundreds]}百" if hundreds else ""
    if tens:
        text += f"{_DIGITS[tens]}十"
    elif hundreds and ones:
        text += "零"
    return text + (_DIGITS[ones] if ones else "")
