"""Video and question in, answer out: the compiled vision engine followed by the LLM decoder, for many callers.

    with Pipeline.load("engines/...") as pipeline:
        for delta in pipeline.stream("clip.mp4", "What happens?"):
            print(delta.text, end="")

Everything is loaded once. Requests may come from any thread and wait in a bounded queue; one worker thread decodes and
resizes the next video while another answers the current request (`runtime.service.scheduler`,
`runtime.service.answering`). A caller that reads slowly, or not at all, delays no other.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.numbers import whole
from runtime.checkpoint import Source
from runtime.choices import MAX_NEW_TOKENS
from runtime.decoder.eager import InnerMerge
from runtime.decoder.protocol import TextDecoder
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.gpu.staging import Arriving, as_of_now
from runtime.options import Options, instance
from runtime.parts import WantedParts, load_parts
from runtime.service.answering import READ_AFTER_ANOTHER_TEXT, WATCH_BYTES, Answering
from runtime.service.asking import Request
from runtime.service.job import Job
from runtime.service.prefixes import PrefixCache
from runtime.service.requests import (
    Answer,
    Arrived,
    Delta,
    Embeds,
    Ready,
    Remembered,
    Seen,
    Taken,
    Timings,
    Video,
    Work,
)
from runtime.service.scheduler import Scheduler
from runtime.service.watched import Watched
from runtime.text.messages import ChatMessage
from runtime.text.prompt import Prompt
from runtime.video import Clip, Limits
from runtime.video.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from runtime.service.live_video import LiveVideo

__all__ = [  # what callers import from here
    "Answer",
    "ChatMessage",
    "Clip",
    "Delta",
    "InnerMerge",
    "Limits",
    "Pipeline",
    "Request",
    "Sampling",
    "Timings",
]
_log = logging.getLogger(__name__)
WAITING = 8  # default length of the queue
_ANY_QUESTION = "?"  # where only the text before the video counts, which no question changes


class Pipeline:
    """One engine, one decoder and a queue of requests; made by `load`. Every method is thread-safe.

    `notes` are lines on what may change answers unexpectedly: settings of the checkpoint's generation_config.json that
    are not applied, and why the decoder is not in fp32.

    `close` frees engine and decoder. A pipeline that is garbage-collected unclosed ends its requests and threads.
    """

    def __init__(self, core: Answering, *, waiting: int = WAITING, notes: Sequence[str] = ()) -> None:
        self.manifest, self.vision, self.notes = core.manifest, core.vision, tuple(notes)
        self._core = core
        # The workers refer to the core, not to this object: it can be garbage-collected while they wait.
        self._scheduler: Scheduler[Work, Ready, Delta | Embeds] = Scheduler(
            core.prepare_work, core.answer_turns, waiting=waiting, batch=core.batch, lanes=core.lanes
        )
        weakref.finalize(self, self._scheduler.abandon).atexit = False  # the scheduler sees to that

    @property
    def watched(self) -> PrefixCache[Remembered, Seen]:
        """The prefix cache of watched videos, with its counters and its limit in bytes."""
        return self._core.watched

    @property
    def closed(self) -> bool:
        """Whether the pipeline is closed, its decoder freed."""
        return self._core.decoder is None

    @property
    def context(self) -> int:
        """Context length in tokens, prompt and answer together. Raises Closed once closed."""
        return self._core.context

    @property
    def lanes(self) -> int:
        """Requests that can be answered concurrently."""
        return self._core.lanes

    @property
    def running(self) -> int:
        """Number of requests being answered."""
        return self._scheduler.running

    @property
    def queued(self) -> int:
        """Number of requests not being answered yet: waiting, or with their video being decoded."""
        return self._scheduler.queued

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that loaded the pipeline; every request raises `Closed` then."""
        return self._scheduler.home.left

    @property
    def decoder(self) -> TextDecoder | None:
        """None once closed."""
        return self._core.decoder

    @classmethod
    def load(
        cls,
        engine: str | Path,
        model: Source = None,
        backend: str = "auto",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        decoder: str = "torch",
        inner: InnerMerge | None = None,
        waiting: int = WAITING,
        watch_bytes: int = WATCH_BYTES,
        warm_up: bool | None = None,
        limits: Limits = DEFAULT_LIMITS,
        bias: bool | None = None,
        positions: str | None = None,
        decoder_key: str | None = None,
        decoder_dtype: str | None = None,
    ) -> Pipeline:
        """Load an engine folder and the decoder of its model.

        Args:
            engine: a folder that `python -m builder.build` wrote.
            model: the checkpoint it was built from; default: the source that the manifest names.
            backend: "auto" (the compiled engine where torch can use a GPU, else ONNX Runtime, or PyTorch for a bf16
                engine), "onnxruntime", "tensorrt", "tensorrt-rtx", or "torch", the reference.
            device, dtype: of the decoder; default: the GPU in the engine's precision, else the CPU in fp32, or in the
                checkpoint's own dtype where fp32 does not fit into free memory.
            decoder: "torch", or "torch-tensorrt" to compile the decoder: the first load takes minutes, and the programs
                are kept in the engine's folder. "vllm", "vllm:FOLDER" or the address of a vLLM server (see
                `runtime.decoder.vllm`) answer many requests concurrently.
            inner: merge visual tokens inside the decoder, too (with decoder "torch").
            waiting: requests that may wait besides those being answered; more are refused.
            watch_bytes: memory on the decoder's device for the prefixes of watched videos; see `watch`.
            warm_up: call `warm_up` after loading; default: on a GPU.
            limits: the largest video that is read.
            bias: add log(number of tokens it stands for) to each visual token's attention logits; default: as the
                engine's method does.
            positions: "original", the visual tokens' positions in the video, or "consecutive"; default: as the engine's
                method does.
            decoder_key: the API key of a vLLM server.
            decoder_dtype: "int8" for weights in int8 on a CPU, see `runtime.checkpoint.narrow`; the decoder computes
                in bf16 then.

        Raises:
            EngineError: no engine in the folder, changed files, another library version, or an engine of another model;
                the decoder cannot be compiled here.
            UserError: an invalid argument, before anything is loaded; the checkpoint cannot be loaded, there is no such
                device, or `inner` does not fit the decoder.
            DecoderFailed (a UserError): not a vLLM server, or not started as needed; DecoderAway: it is unreachable.
            OSError: the compiled decoder cannot be written.
        """
        waiting, watch_bytes = whole("waiting", waiting, 0), whole("watch_bytes", watch_bytes, 0)
        instance("limits", limits, Limits, "Limits(max_seconds=...)")
        if warm_up is not None:
            instance("warm_up", warm_up, bool, "True or False")
        wanted = WantedParts.checked(
            engine, model, backend, device, dtype, decoder, inner, bias, positions, decoder_key, decoder_dtype
        )
        parts = load_parts(wanted)
        text = parts.text
        core = Answering(
            parts.manifest,
            parts.vision,
            text.decoder,
            text.closing,
            text.tokenizer,
            text.stops,
            watch_bytes=watch_bytes,
            limits=limits,
            placing=parts.placing,
        )
        made = cls(core, waiting=waiting, notes=parts.notes)
        _log.info("engine %s in %s, decoder %s on %s", parts.manifest.name, made.vision.name, decoder, wanted.device)
        for line in made.notes:
            _log.info("%s", line)
        try:
            if wanted.device.type == "cuda" if warm_up is None else warm_up:
                made.warm_up()
        except BaseException:
            made.close()
            raise
        return made

    def warm_up(self) -> None:
        """Generate two tokens about a black clip of each frame count, so that the first request finds memory allocated,
        kernels loaded and CUDA graphs captured.

        Raises:
            UserError: the model cannot answer in this precision; otherwise as `submit` and its request.
        """
        size = self.manifest.model.preprocessing.size
        for count in self.manifest.counts:
            black = Clip(torch.zeros(count, 3, *size, dtype=torch.uint8), (), count, 0.0, 0.0, 0.0)
            with closing(self.stream(black, _ANY_QUESTION, frames=count)) as deltas:
                for _ in itertools.islice(deltas, 2):
                    pass

    def submit(
        self,
        video: Video | Seen | Arrived | Remembered,
        prompt: str | Sequence[ChatMessage],
        *,
        deadline: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = GREEDY,
        system: str | None = None,
        frames: int | None = None,
        stop: Sequence[str] = (),
        kept: bool = False,
    ) -> Request:
        """Queue a question about a video; returns at once.

        Args:
            video: a path, a file's content (bytes, or a file opened in binary mode; copied here), decoded frames (uint8
                RGB [n, 3, h, w] or [n, h, w, 3], n >= 2), which must not change before the request ends, a list of
                single frames or PIL images, or a `Clip`.
            prompt: the question, or a conversation that ends with it: messages, one of which holds the video.
            deadline: seconds from now after which the request fails, in whichever state it is.
            max_new_tokens, sampling: of the decoder; None samples greedily.
            system: a system message before the question.
            frames: one of the engine's frame counts; default: the one that suits the video.
            stop: strings that end the answer; they are not part of its text.
            kept: return in `Answer.kept` which visual tokens were kept.

        Raises:
            UserError: here, an invalid argument; from the request, a video that cannot be read.
            Overloaded (a UserError): the queue is full.
            Closed: the pipeline is closed; from the request, it was closed before the answer.
            DeadlineExceeded (a UserError), Cancelled: from the request.
        """
        self._scheduler.home.check()  # first: in a fork, a lock below may be held for ever
        if isinstance(video, Remembered):
            if frames is not None or system not in (None, video.system):
                raise UserError("frames and system message of a watched video are those it is watched with")
            system = video.system if isinstance(prompt, str) else None  # messages have theirs among them
        question = self._core.question(
            prompt, max_new_tokens=max_new_tokens, sampling=sampling, system=system, frames=frames, stop=stop, kept=kept
        )
        if isinstance(video, Remembered) and question.words.prefix_ids != video.before:
            raise UserError(READ_AFTER_ANOTHER_TEXT)
        self._scheduler.check_room(deadline)  # before a video's content is copied
        taken = video if isinstance(video, Remembered) else self._core.take(video)
        work = Work(taken, question, frames, given=_given(taken))
        return Request(cast(Job[Delta], self._scheduler.submit(work, deadline=deadline)), self)

    def check(self, prompt: str | Sequence[ChatMessage], *, deadline: float | None = None, **how: Any) -> Prompt:
        """Raise what `submit` would raise now for this question, whatever the video; to call before costly work.

        Returns:
            the tokens before and after the video. Questions about one watched video share those before it.
        """
        self._scheduler.home.check()
        question = self._core.question(prompt, **how)
        self._scheduler.check_room(deadline)
        return question.words

    def stream(
        self, video: Video | Seen | Arrived, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]
    ) -> Generator[Delta, None, None]:
        """Answer a question token by token; `submit` runs at the first `next`.

        Arguments and errors as `submit`; errors are raised while iterating.

        Yields:
            a `Delta` per token, then one with `finish` and `answer`. Closing the generator cancels the request.
        """
        request = self.submit(video, prompt, **how)
        try:
            yield from request
        finally:
            request._job.abandon()  # not left to `Request.__del__`: an exception's traceback may hold the request

    def ask(self, video: Video | Seen | Arrived, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Answer:
        """`submit`, and wait for the answer; arguments and errors as `submit`. Ctrl-C cancels the request."""
        with self.submit(video, prompt, **how) as request:
            return request.result()

    def embed(
        self,
        video: Video | Arrived,
        prompt: str | Sequence[ChatMessage],
        *,
        system: str | None = None,
        frames: int | None = None,
        deadline: float | None = None,
    ) -> Tensor:
        """Embeddings of the prompt with the video spliced in; waits for them.

        For a server with its own decoder: vLLM takes them as `prompt_embeds`.

        Args:
            video, prompt, system, frames, deadline: as in `submit`.

        Returns:
            [1, L, D] on the decoder's device and in its dtype: text embeddings, with the visual tokens and what closes
            them in the video's place. The tensor is the caller's.

        Raises:
            as `submit` and its request.
        """
        self._scheduler.home.check()
        question = self._core.question(prompt, max_new_tokens=1, system=system, frames=frames)
        self._scheduler.check_room(deadline)
        taken = self._core.take(video)
        work = Work(taken, question, frames, given=_given(taken), embed=True)
        made = self._done(work, deadline)
        assert isinstance(made, Embeds)
        return made.values

    def watch(
        self,
        video: Video | Seen | Arrived,
        *,
        system: str | None = None,
        frames: int | None = None,
        deadline: float | None = None,
    ) -> Watched:
        """Encode and prefill a video once, to ask about it many times; waits until that is done.

        Args:
            video, system, frames, deadline: as in `submit`. A file or frames must not change while watched: an evicted
                prefix is computed again from them.

        Raises:
            UserError: a video that cannot be used, a prefix larger than `watch_bytes`, or inner merging, which needs
                the question first; otherwise as `submit` and its request.
        """
        self._scheduler.home.check()
        question = self._core.question(_ANY_QUESTION, max_new_tokens=1, system=system, frames=frames)
        self._scheduler.check_room(deadline)
        remembered = Remembered(self._core.take(video), system, frames, question.words.prefix_ids)
        work = Work(remembered, question, read_only=True, given=_given(remembered))
        self._done(work, deadline)
        return Watched(self, remembered)

    def remember(
        self,
        video: Video | Seen | Arrived,
        prompt: str | Sequence[ChatMessage] = _ANY_QUESTION,
        *,
        system: str | None = None,
        frames: int | None = None,
    ) -> Watched:
        """`watch` without the wait: the first question prefills the video, and later ones find it in the cache.

        Args:
            video, system, frames: as in `watch`.
            prompt: a conversation; its text before the video is part of the prefix, so every question about the video
                must begin with that text.

        Raises:
            UserError: an invalid argument.
        """
        self._scheduler.home.check()
        question = self._core.question(prompt, max_new_tokens=1, system=system, frames=frames)
        return Watched(self, Remembered(self._core.take(video), system, frames, question.words.prefix_ids))

    def open_stream(self, *, total: int | None = None, limit: int | None = None) -> LiveVideo:
        """A video whose frames arrive one by one, from a camera or a download, and are encoded as they arrive.

        Args:
            total: number of frames that will arrive, where known: frames outside the sample are then skipped.
            limit: the most frames that may arrive where `total` is unknown; default: 4 F, F the engine's frames.

        Raises:
            EngineError: the engine takes whole clips only: build one with --chunk.
            UserError: an invalid `total` or `limit`.
            RuntimeError: the pipeline is closed, or was loaded before the process forked.
        """
        self._scheduler.home.check()
        from runtime.service.live_video import LiveVideo
        from runtime.vision.live import LiveClip

        sampling = self.manifest.model.preprocessing.sampling
        clip = LiveClip(self.vision, total=total, limit=limit, device=self.vision.device, sampling=sampling)  # type: ignore[arg-type]
        return LiveVideo(self, clip)

    def _done(self, work: Work, deadline: float | None) -> Delta | Embeds | None:
        """Submit some work and wait for its last item."""
        job = self._scheduler.submit(work, deadline=deadline)
        try:
            return job.last()
        finally:
            job.cancel()  # if the wait was interrupted

    def close(self, *, drain: bool = False) -> None:
        """Refuse new requests, end queued ones with `Closed` (with `drain`, answer them), and free engine and decoder
        once the current answer is finished. Does nothing a second time or in a fork of the process."""
        instance("drain", drain, bool, "True or False")
        if self._scheduler.home.left:
            return  # an engine cannot be freed without its threads
        self._scheduler.close(drain=drain)
        self._core.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None:  # after Ctrl-C nobody wants to wait for the end of an answer
            self._scheduler.abort()
        self.close()


def _given(video: Taken | Remembered) -> Arriving | None:
    """Frames given on a GPU, with the event that they are written: the workers use other streams than the caller."""
    shown = video.video if isinstance(video, Remembered) else video
    frames = shown.frames if isinstance(shown, Clip) else shown
    return as_of_now(frames) if isinstance(frames, Tensor) else None
