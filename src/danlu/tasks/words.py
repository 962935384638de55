"""The words that tasks are made of, and digits in words."""

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

DIGITS: dict[Language, tuple[str, ...]] = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}


def listed(words: tuple[str, ...] | list[str], language: Language) -> str:
    """Words as a list: `cat, red` or `猫、红色`."""
    return JOINT[language].join(words)


def spelled(number: int, language: Language) -> str:
    """A number's digits in words, one by one: 205 is “two zero five” or 二零五."""
    return {"en": " ", "zh": ""}[language].join(DIGITS[language][int(digit)] for digit in str(number))
