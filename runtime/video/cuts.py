"""Detects truncated files: copied in part, or a recording that ended before its file was closed.

A duration in a header proves nothing: it may be wall-clock time, or that of the recording from which this file is an
excerpt, and may or may not count from the first frame. The structure is the evidence: an incomplete packet, an index
longer than the packets, an element larger than the file. The duration is used only if the structure is short, or
inconclusive.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import av

from runtime.video.opening import Opened
from runtime.video.source import Spooled

_SHOWS_IN_LAST_PACKET = {"avi", "flv", "matroska", "mov"}
# How a complete picture ends, in formats without picture sizes; more data may follow.
_LAST_BYTES = {"gif": (b"\0", b"\0;"), "mjpeg": (b"\xff\xd9", b"\xff\xd9")}
_SEGMENT = 0x18538067  # id of Matroska's top-level element
_HEADER = 12  # bytes of a Matroska element's id and size at most
_METADATA = 8192  # bytes at the beginning of an FLV file, in which its metadata is


def ends_early(packet: Any, kinds: frozenset[str]) -> bool:
    """Whether the last packet of a file is incomplete, as far as the format shows it."""
    for kind in kinds & _LAST_BYTES.keys():
        at_end, within = _LAST_BYTES[kind]
        content = bytes(packet)
        return not content.endswith(at_end) and within not in content
    return bool(packet.is_corrupt)


def is_cut_off(opened: Opened, read: int, end: float, torn: bool) -> bool:
    """Whether a file is truncated. read: packets read of the video; end: end of the last of all packets in seconds;
    torn: the video's last packet is incomplete."""
    kinds = opened.kinds
    if torn and kinds & _SHOWS_IN_LAST_PACKET:
        return True
    if "mov" in kinds:
        return len(getattr(opened.stream, "index_entries", ())) > read
    if not kinds & {"matroska", "flv"}:
        return False
    path = Path(opened.source.path) if isinstance(opened.source, Spooled) else opened.source
    short = _matroska_is_short(path) if "matroska" in kinds else _flv_is_short(path)
    length = (opened.container.duration or 0) / av.time_base
    if short is None:
        return length - end > max(0.1 * length, 0.5)
    start = max(0, opened.container.start_time or 0) / av.time_base
    return short and (not length or length - end > 0.1 * (length - start))  # less is missing where only the index is


def _matroska_is_short(path: Path) -> bool | None:
    """Whether an element is larger than the rest of the file; None if elements have no sizes."""
    whole = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        while position < whole:
            file.seek(position)
            kind, size, header = _element(file.read(_HEADER))
            if kind is None or header is None:
                return None
            if size is not None and position + header + size > whole:
                return True
            if kind == _SEGMENT and size is None:  # open-ended: check the elements in it
                position += header
            elif size is None:
                return None
            else:
                position += header + size
    return False


def _element(head: bytes) -> tuple[int | None, int | None, int | None]:
    """(id, size, header bytes) of a Matroska element; None for what is unknown or missing."""
    first = 9 - head[0].bit_length() if head and head[0] else 0
    if not 1 <= first <= 4 or len(head) <= first or not head[first]:
        return None, None, None
    bits = 9 - head[first].bit_length()
    kind = int.from_bytes(head[:first])
    content = head[first : first + bits]
    if len(content) < bits:
        return kind, None, None
    size = int.from_bytes(content) & ((1 << 7 * bits) - 1)
    return kind, None if size == (1 << 7 * bits) - 1 else size, first + bits


def _flv_is_short(path: Path) -> bool | None:
    """Whether the file is smaller than its metadata says; None without such metadata."""
    with path.open("rb") as file:
        head = file.read(_METADATA)
    at = head.find(b"filesize\0")  # the key, and the type byte of a number
    number = head[at + 9 : at + 17] if at >= 0 else b""
    said = struct.unpack(">d", number)[0] if len(number) == 8 else 0.0
    return os.path.getsize(path) < said if said > 0 else None
