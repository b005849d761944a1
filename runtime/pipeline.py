"""From a video and a question to an answer: the compiled vision engine chained with the LLM decoder.

    with Pipeline.load("engines/...") as pipeline:
        for delta in pipeline.stream("clip.mp4", "What happens?"):
            print(delta.text, end="")

The stages of one request: decode and resize the frames, run the vision engine, splice its tokens into the prompt,
prefill, decode token by token. Everything is loaded once. One request at a time: a second one is refused, not queued,
because its caller alone knows whether to wait, and a stream that somebody forgot to close would block it for ever.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from runtime import contract
from runtime.backends import VisionBackend, choose_backend, open_backend
from runtime.checkpoint import Checkpoint, Source, describe, load_model, load_tokenizer
from runtime.decoder import GREEDY, Decoder, Finish, InnerMerge, Sampling
from runtime.errors import EngineError
from runtime.manifest import Manifest
from runtime.prompt import build_prompt, check_length, splice, stop_token_ids
from runtime.text import TextStream
from runtime.video import Clip, clip_from_frames, load_clip

if TYPE_CHECKING:
    from runtime.decoder_compiler import Compiler

MAX_NEW_TOKENS = 128
DECODERS = ("torch", "torch-tensorrt")
DECODER_FOLDER = "decoder"  # in the engine's folder: compiled programs of the decoder


@dataclass(frozen=True)
class Timings:
    """Seconds of one request. On a GPU the stages overlap the host; `vision` is then measured by events on the device.

    Attributes:
        decode: opening and decoding the video; preprocess: resizing its frames. Both are 0 for a `Clip`: it is ready.
        vision: copy to the device, the vision engine.
        prefill: splice, prefill and the first token.
        first_token: from the first `next` to the first token (TTFT): the stages above and making the prompt.
        per_token: mean time of each further token (TPOT), without the caller's own between them; 0 when there is none.
        total: from the first `next` to the end of the answer, the caller's time included.
    """

    decode: float
    preprocess: float
    vision: float
    prefill: float
    first_token: float
    per_token: float
    total: float


@dataclass(frozen=True)
class Delta:
    """What one more token brought.

    `text` may be empty while a character is unfinished. The last delta has `finish` and `answer`, and no token.
    """

    text: str
    token: int | None = None
    finish: Finish | None = None
    answer: Answer | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer: text and token ids, why it ended, what it cost, and how many visual tokens it looked at."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    timings: Timings
    visual_tokens: int


class Pipeline:
    """One engine and one decoder; made by `load`. Closing it frees both."""

    def __init__(
        self, manifest: Manifest, vision: VisionBackend, decoder: Decoder, newline: Tensor, tokenizer: Any, stops: Any
    ) -> None:
        self.manifest = manifest
        self.vision = vision
        self.decoder: Decoder | None = decoder  # None once closed
        self._newline = newline
        self._tokenizer = tokenizer
        self._stops = stops
        self._busy = threading.Lock()

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
    ) -> Pipeline:
        """Load an engine folder and the decoder of its model.

        Args:
            engine: a folder that `python -m builder.build` wrote.
            model: the checkpoint it was built from; default the source that the folder names.
            backend: "auto" (the compiled engine where torch can use a GPU, else ONNX Runtime), "onnxruntime",
                "tensorrt", "tensorrt-rtx", or "torch", the reference.
            device, dtype: of the decoder; default the GPU in the engine's precision, else the CPU in fp32.
            decoder: "torch", or "torch-tensorrt" to compile the decoder; the first call takes minutes then, and what it
                compiled is kept in the engine's folder.
            inner: merge visual tokens inside the decoder, too (with decoder "torch").

        Raises:
            EngineError: no engine there, changed files, another library version, or an engine of another model; the
                decoder cannot be compiled here.
            UserError: the checkpoint cannot be loaded, there is no such device, or `inner` does not fit the decoder.
            OSError: the compiled decoder cannot be written.
        """
        if inner is not None and decoder != "torch":
            raise UserError(f"inner merging runs in the PyTorch decoder, not in {decoder}: use --decoder torch")
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        compiler = _open_compiler(decoder, where)  # first: it wants to, and refuses before anything large is loaded
        if where.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"no GPU that torch {torch.__version__} can use for --device {where}: use --device cpu")
        folder = Path(engine)
        manifest = Manifest.read(folder)
        choice = choose_backend(backend, manifest)
        checkpoint = describe(manifest.model.source if model is None else model)
        if (digest := checkpoint.digest()) != manifest.model.digest:
            raise EngineError(
                f"engine {manifest.name} was built from {manifest.model.source} (weights "
                f"{manifest.model.digest[:12]}), and {checkpoint.source} has weights {digest[:12]}: give the model it "
                f"was built from with --model, or build an engine for this one with python -m builder.build "
                f"--model {checkpoint.source}"
            )
        precision = dtype or (torch.float32 if where.type == "cpu" else contract.DTYPES[manifest.dtype])
        vision = _open_vision(folder, manifest, choice, checkpoint, where, precision)
        make = functools.partial(_make_decoder, compiler, folder, manifest, where, inner)
        return cls(manifest, vision, *_load_decoder(checkpoint, where, precision, make))

    def stream(
        self,
        video: str | Path | Tensor | NDArray[Any] | Clip,
        prompt: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        system: str | None = None,
    ) -> Generator[Delta, None, None]:
        """Answer a question about a video, token by token.

        Args:
            video: a file, decoded frames (uint8 [n, 3, h, w] or [n, h, w, 3], n >= 2), or a `Clip`.
            prompt: the question.
            max_new_tokens, sampling: of the decoder.
            system: a system message before the question.

        Yields:
            a `Delta` per token, then one with `finish` and `answer`. Closing the generator ends the request.

        Raises:
            UserError: while iterating: a video or a prompt that cannot be used.
            RuntimeError: while iterating: another stream has neither ended nor been closed, or the pipeline is closed.
        """
        # The engine's and the decoder's buffers are used again by every request.
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "this pipeline is answering another request: finish or close that stream first, let threads take turns "
                "with a lock of yours, or load one pipeline for each"
            )
        try:
            yield from self._answer(video, prompt, max_new_tokens, sampling, system)
        finally:
            self._busy.release()

    def _answer(
        self,
        video: str | Path | Tensor | NDArray[Any] | Clip,
        prompt: str,
        max_new_tokens: int,
        sampling: Sampling,
        system: str | None,
    ) -> Generator[Delta, None, None]:
        """One request, by its only holder."""
        decoder = self.decoder
        if decoder is None:
            raise RuntimeError("this pipeline is closed")
        started = time.perf_counter()
        words = build_prompt(self._tokenizer, prompt, system=system)
        check_length(
            words,
            visual_tokens=self.manifest.tokens + 1,
            new_tokens=max_new_tokens,
            context=decoder.limit,
        )
        clip = self._clip(video)
        vision = _Stopwatch(decoder.device)
        tokens, _ = self.vision.encode(clip.frames)
        vision.stop()
        embeds = splice(words, tokens.to(decoder.device), self._newline, decoder.embed)
        source = decoder.stream(
            embeds,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stops,
            sampling=sampling,
            visual=words.visual_span(len(tokens) + 1),
        )
        text = TextStream(self._tokenizer)
        ids: list[int] = []
        parts: list[str] = []
        steps: list[tuple[float, float]] = []  # begin and end of each; between two of them the caller has its time
        finish: Finish = "length"
        with closing(source):  # and not left to the garbage: a traceback would keep it, and so the decoder busy
            while True:
                begun = time.perf_counter()
                try:
                    token = next(source)
                except StopIteration as end:
                    finish = end.value
                    break
                finally:
                    steps.append((begun, time.perf_counter()))
                ids.append(token)
                parts.append(text.push(token))
                yield Delta(parts[-1], token)
        parts.append(text.finish())
        first, further = steps[0][1], steps[1 : len(ids)]
        timings = Timings(
            decode=clip.decode_seconds,
            preprocess=clip.preprocess_seconds,
            vision=vision.seconds(),
            prefill=first - vision.started - vision.seconds(),
            first_token=first - started,
            per_token=sum(end - begun for begun, end in further) / len(further) if further else 0.0,
            total=time.perf_counter() - started,
        )
        answer = Answer("".join(parts), tuple(ids), finish, timings, len(tokens))
        yield Delta(parts[-1], None, finish, answer)

    def ask(
        self,
        video: str | Path | Tensor | NDArray[Any] | Clip,
        prompt: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        system: str | None = None,
    ) -> Answer:
        """`stream`, waited for. Arguments and errors as there."""
        answer: Answer | None = None
        for delta in self.stream(video, prompt, max_new_tokens=max_new_tokens, sampling=sampling, system=system):
            answer = delta.answer
        assert answer is not None  # the last delta has it
        return answer

    def close(self) -> None:
        """Free the engine and the decoder; a stream under way may finish. A second call does nothing."""
        self.vision.close()
        self.decoder = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _clip(self, video: str | Path | Tensor | NDArray[Any] | Clip) -> Clip:
        if isinstance(video, Clip):  # decoded before this request
            return dataclasses.replace(video, decode_seconds=0.0, preprocess_seconds=0.0)
        size = self.manifest.model.preprocessing.size
        if isinstance(video, (str, Path)):
            return load_clip(video, self.manifest.frames, size)
        return clip_from_frames(video, self.manifest.frames, size)


class _Stopwatch:
    """Seconds between its creation and `stop`: on a GPU by events on the stream, which waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.events: list[Any] = []
        self.started = self.stopped = time.perf_counter()
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()

    def stop(self) -> None:
        self.stopped = time.perf_counter()
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """Valid once the host has waited for the device, as it does for every token."""
        if self.events:
            return self.events[0].elapsed_time(self.events[1]) / 1000
        return self.stopped - self.started


def _open_vision(
    folder: Path, manifest: Manifest, backend: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> VisionBackend:
    if backend != "torch":
        return open_backend(backend, folder, manifest)
    from runtime.backends.torch import TorchVision

    shape = (manifest.frames, 3, *manifest.model.preprocessing.size)
    return TorchVision(checkpoint, EarlyTomConfig.from_dict(manifest.earlytom), shape, device=device, dtype=dtype)


def _open_compiler(decoder: str, device: torch.device) -> Compiler | None:
    """The compiler of one of `DECODERS`, None for "torch", which needs none."""
    if decoder not in DECODERS:
        raise EngineError(f"unknown decoder {decoder!r}: expected one of {', '.join(DECODERS)} (--decoder)")
    if decoder == "torch":
        return None
    from runtime.decoder_compiler import TorchTensorRT

    return TorchTensorRT(device)


def _make_decoder(
    compiler: Compiler | None,
    folder: Path,
    manifest: Manifest,
    device: torch.device,
    inner: InnerMerge | None,
    model: Any,
) -> Decoder:
    """The decoder of a model, whose layers go to the device, or into compiled programs there."""
    if compiler is None:
        torch.nn.Module.to(model, device)
        return Decoder.from_model(model, inner=inner)
    from runtime.compiled_decoder import CompiledDecoder, default_size
    from runtime.program_store import ProgramStore

    size = default_size(manifest.tokens + 1, model.get_decoder().config.max_position_embeddings)
    return CompiledDecoder.compile(model, compiler, ProgramStore(folder / DECODER_FOLDER), [size])


def _load_decoder(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, make: Callable[[Any], Decoder]
) -> tuple[Decoder, Tensor, Any, Any]:
    """Decoder, `image_newline`, tokenizer and stop ids. The checkpoint's own vision tower is let go."""
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, dtype)
    stops = stop_token_ids(model.generation_config, tokenizer)
    del model.model.vision_tower, model.model.multi_modal_projector
    return make(model), model.model.image_newline.detach().to(device), tokenizer, stops
