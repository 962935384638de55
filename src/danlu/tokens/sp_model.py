"""SentencePiece's `tokenizer.model`, read and grown without a protobuf library.

The file is one protobuf message: `repeated SentencePiece pieces = 1 {string piece = 1; float score = 2; Type type = 3}`,
then specifications of trainer and normaliser that stay as they are. A message's repeated fields may stand anywhere and are
joined in their order, so a grown file is the old one with further pieces behind it.

    pieces = read_pieces(data)
    data = append_pieces(data, [Piece("你好", -32000.0)])
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from danlu.core.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
PIECES, TRAINER_SPEC, VOCAB_SIZE = 1, 2, 4  # numbers of fields
VARINT, EIGHT, DELIMITED, FOUR = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece: its text, its score and its type."""

    text: str
    score: float
    type: int = NORMAL


def read_pieces(data: bytes) -> list[Piece]:
    """The pieces in the order of their ids. Raises DataError where the bytes are no such model."""
    found = [_read_piece(raw) for number, raw, _ in _fields(data) if number == PIECES and isinstance(raw, bytes)]
    if not found:
        raise DataError("holds no pieces: it is no SentencePiece model")
    return found


def append_pieces(data: bytes, pieces: Iterable[Piece]) -> bytes:
    """The model with pieces behind its own; every byte of the old file stays where it is."""
    body = data + b"".join(delimited(PIECES, _write_piece(piece)) for piece in pieces)
    # A message that stands twice is merged field by field: this says the new size and keeps the rest of the specification.
    return body + delimited(TRAINER_SPEC, _key(VOCAB_SIZE, VARINT) + _varint(len(read_pieces(body))))


def keep_pieces(data: bytes, kept: Iterable[int]) -> bytes:
    """The model with these of its pieces alone, in their order, and all else as it was."""
    chosen, index, parts = set(kept), 0, []
    for number, _, span in _fields(data):
        if number != PIECES or index in chosen:
            parts.append(data[span[0]:span[1]])
        index += number == PIECES
    return b"".join(parts)


def _read_piece(raw: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value, _ in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8", "replace")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _write_piece(piece: Piece) -> bytes:
    body = delimited(1, piece.text.encode()) + _key(2, FOUR) + struct.pack("<f", piece.score)
    return body if piece.type == NORMAL else body + _key(3, VARINT) + _varint(piece.type)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, tuple[int, int]]]:
    """(number, value, where it stands) of each field of a message."""
    position = 0
    while position < len(data):
        begin = position
        key, position = _read_varint(data, position)
        value: int | bytes
        if key & 7 == VARINT:
            value, position = _read_varint(data, position)
        else:
            if key & 7 == DELIMITED:
                size, position = _read_varint(data, position)
            elif key & 7 in (FOUR, EIGHT):
                size = 4 if key & 7 == FOUR else 8
            else:
                raise DataError(f"is no SentencePiece model (wire type {key & 7} at byte {begin})")
            if position + size > len(data):
                raise DataError(f"is no SentencePiece model, or cut off (at byte {begin})")
            value, position = data[position:position + size], position + size
        yield key >> 3, value, (begin, position)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            return value, position
    raise DataError(f"is no SentencePiece model, or cut off (at byte {position})")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def delimited(number: int, body: bytes) -> bytes:
    """A field of bytes as Protocol Buffers write it: the number with its wire type, the length, the bytes."""
    return _key(number, DELIMITED) + _varint(len(body)) + body
