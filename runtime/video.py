"""A video file, or frames that the caller has decoded already, becomes the engine's input: uint8 RGB at its resolution.

Knows FFmpeg (through PyAV, and nothing else does) and sampling. Knows nothing of models, tokens or engines.

Sampling goes by frame index over the whole clip, `np.linspace(0, n - 1, F, dtype=int)`, as the released LLaVA-OneVision
code does. In a clip of variable rate, neighbours in the sample are therefore the same number of frames apart, not the
same number of seconds; `Clip.timestamps` has the seconds. A clip of fewer than F frames repeats some of them.

Most frames are never decoded. One cheap pass reads the packets without decoding them (0.4 s for an hour at 30 frames
per second) and tells how many frames there are, which packet holds which, and where the keyframes are. The second pass
feeds the decoder only what the sampled frames need: from the keyframe before each to the frame itself. The packets in
between are read and dropped, which lands exactly in every container, where a seek is only as exact as the container's
index. What comes out of the decoder is held against the packets; at the first contradiction everything is decoded from
the start instead, and the number of frames that then come out is the one that is sampled.
"""

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import UserError
from runtime.errors import VideoError
from runtime.frames import MIN_FRAMES, channels_first, resize_frames

# Decoding may start at any keyframe of these and gives the same pixels as decoding from the start of the file.
_EXACT_FROM_KEYFRAME = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
# H.264 marks the pictures that no other refers to: where nobody asked for them either, they need no decoding.
# HEVC's like-named mark only speaks of the picture's own temporal layer, so there it would not be exact.
_UNREFERENCED_IS_MARKED = {"h264"}
# Files of these kinds are told from shorter ones when they were cut off: a packet that ends in the middle, a list of
# packets longer than what is there (mov, which is also mp4), or a length in the header that is missed by far.
_CUT_SHOWS_IN_PACKETS = {"avi", "flv", "matroska", "mov"}
_CUT_SHOWS_IN_LENGTH = {"flv", "matroska"}
# Tags are not used, so any encoding will do; before version 19 PyAV has to be told.
_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True, eq=False)
class Clip:
    """The sampled frames of a video, ready for an engine, and what is known of where they come from."""

    frames: Tensor  # uint8 [F, 3, H, W], RGB, contiguous
    timestamps: tuple[float, ...]  # [F] seconds after the first frame of the source; empty where there is no clock
    source_frames: int  # frames in the source; 0 if unknown
    duration: float  # seconds; 0.0 if unknown
    decode_seconds: float  # opening, reading, decoding, conversion to RGB
    preprocess_seconds: float  # resizing


def load_clip(
    path: str | os.PathLike[str],
    frames: int | Sequence[int],
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
) -> Clip:
    """Sample `frames` frames uniformly over the whole video file and resize each to `size` = (H, W).

    Of several counts in `frames` the one that suits the length of the video is taken (`frames_for`). Frames are resized
    on `device`, and stay there.
    Rotation and mirroring asked for by the file are applied; the aspect ratio is not kept (nor does the model keep it).
    Memory is that of the result, one source frame and what the decoder holds, however long the video is.

    Raises VideoError when the file is missing, not a video, cut off, undecodable or shorter than two frames, and
    UserError when `frames` or `size` make no sense.
    """
    _check_request(frames, size)
    source = _existing_file(path)
    started = time.perf_counter()
    try:
        packets = _read_packets(source)
        sample, pts = _decode(source, packets, frames, size, torch.device(device))
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise VideoError(
            f"{_name(source)} cannot be read as a video ({reason}); give a file that FFmpeg reads"
        ) from error
    seconds = _seconds(pts, packets)
    chosen = sample_indices(len(pts), frames_for(len(pts), frames))
    return Clip(
        frames=sample.result(chosen),
        timestamps=tuple(seconds[chosen].tolist()),
        source_frames=len(pts),
        duration=float(seconds[-1] * len(pts) / (len(pts) - 1)),  # the last frame stays for the mean time of the others
        decode_seconds=time.perf_counter() - started - sample.resize_seconds,
        preprocess_seconds=sample.resize_seconds,
    )


def clip_from_frames(
    pixels: Tensor | NDArray[np.uint8],
    frames: int | Sequence[int],
    size: tuple[int, int],
    *,
    fps: float | None = None,
    device: torch.device | str | None = None,
) -> Clip:
    """Sample and resize frames that were decoded elsewhere.

    pixels: uint8 RGB, [n, 3, h, w] or [n, h, w, 3] (channels first where both would fit), n >= 2, in time order.
    frames: how many; of several counts the one that suits n is taken (`frames_for`).
    fps: frames a second of `pixels`; without it the clip has no timestamps and its duration is 0.0.
    device: where frames are resized and stay; default the CPU.
    Only the sampled frames are touched. Raises UserError for anything else than that.
    """
    _check_request(frames, size)
    if fps is not None and not 0 < fps < float("inf"):
        raise UserError(f"fps is {fps}; give the frames per second of the source, above 0, or leave it out")
    started = time.perf_counter()
    planar = channels_first(pixels)  # [n, 3, h, w]
    chosen = sample_indices(len(planar), frames_for(len(planar), frames))
    resized = resize_frames(planar[torch.from_numpy(chosen).to(planar.device)], size, device or "cpu")
    return Clip(
        frames=resized.contiguous(),
        timestamps=() if fps is None else tuple((chosen / fps).tolist()),
        source_frames=len(planar),
        duration=0.0 if fps is None else len(planar) / fps,
        decode_seconds=0.0,
        preprocess_seconds=time.perf_counter() - started,
    )


def frames_for(source: int, frames: int | Sequence[int]) -> int:
    """How many frames to show of a video of `source`: of several counts the least that shows all, else the most."""
    if isinstance(frames, int | np.integer):
        return int(frames)
    return min((count for count in frames if count >= source), default=max(frames))


def sample_indices(count: int, frames: int) -> NDArray[np.int64]:
    """Which of `count` frames are shown: int64 [frames], ascending, from the first to the last one.

    Fractions are rounded down, by numpy itself, so that every index is the one the released code takes.
    """
    return np.linspace(0, count - 1, frames, dtype=np.int64)


def apply_display_matrix(image: NDArray[np.uint8], matrix: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Turn and mirror `image` [h, w, 3] as a container's display matrix [9] asks; a view, [h, w, 3] or [w, h, 3].

    The matrix maps a pixel at (x, y) to (a*x + c*y, b*x + d*y), y downwards. Only quarter turns and mirrors exist in
    practice; any other angle is taken as the nearest one of them.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, flip_rows, flip_columns = image.transpose(1, 0, 2), b < 0, c < 0
    else:
        flip_rows, flip_columns = d < 0, a < 0
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


# ---------------------------------------------------------------------------------------------------------- packets


@dataclass
class _Packets:
    """What the file says of its frames without decoding one, in the order of the file (which is that of decoding)."""

    codec: str
    rate: float  # frames per second, for streams without timestamps
    tick: float  # seconds in one unit of pts
    pts: list[int | None] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)  # False where an edit list cuts a frame away: decoded, not shown

    def times(self) -> list[int] | None:
        """The pts of every packet, or None where they do not tell one frame from another."""
        known = [pts for pts in self.pts if pts is not None]
        return known if len(set(known)) == len(self.pts) else None


@dataclass
class _Span:
    """A stretch of packets to decode without a gap, from a keyframe on."""

    first: int  # position of the keyframe's packet
    last: int
    wanted: dict[int, int]  # position of a sampled frame's packet -> its row in the sample


class _ContradictionError(Exception):
    """The decoder gave something else than the packets promised."""


def _read_packets(source: Path) -> _Packets:
    """Read the file once without decoding. Raises VideoError if it has no video stream or ends before its length."""
    with _open(source) as (container, stream):
        # 25 frames per second is FFmpeg's own guess for a bare stream
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        table = _Packets(stream.codec_context.codec.canonical_name, rate, float(stream.time_base or 0))
        ends = dict.fromkeys(range(len(container.streams)), 0)  # stream -> pts; the sound may outlast the picture
        read, torn = 0, False
        for packet in container.demux():
            read += packet.stream_index == stream.index and packet.dts is not None
            if not packet.size or packet.stream_index not in ends:  # an end, a frame that AVI dropped, a late stream
                continue
            if packet.pts is not None:
                ends[packet.stream_index] = max(ends[packet.stream_index], packet.pts + (packet.duration or 0))
            if packet.stream_index == stream.index:
                table.pts.append(packet.pts)
                table.key.append(packet.is_keyframe)
                table.shown.append(not packet.is_discard)
                torn = packet.is_corrupt
        kinds = set(container.format.name.split(","))
        torn = (torn and bool(kinds & _CUT_SHOWS_IN_PACKETS)) or (
            "mov" in kinds and len(getattr(stream, "index_entries", ())) > read
        )
        end = max(float(pts * (container.streams[i].time_base or 0)) for i, pts in ends.items())
        length = ((container.duration or 0) + max(0, container.start_time or 0)) / av.time_base
        if torn or (kinds & _CUT_SHOWS_IN_LENGTH and length - end > max(0.1 * length, 0.5)):
            lengths = f"{end:.1f} of {length:.1f} seconds"
            raise VideoError(f"{_name(source)} is cut off: it ends after {lengths}; copy it again in full")
    return table


def _plan(packets: _Packets, chosen: NDArray[np.int64]) -> list[_Span] | None:
    """What to decode for the frames `chosen` (distinct, ascending), or None when everything has to be."""
    times = packets.times()
    if times is None or packets.codec not in _EXACT_FROM_KEYFRAME:
        return None
    order = sorted((i for i, shown in enumerate(packets.shown) if shown), key=times.__getitem__)
    keys = [i for i, key in enumerate(packets.key) if key]
    spans: list[_Span] = []
    for row, index in enumerate(chosen.tolist()):
        position = order[index]
        # A frame shown before the keyframe that precedes it in the file leans on the group before (an open group).
        at = bisect_right(keys, position) - 1
        while at >= 0 and times[position] < times[keys[at]]:
            at -= 1
        if at < 0:
            return None
        if spans and keys[at] <= spans[-1].last + 1:
            spans[-1].last = max(spans[-1].last, position)
            spans[-1].wanted[position] = row
        else:
            spans.append(_Span(keys[at], position, {position: row}))
    return spans


# --------------------------------------------------------------------------------------------------------- decoding


def _decode(
    source: Path, packets: _Packets, frames: int | Sequence[int], size: tuple[int, int], device: torch.device
) -> tuple["_Sample", list[int | None]]:
    """The sampled frames and the times (pts) of all frames of the video, sampled or not."""
    count = sum(packets.shown)
    if count >= MIN_FRAMES:
        chosen = np.unique(sample_indices(count, frames_for(count, frames)))
        spans = _plan(packets, chosen)
        if spans is not None:
            sample = _Sample(len(chosen), size, device)
            try:
                _decode_spans(source, packets, spans, sample.put)
            except _ContradictionError:
                pass  # decode everything and believe only what comes out
            else:
                shown = [pts or 0 for pts, shown in zip(packets.pts, packets.shown, strict=True) if shown]
                return sample, [*sorted(shown)]
    for _ in range(2):  # once more if the packets were no measure of the frames
        chosen = np.unique(sample_indices(max(count, 1), frames_for(count, frames)))
        sample = _Sample(len(chosen), size, device)
        pts = _decode_all(source, {index: row for row, index in enumerate(chosen.tolist())}, sample.put)
        if len(pts) < MIN_FRAMES:
            what = "1 frame" if pts else "no frame that can be decoded"
            raise VideoError(f"{_name(source)} has {what}; give a video of at least {MIN_FRAMES} frames")
        if len(pts) == count:
            return sample, pts
        count = len(pts)
    raise VideoError(f"{_name(source)} decodes to another number of frames each time; re-encode it")


def _decode_spans(
    source: Path, packets: _Packets, spans: list[_Span], put: Callable[[int, av.VideoFrame], None]
) -> None:
    """Decode the spans only, checking all that the decoder returns. Raises _ContradictionError."""
    times = packets.times() or []
    may_skip = packets.codec in _UNREFERENCED_IS_MARKED
    with _open(source) as (container, stream):
        reader = enumerate(packet for packet in container.demux(stream) if packet.size)
        for span in spans:
            start = times[span.first]
            rows = {times[position]: row for position, row in span.wanted.items()}
            seen: list[int] = []
            for frame in _span_frames(stream.codec_context, reader, span, may_skip):
                if frame.pts is None:
                    raise _ContradictionError
                if frame.pts < start:
                    continue  # leans on frames before the span, which were not decoded
                if frame.pts == start and not frame.key_frame:
                    raise _ContradictionError  # the container calls it a keyframe, the decoder does not
                seen.append(frame.pts)
                if frame.pts in rows:
                    put(rows[frame.pts], frame)

            # Every frame of the span came out once, in the order of time; of H.264 at least those that were asked for.
            covered = [i for i in range(span.first, span.last + 1) if packets.shown[i] and times[i] >= start]
            if may_skip:
                came = set(seen)
                covered = [i for i in covered if times[i] in came or i in span.wanted or i == span.first]
            if seen != sorted(times[i] for i in covered):
                raise _ContradictionError


def _span_frames(
    decoder: Any, reader: Iterator[tuple[int, Any]], span: _Span, may_skip: bool
) -> Iterator[av.VideoFrame]:
    """Read on to the span, feed it to the decoder and drain it, so that the next span meets an empty decoder."""
    try:
        for position, packet in reader:
            if position < span.first:
                continue
            asked = position == span.first or position in span.wanted
            decoder.skip_frame = "NONREF" if may_skip and not asked else "DEFAULT"
            yield from packet.decode()
            if position == span.last:
                break
        yield from decoder.decode(None)
    except av.error.InvalidDataError as error:
        raise _ContradictionError from error
    decoder.flush_buffers()  # after the drain it takes packets again


def _decode_all(source: Path, rows: dict[int, int], put: Callable[[int, av.VideoFrame], None]) -> list[int | None]:
    """Decode every frame, hand on those whose index is in `rows`, return the pts of all. Broken packets are skipped."""
    pts: list[int | None] = []
    with _open(source) as (container, stream):
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in decoded:
                if len(pts) in rows:
                    put(rows[len(pts)], frame)
                pts.append(frame.pts)
    return pts


class _Sample:
    """Collects sampled frames in any order, each brought to RGB, upright and to its final size at once."""

    def __init__(self, count: int, size: tuple[int, int], device: torch.device) -> None:
        self.size = size
        self.frames = torch.empty(count, 3, *size, dtype=torch.uint8, device=device)
        self.resize_seconds = 0.0
        self._reformatter = VideoReformatter()  # one for all frames: it keeps its tables
        self._rotation: int | None = None  # degrees
        self._matrix: NDArray[np.int32] | None = None

    def put(self, row: int, frame: av.VideoFrame) -> None:
        # The matrix and the range of the file's colours are the frame's own; swscale takes untagged ones as BT.601.
        rgb = self._reformatter.reformat(frame, format="rgb24")
        plane: Any = rgb.planes[0]
        shape, strides = (rgb.height, rgb.width, 3), (plane.line_size, 3, 1)
        image: NDArray[np.uint8] = np.ndarray(shape, np.uint8, buffer=plane, strides=strides)
        # A frame whose side data was looked at is in a reference cycle and lives until the next garbage collection, so
        # the matrix is read again only where the rotation changes.
        if frame.rotation != self._rotation:
            side_data: Any = frame.side_data
            matrix = side_data.get("DISPLAYMATRIX")
            self._rotation = frame.rotation
            self._matrix = None if matrix is None else np.frombuffer(matrix, np.int32).copy()
        if self._matrix is not None:
            image = apply_display_matrix(image, self._matrix)
        upright = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # [3, h, w]
        started = time.perf_counter()
        resized = resize_frames(upright[None], self.size, self.frames.device)[0]
        if resized.device.type == "cpu":
            # Copied by numpy: torch would spread the copy over threads and, on busy cores, wait longer than it takes.
            self.frames.numpy()[row] = resized.numpy()
        else:
            self.frames[row] = resized
        self.resize_seconds += time.perf_counter() - started

    def result(self, chosen: NDArray[np.int64]) -> Tensor:
        """The frames at the indices `chosen`, in which an index may come several times: uint8 [F, 3, H, W]."""
        if len(chosen) == len(self.frames):
            return self.frames
        return self.frames[torch.from_numpy(np.unique(chosen, return_inverse=True)[1]).to(self.frames.device)]


def _seconds(pts: list[int | None], packets: _Packets) -> NDArray[np.float64]:
    """Seconds of every frame after the first: by the clock of the file if it runs forwards, else by its frame rate."""
    if None not in pts:
        ticks = np.array(pts, dtype=np.int64)
        if packets.tick and (np.diff(ticks) >= 0).all() and ticks[-1] > ticks[0]:
            return (ticks - ticks[0]) * packets.tick
    return np.arange(len(pts)) / packets.rate


# ----------------------------------------------------------------------------------------------- opening and checking


@contextmanager
def _open(source: Path) -> Iterator[tuple[Any, Any]]:
    """The opened file and its main video stream, ready for threaded decoding."""
    # "file:" keeps FFmpeg from taking a name with a colon for an address.
    with av.open(f"file:{source}", **_TAGS) as container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a song
            raise VideoError(f"{_name(source)} has no video stream; give a file with moving pictures")
        if stream.codec_context is None:
            raise VideoError(f"{_name(source)} uses a codec that this FFmpeg cannot decode; convert it to H.264")
        if stream.codec_context.name == "ansi":  # FFmpeg draws the letters of a text file
            raise VideoError(f"{_name(source)} is a text file; give a video file that FFmpeg reads")
        stream.thread_type = "AUTO"
        yield container, stream


def _existing_file(path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    try:
        status = source.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a valid name"
        raise VideoError(f"video {_name(source)} cannot be opened ({reason}); give the path of a video file") from error
    if not source.is_file():
        raise VideoError(f"{_name(source)} is a folder or a device; give the path of a video file")
    if status.st_size == 0:
        raise VideoError(f"{_name(source)} is empty (0 bytes); copy or download it again")
    return source


def _check_request(frames: int | Sequence[int], size: tuple[int, int]) -> None:
    counts = frames if isinstance(frames, tuple | list) and frames else (frames,)
    if any(isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1 for count in counts):
        raise UserError(f"frames is {frames!r}; give a whole number of frames of at least 1, or several of them")
    if len(size) != 2 or not all(isinstance(side, int | np.integer) and side >= 1 for side in size):
        raise UserError(f"size is {size!r}; give (height, width) in pixels, each at least 1")


def _name(source: Path) -> str:
    return repr(os.fspath(source))  # quoted, and a line break in it stays on the line
