"""Reads from an MP4 or QuickTime file's boxes how many samples it declares, and whether it ends before its index.

FFmpeg allocates a list of that length, 24 bytes per sample, before it reads any, and again for every entry of an edit
list; a few bytes of a file can declare hundreds of millions. So the boxes are checked first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_FIRST = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx", b"uuid"}
_OUTER = {b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_INDICES = {b"moov", b"moof", b"meta"}  # index boxes of a film, a fragment, a picture
_USUAL_EDITS = 100  # edit lists of up to this length are usual, and not counted
_MOST = 500_000  # boxes to read: fragments of two seconds for three days


class Samples(NamedTuple):
    """The counts that a file declares; all zero for other formats.

    Attributes:
        total: samples of all tracks.
        pictures: the most samples of one video track.
        edited: the most samples that a long edit list may show, entries times samples of its track.
        cut: whether the file ends before its index.
    """

    total: int = 0
    pictures: int = 0
    edited: int = 0
    cut: bool = False


def samples(path: Path) -> Samples:
    """The declared samples of a file."""
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
            elif kind == b"elst":  # like hdlr, it precedes the samples of its track
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
    """(kind, start, end of the content) of each box; inner boxes follow their outer one."""
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
