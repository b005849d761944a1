"""Opens untrusted files with FFmpeg and reads their packets; a harmful file can at worst be refused.

The only module that opens a container. Only self-contained formats are opened, and nothing but the file itself: a
playlist, a script or a reference inside a file would read other files or URLs, and a live playlist waits for ever.
Nothing is decoded while FFmpeg looks for the streams unless the limit on pixels holds there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from runtime.errors import VideoError
from runtime.video.boxes import samples
from runtime.video.limits import Limits, remedy
from runtime.video.source import Spooled, label_of

# Formats that FFmpeg may detect. Formats without pictures are included for a better error message.
_FORMATS = (
    "3dostr,4xm,aac,ac3,aiff,amv,apng,asf,av1,avi,avs2,avs3,caf,cavsvideo,dhav,dirac,dnxhd,dv,evc,ffm,filmstrip,flac,flic,"
    "flv,gif,gxf,h261,h263,h264,hevc,ingenient,ivf,kux,live_flv,m4v,matroska,mjpeg,mjpeg_2000,mov,mp3,mp4,mpeg,mpegts,"
    "mpegvideo,mpjpeg,mxf,nsv,nut,nuv,obu,ogg,pva,rm,roq,smjpeg,swf,ty,vc1,vc1test,viv,vvc,w64,wav,webm,wtv,yuv4mpegpipe"
)
# Formats whose streams are found only while reading. FFmpeg's stream probing would use decoders without the limit on
# pixels, so it gets no decoders: the picture sizes come from the parsers.
_STREAMS_LATE = {"dhav", "flv", "kux", "live_flv", "mpeg", "mpegts", "nsv", "swf", "ty", "wtv"}
_NO_DECODING = {"codec_whitelist": "none"}
# For streams that begin late, probe more of the file than FFmpeg's default of 5 MB and 5 seconds.
_LOOK_FURTHER = {"probesize": str(64 << 20), "analyzeduration": str(10 * 60 * 1_000_000)}
# FFmpeg counts the pixels of a frame's padded memory, so its limit is a little higher.
_PADDING = 1 << 20
_MOST_EDITED = 20_000_000  # samples of an edit list's entries: 0.5 GB in FFmpeg, and ten seconds
_DEFAULT = 5_000_000  # pixels that FFmpeg's command adds to a stream marked as default when it compares sizes
_TIMEOUT = 8.0  # seconds to open, and to read a packet: far above what a disk needs, against formats that wait
# Tags are not used, so their encoding does not matter; PyAV before version 19 must be told.
_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
_TEXTS = (  # beginnings of files that refer to others -> their kind
    (b"#extm3u", "a playlist"),
    (b"[playlist]", "a playlist"),
    (b"<smil", "a playlist"),
    (b"<asx", "a playlist"),
    (b"ffconcat", "a script that joins files"),
    (b"<mpd", "a DASH manifest"),
    (b"v=0", "a description of a session (SDP)"),
)
_PICTURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"P3\n",
    b"P5\n",
    b"P6\n",
    b"8BPS",
    b"qoif",
    b"\0\0\0\x0cJXL ",
)


@dataclass(frozen=True)
class Opened:
    """An open container and the stream that is the video."""

    container: Any
    stream: Any
    kinds: frozenset[str]  # FFmpeg's names of the format
    source: Path | Spooled
    check: Callable[[], object] | None

    def ask(self) -> None:
        """Call the caller's `check`, which may raise to end the reading."""
        if self.check is not None:
            self.check()

    def packets(self, *streams: Any) -> Iterator[Any]:
        """The packets of `streams`, or of all, in file order; also the empty ones of AVI's dropped frames.

        After the first packet a format error ends them, like the end of the file. Errors of `check` are raised.
        """
        reader = self.container.demux(*streams)
        some = False
        while True:
            self.ask()
            try:
                packet = next(reader, None)
            except av.error.ExitError as error:
                label = label_of(self.source)
                raise VideoError(f"{label} takes longer than {_TIMEOUT:g} s to read on; copy it to a disk") from error
            except (av.error.FFmpegError, IndexError) as error:
                # PyAV raises IndexError for a stream that appears after the beginning.
                if isinstance(error, av.error.FFmpegError) and (not some or isinstance(error, OSError | MemoryError)):
                    raise
                return
            if packet is None:
                return
            if packet.size or packet.dts is not None:  # not PyAV's end-of-file packets
                some = True
                yield packet


class Opener:
    """Opens a source as often as needed."""

    def __init__(self, source: Path | Spooled, limits: Limits, check: Callable[[], object] | None) -> None:
        self.source, self.limits, self.check = source, limits, check
        self.label = label_of(source)
        pixels = limits.max_pixels
        self._bound = {} if pixels is None else {"max_pixels": str(min(pixels + _PADDING, 2**31 - 1))}  # for decoders
        self.side_by_side = True  # whether frame threads are allowed
        self._options: dict[str, str] | None = None  # for FFmpeg's stream probing; None until the format is known

    @contextmanager
    def __call__(self) -> Iterator[Opened]:
        """The opened file and its main video stream, ready for threaded decoding, within the limit on pixels."""
        if self.check is not None:
            self.check()
        with self._container() as container:
            kinds = frozenset(container.format.name.split(","))
            stream = _main_stream(container)
            self._check_stream(stream)
            context = stream.codec_context
            self.check_pixels(context.width, context.height)
            context.options = self._bound
            context.flags |= av.codec.context.Flags.unaligned.value  # else cropping on the left is not exact
            stream.thread_type = "AUTO" if self.side_by_side else "SLICE"
            yield Opened(container, stream, kinds, self.source, self.check)

    def check_pixels(self, width: int, height: int) -> None:
        """Raises VideoError for a frame above the limit."""
        limit = self.limits.max_pixels
        if limit is not None and width * height > limit:
            raise VideoError(
                f"{self.label} has frames of {width}x{height}, more than {limit} pixels (max_pixels); "
                f"{remedy('max_pixels')}"
            )

    @contextmanager
    def _container(self) -> Iterator[Any]:
        if self._options is None:
            self._check_samples()
            with self._open(_NO_DECODING) as container:
                self._options = self._ways(container)
        with self._open(self._options) as container:
            yield container

    def _check_samples(self) -> None:
        """Raises VideoError if the file is cut off, or declares more samples than it can hold or than are allowed."""
        path = self._path()
        try:
            said, size = samples(path), path.stat().st_size
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise VideoError(f"{self.label} cannot be read ({reason}); give a file that this user may read") from error
        most = self.limits.max_frames
        if said.cut:
            raise VideoError(f"{self.label} is cut off: it ends before its index; copy it again in full")
        if said.total > size:
            raise VideoError(
                f"{self.label} says that it has {said.total} samples, in {size} bytes; copy it again in full"
            )
        if said.edited > _MOST_EDITED:
            raise VideoError(f"{self.label} has an edit list of too many entries; convert it to MP4 without one")
        if most is not None and said.pictures > most:
            raise VideoError(f"{self.label} has more than {most} frames (max_frames); {remedy('max_frames')}")

    def _path(self) -> Path:
        return Path(self.source.path) if isinstance(self.source, Spooled) else self.source

    def _ways(self, container: Any) -> dict[str, str]:
        """FFmpeg's options for this file from now on, found by a first opening that decodes nothing."""
        late = bool(_STREAMS_LATE & set(container.format.name.split(",")))
        stream = _main_stream(container)
        if late:
            return _NO_DECODING if stream is not None else _NO_DECODING | _LOOK_FURTHER
        if stream is not None and stream.codec_context is not None:
            self.check_pixels(stream.codec_context.width, stream.codec_context.height)
        return self._bound

    @contextmanager
    def _open(self, options: dict[str, str]) -> Iterator[Any]:
        safe = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "enable_drefs": "0"}
        try:
            # "file:" keeps FFmpeg from taking a name with a colon for a URL.
            container: Any = av.open(
                f"file:{self._path()}", options=safe | options, timeout=(_TIMEOUT, _TIMEOUT), **_TAGS
            )
        except av.error.ExitError as error:
            raise VideoError(f"{self.label} takes longer than {_TIMEOUT:g} s to open; convert it to MP4") from error
        except av.error.FFmpegError as error:
            self._explain(error)
            raise
        with container:
            yield container

    def _explain(self, error: Exception) -> None:
        """Raises VideoError if the beginning of the file shows why it cannot be opened."""
        try:
            with self._path().open("rb") as file:
                head = file.read(4096)
        except OSError:  # FFmpeg has reported it
            return
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for start, what in _TEXTS:
            if text.startswith(start) or (start[:1] == b"<" and text.startswith(b"<") and start in text):
                raise VideoError(
                    f"{self.label} is {what}, which is not followed; give the video file itself, or the segments "
                    "joined into one file"
                ) from error
        webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
        if webp and head[12:16] == b"VP8X" and head[20] & 2:
            raise VideoError(f"{self.label} is an animated WebP, which is not read here; convert it to MP4") from error
        if head.startswith(_PICTURES) or webp:
            raise VideoError(f"{self.label} is a picture, 1 frame; give a video of at least 2 frames") from error
        if b"\0" not in head and sum(byte < 9 or 13 < byte < 32 for byte in head) == 0:
            raise VideoError(
                f"{self.label} cannot be read as a video: it is a text file; give a video file that FFmpeg reads"
            ) from error
        if isinstance(error, av.error.ArgumentError):
            raise VideoError(
                f"{self.label} cannot be read as a video: FFmpeg takes it for a format that is not read here; convert "
                "it to MP4"
            ) from error

    def _check_stream(self, stream: Any) -> None:
        if stream is None:
            raise VideoError(f"{self.label} has no video stream; give a file with moving pictures")
        if stream.codec_context is None:
            raise VideoError(f"{self.label} uses a codec that this FFmpeg cannot decode; convert it to H.264")


def _main_stream(container: Any) -> Any:
    """The stream with the largest pictures, as FFmpeg's own command chooses it, without cover art; None if none is."""
    kinds = av.stream.Disposition

    def rank(stream: Any) -> tuple[bool, bool, int]:
        context = stream.codec_context  # None without a decoder
        pixels = 0 if context is None else context.width * context.height
        return context is not None, stream.frames != 1, pixels + _DEFAULT * bool(stream.disposition & kinds.default)

    moving = [stream for stream in container.streams.video if not stream.disposition & kinds.attached_pic]
    return max(moving, key=rank, default=None)
