"""How many rows a Parquet file says that it has: from its footer alone, in Thrift's compact protocol."""

from __future__ import annotations

from pathlib import Path

from hasten.errors import BadInput

LARGEST_FOOTER_BYTES = 64 << 20
DEEPEST = 16
NUM_ROWS, I64, STRUCT = 3, 6, 12
LENGTHS = {1: 0, 2: 0, 3: 1, 7: 8}
"""Bytes of a field's value by its type; 1 and 2 are true and false, which have none of their own."""


def footer_rows(path: Path) -> int | None:
    """Give the number of rows; None where the footer cannot be read so: then only reading the file tells.

    Source: apache/parquet-format, ``FileMetaData.num_rows`` (field 3); Thrift's compact protocol.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        if not 0 < length <= min(size - 8, LARGEST_FOOTER_BYTES):
            return None
        file.seek(size - 8 - length)
        footer = file.read(length)
    try:
        return _rows(_Reader(footer))
    except (IndexError, BadInput):
        return None


def _rows(reader: _Reader) -> int | None:
    number = 0
    while True:
        kind, number = reader.field(number)
        if kind == 0 or number > NUM_ROWS:
            return None
        if (number, kind) == (NUM_ROWS, I64):
            value = reader.varint()
            return value >> 1 if value & 1 == 0 else None  # zigzag: an odd one is negative
        reader.skip(kind, DEEPEST)


class _Reader:
    """Reads values one after the other. Raises IndexError past the end, BadInput for what is no such thing."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise BadInput("a number of the footer is too long")

    def field(self, before: int) -> tuple[int, int]:
        """Give a field's type, 0 at the end of a structure, and its number."""
        head = self.byte()
        if head == 0:
            return 0, before
        if head >> 4:
            return head & 15, before + (head >> 4)
        number = self.varint()
        return head & 15, number >> 1

    def skip(self, kind: int, deepest: int) -> None:
        if deepest == 0:
            raise BadInput("the footer is nested too deep")
        if kind in LENGTHS:
            self._at += LENGTHS[kind]
        elif kind in (4, 5, I64):
            self.varint()
        elif kind == 8:  # bytes, with their length
            length = self.varint()
            self._at += length
        elif kind in (9, 10):  # a list: its items' type, and how many
            head = self.byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self.varint()):
                if self._at >= len(self._data):
                    raise BadInput("a list of the footer is longer than it")
                self.skip(3 if head & 15 in (1, 2) else head & 15, deepest - 1)
        elif kind == STRUCT:
            number = 0
            while True:
                inner, number = self.field(number)
                if inner == 0:
                    return
                self.skip(inner, deepest - 1)
        else:
            raise BadInput(f"the footer has a field of the type {kind}")
