"""In which encoding a file's bytes are: told by its mark or its beginning, and for a line that does not fit, by the line.

UTF-8 needs no guess: other bytes hardly ever form it by chance. What is not UTF-8 and has no mark of UTF-16 is told by what
the bytes would say: Chinese comes in runs of pairs, of which nearly all are in the right encoding's own table of common
characters (the first level of GB 2312, or of Big5), and two fifths among a hundred that every text is full of. Korean,
Cyrillic or Thai bytes fill the tables, too, but hit upon those few in one of thirty; Japanese (EUC-JP) never has the low
second bytes that Big5 has in every other character. The accents of Windows-1252 (Latin-1) stand alone beside plain
letters. What is neither is not guessed, and where the lines at the beginning of a file are not, no line of it is taken for
Chinese: a few pairs of Korean say too little alone. A line of UTF-8 in a file of another encoding stays what it is: in that
encoding it would be other characters, often without a mistake.

    with open_text(located, gate) as file:
        file.readline()                     # UTF-8, whatever the file is in
    decode_line(raw)                        # ("你好", "GB18030") or (None, "")
"""

import codecs
import io
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danlu.text.lines import Gate

SAMPLE = 1 << 16  # bytes at the beginning by which a file is judged
MIN_COMMON = 0.6  # share of pairs that have to be common characters
MIN_FREQUENT = 0.08  # share of Han characters that have to be FREQUENT ones
MIN_HAN = 20  # characters from which on that can be said
FREQUENT = frozenset(
    "的一了不是人有在来大为中年个和他说我这上道到出时以国后发可子要就性生也家里地于多下去天们着你过用好成得么日行现见能会等都那体者分"
    "经作之前自又主对进部起因只高心事月重及小方学还本长如而公新开没看面头其原二同三业全來為個說這時國後發裡於們著過麼現見會體經對進學"
    "還長開沒頭業")
MIN_ACCENTS = 8  # by which a whole file is told
MAX_HIGH_RUN = 2  # accents beside each other; more are another alphabet
UTF_8 = "UTF-8"
RECODED = "recoded as UTF-8"
CODECS = {"GB18030": "gb18030", "Big5": "big5hkscs", "Windows-1252": "cp1252", "UTF-16": "utf-16"}
CHINESE = ("GB18030", "Big5")
_HIGH_BYTES = bytes(range(0x80, 0x100))
_PAIR = rb"[\x81-\xfe][\x40-\x7e\x80-\xfe]"
_TOKEN = re.compile(_PAIR + rb"|[\x80-\xff]")
_RUN = re.compile(rb"(?:" + _PAIR + rb"){2,}")
_HIGH_RUN = re.compile(rb"[\xc0-\xff]{%d,}" % (MAX_HIGH_RUN + 1))
_ACCENT = re.compile(rb"[\xc0-\xd6\xd8-\xf6\xf8-\xff]")
_IN_WORD = re.compile(rb"(?<=[A-Za-z])[\xc0-\xd6\xd8-\xf6\xf8-\xff]|[\xc0-\xd6\xd8-\xf6\xf8-\xff](?=[A-Za-z])")
# Lines of UTF-8, of three bytes a character where pairs of other encodings could be it by chance (the first two of 联通)
_THREE = rb"[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
_WIDE = re.compile(rb"(?=.*[\x80-\xff])(?:[\x00-\x7f]|" + _THREE + rb")+", re.S)
_MARKED = re.compile(rb"(?=.*[\x80-\xff])(?:[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|" + _THREE +
                     rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3})+", re.S)
_SIGN = re.compile(rb"[\x82-\x8c\x91-\x9c\xa0-\xbf]")  # quotation marks, dashes, currencies


class _Recoded(io.RawIOBase):
    """A stream in another encoding as one of UTF-8; lines that are UTF-8 and bytes that say nothing stay as they are.

    At its end the gate is told by how much the text is longer than the file, whose bytes are what came.
    """

    def __init__(self, file: io.BufferedIOBase, codec: str, gate: "Gate | None") -> None:
        self.file, self.gate, self.longer = file, gate, 0
        self.errors = "replace" if codec == "utf-16" else "surrogateescape"
        self.decoder = codecs.getincrementaldecoder(codec)(self.errors)
        self.utf_8 = None if codec == "utf-16" else _MARKED if codec == "cp1252" else _WIDE
        self.ready, self.begins = b"", True  # whether a line begins

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not self.ready:
            size, self.ready = self._read()
            self.longer += len(self.ready) - size
            if not size:
                self._settle()
                break
        size = min(len(view), len(self.ready))
        view[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def _read(self) -> tuple[int, bytes]:
        """Some bytes of the file: how many, and they in UTF-8. At its end the first is 0."""
        size, parts = 0, []
        while size < SAMPLE and (line := self.file.readline(SAMPLE)):
            size += len(line)
            whole = self.begins and (line.endswith(b"\n") or len(line) < SAMPLE)
            self.begins = line.endswith(b"\n")
            if whole and self.utf_8 is not None and self.utf_8.fullmatch(line):
                parts.append(line)
                if self.gate is not None:
                    self.gate.station.note(f"lines decoded as {UTF_8}")
            else:
                parts.append(self._encoded(line))
        return size, b"".join(parts) if size else self._encoded(b"")

    def _encoded(self, data: bytes) -> bytes:
        return self.decoder.decode(data, final=not data).encode("utf-8", self.errors)

    def _settle(self) -> None:
        if self.gate is not None:
            self.gate.take(bytes=-self.longer)
            (self.gate.station.add if self.longer > 0 else self.gate.station.drop)(RECODED, bytes=abs(self.longer))
            self.gate = None

    def close(self) -> None:
        self.file.close()
        super().close()


def as_utf8(file: io.BufferedReader, gate: "Gate | None" = None) -> io.BufferedReader:
    """The stream, recoded where it is not UTF-8; the encoding is noted at the gate's station."""
    name = encoding_of(file.peek(SAMPLE)[:SAMPLE])
    if name == UTF_8:
        return file
    if gate is not None:
        gate.station.note(f"files decoded as {name}")
    return io.BufferedReader(_Recoded(file, CODECS[name], gate), SAMPLE)


def encoding_of(sample: bytes) -> str:
    """The name of the encoding by the beginning of a file; UTF-8 where nothing else is likelier."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not sample.startswith(codecs.BOM_UTF32_LE):
        return "UTF-16"
    if len(sample) >= SAMPLE:
        sample = sample.rstrip(_HIGH_BYTES)  # its last character may be cut
    if sample.isascii() or sample.startswith(codecs.BOM_UTF8) or _is_damaged_utf8(sample):
        return UTF_8
    name = _guess(sample)
    few = name == "Windows-1252" and len(_ACCENT.findall(sample)) + len(_SIGN.findall(sample)) < MIN_ACCENTS
    return UTF_8 if name is None or few else name  # with a few of them only their lines are decoded otherwise


def decode_line(raw: bytes, beginning: bytes = b"") -> tuple[str | None, str]:
    """(the text of a line that is not UTF-8, its encoding), or (None, "") where it is damaged UTF-8 or cannot be told.

    beginning  of the line's file, by which a short line is told better
    """
    beside = _told_of_lines(beginning)
    name = None if _is_damaged_utf8(raw) else _guess(raw, beside)
    if name is None or (name in CHINESE and beside is None):
        return None, ""
    try:
        return raw.decode(CODECS[name]), name
    except UnicodeDecodeError:
        return None, ""


@lru_cache(maxsize=4)
def _told_of_lines(beginning: bytes) -> str | None:
    """The encoding of the lines that are not UTF-8; None where they are in none of these, "" where they say too little."""
    lines = [line for line in beginning.splitlines() if not line.isascii() and not _is_damaged_utf8(line)]
    data = b"\n".join(lines)
    return _guess(data) if sum(len(run) // 2 for run in _RUN.findall(data)) >= MIN_HAN else ""


def _is_damaged_utf8(data: bytes) -> bool:
    """Whether at least as many characters are told by UTF-8 as bytes are not."""
    text = data.decode("utf-8", "surrogateescape")
    bad = sum("\udc80" <= character <= "\udcff" for character in text)
    return len(text) - bad - sum(map(str.isascii, text)) >= bad


def _guess(data: bytes, beside: str | None = "") -> str | None:
    """The encoding of bytes that are not UTF-8; None where they look like none of the known ones.

    beside  the encoding of other lines of the file: lines of rare characters need not be told from Korean again
    """
    tokens = _TOKEN.findall(data)
    in_runs = [pair for run in _RUN.findall(data) for pair in zip(run[::2], run[1::2])]
    gb = sum((0xb0 <= lead <= 0xd7 or 0xa1 <= lead <= 0xa3) and trail >= 0xa1 for lead, trail in in_runs)
    big5 = sum(0xa4 <= lead <= 0xc6 or 0xa1 <= lead <= 0xa3 for lead, trail in in_runs if not 0x7f <= trail <= 0xa0)
    name, common = ("GB18030", gb) if gb >= big5 else ("Big5", big5)
    if common >= MIN_COMMON * len(tokens) > 0 and (name == beside or _reads_as_chinese(data, in_runs, name)):
        return name
    accents, inside = len(_ACCENT.findall(data)), len(_IN_WORD.findall(data))
    likely = 2 * inside >= accents if inside else not accents and _SIGN.search(data)
    if likely and not _HIGH_RUN.search(data):
        return "Windows-1252"
    return None


def _reads_as_chinese(data: bytes, pairs: list[tuple[int, int]], name: str) -> bool:
    """Whether the pairs of an encoding give the characters that Chinese text is full of."""
    if name == "Big5" and len(pairs) >= 8 and all(trail >= 0x80 for _, trail in pairs):
        return False
    text = b"".join(_RUN.findall(data)).decode(CODECS[name], "replace")
    han = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    return len(han) < MIN_HAN or sum(character in FREQUENT for character in han) >= MIN_FREQUENT * len(han)
