"""Members of tar files: each by its own reader, and what must never be read or written."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text import archives, expansion
from danlu.text.expansion import TOO_LARGE
from danlu.text.files import suffix_of
from danlu.text.read import SourceConfig, read_documents


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **attributes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def read(folder: Path, name: str, **settings) -> tuple[list[Document], dict, Ledger]:
    ledger = Ledger()
    documents = list(read_documents(SourceConfig(path=name, **{"max_refused": 1, **settings}), folder, ledger))
    ledger.check()
    return documents, ledger.station(f"read:{name}").to_json(), ledger


def test_names_of_archives() -> None:
    assert {suffix_of(Path(name)) for name in ("a.tar", "a.tar.gz", "a.TGZ", "a.tar.zst", "a.tbz2", "a.txz")} == {".tar"}


@pytest.mark.parametrize("name,mode", [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.bz2", "w:bz2"),
                                       ("a.txz", "w:xz")])
def test_each_member_by_its_own_reader(tmp_path: Path, name: str, mode: str) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["p1", "p2"]}), table)
    with tarfile.open(tmp_path / name, mode) as archive:
        add(archive, "./d", type=tarfile.DIRTYPE)
        add(archive, "./d/a.txt", "天下大势\n".encode("gb18030") * 50)
        add(archive, "d/b.jsonl.gz", gzip.compress(b'{"text": "one"}\n{oops\n{"text": "two"}\n'))
        add(archive, "d/c.json", json.dumps([{"text": "three"}]).encode())
        add(archive, "d/e.parquet", table.getvalue())
        add(archive, "d/f.csv", b'text,n\n"four\nlines",1\n')
        add(archive, "d/" + "long" * 40 + ".md", b"# md")
        add(archive, "picture.png", b"\x89PNG")
        add(archive, "d/._a.txt", b"hidden")
        add(archive, "w.xml", b"<mediawiki><page><title>t</title><ns>0</ns><revision><text>wiki</text></revision></page>"
                              b"</mediawiki>")
    documents, station, ledger = read(tmp_path, name)
    assert [(item.id, item.text) for item in documents] == [
        (f"{name}/d/a.txt", "天下大势\n" * 50), (f"{name}/d/b.jsonl.gz:1", "one"), (f"{name}/d/b.jsonl.gz:3", "two"),
        (f"{name}/d/c.json:1#1", "three"), (f"{name}/d/e.parquet:1", "p1"), (f"{name}/d/e.parquet:2", "p2"),
        (f"{name}/d/f.csv:2", "four\nlines"), (f"{name}/d/{'long' * 40}.md", "# md"), (f"{name}/w.xml#t", "wiki")]
    assert {item.source for item in documents if "b.jsonl" in item.id} == {f"{name}/d/b.jsonl.gz"}
    assert station["dropped"]["member that is no text"] == {"rows": 1, "bytes": 4, "tokens": 0}
    assert station["dropped"]["hidden member"]["rows"] == 1
    assert [item.where for item in ledger.quarantined] == [f"{name}/d/b.jsonl.gz:2"]
    assert [item.text for item in read(tmp_path, f"{name}#2")[0]] == ["天下大势\n" * 50, "one"]


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "link.txt", type=tarfile.SYMTYPE, linkname=str(outside))
        add(archive, "hard.txt", type=tarfile.LNKTYPE, linkname="../outside.txt")
        add(archive, "dev.txt", type=tarfile.CHRTYPE)
        add(archive, "pipe.txt", type=tarfile.FIFOTYPE)
        add(archive, str(tmp_path / "abs.txt"), b"absolute")
        add(archive, "d/../../up.txt", b"up")
        add(archive, "d\\..\\up.txt", b"up")
        add(archive, "C:\\windows.txt", b"drive")
        add(archive, "inner.tar.gz", b"archive")
        add(archive, "good.txt", b"good")
    before = sorted(tmp_path.iterdir())
    documents, station, ledger = read(tmp_path, "a.tar")
    assert [item.text for item in documents] == ["good"] and sorted(tmp_path.iterdir()) == before
    assert [item.reason for item in ledger.quarantined] == [
        "a symbolic link in an archive", "a hard link in an archive", "a device in an archive", "a pipe in an archive",
        "an absolute path in an archive", "a path that leads out of its archive", "a path that leads out of its archive",
        "an absolute path in an archive", "an archive in an archive"]
    assert ledger.quarantined[0].where == "a.tar/link.txt" and station["in"]["rows"] == 10


def test_a_name_in_another_encoding(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="gb18030", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "中文的文件名.txt", b"text")
    documents, _, _ = read(tmp_path, "a.tar")
    assert [item.id for item in documents] == ["a.tar/中文的文件名.txt"]


def make(path: Path, number: int = 20) -> bytes:
    with tarfile.open(path, "w") as archive:
        for n in range(number):
            add(archive, f"{n:02}.txt", f"text {n}".encode())
    return path.read_bytes()


def test_damage(tmp_path: Path) -> None:
    data = make(tmp_path / "a.tar")
    for name, damaged, read_before in [
            ("header.tar", data[:3072] + b"x" * 512 + data[3584:], 3), ("cut.tar", data[:3072 + 200], 3),
            ("text.tar", b"no archive at all" * 100, 0), ("empty.tar", b"", 0), ("body.tar", data[:3072 + 512 + 3], 3)]:
        (tmp_path / name).write_bytes(damaged)
        documents, station, ledger = read(tmp_path, name)
        assert len(documents) == read_before, name
        assert [item.where for item in ledger.quarantined] == [f"{name}:{read_before + 1}"]
        assert station["dropped"][archives.DAMAGED]["rows"] == 1
    packed = gzip.compress(data)
    (tmp_path / "cut.tar.gz").write_bytes(packed[:-40])
    with pytest.raises(DataError, match="cut off or damaged"):
        read(tmp_path, "cut.tar.gz")
    with pytest.raises(DataError, match="max_refused"):
        read(tmp_path, "cut.tar", max_refused=0)


def test_a_header_of_any_length_is_not_held(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"a" * 2048)
    documents, _, ledger = read(tmp_path, "a.tar")
    assert not documents and "a header of 1,073,741,824 bytes" in ledger.quarantined[0].reason


def test_bombs_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "FREE_BYTES", 300_000)
    monkeypatch.setattr(expansion, "MAX_RATIO", 20)
    rows = (json.dumps({"text": "abc " * 100}) + "\n") * 500
    with tarfile.open(tmp_path / "nested.tar.gz", "w:gz") as archive:
        for n in range(4):  # each alone is within the bound, but not all together
            add(archive, f"{n}.jsonl.gz", gzip.compress(rows.encode()))
    limit = 300_000 + 20 * (tmp_path / "nested.tar.gz").stat().st_size
    documents, station, ledger = read(tmp_path, "nested.tar.gz")
    assert 0 < sum(item.num_bytes for item in documents) < limit
    assert station["dropped"][TOO_LARGE]["rows"] >= 2 and len(documents) >= 500
    with tarfile.open(tmp_path / "zeros.tar.gz", "w:gz") as archive:
        add(archive, "a.txt", b"small\n")
        add(archive, "b.txt", b"\n" * 5_000_000)
        add(archive, "c.txt", b"never reached\n")
    documents, station, ledger = read(tmp_path, "zeros.tar.gz")
    assert [item.text for item in documents] == ["small\n"]
    assert [item.where for item in ledger.quarantined] == ["zeros.tar.gz:2"]
