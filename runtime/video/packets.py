"""Reads a file's packets without decoding, and plans which of them to decode.

One cheap pass over the packets (0.4 s for an hour at 30 frames per second) gives the number of frames, the packet of
each, and the keyframes. There is a plan only if the packets determine the order in which the decoder returns the
frames; else everything is decoded.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import av
import numpy as np
from numpy.typing import NDArray

from runtime.errors import VideoError
from runtime.video.cuts import ends_early, is_cut_off
from runtime.video.limits import Limits, remedy
from runtime.video.opening import Opened, Opener

# Codecs for which decoding from any keyframe gives the same pixels as decoding from the start of the file.
_EXACT_FROM_KEYFRAME = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
_REORDERED = 16  # the most places by which decoding and display order may differ
# Seconds between frames from which on recordings were joined or the clock jumped: FFmpeg's own value for formats with
# discontinuities, and for others, where a still picture may be shown for hours, more than any frame rate explains.
_JUMP_AT_JOINTS, _JUMP = 10.0, 6 * 3600.0
_FASTEST = 10_000  # frames per second; a higher guess of FFmpeg's is the time base
_JOINTS = {"flv", "kux", "live_flv"}  # formats with joints that FFmpeg does not mark as discontinuous


@dataclass
class Packets:
    """All packets of the video, in file order, which is decoding order."""

    codec: str
    rate: float  # frames per second, for streams without timestamps
    tick: float  # seconds in one unit of pts
    jump: float = _JUMP  # seconds between two frames from which on they are a jump of the clock
    pts: list[int | None] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)  # False for frames removed by an edit list: decoded, not shown
    last_group: int | None = None  # byte position of the last keyframe's packet
    kinds: frozenset[str] = frozenset()  # FFmpeg's names of the format
    steady: bool = True  # whether dts never decrease
    seconds: float = 0.0  # duration by dts, without the jumps at joints
    decode_times: bool = False  # the format has no display times, so its pts are dts
    torn: bool = False  # the last packet is incomplete, as far as the format shows it
    read: int = 0  # packets read, with the empty ones of dropped frames

    def drop_last(self) -> None:
        """Remove the last packet, which is incomplete."""
        for column in (self.pts, self.key, self.shown):
            column.pop()

    def times(self) -> list[int] | None:
        """The pts of every packet, or None unless all are known and distinct."""
        known = [pts for pts in self.pts if pts is not None]
        return known if len(set(known)) == len(self.pts) else None


@dataclass
class Span:
    """Consecutive packets to decode, from a keyframe on."""

    first: int  # position of the keyframe's packet
    last: int
    wanted: dict[int, int]  # position of a sampled frame's packet -> its row in the sample
    asked: set[int] = field(default_factory=set)  # positions whose frames must be decoded to check the order


def read_packets(opener: Opener) -> Packets:
    """Read the file once, without decoding; VideoError if it has no video stream, is cut off or above a limit."""
    limits = opener.limits
    with opener() as opened:
        stream = opened.stream
        joints = opened.container.format.flags & av.format.Flags.ts_discont.value or opened.kinds & _JOINTS
        rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate and rate <= _FASTEST]
        table = Packets(
            stream.codec_context.codec.canonical_name,
            rates[0] if rates else 25.0,  # FFmpeg's own guess for a bare stream
            float(stream.time_base or 0),
            jump=_JUMP_AT_JOINTS if joints else _JUMP,
            kinds=opened.kinds,
        )
        ends = _fill(table, opened, limits, opener.label)
        table.decode_times = "avi" in opened.kinds
        if is_cut_off(opened, table.read, ends, table.torn):
            raise VideoError(f"{opener.label} is cut off: it ends before its length; copy it again in full")
    return table


def _fill(table: Packets, opened: Opened, limits: Limits, label: str) -> float:
    """Read all packets into `table`. Returns the end of the last in seconds."""
    bases = [float(stream.time_base or 0) for stream in opened.container.streams]
    ends = [0] * len(bases)  # pts; the sound may outlast the picture
    index, last, before = opened.stream.index, None, None
    longest, most = limits.max_seconds, limits.max_frames
    for packet in opened.packets():
        at = packet.stream_index
        table.read += at == index
        if not packet.size:
            continue
        if packet.pts is not None:
            ends[at] = max(ends[at], packet.pts + (packet.duration or 0))
        if at != index:
            continue
        table.pts.append(packet.pts)
        table.key.append(packet.is_keyframe)
        table.shown.append(not packet.is_discard)
        if packet.is_keyframe:
            table.last_group = packet.pos
            if hasattr(packet, "has_sidedata") and packet.has_sidedata("encryption_info"):  # since PyAV 16
                raise VideoError(f"{label} is encrypted; give a copy without protection")
        last = packet
        dts = packet.dts
        if dts is not None:
            step = 0.0 if before is None else (dts - before) * table.tick
            table.steady &= step >= 0
            table.seconds += step if 0 <= step <= table.jump else 0.0
            before = dts
        if most is not None and len(table.pts) > most:
            raise VideoError(f"{label} has more than {most} frames (max_frames); {remedy('max_frames')}")
        if longest is not None and table.seconds > longest:
            raise VideoError(f"{label} is longer than {longest:g} seconds (max_seconds); {remedy('max_seconds')}")
    table.torn = last is not None and ends_early(last, opened.kinds)
    return max((end * base for end, base in zip(ends, bases, strict=True)), default=0.0)


def plan(packets: Packets, chosen: NDArray[np.int64]) -> list[Span] | None:
    """The spans to decode for the frames `chosen` (distinct, ascending), or None if everything must be decoded."""
    times = packets.times()
    if times is None or not packets.steady or packets.codec not in _EXACT_FROM_KEYFRAME:
        return None
    keys = [i for i, key in enumerate(packets.key) if key]
    everything = sorted(range(len(times)), key=times.__getitem__)
    reach = _reordering(times, keys, everything)
    if reach is None:
        return None
    order = [i for i in everything if packets.shown[i]]
    spans: list[Span] = []
    for row, index in enumerate(chosen.tolist()):
        position = order[index]
        # A frame shown before the keyframe that precedes it in the file refers to the group before (an open GOP).
        here = at = bisect_right(keys, position) - 1
        while at >= 0 and times[position] < times[keys[at]]:
            at -= 1
        if at < 0:
            return None
        end = keys[here + 1] if here + 1 < len(keys) else len(times)
        asked = _asked(times, position, end, reach)
        if spans and keys[at] <= spans[-1].last + 1:
            spans[-1].last = max(spans[-1].last, *asked)
        else:
            spans.append(Span(keys[at], max(asked), {}))
        spans[-1].wanted[position] = row
        spans[-1].asked |= asked
    return spans


def _reordering(times: list[int], keys: list[int], everything: list[int]) -> int | None:
    """The most places by which display and decoding order differ. None if the times cannot be the decoder's order: a
    group of frames does not follow the one before, or a frame moves too far.

    A clock that jumps or steps back, or a single wrong time, causes that.
    """
    if not keys or keys[0] != 0:
        return None
    reach = int(np.abs(np.array(everything) - np.arange(len(everything))).max())
    ticks = np.array(times, np.int64)
    least, most = np.minimum.reduceat(ticks, keys), np.maximum.reduceat(ticks, keys)  # of each group
    return reach if reach <= _REORDERED and (least[1:] > most[:-1]).all() else None


def _asked(times: list[int], position: int, end: int, reach: int) -> set[int]:
    """The packets whose frames check that the decoder returns the one at `position` in its place: those within the
    reordering distance after it, up to the `end` of the group, and earlier ones that are shown after it.

    A clock that jumps between two frames that belong in the other order is seen nowhere else.
    """
    time = times[position]
    earlier = range(max(0, position - 2 * reach), position)
    return {*range(position, min(end, position + reach + 1)), *(i for i in earlier if times[i] > time)}
