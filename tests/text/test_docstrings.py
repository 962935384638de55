"""Docstrings as text, read from source."""

import sys
from pathlib import Path

from danlu.core.ledger import Ledger
from danlu.text.read import SourceConfig, read_documents


def test_one_document_a_module(package: Path, ledger: Ledger) -> None:
    source = SourceConfig(path="docstrings:tinypackage,single_tiny", category="en")
    found = {document.id: document for document in read_documents(source, Path(), ledger)}
    assert list(found) == ["tinypackage", "tinypackage.sub", "tinypackage.tool", "single_tiny"]
    assert found["tinypackage"].text == "The package.\n\nIndented.\n"
    assert found["tinypackage.tool"].text == (
        "About A.\n\nAbout f.\n\nAbout g.\n\nAbout h: 好.\n")
    assert found["tinypackage.tool"].source == "docstrings:tinypackage"
    assert found["tinypackage.tool"].category == "en"
    assert "tinypackage" not in sys.modules, "documentation is read without importing"


def test_what_gives_no_text_is_counted(package: Path, ledger: Ledger) -> None:
    list(read_documents(SourceConfig(path="docstrings:tinypackage"), Path(), ledger))
    ledger.check()
    station = ledger.station("read:docstrings:tinypackage")
    assert station.dropped["no docstrings"].rows == 1
    assert station.dropped["not Python"].rows == 1
    assert [item.where for item in ledger.quarantined] == ["tinypackage.sub.broken:1"]
    assert station.came.rows == 5 and station.went.rows == 3
    sources = [path.stat().st_size for path in package.rglob("*.py")]
    assert station.came.bytes == sum(sources)


def test_odd_source_files_are_refused_not_fatal(package: Path, ledger: Ledger) -> None:
    (package / "nul.py").write_bytes(b'"""x"""\n\x00\n')
    (package / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    (package / "cookie.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""caf\xe9"""\n')
    (package / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (package / "half.py").write_text('"""a \\ud800 b"""\n')
    found = {document.id: document.text for document in
             read_documents(SourceConfig(path="docstrings:tinypackage"), Path(), ledger)}
    ledger.check()
    assert found["tinypackage.cookie"] == "café\n"
    refused = {item.where.partition(":")[0] for item in ledger.quarantined}
    assert refused == {f"tinypackage.{name}" for name in ("nul", "latin", "deep", "sub.broken")}
    assert "tinypackage.half" not in found


def test_the_help_topics_of_the_standard_library(ledger: Ledger) -> None:
    found = {document.id: document.text for document in
             read_documents(SourceConfig(path="docstrings:pydoc_data"), Path(), ledger)}
    ledger.check()
    assert len(found) > 50
    assert 'The "assert" statement' in found["pydoc_data.topics#assert"]
