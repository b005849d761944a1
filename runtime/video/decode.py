"""Decodes the sampled frames: only the spans they need where that is safe, else everything.

A span is decoded from a keyframe on; packets between spans are read and dropped, which is exact in every container,
while a seek is only as exact as the container's index. The output is checked against the packets; at the first
contradiction everything is decoded from the start instead, and the sample is taken from the frames that come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import av
import numpy as np
import torch

from earlytom.families import FrameSampling
from runtime.errors import VideoError
from runtime.video.frames import MIN_FRAMES
from runtime.video.limits import remedy
from runtime.video.opening import Opened, Opener
from runtime.video.packets import Packets, Span, plan
from runtime.video.sample import Sample, frames_for, sample_indices

# H.264 marks pictures that no other refers to: unless sampled, they need no decoding. HEVC's mark of that name holds
# only within the picture's own temporal layer, so it would not be exact there.
_UNREFERENCED_IS_MARKED = {"h264"}
# FFmpeg's decoder of VP9 ends the process where it decodes frames side by side, was flushed, and then gets a keyframe
# that is broken and frames that lean on it (seen with FFmpeg 8.1). It then works on the parts of one frame instead.
_FRAME_BY_FRAME = {"vp9"}
_BARE = {"h264", "hevc", "m4v", "mpegvideo"}  # without timestamps: FFmpeg counts frames from where reading begins
# Formats that do not show whether their last picture is complete.
_OPEN_ENDED = _BARE | {"mpeg", "mpegts"}
_HELD_BACK = 4  # without timestamps, the last picture of the file is among so many last frames

Put = Callable[[int, av.VideoFrame], bool]
See = Callable[[av.VideoFrame], None]  # called with every frame, before it may be put


class _ContradictionError(Exception):
    """The decoder's output contradicts the packets."""


def decode(
    opener: Opener,
    packets: Packets,
    frames: int | Sequence[int],
    size: tuple[int, int],
    device: torch.device,
    sampling: FrameSampling = "ends",
) -> tuple[Sample, list[int | None]]:
    """The sampled frames and the times (pts) of all frames of the video, sampled or not."""
    if len(packets.pts) > MIN_FRAMES and (
        _last_is_torn(opener, packets) if packets.kinds & _OPEN_ENDED else packets.torn
    ):
        packets.drop_last()
    count = sum(packets.shown)
    if count >= MIN_FRAMES:
        chosen = np.unique(sample_indices(count, frames_for(count, frames), sampling))
        spans = plan(packets, chosen)
        if spans is not None:
            sample = Sample(len(chosen), size, device)
            try:
                decode_spans(opener, packets, spans, sample.put, sample.see)
                if not sample.missing:
                    shown = [pts or 0 for pts, shown in zip(packets.pts, packets.shown, strict=True) if shown]
                    return sample, [*sorted(shown)]
            except _ContradictionError:
                pass  # decode everything and go by the frames that come out
    for _ in range(3):  # again if the number of packets was not that of the frames
        chosen = np.unique(sample_indices(max(count, 1), frames_for(count, frames), sampling))
        sample = Sample(len(chosen), size, device)
        rows = {index: row for row, index in enumerate(chosen.tolist())}
        pts = decode_all(opener, len(packets.pts), rows, sample.put, sample.see)
        if len(pts) < MIN_FRAMES and (len(pts) == count or not opener.side_by_side):
            what = "1 frame" if pts else "no frame that can be decoded"
            raise VideoError(f"{opener.label} has {what}; give a video of at least {MIN_FRAMES} frames")
        if len(pts) == count and not sample.missing:
            return sample, pts
        count = len(pts)
        opener.side_by_side = False  # with frame threads a broken packet at the end loses all frames in flight
    raise VideoError(f"{opener.label} decodes to another number of frames each time; re-encode it")


def decode_spans(opener: Opener, packets: Packets, spans: list[Span], put: Put, see: See) -> None:
    """Decode the spans only, checking all that the decoder returns. Raises _ContradictionError."""
    times = packets.times() or []
    may_skip = packets.codec in _UNREFERENCED_IS_MARKED
    with opener() as opened:
        if packets.codec in _FRAME_BY_FRAME:
            opened.stream.thread_type = "SLICE"
        reader = enumerate(packet for packet in opened.packets(opened.stream) if packet.size)
        for span in spans:
            start = times[span.first]
            rows = {times[position]: row for position, row in span.wanted.items()}
            seen: list[int] = []
            for frame in span_frames(opened, reader, span, may_skip):
                opened.ask()
                if frame.pts is None:
                    raise _ContradictionError
                if frame.pts < start:
                    continue  # refers to frames before the span, which were not decoded
                if frame.pts == start and not frame.key_frame:
                    raise _ContradictionError  # the container calls it a keyframe, the decoder does not
                seen.append(frame.pts)
                opener.check_pixels(frame.width, frame.height)
                see(frame)
                if frame.pts in rows and not put(rows[frame.pts], frame):
                    raise _ContradictionError  # twice

            # Every frame of the span must come out once, in order of time; of H.264 at least those asked for.
            covered = [i for i in range(span.first, span.last + 1) if packets.shown[i] and times[i] >= start]
            if may_skip:
                came = set(seen)
                covered = [i for i in covered if times[i] in came or i in span.asked or i == span.first]
            if seen != sorted(times[i] for i in covered):
                raise _ContradictionError


def span_frames(
    opened: Opened, reader: Iterator[tuple[int, Any]], span: Span, may_skip: bool
) -> Iterator[av.VideoFrame]:
    """Skip to the span, decode it and drain the decoder, so that the next span starts with an empty one."""
    decoder = opened.stream.codec_context
    for position, packet in reader:
        if position < span.first:
            continue
        asked = position == span.first or position in span.asked
        decoder.skip_frame = "NONREF" if may_skip and not asked else "DEFAULT"
        yield from _frames_or_contradiction(decoder, packet)
        if position == span.last:
            break
    yield from _frames_or_contradiction(decoder, None)
    decoder.flush_buffers()  # after the drain it takes packets again


def _frames_or_contradiction(decoder: Any, packet: Any) -> list[av.VideoFrame]:
    try:
        return decoder.decode(packet)
    except av.error.FFmpegError as error:  # explained when everything is decoded
        raise _ContradictionError from error


def decode_all(
    opener: Opener, packets: int, rows: dict[int, int], put: Put, see: See = lambda frame: None
) -> list[int | None]:
    """Decode so many packets, `put` the frames whose index is in `rows`, and return the pts of all frames. Broken
    packets are skipped.
    """
    pts: list[int | None] = []
    with opener() as opened:
        for frame in _all_frames(opener, opened, packets):
            opened.ask()
            opener.check_pixels(frame.width, frame.height)
            see(frame)
            if len(pts) in rows:
                put(rows[len(pts)], frame)
            pts.append(frame.pts)
    return pts


def _all_frames(opener: Opener, opened: Opened, packets: int) -> Iterator[av.VideoFrame]:
    decoder = opened.stream.codec_context
    left = packets
    reader = (packet for packet in opened.packets(opened.stream) if packet.size)
    while True:
        packet = next(reader, None) if left > 0 else None
        left -= 1
        try:
            decoded = decoder.decode(packet)
        except av.error.FFmpegError as error:
            _explain(opener, decoder, error)
            decoded = []  # a broken packet loses a frame, not the video
        yield from decoded
        if packet is None:
            return


def _explain(opener: Opener, decoder: Any, error: Exception) -> None:
    """Raise unless the error is broken data; VideoError if a frame is above the limit on pixels."""
    limit = opener.limits.max_pixels
    if limit is not None:
        opener.check_pixels(decoder.width, decoder.height)  # some decoders keep the size they refused
        # Others reset it, or report an overflow.
        refused = isinstance(error, av.error.ArgumentError) and not decoder.width
        if refused or isinstance(error, av.error.OverflowError):
            raise VideoError(
                f"{opener.label} has a frame of more than {limit} pixels (max_pixels), or a broken one; "
                f"{remedy('max_pixels')}"
            ) from error
    if not isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
        raise error


def _last_is_torn(opener: Opener, packets: Packets) -> bool:
    """Whether the last packet's frame is incomplete, in a recording that ended at any byte.

    Decodes the last group of pictures (or, if its place is unknown, all) without frame threads, with which the decoder
    returns the last frame before it knows.
    """
    last, came = None if packets.kinds & _BARE else packets.pts[-1], []
    may_skip = packets.codec in _UNREFERENCED_IS_MARKED
    with opener() as opened:
        opened.stream.thread_type = "SLICE"
        if packets.last_group:
            opened.container.seek(packets.last_group, stream=opened.stream, unsupported_byte_offset=True)
        decoder = opened.stream.codec_context
        reader = (packet for packet in opened.packets(opened.stream) if packet.size)
        for packet, following in pairwise(chain(reader, (None, None))):
            decoder.skip_frame = "NONREF" if may_skip and following is not None else "DEFAULT"
            try:
                decoded = decoder.decode(packet)
            except av.error.FFmpegError as error:
                _explain(opener, decoder, error)
                continue
            came += [(frame.pts, frame.is_corrupt) for frame in decoded]
    named = [torn for pts, torn in came if pts is not None and pts == last]
    return named[-1] if named else any(torn for _, torn in came[-_HELD_BACK:])
