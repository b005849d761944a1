"""How many samples an MP4 or QuickTime file says that it has, and whether it ends before it says so.

FFmpeg builds a list of that many before it reads one, 24 bytes each, and again for every entry of an edit list; a few
bytes of a file can say hundreds of millions. So the boxes that say it are looked at first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_FIRST = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx", b"uuid"}
_OUTER = {b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_INDICES = {b"moov", b"moof", b"meta"}  # of a film, of a piece of one, of a picture
_USUAL_EDITS = 100  # what a cutter's file may have; then only the samples count
_MOST = 500_000  # boxes: fragments of two seconds for three days


class Samples(NamedTuple):
    """What a file says; all zero for files of other kinds.

    Attributes:
        total: samples of all tracks.
        pictures: the most that one list of pictures has.
        edited: the most that the entries of an edit list, each of which may show all samples of its track, come to.
        cut: the file ends before its index does.
    """

    total: int = 0
    pictures: int = 0
    edited: int = 0
    cut: bool = False


def samples(path: Path) -> Samples:
    """Of the file, from its boxes."""
    total = pictures = edited = edits = 0
    moving = indexed = False
    with path.open("rb") as file:
        if file.read(8)[4:] not in _FIRST:
            return Samples()
        size = os.fstat(file.fileno()).st_size
        for number, (kind, start, end) in enumerate(_boxes(file, 0, size)):
            indexed |= (kind in _INDICES and end <= size) or number > _MOST
            if number > _MOST:
                break
            file.seek(start)
            if kind == b"trak":
                edits = 0
            elif kind == b"elst":  # before the samples of its track, as is what kind of track it is
                edits = int.from_bytes(file.read(8)[4:])
            elif kind == b"hdlr":
                moving = file.read(12)[8:] == b"vide"
            elif kind == b"stsz":
                count = int.from_bytes(file.read(12)[8:])
                total, pictures = total + count, max(pictures, count if moving else 0)
                edited = max(edited, edits * count if edits > _USUAL_EDITS else 0)
            elif kind == b"trun":
                total += int.from_bytes(file.read(8)[4:])
    return Samples(total, pictures, edited, not indexed)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each box, where its content begins and where it ends, those inside others after them."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, kind, content = int.from_bytes(head[:4]), head[4:8], start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:]), start + 16
        after = end if size == 0 else start + size
        if after < content:
            return
        yield kind, content, after
        start = content if kind in _OUTER else after  # those inside fill the outer one
