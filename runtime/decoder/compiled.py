"""The LLM decoder compiled with torch-tensorrt: the interface of `runtime.decoder.eager.Decoder` on compiled programs.

For each size (prompt bucket, cache bucket) there are two compiled programs, a prefill and a decode step (see
`runtime.decoder.programs`). They are loaded from a `ProgramStore`, or exported, compiled, compared with PyTorch and
stored there, which takes minutes; nothing is compiled after that. Each program holds its own copy of the layers'
weights, so the model's are moved off the device and freed.

    compiler = TorchTensorRT(torch.device("cuda"))
    decoder = CompiledDecoder.compile(model, compiler, ProgramStore(folder), sizes=[Size(768, 1280)])
    for token in decoder.stream(embeds, max_new_tokens=64): ...

Programs take positions and a bias only if they were made with `placed=True`, as these are additional inputs of every
call.

A program is stored only if the program loaded from its file agrees with PyTorch on an example within `TOLERANCE`: a
wrong mask or slot is an error at compile time, not a strange answer later.

Compilation itself is unverified without a GPU: tests on a CPU run the exported programs in place of compiled ones.
"""

from __future__ import annotations

import errno
import logging
import tempfile
import threading
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram

from earlytom.errors import UserError
from earlytom.inner_decoder import InnerPrompt
from runtime.decoder.compiler import REMEDY, Compiler
from runtime.decoder.eager import Decoder, Finish
from runtime.decoder.placing import Placed
from runtime.decoder.prefix import Prefix
from runtime.decoder.programs import (
    FAMILY,
    REVISION,
    Program,
    ProgramSize,
    empty_caches,
    example_inputs,
    export_program,
    weights_digest,
)
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.decoder.store import Identity, ProgramStore
from runtime.errors import EngineError

# Largest error of a compiled program's outputs, relative to their largest value. A wrong mask or slot gives about 1.
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.1}
# Tokens that `default_size` allows for text in the prompt and for the answer; prompts are rounded up to a STEP.
TEXT_TOKENS, ANSWER_TOKENS, STEP = 256, 512, 64

_NO_PREFIX = (
    "the compiled decoder cannot keep the beginning of a prompt for several questions: use --decoder torch, or ask "
    "without a prefix"
)
_NO_STATES = "compiled programs take no states of layers and one position a token: use --decoder torch"
_NO_PLACES = (
    "this compiled decoder was made without positions and attention bias: use --decoder torch, or --no-bias "
    "--positions consecutive"
)

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # torch exports and loads programs in one thread only: they keep global state


class Size(NamedTuple):
    """The longest prompt, and the capacity of the cache for prompt and answer, in tokens."""

    prompt: int
    cache: int


def default_size(visual_tokens: int, context: int) -> Size:
    """The default size for prompts with that many visual tokens, within the model's context."""
    prompt = -(-(visual_tokens + TEXT_TOKENS) // STEP) * STEP
    cache = min(prompt + ANSWER_TOKENS, context)
    return Size(min(prompt, cache - 1), cache)


@dataclass
class _Request:
    """The state of one answer: cache slots it may need; from the prefill on its size, last slot and caches."""

    slots: int
    size: Size | None = None
    last: Tensor | None = None  # int64 [1]
    places: tuple[Tensor, ...] = ()  # for `placed` programs: the last position, int64 [1], and the bias, fp32 [C]
    steps: None = None  # the attribute of `DecoderCache`, which `places` replace here
    caches: tuple[Tensor, ...] = ()


class CompiledDecoder(Decoder):
    """A `Decoder` whose prefill and decode steps are compiled programs; made by `compile`.

    Attributes:
        sizes: the sizes with programs, the smallest first.
        placed: whether the programs take positions and a bias.
        limit, buckets: as in `Decoder`, of the caches.
    """

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        programs: Mapping[ProgramSize, Program],
        sizes: Sequence[Size],
        *,
        placed: bool = False,
    ) -> None:
        self.placed = placed
        self.sizes = tuple(sorted(set(sizes), key=lambda size: (size.cache, size.prompt)))
        super().__init__(language_model, lm_head, buckets=[size.cache for size in self.sizes])
        self._programs = dict(programs)
        # Every request starts from these: programs change nothing in place, so they stay empty.
        self._empty = {n: empty_caches(self._config, n, self.dtype, self.device) for n in self.buckets}
        self.replay.refuse("the decode steps are compiled programs")
        del self._language_model, self._lm_head  # the programs hold the weights

    @classmethod
    def compile(
        cls, model: Any, compiler: Compiler, store: ProgramStore, sizes: Sequence[Size], *, placed: bool = False
    ) -> CompiledDecoder:
        """The compiled decoder of a transformers model with a Qwen2 decoder.

        Args:
            model: as for `Decoder.from_model`, in the dtype to run in, on any device. It is given away: its layers end
                on the CPU, and go with it.
            compiler: makes and loads programs.
            store: where they are kept.
            sizes: prompts and caches to compile for; a request takes the smallest that holds it.
            placed: make programs that take positions and a bias.

        Raises:
            EngineError: another family of models; a program that cannot be compiled, or computes something else.
            ValueError: no size, or one that does not fit the model's context.
            OSError: the store has no room. One that may not be written is said (`logging`), and its programs are not
                kept.
        """
        language_model, lm_head = model.get_decoder().eval(), model.get_output_embeddings().eval()
        config = language_model.config
        if config.model_type != FAMILY:
            raise EngineError(f"only a {FAMILY} decoder can be compiled, this model's is {config.model_type}: {REMEDY}")
        for size in sizes:
            if not 2 <= size.prompt < size.cache <= config.max_position_embeddings:
                raise ValueError(
                    f"a size needs 2 <= prompt < cache <= {config.max_position_embeddings}, got {tuple(size)}"
                )
        wanted = sorted({ProgramSize(size.cache, tokens, placed) for size in sizes for tokens in (size.prompt, 1)})
        with _one_at_a_time, tempfile.TemporaryDirectory(prefix="programs-") as spare:
            source = _Source(language_model, lm_head, compiler, store, ProgramStore(Path(spare)))
            files = {size: source.file(size) for size in wanted}
            language_model.to("cpu")  # before loading: the GPU may not hold the model and its programs
            lm_head.to("cpu")
            programs = {size: compiler.load(file) for size, file in files.items()}
        language_model.get_input_embeddings().to(compiler.device)
        made = cls(language_model, lm_head, programs, sizes, placed=placed)
        made._warm_up()
        return made

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run every program once, so that no request pays for the initialisation of a first run."""
        last = torch.zeros(1, dtype=torch.int64, device=self.device)
        for size, program in self._programs.items():
            embeds = torch.zeros(1, size.tokens, self._width, dtype=self.dtype, device=self.device)
            program(embeds, last, *self._places(size, None), *self._empty[size.cache])

    def _places(self, size: ProgramSize, placed: Placed | None) -> tuple[Tensor, ...]:
        """Padded positions [L] and bias [C] of a prompt, for `placed` programs; else nothing."""
        if not self.placed:
            return ()
        positions = torch.arange(size.tokens, device=self.device) if placed is None else placed.positions
        bias = torch.zeros(size.cache, device=self.device) if placed is None or placed.bias is None else placed.bias
        return (
            nn.functional.pad(positions, (0, size.tokens - len(positions))),
            nn.functional.pad(bias, (0, size.cache - len(bias))),
        )

    def warm_up(self, lengths: Iterable[int], *, positions: bool = False, bias: bool = False) -> None:
        """Nothing to do: `compile` has run every program."""

    def prefill(
        self,
        inputs_embeds: Tensor,
        visual: Sequence[int] | None = None,
        *,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Prefix:
        """Always raises UserError: the compiled prefill starts from an empty cache, so it cannot continue a prefix."""
        raise UserError(_NO_PREFIX)

    def stream(
        self,
        inputs_embeds: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        visual: Sequence[int] | None = None,
        prefix: Prefix | None = None,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Generator[int, None, Finish]:
        """As `Decoder.stream`. Also raises UserError for a prompt that fits no size, a prefix, states of layers,
        positions on several axes and, unless `placed`, positions or a bias.
        """
        if prefix is not None:
            raise UserError(_NO_PREFIX)
        if states is not None or (positions is not None and positions.dim() > 1):
            raise UserError(_NO_STATES)
        if not self.placed and (positions is not None or bias is not None):
            raise UserError(_NO_PLACES)
        tokens = super().stream(
            inputs_embeds,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            visual=visual,
            positions=positions,
            bias=bias,
        )
        length = inputs_embeds.shape[1]
        if self._size(length, length + max_new_tokens) is None:
            known = ", ".join(f"{size.prompt} of {size.cache}" for size in self.sizes)
            raise UserError(
                f"a prompt of {length} tokens and {max_new_tokens} new ones fit none of the sizes that the decoder was "
                f"compiled for (prompt of all: {known}): shorten the question, lower --max-new-tokens, or {REMEDY}"
            )
        return tokens

    def _size(self, prompt: int, slots: int) -> Size | None:
        return next((size for size in self.sizes if prompt <= size.prompt and slots <= size.cache), None)

    def _cleared_cache(self, length: int, placed: Placed | None = None) -> Any:
        return _Request(length)

    @torch.inference_mode()
    def _advance(self, cache: Any, merged: InnerPrompt | None) -> None:
        self._step(cache, merged)  # no CUDA graph: a program's caches are new tensors after each step

    @torch.inference_mode()
    def _forward(
        self,
        embeds: Tensor,
        cache: Any,
        merged: InnerPrompt | None = None,
        start: int | None = None,
        placed: Placed | None = None,
    ) -> Tensor:
        request = cast(_Request, cache)
        if request.size is None or request.last is None:
            length = embeds.shape[1]
            request.size = self._size(length, request.slots)
            assert request.size is not None  # `stream` has looked
            request.caches = self._empty[request.size.cache]
            request.last = torch.full((1,), length - 1, device=self.device)
            embeds = nn.functional.pad(embeds, (0, 0, 0, request.size.prompt - length))
            places = self._places(ProgramSize(request.size.cache, request.size.prompt), placed)
            request.places = (places[0][length - 1 : length], places[1]) if places else ()
        else:
            request.last = request.last + 1  # computed on the device, without a copy from the host
            if request.places:
                request.places = (request.places[0] + 1, request.places[1])
            places = request.places
        program = self._programs[ProgramSize(request.size.cache, embeds.shape[1], self.placed)]
        logits, *caches = program(embeds, request.last, *places, *request.caches)
        request.caches = tuple(caches)
        return logits[0]


class _Source:
    """Gets the programs of one model from the store, else from the compiler.

    `spare`: a temporary store, for programs that cannot be kept.
    """

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        compiler: Compiler,
        store: ProgramStore,
        spare: ProgramStore,
    ) -> None:
        self._language_model, self._lm_head = language_model, lm_head
        self._compiler, self._store, self._spare = compiler, store, spare
        self._said = False  # whether the warning that programs are not kept was logged
        weight = next(language_model.parameters())
        self._identity: dict[str, str | int] = {
            "weights": weights_digest(language_model, lm_head),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "programs": REVISION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **compiler.identity(),
        }

    def file(self, size: ProgramSize) -> Path:
        """The file of one size's compiled program; compiled, checked and stored if the store does not have it."""
        identity: Identity = {"kind": size.kind, "tokens": size.tokens, "cache": size.cache, **self._identity}
        if size.placed:  # left out of the others, so that older stores still match
            identity = {**identity, "placed": 1}
        if (file := self._store.find(identity)) is not None:  # without the lock: the store may be read-only
            return file
        try:
            return self._made(self._store, identity, size)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            if not self._said:
                _log.warning("%s cannot be written (%s): programs are not kept", self._store.folder, error.strerror)
            self._said = True
        return self._made(self._spare, identity, size)

    def _made(self, store: ProgramStore, identity: Identity, size: ProgramSize) -> Path:
        with store.locked(identity):
            if (file := store.find(identity)) is not None:  # another process has made it meanwhile
                return file
            if (place := store.path(identity)).exists():
                _log.warning("%s is not the program that was recorded: it is compiled again, not loaded", place)
            return store.add(identity, lambda file: self._make(size, file))

    def _make(self, size: ProgramSize, file: Path) -> dict[str, float]:
        """Compile the program to its file, and check the program loaded from it."""
        for module in (self._language_model, self._lm_head):
            module.to(self._compiler.device)
        started = time.perf_counter()
        exported = export_program(self._language_model, self._lm_head, size)
        exporting = time.perf_counter()
        self._compiler.compile(exported, file)
        compiling = time.perf_counter()
        return {
            "export_seconds": exporting - started,
            "compile_seconds": compiling - exporting,
            "relative_error": self._check(size, exported, self._compiler.load(file)),
        }

    @torch.inference_mode()
    def _check(self, size: ProgramSize, exported: ExportedProgram, program: Program) -> float:
        """The largest error of the program's outputs on an example, relative to each output's largest value."""
        inputs = example_inputs(self._language_model, size)
        dtype, name = inputs[0].dtype, str(inputs[0].dtype).removeprefix("torch.")
        expected = exported.module()(*inputs)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in expected):
            raise EngineError(
                f"the language model's values overflow in {name}, so no compiled program can be compared with it: "
                "load it in bfloat16 or float32"
            )
        pairs = zip(program(*inputs), expected, strict=True)
        error = float(torch.stack([_relative_error(got.float(), want.float()) for got, want in pairs]).max())
        if not error <= TOLERANCE[dtype]:  # or it is NaN
            raise EngineError(
                f"the compiled {size.kind} program computes something else than PyTorch (relative error {error:.2g}, "
                f"allowed {TOLERANCE[dtype]}), so it is not kept: {REMEDY}"
            )
        return error


def _relative_error(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).abs().max() / want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
