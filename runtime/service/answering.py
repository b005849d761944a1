"""Answers a request of a `Pipeline`: from a video and a question to the answer.

    core = Answering(manifest, vision, decoder, closing, tokenizer, stops)
    question = core.question("What happens?", max_new_tokens=64)
    for delta in core.answer(Ready(core.prepare("clip.mp4"), question)): ...

The stages: decode and resize the frames (`prepare`), run the vision engine, splice its tokens into the prompt, prefill,
decode token by token (`answer`). Queueing is not done here. Answers share the buffers of engine and decoder, so one
must end before the next begins, unless the decoder runs several concurrently (`lanes`): then that many threads may
generate answers, and take turns only at encoding their videos. `question` and `prepare` may run at any time.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import FrameTimes, family_named
from earlytom.numbers import shown, whole
from runtime.choices import MAX_NEW_TOKENS
from runtime.decoder.eager import Finish
from runtime.decoder.protocol import TextDecoder
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.engine.manifest import Manifest
from runtime.errors import Closed
from runtime.gpu.staging import Upload
from runtime.gpu.stopwatch import Stopwatch
from runtime.service.prefixes import PrefixCache
from runtime.service.requests import (
    Answer,
    Arrived,
    CheckedQuestion,
    Delta,
    Embeds,
    Provenance,
    Ready,
    Remembered,
    Seen,
    Taken,
    Timings,
    Video,
    Work,
)
from runtime.service.scheduler import Turn
from runtime.service.splicing import Splicing
from runtime.service.writing import Writing
from runtime.show.kept import grid_of
from runtime.text.axes import following
from runtime.text.messages import ChatMessage
from runtime.text.places import Placing
from runtime.text.prompt import Prompt, build_prompt, bytes_per_token, check_length
from runtime.video import Clip, Limits, Spooled, channels_first, clip_from_frames, load_clip, take_video
from runtime.video.limits import DEFAULT_LIMITS
from runtime.vision import BatchedVision, Encoded, VisionBackend, encode_one

CONSECUTIVE = Placing()
WATCH_BYTES = 2 << 30  # default limit of the prefix cache
_log = logging.getLogger(__name__)
READ_AFTER_ANOTHER_TEXT = (
    "this video was read after another text than the question asks for: give the same system message, and the same "
    "messages before the video"
)


class Prompted(NamedTuple):
    """An answer that is about to be decoded.

    Attributes:
        source: its token ids.
        vision: the stopwatch of its encoding, at zero where nothing was encoded.
        decode_seconds, preprocess_seconds: of its clip.
    """

    visual_tokens: int
    prompt_tokens: int
    source: Generator[int, None, Finish]
    cached_tokens: int
    visual_tokens_full: int
    kept: Provenance | None
    vision: Stopwatch
    decode_seconds: float
    preprocess_seconds: float


class Answering:
    """One engine and one decoder.

    Args:
        watch_bytes: limit of the prefix cache of watched videos.
        limits: the largest video that is read.
        placing: which positions and bias the visual tokens get.

    Attributes:
        lanes: answers that may be generated concurrently.
        batch: videos that the engine encodes in one call; 1 with several lanes.
        decoder: None once closed.
        watched: the prefix cache of watched videos.
    """

    def __init__(
        self,
        manifest: Manifest,
        vision: VisionBackend,
        decoder: TextDecoder,
        closing: Tensor | None,
        tokenizer: Any,
        stops: Any,
        *,
        watch_bytes: int = WATCH_BYTES,
        limits: Limits = DEFAULT_LIMITS,
        placing: Placing = CONSECUTIVE,
    ) -> None:
        self.placing = placing
        self.manifest = manifest
        self.limits = limits
        self.vision = vision
        self.lanes = decoder.concurrent
        self.batch = vision.batch if self.lanes == 1 else 1
        self.decoder: TextDecoder | None = decoder
        self._turn = threading.Lock()  # held while the engine runs, until its outputs are copied
        self.tokenizer = tokenizer
        self.stops = stops
        self._family = family_named(manifest.model.family)
        self._grid = grid_of(manifest.tokens_per_frame, manifest.model.preprocessing.size)
        self.splicing = Splicing(manifest, closing, placing)
        self._bytes_per_token = bytes_per_token(tokenizer)
        self.watched: PrefixCache[Remembered, Seen] = PrefixCache(watch_bytes)
        # Copies the next request's frames to the engine's GPU while the engine computes.
        self._upload = Upload(vision.device)

    @property
    def context(self) -> int:
        """Context length in tokens, prompt and answer together."""
        return self._open_decoder().limit

    def question(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = GREEDY,
        system: str | None = None,
        frames: int | None = None,
        stop: Sequence[str] = (),
        kept: bool = False,
    ) -> CheckedQuestion:
        """Check all of a question that does not depend on its video's content; UserError if it is invalid."""
        context = self.context
        least = self.manifest.at(self.manifest.counts[0] if frames is None else whole("frames", frames, 1))
        new_tokens = whole("max_new_tokens (--max-new-tokens)", max_new_tokens, 1)
        if not isinstance(sampling, Sampling | None):
            raise UserError(f"sampling must be a Sampling, got {shown(sampling)}: give Sampling(temperature=...)")
        if not isinstance(stop, list | tuple) or not all(isinstance(one, str) and one for one in stop):
            raise UserError(f"stop must be a list of texts that are not empty, got {shown(stop)}: give stop=('.',)")
        # A longer text certainly has more tokens than the context.
        most = None if self._bytes_per_token is None else context * self._bytes_per_token
        words = build_prompt(self.tokenizer, prompt, system=system, most_bytes=most, family=self._family)
        left, all_frames = least.frames_per_stage[-1], least.layout.steps
        closings = self.manifest.closings
        visual = least.tokens + closings.most(least.tokens, left)
        check_length(words, visual_tokens=visual, new_tokens=new_tokens, context=context, left=left, frames=all_frames)
        span = self.placing.span(closings.span(all_frames))
        whole_frames = span // least.tokens_per_frame
        named = whole_frames if words.times is None else all_frames
        end = words.room(span + closings.behind, whole_frames, named) + new_tokens
        if self.placing.original and not self._family.on_axes and end > context:
            raise UserError(
                f"with visual tokens where they were in the video, the answer would end at position {end}, and the "
                f"model's context ends at {context}: use --positions consecutive, or fewer frames"
            )
        return CheckedQuestion(words, new_tokens, sampling or GREEDY, tuple(stop), bool(kept))

    def take(self, video: Video | Seen | Arrived) -> Taken:
        """A video as a caller gives it, checked and brought to one form; its content is copied, nothing is decoded."""
        if isinstance(video, Seen | Arrived):
            return video
        if isinstance(video, Clip):
            channels_first(video.frames)
        return take_video(video, self.limits)

    def prepare(
        self,
        video: str | Path | Spooled | Tensor | NDArray[Any] | Clip,
        frames: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> Clip:
        """Decode a video and resize it on the engine's device; a `Clip` is ready as it is.

        Args:
            frames: one of the engine's frame counts; default: the one that suits the video.
            check: called repeatedly while a file is decoded; an exception of it ends that.
        """
        if isinstance(video, Clip):  # decoded before this request
            return dataclasses.replace(video, decode_seconds=0.0, preprocess_seconds=0.0)
        preprocessing = self.manifest.model.preprocessing
        size = preprocessing.size
        how: dict[str, Any] = {"device": self.vision.device, "sampling": preprocessing.sampling}
        counts = self.manifest.counts if frames is None else (frames,)
        if isinstance(video, str | Path | Spooled):
            return load_clip(video, counts, size, limits=self.limits, check=check, **how)
        return clip_from_frames(video, counts, size, **how)

    def prepare_work(self, work: Work, check: Callable[[], None] | None = None) -> Ready:
        """The scheduler's `prepare`: get a request's video ready."""
        remembered = work.video if isinstance(work.video, Remembered) else None
        if remembered is not None and (seen := self.watched.get(remembered)) is not None:
            return Ready(seen, work.question, read_only=work.read_only)
        video, frames = (work.video, work.frames) if remembered is None else (remembered.video, remembered.frames)
        assert not isinstance(video, Remembered)
        if isinstance(video, (Seen, Arrived)):
            return Ready(video, work.question, None, remembered, work.read_only, work.embed)
        with self._upload.working():
            if work.given is not None:
                work.given.take()
            clip = self.prepare(video, frames, check)
            arriving = self._upload(clip.frames)
            return Ready(clip, work.question, arriving, remembered, work.read_only, work.embed)

    def answer_turns(self, turns: Sequence[Turn[Ready]]) -> list[Generator[Delta | Embeds, None, None]]:
        """The scheduler's `serve`: generators of the requests' answers, to be run one after another.

        An engine with a batch encodes the requests' videos here, in one call.
        """
        if self.decoder is not None and self.decoder.device.type == "cuda":
            torch.cuda.set_device(self.decoder.device)  # the current device is per thread
        clips = [turn.ready for turn in turns if isinstance(turn.ready.shown, Clip)]
        encoded = iter(self._encode_together(clips) if len(clips) > 1 else [])
        found = [next(encoded, None) if isinstance(turn.ready.shown, Clip) else None for turn in turns]
        return [
            self.embeds(turn.ready, encoded=one)
            if turn.ready.embed
            else self.answer(turn.ready, submitted=turn.submitted, waited=turn.waited, encoded=one)
            for turn, one in zip(turns, found, strict=True)
        ]

    def embeds(self, ready: Ready, *, encoded: Measured | None = None) -> Generator[Embeds, None, None]:
        """The prompt's embeddings with its video spliced in, for an external decoder; no prefill, no decoding.

        Args:
            ready, encoded: as in `answer`.

        Yields:
            one `Embeds`, which nothing overwrites and any stream may read.
        """
        with self._turn:
            found, _ = self._tokens(ready) if encoded is None else encoded
            spliced = self.splicing(self._open_decoder(), ready.question.words, found, self._times_of(ready.shown))
        if self._family.on_axes:
            raise UserError(
                f"a prompt of {self._family.title} is more than embeddings, its decoder takes positions on axes: ask "
                "here, with ask or submit"
            )
        values = spliced.embeds
        if values.is_cuda:
            torch.cuda.current_stream(values.device).synchronize()  # its reader has another stream
        yield Embeds(values)

    def answer(
        self,
        ready: Ready,
        *,
        submitted: float | None = None,
        waited: float = 0.0,
        encoded: Measured | None = None,
    ) -> Generator[Delta, None, None]:
        """Answer a question token by token.

        Args:
            ready: the question and its video.
            submitted, waited: when the request came (`time.perf_counter`; default now) and how long it was in line.
            encoded: the clip's visual tokens and the stopwatch of their encoding, if they are encoded already.

        Yields:
            a `Delta` per token, then one with `finish` and `answer`; nothing if `ready.read_only`. Closing the
            generator ends the answer.
        """
        came = time.perf_counter()
        with self._turn:
            resumed = time.perf_counter()
            prompted = self._begin(ready, encoded)
        if prompted is None:
            return
        writing = Writing(self.tokenizer, ready.question.stop)
        del encoded, ready  # frames and the engine's buffers are not needed while the decoder goes on
        yield from writing.deltas(prompted.source)
        vision = prompted.vision
        seen = vision.started + vision.seconds()  # before `resumed` where others of its group were answered since then
        submitted = resumed if submitted is None else submitted
        timings = Timings(
            waiting=waited + resumed - came + max(0.0, resumed - seen),
            decode=prompted.decode_seconds,
            preprocess=prompted.preprocess_seconds,
            vision=vision.seconds(),
            prefill=writing.first - max(resumed, seen),
            first_token=writing.first - submitted,
            per_token=writing.per_token,
            total=time.perf_counter() - submitted,
        )
        answer = Answer(
            text="".join(writing.parts),
            tokens=tuple(writing.ids),
            finish=writing.finish,
            timings=timings,
            visual_tokens=prompted.visual_tokens,
            prompt_tokens=prompted.prompt_tokens,
            cached_tokens=prompted.cached_tokens,
            kept=prompted.kept,
            grid=self._grid,
            sampling=self.manifest.model.preprocessing.sampling,
            step=self._family.step,
            visual_tokens_full=prompted.visual_tokens_full,
        )
        _log.debug(
            "answered in %.1f ms, %d visual tokens, %s", 1000 * timings.total, prompted.visual_tokens, writing.finish
        )
        yield Delta(writing.parts[-1], None, writing.finish, answer)

    def close(self) -> None:
        """Free the engine and the decoder. A second call does nothing."""
        self.vision.close()
        decoder, self.decoder = self.decoder, None
        if decoder is not None:
            decoder.close()
        self.watched.clear()

    def _begin(self, ready: Ready, encoded: Measured | None) -> Prompted | None:
        """Encode a video unless that is done, and put the question behind it; None if it is only to be read."""
        shown, vision = ready.shown, Stopwatch(None)
        costs = (shown.decode_seconds, shown.preprocess_seconds) if isinstance(shown, Clip) else (0.0, 0.0)
        if ready.remembered is not None and ready.remembered in self.watched:  # one before this one has read it
            shown = self.watched.get(ready.remembered) or shown
        cached = shown.prefix.length if isinstance(shown, Seen) else 0
        if not isinstance(shown, Seen):
            found, vision = self._tokens(ready) if encoded is None else encoded
            shown = Arrived(found, self._times_of(shown))
            if ready.remembered:
                shown = self._read(shown, ready.question.words, ready.remembered)
        if ready.read_only:
            return None
        made = shown.kept if isinstance(shown, Seen) else shown.encoded
        full = made.sources.shape[-1] * self.manifest.tokens_per_frame
        kept = (made if isinstance(made, Provenance) else _kept(made)) if ready.question.kept else None
        return Prompted(*self._start(shown, ready.question), cached, full, kept, vision, *costs)

    def _start(self, shown: Seen | Arrived, question: CheckedQuestion) -> tuple[int, int, Generator[int, None, Finish]]:
        """The number of visual tokens, that of all prompt tokens, and the answer's ids as a generator not started."""
        decoder, words = self._open_decoder(), question.words
        how: dict[str, Any] = {
            "max_new_tokens": question.max_new_tokens,
            "stop_ids": self.stops,
            "sampling": question.sampling,
        }
        if isinstance(shown, Arrived):
            spliced = self.splicing(decoder, words, shown.encoded, shown.times)
            stream = decoder.stream(spliced.embeds, visual=spliced.visual, **how | spliced.placed)
            return len(shown.encoded.tokens), spliced.embeds.shape[1], stream
        if shown.before != words.prefix_ids:
            raise UserError(READ_AFTER_ANOTHER_TEXT)
        behind = words.behind(shown.times)
        suffix = decoder.embed(torch.tensor([behind], dtype=torch.int64))
        if shown.after is not None:
            positions = following(shown.after, len(behind), suffix.device)
            how["positions"] = positions if self._family.on_axes else positions[0]
        length = shown.prefix.length + len(behind)
        return shown.visual_tokens, length, decoder.stream(suffix, prefix=shown.prefix, **how)

    def _times_of(self, shown: Clip | Seen | Arrived) -> FrameTimes:
        """The times of a video's frames."""
        assert not isinstance(shown, Seen)
        return shown.times if isinstance(shown, Arrived) else shown.times(self.manifest.model.preprocessing.sampling)

    def _read(self, arrived: Arrived, words: Prompt, remembered: Remembered) -> Seen:
        """Prefill a video and the text before it, and put the prefix into the cache."""
        encoded = arrived.encoded
        before = dataclasses.replace(words, suffix_ids=(), times=None)
        decoder = self._open_decoder()
        spliced = self.splicing(decoder, before, encoded, arrived.times)
        prefix = decoder.prefill(spliced.embeds, visual=spliced.visual, **spliced.placed)
        seen = Seen(prefix, words.prefix_ids, len(encoded.tokens), _kept(encoded), arrived.times, spliced.after)
        held = self.watched.keys()
        for one in held:
            if one.closed:  # by its finalizer, which takes no lock and so leaves the entry here
                self.watched.drop(one)
        if not remembered.closed:
            self.watched.put(remembered, seen)
        return seen

    def _tokens(self, ready: Ready) -> Measured:
        """A video's visual tokens, and the stopwatch of their encoding."""
        if isinstance(ready.shown, Arrived):
            return ready.shown.encoded, Stopwatch(None)
        vision = Stopwatch(self._open_decoder().device)
        found = encode_one(self.vision, _frames(ready))
        vision.stop()
        return found, vision

    def _encode_together(self, clips: Sequence[Ready]) -> list[Measured]:
        """Encode several clips in one call. If it fails, because of one bad clip perhaps, return none: then each is
        encoded by itself, with its own error."""
        vision = Stopwatch(self._open_decoder().device)
        try:
            found = cast(BatchedVision, self.vision).encode_several([_frames(ready) for ready in clips])
        except Exception:
            return []
        vision.stop()
        return [(one, vision) for one in found]

    def _open_decoder(self) -> TextDecoder:
        if self.decoder is None:
            raise Closed("this pipeline is closed: load another one")
        return self.decoder


def _kept(encoded: Encoded) -> Provenance:
    """The provenance of an engine's outputs, copied to the CPU."""
    return Provenance(*(value.to("cpu", copy=True) for value in (encoded.positions, encoded.sources, encoded.place)))


def _frames(ready: Ready) -> Tensor:
    """The clip's frames, on the engine's device if they were uploaded."""
    assert isinstance(ready.shown, Clip)
    return ready.shown.frames if ready.arriving is None else ready.arriving.take()


Measured = tuple[Encoded, Stopwatch]  # visual tokens, and the stopwatch of their encoding
