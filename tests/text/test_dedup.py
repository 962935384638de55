"""Exact duplicates across sources."""

from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.dedup import deduplicate, fingerprint


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
