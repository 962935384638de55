"""Decontamination, and its own measure; block lists."""

import time
from pathlib import Path

import pytest

from danlu.core.errors import ConfigError
from danlu.core.ledger import Ledger
from danlu.text.blocklists import BlocklistConfig, compile_words, load
from danlu.text.decontaminate import (
    DISGUISES,
    Contamination,
    DecontaminateConfig,
    EvalSetConfig,
    measure_recall,
)
from danlu.text.evalsets import read_items

SETS = [EvalSetConfig(name="quiz", path="quiz.jsonl")]
CONFIG = DecontaminateConfig(sets=SETS)
ENGLISH = [f"Which of the {n} keepers climbed the stairs of the lighthouse before sunset on day {n}?" for n in range(20)]
CHINESE = [f"第{n}位老人每天傍晚都要爬上灯塔，擦亮玻璃，点起那盏灯，请问他是在哪一年离开海岛的？" for n in range(20)]
CARRIERS = ["The gulls cried over the harbour. Nobody came.\n\nLater it rained.",
            "海面上什么也没有，只有风。后来下起了雨，谁也没有来。"]


@pytest.mark.parametrize("text, name", [
    (ENGLISH[3], "quiz"), (f"Before. {ENGLISH[3]} Behind.", "quiz"), (ENGLISH[3].upper().replace(" ", "\n"), "quiz"),
    (" ".join(ENGLISH[3].split()[:12]), None), (" ".join(ENGLISH[3].split()[:13]), "quiz"),
    (CHINESE[1], "汉语"), (CHINESE[1][:20], None), (CHINESE[1][1:25], "汉语"), (CHINESE[1].replace("，", "\n"), "汉语"),
    ("Who is the keeper of the old lamp there?", "quiz"), ("Who is the keeper of the old", None), (CARRIERS[0], None),
    ("", None)])
def test_runs_that_are_shared(text: str, name: str | None) -> None:
    index = Contamination({"quiz": [*ENGLISH, "Who is the keeper of the old lamp there?", "Too short."],
    "汉语": CHINESE}, CONFIG)
    assert index.found(text) == name
    assert index.num_items == {"quiz": 22, "汉语": 20} and index.num_too_short == {"quiz": 1, "汉语": 0}


def test_recall_is_measured_and_a_blind_index_is_seen() -> None:
    items = {"quiz": [*ENGLISH, "Too short."], "hanyu": CHINESE}
    recall = measure_recall(items, CARRIERS, CONFIG)
    for name in items:
        assert recall[name].planted == 20 * len(DISGUISES) and recall[name].found == recall[name].planted
        assert recall[name].missed == {} and recall[name].false == 0
    assert recall["quiz"].too_short == 1
    spoiled = measure_recall(items, [*CARRIERS, ENGLISH[0]], CONFIG)
    assert spoiled["quiz"].false == 1
    assert measure_recall(items, CARRIERS, CONFIG) == recall


def test_items_are_read_like_a_corpus(tmp_path: Path) -> None:
    rows = ('{"q": "One?", "a": ["Two", "Three"]}', '{"q": "Four?", "a": ["Five"]}', '{"a": ["Six"]}')
    (tmp_path / "quiz.jsonl").write_text("\n".join(rows))
    (tmp_path / "lines.txt").write_text("One item.\nAnother item.\n")
    config = DecontaminateConfig(sets=[EvalSetConfig(name="quiz", path="quiz.jsonl", fields=["q", "a[]"]),
                                       EvalSetConfig(name="lines", path="lines.txt")])
    ledger = Ledger()
    items = read_items(config, tmp_path, ledger)
    assert items["lines"] == ["One item.", "Another item."]
    assert [word for text in items["quiz"] for word in text.split()] == ["One?", "Four?", "Two", "Three", "Five", "Six"]
    ledger.check()
    assert [(bad.where, bad.reason) for bad in ledger.quarantined] == [
        ("quiz.jsonl:3", "no field “q” (fields found: a)")]
    assert ledger.to_json()["stations"][0]["name"] == "quiz, q: read:quiz.jsonl"


def test_what_a_disguise_hides_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISGUISES, "every word changed", lambda text, random: text.replace(" ", "x "))
    recall = measure_recall({"quiz": ENGLISH}, CARRIERS, CONFIG)["quiz"]
    assert recall.missed == {"every word changed": 20} and recall.found == recall.planted - 20


@pytest.mark.parametrize("text, found", [
    ("he wins at BLACK  \n　jack", ["black jack"]), ("black-jack, blackjack", []), ("in C# and C", ["c#"]),
    ("he wins at Black Jack", ["black jack"]), ("casinos", []), ("the casino's",
    ["casino"]),
    ("ｃａｓｉｎｏ", ["casino"]), ("线上赌场开业", ["赌场"]), ("see https://www.bad.com/x?y", ["bad.com"]),
    ("a.b.bad.com", ["bad.com"]),
    ("登录bad.com领取", ["bad.com"]), ("登录notbad.com", []), ("见a坏.bad.com", ["bad.com"]),
    ("notbad.com", []), ("mail x@bad.com", []), ("good.org/fine", []), ("http://good.org/bad/page", ["good.org/bad"]),
    ("c++!", ["c++"])])
def test_block_lists(tmp_path: Path, text: str, found: list[str]) -> None:
    (tmp_path / "words.txt").write_text("# games\ncasino\nblack  jack\n赌场\t# in Chinese\nC++\nC#\n", encoding="utf-8")
    (tmp_path / "sites.txt").write_text("https://www.bad.com/\ngood.org/bad # a folder\n", encoding="utf-8")
    blocked = load([BlocklistConfig(name="games", words="words.txt", urls="sites.txt")], tmp_path)[0]
    assert blocked.found(text) == found and blocked.blocks(text) == bool(found)
    assert blocked.reason == "blocked_games"


def test_block_lists_are_found_where_sources_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First below the current folder, then below the recipe's; a folder is one list of all its files."""
    for folder, words in (("here/lists", "casino"), ("recipe/lists", "town"), ("recipe/more", "roulette")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(words)
    (tmp_path / "recipe/more/b.txt").write_text("poker")
    monkeypatch.chdir(tmp_path / "here")
    first, more = load([BlocklistConfig(name="a", words="lists/a.txt"), BlocklistConfig(name="b", words="more")],
                       tmp_path / "recipe")
    assert first.blocks("a casino") and not first.blocks("a town")
    assert more.blocks("roulette") and more.blocks("poker")


def test_links_are_looked_for_in_linear_time(tmp_path: Path) -> None:
    (tmp_path / "sites.txt").write_text("bad.com\n")
    blocked = load([BlocklistConfig(name="games", urls="sites.txt")], tmp_path)[0]
    started = time.process_time()
    assert not blocked.blocks("a-" * 200_000 + ". ") and blocked.blocks("a-" * 1000 + " bad.com")
    assert time.process_time() - started < 5, "400 kB; with the square of the length it would be minutes"


def test_block_lists_that_take_several_entries(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("casino\nroulette\n", encoding="utf-8")
    blocked = load([BlocklistConfig(name="games", words="words.txt", min_count=2)], tmp_path)[0]
    assert not blocked.blocks("casino casino") and blocked.blocks("casino, roulette")
    words = compile_words([f"word{number}" for number in range(3000)])
    assert words is not None and words.search("a word2999 b") and not words.search("a word3000 b")


def test_an_entry_as_long_as_a_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("casino\n" + "x" * 1500)
    with pytest.raises(ConfigError, match="1,500 characters is too long"):
        load([BlocklistConfig(name="games", words="words.txt")], tmp_path)


@pytest.mark.parametrize("content, message", [(None, "nothing is found at “words.txt”"), ("# nothing\n", "no entry")])
def test_a_block_list_that_is_none(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load([BlocklistConfig(name="games", words="words.txt")], tmp_path)
