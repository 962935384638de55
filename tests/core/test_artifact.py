"""Artifacts: whole or not at all, and every changed byte is found."""

import errno
import os
from pathlib import Path

import pytest

from danlu.core import artifact
from danlu.core.artifact import MANIFEST, open_artifact, publish
from danlu.core.errors import DataError

OPTIONS = {"kind": "corpus", "fingerprint": "ab" * 32, "parents": {"x": "cd" * 32}, "config": {"n": 1},
           "metrics": {"rows": 3}, "code": "0"}


def make(tmp_path: Path, name: str = "a") -> Path:
    work = tmp_path / f".work-{name}"
    (work / "sub").mkdir(parents=True)
    (work / "one.bin").write_bytes(bytes(range(256)) * 40)
    (work / "sub" / "two.txt").write_text("hello")
    publish(work, tmp_path / name, **OPTIONS)
    return tmp_path / name


def test_published_and_opened(tmp_path: Path) -> None:
    folder = make(tmp_path)
    opened = open_artifact(folder, kind="corpus", deep=True)
    assert opened.fingerprint == "ab" * 32 and opened.metrics == {"rows": 3}
    assert sorted(opened.manifest["files"]) == ["one.bin", "sub/two.txt"]
    assert not list(tmp_path.glob(".work*"))


def test_equal_work_gives_equal_manifests(tmp_path: Path) -> None:
    assert (make(tmp_path, "a") / MANIFEST).read_bytes() == (make(tmp_path, "b") / MANIFEST).read_bytes()


@pytest.mark.parametrize("name", ["one.bin", "sub/two.txt", MANIFEST])
def test_a_flipped_byte_is_refused_with_the_files_name(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        open_artifact(folder, deep=True)


def test_every_single_byte_of_a_small_file_and_of_the_manifest(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for name in ("sub/two.txt", MANIFEST):
        good = (folder / name).read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 0x10
            (folder / name).write_bytes(bad)
            try:
                opened = open_artifact(folder, deep=True)
            except DataError:
                continue
            # white space between the manifest's items is not content
            assert name == MANIFEST and opened.fingerprint == OPTIONS["fingerprint"]
        (folder / name).write_bytes(good)


def test_cut_missing_and_foreign_files(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "one.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"one\.bin.*has 5 bytes"):
        open_artifact(folder)
    (folder / "one.bin").unlink()
    with pytest.raises(DataError, match=r"one\.bin.*missing"):
        open_artifact(folder)
    (make(tmp_path, "b") / "new.txt").write_text("x")
    with pytest.raises(DataError, match=r"new\.txt.*not in the manifest"):
        open_artifact(tmp_path / "b")


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished artifact"):
        open_artifact(tmp_path)


def test_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a corpus artifact, not a model artifact"):
        open_artifact(make(tmp_path), kind="model")


def test_links_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    os.symlink("/etc/hostname", folder / "link")
    with pytest.raises(DataError, match="link"):
        open_artifact(folder)


@pytest.mark.parametrize("function", ["write_atomic", "sync"])
def test_a_full_disk_is_one_clear_message_and_leaves_nothing_published(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    work = tmp_path / ".work"
    work.mkdir()
    (work / "a").write_text("a")
    monkeypatch.setattr(artifact, function, full)
    with pytest.raises(DataError, match="the disk is full"):
        publish(work, tmp_path / "final", **OPTIONS)
    assert not (tmp_path / "final").exists()
