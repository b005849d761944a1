"""From packets to sampled frames: only what they need is decoded where that is safe, everything elsewhere.

A span is fed to the decoder from a keyframe on; the packets in between are read and dropped, which lands exactly in
every container, where a seek is only as exact as the container's index. What comes out is held against the packets; at
the first contradiction everything is decoded from the start instead, and the number of frames that then come out is the
one that is sampled.
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

# H.264 marks the pictures that no other refers to: where nobody asked for them either, they need no decoding.
# HEVC's like-named mark only speaks of the picture's own temporal layer, so there it would not be exact.
_UNREFERENCED_IS_MARKED = {"h264"}
# FFmpeg's decoder of VP9 ends the process where it decodes frames side by side, was flushed, and then gets a keyframe
# that is broken and frames that lean on it (seen with FFmpeg 8.1). It then works on the parts of one frame instead.
_FRAME_BY_FRAME = {"vp9"}
_BARE = {"h264", "hevc", "m4v", "mpegvideo"}  # without times: FFmpeg counts frames from where reading begins
# Nothing in files of these kinds tells whether their last picture is there in full.
_OPEN_ENDED = _BARE | {"mpeg", "mpegts"}
_HELD_BACK = 4  # frames among which the last one in the file may be shown, where no times tell which it is

Put = Callable[[int, av.VideoFrame], bool]
See = Callable[[av.VideoFrame], None]  # of every frame, before it may be put


class _ContradictionError(Exception):
    """The decoder gave something else than the packets promised."""


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
                pass  # decode everything and believe only what comes out
    for _ in range(3):  # again if the packets were no measure of the frames
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
        opener.side_by_side = False  # a broken packet at the end costs all frames that are on their way
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
                    continue  # leans on frames before the span, which were not decoded
                if frame.pts == start and not frame.key_frame:
                    raise _ContradictionError  # the container calls it a keyframe, the decoder does not
                seen.append(frame.pts)
                opener.check_pixels(frame.width, frame.height)
                see(frame)
                if frame.pts in rows and not put(rows[frame.pts], frame):
                    raise _ContradictionError  # twice

            # Every frame of the span came out once, in the order of time; of H.264 at least those that were asked for.
            covered = [i for i in range(span.first, span.last + 1) if packets.shown[i] and times[i] >= start]
            if may_skip:
                came = set(seen)
                covered = [i for i in covered if times[i] in came or i in span.asked or i == span.first]
            if seen != sorted(times[i] for i in covered):
                raise _ContradictionError


def span_frames(
    opened: Opened, reader: Iterator[tuple[int, Any]], span: Span, may_skip: bool
) -> Iterator[av.VideoFrame]:
    """Read on to the span, feed it to the decoder and drain it, so that the next span meets an empty decoder."""
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
    except av.error.FFmpegError as error:  # decoding everything finds out what it means
        raise _ContradictionError from error


def decode_all(
    opener: Opener, packets: int, rows: dict[int, int], put: Put, see: See = lambda frame: None
) -> list[int | None]:
    """Decode that many packets, hand on the frames whose index is in `rows`, return the pts of all.

    Broken packets are skipped.
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
            decoded = []  # a broken packet costs a frame, not the video
        yield from decoded
        if packet is None:
            return


def _explain(opener: Opener, decoder: Any, error: Exception) -> None:
    """Raises unless the error is of broken data; VideoError where a frame is above the limit on pixels."""
    limit = opener.limits.max_pixels
    if limit is not None:
        opener.check_pixels(decoder.width, decoder.height)  # the size that some decoders have tried to take on
        # The others forget the size they had, or say that the number is too large.
        refused = isinstance(error, av.error.ArgumentError) and not decoder.width
        if refused or isinstance(error, av.error.OverflowError):
            raise VideoError(
                f"{opener.label} has a frame of more than {limit} pixels (max_pixels), or a broken one; "
                f"{remedy('max_pixels')}"
            ) from error
    if not isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
        raise error


def _last_is_torn(opener: Opener, packets: Packets) -> bool:
    """Whether the frame of the last packet is not there in full: a recording that was ended at any byte.

    The last group is decoded for that without decoding frames side by side, where the decoder returns the last one
    before it knows. Where the group cannot be found alone nothing is left out.
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
