"""Exact duplicates across sources."""

from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.dedup import deduplicate, drop_repeated_paragraphs, fingerprint


def test_case_width_and_blanks_make_no_difference() -> None:
    assert fingerprint("Hello  World\n") == fingerprint("ｈｅｌｌｏ\tworld") == fingerprint(" HELLO world")
    assert fingerprint("helloworld") != fingerprint("hello world")


def test_the_first_one_stays_and_the_rest_is_counted(ledger: Ledger) -> None:
    texts = [("你好，世界", "a"), ("x", "a"), ("你好,世界", "b"), ("x ", "c"), ("y", "c")]
    kept = list(deduplicate((Document(text, source, str(n)) for n, (text, source) in enumerate(texts)), ledger))
    assert [document.id for document in kept] == ["0", "1", "4"]
    station = ledger.station("dedup")
    assert station.dropped["duplicate"].rows == 2
    assert station.dropped["duplicate"].bytes == len("你好,世界".encode()) + 2
    ledger.check()


def test_repeated_paragraphs_are_dropped_and_counted() -> None:
    ledger = Ledger()
    texts = ["First.\n\nShared  words.\n\n\nLast.", "shared words.\n\nNew.", "NEW.\n\nfirst."]
    documents = [Document(text, "s", str(number)) for number, text in enumerate(texts)]
    kept = list(drop_repeated_paragraphs(documents, ledger))
    ledger.check()
    assert [document.text for document in kept] == ["First.\n\nShared  words.\n\n\nLast.", "New."]
    station = ledger.station("paragraphs")
    assert station.dropped["nothing but repeated paragraphs"].rows == 1
    assert station.dropped["repeated paragraph"].bytes == len("shared words.\n\n") + len(texts[2])
