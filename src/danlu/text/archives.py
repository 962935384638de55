"""The members of tar files, each a file by itself: read by the reader of its own name, under the name `a.tar/dir/b.jsonl`.

A member is copied to a temporary file, because tables are read from their end and JSON is looked at before it is read;
nothing is ever written under a name from the archive. Links, devices and names that lead out of the archive are refused,
archives inside archives too. All that is read of an archive, unpacked, may not be more than the archive's own bound.

    for member in read_members(Located(path, "a.tar.gz"), gate, (".txt", ".jsonl")):
        ...                                     # a Located, as long as the next one is not asked for
"""

import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from tarfile import InvalidHeaderError, ReadError, TarFile, TruncatedHeaderError  # type: ignore[attr-defined]  # not among its published names
from tempfile import TemporaryDirectory
from typing import IO, Self

from danlu.text.encodings import decode_line
from danlu.text.expansion import Expanded, limit_of
from danlu.text.files import ARCHIVE, Located, compression_of, suffix_of
from danlu.text.lines import UNREADABLE, Gate, give_up, open_file, unreadable

PIECE = 1 << 20
DAMAGED = "the archive is cut off or damaged"
MAX_HEADER = 1 << 20  # bytes of a name or of further headers, which are held in memory
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
KINDS = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device",
         tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe"}


class _Member(tarfile.TarInfo):
    """A header that is no endless name, and that does not take damage in the middle for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in EXTENDED and member.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except (InvalidHeaderError, TruncatedHeaderError) as error:
            raise ReadError(f"{error} at byte {tarfile.offset:,}") from error


def read_members(located: Located, gate: Gate, suffixes: tuple[str, ...]) -> Iterator[Located]:
    """The members that end in one of these suffixes, in their order; all others are counted, in rows and bytes.

    A damaged archive is one refused row, behind which nothing is read. Raises DataError where the compressed file is cut
    off, or cannot be read.
    """
    number = 0
    allowed = limit_of(located.path.stat().st_size, located.limit) if compression_of(located.path) else located.limit
    began = gate.station.came.bytes  # all that is read of members comes in at the gate
    try:
        with open_file(located.path, located.limit) as file, tarfile.open(
                fileobj=file, mode="r|", tarinfo=_Member, encoding="utf-8") as archive, TemporaryDirectory() as folder:
            while True:
                number += 1
                member = archive.next()
                archive.members.clear()  # type: ignore[attr-defined]  # it would hold all headers
                if member is None:
                    break
                if member.isdir():
                    continue
                name = _name(member.name)
                where = f"{located.label}/{name}"
                if reason := _refused(member):
                    _pass_over(member, where, gate, refused=reason)
                elif reason := _left_out(name, suffixes):
                    _pass_over(member, where, gate, dropped=reason)
                else:
                    copied = _copy(archive, member, Path(folder), name)
                    spent = gate.station.came.bytes - began
                    left = None if allowed is None else max(allowed - spent, 0)
                    yield replace(located, path=copied, label=where, limit=left)
                    copied.unlink()
    except tarfile.TarError as error:
        gate.take(rows=1)
        gate.refuse(f"{located.label}:{max(number, 1)}", f"{DAMAGED}: {error}; the rest is not read", kind=DAMAGED)
    except Expanded as error:
        give_up(gate, f"{located.label}:{max(number, 1)}", error)
    except UNREADABLE as error:
        raise unreadable(located, error) from error


def _pass_over(member: tarfile.TarInfo, where: str, gate: Gate, refused: str = "", dropped: str = "") -> None:
    size = member.size if member.isreg() and not member.issparse() else 0
    gate.take(rows=1, bytes=size)
    if refused:
        gate.refuse(where, refused, member.name.encode("utf-8", "replace").decode(), size)
    else:
        gate.station.drop(dropped, rows=1, bytes=size)


def _name(name: str) -> str:
    """A member's name as text, whatever encoding it is in, without `./` before it."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = decode_line(raw)[0] or raw.decode("utf-8", "backslashreplace")
    return PurePosixPath(text).as_posix()


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is never read, whatever is in it; "" where it may be."""
    if not member.isreg() or member.issparse():
        return f"{KINDS.get(member.type, 'a sparse file')} in an archive"
    if member.name.startswith(("/", "\\")) or PureWindowsPath(member.name).drive:
        return "an absolute path in an archive"
    if ".." in PurePosixPath(member.name.replace("\\", "/")).parts:
        return "a path that leads out of its archive"
    return "an archive in an archive" if suffix_of(Path(member.name)) == ARCHIVE else ""


def _left_out(name: str, suffixes: tuple[str, ...]) -> str:
    """Why a member is not read, as files in folders are not."""
    if any(part.startswith(".") for part in PurePosixPath(name).parts):
        return "hidden member"
    return "" if suffix_of(Path(name)) in suffixes else "member that is no text"


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str) -> Path:
    """The member as a file whose name ends as its own. Raises tarfile.ReadError where the archive ends before."""
    target = folder / ("member" + suffix_of(Path(name)) + compression_of(Path(name)))
    source: IO[bytes] | None = archive.extractfile(member)
    assert source is not None, "it is a file"
    with open(target, "wb") as file:
        shutil.copyfileobj(source, file, PIECE)
    return target
