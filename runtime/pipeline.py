"""From a video and a question to an answer: the compiled vision engine chained with the LLM decoder, for many callers.

    with Pipeline.load("engines/...") as pipeline:
        for delta in pipeline.stream("clip.mp4", "What happens?"):
            print(delta.text, end="")

Everything is loaded once. Requests come from any number of threads and wait in a bounded line; one worker decodes and
resizes the next video while another answers the request before it (`runtime.service.scheduler`,
`runtime.service.answering`). A caller that reads slowly, or not at all, holds up nobody.
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
WAITING = 8  # requests in line, if nothing else is asked for
_ANY_QUESTION = "?"  # what stands before a video in a prompt is the same for every question


class Pipeline:
    """One engine and one decoder, and the line of those who ask; made by `load`. Any thread may call anything.

    `notes` are lines about answers that may not be expected: what the checkpoint's generation_config.json asks for and
    is left out, and why the decoder is not in fp32.

    Closing it frees engine and decoder. One that is let go without that ends its requests and its threads by itself.
    """

    def __init__(self, core: Answering, *, waiting: int = WAITING, notes: Sequence[str] = ()) -> None:
        self.manifest, self.vision, self.notes = core.manifest, core.vision, tuple(notes)
        self._core = core
        # The workers know the core and not this object, so that it can be let go while they wait.
        self._scheduler: Scheduler[Work, Ready, Delta | Embeds] = Scheduler(
            core.prepare_work, core.answer_turns, waiting=waiting, batch=core.batch, lanes=core.lanes
        )
        weakref.finalize(self, self._scheduler.abandon).atexit = False  # the scheduler sees to that

    @property
    def watched(self) -> PrefixCache[Remembered, Seen]:
        """What `watch` keeps: its counters, its limit."""
        return self._core.watched

    @property
    def closed(self) -> bool:
        """Whether it has been closed and freed."""
        return self._core.decoder is None

    @property
    def context(self) -> int:
        """Positions that a prompt and its answer may take together. Raises Closed once closed."""
        return self._core.context

    @property
    def lanes(self) -> int:
        """Requests that are answered at a time."""
        return self._core.lanes

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._scheduler.running

    @property
    def queued(self) -> int:
        """Requests that wait behind those, or whose videos are being read."""
        return self._scheduler.queued

    @property
    def forked(self) -> bool:
        """This is a fork of the process that loaded it: every call for an answer ends with `Closed`."""
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
            model: the checkpoint it was built from; default the source that the folder names.
            backend: "auto" (the compiled engine where torch can use a GPU, else ONNX Runtime), "onnxruntime",
                "tensorrt", "tensorrt-rtx", or "torch", the reference.
            device, dtype: of the decoder; default the GPU in the engine's precision, else the CPU in fp32, or where
                that does not fit into the memory that is free, in what the checkpoint is stored in.
            decoder: "torch", or "torch-tensorrt" to compile the decoder; the first call takes minutes then, and what it
                compiled is kept in the engine's folder. "vllm", "vllm:FOLDER" or the address of a vLLM server: see
                `runtime.decoder.vllm`; many requests are answered at a time then.
            inner: merge visual tokens inside the decoder, too (with decoder "torch").
            waiting: requests that may wait behind those that are answered; more are refused.
            watch_bytes: memory on the decoder's device for videos that are watched; see `watch`.
            warm_up: answer a question about a black clip first, see `warm_up`; by default on a GPU.
            limits: the largest video that is read.
            bias: let each visual token weigh as much as the tokens that it stands for; by default as the engine's
                method has it.
            positions: "original", where visual tokens were in the video, or "consecutive"; by default as the engine's
                method has it.
            decoder_key: what a vLLM server asks clients for.
            decoder_dtype: "int8" for weights in int8 on a CPU, see `runtime.checkpoint.narrow`; the decoder computes
                in bf16 then.

        Raises:
            EngineError: no engine there, changed files, another library version, or an engine of another model; the
                decoder cannot be compiled here.
            UserError: an argument that makes no sense, before anything is loaded; the checkpoint cannot be loaded,
                there is no such device, `inner` does not fit the decoder.
            DecoderFailed (a UserError): the vLLM server is none, or is started in another way; DecoderAway: it cannot
                be reached.
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
        """Answer a question about a black clip of each frame count, as far as the second token, so that the first
        request finds memory allocated, kernels loaded and CUDA graphs captured.

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
        """Put a question about a video in line; returns at once.

        Args:
            video: a file, its content (bytes, or a file opened in binary mode, which are copied here), decoded frames
                (uint8 [n, 3, h, w] or [n, h, w, 3], n >= 2), which must not change before the request has ended, a list
                of single frames or PIL images, or a `Clip`.
            prompt: the question, or a conversation about the video that ends with it: messages, one of which has the
                video.
            deadline: seconds from now after which the request ends without its answer, whether it is in line, being
                prepared or being answered.
            max_new_tokens, sampling: of the decoder; None samples greedily.
            system: a system message before the question.
            frames: one of the engine's frame counts; by default the one that suits the video.
            stop: strings that end the answer; they are not part of its text.
            kept: the answer says which visual tokens it looked at.

        Raises:
            UserError: here, an argument that makes no sense or cannot be a video; by the request, a video that cannot
                be read.
            Overloaded (a UserError): as many requests wait as may wait.
            Closed: the pipeline is closed; by the request, it was closed before the answer.
            DeadlineExceeded (a UserError), Cancelled: by the request.
        """
        self._scheduler.home.check()  # a fork may wait for ever for a lock of what is asked next
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
        """Raise what `submit` would raise now for this question, whatever the video; for what costs much before it.

        Returns:
            the tokens around the video. What is before it is what questions about one watched video have to share.
        """
        self._scheduler.home.check()
        question = self._core.question(prompt, **how)
        self._scheduler.check_room(deadline)
        return question.words

    def stream(
        self, video: Video | Seen | Arrived, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]
    ) -> Generator[Delta, None, None]:
        """Answer a question about a video, token by token: `submit` at the first `next`, and its deltas.

        Arguments and errors as there; errors come while iterating.

        Yields:
            a `Delta` per token, then one with `finish` and `answer`. Closing the generator cancels the request.
        """
        request = self.submit(video, prompt, **how)
        try:
            yield from request
        finally:
            request._job.abandon()  # as in `Request.__del__`, which an exception that is still held would put off

    def ask(self, video: Video | Seen | Arrived, prompt: str | Sequence[ChatMessage], **how: Unpack[Options]) -> Answer:
        """`submit`, waited for: arguments and errors as there. Interrupted (Ctrl-C), it cancels the request."""
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
        """The prompt with the video in it, as the decoder reads it; waits for that.

        For a server that decodes by itself: vLLM takes it as `prompt_embeds`.

        Args:
            video, prompt, system, frames, deadline: as in `submit`.

        Returns:
            [1, L, D] on the decoder's device and in its dtype: the embeddings of the text, with the visual tokens and
            the token that closes it in the place of the video. It is the caller's.

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
        """Encode and read a video once, to ask about it many times; waits for that.

        Args:
            video, system, frames, deadline: as in `submit`. A file or frames must stay as they are while they are
                watched: where memory is short they are read again.

        Raises:
            UserError: a video that cannot be used, one that does not fit into `watch_bytes`, or inner merging, which
                needs the question first; otherwise as `submit` and its request.
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
        """`watch` that waits for nothing: the first question reads the video, for itself and for those after it.

        Args:
            video, system, frames: as in `watch`.
            prompt: a conversation, of which all that stands before the video is read with it; questions about the
                video have to begin with the same.

        Raises:
            UserError: an argument that makes no sense or cannot be a video.
        """
        self._scheduler.home.check()
        question = self._core.question(prompt, max_new_tokens=1, system=system, frames=frames)
        return Watched(self, Remembered(self._core.take(video), system, frames, question.words.prefix_ids))

    def open_stream(self, *, total: int | None = None, limit: int | None = None) -> LiveVideo:
        """A video that comes frame by frame, from a camera or a download, and is encoded while it comes.

        Args:
            total: how many frames will come, where that is known: the sample is then exactly a file's.
            limit: the most frames that may come where it is not, by default four times as many as the engine takes.

        Raises:
            EngineError: the engine takes whole clips only: build one with --chunk.
            UserError: a total or limit that makes no sense.
            RuntimeError: the pipeline is closed, or was loaded before the process forked.
        """
        self._scheduler.home.check()
        from runtime.service.live_video import LiveVideo
        from runtime.vision.live import LiveClip

        sampling = self.manifest.model.preprocessing.sampling
        clip = LiveClip(self.vision, total=total, limit=limit, device=self.vision.device, sampling=sampling)  # type: ignore[arg-type]
        return LiveVideo(self, clip)

    def _done(self, work: Work, deadline: float | None) -> Delta | Embeds | None:
        """The last that comes of some work, waited for."""
        job = self._scheduler.submit(work, deadline=deadline)
        try:
            return job.last()
        finally:
            job.cancel()  # if the wait was interrupted

    def close(self, *, drain: bool = False) -> None:
        """Take no more requests, end those in line with `Closed` (with `drain`, answer them), and free the engine and
        the decoder once the answer that is under way is finished. A second call does nothing, nor does
        one in a fork of the process."""
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
        if error is not None:  # whoever is interrupted does not want to wait for the end of an answer
            self._scheduler.abort()
        self.close()


def _given(video: Taken | Remembered) -> Arriving | None:
    """Its frames and when they are there, if they are on a GPU: the workers have other streams than who made them."""
    shown = video.video if isinstance(video, Remembered) else video
    frames = shown.frames if isinstance(shown, Clip) else shown
    return as_of_now(frames) if isinstance(frames, Tensor) else None
