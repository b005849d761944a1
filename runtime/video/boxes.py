"""How many samples an MP4 or QuickTime file says that it has.

FFmpeg builds a list of that many before it reads one, 24 bytes each, and a few bytes of a file can say hundreds of
millions. So the boxes that say it are looked at first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FIRST = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx", b"uuid"}
_OUTER = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_MOST = 500_000  # boxes: fragments of two seconds for three days


def samples(path: Path) -> tuple[int, int]:
    """The samples of the file, and the most that one list of pictures has; zeros for files of other kinds."""
    total, pictures, moving = 0, 0, False
    with path.open("rb") as file:
        if file.read(8)[4:] not in _FIRST:
            return 0, 0
        for number, (kind, start) in enumerate(_boxes(file, 0, os.fstat(file.fileno()).st_size)):
            if number > _MOST:
                break
            file.seek(start)
            if kind == b"hdlr":  # before the samples of its track
                moving = file.read(12)[8:] == b"vide"
            elif kind == b"stsz":
                count = int.from_bytes(file.read(12)[8:])
                total, pictures = total + count, max(pictures, count if moving else 0)
            elif kind == b"trun":
                total += int.from_bytes(file.read(8)[4:])
    return total, pictures


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """The kind of each box and where its content begins, those inside others after them."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, kind, content = int.from_bytes(head[:4]), head[4:8], start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:]), start + 16
        after = end if size == 0 else start + size
        if after < content:
            return
        yield kind, content
        start = content if kind in _OUTER else after  # those inside fill the outer one
