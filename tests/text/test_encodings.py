"""Encodings: of files, of single lines, and what is not guessed."""

import codecs
import json
from pathlib import Path

import pytest

from danlu.core.ledger import Ledger
from danlu.text.encodings import SAMPLE, decode_line, encoding_of
from danlu.text.read import SourceConfig, read_documents

ZH = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。\n"
TW = "話說天下大勢，分久必合，合久必分。周末七國分爭，併入於秦。\n"
FR = "Il a été à Paris, où l’on dîne déjà très tôt.\n"


def read(tmp_path: Path, name: str, data: bytes, **keys) -> tuple[str, Ledger]:
    (tmp_path / name).write_bytes(data)
    ledger = Ledger()
    documents = list(read_documents(SourceConfig(path=name, **keys), tmp_path, ledger))
    ledger.check()
    return "".join(document.text for document in documents), ledger


@pytest.mark.parametrize("text, codec, name", [
    (ZH, "gb18030", "GB18030"), (ZH, "gbk", "GB18030"), (TW, "big5", "Big5"), (FR, "cp1252", "Windows-1252"),
    (ZH, "utf-8", "UTF-8"), (TW, "utf-8-sig", "UTF-8"), (FR, "utf-8", "UTF-8"), (ZH + FR, "utf-16", "UTF-16")])
def test_a_file_in_any_encoding(tmp_path: Path, text: str, codec: str, name: str) -> None:
    assert encoding_of((text * 3).encode(codec)) == name
    found, ledger = read(tmp_path, "a.txt", (text * 3).encode(codec))
    assert found == text * 3
    assert ledger.station("read:a.txt").notes == ({f"files decoded as {name}": 1} if name != "UTF-8" else {})
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _ in range(3))
    assert read(tmp_path, "b.jsonl", rows.encode(codec))[0] == text * 3
    assert read(tmp_path, "c.json", json.dumps([text] * 3, ensure_ascii=False).encode(codec))[0] == text * 3
    assert read(tmp_path, "d.csv", f'n,text\n1,"{text}"\n'.encode(codec), field="text")[0] == text


def test_big_endian_utf_16_and_a_cut_one(tmp_path: Path) -> None:
    data = codecs.BOM_UTF16_BE + ZH.encode("utf-16-be")
    assert read(tmp_path, "a.txt", data)[0] == ZH
    assert read(tmp_path, "a.txt", data[:-1])[0] == ZH[:-1] + "\ufffd"


def test_single_lines_in_another_encoding(tmp_path: Path) -> None:
    plain = "A line in plain letters, as most are.\n" * (SAMPLE // 30)
    data = plain.encode() + ZH.encode() + ZH.encode("gb18030") + TW.encode("big5") + FR.encode("cp1252") + b"end\n"
    found, ledger = read(tmp_path, "a.txt", data)
    assert found == plain + ZH + ZH + TW + FR + "end\n"
    station = ledger.station("read:a.txt")
    assert station.notes == {"lines decoded as GB18030": 1, "lines decoded as Big5": 1, "lines decoded as Windows-1252": 1}
    assert station.added["recoded as UTF-8"].bytes == sum(
        len(text.encode()) - len(text.encode(codec)) for text, codec in ((ZH, "gb18030"), (TW, "big5"), (FR, "cp1252")))


@pytest.mark.parametrize("codec, text", [("gb18030", ZH), ("big5", TW), ("cp1252", FR)])
def test_lines_of_utf_8_in_a_file_that_is_not(tmp_path: Path, codec: str, text: str) -> None:
    """浣犲ソ is what UTF-8 says in GB18030, without a mistake. The first two characters of 联通 are UTF-8 by chance."""
    by_chance = "联通\n" if codec == "gb18030" else ""
    data = (text * 4000 + by_chance).encode(codec) + (ZH * 3).encode() + text.encode(codec) + ZH.encode()[:-1]
    found, ledger = read(tmp_path, "a.txt", data)
    assert found == text * 4000 + by_chance + ZH * 3 + text + ZH[:-1]
    assert ledger.station("read:a.txt").notes["lines decoded as UTF-8"] == 4
    row = json.dumps({"text": text * 9000}, ensure_ascii=False) + "\n"  # a line longer than what is read at a time
    assert len(row) > SAMPLE and read(tmp_path, "b.jsonl", row.encode(codec))[0] == text * 9000


def test_half_of_a_surrogate_pair_is_no_utf_8(tmp_path: Path) -> None:
    cesu = "\ud83d\ude00".encode("utf-8", "surrogatepass") + "好\n".encode()
    _, ledger = read(tmp_path, "a.txt", ZH.encode("gb18030") * 40 + cesu)
    assert "lines decoded as UTF-8" not in ledger.station("read:a.txt").notes


def test_one_bad_byte_costs_one_line_whatever_the_encoding(tmp_path: Path) -> None:
    found, ledger = read(tmp_path, "a.txt", ZH.encode() * 3 + "分久\n".encode()[:-1] + b"\xff\n" + ZH.encode())
    assert found == ZH * 4 and ledger.station("read:a.txt").dropped["not UTF-8"].rows == 1
    found, ledger = read(tmp_path, "b.txt", ZH.encode("gb18030") * 3 + b"bad \xff\xff\n" + ZH.encode("gb18030"))
    assert found == ZH * 4 and ledger.station("read:b.txt").dropped["not UTF-8"].rows == 1


@pytest.mark.parametrize("codec, text", [
    ("euc-kr", "대한민국의 수도는 서울이며 한강을 끼고 있다. 오늘 날씨가 매우 좋아서 사람들이 공원에 많이 나왔다.\n"),
    ("koi8-r", "Москва является столицей России. Сегодня была хорошая погода, и много людей гуляло в парке.\n"),
    ("cp1251", "Москва является столицей России. Сегодня была хорошая погода, и много людей гуляло в парке.\n"),
    ("euc-jp", "東京は日本の首都であり、世界でも有数の大都市である。今日は天気が良く、公園には多くの人がいた。\n"),
    ("shift-jis", "東京は日本の首都であり、世界でも有数の大都市である。今日は天気が良く、公園には多くの人がいた。\n"),
    ("cp874", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย วันนี้อากาศดีมาก ผู้คนจำนวนมากออกมาเดินเล่นในสวน\n")])
def test_other_alphabets_are_not_taken_for_chinese(codec: str, text: str) -> None:
    assert encoding_of((text * 9).encode(codec)) == "UTF-8" and decode_line((text[:-1] * 9).encode(codec)) == (None, "")


@pytest.mark.parametrize("codec, lines", [
    ("euc-kr", ["오늘은 날씨가 좋아서 공원에 갔다.", "친구들과 점심을 먹었다.", "서울은 대한민국의 수도이다.",
                "바람이 차가웠다."]),
    ("euc-jp", ["第一章", "ありがとう", "東京は日本の首都である。", "経済の発展", "今日は天気が良い。"]),
    ("koi8-r", ["Москва является столицей", "Сегодня хорошая погода", "много людей", "гуляло в парке"]),
    ("cp874", ["วันนี้อากาศดีมาก", "แม่ไปตลาดซื้อผัก", "นักเรียนไปโรงเรียน", "เราไปเดินเล่นที่สวน"])])
def test_short_lines_are_told_by_those_beside_them(tmp_path: Path, codec: str, lines: list[str]) -> None:
    """Of a few pairs each could be Chinese; the beginning of the file says that none is."""
    assert any(decode_line(line.encode(codec))[0] is not None for line in lines)
    text = "".join(f"{line}\n" for line in lines * 4)
    for before in ("", ZH + "plain\n"):  # a file of that encoding, and one of UTF-8 in which there are such lines
        found, ledger = read(tmp_path, "a.txt", before.encode() + text.encode(codec), document="line", max_refused=1.0)
        assert found == before.replace("\n", "")
        assert ledger.station("read:a.txt").dropped["not UTF-8"].rows == 4 * len(lines)


def test_a_sample_that_ends_inside_a_character() -> None:
    for shift in range(4):
        assert encoding_of((b"x" * shift + ZH.encode() * 2000)[:SAMPLE]) == "UTF-8"
    assert encoding_of((b"x" * (SAMPLE - 1) + "é".encode())[:SAMPLE]) == "UTF-8"


@pytest.mark.parametrize("raw", ["Привет, мир\n".encode("cp1251"), b"two \xff\xfe\n", b'{"text": "\xff"}', b"\x80\x81\x82",
                                 ZH.encode()[:-2] + b"\n", b"an \xff bad one\n"])
def test_what_cannot_be_told_is_not_guessed(raw: bytes) -> None:
    assert decode_line(raw) == (None, "")
